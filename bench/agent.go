package bench

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/agent/feed"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/pkg/digest"
)

const (
	// joining is how many agents attest at once: enough to keep both ends busy.
	joining = 32
	// patience bounds every wait: ten thousand agents attest in minutes.
	patience = 15 * time.Minute
)

// fleet is simulated agents: the real identity, connection and feed of an
// agent, over what it holds only by name.
type fleet struct {
	server *server
	alias  string // path of a SPIFFE ID that all of them have besides their own
	agents []*agent
	ctx    context.Context
	stop   context.CancelFunc
	group  errgroup.Group

	arrivals atomic.Pointer[arrivals] // what is being timed; nil: nothing
}

func newFleet(ctx context.Context, s *server, alias string) *fleet {
	f := &fleet{server: s, alias: alias}
	f.ctx, f.stop = context.WithCancel(ctx)
	return f
}

// close ends the agents and has the server forget them.
func (f *fleet) close(ctx context.Context) error {
	f.stop()
	_ = f.group.Wait() // every agent was told to end
	if f.server.own() {
		return nil // it goes with all it has
	}
	for _, a := range f.agents {
		if err := f.server.evict(ctx, a.node.Status().ID); err != nil {
			return err
		}
	}
	return nil
}

// grow adds agents until there are n, and waits until all are in step.
func (f *fleet) grow(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var g errgroup.Group
	g.SetLimit(joining)
	first := len(f.agents)
	f.agents = append(f.agents, make([]*agent, max(0, n-first))...)
	for i := first; i < n; i++ {
		g.Go(func() (err error) {
			f.agents[i], err = f.join(ctx)
			return err
		})
	}
	return g.Wait()
}

func (f *fleet) join(ctx context.Context) (*agent, error) {
	n, err := f.server.newNode(ctx, f.alias)
	if err != nil {
		return nil, err
	}
	a := &agent{fleet: f, node: n, entries: make(map[string]member), bundles: make(map[spiffeid.TrustDomain]uint64), crls: make(map[string]uint64), synced: make(chan struct{})}
	follow := feed.New(feed.Options{TrustDomain: f.server.td, Node: n, Held: a})
	f.group.Go(func() error { return n.Run(f.ctx) })
	f.group.Go(func() error { return follow.Run(f.ctx) })
	select {
	case <-a.synced:
		return a, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("agent %d did not come into step: %w (%v)", len(f.agents), ctx.Err(), n.Status().LastError)
	}
}

// agent is one simulated agent. It is what its feed applies changes to.
type agent struct {
	fleet  *fleet
	node   *node.Node
	synced chan struct{} // closed once it has been in step

	mu       sync.Mutex
	entries  map[string]member
	bundles  map[spiffeid.TrustDomain]uint64 // sequence numbers
	crls     map[string]uint64               // numbers, by authority
	sum      digest.Sum
	revision int64
}

// member is what the digest knows of an entry.
type member struct{ revision, created int64 }

// Apply implements [feed.Held].
func (a *agent) Apply(c held.Change) {
	a.mu.Lock()
	if c.Complete {
		clear(a.entries)
		clear(a.bundles)
		clear(a.crls)
		a.sum = digest.Sum{}
	}
	for _, e := range c.Entries {
		a.drop(e.ID)
		m := member{e.RevisionNumber, e.CreatedAt.Unix()}
		a.entries[e.ID] = m
		a.sum.AddEntry(e.ID, m.revision, m.created)
	}
	for _, id := range c.GoneEntries {
		a.drop(id)
	}
	for _, b := range c.Bundles {
		a.dropBundle(b.TrustDomain)
		a.bundles[b.TrustDomain] = b.SequenceNumber
		a.sum.AddBundle(b.TrustDomain.Name(), b.SequenceNumber)
	}
	for _, td := range c.GoneBundles {
		a.dropBundle(td)
	}
	for _, c := range c.CRLs {
		a.dropCRL(c.ID())
		a.crls[c.ID()] = c.Number()
		a.sum.AddCRL(c.ID(), c.Number())
	}
	for _, id := range c.GoneCRLs {
		a.dropCRL(id)
	}
	first := a.revision == 0
	a.revision = c.Revision
	a.mu.Unlock()
	if first {
		close(a.synced)
	}
	if w := a.fleet.arrivals.Load(); w != nil && w.of(c) {
		w.note(a)
	}
}

func (a *agent) drop(id string) {
	if m, ok := a.entries[id]; ok {
		a.sum.SubEntry(id, m.revision, m.created)
		delete(a.entries, id)
	}
}

func (a *agent) dropBundle(td spiffeid.TrustDomain) {
	if seq, ok := a.bundles[td]; ok {
		a.sum.SubBundle(td.Name(), seq)
		delete(a.bundles, td)
	}
}

func (a *agent) dropCRL(authority string) {
	if number, ok := a.crls[authority]; ok {
		a.sum.SubCRL(authority, number)
		delete(a.crls, authority)
	}
}

// Digest implements [feed.Held].
func (a *agent) Digest() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.sum[:])
}

// Revision implements [feed.Held].
func (a *agent) Revision() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.revision
}

// arrivals notes when each agent of a fleet has applied something.
type arrivals struct {
	of   func(held.Change) bool
	want int
	done chan struct{} // closed when want have arrived

	mu    sync.Mutex
	seen  map[*agent]bool
	times []time.Time
}

// expect starts to note when agents apply a change that of is true of.
func (f *fleet) expect(of func(held.Change) bool) *arrivals {
	w := &arrivals{of: of, want: len(f.agents), done: make(chan struct{}), seen: make(map[*agent]bool, len(f.agents))}
	f.arrivals.Store(w)
	return w
}

func (w *arrivals) note(a *agent) {
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.seen[a] {
		return
	}
	w.seen[a] = true
	w.times = append(w.times, now)
	if len(w.times) == w.want {
		close(w.done)
	}
}

// wait waits for all agents and returns how long each took from a time on.
func (w *arrivals) wait(ctx context.Context, since time.Time) ([]time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-w.done:
	case <-ctx.Done():
		w.mu.Lock()
		defer w.mu.Unlock()
		return nil, fmt.Errorf("%d of %d agents have applied the change: %w", len(w.times), w.want, ctx.Err())
	}
	took := make([]time.Duration, len(w.times))
	for i, t := range w.times {
		took[i] = t.Sub(since)
	}
	return took, nil
}
