package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/server/registry"
)

// Bounds of a connection.
const (
	// handshakeTimeout is how long a client has from connecting to the end of
	// the TLS handshake and HTTP/2's preface.
	handshakeTimeout = 10 * time.Second
	// maxMessage is the size of a request, in bytes: gRPC's own default, which
	// clients count on.
	maxMessage = 4 << 20
	// maxStreams is how many calls a connection may have under way.
	maxStreams = 100
	// maxHeaders is the size of a call's metadata, in bytes.
	maxHeaders = 16 << 10
	// maxAnonymousBytes is how much a connection without a valid X509-SVID may
	// send in its life: enough for an attestation with ten challenges of 64 KiB.
	// After that it is closed, and the client may connect again.
	maxAnonymousBytes = 1 << 20
	// maxAnonymousLife is how long such a connection may last, whatever it does.
	maxAnonymousLife = 5 * time.Minute
	// keepaliveTime and keepaliveTimeout find agents that vanished: a connection
	// that nothing came from for so long is pinged, and closed if no answer comes.
	keepaliveTime    = time.Minute
	keepaliveTimeout = 20 * time.Second
	// minPing is how often a client may ping; gRPC clients do not go below.
	minPing = 10 * time.Second
	// maxIdle closes connections without a call. Clients open them again.
	maxIdle = 10 * time.Minute
	// maxAdminConnections is how many operators' connections the admin socket
	// serves at once.
	maxAdminConnections = 256
)

// ListenTCP listens for agents and workloads. An error names the setting that
// is to blame.
func ListenTCP(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("listen: %s is in use by another process; stop it, or set listen to another address", address)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("listen: %s is not an address of this machine; set listen to one that is", address)
	case errors.Is(err, syscall.EACCES):
		return nil, fmt.Errorf("listen: this user may not listen on %s; set listen to a port above 1023", address)
	}
	return nil, fmt.Errorf("listen: %w", err)
}

// ListenAdmin listens for operators on this machine.
func ListenAdmin(path string) (net.Listener, error) {
	l, err := peercred.Listen(path, 0o600)
	if err != nil {
		return nil, fmt.Errorf("admin_socket: %w", err)
	}
	return l, nil
}

// serverOptions are those of both listeners.
func serverOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, MaxConnectionIdle: maxIdle}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	}
}

// tlsCredentials are TLS 1.3 with the server's own X509-SVID. A client may
// present an X509-SVID; what that is worth is found out here and, as bundles
// change and time passes, for each call. A bad one does not fail the handshake,
// so that a client can be told what is wrong with it.
type tlsCredentials struct {
	credentials.TransportCredentials
	api       *API
	anonymous atomic.Int64 // connections without a valid X509-SVID
}

func (a *API) tlsCredentials() credentials.TransportCredentials {
	turns := make(turns, turnsPerCPU*runtime.GOMAXPROCS(0))
	return &tlsCredentials{
		TransportCredentials: credentials.NewTLS(&tls.Config{
			MinVersion: tls.VersionTLS13,
			GetConfigForClient: func(hello *tls.ClientHelloInfo) (_ *tls.Config, err error) {
				c := hello.Conn.(*clientConn) // which our listener made
				c.endTurn, err = turns.begin(hello.Context())
				return nil, err
			},
			ClientAuth: tls.RequestClientCert,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				return a.issuer.ServerTLS()
			},
			// A ticket would stand for the certificate that was presented when it
			// was made. Agents keep their connections; they gain nothing from it.
			SessionTicketsDisabled: true,
			Time:                   a.now,
		}),
		api: a,
	}
}

// ServerHandshake finds out what the client is.
func (t *tlsCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	client := raw.(*clientConn) // which our listener made
	defer client.waits()
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	p := newTLSPeer(info.(credentials.TLSInfo), raw.RemoteAddr().String())
	now := t.api.now()
	if p.leaf == nil || now.After(p.leaf.NotAfter) || p.verify(t.api.registry.View(), now) != nil {
		if !client.restrict(&t.anonymous, t.api.limits.Load().maxAnonymous()) {
			return nil, nil, errors.New("there are too many connections without an X509-SVID")
		}
	}
	return conn, p, nil
}

// Clone returns the same credentials: they do not change.
func (t *tlsCredentials) Clone() credentials.TransportCredentials { return t }

// tlsPeer is the client of a TLS connection.
type tlsPeer struct {
	credentials.TLSInfo
	address   string              // host:port
	leaf      *x509.Certificate   // nil: it presented none
	chain     []*x509.Certificate // leaf first
	id        spiffeid.ID         // of the leaf; proven by verify only
	serial    string              // of the leaf, decimal
	issuer    string              // ID of the authority that the leaf names
	malformed error               // why the leaf is not an X509-SVID

	verified atomic.Pointer[verification]
}

// verification is what came of verifying a chain against a bundle. It holds
// as long as the bundle does: each call looks at the leaf's end, and no
// authority of ours signs beyond its own.
type verification struct {
	by  *bundle.Bundle
	err error
}

func newTLSPeer(info credentials.TLSInfo, address string) *tlsPeer {
	p := &tlsPeer{TLSInfo: info, address: address, chain: info.State.PeerCertificates}
	if len(p.chain) > 0 {
		p.leaf = p.chain[0]
		p.serial = p.leaf.SerialNumber.String()
		p.issuer = hex.EncodeToString(p.leaf.AuthorityKeyId)
		p.id, p.malformed = x509svid.IDFromCert(p.leaf)
	}
	return p
}

var (
	errNoOwnBundle = errors.New("the trust domain has no bundle yet")
	errRevoked     = errors.New("it was revoked")
)

// verify verifies the client's certificate by the rules of X509-SVID §5
// against the bundle of its trust domain, and its authority's CRL.
func (p *tlsPeer) verify(view *registry.View, now time.Time) error {
	by := view.Bundle(view.TrustDomain())
	if by == nil {
		return errNoOwnBundle
	}
	if err := p.verifyChain(by, now); err != nil {
		return err
	}
	if view.CRL(p.issuer).Has(p.leaf.SerialNumber.Bytes()) {
		return errRevoked
	}
	return nil
}

func (p *tlsPeer) verifyChain(by *bundle.Bundle, now time.Time) error {
	if v := p.verified.Load(); v != nil && v.by == by {
		return v.err
	}
	roots := x509bundle.New(by.TrustDomain)
	for _, a := range by.X509Authorities {
		roots.AddX509Authority(a.Certificate)
	}
	_, _, err := x509svid.Verify(p.chain, roots, x509svid.WithTime(now))
	p.verified.Store(&verification{by, err})
	return err
}

// boundedListener accepts so many connections at once and closes those beyond.
type boundedListener struct {
	net.Listener
	most    func() int64
	open    atomic.Int64
	refused func(net.Addr)
}

// Accept returns the next connection there is room for.
func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.open.Add(1) <= l.most() {
			return &clientConn{Conn: c, open: &l.open}, nil
		}
		l.open.Add(-1)
		l.refused(c.RemoteAddr())
		c.Close()
	}
}

// clientConn is a connection that was accepted, below TLS: whatever comes of
// it, this is what is closed in the end.
type clientConn struct {
	net.Conn
	open *atomic.Int64 // connections, of which this is one
	once sync.Once

	endTurn func() // of its handshake, which is being computed; nil: it is not

	// Set when the handshake has shown that the client has no valid X509-SVID.
	anonymous *atomic.Int64 // connections of that kind, of which this is one
	end       *time.Timer
	left      int64 // bytes that it may send
}

// restrict makes sure that an anonymous client cannot send much, nor stay long.
// It reports false if there are too many of them.
func (c *clientConn) restrict(anonymous *atomic.Int64, most int64) bool {
	if anonymous.Add(1) > most {
		anonymous.Add(-1)
		return false
	}
	c.anonymous, c.left = anonymous, maxAnonymousBytes
	c.end = time.AfterFunc(maxAnonymousLife, func() { c.Conn.Close() })
	return true
}

// waits ends the turn of the connection's handshake, if it has one: what comes
// next is the client's.
func (c *clientConn) waits() {
	if c.endTurn != nil {
		c.endTurn()
		c.endTurn = nil
	}
}

// Read reads from the connection until an anonymous client has sent too much.
func (c *clientConn) Read(b []byte) (int, error) {
	c.waits()
	if c.anonymous == nil {
		return c.Conn.Read(b)
	}
	if c.left <= 0 {
		return 0, errors.New("the client sent more than one without an X509-SVID may")
	}
	n, err := c.Conn.Read(b[:min(int64(len(b)), c.left)])
	c.left -= int64(n)
	return n, err
}

// Close closes the connection and makes room for another.
func (c *clientConn) Close() error {
	c.once.Do(func() {
		c.open.Add(-1)
		if c.anonymous != nil {
			c.end.Stop()
			c.anonymous.Add(-1)
		}
	})
	return c.Conn.Close()
}

// serve serves on both listeners until the context ends, then lets calls end
// for a while.
func serve(ctx context.Context, grace time.Duration, servers map[*grpc.Server]net.Listener) error {
	var running sync.WaitGroup
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	for s, l := range servers {
		running.Go(func() {
			if err := s.Serve(l); err != nil {
				cancel(fmt.Errorf("serve on %s: %w", l.Addr(), err))
			}
		})
	}
	<-ctx.Done()
	for s := range servers {
		running.Go(func() {
			hard := time.AfterFunc(grace, s.Stop)
			defer hard.Stop()
			s.GracefulStop()
		})
	}
	running.Wait()
	return context.Cause(ctx)
}
