package registry

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/server/store"
)

// decodeGroup is how many records are decoded together: enough that handing
// them over costs nothing beside it.
const decodeGroup = 512

// load reads the whole state. Entries, of which there may be a million, are
// decoded on every core while the store is read, and their indexes are made
// from sorted lists, each on its own, which costs a fraction of folding one
// after the other.
func (r *Registry) load(ctx context.Context) error {
	f := newFold()
	decoding, ctx := errgroup.WithContext(ctx)
	decoding.SetLimit(runtime.GOMAXPROCS(0))
	var groups [][]*storedEntry
	var digests []*digest.Sum // of each group
	var records []store.Record
	decode := func() {
		group, out, sum := records, make([]*storedEntry, len(records)), new(digest.Sum)
		groups, digests, records = append(groups, out), append(digests, sum), make([]store.Record, 0, decodeGroup)
		decoding.Go(func() (err error) { // waits for its turn: what is read is bounded
			for i, rec := range group {
				if out[i], err = entryFromRecord(rec); err != nil {
					return unreadable(rec, err)
				}
				sum.AddRecord(rec.Key, int64(rec.Revision))
			}
			return nil
		})
	}
	rev, err := r.store.Read(ctx, "", func(rec store.Record) error {
		if strings.HasPrefix(rec.Key, entryPrefix) {
			if records = append(records, rec); len(records) == decodeGroup {
				decode()
			}
			return nil
		}
		if err := f.apply(rec); err != nil {
			return unreadable(rec, err)
		}
		return nil
	})
	if err == nil {
		decode()
	}
	if failed := decoding.Wait(); failed != nil { // it ended the reading
		return failed
	}
	if err != nil {
		return err
	}
	f.loadEntries(slices.Concat(groups...))
	for _, sum := range digests {
		f.digest.Merge(*sum)
	}
	r.fold = f
	r.view.Store(r.fold.publish(rev, r.td))
	if r.told == nil { // opened
		r.told = r.View()
	}
	return nil
}

func unreadable(rec store.Record, err error) error {
	return fmt.Errorf("record %q cannot be read: %w; restore a backup, or run the version that wrote it", rec.Key, err)
}

// loadEntries folds entries, in the order of their IDs, into a fold that has
// none. The outcome is that of applying their records one by one.
func (f *fold) loadEntries(byID []*storedEntry) {
	children := make(map[spiffeid.ID][]*storedEntry)
	var aliases, ending []*storedEntry
	for _, e := range byID {
		siblings := children[e.ParentID]
		if len(siblings) > 0 {
			e.ParentID = siblings[0].ParentID // one string in memory, and quick to compare
		}
		children[e.ParentID] = append(siblings, e)
		if e.IsAlias() {
			aliases = append(aliases, e)
		}
		if !e.ExpiresAt.IsZero() {
			ending = append(ending, e)
		}
	}
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	index := func(fill func()) { g.Go(func() error { fill(); return nil }) }
	index(func() { f.bySPIFFEID.load(sortedBy(byID, lessBySPIFFEID)) })
	index(func() {
		for _, parent := range slices.SortedFunc(maps.Keys(children), compareIDs) {
			f.byParent.load(children[parent])
			f.interior.load(slices.DeleteFunc(slices.Clone(children[parent]), func(e *storedEntry) bool {
				return e.IsAlias() || len(children[e.SPIFFEID]) == 0
			}))
		}
	})
	index(func() { f.entries.load(byID) })
	index(func() {
		f.byExpiry.load(sortedBy(ending, lessByExpiry))
		f.aliases.load(sortedBy(aliases, lessByFirstSelector))
	})
	_ = g.Wait() // none fails
}

func sortedBy(entries []*storedEntry, less func(a, b *storedEntry) bool) []*storedEntry {
	return slices.SortedFunc(slices.Values(entries), func(a, b *storedEntry) int {
		if less(a, b) {
			return -1
		}
		return 1 // their IDs differ
	})
}
