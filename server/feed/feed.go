// Package feed pushes to each agent what it is authorized for, as it changes.
//
// A [Feed] serves the one stream that each connected agent holds
// ([Feed.Follow], the body of hallmark.v1.FeedService): first what the agent
// lacks, then each change as the registry tells of it. Agents acknowledge what
// they have applied, so [Feed.WaitAcked] can say when a change has reached all
// of them and [Feed.Connections] how far each is.
//
// # What a stream remembers
//
// A stream knows exactly what its agent holds: a map from entry ID to the
// registry's own entry (a pointer, so an entry costs some 40 bytes a stream
// and its content nothing), the bundles likewise, and their running digest. A
// change, even one that moves a whole subtree, is therefore sent as a
// difference, and the digest of a heartbeat is at hand whatever the size of
// the set.
//
// # When an agent is in step
//
// Most revisions do not concern most agents, and those agents hear nothing of
// them. An agent is in step with revision R if it has acknowledged R or a
// later one, or if its stream has looked at everything up to R or later, found
// nothing more to send, and all that was sent is acknowledged.
package feed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// Bounds of one stream.
const (
	// Heartbeat is how long a stream is silent at most. Agents take a stream
	// that is silent for longer to be broken.
	Heartbeat = 25 * time.Second
	// SendTimeout is how long an agent may leave a message unread before its
	// stream is ended. Changes add up meanwhile and cost nothing.
	SendTimeout = 60 * time.Second
	// HelloTimeout is how long an agent has for its first message.
	HelloTimeout = 10 * time.Second
	// CatchUpTime is how long a server that shares its store may need to show
	// what an agent has from another one. Agents go on to the next after it.
	CatchUpTime = 3 * time.Second

	maxMessage = 256 << 10 // bytes of one message, unless one record is larger
	maxVersion = 255       // characters of an agent's version
)

// Errors that end a stream.
var (
	// ErrNodeGone: the node was banned or deleted.
	ErrNodeGone = errors.New("the node was banned or deleted")
	// ErrUntrusted: the agent's SVID verifies no more, as an authority was
	// revoked. It is wrapped.
	ErrUntrusted = errors.New("the agent's SVID verifies no more")
	// ErrSlow: the agent does not read, or did not say what it has.
	ErrSlow = errors.New("the agent is too slow")
	// ErrReplaced: the agent has opened another stream, which takes the place of
	// this one.
	ErrReplaced = errors.New("the agent has opened another stream")
	// ErrBehind: the agent has seen changes that this server has not, and the store
	// does not answer. It is wrapped.
	ErrBehind = errors.New("this server is behind what the agent has from another; try one that reaches the others")
	// ErrProtocol: the agent sent what makes no sense. It is wrapped.
	ErrProtocol = errors.New("malformed message of the agent")
)

// Options are what a feed is made of.
type Options struct {
	Registry *registry.Registry
	X509TTL  time.Duration    // the trust domain's default lifetimes, told to agents; whole seconds
	JWTTTL   time.Duration    //
	Now      func() time.Time // nil: time.Now
	Log      *slog.Logger     // nil: none
	Metrics  *metrics.Metrics // nil: none
}

// Feed serves the push streams of all connected agents.
type Feed struct {
	registry *registry.Registry
	defaults *hallmarkv1.Defaults
	now      func() time.Time
	log      *slog.Logger
	metrics  *metrics.Metrics
	running  sync.WaitGroup                     // goroutines of streams
	servers  atomic.Pointer[hallmarkv1.Servers] // nil: this one is alone

	mu      sync.Mutex
	streams map[spiffeid.ID]*stream // one a node
	records map[spiffeid.TrustDomain]bundleRecord
}

type bundleRecord struct {
	of     *bundle.Bundle
	record *hallmarkv1.Bundle
}

// New makes a feed.
func New(o Options) *Feed {
	f := &Feed{
		registry: o.Registry,
		defaults: &hallmarkv1.Defaults{X509SvidTtl: int32(o.X509TTL / time.Second), JwtSvidTtl: int32(o.JWTTTL / time.Second)},
		now:      o.Now,
		log:      o.Log,
		metrics:  o.Metrics,
		streams:  make(map[spiffeid.ID]*stream),
		records:  make(map[spiffeid.TrustDomain]bundleRecord),
	}
	if f.now == nil {
		f.now = time.Now
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if f.metrics == nil {
		f.metrics = metrics.New(nil)
	}
	return f
}

// SetServers says where the servers are that share the store, this one among
// them: host:port of each. All agents are told.
func (f *Feed) SetServers(s *hallmarkv1.Servers) {
	s.Addresses = slices.Compact(slices.Sorted(slices.Values(s.Addresses)))
	if proto.Equal(f.servers.Load(), s) {
		return
	}
	f.servers.Store(s)
	for _, s := range f.all() {
		s.lookAgain()
	}
}

// Wait waits until no goroutine of a stream is left. Call it once the
// transport has ended all streams.
func (f *Feed) Wait() { f.running.Wait() }

// Connection is an agent that holds a stream.
type Connection struct {
	Node         spiffeid.ID
	Acknowledged store.Revision // the newest with which the agent is known to be in step
	ConnectedAt  time.Time
	AgentVersion string
	Address      string // host:port of the agent
	Behind       bool   // it has not acknowledged all that was sent to it
}

// Connections returns the agents that hold a stream, by ID.
func (f *Feed) Connections() []Connection {
	streams := f.all()
	out := make([]Connection, len(streams))
	for i, s := range streams {
		out[i] = s.connection()
	}
	return out
}

// Behind returns how many agents hold a stream and have not acknowledged all
// that was sent to them.
func (f *Feed) Behind() (agents int) {
	for _, s := range f.all() {
		s.mu.Lock()
		if s.acked < s.sent {
			agents++
		}
		s.mu.Unlock()
	}
	return agents
}

func (f *Feed) all() []*stream {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]*stream, 0, len(f.streams))
	for _, s := range f.streams {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *stream) int { return cmp.Compare(a.node.String(), b.node.String()) })
	return out
}

// WaitAcked waits until every agent that is connected is in step with a
// revision, which a write of the registry has returned, and returns how many
// they are. An agent that connects meanwhile gets at least that revision
// first; one that goes away is not waited for. The error says how many agents
// are not in step when the context ends.
func (f *Feed) WaitAcked(ctx context.Context, rev store.Revision) (agents int, err error) {
	streams := f.all()
	for _, s := range streams {
		in, err := s.await(ctx, rev)
		if err != nil {
			return agents, behind(streams, rev, err)
		}
		if in {
			agents++
		}
	}
	return agents, nil
}

func behind(streams []*stream, rev store.Revision, cause error) error {
	var missing []*stream
	for _, s := range streams {
		if in, closed := s.inStep(rev); !in && !closed {
			missing = append(missing, s)
		}
	}
	if len(missing) == 0 {
		return cause
	}
	return fmt.Errorf("%d of %d connected agents have not acknowledged revision %d, among them %s: %w",
		len(missing), len(streams), rev, missing[0].node, cause)
}

// bundleRecord returns the wire form of a bundle. All streams share it, as a
// changed bundle goes to most of them at once.
func (f *Feed) bundleRecord(b *bundle.Bundle) (*hallmarkv1.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.records[b.TrustDomain]; r.of == b {
		return r.record, nil
	}
	rec, err := b.Record()
	if err == nil {
		f.records[b.TrustDomain] = bundleRecord{b, rec}
	}
	return rec, err
}

// enter makes a stream the one of its node.
func (f *Feed) enter(s *stream) {
	f.mu.Lock()
	old := f.streams[s.node]
	f.streams[s.node] = s
	f.metrics.Agents.Set(float64(len(f.streams)))
	f.mu.Unlock()
	if old != nil {
		old.end(ErrReplaced)
	}
}

func (f *Feed) leave(s *stream) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.streams[s.node] == s {
		delete(f.streams, s.node)
		f.metrics.Agents.Set(float64(len(f.streams)))
	}
}
