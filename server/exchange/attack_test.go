package exchange_test

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/attestors/oidc"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/server/exchange"
	"github.com/hallmark-id/hallmark/test/harness"
)

// signed signs a payload with any members of the header.
func signed(t testing.TB, key any, header map[jose.HeaderKey]any, payload []byte) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, &jose.SignerOptions{ExtraHeaders: maps.Clone(header)})
	must(t, err)
	s, err := signer.Sign(payload)
	must(t, err)
	text, err := s.CompactSerialize()
	must(t, err)
	return text
}

// This goes through tokens for which nobody
// must get an SVID, though an entry is there for whoever the issuer vouches for.
func TestTokenExchange_TX07_TX10_JA03_JA04_JA05_JA06_JA09_ATokenThatProvesNothingGetsNothing(t *testing.T) {
	other := harness.NewIssuer(t)
	w := newWorld(t, func(c *exchange.IssuerConfig) {
		c.Preset = "github"
		c.Condition = `claims.repository_owner_id == "7" && !claims.ref.contains("pull")`
	})
	w.entry("ci", "/job", "github:repository_id:42", "github:ref:refs/heads/main", "oidc:sub:repo:acme/shop")
	now := time.Now()
	claims := func(change map[string]any) map[string]any {
		all := map[string]any{"sub": "repo:acme/shop", "repository_id": "42", "repository_owner_id": "7", "ref": "refs/heads/main"}
		for name, value := range change {
			all[name] = value
		}
		return w.ci.Claims(us, all)
	}
	with := func(name string, value any) string { return w.ci.Sign(t, claims(map[string]any{name: value})) }
	payload, err := json.Marshal(claims(nil))
	must(t, err)
	header := func(name jose.HeaderKey, value any) string {
		return signed(t, w.ci.Key, map[jose.HeaderKey]any{"kid": "key-1", name: value}, payload)
	}
	raw := func(old, new string) string {
		return signed(t, w.ci.Key, map[jose.HeaderKey]any{"kid": "key-1"}, []byte(strings.Replace(string(payload), old, new, 1)))
	}
	good := with("jti", "good")
	w.validated(w.exchanged(good), "https://api.example.org")
	parts := strings.Split(good, ".")
	encode := base64.RawURLEncoding.EncodeToString
	for name, token := range map[string]string{
		"used before":                      good,
		"used before, with another claim":  w.ci.Sign(t, claims(map[string]any{"jti": "good", "actor": "x"})),
		"the algorithm none":               encode([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".",
		"none with a signature":            encode([]byte(`{"alg":"none","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"nOnE":                             encode([]byte(`{"alg":"nOnE","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"the public key as a secret":       harness.SignJWT(t, jose.HS256, w.ci.JWKS(t), "key-1", claims(nil)),
		"another algorithm":                encode([]byte(`{"alg":"PS256","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"two algorithms":                   encode([]byte(`{"alg":"none","alg":"ES256","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"no signature":                     parts[0] + "." + parts[1] + ".",
		"a signature of zeros":             parts[0] + "." + parts[1] + "." + encode(make([]byte, 64)),
		"another key":                      harness.SignJWT(t, jose.ES256, other.Key, "key-1", claims(nil)),
		"an unknown key":                   harness.SignJWT(t, jose.ES256, w.ci.Key, "../../key-1", claims(nil)),
		"a key in the header":              signed(t, other.Key, map[jose.HeaderKey]any{"jwk": jose.JSONWebKey{Key: other.Key.Public()}}, payload),
		"a URL of keys in the header":      header("jku", other.URL+"/jwks"),
		"a URL of a certificate":           header("x5u", "http://169.254.169.254/latest"),
		"certificates in the header":       header("x5c", []string{"AAAA"}),
		"critical headers":                 header("crit", []string{"exp"}),
		"another kind of token":            header("typ", "secevent+jwt"),
		"a WIT-SVID":                       header("typ", "wit+jwt"),
		"an encrypted token":               strings.Join([]string{parts[0], "", "", parts[1], parts[2]}, "."),
		"another issuer":                   other.Sign(t, other.Claims(us, map[string]any{"sub": "repo:acme/shop", "repository_id": "42", "repository_owner_id": "7", "ref": "refs/heads/main"})),
		"another issuer's name":            other.Sign(t, claims(nil)),
		"no issuer":                        with("iss", nil),
		"the issuer with a slash":          with("iss", w.ci.URL+"/"),
		"issuers":                          with("iss", []string{w.ci.URL}),
		"a look-alike of the issuer":       with("iss", strings.Replace(w.ci.URL, "127", "\uff11\uff12\uff17", 1)),
		"an issuer to be fetched":          with("iss", "http://169.254.169.254/"),
		"another audience":                 with("aud", "https://tokens.example.org"),
		"the endpoint as audience":         with("aud", us+"/token"),
		"another audience beside":          with("aud", []string{us, "https://other"}),
		"no audience":                      with("aud", nil),
		"an audience of a type":            with("aud", map[string]any{us: true}),
		"an end in the past":               with("exp", now.Add(-time.Minute).Unix()),
		"no end":                           with("exp", nil),
		"an end as text":                   with("exp", "9999999999"),
		"a beginning in the future":        with("nbf", now.Add(time.Hour).Unix()),
		"issued in the future":             with("iat", now.Add(time.Hour).Unix()),
		"issued long ago":                  with("iat", now.Add(-2*time.Hour).Unix()),
		"never issued":                     with("iat", nil),
		"no subject":                       with("sub", nil),
		"another subject":                  with("sub", "repo:acme/other"),
		"a subject in capitals":            with("sub", "repo:Acme/shop"),
		"a look-alike of the subject":      with("sub", "repo:\u0430cme/shop"),
		"an invisible letter more":         with("sub", "repo:acme/shop\u200d"),
		"a composed letter":                with("sub", "repo:acme/sho\u0070\u0301"),
		"another repository":               with("repository_id", "43"),
		"repositories":                     with("repository_id", []string{"42"}),
		"a repository within":              with("repository_id", map[string]any{"42": "42"}),
		"a fraction of a repository":       raw(`"repository_id":"42"`, `"repository_id":42.0`),
		"a repository with a zero":         with("repository_id", "042"),
		"a repository twice":               raw(`{`, `{"repository_id":"41",`),
		"another branch":                   with("ref", "refs/heads/main2"),
		"a selector within a claim":        with("ref", "x\ngithub:ref:refs/heads/main"),
		"a condition that is not met":      with("repository_owner_id", "8"),
		"a condition by another type":      with("repository_owner_id", 7),
		"a condition's claim that is none": with("ref", nil),
		"a pull request":                   with("ref", "refs/pull/1/merge"),
		"an actor that may act":            with("may_act", map[string]any{"sub": "x"}),
		"a jti of a type":                  with("jti", 7),
		"deep claims":                      raw(`{`, `{"x":`+strings.Repeat(`[`, 50)+strings.Repeat(`]`, 50)+`,`),
		"not UTF-8":                        raw(`acme`, "acm\xff"),
		"a long token":                     with("x", strings.Repeat("x", 40<<10)),
		"no token":                         "token",
	} {
		t.Run(name, func(t *testing.T) {
			a := w.exchanged(token)
			if a.status != http.StatusBadRequest || a.Error != "invalid_request" || a.Token != "" {
				t.Errorf("got %d %s", a.status, a.body)
			}
			if strings.ContainsAny(a.Description, "\"\\\n") || len(a.Description) > 2048 {
				t.Errorf("the description is %q", a.Description)
			}
		})
	}
	if other.Asked.Load() != 0 {
		t.Error("an issuer was asked that nobody trusts")
	}
	if strings.Contains(w.log.String(), "eyJ") {
		t.Error("a token is in the log")
	}
}

// This goes through requests that are none.
func TestTokenExchange_TX02_TX03_TX04_TX07_JA08_ARequestThatIsNoneGetsNothing(t *testing.T) {
	w := newWorld(t)
	w.entry("ci", "/job", "oidc:issuer:ci")
	token := w.token(map[string]any{"jti": "1"})
	base := func(more ...string) string {
		return form(append([]string{"grant_type", grantExchange, "subject_token", token, "subject_token_type", typeJWT}, more...)...)
	}
	const aud = "&audience=x"
	csr, _ := newCSR(t)
	for name, c := range map[string]struct{ form, code string }{
		"nothing":                        {"", "invalid_request"},
		"no grant":                       {form("subject_token", token, "subject_token_type", typeJWT) + aud, "invalid_request"},
		"another grant":                  {form("grant_type", "password", "username", "x", "password", "y"), "unsupported_grant_type"},
		"no subject token":               {form("grant_type", grantExchange, "subject_token_type", typeJWT) + aud, "invalid_request"},
		"no type of it":                  {form("grant_type", grantExchange, "subject_token", token) + aud, "invalid_request"},
		"another type of it":             {form("grant_type", grantExchange, "subject_token", token, "subject_token_type", "urn:ietf:params:oauth:token-type:saml2") + aud, "invalid_request"},
		"an access token":                {form("grant_type", grantExchange, "subject_token", token, "subject_token_type", "urn:ietf:params:oauth:token-type:access_token") + aud, "invalid_request"},
		"an actor":                       {base("audience", "x", "actor_token", token, "actor_token_type", typeJWT), "invalid_request"},
		"an actor without type":          {base("audience", "x", "actor_token", token), "invalid_request"},
		"an actor's type alone":          {base("audience", "x", "actor_token_type", typeJWT), "invalid_request"},
		"two subject tokens":             {base("audience", "x", "subject_token", token), "invalid_request"},
		"two grants":                     {base("audience", "x", "grant_type", bearer), "invalid_request"},
		"an assertion beside":            {base("audience", "x", "assertion", token), "invalid_request"},
		"a client assertion beside":      {base("audience", "x", "client_assertion", token), "invalid_request"},
		"a secret":                       {form("grant_type", "client_credentials", "client_id", "x", "client_secret", "y") + aud, "invalid_request"},
		"a secret beside":                {form("grant_type", "client_credentials", "client_assertion", token, "client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer", "client_secret", "y") + aud, "invalid_request"},
		"a client assertion of any type": {form("grant_type", "client_credentials", "client_assertion", token) + aud, "invalid_request"},
		"two client assertions":          {form("grant_type", "client_credentials", "client_assertion", token, "client_assertion", token, "client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer") + aud, "invalid_request"},
		"no assertion":                   {form("grant_type", bearer) + aud, "invalid_request"},
		"a scope":                        {base("audience", "x", "scope", "admin"), "invalid_scope"},
		"no audience":                    {base(), "invalid_target"},
		"an empty audience":              {base("audience", ""), "invalid_target"},
		"an empty audience beside":       {base("audience", "x", "audience", ""), "invalid_target"},
		"a long audience":                {base("audience", strings.Repeat("x", 3000)), "invalid_target"},
		"many audiences":                 {base() + strings.Repeat(aud, 65), "invalid_target"},
		"many parameters":                {base() + strings.Repeat(aud, 200), "invalid_request"},
		"a relative resource":            {base("resource", "/x"), "invalid_target"},
		"a resource with a fragment":     {base("resource", "https://x/#y"), "invalid_target"},
		"another type of SVID":           {base("audience", "x", "requested_token_type", "urn:ietf:params:oauth:token-type:refresh_token"), "invalid_request"},
		"no CSR":                         {base("requested_token_type", typeX509), "invalid_request"},
		"a CSR that is none":             {base("requested_token_type", typeX509, "csr", "AAAA"), "invalid_request"},
		"a CSR that was changed":         {base("requested_token_type", typeX509, "csr", csr[:len(csr)-8]+"AAAAAA=="), "invalid_request"},
		"an X509-SVID with an audience":  {base("requested_token_type", typeX509, "csr", csr, "audience", "x"), "invalid_target"},
		"a WIT-SVID without a key":       {base("requested_token_type", typeWIT, "signing_algorithm", "ES256"), "invalid_request"},
		"an X509-SVID by an assertion":   {form("grant_type", bearer, "assertion", token, "requested_token_type", typeX509, "csr", csr), "invalid_request"},
		"an ID that is nobody's":         {base("audience", "x", "spiffe_id", "spiffe://example.org/spire/server"), "invalid_target"},
		"the ID of the issuer":           {base("audience", "x", "spiffe_id", "spiffe://example.org/hallmark/issuer/ci"), "invalid_target"},
		"no form":                        {"%zz", "invalid_request"},
		"semicolons":                     {strings.ReplaceAll(base("audience", "x"), "&", ";"), "invalid_request"},
		"not UTF-8":                      {base("audience", "\xff"), "invalid_request"},
		"far too much":                   {base("audience", "x", "y", strings.Repeat("x", 200<<10)), "invalid_request"},
	} {
		t.Run(name, func(t *testing.T) {
			if a := w.post(c.form); a.Error != c.code || a.Token != "" || a.header.Get("Cache-Control") != "no-store" {
				t.Errorf("got %d %s, want %s", a.status, a.body, c.code)
			}
		})
	}
	request := func(method, target, kind string, body io.Reader, header ...string) *answer {
		r := httptest.NewRequest(method, target, body)
		r.Header.Set("Content-Type", kind)
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		return w.do(r)
	}
	const kind = "application/x-www-form-urlencoded"
	good := base("audience", "x")
	for name, a := range map[string]*answer{
		"GET":                       request(http.MethodGet, us+"/token?"+good, kind, nil),
		"a query":                   request(http.MethodPost, us+"/token?"+good, kind, strings.NewReader("")),
		"a query beside":            request(http.MethodPost, us+"/token?spiffe_id=x", kind, strings.NewReader(good)),
		"JSON":                      request(http.MethodPost, us+"/token", "application/json", strings.NewReader(`{}`)),
		"another path":              request(http.MethodPost, us+"/token/", kind, strings.NewReader(good)),
		"a password beside":         request(http.MethodPost, us+"/token", kind, strings.NewReader(good), "Authorization", "Basic eDp5"),
		"the metadata of no issuer": request(http.MethodGet, "https://tokens.example.org/.well-known/oauth-authorization-server", kind, nil),
	} {
		if a.status < 400 || a.Token != "" {
			t.Errorf("%s: got %d %s", name, a.status, a.body)
		}
	}
	// After all of that the token is good.
	w.validated(w.post(good), "x")
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	p := harness.NewIssuer(t)
	for want, change := range map[string]func(*exchange.Options){
		"is not an https URL":   func(o *exchange.Options) { o.Issuer = "http://tokens.example.org" },
		"not an https URL":      func(o *exchange.Options) { o.Issuer = "https://tokens.example.org/" },
		"an https URL":          func(o *exchange.Options) { o.Issuer = "https://tokens.example.org/{x}" },
		"without query":         func(o *exchange.Options) { o.Issuer = "https://tokens.example.org?x" },
		"issuers is missing":    func(o *exchange.Options) { o.Issuers = nil },
		"the most is 100":       func(o *exchange.Options) { o.Issuers = make([]exchange.IssuerConfig, 101) },
		"is there twice":        func(o *exchange.Options) { o.Issuers = append(o.Issuers, o.Issuers[0]) },
		"under another name":    func(o *exchange.Options) { o.Issuers = append(o.Issuers, o.Issuers[0]); o.Issuers[1].Name = "b" },
		"issuer is missing":     func(o *exchange.Options) { o.Issuers[0].Issuer = "" },
		"belong together":       func(o *exchange.Options) { o.Issuers[0].Preset = "spiffe" },
		"set both or none":      func(o *exchange.Options) { o.Issuers[0].TrustDomain = "other.org" },
		"is this server's own":  func(o *exchange.Options) { o.Issuers[0] = domain("example.org") },
		"no name of a trust":    func(o *exchange.Options) { o.Issuers[0] = domain("spiffe://other.org") },
		"are in its bundle":     func(o *exchange.Options) { o.Issuers[0] = domain("other.org"); o.Issuers[0].JWKSURL = "https://x" },
		"max_age":               func(o *exchange.Options) { o.Issuers[0].MaxAge = config.Duration(time.Millisecond) },
		"condition":             func(o *exchange.Options) { o.Issuers[0].Condition = "true ||" },
		"an issuer has no name": func(o *exchange.Options) { o.Issuers[0].Name = "" },
		"called \"../x\"":       func(o *exchange.Options) { o.Issuers[0].Name = "../x" },
		"algorithm \"none\"":    func(o *exchange.Options) { o.Issuers[0].Algorithms = []string{"none"} },
	} {
		o := exchange.Options{TrustDomain: td, Issuer: us, Issuers: []exchange.IssuerConfig{issuerOf(p)}}
		change(&o)
		if _, err := exchange.New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

func domain(name string) exchange.IssuerConfig {
	return exchange.IssuerConfig{IssuerConfig: oidc.IssuerConfig{Name: "other", Config: issuer.Config{}}, Preset: "spiffe", TrustDomain: name}
}

// FuzzRequest looks for requests that get a token without the issuer's, or that
// the endpoint fails at.
func FuzzRequest(f *testing.F) {
	w := newWorld(f, func(c *exchange.IssuerConfig) { c.Reusable = true })
	w.entry("ci", "/job", "oidc:issuer:ci")
	token := w.token(nil)
	f.Add(form("grant_type", grantExchange, "subject_token", token, "subject_token_type", typeJWT, "audience", "x"))
	f.Add(form("grant_type", bearer, "assertion", token, "resource", "https://x"))
	f.Add("grant_type=%00&&=&a")
	f.Fuzz(func(t *testing.T, body string) {
		at := *w
		at.t = t
		a := at.post(body)
		values, _ := url.ParseQuery(body)
		if a.status == http.StatusOK && values.Get("subject_token") != token && values.Get("assertion") != token && values.Get("client_assertion") != token {
			t.Errorf("%q got %s", body, a.body)
		}
		if a.status != http.StatusOK && (a.Error == "" || a.Token != "") {
			t.Errorf("%q got %d %s", body, a.status, a.body)
		}
	})
}
