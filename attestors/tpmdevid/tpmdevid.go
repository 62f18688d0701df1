// Package tpmdevid attests a node by a device identity (DevID, IEEE 802.1AR): a
// certificate that its owner made for a key in the node's TPM 2.0.
//
// [NewAgent] makes the half on the node, [New] the half on the server. They speak
// what SPIRE's attestor of that name speaks, so that either half works with
// SPIRE's other one. All messages are JSON, byte strings in base64:
//
//	node    {"DevIDCert": […], "DevIDPub", "EKCert", "EKPub", "AKPub",
//	         "CertifiedDevID", "CertificationSignature"}
//	server  {"DevID", "CredActivation": {"Credential", "Secret"}}
//	node    {"DevID", "CredActivation"}
//
// Certificates are DER, the leaf first; what ends in Pub is a TPMT_PUBLIC, the
// rest a TPMS_ATTEST and a TPMT_SIGNATURE.
//
// An attestation key states that the key of the certificate is in the same TPM
// (CertifiedDevID). The server encrypts a secret that the TPM with the endorsement
// key gives out only if it holds that attestation key (CredActivation), and has a
// nonce signed by the certificate's key (DevID).
//
// A node's SPIFFE ID ends in tpm_devid/FINGERPRINT, the SHA-1 of the certificate.
// The selectors, all of type "tpm_devid", are named as SPIRE's are:
//
//	subject:cn:host-1         the common name, if the certificate has one
//	issuer:cn:machines        that of its issuer, likewise
//	ca:fingerprint:0beec7b5…  SHA-1 of each certificate above it, one each
//
// The challenge is not bound to the connection. A node whose agent trusts the
// wrong server (insecure_bootstrap) can be made to answer the challenge of the
// right one.
package tpmdevid

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type of
// its selectors.
const Name = "tpm_devid"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Hardware,
	Needed:   "the use of the node's TPM: root on the node, while it attests",
	Selectors: []attestors.Form{
		{Value: "subject:cn:NAME", Meaning: "the common name of the certificate"},
		{Value: "issuer:cn:NAME", Meaning: "that of its issuer"},
		{Value: "ca:fingerprint:SHA1", Meaning: "each certificate above it"},
	},
	Page: "docs/attestors/tpm_devid.md",
}

// Bounds of what one side takes from the other.
const (
	maxPayload      = 64 << 10 // bytes, as every attestation's
	maxCertificates = 10       // leaf and intermediates
	maxMessage      = 8 << 10  // bytes of a challenge or response
	nonceSize       = 32       // bytes
	maxNonce        = 128      // bytes that a node signs; SPIRE's servers send as many as ours
)

// Bounds of RSA keys: what TPMs have.
const (
	minRSA = 2048 // bits
	maxRSA = 4096 // bits
)

const supportedKeys = "use RSA of 2048 to 4096 bits (RSASSA, SHA-256), or ECDSA on P-256 or P-384 (SHA-256)"

// payload is what a node sends first.
type payload struct {
	DevIDCert              [][]byte
	DevIDPub               []byte
	EKCert                 []byte
	EKPub                  []byte
	AKPub                  []byte
	CertifiedDevID         []byte
	CertificationSignature []byte
}

type challenge struct {
	DevID          []byte // nonce
	CredActivation *activation
}

type activation struct {
	Credential []byte
	Secret     []byte
}

type response struct {
	DevID          []byte // signature over the nonce
	CredActivation []byte // secret
}

// parsePayload reads what a node sends first, and its certificates.
func parsePayload(data []byte) (*payload, []*x509.Certificate, error) {
	if len(data) > maxPayload {
		return nil, nil, fmt.Errorf("tpm_devid payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, nil, fmt.Errorf("malformed tpm_devid payload: %w", err)
	}
	switch n := len(p.DevIDCert); {
	case n == 0:
		return nil, nil, errors.New("tpm_devid payload holds no DevID certificate")
	case n > maxCertificates:
		return nil, nil, fmt.Errorf("tpm_devid payload holds %d certificates; the most is %d", n, maxCertificates)
	}
	certs := make([]*x509.Certificate, len(p.DevIDCert))
	for i, der := range p.DevIDCert {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, nil, fmt.Errorf("certificate %d of the chain is malformed: %w", i+1, err)
		}
		// Before any signature: the cost of verifying one is bounded only for
		// keys of a supported size.
		if err := checkRSA(cert); err != nil {
			return nil, nil, fmt.Errorf("certificate %d of the chain: %w", i+1, err)
		}
		certs[i] = cert
	}
	return &p, certs, nil
}

// parseChallenge reads the server's challenge.
func parseChallenge(data []byte) (*challenge, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("tpm_devid challenge is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var c challenge
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("malformed tpm_devid challenge: %w", err)
	}
	if n := len(c.DevID); n < nonceSize || n > maxNonce {
		return nil, fmt.Errorf("nonce of the tpm_devid challenge is %d bytes long, not between %d and %d", n, nonceSize, maxNonce)
	}
	if c.CredActivation == nil || len(c.CredActivation.Credential) == 0 || len(c.CredActivation.Secret) == 0 {
		return nil, errors.New("tpm_devid challenge holds no credential")
	}
	return &c, nil
}

// parseResponse reads a node's response.
func parseResponse(data []byte) (*response, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("tpm_devid response is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var r response
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("malformed tpm_devid response: %w", err)
	}
	return &r, nil
}

func checkRSA(cert *x509.Certificate) error {
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil
	}
	if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
		return fmt.Errorf("the RSA key has %d bits; %s", bits, supportedKeys)
	}
	if key.E != 65537 {
		return fmt.Errorf("the RSA key has the public exponent %d; use 65537", key.E)
	}
	return nil
}

// checkLeaf checks that a certificate is one to attest with.
func checkLeaf(cert *x509.Certificate) error {
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return fmt.Errorf("the DevID certificate's key is on the curve %s; %s", key.Curve.Params().Name, supportedKeys)
		}
	default:
		return fmt.Errorf("the DevID certificate's key (%s) is not supported; %s", cert.PublicKeyAlgorithm, supportedKeys)
	}
	switch {
	case cert.IsCA:
		return errors.New("the DevID certificate is that of a certificate authority")
	// RFC 5280 §4.2.1.3; a certificate that does not say may be used for all.
	case cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the DevID certificate's key usage does not include digitalSignature")
	}
	return nil
}

// fingerprint is the SHA-1 of a certificate, which SPIRE's IDs and selectors
// hold. It names a certificate that an authority signed; it verifies nothing.
func fingerprint(cert *x509.Certificate) string {
	sum := sha1.Sum(cert.Raw)
	return hex.EncodeToString(sum[:])
}
