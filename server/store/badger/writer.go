package badger

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"runtime"
	"time"

	badgerdb "github.com/dgraph-io/badger/v4"

	"github.com/hallmark-id/hallmark/server/store"
)

const (
	// slowCommit is how long a group may take before the log says that the disk
	// is slow, at most once in slowEvery.
	slowCommit = time.Second
	slowEvery  = time.Minute

	// spareDisk and four memtables must be free on the disk for a write to be
	// tried. Badger writes through mapped files, where a full disk is a signal
	// that kills the process; the room is for what badger writes on its own
	// after us, sorting and merging.
	spareDisk = 64 << 20

	// openDisk must be free for the store to be opened: badger then writes out
	// what a killed process had in memory.
	openDisk = 32 << 20
)

// What badger counts towards the bounds of its transactions.
const (
	entryOverhead = 12 // bytes an entry, besides key and value
	groupBytes    = 64 // end mark, and our revision's entry
	groupEntries  = 3  // end mark, our revision's entry, and badger's "less than"
)

// request is one call of Commit or Advance on its way through the writer.
type request struct {
	ctx     context.Context
	txns    []txn
	results []store.Result // the writer's until done is closed
	advance store.Revision // if not 0: no transactions, but this revision
	done    chan struct{}
}

// txn is a transaction in badger's form. It shares no memory with the caller,
// who may give up waiting and go on.
type txn struct {
	conditions []condition
	writes     []write
	bytes      int64 // as badger counts
	result     *store.Result
}

type condition struct {
	key      []byte
	revision store.Revision
}

type write struct {
	name  string
	key   []byte
	value []byte // header and value; nil: delete
}

func newTxn(t store.Txn, result *store.Result) txn {
	var keys, values int
	for _, c := range t.If {
		keys += 1 + len(c.Key)
	}
	for _, w := range t.Do {
		keys += 1 + len(w.Key)
		if w.Value != nil {
			values += header + len(w.Value)
		}
	}
	// Watchers may hold on to the values for long, and to nothing else.
	keyBuf, valueBuf := make([]byte, 0, keys), make([]byte, 0, values)
	key := func(k string) []byte {
		start := len(keyBuf)
		keyBuf = append(append(keyBuf, recordPrefix), k...)
		return keyBuf[start:len(keyBuf):len(keyBuf)]
	}
	x := txn{
		conditions: make([]condition, len(t.If)),
		writes:     make([]write, len(t.Do)),
		bytes:      int64(keys + values + len(t.Do)*entryOverhead),
		result:     result,
	}
	for i, c := range t.If {
		x.conditions[i] = condition{key(c.Key), c.Revision}
	}
	for i, w := range t.Do {
		x.writes[i] = write{name: w.Key, key: key(w.Key)}
		if w.Value != nil {
			start := len(valueBuf)
			valueBuf = append(append(valueBuf, make([]byte, header)...), w.Value...)
			x.writes[i].value = valueBuf[start:len(valueBuf):len(valueBuf)]
		}
	}
	return x
}

// Commit implements [store.Store].
func (db *DB) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	results := make([]store.Result, len(txns))
	if err := ctx.Err(); err != nil {
		return refuse(results, err)
	}
	r := &request{ctx: ctx, results: results, txns: make([]txn, 0, len(txns))}
	for i, t := range txns {
		if err := t.Check(); err != nil {
			results[i].Err = err
			continue
		}
		r.txns = append(r.txns, newTxn(t, &results[i]))
	}
	if err := db.send(r); err != nil {
		return refuse(make([]store.Result, len(txns)), err)
	}
	return results
}

func refuse(results []store.Result, err error) []store.Result {
	for i := range results {
		results[i] = store.Result{Err: err}
	}
	return results
}

// Advance raises the revision of the store to at least a revision, without a
// change. Those who watch from a lower one get [store.ErrCompacted].
// [store.Restore] uses it to pass all revisions that anyone may have seen.
func (db *DB) Advance(ctx context.Context, to store.Revision) error {
	r := &request{ctx: ctx, advance: to, results: make([]store.Result, 1)}
	if err := db.send(r); err != nil {
		return err
	}
	return r.results[0].Err
}

// send hands a request to the writer and waits until it is done.
func (db *DB) send(r *request) error {
	if err := db.enter(); err != nil {
		return err
	}
	defer db.calls.Done()
	r.done = make(chan struct{})
	select {
	case db.queue <- r:
	case <-r.ctx.Done():
		return r.ctx.Err()
	}
	select {
	case <-r.done:
		return nil
	case <-r.ctx.Done():
		return r.ctx.Err()
	}
}

// writer carries out requests, in one goroutine.
type writer struct {
	db       *DB
	revision store.Revision // committed
	group    *openGroup     // nil: none is open

	maxBytes, maxEntries int64  // of one badger transaction
	spare                uint64 // bytes that must be free on the disk
	full                 bool   // the disk; said so in the log
	saidSlow             time.Time
	failed               error // the store has stopped
	crowd                int   // requests that the last group answered

	// Replaced by tests that make them fail.
	commit func(*badgerdb.Txn) error
	free   func(dir string) (uint64, error)
}

func newWriter(db *DB, revision store.Revision, memTable int64) writer {
	return writer{
		db:         db,
		revision:   revision,
		maxBytes:   db.badger.MaxBatchSize() - groupBytes,
		maxEntries: db.badger.MaxBatchCount() - groupEntries,
		spare:      uint64(spareDisk + 4*memTable),
		commit:     (*badgerdb.Txn).Commit,
		free:       freeBytes,
	}
}

// openGroup is transactions that will be committed as one badger transaction.
type openGroup struct {
	txn            *badgerdb.Txn
	revision       store.Revision // after its last transaction
	bytes, entries int64
	results        []*store.Result // of the transactions in it
	changes        []store.Change  // likewise
	refused        []*store.Result // of those whose conditions did not hold after the group's changes
	finishes       []*request      // whose last transaction is in it, or before it
}

func (w *writer) run() {
	for r := range w.db.queue {
		for r != nil {
			w.carryOut(r)
			r = w.waiting()
		}
		w.flush()
	}
}

// waiting returns the next request, or nil if there is none. If several were
// answered a moment ago, they get the chance to come again: that makes groups
// half as large again when many write.
func (w *writer) waiting() *request {
	if len(w.db.queue) == 0 && w.crowd > 1 {
		runtime.Gosched()
	}
	select {
	case r := <-w.db.queue: // nil when it is closed; run ends then
		return r
	default:
		return nil
	}
}

// carryOut puts a request's transactions into groups, the last of which stays
// open.
func (w *writer) carryOut(r *request) {
	if r.ctx.Err() != nil { // its caller has gone
		close(r.done)
		return
	}
	if r.advance != 0 {
		w.flush()
		w.advance(r)
		return
	}
	for i := range r.txns {
		w.apply(&r.txns[i])
	}
	if w.group == nil { // nothing open: all has been decided
		close(r.done)
		return
	}
	w.group.finishes = append(w.group.finishes, r)
}

func (w *writer) open() *openGroup {
	if w.group == nil {
		w.group = &openGroup{txn: w.db.badger.NewTransaction(true), revision: w.revision}
	}
	return w.group
}

// apply puts a transaction into the open group, or into a new one if the open
// one has no room for all of it.
func (w *writer) apply(t *txn) {
	entries := int64(len(t.writes))
	if g := w.group; g != nil && (g.bytes+t.bytes > w.maxBytes || g.entries+entries > w.maxEntries) {
		w.flush()
	}
	if w.failed != nil {
		t.result.Err = w.failed
		return
	}
	g := w.open()
	for _, c := range t.conditions {
		revision, err := g.revisionOf(c.key)
		if err == nil && revision != c.revision {
			err = store.ErrConflict
		}
		if err != nil {
			t.result.Err = err
			if len(g.changes) > 0 {
				g.refused = append(g.refused, t.result)
			}
			return
		}
	}
	revision := g.revision + 1
	change := store.Change{Revision: revision, Writes: make([]store.Record, len(t.writes))}
	for i, wr := range t.writes {
		var err error
		rec := store.Record{Key: wr.name, Revision: revision}
		if wr.value == nil {
			err = g.txn.Delete(wr.key)
		} else {
			binary.BigEndian.PutUint64(wr.value, uint64(revision))
			rec.Value = wr.value[header:]
			err = g.txn.Set(wr.key, wr.value)
		}
		if err != nil {
			// Part of the transaction is in the group now and cannot be taken out.
			g.results = append(g.results, t.result)
			w.abandon(fmt.Errorf("store: write %.40q: %w", wr.name, err))
			return
		}
		change.Writes[i] = rec
	}
	g.revision = revision
	g.bytes += t.bytes
	g.entries += entries
	g.results = append(g.results, t.result)
	g.changes = append(g.changes, change)
}

// revisionOf returns the revision that wrote a key, 0 if it does not exist, as
// of the group's last transaction.
func (g *openGroup) revisionOf(key []byte) (store.Revision, error) {
	item, err := g.txn.Get(key)
	if errors.Is(err, badgerdb.ErrKeyNotFound) {
		return 0, nil
	}
	var revision store.Revision
	if err == nil {
		err = item.Value(func(value []byte) error {
			revision, _, err = revisionOf(value)
			return err
		})
	}
	if err != nil {
		return 0, fmt.Errorf("store: read %.40q: %w", key[1:], err)
	}
	return revision, nil
}

// flush commits the open group, if there is one, and ends the requests that
// wait for it.
func (w *writer) flush() {
	g := w.group
	if g == nil {
		return
	}
	if len(g.changes) == 0 { // conflicts only
		w.abandon(nil)
		return
	}
	if err := w.room(); err != nil {
		w.abandon(err)
		return
	}
	if err := g.txn.Set(revisionKey, encodeRevision(g.revision)); err != nil {
		w.abandon(fmt.Errorf("store: write the revision: %w", err))
		return
	}
	start := w.db.now()
	if err := w.commit(g.txn); err != nil {
		w.failed = w.db.fail(err)
		w.abandon(w.failed)
		return
	}
	w.timed(start)
	w.db.metrics.Commits.Add(float64(len(g.changes)))
	w.revision = g.revision
	w.db.recent.add(g.changes)
	for i, r := range g.results {
		r.Revision = g.changes[i].Revision
	}
	w.finish()
}

// abandon drops the open group: its transactions fail with err, and nothing of
// them happens unless the store has failed. With them fail those that were
// refused for what they would have written.
func (w *writer) abandon(err error) {
	if g := w.group; len(g.results) > 0 {
		for _, r := range append(g.results, g.refused...) {
			r.Err = err
		}
	}
	w.finish()
}

// finish ends the group and the requests that wait for it.
func (w *writer) finish() {
	g := w.group
	w.group = nil
	g.txn.Discard() // without effect after a commit
	w.crowd = len(g.finishes)
	for _, r := range g.finishes {
		close(r.done)
	}
}

// advance carries out a request for a higher revision. No group is open.
func (w *writer) advance(r *request) {
	defer close(r.done)
	if w.failed != nil {
		r.results[0].Err = w.failed
		return
	}
	if r.advance <= w.revision {
		return
	}
	if err := w.room(); err != nil {
		r.results[0].Err = err
		return
	}
	txn := w.db.badger.NewTransaction(true)
	defer txn.Discard()
	if err := txn.Set(revisionKey, encodeRevision(r.advance)); err != nil {
		r.results[0].Err = fmt.Errorf("store: write the revision: %w", err)
		return
	}
	if err := w.commit(txn); err != nil {
		w.failed = w.db.fail(err)
		r.results[0].Err = w.failed
		return
	}
	w.revision = r.advance
	w.db.recent.begin(r.advance)
}

func encodeRevision(revision store.Revision) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(revision))
}

// room returns an error if the disk is so full that a write could kill the
// process.
func (w *writer) room() error {
	if w.db.dir == "" {
		return nil
	}
	free, err := w.free(w.db.dir)
	if err != nil { // not a reason to stop; a failing disk shows itself
		free = math.MaxUint64
	}
	if full := free < w.spare; full != w.full {
		w.full = full
		if full {
			w.db.log.Error("the disk is full: writes are refused until there is room", "dir", w.db.dir, "free_bytes", free, "needed_bytes", w.spare)
		} else {
			w.db.log.Info("the disk has room again: writes go on", "dir", w.db.dir, "free_bytes", free)
		}
	}
	if w.full {
		return diskFull(w.db.dir, free, w.spare)
	}
	return nil
}

func diskFull(dir string, free, needed uint64) error {
	return fmt.Errorf("store: the disk of %s is full: %d MiB are free, %d MiB are needed; make room", dir, free>>20, needed>>20)
}

// timed records how long a commit took, and tells the operator of a disk that
// is too slow.
func (w *writer) timed(start time.Time) {
	now := w.db.now()
	took := now.Sub(start)
	w.db.metrics.CommitSeconds.Observe(took.Seconds())
	if took >= slowCommit && now.Sub(w.saidSlow) >= slowEvery {
		w.saidSlow = now
		w.db.log.Warn("the disk is slow: a write took long to reach it", "dir", w.db.dir, "took", took)
	}
}
