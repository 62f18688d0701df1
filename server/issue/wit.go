package issue

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
)

// WITKey is the public key that a WIT-SVID is asked for.
type WITKey struct {
	PKIX      []byte // SubjectPublicKeyInfo, DER
	Algorithm string // with which its holder will sign proofs: RS…, ES… or PS…
}

// WorkloadWIT issues the WIT-SVID of an entry for a public key.
func (i *Issuer) WorkloadWIT(ctx context.Context, e *entry.Entry, key WITKey) (*JWTSVID, error) {
	return i.WorkloadWITWithin(ctx, e, key, 0)
}

// WorkloadWITWithin is WorkloadWIT for at most so long, unless that is zero: for
// evidence that ends.
func (i *Issuer) WorkloadWITWithin(ctx context.Context, e *entry.Entry, key WITKey, most time.Duration) (*JWTSVID, error) {
	ttl := i.witTTL
	if most > 0 {
		ttl = min(ttl, most)
	}
	svid, err := i.signWIT(ctx, token{reason: "workload", entry: e.ID, id: e.SPIFFEID, ttl: ttl}, key)
	if err != nil {
		return nil, err
	}
	svid.Hint = e.Hint
	return svid, nil
}

// MintWIT issues a WIT-SVID of any workload's ID in the trust domain for a
// public key, for administrators. Zero as its lifetime stands for the default.
func (i *Issuer) MintWIT(ctx context.Context, id spiffeid.ID, key WITKey, ttl time.Duration) (*JWTSVID, error) {
	if err := i.validateWorkloadID(id); err != nil {
		return nil, err
	}
	if err := validateTTL(ttl); err != nil {
		return nil, err
	}
	return i.signWIT(ctx, token{reason: "mint", id: id, ttl: cmp.Or(ttl, i.witTTL)}, key)
}

// signWIT builds a WIT-SVID, signs and records it.
func (i *Issuer) signWIT(ctx context.Context, t token, key WITKey) (*JWTSVID, error) {
	var err error
	if t.key, err = key.confirmation(); err != nil {
		return nil, err
	}
	t.jti = true
	return i.signToken(ctx, &i.wit, t)
}

// maxPublicKey bounds a public key, in bytes; one of RSA with 8192 bits has
// 1.1 KiB.
const maxPublicKey = 4 << 10

// The algorithms that fit a key. WIT-SVID §3.2 allows these and no others.
var (
	rsaAlgorithms   = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
	ecdsaAlgorithms = map[elliptic.Curve]string{elliptic.P256(): "ES256", elliptic.P384(): "ES384", elliptic.P521(): "ES512"}
)

// confirmation returns the key as the claim cnf.jwk has it (RFC 7800 §3.2): a
// public JWK with its algorithm. It is encoded anew: nothing else of what a
// caller sent reaches a token.
func (k WITKey) confirmation() ([]byte, error) {
	switch n := len(k.PKIX); {
	case n == 0:
		return nil, invalid("missing public key")
	case n > maxPublicKey:
		return nil, invalid("the public key is %d bytes long; the most is %d", n, maxPublicKey)
	case k.Algorithm == "":
		return nil, invalid("missing signing algorithm")
	}
	public, err := x509.ParsePKIXPublicKey(k.PKIX) // checks that a point is on its curve
	if err != nil {
		return nil, invalid("malformed public key: %v", err)
	}
	if err := checkKey("the request's", public); err != nil {
		return nil, err
	}
	var fit []string
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		fit = []string{ecdsaAlgorithms[key.Curve]}
	case *rsa.PublicKey:
		fit = rsaAlgorithms
	default:
		return nil, invalid("the request's key (%T) is not supported by WIT-SVIDs; use ECDSA or RSA", public)
	}
	if !slices.Contains(fit, k.Algorithm) {
		return nil, invalid("the signing algorithm %.16q does not fit the public key; use %s", k.Algorithm, strings.Join(fit, ", "))
	}
	jwk, err := json.Marshal(jose.JSONWebKey{Key: public, Algorithm: k.Algorithm})
	if err != nil {
		return nil, fmt.Errorf("encode a public key: %w", err)
	}
	return jwk, nil
}
