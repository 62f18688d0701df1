package cli

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/pkg/config"
)

// entryItem is an entry as commands print it and read it from files. The names
// are those of the contracts.
type entryItem struct {
	ID                      string          `json:"id" yaml:"id"`
	SPIFFEID                string          `json:"spiffe_id" yaml:"spiffe_id"`
	ParentID                string          `json:"parent_id" yaml:"parent_id"`
	Selectors               []string        `json:"selectors" yaml:"selectors"`
	X509SVIDTTL             config.Duration `json:"x509_svid_ttl,omitzero" yaml:"x509_svid_ttl"`
	JWTSVIDTTL              config.Duration `json:"jwt_svid_ttl,omitzero" yaml:"jwt_svid_ttl"`
	DNSNames                []string        `json:"dns_names,omitempty" yaml:"dns_names"`
	FederatesWith           []string        `json:"federates_with,omitempty" yaml:"federates_with"`
	Hint                    string          `json:"hint,omitempty" yaml:"hint"`
	Admin                   bool            `json:"admin,omitempty" yaml:"admin"`
	Downstream              bool            `json:"downstream,omitempty" yaml:"downstream"`
	StoreSVID               bool            `json:"store_svid,omitempty" yaml:"store_svid"`
	DisableX509SVIDPrefetch bool            `json:"disable_x509_svid_prefetch,omitempty" yaml:"disable_x509_svid_prefetch"`
	JWTSVIDIncludeJTI       bool            `json:"jwt_svid_include_jti,omitempty" yaml:"jwt_svid_include_jti"`
	ExpiresAt               *time.Time      `json:"expires_at,omitempty" yaml:"expires_at"`

	// Set by the server; read from files, so that what was listed can be
	// created again, but of no effect there.
	CreatedAt      *time.Time `json:"created_at,omitempty" yaml:"created_at"`
	RevisionNumber int64      `json:"revision_number" yaml:"revision_number"`
}

func entryOf(e *types.Entry) entryItem {
	return entryItem{
		ID: e.Id, SPIFFEID: idText(e.SpiffeId), ParentID: idText(e.ParentId),
		Selectors:   selectorTexts(e.Selectors),
		X509SVIDTTL: config.Duration(time.Duration(e.X509SvidTtl) * time.Second),
		JWTSVIDTTL:  config.Duration(time.Duration(e.JwtSvidTtl) * time.Second),
		DNSNames:    e.DnsNames, FederatesWith: e.FederatesWith, Hint: e.Hint,
		Admin: e.Admin, Downstream: e.Downstream, StoreSVID: e.StoreSvid,
		DisableX509SVIDPrefetch: e.GetAdditionalAttributes().GetDisableX509SvidPrefetch(),
		JWTSVIDIncludeJTI:       e.GetAdditionalAttributes().GetJwtSvidIncludeJti(),
		ExpiresAt:               timestamp(e.ExpiresAt), CreatedAt: timestamp(e.CreatedAt),
		RevisionNumber: e.RevisionNumber,
	}
}

func entriesOf(entries []*types.Entry) []entryItem {
	out := make([]entryItem, len(entries))
	for i, e := range entries {
		out[i] = entryOf(e)
	}
	return out
}

func selectorTexts(selectors []*types.Selector) []string {
	out := make([]string, len(selectors))
	for i, s := range selectors {
		out[i] = s.Type + ":" + s.Value
	}
	return out
}

// entry is the item as the contracts have it.
func (i *entryItem) entry(ctx context.Context, c *admin) (*types.Entry, error) {
	switch {
	case i.SPIFFEID == "":
		return nil, fmt.Errorf("an entry has no spiffe_id")
	case i.ParentID == "":
		return nil, fmt.Errorf("the entry of %s has no parent_id", i.SPIFFEID)
	case len(i.Selectors) == 0:
		return nil, fmt.Errorf("the entry of %s has no selectors", i.SPIFFEID)
	}
	e := &types.Entry{
		Id: i.ID, DnsNames: i.DNSNames, FederatesWith: i.FederatesWith, Hint: i.Hint,
		Admin: i.Admin, Downstream: i.Downstream, StoreSvid: i.StoreSVID,
	}
	var err error
	if e.SpiffeId, err = c.id(ctx, "spiffe_id", i.SPIFFEID); err != nil {
		return nil, err
	}
	if e.ParentId, err = c.id(ctx, "parent_id", i.ParentID); err != nil {
		return nil, err
	}
	if e.Selectors, err = selectors(i.Selectors); err != nil {
		return nil, err
	}
	if e.X509SvidTtl, err = (&duration{i.X509SVIDTTL}).seconds("x509_svid_ttl"); err != nil {
		return nil, err
	}
	if e.JwtSvidTtl, err = (&duration{i.JWTSVIDTTL}).seconds("jwt_svid_ttl"); err != nil {
		return nil, err
	}
	if i.DisableX509SVIDPrefetch || i.JWTSVIDIncludeJTI {
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: i.DisableX509SVIDPrefetch, JwtSvidIncludeJti: i.JWTSVIDIncludeJTI,
		}
	}
	if i.ExpiresAt != nil {
		e.ExpiresAt = i.ExpiresAt.Unix()
	}
	return e, nil
}

// marks are the flags of an entry in one word each.
func marks(e *types.Entry) []string {
	var out []string
	for _, m := range []struct {
		on   bool
		name string
	}{
		{e.Admin, "admin"}, {e.Downstream, "downstream"}, {e.StoreSvid, "store"},
		{e.GetAdditionalAttributes().GetDisableX509SvidPrefetch(), "no prefetch"},
		{e.GetAdditionalAttributes().GetJwtSvidIncludeJti(), "jti"},
	} {
		if m.on {
			out = append(out, m.name)
		}
	}
	return out
}

// ttl shows a lifetime of an entry; zero is the server's default.
func ttl(seconds int32) string {
	if seconds == 0 {
		return "server's default"
	}
	return config.Duration(time.Duration(seconds) * time.Second).String()
}

func (a *app) showEntry(w io.Writer, e *types.Entry) {
	d := details{style: a.style}
	d.addPainted("SPIFFE ID", a.style.bold, idText(e.SpiffeId))
	d.add("Entry ID", e.Id)
	d.add("Parent", idText(e.ParentId))
	d.add("Selectors", selectorTexts(e.Selectors)...)
	d.add("X509-SVID lifetime", ttl(e.X509SvidTtl))
	d.add("JWT-SVID lifetime", ttl(e.JwtSvidTtl))
	d.add("DNS names", e.DnsNames...)
	d.add("Federates with", e.FederatesWith...)
	d.add("Hint", e.Hint)
	d.add("Marks", strings.Join(marks(e), ", "))
	if e.ExpiresAt != 0 {
		d.add("Expires", a.moment(time.Unix(e.ExpiresAt, 0)))
	}
	if e.CreatedAt != 0 {
		d.add("Created", a.moment(time.Unix(e.CreatedAt, 0)))
	}
	d.add("Revision", fmt.Sprint(e.RevisionNumber))
	io.WriteString(w, d.String())
}

func (a *app) printEntries(entries []*types.Entry) error {
	return a.print(entriesOf(entries), func(w io.Writer) {
		if len(entries) == 0 {
			return
		}
		t := table{style: a.style, header: []string{"SPIFFE ID", "SELECTORS", "PARENT", "HINT", "MARKS", "EXPIRES", "ENTRY ID"}}
		for _, e := range entries {
			parent := idText(e.ParentId)
			if e.ParentId.GetTrustDomain() == e.SpiffeId.GetTrustDomain() {
				parent = e.ParentId.GetPath()
			}
			expires := cell{}
			if e.ExpiresAt != 0 {
				expires = text(a.relative(time.Unix(e.ExpiresAt, 0)))
			}
			t.add(painted(a.style.bold, idText(e.SpiffeId)), text(selectorTexts(e.Selectors)...), text(parent),
				text(e.Hint), text(marks(e)...), expires, painted(a.style.dim, e.Id))
		}
		io.WriteString(w, t.String())
	})
}
