// Package sshpop attests a node by the SSH certificate of its host key, and by
// proof that it has that key.
//
// [NewAgent] makes the half on the node, [New] the half on the server. They
// speak what SPIRE's attestor of that name speaks, so that either half works
// with SPIRE's other one. All messages are JSON, byte strings in base64:
//
//	node    {"Certificate"}                                in SSH's wire format
//	server  {"Nonce"}
//	node    {"Nonce", "Signature": {"Format", "Blob"}}     as SSH has signatures
//
// What is signed is the SHA-256 of the server's nonce followed by the node's.
// So neither side alone chooses it: a server cannot have anything else signed
// (no SSH handshake either), and a response answers one challenge only.
//
// By default a node's SPIFFE ID ends in sshpop/FINGERPRINT, the SHA-256 of the
// certificate as ssh-keygen shows it, but in the alphabet of URLs; a template can
// name it after what the certificate says.
//
// The selectors, all of type "sshpop", are ours; SPIRE's attestor has none:
//
//	principal:host-1.example.org   one for each host name in the certificate
//	ca:fingerprint:wjx3dLfGVQ6…    SHA-256 of the authority's key, as in an ID
//
// The challenge is not bound to the connection. A node whose agent trusts the
// wrong server (insecure_bootstrap) can be made to answer the challenge of the
// right one.
package sshpop

import (
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type
// of its selectors.
const Name = "sshpop"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Key,
	Needed:   "the key of a host certificate of a trusted authority, or to have one issued",
	Selectors: []attestors.Form{
		{Value: "principal:NAME", Meaning: "each host name in the certificate"},
		{Value: "ca:fingerprint:HASH", Meaning: "the authority that signed it"},
	},
	Page: "docs/attestors/sshpop.md",
}

// Bounds of what one side takes from the other.
const (
	maxPayload = 64 << 10 // bytes, as every attestation's
	maxMessage = 4 << 10  // bytes of a challenge or response; those of the largest key need half
	nonceSize  = 32       // bytes, exactly
)

// Bounds of RSA keys: weaker ones prove nothing, larger ones cost more to verify
// than a stranger may ask for.
const (
	minRSA      = 2048 // bits
	maxRSA      = 8192 // bits
	minExponent = 65537
)

const supportedKeys = "use ed25519, ECDSA, or RSA of 2048 to 8192 bits"

// payload is what a node sends first.
type payload struct {
	Certificate []byte
}

type challenge struct {
	Nonce []byte
}

type response struct {
	Nonce     []byte // the node's
	Signature *ssh.Signature
}

// digest is what is signed.
func digest(server, node []byte) []byte {
	h := sha256.New()
	h.Write(server)
	h.Write(node)
	return h.Sum(nil)
}

// parsePayload reads what a node sends first.
func parsePayload(data []byte) (*ssh.Certificate, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("sshpop payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("malformed sshpop payload: %w", err)
	}
	if len(p.Certificate) == 0 {
		return nil, errors.New("sshpop payload holds no certificate")
	}
	key, err := ssh.ParsePublicKey(p.Certificate)
	if err != nil {
		return nil, fmt.Errorf("malformed certificate: %w", err)
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, fmt.Errorf("sshpop payload holds a bare key (%s), not a certificate of one", key.Type())
	}
	return cert, nil
}

// parseChallenge reads the server's challenge.
func parseChallenge(data []byte) (*challenge, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("sshpop challenge is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var c challenge
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("malformed sshpop challenge: %w", err)
	}
	if len(c.Nonce) != nonceSize {
		return nil, fmt.Errorf("nonce of the sshpop challenge is %d bytes long, not %d", len(c.Nonce), nonceSize)
	}
	return &c, nil
}

// parseResponse reads a node's response.
func parseResponse(data []byte) (*response, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("sshpop response is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var r response
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("malformed sshpop response: %w", err)
	}
	switch {
	case len(r.Nonce) != nonceSize:
		return nil, fmt.Errorf("nonce of the sshpop response is %d bytes long, not %d", len(r.Nonce), nonceSize)
	case r.Signature == nil:
		return nil, errors.New("sshpop response holds no signature")
	case len(r.Signature.Rest) > 0: // of keys on a security token only
		return nil, errors.New("the signature of the sshpop response goes on after its end")
	}
	return &r, nil
}

// checkKey checks that a key is of a kind that proves something, and whose
// signatures cost no more than a stranger may ask for.
func checkKey(key ssh.PublicKey) error {
	switch key.Type() {
	case ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521:
		return nil
	case ssh.KeyAlgoRSA:
		of, ok := key.(ssh.CryptoPublicKey)
		if !ok {
			break
		}
		public, ok := of.CryptoPublicKey().(*rsa.PublicKey)
		if !ok {
			break
		}
		if bits := public.N.BitLen(); bits < minRSA || bits > maxRSA {
			return fmt.Errorf("the RSA key has %d bits; %s", bits, supportedKeys)
		}
		if public.E < minExponent {
			return fmt.Errorf("the RSA key has the public exponent %d; use %d", public.E, minExponent)
		}
		return nil
	}
	return fmt.Errorf("a key of type %s is not supported; %s", key.Type(), supportedKeys)
}

// checkCertificate checks that a certificate is one that a host attests with,
// but not who has signed it.
func checkCertificate(cert *ssh.Certificate) error {
	if cert.CertType != ssh.HostCert {
		return errors.New("the certificate is not that of a host; make it with \"ssh-keygen -h\"")
	}
	if err := checkKey(cert.Key); err != nil {
		return err
	}
	if len(cert.ValidPrincipals) == 0 { // SSH takes it for every host
		return errors.New("the certificate names no host; make it with \"ssh-keygen -n HOST\"")
	}
	return nil
}

// fingerprint is the SHA-256 of a certificate or a key, as SPIRE has it in IDs.
func fingerprint(key ssh.PublicKey) string {
	sum := sha256.Sum256(key.Marshal())
	return base64.RawURLEncoding.EncodeToString(sum[:])
}
