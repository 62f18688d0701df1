// Package workloadapi serves the SPIFFE Workload API on a Unix socket: a
// workload asks without any credential of its own, is attested by what the
// kernel says of it, and gets its X509-SVIDs, JWT-SVIDs, WIT-SVIDs and bundles
// as they change. Make a [Server] with [New].
//
// A call runs peer → attest → selectors → what is held for them → response.
// The first two are package endpoint's, the last two package delivery's.
// Selectors are reused for a few seconds on the same connection; responses are
// encoded once for each change and set of selectors and shared by all who get
// them.
package workloadapi

import (
	"context"
	"iter"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"

	"github.com/hallmark-id/hallmark/agent/delivery"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/metrics"
	agentworkload "github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

// SocketMode is the mode of the socket: every local user may ask; who gets
// what is decided by attestation.
const SocketMode = 0o777

// Header is the metadata that every call carries (Workload Endpoint §3).
const Header = "workload.spiffe.io"

// maxStreams is how many calls one connection may have at once: a workload
// needs a few.
const maxStreams = 100

// Options of [New]. Listener, Held and Attestor are required.
type Options struct {
	Listener net.Listener // of a Unix socket; [peercred.Listen] with SocketMode
	Held     *held.Held
	Attestor *agentworkload.Attestor
	Limits   endpoint.Limits
	WIT      bool              // serve the WIT-SVID profile
	Now      func() time.Time  // nil is time.Now
	Log      *slog.Logger      // nil is silent
	Metrics  *metrics.Metrics  // nil: none
	Traces   *telemetry.Traces // nil: none
}

// Server serves the Workload API.
type Server struct {
	workload.UnsafeSpiffeWorkloadAPIServer // every call is here: one that is missing does not compile

	*endpoint.Endpoint
	held   *held.Held
	wit    bool
	now    func() time.Time
	traces *telemetry.Traces
}

// New makes a server. [Server.Run] closes the listener.
func New(o Options) *Server {
	s := &Server{held: o.Held, wit: o.WIT, now: o.Now, traces: o.Traces}
	if s.now == nil {
		s.now = time.Now
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	s.Endpoint = endpoint.New(endpoint.Options{
		Listener: o.Listener, Held: o.Held, Attestor: o.Attestor, Limits: o.Limits, MaxStreams: maxStreams, Header: Header,
		Calls: o.Metrics.Calls, Streams: o.Metrics.Streams, Now: o.Now, Log: o.Log,
		Traces: o.Traces,
	})
	return s
}

// Run serves until ctx ends, and returns its error. It is called once.
func (s *Server) Run(ctx context.Context) error {
	return s.Endpoint.Run(ctx, func(g *grpc.Server) { workload.RegisterSpiffeWorkloadAPIServer(g, s) })
}

// share is all that the caller's selectors entitle to.
func (s *Server) share(selectors selector.Set) delivery.Share {
	return delivery.Share{Held: s.held, Selectors: selectors}
}

// to is the caller's stream: it ends with the process, and when no entry is for
// that any more.
func (s *Server) to(stream grpc.ServerStream, c *endpoint.Caller, selectors selector.Set) delivery.Stream {
	return delivery.Stream{
		Send:  stream.SendMsg,
		Check: func() error { return s.Alive(c) },
		None:  func() error { return s.DenyUnmatched(c, selectors) },
	}
}

// first returns what ends a span, and logs which IDs a caller is given SVIDs
// of, when a stream's first message goes out.
func (s *Server) first(c *endpoint.Caller, span trace.Span, what string, ids func(*held.Update) iter.Seq[spiffeid.ID]) func(*held.Update) {
	sent := false
	return func(u *held.Update) {
		if !sent {
			sent = true
			span.End()
			s.Given(c, what, ids(u), nil)
		}
	}
}

// memoKey is a key of an update's memos.
type memoKey int

const (
	x509SVIDs memoKey = iota
	x509Bundles
	jwtBundles
	witBundles
)

// once encodes an update once for all streams that have it.
func once(key memoKey, encode func(*held.Update) endpoint.Encoded) func(*held.Update) endpoint.Encoded {
	return func(u *held.Update) endpoint.Encoded {
		return u.Memo(key, func() any { return encode(u) }).(endpoint.Encoded)
	}
}
