package oidc_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	rp "github.com/coreos/go-oidc/v3/oidc"
	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/oidc"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a server's authorities and what it issues and publishes.
type world struct {
	t           testing.TB
	url         string // of the issuer
	registry    *registry.Registry
	authorities *authority.Authorities
	issue       *issue.Issuer
}

func newWorld(t testing.TB) *world {
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	w := &world{t: t}
	w.registry, err = registry.Open(ctx, registry.Options{Store: db, TrustDomain: td})
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.registry.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		must(t, db.Close())
	})
	w.authorities, err = authority.Open(ctx, authority.Options{Registry: w.registry, Keys: authority.NewMemoryKeys(), TrustDomain: td, Server: "s", JWTRS256: true, WIT: true})
	must(t, err)
	server := httptest.NewUnstartedServer(nil)
	w.url = "http://" + server.Listener.Addr().String() + "/acme"
	served, err := oidc.New(oidc.Options{URLs: []string{w.url}, AllowLoopback: true, Bundle: w.bundle, MaxAge: 5 * time.Minute})
	must(t, err)
	server.Config.Handler = served
	server.Start()
	t.Cleanup(server.Close)
	rs256, err := issue.NewProfile(issue.ProfileConfig{Audience: "cloud", Algorithm: "RS256"}, jose.ES256)
	must(t, err)
	w.issue = issue.New(issue.Options{TrustDomain: td, Authorities: w.authorities, JWTIssuer: w.url, Profiles: []*issue.Profile{rs256}})
	return w
}

func (w *world) bundle() *bundle.Bundle { return w.registry.View().Bundle(td) }

func (w *world) token(audience string) string {
	w.t.Helper()
	svid, err := w.issue.MintJWT(w.t.Context(), spiffeid.RequireFromPath(td, "/web"), []string{audience}, 0)
	must(w.t, err)
	return svid.Token
}

// relyingParty is one that knows the issuer's URL and nothing else.
func (w *world) relyingParty(audience string) *rp.IDTokenVerifier {
	w.t.Helper()
	provider, err := rp.NewProvider(w.t.Context(), w.url)
	must(w.t, err)
	return provider.Verifier(&rp.Config{ClientID: audience})
}

func (w *world) replace() (old string) {
	w.t.Helper()
	active, _, _ := w.authorities.State(registry.JWT)
	next, err := w.authorities.Prepare(w.t.Context(), registry.JWT)
	must(w.t, err)
	if got := w.keyIDs(); !slices.Contains(got, next.ID) || !slices.Contains(got, active.ID) {
		w.t.Errorf("keys are %q: the prepared one %s, or the active one, is not among them", got, next.ID)
	}
	_, err = w.authorities.Activate(w.t.Context(), registry.JWT, next.ID)
	must(w.t, err)
	return active.ID
}

func (w *world) get(path string, header ...string) *http.Response {
	w.t.Helper()
	return w.do(http.MethodGet, path, header...)
}

func (w *world) do(method, path string, header ...string) *http.Response {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), method, w.url+path, nil)
	must(w.t, err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	must(w.t, err)
	w.t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func (w *world) keys() (set jose.JSONWebKeySet) {
	w.t.Helper()
	must(w.t, json.NewDecoder(w.get("/keys").Body).Decode(&set))
	return set
}

func (w *world) keyIDs() (ids []string) {
	for _, k := range w.keys().Keys {
		ids = append(ids, k.KeyID)
	}
	return ids
}

func TestDiscovery_DI09_ARelyingPartyOfAnotherMakerTakesOurTokensByDiscoveryAlone(t *testing.T) {
	w := newWorld(t)
	for audience, algorithm := range map[string]string{"api": rp.ES256, "cloud": rp.RS256} {
		verifier := w.relyingParty(audience)
		token := w.token(audience)
		got, err := verifier.Verify(t.Context(), token)
		must(t, err)
		if got.Subject != "spiffe://example.org/web" || got.Issuer != w.url {
			t.Errorf("got %+v", got)
		}
		if header, _, _ := strings.Cut(token, "."); !strings.Contains(decoded(t, header), `"alg":"`+algorithm+`"`) {
			t.Errorf("a token for %s is not signed with %s", audience, algorithm)
		}
		// It is a JWT-SVID all the same.
		if _, err := jwtsvid.Validate(token, []string{audience}, func(spiffeid.TrustDomain) *bundle.Bundle { return w.bundle() }, time.Now()); err != nil {
			t.Error(err)
		}
		if _, err := w.relyingParty("other").Verify(t.Context(), token); err == nil {
			t.Error("another audience takes it")
		}
		if _, err := verifier.Verify(t.Context(), token[:len(token)-8]+"AAAAAAAA"); err == nil {
			t.Error("a token that was changed is taken")
		}
	}
}

// decoded returns a part of a token as text.
func decoded(t testing.TB, part string) string {
	t.Helper()
	text, err := base64.RawURLEncoding.DecodeString(part)
	must(t, err)
	return string(text)
}

func TestAKeyIsPublishedBeforeItSignsAndGoesWhenItIsRevoked(t *testing.T) {
	w := newWorld(t)
	held := w.relyingParty("api") // with the keys of now
	first := w.token("api")
	_, err := held.Verify(t.Context(), first)
	must(t, err)
	old := w.replace() // checks that the prepared one is published
	for _, token := range []string{first, w.token("api")} {
		if _, err := held.Verify(t.Context(), token); err != nil {
			t.Errorf("while keys change: %v", err)
		}
	}
	_, err = w.authorities.Taint(t.Context(), registry.JWT, old)
	must(t, err)
	if !slices.Contains(w.keyIDs(), old) {
		t.Error("a tainted key is gone before it is revoked: what it signed must verify until then")
	}
	_, err = w.authorities.Revoke(t.Context(), registry.JWT, old)
	must(t, err)
	if slices.Contains(w.keyIDs(), old) {
		t.Error("a revoked key is there")
	}
	if _, err := w.relyingParty("api").Verify(t.Context(), first); err == nil {
		t.Error("a token of a revoked key is taken")
	}
}

func TestDiscovery_DI02_DI05_TheKeysAreThoseOfJWTSVIDsAloneEachWithItsUseAndAlgorithm(t *testing.T) {
	w := newWorld(t)
	set := w.keys()
	var algorithms []string
	for _, k := range set.Keys {
		if k.Use != "sig" || !k.IsPublic() || !k.Valid() || w.bundle().JWTKey(k.KeyID) == nil {
			t.Errorf("%s has use %q", k.KeyID, k.Use)
		}
		algorithms = append(algorithms, k.Algorithm)
	}
	slices.Sort(algorithms)
	if !slices.Equal(algorithms, []string{"ES256", "RS256"}) {
		t.Errorf("algorithms are %q", algorithms)
	}
	var m struct {
		Issuer     string   `json:"issuer"`
		JWKS       string   `json:"jwks_uri"`
		Algorithms []string `json:"id_token_signing_alg_values_supported"`
		Subjects   []string `json:"subject_types_supported"`
		Responses  []string `json:"response_types_supported"`
	}
	must(t, json.NewDecoder(w.get("/.well-known/openid-configuration").Body).Decode(&m))
	if m.Issuer != w.url || m.JWKS != w.url+"/keys" || !slices.Equal(m.Algorithms, algorithms) || len(m.Subjects) == 0 || len(m.Responses) == 0 {
		t.Errorf("got %+v", m)
	}
}

func TestDiscovery_DI01_AnswersMayBeKeptUntilKeysCanChangeAndAreTheSameUntilTheyDo(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/keys", "/.well-known/openid-configuration"} {
		resp := w.get(path)
		tag := resp.Header.Get("ETag")
		if resp.Header.Get("Cache-Control") != "public, max-age=300" || tag == "" || resp.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: got %v", path, resp.Header)
		}
		for _, match := range []string{tag, `"x", W/` + tag, "*"} {
			if again := w.get(path, "If-None-Match", match); again.StatusCode != http.StatusNotModified {
				t.Errorf("%s, %s: got %s", path, match, again.Status)
			}
		}
		head := w.do(http.MethodHead, path)
		if body, _ := io.ReadAll(head.Body); head.StatusCode != http.StatusOK || len(body) != 0 || head.Header.Get("ETag") != tag {
			t.Errorf("HEAD %s: got %s %q", path, head.Status, body)
		}
		for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions, "TRACE"} {
			if got := w.do(method, path); got.StatusCode != http.StatusMethodNotAllowed || got.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s %s: got %s", method, path, got.Status)
			}
		}
	}
	was := w.get("/keys").Header.Get("ETag")
	w.replace()
	if got := w.get("/keys", "If-None-Match", was); got.StatusCode != http.StatusOK || got.Header.Get("ETag") == was {
		t.Errorf("after a change of keys: %s", got.Status)
	}
}

// served answers a request for a host and path.
func served(i http.Handler, host, path string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Host, r.URL.Path = host, path
	for n := 0; n < len(header); n += 2 {
		r.Header.Set(header[n], header[n+1])
	}
	rec := httptest.NewRecorder()
	i.ServeHTTP(rec, r)
	return rec
}

func TestDiscovery_DI07_EachIssuerIsServedByItsHostAndPathAndNothingElseIs(t *testing.T) {
	w := newWorld(t)
	urls := []string{"https://id.example.org", "https://id.example.org/tenant", "https://other.example:8445", "https://[2001:db8::1]/x"}
	i, err := oidc.New(oidc.Options{URLs: urls, Bundle: w.bundle})
	must(t, err)
	const at = "/.well-known/openid-configuration"
	for _, c := range []struct{ host, path, issuer string }{
		{"id.example.org", at, urls[0]}, {"ID.example.org:443", at, urls[0]}, {"id.example.org:80", at, urls[0]},
		{"id.example.org", "/tenant" + at, urls[1]}, {"other.example:8445", at, urls[2]}, {"[2001:db8::1]", "/x" + at, urls[3]}, {"[2001:db8::1]:443", "/x" + at, urls[3]},
	} {
		got := served(i, c.host, c.path, "X-Forwarded-Host", "other.example:8445", "Forwarded", "host=other.example:8445")
		if got.Code != http.StatusOK || !strings.Contains(got.Body.String(), fmt.Sprintf(`"issuer":%q`, c.issuer)) {
			t.Errorf("%s%s: got %d %s", c.host, c.path, got.Code, got.Body)
		}
	}
	for _, c := range [][2]string{
		{"evil.example", at}, {"", at}, {"other.example", at}, {"id.example.org:8445", at}, {"id.example.org.", at}, {"id.example.org", "/"},
		{"id.example.org", at + "/"}, {"id.example.org", "/tenant/../" + at}, {"id.example.org", "//keys"}, {"id.example.org", "/other" + at},
		{"other.example:8445", "/tenant" + at}, {"id.example.org", "/KEYS"}, {"2001:db8::1", "/x" + at},
	} {
		if got := served(i, c[0], c[1]); got.Code != http.StatusNotFound {
			t.Errorf("%s%s: got %d %s", c[0], c[1], got.Code, got.Body)
		}
	}
	i, err = oidc.New(oidc.Options{URLs: urls, Bundle: w.bundle, Next: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })})
	must(t, err)
	if got := served(i, "evil.example", at); got.Code != http.StatusTeapot {
		t.Errorf("got %d", got.Code)
	}
}

func TestBeforeThereIsABundleRelyingPartiesAreToComeAgain(t *testing.T) {
	i, err := oidc.New(oidc.Options{URLs: []string{"https://id.example.org"}, Bundle: func() *bundle.Bundle { return nil }})
	must(t, err)
	if got := served(i, "id.example.org", "/keys"); got.Code != http.StatusServiceUnavailable || got.Header().Get("Retry-After") == "" || got.Header().Get("Cache-Control") != "" {
		t.Errorf("got %d %v", got.Code, got.Header())
	}
}

func TestDiscovery_DI04_AnIssuerHasAURLThatRelyingPartiesCompareByteForByte(t *testing.T) {
	for _, bad := range []string{
		"", "id.example.org", "http://id.example.org", "http://127.0.0.1", "https://", "https://id.example.org/", "https://id.example.org/x/", "https://u@id.example.org",
		"https://id.example.org?x", "https://id.example.org?", "https://id.example.org#", "https://id.example.org#x", "https://ID.example.org",
		"https://id.example.org.", "https://id.example.org//x", "https://id.example.org/%78", "https://id.example.org/../x", "https://id.example.org/é",
		"spiffe://example.org", "https:id.example.org", "https://id.example.org/" + strings.Repeat("x", 3000),
	} {
		if _, err := oidc.New(oidc.Options{URLs: []string{bad}}); err == nil {
			t.Errorf("%.100q was taken", bad)
		}
	}
	if _, err := oidc.New(oidc.Options{URLs: []string{"https://a.example", "https://a.example:443"}}); err == nil {
		t.Error("one was taken twice")
	}
	if _, err := oidc.New(oidc.Options{}); err == nil {
		t.Error("none was taken")
	}
	if _, err := oidc.New(oidc.Options{URLs: []string{"http://evil.example"}, AllowLoopback: true}); err == nil {
		t.Error("http to another machine was taken")
	}
}
