package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/hallmark-id/hallmark/server/store"
)

func watchFromRevision(t *testing.T, f *fixture) {
	start := f.revision()
	first := f.commit(put("a", "1"))
	second := f.commit(store.Txn{Do: []store.Write{{Key: "b", Value: []byte("2")}, {Key: "a"}, {Key: "c", Value: []byte{}}}})
	f.try(put("a", "no", at("a", 99)))
	last := f.commit(put("a", "3"))
	for after, want := range map[store.Revision]string{
		start:  "[a=1][b=2 a gone c=][a=3]",
		first:  "[b=2 a gone c=][a=3]",
		second: "[a=3]",
	} {
		got := ""
		for _, c := range f.watch(after, last) {
			if len(c.Writes) > 0 { // not what raised the revision only
				got += fmt.Sprint(render(c.Writes))
			}
		}
		if got != want {
			t.Errorf("after %d: %s, want %s", after, got, want)
		}
	}
}

func watchWaits(t *testing.T, f *fixture) {
	revision := f.commit(put("a", "1"))
	seen := make(chan store.Change)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(f.ctx)
	go func() {
		ended <- f.store.Watch(ctx, revision, func(changes []store.Change) error {
			for _, c := range changes {
				seen <- c
			}
			return nil
		})
	}()
	for i := range 20 {
		want := f.commit(put("a", fmt.Sprint(i)))
		if c := <-seen; c.Revision != want || string(c.Writes[0].Value) != fmt.Sprint(i) {
			t.Fatalf("change %+v follows a commit at %d", c, want)
		}
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Watch: %v", err)
	}
}

// writers commits rounds transactions from each of n writers, in calls of one
// to three, some of them conflicts, and last one that writes the key "done".
func (f *fixture) writers(n, rounds int) {
	var group sync.WaitGroup
	for w := range n {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), 1))
			for i := 0; i < rounds; {
				var txns []store.Txn
				for range min(1+random.IntN(3), rounds-i) {
					key := fmt.Sprint("k", random.IntN(20))
					txn := put(key, fmt.Sprint(w, "/", i))
					if random.IntN(4) == 0 {
						txn = remove(key)
					}
					txns = append(txns, txn)
					i++
				}
				conflict := put("never", "", at("never", 1))
				for i, r := range f.store.Commit(f.ctx, append(txns, conflict)...) {
					if (r.Err == nil) != (i < len(txns)) {
						f.t.Errorf("Commit: %v", r.Err)
						return
					}
				}
			}
		})
	}
	group.Wait()
	if r := f.store.Commit(f.ctx, put("done", ""))[0]; r.Err != nil {
		f.t.Errorf("Commit: %v", r.Err)
	}
}

// done says whether changes have the end of writers.
func done(changes []store.Change) bool {
	writes := changes[len(changes)-1].Writes
	return len(writes) > 0 && writes[len(writes)-1].Key == "done"
}

func watchersUnderConcurrency(t *testing.T, f *fixture) {
	start := f.revision()
	var watchers sync.WaitGroup
	for range 5 {
		watchers.Go(func() {
			folded := state{}
			last := start
			err := f.store.Watch(f.ctx, start, func(changes []store.Change) error {
				if len(changes) == 0 {
					return errors.New("yield was called with nothing")
				}
				ordered(t, last, changes)
				last = changes[len(changes)-1].Revision
				folded.fold(changes)
				if done(changes) {
					return errEnough
				}
				return nil
			})
			if err != errEnough {
				t.Errorf("Watch ended at %d: %v", last, err)
				return
			}
			var records []store.Record
			if _, err := f.store.Read(f.ctx, "", func(r store.Record) error {
				records = append(records, r)
				return nil
			}); err != nil {
				t.Errorf("Read: %v", err)
			}
			folded.is(t, records)
		})
	}
	f.writers(6, 60)
	watchers.Wait()
}

func watchResumes(t *testing.T, f *fixture) {
	written := make(chan struct{})
	last := f.revision()
	go func() {
		defer close(written)
		f.writers(4, 50)
	}()
	folded := state{}
	breaks, changed := 0, 0
	for end := false; !end; { // each time a little further
		err := f.store.Watch(f.ctx, last, func(changes []store.Change) error {
			keep := changes[:1+rand.IntN(len(changes))] // a change is taken whole, a call need not be
			ordered(t, last, keep)
			folded.fold(keep)
			last, end = keep[len(keep)-1].Revision, done(keep)
			changed += len(keep)
			return errEnough
		})
		if err != errEnough {
			t.Fatalf("Watch(%d): %v", last, err)
		}
		breaks++
	}
	<-written
	records, _ := f.read("")
	folded.is(t, records)
	t.Logf("%d changes in %d watches", changed, breaks)
}

// watchAfterRead is how everyone starts: read the state, then watch from its
// revision.
func watchAfterRead(t *testing.T, f *fixture) {
	written := make(chan struct{})
	go func() {
		defer close(written)
		f.writers(4, 60)
	}()
	for {
		folded := state{}
		revision, err := f.store.Read(f.ctx, "", func(r store.Record) error {
			folded[r.Key] = r
			return nil
		})
		if err != nil {
			t.Fatalf("Read: %v", err)
		}
		if _, ended := folded["done"]; !ended {
			err = f.store.Watch(f.ctx, revision, func(changes []store.Change) error {
				ordered(t, revision, changes)
				folded.fold(changes)
				revision = changes[len(changes)-1].Revision
				if done(changes) {
					return errEnough
				}
				return nil
			})
			if err != errEnough {
				t.Fatalf("Watch: %v", err)
			}
		}
		select {
		case <-written:
			records, _ := f.read("")
			folded.is(t, records)
			return
		default:
		}
	}
}

func watchKnowsTheLast(t *testing.T, f *fixture) {
	const known = 10_000
	revisions := f.fill("k", known+500)
	first, last := revisions[499], revisions[len(revisions)-1]
	// Some may share the revision of the first.
	later := slices.DeleteFunc(revisions, func(r store.Revision) bool { return r <= first })
	changes := f.watch(first, last)
	seen := 0
	for _, c := range changes {
		seen += len(c.Writes)
	}
	if want := len(slices.Compact(slices.Clone(later))); seen != len(later) || len(changes) != want {
		t.Errorf("after the first 500 there are %d changes of %d writes, want %d of %d", len(changes), seen, want, len(later))
	}
}

// watchCompacted accepts an engine that knows more than it has to.
func watchCompacted(t *testing.T, f *fixture) {
	const total = 25_000
	start := f.revision()
	f.fill("k", total)
	seen, last := 0, start
	err := f.store.Watch(f.ctx, start, func(changes []store.Change) error {
		ordered(t, last, changes)
		last = changes[len(changes)-1].Revision
		for _, c := range changes {
			seen += len(c.Writes)
		}
		if seen >= total {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, store.ErrCompacted) && (err != errEnough || seen != total) {
		t.Errorf("Watch from the start yielded %d of %d writes: %v", seen, total, err)
	}
	// After ErrCompacted one reads, and watches from there.
	_, revision := f.read("k0000")
	want := f.commit(put("k", "1"))
	if c := f.watch(revision, want); c[0].Revision != want {
		t.Errorf("the change after %d is %d", revision, c[0].Revision)
	}
}

func slowWatcher(t *testing.T, f *fixture) {
	standing, goOn := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	start := f.revision()
	go func() {
		last, seen := start, 0
		ended <- f.store.Watch(f.ctx, start, func(changes []store.Change) error {
			if last == start {
				close(standing)
				<-goOn
			}
			ordered(t, last, changes)
			last = changes[len(changes)-1].Revision
			for _, c := range changes {
				seen += len(c.Writes)
			}
			if seen == 3001 {
				return errEnough
			}
			return nil
		})
	}()
	f.commit(put("a", "1"))
	<-standing
	revisions := f.fill("k", 3000)
	f.watch(start, revisions[len(revisions)-1])
	close(goOn)
	if err := <-ended; err != errEnough {
		t.Errorf("the watcher that stood still: %v", err)
	}
}

func watchErrors(t *testing.T, f *fixture) {
	start := f.revision()
	f.commit(put("a", "1"))
	own := errors.New("yield's own error")
	if err := f.store.Watch(f.ctx, start, func([]store.Change) error { return own }); err != own {
		t.Errorf("after an error of yield: %v", err)
	}
	ctx, cancel := context.WithCancel(f.ctx)
	err := f.store.Watch(ctx, start, func([]store.Change) error {
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
}

func watchAfterReopen(t *testing.T, f *fixture) {
	revisions := f.fill("k", 50)
	last := revisions[49]
	f.reopen()
	if got := f.revision(); got != last {
		t.Fatalf("it has revision %d, had %d", got, last)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- f.store.Watch(f.ctx, last, func(changes []store.Change) error {
			if changes[0].Revision <= last || string(changes[0].Writes[0].Value) != "new" {
				return fmt.Errorf("the first change is %+v", changes[0])
			}
			return errEnough
		})
	}()
	now := f.commit(put("k", "new"))
	if err := <-ended; err != errEnough {
		t.Errorf("Watch from the revision it was opened at: %v", err)
	}
	var changes []store.Change
	err := f.store.Watch(f.ctx, revisions[9], func(cs []store.Change) error {
		changes = append(changes, cs...)
		if changes[len(changes)-1].Revision == now {
			return errEnough
		}
		return nil
	})
	if err != errEnough && !errors.Is(err, store.ErrCompacted) {
		t.Errorf("Watch from an older revision: %v", err)
	}
	ordered(t, revisions[9], changes)
}
