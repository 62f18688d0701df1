// Package storetest is the suite that every engine of the store's contract
// passes. An engine's test calls [Run] with a function that opens it.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/store"
)

// Open returns an empty store, which the suite closes, and a function that
// closes it and opens it again; that is nil if the engine keeps nothing. Several
// are open at once.
type Open func(t *testing.T) (s store.Store, reopen func() store.Store)

// patience is how long a test waits for what has to happen soon. It is reached
// only by a test that fails.
const patience = time.Minute

// Run tests an engine.
func Run(t *testing.T, open Open) {
	tests := []struct {
		name string
		run  func(*testing.T, *fixture)
	}{
		{"an empty store has no records", emptyStore},
		{"each transaction raises the revision", revisionGrows},
		{"there is one result a transaction", oneResultATransaction},
		{"a condition holds at the revision that wrote the key", conditions},
		{"a transaction whose condition fails writes nothing", conflictWritesNothing},
		{"a later transaction sees the writes of an earlier one", laterSeesEarlier},
		{"nil deletes and empty is a value", deletesAndEmptyValues},
		{"a key may be written once in a transaction", keyTwice},
		{"what is within the bounds is accepted", withinBounds},
		{"what is over the bounds is too large and harms no neighbour", overBounds},
		{"a cancelled context ends every call", cancelled},
		{"the caller's memory is his own after a commit", callersMemory},
		{"concurrent counters lose no increment", concurrentCounters},
		{"one of many creators of a key succeeds", oneCreator},
		{"read returns what has the prefix in the order of keys", readPrefix},
		{"read stops at the first error of yield", readStops},
		{"what read returns is yield's to keep", readValuesKept},
		{"read is of one revision while others write", readIsConsistent},
		{"a write is read after its commit", readYourWrites},
		{"watch yields every change after the revision in order", watchFromRevision},
		{"watch waits for changes", watchWaits},
		{"watchers see every change while many write", watchersUnderConcurrency},
		{"watch resumes without a gap", watchResumes},
		{"watch takes over from read without a gap", watchAfterRead},
		{"the last 10000 changes are known", watchKnowsTheLast},
		{"advance raises the revision and nothing else", advance},
		{"watch says when changes are no longer known", watchCompacted},
		{"a watcher that stands still delays no one", slowWatcher},
		{"watch always returns an error", watchErrors},
		{"close waits for commits and reads", closeWaits},
		{"every call fails after close", closed},
		{"what was committed is there after reopening", reopened},
		{"watch goes on after reopening", watchAfterReopen},
		{"what was acknowledged before close is there after reopening", closeUnderLoad},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, open)
			test.run(t, f)
		})
	}
}

// fixture is a store under test.
type fixture struct {
	t      *testing.T
	store  store.Store
	ctx    context.Context // ends with the test, or when patience does
	again  func() store.Store
	closed bool
}

func newFixture(t *testing.T, open Open) *fixture {
	f := &fixture{t: t}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	f.ctx = ctx
	f.store, f.again = open(t)
	t.Cleanup(func() {
		if !f.closed {
			f.close()
		}
	})
	return f
}

func (f *fixture) close() {
	f.t.Helper()
	f.closed = true
	if err := f.store.Close(); err != nil {
		f.t.Errorf("Close: %v", err)
	}
}

// reopen closes the store and opens it again; the test is skipped if the engine
// keeps nothing.
func (f *fixture) reopen() {
	f.t.Helper()
	if f.again == nil {
		f.t.Skip("this engine keeps nothing")
	}
	f.store = f.again()
	f.closed = false
}

func put(key, value string, conditions ...store.Condition) store.Txn {
	return store.Txn{If: conditions, Do: []store.Write{{Key: key, Value: []byte(value)}}}
}

func remove(key string) store.Txn { return store.Txn{Do: []store.Write{{Key: key}}} }

func at(key string, revision store.Revision) store.Condition {
	return store.Condition{Key: key, Revision: revision}
}

// commit commits one transaction that has to succeed.
func (f *fixture) commit(txn store.Txn) store.Revision {
	f.t.Helper()
	r := f.try(txn)
	if r.Err != nil {
		f.t.Fatalf("Commit: %v", r.Err)
	}
	return r.Revision
}

// fill commits n transactions that write a record each, in a few calls, and
// returns the revision of each.
func (f *fixture) fill(prefix string, n int) (revisions []store.Revision) {
	f.t.Helper()
	const together = 1000
	for i := 0; i < n; i += together {
		var txns []store.Txn
		for j := i; j < min(n, i+together); j++ {
			txns = append(txns, put(fmt.Sprintf("%s%06d", prefix, j), fmt.Sprint(j)))
		}
		for _, r := range f.store.Commit(f.ctx, txns...) {
			if r.Err != nil {
				f.t.Fatalf("Commit: %v", r.Err)
			}
			revisions = append(revisions, r.Revision)
		}
	}
	return revisions
}

func (f *fixture) try(txn store.Txn) store.Result {
	f.t.Helper()
	rs := f.store.Commit(f.ctx, txn)
	if len(rs) != 1 {
		f.t.Fatalf("Commit of one transaction has %d results", len(rs))
	}
	if rs[0].Err != nil && rs[0].Revision != 0 {
		f.t.Errorf("a result has the error %v and revision %d", rs[0].Err, rs[0].Revision)
	}
	return rs[0]
}

// read returns the records with a prefix.
func (f *fixture) read(prefix string) ([]store.Record, store.Revision) {
	f.t.Helper()
	var records []store.Record
	revision, err := f.store.Read(f.ctx, prefix, func(r store.Record) error {
		records = append(records, r)
		return nil
	})
	if err != nil {
		f.t.Fatalf("Read(%q): %v", prefix, err)
	}
	return records, revision
}

func (f *fixture) revision() store.Revision {
	f.t.Helper()
	_, revision := f.read("no record has this prefix")
	return revision
}

// expect checks the records of the whole store, as "key=value" in order.
func (f *fixture) expect(want ...string) {
	f.t.Helper()
	records, _ := f.read("")
	if got := render(records); fmt.Sprint(got) != fmt.Sprint(want) {
		f.t.Errorf("the store has %q, want %q", got, want)
	}
}

func render(records []store.Record) []string {
	lines := []string{}
	for _, r := range records {
		if r.Value == nil {
			lines = append(lines, r.Key+" gone")
		} else {
			lines = append(lines, r.Key+"="+string(r.Value))
		}
	}
	return lines
}

var errEnough = errors.New("enough")

// watch returns the changes after a revision up to another, which has to be
// one of theirs.
func (f *fixture) watch(after, to store.Revision) []store.Change {
	f.t.Helper()
	var changes []store.Change
	last := after
	err := f.store.Watch(f.ctx, after, func(cs []store.Change) error {
		changes = append(changes, cs...)
		if last = cs[len(cs)-1].Revision; last >= to {
			return errEnough
		}
		return nil
	})
	if err != errEnough {
		f.t.Fatalf("Watch(%d) ended after %d changes, at %d of %d: %v", after, len(changes), last, to, err)
	}
	ordered(f.t, after, changes)
	if last != to && !slices.ContainsFunc(changes, func(c store.Change) bool { return c.Revision == to }) {
		f.t.Fatalf("Watch(%d) passed over revision %d", after, to)
	}
	return changes
}

// ordered checks that changes come in order after a revision, each of them well
// formed.
func ordered(t testing.TB, after store.Revision, changes []store.Change) {
	t.Helper()
	for _, c := range changes {
		if c.Revision <= after {
			t.Fatalf("change %d follows revision %d", c.Revision, after)
		}
		after = c.Revision
		for _, r := range c.Writes {
			if r.Revision != c.Revision {
				t.Fatalf("a record of change %d has revision %d", c.Revision, r.Revision)
			}
		}
	}
}

// state is the fold of changes.
type state map[string]store.Record

func (s state) fold(changes []store.Change) {
	for _, c := range changes {
		for _, r := range c.Writes {
			if r.Value == nil {
				delete(s, r.Key)
			} else {
				s[r.Key] = r
			}
		}
	}
}

// is checks that the fold is what a Read returned.
func (s state) is(t testing.TB, records []store.Record) {
	t.Helper()
	if len(s) != len(records) {
		t.Errorf("the changes make %d records, the store has %d", len(s), len(records))
	}
	for _, r := range records {
		if got := s[r.Key]; string(got.Value) != string(r.Value) || got.Revision != r.Revision {
			t.Errorf("the changes make %q=%q at %d, the store has %q at %d", r.Key, got.Value, got.Revision, r.Value, r.Revision)
		}
	}
}
