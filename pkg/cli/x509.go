package cli

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// x509Item is an X509-SVID as commands print it.
type x509Item struct {
	SPIFFEID     string     `json:"spiffe_id"`
	Hint         string     `json:"hint,omitempty"`
	SerialNumber string     `json:"serial_number"` // decimal
	KeyType      string     `json:"key_type"`
	NotBefore    *time.Time `json:"not_before"`
	ExpiresAt    *time.Time `json:"expires_at"`
	DNSNames     []string   `json:"dns_names,omitempty"`
	AuthorityID  string     `json:"authority_id"` // key ID of the bundle's authority above the chain
	Verified     bool       `json:"verified"`     // against the bundle of its trust domain
	Chain        string     `json:"chain"`        // PEM, the SVID first
	Bundle       string     `json:"bundle"`       // PEM
	PrivateKey   string     `json:"private_key,omitempty"`
}

func x509Of(s *x509svid.SVID, roots []*x509.Certificate) (*x509Item, error) {
	leaf := s.Certificates[0]
	item := &x509Item{
		SPIFFEID: s.ID.String(), Hint: s.Hint, SerialNumber: leaf.SerialNumber.String(), KeyType: keyType(leaf.PublicKey),
		NotBefore: timestamp(leaf.NotBefore.Unix()), ExpiresAt: timestamp(leaf.NotAfter.Unix()), DNSNames: leaf.DNSNames,
		AuthorityID: hex.EncodeToString(s.Certificates[len(s.Certificates)-1].AuthorityKeyId),
		Chain:       string(certificatesPEM(s.Certificates...)), Bundle: string(certificatesPEM(roots...)),
	}
	item.Verified = verify(s, roots) == nil
	return item, nil
}

// verify checks a chain against the authorities of its trust domain.
func verify(s *x509svid.SVID, roots []*x509.Certificate) error {
	bundle := x509bundle.FromX509Authorities(s.ID.TrustDomain(), roots)
	_, _, err := x509svid.Verify(s.Certificates, bundle)
	return err
}

func keyPEM(s *x509svid.SVID) (string, error) {
	der, err := x509.MarshalPKCS8PrivateKey(s.PrivateKey)
	if err != nil {
		return "", fmt.Errorf("encode the private key: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), nil
}

// showX509 prints an X509-SVID for people.
func (a *app) showX509(w io.Writer, s *x509svid.SVID, roots []*x509.Certificate) {
	leaf := s.Certificates[0]
	fmt.Fprintln(w, a.style.bold(s.ID.String()))
	d := details{style: a.style}
	d.add("Hint", s.Hint)
	d.add("Expires", a.moment(leaf.NotAfter))
	d.add("Serial", leaf.SerialNumber.String())
	d.add("Key", keyType(leaf.PublicKey))
	d.add("DNS names", leaf.DNSNames...)
	d.add("Issued by", issuers(s, roots)...)
	if err := verify(s, roots); err != nil {
		d.addPainted("Verified", a.style.red, "no: "+err.Error())
	} else {
		d.addPainted("Verified", a.style.green, "yes, against the bundle of "+s.ID.TrustDomain().Name())
	}
	io.WriteString(w, d.String())
}

// issuers names the certificates above an SVID, up to the bundle's.
func issuers(s *x509svid.SVID, roots []*x509.Certificate) []string {
	var out []string
	name := func(c *x509.Certificate, what string) string {
		return fmt.Sprintf("%s %s, %s", what, hex.EncodeToString(c.SubjectKeyId), cmp.Or(c.Subject.CommonName, c.Subject.String(), "without a name"))
	}
	for _, c := range s.Certificates[1:] {
		out = append(out, name(c, "intermediate"))
	}
	last := s.Certificates[len(s.Certificates)-1]
	for _, root := range roots {
		if bytes.Equal(root.RawSubject, last.RawIssuer) && bytes.Equal(root.SubjectKeyId, last.AuthorityKeyId) {
			return append(out, name(root, "authority"))
		}
	}
	return append(out, "authority "+hex.EncodeToString(last.AuthorityKeyId)+", which is not in the bundle")
}
