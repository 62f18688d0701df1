// Package endpoint is what the agent's sockets have in common: a gRPC server
// whose callers are pinned when they connect ([peercred.New]), counted and
// bounded, attested when a service wants to know what they are, and ended when
// the agent stops. The Workload API, the Broker API and the admin APIs each
// stand on one. Make an [Endpoint] with [New].
//
// A call passes, in this order: the bounds of its user ([Limits]), the header
// that the endpoint demands, and the rule of who may call what
// (Options.Authorize). A service then asks who the caller is
// ([Endpoint.Identify]), whether it is trusted with the identities of others
// ([Endpoint.Trust]), and what a process is that such a caller names
// ([Trusted.Name]).
//
// Why a caller gets nothing is told to the agent's log, and to whoever asks
// the agent's admin socket to explain it; never to the caller.
package endpoint

import (
	"context"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

// Bounds of what callers may do. Limits holds those that a machine may need
// otherwise.
const (
	maxMessage     = 64 << 10 // bytes of a request
	maxHeaderList  = 16 << 10 // bytes of a request's headers
	handshakeTime  = 5 * time.Second
	maxIdle        = 10 * time.Minute // of a connection without calls
	keepaliveTime  = time.Minute      // between our pings to a connection
	keepaliveWait  = 20 * time.Second // for its answer
	minPing        = 10 * time.Second // between a client's pings
	stopTime       = 2 * time.Second  // for calls to end when the agent stops
	readBufferSize = 4 << 10          // bytes, of each connection: requests are small
)

// Options of [New]. Listener, Held, Attestor and MaxStreams are required.
type Options struct {
	Listener   net.Listener // of a Unix socket; [peercred.Listen]
	Held       *held.Held
	Attestor   *workload.Attestor
	Limits     Limits
	MaxStreams uint32 // calls at once on one connection
	// RequireOwner admits processes of root and of the agent's user only.
	RequireOwner bool
	// Header, if set, is the metadata that every call carries once with the
	// value true: a browser or a proxy that is tricked into connecting does not
	// send it. It is demanded of every service on the socket, reflection too.
	Header string
	// Secure, if set, adds to the credentials that pin the peer. What
	// authentication information it makes embeds the [peercred.Peer].
	Secure func(credentials.TransportCredentials) credentials.TransportCredentials
	// Authorize, if set, decides on each call, and returns the context that
	// its handler gets.
	Authorize func(ctx context.Context, method string) (context.Context, error)
	Calls     *telemetry.Calls  // nil: they are not counted
	Streams   prometheus.Gauge  // open ones; nil: they are not counted
	Now       func() time.Time  // nil is time.Now
	Log       *slog.Logger      // nil is silent
	Traces    *telemetry.Traces // of all calls but streams; nil: none
	// Traced says of a call's context whether its caller's trace is gone on
	// with. Nil is nobody's: a process could have everything that it does kept.
	Traced func(context.Context) bool
}

// Endpoint is one socket. All methods may be called concurrently.
type Endpoint struct {
	o       Options
	log     *slog.Logger
	now     func() time.Time
	callers callers

	stopping context.Context // ends, with ErrStopped, when Run does
	stop     context.CancelCauseFunc
}

// New makes an endpoint. [Endpoint.Run] closes the listener.
func New(o Options) *Endpoint {
	e := &Endpoint{o: o, log: o.Log, now: o.Now}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.now == nil {
		e.now = time.Now
	}
	if e.o.Calls == nil {
		e.o.Calls = telemetry.NewCalls(nil, "uncounted", "nobody")
	}
	if e.o.Streams == nil {
		e.o.Streams = prometheus.NewGauge(prometheus.GaugeOpts{})
	}
	if e.o.Traced == nil {
		e.o.Traced = func(context.Context) bool { return false }
	}
	e.stopping, e.stop = context.WithCancelCause(context.Background())
	e.callers.init(o.Limits)
	return e
}

// Run serves what register registers, and reflection, until ctx ends; it
// returns ctx's error. It is called once.
func (e *Endpoint) Run(ctx context.Context, register func(*grpc.Server)) error {
	creds := peercred.New(peercred.Options{RequireOwner: e.o.RequireOwner, Admit: e.admit, Log: e.log})
	if e.o.Secure != nil {
		creds = e.o.Secure(creds)
	}
	untraced := make(map[string]bool)
	server := grpc.NewServer(append(e.o.Traces.ServerOptions(e.o.Traced, untraced),
		grpc.Creds(creds),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.UnaryInterceptor(e.unary),
		grpc.StreamInterceptor(e.stream),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxConcurrentStreams(e.o.MaxStreams),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.ReadBufferSize(readBufferSize),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: maxIdle, Time: keepaliveTime, Timeout: keepaliveWait}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true),
	)...)
	register(server)
	reflection.Register(server)
	for service, info := range server.GetServiceInfo() {
		for _, m := range info.Methods {
			// A stream lasts for as long as its caller does.
			untraced["/"+service+"/"+m.Name] = m.IsClientStream || m.IsServerStream
		}
	}

	var serving sync.WaitGroup
	failed := make(chan error, 1)
	serving.Go(func() { failed <- server.Serve(e.o.Listener) })
	defer serving.Wait()
	defer e.stop(ErrStopped)
	select {
	case err := <-failed:
		server.Stop()
		return err
	case <-ctx.Done():
	}
	e.stop(ErrStopped)
	force := time.AfterFunc(stopTime, server.Stop)
	server.GracefulStop()
	force.Stop()
	return ctx.Err()
}

// unary is the one interceptor of unary calls.
func (e *Endpoint) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	began := time.Now()
	defer func() { e.o.Calls.Call(info.FullMethod, err, time.Since(began)) }()
	defer e.recover(info.FullMethod, &err)
	_, ctx, err = e.enter(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// stream is the one interceptor of streams. Their context ends when the agent
// stops; its cause is an error for the caller.
func (e *Endpoint) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer func() { e.o.Calls.Stream(info.FullMethod, err) }()
	defer e.recover(info.FullMethod, &err)
	c, ctx, err := e.enter(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	if !e.callers.openStream(c) {
		return errBusy
	}
	defer e.callers.closeStream(c)
	e.o.Streams.Inc()
	defer e.o.Streams.Dec()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(e.stopping, func() { cancel(context.Cause(e.stopping)) })()
	return handler(srv, &stream{ServerStream: ss, ctx: ctx})
}

// stream is a gRPC stream with a context of our own.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context returns the stream's context.
func (s *stream) Context() context.Context { return s.ctx }

// Errors for callers.
var (
	// ErrDenied is for everybody who gets nothing, whatever the reason.
	ErrDenied = status.Error(codes.PermissionDenied, "no identity issued")
	// ErrNotReady says that the agent does not know yet what it may give out.
	ErrNotReady = status.Error(codes.Unavailable, "the agent is not ready; try again later")
	// ErrStopped ends the streams of an agent that stops.
	ErrStopped = status.Error(codes.Unavailable, "the agent is stopping; try again later")

	errBusy  = status.Error(codes.Unavailable, "too many requests; try again later")
	errPanic = status.Error(codes.Internal, "internal error")
)

// Ended returns the error of a call whose context has ended: its cause, if that
// is one for callers.
func Ended(ctx context.Context) error {
	cause := context.Cause(ctx)
	if _, ok := status.FromError(cause); ok {
		return cause
	}
	return status.FromContextError(ctx.Err()).Err()
}

// enter checks what is demanded of every call.
func (e *Endpoint) enter(ctx context.Context, method string) (*Caller, context.Context, error) {
	c, err := e.Caller(ctx)
	if err != nil {
		return nil, nil, err
	}
	if !c.user.calls.Allow() {
		return nil, nil, errBusy
	}
	if e.o.Header != "" {
		if v := metadata.ValueFromIncomingContext(ctx, e.o.Header); len(v) != 1 || v[0] != "true" {
			return nil, nil, status.Errorf(codes.InvalidArgument, `security header missing from request: send the metadata "%s: true" once`, e.o.Header)
		}
	}
	if e.o.Authorize != nil {
		if ctx, err = e.o.Authorize(ctx, method); err != nil {
			return nil, nil, err
		}
	}
	return c, ctx, nil
}

func (e *Endpoint) recover(method string, err *error) {
	if v := recover(); v != nil {
		e.log.Error("a call panicked", "method", method, "panic", v, "stack", string(debug.Stack()))
		*err = errPanic
	}
}
