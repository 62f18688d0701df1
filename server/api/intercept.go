package api

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/hallmark-id/hallmark/pkg/peercred"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// untraced are the methods whose calls last for as long as their callers do, or
// that monitoring makes.
var untraced = map[string]bool{
	hallmarkv1.FeedService_Follow_FullMethodName:                           true,
	entryv1.Entry_SyncAuthorizedEntries_FullMethodName:                     true,
	grpc_health_v1.Health_Check_FullMethodName:                             true,
	grpc_health_v1.Health_Watch_FullMethodName:                             true,
	reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName:      true,
	reflectionv1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: true,
}

// vouchedFor reports whether a call comes from whom an authority of ours, or
// the kernel, vouches for.
func (a *API) vouchedFor(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	switch info := p.AuthInfo.(type) {
	case *peercred.Peer:
		return true
	case *tlsPeer:
		return info.leaf != nil && info.verify(a.registry.View(), a.now()) == nil
	}
	return false
}

// errStopping ends streams when the server stops.
var errStopping = callErrorf(codes.Unavailable, "the server is stopping; try again")

// refuseEarly denies a call to one without an X509-SVID before anything of its
// request is read.
func (a *API) refuseEarly(ctx context.Context, info *tap.Info) (context.Context, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if t, ok := p.AuthInfo.(*tlsPeer); ok && t.leaf == nil && methods[info.FullMethodName].callers&anyone == 0 {
			err := a.refused(ctx, info.FullMethodName, denied(info.FullMethodName), nil)
			return nil, grpcstatus.Convert(err).Err()
		}
	}
	return ctx, nil
}

// unary is what every call with one request goes through.
func (a *API) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	m, began := methods[info.FullMethod], time.Now()
	c, err := a.authorize(ctx, info.FullMethod, m)
	if err != nil {
		return nil, a.refused(ctx, info.FullMethod, err, subject(req, nil))
	}
	ctx = context.WithValue(ctx, callerKey{}, c)
	// RFC 9110 §6.6.1. A client learns by it how far its clock is off. It fails
	// only once the headers were sent.
	_ = grpc.SetHeader(ctx, metadata.Pairs("date", a.now().UTC().Format(http.TimeFormat)))
	if err = a.limitCalls(ctx, c); err == nil {
		err = a.safely(info.FullMethod, func() (err error) {
			resp, err = handler(ctx, req)
			return err
		})
	}
	err = a.finished(ctx, info.FullMethod, err)
	a.metrics.Calls.Call(info.FullMethod, err, time.Since(began))
	if m.audit {
		a.audit(ctx, c, info.FullMethod, err, began, subject(req, resp))
	}
	return resp, err
}

// stream is what every other call goes through. It returns, and so ends the
// call, as soon as the caller's SVID ends or the server stops, even while its
// service waits for a message; the service then fails to receive and send.
func (a *API) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	m, began := methods[info.FullMethod], time.Now()
	c, err := a.authorize(ss.Context(), info.FullMethod, m)
	if err != nil {
		return a.refused(ss.Context(), info.FullMethod, err, nil)
	}
	ctx, end := context.WithCancelCause(ss.Context())
	defer end(nil)
	defer context.AfterFunc(a.stopping, func() { end(errStopping) })()
	if !c.expires.IsZero() {
		timer := time.AfterFunc(c.expires.Sub(a.now()), func() { end(ended(c)) })
		defer timer.Stop()
	}
	record := &auditRecord{}
	ctx = context.WithValue(context.WithValue(ctx, callerKey{}, c), auditKey{}, record)
	record.write = func(err error) {
		if m.audit {
			a.audit(ctx, c, info.FullMethod, err, began, record.attrs())
		}
	}
	call := func() error {
		if err := a.limitCalls(ctx, c); err != nil {
			return err
		}
		return a.safely(info.FullMethod, func() error { return handler(srv, &serverStream{ss, ctx}) })
	}
	if m.watches {
		err = call()
	} else {
		done := make(chan error, 1)
		a.running.Go(func() { done <- call() })
		select {
		case err = <-done:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	err = a.finished(ctx, info.FullMethod, err)
	a.metrics.Calls.Stream(info.FullMethod, err)
	record.settle(err)
	return err
}

// ended is why a stream ends whose caller was let in with an SVID that has
// expired.
func ended(c *Caller) error {
	if c.Kind == agent {
		return permissionDenied(types.PermissionDeniedDetails_AGENT_EXPIRED, "agent SVID has expired")
	}
	return callErrorf(codes.PermissionDenied, "the X509-SVID has expired")
}

// serverStream is a stream with the context that says who calls.
type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context returns the context of the call.
func (s *serverStream) Context() context.Context { return s.ctx }

// safely calls a service. A panic of it fails this call and no other.
func (a *API) safely(name string, call func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			a.log.Error("a call panicked", "method", name, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))
			err = callErrorf(codes.Internal, internalText)
		}
	}()
	return call()
}

// refused records that a call was denied, and what it was about, as far as that
// is known. Whoever is denied can try as often as it likes, so only some are
// recorded: of each one that has an X509-SVID, and of all others together.
func (a *API) refused(ctx context.Context, name string, err error, subject []slog.Attr) error {
	a.countRefusal(name, err)
	if cause := hiddenCause(err); cause != nil {
		a.log.Error("a caller could not be authorized", "method", name, "error", cause)
		return err
	}
	now := a.now()
	if !a.refusals.of(a.known(ctx), now).AllowN(now, 1) {
		return err
	}
	message := "call denied"
	if methods[name].audit {
		message = "audit"
	}
	attrs := append([]slog.Attr{slog.String("method", strings.TrimPrefix(clip(name), "/"))}, from(ctx)...)
	attrs = append(attrs, subject...)
	attrs = append(attrs, slog.String("outcome", grpcstatus.Code(err).String()), slog.String("error", grpcstatus.Convert(err).Message()))
	a.log.LogAttrs(ctx, slog.LevelWarn, message, attrs...)
	return err
}

// known returns the ID of a caller that an authority vouches for; of others "".
func (a *API) known(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && a.vouchedFor(ctx) {
		if info, ok := p.AuthInfo.(*tlsPeer); ok {
			return info.id.String()
		}
	}
	return ""
}

// countRefusal counts a call that was denied. Whoever is denied may have made
// up the method.
func (a *API) countRefusal(name string, err error) {
	if _, ok := methods[name]; !ok {
		name = "unknown"
	}
	a.metrics.Refusals.WithLabelValues(name, grpcstatus.Code(err).String()).Inc()
}

// finished turns a service's error into the call's, and logs the cause of one
// that is the server's own.
func (a *API) finished(ctx context.Context, name string, err error) error {
	if err == nil {
		return nil
	}
	err = status(err)
	if cause := hiddenCause(err); cause != nil {
		attrs := append([]slog.Attr{slog.String("method", name), slog.Any("error", cause)}, from(ctx)...)
		a.log.LogAttrs(ctx, slog.LevelError, "a call failed", attrs...)
	}
	return err
}

// from says where a call comes from, for the log.
func from(ctx context.Context) []slog.Attr {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	switch info := p.AuthInfo.(type) {
	case *peercred.Peer:
		return []slog.Attr{slog.Int("pid", int(info.PID)), slog.Uint64("uid", uint64(info.UID))}
	case *tlsPeer:
		attrs := []slog.Attr{slog.String("address", info.address)}
		if info.leaf != nil && info.malformed == nil {
			attrs = append(attrs, slog.String("presented", info.id.String()))
		}
		return attrs
	}
	return nil
}

// unknown answers calls of methods that no service has: whoever may call the
// method if there were one learns that there is none.
func unknown(_ any, ss grpc.ServerStream) error {
	name, _ := grpc.MethodFromServerStream(ss)
	return callErrorf(codes.Unimplemented, "this server does not have method %s", name)
}
