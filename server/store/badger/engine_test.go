package badger_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

func put(key, value string, conditions ...store.Condition) store.Txn {
	return store.Txn{If: conditions, Do: []store.Write{{Key: key, Value: []byte(value)}}}
}

func revision(t testing.TB, db *badger.DB) store.Revision {
	t.Helper()
	revision, err := db.Read(context.Background(), "none", func(store.Record) error { return nil })
	if err != nil {
		t.Fatalf("Read: %v", err)
	}
	return revision
}

func count(t testing.TB, db *badger.DB) (n int) {
	t.Helper()
	if _, err := db.Read(context.Background(), "", func(store.Record) error { n++; return nil }); err != nil {
		t.Fatalf("Read: %v", err)
	}
	return n
}

func TestWritersWhoWaitShareOneSync(t *testing.T) {
	const writers = 64
	db := open(t, badger.Options{Dir: t.TempDir()})
	syncing, goOn := make(chan struct{}), make(chan struct{})
	commits := 0
	badger.OnCommit(db, func(next func() error) error {
		if commits++; commits == 1 {
			close(syncing)
			<-goOn
		}
		return next()
	})
	var group sync.WaitGroup
	write := func(w int) {
		group.Go(func() {
			for _, r := range db.Commit(t.Context(), put(fmt.Sprint("a", w), "1"), put(fmt.Sprint("b", w), "1")) {
				if r.Err != nil {
					t.Errorf("Commit: %v", r.Err)
				}
			}
		})
	}
	write(0)
	<-syncing
	for w := range writers {
		write(w + 1)
	}
	for badger.Waiting(db) < writers {
		runtime.Gosched()
	}
	close(goOn)
	group.Wait()
	if commits != 2 {
		t.Errorf("%d writers who came during one sync made for %d more, want 1", writers, commits-1)
	}
	if got := revision(t, db); got != 2*(writers+1) {
		t.Errorf("the store has revision %d", got)
	}
}

func TestChangesOfOneCommitComeInOneCall(t *testing.T) {
	db := open(t, badger.Options{InMemory: true})
	results := db.Commit(t.Context(), put("a", "1"), put("b", "no", store.Condition{Key: "a"}), put("c", "1"), store.Txn{})
	last := results[3].Revision
	err := db.Watch(t.Context(), 0, func(changes []store.Change) error {
		return fmt.Errorf("%d changes", len(changes))
	})
	if last != 3 || err.Error() != "3 changes" {
		t.Errorf("Watch yields %v, up to %d", err, last)
	}
	err = db.Watch(t.Context(), 1, func(changes []store.Change) error {
		return fmt.Errorf("%d changes from %d", len(changes), changes[0].Revision)
	})
	if err.Error() != "2 changes from 2" {
		t.Errorf("Watch from the middle yields %v", err)
	}
}

// large returns n transactions of two records of which a badger transaction has
// room for less than ten.
func large(n int) (txns []store.Txn) {
	for i := range n {
		txns = append(txns, store.Txn{Do: []store.Write{
			{Key: fmt.Sprintf("a%03d", i), Value: bytes.Repeat([]byte{byte(i)}, 100_000)},
			{Key: fmt.Sprintf("b%03d", i), Value: bytes.Repeat([]byte{byte(i)}, 100_000)},
		}})
	}
	return txns
}

func TestALargeBatchIsSplitBetweenTransactions(t *testing.T) {
	for _, o := range []badger.Options{{InMemory: true}, {Dir: t.TempDir(), MemTable: 12 << 20}} {
		db := open(t, o)
		commits := badger.CountCommits(db)
		for i, r := range db.Commit(t.Context(), large(60)...) {
			if r.Err != nil || r.Revision != store.Revision(i+1) {
				t.Fatalf("transaction %d: %+v", i, r)
			}
		}
		if n := commits.Load(); n < 3 || n > 15 {
			t.Errorf("12 MB took %d commits", n)
		}
		// Many small ones are over the number that badger takes at once.
		commits.Store(0)
		for i, r := range db.Commit(t.Context(), batch(0, 15_000)...) {
			if r.Err != nil || r.Revision != store.Revision(i+61) {
				t.Fatalf("transaction %d: %+v", i, r)
			}
		}
		if n := commits.Load(); n < 2 || n > 20 {
			t.Errorf("15,000 transactions took %d commits", n)
		}
		if n := count(t, db); n != 15_120 {
			t.Errorf("the store has %d records", n)
		}
	}
}

func TestAFailedCommitFailsItsTransactionsAndStopsTheStore(t *testing.T) {
	dir := t.TempDir()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("the disk is broken")
	commits := 0
	badger.OnCommit(db, func(next func() error) error {
		if commits++; commits == 3 {
			return broken
		}
		return next()
	})
	watching := make(chan error, 1)
	go func() { watching <- db.Watch(context.Background(), 0, func([]store.Change) error { return nil }) }()

	results := db.Commit(t.Context(), large(60)...)
	good := 0
	for good < len(results) && results[good].Err == nil {
		good++
	}
	if good == 0 || good == len(results) {
		t.Fatalf("%d of %d transactions succeeded", good, len(results))
	}
	for i, r := range results[good:] {
		if !errors.Is(r.Err, broken) || r.Revision != 0 {
			t.Errorf("transaction %d: %+v", good+i, r)
		}
	}
	if commits != 3 {
		t.Errorf("the store went on to commit %d times", commits-3)
	}

	if r := db.Commit(t.Context(), put("k", "1"))[0]; !errors.Is(r.Err, broken) {
		t.Errorf("Commit afterwards: %v", r.Err)
	}
	if _, err := db.Read(t.Context(), "", func(store.Record) error { return nil }); !errors.Is(err, broken) {
		t.Errorf("Read afterwards: %v", err)
	}
	if err := db.Watch(t.Context(), 0, func([]store.Change) error { return nil }); !errors.Is(err, broken) {
		t.Errorf("Watch afterwards: %v", err)
	}
	if err := <-watching; !errors.Is(err, broken) {
		t.Errorf("a Watch under way: %v", err)
	}
	if err := db.Advance(t.Context(), 1000); !errors.Is(err, broken) {
		t.Errorf("Advance afterwards: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if r := db.Commit(t.Context(), put("k", "1"))[0]; !errors.Is(r.Err, store.ErrClosed) {
		t.Errorf("Commit after Close: %v", r.Err)
	}

	db = open(t, badger.Options{Dir: dir})
	if got := revision(t, db); int(got) != good || count(t, db) != 2*good {
		t.Errorf("opened again it has revision %d and %d records, want %d transactions of two", got, count(t, db), good)
	}
}

func TestCallsThatWaitWhenTheStoreFailsFailToo(t *testing.T) {
	db := open(t, badger.Options{InMemory: true})
	broken := errors.New("the disk is broken")
	syncing, goOn := make(chan struct{}), make(chan struct{})
	badger.OnCommit(db, func(func() error) error {
		close(syncing)
		<-goOn
		return broken
	})
	var group sync.WaitGroup
	write := func(key string) {
		group.Go(func() {
			if r := db.Commit(t.Context(), put(key, "1"))[0]; !errors.Is(r.Err, broken) {
				t.Errorf("Commit: %v", r.Err)
			}
		})
	}
	write("a")
	<-syncing
	for i := range 10 {
		write(fmt.Sprint("b", i))
	}
	for badger.Waiting(db) < 10 {
		runtime.Gosched()
	}
	close(goOn)
	group.Wait()
}

func TestAFullDiskRefusesWritesUntilThereIsRoom(t *testing.T) {
	var log bytes.Buffer
	db := open(t, badger.Options{Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))})
	succeed(t, db.Commit(t.Context(), put("a", "1")))
	full := true
	badger.OnFree(db, func() uint64 {
		if full {
			return 10 << 20
		}
		return 10 << 30
	})
	results := db.Commit(t.Context(),
		put("b", "1", store.Condition{Key: "b"}),
		put("b", "2", store.Condition{Key: "b"}), // refused for a write that will not be
		put("a", "2", store.Condition{Key: "a"})) // also
	for i, r := range results {
		if r.Err == nil || !strings.Contains(r.Err.Error(), "is full: 10 MiB are free, 96 MiB are needed") || r.Revision != 0 {
			t.Errorf("transaction %d: %+v", i, r)
		}
	}
	if r := db.Commit(t.Context(), put("a", "2", store.Condition{Key: "a"}))[0]; !errors.Is(r.Err, store.ErrConflict) {
		t.Errorf("a conflict with what is there: %v", r.Err)
	}
	if err := db.Advance(t.Context(), 99); err == nil {
		t.Error("Advance wrote to a full disk")
	}
	if n := count(t, db); n != 1 {
		t.Errorf("the store has %d records", n)
	}
	full = false
	if r := db.Commit(t.Context(), put("b", "3", store.Condition{Key: "b"}))[0]; r.Err != nil || r.Revision != 2 {
		t.Errorf("Commit with room again: %+v", r)
	}
	if s := log.String(); strings.Count(s, "the disk is full") != 1 || strings.Count(s, "the disk has room again") != 1 {
		t.Errorf("the log says:\n%s", s)
	}
}

func TestASlowDiskIsInTheLogOnceAMinute(t *testing.T) {
	var log bytes.Buffer
	now := time.Unix(1_800_000_000, 0)
	db := open(t, badger.Options{InMemory: true, Log: slog.New(slog.NewTextHandler(&log, nil)), Now: func() time.Time { return now }})
	takes := time.Duration(0)
	badger.OnCommit(db, func(next func() error) error {
		now = now.Add(takes)
		return next()
	})
	for _, takes = range []time.Duration{0, 900 * time.Millisecond, 2 * time.Second, 3 * time.Second, time.Minute} {
		succeed(t, db.Commit(t.Context(), put("a", "1")))
	}
	if s := log.String(); strings.Count(s, "the disk is slow") != 2 || !strings.Contains(s, "took=2s") || !strings.Contains(s, "took=1m0s") {
		t.Errorf("the log says:\n%s", s)
	}
}

func TestWatchFromBeforeTheLastChangesIsCompacted(t *testing.T) {
	watch := func(db *badger.DB, after store.Revision) error {
		return db.Watch(t.Context(), after, func(changes []store.Change) error {
			return fmt.Errorf("change %d", changes[0].Revision)
		})
	}
	t.Run("by number", func(t *testing.T) {
		db := open(t, badger.Options{InMemory: true})
		for range 20 {
			succeed(t, db.Commit(t.Context(), batchOf(1000, 10)...))
		}
		if err := watch(db, 10_000); err.Error() != "change 10001" {
			t.Errorf("the last 10,000: %v", err)
		}
		if err := watch(db, 5_000); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("the last 15,000: %v", err)
		}
	})
	t.Run("by size", func(t *testing.T) {
		db := open(t, badger.Options{InMemory: true})
		for range 60 {
			succeed(t, db.Commit(t.Context(), batchOf(1, 1_000_000)...))
		}
		if err := watch(db, 30); err.Error() != "change 31" {
			t.Errorf("the last 30 MB: %v", err)
		}
		if err := watch(db, 20); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("the last 40 MB: %v", err)
		}
	})
	t.Run("by a restart", func(t *testing.T) {
		dir := t.TempDir()
		db, err := badger.Open(badger.Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		succeed(t, db.Commit(t.Context(), batchOf(5, 10)...))
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		db = open(t, badger.Options{Dir: dir})
		if err := watch(db, 4); !errors.Is(err, store.ErrCompacted) {
			t.Errorf("from before it was opened: %v", err)
		}
		succeed(t, db.Commit(t.Context(), batchOf(1, 10)...))
		if err := watch(db, 5); err.Error() != "change 6" {
			t.Errorf("from when it was opened: %v", err)
		}
	})
}

// batchOf returns n transactions that write the same few keys.
func batchOf(n, size int) (txns []store.Txn) {
	for i := range n {
		txns = append(txns, put(fmt.Sprint("k", i%7), strings.Repeat("v", size)))
	}
	return txns
}

func TestAdvanceRaisesTheRevision(t *testing.T) {
	dir := t.TempDir()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	succeed(t, db.Commit(t.Context(), put("a", "1"), put("b", "1")))
	behind := make(chan error, 1)
	go func() { behind <- db.Watch(t.Context(), 2, func([]store.Change) error { return nil }) }()
	for _, to := range []store.Revision{1 << 40, 5} { // the second is behind
		if err := db.Advance(t.Context(), to); err != nil {
			t.Fatalf("Advance(%d): %v", to, err)
		}
		if got := revision(t, db); got != 1<<40 {
			t.Errorf("after Advance(%d) the store has revision %d", to, got)
		}
	}
	if err := <-behind; !errors.Is(err, store.ErrCompacted) {
		t.Errorf("a Watch from before: %v", err)
	}
	if r := db.Commit(t.Context(), put("a", "2", store.Condition{Key: "a", Revision: 1}))[0]; r.Err != nil || r.Revision != 1<<40+1 {
		t.Errorf("Commit afterwards: %+v", r)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if got := revision(t, open(t, badger.Options{Dir: dir})); got != 1<<40+1 {
		t.Errorf("opened again it has revision %d", got)
	}
}

func TestAnOrdinaryLifeIsNotInTheLog(t *testing.T) {
	var log bytes.Buffer
	// By this clock no write takes long, however busy the machine is.
	still := time.Unix(1_800_000_000, 0)
	o := badger.Options{Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil)), Now: func() time.Time { return still }}
	for range 3 {
		db, err := badger.Open(o)
		if err != nil {
			t.Fatal(err)
		}
		succeed(t, db.Commit(t.Context(), large(60)...))
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if log.Len() > 0 {
		t.Errorf("the log says:\n%s", log.String())
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for what, o := range map[string]badger.Options{
		"no directory":             {},
		"memory and a directory":   {InMemory: true, Dir: t.TempDir()},
		"a memtable too small":     {InMemory: true, MemTable: 1 << 20},
		"a memtable too large":     {InMemory: true, MemTable: 1 << 30},
		"a file for the directory": {Dir: os.Args[0]},
	} {
		if db, err := badger.Open(o); err == nil {
			db.Close()
			t.Errorf("%s was accepted", what)
		}
	}
}

func TestNobodyElseCanReadTheFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by", "open")
	open(t, badger.Options{Dir: dir})
	lax := t.TempDir()
	if err := os.Chmod(lax, 0o755); err != nil {
		t.Fatal(err)
	}
	open(t, badger.Options{Dir: lax})
	for _, d := range []string{dir, lax} {
		info, err := os.Stat(d)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o700 {
			t.Errorf("the directory has the mode %v", info.Mode())
		}
	}
}

func TestTheValueLogStaysEmpty(t *testing.T) {
	dir := t.TempDir()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 12 { // more than a memtable
		succeed(t, db.Commit(t.Context(), put(fmt.Sprint(i), strings.Repeat("v", store.MaxValue))))
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(dir, "*.vlog"))
	if err != nil || len(logs) == 0 {
		t.Fatalf("there is no value log: %v", err)
	}
	for _, log := range logs {
		if info, err := os.Stat(log); err != nil || info.Size() > 100 {
			t.Errorf("%s has %d bytes: %v", log, info.Size(), err)
		}
	}
}

// TestDamageIsAnErrorAtOpen flips one byte of each table in turn: a store that
// has lost records must not open as if it had fewer.
func TestDamageIsAnErrorAtOpen(t *testing.T) {
	dir := t.TempDir()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	succeed(t, db.Commit(t.Context(), batch(0, 1000)...))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil || len(tables) == 0 {
		t.Fatalf("there is no table: %v", err)
	}
	for _, table := range tables {
		good, err := os.ReadFile(table)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []int{0, len(good) / 3, len(good) / 2, len(good) - 200} {
			bad := bytes.Clone(good)
			bad[at] ^= 0x10
			if err := os.WriteFile(table, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if db, err := badger.Open(badger.Options{Dir: dir}); err == nil {
				t.Errorf("with byte %d of %d flipped it opens, with %d records", at, len(good), count(t, db))
				db.Close()
			}
		}
		if err := os.WriteFile(table, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n := count(t, open(t, badger.Options{Dir: dir})); n != 1000 {
		t.Errorf("repaired it has %d records", n)
	}
}

func TestLogsThatAKillLeftEmptyAreSweptAway(t *testing.T) {
	dir := t.TempDir()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	succeed(t, db.Commit(t.Context(), batch(0, 10)...))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"00001.mem", "00002.mem", "000009.vlog"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n := count(t, open(t, badger.Options{Dir: dir})); n != 10 {
		t.Errorf("the store has %d records", n)
	}
}

func TestAnotherFormatIsRefused(t *testing.T) {
	dir := t.TempDir()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(dir, "MANIFEST")
	b, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	b[5]++ // the version of badger's user, after badger's four letters
	if err := os.WriteFile(manifest, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if db, err := badger.Open(badger.Options{Dir: dir}); err == nil {
		db.Close()
		t.Error("a store of another format opens")
	}
}

func TestASecondProcessIsToldThatTheServerRuns(t *testing.T) {
	dir := t.TempDir()
	open(t, badger.Options{Dir: dir})
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), "HALLMARK_TEST_OPEN="+dir)
	out, err := child.CombinedOutput()
	if err == nil {
		t.Fatalf("a second process opened the store: %s", out)
	}
	want := fmt.Sprintf("%s is in use by process %d: the server is running; use the admin commands, which ask it over its admin socket", dir, os.Getpid())
	if !strings.Contains(string(out), want) {
		t.Errorf("the second process was told %q, want %q", out, want)
	}
	if _, err := badger.Open(badger.Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("a second Open here: %v", err)
	}
}

// TestNothingIsLeftBehind counts goroutines: Close waits for all of them.
func TestNothingIsLeftBehind(t *testing.T) {
	before := runtime.NumGoroutine()
	dir := t.TempDir()
	for range 3 {
		db, err := badger.Open(badger.Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		succeed(t, db.Commit(t.Context(), put("a", "1")))
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Errorf("a second Close: %v", err)
		}
	}
	for limit := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; runtime.Gosched() { // badger signals some without waiting
		if time.Now().After(limit) {
			t.Fatalf("there are %d goroutines, were %d", runtime.NumGoroutine(), before)
		}
	}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, "LOCK") || strings.HasSuffix(path, ".mem") {
			t.Errorf("%s is left", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
