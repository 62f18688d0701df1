package node

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// An authority that leaves the bundle before its end was revoked: its key may
// be anybody's. A trust bundle in a file and the roots pinned in a join string
// are older than that, and must not vouch for a server by it. So a node
// remembers those that have left, until their end.

// disownedFile is in the data directory: certificates in PEM.
const disownedFile = "disowned.pem"

// after returns the trust in a bundle that comes after an earlier one (nil:
// none): what that had and this has not is disowned, for as long as it could be
// used.
func (t *trust) after(earlier *trust, now time.Time) *trust {
	if earlier == nil {
		return t
	}
	gone := slices.Clone(earlier.disowned)
	for _, a := range earlier.bundle.X509Authorities {
		gone = append(gone, a.Certificate)
	}
	slices.SortStableFunc(gone, func(a, b *x509.Certificate) int { return b.NotAfter.Compare(a.NotAfter) })
	for _, cert := range gone {
		if now.Before(cert.NotAfter) && !hasKey(t.bundle, cert) && !t.disowns(cert) && len(t.disowned) < maxAuthorities {
			t.disowned = append(t.disowned, cert)
		}
	}
	return t
}

// disowns reports whether an authority was revoked, as far as the node knows.
// It is the key that counts, under whichever certificate. A nil trust disowns
// none.
func (t *trust) disowns(cert *x509.Certificate) bool {
	return t != nil && slices.ContainsFunc(t.disowned, func(c *x509.Certificate) bool { return sameKey(c, cert) })
}

// withoutDisowned returns a bundle without the authorities that were revoked.
func (t *trust) withoutDisowned(b *bundle.Bundle) *bundle.Bundle {
	out := b.Clone()
	out.X509Authorities = slices.DeleteFunc(out.X509Authorities, func(a bundle.X509Authority) bool { return t.disowns(a.Certificate) })
	return out
}

func hasKey(b *bundle.Bundle, cert *x509.Certificate) bool {
	return slices.ContainsFunc(b.X509Authorities, func(a bundle.X509Authority) bool { return sameKey(a.Certificate, cert) })
}

func sameKey(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

func (d *dir) saveDisowned(certs []*x509.Certificate) error {
	var err error
	if len(certs) == 0 {
		err = d.remove(disownedFile)
	} else {
		var b bytes.Buffer
		for _, cert := range certs {
			_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}) // a Buffer takes everything
		}
		err = d.write(disownedFile, b.Bytes())
	}
	if err != nil {
		return fmt.Errorf("save revoked authorities: %w", err)
	}
	return nil
}

func (d *dir) loadDisowned() ([]*x509.Certificate, error) {
	data, err := d.read(disownedFile)
	if err != nil {
		return nil, fmt.Errorf("read revoked authorities: %w", err)
	}
	var out []*x509.Certificate
	for len(bytes.TrimSpace(data)) > 0 {
		block, rest := pem.Decode(data)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s is damaged; remove the data directory's content to attest anew", filepath.Join(d.path, disownedFile))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s is damaged: %w; remove the data directory's content to attest anew", filepath.Join(d.path, disownedFile), err)
		}
		out, data = append(out, cert), rest
	}
	return out, nil
}
