package jwtsvid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes of the algorithms
	_ "crypto/sha512"
	"errors"
	"fmt"
	"math/big"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// algorithm is one of the signature algorithms that a JWT-SVID may have.
type algorithm struct {
	name  string
	hash  crypto.Hash
	curve elliptic.Curve // of ES…; nil for RSA
	pss   bool           // PS…
}

// JWT-SVID §2.1 allows these and no others.
var algorithms = func() map[string]algorithm {
	m := make(map[string]algorithm)
	for _, a := range []algorithm{
		{"RS256", crypto.SHA256, nil, false},
		{"RS384", crypto.SHA384, nil, false},
		{"RS512", crypto.SHA512, nil, false},
		{"PS256", crypto.SHA256, nil, true},
		{"PS384", crypto.SHA384, nil, true},
		{"PS512", crypto.SHA512, nil, true},
		{"ES256", crypto.SHA256, elliptic.P256(), false},
		{"ES384", crypto.SHA384, elliptic.P384(), false},
		{"ES512", crypto.SHA512, elliptic.P521(), false},
	} {
		m[a.name] = a
	}
	return m
}()

const (
	// maxTried is how many keys a token without a key ID is tried with.
	maxTried = 16
	// minRSA is the size of the smallest RSA key that is believed, in bits.
	minRSA = 2048
)

// verify checks a signature with the key that the header names, or, since a key
// ID is optional, with each JWT key of the bundle that fits the algorithm.
func (h header) verify(b *bundle.Bundle, signed, signature []byte) error {
	if len(b.JWTAuthorities) == 0 {
		return fmt.Errorf("trust domain %q has no keys for JWT-SVIDs", b.TrustDomain.Name())
	}
	digest := h.alg.hash.New()
	digest.Write(signed)
	sum := digest.Sum(nil)
	if h.hasKID {
		key := b.JWTKey(h.kid)
		if key == nil {
			return fmt.Errorf("trust domain %q has no JWT key with this key ID", b.TrustDomain.Name())
		}
		if err := h.alg.fits(key); err != nil {
			return err
		}
		if !h.alg.verify(key, sum, signature) {
			return errors.New("the signature is not valid")
		}
		return nil
	}
	tried := 0
	for _, a := range b.JWTAuthorities {
		if h.alg.fits(a.PublicKey) != nil {
			continue
		}
		if tried++; tried > maxTried {
			break
		}
		if h.alg.verify(a.PublicKey, sum, signature) {
			return nil
		}
	}
	return errors.New("the signature is not valid")
}

// fits reports whether a key is one of the algorithm's.
func (a algorithm) fits(key crypto.PublicKey) error {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		if a.curve != nil && key.Curve == a.curve {
			return nil
		}
	case *rsa.PublicKey:
		if a.curve != nil {
			break
		}
		if n := key.N.BitLen(); n < minRSA {
			return fmt.Errorf("the key has %d bits; at least %d are needed", n, minRSA)
		}
		return nil
	}
	return fmt.Errorf("algorithm %s does not fit the key", a.name)
}

func (a algorithm) verify(key crypto.PublicKey, sum, signature []byte) bool {
	switch key := key.(type) {
	case *ecdsa.PublicKey:
		// RFC 7518 §3.4: r and s, each as long as the curve's order.
		size := (a.curve.Params().BitSize + 7) / 8
		if len(signature) != 2*size {
			return false
		}
		return ecdsa.Verify(key, sum, new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:]))
	case *rsa.PublicKey:
		if a.pss { // RFC 7518 §3.5: the salt is as long as the hash
			return rsa.VerifyPSS(key, a.hash, sum, signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(key, a.hash, sum, signature) == nil
	}
	return false
}
