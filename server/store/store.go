// Package store defines the contract of a server's durable state: records in
// one ordered, transactional key-value store, whose revision only grows, and
// which can be watched from any recent revision.
//
// [Store] is the contract. Its engines are sub-packages (badger: embedded, one
// server); package storetest is the suite that every engine passes. Backup and
// restore are written over the contract, so that a copy made with one engine
// can be restored into another.
package store

import (
	"context"
	"errors"
)

// Revision numbers the state of a store. It starts at 0 (empty) and grows by
// one with each transaction.
type Revision int64

// Bounds of one transaction, which every engine accepts. A transaction over
// them fails with [ErrTooLarge].
const (
	MaxKey    = 4 << 10 // bytes
	MaxValue  = 1 << 20 // bytes
	MaxWrites = 100     // conditions and writes together
)

var (
	// ErrConflict: a condition of the transaction did not hold; nothing of it
	// was written.
	ErrConflict = errors.New("store: condition does not hold")
	// ErrTooLarge: the transaction, a key or a value is over its bound.
	ErrTooLarge = errors.New("store: transaction too large")
	// ErrCompacted: the changes after that revision are no longer known; read
	// the state anew.
	ErrCompacted = errors.New("store: revision is too old to watch from")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store: closed")
)

// Record is a key and its value, with the revision that wrote it.
type Record struct {
	Key      string
	Value    []byte // nil in a change: the key was deleted
	Revision Revision
}

// Condition demands that Key was last written at Revision; 0 demands that it
// does not exist.
type Condition struct {
	Key      string
	Revision Revision
}

// Write sets a key to a value; a nil value deletes it (which a missing key
// permits). An empty value that is not nil is a value.
type Write struct {
	Key   string
	Value []byte
}

// Txn is a set of writes that happen together if all conditions hold, or not
// at all. A key may be written once.
type Txn struct {
	If []Condition
	Do []Write
}

// Result is the outcome of one transaction.
type Result struct {
	Revision Revision // of its writes; 0 if Err is set
	Err      error    // nil, ErrConflict, ErrTooLarge, ErrClosed or a failure of the engine
}

// Change is the writes of one transaction.
type Change struct {
	Revision Revision
	Writes   []Record
}

// Store is the durable state of a trust domain.
type Store interface {
	// Commit carries out transactions, each atomic on its own, in order: a
	// later one sees the writes of an earlier one. When it returns, every
	// transaction whose result has no error is durable. Concurrent callers
	// share the cost of making it so. There is one result a transaction.
	//
	// A cancelled context may leave the outcome unknown: the results then
	// carry its error, and the writes may still happen.
	Commit(ctx context.Context, txns ...Txn) []Result

	// Read calls yield with every record whose key begins with prefix, in the
	// order of keys, all as of one revision, which it returns. It stops at the
	// first error of yield and returns that. The value is yield's to keep.
	Read(ctx context.Context, prefix string, yield func(Record) error) (Revision, error)

	// Watch calls yield with every change after the revision, in order and
	// without a gap, as they become durable, until the context ends, yield
	// fails or the store is closed ([ErrClosed]); it always returns an error.
	// Changes that were committed together come in one call. It fails with
	// [ErrCompacted] when the changes after the revision are no longer known;
	// an engine keeps at least the last 10,000.
	Watch(ctx context.Context, after Revision, yield func([]Change) error) error

	// Close waits for what is under way and releases the store.
	Close() error
}
