// Package badger is the embedded engine of the store's contract, for one
// server: a log-structured merge tree in a directory.
//
// [Open] returns a [DB], which is a [store.Store]. One goroutine of its own
// writes: all transactions that wait while the disk is busy share one badger
// transaction and one sync, and each keeps its own atomicity, conditions and
// revision. Recent changes stay in memory for those who watch; a store that
// was opened again knows the changes after the revision it was opened at.
//
// In badger, a record is "r" and its key; its value begins with the 8 bytes
// (big endian) of the revision that wrote it. The key "m" holds the revision
// of the store and is written with every transaction. No value goes to
// badger's value log: all are below its threshold, so there is no garbage in
// it to collect, and a record is in one place, under one checksum. Versions
// that were overwritten disappear with badger's own compaction.
package badger

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	badgerdb "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/store"
)

const (
	// defaultMemTable is as small as the largest transaction allows (badger
	// takes 15 % of it as one transaction), because badger allocates the table
	// whole and Go's collector counts it whole.
	defaultMemTable = 8 << 20
	maxMemTable     = 256 << 20

	// valueThreshold is the size from which badger would put a value into its
	// value log: the most that badger permits, more than any value we write.
	valueThreshold = 1 << 20

	// logFile is the size of a value log file: the least that badger permits,
	// since it maps twice that for a file that stays empty.
	logFile = 1 << 20

	// format is the version of how we use badger. Badger refuses to open a
	// directory that was written with another one.
	format = 1

	// Sorting and merging costs a large store more than writing does. Fewer levels
	// and larger tables halve that: a million entries are in two levels below
	// the newest tables, and those are merged when there are many.
	baseLevel    = 128 << 20
	baseTable    = 8 << 20
	newestTables = 15

	// checkEvery is the number of records that Read passes on between two looks
	// at its context.
	checkEvery = 256
)

// Options says where and how a store is kept.
type Options struct {
	// Dir is the directory of the files. It is made if it is missing, and only
	// its owner can enter it afterwards, whatever its mode was. It must be on a
	// local disk and used for nothing else.
	Dir string

	// InMemory keeps everything in memory, until Close: for tests. Dir must be
	// empty.
	InMemory bool

	// MemTable is the size in bytes of the table in memory that collects writes
	// before they are sorted into files: 8 MiB (the default) to 256 MiB. A larger
	// one makes loading many records faster and takes up to four times its size
	// of memory while that lasts.
	MemTable int64

	Now     func() time.Time // nil: time.Now
	Log     *slog.Logger     // nil: none
	Metrics *metrics.Metrics // nil: none
}

// DB is a store in a directory. Its methods may be called concurrently.
type DB struct {
	badger *badgerdb.DB
	dir    string   // empty: in memory
	lock   *os.File // of the directory; nil: in memory
	now    func() time.Time
	log    *slog.Logger

	metrics *metrics.Metrics

	queue   chan *request
	written chan struct{} // closed when the writer has ended
	writer  writer
	recent  recent

	mu    sync.RWMutex
	ended error          // why calls are refused: nil, store.ErrClosed or a failure
	stop  chan struct{}  // closed when ended is first set
	calls sync.WaitGroup // commits and reads under way

	closing  sync.Once
	closeErr error
}

// Open opens the store in a directory, or makes it. It fails if another
// process has it open, if it was written in a format that this version does not
// know, and if a table of it does not match its checksum.
func Open(o Options) (*DB, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	if o.MemTable == 0 {
		o.MemTable = defaultMemTable
	}
	switch {
	case o.MemTable < defaultMemTable || o.MemTable > maxMemTable:
		return nil, fmt.Errorf("store: memtable of %d bytes; it must be between %d and %d", o.MemTable, defaultMemTable, maxMemTable)
	case o.InMemory && o.Dir != "":
		return nil, errors.New("store: one in memory has no directory")
	case !o.InMemory && o.Dir == "":
		return nil, errors.New("store: no directory given")
	}
	db := &DB{
		dir:     o.Dir,
		now:     o.Now,
		log:     o.Log,
		metrics: o.Metrics,
		queue:   make(chan *request, 256),
		written: make(chan struct{}),
		stop:    make(chan struct{}),
	}
	revision, err := db.start(o)
	if err != nil {
		return nil, err
	}
	db.recent.begin(revision)
	db.writer = newWriter(db, revision, o.MemTable)
	go func() {
		defer close(db.written)
		db.writer.run()
	}()
	return db, nil
}

// start opens badger and returns the revision that the store has.
func (db *DB) start(o Options) (revision store.Revision, err error) {
	defer func() {
		if err == nil {
			return
		}
		if db.badger != nil {
			err = errors.Join(err, db.badger.Close())
		}
		if db.lock != nil {
			err = errors.Join(err, db.lock.Close())
		}
	}()
	if !o.InMemory {
		if db.lock, err = takeDir(o.Dir); err != nil {
			return 0, err
		}
		if err := sweep(o.Dir); err != nil {
			return 0, fmt.Errorf("store: sweep %s: %w", o.Dir, err)
		}
		if free, err := freeBytes(o.Dir); err == nil && free < openDisk {
			return 0, diskFull(o.Dir, free, openDisk)
		}
	}
	b, err := badgerdb.Open(badgerOptions(o))
	if err != nil { // b is not nil then, and cannot be closed
		return 0, fmt.Errorf("store: open %s: %w", o.Dir, err)
	}
	db.badger = b
	if !o.InMemory {
		if err := errors.Join(syncDir(o.Dir), syncDir(filepath.Dir(o.Dir))); err != nil {
			return 0, fmt.Errorf("store: open %s: %w", o.Dir, err)
		}
	}
	txn := db.badger.NewTransaction(false)
	defer txn.Discard()
	if revision, err = readRevision(txn); err != nil {
		return 0, fmt.Errorf("store: open %s: %w", o.Dir, err)
	}
	return revision, nil
}

func badgerOptions(o Options) badgerdb.Options {
	b := badgerdb.DefaultOptions(o.Dir)
	b.InMemory = o.InMemory
	b.SyncWrites = true
	b.NumVersionsToKeep = 1
	b.DetectConflicts = false // there is one writer
	b.MemTableSize = o.MemTable
	b.NumMemtables = 2 // one that fills while one or two are written out
	b.NumCompactors = 2
	b.BaseLevelSize = baseLevel
	b.BaseTableSize = baseTable
	b.NumLevelZeroTables = newestTables
	b.NumLevelZeroTablesStall = 3 * newestTables // writes wait
	b.ValueThreshold = valueThreshold
	b.ValueLogFileSize = logFile
	b.Compression = options.None // records are small and mostly keys; saves the block cache
	b.BlockCacheSize = 0
	b.IndexCacheSize = 0 // indexes are read from the mapped files
	// A block that fails its checksum ends an iteration without an error, so
	// checksums are verified when a table is opened, where it is an error.
	b.ChecksumVerificationMode = options.OnTableRead
	b.MetricsEnabled = false // process-wide expvars
	b.ExternalMagicVersion = format
	b.Logger = logger{o.Log}
	return b
}

// Close waits for the commits and reads under way and releases the store. A
// second call returns what the first returned.
func (db *DB) Close() error {
	db.closing.Do(func() {
		db.end(store.ErrClosed)
		db.calls.Wait()
		close(db.queue)
		<-db.written
		err := db.badger.Close()
		if db.lock != nil {
			err = errors.Join(err, db.lock.Close())
		}
		if err != nil {
			db.closeErr = fmt.Errorf("store: close %s: %w", db.dir, err)
		}
	})
	return db.closeErr
}

// end makes every call from now on fail with err.
func (db *DB) end(err error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.ended == nil {
		close(db.stop)
	}
	db.ended = err
}

// fail stops the store after a write whose outcome is unknown: what badger has
// in memory may differ from what is on disk, so neither reads nor writes can be
// trusted until it has been opened again.
func (db *DB) fail(err error) error {
	err = fmt.Errorf("store: stopped after a failed write, of which it is not known whether it is on disk; restart the server: %w", err)
	db.log.Error("the store has stopped: a write failed", "dir", db.dir, "error", err)
	db.end(err)
	return err
}

// state returns why calls are refused, or nil.
func (db *DB) state() error {
	db.mu.RLock()
	defer db.mu.RUnlock()
	return db.ended
}

// enter begins a commit or a read, which Close waits for. If it returns nil,
// the caller has to call db.calls.Done.
func (db *DB) enter() error {
	db.mu.RLock()
	defer db.mu.RUnlock()
	if db.ended == nil {
		db.calls.Add(1)
	}
	return db.ended
}

// Keys in badger.
const recordPrefix = 'r'

var revisionKey = []byte("m")

// header is the size of the revision in front of a value.
const header = 8

// revisionOf splits the value that badger has of a record.
func revisionOf(value []byte) (store.Revision, []byte, error) {
	// Badger returns an empty value, and no error, for one it could not read.
	if len(value) < header {
		return 0, nil, fmt.Errorf("record is damaged: it has %d bytes, less than its header", len(value))
	}
	return store.Revision(binary.BigEndian.Uint64(value)), value[header:], nil
}

func readRevision(txn *badgerdb.Txn) (store.Revision, error) {
	item, err := txn.Get(revisionKey)
	if errors.Is(err, badgerdb.ErrKeyNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the revision: %w", err)
	}
	var revision store.Revision
	err = item.Value(func(value []byte) error {
		revision, _, err = revisionOf(value)
		return err
	})
	return revision, err
}

// Read implements [store.Store]. It holds on to the state it reads from, so
// that a slow yield keeps versions from being dropped, but delays no one.
func (db *DB) Read(ctx context.Context, prefix string, yield func(store.Record) error) (store.Revision, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := db.enter(); err != nil {
		return 0, err
	}
	defer db.calls.Done()

	txn := db.badger.NewTransaction(false)
	defer txn.Discard()
	revision, err := readRevision(txn)
	if err != nil {
		return 0, fmt.Errorf("store: %w", err)
	}
	o := badgerdb.DefaultIteratorOptions
	o.PrefetchValues = false // it starts a goroutine for each
	o.Prefix = append([]byte{recordPrefix}, prefix...)
	it := txn.NewIterator(o)
	defer it.Close()
	n := 0
	for it.Rewind(); it.Valid(); it.Next() {
		if n++; n%checkEvery == 0 && ctx.Err() != nil {
			return 0, ctx.Err()
		}
		item := it.Item()
		rec := store.Record{Key: string(item.Key()[1:])}
		value, err := item.ValueCopy(nil)
		if err == nil {
			rec.Revision, rec.Value, err = revisionOf(value)
		}
		if err != nil {
			return 0, fmt.Errorf("store: read %.40q: %w", rec.Key, err)
		}
		if err := yield(rec); err != nil {
			return 0, err
		}
	}
	return revision, nil
}

// Watch implements [store.Store].
func (db *DB) Watch(ctx context.Context, after store.Revision, yield func([]store.Change) error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := db.state(); err != nil {
			return err
		}
		changes, more, err := db.recent.after(after)
		if err != nil {
			return err
		}
		if len(changes) > 0 {
			if err := yield(changes); err != nil {
				return err
			}
			after = changes[len(changes)-1].Revision
			continue
		}
		select {
		case <-more:
		case <-ctx.Done():
		case <-db.stop:
		}
	}
}
