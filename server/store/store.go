// Package store defines the contract of a server's durable state: records in
// one ordered, transactional key-value store, whose revision only grows, and
// which can be watched from any recent revision.
//
// [Store] is the contract. Its engines are sub-packages (badger: embedded, one
// server; etcd: several); package storetest is the suite that every engine
// passes. Backup and restore are written over the contract, so that a copy made
// with one engine can be restored into another.
package store

import (
	"context"
	"errors"
	"fmt"
)

// Revision numbers the state of a store. It only grows: with every transaction,
// by one or more. Transactions of one Commit, or of several at the same time,
// may share a revision.
type Revision int64

// Bounds of one transaction, which every engine accepts. A transaction over
// them fails with [ErrTooLarge].
const (
	MaxKey    = 4 << 10   // bytes
	MaxValue  = 1_000_000 // bytes; leaves an engine room for a header within 1 MiB
	MaxWrites = 100       // conditions and writes together; etcd takes 128
	MaxBytes  = 1_100_000 // keys and values of conditions and writes together; etcd takes 1.5 MiB, framing included
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
	// ErrNoQuorum: too few of the servers that keep the store can be reached for
	// it to take writes. Whether the transaction happens may be unknown.
	ErrNoQuorum = errors.New("store: no majority of the servers that keep it can be reached")
	// ErrFull: there is no room for what was to be written.
	ErrFull = errors.New("store: there is no room left")
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
// at all. A key may be written once. A transaction without writes only checks
// its conditions, and counts as any other.
type Txn struct {
	If []Condition
	Do []Write
}

// Check returns an error if the transaction is over its bounds
// ([ErrTooLarge]) or writes a key twice. Engines call it for each transaction
// of a Commit; one that fails does not keep the others from happening.
func (t Txn) Check() error {
	if n := len(t.If) + len(t.Do); n > MaxWrites {
		return fmt.Errorf("%w: it has %d conditions and writes; the most is %d", ErrTooLarge, n, MaxWrites)
	}
	size := 0
	key := func(k string) error {
		if len(k) > MaxKey {
			return fmt.Errorf("%w: key %.40q… has %d bytes; the most is %d", ErrTooLarge, k, len(k), MaxKey)
		}
		size += len(k)
		return nil
	}
	for _, c := range t.If {
		if err := key(c.Key); err != nil {
			return err
		}
	}
	for i, w := range t.Do {
		if err := key(w.Key); err != nil {
			return err
		}
		if len(w.Value) > MaxValue {
			return fmt.Errorf("%w: value of key %.40q has %d bytes; the most is %d", ErrTooLarge, w.Key, len(w.Value), MaxValue)
		}
		size += len(w.Value)
		for _, earlier := range t.Do[:i] { // at most MaxWrites²/2 comparisons, most of them of lengths
			if earlier.Key == w.Key {
				return fmt.Errorf("store: transaction writes key %.40q twice", w.Key)
			}
		}
	}
	if size > MaxBytes {
		return fmt.Errorf("%w: its keys and values have %d bytes; the most is %d", ErrTooLarge, size, MaxBytes)
	}
	return nil
}

// Result is the outcome of one transaction.
type Result struct {
	Revision Revision // of its writes; 0 if Err is set
	Err      error    // nil, ErrConflict, ErrTooLarge, ErrClosed or a failure of the engine
}

// Change is the writes that made a revision: those of a transaction, or of
// several that share it. The deletion of a key that was missing need not be in
// it.
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

	// Watch calls yield with every change after the revision, in order and with
	// none left out, as they become durable, until the context ends, yield
	// fails or the store is closed ([ErrClosed]); it always returns an error.
	// Changes that were committed together come in one call; yield must not
	// modify them, other watchers see the same. A slow yield delays nobody else.
	// Watch fails with [ErrCompacted] when the changes after the revision are no
	// longer known; an engine keeps at least the last 10,000, or the last 32 MiB
	// of them if that is less.
	Watch(ctx context.Context, after Revision, yield func([]Change) error) error

	// Advance raises the revision to at least the given one, without a change.
	// Those who watch from a lower one get [ErrCompacted]. It is for [Restore],
	// which uses it on an empty store that nobody else has open.
	Advance(ctx context.Context, to Revision) error

	// Close waits for the commits and reads that are under way and releases the
	// store. Every call after it fails with [ErrClosed].
	Close() error
}
