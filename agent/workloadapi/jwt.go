package workloadapi

import (
	"context"
	"encoding/json"
	"errors"
	"math/big"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

const (
	maxAudiences     = 32      // of one JWT-SVID
	maxAudienceBytes = 8 << 10 // all together; the token stays below jwtsvid.MaxToken
	maxSigning       = 8       // JWT-SVIDs that one call has signed at once
	maxRematches     = 3       // when entries change while their JWT-SVIDs are signed
)

var errNoJWT = status.Error(codes.Unavailable, "no JWT-SVID could be signed; try again later")

// FetchJWTSVID returns a JWT-SVID for each of the caller's identities, or for
// the one that is asked for. If one of them cannot be had it returns none: the
// first in a response is the default identity, and another must not take its
// place.
func (s *Server) FetchJWTSVID(ctx context.Context, r *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	var id spiffeid.ID
	if err := checkAudience(r.Audience); err != nil {
		return nil, err
	}
	if r.SpiffeId != "" {
		var err error
		if id, err = spiffeid.FromString(r.SpiffeId); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	c, selectors, err := s.identify(ctx)
	if err != nil {
		return nil, err
	}
	for range maxRematches {
		entries := s.identitiesOf(selectors, id)
		if len(entries) == 0 {
			return nil, s.noEntry(c, selectors)
		}
		m, err := s.signJWTs(ctx, entries, r.Audience)
		switch {
		case err == nil:
			return m, nil
		case ctx.Err() != nil:
			return nil, status.FromContextError(ctx.Err()).Err()
		case !errors.Is(err, held.ErrNotHeld):
			return nil, errNoJWT // held has logged why
		}
	}
	return nil, errNoJWT
}

func checkAudience(audience []string) error {
	if len(audience) == 0 {
		return status.Error(codes.InvalidArgument, "audience is missing")
	}
	if len(audience) > maxAudiences {
		return status.Errorf(codes.InvalidArgument, "%d audiences; the most is %d", len(audience), maxAudiences)
	}
	size := 0
	for _, a := range audience {
		if a == "" {
			return status.Error(codes.InvalidArgument, "an audience is empty")
		}
		size += len(a)
	}
	if size > maxAudienceBytes {
		return status.Errorf(codes.InvalidArgument, "the audiences are %d bytes long; the most is %d", size, maxAudienceBytes)
	}
	return nil
}

// identitiesOf returns the entries that the caller has JWT-SVIDs of: those with
// the SPIFFE ID, if one is given.
func (s *Server) identitiesOf(selectors selector.Set, id spiffeid.ID) []*entry.Entry {
	entries := s.o.Held.Match(selectors)
	if !id.IsZero() {
		var of []*entry.Entry
		for _, e := range entries {
			if e.SPIFFEID == id {
				of = append(of, e)
			}
		}
		entries = of
	}
	kept, _ := held.DistinctHints(entries)
	return kept
}

func (s *Server) signJWTs(ctx context.Context, entries []*entry.Entry, audience []string) (*workload.JWTSVIDResponse, error) {
	m := &workload.JWTSVIDResponse{Svids: make([]*workload.JWTSVID, len(entries))}
	sign := func(ctx context.Context, i int) error {
		e := entries[i]
		got, err := s.o.Held.JWT(ctx, e, audience)
		if err != nil {
			return err
		}
		m.Svids[i] = &workload.JWTSVID{SpiffeId: e.SPIFFEID.String(), Svid: got.Token, Hint: e.Hint}
		return nil
	}
	if len(entries) == 1 {
		return m, sign(ctx, 0)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxSigning)
	for i := range entries {
		g.Go(func() error { return sign(ctx, i) })
	}
	return m, g.Wait()
}

// FetchJWTBundles sends the JWT bundles of the caller's trust domain and of
// those that its entries federate with, now and whenever they change.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return s.sendBundles(stream, jwtBundles, func(u *held.Update) encoded {
		if u.Bundle == nil {
			return nil
		}
		m := &workload.JWTBundlesResponse{Bundles: make(map[string][]byte, 1+len(u.Federated))}
		m.Bundles[u.Bundle.TrustDomain.IDString()] = u.Bundle.JWKS()
		for _, b := range u.Federated {
			m.Bundles[b.TrustDomain.IDString()] = b.JWKS()
		}
		return encode(m)
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
	c, selectors, err := s.identify(ctx)
	if err != nil {
		return nil, err
	}
	u := s.o.Held.Look(selectors)
	switch {
	case len(u.Entries) == 0:
		return nil, s.noEntry(c, selectors)
	case u.Bundle == nil:
		return nil, errNotYet
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
