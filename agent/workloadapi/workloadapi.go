// Package workloadapi serves the SPIFFE Workload API on a Unix socket: a
// workload asks without any credential of its own, is attested by what the
// kernel says of it, and gets its X509-SVIDs, JWT-SVIDs and bundles as they
// change. Make a [Server] with [New].
//
// A call runs peer → attest → selectors → what is held for them → response.
// The peer is pinned when it connects ([peercred.New]); its selectors are
// reused for a few seconds on the same connection; responses are encoded once
// for each change and set of selectors and shared by all who get them.
//
// Why a caller has no identity is told to the agent's log, and to whoever asks
// the agent's admin socket to explain it; never to the caller.
package workloadapi

import (
	"context"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/metrics"
	agentworkload "github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/pkg/peercred"
)

// SocketMode is the mode of the socket: every local user may ask; who gets
// what is decided by attestation.
const SocketMode = 0o777

// Header is the metadata that every call carries (Workload Endpoint §3): a
// browser or a proxy that is tricked into connecting does not send it. It is
// demanded of every service on the socket, reflection too.
const Header = "workload.spiffe.io"

// Bounds of what callers may do. Limits holds those that a machine may need
// otherwise.
const (
	maxMessage     = 64 << 10 // bytes of a request
	maxHeaderList  = 16 << 10 // bytes of a request's headers
	maxStreams     = 100      // on one connection
	handshakeTime  = 5 * time.Second
	maxIdle        = 10 * time.Minute // of a connection without calls
	keepaliveTime  = time.Minute      // between our pings to a connection
	keepaliveWait  = 20 * time.Second // for its answer
	minPing        = 10 * time.Second // between a client's pings
	stopTime       = 2 * time.Second  // for calls to end when the agent stops
	readBufferSize = 4 << 10          // bytes, of each connection: requests are small
)

// Limits are bounds for all the processes of one user, or of one PID. 0 is the
// default.
type Limits struct {
	Connections       int     // in all; DefaultConnections
	ConnectionsOfUser int     // DefaultConnectionsOfUser
	ConnectionsOfPID  int     // DefaultConnectionsOfPID
	StreamsOfUser     int     // open at once; DefaultStreamsOfUser
	CallsOfUser       float64 // a second, with bursts of twice as many; DefaultCallsOfUser
}

// Defaults of Limits. On a node all containers often run as one user, so what
// one user may do is what a full node needs; a process needs a few connections
// only. All connections together take two descriptors each.
const (
	DefaultConnections       = 4096
	DefaultConnectionsOfUser = 2048
	DefaultConnectionsOfPID  = 32
	DefaultStreamsOfUser     = 8192
	DefaultCallsOfUser       = 2000
)

// Options of [New]. All but Limits, Now and Log are required.
type Options struct {
	Listener net.Listener // of a Unix socket; [peercred.Listen] with SocketMode
	Held     *held.Held
	Attestor *agentworkload.Attestor
	Limits   Limits
	Now      func() time.Time // nil is time.Now
	Log      *slog.Logger     // nil is silent
	Metrics  *metrics.Metrics // nil: none
}

// Server serves the Workload API.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer // the WIT methods

	o        Options
	log      *slog.Logger
	metrics  *metrics.Metrics
	now      func() time.Time
	callers  callers
	stopping chan struct{}
}

// New makes a server. [Server.Run] closes the listener.
func New(o Options) *Server {
	s := &Server{o: o, log: o.Log, metrics: o.Metrics, now: o.Now, stopping: make(chan struct{})}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.metrics == nil {
		s.metrics = metrics.New(nil)
	}
	if s.now == nil {
		s.now = time.Now
	}
	s.callers.init(o.Limits)
	return s
}

// Run serves until ctx ends, and returns its error. It is called once.
func (s *Server) Run(ctx context.Context) error {
	server := grpc.NewServer(
		grpc.Creds(peercred.New(peercred.Options{Admit: s.admit, Log: s.log})),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.ReadBufferSize(readBufferSize),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: maxIdle, Time: keepaliveTime, Timeout: keepaliveWait}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)
	workload.RegisterSpiffeWorkloadAPIServer(server, s)
	reflection.Register(server)

	var serving sync.WaitGroup
	failed := make(chan error, 1)
	serving.Go(func() { failed <- server.Serve(s.o.Listener) })
	defer serving.Wait()
	select {
	case err := <-failed:
		server.Stop()
		return err
	case <-ctx.Done():
	}
	close(s.stopping)
	force := time.AfterFunc(stopTime, server.Stop)
	server.GracefulStop()
	force.Stop()
	return ctx.Err()
}

// unary is the one interceptor of unary calls.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	began := time.Now()
	defer func() { s.metrics.Calls.Call(info.FullMethod, err, time.Since(began)) }()
	defer s.recover(info.FullMethod, &err)
	if _, err := s.enter(ctx); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// stream is the one interceptor of streams.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer func() { s.metrics.Calls.Stream(info.FullMethod, err) }()
	defer s.recover(info.FullMethod, &err)
	c, err := s.enter(ss.Context())
	if err != nil {
		return err
	}
	if !s.callers.openStream(c) {
		return errBusy
	}
	defer s.callers.closeStream(c)
	s.metrics.Streams.Inc()
	defer s.metrics.Streams.Dec()
	return handler(srv, ss)
}

var (
	errHeader  = status.Error(codes.InvalidArgument, `security header missing from request: send the metadata "workload.spiffe.io: true" once`)
	errBusy    = status.Error(codes.Unavailable, "too many requests; try again later")
	errNone    = status.Error(codes.PermissionDenied, "no identity issued")
	errNotYet  = status.Error(codes.Unavailable, "the agent is not ready; try again later")
	errStopped = status.Error(codes.Unavailable, "the agent is stopping; try again later")
	errPanic   = status.Error(codes.Internal, "internal error")
)

// enter checks what is demanded of every call.
func (s *Server) enter(ctx context.Context) (*caller, error) {
	c, err := s.callerOf(ctx)
	if err != nil {
		return nil, err
	}
	if !c.user.calls.Allow() {
		return nil, errBusy
	}
	if v := metadata.ValueFromIncomingContext(ctx, Header); len(v) != 1 || v[0] != "true" {
		return nil, errHeader
	}
	return c, nil
}

func (s *Server) recover(method string, err *error) {
	if v := recover(); v != nil {
		s.log.Error("a call panicked", "method", method, "panic", v, "stack", string(debug.Stack()))
		*err = errPanic
	}
}
