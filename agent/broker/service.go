package broker

import (
	"context"
	"errors"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/delivery"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
)

// errand is a broker's call about a workload.
type errand struct {
	client
	delivery.Share
	workload *endpoint.Named
	audit    delivery.Audit
}

// errand resolves a reference, and returns the context in which the workload
// lasts and the broker is trusted (Broker API §3.1.1, §4.9).
func (s *Server) errand(ctx context.Context, r *broker.WorkloadReference) (_ errand, _ context.Context, stop func(), err error) {
	c := ctx.Value(clientKey{}).(client)
	pid, err := pidOf(r)
	if err != nil {
		return errand{}, nil, nil, err
	}
	gone := referenceError(codes.NotFound, reasonNotFound, "there is no process %d", pid)
	named, err := c.Name(ctx, pid, gone)
	if errors.Is(err, endpoint.ErrForeignPID) {
		err = referenceError(codes.InvalidArgument, reasonInvalid, "%s", status.Convert(err).Message())
	}
	if err != nil {
		return errand{}, nil, nil, err
	}
	e := errand{
		client:   c,
		Share:    delivery.Share{Held: s.o.Held, Selectors: named.Selectors, Only: c.policy.entitles},
		workload: named,
		audit:    delivery.Audit{Log: s.o.Log, By: slog.String("broker", c.ID.String()), Reference: slog.Int("workload_pid", int(pid))},
	}
	ctx, stop = named.While(ctx)
	return e, ctx, stop, nil
}

// errNotEntitled is for a workload that has no entry, and for one whose entries
// the broker's policy does not name: a broker cannot tell the two apart.
var errNotEntitled = referenceError(codes.PermissionDenied, reasonNotEntitled, "no identity issued")

// to is the broker's stream.
func (e errand) to(stream grpc.ServerStream) delivery.Stream {
	return delivery.Stream{Send: stream.SendMsg, Check: e.workload.Check, None: func() error { return errNotEntitled }}
}

// SubscribeToX509SVID sends the X509-SVIDs of a workload with bundles, now and
// whenever anything of them changes, as long as the workload lives.
func (s *Server) SubscribeToX509SVID(r *broker.SubscribeToX509SVIDRequest, stream grpc.ServerStreamingServer[broker.SubscribeToX509SVIDResponse]) error {
	e, ctx, stop, err := s.errand(stream.Context(), r.Reference)
	if err != nil {
		return err
	}
	defer stop()
	to := e.to(stream)
	to.Record = e.audit.X509()
	return e.Follow(ctx, to, encodeX509SVIDs)
}

// encodeX509SVIDs returns nil if there is nothing that may be sent: a message
// has at least one X509-SVID, each with a bundle.
func encodeX509SVIDs(u *held.Update) endpoint.Encoded {
	if !delivery.HasX509(u.Bundle) {
		return nil
	}
	m := &broker.SubscribeToX509SVIDResponse{FederatedBundles: delivery.X509Bundles(u.Federated...), Crl: u.CRLs}
	for _, i := range u.Identities {
		if i.SVID == nil {
			continue
		}
		m.Svids = append(m.Svids, &broker.X509SVID{
			SpiffeId:    i.Entry.SPIFFEID.String(),
			X509Svid:    i.SVID.Chain,
			X509SvidKey: i.SVID.Key,
			Bundle:      u.Bundle.DER(),
			Hint:        i.Entry.Hint,
		})
	}
	if len(m.Svids) == 0 {
		return nil
	}
	return endpoint.Encode(m)
}

// SubscribeToX509Bundles sends the X.509 bundles of the trust domain and of
// those that the workload's entries federate with, now and whenever they change.
func (s *Server) SubscribeToX509Bundles(r *broker.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[broker.SubscribeToX509BundlesResponse]) error {
	return s.sendBundles(stream, r.Reference, func(u *held.Update) endpoint.Encoded {
		if !delivery.HasX509(u.Bundle) {
			return nil
		}
		return endpoint.Encode(&broker.SubscribeToX509BundlesResponse{Bundles: delivery.X509Bundles(delivery.Bundles(u)...), Crl: u.CRLs})
	})
}

// SubscribeToJWTBundles sends the JWT bundles of the trust domain and of those
// that the workload's entries federate with, now and whenever they change.
func (s *Server) SubscribeToJWTBundles(r *broker.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[broker.SubscribeToJWTBundlesResponse]) error {
	return s.sendBundles(stream, r.Reference, func(u *held.Update) endpoint.Encoded {
		if u.Bundle == nil {
			return nil
		}
		return endpoint.Encode(&broker.SubscribeToJWTBundlesResponse{Bundles: delivery.JWTBundles(delivery.Bundles(u)...)})
	})
}

func (s *Server) sendBundles(stream grpc.ServerStream, r *broker.WorkloadReference, encode func(*held.Update) endpoint.Encoded) error {
	e, ctx, stop, err := s.errand(stream.Context(), r)
	if err != nil {
		return err
	}
	defer stop()
	return e.FollowBundles(ctx, e.to(stream), encode)
}

// FetchJWTSVID returns a JWT-SVID for each identity of a workload, or for the
// one that is asked for.
func (s *Server) FetchJWTSVID(ctx context.Context, r *broker.FetchJWTSVIDRequest) (*broker.FetchJWTSVIDResponse, error) {
	if err := delivery.CheckAudience(r.Audience); err != nil {
		return nil, err
	}
	id, err := delivery.ParseID(r.SpiffeId)
	if err != nil {
		return nil, err
	}
	e, ctx, stop, err := s.errand(ctx, r.Reference)
	if err != nil {
		return nil, err
	}
	defer stop()
	if refused, ok := e.policy.refusedAudience(r.Audience); ok {
		return nil, status.Errorf(codes.PermissionDenied, "this broker may not ask for the audience %q", refused)
	}
	svids, err := e.JWTs(ctx, id, r.Audience)
	if err == nil {
		err = e.workload.Check() // signing may have taken a while
	}
	if errors.Is(err, delivery.ErrNone) {
		return nil, errNotEntitled
	}
	if err != nil {
		return nil, err
	}
	e.audit.JWT(svids, r.Audience)
	m := &broker.FetchJWTSVIDResponse{}
	for _, j := range svids {
		m.Svids = append(m.Svids, &broker.JWTSVID{SpiffeId: j.Entry.SPIFFEID.String(), Svid: j.Token, Hint: j.Entry.Hint})
	}
	return m, nil
}
