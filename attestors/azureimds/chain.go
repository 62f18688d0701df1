package azureimds

import (
	"context"
	"crypto/x509"
	_ "embed"
	"encoding/pem"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

const (
	maxCertificate = 16 << 10 // bytes of one that is fetched
	maxKept        = 64       // that were fetched; Azure uses a dozen
	maxLinks       = 3        // fetched for one chain
)

// roots.pem has the authorities of
// https://learn.microsoft.com/azure/security/fundamentals/azure-ca-details that
// certificates of metadata services lead to.
//
//go:embed roots.pem
var rootsPEM []byte

var builtIn = sync.OnceValues(func() (*x509.CertPool, error) {
	certs, err := pemfile.ParseCertificates(rootsPEM)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, cert := range certs {
		pool.AddCert(cert)
	}
	return pool, nil
})

// chains verifies certificates of metadata services. Documents do not bring those
// between them and the root: they are fetched from where the certificate says.
type chains struct {
	bundle *pemfile.Bundle // nil: built in
	hosts  []string
	api    *cloud.Service

	mu   sync.Mutex
	kept map[string]*x509.Certificate // by URL
}

func newChains(c ServerConfig) (*chains, error) {
	out := &chains{hosts: c.CAIssuerHosts, api: cloud.API(), kept: make(map[string]*x509.Certificate)}
	if c.CABundlePath != "" {
		out.bundle = &pemfile.Bundle{Paths: []string{c.CABundlePath}}
	}
	if _, err := out.roots(); err != nil {
		return nil, fmt.Errorf("ca_bundle_path: %w", err)
	}
	return out, nil
}

func (c *chains) roots() (*x509.CertPool, error) {
	if c.bundle == nil {
		return builtIn()
	}
	return c.bundle.Load()
}

// verify checks that a certificate leads to an authority over those that came with
// it or, if that is not enough, those that are fetched.
func (c *chains) verify(ctx context.Context, leaf *x509.Certificate, with []*x509.Certificate, now time.Time) error {
	roots, err := c.roots()
	if err != nil {
		return unavailable{fmt.Errorf("authorities of Azure: %w", err)}
	}
	certs := append([]*x509.Certificate{leaf}, with...)
	_, err = attestors.VerifyChain(certs, roots, now)
	fetched := make(map[string]*x509.Certificate)
	for last := leaf; err != nil && len(fetched) < maxLinks; {
		where, ok := c.issuerOf(last)
		if !ok || fetched[where] != nil {
			break
		}
		issuer, fetchErr := c.fetch(ctx, where)
		if fetchErr != nil {
			return unavailable{fmt.Errorf("certificate of an authority of Azure: %w", fetchErr)}
		}
		certs, last, fetched[where] = append(certs, issuer), issuer, issuer
		_, err = attestors.VerifyChain(certs, roots, now)
	}
	if err != nil {
		return err
	}
	// Only now, as what came by plain HTTP may be anything.
	c.mu.Lock()
	defer c.mu.Unlock()
	for where, cert := range fetched {
		if len(c.kept) >= maxKept {
			clear(c.kept)
		}
		c.kept[where] = cert
	}
	return nil
}

// issuerOf returns the URL where a certificate says that its issuer's is, if that
// is where such a one may be fetched from.
func (c *chains) issuerOf(cert *x509.Certificate) (string, bool) {
	for _, text := range cert.IssuingCertificateURL {
		u, err := url.Parse(text)
		if err == nil && u.Scheme == "http" && u.User == nil && u.RawQuery == "" && strings.HasPrefix(u.Path, "/pki") && slices.Contains(c.hosts, u.Host) {
			return u.String(), true
		}
	}
	return "", false
}

// fetch fetches a certificate, if it is not kept.
func (c *chains) fetch(ctx context.Context, where string) (*x509.Certificate, error) {
	c.mu.Lock()
	cert := c.kept[where]
	c.mu.Unlock()
	if cert != nil {
		return cert, nil
	}
	answer, err := c.api.Do(ctx, cloud.Question{URL: where, Most: maxCertificate})
	if err != nil {
		return nil, err
	}
	der := answer.Body
	if block, _ := pem.Decode(der); block != nil {
		der = block.Bytes
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		return nil, fmt.Errorf("%s is no certificate: %w", where, err)
	}
	return cert, nil
}
