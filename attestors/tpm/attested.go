package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/crypto/cryptobyte"
)

// generated begins all that a TPM says, and nothing that a restricted key signs
// for anybody else: "\xffTCG". TPM 2.0 Library, part 2, §10.12.12.
const generated = 0xff544347

// Attested is what a TPM has signed: a TPMS_ATTEST. Either Quoted or Certified is
// set.
type Attested struct {
	ExtraData []byte // what the one who asked wanted in it
	Quoted    *Quoted
	Certified *Certified
}

// Quoted says what PCRs were like.
type Quoted struct {
	PCRs   []uint // of the SHA-256 bank
	Digest []byte // of their values, one after the other
}

// Certified says that the TPM holds a key.
type Certified struct {
	Name []byte
}

var errTruncated = errors.New("what the TPM signed is cut off, or holds lengths that cannot be")

// ParseAttested reads a TPMS_ATTEST of a quote or a certification, to its end.
func ParseAttested(data []byte) (*Attested, error) {
	s := cryptobyte.String(data)
	var magic uint32
	var kind uint16
	var signer, extra cryptobyte.String
	switch {
	case !s.ReadUint32(&magic):
		return nil, errTruncated
	case magic != generated:
		return nil, errors.New("what was signed was not said by a TPM: it does not begin with TPM_GENERATED_VALUE")
	}
	const clock, firmware = 8 + 4 + 4 + 1, 8 // bytes; what they say is not used
	if !s.ReadUint16(&kind) || !s.ReadUint16LengthPrefixed(&signer) || !s.ReadUint16LengthPrefixed(&extra) || !s.Skip(clock+firmware) {
		return nil, errTruncated
	}
	out := &Attested{ExtraData: extra}
	var err error
	switch tpm2.TPMST(kind) {
	case tpm2.TPMSTAttestQuote:
		out.Quoted, err = parseQuoted(&s)
	case tpm2.TPMSTAttestCertify:
		var name, qualified cryptobyte.String
		if !s.ReadUint16LengthPrefixed(&name) || !s.ReadUint16LengthPrefixed(&qualified) {
			return nil, errTruncated
		}
		out.Certified = &Certified{Name: name}
	default:
		err = fmt.Errorf("the TPM signed something else than what it was asked for (type %#04x)", kind)
	}
	if err != nil {
		return nil, err
	}
	if !s.Empty() {
		return nil, fmt.Errorf("what the TPM signed has %d bytes after its end", len(s))
	}
	return out, nil
}

func parseQuoted(s *cryptobyte.String) (*Quoted, error) {
	var banks uint32
	if !s.ReadUint32(&banks) {
		return nil, errTruncated
	}
	if banks > 1 {
		return nil, fmt.Errorf("the quote is of %d banks of PCRs; one was asked for", banks)
	}
	out := &Quoted{}
	if banks == 1 {
		var hash uint16
		var bits cryptobyte.String
		if !s.ReadUint16(&hash) || !s.ReadUint8LengthPrefixed(&bits) {
			return nil, errTruncated
		}
		if tpm2.TPMAlgID(hash) != tpm2.TPMAlgSHA256 {
			return nil, fmt.Errorf("the quote is of the bank of PCRs %#04x; that of SHA-256 was asked for", hash)
		}
		for i, b := range bits {
			for bit := range 8 {
				if b>>bit&1 == 1 {
					out.PCRs = append(out.PCRs, uint(i*8+bit))
				}
			}
		}
	}
	var digest cryptobyte.String
	if !s.ReadUint16LengthPrefixed(&digest) {
		return nil, errTruncated
	}
	out.Digest = digest
	return out, nil
}

// Matches tells whether the values of PCRs are those that were quoted.
func (q *Quoted) Matches(values [][]byte) bool {
	h := sha256.New()
	for _, v := range values {
		h.Write(v)
	}
	return bytes.Equal(h.Sum(nil), q.Digest)
}

// ASN1 writes an ECDSA signature of a TPM as others do: RFC 3279 §2.2.3.
func ASN1(s *tpm2.TPMTSignature) ([]byte, error) {
	ec, err := s.Signature.ECDSA()
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct{ R, S *big.Int }{
		new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer),
	})
}
