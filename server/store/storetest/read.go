package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/store"
)

func readPrefix(t *testing.T, f *fixture) {
	keys := []string{"\x00", "\x00\xff", "a", "a\x00", "a\x00b", "a/", "a/b", "aa", "ab", "b", "é", "\xfe", "\xff", "\xff\x00", "\xff\xff", "\xff\xffz"}
	if !slices.IsSorted(keys) {
		t.Fatal("the keys of this test are not in order")
	}
	wrote := map[string]store.Revision{}
	for _, i := range []int{7, 3, 15, 0, 9, 1, 12, 5, 14, 2, 11, 4, 13, 6, 10, 8} {
		wrote[keys[i]] = f.commit(put(keys[i], "value of "+keys[i]))
	}
	f.commit(put("gone", "1"))
	last := f.commit(remove("gone"))
	for _, prefix := range append([]string{"", "none", "ab\x00", "g"}, keys...) {
		var want []string
		for _, k := range keys {
			if strings.HasPrefix(k, prefix) {
				want = append(want, k)
			}
		}
		records, revision := f.read(prefix)
		var got []string
		for _, r := range records {
			got = append(got, r.Key)
			if string(r.Value) != "value of "+r.Key {
				t.Errorf("%q has the value %q", r.Key, r.Value)
			}
			if r.Revision != wrote[r.Key] {
				t.Errorf("%q has revision %d, was written at %d", r.Key, r.Revision, wrote[r.Key])
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("prefix %q has the keys %q, want %q", prefix, got, want)
		}
		if revision != last {
			t.Errorf("prefix %q was read as of %d, want %d", prefix, revision, last)
		}
	}
}

func readStops(t *testing.T, f *fixture) {
	f.fill("k", 10)
	n := 0
	_, err := f.store.Read(f.ctx, "", func(store.Record) error {
		if n++; n == 3 {
			return errEnough
		}
		return nil
	})
	if err != errEnough || n != 3 {
		t.Errorf("Read yielded %d records and returned %v, want 3 and yield's error", n, err)
	}
}

func readValuesKept(t *testing.T, f *fixture) {
	f.fill("k", 500)
	first, _ := f.read("")
	for i := range first {
		copy(first[i].Value, "XXXXXX")
		first[i].Value = append(first[i].Value, "more"...)
	}
	second, _ := f.read("")
	for i, r := range second {
		if string(r.Value) != fmt.Sprint(i) {
			t.Fatalf("%s has %q after the value of an earlier Read was changed", r.Key, r.Value)
		}
	}
	for _, r := range first {
		if !strings.HasPrefix(string(r.Value), "X") {
			t.Fatalf("a value that was kept has become %q", r.Value)
		}
	}
}

// readIsConsistent reads while transactions write all keys at once: a Read sees
// one transaction's values, and says its revision.
func readIsConsistent(t *testing.T, f *fixture) {
	const keys, rounds = 40, 150
	write := func(round int) store.Txn {
		var txn store.Txn
		for k := range keys {
			txn.Do = append(txn.Do, store.Write{Key: fmt.Sprintf("k%02d", k), Value: fmt.Append(nil, round)})
		}
		return txn
	}
	f.commit(write(0))
	ctx, stop := context.WithCancel(f.ctx)
	var group sync.WaitGroup
	group.Go(func() {
		defer stop()
		for round := range rounds {
			if r := f.store.Commit(f.ctx, write(round))[0]; r.Err != nil {
				t.Errorf("Commit: %v", r.Err)
				return
			}
		}
	})
	for range 3 {
		group.Go(func() {
			var last store.Revision
			for ctx.Err() == nil {
				var seen []store.Record
				revision, err := f.store.Read(f.ctx, "", func(r store.Record) error {
					seen = append(seen, r)
					return nil
				})
				if err != nil || len(seen) != keys {
					t.Errorf("Read: %d records, %v", len(seen), err)
					return
				}
				for _, r := range seen {
					if r.Revision != revision || string(r.Value) != string(seen[0].Value) {
						t.Errorf("a Read as of %d has %s=%s of revision %d beside %s=%s", revision, r.Key, r.Value, r.Revision, seen[0].Key, seen[0].Value)
						return
					}
				}
				if revision < last {
					t.Errorf("a Read as of %d came after one as of %d", revision, last)
					return
				}
				last = revision
			}
		})
	}
	group.Wait()
}

func readYourWrites(t *testing.T, f *fixture) {
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			for i := range 50 {
				key, value := fmt.Sprint("writer", w), fmt.Sprint(i)
				r := f.store.Commit(f.ctx, put(key, value))[0]
				if r.Err != nil {
					t.Errorf("Commit: %v", r.Err)
					return
				}
				var got store.Record
				revision, err := f.store.Read(f.ctx, key, func(r store.Record) error {
					got = r
					return nil
				})
				if err != nil || string(got.Value) != value || got.Revision != r.Revision || revision < r.Revision {
					t.Errorf("after %s=%s was committed at %d, Read as of %d has %s of %d: %v", key, value, r.Revision, revision, got.Value, got.Revision, err)
					return
				}
			}
		})
	}
	group.Wait()
}

func closeWaits(t *testing.T, f *fixture) {
	f.fill("k", 10)
	reading, goOn := make(chan struct{}), make(chan struct{})
	read := make(chan error, 1)
	go func() {
		n := 0
		_, err := f.store.Read(f.ctx, "", func(store.Record) error {
			if n++; n == 1 {
				close(reading)
				<-goOn
			}
			return nil
		})
		if err == nil && n != 10 {
			err = fmt.Errorf("it yielded %d records", n)
		}
		read <- err
	}()
	<-reading
	closing := make(chan error, 1)
	go func() {
		f.closed = true
		closing <- f.store.Close()
	}()
	for { // Close has begun when calls are refused
		r := f.store.Commit(f.ctx, put("k", "1"))[0]
		if errors.Is(r.Err, store.ErrClosed) {
			break
		}
		if r.Err != nil {
			t.Fatalf("Commit: %v", r.Err)
		}
	}
	select {
	case err := <-closing:
		t.Fatalf("Close returned %v while a Read was under way", err)
	case <-time.After(50 * time.Millisecond): // more than Close takes
	}
	close(goOn)
	if err := <-read; err != nil {
		t.Errorf("a Read that was under way at Close: %v", err)
	}
	if err := <-closing; err != nil {
		t.Errorf("Close: %v", err)
	}
}

func closed(t *testing.T, f *fixture) {
	start := f.revision()
	f.commit(put("a", "1"))
	watching := make(chan error, 1)
	started := make(chan struct{})
	go func() {
		once := sync.OnceFunc(func() { close(started) })
		watching <- f.store.Watch(f.ctx, start, func([]store.Change) error {
			once()
			return nil
		})
	}()
	<-started
	f.close()
	if err := <-watching; !errors.Is(err, store.ErrClosed) {
		t.Errorf("a Watch ends with %v when the store is closed", err)
	}
	rs := f.store.Commit(f.ctx, put("a", "2"), put("b", "2"))
	if len(rs) != 2 || !errors.Is(rs[0].Err, store.ErrClosed) || !errors.Is(rs[1].Err, store.ErrClosed) {
		t.Errorf("Commit: %+v", rs)
	}
	if _, err := f.store.Read(f.ctx, "", func(store.Record) error { return nil }); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Read: %v", err)
	}
	if err := f.store.Watch(f.ctx, start, func([]store.Change) error { return nil }); !errors.Is(err, store.ErrClosed) {
		t.Errorf("Watch: %v", err)
	}
}

func reopened(t *testing.T, f *fixture) {
	f.fill("k", 300)
	f.commit(remove("k000007"))
	large := f.commit(put("large", strings.Repeat("v", store.MaxValue)))
	empty := f.commit(store.Txn{Do: []store.Write{{Key: "empty", Value: []byte{}}}})
	before, revision := f.read("")
	f.reopen()
	after, now := f.read("")
	if now != revision {
		t.Errorf("it has revision %d, had %d", now, revision)
	}
	if !slices.EqualFunc(before, after, func(a, b store.Record) bool {
		return a.Key == b.Key && string(a.Value) == string(b.Value) && a.Revision == b.Revision && (a.Value == nil) == (b.Value == nil)
	}) {
		t.Errorf("its records have changed: there are %d, were %d", len(after), len(before))
	}
	if got := f.commit(put("large", "1", at("large", large), at("empty", empty), at("k000007", 0))); got <= revision {
		t.Errorf("the next transaction has revision %d after %d", got, revision)
	}
}

// closeUnderLoad closes the store while many write: each write is refused, or
// there for good.
func closeUnderLoad(t *testing.T, f *fixture) {
	const writers = 8
	acknowledged := make([]int, writers)
	var enough, group sync.WaitGroup
	enough.Add(writers)
	for w := range writers {
		group.Go(func() {
			for i := 1; ; i++ {
				r := f.store.Commit(f.ctx, put(fmt.Sprint("w", w), fmt.Sprint(i)), put(fmt.Sprint("x", w), fmt.Sprint(i)))
				if r[0].Err != nil || r[1].Err != nil {
					if !errors.Is(r[0].Err, store.ErrClosed) || !errors.Is(r[1].Err, store.ErrClosed) {
						t.Errorf("Commit: %v, %v", r[0].Err, r[1].Err)
					}
					if i <= 10 {
						enough.Done()
					}
					return
				}
				acknowledged[w] = i
				if i == 10 {
					enough.Done()
				}
			}
		})
	}
	enough.Wait()
	f.close()
	group.Wait()
	f.reopen()
	records, _ := f.read("")
	for _, r := range records {
		var w int
		fmt.Sscanf(r.Key[1:], "%d", &w)
		if string(r.Value) != fmt.Sprint(acknowledged[w]) {
			t.Errorf("%s=%s, acknowledged was %d", r.Key, r.Value, acknowledged[w])
		}
	}
	if len(records) != 2*writers {
		t.Errorf("the store has %d records", len(records))
	}
}
