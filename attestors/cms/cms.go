// Package cms reads signed documents as clouds give them to their instances: CMS
// (RFC 5652, formerly PKCS #7), in base64. It is not an attestor.
//
// [Parse] a [Message], find out whose certificate must have signed it, and
// [Message.Verify] it by that. The certificates that a message carries count for
// nothing by themselves.
package cms

import (
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/smallstep/pkcs7"
)

const (
	// maxMessage is the most bytes of a message in base64. Clouds' have 2 to 8 KiB.
	maxMessage = 32 << 10
	// maxCertificates is the most certificates that one carries.
	maxCertificates = 10
	// maxDepth is the most layers of its encoding; a certificate in it has 12.
	maxDepth = 32
	minRSA   = 2048 // bits
)

// digests are the algorithms that are good; Azure names that of the signature.
var digests = []asn1.ObjectIdentifier{
	pkcs7.OIDDigestAlgorithmSHA256, pkcs7.OIDDigestAlgorithmSHA384, pkcs7.OIDDigestAlgorithmSHA512,
	pkcs7.OIDEncryptionAlgorithmRSASHA256, pkcs7.OIDEncryptionAlgorithmRSASHA384, pkcs7.OIDEncryptionAlgorithmRSASHA512,
}

// Message is a document with the one signature that it has.
type Message struct{ p *pkcs7.PKCS7 }

// Parse reads a message. Line breaks in it do not matter.
func Parse(text string) (*Message, error) {
	if len(text) > maxMessage {
		return nil, fmt.Errorf("the signature is %d bytes long; the most is %d", len(text), maxMessage)
	}
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, errors.New("the signature is not base64")
	}
	end, err := checkNesting(raw, len(raw), 0)
	if err != nil || end != len(raw) {
		return nil, errors.New("the signature is no PKCS #7 message")
	}
	p, err := pkcs7.Parse(raw)
	if err != nil {
		return nil, errors.New("the signature is no PKCS #7 message")
	}
	switch {
	case len(p.Signers) != 1:
		return nil, fmt.Errorf("the document has %d signatures, not one", len(p.Signers))
	case len(p.Certificates) > maxCertificates:
		return nil, fmt.Errorf("the signature brings %d certificates; the most is %d", len(p.Certificates), maxCertificates)
	case len(p.Content) == 0:
		return nil, errors.New("the signature holds no document")
	}
	return &Message{p}, nil
}

// Certificates are those that the message brings, in no order.
func (m *Message) Certificates() []*x509.Certificate { return m.p.Certificates }

// Signer is the one of them that the message says it is signed by, or nil.
func (m *Message) Signer() *x509.Certificate { return m.p.GetOnlySigner() }

// Verify returns the document if the signature is by the key of a certificate that
// is valid now. Whether that certificate is to be trusted, the caller knows.
func (m *Message) Verify(by *x509.Certificate, now time.Time) ([]byte, error) {
	if now.Before(by.NotBefore) || now.After(by.NotAfter) {
		return nil, errors.New("the certificate that the document is signed by has expired, or is not valid yet")
	}
	if key, ok := by.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() < minRSA {
		return nil, fmt.Errorf("the document is signed by an RSA key of %d bits; at least %d are needed", key.N.BitLen(), minRSA)
	}
	// The library takes SHA-1, of which two documents can be made with the same.
	if algorithm := m.p.Signers[0].DigestAlgorithm.Algorithm; !slices.ContainsFunc(digests, algorithm.Equal) {
		return nil, fmt.Errorf("the document is signed over a digest of the algorithm %s; SHA-256 or longer is needed", algorithm)
	}
	only := *m.p
	only.Certificates = []*x509.Certificate{by}
	if err := only.Verify(); err != nil {
		return nil, errors.New("the document's signature is wrong")
	}
	return m.p.Content, nil
}

// checkNesting checks the BER element (X.690 §8.1) that data begins with, which
// must end by a limit, and returns where it does. The library reads a part that
// sticks out of what it is in over and over, in time that doubles with each layer:
// here each must lie within the one around it.
func checkNesting(data []byte, limit, depth int) (int, error) {
	malformed := errors.New("malformed")
	if depth > maxDepth || limit < 2 {
		return 0, malformed
	}
	const highTag, constructed, indefinite = 0x1f, 0x20, 0x80
	tag, at := data[0], 2
	if tag&highTag == highTag { // of many bytes; there is none in CMS
		return 0, malformed
	}
	length := int(data[1])
	if length == indefinite {
		if tag&constructed == 0 {
			return 0, malformed
		}
		for first := true; ; first = false {
			if limit-at < 2 {
				return 0, malformed
			}
			if data[at] == 0 && data[at+1] == 0 {
				if first { // the library takes it for a part
					return 0, malformed
				}
				return at + 2, nil
			}
			n, err := checkNesting(data[at:], limit-at, depth+1)
			if err != nil {
				return 0, err
			}
			at += n
		}
	}
	if length > indefinite {
		bytes := length - indefinite
		if bytes > 3 || limit-at < bytes {
			return 0, malformed
		}
		length = 0
		for range bytes {
			length = length<<8 | int(data[at])
			at++
		}
	}
	end := at + length
	if end > limit {
		return 0, malformed
	}
	for tag&constructed != 0 && at < end {
		n, err := checkNesting(data[at:], end-at, depth+1)
		if err != nil {
			return 0, err
		}
		at += n
	}
	return end, nil
}
