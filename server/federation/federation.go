// Package federation fetches the bundles of foreign trust domains from the
// endpoints where these publish them.
//
// [Client.Fetch] makes one request by a relationship of the registry, with the
// profile that it names: https_web verifies the endpoint by the Web PKI,
// https_spiffe by the bundle of the trust domain that the endpoint's SPIFFE ID
// is of. There is no fallback from one to the other. What an endpoint may cost
// is bounded in time, size and redirects.
package federation

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/registry"
)

// Bounds of one fetch.
const (
	maxTime      = 20 * time.Second
	maxDocument  = 1 << 20 // bytes; more than any bundle that can be stored
	maxHeaders   = 64 << 10
	maxRedirects = 5
)

// A refresh hint is taken within these bounds: a foreign trust domain must not
// make this server ask all the time, nor never again.
const (
	minRefreshHint = time.Minute
	maxRefreshHint = 24 * time.Hour
)

// Client fetches bundles. The zero value is ready; it is safe for concurrent
// use.
type Client struct {
	// Roots verify endpoints of the profile https_web; nil: the system's.
	Roots *x509.CertPool
	// RefuseRedirects has a fetch fail whose endpoint leads elsewhere. SPIFFE
	// Federation §7.5.1.
	RefuseRedirects bool
	// Timeout bounds a fetch; 0: 20 seconds.
	Timeout time.Duration
}

// ErrNoRoots means that an endpoint cannot be verified, as the server has no
// bundle of the trust domain that the endpoint's SPIFFE ID is of.
var ErrNoRoots = errors.New("no bundle to verify the endpoint by")

// Fetch fetches the bundle of a relationship's trust domain. Bundles verifies
// an endpoint of the profile https_spiffe.
func (c *Client) Fetch(ctx context.Context, f *registry.Federation, bundles x509bundle.Source) (*spiffebundle.Bundle, error) {
	slow := fmt.Errorf("the endpoint took longer than %v", cmp.Or(c.Timeout, maxTime))
	ctx, cancel := context.WithTimeoutCause(ctx, cmp.Or(c.Timeout, maxTime), slow)
	defer cancel()
	config := &tls.Config{RootCAs: c.Roots}
	if !f.EndpointID.IsZero() {
		td := f.EndpointID.TrustDomain()
		if _, err := bundles.GetX509BundleForTrustDomain(td); err != nil {
			return nil, fmt.Errorf("%w: the server has no bundle of trust domain %q; set it first", ErrNoRoots, td.Name())
		}
		// It applies to each connection, so a redirect must lead to the same
		// SPIFFE ID. SPIFFE Federation §5.2.2.4.
		config = tlsconfig.TLSClientConfig(bundles, tlsconfig.AuthorizeID(f.EndpointID))
	}
	config.MinVersion = tls.VersionTLS12
	transport := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		TLSClientConfig:        config,
		DisableKeepAlives:      true, // one request
		ForceAttemptHTTP2:      true,
		MaxResponseHeaderBytes: maxHeaders,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: c.checkRedirect}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.EndpointURL, http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("fetch the bundle of %q: %w", f.TrustDomain.Name(), err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, failed(ctx, f, slow, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("fetch the bundle of %q: the endpoint at %s answered %q", f.TrustDomain.Name(), f.EndpointURL, resp.Status)
	}
	document, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	switch {
	case err != nil:
		return nil, failed(ctx, f, slow, err)
	case len(document) > maxDocument:
		return nil, fmt.Errorf("fetch the bundle of %q: the document is longer than %d bytes", f.TrustDomain.Name(), maxDocument)
	}
	b, err := spiffebundle.Read(f.TrustDomain, bytes.NewReader(bundle.Usable(document)))
	if err != nil {
		return nil, fmt.Errorf("the bundle of %q at %s: %w", f.TrustDomain.Name(), f.EndpointURL, err)
	}
	for _, cert := range b.X509Authorities() {
		if id, err := x509svid.IDFromCert(cert); err == nil && id.TrustDomain() != f.TrustDomain {
			return nil, fmt.Errorf("the bundle of %q at %s is that of %q, or mixed up with it: an authority in it has that trust domain's SPIFFE ID", f.TrustDomain.Name(), f.EndpointURL, id.TrustDomain().Name())
		}
	}
	if err := clampRefreshHint(b, document); err != nil {
		return nil, fmt.Errorf("the bundle of %q at %s: %w", f.TrustDomain.Name(), f.EndpointURL, err)
	}
	return b, nil
}

// failed says why a fetch has failed: that it was slow, if it was.
func failed(ctx context.Context, f *registry.Federation, slow, err error) error {
	if context.Cause(ctx) == slow {
		err = slow
	}
	return fmt.Errorf("fetch the bundle of %q from %s: %w", f.TrustDomain.Name(), f.EndpointURL, err)
}

// clampRefreshHint reads the hint from the document once more: as a duration a
// large one has wrapped around.
func clampRefreshHint(b *spiffebundle.Bundle, document []byte) error {
	var hint struct {
		Seconds *int64 `json:"spiffe_refresh_hint"`
	}
	if err := json.Unmarshal(document, &hint); err != nil {
		return fmt.Errorf("refresh hint: %w", err)
	}
	if hint.Seconds != nil {
		seconds := min(max(*hint.Seconds, int64(minRefreshHint/time.Second)), int64(maxRefreshHint/time.Second))
		b.SetRefreshHint(time.Duration(seconds) * time.Second)
	}
	return nil
}

// checkRedirect lets a request be redirected to what could be configured as an
// endpoint too (SPIFFE Federation §5.2.1.3), on the same host: whom this server
// asks is for its operator to say.
func (c *Client) checkRedirect(req *http.Request, via []*http.Request) error {
	switch host := via[0].URL.Hostname(); {
	case c.RefuseRedirects:
		return errors.New("redirected, and federation.refuse_redirects is set")
	case len(via) > maxRedirects:
		return fmt.Errorf("redirected more than %d times", maxRedirects)
	case !strings.EqualFold(req.URL.Hostname(), host):
		return fmt.Errorf("redirected from %s to another host, %s; if that is where the bundle is now, set its URL with \"hallmark federation update\"", host, req.URL.Hostname())
	}
	if err := registry.ValidateEndpointURL(req.URL.String()); err != nil {
		return fmt.Errorf("redirected to what is no endpoint: %w", err)
	}
	return nil
}
