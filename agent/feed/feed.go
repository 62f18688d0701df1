// Package feed follows the server's push stream and applies what it says.
//
// A [Feed] holds the agent's one stream (hallmark.v1.FeedService): it says what
// the node holds already, takes each step of changes, gives it to agent/held
// (and the own trust domain's bundle to agent/node), compares digests, and
// acknowledges. When the stream or the connection ends it starts again from
// where it was; when the digests differ it asks for the whole.
package feed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/version"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const (
	// Silence is how long a stream may say nothing: three times what the
	// server promises. Then the connection is taken for dead and made anew.
	Silence = 90 * time.Second
	// stableAfter is how long a stream must be in step for the next failure
	// to be a first one again.
	stableAfter = 10 * time.Second
	maxVersion  = 255 // characters of the agent's version; feed.proto
)

// Node is what the feed needs of agent/node.
type Node interface {
	Link(ctx context.Context) (*node.Link, error)
	SetBundle(b *bundle.Bundle) error
	SetServers(*hallmarkv1.Servers)
}

// Held is what the feed needs of agent/held.
type Held interface {
	Apply(c held.Change)
	Digest() []byte
	Revision() int64
}

// Options of [New]. TrustDomain, Node and Held are required.
type Options struct {
	TrustDomain spiffeid.TrustDomain // the own one
	Node        Node
	Held        Held
	Now         func() time.Time // nil is time.Now
	Log         *slog.Logger     // nil is silent
}

// Status says how the feed is.
type Status struct {
	InStep    bool      // the stream is open, and what is held is what the server says
	LastError error     // why it is not in step; nil while it is
	Drifts    int       // how often digests differed since the start
	SyncedAt  time.Time // when what is held was last found to be what the server says; zero: never
}

// Feed follows the push stream. Make one with [New].
type Feed struct {
	o Options

	// Run's own.
	agent  spiffeid.ID // whose authorized set is held
	whole  bool        // what is held is not to be built upon
	unread unread

	mu     sync.Mutex
	status Status
}

// New makes a feed that does nothing until [Feed.Run].
func New(o Options) *Feed {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Feed{o: o, unread: make(unread)}
}

// Status says how the feed is.
func (f *Feed) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// Run follows the stream until ctx ends, whatever happens to server and
// connection.
func (f *Feed) Run(ctx context.Context) error {
	var backoff node.Backoff
	for {
		link, err := f.o.Node.Link(ctx)
		if err != nil {
			return err
		}
		steadySince, err := f.follow(ctx, link)
		done := link.Done()
		link.Report(err)
		if status.Code(err) == codes.Unavailable { // it is going away, or behind the others
			link.Elsewhere(err)
		}
		link.Release()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		f.failed(err)
		if !steadySince.IsZero() && f.o.Now().Sub(steadySince) >= stableAfter {
			backoff.Reset()
		}
		// A new link is a new chance, and the node has spaced it out already.
		timer := time.NewTimer(backoff.Next())
		select {
		case <-timer.C:
		case <-done:
			backoff.Reset()
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// Why a stream ends that no error of gRPC's describes.
var (
	errLinkDone = errors.New("the connection was lost or replaced")
	errSilence  = fmt.Errorf("the server said nothing for %v", Silence)
	errDrift    = errors.New("what this node holds differs from what the server says; asking for the whole")
)

// follow opens the stream on a link and follows it to its end. It returns when
// it came into step (zero: never) and why it ended.
func (f *Feed) follow(ctx context.Context, link *node.Link) (steadySince time.Time, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel(nil)
	watching.Go(func() {
		select {
		case <-link.Done():
			cancel(errLinkDone)
		case <-ctx.Done():
		}
	})
	silence := time.AfterFunc(Silence, func() {
		cancel(errSilence)
		link.Break(errSilence) // a half-open connection would swallow the next stream, too
	})
	defer silence.Stop()

	stream, err := hallmarkv1.NewFeedServiceClient(link.Conn()).Follow(ctx)
	if err != nil {
		return steadySince, cause(ctx, err)
	}
	hello := f.hello(link.ID())
	if err := stream.Send(hello); err != nil && err != io.EOF { // io.EOF: Recv says why
		return steadySince, cause(ctx, err)
	}
	var s step
	for {
		response, err := stream.Recv()
		if err != nil {
			return steadySince, cause(ctx, err)
		}
		silence.Reset(Silence)
		if err := s.add(response); err != nil {
			return steadySince, err
		}
		if response.More {
			continue
		}
		if hello.Revision == 0 && steadySince.IsZero() && !s.change.Complete {
			return steadySince, errors.New("server sent changes to an agent that asked for the whole")
		}
		if err := f.apply(s, response.Digest); err != nil {
			return steadySince, err
		}
		f.agent, f.whole = link.ID(), false
		f.synced()
		if err := stream.Send(&hallmarkv1.FollowRequest{Revision: s.change.Revision}); err != nil && err != io.EOF {
			return steadySince, cause(ctx, err)
		}
		if steadySince.IsZero() {
			steadySince = f.o.Now()
			f.inStep(s.change.Revision)
		}
		s = step{}
	}
}

// hello is the first message of a stream.
func (f *Feed) hello(agent spiffeid.ID) *hallmarkv1.FollowRequest {
	v := version.String()
	if len(v) > maxVersion {
		v = v[:maxVersion]
	}
	hello := &hallmarkv1.FollowRequest{AgentVersion: v, TakesCrls: true, TakesStatusLists: true}
	if agent == f.agent && !f.whole { // what another agent was authorized for is no base
		hello.Revision = f.o.Held.Revision()
		sum := f.digest()
		hello.Digest = sum[:]
	}
	return hello
}

// apply makes a step's change and compares the outcome with the server's word.
func (f *Feed) apply(s step, want []byte) error {
	if len(want) != digest.Size {
		return fmt.Errorf("server sent a digest of %d bytes; it must have %d", len(want), digest.Size)
	}
	for _, err := range s.errors {
		f.o.Log.Error("server sent what this agent cannot read; it goes on without", "error", err)
	}
	if s.servers != nil {
		f.o.Node.SetServers(s.servers)
	}
	f.unread.take(&s)
	// The node's bundle goes first: what is signed because of this change is
	// verified by it.
	for _, b := range s.change.Bundles {
		if b.TrustDomain == f.o.TrustDomain {
			if err := f.o.Node.SetBundle(b); err != nil {
				f.o.Log.Error("server sent a bundle that cannot be used", "error", err)
			}
		}
	}
	f.o.Held.Apply(s.change)
	if got := f.digest(); string(got[:]) != string(want) {
		f.whole = true
		f.mu.Lock()
		f.status.Drifts++
		f.mu.Unlock()
		return fmt.Errorf("%w (revision %d, digest %s, server's %x)", errDrift, s.change.Revision, got, want)
	}
	return nil
}

// digest is that of all the server sent: what is held, and what could not be
// read.
func (f *Feed) digest() digest.Sum {
	sum := digest.Sum(f.o.Held.Digest())
	f.unread.addTo(&sum)
	return sum
}

func (f *Feed) synced() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.status.SyncedAt = f.o.Now()
}

func (f *Feed) inStep(revision int64) {
	f.mu.Lock()
	f.status.InStep, f.status.LastError = true, nil
	f.mu.Unlock()
	f.o.Log.Info("in step with the server", "revision", revision)
}

func (f *Feed) failed(err error) {
	f.mu.Lock()
	last := f.status.LastError
	f.status.InStep, f.status.LastError = false, err
	f.mu.Unlock()
	level := slog.LevelWarn
	if errors.Is(err, errLinkDone) || last != nil && last.Error() == err.Error() {
		level = slog.LevelDebug // the node has said it, or it was said before
	}
	f.o.Log.Log(context.Background(), level, "push stream ended", "error", err)
}

// cause replaces the error of a stream that this side ended by the reason, and
// says plainly what an orderly end is.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == io.EOF {
		return errors.New("the server ended it")
	}
	if status.Code(err) == codes.Unimplemented {
		return fmt.Errorf("the server does not offer it; it must be a Hallmark server of this version or a later one: %w", err)
	}
	return err
}
