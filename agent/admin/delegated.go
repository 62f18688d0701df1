package admin

import (
	"context"
	"errors"
	"log/slog"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/delivery"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// delegatedService is SPIRE's agent Delegated Identity API: a delegate, which is
// a workload of this node itself, fetches the SVIDs of others, by selectors that
// it vouches for or by PID. What it is given of a process by PID ends with that;
// what it asks for by selectors it may ask for before there is anything.
type delegatedService struct {
	delegatedv1.UnsafeDelegatedIdentityServer // every call is here: one that is missing does not compile
	*Server
}

var delegatedMethods = "/" + delegatedv1.DelegatedIdentity_ServiceDesc.ServiceName + "/"

// maxSelectors is how many selectors one request may name.
const maxSelectors = 1000

var errOneOf = status.Error(codes.InvalidArgument, "either selectors or a pid must be there, and not both")

// delegateKey is the context key of a delegate's *endpoint.Trusted.
type delegateKey struct{}

func (s *Server) authorizeDelegate(ctx context.Context) (context.Context, error) {
	t, err := s.Trust(ctx, func(id spiffeid.ID) bool { return slices.Contains(s.o.Delegates, id) })
	if err != nil {
		return nil, err
	}
	return context.WithValue(ctx, delegateKey{}, t), nil
}

// delegateOf returns the delegate that authorize found.
func delegateOf(ctx context.Context) *endpoint.Trusted {
	return ctx.Value(delegateKey{}).(*endpoint.Trusted)
}

// errand is what a delegate's call is about.
type errand struct {
	delivery.Share
	audit delivery.Audit
	// check is asked before anything is sent: the delegate must still be one,
	// and the process that it named must still run.
	check func() error
}

// errand finds out what a request is about, and returns the context in which
// that lasts.
func (s *delegatedService) errand(ctx context.Context, selectors []*types.Selector, pid int32) (_ errand, _ context.Context, stop func(), err error) {
	d := delegateOf(ctx)
	e := errand{
		Share: delivery.Share{Held: s.o.Held, Only: delivery.Delegable},
		audit: delivery.Audit{Log: s.o.Log, By: slog.String("delegate", d.ID.String()), Reference: slog.String("reference", "selectors")},
		check: d.Check,
	}
	switch {
	case (len(selectors) == 0) == (pid == 0):
		return e, nil, nil, errOneOf
	case pid < 0:
		return e, nil, nil, status.Errorf(codes.InvalidArgument, "pid %d is not one of a process; a PID is positive", pid)
	case pid == 0:
		if e.Selectors, err = selectorsFromWire(selectors); err != nil {
			return e, nil, nil, err
		}
		ctx, stop = d.While(ctx)
		return e, ctx, stop, nil
	}
	named, err := d.Name(ctx, pid, status.Errorf(codes.NotFound, "there is no process %d", pid))
	if err != nil {
		return e, nil, nil, err
	}
	e.Selectors, e.check = named.Selectors, named.Check
	e.audit.Reference = slog.Int("workload_pid", int(pid))
	ctx, stop = named.While(ctx)
	return e, ctx, stop, nil
}

func selectorsFromWire(wire []*types.Selector) (selector.Set, error) {
	if len(wire) > maxSelectors {
		return nil, status.Errorf(codes.InvalidArgument, "%d selectors; the most is %d", len(wire), maxSelectors)
	}
	out := make([]selector.Selector, len(wire))
	for i, w := range wire {
		var err error
		if out[i], err = selector.New(w.GetType(), w.GetValue()); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "selector %d: %v", i, err)
		}
	}
	return selector.NewSet(out...), nil
}

// SubscribeToX509SVIDs sends the X509-SVIDs of a workload, now and whenever they
// change. Where there are none it says so, and goes on.
func (s *delegatedService) SubscribeToX509SVIDs(r *delegatedv1.SubscribeToX509SVIDsRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToX509SVIDsResponse]) error {
	e, ctx, stop, err := s.errand(stream.Context(), r.Selectors, r.Pid)
	if err != nil {
		return err
	}
	defer stop()
	return e.Follow(ctx, delivery.Stream{Send: stream.SendMsg, Check: e.check, Record: e.audit.X509()}, encodeDelegated)
}

// encodeDelegated returns nil if there are identities and none of them can be
// sent yet.
func encodeDelegated(u *held.Update) endpoint.Encoded {
	m := &delegatedv1.SubscribeToX509SVIDsResponse{}
	for _, i := range u.Identities {
		if i.SVID == nil {
			continue
		}
		m.X509Svids = append(m.X509Svids, &delegatedv1.X509SVIDWithKey{
			X509Svid: &types.X509SVID{
				Id:        idToWire(i.Entry.SPIFFEID),
				CertChain: i.SVID.Certificates(),
				ExpiresAt: i.SVID.ExpiresAt.Unix(),
				Hint:      i.Entry.Hint,
			},
			X509SvidKey: i.SVID.Key,
		})
	}
	if len(m.X509Svids) == 0 && len(u.Identities) > 0 {
		return nil
	}
	for _, b := range u.Federated {
		m.FederatesWith = append(m.FederatesWith, b.TrustDomain.IDString())
	}
	return endpoint.Encode(m)
}

func idToWire(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// SubscribeToX509Bundles sends the X.509 bundles of all trust domains that this
// node knows, now and whenever they change.
func (s *delegatedService) SubscribeToX509Bundles(_ *delegatedv1.SubscribeToX509BundlesRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToX509BundlesResponse]) error {
	return s.sendBundles(stream, func(all []*bundle.Bundle) endpoint.Encoded {
		m := &delegatedv1.SubscribeToX509BundlesResponse{CaCertificates: delivery.X509Bundles(all...)}
		if m.CaCertificates[s.o.TrustDomain.IDString()] == nil {
			return nil
		}
		return endpoint.Encode(m)
	})
}

// SubscribeToJWTBundles sends the JWT bundles of all trust domains that this
// node knows, now and whenever they change.
func (s *delegatedService) SubscribeToJWTBundles(_ *delegatedv1.SubscribeToJWTBundlesRequest, stream grpc.ServerStreamingServer[delegatedv1.SubscribeToJWTBundlesResponse]) error {
	return s.sendBundles(stream, func(all []*bundle.Bundle) endpoint.Encoded {
		m := &delegatedv1.SubscribeToJWTBundlesResponse{Bundles: delivery.JWTBundles(all...)}
		if m.Bundles[s.o.TrustDomain.IDString()] == nil {
			return nil
		}
		return endpoint.Encode(m)
	})
}

func (s *delegatedService) sendBundles(stream grpc.ServerStream, encode func([]*bundle.Bundle) endpoint.Encoded) error {
	d := delegateOf(stream.Context())
	ctx, stop := d.While(stream.Context())
	defer stop()
	return delivery.FollowAllBundles(ctx, s.o.Held, delivery.Stream{Send: stream.SendMsg, Check: d.Check}, encode)
}

// FetchJWTSVIDs returns a JWT-SVID for each identity of a workload.
func (s *delegatedService) FetchJWTSVIDs(ctx context.Context, r *delegatedv1.FetchJWTSVIDsRequest) (*delegatedv1.FetchJWTSVIDsResponse, error) {
	if err := delivery.CheckAudience(r.Audience); err != nil {
		return nil, err
	}
	e, ctx, stop, err := s.errand(ctx, r.Selectors, r.Pid)
	if err != nil {
		return nil, err
	}
	defer stop()
	svids, err := e.JWTs(ctx, spiffeid.ID{}, r.Audience)
	if err == nil {
		err = e.check() // signing may have taken a while
	}
	if errors.Is(err, delivery.ErrNone) {
		return nil, endpoint.ErrDenied
	}
	if err != nil {
		return nil, err
	}
	e.audit.JWT(svids, r.Audience)
	m := &delegatedv1.FetchJWTSVIDsResponse{}
	for _, j := range svids {
		m.Svids = append(m.Svids, &types.JWTSVID{
			Token: j.Token, Id: idToWire(j.Entry.SPIFFEID), ExpiresAt: j.ExpiresAt.Unix(), IssuedAt: j.IssuedAt.Unix(), Hint: j.Entry.Hint,
		})
	}
	return m, nil
}
