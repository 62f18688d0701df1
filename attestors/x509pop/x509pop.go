// Package x509pop attests a node by an X.509 certificate that it was given by
// other means, and by proof that it has the certificate's private key.
//
// [NewAgent] makes the half on the node, [New] the half on the server. They
// speak what SPIRE's attestor of that name speaks, so that either half works
// with SPIRE's other one. All messages are JSON, byte strings in base64:
//
//	node    {"certificates": […]}                            DER, the leaf first
//	server  {"ecdsa_signature": {"nonce"}}                   or "rsa_signature"
//	node    {"ecdsa_signature": {"nonce", "r", "s"}}
//	        {"rsa_signature": {"nonce", "signature"}}        PSS with SHA-256
//
// What is signed is the SHA-256 of the server's nonce followed by the node's.
// So neither side alone chooses it: a server cannot have anything else signed,
// and a response answers one challenge only.
//
// The server verifies the chain up to authorities that its configuration names
// (mode external_pki), or up to those of a trust domain (mode spiffe: the
// certificate is an X509-SVID). By default a node's SPIFFE ID ends in
// x509pop/FINGERPRINT, the SHA-1 of the certificate, or in x509pop/PATH after
// the path of the SVID; a template can name it after what the certificate says.
//
// The selectors, all of type "x509pop", are named as SPIRE's are:
//
//	subject:cn:host-1         the common name, if the certificate has one
//	ca:fingerprint:0beec7b5…  SHA-1 of each certificate above it, one each
//	serialnumber:0a1b2c       lower-case hexadecimal, an even number of digits
//	san:rack:r7               one for each URI x509pop://TRUST-DOMAIN/rack/r7
//
// The challenge is not bound to the connection. A node whose agent trusts the
// wrong server (insecure_bootstrap) can be made to answer the challenge of the
// right one.
package x509pop

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type
// of its selectors.
const Name = "x509pop"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Key,
	Needed:   "the key of a certificate of a trusted authority, or to have one issued",
	Selectors: []attestors.Form{
		{Value: "subject:cn:NAME", Meaning: "the common name of the certificate"},
		{Value: "ca:fingerprint:SHA1", Meaning: "each certificate above it"},
		{Value: "serialnumber:HEX", Meaning: "its serial number"},
		{Value: "san:KEY:VALUE", Meaning: "its names x509pop://TRUST-DOMAIN/KEY/VALUE"},
	},
	Page: "docs/attestors/x509pop.md",
}

// Bounds of what one side takes from the other.
const (
	maxPayload      = 64 << 10 // bytes, as every attestation's
	maxCertificates = 10       // leaf and intermediates
	maxMessage      = 4 << 10  // bytes of a challenge or response; those of the largest key need half
	nonceSize       = 32       // bytes, exactly
)

// Bounds of keys: weaker ones prove nothing, larger ones cost more to verify
// than a stranger may ask for.
const (
	minRSA      = 2048 // bits
	maxRSA      = 8192 // bits
	minExponent = 65537
)

const supportedKeys = "use ECDSA on P-256, P-384 or P-521, or RSA of 2048 to 8192 bits"

// payload is what a node sends first.
type payload struct {
	Certificates [][]byte `json:"certificates"`
}

// challenge is of the kind that the leaf's key answers; the other is null.
type challenge struct {
	RSA   *nonce `json:"rsa_signature"`
	ECDSA *nonce `json:"ecdsa_signature"`
}

type nonce struct {
	Nonce []byte `json:"nonce"`
}

// response is of the challenge's kind.
type response struct {
	RSA   *rsaResponse   `json:"rsa_signature"`
	ECDSA *ecdsaResponse `json:"ecdsa_signature"`
}

type rsaResponse struct {
	Nonce     []byte `json:"nonce"` // the node's
	Signature []byte `json:"signature"`
}

type ecdsaResponse struct {
	Nonce []byte `json:"nonce"` // the node's
	R     []byte `json:"r"`     // big endian
	S     []byte `json:"s"`     // big endian
}

// digest is what is signed.
func digest(server, node []byte) []byte {
	h := sha256.New()
	h.Write(server)
	h.Write(node)
	return h.Sum(nil)
}

// parsePayload reads what a node sends first: at least one certificate, every
// key of a size that can be dealt with.
func parsePayload(data []byte) ([]*x509.Certificate, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("x509pop payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("malformed x509pop payload: %w", err)
	}
	switch n := len(p.Certificates); {
	case n == 0:
		return nil, errors.New("x509pop payload holds no certificate")
	case n > maxCertificates:
		return nil, fmt.Errorf("x509pop payload holds %d certificates; the most is %d", n, maxCertificates)
	}
	certs := make([]*x509.Certificate, len(p.Certificates))
	for i, der := range p.Certificates {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain is malformed: %w", i+1, err)
		}
		// Before any signature: the cost of verifying one is bounded only for
		// keys of a supported size.
		if key, ok := cert.PublicKey.(*rsa.PublicKey); ok {
			if err := checkRSA(key); err != nil {
				return nil, fmt.Errorf("certificate %d of the chain: %w", i+1, err)
			}
		}
		certs[i] = cert
	}
	return certs, nil
}

// parseChallenge reads the server's challenge, of one kind or of both.
func parseChallenge(data []byte) (*challenge, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("x509pop challenge is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var c challenge
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("malformed x509pop challenge: %w", err)
	}
	if c.RSA == nil && c.ECDSA == nil {
		return nil, errors.New("x509pop challenge is for no kind of key that is known")
	}
	for _, n := range []*nonce{c.RSA, c.ECDSA} {
		if n != nil && len(n.Nonce) != nonceSize {
			return nil, fmt.Errorf("nonce of the x509pop challenge is %d bytes long, not %d", len(n.Nonce), nonceSize)
		}
	}
	return &c, nil
}

// parseResponse reads a node's response, of exactly one kind.
func parseResponse(data []byte) (*response, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("x509pop response is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var r response
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("malformed x509pop response: %w", err)
	}
	var n []byte
	switch {
	case r.RSA != nil && r.ECDSA != nil:
		return nil, errors.New("x509pop response is of two kinds of key")
	case r.RSA != nil:
		n = r.RSA.Nonce
	case r.ECDSA != nil:
		n = r.ECDSA.Nonce
	default:
		return nil, errors.New("x509pop response is of no kind of key that is known")
	}
	if len(n) != nonceSize {
		return nil, fmt.Errorf("nonce of the x509pop response is %d bytes long, not %d", len(n), nonceSize)
	}
	return &r, nil
}

// checkLeaf checks that a certificate is one to attest with: its key is of a
// kind that can be challenged and meant for signatures, and it is no authority.
func checkLeaf(cert *x509.Certificate) error {
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		if err := checkRSA(key); err != nil {
			return err
		}
	case *ecdsa.PublicKey:
		switch key.Curve {
		case elliptic.P256(), elliptic.P384(), elliptic.P521():
		default:
			return fmt.Errorf("the certificate's key is on the curve %s; %s", key.Curve.Params().Name, supportedKeys)
		}
	default:
		return fmt.Errorf("the certificate's key (%s) is not supported; %s", cert.PublicKeyAlgorithm, supportedKeys)
	}
	switch {
	case cert.IsCA:
		return errors.New("the certificate is that of a certificate authority; a node attests with one of its own")
	case cert.KeyUsage&x509.KeyUsageDigitalSignature == 0: // RFC 5280 §4.2.1.3
		return errors.New("the certificate's key usage does not include digitalSignature")
	}
	return nil
}

func checkRSA(key *rsa.PublicKey) error {
	if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
		return fmt.Errorf("the RSA key has %d bits; %s", bits, supportedKeys)
	}
	if key.E < minExponent || key.E&1 == 0 {
		return fmt.Errorf("the RSA key has the public exponent %d; use %d", key.E, minExponent)
	}
	return nil
}

// fingerprint is the SHA-1 of a certificate, which SPIRE's IDs and selectors
// hold. It names a certificate that an authority signed; it verifies nothing.
func fingerprint(cert *x509.Certificate) string {
	sum := sha1.Sum(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// serialHex writes a serial number in full bytes, as other tools show it.
func serialHex(serial *big.Int) string {
	text := serial.Text(16)
	if len(text)%2 == 1 {
		text = "0" + text
	}
	return text
}
