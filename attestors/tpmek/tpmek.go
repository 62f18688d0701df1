// Package tpmek attests a node by the TPM 2.0 in it, which its manufacturer has
// certified, and by what the machine has booted.
//
// [NewAgent] makes the half on the node, [New] the half on the server. All
// messages are JSON, byte strings in base64:
//
//	node    {"endorsement_key", "endorsement_certificate", "attestation_key"}
//	server  {"credential", "secret", "pcrs": [0, 7]}
//	node    {"quote", "signature", "pcrs": […]}
//
// Keys are in the form of SubjectPublicKeyInfo, the certificate is DER and may be
// missing, the signature is ASN.1. The credential is a TPMS_ID_OBJECT, the quote a
// TPMS_ATTEST.
//
// An endorsement key cannot sign; it decrypts. So the server encrypts a secret
// for it that the TPM gives out only if it also holds the attestation key, with
// all the attributes that [tpm.AKTemplate] has: the key's name is a hash of them.
// The node answers with a quote of PCRs that the attestation key has signed over
// that secret. Nobody but this TPM can make one, and not for another secret.
//
// A node's SPIFFE ID ends in tpm_ek/HASH, the SHA-256 of the endorsement key. The
// selectors, all of type "tpm_ek":
//
//	ek:sha256:0beec7b5…        the endorsement key
//	ca:sha256:62cdb702…        each certificate above that of the key, one each
//	manufacturer:id:53544d20   what the manufacturer says of the TPM, likewise
//	model:…, version:…         (none without a certificate)
//	pcr:sha256:7:b5710bf5…     each PCR that the server asks for
//
// The challenge is not bound to the connection. A node whose agent trusts the
// wrong server (insecure_bootstrap) can be made to answer the challenge of the
// right one.
package tpmek

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type of
// its selectors.
const Name = "tpm_ek"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Hardware,
	Needed:   "the use of the node's TPM: root on the node, while it attests",
	Selectors: []attestors.Form{
		{Value: "ek:sha256:HASH", Meaning: "the endorsement key"},
		{Value: "ca:sha256:HASH", Meaning: "each authority above its certificate"},
		{Value: "manufacturer:id:HEX", Meaning: "the manufacturer of the TPM"},
		{Value: "model:NAME", Meaning: "the model of the TPM"},
		{Value: "version:NUMBER", Meaning: "the version of its firmware"},
		{Value: "pcr:sha256:N:HASH", Meaning: "what the machine has booted, for each PCR that is configured"},
	},
	Page: "docs/attestors/tpm_ek.md",
}

// Bounds of what one side takes from the other.
const (
	maxPayload = 16 << 10 // bytes; certificates in TPMs have one or two thousand
	maxMessage = 8 << 10  // bytes of a challenge or response; those of all PCRs need two thousand
	maxPCR     = 23       // the highest number that every TPM has
	digestSize = 32       // bytes of a PCR
)

// payload is what a node sends first.
type payload struct {
	EndorsementKey         []byte `json:"endorsement_key"`
	EndorsementCertificate []byte `json:"endorsement_certificate,omitempty"`
	AttestationKey         []byte `json:"attestation_key"`
}

type challenge struct {
	Credential []byte `json:"credential"`
	Secret     []byte `json:"secret"`
	PCRs       []uint `json:"pcrs"` // of the SHA-256 bank, ascending
}

type response struct {
	Quote     []byte   `json:"quote"`
	Signature []byte   `json:"signature"`
	PCRs      [][]byte `json:"pcrs"` // their values, in the challenge's order
}

// claim is a payload that was read.
type claim struct {
	ek          crypto.PublicKey
	certificate []byte // nil: none
	ak          *ecdsa.PublicKey
}

// parsePayload reads what a node sends first.
func parsePayload(data []byte) (*claim, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("tpm_ek payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("malformed tpm_ek payload: %w", err)
	}
	ek, err := x509.ParsePKIXPublicKey(p.EndorsementKey)
	if err != nil {
		return nil, fmt.Errorf("malformed endorsement key: %w", err)
	}
	ak, err := x509.ParsePKIXPublicKey(p.AttestationKey)
	if err != nil {
		return nil, fmt.Errorf("malformed attestation key: %w", err)
	}
	key, ok := ak.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("the attestation key is not on P-256")
	}
	return &claim{ek: ek, certificate: p.EndorsementCertificate, ak: key}, nil
}

// parseChallenge reads the server's challenge.
func parseChallenge(data []byte) (*challenge, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("tpm_ek challenge is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var c challenge
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("malformed tpm_ek challenge: %w", err)
	}
	if len(c.Credential) == 0 || len(c.Secret) == 0 {
		return nil, errors.New("tpm_ek challenge holds no credential")
	}
	return &c, checkPCRs(c.PCRs)
}

// checkPCRs checks a list of PCRs' numbers.
func checkPCRs(pcrs []uint) error {
	for i, n := range pcrs {
		if n > maxPCR {
			return fmt.Errorf("there is no PCR %d; the last is %d", n, maxPCR)
		}
		if i > 0 && n <= pcrs[i-1] {
			return errors.New("the PCRs' numbers are not in ascending order")
		}
	}
	return nil
}

// parseResponse reads a node's response about PCRs.
func parseResponse(data []byte, pcrs []uint) (*response, error) {
	if len(data) > maxMessage {
		return nil, fmt.Errorf("tpm_ek response is %d bytes long; the most is %d", len(data), maxMessage)
	}
	var r response
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("malformed tpm_ek response: %w", err)
	}
	if len(r.PCRs) != len(pcrs) {
		return nil, fmt.Errorf("tpm_ek response holds %d PCRs; %d were asked for", len(r.PCRs), len(pcrs))
	}
	if slices.ContainsFunc(r.PCRs, func(v []byte) bool { return len(v) != digestSize }) {
		return nil, fmt.Errorf("a PCR of the tpm_ek response does not have %d bytes", digestSize)
	}
	return &r, nil
}
