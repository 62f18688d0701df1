package authority

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of what an upstream returns. Every SVID carries the chain, every
// agent and workload the roots.
const (
	maxChain      = 8
	maxChainBytes = 32 << 10
	maxRoots      = 100
	maxRootBytes  = 1 << 20
	maxKeyIDBytes = 64 // of a subject key identifier
	minRSABits    = 2048
	minCurveBits  = 256
	maxSerialBits = 160 // RFC 5280 §4.1.2.2
	// clockSkew is how far ahead of this machine's an upstream's clock may be: so
	// long it is waited until a certificate is valid.
	clockSkew = 10 * time.Second
)

// verifyIssued checks what an upstream made of a signing request: that a
// validator which has nothing but the roots would accept what the new authority
// signs, and that nothing else is to be trusted because of it. It returns the
// chain without roots.
func verifyIssued(td spiffeid.TrustDomain, signer crypto.Signer, chain, roots []*x509.Certificate, now time.Time) (_, _ []*x509.Certificate, err error) {
	if len(chain) == 0 {
		return nil, nil, errors.New("it returned no certificate")
	}
	if len(chain) > maxChain+1 {
		return nil, nil, fmt.Errorf("it returned a chain of %d certificates; the most is %d", len(chain), maxChain)
	}
	roots = distinct(roots)
	if err := checkRoots(roots, now); err != nil {
		return nil, nil, err
	}
	own := chain[0]
	if err := checkOwn(td, signer.Public(), own, now); err != nil {
		return nil, nil, err
	}
	if slices.ContainsFunc(roots, own.Equal) {
		return nil, nil, errors.New("it returned the new authority's certificate among the roots")
	}
	for len(chain) > 1 { // some have the root at its end
		last := chain[len(chain)-1]
		if !slices.ContainsFunc(roots, last.Equal) && last.CheckSignatureFrom(last) != nil {
			break
		}
		chain = chain[:len(chain)-1]
	}
	size := 0
	for i, c := range chain {
		size += len(c.Raw)
		if i == 0 {
			continue
		}
		if err := checkCA(fmt.Sprintf("certificate %d of its chain, %q,", i+1, c.Subject), c, now); err != nil {
			return nil, nil, err
		}
		for _, u := range c.URIs {
			if u.Scheme == "spiffe" && u.String() != td.IDString() {
				return nil, nil, fmt.Errorf("certificate %d of its chain is that of %q, not of this trust domain", i+1, u)
			}
		}
	}
	if len(chain) > maxChain || size > maxChainBytes {
		return nil, nil, fmt.Errorf("its chain of %d certificates has %d bytes; the most is %d of %d bytes together", len(chain), size, maxChain, maxChainBytes)
	}
	if err := checkLinks(chain, roots); err != nil {
		return nil, nil, err
	}
	if err := probe(td, signer, chain, roots, now); err != nil {
		return nil, nil, err
	}
	return chain, roots, nil
}

// distinct returns certificates without those that come again.
func distinct(certs []*x509.Certificate) []*x509.Certificate {
	out := make([]*x509.Certificate, 0, len(certs))
	for _, c := range certs {
		if !slices.ContainsFunc(out, c.Equal) {
			out = append(out, c)
		}
	}
	return out
}

// checkRoots checks the roots of an upstream.
func checkRoots(roots []*x509.Certificate, now time.Time) error {
	if len(roots) == 0 {
		return errors.New("it returned no root to publish; name a file with the roots as bundle in upstream")
	}
	size := 0
	for _, c := range roots {
		size += len(c.Raw)
	}
	if len(roots) > maxRoots || size > maxRootBytes {
		return fmt.Errorf("it returned %d roots of %d bytes; the most is %d of %d bytes together", len(roots), size, maxRoots, maxRootBytes)
	}
	for _, c := range roots {
		if err := checkCA(fmt.Sprintf("its root %q", c.Subject), c, now); err != nil && !now.After(c.NotAfter) {
			return err // one that has ended does no harm, and is pruned
		}
	}
	return nil
}

// checkOwn checks the certificate of the new authority itself.
func checkOwn(td spiffeid.TrustDomain, public crypto.PublicKey, c *x509.Certificate, now time.Time) error {
	names := make([]string, 0, len(c.URIs))
	for _, u := range c.URIs {
		names = append(names, u.String())
	}
	switch {
	case !sameKey(public, c.PublicKey):
		return errors.New("the certificate that it returned is not of this server's key")
	case len(names) == 0:
		return fmt.Errorf("the certificate that it returned has not the name that was asked for, the URI %s; have it take the URI from the signing request", td.IDString())
	case len(names) > 1 || names[0] != td.IDString():
		return fmt.Errorf("the certificate that it returned is of %q, not of %s alone", names, td.IDString())
	case len(c.SubjectKeyId) == 0 || len(c.SubjectKeyId) > maxKeyIDBytes:
		return fmt.Errorf("the certificate that it returned has a subject key identifier of %d bytes; 1 to %d are needed", len(c.SubjectKeyId), maxKeyIDBytes)
	case len(c.Subject.Names) == 0:
		return errors.New("the certificate that it returned has no subject, which an authority needs") // RFC 5280 §4.1.2.4
	case string(c.RawSubject) == string(c.RawIssuer):
		return errors.New("the certificate that it returned has the name of its issuer as its own")
	}
	if left := c.NotAfter.Sub(now); left < MinLifetime {
		return fmt.Errorf("the certificate that it returned ends at %s, in %v; %v are needed", c.NotAfter.UTC().Format(time.RFC3339), left.Round(time.Second), MinLifetime)
	}
	return checkCA("the certificate that it returned", c, now)
}

// checkCA checks what every certificate above an SVID has to be.
func checkCA(what string, c *x509.Certificate, now time.Time) error {
	switch {
	case !c.BasicConstraintsValid || !c.IsCA:
		return fmt.Errorf("%s is not that of an authority (CA)", what)
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return fmt.Errorf("%s may not sign certificates (keyCertSign)", what) // X509-SVID §4.3
	case c.NotBefore.After(now):
		return fmt.Errorf("%s is valid only from %s; are the clocks right?", what, c.NotBefore.UTC().Format(time.RFC3339))
	case now.After(c.NotAfter):
		return fmt.Errorf("%s has expired, at %s", what, c.NotAfter.UTC().Format(time.RFC3339))
	case c.SerialNumber == nil || c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() > maxSerialBits:
		return fmt.Errorf("%s has a serial number that is not positive and at most %d bits long", what, maxSerialBits)
	}
	if err := CheckSigner(c.PublicKey); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// checkLinks checks that each certificate is signed by the next, the last by a
// root, and that none is valid longer than what signed it.
func checkLinks(chain, roots []*x509.Certificate) error {
	for i, c := range chain {
		above := roots
		if i+1 < len(chain) {
			above = chain[i+1 : i+2]
		}
		var parent *x509.Certificate
		for _, p := range above {
			if c.CheckSignatureFrom(p) == nil && (parent == nil || parent.NotAfter.Before(p.NotAfter)) {
				parent = p
			}
		}
		switch {
		case parent == nil && i+1 < len(chain):
			return fmt.Errorf("certificate %d of its chain is not signed by the next one, %q", i+1, above[0].Subject)
		case parent == nil:
			return fmt.Errorf("its chain ends with %q, which none of the %d roots signed", c.Issuer, len(roots))
		case c.NotAfter.After(parent.NotAfter):
			return fmt.Errorf("certificate %d of its chain is valid until %s, longer than %q that signed it (%s)", i+1,
				c.NotAfter.UTC().Format(time.RFC3339), parent.Subject, parent.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

// probe signs an SVID that nobody gets, and validates it as clients and servers
// do, with the roots alone: path lengths, name constraints and extended key
// usages of all above it.
func probe(td spiffeid.TrustDomain, signer crypto.Signer, chain, roots []*x509.Certificate, now time.Time) error {
	id := td.ID().URL()
	id.Path = "/spire/server"
	tmpl := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(Serial()), URIs: []*url.URL{id},
		NotBefore: now.Add(-time.Second), NotAfter: now.Add(time.Second), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, chain[0], signer.Public(), signer)
	if err != nil {
		return fmt.Errorf("sign with the new authority: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	trusted, between := x509.NewCertPool(), x509.NewCertPool()
	for _, c := range roots {
		trusted.AddCert(c)
	}
	for _, c := range chain {
		between.AddCert(c)
	}
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: trusted, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{usage}})
		if err != nil {
			return fmt.Errorf("an SVID under the certificate that it returned would not verify: %w; look at path lengths, name constraints and extended key usages of %q and of what is above it", err, chain[0].Issuer)
		}
	}
	return nil
}
