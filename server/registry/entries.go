package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/store"
)

// EntryResult is the outcome of a write of one entry.
type EntryResult struct {
	Entry *entry.Entry // as it is now; with AlreadyExists, the one that exists
	Err   error
}

// EntryUpdate is a change of one entry.
type EntryUpdate struct {
	ID     string
	Change func(*entry.Entry) error // edits a copy; may be called again
}

func entryKey(id string) string { return entryPrefix + id }

// similarKey is the key of the record that keeps two similar entries from both
// existing, even if two servers write at once.
func similarKey(e *entry.Entry) string {
	sum := sha256.Sum256([]byte(e.Key()))
	return similarPrefix + hex.EncodeToString(sum[:16])
}

var errEntryNotFound = &Error{Kind: NotFound, Msg: "entry not found"}

// entryWrite is one entry on its way to the store. Its plan is made again from
// the newest view when another writer came first.
type entryWrite struct {
	plan func(v *View) (txn store.Txn, result *entry.Entry, err error)
	res  EntryResult
	done bool
}

// CreateEntries creates entries, each on its own. It completes what they lack
// (ID, creation time) and validates them. There is one result an entry.
func (r *Registry) CreateEntries(ctx context.Context, entries []*entry.Entry) []EntryResult {
	now := r.now().Truncate(time.Second)
	writes := make([]entryWrite, len(entries))
	for i, given := range entries {
		e := *given
		e.Selectors = slices.Clone(given.Selectors)
		e.RevisionNumber = 0
		e.CreatedAt = now
		if e.ID == "" {
			e.ID = uuid.NewString()
		}
		err := e.Validate(r.td)
		writes[i].plan = func(v *View) (store.Txn, *entry.Entry, error) {
			if err != nil {
				return store.Txn{}, nil, &Error{Kind: Invalid, Msg: err.Error()}
			}
			if old := v.Entry(e.ID); old != nil {
				return store.Txn{}, old, &Error{Kind: AlreadyExists, Msg: "an entry with this ID already exists"}
			}
			value, err := proto.Marshal(e.Record())
			if err != nil {
				return store.Txn{}, nil, err
			}
			return store.Txn{
				If: []store.Condition{{Key: entryKey(e.ID)}, {Key: similarKey(&e)}},
				Do: []store.Write{
					{Key: entryKey(e.ID), Value: value},
					{Key: similarKey(&e), Value: []byte(e.ID)},
				},
			}, &e, nil
		}
	}
	return r.writeEntries(ctx, writes, func(w *entryWrite) *entry.Entry {
		_, e, _ := w.plan(r.View())
		return e
	})
}

// UpdateEntries changes entries, each on its own. The ID and the creation time
// stay; the revision number rises by one. There is one result an update.
func (r *Registry) UpdateEntries(ctx context.Context, updates []EntryUpdate) []EntryResult {
	writes := make([]entryWrite, len(updates))
	for i, u := range updates {
		writes[i].plan = func(v *View) (store.Txn, *entry.Entry, error) {
			old := v.stored(u.ID)
			if old == nil {
				return store.Txn{}, nil, errEntryNotFound
			}
			e := old.Entry
			e.Selectors = slices.Clone(old.Selectors)
			if err := u.Change(&e); err != nil {
				return store.Txn{}, nil, err
			}
			e.ID, e.CreatedAt, e.RevisionNumber = old.ID, old.CreatedAt, old.RevisionNumber+1
			if err := e.Validate(r.td); err != nil {
				return store.Txn{}, nil, &Error{Kind: Invalid, Msg: err.Error()}
			}
			value, err := proto.Marshal(e.Record())
			if err != nil {
				return store.Txn{}, nil, err
			}
			txn := store.Txn{
				If: []store.Condition{{Key: entryKey(e.ID), Revision: old.revision}},
				Do: []store.Write{{Key: entryKey(e.ID), Value: value}},
			}
			if was, is := similarKey(&old.Entry), similarKey(&e); was != is {
				txn.If = append(txn.If, store.Condition{Key: is})
				txn.Do = append(txn.Do, store.Write{Key: is, Value: []byte(e.ID)}, store.Write{Key: was})
			}
			return txn, &e, nil
		}
	}
	return r.writeEntries(ctx, writes, func(w *entryWrite) *entry.Entry {
		_, e, _ := w.plan(r.View())
		return e
	})
}

// DeleteEntries deletes entries, each on its own. There is one error an ID.
func (r *Registry) DeleteEntries(ctx context.Context, ids []string) []error {
	writes := make([]entryWrite, len(ids))
	for i, id := range ids {
		writes[i].plan = func(v *View) (store.Txn, *entry.Entry, error) {
			old := v.stored(id)
			if old == nil {
				return store.Txn{}, nil, errEntryNotFound
			}
			return deleteTxn(old), &old.Entry, nil
		}
	}
	errs := make([]error, len(ids))
	for i, res := range r.writeEntries(ctx, writes, nil) {
		errs[i] = res.Err
	}
	return errs
}

func deleteTxn(e *storedEntry) store.Txn {
	return store.Txn{
		If: []store.Condition{{Key: entryKey(e.ID), Revision: e.revision}},
		Do: []store.Write{{Key: entryKey(e.ID)}, {Key: similarKey(&e.Entry)}},
	}
}

// writeEntries commits writes together, and those again before which another
// writer came. wanted, if given, says what an entry in conflict was to become,
// so that a similar one can be named.
func (r *Registry) writeEntries(ctx context.Context, writes []entryWrite, wanted func(*entryWrite) *entry.Entry) []EntryResult {
	var turn turn
	defer turn.end(r)
	for range maxTries {
		var txns []store.Txn
		var pending []*entryWrite
		v := r.View()
		for i := range writes {
			w := &writes[i]
			if w.done {
				continue
			}
			txn, e, err := w.plan(v)
			w.res = EntryResult{Entry: e, Err: err}
			if err != nil {
				w.done = true
				continue
			}
			txns, pending = append(txns, txn), append(pending, w)
		}
		if len(txns) == 0 {
			break
		}
		var newest store.Revision
		var conflicts []*entryWrite
		for i, res := range r.commit(ctx, txns...) {
			w := pending[i]
			if errors.Is(res.Err, store.ErrConflict) {
				conflicts = append(conflicts, w)
				continue
			}
			w.done = true
			newest = max(newest, res.Revision)
			if res.Err != nil {
				w.res = EntryResult{Err: res.Err}
			}
		}
		if newest > 0 {
			if _, err := r.await(ctx, newest); err != nil {
				return failAll(writes, err)
			}
		}
		if len(conflicts) == 0 {
			break
		}
		if err := r.CatchUp(ctx); err != nil {
			return failAll(writes, err)
		}
		if wanted != nil {
			if err := r.findSimilar(ctx, conflicts, wanted); err != nil {
				return failAll(writes, err)
			}
			if !slices.ContainsFunc(conflicts, func(w *entryWrite) bool { return !w.done }) {
				break
			}
		}
		if turn.taken {
			continue
		}
		if err := turn.wait(ctx, r); err != nil {
			return failAll(writes, err)
		}
		if err := r.CatchUp(ctx); err != nil { // with what came while it waited
			return failAll(writes, err)
		}
	}
	out := make([]EntryResult, len(writes))
	for i, w := range writes {
		if out[i] = w.res; !w.done {
			out[i] = EntryResult{Err: &Error{Kind: Contended, Msg: "others keep changing the same entry; try again"}}
		}
	}
	return out
}

// findSimilar ends those writes that failed because a similar entry exists.
func (r *Registry) findSimilar(ctx context.Context, conflicts []*entryWrite, wanted func(*entryWrite) *entry.Entry) error {
	for _, w := range conflicts {
		e := wanted(w)
		if e == nil {
			continue // the next plan says why
		}
		key, id := similarKey(e), ""
		if _, err := r.store.Read(ctx, key, func(rec store.Record) error {
			id = string(rec.Value)
			return nil
		}); err != nil {
			return err
		}
		if similar := r.View().Entry(id); id != e.ID && similar != nil {
			w.res = EntryResult{Entry: similar, Err: &Error{Kind: AlreadyExists, Msg: "similar entry already exists"}}
			w.done = true
		}
	}
	return nil
}

func failAll(writes []entryWrite, err error) []EntryResult {
	out := make([]EntryResult, len(writes))
	for i, w := range writes {
		if out[i] = w.res; w.res.Err == nil {
			out[i] = EntryResult{Err: err}
		}
	}
	return out
}

// pruneInterval bounds how long after its end an entry or join token stays in
// the store. It is of no use to anyone meanwhile.
const pruneInterval = 30 * time.Second

// The least time between two rounds of deletion, and after one that failed.
const (
	prunePause  = 100 * time.Millisecond
	pruneFailed = 5 * time.Second
)

// prune deletes entries and join tokens that have ended, until the context
// ends. Entries go when they end; push streams learn of it from the deletion.
func (r *Registry) prune(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var last time.Time // of the last round
	pause := prunePause
	for {
		r.mu.Lock()
		changed := r.changed
		r.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-changed: // an entry may have come that ends before the timer
		case <-timer.C:
			pause = prunePause
			if !r.leads() { // another server does it; look again, it may have gone
				pause = pruneFailed
			} else if err := r.pruneAll(ctx); err != nil && ctx.Err() == nil {
				r.log.Warn("expired records could not be deleted; trying again", "error", err)
				pause = pruneFailed
			}
			last = time.Now()
		}
		wait := pruneInterval - time.Since(last)
		if e, ok := r.View().byExpiry.Min(); ok {
			wait = min(wait, max(e.ExpiresAt.Sub(r.now()), pause-time.Since(last)))
		}
		timer.Reset(max(wait, 0))
	}
}

// pruneGroup is how many records of a kind are deleted together, at most.
const pruneGroup = 1000

// pruneAll deletes what has ended by now: of used tokens, of which there may be
// many, all.
func (r *Registry) pruneAll(ctx context.Context) error {
	for {
		ended := r.View().endedUses(r.now(), pruneGroup)
		if err := r.forget(ctx, ended); err != nil {
			return err
		}
		if len(ended) < pruneGroup {
			return r.pruneOnce(ctx)
		}
	}
}

// pruneOnce deletes, in groups of a bounded size, entries, join tokens and
// revocations that have ended by now.
func (r *Registry) pruneOnce(ctx context.Context) error {
	const group = pruneGroup
	now, v := r.now(), r.View()
	var txns []store.Txn
	v.byExpiry.Scan(func(e *storedEntry) bool {
		if !e.Expired(now) || len(txns) == group {
			return false
		}
		txns = append(txns, deleteTxn(e))
		return true
	})
	entries := len(txns)
	txns = append(txns, v.endedRevocations(now, group)...)
	revocations := len(txns) - entries
	v.tokens.Scan(func(t *storedToken) bool {
		if now.After(t.ExpiresAt.Add(tokenGrace)) {
			txns = append(txns, store.Txn{
				If: []store.Condition{{Key: t.key, Revision: t.revision}},
				Do: []store.Write{{Key: t.key}},
			})
		}
		return len(txns) < 3*group
	})
	if err := r.forget(ctx, txns); err != nil || len(txns) == 0 {
		return err
	}
	r.log.Debug("pruned expired records", "entries", entries, "revocations", revocations, "join_tokens", len(txns)-entries-revocations)
	return nil
}

// forget commits deletions, of which some may come too late, and returns once the
// view shows them.
func (r *Registry) forget(ctx context.Context, txns []store.Txn) error {
	if len(txns) == 0 {
		return nil
	}
	var newest store.Revision
	for _, res := range r.commit(ctx, txns...) {
		newest = max(newest, res.Revision)
		if res.Err != nil && !errors.Is(res.Err, store.ErrConflict) { // a conflict: changed meanwhile
			return res.Err
		}
	}
	_, err := r.await(ctx, newest)
	return err
}
