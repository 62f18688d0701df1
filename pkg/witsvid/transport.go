package witsvid

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"time"

	spiffewit "github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Transport is an [http.RoundTripper] that proves an identity with each
// request. It sends nothing that is not https, nor to servers that the TLS
// configuration does not authenticate, and follows no redirect to another
// origin: a server must not choose to whom its clients prove themselves.
type Transport struct {
	// ID is the identity to prove.
	ID spiffeid.ID
	// SVIDs has the identity's current WIT-SVID with its key, as the
	// workloadapi.WITSource of go-spiffe does.
	SVIDs spiffewit.Source
	// Base sends the requests; nil: [http.DefaultTransport].
	Base http.RoundTripper
	// Tokens names the header fields with further tokens about the request,
	// which the proof is to bind: the claim oth of the draft. The server must
	// know the same. Access tokens in Authorization and Txn-Token are bound
	// always.
	Tokens []string
}

// RoundTrip proves the identity and sends the request.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	base := t.Base
	if base == nil {
		base = http.DefaultTransport
	}
	proved, err := t.prove(r, base)
	if err != nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, fmt.Errorf("witsvid: %w", err)
	}
	return base.RoundTrip(proved)
}

func (t *Transport) prove(r *http.Request, base http.RoundTripper) (*http.Request, error) {
	if t.SVIDs == nil {
		return nil, errors.New("the transport has no source of SVIDs")
	}
	if plain, ok := base.(*http.Transport); ok && blind(plain.TLSClientConfig) {
		return nil, errors.New("the transport's TLS configuration verifies no server: a WIT-SVID is not shown to just anybody")
	}
	if r.Response != nil && r.Response.Request != nil && originOf(r.Response.Request.URL) != originOf(r.URL) {
		return nil, fmt.Errorf("redirected from %q to %q: call the other origin yourself if that is right", r.Response.Request.URL.Host, r.URL.Host)
	}
	svid, err := t.SVIDs.GetWITSVIDForID(t.ID)
	if err != nil {
		return nil, fmt.Errorf("get the WIT-SVID: %w", err)
	}
	if svid.ID != t.ID {
		return nil, fmt.Errorf("asked for the WIT-SVID of %s, the source gave that of %s", t.ID, svid.ID)
	}
	r = r.Clone(r.Context()) // a RoundTripper leaves the request as it is
	if r.Header == nil {
		r.Header = http.Header{}
	}
	return r, Prove(r, svid, t.Tokens, time.Now())
}

// blind reports whether a TLS client takes any server for the right one.
func blind(c *tls.Config) bool {
	return c != nil && c.InsecureSkipVerify && c.VerifyPeerCertificate == nil && c.VerifyConnection == nil
}
