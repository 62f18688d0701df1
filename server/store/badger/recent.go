package badger

import (
	"sort"
	"sync"

	"github.com/hallmark-id/hallmark/server/store"
)

// Bounds of the changes that are kept for watchers; the contract's.
const (
	recentChanges = 10_000
	recentBytes   = 32 << 20
)

// What a change and a record take in memory besides key and value.
const (
	changeOverhead = 32
	recordOverhead = 48
)

// recent is the last changes, in memory. The writer adds to it and never
// waits: a watcher takes what is there and comes again.
type recent struct {
	mu      sync.Mutex
	base    store.Revision // all changes after it are here
	last    store.Revision
	groups  []group       // oldest first, without gaps
	changes int           // in groups
	bytes   int           // in groups
	more    chan struct{} // closed at the next change; nil: no one waits for it
}

// group is changes that were committed together.
type group struct {
	changes []store.Change
	bytes   int
}

func (g group) last() store.Revision { return g.changes[len(g.changes)-1].Revision }

// begin forgets all changes; the store is at this revision.
func (r *recent) begin(revision store.Revision) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.base, r.last = revision, revision
	r.groups, r.changes, r.bytes = nil, 0, 0
	r.wake()
}

// add appends changes that were committed together, and forgets the oldest
// that are over the bounds.
func (r *recent) add(changes []store.Change) {
	g := group{changes: changes}
	for _, c := range changes {
		g.bytes += changeOverhead
		for _, rec := range c.Writes {
			g.bytes += recordOverhead + len(rec.Key) + header + len(rec.Value)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.groups = append(r.groups, g)
	r.changes += len(g.changes)
	r.bytes += g.bytes
	r.last = g.last()
	for len(r.groups) > 1 && (r.changes-len(r.groups[0].changes) >= recentChanges || r.bytes > recentBytes) {
		oldest := r.groups[0]
		r.groups[0] = group{}
		r.groups = r.groups[1:]
		r.changes -= len(oldest.changes)
		r.bytes -= oldest.bytes
		r.base = oldest.last()
	}
	r.wake()
}

func (r *recent) wake() {
	if r.more != nil {
		close(r.more)
		r.more = nil
	}
}

// after returns the oldest changes after a revision that were committed
// together, or, if there are none, a channel that is closed when there are.
func (r *recent) after(revision store.Revision) ([]store.Change, <-chan struct{}, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if revision < r.base {
		return nil, nil, store.ErrCompacted
	}
	if revision >= r.last {
		if r.more == nil {
			r.more = make(chan struct{})
		}
		return nil, r.more, nil
	}
	i := sort.Search(len(r.groups), func(i int) bool { return r.groups[i].last() > revision })
	changes := r.groups[i].changes
	if first := changes[0].Revision; revision >= first {
		changes = changes[revision-first+1:]
	}
	return changes[:len(changes):len(changes)], nil, nil
}
