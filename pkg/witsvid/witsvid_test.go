package witsvid_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	spiffewit "github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
	"github.com/hallmark-id/hallmark/pkg/witsvid"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	other = spiffeid.RequireTrustDomainFromString("other.org")
	web   = spiffeid.RequireFromPath(td, "/web")
	now   = time.Unix(1_800_000_000, 0)

	authority = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	second    = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p256      = must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) // of a workload
	p384      = must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	p521      = must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	rsa2k     = must(rsa.GenerateKey(rand.Reader, 2048))
	rsa1k     = must(rsa.GenerateKey(rand.Reader, 1024))

	bundles = witbundle.NewSet(
		witbundle.FromWITAuthorities(td, map[string]crypto.PublicKey{
			"Key": authority.Public(), "p384": p384.Public(), "p521": p521.Public(), "rsa": rsa2k.Public(), "weak": rsa1k.Public(),
		}),
		witbundle.FromWITAuthorities(other, map[string]crypto.PublicKey{"second": second.Public()}),
	)
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func encode(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// signed signs any header and payload. The header's algorithm need not be the
// one that is used.
func signed(alg jose.SignatureAlgorithm, key crypto.PrivateKey, header, payload string) string {
	in := encode(header) + "." + encode(payload)
	h := map[string]crypto.Hash{"256": crypto.SHA256, "384": crypto.SHA384, "512": crypto.SHA512}[string(alg[2:])]
	hash := h.New()
	hash.Write([]byte(in))
	sum := hash.Sum(nil)
	var sig []byte
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		size := (key.Params().BitSize + 7) / 8
		r, s, err := ecdsa.Sign(rand.Reader, key, sum)
		if err != nil {
			panic(err)
		}
		sig = make([]byte, 2*size)
		r.FillBytes(sig[:size])
		s.FillBytes(sig[size:])
	case *rsa.PrivateKey:
		var opts crypto.SignerOpts = h
		if alg[0] == 'P' {
			opts = &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: h}
		}
		sig = must(key.Sign(rand.Reader, sum, opts))
	}
	return in + "." + base64.RawURLEncoding.EncodeToString(sig)
}

// token signs a WIT-SVID by ES256.
func token(key *ecdsa.PrivateKey, header, payload string) string {
	return signed(jose.ES256, key, header, payload)
}

const goodHeader = `{"alg":"ES256","kid":"Key","typ":"wit+jwt"}`

func jwkOf(key crypto.PublicKey, alg jose.SignatureAlgorithm) map[string]any {
	var m map[string]any
	encoded := must(jose.JSONWebKey{Key: key, Algorithm: string(alg)}.MarshalJSON())
	if err := json.Unmarshal(encoded, &m); err != nil {
		panic(err)
	}
	return m
}

func cnf(jwk any) map[string]any { return map[string]any{"jwk": jwk} }

func claims(change func(map[string]any)) string {
	m := map[string]any{"sub": web.String(), "exp": now.Add(time.Hour).Unix(), "cnf": cnf(jwkOf(p256.Public(), jose.ES256))}
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

func good(change func(map[string]any)) string { return token(authority, goodHeader, claims(change)) }

func accepted(t *testing.T, token string) *witsvid.Unproven {
	t.Helper()
	u, err := witsvid.ValidateWithoutProof(token, bundles, now)
	if err != nil {
		t.Fatalf("refused: %v", err)
	}
	return u
}

func refused(t *testing.T, token, says string) {
	t.Helper()
	u, err := witsvid.ValidateWithoutProof(token, bundles, now)
	if err == nil {
		t.Errorf("accepted: %+v", u)
	} else if !strings.Contains(err.Error(), says) {
		t.Errorf("error is %q, want one that says %q", err, says)
	}
}

func TestWITSVID_W01_W09_AGoodTokenIsAccepted(t *testing.T) {
	u := accepted(t, good(set("nbf", now.Unix())))
	if u.ID != web || !u.ExpiresAt.Equal(now.Add(time.Hour)) || !u.NotBefore.Equal(now) || u.Algorithm != "ES256" || !p256.PublicKey.Equal(u.Key) {
		t.Errorf("got %+v", u)
	}
	parts := strings.Split(good(nil), ".")
	refused(t, fmt.Sprintf(`{"protected":%q,"payload":%q,"signature":%q}`, parts[0], parts[1], parts[2]), "compact")
	refused(t, strings.Join(parts[:2], "."), "compact")
	refused(t, parts[0]+"."+parts[1]+".", "signature")
	refused(t, parts[0]+"."+encode(claims(set("sub", "spiffe://example.org/admin")))+"."+parts[2], "signature")
	refused(t, strings.Repeat("a", witsvid.MaxToken+1), "bytes long")
	for _, sub := range []any{nil, 7, "", "web", "https://example.org/web", "spiffe://example.org/", "spiffe://Example.org/a", "spiffe://example.org/" + strings.Repeat("a", 2048), []string{web.String()}} {
		refused(t, good(set("sub", sub)), "sub")
	}
}

func TestWITSVID_W02_W03_TheKeyIDIsThereAndComparedByteByByte(t *testing.T) {
	refused(t, token(authority, `{"alg":"ES256","typ":"wit+jwt"}`, claims(nil)), "no key ID")
	refused(t, token(authority, `{"alg":"ES256","kid":"","typ":"wit+jwt"}`, claims(nil)), "no key ID")
	refused(t, token(authority, `{"alg":"ES256","kid":7,"typ":"wit+jwt"}`, claims(nil)), "not a string")
	for _, kid := range []string{"key", "KEY", "Key ", "Kéy", "unknown"} {
		refused(t, token(authority, fmt.Sprintf(`{"alg":"ES256","kid":%q,"typ":"wit+jwt"}`, kid), claims(nil)), "no WIT key")
	}
}

func TestWITSVID_W05_TheTypeIsThatOfAWITSVID(t *testing.T) {
	for _, typ := range []string{`"JWT"`, `"JOSE"`, `"WIT+JWT"`, `"application/wit+jwt"`, `"wpt+jwt"`, `"wit+jwt "`, `""`} {
		refused(t, token(authority, `{"alg":"ES256","kid":"Key","typ":`+typ+`}`, claims(nil)), "type")
	}
	refused(t, token(authority, `{"alg":"ES256","kid":"Key"}`, claims(nil)), "type")
	refused(t, token(authority, `{"alg":"ES256","kid":"Key","typ":null}`, claims(nil)), "not a string")
}

func TestWITSVID_W06_TheAlgorithmIsOneOfNineAndThatOfTheKey(t *testing.T) {
	for _, c := range []struct {
		alg jose.SignatureAlgorithm
		kid string
		key crypto.PrivateKey
	}{
		{jose.ES256, "Key", authority}, {jose.ES384, "p384", p384}, {jose.ES512, "p521", p521},
		{jose.RS256, "rsa", rsa2k}, {jose.RS384, "rsa", rsa2k}, {jose.RS512, "rsa", rsa2k},
		{jose.PS256, "rsa", rsa2k}, {jose.PS384, "rsa", rsa2k}, {jose.PS512, "rsa", rsa2k},
	} {
		accepted(t, signed(c.alg, c.key, fmt.Sprintf(`{"alg":%q,"kid":%q,"typ":"wit+jwt"}`, c.alg, c.kid), claims(nil)))
	}
	for _, alg := range []string{"none", "None", "HS256", "EdDSA", "Ed25519", "ES256K", "es256", ""} {
		refused(t, token(authority, fmt.Sprintf(`{"alg":%q,"kid":"Key","typ":"wit+jwt"}`, alg), claims(nil)), "not allowed")
	}
	refused(t, token(authority, `{"kid":"Key","typ":"wit+jwt"}`, claims(nil)), "no algorithm")
	refused(t, token(authority, `{"alg":"ES384","kid":"Key","typ":"wit+jwt"}`, claims(nil)), "does not fit")
	refused(t, token(authority, `{"alg":"RS256","kid":"Key","typ":"wit+jwt"}`, claims(nil)), "does not fit")
	refused(t, signed(jose.RS256, rsa1k, `{"alg":"RS256","kid":"weak","typ":"wit+jwt"}`, claims(nil)), "bits")
}

func TestWITSVID_W08_OtherMembersOfTheHeaderMeanNothingUnlessTheyAreCritical(t *testing.T) {
	jwk := string(must(json.Marshal(jwkOf(second.Public(), jose.ES256))))
	accepted(t, token(authority, `{"alg":"ES256","kid":"Key","typ":"wit+jwt","x":1,"jku":"https://evil.example","jwk":`+jwk+`}`, claims(nil)))
	refused(t, token(second, `{"alg":"ES256","kid":"Key","typ":"wit+jwt","jwk":`+jwk+`}`, claims(nil)), "signature")
	for _, crit := range []string{`["x"]`, `["b64"]`, `[]`, `null`} {
		refused(t, token(authority, `{"alg":"ES256","kid":"Key","typ":"wit+jwt","x":1,"b64":true,"crit":`+crit+`}`, claims(nil)), "critical")
	}
}

func TestWITSVID_W11_W12_W13_TheTokenIsBoundToAPublicKeyWithItsAlgorithm(t *testing.T) {
	for alg, key := range map[jose.SignatureAlgorithm]crypto.PublicKey{jose.ES384: p384.Public(), jose.ES512: p521.Public(), jose.RS256: rsa2k.Public(), jose.PS512: rsa2k.Public()} {
		if u := accepted(t, good(set("cnf", cnf(jwkOf(key, alg))))); u.Algorithm != string(alg) {
			t.Errorf("algorithm is %s", u.Algorithm)
		}
	}
	with := func(key crypto.PublicKey, alg jose.SignatureAlgorithm, name string, value any) map[string]any {
		jwk := jwkOf(key, alg)
		set(name, value)(jwk)
		return jwk
	}
	withKeySet := cnf(jwkOf(p256.Public(), jose.ES256))
	withKeySet["jku"] = "https://evil.example"
	ed, _, _ := ed25519.GenerateKey(rand.Reader)
	for name, c := range map[string]struct {
		cnf  any
		says string
	}{
		"none":           {nil, "cnf"},
		"null":           {json.RawMessage("null"), "cnf"},
		"text":           {"key", "cnf"},
		"no JWK":         {map[string]any{"kid": "x"}, "jwk is missing"},
		"a thumbprint":   {map[string]any{"jkt": "x"}, "jwk is missing"},
		"a key set too":  {withKeySet, "jku"},
		"private EC":     {cnf(jwkOf(p256, jose.ES256)), "private member d"},
		"private RSA":    {cnf(jwkOf(rsa2k, jose.RS256)), "private member"},
		"d alone":        {cnf(with(p256.Public(), jose.ES256, "d", "")), "private member d"},
		"a prime alone":  {cnf(with(rsa2k.Public(), jose.RS256, "p", "AQAB")), "private member p"},
		"secret":         {cnf(map[string]any{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}), "private member k"},
		"empty secret":   {cnf(map[string]any{"kty": "oct", "alg": "ES256"}), "public key"},
		"off the curve":  {cnf(with(p256.Public(), jose.ES256, "y", jwkOf(second.Public(), jose.ES256)["y"])), "public key"},
		"other curve":    {cnf(with(p256.Public(), jose.ES256, "crv", "secp256k1")), "public key"},
		"no algorithm":   {cnf(jwkOf(p256.Public(), "")), "no algorithm"},
		"odd algorithm":  {cnf(with(p256.Public(), jose.ES256, "alg", 7)), "no algorithm"},
		"none at all":    {cnf(jwkOf(p256.Public(), "none")), "not allowed"},
		"HS256":          {cnf(jwkOf(p256.Public(), jose.HS256)), "not allowed"},
		"EdDSA":          {cnf(jwkOf(ed, jose.EdDSA)), "not allowed"},
		"Ed25519 as EC":  {cnf(jwkOf(ed, jose.ES256)), "does not fit"},
		"EC as RSA":      {cnf(jwkOf(p256.Public(), jose.RS256)), "does not fit"},
		"RSA as EC":      {cnf(jwkOf(rsa2k.Public(), jose.ES256)), "does not fit"},
		"another curve":  {cnf(jwkOf(p256.Public(), jose.ES384)), "does not fit"},
		"a weak RSA key": {cnf(jwkOf(rsa1k.Public(), jose.RS256)), "bits"},
	} {
		t.Run(name, func(t *testing.T) { refused(t, good(set("cnf", c.cnf)), c.says) })
	}
}

func TestWITSVID_W17_W18_W19_W21_TheTokenIsValidNow(t *testing.T) {
	at := func(d time.Duration) int64 { return now.Add(d).Unix() }
	for _, c := range []struct {
		name  string
		value any
		says  string // empty: accepted
	}{
		{"exp", nil, "exp"},
		{"exp", fmt.Sprint(at(time.Minute)), "exp"},
		{"exp", json.Number("1e400"), "exp"},
		{"exp", json.Number("9223372036854775808"), "exp"},
		{"exp", at(-time.Hour), "expired"},
		{"exp", at(-witsvid.Leeway), "expired"},
		{"exp", at(-witsvid.Leeway + time.Second), ""},
		{"nbf", at(time.Minute), "not valid before"},
		{"nbf", at(witsvid.Leeway), ""},
		{"nbf", "soon", "nbf"},
		{"iat", at(time.Hour), ""},
	} {
		tok := good(set(c.name, c.value))
		t.Run(fmt.Sprint(c.name, " ", c.value), func(t *testing.T) {
			if c.says == "" {
				accepted(t, tok)
			} else {
				refused(t, tok, c.says)
			}
		})
	}
	if witsvid.Leeway > 2*time.Minute {
		t.Error("the leeway is more than two minutes")
	}
}

func TestWITSVID_W24_ATokenWithAnAudienceIsRefused(t *testing.T) {
	for _, aud := range []any{"us", []string{"us"}, []string{}, json.RawMessage("null")} {
		refused(t, good(set("aud", aud)), "aud")
	}
}

func TestWITSVID_W25_OtherClaimsMeanNothingAndPassThrough(t *testing.T) {
	u := accepted(t, good(set("big", json.Number("9007199254740993"))))
	if got := u.Claims["big"]; got != json.Number("9007199254740993") {
		t.Errorf("got %v", got)
	}
	refused(t, token(authority, goodHeader, strings.TrimSuffix(claims(nil), "}")+`,"sub":"spiffe://example.org/admin"}`), "twice")
}

func TestWITSVID_W34_TheKeyIsAWITKeyOfTheSubjectsTrustDomain(t *testing.T) {
	accepted(t, token(second, `{"alg":"ES256","kid":"second","typ":"wit+jwt"}`, claims(set("sub", "spiffe://other.org/web"))))
	refused(t, token(second, `{"alg":"ES256","kid":"second","typ":"wit+jwt"}`, claims(nil)), "no WIT key")
	refused(t, good(set("sub", "spiffe://other.org/web")), "no WIT key")
	refused(t, good(set("sub", "spiffe://unknown.org/web")), "no bundle")

	// A bundle document as it is published: only the key for WIT-SVIDs counts.
	doc := func(use string) []byte {
		return must(json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: authority.Public(), KeyID: "Key", Use: use}}}))
	}
	for _, use := range []string{"wit-svid", "jwt-svid", "WIT-SVID", "sig", ""} {
		b := must(spiffebundle.Parse(td, bundle.Usable(doc(use))))
		_, err := witsvid.ValidateWithoutProof(good(nil), b.WITBundle(), now)
		if (err == nil) != (use == "wit-svid") {
			t.Errorf("with the use %q: %v", use, err)
		}
	}
	wrong := sourceFunc(func(spiffeid.TrustDomain) (*witbundle.Bundle, error) { return bundles.GetWITBundleForTrustDomain(td) })
	if _, err := witsvid.ValidateWithoutProof(token(authority, goodHeader, claims(set("sub", "spiffe://other.org/web"))), wrong, now); err == nil {
		t.Error("another trust domain's bundle was used")
	}
}

type sourceFunc func(spiffeid.TrustDomain) (*witbundle.Bundle, error)

func (f sourceFunc) GetWITBundleForTrustDomain(td spiffeid.TrustDomain) (*witbundle.Bundle, error) {
	return f(td)
}

// Both validators have the same key, so that nothing but the kind of token
// decides.
func TestWITSVID_W35_EachValidatorRefusesTheOthersTokens(t *testing.T) {
	aud := set("aud", "us")
	jwtBundles := func(spiffeid.TrustDomain) *bundle.Bundle {
		return &bundle.Bundle{TrustDomain: td, JWTAuthorities: []bundle.JWTAuthority{{KeyID: "Key", PublicKey: authority.Public()}}}
	}
	for name, c := range map[string]struct {
		token    string
		jwt, wit bool
	}{
		"a JWT-SVID":                        {token(authority, `{"alg":"ES256","kid":"Key","typ":"JWT"}`, claims(aud)), true, false},
		"a JWT-SVID without a type":         {token(authority, `{"alg":"ES256","kid":"Key"}`, claims(aud)), true, false},
		"a JWT-SVID without an audience":    {token(authority, `{"alg":"ES256","kid":"Key","typ":"JWT"}`, claims(nil)), false, false},
		"a WIT-SVID":                        {token(authority, goodHeader, claims(nil)), false, true},
		"a WIT-SVID with an audience":       {token(authority, goodHeader, claims(aud)), false, false},
		"a proof signed by the authority":   {token(authority, `{"alg":"ES256","kid":"Key","typ":"wpt+jwt"}`, claims(aud)), false, false},
		"an access token of the same key":   {token(authority, `{"alg":"ES256","kid":"Key","typ":"at+jwt"}`, claims(aud)), false, false},
		"a status list of the same key":     {token(authority, `{"alg":"ES256","kid":"Key","typ":"statuslist+jwt"}`, claims(aud)), false, false},
		"a security event of the same key":  {token(authority, `{"alg":"ES256","kid":"Key","typ":"secevent+jwt"}`, claims(aud)), false, false},
		"a WIT-SVID of a key for JWT-SVIDs": {token(second, goodHeader, claims(nil)), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			_, asJWT := jwtsvid.Validate(c.token, []string{"us"}, jwtBundles, now)
			_, asWIT := witsvid.ValidateWithoutProof(c.token, bundles, now)
			if (asJWT == nil) != c.jwt || (asWIT == nil) != c.wit {
				t.Errorf("as a JWT-SVID: %v; as a WIT-SVID: %v", asJWT, asWIT)
			}
		})
	}
}

// FuzzValidate looks for tokens that we accept and go-spiffe does not.
func FuzzValidate(f *testing.F) {
	f.Add(good(nil))
	f.Add(good(set("nbf", 1)))
	f.Add(token(authority, `{"alg":"none","typ":"wit+jwt"}`, `{}`))
	f.Add("..")
	f.Fuzz(func(t *testing.T, token string) { sameAsGoSPIFFE(t, token) })
}

// FuzzClaims mutates header and claims under a valid signature.
func FuzzClaims(f *testing.F) {
	f.Add(goodHeader, claims(nil))
	f.Add(goodHeader, claims(set("cnf", cnf(jwkOf(rsa2k.Public(), jose.PS256)))))
	f.Add(`{"alg":"ES256","kid":"Key","typ":"wit+jwt","x":[1]}`, claims(set("exp", 1.5e10)))
	f.Fuzz(func(t *testing.T, header, payload string) { sameAsGoSPIFFE(t, token(authority, header, payload)) })
}

func sameAsGoSPIFFE(t *testing.T, token string) {
	u, err := witsvid.ValidateWithoutProof(token, bundles, now)
	if err != nil {
		return
	}
	theirs, err := spiffewit.ParseAndValidate(token, bundles)
	switch {
	case err != nil && strings.Contains(err.Error(), "has expired"), err != nil && strings.Contains(err.Error(), "not yet valid"): // by the real clock
	case err != nil:
		t.Errorf("we accept %q, go-spiffe says %v", token, err)
	case theirs.ID != u.ID || !u.Key.(interface{ Equal(crypto.PublicKey) bool }).Equal(theirs.PublicKey):
		t.Errorf("we read %v, go-spiffe %v", u.ID, theirs.ID)
	}
}

func BenchmarkValidateWithoutProof(b *testing.B) {
	tok := good(nil)
	for b.Loop() {
		if _, err := witsvid.ValidateWithoutProof(tok, bundles, now); err != nil {
			b.Fatal(err)
		}
	}
}
