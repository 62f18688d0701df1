package issuer_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/test/harness"
)

// signed signs any payload with any members of the header.
func signed(t testing.TB, a jose.SignatureAlgorithm, key any, header map[jose.HeaderKey]any, payload []byte) string {
	t.Helper()
	o := &jose.SignerOptions{ExtraHeaders: maps.Clone(header)}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: a, Key: key}, o)
	must(t, err)
	s, err := signer.Sign(payload)
	must(t, err)
	text, err := s.CompactSerialize()
	must(t, err)
	return text
}

// TestATokenThatProvesNothingIsRefused goes through tokens that nobody must take
// for the issuer's.
func TestATokenThatProvesNothingIsRefused(t *testing.T) {
	p, other := harness.NewIssuer(t), harness.NewIssuer(t)
	other.KeyID = "key-1"
	i := trust(t, configOf(p), issuer.Options{})
	_, err := i.Validate(t.Context(), p.Sign(t, p.Claims("us", nil)))
	must(t, err)

	now := time.Now()
	claims := func(name string, value any) string { return p.Sign(t, p.Claims("us", map[string]any{name: value})) }
	encode := base64.RawURLEncoding.EncodeToString
	payload, err := json.Marshal(p.Claims("us", nil))
	must(t, err)
	header := func(name jose.HeaderKey, value any) string {
		return signed(t, jose.ES256, p.Key, map[jose.HeaderKey]any{"kid": "key-1", name: value}, payload)
	}
	raw := func(payload string) string {
		return signed(t, jose.ES256, p.Key, map[jose.HeaderKey]any{"kid": "key-1"}, []byte(payload))
	}
	good := p.Sign(t, p.Claims("us", nil))
	parts := strings.Split(good, ".")
	jwk := jose.JSONWebKey{Key: other.Key.Public(), KeyID: "evil"}
	for name, token := range map[string]string{
		"nothing":                    "",
		"no JWT":                     "token",
		"the algorithm none":         encode([]byte(`{"alg":"none"}`)) + "." + parts[1] + ".",
		"none with a signature":      encode([]byte(`{"alg":"none","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"None":                       encode([]byte(`{"alg":"None","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"no algorithm":               encode([]byte(`{"kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"two algorithms":             encode([]byte(`{"alg":"none","alg":"ES256","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"the public key as a secret": harness.SignJWT(t, jose.HS256, p.JWKS(t), "key-1", p.Claims("us", nil)),
		"another algorithm":          encode([]byte(`{"alg":"RS256","kid":"key-1"}`)) + "." + parts[1] + "." + parts[2],
		"no signature":               parts[0] + "." + parts[1] + ".",
		"a signature of zeros":       parts[0] + "." + parts[1] + "." + encode(make([]byte, 64)),
		"another key":                harness.SignJWT(t, jose.ES256, other.Key, "key-1", p.Claims("us", nil)),
		"an unknown key":             harness.SignJWT(t, jose.ES256, p.Key, "key-2", p.Claims("us", nil)),
		"claims of another":          parts[0] + "." + strings.Split(p.Sign(t, p.Claims("us", map[string]any{"sub": "root"})), ".")[1] + "." + parts[2],
		"a key in the header":        signed(t, jose.ES256, other.Key, map[jose.HeaderKey]any{"kid": "evil", "jwk": jwk}, payload),
		"the issuer's in the header": header("jwk", jose.JSONWebKey{Key: p.Key.Public()}),
		"a URL of keys":              header("jku", other.URL+"/jwks"),
		"a URL of a certificate":     header("x5u", other.URL+"/cert"),
		"certificates":               header("x5c", []string{"AAAA"}),
		"critical headers":           header("crit", []string{"exp"}),
		"compression":                header("zip", "DEF"),
		"a nested token":             header("cty", "JWT"),
		"the type of another token":  header("typ", "wit+jwt"),
		"a logout token":             header("typ", "logout+jwt"),
		"a type that is none":        header("typ", 7),
		"no issuer":                  claims("iss", nil),
		"another issuer":             claims("iss", other.URL),
		"a slash more":               claims("iss", p.URL+"/"),
		"capital letters":            claims("iss", strings.ToUpper(p.URL)),
		"a look-alike":               claims("iss", strings.Replace(p.URL, "127", "\u0661\u0662\u0667", 1)),
		"issuers":                    claims("iss", []string{p.URL}),
		"no subject":                 claims("sub", nil),
		"an empty subject":           claims("sub", ""),
		"a number as subject":        claims("sub", 7),
		"subjects":                   claims("sub", []string{"job-7"}),
		"an invisible subject":       claims("sub", "job-7\u200b"),
		"a subject that turns back":  claims("sub", "job-\u202e7"),
		"a subject with a zero":      claims("sub", "job-7\x00"),
		"a long subject":             claims("sub", strings.Repeat("x", 2049)),
		"no audience":                claims("aud", nil),
		"an empty audience":          claims("aud", []string{}),
		"another audience":           claims("aud", "them"),
		"capital audience":           claims("aud", "US"),
		"a part of the audience":     claims("aud", "u"),
		"us and them":                claims("aud", []string{"us", "them"}),
		"an audience of a type":      claims("aud", map[string]bool{"us": true}),
		"audiences of a type":        claims("aud", []any{"us", 7}),
		"no end":                     claims("exp", nil),
		"an end as text":             claims("exp", fmt.Sprint(now.Add(time.Hour).Unix())),
		"an end in the past":         claims("exp", now.Add(-time.Minute).Unix()),
		"an end that is no number":   raw(strings.Replace(string(payload), `"exp":`, `"exp":1e400,"x":`, 1)),
		"a beginning to come":        claims("nbf", now.Add(time.Minute+issuer.Leeway).Unix()),
		"a beginning as text":        claims("nbf", "0"),
		"no issuance":                claims("iat", nil),
		"issuance as a truth":        claims("iat", true),
		"issued in the future":       claims("iat", now.Add(time.Minute+issuer.Leeway).Unix()),
		"issued long ago":            claims("iat", now.Add(-2*time.Hour).Unix()),
		"a jti that is none":         claims("jti", []string{"a"}),
		"an empty jti":               claims("jti", ""),
		"a claim twice":              raw(strings.Replace(string(payload), `{`, `{"sub":"root",`, 1)),
		"not UTF-8":                  raw(strings.Replace(string(payload), `job-7`, "job-\xff", 1)),
		"an array":                   raw(`[]`),
		"more after it":              raw(string(payload) + "{}"),
		"deep claims":                raw(strings.Replace(string(payload), `{`, `{"x":`+strings.Repeat("[", 40)+strings.Repeat("]", 40)+`,`, 1)),
		"far too much":               claims("x", strings.Repeat("x", 64<<10)),
		"white space":                good + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			got, err := i.Validate(t.Context(), token)
			if got != nil || err == nil || errors.Is(err, issuer.ErrUnavailable) {
				t.Fatalf("got %+v, %v", got, err)
			}
			if len(err.Error()) > 400 {
				t.Errorf("the error is long: %v", err)
			}
		})
	}
	if n := other.Asked.Load(); n != 0 {
		t.Errorf("the other issuer was asked %d times", n)
	}
}

// FuzzValidate looks for tokens that are taken though the issuer did not sign
// them, and for keys that make the reader fail.
func FuzzValidate(f *testing.F) {
	p := harness.NewIssuer(f)
	c := issuer.Config{Issuer: p.URL, Audiences: []string{"us"}, JWKSPath: write(f, p.JWKS(f))}
	i := trust(f, c, issuer.Options{})
	good := p.Sign(f, p.Claims("us", nil))
	f.Add(good)
	f.Add("e30.e30.AA")
	f.Fuzz(func(t *testing.T, token string) {
		got, err := i.Validate(t.Context(), token)
		if (got == nil) == (err == nil) {
			t.Errorf("got %v, %v", got, err)
		}
		if parsed, bad := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256}); got != nil && (bad != nil || parsed.Claims(p.Key.Public()) != nil) {
			t.Errorf("%q is taken", token)
		}
	})
}

// FuzzKeys looks for JWK Sets that the reader fails at.
func FuzzKeys(f *testing.F) {
	p := harness.NewIssuer(f)
	f.Add(p.JWKS(f))
	f.Add([]byte(`{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB","use":"sig","key_ops":["verify"],"x5c":["x"]}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := issuer.Config{Issuer: p.URL, Audiences: []string{"us"}, JWKSPath: write(t, data)}
		i, err := issuer.New(c, issuer.Options{})
		if err != nil {
			return
		}
		if got, err := i.Validate(t.Context(), "e30.e30.AA"); got != nil || err == nil {
			t.Errorf("got %v, %v", got, err)
		}
	})
}
