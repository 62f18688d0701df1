package revocation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	maxMessage = 8 << 20 // bytes of a message of the Workload API
	minRetry   = 200 * time.Millisecond
	maxRetry   = 10 * time.Second
)

// Options of [NewSource].
type Options struct {
	Address string       // of the Workload API; empty: SPIFFE_ENDPOINT_SOCKET
	Log     *slog.Logger // nil: none
}

// Source holds the CRLs and bundles that the Workload API sends. Close it.
type Source struct {
	lists *Lists
	log   *slog.Logger
	conn  *grpc.ClientConn

	cancel  context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex
	bundles *x509bundle.Set
	updated chan struct{} // closed and replaced at each update
	open    map[*watched]bool
}

// watched is a connection that is closed once its peer is revoked.
type watched struct {
	net.Conn                                     // below TLS
	peer     atomic.Pointer[tls.ConnectionState] // nil: it has not shown a certificate yet
	forget   func()
}

// Close closes the connection.
func (w *watched) Close() error {
	w.forget()
	return w.Conn.Close()
}

// NewSource follows the Workload API until it is closed. It returns once it has
// the first message, or fails when the context ends.
func NewSource(ctx context.Context, o Options) (*Source, error) {
	if o.Address == "" {
		var ok bool
		if o.Address, ok = workloadapi.GetDefaultAddress(); !ok {
			return nil, fmt.Errorf("follow CRLs: no Workload API is named; set %s", workloadapi.SocketEnv)
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	target, err := workloadapi.TargetFromAddress(o.Address)
	if err != nil {
		return nil, fmt.Errorf("follow CRLs: %w", err)
	}
	conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("follow CRLs: %w", err)
	}
	s := &Source{lists: New(nil), log: o.Log, conn: conn, updated: make(chan struct{}), open: make(map[*watched]bool)}
	var running context.Context
	running, s.cancel = context.WithCancel(context.Background())
	first := s.Updated()
	failed := make(chan error, 1)
	s.running.Go(func() { s.run(running, failed) })
	select {
	case <-first:
		return s, nil
	case err = <-failed:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return nil, errors.Join(fmt.Errorf("follow CRLs: %w", err), s.Close())
}

// Close ends the source. What it holds stays as it is.
func (s *Source) Close() error {
	s.cancel()
	s.running.Wait()
	return s.conn.Close()
}

// Updated returns a channel that is closed at the next update.
func (s *Source) Updated() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.updated
}

// run follows the stream, again and again. An error that another try does not
// mend goes to failed.
func (s *Source) run(ctx context.Context, failed chan<- error) {
	retry := minRetry
	for {
		got, err := s.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		if status.Code(err) == codes.InvalidArgument || status.Code(err) == codes.Unimplemented {
			select {
			case failed <- err:
			default:
			}
		}
		if got {
			retry = minRetry
		}
		s.log.Warn("the stream of CRLs ended; trying again", "error", err, "in", retry)
		timer := time.NewTimer(retry)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		retry = min(2*retry, maxRetry)
	}
}

// follow follows one stream to its end.
func (s *Source) follow(ctx context.Context) (got bool, err error) {
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true") // Workload Endpoint §3.2
	stream, err := workload.NewSpiffeWorkloadAPIClient(s.conn).FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err != nil {
		return false, err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return got, err
		}
		got = true
		s.take(m)
	}
}

// take takes in a message and closes the connections that it is about.
func (s *Source) take(m *workload.X509BundlesResponse) {
	bundles := x509bundle.NewSet()
	for name, der := range m.Bundles {
		td, err := spiffeid.TrustDomainFromString(name)
		if err == nil {
			var b *x509bundle.Bundle
			if b, err = x509bundle.ParseRaw(td, der); err == nil {
				bundles.Add(b)
			}
		}
		if err != nil {
			s.log.Warn("a bundle of the Workload API cannot be read", "trust_domain", name, "error", err)
		}
	}
	if err := s.lists.Update(m.Crl); err != nil {
		s.log.Error("CRLs of the Workload API cannot be taken; peers of their authorities are refused", "error", err)
	}
	s.mu.Lock()
	s.bundles = bundles
	close(s.updated)
	s.updated = make(chan struct{})
	open := slices.Collect(maps.Keys(s.open))
	s.mu.Unlock()
	for _, w := range open {
		state := w.peer.Load()
		if state == nil {
			continue // its handshake is under way, and verified by what is here now
		}
		if err := s.Verify(*state); err != nil {
			s.log.Info("a connection is closed", "peer", w.RemoteAddr().String(), "error", err)
			_ = w.Close() // at once: whoever is at the other end need not say goodbye
		}
	}
}

// Verify checks the certificates of a connection's peer: its X509-SVID and those
// between that and a root. It is for [tls.Config.VerifyConnection], which is also
// called where a session is resumed, and does not verify the chain itself.
func (s *Source) Verify(state tls.ConnectionState) error {
	certs := state.PeerCertificates
	if len(certs) == 0 {
		return nil // who demands a certificate is not asked here
	}
	issuers := append([]*x509.Certificate(nil), certs[1:]...)
	s.mu.Lock()
	bundles := s.bundles
	s.mu.Unlock()
	if len(certs[0].URIs) == 1 && bundles != nil {
		if td, err := spiffeid.TrustDomainFromURI(certs[0].URIs[0]); err == nil {
			if b, ok := bundles.Get(td); ok {
				issuers = append(issuers, b.X509Authorities()...)
			}
		}
	}
	for i, c := range certs {
		if i > 0 && isRoot(c) {
			continue
		}
		if err := s.lists.Check(c, issuers); err != nil {
			return err
		}
	}
	return nil
}

// isRoot reports whether a certificate names itself as its issuer: whether it is
// trusted is the bundle's to say.
func isRoot(c *x509.Certificate) bool { return string(c.RawIssuer) == string(c.RawSubject) }

// Guard has a configuration refuse revoked peers on every handshake, besides
// what it verifies already. It returns the configuration.
func (s *Source) Guard(config *tls.Config) *tls.Config {
	before := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		if before != nil {
			if err := before(state); err != nil {
				return err
			}
		}
		return s.Verify(state)
	}
	if choose := config.GetConfigForClient; choose != nil {
		config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			chosen, err := choose(hello)
			if chosen != nil {
				chosen = s.Guard(chosen.Clone())
			}
			return chosen, err
		}
	}
	return config
}

// Listen listens as [tls.Listen] does, refuses revoked peers, and closes
// connections whose peer is revoked while they are open.
func (s *Source) Listen(network, address string, config *tls.Config) (net.Listener, error) {
	l, err := net.Listen(network, address)
	if err != nil {
		return nil, err
	}
	return &listener{l, s, config}, nil
}

type listener struct {
	net.Listener
	source *Source
	config *tls.Config
}

// Accept returns the next connection, before its handshake.
func (l *listener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	w := l.source.watch(raw)
	config := l.source.Guard(l.config.Clone())
	guard := config.VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) error {
		w.peer.Store(&state) // before it is verified: an update that comes now sees it
		return guard(state)
	}
	return tls.Server(w, config), nil
}

func (s *Source) watch(c net.Conn) *watched {
	w := &watched{Conn: c}
	w.forget = func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.open, w)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[w] = true
	return w
}

// Watch closes a connection whose handshake is over, a client's for example, if
// its peer is or gets revoked, until stop is called.
func (s *Source) Watch(c *tls.Conn) (stop func()) {
	w := s.watch(c.NetConn())
	state := c.ConnectionState()
	w.peer.Store(&state)
	if s.Verify(state) != nil {
		_ = w.Close()
	}
	return w.forget
}
