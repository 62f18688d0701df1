package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/go-jose/go-jose/v4"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/kms"
)

// KeyType is the kind of key that an authority signs with. The zero value is
// [ECP256].
type KeyType int

// The kinds of key. ECP256 is the default: the fastest to sign with, and every
// relying party takes it. RSA is for those that take JWTs signed with RS256
// only.
const (
	ECP256 KeyType = iota
	ECP384
	RSA2048
	RSA4096
)

var keyTypes = [...]struct {
	name string
	kms  apiv1.SignatureAlgorithm
	bits int // of an RSA key
}{
	ECP256:  {"ec-p256", apiv1.ECDSAWithSHA256, 0},
	ECP384:  {"ec-p384", apiv1.ECDSAWithSHA384, 0},
	RSA2048: {"rsa-2048", apiv1.SHA256WithRSA, 2048},
	RSA4096: {"rsa-4096", apiv1.SHA256WithRSA, 4096},
}

// ParseKeyType reads the name of a key type: ec-p256, ec-p384, rsa-2048 or
// rsa-4096.
func ParseKeyType(name string) (KeyType, error) {
	names := KeyType(0).Choices()
	if i := slices.Index(names, name); i >= 0 {
		return KeyType(i), nil
	}
	return 0, fmt.Errorf("unknown key type %q; it is one of %s", name, strings.Join(names, ", "))
}

// Choices returns the names that [ParseKeyType] reads.
func (KeyType) Choices() []string {
	names := make([]string, len(keyTypes))
	for i, k := range keyTypes {
		names[i] = k.name
	}
	return names
}

// String returns the name that [ParseKeyType] reads.
func (t KeyType) String() string {
	if t < 0 || int(t) >= len(keyTypes) {
		return fmt.Sprintf("KeyType(%d)", int(t))
	}
	return keyTypes[t].name
}

// MarshalText returns the name that [ParseKeyType] reads.
func (t KeyType) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText is [ParseKeyType].
func (t *KeyType) UnmarshalText(text []byte) (err error) {
	*t, err = ParseKeyType(string(text))
	return err
}

// createKey makes a key in a key manager. The key has the name under which the
// manager finds it again.
func createKey(keys apiv1.KeyManager, name string, t KeyType) (key, error) {
	k := keyTypes[t]
	made, err := keys.CreateKey(&apiv1.CreateKeyRequest{Name: name, SignatureAlgorithm: k.kms, Bits: k.bits})
	if err != nil {
		return key{}, fmt.Errorf("create %s key %q: %w", t, name, err)
	}
	signer, err := keys.CreateSigner(&made.CreateSignerRequest)
	if err != nil {
		if deleter, ok := keys.(apiv1.KeyDeleter); ok {
			err = errors.Join(err, deleter.DeleteKey(&apiv1.DeleteKeyRequest{Name: made.Name}))
		}
		return key{}, fmt.Errorf("open the new %s key %q: %w", t, made.Name, err)
	}
	return key{name: made.Name, signer: signer}, nil
}

// CheckSigner says what is wrong with a key for signing certificates, if anything
// is.
func CheckSigner(public crypto.PublicKey) error {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		if n := k.Curve.Params().BitSize; n < minCurveBits {
			return fmt.Errorf("the key is on a curve of %d bits; %d are the least", n, minCurveBits)
		}
		return nil
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits {
			return fmt.Errorf("the RSA key has %d bits; %d are the least", n, minRSABits)
		}
		return nil
	}
	return fmt.Errorf("a key of type %T does not sign for SPIFFE; RSA and ECDSA do", public)
}

// JWTAlgorithm returns the algorithm that a key signs JWTs with.
func JWTAlgorithm(public crypto.PublicKey) (jose.SignatureAlgorithm, error) {
	switch k := public.(type) {
	case *ecdsa.PublicKey:
		switch k.Curve {
		case elliptic.P256():
			return jose.ES256, nil
		case elliptic.P384():
			return jose.ES384, nil
		}
	case *rsa.PublicKey:
		return jose.RS256, nil
	}
	return "", fmt.Errorf("a %T does not sign JWTs", public)
}

// isLocal says that the key is in this process, in software.
func isLocal(signer crypto.Signer) bool {
	switch signer.(type) {
	case *ecdsa.PrivateKey, *rsa.PrivateKey:
		return true
	}
	return false
}

// generate makes a key in this process.
func generate(req *apiv1.CreateKeyRequest) (crypto.Signer, error) {
	if err := kms.Supported(req); err != nil {
		return nil, err
	}
	switch req.SignatureAlgorithm {
	case apiv1.UnspecifiedSignAlgorithm, apiv1.ECDSAWithSHA256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case apiv1.ECDSAWithSHA384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	}
	return rsa.GenerateKey(rand.Reader, req.Bits)
}
