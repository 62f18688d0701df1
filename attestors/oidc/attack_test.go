package oidc_test

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/oidc"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestATokenThatProvesNothingIsRefused goes through tokens by which nobody must
// become a node.
func TestATokenThatProvesNothingIsRefused(t *testing.T) {
	p, other := harness.NewIssuer(t), harness.NewIssuer(t)
	changed := func(name string, value any) string { return p.Sign(t, claims(p, map[string]any{name: value})) }
	good := changed("jti", "1")
	for name, token := range map[string]string{
		"another key":                  harness.SignJWT(t, jose.ES256, other.Key, "key-1", claims(p, nil)),
		"a key that nobody knows":      harness.SignJWT(t, jose.ES256, p.Key, "key-2", claims(p, nil)),
		"the public key as a secret":   harness.SignJWT(t, jose.HS256, p.JWKS(t), "key-1", claims(p, nil)),
		"the algorithm none":           base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + good[strings.IndexByte(good, '.'):strings.LastIndexByte(good, '.')+1],
		"no signature":                 good[:strings.LastIndexByte(good, '.')+1],
		"no JWT":                       "token",
		"an issuer that is no issuer":  other.Sign(t, claims(other, nil)),
		"no issuer":                    changed("iss", nil),
		"the issuer with a slash":      changed("iss", p.URL+"/"),
		"another audience":             changed("aud", "spiffe://other.org/spire/server"),
		"an audience more":             changed("aud", []string{audience, "https://other.org"}),
		"no audience":                  changed("aud", nil),
		"an end in the past":           changed("exp", time.Now().Add(-time.Hour).Unix()),
		"no end":                       changed("exp", nil),
		"a beginning in the future":    changed("nbf", time.Now().Add(time.Hour).Unix()),
		"issued long ago":              changed("iat", time.Now().Add(-2*time.Hour).Unix()),
		"the condition is not met":     changed("kind", "human"),
		"the condition's claim is not": changed("kind", nil),
		"a condition's claim of type":  changed("kind", []string{"robot"}),
		"no fixed claim":               changed("serial", nil),
		"an empty fixed claim":         changed("serial", ""),
		"a fixed claim of a type":      changed("serial", []string{"r2-d2"}),
		"a fixed claim with slashes":   changed("serial", "a/../../spire/server"),
		"a fixed claim that is dots":   changed("serial", ".."),
		"a look-alike":                 changed("serial", "r\u0662-d2"),
		"a huge list":                  changed("groups", strings.Split(strings.Repeat("x,", 200), ",")),
	} {
		t.Run(name, func(t *testing.T) {
			c := plant(p)
			c.FixedClaims, c.AgentPathTemplate = []string{"serial"}, "oidc/plant/{{ .Claims.serial }}"
			e, err := verify(t, server(t, c), payload(t, token))
			if e != nil || err == nil || errors.Is(err, attestors.ErrUnavailable) {
				t.Fatalf("attested as %+v, %v", e, err)
			}
			if len(err.Error()) > 500 {
				t.Errorf("the error is long: %v", err)
			}
		})
	}
	if other.Asked.Load() != 0 {
		t.Error("an issuer was asked that nobody trusts")
	}
}

func TestAMalformedPayloadIsRefused(t *testing.T) {
	p := harness.NewIssuer(t)
	s := server(t, plant(p))
	for name, data := range map[string]string{
		"nothing": "", "null": "null", "an array": "[]", "no token": "{}", "an empty token": `{"token":""}`,
		"a token of a type": `{"token":{}}`, "trailing": `{"token":"x"}{}`, "far too much": `{"token":"` + strings.Repeat("x", 1<<20) + `"}`,
	} {
		if e, err := verify(t, s, []byte(data)); e != nil || err == nil || len(err.Error()) > 300 {
			t.Errorf("%s: got %v, %v", name, e, err)
		}
	}
	if n := p.Asked.Load(); n != 0 {
		t.Errorf("the issuer was asked %d times", n)
	}
}

func TestATokenIsNotShownTwice(t *testing.T) {
	p := harness.NewIssuer(t)
	s := server(t, plant(p))
	for _, change := range []map[string]any{{"jti": "1"}, nil} {
		all := claims(p, change)
		_, err := verify(t, s, payload(t, p.Sign(t, all)))
		must(t, err)
		again := maps.Clone(all)
		if change != nil {
			again["sub"] = "another" // jti is the same
		}
		if e, err := verify(t, s, payload(t, p.Sign(t, again))); !errors.Is(err, issuer.ErrUsed) {
			t.Errorf("attested as %+v, %v", e, err)
		}
	}
	// One that was refused is not used up.
	c := plant(p)
	c.FixedClaims, c.AgentPathTemplate = []string{"serial"}, "oidc/plant/{{ .Claims.serial }}"
	strict, token := server(t, c), payload(t, p.Sign(t, claims(p, map[string]any{"serial": ""})))
	for range 2 {
		if _, err := verify(t, strict, token); err == nil || errors.Is(err, issuer.ErrUsed) {
			t.Errorf("got %v", err)
		}
	}
}

func TestAnIssuerThatIsAwayIsNotTheNodesFault(t *testing.T) {
	p := harness.NewIssuer(t)
	p.Handle(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	var log bytes.Buffer
	s, err := oidc.New(oidc.ServerConfig{Issuers: []oidc.NodeIssuerConfig{plant(p)}}, oidc.Options{Audience: audience, Log: slog.New(slog.NewTextHandler(&log, nil))})
	must(t, err)
	token := p.Sign(t, claims(p, nil))
	if e, err := verify(t, s, payload(t, token)); e != nil || err != attestors.ErrUnavailable {
		t.Errorf("got %v, %v", e, err)
	}
	if !strings.Contains(log.String(), "503") || strings.Contains(log.String(), token) {
		t.Errorf("the log is %s", log.String())
	}
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	p := harness.NewIssuer(t)
	for want, change := range map[string]func(*oidc.NodeIssuerConfig){
		"has no name":             func(c *oidc.NodeIssuerConfig) { c.Name = "" },
		`called "a/b"`:            func(c *oidc.NodeIssuerConfig) { c.Name = "a/b" },
		"issuer is missing":       func(c *oidc.NodeIssuerConfig) { c.Issuer = "" },
		"not true or false":       func(c *oidc.NodeIssuerConfig) { c.Condition = "claims.sub" },
		"Syntax error":            func(c *oidc.NodeIssuerConfig) { c.Condition = "claims.sub ==" },
		`claims has "a:b"`:        func(c *oidc.NodeIssuerConfig) { c.Claims = map[string]string{"a:b": "a"} },
		"no JSON Pointer":         func(c *oidc.NodeIssuerConfig) { c.Claims = map[string]string{"a": "/a~2"} },
		"name is missing":         func(c *oidc.NodeIssuerConfig) { c.Claims = map[string]string{"a": ""} },
		"that fixed_claims lists": func(c *oidc.NodeIssuerConfig) { c.AgentPathTemplate = "oidc/plant/{{ .Claims.email }}" },
		"none of fixed_claims":    func(c *oidc.NodeIssuerConfig) { c.FixedClaims = []string{"serial"} },
		`fixed_claims has "/a"`:   func(c *oidc.NodeIssuerConfig) { c.FixedClaims = []string{"/a"} },
		"the same path of all":    func(c *oidc.NodeIssuerConfig) { c.AgentPathTemplate = "oidc/plant/node" },
		"does not begin with":     func(c *oidc.NodeIssuerConfig) { c.AgentPathTemplate = "oidc/other/{{ .Claims.sub }}" },
		"can't evaluate field":    func(c *oidc.NodeIssuerConfig) { c.AgentPathTemplate = "oidc/plant/{{ .Token }}" },
	} {
		c := plant(p)
		change(&c)
		_, err := oidc.New(oidc.ServerConfig{Issuers: []oidc.NodeIssuerConfig{c}}, oidc.Options{Audience: audience})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
	second := plant(p)
	second.Name = "mill"
	for want, issuers := range map[string][]oidc.NodeIssuerConfig{
		"issuers is missing": nil, "there twice": {plant(p), plant(p)}, "under another name": {plant(p), second},
		"the most is 100": make([]oidc.NodeIssuerConfig, 101),
	} {
		if _, err := oidc.New(oidc.ServerConfig{Issuers: issuers}, oidc.Options{Audience: audience}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	p := harness.NewIssuer(f)
	s := server(f, plant(p))
	token := p.Sign(f, claims(p, nil))
	f.Add(payload(f, token))
	f.Add([]byte(`{"token":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := s.Verify(t.Context(), data, nil)
		if (e == nil) == (err == nil) {
			t.Errorf("got %v, %v", e, err)
		}
		if e != nil && !bytes.Contains(data, []byte(token[:20])) {
			t.Errorf("attested by %q", data)
		}
	})
}

// FuzzClaim looks for claims that the reader fails at.
func FuzzClaim(f *testing.F) {
	for _, path := range []string{"sub", "/a/b", "/a~1b/*", "/*", "//"} {
		f.Add(path)
	}
	all := map[string]any{"sub": "x", "a": map[string]any{"b": []any{true, nil}}, "a/b": []any{"y"}}
	f.Fuzz(func(t *testing.T, path string) {
		c, err := oidc.ParseClaim(path)
		if err != nil {
			return
		}
		if values, err := c.Values(all); err != nil || fmt.Sprint(values) == "" {
			t.Errorf("%q: %v, %v", path, values, err)
		}
	})
}
