package feed

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// Stream is the server's end of one call of FeedService.Follow. Send and Recv
// fail once Follow has returned.
type Stream interface {
	Send(*hallmarkv1.FollowResponse) error
	Recv() (*hallmarkv1.FollowRequest, error)
}

// Peer is the agent at the other end.
type Peer struct {
	Node    spiffeid.ID
	Address string // host:port, for the operator to read
	// Verify verifies the agent's SVID against the own bundle of a view. It is
	// asked at the start and whenever that bundle has changed. Nil: never.
	Verify func(*registry.View) error
}

// stream is the one stream of an agent.
type stream struct {
	feed        *Feed
	node        spiffeid.ID
	address     string
	verify      func(*registry.View) error // nil: nothing to verify
	connectedAt time.Time
	sub         *registry.Subscription
	end         context.CancelCauseFunc
	look        chan struct{} // asks push to look at everything up to now
	hello       chan *hallmarkv1.FollowRequest

	held held                // push's own
	by   *bundle.Bundle      // push's own; that against which the agent's SVID was verified
	told *hallmarkv1.Servers // push's own; what the agent knows of the servers

	mu       sync.Mutex
	version  string         // of the agent
	position store.Revision // push has looked at everything up to here
	sent     store.Revision // of the last change that was sent
	acked    store.Revision // by the agent
	behind   time.Time      // since when it has not acknowledged all that was sent
	closed   bool
	waiting  []chan struct{} // closed when any of the above changes
}

// Follow serves the stream of an agent until the agent ends it (nil), the
// context ends (its cause), or the stream has to end (one of the errors above,
// or one of the stream's own).
//
// It returns even while a Send or Recv is blocked; the goroutine that does it
// then ends when the caller has ended the call. [Feed.Wait] waits for it.
func (f *Feed) Follow(ctx context.Context, g Stream, p Peer) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	s := &stream{
		feed:        f,
		node:        p.Node,
		address:     p.Address,
		verify:      p.Verify,
		connectedAt: f.now(),
		end:         end,
		look:        make(chan struct{}, 1),
		hello:       make(chan *hallmarkv1.FollowRequest, 1),
	}
	defer f.leave(s)
	defer s.close()
	f.running.Go(func() { end(s.receive(ctx, g)) })
	if err := s.push(ctx, g); err != io.EOF {
		return err
	}
	return nil
}

// receive reads what the agent has, then its acknowledgements. io.EOF is the
// agent's end of the stream.
func (s *stream) receive(ctx context.Context, g Stream) error {
	hello, err := g.Recv()
	if err != nil {
		return err
	}
	switch {
	case hello.Revision < 0:
		return fmt.Errorf("%w: revision %d is negative", ErrProtocol, hello.Revision)
	case len(hello.Digest) != 0 && len(hello.Digest) != digest.Size:
		return fmt.Errorf("%w: digest has %d bytes; it must have %d", ErrProtocol, len(hello.Digest), digest.Size)
	case len(hello.AgentVersion) > maxVersion:
		return fmt.Errorf("%w: agent version is %d characters long; the most is %d", ErrProtocol, len(hello.AgentVersion), maxVersion)
	}
	s.hello <- hello
	if err := s.recordVersion(ctx, hello.AgentVersion); err != nil && ctx.Err() == nil {
		s.feed.log.Warn("an agent's version could not be recorded", "agent", s.node.String(), "error", err)
	}
	for {
		req, err := g.Recv()
		if err != nil {
			return err
		}
		if err := s.acknowledge(store.Revision(req.Revision)); err != nil {
			return err
		}
	}
}

// recordVersion keeps the version of an agent with its node, for the operator.
func (s *stream) recordVersion(ctx context.Context, version string) error {
	n := s.feed.registry.View().Node(s.node)
	if n == nil || version == "" || n.AgentVersion == version {
		return nil
	}
	_, err := s.feed.registry.UpdateNode(ctx, s.node, func(n *registry.Node) error {
		n.AgentVersion = version
		return nil
	})
	return err
}

// push sends what the agent lacks, then each change.
func (s *stream) push(ctx context.Context, g Stream) error {
	hello, err := s.awaitHello(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.version = hello.AgentVersion
	s.mu.Unlock()

	s.sub = s.feed.registry.Subscribe(s.node)
	defer s.sub.Close()
	s.feed.enter(s)
	w := &writer{ctx: ctx, stream: g, running: &s.feed.running, admitted: s.admitted, servers: s.servers, message: &hallmarkv1.FollowResponse{}}

	// Whatever is noted after this view is sent as a change of it.
	view, _ := s.sub.Take()
	if err := s.start(view, hello, w); err != nil {
		return err
	}
	silence := time.NewTimer(Heartbeat)
	defer silence.Stop()
	for {
		beat := false
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.sub.C:
		case <-s.look:
		case <-silence.C:
			beat = true
		}
		view, delta := s.sub.Take()
		if delta.NodeGone {
			return ErrNodeGone
		}
		if err := s.trusted(view, delta.Revoked || delta.Resync); err != nil {
			if failed := s.farewell(view, w); failed != nil {
				return failed
			}
			return err
		}
		said, err := s.change(view, delta, w)
		if err == nil && !said && (beat || s.told != s.feed.servers.Load()) {
			said, err = true, w.beat(view.Revision(), s.held.sum)
		}
		if err != nil {
			return err
		}
		if said {
			silence.Reset(Heartbeat)
		}
	}
}

func (s *stream) awaitHello(ctx context.Context) (*hallmarkv1.FollowRequest, error) {
	timer := time.NewTimer(HelloTimeout)
	defer timer.Stop()
	select {
	case hello := <-s.hello:
		return hello, nil
	case <-timer.C:
		return nil, fmt.Errorf("%w: it did not say what it has within %v", ErrSlow, HelloTimeout)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// admitted fails once the node was banned or deleted.
func (s *stream) admitted() error {
	if n := s.feed.registry.View().Node(s.node); n == nil || n.Banned {
		return ErrNodeGone
	}
	return nil
}

// trusted fails once the agent's SVID verifies no more: it or its authority was
// revoked, so whoever is at the other end may be anybody. crls is whether CRLs
// may have changed.
func (s *stream) trusted(view *registry.View, crls bool) error {
	own := view.Bundle(view.TrustDomain())
	if s.verify == nil || own == s.by && !crls {
		return nil
	}
	if err := s.verify(view); err != nil {
		return fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	s.by = own
	return nil
}

// farewell sends the own bundle, the CRLs and the status lists, which anyone may have, as the last
// thing on the stream of an agent that is not trusted any more: its workloads
// learn at once whom not to trust, even if it cannot come back.
func (s *stream) farewell(view *registry.View, w *writer) error {
	var d difference
	s.held.reconcile(view, map[spiffeid.TrustDomain]bool{view.TrustDomain(): true}, &d)
	s.held.takeRevoked(view, &d)
	if d.empty() {
		return nil
	}
	s.moved(view.Revision(), true)
	if err := s.write(d, w); err != nil {
		return err
	}
	return w.finish(view.Revision(), s.held.sum)
}

// start sends the whole set, unless the agent has it.
func (s *stream) start(view *registry.View, hello *hallmarkv1.FollowRequest, w *writer) error {
	if err := s.admitted(); err != nil {
		return err
	}
	if err := s.trusted(view, true); err != nil {
		return err
	}
	has := store.Revision(hello.Revision)
	if has > view.Revision() {
		if err := s.catchUp(w.ctx); err != nil {
			return err
		}
		view, _ = s.sub.Take()
	}
	rev := view.Revision()
	s.held = newHeld(view.TrustDomain())
	s.held.takes, s.held.takesLists = hello.TakesCrls, hello.TakesStatusLists
	w.complete, w.defaults = true, s.feed.defaults
	// The digest says whether the agent holds this very set. A revision that is
	// still ahead of the store's means that the store was set back: numbers and times
	// may then agree by chance.
	first := s.held.difference(view, s.node, s.feed.now())
	if has > 0 && has <= rev && string(hello.Digest) == string(s.held.sum[:]) {
		s.moved(rev, false)
		w.complete = false
		return w.beat(rev, s.held.sum)
	}
	s.moved(rev, true)
	if err := s.write(first, w); err != nil {
		return err
	}
	return w.finish(rev, s.held.sum)
}

// catchUp makes sure that this server shows all that any server has written. If
// an agent comes from another one, to send it an older set would bring back what
// was deleted.
func (s *stream) catchUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, CatchUpTime)
	defer cancel()
	if err := s.feed.registry.CatchUp(ctx); err != nil {
		return fmt.Errorf("%w (%v)", ErrBehind, err)
	}
	return nil
}

// servers returns where the servers are, if the agent has not been told; else
// nil.
func (s *stream) servers() *hallmarkv1.Servers {
	now := s.feed.servers.Load()
	if now == s.told {
		return nil
	}
	s.told = now
	return now
}

// change sends what a delta means for the agent. said is whether that was
// anything.
func (s *stream) change(view *registry.View, delta registry.Delta, w *writer) (said bool, err error) {
	now := s.feed.now()
	var d difference
	if delta.Resync {
		d = s.held.difference(view, s.node, now)
	} else {
		d = s.held.change(view, s.node, now, delta)
	}
	said = !d.empty()
	s.moved(view.Revision(), said)
	if !said {
		return false, nil
	}
	if err := s.write(d, w); err != nil {
		return true, err
	}
	return true, w.finish(view.Revision(), s.held.sum)
}

func (s *stream) write(d difference, w *writer) error {
	for _, b := range d.bundles {
		rec, err := s.feed.bundleRecord(b)
		if err != nil {
			return err
		}
		if err := w.bundle(rec); err != nil {
			return err
		}
	}
	for _, e := range d.entries {
		if err := w.entry(e.Record()); err != nil {
			return err
		}
	}
	for _, id := range d.goneEntries {
		if err := w.goneEntry(id); err != nil {
			return err
		}
	}
	for _, td := range d.goneBundles {
		if err := w.goneBundle(td.Name()); err != nil {
			return err
		}
	}
	for _, c := range d.crls {
		if err := w.crl(&hallmarkv1.CRL{AuthorityId: c.AuthorityID, Number: c.Number, Der: c.DER}); err != nil {
			return err
		}
	}
	for _, id := range d.goneCRLs {
		if err := w.goneCRL(id); err != nil {
			return err
		}
	}
	for _, l := range d.lists {
		if err := w.revokedTokens(&hallmarkv1.RevokedTokens{ListId: l.ID, Revision: int64(l.Revision()), Bits: l.Bits}); err != nil {
			return err
		}
	}
	for _, id := range d.goneLists {
		if err := w.goneRevokedTokens(id); err != nil {
			return err
		}
	}
	return nil
}

// moved notes that push has looked at everything up to a revision, and whether
// it has something to send about it. It comes before the sending, so that no
// acknowledgement is ahead of it.
func (s *stream) moved(rev store.Revision, sends bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.position = rev
	if sends {
		if s.acked >= s.sent {
			s.behind = s.feed.now()
		}
		s.sent = rev
	}
	s.wake()
}

func (s *stream) acknowledge(rev store.Revision) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if rev > s.position {
		return fmt.Errorf("%w: it acknowledges revision %d, but was sent %d at most", ErrProtocol, rev, s.position)
	}
	if s.acked < s.sent && rev >= s.sent {
		s.feed.metrics.PushStep.Observe(s.feed.now().Sub(s.behind).Seconds())
	}
	s.acked = max(s.acked, rev)
	s.wake()
	return nil
}

func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.wake()
}

// wake lets those who wait look again.
func (s *stream) wake() {
	for _, c := range s.waiting {
		close(c)
	}
	s.waiting = nil
}

// lookAgain has push look at everything up to now.
func (s *stream) lookAgain() {
	select {
	case s.look <- struct{}{}:
	default:
	}
}

func (s *stream) inStep(rev store.Revision) (in, closed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inStepLocked(rev), s.closed
}

func (s *stream) inStepLocked(rev store.Revision) bool {
	return s.acked >= rev || s.position >= rev && s.acked >= s.sent
}

// await waits until the agent is in step with a revision, or gone (false).
func (s *stream) await(ctx context.Context, rev store.Revision) (bool, error) {
	for {
		s.mu.Lock()
		switch {
		case s.closed:
			s.mu.Unlock()
			return false, nil
		case s.inStepLocked(rev):
			s.mu.Unlock()
			return true, nil
		}
		c := make(chan struct{})
		s.waiting = append(s.waiting, c)
		s.mu.Unlock()
		s.lookAgain() // it may not be concerned, and not know
		select {
		case <-c:
		case <-ctx.Done():
			return false, context.Cause(ctx)
		}
	}
}

func (s *stream) connection() Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := Connection{
		Node:         s.node,
		Acknowledged: s.acked,
		ConnectedAt:  s.connectedAt,
		AgentVersion: s.version,
		Address:      s.address,
		Behind:       s.acked < s.sent,
	}
	if !c.Behind {
		c.Acknowledged = max(s.acked, s.position)
	}
	return c
}
