package server

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"strings"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/revocation"
	"github.com/hallmark-id/hallmark/server/web"
)

// CRLEndpointConfig serves the CRLs of all X.509 authorities of the trust domain
// to whoever asks: GET /crl/AUTHORITY.crl. They are public and signed, so that
// HTTP is what they usually come by.
type CRLEndpointConfig struct {
	// Listen is the host:port, for example 0.0.0.0:8080. It is required.
	Listen string `yaml:"listen" env:"expand"`
	// URL is the URL of the endpoint, without a path, for example
	// http://crl.example.org. If it is set, X509-SVIDs name their CRL's URL below it
	// (CRL distribution point); some verifiers then refuse them while it cannot be
	// reached. Default: they name none.
	URL string `yaml:"url" env:"expand"`
	// HTTPSWeb has a certificate, for HTTPS. Default: HTTP.
	HTTPSWeb *CertificateConfig `yaml:"https_web"`
}

func (s *settings) checkCRLEndpoint(wrong func(path, format string, args ...any)) {
	c := s.CRLEndpoint
	if c == nil {
		return
	}
	s.checkEndpoint("crl_endpoint", c.Listen, "8080", c.HTTPSWeb, wrong)
	for name, other := range map[string]string{
		"bundle_endpoint": listenOf(s.BundleEndpoint, func(b *BundleEndpointConfig) string { return b.Listen }),
		"token_exchange":  listenOf(s.TokenExchange, func(b *TokenExchangeConfig) string { return b.Listen }),
		"oidc_issuer":     listenOf(s.OIDCIssuer, func(b *OIDCIssuerConfig) string { return b.Listen }),
	} {
		if c.Listen != "" && other == c.Listen {
			wrong("crl_endpoint.listen", "crl_endpoint.listen is %s, where %s is; choose another port, such as 8080", c.Listen, name)
		}
	}
	if c.URL == "" {
		return
	}
	u, err := url.Parse(c.URL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || strings.TrimPrefix(c.URL, u.Scheme+"://") != u.Host || len(c.URL) > 512 {
		wrong("crl_endpoint.url", "crl_endpoint.url %.100q is none of a host alone; write one like http://crl.example.org", c.URL)
	}
}

func listenOf[C any](c *C, listen func(*C) string) string {
	if c == nil {
		return ""
	}
	return listen(c)
}

// crlURL is what the URLs of CRLs begin with; empty: certificates name none.
func (s *settings) crlURL() string {
	if s.CRLEndpoint == nil || s.CRLEndpoint.URL == "" {
		return ""
	}
	return s.CRLEndpoint.URL + revocation.Path
}

// listenCRLEndpoint begins to listen where CRLs are served. It returns nil if
// they are not.
func (s *settings) listenCRLEndpoint(log *slog.Logger) (*web.Options, error) {
	c := s.CRLEndpoint
	if c == nil {
		return nil, nil
	}
	o := &web.Options{Log: log} // no request has a body
	if c.HTTPSWeb != nil {
		var err error
		if o.Certificate, err = s.webCertificate("crl_endpoint", c.HTTPSWeb, log); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("crl_endpoint.listen: %w; choose another address", err)
	}
	o.Listener = l
	return o, nil
}

// serveCRLs serves CRLs until the context ends.
func (s *settings) serveCRLs(ctx context.Context, o web.Options, reg *registry.Registry) error {
	o.Handler = revocation.Handler(reg.View)
	o.Log.Info("CRLs are served", "listen", o.Listener.Addr().String(), "tls", o.Certificate.Get != nil)
	if err := web.Serve(ctx, o); ctx.Err() == nil {
		return fmt.Errorf("serve CRLs: %w", err)
	}
	return ctx.Err()
}

// openJournal opens the journal of what is issued. A server that keeps nothing
// on disk keeps it in memory, too.
func (s *settings) openJournal(log *slog.Logger) (*journal.Journal, error) {
	if s.Store.Memory != nil {
		return journal.Open("", nil, log)
	}
	return journal.Open(filepath.Join(s.DataDir, "issued"), nil, log)
}

func (s *settings) newPublisher(reg *registry.Registry, authorities *authority.Authorities, issued *journal.Journal, log *slog.Logger, counted *metrics.Metrics) *revocation.Publisher {
	return revocation.New(revocation.Options{
		Registry: reg, Authorities: authorities, Journal: issued, Always: s.CRLEndpoint != nil, Log: log, Metrics: counted,
	})
}
