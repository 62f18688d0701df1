package delivery

import (
	"context"
	"errors"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

const (
	maxAudiences     = 32      // of one JWT-SVID
	maxAudienceBytes = 8 << 10 // all together; the token stays below jwtsvid.MaxToken
	maxSigning       = 8       // JWT-SVIDs that one call has signed at once
	maxRematches     = 3       // when entries change while their JWT-SVIDs are signed
)

var errNoJWT = status.Error(codes.Unavailable, "no JWT-SVID could be signed; try again later")

// JWT is a JWT-SVID with the entry that it is of.
type JWT struct {
	held.JWTResult
	Entry *entry.Entry
}

// JWTs returns a JWT-SVID for each of the share's identities, or for the one
// with an ID if that is not zero. If one of them cannot be had it returns none:
// the first in a response is the default identity, and another must not take
// its place. The error is one for the caller, or [ErrNone].
func (s Share) JWTs(ctx context.Context, id spiffeid.ID, audience []string) ([]JWT, error) {
	for range maxRematches {
		entries := identities(s.Look(), id)
		if len(entries) == 0 {
			return nil, ErrNone
		}
		svids, err := s.sign(ctx, entries, audience)
		switch {
		case err == nil:
			return svids, nil
		case ctx.Err() != nil:
			return nil, endpoint.Ended(ctx)
		case !errors.Is(err, held.ErrNotHeld):
			return nil, errNoJWT // held has logged why
		}
	}
	return nil, errNoJWT
}

// identities returns the entries of an update that there are tokens of: those
// with the SPIFFE ID, if one is given, and of those with one hint the oldest.
func identities(u *held.Update, id spiffeid.ID) []*entry.Entry {
	entries := u.Entries
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

func (s Share) sign(ctx context.Context, entries []*entry.Entry, audience []string) ([]JWT, error) {
	svids := make([]JWT, len(entries))
	sign := func(ctx context.Context, i int) error {
		got, err := s.Held.JWT(ctx, entries[i], audience)
		svids[i] = JWT{JWTResult: got, Entry: entries[i]}
		return err
	}
	if len(entries) == 1 {
		return svids, sign(ctx, 0)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(maxSigning)
	for i := range entries {
		g.Go(func() error { return sign(ctx, i) })
	}
	return svids, g.Wait()
}

// CheckAudience refuses an audience that no JWT-SVID is signed for.
func CheckAudience(audience []string) error {
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

// ParseID reads the SPIFFE ID that a request may name; "" is the zero ID.
func ParseID(s string) (spiffeid.ID, error) {
	if s == "" {
		return spiffeid.ID{}, nil
	}
	id, err := spiffeid.FromString(s)
	if err != nil {
		return spiffeid.ID{}, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
	}
	return id, nil
}
