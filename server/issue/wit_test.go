package issue_test

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
)

func newWITKey(tb testing.TB, key crypto.Signer, algorithm string) issue.WITKey {
	tb.Helper()
	return issue.WITKey{PKIX: pkixOf(tb, key.Public()), Algorithm: algorithm}
}

func pkixOf(tb testing.TB, public crypto.PublicKey) []byte {
	tb.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

// witKeys are keys of each kind, with the algorithms that fit them.
func witKeys(tb testing.TB) map[crypto.Signer][]string {
	return map[crypto.Signer][]string{
		newKey(tb, elliptic.P256()): {"ES256"},
		newKey(tb, elliptic.P384()): {"ES384"},
		newKey(tb, elliptic.P521()): {"ES512"},
		newRSA(tb, 2048):            {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"},
	}
}

func TestWITSVID_W01_W02_W05_W06_W07_W26_TheHeaderHasAlgKidAndTypAlone(t *testing.T) {
	for _, a := range jwtAuthorities {
		h := newHouse(t)
		h.keys.wit = newJWTAuthority(a.key(t), a.algorithm)
		svid, err := h.WorkloadWIT(context.Background(), workload(t), newWITKey(t, newKey(t, elliptic.P256()), "ES256"))
		if err != nil {
			t.Fatal(err)
		}
		header, _ := decode(t, svid.Token) // three parts, in the base64url of a compact JWS
		if got := keysOf(header); !slices.Equal(got, []string{"alg", "kid", "typ"}) {
			t.Errorf("header has %v", got)
		}
		if header["alg"] != string(a.algorithm) || header["kid"] != "kid-1" || header["typ"] != "wit+jwt" {
			t.Errorf("header is %v", header)
		}
	}
}

func TestWITSVID_W09_W10_W14_W17_W22_W23_W26_TheClaims(t *testing.T) {
	// An issuer of JWT-SVIDs that OpenID Connect discovers is not one of
	// WIT-SVIDs.
	h := newHouse(t, func(o *issue.Options) { o.JWTIssuer = "https://oidc.example.org" })
	e := workload(t, func(e *entry.Entry) { e.Hint = "internal" })
	key := newWITKey(t, newKey(t, elliptic.P256()), "ES256")
	seen := map[any]bool{}
	for range 100 {
		svid, err := h.WorkloadWIT(context.Background(), e, key)
		if err != nil {
			t.Fatal(err)
		}
		_, claims := decode(t, svid.Token)
		if got := keysOf(claims); !slices.Equal(got, []string{"cnf", "exp", "iat", "jti", "nbf", "sub"}) {
			t.Fatalf("claims are %v", got)
		}
		if claims["sub"] != "spiffe://example.org/web" || svid.ID.Path() != "/web" || svid.Hint != "internal" {
			t.Errorf("sub is %v, ID %s, hint %q", claims["sub"], svid.ID, svid.Hint)
		}
		issued, expires := start.Truncate(time.Second), start.Truncate(time.Second).Add(time.Hour)
		if claims["iat"] != float64(issued.Unix()) || claims["exp"] != float64(expires.Unix()) || claims["nbf"] != float64(issued.Unix()-10) {
			t.Errorf("iat %v, nbf %v, exp %v", claims["iat"], claims["nbf"], claims["exp"])
		}
		if !svid.IssuedAt.Equal(issued) || !svid.ExpiresAt.Equal(expires) {
			t.Errorf("says it is valid from %s to %s", svid.IssuedAt, svid.ExpiresAt)
		}
		jti, _ := claims["jti"].(string)
		if raw, err := base64.RawURLEncoding.DecodeString(jti); err != nil || len(raw) != 16 || seen[jti] {
			t.Errorf("jti %q is not 128 bits, or not unique", jti)
		}
		seen[jti] = true
	}
}

func TestWITSVID_W12_W13_W26_TheConfirmationIsThePublicKeyWithItsAlgorithm(t *testing.T) {
	h := newHouse(t)
	for key, algorithms := range witKeys(t) {
		for _, algorithm := range algorithms {
			svid, err := h.WorkloadWIT(context.Background(), workload(t), newWITKey(t, key, algorithm))
			if err != nil {
				t.Fatal(err)
			}
			_, claims := decode(t, svid.Token)
			cnf := claims["cnf"].(map[string]any)
			if got := keysOf(cnf); !slices.Equal(got, []string{"jwk"}) {
				t.Errorf("cnf has %v", got)
			}
			text, err := json.Marshal(cnf["jwk"])
			if err != nil {
				t.Fatal(err)
			}
			members := []string{"alg", "crv", "kty", "x", "y"}
			if strings.Contains(algorithm, "S2") || strings.Contains(algorithm, "S3") || strings.Contains(algorithm, "S5") {
				if _, rsa := key.(*rsa.PrivateKey); rsa {
					members = []string{"alg", "e", "kty", "n"}
				}
			}
			if got := keysOf(cnf["jwk"].(map[string]any)); !slices.Equal(got, members) {
				t.Errorf("%s: cnf.jwk has %v", algorithm, got)
			}
			var jwk jose.JSONWebKey
			if err := json.Unmarshal(text, &jwk); err != nil || !jwk.IsPublic() || !jwk.Valid() || jwk.Algorithm != algorithm {
				t.Errorf("%s: cnf.jwk is %s, %v", algorithm, text, err)
			}
			if !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(jwk.Key) {
				t.Errorf("%s: cnf.jwk is another key", algorithm)
			}
		}
	}
}

func TestWITSVID_W06_W12_W13_OtherKeysAndAlgorithmsAreRefused(t *testing.T) {
	h := newHouse(t)
	ec, rsa2048 := newKey(t, elliptic.P256()), newRSA(t, 2048)
	small := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 1023, 1), E: 65537}
	huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 8192, 1), E: 65537}
	exponent := &rsa.PublicKey{N: rsa2048.N, E: 3}
	x25519, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	off := pkixOf(t, ec.Public())
	off[len(off)-1] ^= 1
	for text, key := range map[string]issue.WITKey{
		"missing public key":                            {Algorithm: "ES256"},
		"missing signing algorithm":                     {PKIX: pkixOf(t, ec.Public())},
		"malformed public key":                          {PKIX: []byte("no key"), Algorithm: "ES256"},
		"the public key is 4097 bytes long":             {PKIX: make([]byte, 4097), Algorithm: "ES256"},
		"malformed public key: P256 point not on curve": {PKIX: off, Algorithm: "ES256"},
		"malformed public key: x509: trailing data":     {PKIX: append(pkixOf(t, ec.Public()), 0), Algorithm: "ES256"},
		`"ES384" does not fit the public key; use ES2`:  newWITKey(t, ec, "ES384"),
		`"EdDSA" does not fit the public key`:           newWITKey(t, ec, "EdDSA"),
		`"HS256" does not fit the public key`:           newWITKey(t, ec, "HS256"),
		`"none" does not fit the public key`:            newWITKey(t, ec, "none"),
		`"es256" does not fit the public key`:           newWITKey(t, ec, "es256"),
		`"ES256" does not fit the public key; use RS2`:  newWITKey(t, rsa2048, "ES256"),
		`"RS256" does not fit the public key; use ES2`:  newWITKey(t, ec, "RS256"),
		`"ES256AAAAAAAAAAA" does not fit`:               newWITKey(t, ec, "ES256"+strings.Repeat("A", 1<<10)),
		"(ed25519.PublicKey) is not supported by WIT-":  newWITKey(t, newEd25519(t), "EdDSA"),
		"(*ecdh.PublicKey) is not supported":            {PKIX: pkixOf(t, x25519.PublicKey()), Algorithm: "ES256"},
		"(*dsa.PublicKey) is not supported":             {PKIX: dsaKey(t), Algorithm: "ES256"},
		"on the curve P-224":                            newWITKey(t, newKey(t, elliptic.P224()), "ES256"),
		"RSA key has 1024 bits":                         {PKIX: pkixOf(t, small), Algorithm: "RS256"},
		"RSA key has 8193 bits":                         {PKIX: pkixOf(t, huge), Algorithm: "RS256"},
		"public exponent 3":                             {PKIX: pkixOf(t, exponent), Algorithm: "PS256"},
	} {
		_, err := h.WorkloadWIT(context.Background(), workload(t), key)
		wantInvalid(t, err)
		if err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("got %q, want one with %q", err, text)
		}
		_, err = h.MintWIT(context.Background(), spiffeid.RequireFromPath(td, "/web"), key, 0)
		wantInvalid(t, err)
	}
}

// dsaKey encodes a public key of DSA, which Go reads and does not write.
func dsaKey(t *testing.T) []byte {
	t.Helper()
	p := struct{ P, Q, G *big.Int }{big.NewInt(23), big.NewInt(11), big.NewInt(4)}
	parameters, err := asn1.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	y, err := asn1.Marshal(big.NewInt(8))
	if err != nil {
		t.Fatal(err)
	}
	der, err := asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}{
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10040, 4, 1}, Parameters: asn1.RawValue{FullBytes: parameters}},
		asn1.BitString{Bytes: y, BitLength: 8 * len(y)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestWITSVIDsAreAcceptedByGoSpiffe(t *testing.T) {
	for _, a := range jwtAuthorities {
		h := newHouse(t, func(o *issue.Options) { o.Now = time.Now })
		signer := a.key(t)
		h.keys.wit = newJWTAuthority(signer, a.algorithm)
		h.keys.wit.ExpiresAt = time.Now().Add(time.Hour)
		bundle := witbundle.FromWITAuthorities(td, map[string]crypto.PublicKey{"kid-1": signer.Public()})
		for key, algorithms := range witKeys(t) {
			for _, algorithm := range algorithms {
				svid, err := h.WorkloadWIT(context.Background(), workload(t), newWITKey(t, key, algorithm))
				if err != nil {
					t.Fatal(err)
				}
				parsed, err := witsvid.ParseAndValidate(svid.Token, bundle)
				if err != nil {
					t.Fatalf("%s, %s: %v", a.algorithm, algorithm, err)
				}
				if parsed.ID != svid.ID || !parsed.Expiry.Equal(svid.ExpiresAt) || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(parsed.PublicKey) {
					t.Fatalf("%s, %s: ID %s, expires %s", a.algorithm, algorithm, parsed.ID, parsed.Expiry)
				}
				// Nor is it taken for a token of a bearer.
				if _, err := jwtsvid.ParseInsecure(svid.Token, []string{"a"}); err == nil {
					t.Error("a WIT-SVID is taken for a JWT-SVID")
				}
			}
		}
	}
}

func TestWITLifetimesAreTheDefaultOrAskedForAndEndWithTheAuthority(t *testing.T) {
	h := newHouse(t, func(o *issue.Options) { o.WITTTL = 2 * time.Minute })
	h.keys.wit.ExpiresAt = start.Add(30 * time.Minute)
	end, now := start.Add(30*time.Minute).Truncate(time.Second), start.Truncate(time.Second)
	key := newWITKey(t, newKey(t, elliptic.P256()), "ES256")
	id := spiffeid.RequireFromPath(td, "/web")
	for ttl, want := range map[time.Duration]time.Time{0: now.Add(2 * time.Minute), 10 * time.Minute: now.Add(10 * time.Minute), time.Hour: end} {
		svid, err := h.MintWIT(context.Background(), id, key, ttl)
		if err != nil {
			t.Fatal(err)
		}
		if _, claims := decode(t, svid.Token); !svid.ExpiresAt.Equal(want) || claims["exp"] != float64(want.Unix()) {
			t.Errorf("%s: ends at %s, want %s", ttl, svid.ExpiresAt, want)
		}
	}
	// The lifetimes of an entry are of its other SVIDs.
	svid, err := h.WorkloadWIT(context.Background(), workload(t, func(e *entry.Entry) { e.JWTSVIDTTL, e.X509SVIDTTL = time.Hour, time.Hour }), key)
	if err != nil || !svid.ExpiresAt.Equal(now.Add(2*time.Minute)) {
		t.Errorf("ends at %s, %v", svid.ExpiresAt, err)
	}
	h.clock.add(30 * time.Minute)
	if _, err := h.WorkloadWIT(context.Background(), workload(t), key); err != authority.ErrUnavailable {
		t.Errorf("got error %v at the end of the authority, want ErrUnavailable", err)
	}
}

func TestMintWITTakesWorkloadsOfTheTrustDomainOnly(t *testing.T) {
	h := newHouse(t)
	key := newWITKey(t, newKey(t, elliptic.P256()), "ES256")
	for _, id := range []spiffeid.ID{
		{}, td.ID(), spiffeid.RequireFromPath(td, "/spire/agent/x/1"), spiffeid.RequireFromString("spiffe://other.org/web"),
	} {
		_, err := h.MintWIT(context.Background(), id, key, 0)
		wantInvalid(t, err)
	}
	_, err := h.MintWIT(context.Background(), spiffeid.RequireFromPath(td, "/web"), key, -time.Second)
	wantInvalid(t, err)
}

// Whatever is asked for, a token that is issued is one that a validator takes.
func FuzzWITKey(f *testing.F) {
	for key, algorithms := range witKeys(f) {
		for _, algorithm := range algorithms {
			f.Add(pkixOf(f, key.Public()), algorithm)
		}
	}
	f.Add([]byte{0x30, 0x80}, "EdDSA")
	h := newHouse(f, func(o *issue.Options) { o.Now = time.Now })
	h.keys.wit.ExpiresAt = time.Now().Add(24 * time.Hour)
	bundle := witbundle.FromWITAuthorities(td, map[string]crypto.PublicKey{"kid-1": h.keys.wit.Signer.Public()})
	e := workload(f)
	f.Fuzz(func(t *testing.T, public []byte, algorithm string) {
		svid, err := h.WorkloadWIT(context.Background(), e, issue.WITKey{PKIX: public, Algorithm: algorithm})
		if err != nil {
			wantInvalid(t, err)
			return
		}
		parsed, err := witsvid.ParseAndValidate(svid.Token, bundle)
		if err != nil {
			t.Fatal(err)
		}
		switch key := parsed.PublicKey.(type) {
		case *ecdsa.PublicKey, *rsa.PublicKey:
		default:
			t.Errorf("a key of type %T was let through", key)
		}
	})
}
