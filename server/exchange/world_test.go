package exchange_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors/oidc"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/exchange"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/test/harness"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const (
	us            = "https://tokens.example.org/oauth"
	grantExchange = "urn:ietf:params:oauth:grant-type:token-exchange"
	bearer        = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	typeJWT       = "urn:ietf:params:oauth:token-type:jwt"
	typeX509      = "urn:hallmark:token-type:x509-svid"
	typeWIT       = "urn:hallmark:token-type:wit-svid"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a token endpoint over a real registry and real authorities, with one
// issuer, called ci.
type world struct {
	t        testing.TB
	ci       *harness.Issuer
	registry *registry.Registry
	own      *authority.Authorities
	endpoint *exchange.Exchange
	log      *logBuffer
	fail     *atomic.Bool // the store takes no writes
	options  exchange.Options
}

var errDisk = errors.New("disk on fire")

// faulty is a store that fails when its world says so.
type faulty struct {
	store.Store
	of *world
}

func (s faulty) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	if !s.of.fail.Load() {
		return s.Store.Commit(ctx, txns...)
	}
	out := make([]store.Result, len(txns))
	for i := range out {
		out[i].Err = errDisk
	}
	return out
}

// second returns another endpoint over the same store.
func (w *world) second() *world {
	w.t.Helper()
	other := &world{t: w.t, ci: w.ci, registry: w.registry, own: w.own, log: w.log}
	var err error
	other.endpoint, err = exchange.New(w.options)
	must(w.t, err)
	return other
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// issuerOf is the configuration of a test's issuer.
func issuerOf(p *harness.Issuer) exchange.IssuerConfig {
	return exchange.IssuerConfig{IssuerConfig: oidc.IssuerConfig{Name: "ci", Config: issuer.Config{Issuer: p.URL, CAPath: p.CA}}}
}

// newWorld starts one; functions may change the issuer, or what the endpoint is
// made of.
func newWorld(t testing.TB, change ...any) *world {
	t.Helper()
	w := &world{t: t, ci: harness.NewIssuer(t), log: &logBuffer{}, fail: new(atomic.Bool)}
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	w.registry, err = registry.Open(t.Context(), registry.Options{Store: faulty{db, w}, TrustDomain: td})
	must(t, err)
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = w.registry.Run(ctx) })
	t.Cleanup(func() {
		stop()
		running.Wait()
		must(t, db.Close())
	})
	w.own, err = authority.Open(t.Context(), authority.Options{Registry: w.registry, Keys: authority.NewMemoryKeys(), TrustDomain: td, Server: "test", WIT: true})
	must(t, err)
	c := issuerOf(w.ci)
	none := func(context.Context, string) error { return nil }
	log := slog.New(slog.NewTextHandler(w.log, nil))
	o := exchange.Options{
		TrustDomain: td, Issuer: us, Registry: w.registry, WIT: true, LimitAddress: none, LimitIssuer: none, Log: log,
		Sign: issue.New(issue.Options{TrustDomain: td, Authorities: w.own, Log: log}),
	}
	for _, f := range change {
		if f, ok := f.(func(*exchange.IssuerConfig)); ok {
			f(&c)
		}
	}
	o.Issuers = []exchange.IssuerConfig{c}
	for _, f := range change {
		if f, ok := f.(func(*exchange.Options)); ok {
			f(&o)
		}
	}
	w.options = o
	w.endpoint, err = exchange.New(o)
	must(t, err)
	return w
}

// entry makes an entry for tokens of an issuer and waits until it counts.
func (w *world) entry(of, path string, selectors ...string) *entry.Entry {
	w.t.Helper()
	var set []selector.Selector
	for _, text := range selectors {
		s, err := selector.Parse(text)
		must(w.t, err)
		set = append(set, s)
	}
	results := w.registry.CreateEntries(w.t.Context(), []*entry.Entry{{
		SPIFFEID: spiffeid.RequireFromPath(td, path), ParentID: spiffeid.RequireFromPath(td, "/hallmark/issuer/"+of), Selectors: selector.NewSet(set...),
	}})
	must(w.t, results[0].Err)
	return results[0].Entry
}

// token signs claims of a good token with others put in.
func (w *world) token(change map[string]any) string {
	w.t.Helper()
	return w.ci.Sign(w.t, w.ci.Claims(us, change))
}

// answer is what the endpoint said.
type answer struct {
	status int
	header http.Header
	body   string

	Token       string `json:"access_token"`
	Issued      string `json:"issued_token_type"`
	Type        string `json:"token_type"`
	ExpiresIn   int64  `json:"expires_in"`
	SPIFFEID    string `json:"spiffe_id"`
	TrustBundle string `json:"trust_bundle"`
	Error       string `json:"error"`
	Description string `json:"error_description"`
}

func (w *world) do(r *http.Request) *answer {
	w.t.Helper()
	rec := httptest.NewRecorder()
	w.endpoint.Handler().ServeHTTP(rec, r.WithContext(w.t.Context()))
	a := &answer{status: rec.Code, header: rec.Header(), body: rec.Body.String()}
	_ = json.Unmarshal(rec.Body.Bytes(), a)
	return a
}

func (w *world) post(form string) *answer {
	w.t.Helper()
	r := httptest.NewRequest(http.MethodPost, us+"/token", strings.NewReader(form))
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return w.do(r)
}

// form writes parameters: name, value, name, value.
func form(pairs ...string) string {
	var parts []string
	for i := 0; i < len(pairs); i += 2 {
		parts = append(parts, url.QueryEscape(pairs[i])+"="+url.QueryEscape(pairs[i+1]))
	}
	return strings.Join(parts, "&")
}

// exchanged exchanges a token for a JWT-SVID, with more parameters.
func (w *world) exchanged(token string, more ...string) *answer {
	w.t.Helper()
	return w.post(form(append([]string{"grant_type", grantExchange, "subject_token", token, "subject_token_type", typeJWT, "audience", "https://api.example.org"}, more...)...))
}

func (a *answer) refused(t testing.TB, code, says string) {
	t.Helper()
	if a.status < 400 || a.Error != code || !strings.Contains(a.Description, says) || a.Token != "" {
		t.Errorf("got %d %s, want %s that says %q", a.status, a.body, code, says)
	}
}

func (w *world) bundle() *bundle.Bundle { return w.registry.View().Bundle(td) }

var errLimit = errors.New("too many")
