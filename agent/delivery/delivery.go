// Package delivery hands what is held for a workload to whoever may have it:
// to the workload itself (the Workload API), or to a process that is trusted to
// fetch it on the workload's behalf (the Broker API, SPIRE's Delegated Identity
// API). Those differ in who asks and in the wire messages; when something is
// sent, and what it is made of, is the same and is here.
//
// A [Share] says what may be had: [Share.Follow] streams X509-SVIDs,
// [Share.FollowWIT] WIT-SVIDs, [Share.FollowBundles] bundles, [Share.JWTs] has
// JWT-SVIDs signed.
package delivery

import (
	"bytes"
	"context"
	"errors"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

const (
	// firstWait is how long a stream waits for SVIDs that are being signed
	// before it sends its first message without them, or ends.
	firstWait = 10 * time.Second
	// replaceWait is how long a stream whose only identity was taken away
	// stays open for another that is being signed. No message says "none"
	// (Workload API §5.2.1), so otherwise the stream ends.
	replaceWait = time.Second
)

var errNotSigned = status.Error(codes.Unavailable, "no SVID could be signed yet; try again later")

// ErrNone says that nothing is there to be had.
var ErrNone = errors.New("no entry matches")

// Share is what somebody may have of what is held: that of the entries that
// match a workload's selectors.
type Share struct {
	Held      *held.Held
	Selectors selector.Set
	// Only, if set, says which of the entries.
	Only func(*entry.Entry) bool
}

// Delegable reports whether an SVID of the entry may go to somebody who asks on
// its workload's behalf. One that administers the trust domain, or that signs
// for a domain below, may not: whoever fetches identities of a node must not
// become more than the node is.
func Delegable(e *entry.Entry) bool { return !e.Admin && !e.Downstream }

// Look returns the share as it is now. It signs nothing.
func (s Share) Look() *held.Update { return s.of(s.Held.Look(s.Selectors)) }

func (s Share) of(u *held.Update) *held.Update {
	if s.Only == nil {
		return u
	}
	return u.Only(s.Only)
}

// Stream is where a share goes.
type Stream struct {
	Send func(any) error // of the gRPC stream
	// Check is asked before each message; its error ends the stream.
	Check func() error
	// None makes the error that a stream ends with while there is nothing to be
	// had. Nil: then too it has a message.
	None func() error
	// Record, if set, is told what is about to be sent: nothing goes out that is
	// not on record.
	Record func(*held.Update)
}

// Follow sends what encode makes of the share, now and whenever anything of it
// changes. The first message waits until all X509-SVIDs are signed, or cannot
// be. Encode returns nil while there is nothing that may be sent.
func (s Share) Follow(ctx context.Context, to Stream, encode func(*held.Update) endpoint.Encoded) error {
	return s.follow(ctx, to, s.Held.Subscribe, func(u *held.Update) state {
		return state{none: len(u.Identities) == 0, message: encode(u), ready: u.Ready}
	})
}

// state is what a stream of SVIDs has to say of an update.
type state struct {
	none    bool             // no identity is there
	message endpoint.Encoded // nil: there is nothing that may be sent
	ready   bool             // nothing better is to be had at once
	never   error            // why nothing will be there soon; nil: it may
}

// subscribe is one of [held.Held]'s ways to follow SVIDs.
type subscribe func(context.Context, selector.Set) *held.Subscription

// follow sends what a subscription's updates say, now and whenever that
// changes. The first message waits until all SVIDs are signed, or cannot be.
func (s Share) follow(ctx context.Context, to Stream, subscribe subscribe, read func(*held.Update) state) error {
	sub := subscribe(ctx, s.Selectors)
	defer sub.Close()
	var (
		sent endpoint.Encoded
		wait <-chan time.Time // nil: for nothing
		over bool             // it was in vain
	)
	for {
		if err := to.Check(); err != nil {
			return err
		}
		u := s.of(sub.Update())
		is := read(u)
		switch {
		case is.none && to.None != nil:
			return to.None()
		case is.never != nil:
			return is.never
		case is.message != nil && (sent != nil || is.ready || over):
			if err := to.send(is.message, &sent, u); err != nil {
				return err
			}
			wait, over = nil, false
		case over, sent != nil && is.ready:
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
		case <-ctx.Done():
			return endpoint.Ended(ctx)
		}
	}
}

// FollowBundles sends what encode makes of the share's bundles, now and
// whenever they change. Encode returns nil if the own one is not known.
func (s Share) FollowBundles(ctx context.Context, to Stream, encode func(*held.Update) endpoint.Encoded) error {
	sub := s.Held.SubscribeBundles(s.Selectors)
	defer sub.Close()
	return to.follow(ctx, sub.C, func() (endpoint.Encoded, *held.Update, error) {
		u := s.of(sub.Update())
		if len(u.Entries) == 0 && to.None != nil {
			return nil, nil, to.None()
		}
		return encode(u), u, nil
	})
}

// FollowAllBundles sends what encode makes of all bundles that are held, now
// and whenever they change. Encode returns nil if the own one is not known.
func FollowAllBundles(ctx context.Context, h *held.Held, to Stream, encode func([]*bundle.Bundle) endpoint.Encoded) error {
	watch := h.WatchBundles()
	defer watch.Close()
	return to.follow(ctx, watch.C, func() (endpoint.Encoded, *held.Update, error) {
		return encode(watch.Bundles()), nil, nil
	})
}

// follow sends what next returns, now and whenever changed receives.
func (to Stream) follow(ctx context.Context, changed <-chan struct{}, next func() (endpoint.Encoded, *held.Update, error)) error {
	var sent endpoint.Encoded
	for {
		if err := to.Check(); err != nil {
			return err
		}
		message, u, err := next()
		switch {
		case err != nil:
			return err
		case message == nil:
			return endpoint.ErrNotReady
		}
		if err := to.send(message, &sent, u); err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return endpoint.Ended(ctx)
		}
	}
}

// send sends a message unless it is the same as the last one.
func (to Stream) send(message endpoint.Encoded, last *endpoint.Encoded, u *held.Update) error {
	if *last != nil && bytes.Equal(*last, message) {
		return nil
	}
	if to.Record != nil {
		to.Record(u)
	}
	if err := to.Send(message); err != nil {
		return err
	}
	*last = message
	return nil
}

// HasX509 reports whether a bundle is known and has X.509 authorities.
func HasX509(b *bundle.Bundle) bool { return b != nil && len(b.X509Authorities) > 0 }

// X509Bundles returns bundles as the standard's messages carry them: DER, by
// the ID of the trust domain, without a final slash. One without X.509
// authorities is left out.
func X509Bundles(bundles ...*bundle.Bundle) map[string][]byte {
	m := make(map[string][]byte, len(bundles))
	for _, b := range bundles {
		if HasX509(b) {
			m[b.TrustDomain.IDString()] = b.DER()
		}
	}
	return m
}

// JWTBundles returns bundles as the standard's messages carry them: plain JWK
// sets, by the ID of the trust domain.
func JWTBundles(bundles ...*bundle.Bundle) map[string][]byte {
	m := make(map[string][]byte, len(bundles))
	for _, b := range bundles {
		m[b.TrustDomain.IDString()] = b.JWKS()
	}
	return m
}

// Bundles returns the update's bundles, the own one first.
func Bundles(u *held.Update) []*bundle.Bundle {
	return append([]*bundle.Bundle{u.Bundle}, u.Federated...)
}
