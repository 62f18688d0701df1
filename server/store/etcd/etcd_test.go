package etcd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/server/store/etcd"
	"github.com/hallmark-id/hallmark/server/store/storetest"
)

// single starts a cluster of one member in this process, and returns a function
// that makes clients of it.
func single(t testing.TB, quota int64) func() *clientv3.Client {
	t.Helper()
	c := embed.NewConfig()
	c.Dir = t.TempDir()
	c.LogLevel = "panic" // it calls its own end an error
	c.ListenPeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	c.AdvertisePeerUrls = c.ListenPeerUrls
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.ListenClientUrls, c.AdvertiseClientUrls = nil, nil
	c.QuotaBackendBytes = quota
	c.UnsafeNoFsync = true // nothing here ends by surprise
	e, err := embed.StartEtcd(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	<-e.Server.ReadyNotify()
	return func() *clientv3.Client { return v3client.New(e.Server) }
}

func open(t testing.TB, o etcd.Options) *etcd.DB {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	db, err := etcd.Open(ctx, o)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return db
}

// contract runs the suite on a cluster, with a prefix for each of its tests.
func contract(t *testing.T, client func() *clientv3.Client) {
	var n atomic.Int64
	storetest.Run(t, func(t *testing.T) (store.Store, func() store.Store) {
		o := etcd.Options{Client: client(), Prefix: fmt.Sprintf("test%d/", n.Add(1)), Name: "one"}
		db := open(t, o)
		return db, func() store.Store {
			if err := db.Close(); err != nil {
				t.Fatalf("Close: %v", err)
			}
			o.Client = client()
			db = open(t, o)
			return db
		}
	})
}

func TestTheContractHoldsInOneMember(t *testing.T) {
	t.Parallel()
	contract(t, single(t, 0))
}

func put(key, value string, conditions ...store.Condition) store.Txn {
	return store.Txn{If: conditions, Do: []store.Write{{Key: key, Value: []byte(value)}}}
}

func contents(t testing.TB, s store.Store) map[string]store.Record {
	t.Helper()
	all := map[string]store.Record{}
	if _, err := s.Read(t.Context(), "", func(r store.Record) error {
		all[r.Key] = r
		return nil
	}); err != nil {
		t.Fatalf("Read: %v", err)
	}
	return all
}

// lossy is a client's connection that loses answers: what was asked for
// happens, and the one who asked hears nothing.
type lossy struct {
	clientv3.KV
	lose atomic.Int64 // so many of the next transactions that write
}

type lossyTxn struct {
	clientv3.Txn
	lossy  *lossy
	writes bool
}

func (l *lossy) Txn(ctx context.Context) clientv3.Txn { return &lossyTxn{Txn: l.KV.Txn(ctx), lossy: l} }

func (x *lossyTxn) If(c ...clientv3.Cmp) clientv3.Txn  { x.Txn = x.Txn.If(c...); return x }
func (x *lossyTxn) Else(o ...clientv3.Op) clientv3.Txn { x.Txn = x.Txn.Else(o...); return x }
func (x *lossyTxn) Then(o ...clientv3.Op) clientv3.Txn {
	x.writes = o[0].IsPut()
	x.Txn = x.Txn.Then(o...)
	return x
}

func (x *lossyTxn) Commit() (*clientv3.TxnResponse, error) {
	r, err := x.Txn.Commit()
	if err == nil && x.writes && x.lossy.lose.Add(-1) >= 0 {
		return nil, context.DeadlineExceeded
	}
	return r, err
}

func TestWhatWasWrittenWithoutAnAnswerIsWrittenOnceAndKnown(t *testing.T) {
	t.Parallel()
	client := single(t, 0)()
	connection := &lossy{KV: client.KV}
	client.KV = connection
	db := open(t, etcd.Options{Client: client, Prefix: "p/", Name: "one"})
	first := db.Commit(t.Context(), put("old", "1"), put("counter", "1"))[0].Revision

	for _, losses := range []int64{1, 2} {
		connection.lose.Store(losses)
		results := db.Commit(t.Context(),
			put(fmt.Sprint("a", losses), "1", store.Condition{Key: "old", Revision: first}),
			put("b", "no", store.Condition{Key: "old", Revision: first + 99}),
			store.Txn{Do: []store.Write{{Key: "never"}}},
			put(fmt.Sprint("c", losses), "1", store.Condition{Key: fmt.Sprint("c", losses)}))
		for i, want := range []error{nil, store.ErrConflict, nil, nil} {
			if !errors.Is(results[i].Err, want) || (want == nil) != (results[i].Err == nil) {
				t.Errorf("transaction %d of a group whose answer was lost: %v, want %v", i, results[i].Err, want)
			}
		}
		all := contents(t, db)
		if got := all[fmt.Sprint("a", losses)].Revision; got != results[0].Revision {
			t.Errorf("it is there at %d, said was %d", got, results[0].Revision)
		}
		if _, ok := all["b"]; ok {
			t.Error("what conflicted is there")
		}
	}
}

func TestOfTwoProcessesOfOneNameTheFirstStops(t *testing.T) {
	t.Parallel()
	client := single(t, 0)
	first := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "one"})
	other := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "two"})
	if r := first.Commit(t.Context(), put("a", "1"))[0]; r.Err != nil {
		t.Fatal(r.Err)
	}
	second := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "one"})
	if r := first.Commit(t.Context(), put("a", "2"))[0]; r.Err == nil || !strings.Contains(r.Err.Error(), "under this server's name") {
		t.Errorf("the first: %v", r.Err)
	}
	if err := first.Watch(t.Context(), 1<<40, func([]store.Change) error { return nil }); err == nil || !strings.Contains(err.Error(), "under this server's name") {
		t.Errorf("the first's watch: %v", err)
	}
	for _, db := range []*etcd.DB{second, other} {
		if r := db.Commit(t.Context(), put("a", "3"))[0]; r.Err != nil {
			t.Error(r.Err)
		}
	}
}

func TestANameHasNoSlash(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "a/b"} {
		if _, err := etcd.Open(t.Context(), etcd.Options{Client: single(t, 0)(), Name: name}); err == nil {
			t.Errorf("the name %q was taken", name)
		}
	}
}

func TestSeveralServersShareAStore(t *testing.T) {
	t.Parallel()
	client := single(t, 0)
	a := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "a"})
	b := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "b"})
	start := a.Commit(t.Context(), put("k", "1"))[0].Revision
	seen := make(chan store.Change, 1)
	go b.Watch(t.Context(), start, func(changes []store.Change) error {
		seen <- changes[0]
		return errors.New("enough")
	})
	if r := b.Commit(t.Context(), put("k", "2", store.Condition{Key: "k", Revision: start}))[0]; r.Err != nil {
		t.Fatal(r.Err)
	}
	if c := <-seen; len(c.Writes) != 1 || string(c.Writes[0].Value) != "2" {
		t.Errorf("the other's watch has %+v", c)
	}
	if r := a.Commit(t.Context(), put("k", "3", store.Condition{Key: "k", Revision: start}))[0]; !errors.Is(r.Err, store.ErrConflict) {
		t.Errorf("after the other has written: %v", r.Err)
	}
}

func TestAWatchFromBeforeACompactionSaysSo(t *testing.T) {
	t.Parallel()
	client := single(t, 0)
	db := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "one"})
	start := db.Commit(t.Context(), put("k", "0"))[0].Revision
	for i := range 10 {
		db.Commit(t.Context(), put("k", fmt.Sprint(i)))
	}
	c := client()
	now, err := c.Get(t.Context(), "p/r")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Compact(t.Context(), now.Header.Revision); err != nil {
		t.Fatal(err)
	}
	if err := db.Watch(t.Context(), start, func([]store.Change) error { return errors.New("a change") }); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("Watch: %v", err)
	}
}

func TestOldRevisionsAreGivenUpAndTheLastKept(t *testing.T) {
	t.Parallel()
	client := single(t, 0)
	raw := client()
	defer raw.Close()
	db := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "one"})
	first := db.Commit(t.Context(), put("k", "first"))[0].Revision
	// What counts are etcd's revisions, whoever makes them.
	var group sync.WaitGroup
	for range 100 {
		group.Go(func() {
			for range etcd.KeepRevisions / 100 {
				if _, err := raw.Put(t.Context(), "other", ""); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	kept := db.Commit(t.Context(), put("k", "kept"))[0].Revision
	db.Commit(t.Context(), put("k", "last"))
	ended := errors.New("ended")
	from := func(after store.Revision) error {
		return db.Watch(t.Context(), after, func([]store.Change) error { return ended })
	}
	seen, err := etcd.Compact(db, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := from(first); err != ended {
		t.Errorf("what came since the last compaction was given up: %v", err)
	}
	if _, err := etcd.Compact(db, seen); err != nil {
		t.Fatal(err)
	}
	if err := from(first); !errors.Is(err, store.ErrCompacted) {
		t.Errorf("Watch from the oldest: %v", err)
	}
	if err := from(kept); err != ended {
		t.Errorf("Watch from the oldest that is kept: %v", err)
	}
	if _, err := etcd.Compact(db, seen); err != nil { // as the other servers do
		t.Errorf("once more: %v", err)
	}
}

func TestAFullClusterRefusesWritesAndIsRead(t *testing.T) {
	t.Parallel()
	client := single(t, 2<<20)
	db := open(t, etcd.Options{Client: client(), Prefix: "p/", Name: "one"})
	var err error
	n := 0
	for ; err == nil && n < 100; n++ {
		err = db.Commit(t.Context(), put(fmt.Sprint("k", n), strings.Repeat("v", 500_000)))[0].Err
	}
	if !errors.Is(err, store.ErrFull) {
		t.Fatalf("after %d MB of 2: %v", n/2, err)
	}
	if got := len(contents(t, db)); got != n-1 {
		t.Errorf("%d records are there, %d were acknowledged", got, n-1)
	}
	if err := db.Ready(t.Context()); err != nil {
		t.Errorf("Ready: %v", err)
	}
	if r := db.Commit(t.Context(), put("small", "1"))[0]; !errors.Is(r.Err, store.ErrFull) {
		t.Errorf("a small one: %v", r.Err)
	}
}

func TestABackupOfTheOtherEngineIsRestored(t *testing.T) {
	t.Parallel()
	from, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	var want []string
	for i := range 3000 { // more than a page of Read
		key := fmt.Sprintf("k%04d", i)
		want = append(want, key+"="+strings.Repeat("v", i))
		if r := from.Commit(t.Context(), put(key, strings.Repeat("v", i)))[0]; r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	var backup, again bytes.Buffer
	revision, err := store.Backup(t.Context(), from, &backup)
	if err != nil {
		t.Fatal(err)
	}
	db := open(t, etcd.Options{Client: single(t, 0)(), Prefix: "p/", Name: "one"})
	if n, err := store.Restore(t.Context(), db, &backup); err != nil || n != len(want) {
		t.Fatalf("Restore: %d records, %v", n, err)
	}
	var got []string
	now, err := db.Read(t.Context(), "", func(r store.Record) error {
		got = append(got, r.Key+"="+string(r.Value))
		return nil
	})
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("Read: %d records of %d, %v", len(got), len(want), err)
	}
	if now <= revision {
		t.Errorf("it has revision %d, the backup %d", now, revision)
	}
	if r := db.Commit(t.Context(), put("k", "1", store.Condition{Key: "k"}))[0]; r.Err != nil || r.Revision <= now {
		t.Errorf("the next transaction: %+v after %d", r, now)
	}
	if _, err := store.Backup(t.Context(), db, &again); err != nil {
		t.Errorf("Backup: %v", err)
	}
}
