package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"

	"github.com/hallmark-id/hallmark/pkg/entry"
)

// peer is a server that is dialed as an agent does it.
type peer struct {
	address     string // host:port
	trustDomain spiffeid.TrustDomain
	authorities []*x509.Certificate // none: whether it is the right one cannot be told
	trustedBy   string              // whose authorities they are
	remedy      string              // if they do not vouch for the server
}

// How far clocks may be apart: an SVID is valid a little before it was issued,
// and not valid yet for whoever is further behind.
const (
	clockWarning = 5 * time.Second
	clockFailure = 10 * time.Second // as the server backdates what it signs
)

// dial dials a server: TCP, TLS, whether the certificate is the right one, and
// how far its clock is from ours.
func (d *examination) dial(ctx context.Context, p *part, s peer) {
	chain, err := handshake(ctx, s.address)
	var op *net.OpError
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		p.fail("connection", "Correct the name, in the agent's configuration (server) or in DNS.", "%s: %v", s.address, err)
		return
	case errors.As(err, &op) && op.Op == "dial", errors.Is(err, context.DeadlineExceeded):
		p.fail("connection", "Start the server there, open the port in firewalls between, or correct the address.", "no server at %s: %v", s.address, err)
		return
	case err != nil:
		p.fail("connection", "Something else than a Hallmark server may listen there, or a proxy in between ends TLS; agents need TLS 1.3 to the server itself.",
			"%s does not speak TLS as a server does: %v", s.address, err)
		return
	}
	p.ok("connection", "%s answers with TLS 1.3", s.address)
	if len(s.authorities) == 0 {
		p.skip("server certificate", "there is no bundle yet to verify %s by", s.address)
		return
	}
	now := d.Now()
	if !d.certificate(p, s, chain, now) {
		return
	}
	d.clock(ctx, p, s, chain)
}

// handshake makes a TLS connection and returns the certificates that the server
// presents, without a judgement.
func handshake(ctx context.Context, address string) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := (&tls.Dialer{Config: tlsConfig()}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	state := conn.(*tls.Conn).ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		return nil, errors.New("it does not speak HTTP/2")
	}
	return state.PeerCertificates, nil
}

// tlsConfig verifies nothing: a SPIFFE server is known by its ID and its bundle,
// which the caller looks at.
func tlsConfig() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, InsecureSkipVerify: true}
}

func (s peer) verify(chain []*x509.Certificate, at time.Time) (spiffeid.ID, error) {
	id, _, err := x509svid.Verify(chain, x509bundle.FromX509Authorities(s.trustDomain, s.authorities), x509svid.WithTime(at))
	return id, err
}

// certificate looks at what the server presents. It reports whether the server
// is the right one.
func (d *examination) certificate(p *part, s peer, chain []*x509.Certificate, now time.Time) bool {
	const check = "server certificate"
	leaf := chain[0]
	id, err := s.verify(chain, now)
	if err != nil && (now.Before(leaf.NotBefore) || now.After(leaf.NotAfter)) {
		// Whether it is the right server otherwise shows in the middle of the
		// certificate's life.
		if id, err = s.verify(chain, leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore)/2)); err == nil {
			apart := leaf.NotBefore.Sub(now)
			if now.After(leaf.NotAfter) {
				apart = now.Sub(leaf.NotAfter)
			}
			p.fail("clock", "Have the clocks of both machines set by NTP or chrony; if they are right, start the server again.",
				"the server's certificate is valid from %s to %s, and this machine's clock is %s off that",
				leaf.NotBefore.UTC().Format(time.RFC3339), leaf.NotAfter.UTC().Format(time.RFC3339), span(apart))
			return false
		}
	}
	switch {
	case id.TrustDomain() != s.trustDomain && !id.IsZero():
		p.fail(check, "Correct the address, or the trust domain.", "at %s is %s, no server of %s", s.address, id, s.trustDomain.Name())
	case err != nil:
		p.fail(check, s.remedy, "%s does not vouch for the server at %s: %v", s.trustedBy, s.address, err)
	case id.Path() != entry.ServerPath:
		p.fail(check, "Correct the address.", "at %s is %s, which is no server", s.address, id)
	default:
		p.ok(check, "it is %s; its certificate %s", id, d.until(leaf.NotAfter))
		return true
	}
	return false
}

// clock asks the server for the time, which it says to the second with every
// answer, and compares it to ours. What it says is only believed of a server
// that has verified.
func (d *examination) clock(ctx context.Context, p *part, s peer, chain []*x509.Certificate) {
	const check = "clock"
	config := tlsConfig()
	config.VerifyConnection = func(state tls.ConnectionState) error {
		id, err := s.verify(state.PeerCertificates, d.Now())
		if err == nil && id.Path() != entry.ServerPath {
			err = errors.New("another server answers")
		}
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+s.address, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithNoProxy())
	if err != nil {
		p.skip(check, "%v", err)
		return
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var sent, received time.Time
	var header metadata.MD
	for range 2 { // the first call makes the connection, the second is quick
		header, sent = nil, d.Now()
		_, err = bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{}, grpc.Header(&header))
		if received = d.Now(); err != nil {
			p.skip(check, "the server does not say its time: %v", err)
			return
		}
	}
	dates := header.Get("date")
	if len(dates) != 1 {
		p.skip(check, "the server at %s does not say its time", s.address)
		return
	}
	date, err := http.ParseTime(dates[0])
	if err != nil {
		p.skip(check, "the server says no time: %v", err)
		return
	}
	low, high := offset(sent, received, date)
	least := max(low, -high, 0) // that the clocks are apart
	who := "ahead of"
	if low > 0 {
		who = "behind"
	}
	switch remedy := "Have the clocks of both machines set by NTP or chrony."; {
	case least > clockFailure:
		p.fail(check, remedy, "this machine's clock is %s %s the server's: new SVIDs are not valid yet here, or end too soon", span(least), who)
	case least > clockWarning:
		p.warn(check, remedy, "this machine's clock is %s %s the server's", span(least), who)
	default:
		p.ok(check, "at most %s apart from the server's", span(max(-low, high)))
	}
}

// offset returns bounds of how far a server's clock is ahead of ours, when it
// said a date, to the second, between sending a request and receiving the
// answer.
func offset(sent, received, date time.Time) (low, high time.Duration) {
	return date.Sub(received), date.Add(time.Second).Sub(sent)
}
