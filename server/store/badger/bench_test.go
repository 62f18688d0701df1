package badger_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

// recordSize is about that of a registration entry.
const recordSize = 300

func record(key string) store.Txn {
	return store.Txn{
		If: []store.Condition{{Key: key}},
		Do: []store.Write{{Key: key, Value: make([]byte, recordSize)}},
	}
}

func succeed(b testing.TB, results []store.Result) {
	for _, r := range results {
		if r.Err != nil {
			b.Fatalf("Commit: %v", r.Err)
		}
	}
}

// BenchmarkSerial is one writer, a transaction at a time: the latency of a
// durable write.
func BenchmarkSerial(b *testing.B) {
	db := open(b, badger.Options{Dir: b.TempDir()})
	n := 0
	for b.Loop() {
		succeed(b, db.Commit(b.Context(), record(fmt.Sprint("k", n))))
		n++
	}
}

// BenchmarkParallel is 64 writers that share syncs; an operation is a
// transaction.
func BenchmarkParallel(b *testing.B) {
	db := open(b, badger.Options{Dir: b.TempDir()})
	syncs := badger.CountCommits(db)
	var next atomic.Int64
	b.ResetTimer()
	var writers sync.WaitGroup
	for range 64 {
		writers.Go(func() {
			for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
				if r := db.Commit(context.Background(), record(fmt.Sprint("k", n)))[0]; r.Err != nil {
					b.Errorf("Commit: %v", r.Err)
				}
			}
		})
	}
	writers.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "txns/s")
	b.ReportMetric(float64(b.N)/float64(syncs.Load()), "txns/sync")
}

// BenchmarkBatch is one call with 1,000 transactions.
func BenchmarkBatch(b *testing.B) {
	db := open(b, badger.Options{Dir: b.TempDir()})
	n := 0
	for b.Loop() {
		succeed(b, db.Commit(b.Context(), batch(n*1000, 1000)...))
		n++
	}
	b.ReportMetric(float64(b.N)*1000/b.Elapsed().Seconds(), "txns/s")
}

func batch(from, n int) (txns []store.Txn) {
	for i := from; i < from+n; i++ {
		txns = append(txns, record(fmt.Sprintf("entry/%08d", i)))
	}
	return txns
}

func fill100k(b *testing.B, db *badger.DB) {
	for i := 0; i < 100_000; i += 1000 {
		succeed(b, db.Commit(b.Context(), batch(i, 1000)...))
	}
}

// BenchmarkFill100k writes 100,000 records in calls of 1,000 transactions.
func BenchmarkFill100k(b *testing.B) {
	for b.Loop() {
		db, err := badger.Open(badger.Options{Dir: b.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		fill100k(b, db)
		if err := db.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkOpenAndRead100k is the start of a server with 100,000 records.
func BenchmarkOpenAndRead100k(b *testing.B) {
	dir := b.TempDir()
	db, err := badger.Open(badger.Options{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	fill100k(b, db)
	if err := db.Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		db, err := badger.Open(badger.Options{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		n := 0
		if _, err := db.Read(b.Context(), "", func(store.Record) error { n++; return nil }); err != nil || n != 100_000 {
			b.Fatalf("Read: %d records, %v", n, err)
		}
		if err := db.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
