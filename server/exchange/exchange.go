// Package exchange is the token endpoint of the trust domain: it takes tokens of
// outside issuers that are trusted, and gives SVIDs for them. It speaks OAuth
// 2.0: token exchange (RFC 8693) and JWT assertions (RFC 7523), with metadata
// (RFC 8414). An [Exchange], made by [New], is an HTTP handler.
//
// A token is evidence like any other. What is verified of it becomes selectors;
// the registration entries below the issuer's ID whose selectors are all among
// them decide which identities it may have. What is issued is issued by
// [issue.Issuer] and recorded.
package exchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
)

const (
	maxIssuers = 100     // more is a mistake in writing
	maxUses    = 200_000 // tokens that are remembered; about 150 bytes each
	verifyTime = 15 * time.Second
	maxNamed   = 20 // of SPIFFE IDs in an error

	// MaxBody is how long a request may be, in bytes: a token, a certificate
	// signing request and many audiences, encoded.
	MaxBody = 128 << 10
)

// Options of [New]. Log, Now and Metrics may be nil; what has no other remark is
// required for serving, and not for checking a configuration.
type Options struct {
	TrustDomain spiffeid.TrustDomain // always
	Issuer      string               // the endpoint's own URL, as metadata has it; always
	Issuers     []IssuerConfig       // at least one; always

	Registry *registry.Registry
	Sign     *issue.Issuer
	WIT      bool // WIT-SVIDs may be asked for
	// Limit counts a request from an address (host:port) against its rate, and one
	// signature for an issuer against that of the issuer. An error is that there
	// were too many.
	LimitAddress func(ctx context.Context, address string) error
	LimitIssuer  func(ctx context.Context, name string) error
	Log          *slog.Logger
	Metrics      *metrics.Metrics
	Now          func() time.Time
}

// bundleOf returns what returns the newest bundle of a trust domain.
func (o *Options) bundleOf(td spiffeid.TrustDomain) func() *bundle.Bundle {
	return func() *bundle.Bundle { return o.Registry.View().Bundle(td) }
}

// Exchange is the token endpoint. It is safe for concurrent use.
type Exchange struct {
	o       Options
	path    string              // of the issuer URL
	issuers map[string]*trusted // by URL, or ID of the trust domain
	uses    *issuer.Uses
}

// New makes the endpoint. It fails if the configuration contradicts itself.
func New(o Options) (*Exchange, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	u, err := parseIssuer(o.Issuer)
	if err != nil {
		return nil, fmt.Errorf("issuer: %w", err)
	}
	switch n := len(o.Issuers); {
	case n == 0:
		return nil, errors.New("issuers is missing; name the issuers whose tokens may be exchanged")
	case n > maxIssuers:
		return nil, fmt.Errorf("issuers has %d; the most is %d", n, maxIssuers)
	}
	x := &Exchange{o: o, path: u.Path, issuers: make(map[string]*trusted), uses: issuer.NewUses(maxUses)}
	names := make(map[string]bool)
	for _, c := range o.Issuers {
		made, err := newTrusted(c, &x.o)
		switch {
		case err != nil:
			return nil, fmt.Errorf("issuer %q: %w", attestors.Clip(c.Name), err)
		case names[c.Name]:
			return nil, fmt.Errorf("issuer %q is there twice", c.Name)
		case x.issuers[made.URL()] != nil:
			return nil, fmt.Errorf("issuer %q: %s is there already, under another name", c.Name, made.URL())
		}
		names[c.Name], x.issuers[made.URL()] = true, made
	}
	return x, nil
}

// Evidence is what a token says.
type Evidence struct {
	Token     *issuer.Token
	Issuer    string      // its name
	Parent    spiffeid.ID // of the entries for it
	Selectors selector.Set
	of        *trusted
}

var errUntrusted = errors.New("the token is of no issuer that is trusted here")

// Examine verifies a token and says what it proves. It does not use it up.
func (x *Exchange) Examine(ctx context.Context, token string) (*Evidence, error) {
	of, err := x.issuerOf(token)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	verified, selectors, err := of.Verify(ctx, token)
	if err == nil {
		var more []selector.Selector
		more, err = of.presetSelectors(verified)
		selectors = append(selectors, more...)
	}
	if err != nil {
		return &Evidence{Issuer: of.Name(), of: of}, err
	}
	return &Evidence{verified, of.Name(), of.parent, selector.NewSet(selectors...), of}, nil
}

// presetSelectors returns the selectors that the preset makes of a token.
func (of *trusted) presetSelectors(t *issuer.Token) ([]selector.Selector, error) {
	if of.config.Preset == "" {
		return nil, nil
	}
	var values []string
	for _, name := range sortedKeys(of.claims) {
		if of.config.Preset == "gcp" && name == "email" && t.Claims["email_verified"] != true {
			continue
		}
		found, err := of.claims[name].Values(t.Claims)
		if err != nil {
			return nil, err
		}
		for _, v := range found {
			values = append(values, name+":"+v)
		}
	}
	if td := of.config.TrustDomain; td != "" {
		values = append(values, "trust_domain:"+td)
	}
	return attestors.SelectorsOf(of.config.Preset, values), nil
}

// issuerOf returns the issuer that is to verify a token: the one of its claim
// iss, or the trust domain of its subject.
func (x *Exchange) issuerOf(token string) (*trusted, error) {
	iss, sub, err := issuer.Claimed(token)
	if err != nil {
		return nil, err
	}
	if of := x.issuers[iss]; of != nil && of.config.TrustDomain == "" {
		return of, nil
	}
	if id, err := spiffeid.FromString(sub); err == nil {
		if of := x.issuers[id.TrustDomain().IDString()]; of != nil && of.config.TrustDomain != "" {
			return of, nil
		}
	}
	return nil, errUntrusted
}

// entries returns the entries that evidence matches, by ID.
func (x *Exchange) entries(e *Evidence) (out []*entry.Entry) {
	now := x.o.Now()
	for one := range x.o.Registry.View().EntriesByParent(e.Parent) {
		if !one.Expired(now) && one.Selectors.SubsetOf(e.Selectors) {
			out = append(out, one)
		}
	}
	return out
}

// choose returns the entry for an ID, or the only one there is if the ID is
// empty.
func (x *Exchange) choose(e *Evidence, id string) (*entry.Entry, *failure) {
	all := x.entries(e)
	var named []string
	for _, one := range all {
		if one.SPIFFEID.String() == id {
			return one, nil
		}
		if text := one.SPIFFEID.String(); !slices.Contains(named, text) {
			named = append(named, text)
		}
	}
	slices.Sort(named)
	switch {
	case id != "":
		return nil, refuse("invalid_target", "no entry gives this token that SPIFFE ID")
	case len(named) == 0:
		return nil, refuse("invalid_request", "no entry matches the token; have one made with parent ID %s, for selectors that the server's log names", e.Parent)
	case len(named) > maxNamed:
		return nil, refuse("invalid_request", "%d SPIFFE IDs match; name one as spiffe_id", len(named))
	case len(named) > 1:
		return nil, refuse("invalid_request", "several SPIFFE IDs match; name one as spiffe_id: %s", strings.Join(named, " "))
	}
	return all[0], nil
}

// answer is a successful answer. RFC 6749 §5.1, RFC 8693 §2.2.1.
type answer struct {
	AccessToken     string `json:"access_token"`
	IssuedTokenType string `json:"issued_token_type,omitempty"`
	TokenType       string `json:"token_type"`
	ExpiresIn       int64  `json:"expires_in"`
	SPIFFEID        string `json:"spiffe_id"`
	// TrustBundle is the X.509 authorities of the trust domain, PEM, with an
	// X509-SVID.
	TrustBundle string `json:"trust_bundle,omitempty"`
}

// grant verifies, decides and issues.
func (x *Exchange) grant(ctx context.Context, r *request, say *record) (*answer, *failure) {
	e, err := x.Examine(ctx, r.token)
	if e != nil {
		say.issuer = e.Issuer
	}
	switch {
	case errors.Is(err, issuer.ErrUnavailable):
		say.cause = err
		return nil, unavailable("the token cannot be verified now; try again in a moment")
	case err != nil:
		return nil, refuse(r.invalid, "%v", err)
	}
	say.subject, say.jti, say.selectors = e.Token.Subject, e.Token.ID, e.Selectors
	if err := checkActor(e.Token); err != nil {
		return nil, refuse(r.invalid, "%v", err)
	}
	if r.client != "" && r.client != e.Token.Subject { // RFC 7523 §3
		return nil, refuse("invalid_client", "client_id is not the token's subject")
	}
	one, failed := x.choose(e, r.spiffeID)
	if failed != nil {
		return nil, failed
	}
	say.entry, say.id = one.ID, one.SPIFFEID.String()
	// A copy, whose lifetimes end with the token's.
	issued, most := *one, time.Duration(0)
	if !e.of.config.OutliveToken {
		left := e.Token.ExpiresAt.Sub(x.o.Now()).Truncate(time.Second)
		if left < time.Second {
			return nil, refuse(r.invalid, "the token ends now")
		}
		most = left
		x509TTL, jwtTTL := x.o.Sign.DefaultTTLs()
		issued.X509SVIDTTL = shorter(issued.X509SVIDTTL, x509TTL, left)
		issued.JWTSVIDTTL = shorter(issued.JWTSVIDTTL, jwtTTL, left)
	}
	if err := x.o.LimitIssuer(ctx, e.Issuer); err != nil {
		return nil, tooMany()
	}
	if !e.of.config.Reusable {
		switch err := x.use(ctx, e.Token); {
		case errors.Is(err, issuer.ErrUsed):
			return nil, refuse(r.invalid, "%v", err)
		case errors.Is(err, issuer.ErrBusy):
			return nil, unavailable("%v", err)
		case err != nil:
			say.cause = err
			return nil, unavailable("it cannot be noted now that the token is used; try again in a moment")
		}
	}
	out, err := x.sign(ctx, r, &issued, most)
	if told := (*issue.InvalidError)(nil); errors.As(err, &told) {
		return nil, refuse("invalid_request", "%v", told)
	}
	if err != nil {
		say.cause = err
		return nil, unavailable("nothing can be issued now; try again in a moment")
	}
	out.SPIFFEID = one.SPIFFEID.String()
	return out, nil
}

// use notes that a token is used, which is once, on whichever server and however
// often they start: in memory first, which bounds how many there are of an issuer.
func (x *Exchange) use(ctx context.Context, t *issuer.Token) error {
	if err := x.uses.Use(t, x.o.Now()); err != nil {
		return err
	}
	hash, until := t.Known()
	err := x.o.Registry.UseToken(ctx, hash, until)
	if told := (*registry.Error)(nil); errors.As(err, &told) && told.Kind == registry.AlreadyExists {
		return issuer.ErrUsed
	}
	if err != nil {
		x.uses.Forget(t)
	}
	return err
}

// checkActor refuses a token that is for somebody to act with: nobody here has
// shown to be that party. RFC 8693 §4.4.
func checkActor(t *issuer.Token) error {
	if _, ok := t.Claims["may_act"]; ok {
		return errors.New("the token names who may act with it (may_act), which is not supported")
	}
	return nil
}

func shorter(own, standard, left time.Duration) time.Duration {
	if own == 0 {
		own = standard
	}
	return min(own, left)
}

// sign issues what was asked for, for at most so long, unless that is zero.
func (x *Exchange) sign(ctx context.Context, r *request, e *entry.Entry, most time.Duration) (*answer, error) {
	now := x.o.Now()
	seconds := func(end time.Time) int64 { return max(int64(end.Sub(now)/time.Second), 0) }
	switch r.kind {
	case typeX509:
		svid, err := x.o.Sign.WorkloadX509(ctx, e, r.csr)
		if err != nil {
			return nil, err
		}
		return &answer{
			AccessToken: pemOf(svid.Chain), IssuedTokenType: typeX509, TokenType: "N_A", ExpiresIn: seconds(svid.ExpiresAt),
			TrustBundle: pemOf(x.authorities()),
		}, nil
	case typeWIT:
		svid, err := x.o.Sign.WorkloadWITWithin(ctx, e, r.key, most)
		if err != nil {
			return nil, err
		}
		return &answer{AccessToken: svid.Token, IssuedTokenType: typeWIT, TokenType: "N_A", ExpiresIn: seconds(svid.ExpiresAt)}, nil
	}
	svid, err := x.o.Sign.WorkloadJWT(ctx, e, r.audience)
	if err != nil {
		return nil, err
	}
	a := &answer{AccessToken: svid.Token, IssuedTokenType: typeJWT, TokenType: "N_A", ExpiresIn: seconds(svid.ExpiresAt)}
	if r.grant != grantExchange {
		a.IssuedTokenType, a.TokenType = "", "Bearer"
	}
	return a, nil
}

func (x *Exchange) authorities() (out [][]byte) {
	b := x.o.Registry.View().Bundle(x.o.TrustDomain)
	if b == nil {
		return nil
	}
	for _, a := range b.X509Authorities {
		out = append(out, a.Certificate.Raw)
	}
	return out
}

// Handler serves the endpoint and its metadata.
func (x *Exchange) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+x.path+"/token", x.serveToken)
	mux.HandleFunc("GET /.well-known/oauth-authorization-server"+x.path, x.serveMetadata) // RFC 8414 §3.1
	return mux
}

// endpointURL is where tokens are exchanged.
func (x *Exchange) endpointURL() string { return x.o.Issuer + "/token" }
