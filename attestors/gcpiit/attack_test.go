package gcpiit_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/attestors/gcpiit"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestATokenThatProvesNothingIsRefused goes through tokens by which nobody must
// become a node.
func TestATokenThatProvesNothingIsRefused(t *testing.T) {
	google := harness.NewGCP(t, blog())
	s := newServer(t, trusting(google))
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	public, err := x509.MarshalPKIXPublicKey(google.Key.Public())
	must(t, err)
	claims := func(change func(map[string]any)) map[string]any {
		c := blog().Claims(gcpiit.DefaultAudience)
		change(c)
		return c
	}
	signed := func(change func(map[string]any)) string { return google.Sign(t, claims(change)) }
	engine := func(change func(map[string]any)) string {
		return signed(func(c map[string]any) { change(c["google"].(map[string]any)["compute_engine"].(map[string]any)) })
	}
	same := func(map[string]any) {}
	good := signed(same)
	parts := strings.Split(good, ".")
	turned, err := base64.RawURLEncoding.DecodeString(parts[2])
	must(t, err)
	turned[len(turned)-1] ^= 1
	raw := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	for name, c := range map[string]struct{ token, want string }{
		"a stranger's key":               {harness.SignJWT(t, jose.RS256, stranger, harness.GCPKeyID, claims(same)), "signature"},
		"a stranger's key of another ID": {harness.SignJWT(t, jose.RS256, stranger, "mine", claims(same)), "no key"},
		"no algorithm":                   {raw(`{"alg":"none","kid":"`+harness.GCPKeyID+`"}`) + "." + parts[1] + ".", ""},
		"no algorithm, a signature":      {raw(`{"alg":"none"}`) + "." + parts[1] + "." + parts[2], ""},
		"the public key as secret":       {harness.SignJWT(t, jose.HS256, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), harness.GCPKeyID, claims(same)), ""},
		"another algorithm of the key":   {harness.SignJWT(t, jose.PS256, google.Key, harness.GCPKeyID, claims(same)), "not allowed"},
		"a longer digest":                {harness.SignJWT(t, jose.RS512, google.Key, harness.GCPKeyID, claims(same)), "not allowed"},
		"an elliptic key":                {harness.SignJWT(t, jose.ES256, ec, harness.GCPKeyID, claims(same)), "not allowed"},
		"a key that it brings":           {raw(`{"alg":"RS256","jwk":{"kty":"RSA"}}`) + "." + parts[1] + "." + parts[2], "not allowed"},
		"another's claims":               {parts[0] + "." + raw(`{"iss":"https://accounts.google.com"}`) + "." + parts[2], ""},
		"another audience":               {signed(func(c map[string]any) { c["aud"] = "https://example.org" }), "audience"},
		"two audiences":                  {signed(func(c map[string]any) { c["aud"] = []string{gcpiit.DefaultAudience, "https://example.org"} }), "audience"},
		"no audience":                    {signed(func(c map[string]any) { delete(c, "aud") }), "aud"},
		"another issuer":                 {signed(func(c map[string]any) { c["iss"] = "https://accounts.google.com.evil.org" }), "iss"},
		"an issuer without scheme":       {signed(func(c map[string]any) { c["iss"] = "accounts.google.com" }), "iss"},
		"expired": {signed(func(c map[string]any) {
			c["iat"], c["exp"] = time.Now().Add(-2*time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()
		}), "expired"},
		"without end": {signed(func(c map[string]any) { delete(c, "exp") }), "exp"},
		"of tomorrow": {signed(func(c map[string]any) {
			c["iat"], c["exp"] = time.Now().Add(24*time.Hour).Unix(), time.Now().Add(25*time.Hour).Unix()
		}), "future"},
		"of yesterday, good for a week": {signed(func(c map[string]any) {
			c["iat"], c["exp"] = time.Now().Add(-24*time.Hour).Unix(), time.Now().Add(168*time.Hour).Unix()
		}), "it is taken for"},
		"a person's, or a service's":   {signed(func(c map[string]any) { delete(c, "google") }), "format=full"},
		"a claim of another form":      {signed(func(c map[string]any) { c["google"] = "x" }), "format=full"},
		"a foreign project":            {engine(func(e map[string]any) { e["project_id"] = "evil-123456" }), "project evil-123456 may not attest"},
		"a project in another's name":  {engine(func(e map[string]any) { e["project_id"] = "evil.com:big-kahuna-123456" }), "may not attest"},
		"a project that is a path":     {engine(func(e map[string]any) { e["project_id"] = "../../server" }), "no project's ID"},
		"no project":                   {engine(func(e map[string]any) { delete(e, "project_id") }), "no project's ID"},
		"an instance that is a path":   {engine(func(e map[string]any) { e["instance_id"] = "1/../../server" }), "no instance's ID"},
		"an instance that is a number": {engine(func(e map[string]any) { e["instance_id"] = 7 }), "malformed"},
		"no instance":                  {engine(func(e map[string]any) { delete(e, "instance_id") }), "no instance's ID"},
		"a zone that is a path":        {engine(func(e map[string]any) { e["zone"] = "../x" }), "which is none"},
		"a name that is a path":        {engine(func(e map[string]any) { e["instance_name"] = "x/../y" }), "no instance's name"},
		"half":                         {good[:len(good)/2], ""},
		"a bit turned":                 {parts[0] + "." + parts[1] + "." + base64.RawURLEncoding.EncodeToString(turned), "signature"},
		"twice":                        {good + "." + good, ""},
		"nothing":                      {"", ""},
		"a page":                       {"<html>", ""},
		"far too much":                 {good + strings.Repeat("A", 20<<10), "the most is"},
	} {
		e, err := s.Verify(t.Context(), []byte(c.token), unasked(t))
		if err == nil || e != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	if _, err := s.Verify(t.Context(), []byte(good), unasked(t)); err != nil {
		t.Errorf("the true one is refused: %v", err)
	}
}

func FuzzVerify(f *testing.F) {
	google := harness.NewGCP(f, blog())
	s := newServer(f, trusting(google))
	good := google.Sign(f, blog().Claims(gcpiit.DefaultAudience))
	f.Add([]byte(good))
	f.Add([]byte(good[:100]))
	f.Add([]byte("a.b.c"))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := s.Verify(t.Context(), data, unasked(t))
		if err == nil && e.Path != "gcp_iit/big-kahuna-123456/152986662232938449" {
			t.Errorf("admitted as %s", e.Path)
		}
	})
}
