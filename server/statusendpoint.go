package server

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/oidc"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/tokenstatus"
	"github.com/hallmark-id/hallmark/server/web"
)

const (
	defaultStatusTTL = 30 * time.Second
	maxStatusTTL     = time.Hour
)

// StatusListEndpointConfig gives JWT-SVIDs and WIT-SVIDs a claim status, and
// serves the lists of all servers of the trust domain, which say what of them was
// revoked, to whoever asks: GET /status/LIST (draft-ietf-oauth-status-list).
type StatusListEndpointConfig struct {
	// Listen is the host:port, for example 0.0.0.0:8446. It is required.
	Listen string `yaml:"listen" env:"expand"`
	// URL is the URL of the endpoint, without a path, for example
	// https://status.example.org. Tokens name their list below it, and relying parties
	// fetch it from there. It is required. http is for this machine, for trials.
	URL string `yaml:"url" env:"expand"`
	// TTL is how long a relying party may hold a list, 1s to 1h: it learns of a
	// revocation that late. Default 30s.
	TTL config.Duration `yaml:"ttl"`
	// HTTPSWeb has the certificate. Default: HTTP, behind a proxy that has it.
	HTTPSWeb *CertificateConfig `yaml:"https_web"`
}

func (s *settings) checkStatusListEndpoint(wrong func(path, format string, args ...any)) {
	c := s.StatusListEndpoint
	if c == nil {
		return
	}
	s.checkEndpoint("status_list_endpoint", c.Listen, "8446", c.HTTPSWeb, wrong)
	for name, other := range map[string]string{
		"bundle_endpoint": listenOf(s.BundleEndpoint, func(b *BundleEndpointConfig) string { return b.Listen }),
		"token_exchange":  listenOf(s.TokenExchange, func(b *TokenExchangeConfig) string { return b.Listen }),
		"oidc_issuer":     listenOf(s.OIDCIssuer, func(b *OIDCIssuerConfig) string { return b.Listen }),
		"crl_endpoint":    listenOf(s.CRLEndpoint, func(b *CRLEndpointConfig) string { return b.Listen }),
	} {
		if c.Listen != "" && other == c.Listen {
			wrong("status_list_endpoint.listen", "status_list_endpoint.listen is %s, where %s is; choose another port, such as 8446", c.Listen, name)
		}
	}
	if ttl := time.Duration(c.TTL); ttl != 0 && (ttl < time.Second || ttl > maxStatusTTL || ttl%time.Second != 0) {
		wrong("status_list_endpoint.ttl", "status_list_endpoint.ttl is %v; it is whole seconds, between 1s and %v", ttl, maxStatusTTL)
	}
	u, err := url.Parse(c.URL)
	switch {
	case c.URL == "":
		wrong("status_list_endpoint", "status_list_endpoint has no url; set it to one like https://status.example.org")
	case err != nil || u.Host == "" || u.User != nil || strings.TrimPrefix(c.URL, u.Scheme+"://") != u.Host || len(c.URL) > 512:
		wrong("status_list_endpoint.url", "status_list_endpoint.url %.100q is none of a host alone; write one like https://status.example.org", c.URL)
	case u.Scheme != "https" && !(u.Scheme == "http" && oidc.IsLoopback(u.Hostname())):
		wrong("status_list_endpoint.url", "status_list_endpoint.url %.100q is not https; relying parties refuse it", c.URL)
	}
}

// listenStatusListEndpoint begins to listen where status lists are served. It
// returns nil if they are not.
func (s *settings) listenStatusListEndpoint(log *slog.Logger) (*web.Options, error) {
	c := s.StatusListEndpoint
	if c == nil {
		return nil, nil
	}
	o := &web.Options{Log: log} // no request has a body
	if c.HTTPSWeb != nil {
		var err error
		if o.Certificate, err = s.webCertificate("status_list_endpoint", c.HTTPSWeb, log); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("status_list_endpoint.listen: %w; choose another address", err)
	}
	o.Listener = l
	return o, nil
}

// newStatusLists makes the status lists. Those of other servers and earlier runs
// are kept where this one gives no token a place, too.
func (s *settings) newStatusLists(name string, reg *registry.Registry, issued *journal.Journal, log *slog.Logger, counted *metrics.Metrics) *tokenstatus.Lists {
	o := tokenstatus.Options{Registry: reg, Server: name, Journal: issued, Log: log, Metrics: counted}
	if c := s.StatusListEndpoint; c != nil {
		o.URL = c.URL + tokenstatus.Path
	}
	return tokenstatus.New(o)
}

// serveStatusLists serves status lists until the context ends.
func (s *settings) serveStatusLists(ctx context.Context, o web.Options, reg *registry.Registry, authorities *authority.Authorities, issuer *issue.Issuer) error {
	ttl := time.Duration(s.StatusListEndpoint.TTL)
	if ttl == 0 {
		ttl = defaultStatusTTL
	}
	o.Handler = tokenstatus.Handler(tokenstatus.HandlerOptions{
		View: reg.View, Active: authorities.JWT, Sign: issuer.StatusList, TTL: ttl, Log: o.Log,
	})
	o.Log.Info("status lists are served", "listen", o.Listener.Addr().String(), "url", s.StatusListEndpoint.URL, "tls", o.Certificate.Get != nil)
	if err := web.Serve(ctx, o); ctx.Err() == nil {
		return fmt.Errorf("serve status lists: %w", err)
	}
	return ctx.Err()
}
