package server

import (
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/acme"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/web"
)

// maxCAFile bounds the file of authorities that verify a directory, in bytes.
const maxCAFile = 1 << 20

// minAccountKey is the shortest key of an account with an authority, in bytes: one
// that is shorter was cut off, or is something else.
const minAccountKey = 16

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
	if e := a.ExternalAccount; e != nil && (e.KeyID == "" || e.KeyFile == "") {
		wrong(path+".external_account", "acme.external_account needs key_id and key_file; the authority gives its customers both")
	} else if _, err := e.binding(); err != nil {
		wrong(path+".external_account.key_file", "acme.external_account.key_file: %v", err)
	}
}

// binding reads what binds the account by ACME to one with the authority.
func (c *ExternalAccountConfig) binding() (*acme.ExternalAccountBinding, error) {
	if c == nil {
		return nil, nil
	}
	text, err := authority.ReadSecret(c.KeyFile)
	if err != nil {
		return nil, err
	}
	key, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(text, "="))
	if err != nil || len(key) < minAccountKey { // the error would show some of it
		return nil, fmt.Errorf("%s has no key of %d bytes or more in base64url; write it as the authority shows it", c.KeyFile, minAccountKey)
	}
	return &acme.ExternalAccountBinding{KID: c.KeyID, Key: key}, nil
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
		account, err := a.ExternalAccount.binding()
		if err != nil {
			return web.Certificate{}, fmt.Errorf("%s.https_web.acme.external_account.key_file: %w", name, err)
		}
		obtained := web.NewACME(web.ACMEOptions{
			Domains: a.Domains, Directory: a.Directory, Roots: roots, Email: a.Email, Account: account, Dir: filepath.Join(s.DataDir, "acme"), Log: log,
		})
		return web.Certificate{Get: obtained.Certificate, Obtain: obtained.Obtain}, nil
	}
	files, err := web.OpenFiles(c.Certificate, c.Key, log)
	if err != nil {
		return web.Certificate{}, fmt.Errorf("%s.https_web: %w", name, err)
	}
	return web.Certificate{Get: files.Certificate}, nil
}
