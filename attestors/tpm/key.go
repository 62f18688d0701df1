package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Kind is a kind of endorsement key.
type Kind string

// Kinds of endorsement keys: the two that every manufacturer has.
const (
	RSA2048 Kind = "rsa-2048"
	P256    Kind = "p-256"
)

// endorsement is what the TCG says of endorsement keys: EK Credential Profile
// 2.3 §2.2.1 (handles of the certificates), annex B.3 (templates L-1 and L-2);
// Provisioning Guidance 1.0 §7.8 (handles of the keys).
var endorsement = map[Kind]struct {
	template    tpm2.TPMTPublic
	persistent  tpm2.TPMHandle
	certificate tpm2.TPMHandle
}{
	RSA2048: {tpm2.RSAEKTemplate, 0x81010001, 0x01c00002},
	P256:    {tpm2.ECCEKTemplate, 0x81010002, 0x01c0000a},
}

// AKTemplate is the attestation key: a P-256 key that never leaves its TPM
// (fixedTPM), was made there (sensitiveDataOrigin) and signs nothing but what the
// TPM itself says (restricted).
var AKTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgECC,
	NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM:            true,
		FixedParent:         true,
		SensitiveDataOrigin: true,
		UserWithAuth:        true,
		NoDA:                true,
		Restricted:          true,
		SignEncrypt:         true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		CurveID: tpm2.TPMECCNistP256,
	}),
	Unique: point(make([]byte, 32), make([]byte, 32)),
}

// RSAAKTemplate is the same as an RSA key, which SPIRE's servers want.
var RSAAKTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgRSA,
	NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM:            true,
		FixedParent:         true,
		SensitiveDataOrigin: true,
		UserWithAuth:        true,
		Restricted:          true,
		SignEncrypt:         true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
		Scheme: tpm2.TPMTRSAScheme{
			Scheme:  tpm2.TPMAlgRSASSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		KeyBits: 2048,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{}),
}

// StorageTemplate is the key that protects others: EK Credential Profile 2.3
// annex B.4, templates H-1 and H-2.
func StorageTemplate(alg tpm2.TPMAlgID) tpm2.TPMTPublic {
	if alg == tpm2.TPMAlgECC {
		template := tpm2.ECCSRKTemplate
		template.Unique = point(nil, nil)
		return template
	}
	template := tpm2.RSASRKTemplate
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	return template
}

// EndorsementArea is what a TPM says of its endorsement key (TPMT_PUBLIC), if the
// key is as the TCG wants it.
func EndorsementArea(ek crypto.PublicKey) ([]byte, error) {
	kind, err := KindOf(ek)
	if err != nil {
		return nil, err
	}
	area, err := withKey(endorsement[kind].template, ek)
	if err != nil {
		return nil, err
	}
	return tpm2.Marshal(*area), nil
}

func point(x, y []byte) tpm2.TPMUPublicID {
	return tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: x},
		Y: tpm2.TPM2BECCParameter{Buffer: y},
	})
}

// AKName is what a TPM calls the attestation key with a public key: the hash of
// all that [AKTemplate] says of it. So a key with other attributes has another
// name.
func AKName(public *ecdsa.PublicKey) ([]byte, error) {
	area, err := withKey(AKTemplate, public)
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(area)
	if err != nil {
		return nil, err
	}
	return name.Buffer, nil
}

// withKey fills a template in.
func withKey(template tpm2.TPMTPublic, public crypto.PublicKey) (*tpm2.TPMTPublic, error) {
	switch key := public.(type) {
	case *rsa.PublicKey:
		template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.Bytes()})
	case *ecdsa.PublicKey:
		raw, err := key.Bytes() // 4, X, Y: SEC 1 §2.3.3
		if err != nil {
			return nil, err
		}
		half := len(raw) / 2
		template.Unique = point(raw[1:1+half], raw[1+half:])
	default:
		return nil, fmt.Errorf("a key of type %T", public)
	}
	return &template, nil
}

// KindOf returns the kind of an endorsement key. It fails for one that no kind is
// like.
func KindOf(public crypto.PublicKey) (Kind, error) {
	switch key := public.(type) {
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits != 2048 {
			return "", fmt.Errorf("the endorsement key is RSA of %d bits; 2048 are expected", bits)
		}
		if key.E != 65537 { // what the template says
			return "", fmt.Errorf("the endorsement key has the public exponent %d; 65537 is expected", key.E)
		}
		return RSA2048, nil
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() {
			return "", fmt.Errorf("the endorsement key is on the curve %s; P-256 is expected", key.Curve.Params().Name)
		}
		return P256, nil
	}
	return "", errors.New("the endorsement key is neither RSA of 2048 bits nor on P-256")
}

// isKind tells whether a key is as the template of a kind would make it.
func isKind(public *tpm2.TPMTPublic, kind Kind) bool {
	template := endorsement[kind].template
	template.Unique = public.Unique
	return public.Type == template.Type && bytes.Equal(tpm2.Marshal(*public), tpm2.Marshal(template))
}

// PublicKey returns the public half of a key of a TPM.
func PublicKey(area *tpm2.TPMTPublic) (crypto.PublicKey, error) {
	switch area.Type {
	case tpm2.TPMAlgRSA:
		parms, err := area.Parameters.RSADetail()
		if err != nil {
			return nil, err
		}
		modulus, err := area.Unique.RSA()
		if err != nil {
			return nil, err
		}
		return tpm2.RSAPub(parms, modulus)
	case tpm2.TPMAlgECC:
		parms, err := area.Parameters.ECCDetail()
		if err != nil {
			return nil, err
		}
		at, err := area.Unique.ECC()
		if err != nil {
			return nil, err
		}
		curve, err := parms.CurveID.Curve()
		if err != nil {
			return nil, err
		}
		return onCurve(curve, at.X.Buffer, at.Y.Buffer)
	}
	return nil, fmt.Errorf("a key of the type %v", area.Type)
}

// onCurve makes a public key of a point.
func onCurve(curve elliptic.Curve, x, y []byte) (*ecdsa.PublicKey, error) {
	size := (curve.Params().BitSize + 7) / 8
	if len(x) > size || len(y) > size {
		return nil, errors.New("a point outside of its curve")
	}
	raw := make([]byte, 1+2*size) // some TPMs leave zeros out
	raw[0] = 4                    // SEC 1 §2.3.3
	copy(raw[1+size-len(x):], x)
	copy(raw[1+2*size-len(y):], y)
	return ecdsa.ParseUncompressedPublicKey(curve, raw)
}

// Credential is a secret that only one TPM can read, and only if it holds a key of
// a certain name.
type Credential struct {
	IDObject []byte // TPMS_ID_OBJECT
	Secret   []byte // TPMT_ENCRYPTED_SECRET
}

// NewCredential makes a secret and encrypts it for the TPM with an endorsement
// key that holds a key of a name.
func NewCredential(ek crypto.PublicKey, name []byte) (Credential, []byte, error) {
	kind, err := KindOf(ek)
	if err != nil {
		return Credential{}, nil, err
	}
	area, err := withKey(endorsement[kind].template, ek)
	if err != nil {
		return Credential{}, nil, err
	}
	key, err := tpm2.ImportEncapsulationKey(area)
	if err != nil {
		return Credential{}, nil, err
	}
	secret := make([]byte, 32)
	rand.Read(secret) // never fails
	id, encrypted, err := tpm2.CreateCredential(rand.Reader, key, name, secret)
	return Credential{id, encrypted}, secret, err
}
