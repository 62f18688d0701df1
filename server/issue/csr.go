package issue

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"

	"github.com/hallmark-id/hallmark/server/authority"
)

// Bounds of a certificate signing request.
const (
	MaxCSR = 16 << 10 // bytes; one with an RSA key of 8192 bits has 3 KiB

	minRSA      = 2048 // bits
	maxRSA      = 8192 // bits; the time to verify a signature grows with the square
	minExponent = 65537
)

const supportedKeys = "use ECDSA with P-256, P-384 or P-521, Ed25519, or RSA with 2048 to 8192 bits"

// ParseCSR reads a certificate signing request (PKCS #10, DER) and checks that
// its public key is one that we certify and that whoever made the request has
// its private key: the signature verifies. Errors are [InvalidError]s.
//
// Ed25519 is accepted: SPIFFE names no algorithms for X509-SVIDs, and TLS 1.3
// (RFC 8446 §4.2.3), Go and OpenSSL take it. Browsers do not, but workloads
// choose their keys knowing their peers.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	if len(der) == 0 {
		return nil, invalid("missing CSR")
	}
	if len(der) > MaxCSR {
		return nil, invalid("CSR is %d bytes long; the most is %d", len(der), MaxCSR)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, invalid("malformed CSR: %v", err)
	}
	// Before the signature: the cost of verifying that is bounded only for
	// keys of a supported size.
	if err := checkKey("the CSR's", csr.PublicKey); err != nil {
		return nil, err
	}
	switch csr.SignatureAlgorithm {
	case x509.SHA1WithRSA, x509.ECDSAWithSHA1: // which Go takes in a CSR
		return nil, invalid("the CSR is signed with SHA-1; use SHA-256")
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, invalid("invalid CSR signature: %v", err)
	}
	return csr, nil
}

// checkKey checks that a public key, of which whose says where it comes from,
// is one that we vouch for.
func checkKey(whose string, public any) error {
	switch key := public.(type) {
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
		default:
			return invalid("%s key is on the curve %s, which is not supported; %s", whose, key.Curve.Params().Name, supportedKeys)
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
			return invalid("%s RSA key has %d bits; %s", whose, bits, supportedKeys)
		}
		if key.E < minExponent || key.E&1 == 0 {
			return invalid("%s RSA key has the public exponent %d; use %d", whose, key.E, minExponent)
		}
	default:
		return invalid("%s key (%T) is not supported; %s", whose, public, supportedKeys)
	}
	return nil
}

// subjectKey is a public key to certify.
type subjectKey struct {
	spki []byte // SubjectPublicKeyInfo, DER
	id   []byte // its key identifier
}

func newSubjectKey(public any) (subjectKey, error) {
	// Encoded anew: what else the bytes of a request could carry stays out.
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return subjectKey{}, invalid("the public key cannot be encoded: %v", err)
	}
	id, err := authority.KeyID(spki)
	if err != nil {
		return subjectKey{}, err
	}
	return subjectKey{spki: spki, id: id}, nil
}

// publicKey returns the public key of a certificate signing request, and
// nothing else of it.
func publicKey(der []byte) (subjectKey, error) {
	csr, err := ParseCSR(der)
	if err != nil {
		return subjectKey{}, err
	}
	return newSubjectKey(csr.PublicKey)
}
