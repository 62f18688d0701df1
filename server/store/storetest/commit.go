package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hallmark-id/hallmark/server/store"
)

func emptyStore(t *testing.T, f *fixture) {
	records, revision := f.read("")
	if len(records) != 0 || revision < 0 {
		t.Errorf("it has revision %d and %d records", revision, len(records))
	}
}

func revisionGrows(t *testing.T, f *fixture) {
	steps := []struct {
		what string
		txn  store.Txn
		err  error
	}{
		{"a write", put("a", "1"), nil},
		{"several writes", store.Txn{Do: []store.Write{{Key: "b", Value: []byte("1")}, {Key: "c", Value: []byte("1")}}}, nil},
		{"a deletion", remove("a"), nil},
		{"a conflict", put("b", "2", at("b", 99)), store.ErrConflict},
		{"the deletion of a missing key", remove("a"), nil},
		{"a condition without a write", store.Txn{If: []store.Condition{at("a", 0)}}, nil},
		{"nothing", store.Txn{}, nil},
		{"the same value again", put("b", "1"), nil},
	}
	start := f.revision()
	last := start
	var revisions []store.Revision
	for _, s := range steps {
		r := f.try(s.txn)
		if !errors.Is(r.Err, s.err) || (r.Err == nil) != (s.err == nil) {
			t.Fatalf("%s: %v, want %v", s.what, r.Err, s.err)
		}
		if s.err == nil {
			if r.Revision <= last {
				t.Errorf("%s has revision %d after %d", s.what, r.Revision, last)
			}
			last = r.Revision
			revisions = append(revisions, last)
			if got := f.revision(); got != last {
				t.Errorf("after %s at %d the store has revision %d", s.what, last, got)
			}
		}
	}
	for _, c := range f.watch(start, last) { // every one of them is seen, without writes too
		if len(revisions) > 0 && c.Revision == revisions[0] {
			revisions = revisions[1:]
		}
	}
	if len(revisions) > 0 {
		t.Errorf("a watcher did not see revision %d", revisions[0])
	}
}

func oneResultATransaction(t *testing.T, f *fixture) {
	if rs := f.store.Commit(f.ctx); len(rs) != 0 {
		t.Errorf("no transaction has %d results", len(rs))
	}
	start := f.revision()
	rs := f.store.Commit(f.ctx, put("a", "1"), put("a", "2", at("a", 77)), put("b", "3"))
	if len(rs) != 3 {
		t.Fatalf("three transactions have %d results", len(rs))
	}
	if rs[0].Err != nil || rs[0].Revision <= start || !errors.Is(rs[1].Err, store.ErrConflict) || rs[1].Revision != 0 || rs[2].Err != nil || rs[2].Revision < rs[0].Revision {
		t.Errorf("the results are %+v", rs)
	}
	f.expect("a=1", "b=3")
}

func conditions(t *testing.T, f *fixture) {
	check := func(what string, c store.Condition, holds bool) {
		t.Helper()
		r := f.try(store.Txn{If: []store.Condition{c}})
		if holds && r.Err != nil || !holds && !errors.Is(r.Err, store.ErrConflict) {
			t.Errorf("%s: %v", what, r.Err)
		}
	}
	check("a missing key at 0", at("a", 0), true)
	check("a missing key at 1", at("a", 1), false)
	created := f.commit(put("a", "1"))
	check("a key at the revision that created it", at("a", created), true)
	check("an existing key at 0", at("a", 0), false)
	f.commit(put("b", "1"))
	check("a key after another was written", at("a", created), true)
	changed := f.commit(put("a", "2"))
	check("a changed key at its old revision", at("a", created), false)
	check("a changed key at its new revision", at("a", changed), true)
	check("a key at a revision to come", at("a", changed+100), false)
	f.commit(remove("a"))
	check("a deleted key at its last revision", at("a", changed), false)
	check("a deleted key at 0", at("a", 0), true)
	f.commit(store.Txn{Do: []store.Write{{Key: "empty", Value: []byte{}}}})
	check("a key with an empty value at 0", at("empty", 0), false)
}

func conflictWritesNothing(t *testing.T, f *fixture) {
	a := f.commit(put("a", "1"))
	b := f.commit(put("b", "1"))
	r := f.try(store.Txn{
		If: []store.Condition{at("a", a), at("b", a)}, // the second fails
		Do: []store.Write{{Key: "a", Value: []byte("2")}, {Key: "b"}, {Key: "c", Value: []byte("2")}},
	})
	if !errors.Is(r.Err, store.ErrConflict) {
		t.Errorf("Commit: %v, want a conflict", r.Err)
	}
	f.expect("a=1", "b=1")
	f.commit(store.Txn{
		If: []store.Condition{at("a", a), at("b", b), at("c", 0)},
		Do: []store.Write{{Key: "a", Value: []byte("2")}, {Key: "b"}, {Key: "c", Value: []byte("2")}},
	})
	f.expect("a=2", "c=2")
}

func laterSeesEarlier(t *testing.T, f *fixture) {
	base := f.commit(put("k", "0"))
	rs := f.store.Commit(f.ctx,
		put("k", "1", at("k", base)),
		put("k", "no", at("k", base)), // overtaken
		remove("k"),
		put("k", "no", at("k", base)), // gone
		put("k", "2", at("k", 0)),
		put("new", "1", at("new", 0)),
		put("new", "no", at("new", 0)),
	)
	want := []bool{true, false, true, false, true, true, false}
	for i, r := range rs {
		if (r.Err == nil) != want[i] || r.Err != nil && !errors.Is(r.Err, store.ErrConflict) {
			t.Errorf("transaction %d: %v", i, r.Err)
		}
	}
	f.expect("k=2", "new=1")
}

func deletesAndEmptyValues(t *testing.T, f *fixture) {
	f.commit(put("a", "1"))
	start := f.commit(remove("missing"))
	f.commit(store.Txn{Do: []store.Write{{Key: "empty", Value: []byte{}}}})
	last := f.commit(remove("a"))
	records, _ := f.read("")
	if len(records) != 1 || records[0].Key != "empty" || records[0].Value == nil || len(records[0].Value) != 0 {
		t.Errorf("the store has %+v, want the key \"empty\" with an empty value", records)
	}
	changes := f.watch(start, last)
	if got := fmt.Sprint(render(changes[0].Writes), render(changes[1].Writes)); got != "[empty=] [a gone]" {
		t.Errorf("the changes are %s", got)
	}
}

func keyTwice(t *testing.T, f *fixture) {
	rs := f.store.Commit(f.ctx,
		store.Txn{Do: []store.Write{{Key: "a", Value: []byte("1")}, {Key: "b", Value: []byte("1")}, {Key: "a", Value: []byte("2")}}},
		put("c", "1"))
	if rs[0].Err == nil {
		t.Error("a transaction that writes a key twice succeeded")
	}
	if rs[1].Err != nil {
		t.Errorf("its neighbour failed: %v", rs[1].Err)
	}
	f.expect("c=1")
}

func withinBounds(t *testing.T, f *fixture) {
	longKey := strings.Repeat("k", store.MaxKey)
	longValue := strings.Repeat("v", store.MaxValue)
	f.commit(put(longKey, longValue))
	revision := f.commit(put("x", longValue))

	most := store.Txn{If: []store.Condition{at("x", revision)}}
	for i := range store.MaxWrites - 1 {
		key := fmt.Sprintf("%04d%s", i, strings.Repeat("n", store.MaxKey-4))
		most.Do = append(most.Do, store.Write{Key: key, Value: bytes.Repeat([]byte("w"), store.MaxBytes/store.MaxWrites-store.MaxKey)})
	}
	revision = f.commit(most)
	records, _ := f.read("")
	if len(records) != 2+store.MaxWrites-1 {
		t.Fatalf("the store has %d records", len(records))
	}
	for _, r := range records {
		if r.Key == longKey && string(r.Value) != longValue {
			t.Error("the longest value came back changed")
		}
	}
	many := store.Txn{}
	for i := range store.MaxWrites {
		many.If = append(many.If, at(most.Do[0].Key, revision))
		if i%2 == 0 {
			many.If = many.If[:len(many.If)-1]
			many.Do = append(many.Do, store.Write{Key: strconv.Itoa(i), Value: []byte{}})
		}
	}
	f.commit(many)
}

func overBounds(t *testing.T, f *fixture) {
	writes := func(n int) (ws []store.Write) {
		for i := range n {
			ws = append(ws, store.Write{Key: fmt.Sprint("w", i), Value: []byte("1")})
		}
		return ws
	}
	large := store.Txn{}
	for i := range 4 {
		large.Do = append(large.Do, store.Write{Key: fmt.Sprint("l", i), Value: make([]byte, store.MaxBytes/4)})
	}
	over := map[string]store.Txn{
		"a key":                             put(strings.Repeat("k", store.MaxKey+1), "1"),
		"the key of a condition":            {If: []store.Condition{at(strings.Repeat("k", store.MaxKey+1), 0)}},
		"a value":                           put("v", strings.Repeat("v", store.MaxValue+1)),
		"the number of writes":              {Do: writes(store.MaxWrites + 1)},
		"the number of writes and the rest": {If: []store.Condition{at("a", 0)}, Do: writes(store.MaxWrites)},
		"all bytes":                         large,
	}
	for what, txn := range over {
		start := f.revision()
		rs := f.store.Commit(f.ctx, put("before", what), txn, put("after", what))
		if len(rs) != 3 || rs[0].Err != nil || rs[2].Err != nil {
			t.Fatalf("%s over its bound: neighbours have %+v", what, rs)
		}
		if !errors.Is(rs[1].Err, store.ErrTooLarge) || rs[1].Revision != 0 {
			t.Errorf("%s over its bound: %+v, want ErrTooLarge", what, rs[1])
		}
		f.expect("after="+what, "before="+what)
		if got := f.revision(); got != rs[2].Revision {
			t.Errorf("%s over its bound: the store has revision %d, want %d", what, got, rs[2].Revision)
		}
		f.watch(start, rs[2].Revision)
	}
}

func cancelled(t *testing.T, f *fixture) {
	start := f.commit(put("a", "1"))
	ctx, cancel := context.WithCancel(f.ctx)
	cancel()
	rs := f.store.Commit(ctx, put("b", "1"), put("c", "1"))
	if len(rs) != 2 || !errors.Is(rs[0].Err, context.Canceled) || !errors.Is(rs[1].Err, context.Canceled) {
		t.Errorf("Commit: %+v", rs)
	}
	if _, err := f.store.Read(ctx, "", func(store.Record) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("Read: %v", err)
	}
	if err := f.store.Watch(ctx, start, func([]store.Change) error { return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("Watch: %v", err)
	}

	f.fill("many/", 2000)
	ctx, cancel = context.WithCancel(f.ctx)
	defer cancel()
	n := 0
	_, err := f.store.Read(ctx, "many/", func(store.Record) error {
		if n++; n == 2 {
			cancel()
		}
		return nil
	})
	if !errors.Is(err, context.Canceled) || n == 2000 {
		t.Errorf("a Read that was cancelled at its second record yielded %d and returned %v", n, err)
	}
}

func callersMemory(t *testing.T, f *fixture) {
	start := f.revision()
	value := []byte("right")
	txns := []store.Txn{{If: []store.Condition{at("a", 0)}, Do: []store.Write{{Key: "a", Value: value}}}}
	rs := f.store.Commit(f.ctx, txns...)
	if rs[0].Err != nil {
		t.Fatal(rs[0].Err)
	}
	copy(value, "wrong")
	txns[0].Do[0] = store.Write{Key: "b"}
	f.expect("a=right")
	if got := render(f.watch(start, rs[0].Revision)[0].Writes); got[0] != "a=right" {
		t.Errorf("a watcher sees %q", got)
	}

	// A caller who has gone may change his memory too; the race detector watches.
	var callers sync.WaitGroup
	for i := range 50 {
		callers.Go(func() {
			ctx, cancel := context.WithCancel(f.ctx)
			go cancel()
			value := []byte("1")
			rs := f.store.Commit(ctx, store.Txn{Do: []store.Write{{Key: fmt.Sprint("c", i), Value: value}}})
			if rs[0].Err != nil && !errors.Is(rs[0].Err, context.Canceled) {
				t.Errorf("Commit: %v", rs[0].Err)
			}
			value[0] = '2'
		})
	}
	callers.Wait()
	records, _ := f.read("c")
	for _, r := range records {
		if string(r.Value) != "1" {
			t.Errorf("%s has the value %q, which was never committed", r.Key, r.Value)
		}
	}
}

// concurrentCounters has writers that add one to shared counters, each on
// condition that nobody came in between: whoever loses reads and tries again.
func concurrentCounters(t *testing.T, f *fixture) {
	const writers, rounds, counters = 8, 40, 2
	start := f.revision()
	var conflicts atomic.Int64
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			for i := range rounds {
				key := fmt.Sprint("counter", (w+i)%counters)
				for {
					n, last := 0, store.Revision(0)
					_, err := f.store.Read(f.ctx, key, func(r store.Record) (err error) {
						last = r.Revision
						n, err = strconv.Atoi(string(r.Value))
						return err
					})
					if err != nil {
						t.Errorf("Read: %v", err)
						return
					}
					r := f.store.Commit(f.ctx, put(key, strconv.Itoa(n+1), at(key, last)))[0]
					if r.Err == nil {
						break
					}
					if !errors.Is(r.Err, store.ErrConflict) {
						t.Errorf("Commit: %v", r.Err)
						return
					}
					conflicts.Add(1)
				}
			}
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	records, revision := f.read("counter")
	sum := 0
	for _, r := range records {
		n, _ := strconv.Atoi(string(r.Value))
		sum += n
	}
	if sum != writers*rounds {
		t.Errorf("the counters have %d, want %d increments", sum, writers*rounds)
	}
	// Each counter passed through every number, one at a time.
	last := map[string]int{}
	for _, c := range f.watch(start, revision) {
		for _, r := range c.Writes {
			n, _ := strconv.Atoi(string(r.Value))
			if n != last[r.Key]+1 {
				t.Fatalf("%s went from %d to %d", r.Key, last[r.Key], n)
			}
			last[r.Key] = n
		}
	}
	t.Logf("%d conflicts", conflicts.Load())
}

func oneCreator(t *testing.T, f *fixture) {
	const rivals, keys = 16, 20
	var won [keys]atomic.Int64
	var group sync.WaitGroup
	for range rivals {
		group.Go(func() {
			var txns []store.Txn
			for k := range keys {
				txns = append(txns, put(fmt.Sprint("key", k), "mine", at(fmt.Sprint("key", k), 0)))
			}
			for k, r := range f.store.Commit(f.ctx, txns...) {
				switch {
				case r.Err == nil:
					won[k].Add(1)
				case !errors.Is(r.Err, store.ErrConflict):
					t.Errorf("Commit: %v", r.Err)
				}
			}
		})
	}
	group.Wait()
	for k := range won {
		if n := won[k].Load(); n != 1 {
			t.Errorf("key %d was created %d times", k, n)
		}
	}
}

func advance(t *testing.T, f *fixture) {
	before := f.revision()
	far := before + 1<<33
	if err := f.store.Advance(f.ctx, far); err != nil {
		t.Fatalf("Advance: %v", err)
	}
	f.expect()
	if got := f.revision(); got < far {
		t.Errorf("after Advance to %d the store has revision %d", far, got)
	}
	if err := f.store.Watch(f.ctx, before, func([]store.Change) error { return nil }); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("Watch from before: %v", err)
	}
	if err := f.store.Advance(f.ctx, before); err != nil {
		t.Errorf("Advance to what is below: %v", err)
	}
	start := f.revision()
	created := f.commit(put("a", "1", at("a", 0)))
	changed := f.commit(put("a", "2", at("a", created)))
	if r := f.try(put("a", "no", at("a", created-1<<33))); !errors.Is(r.Err, store.ErrConflict) {
		t.Errorf("a condition at a revision from before: %v", r.Err)
	}
	if start < far || created <= start || changed <= created {
		t.Errorf("after Advance to %d the revisions are %d, %d, %d", far, start, created, changed)
	}
	f.expect("a=2")
	f.watch(start, changed)
	if err := f.store.Advance(f.ctx, changed+1000); err != nil {
		t.Fatalf("Advance: %v", err)
	}
	f.reopen()
	if got := f.revision(); got < changed+1000 {
		t.Errorf("opened again, the store has revision %d, had at least %d", got, changed+1000)
	}
}
