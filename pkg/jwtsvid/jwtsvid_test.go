package jwtsvid_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spiffejwt "github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
)

var (
	td     = spiffeid.RequireTrustDomainFromString("example.org")
	other  = spiffeid.RequireTrustDomainFromString("other.org")
	now    = time.Unix(1_800_000_000, 0)
	p256   = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p384   = must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	p521   = must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	second = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	rsa2k  = must(rsa.GenerateKey(rand.Reader, 2048))
	rsa1k  = must(rsa.GenerateKey(rand.Reader, 1024))
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func bundleOf(td spiffeid.TrustDomain, keys map[string]crypto.PublicKey) *bundle.Bundle {
	b := &bundle.Bundle{TrustDomain: td}
	for id, key := range keys {
		b.JWTAuthorities = append(b.JWTAuthorities, bundle.JWTAuthority{KeyID: id, PublicKey: key})
	}
	return b
}

func bundles(of spiffeid.TrustDomain) *bundle.Bundle {
	switch of {
	case td:
		return bundleOf(td, map[string]crypto.PublicKey{
			"p256": p256.Public(), "p384": p384.Public(), "p521": p521.Public(), "rsa": rsa2k.Public(), "weak": rsa1k.Public(),
		})
	case other:
		return bundleOf(other, map[string]crypto.PublicKey{"second": second.Public()})
	}
	return nil
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// token signs any header and payload by ES256.
func token(key *ecdsa.PrivateKey, header, payload string) string {
	signed := encode(header) + "." + encode(payload)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		panic(err)
	}
	sig := make([]byte, 64)
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return signed + "." + base64.RawURLEncoding.EncodeToString(sig)
}

const goodHeader = `{"alg":"ES256","kid":"p256","typ":"JWT"}`

func claims(change func(map[string]any)) string {
	m := map[string]any{"sub": "spiffe://example.org/web", "aud": []string{"us", "them"}, "exp": now.Add(time.Minute).Unix()}
	if change != nil {
		change(m)
	}
	return string(must(json.Marshal(m)))
}

func set(name string, value any) func(map[string]any) {
	return func(m map[string]any) {
		if value == nil {
			delete(m, name)
			return
		}
		m[name] = value
	}
}

func validate(token string) (*jwtsvid.SVID, error) {
	return jwtsvid.Validate(token, []string{"us"}, bundles, now)
}

func accepted(t *testing.T, token string) *jwtsvid.SVID {
	t.Helper()
	s, err := validate(token)
	if err != nil {
		t.Errorf("refused: %v", err)
	}
	return s
}

func refused(t *testing.T, token, says string) {
	t.Helper()
	if s, err := validate(token); err == nil {
		t.Errorf("accepted: %+v", s)
	} else if !strings.Contains(err.Error(), says) {
		t.Errorf("error is %q, want one that says %q", err, says)
	}
}

func TestJWTSVID_J01_AGoodTokenIsAccepted(t *testing.T) {
	s := accepted(t, token(p256, goodHeader, claims(set("admin", true))))
	if s.ID.String() != "spiffe://example.org/web" || len(s.Audience) != 2 || !s.ExpiresAt.Equal(now.Add(time.Minute)) || s.Claims["admin"] != true {
		t.Errorf("got %+v", s)
	}
}

func TestJWTSVID_J02_J05_OnlyTheCompactFormIsAccepted(t *testing.T) {
	good := token(p256, goodHeader, claims(nil))
	parts := strings.Split(good, ".")
	for name, bad := range map[string]string{
		"empty":      "",
		"flattened":  fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2]),
		"general":    fmt.Sprintf(`{"payload":%q,"signatures":[{"protected":%q,"signature":%q}]}`, parts[1], parts[0], parts[2]),
		"encrypted":  strings.Join([]string{parts[0], "", "", parts[1], parts[2]}, "."),
		"two parts":  parts[0] + "." + parts[1],
		"four":       good + ".",
		"spaces":     " " + good,
		"line break": good + "\n",
		"break in":   parts[0] + "." + parts[1][:10] + "\n" + parts[1][10:] + "." + parts[2],
		"padded":     parts[0] + "." + parts[1] + "." + parts[2] + "==",
		"std base64": strings.NewReplacer("-", "+", "_", "/").Replace(parts[0]) + "+." + parts[1] + "." + parts[2],
		"detached":   parts[0] + ".." + parts[2],
		"no header":  "." + parts[1] + "." + parts[2],
	} {
		t.Run(name, func(t *testing.T) { refused(t, bad, "") })
	}
	refused(t, good+strings.Repeat("A", jwtsvid.MaxToken), "the most is")
}

func TestJWTSVID_J04_TheHeaderIsAClosedSet(t *testing.T) {
	for _, member := range []string{`"jku":"https://x"`, `"jwk":{}`, `"x5u":"https://x"`, `"x5c":[]`, `"crit":["b64"]`, `"zip":"DEF"`, `"b64":false`, `"x5t":"a"`, `"cty":"JWT"`, `"new":1`} {
		refused(t, token(p256, strings.TrimSuffix(goodHeader, "}")+","+member+"}", claims(nil)), "no member")
	}
	for header, says := range map[string]string{
		`{"alg":"ES256","alg":"ES256","kid":"p256"}`: "twice",
		`{"alg":"ES256","kid":7}`:                    "not a string",
		`{"alg":["ES256"],"kid":"p256"}`:             "not a string",
		`{"alg":"ES256","kid":"p256","typ":null}`:    "not a string",
		`{"kid":"p256"}`:                             "no algorithm",
		`[]`:                                         "not a JSON object",
		`"x"`:                                        "not a JSON object",
		`{"alg":"ES256","kid":"p256"}{}`:             "more follows",
		`{"alg":"ES256","kid":"p256"`:                "not JSON",
		"{\"alg\":\"ES256\",\"kid\":\"\xff\"}":       "UTF-8",
	} {
		refused(t, token(p256, header, claims(nil)), says)
	}
}

func TestJWTSVID_J06_AllNineAlgorithmsAreAccepted(t *testing.T) {
	for alg, key := range map[jose.SignatureAlgorithm]struct {
		kid string
		key any
	}{
		jose.ES256: {"p256", p256}, jose.ES384: {"p384", p384}, jose.ES512: {"p521", p521},
		jose.RS256: {"rsa", rsa2k}, jose.RS384: {"rsa", rsa2k}, jose.RS512: {"rsa", rsa2k},
		jose.PS256: {"rsa", rsa2k}, jose.PS384: {"rsa", rsa2k}, jose.PS512: {"rsa", rsa2k},
	} {
		signer := must(jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: key.key, KeyID: key.kid}}, nil))
		good := must(must(signer.Sign([]byte(claims(nil)))).CompactSerialize())
		accepted(t, good)
		parts := strings.Split(good, ".")
		sig := must(base64.RawURLEncoding.DecodeString(parts[2]))
		for _, flip := range []int{0, len(sig) / 2, len(sig) - 1} { // J-24
			bad := append([]byte(nil), sig...)
			bad[flip] ^= 1
			refused(t, parts[0]+"."+parts[1]+"."+base64.RawURLEncoding.EncodeToString(bad), "signature")
		}
		refused(t, parts[0]+"."+parts[1]+"."+base64.RawURLEncoding.EncodeToString(append(sig, 0)), "signature")
	}
}

func TestJWTSVID_J07_OtherAlgorithmsAreRefusedBeforeAKeyIsLookedFor(t *testing.T) {
	looked := false
	for _, alg := range []string{"none", "None", "", "HS256", "HS384", "HS512", "EdDSA", "Ed25519", "ES256K", "es256", "RSA-OAEP"} {
		bad := token(p256, fmt.Sprintf(`{"alg":%q,"kid":"p256"}`, alg), claims(nil))
		_, err := jwtsvid.Validate(bad, []string{"us"}, func(spiffeid.TrustDomain) *bundle.Bundle { looked = true; return nil }, now)
		if err == nil || !strings.Contains(err.Error(), "is not allowed") || looked {
			t.Errorf("%s: %v; a bundle was looked for: %v", alg, err, looked)
		}
	}
}

func TestJWTSVID_J08_APublicKeyIsNoSecretAndAKeyHasItsAlgorithm(t *testing.T) {
	der := must(x509.MarshalPKIXPublicKey(rsa2k.Public()))
	for _, secret := range [][]byte{der, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})} {
		signed := encode(`{"alg":"HS256","kid":"rsa"}`) + "." + encode(claims(nil))
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(signed))
		refused(t, signed+"."+base64.RawURLEncoding.EncodeToString(mac.Sum(nil)), "not allowed")
	}
	for _, kid := range []string{"rsa", "p384", "p521"} {
		refused(t, token(p256, fmt.Sprintf(`{"alg":"ES256","kid":%q}`, kid), claims(nil)), "does not fit")
	}
	refused(t, token(p256, `{"alg":"ES384","kid":"p256"}`, claims(nil)), "does not fit")
	refused(t, token(p256, `{"alg":"RS256","kid":"p256"}`, claims(nil)), "does not fit")
	refused(t, token(p256, `{"alg":"RS256","kid":"weak"}`, claims(nil)), "bits")

	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	odd := func(spiffeid.TrustDomain) *bundle.Bundle {
		return bundleOf(td, map[string]crypto.PublicKey{"ed": edKey.Public()})
	}
	if _, err := jwtsvid.Validate(token(p256, `{"alg":"ES256","kid":"ed"}`, claims(nil)), []string{"us"}, odd, now); err == nil {
		t.Error("a key of an unknown kind was used")
	}
}

func TestJWTSVID_J10_ATokenWithoutKeyIDIsTriedWithEachKey(t *testing.T) {
	accepted(t, token(p256, `{"alg":"ES256"}`, claims(nil)))
	refused(t, token(second, `{"alg":"ES256"}`, claims(nil)), "signature")
	refused(t, token(p256, `{"alg":"ES256","kid":"unknown"}`, claims(nil)), "no JWT key")
	refused(t, token(p256, `{"alg":"ES256","kid":""}`, claims(nil)), "no JWT key")
}

func TestJWTSVID_J11_J12_TheTypeIsThatOfAJWTSVID(t *testing.T) {
	for _, typ := range []string{"JWT", "JOSE"} {
		accepted(t, token(p256, fmt.Sprintf(`{"alg":"ES256","kid":"p256","typ":%q}`, typ), claims(nil)))
	}
	accepted(t, token(p256, `{"alg":"ES256","kid":"p256"}`, claims(nil)))
	for _, typ := range []string{"wit+jwt", "at+jwt", "secevent+jwt", "jwt", ""} {
		refused(t, token(p256, fmt.Sprintf(`{"alg":"ES256","kid":"p256","typ":%q}`, typ), claims(nil)), "type")
	}
}

func TestJWTSVID_J14_TheSubjectIsASPIFFEID(t *testing.T) {
	for _, sub := range []any{
		nil, 7, "", "web", "https://example.org/web", "spiffe:///web", "spiffe://example.org/", "spiffe://example.org//a", "spiffe://example.org/a/",
		"spiffe://example.org/../a", "spiffe://Example.org/a", "spiffe://example.org/a?b", "spiffe://example.org/a#b", "spiffe://u@example.org/a",
		"spiffe://example.org:80/a", "spiffe://example.org/%41", "spiffe://example.org/" + strings.Repeat("a", 2048), "spiffe://" + strings.Repeat("a", 256) + "/a",
		[]string{"spiffe://example.org/web"},
	} {
		refused(t, token(p256, goodHeader, claims(set("sub", sub))), "sub")
	}
	longest := "spiffe://example.org/" + strings.Repeat("a", 2048-len("spiffe://example.org/")) // ID-18
	accepted(t, token(p256, goodHeader, claims(set("sub", longest))))
}

func TestJWTSVID_J16_J17_TheAudienceIsTheValidator(t *testing.T) {
	for _, aud := range []any{"us", []string{"us"}, []string{"them", "us"}} {
		accepted(t, token(p256, goodHeader, claims(set("aud", aud))))
	}
	for _, aud := range []any{nil, "", "them", []string{}, []string{"them"}, []any{"us", 7}, 7, map[string]any{"us": 1}, "US", "us "} {
		refused(t, token(p256, goodHeader, claims(set("aud", aud))), "aud")
	}
	several := []string{"elsewhere", "us"}
	if _, err := jwtsvid.Validate(token(p256, goodHeader, claims(nil)), several, bundles, now); err != nil {
		t.Error(err)
	}
}

func TestJWTSVID_J19_AValidatorHasAnAudience(t *testing.T) {
	good := token(p256, goodHeader, claims(set("aud", "")))
	for _, audience := range [][]string{nil, {}, {""}, {"us", ""}} {
		if _, err := jwtsvid.Validate(good, audience, bundles, now); err == nil {
			t.Errorf("audience %q was accepted", audience)
		}
	}
}

func TestJWTSVID_J21_J22_J23_TheTokenIsValidNow(t *testing.T) {
	at := func(d time.Duration) int64 { return now.Add(d).Unix() }
	for _, c := range []struct {
		name  string
		value any
		says  string // empty: accepted
	}{
		{"exp", nil, "exp"},
		{"exp", fmt.Sprint(at(time.Minute)), "exp"},
		{"exp", true, "exp"},
		{"exp", -1, "exp"},
		{"exp", json.Number("1e400"), "exp"},
		{"exp", json.Number("1e17"), "exp"},
		{"exp", json.Number("9223372036854775808"), "exp"},
		{"exp", at(-5 * time.Minute), "expired"},
		{"exp", at(-jwtsvid.Leeway), "expired"},
		{"exp", at(-jwtsvid.Leeway + time.Second), ""},
		{"exp", json.Number("1800000000.5"), ""},
		{"exp", json.Number("18e8"), ""},
		{"exp", int64(253402300799), ""},
		{"nbf", at(time.Minute), "not valid before"},
		{"nbf", at(jwtsvid.Leeway), ""},
		{"nbf", at(-time.Hour), ""},
		{"nbf", "soon", "nbf"},
		{"iat", at(time.Hour), ""},
	} {
		tok := token(p256, goodHeader, claims(set(c.name, c.value)))
		t.Run(fmt.Sprint(c.name, " ", c.value), func(t *testing.T) {
			if c.says == "" {
				accepted(t, tok)
			} else {
				refused(t, tok, c.says)
			}
		})
	}
	if jwtsvid.Leeway > time.Minute {
		t.Error("the leeway is more than a minute")
	}
}

func TestJWTSVID_J24_WhatIsSignedIsWhatIsRead(t *testing.T) {
	a := strings.Split(token(p256, goodHeader, claims(nil)), ".")
	b := strings.Split(token(p256, goodHeader, claims(set("sub", "spiffe://example.org/admin"))), ".")
	refused(t, a[0]+"."+b[1]+"."+a[2], "signature")
	refused(t, a[0]+"."+a[1]+".", "signature")
	refused(t, a[0]+"."+a[1]+"."+encode(strings.Repeat("\x00", 64)), "signature")
	refused(t, encode(`{"alg":"ES256","kid":"p256"}`)+"."+a[1]+"."+a[2], "signature")
}

func TestClaimsThatTwoReadersMayReadDifferentlyAreRefused(t *testing.T) {
	for payload, says := range map[string]string{
		strings.TrimSuffix(claims(nil), "}") + `,"sub":"spiffe://example.org/admin"}`: "twice",
		strings.TrimSuffix(claims(nil), "}") + `,"x":{"a":1,"a":2}}`:                  "twice",
		claims(nil) + claims(nil): "more follows",
		claims(nil) + "x":         "more follows",
		strings.TrimSuffix(claims(nil), "}") + ",\"x\":\"\xff\"}":                                                "UTF-8",
		strings.TrimSuffix(claims(nil), "}") + `,"x":` + strings.Repeat("[", 40) + strings.Repeat("]", 40) + `}`: "levels",
		"null": "not a JSON object",
		"":     "empty",
	} {
		refused(t, token(p256, goodHeader, payload), says)
	}
}

func TestJWTSVID_J30_J31_A37_TheKeyIsAJWTKeyOfTheSubjectsTrustDomain(t *testing.T) {
	refused(t, token(second, `{"alg":"ES256","kid":"second"}`, claims(nil)), "no JWT key")
	refused(t, token(p256, goodHeader, claims(set("sub", "spiffe://other.org/web"))), "no JWT key")
	refused(t, token(p256, goodHeader, claims(set("sub", "spiffe://unknown.org/web"))), "no bundle")
	accepted(t, token(second, `{"alg":"ES256","kid":"second"}`, claims(set("sub", "spiffe://other.org/web"))))
	none := func(spiffeid.TrustDomain) *bundle.Bundle { return bundleOf(td, nil) }
	if _, err := jwtsvid.Validate(token(p256, goodHeader, claims(nil)), []string{"us"}, none, now); err == nil || !strings.Contains(err.Error(), "no keys") {
		t.Errorf("error is %v", err)
	}
}

func TestJWTSVID_A36_LargeNumbersAreKept(t *testing.T) {
	s := accepted(t, token(p256, goodHeader, strings.TrimSuffix(claims(nil), "}")+`,"big":9007199254740993}`))
	if got := s.Claims["big"]; got != json.Number("9007199254740993") {
		t.Errorf("got %v", got)
	}
}

// FuzzValidate looks for tokens that we accept and go-spiffe does not. Without
// a key ID go-spiffe refuses all.
func FuzzValidate(f *testing.F) {
	good := token(p256, goodHeader, claims(nil))
	f.Add(good)
	f.Add(token(p256, `{"alg":"ES256"}`, claims(nil)))
	f.Add(token(p256, `{"alg":"none"}`, `{}`))
	f.Add(token(p256, goodHeader, claims(set("exp", 1.5))))
	f.Add("..")
	set := jwtbundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{"p256": p256.Public()})
	f.Fuzz(func(t *testing.T, token string) {
		s, err := validate(token)
		if err != nil {
			return
		}
		theirs, err := spiffejwt.ParseAndValidate(token, jwtbundle.NewSet(set), []string{"us"})
		if err != nil && !strings.Contains(err.Error(), "missing key id") && !strings.Contains(err.Error(), "token has expired") {
			t.Errorf("we accept %q, go-spiffe says %v", token, err)
		} else if err == nil && theirs.ID != s.ID {
			t.Errorf("we read %v, go-spiffe %v", s.ID, theirs.ID)
		}
	})
}

// FuzzParse mutates header and claims under a valid signature.
func FuzzParse(f *testing.F) {
	f.Add(goodHeader, claims(nil))
	f.Add(`{"alg":"ES256"}`, claims(set("nbf", 1)))
	f.Add(`{"alg":"ES256","kid":"p256","typ":"JOSE"}`, claims(set("aud", "us")))
	f.Fuzz(func(t *testing.T, header, payload string) {
		s, err := validate(token(p256, header, payload))
		if err != nil {
			return
		}
		var m map[string]any
		if err := json.Unmarshal([]byte(payload), &m); err != nil || m["sub"] != s.ID.String() {
			t.Errorf("accepted %q as %v", payload, s.ID)
		}
	})
}

func BenchmarkValidate(b *testing.B) {
	good := token(p256, goodHeader, claims(nil))
	of := bundles(td)
	look := func(spiffeid.TrustDomain) *bundle.Bundle { return of }
	for b.Loop() {
		if _, err := jwtsvid.Validate(good, []string{"us"}, look, now); err != nil {
			b.Fatal(err)
		}
	}
}
