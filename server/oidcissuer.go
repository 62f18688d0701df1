package server

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/oidc"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/web"
)

// OIDCIssuerConfig publishes what verifies JWT-SVIDs as OpenID Connect Discovery
// says, to whoever asks. It has no secrets.
type OIDCIssuerConfig struct {
	// Listen is the host:port, for example 0.0.0.0:8445. That of token_exchange
	// serves both there, with its certificate. It is required.
	Listen string `yaml:"listen" env:"expand"`
	// URLs are those by which relying parties reach it, without a slash at their
	// end, for example https://id.example.org. Each is told apart by the host and
	// path of a request. jwt.issuer, or issuer of a profile, is one of them. At
	// least one is required.
	URLs []string `yaml:"urls" env:"expand"`
	// HTTPSWeb has the certificate. It is required, unless plain_http is set or
	// token_exchange listens there.
	HTTPSWeb *CertificateConfig `yaml:"https_web"`
	// PlainHTTP serves HTTP: behind a proxy that has the certificate and leaves the
	// header Host as it is, or for trials, where URLs of this machine may then be
	// http. Default false.
	PlainHTTP bool `yaml:"plain_http"`
}

// jwtAlgorithms are those that keys of each type sign JWTs with.
var jwtAlgorithms = map[authority.KeyType]jose.SignatureAlgorithm{
	authority.ECP256: jose.ES256, authority.ECP384: jose.ES384, authority.RSA2048: jose.RS256, authority.RSA4096: jose.RS256,
}

// checkOIDC checks the profiles of JWT-SVIDs and the issuer that publishes what
// verifies them.
func (s *settings) checkOIDC(wrong func(path, format string, args ...any)) {
	if n := len(s.JWT.Profiles); n > issue.MaxProfiles {
		wrong("jwt.profiles", "jwt.profiles has %d; the most is %d", n, issue.MaxProfiles)
	}
	for i, c := range s.JWT.Profiles {
		p, err := issue.NewProfile(c, jwtAlgorithms[s.JWT.KeyType])
		if err != nil {
			wrong("jwt.profiles."+strconv.Itoa(i), "jwt.profiles: %v", err)
			continue
		}
		s.profiles = append(s.profiles, p)
	}
	c := s.OIDCIssuer
	if c == nil {
		return
	}
	s.checkEndpoint("oidc_issuer", c.Listen, "8445", c.HTTPSWeb, wrong)
	if b := s.BundleEndpoint; b != nil && b.Listen == c.Listen {
		wrong("oidc_issuer.listen", "oidc_issuer.listen is %s, where the bundle is published; choose another port, such as 8445", c.Listen)
	}
	switch shared := s.sharesTokenExchange(); {
	case shared && (c.HTTPSWeb != nil || c.PlainHTTP):
		wrong("oidc_issuer", "oidc_issuer listens where token_exchange does, whose https_web is that of both; remove https_web and plain_http, or choose another port")
	case shared && s.TokenExchange.HTTPSWeb == nil:
		wrong("oidc_issuer", "oidc_issuer listens where token_exchange does, whose certificate relying parties cannot verify; set token_exchange.https_web")
	case shared:
	case c.HTTPSWeb == nil && !c.PlainHTTP:
		wrong("oidc_issuer", "oidc_issuer has no https_web; set its certificate and key, or plain_http behind a proxy that has them")
	case c.HTTPSWeb != nil && c.PlainHTTP:
		wrong("oidc_issuer", "oidc_issuer has https_web and plain_http; choose one")
	}
	if _, err := oidc.New(oidc.Options{URLs: c.URLs, AllowLoopback: c.PlainHTTP}); err != nil {
		wrong("oidc_issuer", "oidc_issuer.urls: %v", err)
	}
	if !slices.ContainsFunc(c.URLs, s.issues) && len(c.URLs) > 0 {
		wrong("oidc_issuer", "oidc_issuer: no token has one of its URLs as claim iss, so that no relying party would come; set jwt.issuer to %s", c.URLs[0])
	}
}

// issues reports whether some tokens have a URL as claim iss.
func (s *settings) issues(url string) bool {
	return url == s.JWT.Issuer || slices.ContainsFunc(s.JWT.Profiles, func(p issue.ProfileConfig) bool { return p.Issuer == url })
}

// issuerMaxAge is for how long a relying party may keep the documents of an issuer:
// whoever has them for no longer has a key before it signs.
func (s *settings) issuerMaxAge() time.Duration {
	return (authority.Spread(time.Duration(s.JWT.AuthorityLifetime)) / 2).Truncate(time.Second)
}

// sharesTokenExchange reports whether the issuer is served where tokens are
// exchanged.
func (s *settings) sharesTokenExchange() bool {
	return s.OIDCIssuer != nil && s.TokenExchange != nil && s.OIDCIssuer.Listen == s.TokenExchange.Listen
}

// listenOIDCIssuer begins to listen for relying parties. It returns nil if they
// are not served, or not on a listener of their own.
func (s *settings) listenOIDCIssuer(log *slog.Logger) (*web.Options, error) {
	c := s.OIDCIssuer
	if c == nil || s.sharesTokenExchange() {
		return nil, nil
	}
	o := &web.Options{Log: log} // no request has a body
	if c.HTTPSWeb != nil {
		var err error
		if o.Certificate, err = s.webCertificate("oidc_issuer", c.HTTPSWeb, log); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("oidc_issuer.listen: %w; choose another address", err)
	}
	o.Listener = l
	return o, nil
}

// oidcIssuer makes what relying parties are served, and, where it has nothing,
// what another handler serves; that may be nil.
func (s *settings) oidcIssuer(reg *registry.Registry, next http.Handler, log *slog.Logger) (*oidc.Issuer, error) {
	return oidc.New(oidc.Options{
		URLs: s.OIDCIssuer.URLs, AllowLoopback: s.OIDCIssuer.PlainHTTP,
		Bundle: func() *bundle.Bundle { return reg.View().Bundle(s.td) },
		MaxAge: s.issuerMaxAge(), Next: next, Log: log,
	})
}

// serveOIDCIssuer serves relying parties until the context ends.
func (s *settings) serveOIDCIssuer(ctx context.Context, o web.Options, reg *registry.Registry) error {
	served, err := s.oidcIssuer(reg, nil, o.Log)
	if err != nil {
		return err
	}
	o.Handler = served
	o.Log.Info("keys are published for relying parties", "listen", o.Listener.Addr().String(), "urls", s.OIDCIssuer.URLs, "tls", o.Certificate.Get != nil)
	if err := web.Serve(ctx, o); ctx.Err() == nil {
		return fmt.Errorf("publish keys for relying parties: %w", err)
	}
	return ctx.Err()
}
