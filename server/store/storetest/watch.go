package storetest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/hallmark-id/hallmark/server/store"
)

func watchFromRevision(t *testing.T, f *fixture) {
	f.commit(put("a", "1"))
	f.commit(store.Txn{Do: []store.Write{{Key: "b", Value: []byte("2")}, {Key: "a"}, {Key: "c", Value: []byte{}}}})
	f.try(put("a", "no", at("a", 99)))
	f.commit(put("a", "3"))
	for after, want := range []string{"[a=1][b=2 a gone c=][a=3]", "[b=2 a gone c=][a=3]", "[a=3]"} {
		changes := f.watch(store.Revision(after), 3-after)
		dense(t, store.Revision(after), changes)
		got := ""
		for _, c := range changes {
			got += fmt.Sprint(render(c.Writes))
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
// to three, some of them conflicts, and returns when all are done.
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
}

func watchersUnderConcurrency(t *testing.T, f *fixture) {
	const writers, rounds, total = 6, 60, 6 * 60
	var watchers sync.WaitGroup
	for range 5 {
		watchers.Go(func() {
			folded := state{}
			var last store.Revision
			err := f.store.Watch(f.ctx, 0, func(changes []store.Change) error {
				if len(changes) == 0 {
					return errors.New("yield was called with nothing")
				}
				if changes[0].Revision != last+1 || changes[len(changes)-1].Revision != last+store.Revision(len(changes)) {
					return fmt.Errorf("changes %d to %d follow %d", changes[0].Revision, changes[len(changes)-1].Revision, last)
				}
				last = changes[len(changes)-1].Revision
				folded.fold(changes)
				if last == total {
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
	f.writers(writers, rounds)
	watchers.Wait()
}

func watchResumes(t *testing.T, f *fixture) {
	const total = 4 * 50
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.writers(4, 50)
	}()
	folded := state{}
	var last store.Revision
	breaks := 0
	for last < total { // each time a little further
		err := f.store.Watch(f.ctx, last, func(changes []store.Change) error {
			keep := changes[:1+rand.IntN(len(changes))] // a change is taken whole, a call need not be
			dense(t, last, keep)
			folded.fold(keep)
			last = keep[len(keep)-1].Revision
			return errEnough
		})
		if err != errEnough {
			t.Fatalf("Watch(%d): %v", last, err)
		}
		breaks++
	}
	<-done
	records, _ := f.read("")
	folded.is(t, records)
	t.Logf("%d changes in %d watches", total, breaks)
}

// watchAfterRead is how everyone starts: read the state, then watch from its
// revision.
func watchAfterRead(t *testing.T, f *fixture) {
	const total = 4 * 60
	done := make(chan struct{})
	go func() {
		defer close(done)
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
		if revision < total {
			err = f.store.Watch(f.ctx, revision, func(changes []store.Change) error {
				dense(t, revision, changes)
				folded.fold(changes)
				revision = changes[len(changes)-1].Revision
				if revision == total {
					return errEnough
				}
				return nil
			})
			if err != errEnough {
				t.Fatalf("Watch: %v", err)
			}
		}
		select {
		case <-done:
			records, _ := f.read("")
			folded.is(t, records)
			return
		default:
		}
	}
}

func watchKnowsTheLast(t *testing.T, f *fixture) {
	const known = 10_000
	f.fill("k", known+500)
	changes := f.watch(500, known)
	dense(t, 500, changes)
	if len(changes) != known {
		t.Errorf("there are %d changes after 500, want %d", len(changes), known)
	}
}

// watchCompacted accepts an engine that knows more than it has to.
func watchCompacted(t *testing.T, f *fixture) {
	const total = 25_000
	f.fill("k", total)
	var changes []store.Change
	err := f.store.Watch(f.ctx, 0, func(cs []store.Change) error {
		changes = append(changes, cs...)
		if len(changes) >= total {
			return errEnough
		}
		return nil
	})
	switch {
	case errors.Is(err, store.ErrCompacted):
		if len(changes) > 0 {
			dense(t, 0, changes)
		}
	case err == errEnough:
		dense(t, 0, changes)
	default:
		t.Errorf("Watch from 0 after %d changes: %v", total, err)
	}
	// After ErrCompacted one reads, and watches from there.
	_, revision := f.read("k0000")
	want := f.commit(put("k", "1"))
	if c := f.watch(revision, 1); c[0].Revision != want {
		t.Errorf("the change after %d is %d", revision, c[0].Revision)
	}
}

func slowWatcher(t *testing.T, f *fixture) {
	standing, goOn := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		var last store.Revision
		ended <- f.store.Watch(f.ctx, 0, func(changes []store.Change) error {
			if last == 0 {
				close(standing)
				<-goOn
			}
			if changes[0].Revision != last+1 {
				return fmt.Errorf("change %d follows %d", changes[0].Revision, last)
			}
			if last = changes[len(changes)-1].Revision; last == 3001 {
				return errEnough
			}
			return nil
		})
	}()
	f.commit(put("a", "1"))
	<-standing
	f.fill("k", 3000)
	dense(t, 0, f.watch(0, 3001))
	close(goOn)
	if err := <-ended; err != errEnough {
		t.Errorf("the watcher that stood still: %v", err)
	}
}

func watchErrors(t *testing.T, f *fixture) {
	f.commit(put("a", "1"))
	own := errors.New("yield's own error")
	if err := f.store.Watch(f.ctx, 0, func([]store.Change) error { return own }); err != own {
		t.Errorf("after an error of yield: %v", err)
	}
	ctx, cancel := context.WithCancel(f.ctx)
	err := f.store.Watch(ctx, 0, func([]store.Change) error {
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of its context: %v", err)
	}
}

func watchAfterReopen(t *testing.T, f *fixture) {
	f.fill("k", 50)
	f.reopen()
	if got := f.revision(); got != 50 {
		t.Fatalf("it has revision %d", got)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- f.store.Watch(f.ctx, 50, func(changes []store.Change) error {
			if changes[0].Revision != 51 || string(changes[0].Writes[0].Value) != "new" {
				return fmt.Errorf("the first change is %+v", changes[0])
			}
			return errEnough
		})
	}()
	f.commit(put("k", "new"))
	if err := <-ended; err != errEnough {
		t.Errorf("Watch from the revision it was opened at: %v", err)
	}
	var changes []store.Change
	err := f.store.Watch(f.ctx, 10, func(cs []store.Change) error {
		changes = append(changes, cs...)
		if len(changes) == 41 {
			return errEnough
		}
		return nil
	})
	if err != errEnough && !errors.Is(err, store.ErrCompacted) {
		t.Errorf("Watch from an older revision: %v", err)
	}
	dense(t, 10, changes)
}
