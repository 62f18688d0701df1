package tpm

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
)

// Area is what a TPM says of a signing key: a TPMT_PUBLIC.
type Area struct {
	Public crypto.PublicKey
	Name   []byte // by which the TPM knows the key, with all that is said of it

	attributes uint32
}

// Bits of TPMA_OBJECT: TPM 2.0 Library, part 2, §8.3.
const (
	fixedTPM            = 1 << 1
	fixedParent         = 1 << 4
	sensitiveDataOrigin = 1 << 5
	restricted          = 1 << 16
	decrypt             = 1 << 17
	sign                = 1 << 18
)

// Resident tells whether the key was made in the TPM that has it, cannot leave
// it, and signs what it is given.
func (a *Area) Resident() error {
	const made = fixedTPM | fixedParent | sensitiveDataOrigin
	switch {
	case a.attributes&made != made:
		return errors.New("the key was not made in a TPM, or may leave it (fixedTPM, fixedParent and sensitiveDataOrigin are wanted)")
	case a.attributes&(restricted|decrypt|sign) != sign:
		return errors.New("the key is not one that signs, and nothing else")
	}
	return nil
}

var errArea = errors.New("what the TPM says of the key is cut off, or not of a signing key")

// ParseArea reads a TPMT_PUBLIC of a signing key to its end.
func ParseArea(data []byte) (*Area, error) {
	s := cryptobyte.String(data)
	var kind, nameAlg, symmetric, scheme uint16
	var policy cryptobyte.String
	a := &Area{}
	if !s.ReadUint16(&kind) || !s.ReadUint16(&nameAlg) || !s.ReadUint32(&a.attributes) || !s.ReadUint16LengthPrefixed(&policy) ||
		!s.ReadUint16(&symmetric) || !s.ReadUint16(&scheme) {
		return nil, errArea
	}
	if tpm2.TPMAlgID(symmetric) != tpm2.TPMAlgNull {
		return nil, errArea
	}
	if tpm2.TPMAlgID(scheme) != tpm2.TPMAlgNull && !s.Skip(2) { // the scheme's hash
		return nil, errArea
	}
	var err error
	switch tpm2.TPMAlgID(kind) {
	case tpm2.TPMAlgRSA:
		a.Public, err = parseRSA(&s)
	case tpm2.TPMAlgECC:
		a.Public, err = parseECC(&s)
	default:
		err = fmt.Errorf("the key is of the type %#04x; RSA or ECC is wanted", kind)
	}
	if err != nil {
		return nil, err
	}
	if !s.Empty() {
		return nil, fmt.Errorf("what the TPM says of the key has %d bytes after its end", len(s))
	}
	switch tpm2.TPMAlgID(nameAlg) {
	case tpm2.TPMAlgSHA256:
		sum := sha256.Sum256(data)
		a.Name = append(data[2:4:4], sum[:]...)
	case tpm2.TPMAlgSHA384:
		sum := sha512.Sum384(data)
		a.Name = append(data[2:4:4], sum[:]...)
	default:
		return nil, fmt.Errorf("the key's name is made with the hash %#04x; SHA-256 or SHA-384 is wanted", nameAlg)
	}
	return a, nil
}

func parseRSA(s *cryptobyte.String) (crypto.PublicKey, error) {
	var bits uint16
	var exponent uint32
	var modulus cryptobyte.String
	if !s.ReadUint16(&bits) || !s.ReadUint32(&exponent) || !s.ReadUint16LengthPrefixed(&modulus) {
		return nil, errArea
	}
	if exponent == 0 {
		exponent = 65537 // what TPMs mean by it
	}
	key := &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: int(exponent)}
	if key.N.BitLen() != int(bits) {
		return nil, fmt.Errorf("the RSA key has %d bits and claims %d", key.N.BitLen(), bits)
	}
	return key, nil
}

func parseECC(s *cryptobyte.String) (crypto.PublicKey, error) {
	var id, kdf uint16
	var x, y cryptobyte.String
	if !s.ReadUint16(&id) || !s.ReadUint16(&kdf) || !s.ReadUint16LengthPrefixed(&x) || !s.ReadUint16LengthPrefixed(&y) {
		return nil, errArea
	}
	if tpm2.TPMAlgID(kdf) != tpm2.TPMAlgNull {
		return nil, errArea
	}
	curve, err := tpm2.TPMECCCurve(id).Curve()
	if err != nil {
		return nil, fmt.Errorf("the key is on the curve %#04x, which is not supported", id)
	}
	return onCurve(curve, x, y)
}

// ParseSignature reads a TPMT_SIGNATURE of the kind that the RSA attestation key
// makes, and returns the signature in it.
func ParseSignature(data []byte) ([]byte, error) {
	s := cryptobyte.String(data)
	var scheme, hash uint16
	var signature cryptobyte.String
	if !s.ReadUint16(&scheme) || !s.ReadUint16(&hash) || !s.ReadUint16LengthPrefixed(&signature) || !s.Empty() {
		return nil, errors.New("the TPM's signature is cut off, or goes on after its end")
	}
	if tpm2.TPMAlgID(scheme) != tpm2.TPMAlgRSASSA || tpm2.TPMAlgID(hash) != tpm2.TPMAlgSHA256 {
		return nil, fmt.Errorf("the TPM's signature is by %#04x with %#04x; RSASSA with SHA-256 is wanted", scheme, hash)
	}
	return signature, nil
}

// ParseRSAAK reads a TPMT_PUBLIC that must be as [RSAAKTemplate] says. It returns
// the key and its name.
func ParseRSAAK(data []byte) (*rsa.PublicKey, []byte, error) {
	a, err := ParseArea(data)
	if err != nil {
		return nil, nil, err
	}
	key, ok := a.Public.(*rsa.PublicKey)
	if !ok {
		return nil, nil, errors.New("the attestation key is not RSA")
	}
	area, err := withKey(RSAAKTemplate, key)
	if err != nil {
		return nil, nil, err
	}
	if string(tpm2.Marshal(*area)) != string(data) {
		return nil, nil, errors.New("the attestation key is not RSA of 2048 bits, made in a TPM that it cannot leave, restricted to signing what the TPM says (RSASSA, SHA-256) and used without a policy")
	}
	return key, a.Name, nil
}
