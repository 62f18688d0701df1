package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/hallmark-id/hallmark/server/store"
)

// Bounds of one etcd transaction, as etcd counts by default (--max-txn-ops,
// --max-request-bytes): what a transaction has, and what the largest nested in
// it has, are 128 together.
const (
	maxOps   = 128
	ownOps   = 2 // writer's key, mark
	maxBytes = 1_400_000
	opBytes  = 64 // around a key and a value, at most, besides our prefix
)

// tookLong is how long a group may take before the log says so, at most once in
// saidEvery.
const (
	tookLong  = time.Second
	saidEvery = time.Minute
)

// request is one call of Commit or Advance on its way through the writer.
type request struct {
	ctx     context.Context
	txns    []*txn
	results []store.Result // the writer's until done is closed
	left    int            // transactions of which the outcome is not known; the writer's
	done    chan struct{}
}

// txn is a transaction in etcd's form. It shares no memory with the caller, who
// may give up waiting and go on.
type txn struct {
	request    *request
	result     *store.Result
	advance    store.Revision // if not 0: nothing else, but the revision is raised
	conditions []store.Condition
	writes     []string // keys
	op         clientv3.Op
	ops, bytes int // as etcd counts
}

func (db *DB) newTxn(t store.Txn, r *request, result *store.Result) *txn {
	x := &txn{request: r, result: result, conditions: slices.Clone(t.If), ops: max(len(t.If), len(t.Do))}
	compares := make([]clientv3.Cmp, len(t.If))
	for i, c := range t.If {
		compares[i] = clientv3.Compare(clientv3.ModRevision(db.record(c.Key)), "=", db.etcdRevision(c.Revision))
		x.bytes += opBytes + len(db.record("")) + len(c.Key)
	}
	ops := make([]clientv3.Op, len(t.Do))
	for i, w := range t.Do {
		x.writes = append(x.writes, w.Key)
		if w.Value == nil {
			ops[i] = clientv3.OpDelete(db.record(w.Key))
		} else {
			ops[i] = clientv3.OpPut(db.record(w.Key), string(w.Value))
		}
		x.bytes += opBytes + len(db.record("")) + len(w.Key) + len(w.Value)
	}
	x.op = clientv3.OpTxn(compares, ops, nil)
	return x
}

// etcdRevision is what etcd calls a revision of ours. 0 is that of a key that
// does not exist, in both; -1 is none.
func (db *DB) etcdRevision(r store.Revision) int64 {
	if r == 0 {
		return 0
	}
	if at := int64(r) - db.offset.Load(); at > 0 {
		return at
	}
	return -1
}

// Commit implements [store.Store]. If the cluster does not answer for
// commitTime, the results have [store.ErrNoQuorum].
func (db *DB) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	results := make([]store.Result, len(txns))
	if err := ctx.Err(); err != nil {
		return refuse(results, err)
	}
	r := &request{results: results}
	for i, t := range txns {
		if err := t.Check(); err != nil {
			results[i].Err = err
			continue
		}
		r.txns = append(r.txns, db.newTxn(t, r, &results[i]))
	}
	if err := db.send(ctx, r); err != nil {
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

// Advance implements [store.Store]. Etcd's revision cannot jump; the distance
// between ours and etcd's can.
func (db *DB) Advance(ctx context.Context, to store.Revision) error {
	r := &request{results: make([]store.Result, 1)}
	r.txns = []*txn{{request: r, result: &r.results[0], advance: to}}
	if err := db.send(ctx, r); err != nil {
		return err
	}
	return r.results[0].Err
}

var errSilent = fmt.Errorf("%w; it is not known whether what was to be written is", store.ErrNoQuorum)

// send hands a request to the writer and waits until it is done.
func (db *DB) send(ctx context.Context, r *request) error {
	if err := db.enter(); err != nil {
		return err
	}
	defer db.calls.Done()
	if len(r.txns) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, commitTime, errSilent)
	defer cancel()
	r.ctx, r.left, r.done = ctx, len(r.txns), make(chan struct{})
	select {
	case db.queue <- r:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case <-r.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// writer carries out requests, in one goroutine: one group of transactions at a
// time, while others gather.
type writer struct {
	db       *DB
	key      string // in etcd
	instance string // of this process
	at       int64  // etcd's revision of key when it was last ours
	number   int64  // of the last group

	full bool // said so in the log
	slow time.Time
}

// takeOver makes the writer's key ours. Whoever wrote under our name before
// finds that out with his next group.
func (w *writer) takeOver(ctx context.Context) error {
	for {
		was, err := w.db.client.Get(ctx, w.key)
		if err != nil {
			return err
		}
		var at int64
		if len(was.Kvs) > 0 {
			at = was.Kvs[0].ModRevision
		}
		r, err := w.db.client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(w.key), "=", at)).
			Then(clientv3.OpPut(w.key, w.stamp())).
			Commit()
		if err != nil {
			return err
		}
		if r.Succeeded {
			w.at = r.Header.Revision
			return nil
		}
	}
}

// stamp is what the writer's key holds after the last group.
func (w *writer) stamp() string { return w.instance + " " + strconv.FormatInt(w.number, 10) }

func (w *writer) run() {
	var pending []*txn
	for {
		if len(pending) == 0 {
			r, ok := <-w.db.queue
			if !ok {
				return
			}
			pending = append(pending, r.txns...)
		}
		for len(pending) < maxOps {
			select {
			case r, ok := <-w.db.queue:
				if ok {
					pending = append(pending, r.txns...)
					continue
				}
			default:
			}
			break
		}
		group, rest := cut(pending)
		if len(group) > 0 {
			w.commit(group)
		}
		pending = rest
	}
}

// cut takes from the front of a queue what can be one group: within etcd's
// bounds, and such that no transaction reads or writes what one before it
// writes, since etcd looks at all conditions before it writes anything. It drops
// transactions whose callers have gone.
func cut(queue []*txn) (group, rest []*txn) {
	written := make(map[string]bool)
	bytes, ops := 0, 0
	for i, t := range queue {
		if t.request.ctx.Err() != nil {
			t.finish(0, context.Cause(t.request.ctx))
			continue
		}
		ops = max(ops, t.ops)
		bytes += t.bytes
		full := ownOps+len(group)+1+ops > maxOps || bytes > maxBytes
		if len(group) > 0 && (full || t.advance != 0 || group[0].advance != 0 || t.touches(written)) {
			return group, queue[i:]
		}
		group = append(group, t)
		for _, key := range t.writes {
			written[key] = true
		}
	}
	return group, nil
}

// touches reports whether a transaction has anything to do with certain keys.
func (t *txn) touches(keys map[string]bool) bool {
	return slices.ContainsFunc(t.writes, func(key string) bool { return keys[key] }) ||
		slices.ContainsFunc(t.conditions, func(c store.Condition) bool { return keys[c.Key] })
}

// finish gives a transaction its outcome.
func (t *txn) finish(revision store.Revision, err error) {
	if err != nil {
		revision = 0
	}
	*t.result = store.Result{Revision: revision, Err: err}
	if t.request.left--; t.request.left == 0 {
		close(t.request.done)
	}
}

// commit carries out a group. It tries until it knows the outcome, as long as
// commitTime: a group that etcd did not answer for is written once, or not at
// all, because each try demands that the writer's key is as it was before.
func (w *writer) commit(group []*txn) {
	w.number++
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), commitTime)
	defer cancel()
	for {
		held, at, err := w.try(ctx, group)
		if err == nil {
			w.timed(start)
			w.finish(group, held, at)
			return
		}
		if ctx.Err() == nil && (err == errAgain || passing(err)) {
			pause(ctx)
			continue
		}
		err = w.failed(err)
		for _, t := range group {
			t.finish(0, err)
		}
		return
	}
}

// finish gives the transactions of a group that was written their outcomes.
func (w *writer) finish(group []*txn, held []bool, at int64) {
	revision := store.Revision(at + w.db.offset.Load())
	committed := 0
	for i, t := range group {
		if held[i] {
			committed++
			t.finish(revision, nil)
		} else {
			t.finish(0, store.ErrConflict)
		}
	}
	w.db.metrics.Commits.Add(float64(committed))
}

// errFenced ends a store of which another process has taken the name.
var errFenced = errors.New("store: another process has opened the store under this server's name; each server needs a name and a data directory of its own")

// try sends a group once. It returns which conditions held, and etcd's revision
// of what was written.
func (w *writer) try(ctx context.Context, group []*txn) (held []bool, at int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	db := w.db
	offset := db.offset.Load()
	after := offset
	ops := make([]clientv3.Op, ownOps, ownOps+len(group))
	for _, t := range group {
		if t.advance == 0 {
			ops = append(ops, t.op)
		} else { // alone
			after += max(0, int64(t.advance)-offset-w.at)
		}
	}
	ops[0] = clientv3.OpPut(w.key, w.stamp())
	ops[1] = clientv3.OpPut(db.mark(), strconv.FormatInt(after, 10))
	r, err := db.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(w.key), "=", w.at),
			clientv3.Compare(clientv3.Value(db.mark()), "=", strconv.FormatInt(offset, 10))).
		Then(ops...).
		Else(clientv3.OpGet(w.key), clientv3.OpGet(db.mark())).
		Commit()
	if errors.Is(err, rpctypes.ErrNoSpace) {
		return w.refused(ctx, group, after, err)
	}
	if err != nil {
		return nil, 0, err
	}
	if r.Succeeded {
		w.at = r.Header.Revision
		db.offset.Store(after)
		held = make([]bool, len(group))
		for i, t := range group {
			held[i] = t.advance != 0 || r.Responses[ownOps+i].GetResponseTxn().Succeeded
		}
		return held, w.at, nil
	}
	return w.overtaken(ctx, group, after, r)
}

// refused finds out whether a group was written that etcd had no room for: the
// request that fills it is refused, and carried out all the same.
func (w *writer) refused(ctx context.Context, group []*txn, after int64, why error) (held []bool, at int64, err error) {
	r, err := w.db.client.Txn(ctx).Then(clientv3.OpGet(w.key), clientv3.OpGet(w.db.mark())).Commit()
	if err != nil {
		return nil, 0, err
	}
	held, at, err = w.overtaken(ctx, group, after, r)
	if err == errAgain {
		err = why
	}
	return held, at, err
}

// errAgain: the group was not written; another try may write it.
var errAgain = errors.New("try again")

// overtaken finds out why a group was not written: its conditions on the
// writer's key and the mark did not hold.
func (w *writer) overtaken(ctx context.Context, group []*txn, after int64, r *clientv3.TxnResponse) (held []bool, at int64, err error) {
	db := w.db
	own := r.Responses[0].GetResponseRange().Kvs
	if len(own) == 0 {
		return nil, 0, db.fenced()
	}
	instance, number, _ := strings.Cut(string(own[0].Value), " ")
	if instance != w.instance {
		return nil, 0, db.fenced()
	}
	at = own[0].ModRevision
	if number == strconv.FormatInt(w.number, 10) { // an earlier try was written
		if held, err = w.outcomes(ctx, group, at); err == nil {
			w.at = at
			db.offset.Store(after)
		}
		return held, at, err
	}
	mark, err := markOf((*clientv3.GetResponse)(r.Responses[1].GetResponseRange()))
	if err != nil {
		return nil, 0, err
	}
	db.offset.Store(mark.offset) // another one, if a backup was restored meanwhile
	w.at = at                    // or an earlier group was written after all
	return nil, 0, errAgain
}

// fenced ends the store.
func (db *DB) fenced() error {
	db.log.Error("the store has stopped", "error", errFenced)
	db.end(errFenced)
	return errFenced
}

// outcomes returns which conditions of a group held that was written at a
// revision, by a request that was not answered: those that held just before.
func (w *writer) outcomes(ctx context.Context, group []*txn, at int64) ([]bool, error) {
	held := make([]bool, len(group))
	for i, t := range group {
		held[i] = true
		var gets []clientv3.Op
		for _, c := range t.conditions {
			gets = append(gets, clientv3.OpGet(w.db.record(c.Key), clientv3.WithRev(at-1), clientv3.WithKeysOnly()))
		}
		if len(gets) == 0 {
			continue
		}
		r, err := w.db.client.Txn(ctx).Then(gets...).Commit()
		if err != nil {
			return nil, err
		}
		for j, c := range t.conditions {
			var was int64
			if kvs := r.Responses[j].GetResponseRange().Kvs; len(kvs) > 0 {
				was = kvs[0].ModRevision
			}
			held[i] = held[i] && was == w.db.etcdRevision(c.Revision)
		}
	}
	return held, nil
}

// failed is the error of transactions whose group failed. It tells the operator
// of a full cluster.
func (w *writer) failed(err error) error {
	if err == errAgain {
		err = context.DeadlineExceeded
	}
	err = describe(err)
	switch {
	case errors.Is(err, store.ErrFull):
		if !w.full {
			w.full = true
			w.db.log.Error("the etcd cluster is full: writes are refused until there is room; compact and defragment it, raise its quota, then disarm its alarm", "error", err)
		}
	case errors.Is(err, store.ErrNoQuorum):
		return fmt.Errorf("%w: %v", errSilent, err)
	case err == errFenced:
		return err
	}
	return fmt.Errorf("write to etcd: %w", err)
}

// timed records how long a group took, and tells the operator of a cluster that
// is slow, or has room again.
func (w *writer) timed(start time.Time) {
	now := time.Now()
	took := now.Sub(start)
	w.db.metrics.CommitSeconds.Observe(took.Seconds())
	if w.full {
		w.full = false
		w.db.log.Info("the etcd cluster has room again: writes go on")
	}
	if took >= tookLong && now.Sub(w.slow) >= saidEvery {
		w.slow = now
		w.db.log.Warn("the etcd cluster is slow, or had to choose a leader: a write took long", "took", took)
	}
}
