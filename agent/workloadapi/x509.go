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

// FetchX509SVID sends the caller's X509-SVIDs with bundles, now and whenever
// anything of them changes. The first message waits until all are signed, or
// cannot be.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	ctx, span := s.traces.Root(stream.Context(), "FetchX509SVID until its first answer", trace.SpanContext{})
	defer span.End() // again, which does nothing, after the first answer
	c, selectors, err := s.Identify(ctx)
	if err != nil {
		return err
	}
	to := s.to(stream, c, selectors)
	to.Record = s.first(c, span, "X509-SVIDs given", idsOf)
	return s.share(selectors).Follow(ctx, to, once(x509SVIDs, encodeX509SVIDs))
}

// idsOf returns the IDs that an update has X509-SVIDs of.
func idsOf(u *held.Update) iter.Seq[spiffeid.ID] {
	return func(yield func(spiffeid.ID) bool) {
		for _, i := range u.Identities {
			if i.SVID != nil && !yield(i.Entry.SPIFFEID) {
				return
			}
		}
	}
}

// encodeX509SVIDs returns nil if there is nothing that may be sent: a message
// has at least one X509-SVID, each with a bundle.
func encodeX509SVIDs(u *held.Update) endpoint.Encoded {
	if !delivery.HasX509(u.Bundle) {
		return nil
	}
	m := &workload.X509SVIDResponse{FederatedBundles: delivery.X509Bundles(u.Federated...), Crl: u.CRLs}
	for _, i := range u.Identities {
		if i.SVID == nil {
			continue
		}
		m.Svids = append(m.Svids, &workload.X509SVID{
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

// FetchX509Bundles sends the X.509 bundles of the caller's trust domain and of
// those that its entries federate with, now and whenever they change.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return s.sendBundles(stream, x509Bundles, func(u *held.Update) endpoint.Encoded {
		if !delivery.HasX509(u.Bundle) {
			return nil
		}
		return endpoint.Encode(&workload.X509BundlesResponse{Bundles: delivery.X509Bundles(delivery.Bundles(u)...), Crl: u.CRLs})
	})
}

// sendBundles sends what encode makes of an update; nil is nothing yet.
func (s *Server) sendBundles(stream grpc.ServerStream, key memoKey, encode func(*held.Update) endpoint.Encoded) error {
	c, selectors, err := s.Identify(stream.Context())
	if err != nil {
		return err
	}
	return s.share(selectors).FollowBundles(stream.Context(), s.to(stream, c, selectors), once(key, encode))
}
