package delivery

import (
	"context"
	"iter"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

// ErrNoWIT answers the calls of the WIT-SVID profile where it is not served:
// clients do not try again then (Workload API §7).
var ErrNoWIT = status.Error(codes.Unimplemented, "WIT-SVIDs are not switched on: set wit in experimental, at the server and at the agent")

// WIT is a WIT-SVID with the entry that it is of.
type WIT struct {
	*held.WITSVID
	Entry *entry.Entry
}

// FollowWIT is [Share.Follow] for the WIT-SVIDs of the share's identities, or
// of the one with an ID if that is not zero. Encode gets at least one. Streams
// with the same share and ID share one encoding of an update.
func (s Share) FollowWIT(ctx context.Context, to Stream, id spiffeid.ID, encode func([]WIT) endpoint.Encoded) error {
	return s.follow(ctx, to, s.Held.SubscribeWIT, func(u *held.Update) state {
		return u.Memo(witMemo{id}, func() any { return readWITs(u, id, encode) }).(state)
	})
}

// WITIDs returns the IDs that an update has WIT-SVIDs of: of the share's
// identities, or of the one with an ID if that is not zero.
func WITIDs(u *held.Update, id spiffeid.ID) iter.Seq[spiffeid.ID] {
	return func(yield func(spiffeid.ID) bool) {
		for _, e := range identities(u, id) {
			if u.WITs[e].SVID != nil && !yield(e.SPIFFEID) {
				return
			}
		}
	}
}

// witMemo is the key of an update's memo: the identity that was asked for, or
// zero for all.
type witMemo struct{ id spiffeid.ID }

func readWITs(u *held.Update, id spiffeid.ID, encode func([]WIT) endpoint.Encoded) state {
	entries := identities(u, id)
	is := state{none: len(entries) == 0, ready: true}
	var svids []WIT
	for _, e := range entries {
		switch wit := u.WITs[e]; {
		case wit.SVID != nil:
			svids = append(svids, WIT{WITSVID: wit.SVID, Entry: e})
		case wit.Err == nil:
			is.ready = false
		case status.Code(wit.Err) == codes.Unimplemented: // by the server
			is.never = ErrNoWIT
		}
	}
	if len(svids) > 0 {
		is.message, is.never = encode(svids), nil
	}
	return is
}

// WITBundles returns bundles as the standard's messages carry them: plain JWK
// sets, by the ID of the trust domain.
func WITBundles(bundles ...*bundle.Bundle) map[string]string {
	m := make(map[string]string, len(bundles))
	for _, b := range bundles {
		m[b.TrustDomain.IDString()] = string(b.WITJWKS())
	}
	return m
}
