package workloadapi

import (
	"context"
	"encoding/json"
	"errors"
	"math/big"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hallmark-id/hallmark/agent/delivery"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
)

// FetchJWTSVID returns a JWT-SVID for each of the caller's identities, or for
// the one that is asked for.
func (s *Server) FetchJWTSVID(ctx context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if err := delivery.CheckAudience(r.Audience); err != nil {
		return nil, err
	}
	id, err := delivery.ParseID(r.SpiffeId)
	if err != nil {
		return nil, err
	}
	c, selectors, err := s.Identify(ctx)
	if err != nil {
		return nil, err
	}
	svids, err := s.share(selectors).JWTs(ctx, id, r.Audience)
	if errors.Is(err, delivery.ErrNone) {
		return nil, s.DenyUnmatched(c, selectors)
	}
	if err != nil {
		return nil, err
	}
	s.Given(c, "JWT-SVIDs given", func(yield func(spiffeid.ID) bool) {
		for _, j := range svids {
			if !yield(j.Entry.SPIFFEID) {
				return
			}
		}
	}, r.Audience)
	m := &workload.JWTSVIDResponse{}
	for _, j := range svids {
		m.Svids = append(m.Svids, &workload.JWTSVID{SpiffeId: j.Entry.SPIFFEID.String(), Svid: j.Token, Hint: j.Entry.Hint})
	}
	return m, nil
}

// FetchJWTBundles sends the JWT bundles of the caller's trust domain and of
// those that its entries federate with, now and whenever they change.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return s.sendBundles(stream, jwtBundles, func(u *held.Update) endpoint.Encoded {
		if u.Bundle == nil {
			return nil
		}
		return endpoint.Encode(&workload.JWTBundlesResponse{Bundles: delivery.JWTBundles(delivery.Bundles(u)...)})
	})
}

// ValidateJWTSVID checks a JWT-SVID for the caller, by the bundles that it may
// see.
func (s *Server) ValidateJWTSVID(ctx context.Context, r *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch {
	case r.Audience == "":
		return nil, status.Error(codes.InvalidArgument, "audience is missing")
	case r.Svid == "":
		return nil, status.Error(codes.InvalidArgument, "svid is missing")
	}
	c, selectors, err := s.Identify(ctx)
	if err != nil {
		return nil, err
	}
	u := s.share(selectors).Look()
	switch {
	case len(u.Entries) == 0:
		return nil, s.DenyUnmatched(c, selectors)
	case u.Bundle == nil:
		return nil, endpoint.ErrNotReady
	}
	svid, err := jwtsvid.Validate(r.Svid, []string{r.Audience}, func(td spiffeid.TrustDomain) *bundle.Bundle { return bundleOf(u, td) }, s.now())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "JWT-SVID is not valid: %v", err)
	}
	claims, err := structpb.NewStruct(forStruct(svid.Claims).(map[string]any))
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "JWT-SVID is not valid: claims: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: svid.ID.String(), Claims: claims}, nil
}

func bundleOf(u *held.Update, td spiffeid.TrustDomain) *bundle.Bundle {
	if u.Bundle.TrustDomain == td {
		return u.Bundle
	}
	for _, b := range u.Federated {
		if b.TrustDomain == td {
			return b
		}
	}
	return nil
}

// forStruct makes of a decoded JSON value one that a Struct takes. A Struct's
// numbers are 64-bit floats: an integer that these cannot hold becomes a string
// of its digits rather than another number.
func forStruct(v any) any {
	switch v := v.(type) {
	case json.Number:
		f, err := v.Float64()
		if err != nil {
			return v.String()
		}
		if i, ok := new(big.Int).SetString(v.String(), 10); ok {
			if exact, _ := new(big.Float).SetFloat64(f).Int(nil); exact.Cmp(i) != 0 {
				return v.String()
			}
		}
		return f
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = forStruct(v[i])
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for k := range v {
			out[k] = forStruct(v[k])
		}
		return out
	}
	return v
}
