// Package upstream is the authorities that can stand above a server's own: what
// signs its X.509 authorities instead of themselves.
//
// [New] makes the one that a [Config] names: a CA in files (disk), a server of
// the same trust domain (spire: Hallmark's or SPIRE's), the PKI of Vault
// (vault), step-ca (step_ca), AWS Private CA (aws_pca) or Google's Certificate
// Authority Service (gcp_cas). It is an [authority.Upstream]; package authority
// verifies all that it returns.
package upstream

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
)

// Config names the authority above this server's X.509 authorities: exactly one
// kind.
type Config struct {
	Disk   *DiskConfig   `yaml:"disk"`    // a CA whose key is in a file
	SPIRE  *SPIREConfig  `yaml:"spire"`   // another server of this trust domain, Hallmark's or SPIRE's
	Vault  *VaultConfig  `yaml:"vault"`   // the PKI secrets engine of Vault or OpenBao
	StepCA *StepCAConfig `yaml:"step_ca"` // step-ca
	AWSPCA *AWSPCAConfig `yaml:"aws_pca"` // AWS Private CA
	GCPCAS *GCPCASConfig `yaml:"gcp_cas"` // Google Cloud's Certificate Authority Service

	// Bundle is a PEM file of the roots to publish. It is read again when it
	// changes. It is needed where the upstream does not name its root: of disk, if
	// certificate is not that of a root itself. Not with spire. Default: the roots
	// that the upstream names.
	Bundle string `yaml:"bundle" env:"expand"`
}

// Options are what [New] needs besides the configuration.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Now         func() time.Time // nil: time.Now
}

// Upstream is what [New] makes.
type Upstream interface {
	authority.Upstream
	// Close ends its connections.
	Close() error
}

// Bounds of what is read.
const (
	maxFile   = 1 << 20 // bytes of a PEM file
	maxSecret = 64 << 10
	maxAnswer = 1 << 20 // bytes of an answer over HTTP
	maxCerts  = 110     // in an answer: more than package authority takes
)

// kinds returns those that are configured.
func (c *Config) kinds() (kinds []string) {
	for _, k := range []struct {
		name string
		set  bool
	}{
		{"disk", c.Disk != nil}, {"spire", c.SPIRE != nil}, {"vault", c.Vault != nil},
		{"step_ca", c.StepCA != nil}, {"aws_pca", c.AWSPCA != nil}, {"gcp_cas", c.GCPCAS != nil},
	} {
		if k.set {
			kinds = append(kinds, k.name)
		}
	}
	return kinds
}

// Check checks a configuration without asking anyone. The path is that of what
// is wrong, below upstream.
func (c *Config) Check() (path string, err error) {
	kinds := c.kinds()
	switch {
	case len(kinds) == 0:
		return "", errors.New("upstream names no kind; choose one of disk, spire, vault, step_ca, aws_pca and gcp_cas")
	case len(kinds) > 1:
		return "", fmt.Errorf("upstream names %s; choose one", strings.Join(kinds, " and "))
	case c.SPIRE != nil && c.Bundle != "":
		return "bundle", errors.New("bundle is not for spire, whose server has the roots; remove it")
	}
	var check interface{ check() error }
	switch {
	case c.Disk != nil:
		check = c.Disk
	case c.SPIRE != nil:
		check = c.SPIRE
	case c.Vault != nil:
		check = c.Vault
	case c.StepCA != nil:
		check = c.StepCA
	case c.AWSPCA != nil:
		check = c.AWSPCA
	case c.GCPCAS != nil:
		check = c.GCPCAS
	}
	return kinds[0], check.check()
}

// New makes the upstream of a configuration that was checked. It asks it nothing
// yet, but reads files that must be there.
func New(c Config, o Options) (Upstream, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	var up Upstream
	var err error
	switch {
	case c.Disk != nil:
		up, err = newDisk(*c.Disk, c.Bundle, o.Now)
	case c.SPIRE != nil:
		return newSPIRE(*c.SPIRE, o.TrustDomain), nil
	case c.Vault != nil:
		up, err = newVault(*c.Vault)
	case c.StepCA != nil:
		up, err = newStepCA(*c.StepCA, o.Now)
	case c.AWSPCA != nil:
		up, err = newAWSPCA(*c.AWSPCA, o.Now)
	case c.GCPCAS != nil:
		up, err = newGCPCAS(*c.GCPCAS, o.Now)
	default:
		return nil, errors.New("upstream names no kind")
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("upstream: %w", err)
	case c.Bundle != "":
		return &withBundle{up, c.Bundle}, nil
	}
	return up, nil
}

// withBundle is an upstream whose roots are in a file.
type withBundle struct {
	Upstream
	path string
}

// Sign implements [authority.Upstream].
func (w *withBundle) Sign(ctx context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	if roots, err = readRoots(w.path); err != nil {
		return nil, nil, err
	}
	chain, _, err = w.Upstream.Sign(ctx, csr, lifetime)
	return chain, roots, err
}

// Bundle implements [authority.Follower].
func (w *withBundle) Bundle(context.Context) (*bundle.Bundle, bool, error) {
	roots, err := readRoots(w.path)
	if err != nil {
		return nil, false, err
	}
	b := &bundle.Bundle{}
	for _, c := range roots {
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: c})
	}
	return b, false, nil
}

func readRoots(path string) ([]*x509.Certificate, error) {
	roots, err := pemfile.Certificates(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	return roots, nil
}

// split tells the roots in a chain, which are self-signed, from the rest.
func split(certs []*x509.Certificate) (chain, roots []*x509.Certificate) {
	for i, c := range certs {
		if i > 0 && bytes.Equal(c.RawSubject, c.RawIssuer) && c.CheckSignatureFrom(c) == nil {
			roots = append(roots, c)
		} else {
			chain = append(chain, c)
		}
	}
	return chain, roots
}

// parsePEM reads certificates from texts of PEM, of a bounded number.
func parsePEM(texts ...string) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for _, text := range texts {
		if strings.TrimSpace(text) == "" {
			continue
		}
		more, err := pemfile.ParseCertificates([]byte(text))
		if err != nil {
			return nil, fmt.Errorf("it answered with something else than certificates: %w", err)
		}
		if certs = append(certs, more...); len(certs) > maxCerts {
			return nil, fmt.Errorf("it answered with more than %d certificates", maxCerts)
		}
	}
	if len(certs) == 0 {
		return nil, errors.New("it answered without a certificate")
	}
	return certs, nil
}

// requestPEM is a signing request as PEM.
func requestPEM(csr *x509.CertificateRequest) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr.Raw}))
}
