package store_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

func memory(t testing.TB) *badger.DB {
	t.Helper()
	db, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func commit(t testing.TB, s store.Store, txns ...store.Txn) {
	t.Helper()
	for _, r := range s.Commit(context.Background(), txns...) {
		if r.Err != nil {
			t.Fatalf("Commit: %v", r.Err)
		}
	}
}

func put(key string, value []byte) store.Txn {
	return store.Txn{Do: []store.Write{{Key: key, Value: value}}}
}

func contents(t testing.TB, s store.Store) (map[string]string, store.Revision) {
	t.Helper()
	all := map[string]string{}
	revision, err := s.Read(context.Background(), "", func(r store.Record) error {
		all[r.Key] = string(r.Value)
		return nil
	})
	if err != nil {
		t.Fatalf("Read: %v", err)
	}
	return all, revision
}

func backup(t testing.TB, s store.Store) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := store.Backup(context.Background(), s, &b); err != nil {
		t.Fatalf("Backup: %v", err)
	}
	return b.Bytes()
}

// sample is a store with records of many sizes, which have been rewritten.
func sample(t testing.TB) *badger.DB {
	s := memory(t)
	for round := range 3 {
		var txns []store.Txn
		for i := range 700 {
			txns = append(txns, put(fmt.Sprint("entry/", i), fmt.Append(nil, "value ", i, " of round ", round)))
		}
		commit(t, s, txns...)
	}
	commit(t, s,
		put("empty", []byte{}),
		put("\x00\xff binary", []byte{0, 255, 0}),
		put(strings.Repeat("k", store.MaxKey), bytes.Repeat([]byte("v"), store.MaxValue)),
		put("large", bytes.Repeat([]byte("w"), store.MaxValue)),
		store.Txn{Do: []store.Write{{Key: "entry/7"}}})
	return s
}

func same(t testing.TB, got, want map[string]string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("there are %d records, want %d", len(got), len(want))
	}
	for k, v := range want {
		if g, ok := got[k]; !ok || g != v {
			t.Errorf("%.20q has %.40q, want %.40q", k, g, v)
		}
	}
}

func TestARestoredStoreHasWhatWasBackedUp(t *testing.T) {
	original := sample(t)
	want, revision := contents(t, original)
	var b bytes.Buffer
	at, err := store.Backup(t.Context(), original, &b)
	if err != nil || at != revision {
		t.Fatalf("Backup: revision %d, want %d: %v", at, revision, err)
	}
	file := filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	opened, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	pipe, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	go func() {
		in.Write(b.Bytes())
		in.Close()
	}()
	for what, r := range map[string]io.Reader{
		"memory":         bytes.NewReader(b.Bytes()),
		"a file":         opened,
		"a pipe":         pipe,
		"a plain reader": io.MultiReader(bytes.NewReader(b.Bytes())),
	} {
		s := memory(t)
		n, err := store.Restore(t.Context(), s, r)
		if err != nil || n != len(want) {
			t.Fatalf("Restore from %s: %d records, want %d: %v", what, n, len(want), err)
		}
		got, now := contents(t, s)
		same(t, got, want)
		if now <= revision {
			t.Errorf("from %s the restored store has revision %d, the backup %d", what, now, revision)
		}
		if err := store.CheckRestored(t.Context(), s); err != nil {
			t.Errorf("CheckRestored: %v", err)
		}
		again := backup(t, s)
		if !bytes.Equal(again[:len(again)-40], b.Bytes()[:b.Len()-40]) {
			t.Error("a backup of the restored store has other records")
		}
	}
}

func TestARestoreBeginsWhereTheReaderStands(t *testing.T) {
	b := backup(t, sample(t))
	r := bytes.NewReader(append([]byte("before"), b...))
	if _, err := r.Seek(6, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Restore(t.Context(), memory(t), r); err != nil {
		t.Errorf("Restore: %v", err)
	}
}

// TestNobodyWhoSawALaterRevisionMissesTheRestore is why the revision jumps: the
// store that was lost had gone on after its backup.
func TestNobodyWhoSawALaterRevisionMissesTheRestore(t *testing.T) {
	original := memory(t)
	commit(t, original, put("a", []byte("1")))
	b := backup(t, original)
	var txns []store.Txn
	for range 20_000 {
		txns = append(txns, put("a", []byte("2")))
	}
	commit(t, original, txns...)
	_, seen := contents(t, original)

	restored := memory(t)
	if _, err := store.Restore(t.Context(), restored, bytes.NewReader(b)); err != nil {
		t.Fatal(err)
	}
	commit(t, restored, put("b", []byte("1")))
	err := restored.Watch(t.Context(), seen, func([]store.Change) error { return errors.New("changes") })
	if !errors.Is(err, store.ErrCompacted) {
		t.Errorf("a watcher who saw revision %d of the lost store gets %v", seen, err)
	}
}

func TestABackupIsOfOneRevisionWhileOthersWrite(t *testing.T) {
	s := memory(t)
	write := func(round int) store.Txn {
		var txn store.Txn
		for k := range 90 {
			txn.Do = append(txn.Do, store.Write{Key: fmt.Sprint("k", k), Value: fmt.Append(nil, round)})
		}
		return txn
	}
	commit(t, s, write(0))
	ctx, stop := context.WithCancel(t.Context())
	var writer sync.WaitGroup
	writer.Go(func() {
		for round := 1; ctx.Err() == nil; round++ {
			commit(t, s, write(round))
		}
	})
	for range 20 {
		var b bytes.Buffer
		at, err := store.Backup(t.Context(), s, &b)
		if err != nil {
			t.Fatalf("Backup: %v", err)
		}
		restored := memory(t)
		if _, err := store.Restore(t.Context(), restored, &b); err != nil {
			t.Fatalf("Restore: %v", err)
		}
		all, _ := contents(t, restored)
		for k, v := range all {
			if v != fmt.Sprint(at-1) {
				t.Fatalf("a backup of revision %d has %s=%s", at, k, v)
			}
		}
		restored.Close()
	}
	stop()
	writer.Wait()
}

// seal gives a body the end that belongs to it.
func seal(body []byte, count, revision uint64) []byte {
	b := binary.BigEndian.AppendUint32(bytes.Clone(body), 0)
	b = binary.BigEndian.AppendUint64(b, count)
	b = binary.BigEndian.AppendUint64(b, revision)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

const headSize = 20

func head(format uint32) []byte {
	return binary.BigEndian.AppendUint32([]byte("hallmark backup\n"), format)
}

func frame(b []byte, key, value string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(2+len(key)+len(value)))
	b = binary.BigEndian.AppendUint16(b, uint16(len(key)))
	return append(append(b, key...), value...)
}

func TestADamagedBackupRestoresNothingAndSaysWhy(t *testing.T) {
	small := memory(t)
	commit(t, small, put("a", []byte("1")), put("b", []byte("2")))
	good := backup(t, small)
	flip := func(at int) []byte {
		b := bytes.Clone(good)
		b[at] ^= 1
		return b
	}
	number := func(at int, n uint32) []byte {
		b := bytes.Clone(good)
		binary.BigEndian.PutUint32(b[at:], n)
		return b
	}
	tests := []struct {
		what, why string
		file      []byte
	}{
		{"nothing", "not a backup", nil},
		{"a text", "not a backup", []byte("trust_domain: example.org\nlisten: 127.0.0.1:8081\n")},
		{"zeros", "not a backup", make([]byte, 1<<20)},
		{"half a magic", "not a backup", good[:8]},
		{"only the magic", "truncated", good[:16]},
		{"only the head", "truncated", good[:headSize]},
		{"half a record", "truncated", good[:headSize+7]},
		{"no end", "truncated", good[:len(good)-52]},
		{"half a checksum", "truncated", good[:len(good)-10]},
		{"one byte less", "truncated", good[:len(good)-1]},
		{"one byte more", "something follows", append(bytes.Clone(good), 0)},
		{"two backups", "something follows", append(bytes.Clone(good), good...)},
		{"another format", "its format is 2", seal(head(2), 0, 0)},
		{"a flipped bit in the magic", "not a backup", flip(3)},
		{"a flipped bit in a key", "checksum", flip(headSize + 6)},
		{"a flipped bit in a value", "checksum", flip(headSize + 7)},
		{"a flipped bit in the count", "checksum", flip(len(good) - 41)},
		{"a flipped bit in the revision", "checksum", flip(len(good) - 33)},
		{"a flipped bit in the checksum", "checksum", flip(len(good) - 1)},
		{"a record too long", "has a length of 4294967295", number(headSize, 1<<32-1)},
		{"a record too short", "has a length of 1", number(headSize, 1)},
		{"a key longer than its record", "has a key of", seal(append(head(1), 0, 0, 0, 3, 0, 9, 'a'), 1, 1)},
		{"a key over its bound", "has a key of", seal(frame(head(1), strings.Repeat("k", store.MaxKey+1), ""), 1, 1)},
		{"a value over its bound", "has a key of", seal(frame(head(1), "", strings.Repeat("k", store.MaxValue+1)), 1, 1)},
		{"a record less than it says", "it has 2 records, and has 1", seal(frame(head(1), "a", "1"), 2, 2)},
		{"records out of order", "out of order", seal(frame(frame(head(1), "b", "1"), "a", "1"), 2, 2)},
		{"a record twice", "out of order", seal(frame(frame(head(1), "a", "1"), "a", "1"), 2, 2)},
		{"a revision out of range", "has revision", seal(frame(head(1), "a", "1"), 1, 1<<63+7)},
		{"a store in the middle of a restore", "being restored", seal(frame(head(1), "restoring", ""), 1, 1)},
	}
	s := memory(t)
	for _, test := range tests {
		for _, r := range []io.Reader{bytes.NewReader(test.file), io.MultiReader(bytes.NewReader(test.file))} {
			n, err := store.Restore(t.Context(), s, r)
			if err == nil || n != 0 || !strings.Contains(err.Error(), test.why) || !strings.HasPrefix(err.Error(), "verify the backup: ") {
				t.Errorf("%s: %d records, %v; want an error with %q", test.what, n, err, test.why)
			}
		}
		if all, revision := contents(t, s); len(all) != 0 || revision != 0 {
			t.Fatalf("%s: the store has %d records at revision %d", test.what, len(all), revision)
		}
	}
	// Every bit counts, and every length.
	for i := range good {
		if n, err := store.Restore(t.Context(), s, bytes.NewReader(flip(i))); err == nil || n != 0 {
			t.Errorf("with byte %d changed it was restored", i)
		}
		if n, err := store.Restore(t.Context(), s, bytes.NewReader(good[:i])); err == nil || n != 0 {
			t.Errorf("cut to %d bytes it was restored", i)
		}
	}
	if n, err := store.Restore(t.Context(), s, bytes.NewReader(good)); err != nil || n != 2 {
		t.Errorf("the good one: %d records, %v", n, err)
	}
}

func TestOnlyAnEmptyStoreIsRestoredInto(t *testing.T) {
	b := backup(t, sample(t))
	s := memory(t)
	commit(t, s, put("mine", []byte("1")))
	n, err := store.Restore(t.Context(), s, bytes.NewReader(b))
	if err == nil || n != 0 || !strings.Contains(err.Error(), "only be restored into an empty store") {
		t.Errorf("Restore: %d records, %v", n, err)
	}
	all, revision := contents(t, s)
	same(t, all, map[string]string{"mine": "1"})
	if revision != 1 {
		t.Errorf("the store has revision %d", revision)
	}
	commit(t, s, store.Txn{Do: []store.Write{{Key: "mine"}}})
	if _, err := store.Restore(t.Context(), s, bytes.NewReader(b)); err != nil {
		t.Errorf("Restore into a store that was emptied: %v", err)
	}
}

// failing is a store whose commits fail after a number of them, as if the
// process had been killed.
type failing struct {
	store.Store
	left int
}

func (f *failing) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	if f.left--; f.left >= 0 {
		return f.Store.Commit(ctx, txns...)
	}
	rs := make([]store.Result, len(txns))
	for i := range rs {
		rs[i].Err = errors.New("killed")
	}
	return rs
}

func TestAnInterruptedRestoreIsNoticed(t *testing.T) {
	large := memory(t)
	for i := range 12 {
		commit(t, large, put(fmt.Sprint(i), make([]byte, store.MaxValue)))
	}
	b := backup(t, large)
	for left := range 6 {
		s := memory(t)
		_, err := store.Restore(t.Context(), &failing{s, left}, bytes.NewReader(b))
		if err == nil {
			if left < 3 {
				t.Errorf("12 MB were restored in %d calls", left)
			}
			break
		}
		all, _ := contents(t, s)
		err = store.CheckRestored(t.Context(), s)
		if left == 0 {
			if err != nil || len(all) != 0 {
				t.Errorf("before the first write: %d records, %v", len(all), err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), "restore the backup again") {
			t.Errorf("after %d calls CheckRestored says %v", left, err)
		}
		if _, err := store.Restore(t.Context(), s, bytes.NewReader(b)); err == nil || !strings.Contains(err.Error(), "was interrupted") {
			t.Errorf("after %d calls a second Restore says %v", left, err)
		}
		if _, err := store.Backup(t.Context(), s, io.Discard); err == nil || !strings.Contains(err.Error(), "was interrupted") {
			t.Errorf("after %d calls Backup says %v", left, err)
		}
		s.Close()
	}
}

// changing is a file that is not the same when it is read again.
type changing struct {
	*bytes.Reader
	then []byte
}

func (c *changing) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		c.Reader = bytes.NewReader(c.then)
	}
	return c.Reader.Seek(offset, whence)
}

func TestABackupThatChangesMeanwhileIsNoticed(t *testing.T) {
	good := backup(t, sample(t))
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	s := memory(t)
	if _, err := store.Restore(t.Context(), s, &changing{bytes.NewReader(good), bad}); err == nil || !strings.Contains(err.Error(), "has changed") {
		t.Errorf("Restore: %v", err)
	}
	if err := store.CheckRestored(t.Context(), s); err == nil {
		t.Error("CheckRestored says that the store is whole")
	}
}

// full is a writer that fails after some bytes.
type full struct{ left int }

var errFull = errors.New("no room")

func (f *full) Write(p []byte) (int, error) {
	if f.left -= len(p); f.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestABackupThatCannotBeWrittenFails(t *testing.T) {
	s := sample(t)
	size := len(backup(t, s))
	for _, left := range []int{0, 100_000, size - 1} {
		if _, err := store.Backup(t.Context(), s, &full{left}); !errors.Is(err, errFull) {
			t.Errorf("with room for %d of %d bytes: %v", left, size, err)
		}
	}
	if _, err := store.Backup(t.Context(), s, &full{size}); err != nil {
		t.Errorf("with room enough: %v", err)
	}
}

func TestACancelledBackupOrRestoreEnds(t *testing.T) {
	s := sample(t)
	b := backup(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := store.Backup(ctx, s, io.Discard); !errors.Is(err, context.Canceled) {
		t.Errorf("Backup: %v", err)
	}
	if _, err := store.Restore(ctx, memory(t), bytes.NewReader(b)); !errors.Is(err, context.Canceled) {
		t.Errorf("Restore: %v", err)
	}
}

func TestAnEmptyStoreIsBackedUpAndRestored(t *testing.T) {
	b := backup(t, memory(t))
	s := memory(t)
	n, err := store.Restore(t.Context(), s, bytes.NewReader(b))
	if all, revision := contents(t, s); err != nil || n != 0 || len(all) != 0 || revision == 0 {
		t.Errorf("Restore: %d records, %v; the store has %d at %d", n, err, len(all), revision)
	}
}

func TestABackupOfAFarRevisionIsRestored(t *testing.T) {
	far := seal(frame(head(1), "a", "1"), 1, 1<<50)
	s := memory(t)
	if _, err := store.Restore(t.Context(), s, bytes.NewReader(far)); err != nil {
		t.Errorf("Restore: %v", err)
	}
	if _, revision := contents(t, s); revision <= 1<<50 {
		t.Errorf("the store has revision %d", revision)
	}
}

func FuzzRestore(f *testing.F) {
	small := memory(f)
	commit(f, small, put("a", []byte("1")), put("b", []byte{}), put("c", []byte("3")))
	good := backup(f, small)
	f.Add(good)
	f.Add(good[:len(good)-52]) // the body, which the fuzzer seals
	f.Add(seal(head(1), 0, 0))
	f.Add(frame(head(1), "k", "v"))
	f.Add(head(2))
	f.Add([]byte{})
	s := memory(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, file := range [][]byte{data, seal(data, 1, 5), seal(data, 3, 1<<40)} {
			n, err := store.Restore(t.Context(), s, bytes.NewReader(file))
			all, _ := contents(t, s)
			if err != nil {
				if n != 0 || len(all) != 0 {
					t.Fatalf("Restore: %v, after %d records", err, len(all))
				}
				continue
			}
			if n != len(all) {
				t.Fatalf("Restore says %d records, the store has %d", n, len(all))
			}
			// It was a backup, so it is one now, but for its revision.
			again := backup(t, s)
			if !bytes.Equal(again[:len(again)-40], file[:len(file)-40]) {
				t.Fatal("a backup of the restored store has other records")
			}
			var txn []store.Txn
			for k := range all {
				txn = append(txn, store.Txn{Do: []store.Write{{Key: k}}})
			}
			commit(t, s, txn...)
		}
	})
}
