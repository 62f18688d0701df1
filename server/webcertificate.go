package server

import (
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/web"
)

// maxCAFile bounds the file of authorities that verify a directory, in bytes.
const maxCAFile = 1 << 20

// check says what is wrong with a certificate by ACME.
func (c *CertificateConfig) check(path string, wrong func(path, format string, args ...any)) {
	a := c.ACME
	if c.Certificate != "" || c.Key != "" {
		wrong(path, "https_web has acme and files; choose one")
	}
	path += ".acme"
	switch {
	case len(a.Domains) == 0:
		wrong(path, "acme names no domains; set domains to the DNS names of the endpoint")
	case !a.AcceptTerms:
		wrong(path, "acme needs accept_terms: true, once you have read the terms of service of the authority")
	}
	for _, name := range a.Domains {
		if err := entry.ValidateDNSName(name); err != nil || strings.Contains(name, "*") || name != strings.ToLower(name) {
			wrong(path+".domains", "acme.domains: %q is not the name of a host in lower case; write one like spiffe.example.org", name)
		}
	}
	if a.Directory != "" {
		if u, err := url.Parse(a.Directory); err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
			wrong(path+".directory", "acme.directory: %q is not an https URL of a directory; write one like https://acme-v02.api.letsencrypt.org/directory", a.Directory)
		}
	}
}

// webCertificate has the certificate of an endpoint from where a configuration
// says.
func (s *settings) webCertificate(name string, c *CertificateConfig, log *slog.Logger) (web.Certificate, error) {
	if a := c.ACME; a != nil {
		var roots *x509.CertPool
		if a.CAPath != "" {
			all, err := pemfile.Certificates(a.CAPath, maxCAFile)
			if err != nil {
				return web.Certificate{}, fmt.Errorf("%s.https_web.acme.ca_path: %w", name, err)
			}
			roots = x509.NewCertPool()
			for _, cert := range all {
				roots.AddCert(cert)
			}
		}
		obtained := web.NewACME(web.ACMEOptions{
			Domains: a.Domains, Directory: a.Directory, Roots: roots, Email: a.Email, Dir: filepath.Join(s.DataDir, "acme"), Log: log,
		})
		return web.Certificate{Get: obtained.Certificate, Obtain: obtained.Obtain}, nil
	}
	files, err := web.OpenFiles(c.Certificate, c.Key, log)
	if err != nil {
		return web.Certificate{}, fmt.Errorf("%s.https_web: %w", name, err)
	}
	return web.Certificate{Get: files.Certificate}, nil
}
