package tpm

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
)

// OIDs of the TCG's EK Credential Profile 2.3, §3.
var (
	oidSAN           = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidEKCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidManufacturer  = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidModel         = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidVersion       = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
)

// Endorsement is a verified certificate of an endorsement key.
type Endorsement struct {
	Certificate *x509.Certificate
	Above       []*x509.Certificate // every authority of every chain
	// What the manufacturer says of the TPM; empty if it does not.
	Manufacturer, Model, Version string
}

// VerifyEndorsement checks that a certificate is that of an endorsement key and
// leads to an authority that is trusted. The error's text may be told to the node.
func VerifyEndorsement(der []byte, roots *x509.CertPool, now time.Time) (*Endorsement, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("the endorsement key's certificate is malformed: %w", err)
	}
	if _, err := KindOf(cert.PublicKey); err != nil {
		return nil, err
	}
	e := &Endorsement{Certificate: cert}
	if err := e.checkUse(); err != nil {
		return nil, err
	}
	if err := e.readNames(); err != nil {
		return nil, err
	}
	chains, err := attestors.VerifyChain([]*x509.Certificate{cert}, roots, now) // checkUse has seen to the use
	if err != nil {
		return nil, fmt.Errorf("endorsement key: %w", err)
	}
	for _, chain := range chains {
		e.Above = append(e.Above, chain[1:]...)
	}
	return e, nil
}

// checkUse checks that a certificate is of an endorsement key: an authority may
// sign other things too, for keys that are in no TPM.
func (e *Endorsement) checkUse() error {
	cert := e.Certificate
	named := len(cert.ExtKeyUsage) > 0 || len(cert.UnknownExtKeyUsage) > 0
	const encryption = x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement
	switch {
	case cert.IsCA:
		return errors.New("the endorsement key's certificate is that of an authority")
	case named && !slices.ContainsFunc(cert.UnknownExtKeyUsage, oidEKCertificate.Equal):
		return errors.New("the certificate is for another use than that of an endorsement key (2.23.133.8.1)")
	// Some old ones do not name the use: the key must at least be one that signs
	// nothing.
	case !named && (cert.KeyUsage&encryption == 0 || cert.KeyUsage&^encryption != 0):
		return errors.New("the certificate does not say that it is of an endorsement key (2.23.133.8.1), and its key may be used for more than encryption")
	}
	return nil
}

// readNames reads the names of the TPM, which are in a critical extension that Go
// leaves to us.
func (e *Endorsement) readNames() error {
	cert := e.Certificate
	for _, extension := range cert.Extensions {
		if !extension.Id.Equal(oidSAN) {
			continue
		}
		var names []asn1.RawValue
		if rest, err := asn1.Unmarshal(extension.Value, &names); err != nil || len(rest) > 0 {
			return errors.New("the endorsement key's certificate has a malformed subjectAltName")
		}
		for _, name := range names {
			const directoryName = 4 // RFC 5280 §4.2.1.6
			if name.Class != asn1.ClassContextSpecific || name.Tag != directoryName {
				continue
			}
			var rdns pkix.RDNSequence
			if rest, err := asn1.Unmarshal(name.Bytes, &rdns); err != nil || len(rest) > 0 {
				return errors.New("the endorsement key's certificate has a malformed directoryName")
			}
			for _, rdn := range rdns {
				for _, attribute := range rdn {
					text, _ := attribute.Value.(string)
					switch {
					case attribute.Type.Equal(oidManufacturer):
						e.Manufacturer = text
					case attribute.Type.Equal(oidModel):
						e.Model = text
					case attribute.Type.Equal(oidVersion):
						e.Version = text
					}
				}
			}
		}
		// It holds no name that would have to be compared with anything.
		cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions, oidSAN.Equal)
	}
	return nil
}

// Fingerprint is the SHA-256 of a public key (its SubjectPublicKeyInfo).
func Fingerprint(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// firstDER returns the DER value that data begins with: some TPMs fill up what is
// left of the space for a certificate.
func firstDER(data []byte) ([]byte, error) {
	var value asn1.RawValue
	if _, err := asn1.Unmarshal(data, &value); err != nil {
		return nil, fmt.Errorf("the TPM holds no certificate where it should be: %w", err)
	}
	return value.FullBytes, nil
}
