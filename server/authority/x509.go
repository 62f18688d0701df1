package authority

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Backdate is how much earlier than it was made an authority becomes valid:
// for verifiers whose clock is behind.
const Backdate = 10 * time.Second

// certify turns the key of a new authority and a template for its certificate
// into its chain, own certificate first, and the roots to publish for it. The
// chain leaves the root out, unless the authority is its own root.
type certify func(ctx context.Context, signer crypto.Signer, template *x509.Certificate) (chain, roots []*x509.Certificate, err error)

// selfSigned is the certify of a server that has no authority above it.
func selfSigned(_ context.Context, signer crypto.Signer, template *x509.Certificate) (chain, roots []*x509.Certificate, err error) {
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	return []*x509.Certificate{cert}, []*x509.Certificate{cert}, nil
}

// template returns the certificate of an X.509 authority, unsigned.
// X509-SVID §3.2, §4: the trust domain's ID, the key usages of a signing
// certificate and no other, no extended key usage.
func template(td spiffeid.TrustDomain, public crypto.PublicKey, created, end time.Time) (*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fmt.Errorf("encode a public key: %w", err)
	}
	keyID, err := KeyID(spki)
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(Serial()),
		Subject:               Name(td, keyID),
		NotBefore:             created.Add(-Backdate),
		NotAfter:              end,
		URIs:                  []*url.URL{td.ID().URL()},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId:          keyID,
	}, nil
}

// Serial returns a new serial number of a certificate: 158 random bits in 20
// octets, positive and without a leading zero. RFC 5280 §4.1.2.2.
func Serial() []byte {
	serial := make([]byte, 20)
	rand.Read(serial) // never fails
	serial[0] = serial[0]&0x3f | 0x40
	return serial
}

// KeyID returns the key identifier of a public key (a DER
// SubjectPublicKeyInfo): the first 160 bits of the SHA-256 of the key's bits.
// RFC 7093 §2, method 1.
func KeyID(spki []byte) ([]byte, error) {
	info, bits := cryptobyte.String(spki), []byte(nil)
	if !info.ReadASN1(&info, asn1.SEQUENCE) || !info.SkipASN1(asn1.SEQUENCE) || !info.ReadASN1BitStringAsBytes(&bits) {
		return nil, errors.New("a public key is not a SubjectPublicKeyInfo")
	}
	sum := sha256.Sum256(bits)
	return sum[:20], nil
}

// maxName bounds an attribute of a name. RFC 5280 appendix A.1, ub-common-name.
const maxName = 64

// Name returns the name of the authority with a key ID, which makes it unlike
// that of any other authority: verifiers that look an issuer up by its name
// find the right one while several are in the bundle.
func Name(td spiffeid.TrustDomain, keyID []byte) pkix.Name {
	cn := td.Name()
	if len(cn) > maxName {
		cn = cn[:maxName-3] + "..."
	}
	return pkix.Name{
		Organization: []string{"Hallmark"},
		CommonName:   cn,
		SerialNumber: hex.EncodeToString(keyID),
	}
}
