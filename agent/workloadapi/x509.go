package workloadapi

import (
	"bytes"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
)

const (
	// firstWait is how long a stream waits for X509-SVIDs that are being
	// signed before it sends its first message without them, or ends.
	firstWait = 10 * time.Second
	// replaceWait is how long a stream whose only identity was taken away
	// stays open for another that is being signed. No message says "none"
	// (Workload API §5.2.1), so otherwise the stream ends.
	replaceWait = time.Second
)

var errNotSigned = status.Error(codes.Unavailable, "no X509-SVID could be signed yet; try again later")

// FetchX509SVID sends the caller's X509-SVIDs with bundles, now and whenever
// anything of them changes. The first message waits until all are signed, or
// cannot be.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	c, selectors, err := s.identify(stream.Context())
	if err != nil {
		return err
	}
	sub := s.o.Held.Subscribe(selectors)
	defer sub.Close()
	var (
		sent encoded
		wait <-chan time.Time // nil: for nothing
		over bool             // it was in vain
	)
	for {
		if err := c.peer.Alive(); err != nil {
			return s.ended(c, err)
		}
		u := sub.Update()
		if len(u.Identities) == 0 {
			return s.noEntry(c, selectors)
		}
		response, _ := u.Memo(x509SVIDs, func() any { return encodeX509SVIDs(u) }).(encoded)
		switch {
		case response != nil && (sent != nil || u.Ready || over):
			if !bytes.Equal(sent, response) {
				if err := stream.SendMsg(response); err != nil {
					return err
				}
				sent = response
			}
			wait, over = nil, false
		case over, sent != nil && u.Ready:
			return errNotSigned
		case wait == nil && sent == nil:
			wait = time.After(firstWait)
		case wait == nil:
			wait = time.After(replaceWait)
		}
		select {
		case <-sub.C:
		case <-wait:
			over = true
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-s.stopping:
			return errStopped
		}
	}
}

// Keys of an update's memos.
type memoKey int

const (
	x509SVIDs memoKey = iota
	x509Bundles
	jwtBundles
)

// encodeX509SVIDs returns nil if there is nothing that may be sent: a message
// has at least one X509-SVID, each with a bundle.
func encodeX509SVIDs(u *held.Update) encoded {
	if !hasX509(u.Bundle) {
		return nil
	}
	m := &workload.X509SVIDResponse{FederatedBundles: make(map[string][]byte, len(u.Federated))}
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
	addX509(m.FederatedBundles, u.Federated...)
	return encode(m)
}

func hasX509(b *bundle.Bundle) bool { return b != nil && len(b.X509Authorities) > 0 }

// addX509 adds bundles that have X.509 authorities. The keys are IDs of trust
// domains, without a final slash.
func addX509(m map[string][]byte, bundles ...*bundle.Bundle) {
	for _, b := range bundles {
		if hasX509(b) {
			m[b.TrustDomain.IDString()] = b.DER()
		}
	}
}

// FetchX509Bundles sends the X.509 bundles of the caller's trust domain and of
// those that its entries federate with, now and whenever they change.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return s.sendBundles(stream, x509Bundles, func(u *held.Update) encoded {
		if !hasX509(u.Bundle) {
			return nil
		}
		m := &workload.X509BundlesResponse{Bundles: make(map[string][]byte, 1+len(u.Federated))}
		addX509(m.Bundles, u.Bundle)
		addX509(m.Bundles, u.Federated...)
		return encode(m)
	})
}

// sendBundles sends what encode makes of an update; nil is nothing yet.
func (s *Server) sendBundles(stream grpc.ServerStream, key memoKey, encode func(*held.Update) encoded) error {
	c, selectors, err := s.identify(stream.Context())
	if err != nil {
		return err
	}
	sub := s.o.Held.SubscribeBundles(selectors)
	defer sub.Close()
	var sent encoded
	for {
		if err := c.peer.Alive(); err != nil {
			return s.ended(c, err)
		}
		u := sub.Update()
		if len(u.Entries) == 0 {
			return s.noEntry(c, selectors)
		}
		response, _ := u.Memo(key, func() any { return encode(u) }).(encoded)
		if response == nil {
			return errNotYet
		}
		if !bytes.Equal(sent, response) {
			if err := stream.SendMsg(response); err != nil {
				return err
			}
			sent = response
		}
		select {
		case <-sub.C:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case <-s.stopping:
			return errStopped
		}
	}
}
