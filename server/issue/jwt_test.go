package issue_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"encoding/asn1"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
)

var jwtAuthorities = []struct {
	algorithm jose.SignatureAlgorithm
	key       func(testing.TB) crypto.Signer
}{
	{jose.ES256, func(tb testing.TB) crypto.Signer { return newKey(tb, elliptic.P256()) }},
	{jose.ES384, func(tb testing.TB) crypto.Signer { return newKey(tb, elliptic.P384()) }},
	{jose.RS256, func(tb testing.TB) crypto.Signer { return newRSA(tb, 2048) }},
}

// decode returns a token's header and claims as JSON objects.
func decode(tb testing.TB, token string) (header, claims map[string]any) {
	tb.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		tb.Fatalf("the token has %d parts, want 3", len(parts))
	}
	for i, into := range []*map[string]any{&header, &claims} {
		data, err := base64.RawURLEncoding.Strict().DecodeString(parts[i])
		if err != nil {
			tb.Fatal(err)
		}
		if err := json.Unmarshal(data, into); err != nil {
			tb.Fatal(err)
		}
	}
	return header, claims
}

func keysOf(m map[string]any) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func TestJWTSVID_J01_J03_J06_J09_J11_TheHeaderHasAlgKidAndTypAlone(t *testing.T) {
	for _, a := range jwtAuthorities {
		h := newHouse(t)
		h.keys.jwt = newJWTAuthority(a.key(t), a.algorithm)
		svid, err := h.WorkloadJWT(context.Background(), workload(t), []string{"a"})
		if err != nil {
			t.Fatal(err)
		}
		header, _ := decode(t, svid.Token)
		if got := keysOf(header); !slices.Equal(got, []string{"alg", "kid", "typ"}) {
			t.Errorf("header has %v", got)
		}
		if header["alg"] != string(a.algorithm) || header["kid"] != "kid-1" || header["typ"] != "JWT" {
			t.Errorf("header is %v", header)
		}
	}
}

func TestJWTSVID_J13_J15_J20_TheClaims(t *testing.T) {
	h := newHouse(t)
	audience := []string{"z", "spiffe://example.org/db", `quo"te\`, "ü\u2028<&>\x01"}
	svid, err := h.WorkloadJWT(context.Background(), workload(t, func(e *entry.Entry) { e.Hint = "internal" }), audience)
	if err != nil {
		t.Fatal(err)
	}
	_, claims := decode(t, svid.Token)
	if got := keysOf(claims); !slices.Equal(got, []string{"aud", "exp", "iat", "sub"}) {
		t.Errorf("claims are %v", got)
	}
	if claims["sub"] != "spiffe://example.org/web" || svid.ID.Path() != "/web" || svid.Hint != "internal" {
		t.Errorf("sub is %v, ID %s, hint %q", claims["sub"], svid.ID, svid.Hint)
	}
	var got []string
	for _, a := range claims["aud"].([]any) {
		got = append(got, a.(string))
	}
	if !slices.Equal(got, audience) {
		t.Errorf("aud is %q, want %q", got, audience)
	}
	issued, expires := start.Truncate(time.Second), start.Truncate(time.Second).Add(5*time.Minute) // J-32
	if claims["iat"] != float64(issued.Unix()) || claims["exp"] != float64(expires.Unix()) {
		t.Errorf("iat %v, exp %v", claims["iat"], claims["exp"])
	}
	if !svid.IssuedAt.Equal(issued) || !svid.ExpiresAt.Equal(expires) {
		t.Errorf("says it is valid from %s to %s", svid.IssuedAt, svid.ExpiresAt)
	}
}

func TestJWTSVID_DI08_J32_IssuerAndTokenIDWhereTheyAreConfigured(t *testing.T) {
	h := newHouse(t, func(o *issue.Options) { o.JWTIssuer = "https://oidc.example.org" })
	e := workload(t, func(e *entry.Entry) { e.JWTIncludeJTI = true })
	seen := make(map[any]bool)
	for range 100 {
		svid, err := h.WorkloadJWT(context.Background(), e, []string{"a"})
		if err != nil {
			t.Fatal(err)
		}
		_, claims := decode(t, svid.Token)
		if claims["iss"] != "https://oidc.example.org" {
			t.Errorf("iss is %v", claims["iss"])
		}
		jti, _ := claims["jti"].(string)
		if raw, err := base64.RawURLEncoding.DecodeString(jti); err != nil || len(raw) != 16 || seen[jti] {
			t.Errorf("jti %q is not 128 bits, or not unique", jti)
		}
		seen[jti] = true
	}
}

func TestJWTSVIDsAreAcceptedByGoSpiffe(t *testing.T) {
	for _, a := range jwtAuthorities {
		h := newHouse(t, func(o *issue.Options) { o.Now = time.Now; o.JWTIssuer = "https://oidc.example.org" })
		key := a.key(t)
		h.keys.jwt = newJWTAuthority(key, a.algorithm)
		h.keys.jwt.ExpiresAt = time.Now().Add(time.Hour)
		bundle := jwtbundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{"kid-1": key.Public()})
		for range 3 {
			svid, err := h.WorkloadJWT(context.Background(), workload(t), []string{"spiffe://example.org/db", "other"})
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := jwtsvid.ParseAndValidate(svid.Token, bundle, []string{"spiffe://example.org/db"})
			if err != nil {
				t.Fatalf("%s: %v", a.algorithm, err)
			}
			if parsed.ID != svid.ID || !parsed.Expiry.Equal(svid.ExpiresAt) {
				t.Fatalf("%s: ID %s, expires %s", a.algorithm, parsed.ID, parsed.Expiry)
			}
		}
	}
}

// fixedSigner always returns one signature.
type fixedSigner struct {
	crypto.Signer
	signature []byte
}

func (s *fixedSigner) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return s.signature, nil
}

// RFC 7518 §3.4: both halves of an ECDSA signature have the length of the
// curve's order, also when they begin with zeros; ASN.1 leaves those out.
func TestJWTSVID_TheHalvesOfAnECDSASignatureHaveAFixedLength(t *testing.T) {
	full := new(big.Int).SetBytes(bytes.Repeat([]byte{0xff}, 32))
	for name, c := range map[string]struct{ r, s, want string }{
		"short r": {"1", full.Text(16), strings.Repeat("00", 31) + "01" + strings.Repeat("ff", 32)},
		"short s": {full.Text(16), "102", strings.Repeat("ff", 32) + strings.Repeat("00", 30) + "0102"},
		"long r":  {full.Text(16) + "ff", "1", ""},
	} {
		var numbers struct{ R, S *big.Int }
		numbers.R, _ = new(big.Int).SetString(c.r, 16)
		numbers.S, _ = new(big.Int).SetString(c.s, 16)
		der, err := asn1.Marshal(numbers)
		if err != nil {
			t.Fatal(err)
		}
		h := newHouse(t)
		h.keys.jwt.Signer = &fixedSigner{h.keys.jwt.Signer, der}
		svid, err := h.WorkloadJWT(context.Background(), workload(t), []string{"a"})
		if c.want == "" {
			if err == nil {
				t.Errorf("%s: issued", name)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		signature, err := base64.RawURLEncoding.DecodeString(svid.Token[strings.LastIndex(svid.Token, ".")+1:])
		if err != nil || hex.EncodeToString(signature) != c.want {
			t.Errorf("%s: signature is %x, want %s", name, signature, c.want)
		}
	}
}

func TestJWTSVID_J24_ASignatureIsOverItsOwnTokenAlone(t *testing.T) {
	h := newHouse(t)
	svid, err := h.WorkloadJWT(context.Background(), workload(t), []string{"a"})
	if err != nil {
		t.Fatal(err)
	}
	other, err := h.WorkloadJWT(context.Background(), workload(t), []string{"b"})
	if err != nil {
		t.Fatal(err)
	}
	verify := func(token string) error {
		parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil {
			return err
		}
		return parsed.Claims(h.keys.jwt.Signer.Public(), &jwt.Claims{})
	}
	if err := verify(svid.Token); err != nil {
		t.Fatal(err)
	}
	i := strings.LastIndex(svid.Token, ".")
	j := strings.LastIndex(other.Token, ".")
	if err := verify(svid.Token[:i] + other.Token[j:]); err == nil {
		t.Error("another token's signature verifies")
	}
}

func TestJWTSVID_J16_AudiencesAreBounded(t *testing.T) {
	h := newHouse(t)
	long := strings.Repeat("a", issue.MaxAudience)
	many := slices.Repeat([]string{"a"}, issue.MaxAudiences)
	for name, c := range map[string]struct {
		audience []string
		valid    bool
	}{
		"none":           {nil, false},
		"empty":          {[]string{"a", ""}, false},
		"longest":        {[]string{long}, true},
		"too long":       {[]string{long + "a"}, false},
		"most":           {many, true},
		"too many":       {append(many, "a"), false},
		"much":           {slices.Repeat([]string{long}, 9), false},
		"not UTF-8":      {[]string{"a\xff"}, false},
		"a byte of none": {[]string{"\xc3"}, false},
	} {
		_, err := h.WorkloadJWT(context.Background(), workload(t), c.audience)
		if c.valid {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		wantInvalid(t, err)
		_, err = h.MintJWT(context.Background(), spiffeid.RequireFromPath(td, "/web"), c.audience, 0)
		wantInvalid(t, err)
	}
}

func TestJWTLifetimesAreTheEntrysOrTheDefaultAndEndWithTheAuthority(t *testing.T) {
	h := newHouse(t, func(o *issue.Options) { o.JWTTTL = 2 * time.Minute })
	h.keys.jwt.ExpiresAt = start.Add(30 * time.Minute)
	end := start.Add(30 * time.Minute).Truncate(time.Second)
	now := start.Truncate(time.Second)
	for name, c := range map[string]struct {
		ttl  time.Duration
		want time.Time
	}{
		"default": {0, now.Add(2 * time.Minute)},
		"entry":   {10 * time.Minute, now.Add(10 * time.Minute)},
		"long":    {time.Hour, end},
	} {
		svid, err := h.WorkloadJWT(context.Background(), workload(t, func(e *entry.Entry) { e.JWTSVIDTTL = c.ttl }), []string{"a"})
		if err != nil {
			t.Fatal(err)
		}
		minted, err := h.MintJWT(context.Background(), spiffeid.RequireFromPath(td, "/web"), []string{"a"}, c.ttl)
		if err != nil {
			t.Fatal(err)
		}
		_, claims := decode(t, svid.Token)
		if !svid.ExpiresAt.Equal(c.want) || !minted.ExpiresAt.Equal(c.want) || claims["exp"] != float64(c.want.Unix()) {
			t.Errorf("%s: ends at %s, minted at %s, want %s", name, svid.ExpiresAt, minted.ExpiresAt, c.want)
		}
	}
	h.clock.add(30 * time.Minute)
	if _, err := h.WorkloadJWT(context.Background(), workload(t), []string{"a"}); err != authority.ErrUnavailable {
		t.Errorf("got error %v at the end of the authority, want ErrUnavailable", err)
	}
}

func TestMintJWTTakesWorkloadsOfTheTrustDomainOnly(t *testing.T) {
	h := newHouse(t)
	for _, id := range []spiffeid.ID{
		{},
		td.ID(),
		spiffeid.RequireFromPath(td, "/spire"),
		spiffeid.RequireFromPath(td, "/spire/server"),
		spiffeid.RequireFromPath(td, "/spire/agent/x/1"),
		spiffeid.RequireFromString("spiffe://other.org/web"),
	} {
		_, err := h.MintJWT(context.Background(), id, []string{"a"}, 0)
		wantInvalid(t, err)
	}
	if _, err := h.MintJWT(context.Background(), spiffeid.RequireFromPath(td, "/spired"), []string{"a"}, 0); err != nil {
		t.Error(err)
	}
	_, err := h.MintJWT(context.Background(), spiffeid.RequireFromPath(td, "/web"), []string{"a"}, -time.Second)
	wantInvalid(t, err)
}

func FuzzAudience(f *testing.F) {
	for _, a := range []string{"a", `"`, "\\u0000", "\x7f", "ü", "\u2028", "</script>"} {
		f.Add(a)
	}
	h := newHouse(f)
	e := workload(f)
	f.Fuzz(func(t *testing.T, audience string) {
		svid, err := h.WorkloadJWT(context.Background(), e, []string{audience})
		if err != nil {
			wantInvalid(t, err)
			return
		}
		if _, claims := decode(t, svid.Token); len(claims) != 4 || claims["aud"].([]any)[0] != audience {
			t.Errorf("aud is %q, want %q", claims["aud"], audience)
		}
	})
}
