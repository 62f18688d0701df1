package badger

import (
	"sync/atomic"

	badgerdb "github.com/dgraph-io/badger/v4"
)

// OnCommit makes each commit of a group go through a function, which calls
// next to let it happen. No call may be under way.
func OnCommit(db *DB, on func(next func() error) error) {
	db.writer.commit = func(txn *badgerdb.Txn) error { return on(txn.Commit) }
}

// CountCommits returns a counter of badger's commits, each of which is one
// sync. No call may be under way.
func CountCommits(db *DB) *atomic.Int64 {
	n := new(atomic.Int64)
	OnCommit(db, func(next func() error) error {
		n.Add(1)
		return next()
	})
	return n
}

// OnFree replaces the question how many bytes are free on the disk. No call may
// be under way.
func OnFree(db *DB, free func() uint64) {
	db.writer.free = func(string) (uint64, error) { return free(), nil }
}

// Waiting returns the number of calls that the writer has not taken up.
func Waiting(db *DB) int { return len(db.queue) }
