package node

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/version"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const (
	// dialTimeout bounds TCP, TLS and the first frames of HTTP/2 together.
	dialTimeout = 15 * time.Second
	// A connection on which nothing has come for aliveAfter is asked whether it is
	// still there, and ends without an answer within aliveWait.
	aliveAfter = 15 * time.Second
	aliveWait  = 5 * time.Second
	// Where there is another server, a call that has no answer after doubtAfter
	// has its server asked something small. If that has no answer within doubtWait
	// either, the server hangs, and the call goes to another.
	doubtAfter = 2 * time.Second
	doubtWait  = 2 * time.Second
	// maxMessage is the largest message taken from the server: a step of the
	// feed, or a whole batch of 500 SVIDs with RSA chains.
	maxMessage = 16 << 20
	// maxHeaders bounds the headers of one response.
	maxHeaders = 64 << 10
)

// untraced is the method whose call lasts for as long as the connection.
var untraced = map[string]bool{hallmarkv1.FeedService_Follow_FullMethodName: true}

// ErrUnavailable is wrapped by the errors of calls that found no connection to
// the server.
var ErrUnavailable = errors.New("no connection to the server")

// Link is one TLS connection to the server with the agent's SVID of that time,
// never another: when it breaks, or when the SVID was renewed, there is a new
// Link. It is handed out by [Node.Link] and given back with [Link.Release].
type Link struct {
	node *Node
	svid *svid // nil on the connection for attestation
	conn *grpc.ClientConn
	wire *wire
	to   target

	others bool                // there was more than this server to try
	server []*x509.Certificate // the chain that it presented when the link began
	began  time.Time

	stop  context.CancelFunc // ends watch
	done  chan struct{}      // closed when broken or superseded
	cause error              // set before done is closed
	ended time.Time          // set before done is closed

	mu       sync.Mutex
	users    int
	finished bool // done is closed
}

// ID returns the agent's SPIFFE ID on this link.
func (l *Link) ID() spiffeid.ID { return l.svid.id }

// Conn returns what gRPC clients are made of. It is valid until Release.
func (l *Link) Conn() grpc.ClientConnInterface { return l.conn }

// Done returns a channel that is closed when the link has broken or another
// one replaces it. Calls in flight on a replaced link may finish; a stream
// should be opened again on the next one.
func (l *Link) Done() <-chan struct{} { return l.done }

// Release gives the link back.
func (l *Link) Release() {
	l.mu.Lock()
	l.users--
	last := l.finished && l.users == 0
	l.mu.Unlock()
	if last {
		l.conn.Close()
	}
}

// Break ends the link because of err, which its user noticed: the node makes a
// new one.
func (l *Link) Break(err error) { l.finish(err) }

// Elsewhere ends the link because of err, if there is another server to go to
// than this one, which cannot serve its user now.
func (l *Link) Elsewhere(err error) {
	if l.node.several(l) {
		l.finish(err)
	}
}

var errHangs = errors.New("server does not answer, though it is connected")

// do makes a call, which ends when the link does because its server hangs.
func (l *Link) do(ctx context.Context, call func(context.Context, grpc.ClientConnInterface) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	doubt := time.AfterFunc(doubtAfter, func() {
		if !l.node.several(l) {
			return
		}
		asking, done := context.WithTimeout(ctx, doubtWait)
		defer done()
		_, err := bundlev1.NewBundleClient(l.conn).GetBundle(asking, &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{}})
		if status.Code(err) == codes.DeadlineExceeded && ctx.Err() == nil {
			l.finish(errHangs)
			cancel()
		}
	})
	defer doubt.Stop()
	return call(ctx, l.conn)
}

// Report tells the node of the error of a call on this link. If it is the
// server's word that the agent itself is expired, unknown, superseded or
// banned, the node attests again or gives up; any other error is left to the
// caller.
func (l *Link) Report(err error) {
	if reason, ok := denialReason(err); ok {
		select {
		case l.node.denials <- denial{l, reason, err}:
		default:
		}
	}
}

// alive reports whether calls on the link make sense. A nil link is not alive.
func (l *Link) alive() bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.finished
}

// ends waits until the link is done, but not for long.
func (l *Link) ends(within time.Duration) {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-l.done:
	case <-timer.C:
	}
}

// endedOr returns when the link ended, or now if it has not.
func (l *Link) endedOr(now time.Time) time.Time {
	if l.alive() {
		return now
	}
	return l.ended
}

// acquire counts one more user. It fails if the link is done.
func (l *Link) acquire() bool {
	if l == nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.finished {
		return false
	}
	l.users++
	return true
}

// finish marks the link done; its connection closes with its last user.
func (l *Link) finish(cause error) {
	l.mu.Lock()
	if l.finished {
		l.mu.Unlock()
		return
	}
	l.finished = true
	l.cause, l.ended = cause, l.node.o.Now()
	unused := l.users == 0
	l.stop()
	close(l.done)
	l.mu.Unlock()
	if unused {
		l.conn.Close()
	}
}

// watch ends the link when its connection breaks or the server asks (GOAWAY)
// for another one. It returns when the link is done.
func (l *Link) watch(ctx context.Context) {
	defer l.node.watchers.Done()
	if l.conn.WaitForStateChange(ctx, connectivity.Ready) {
		l.finish(l.wire.failure("server closed it"))
	}
}

// errReplaced is why a link ends that is still good.
var errReplaced = errors.New("replaced by a newer connection")

// publish makes a link the one that is handed out, and ends the one before. A
// nil link leaves none.
func (n *Node) publish(l *Link) {
	n.mu.Lock()
	old := n.link
	if old != nil {
		n.downAt = old.endedOr(n.o.Now())
	}
	n.link = l
	if l != nil {
		n.lastErr = nil
	}
	close(n.changed)
	n.changed = make(chan struct{})
	n.mu.Unlock()
	if old != nil {
		old.finish(errReplaced)
	}
}

// Link waits for a working connection to the server. The caller releases it.
func (n *Node) Link(ctx context.Context) (*Link, error) {
	for {
		n.mu.Lock()
		l, changed := n.link, n.changed
		n.mu.Unlock()
		if l.acquire() {
			return l, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// linkSoon is Link for a call that someone waits for: right after the
// connection broke it waits for the next one, later it fails at once.
func (n *Node) linkSoon(ctx context.Context) (*Link, error) {
	n.mu.Lock()
	now, down := n.o.Now(), n.downAt
	if n.link != nil {
		down = n.link.endedOr(now)
	}
	n.mu.Unlock()
	grace := linkGrace - now.Sub(down)
	wait, cancel := context.WithTimeout(ctx, max(grace, 0))
	defer cancel()
	l, err := n.Link(wait)
	if err == nil || ctx.Err() != nil {
		return l, err
	}
	if last := n.Status().LastError; last != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, last)
	}
	return nil, ErrUnavailable
}

// connect makes a link with the node's SVID to a server that the bundle of the
// moment vouches for.
func (n *Node) connect(ctx context.Context, s *svid) (*Link, error) {
	return n.reach(ctx, func(ctx context.Context, to target) (*Link, error) {
		config := n.tlsConfig(to)
		config.VerifyConnection = func(state tls.ConnectionState) error {
			return n.verifyServer(state.PeerCertificates, n.trusted())
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return s.tls(), nil
		}
		return n.dial(ctx, to, config, s)
	})
}

// tlsConfig is what both kinds of connection have in common. It verifies
// nothing of the server; the caller must.
func (n *Node) tlsConfig(to target) *tls.Config {
	host, _, _ := net.SplitHostPort(to.name)
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		ServerName: host,
		Time:       n.o.Now,
		// A SPIFFE server is known by its ID and its trust domain's bundle,
		// not by a host name; VerifyConnection, or the caller, checks them.
		InsecureSkipVerify: true,
	}
}

// dial makes one TLS connection and a gRPC client that uses this connection and
// no other: what was verified of it holds for every call.
func (n *Node) dial(ctx context.Context, to target, config *tls.Config, s *svid) (*Link, error) {
	wait := dialTimeout
	if !to.last {
		wait = hopTimeout
	}
	dialing, cancel := context.WithTimeout(ctx, wait)
	raw, err := n.o.Dial(dialing, to.address)
	cancel()
	if err != nil {
		return nil, err
	}
	secured := tls.Client(raw, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	state := secured.ConnectionState()
	if state.NegotiatedProtocol != "h2" {
		raw.Close()
		return nil, errors.New("server does not speak HTTP/2; is this the address of a Hallmark server?")
	}
	w := &wire{Conn: secured}
	options := append(n.o.Traces.DialOptions(untraced),
		grpc.WithContextDialer(w.once),
		// TLS is done already, by the connection itself.
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority(to.name),
		grpc.WithUserAgent("hallmark-agent/"+version.String()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithMaxHeaderListSize(maxHeaders),
		grpc.WithIdleTimeout(0),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: aliveAfter, Timeout: aliveWait}),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),
	)
	conn, err := grpc.NewClient("passthrough:///"+to.address, options...)
	if err != nil {
		w.Close()
		return nil, err
	}
	// In TLS 1.3 the server may refuse the client's certificate after the
	// client's handshake is done; its first HTTP/2 frame says it did not.
	conn.Connect()
	for st := conn.GetState(); st != connectivity.Ready; st = conn.GetState() {
		if st == connectivity.TransientFailure || !conn.WaitForStateChange(ctx, st) {
			conn.Close()
			w.Close()
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return nil, w.failure("server closed the connection")
		}
	}
	l := &Link{node: n, svid: s, conn: conn, wire: w, to: to, server: state.PeerCertificates, began: n.o.Now(), done: make(chan struct{})}
	watching, stop := context.WithCancel(context.Background())
	l.stop = stop
	n.watchers.Add(1)
	go l.watch(watching)
	return l, nil
}

// wire is a connection that gRPC gets once, and that remembers why it failed.
type wire struct {
	net.Conn
	taken atomic.Bool
	err   atomic.Pointer[error]
}

func (w *wire) once(context.Context, string) (net.Conn, error) {
	if w.taken.Swap(true) {
		return nil, errors.New("connection is gone")
	}
	return w, nil
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if err != nil {
		w.err.CompareAndSwap(nil, &err)
	}
	return n, err
}

// failure returns why reading failed, or an error of the given text.
func (w *wire) failure(text string) error {
	if p := w.err.Load(); p != nil {
		return *p
	}
	return errors.New(text)
}

// denialReason finds in a call's error the server's word about the agent.
func denialReason(err error) (types.PermissionDeniedDetails_Reason, bool) {
	st, ok := status.FromError(err)
	if !ok || st.Code() != codes.PermissionDenied {
		return 0, false
	}
	for _, d := range st.Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok && d.Reason != types.PermissionDeniedDetails_UNKNOWN {
			return d.Reason, true
		}
	}
	return 0, false
}

// serverWords returns what the server said in a call's error, without what was
// added to it here.
func serverWords(err error) string {
	var said interface{ GRPCStatus() *status.Status }
	if errors.As(err, &said) {
		return said.GRPCStatus().Message()
	}
	return err.Error()
}
