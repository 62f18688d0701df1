package cli

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// chainItem is an X.509 authority with all that is above it.
type chainItem struct {
	ID     string             `json:"id"`
	State  string             `json:"state"` // prepared, active, old or tainted
	Server string             `json:"server"`
	Chain  []*certificateItem `json:"chain"` // its own first, the root last
}

// certificateItem is a certificate of a chain.
type certificateItem struct {
	Subject   string     `json:"subject"`
	KeyID     string     `json:"key_id"`
	ExpiresAt *time.Time `json:"expires_at"`
	Root      bool       `json:"root"`    // it is in the bundle
	Tainted   bool       `json:"tainted"` // its mark in the bundle
}

// upstreamItem is the authority above a server's.
type upstreamItem struct {
	Kind     string                `json:"kind"`
	Address  string                `json:"address"`
	Requests []upstreamRequestItem `json:"requests"`
}

// upstreamRequestItem is one thing that it is asked for.
type upstreamRequestItem struct {
	What         string     `json:"what"` // sign, publish or bundle
	SucceededAt  *time.Time `json:"succeeded_at"`
	Failure      string     `json:"failure,omitempty"`
	FailingSince *time.Time `json:"failing_since"`
	NextTry      *time.Time `json:"next_try"`
}

// authorityShow is what "authority show" prints.
type authorityShow struct {
	Upstream    *upstreamItem `json:"upstream"` // null: there is none
	Authorities []chainItem   `json:"authorities"`
}

func (a *app) authorityShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show [ID]",
		Short: "show an X.509 authority up to its root",
		Long: "Show prints the X.509 authorities that sign, or the one with an ID, each with the\n" +
			"certificates above it up to the root in the bundle, and when each expires; and how the\n" +
			"upstream authority of the server is doing, if it has one.",
		Example: "  hallmark authority show\n  hallmark authority show 5b1a9c0e8d7f6a5b4c3d2e1f0a9b8c7d6e5f4a3b -o json",
		Args:    arguments(0, 1, "the ID that \"hallmark authority list\" shows, or nothing"),
	}
	socket := socketFlag(cmd, serverSocket)
	a.outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.withAuthorities(cmd, *socket, func(ctx context.Context, c *admin) error {
			resp, err := c.server().ListAuthorities(ctx, &hallmarkv1.ListAuthoritiesRequest{})
			if err != nil {
				return rpcError("list authorities", err)
			}
			shown := authorityShow{Upstream: upstreamOf(resp.Upstream), Authorities: []chainItem{}}
			for _, x := range resp.Authorities {
				item := authorityOf(x)
				if item.Kind != "x509" || len(args) == 1 && item.ID != args[0] || len(args) == 0 && item.State != "active" {
					continue
				}
				chain, err := chainOf(x, resp.Roots)
				if err != nil {
					return err
				}
				shown.Authorities = append(shown.Authorities, chainItem{ID: item.ID, State: item.condition(), Server: item.Server, Chain: chain})
			}
			if len(args) == 1 && len(shown.Authorities) == 0 {
				return &failure{code: exitNotFound, err: fmt.Errorf("there is no x509 authority %s", printable(args[0])), remedy: "\"hallmark authority list\" shows them."}
			}
			return a.print(shown, func(w io.Writer) { a.writeChains(w, shown) })
		})
	}
	return cmd
}

// chainOf returns the certificates of an authority, and the root that they lead
// to.
func chainOf(x *hallmarkv1.Authority, roots []*hallmarkv1.X509Authority) ([]*certificateItem, error) {
	var chain []*certificateItem
	item := func(c *x509.Certificate) *certificateItem {
		return &certificateItem{Subject: c.Subject.String(), KeyID: hex.EncodeToString(c.SubjectKeyId), ExpiresAt: &c.NotAfter}
	}
	var last *x509.Certificate
	for _, der := range x.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("a certificate of authority %s: %w", printable(x.Id), err)
		}
		chain, last = append(chain, item(c)), c
	}
	for _, r := range roots {
		root, err := x509.ParseCertificate(r.Asn1)
		if err != nil {
			return nil, fmt.Errorf("a certificate of the bundle: %w", err)
		}
		switch {
		case last == nil:
		case root.Equal(last):
			chain[len(chain)-1].Root, chain[len(chain)-1].Tainted = true, r.Tainted
			return chain, nil
		case last.CheckSignatureFrom(root) == nil:
			above := item(root)
			above.Root, above.Tainted = true, r.Tainted
			return append(chain, above), nil
		}
	}
	return chain, nil
}

func upstreamOf(u *hallmarkv1.Upstream) *upstreamItem {
	if u == nil {
		return nil
	}
	item := &upstreamItem{Kind: u.Kind, Address: u.Address, Requests: []upstreamRequestItem{}}
	for _, q := range u.Requests {
		item.Requests = append(item.Requests, upstreamRequestItem{
			What: q.GetWhat(), SucceededAt: timestamp(q.GetSucceededAt()), Failure: q.GetFailure(),
			FailingSince: timestamp(q.GetFailingSince()), NextTry: timestamp(q.GetNextTry()),
		})
	}
	return item
}

func (a *app) writeChains(w io.Writer, shown authorityShow) {
	for _, x := range shown.Authorities {
		fmt.Fprintf(w, "%s  %s on %s\n", a.style.bold(printable(x.ID)), a.paintAuthority(x.State)(x.State), printable(x.Server))
		for i, c := range x.Chain {
			what := ""
			if c.Root {
				what = "  root"
			}
			if c.Tainted {
				what += ", " + a.style.yellow("tainted")
			}
			fmt.Fprintf(w, "%s%s\n%s  key %s, ends %s%s\n", strings.Repeat("  ", i+1), printable(c.Subject), strings.Repeat("  ", i+1), c.KeyID, a.momentOf(c.ExpiresAt), what)
		}
		if n := len(x.Chain); n > 0 && !x.Chain[n-1].Root {
			fmt.Fprintf(w, "  %s\n", a.style.yellow("it leads to no root of the bundle"))
		}
	}
	if len(shown.Authorities) == 0 {
		fmt.Fprintln(w, "No X.509 authority is active.")
	}
	a.writeUpstream(w, shown.Upstream)
}

// writeUpstream says how the authority above is doing.
func (a *app) writeUpstream(w io.Writer, u *upstreamItem) {
	if u == nil {
		return
	}
	fmt.Fprintf(w, "\nUpstream  %s, %s\n", printable(u.Kind), printable(u.Address))
	if len(u.Requests) == 0 {
		fmt.Fprintln(w, "  not asked since the server started")
	}
	for _, q := range u.Requests {
		if q.Failure == "" {
			fmt.Fprintf(w, "  %-8s %s %s\n", q.What, a.style.green("ok"), a.momentOf(q.SucceededAt))
			continue
		}
		fmt.Fprintf(w, "  %-8s %s since %s, next try %s\n           last error: %s\n", q.What, a.style.red("failing"), a.momentOf(q.FailingSince), a.momentOf(q.NextTry), printable(q.Failure))
	}
}

// endUpstream takes trust away from a root of the authority above.
func (a *app) endUpstream(ctx context.Context, e ending, c *admin, id string, yes bool) error {
	warning := fmt.Sprintf("This taints the upstream's root with the key ID %s: agents replace at once all that leads to it.\nWhat leads to it goes on to verify until it is revoked.", printable(id))
	if e.use == "revoke" {
		warning = fmt.Sprintf("This revokes the upstream's root with the key ID %s: it leaves the bundle, and nothing that leads to it verifies any more.\nThis cannot be undone.", printable(id))
	}
	if yes {
		a.remark("%s", warning)
	}
	if err := a.confirm(yes, true, warning); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	s := localauthorityv1.NewLocalAuthorityClient(c)
	var err error
	done := "is tainted: agents replace what leads to it."
	if e.use == "revoke" {
		done = "is revoked: what leads to it verifies no more."
		_, err = s.RevokeX509UpstreamAuthority(ctx, &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: id})
	} else {
		_, err = s.TaintX509UpstreamAuthority(ctx, &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: id})
	}
	if err != nil {
		return rpcError(e.use+" the upstream's root "+id, err)
	}
	return a.printChange("upstream", e.state, &authorityState{AuthorityId: id}, done)
}
