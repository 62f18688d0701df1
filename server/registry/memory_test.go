package registry_test

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/hallmark-id/hallmark/server/store"
)

// memory is a store without goroutines or clocks of its own, for tests in
// which time is synthetic; badger has both. Everything else uses badger.
type memory struct {
	mu      sync.Mutex
	rev     store.Revision
	records map[string]store.Record
	changes []store.Change
	changed chan struct{}
}

func newMemory() *memory {
	return &memory{records: make(map[string]store.Record), changed: make(chan struct{})}
}

func (m *memory) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]store.Result, len(txns))
	for i, txn := range txns {
		out[i] = m.commit(txn)
	}
	close(m.changed)
	m.changed = make(chan struct{})
	return out
}

func (m *memory) commit(txn store.Txn) store.Result {
	if err := txn.Check(); err != nil {
		return store.Result{Err: err}
	}
	for _, c := range txn.If {
		if m.records[c.Key].Revision != c.Revision {
			return store.Result{Err: store.ErrConflict}
		}
	}
	m.rev++
	change := store.Change{Revision: m.rev}
	for _, w := range txn.Do {
		rec := store.Record{Key: w.Key, Value: w.Value, Revision: m.rev}
		change.Writes = append(change.Writes, rec)
		if m.records[w.Key] = rec; w.Value == nil {
			delete(m.records, w.Key)
		}
	}
	m.changes = append(m.changes, change)
	return store.Result{Revision: m.rev}
}

func (m *memory) Read(ctx context.Context, prefix string, yield func(store.Record) error) (store.Revision, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(m.records)) {
		if strings.HasPrefix(key, prefix) {
			if err := yield(m.records[key]); err != nil {
				return 0, err
			}
		}
	}
	return m.rev, nil
}

func (m *memory) Watch(ctx context.Context, after store.Revision, yield func([]store.Change) error) error {
	for {
		m.mu.Lock()
		changes, changed := m.changes[after:], m.changed
		m.mu.Unlock()
		if len(changes) > 0 {
			if err := yield(changes); err != nil {
				return err
			}
			after += store.Revision(len(changes))
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *memory) Close() error { return nil }

// grouping is a memory whose watches bring what has happened when they are
// told to, as one group.
type grouping struct {
	*memory
	upTo store.Revision // what watches may show; under the memory's mutex
}

func newGrouping() *grouping { return &grouping{memory: newMemory()} }

func (g *grouping) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.upTo = g.rev
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *grouping) Watch(ctx context.Context, after store.Revision, yield func([]store.Change) error) error {
	for {
		g.mu.Lock()
		upTo, changed := g.upTo, g.changed
		changes := g.changes[after:max(after, upTo)]
		g.mu.Unlock()
		if len(changes) > 0 {
			if err := yield(changes); err != nil {
				return err
			}
			after = upTo
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (m *memory) Advance(context.Context, store.Revision) error { return errors.ErrUnsupported }
