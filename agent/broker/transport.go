package broker

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/peercred"
)

// How many refused handshakes are logged, a second: whoever is refused can try
// as often as it likes.
const (
	refusedLogged      = rate.Limit(1)
	refusedLoggedBurst = 10
)

// identified is a pinned process that has proved to hold an X509-SVID.
type identified struct {
	*peercred.Peer
	id spiffeid.ID
}

// transport is mutual TLS over connections whose peers are pinned. The agent's
// certificate is asked for at each handshake: when it is renewed, connections
// that are there stay.
type transport struct {
	credentials.TransportCredentials // that pin the peer
	tls                              credentials.TransportCredentials
	now                              func() time.Time
	log                              *slog.Logger
	refused                          *rate.Limiter
}

func newTransport(pin credentials.TransportCredentials, o Options) *transport {
	config := tlsconfig.MTLSServerConfig(o.Identity, bundles{o.Held}, tlsconfig.AuthorizeMemberOf(o.TrustDomain))
	config.MinVersion = tls.VersionTLS13
	// A resumed session would not be verified again.
	config.SessionTicketsDisabled = true
	return &transport{
		TransportCredentials: pin,
		tls:                  credentials.NewTLS(config),
		now:                  o.Now,
		log:                  o.Log,
		refused:              rate.NewLimiter(refusedLogged, refusedLoggedBurst),
	}
}

// ServerHandshake pins the process at the other end and verifies its X509-SVID.
func (t *transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	pinned, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	process := info.(*peercred.Peer)
	c, identity, err := t.secure(pinned, process)
	if err != nil {
		pinned.Close()
		if t.refused.Allow() {
			t.log.Warn("broker refused", "pid", process.PID, "uid", process.UID, "reason", err)
		}
		return nil, nil, err
	}
	return c, identity, nil
}

func (t *transport) secure(pinned net.Conn, process *peercred.Peer) (net.Conn, *identified, error) {
	secured, info, err := t.tls.ServerHandshake(pinned)
	if err != nil {
		return nil, nil, err
	}
	leaf := info.(credentials.TLSInfo).State.PeerCertificates[0] // verified
	id, err := x509svid.IDFromCert(leaf)
	if err != nil {
		return nil, nil, err
	}
	// A connection lives no longer than the certificate that opened it; the
	// broker comes back with its next one.
	end := time.AfterFunc(leaf.NotAfter.Sub(t.now()), func() { pinned.Close() })
	return &limited{secured, end}, &identified{process, id}, nil
}

// Clone returns the same credentials: they do not change.
func (t *transport) Clone() credentials.TransportCredentials { return t }

// limited is a connection with an end.
type limited struct {
	net.Conn
	end *time.Timer
}

// Close closes the connection.
func (l *limited) Close() error {
	l.end.Stop()
	return l.Conn.Close()
}

// bundles gives TLS the bundles that the agent holds.
type bundles struct{ held *held.Held }

// GetX509BundleForTrustDomain implements [x509bundle.Source].
func (b bundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	known := b.held.Bundle(td)
	if known == nil {
		return nil, fmt.Errorf("the bundle of %s is not known", td)
	}
	x := x509bundle.New(td)
	for _, a := range known.X509Authorities {
		x.AddX509Authority(a.Certificate)
	}
	return x, nil
}
