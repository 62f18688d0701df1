package workloadapi

import (
	"iter"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"

	"github.com/hallmark-id/hallmark/agent/delivery"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
)

// FetchWITSVID sends a WIT-SVID with its key for each of the caller's
// identities, or for the one that is asked for, now and whenever one changes.
func (s *Server) FetchWITSVID(r *workload.WITSVIDRequest, stream grpc.ServerStreamingServer[workload.WITSVIDResponse]) error {
	if !s.wit {
		return delivery.ErrNoWIT
	}
	id, err := delivery.ParseID(r.SpiffeId)
	if err != nil {
		return err
	}
	ctx, span := s.traces.Root(stream.Context(), "FetchWITSVID until its first answer", trace.SpanContext{})
	defer span.End() // again, which does nothing, after the first answer
	c, selectors, err := s.Identify(ctx)
	if err != nil {
		return err
	}
	to := s.to(stream, c, selectors)
	to.Record = s.first(c, span, "WIT-SVIDs given", func(u *held.Update) iter.Seq[spiffeid.ID] { return delivery.WITIDs(u, id) })
	return s.share(selectors).FollowWIT(ctx, to, id, encodeWITSVIDs)
}

func encodeWITSVIDs(svids []delivery.WIT) endpoint.Encoded {
	m := &workload.WITSVIDResponse{}
	for _, w := range svids {
		m.Svids = append(m.Svids, &workload.WITSVID{
			SpiffeId: w.Entry.SPIFFEID.String(), WitSvid: w.Token, WitSvidKey: w.Key, Hint: w.Entry.Hint,
		})
	}
	return endpoint.Encode(m)
}

// FetchWITBundles sends the WIT bundles of the caller's trust domain and of
// those that its entries federate with, now and whenever they change.
func (s *Server) FetchWITBundles(_ *workload.WITBundlesRequest, stream grpc.ServerStreamingServer[workload.WITBundlesResponse]) error {
	if !s.wit {
		return delivery.ErrNoWIT
	}
	return s.sendBundles(stream, witBundles, func(u *held.Update) endpoint.Encoded {
		if u.Bundle == nil {
			return nil
		}
		return endpoint.Encode(&workload.WITBundlesResponse{Bundles: delivery.WITBundles(delivery.Bundles(u)...)})
	})
}
