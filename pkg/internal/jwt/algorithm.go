package jwt

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes of the algorithms
	_ "crypto/sha512"
	"fmt"
	"math/big"
)

// Algorithm is one of the signature algorithms that a token may have.
type Algorithm struct {
	Name  string
	hash  crypto.Hash
	curve elliptic.Curve // of ES…; nil for RSA
	pss   bool           // PS…
}

// JWT-SVID §2.1 and WIT-SVID §2.3 allow these and no others.
var algorithms = func() map[string]Algorithm {
	m := make(map[string]Algorithm)
	for _, a := range []Algorithm{
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
		m[a.Name] = a
	}
	return m
}()

// AlgorithmOf returns the algorithm of a name.
func AlgorithmOf(name string) (Algorithm, error) {
	a, ok := algorithms[name]
	if !ok {
		return a, fmt.Errorf("algorithm %q is not allowed", name)
	}
	return a, nil
}

// minRSA is the size of the smallest RSA key that is believed, in bits.
const minRSA = 2048

// Fits reports whether a public key is one of the algorithm's.
func (a Algorithm) Fits(key crypto.PublicKey) error {
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
	return fmt.Errorf("algorithm %s does not fit the key", a.Name)
}

func (a Algorithm) verify(key crypto.PublicKey, signed, signature []byte) bool {
	h := a.hash.New()
	h.Write(signed)
	sum := h.Sum(nil)
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
