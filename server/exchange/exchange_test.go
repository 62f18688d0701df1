package exchange_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
	"github.com/hallmark-id/hallmark/server/exchange"
	"github.com/hallmark-id/hallmark/test/harness"
)

// validated checks that an answer is a JWT-SVID that verifies.
func (w *world) validated(a *answer, audience string) *jwtsvid.SVID {
	w.t.Helper()
	if a.status != http.StatusOK {
		w.t.Fatalf("got %d %s", a.status, a.body)
	}
	svid, err := jwtsvid.Validate(a.Token, []string{audience}, func(spiffeid.TrustDomain) *bundle.Bundle { return w.bundle() }, time.Now())
	must(w.t, err)
	return svid
}

func TestTokenExchange_TX01_TX05_TX06_TX08_ATokenIsExchangedForAJWTSVID(t *testing.T) {
	w := newWorld(t)
	e := w.entry("ci", "/job", "oidc:sub:job-7", "oidc:iss:"+w.ci.URL)
	a := w.exchanged(w.token(map[string]any{"jti": "1"}), "audience", "b", "resource", "https://c/d", "requested_token_type", typeJWT)
	svid := w.validated(a, "b")
	if svid.ID != e.SPIFFEID || !slices.Equal(svid.Audience, []string{"https://api.example.org", "b", "https://c/d"}) {
		t.Errorf("got %+v", svid)
	}
	if a.Issued != typeJWT || a.Type != "N_A" || a.ExpiresIn < 200 || a.ExpiresIn > 300 || a.SPIFFEID != e.SPIFFEID.String() {
		t.Errorf("got %s", a.body)
	}
	if a.header.Get("Cache-Control") != "no-store" || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("got %v", a.header)
	}
	for _, want := range []string{"msg=audit", "issuer=ci", "subject=job-7", "jti=1", "entry=" + e.ID, "outcome=OK", "msg=issued kind=jwt"} {
		if !strings.Contains(w.log.String(), want) {
			t.Errorf("no %s in the log:\n%s", want, w.log.String())
		}
	}
	if strings.Contains(w.log.String(), "eyJ") {
		t.Errorf("a token is in the log:\n%s", w.log.String())
	}
}

func newCSR(t testing.TB) (string, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "root"}, DNSNames: []string{"evil.example"}}, key)
	must(t, err)
	return base64.StdEncoding.EncodeToString(der), key
}

// svid asks for an SVID of a type.
func (w *world) svid(token, kind string, more ...string) *answer {
	return w.post(form(append([]string{"grant_type", grantExchange, "subject_token", token, "subject_token_type", "urn:ietf:params:oauth:token-type:id_token", "requested_token_type", kind}, more...)...))
}

func TestATokenIsExchangedForAnX509SVIDOfTheKeyInTheRequest(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:issuer:ci")
	csr, key := newCSR(t)
	a := w.svid(w.token(nil), typeX509, "csr", csr)
	block, _ := pem.Decode([]byte(a.Token))
	if a.status != http.StatusOK || block == nil || a.Issued != typeX509 || a.Type != "N_A" {
		t.Fatalf("got %d %s", a.status, a.body)
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(a.TrustBundle)) {
		t.Fatal("there is no trust bundle")
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots})
	must(t, err)
	if !key.PublicKey.Equal(leaf.PublicKey) || leaf.URIs[0].String() != "spiffe://example.org/job" || len(leaf.DNSNames) != 0 || leaf.Subject.CommonName == "root" {
		t.Errorf("got %v %v %v", leaf.URIs, leaf.DNSNames, leaf.Subject)
	}
	// TX-11: the token ends in ten minutes, and so does the SVID.
	if left := time.Until(leaf.NotAfter); left > 10*time.Minute {
		t.Errorf("it lasts for %v", left)
	}
}

func TestTokenExchange_TX11_AnSVIDEndsWithItsTokenUnlessConfiguredOtherwise(t *testing.T) {
	for outlive, most := range map[bool]time.Duration{false: time.Minute, true: time.Hour} {
		w := newWorld(t, func(c *exchange.IssuerConfig) { c.OutliveToken, c.Reusable = outlive, true })
		w.entry("ci", "/job", "oidc:issuer:ci")
		short := map[string]any{"exp": time.Now().Add(time.Minute).Unix()}
		csr, key := newCSR(t)
		spki, err := x509.MarshalPKIXPublicKey(key.Public())
		must(t, err)
		for name, a := range map[string]*answer{
			"x509": w.svid(w.token(short), typeX509, "csr", csr),
			"jwt":  w.exchanged(w.token(short)),
			"wit":  w.svid(w.token(short), typeWIT, "public_key", base64.StdEncoding.EncodeToString(spki), "signing_algorithm", "ES256"),
		} {
			if left := time.Duration(a.ExpiresIn) * time.Second; a.status != http.StatusOK || left > most || outlive && left < 4*time.Minute {
				t.Errorf("%s, %v: got %d %s", name, outlive, a.status, a.body)
			}
		}
	}
}

func TestAssertions_JA01_JA02_JA03_JA07_ATokenIsAGrantOrAuthenticatesItsClient(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:issuer:ci")
	a := w.post(form("grant_type", bearer, "assertion", w.token(map[string]any{"jti": "1"}), "resource", "https://api"))
	if svid := w.validated(a, "https://api"); svid.ID.Path() != "/job" || a.Type != "Bearer" || a.Issued != "" {
		t.Errorf("got %s", a.body)
	}
	client := func(jti string, more ...string) *answer {
		return w.post(form(append([]string{"grant_type", "client_credentials", "client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
			"client_assertion", w.token(map[string]any{"jti": jti}), "audience", "https://api"}, more...)...))
	}
	w.validated(client("2"), "https://api")
	w.validated(client("3", "client_id", "job-7"), "https://api")
	client("4", "client_id", "job-8").refused(t, "invalid_client", "not the token's subject")
	if a := client("5", "client_id", "job-8"); a.status != http.StatusUnauthorized {
		t.Errorf("got %d", a.status)
	}
	client("3").refused(t, "invalid_client", "used before")
	w.post(form("grant_type", bearer, "assertion", w.token(map[string]any{"jti": "1"}), "resource", "https://api")).refused(t, "invalid_grant", "used before")
}

func TestOfSeveralMatchesTheCallerNamesOneOfItsOwn(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/a", "oidc:sub:job-7")
	w.entry("ci", "/b", "oidc:issuer:ci")
	w.entry("ci", "/secret", "oidc:sub:job-8")
	w.entry("other", "/elsewhere", "oidc:issuer:ci")
	a := w.exchanged(w.token(nil))
	a.refused(t, "invalid_request", "spiffe://example.org/a spiffe://example.org/b")
	if strings.Contains(a.body, "secret") || strings.Contains(a.body, "elsewhere") {
		t.Errorf("it tells of others: %s", a.body)
	}
	// The token was not used up by that.
	token := w.token(map[string]any{"jti": "1"})
	w.exchanged(token, "spiffe_id", "spiffe://example.org/secret").refused(t, "invalid_target", "no entry gives this token")
	w.exchanged(token, "spiffe_id", "spiffe://example.org/nowhere").refused(t, "invalid_target", "no entry gives this token")
	if svid := w.validated(w.exchanged(token, "spiffe_id", "spiffe://example.org/b"), "https://api.example.org"); svid.ID.Path() != "/b" {
		t.Errorf("got %s", svid.ID)
	}
}

func TestAllSelectorsOfAnEntryMustMatchAndTheEntryMustBeInForce(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:sub:job-7", "oidc:claim:region:eu")
	w.exchanged(w.token(map[string]any{"region": "eu"})).refused(t, "invalid_request", "no entry matches the token") // the claim is not configured
	w = newWorld(t, func(c *exchange.IssuerConfig) { c.Claims = map[string]string{"region": "region"} })
	e := w.entry("ci", "/job", "oidc:sub:job-7", "oidc:claim:region:eu")
	w.exchanged(w.token(map[string]any{"region": "us"})).refused(t, "invalid_request", "no entry matches the token")
	w.validated(w.exchanged(w.token(map[string]any{"region": "eu"})), "https://api.example.org")
	must(t, w.registry.DeleteEntries(t.Context(), []string{e.ID})[0])
	w.exchanged(w.token(map[string]any{"region": "eu", "jti": "2"})).refused(t, "invalid_request", "no entry matches the token")
}

func TestPresetsKnowTheClaimsOfTheirIssuers(t *testing.T) {
	sts := "https://sts.amazonaws.com/"
	for preset, c := range map[string]struct {
		claims map[string]any
		want   []string // all selectors of the preset
	}{
		"github": {map[string]any{"repository_id": "42", "repository": "acme/shop", "ref": "refs/heads/main", "actor": "x", "run_id": "7"},
			[]string{"github:ref:refs/heads/main", "github:repository:acme/shop", "github:repository_id:42"}},
		"gitlab": {map[string]any{"project_id": "22", "project_path": "acme/shop", "runner_id": 1, "ref_protected": "true"},
			[]string{"gitlab:project_id:22", "gitlab:project_path:acme/shop", "gitlab:ref_protected:true", "gitlab:runner_id:1"}},
		"kubernetes": {map[string]any{"kubernetes.io": map[string]any{"namespace": "shop", "serviceaccount": map[string]any{"name": "web", "uid": "u"}}},
			[]string{"kubernetes:ns:shop", "kubernetes:sa:web", "kubernetes:sa_uid:u"}},
		"aws": {map[string]any{sts: map[string]any{"aws_account": "123456789012", "org_id": "o-1"}},
			[]string{"aws:account:123456789012", "aws:arn:job-7", "aws:org_id:o-1"}},
		"gcp": {map[string]any{"email": "a@b", "email_verified": false, "google": map[string]any{"compute_engine": map[string]any{"instance_id": "9"}}},
			[]string{"gcp:account_id:job-7", "gcp:instance_id:9"}},
		"azure": {map[string]any{"tid": "t", "oid": "o", "appid": "a"}, []string{"azure:app_id:a", "azure:object_id:o", "azure:tenant_id:t"}},
	} {
		w := newWorld(t, func(c *exchange.IssuerConfig) { c.Preset = preset })
		e, err := w.endpoint.Examine(t.Context(), w.token(c.claims))
		must(t, err)
		var got []string
		for _, s := range e.Selectors {
			if s.Type == preset {
				got = append(got, s.String())
			}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", preset, got, c.want)
		}
	}
}

func TestAnotherTrustDomainsJWTSVIDsAreTokens(t *testing.T) {
	other := spiffeid.RequireTrustDomainFromString("other.org")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	w := newWorld(t, func(c *exchange.IssuerConfig) {
		c.Config = issuer.Config{}
		c.Preset, c.TrustDomain = "spiffe", "other.org"
	})
	w.entry("ci", "/guest", "spiffe:id:spiffe://other.org/web", "spiffe:trust_domain:other.org")
	sign := func(change map[string]any) string {
		claims := map[string]any{"sub": "spiffe://other.org/web", "aud": []string{us}, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix()}
		for name, value := range change {
			claims[name] = value
		}
		return harness.SignJWT(t, jose.ES256, key, "k", claims)
	}
	w.exchanged(sign(nil)).refused(t, "temporarily_unavailable", "cannot be verified now") // not federated
	_, err = w.registry.ChangeBundle(t.Context(), other, func(b *bundle.Bundle) error {
		b.JWTAuthorities = []bundle.JWTAuthority{{KeyID: "k", PublicKey: key.Public()}}
		return nil
	})
	must(t, err)
	good := sign(nil)
	if svid := w.validated(w.exchanged(good), "https://api.example.org"); svid.ID.Path() != "/guest" {
		t.Errorf("got %s", svid.ID)
	}
	for name, token := range map[string]string{
		"again":                   good,
		"our own trust domain":    sign(map[string]any{"sub": "spiffe://example.org/web"}),
		"another trust domain":    sign(map[string]any{"sub": "spiffe://third.org/web"}),
		"no SPIFFE ID":            sign(map[string]any{"sub": "web"}),
		"another audience":        sign(map[string]any{"aud": "x"}),
		"another audience beside": sign(map[string]any{"aud": []string{us, "x"}}),
		"no issuance":             sign(map[string]any{"iat": "x"}),
		"another issuer's claim":  w.ci.Sign(t, w.ci.Claims(us, map[string]any{"sub": "spiffe://other.org/web"})),
	} {
		if a := w.exchanged(token); a.Error != "invalid_request" {
			t.Errorf("%s: got %d %s", name, a.status, a.body)
		}
	}
}

func TestOneTokenShownManyTimesAtOnceIsTakenOnce(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:issuer:ci")
	token := w.token(map[string]any{"jti": "1"})
	var taken atomic.Int64
	var wait sync.WaitGroup
	for range 20 {
		wait.Go(func() {
			if a := w.exchanged(token); a.status == http.StatusOK {
				taken.Add(1)
			} else {
				a.refused(t, "invalid_request", "used before")
			}
		})
	}
	wait.Wait()
	if taken.Load() != 1 {
		t.Errorf("it was taken %d times", taken.Load())
	}
}

func TestATokenIsTakenOnceByAllServersThatShareAStore(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:issuer:ci")
	other := w.second() // a server that has its own memory, or one that was restarted
	token := w.token(map[string]any{"jti": "1"})
	w.validated(w.exchanged(token), "https://api.example.org")
	other.exchanged(token).refused(t, "invalid_request", "used before")
	other.validated(other.exchanged(w.token(map[string]any{"jti": "2"})), "https://api.example.org")
	w.exchanged(w.token(map[string]any{"jti": "2", "actor": "x"})).refused(t, "invalid_request", "used before")
}

func TestATokenWhoseUseCannotBeNotedIsNotTakenAndMayComeAgain(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:issuer:ci")
	token := w.token(map[string]any{"jti": "1"})
	w.fail.Store(true)
	a := w.exchanged(token)
	a.refused(t, "temporarily_unavailable", "try again")
	if a.status != http.StatusServiceUnavailable || strings.Contains(a.body, errDisk.Error()) || !strings.Contains(w.log.String(), errDisk.Error()) {
		t.Errorf("got %d %s\n%s", a.status, a.body, w.log.String())
	}
	w.fail.Store(false)
	w.validated(w.exchanged(token), "https://api.example.org")
}

func TestAReusableTokenIsTakenUntilItEnds(t *testing.T) {
	w := newWorld(t, func(c *exchange.IssuerConfig) { c.Reusable = true })
	w.entry("ci", "/job", "oidc:issuer:ci")
	token := w.token(nil)
	for range 3 {
		w.validated(w.exchanged(token), "https://api.example.org")
	}
}

func TestRatesAreThoseOfTheAddressAndOfTheIssuer(t *testing.T) {
	var asked []string
	limit := func(_ context.Context, what string) error {
		asked = append(asked, what)
		return errLimit
	}
	w := newWorld(t, func(o *exchange.Options) { o.LimitAddress = limit })
	if a := w.exchanged("x"); a.status != http.StatusTooManyRequests || a.Error != "temporarily_unavailable" {
		t.Errorf("got %d %s", a.status, a.body)
	}
	w = newWorld(t, func(o *exchange.Options) { o.LimitIssuer = limit })
	w.entry("ci", "/job", "oidc:issuer:ci")
	if a := w.exchanged(w.token(nil)); a.status != http.StatusTooManyRequests {
		t.Errorf("got %d %s", a.status, a.body)
	}
	if !slices.Equal(asked, []string{"192.0.2.1:1234", "ci"}) {
		t.Errorf("asked for %q", asked)
	}
}

func TestAnIssuerThatIsAwayIsNotTheCallersFault(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:issuer:ci")
	w.ci.Handle(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusBadGateway) })
	a := w.exchanged(w.token(nil))
	a.refused(t, "temporarily_unavailable", "try again")
	if a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" || strings.Contains(a.body, "502") || !strings.Contains(w.log.String(), "502") {
		t.Errorf("got %d %s\n%s", a.status, a.body, w.log.String())
	}
}

func TestDiscovery_DI03_DI04_DI06_DI07_TheMetadataAreOfTheConfiguredIssuer(t *testing.T) {
	w := newWorld(t)
	r := httptest.NewRequest(http.MethodGet, "https://evil.example/.well-known/oauth-authorization-server/oauth", nil)
	r.Header.Set("X-Forwarded-Host", "evil.example")
	a := w.do(r)
	var m map[string]any
	must(t, json.Unmarshal([]byte(a.body), &m))
	if m["issuer"] != us || m["token_endpoint"] != us+"/token" || strings.Contains(a.body, "evil") {
		t.Errorf("got %s", a.body)
	}
	for _, name := range []string{"grant_types_supported", "token_endpoint_auth_methods_supported", "token_endpoint_auth_signing_alg_values_supported", "response_types_supported"} {
		if _, ok := m[name].([]any); !ok {
			t.Errorf("%s is %v", name, m[name])
		}
	}
}
