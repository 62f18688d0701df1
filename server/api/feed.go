package api

import (
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/registry"
)

// feedService is our push stream over the feed.
type feedService struct {
	hallmarkv1.UnsafeFeedServiceServer // every call is here: one that is missing does not compile
	*API
}

// Follow pushes to the calling agent what it is authorized for.
func (s *feedService) Follow(stream hallmarkv1.FeedService_FollowServer) error {
	ctx := stream.Context()
	p := feed.Peer{Node: callerFrom(ctx).ID}
	if from, ok := peer.FromContext(ctx); ok {
		p.Address = from.Addr.String()
		if client, ok := from.AuthInfo.(*tlsPeer); ok {
			p.Verify = func(v *registry.View) error { return client.verify(v, s.now()) }
		}
	}
	err := s.feed.Follow(ctx, stream, p)
	switch {
	case errors.Is(err, feed.ErrNodeGone):
		if err := admitted(s.registry.View(), p.Node); err != nil {
			return err
		}
		return errNotActive // deleted, and attested again already
	case errors.Is(err, feed.ErrUntrusted):
		return unverified(err)
	case errors.Is(err, feed.ErrReplaced):
		return callErrorf(codes.Aborted, "%v", err)
	case errors.Is(err, feed.ErrSlow):
		return callErrorf(codes.DeadlineExceeded, "%v", err)
	case errors.Is(err, feed.ErrBehind):
		return callErrorf(codes.Unavailable, "%v", err)
	case errors.Is(err, feed.ErrProtocol):
		return invalidArgument("%v", err)
	}
	return status(err)
}
