// Package broker serves the SPIFFE Broker API on the SPIFFE Broker Endpoint: a
// broker, which is a workload of this node that the configuration trusts,
// fetches the SVIDs and bundles of other workloads by reference to them. Make a
// [Server] with [New]; a [Policy] says what one broker may ask for.
//
// Both standards are incubating; docs/broker.md names their revision, and how
// what they leave open was decided.
//
// A broker proves who it is twice: by its X509-SVID, in mutual TLS over a Unix
// socket, and by being a process that an entry of this node gives that very
// identity to. A stolen key is worth nothing to another process, and a broker
// whose entry is deleted loses its streams at once.
package broker

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/metrics"
	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

// SocketMode is the mode of the socket: the agent's own user, and the socket's
// group (Broker Endpoint §2: designated clients only). The socket gets its
// group from a directory with the setgid bit.
const SocketMode = 0o660

// Header is the metadata that every call carries (Broker Endpoint §3). That of
// the Workload API is no substitute.
const Header = "broker.spiffe.io"

// maxStreams is how many calls one connection may have at once: a broker
// follows each workload of its node on a stream.
const maxStreams = 8192

// Options of [New]. All but Limits, Now, Log, Metrics and Traces are required.
type Options struct {
	Listener    net.Listener // of a Unix socket; [peercred.Listen] with SocketMode
	TrustDomain spiffeid.TrustDomain
	Identity    x509svid.Source // of the agent itself; asked at each handshake
	Held        *held.Held
	Attestor    *workload.Attestor
	Policies    []Policy // of the brokers that there may be
	Limits      endpoint.Limits
	Now         func() time.Time  // nil is time.Now
	Log         *slog.Logger      // nil is silent
	Metrics     *metrics.Metrics  // nil: none
	Traces      *telemetry.Traces // nil: none
}

// Server serves the Broker API.
type Server struct {
	broker.UnsafeAPIServer // every call is here: one that is missing does not compile
	*endpoint.Endpoint

	o        Options
	policies map[spiffeid.ID]Policy
}

// New makes a server. [Server.Run] closes the listener.
func New(o Options) *Server {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	s := &Server{o: o, policies: make(map[spiffeid.ID]Policy, len(o.Policies))}
	for _, p := range o.Policies {
		s.policies[p.Broker] = p
	}
	s.Endpoint = endpoint.New(endpoint.Options{
		Listener: o.Listener, Held: o.Held, Attestor: o.Attestor, Limits: o.Limits, MaxStreams: maxStreams, Header: Header,
		Secure:    func(c credentials.TransportCredentials) credentials.TransportCredentials { return newTransport(c, o) },
		Authorize: s.authorize,
		Calls:     o.Metrics.BrokerCalls, Streams: o.Metrics.BrokerStreams, Now: o.Now, Log: o.Log,
		Traces: o.Traces,
	})
	return s
}

// Run serves until ctx ends, and returns its error. It is called once.
func (s *Server) Run(ctx context.Context) error {
	return s.Endpoint.Run(ctx, func(g *grpc.Server) { broker.RegisterAPIServer(g, s) })
}

// client is a broker that makes a call.
type client struct {
	*endpoint.Trusted
	policy Policy
}

// clientKey is the context key of a call's client.
type clientKey struct{}

var errNotListed = errors.New("no broker has this SPIFFE ID")

// authorize admits brokers alone, to every service on the socket: whoever is in
// no policy gets nothing (Broker API §4.1).
func (s *Server) authorize(ctx context.Context, _ string) (context.Context, error) {
	c, err := s.Caller(ctx)
	if err != nil {
		return nil, err
	}
	p, _ := peer.FromContext(ctx)
	id := p.AuthInfo.(*identified).id
	policy, ok := s.policies[id]
	if !ok {
		return nil, s.Deny(c, errNotListed, "spiffe_id", id)
	}
	t, err := s.Trust(ctx, func(own spiffeid.ID) bool { return own == id })
	if err != nil {
		return nil, err
	}
	return context.WithValue(ctx, clientKey{}, client{t, policy}), nil
}
