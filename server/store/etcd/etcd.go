// Package etcd is the engine of the store's contract for several servers: an
// etcd cluster, which they form themselves or which is there already.
//
// [Open] returns a [DB], which is a [store.Store], over a client of the
// cluster. One goroutine of its own writes: transactions that wait while the
// cluster is busy share one etcd transaction, in which each is nested with its
// own conditions. They share a revision then.
//
// Under its prefix, a record is "r/" and its key. "r" is the mark: it is
// written with every transaction, so that the store has a revision for each,
// whatever else is written to the cluster; its value is how far our revisions
// are above etcd's (see [DB.Advance]). "w/" and the name of a server holds its
// writer's last group, by which it finds out, after a silence of the cluster,
// whether a group was written, and which keeps two processes from writing under
// one name. "s/" and its name is there as long as the server is.
package etcd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/store"
)

const (
	// answerTime is how long one request to the cluster may take before it is
	// made again. A leader that dies takes what it was doing along; the next one
	// is there after one to two seconds.
	answerTime = 1500 * time.Millisecond

	// commitTime bounds a commit, all tries together: longer than the cluster
	// needs to choose another leader.
	commitTime = 6 * time.Second

	// readTime bounds one page of a read.
	readTime = 6 * time.Second

	// A page of Read has about pageBytes, as far as the records before tell.
	pageBytes = 4 << 20
	firstPage = 500 // records
	maxPage   = 20_000
)

// Options says which cluster keeps a store, and for whom.
type Options struct {
	// Client of the cluster. The DB closes it, also if Open fails.
	Client *clientv3.Client
	// Prefix of all keys. The cluster may be used for nothing else: the store
	// compacts it.
	Prefix string
	// Name of this server. No two that have the store open may share it.
	Name string

	Log     *slog.Logger     // nil: none
	Metrics *metrics.Metrics // nil: none
}

// DB is a store in an etcd cluster. Its methods may be called concurrently.
type DB struct {
	client  *clientv3.Client
	prefix  string
	name    string
	log     *slog.Logger
	metrics *metrics.Metrics

	offset  atomic.Int64 // of our revisions above etcd's
	servers servers

	queue   chan *request
	writer  writer
	workers sync.WaitGroup  // writer, compactor
	base    context.Context // ends when calls are refused
	stop    context.CancelFunc

	mu    sync.RWMutex
	ended error          // why calls are refused: nil, store.ErrClosed or a failure
	calls sync.WaitGroup // commits and reads under way

	closing  sync.Once
	closeErr error
}

// Open opens the store in a cluster, or makes it. It fails if the cluster does
// not answer in the time that ctx has.
func Open(ctx context.Context, o Options) (*DB, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	db := &DB{
		client:  o.Client,
		prefix:  o.Prefix,
		name:    o.Name,
		log:     o.Log,
		metrics: o.Metrics,
		queue:   make(chan *request, 256),
	}
	db.base, db.stop = context.WithCancel(context.Background())
	db.writer = writer{db: db, key: o.Prefix + "w/" + o.Name, instance: rand.Text()}
	if err := db.start(ctx); err != nil {
		db.stop()
		return nil, errors.Join(err, o.Client.Close())
	}
	db.workers.Go(db.writer.run)
	db.workers.Go(db.compact)
	return db, nil
}

// start makes what a new store lacks and takes over the writer's key.
func (db *DB) start(ctx context.Context) error {
	if db.name == "" || strings.Contains(db.name, "/") {
		return fmt.Errorf("store: %q is not the name of a server; it is not empty and has no slash", db.name)
	}
	// A mark that is there stays as it is.
	_, err := db.client.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(db.mark()), "=", 0)).
		Then(clientv3.OpPut(db.mark(), "0")).
		Commit()
	if err == nil {
		err = db.writer.takeOver(ctx)
	}
	if err == nil {
		var mark *clientv3.GetResponse
		if mark, err = db.client.Get(ctx, db.mark()); err == nil {
			var at position
			if at, err = markOf(mark); err == nil {
				db.offset.Store(at.offset)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("store: open in etcd: %w", describe(err))
	}
	return nil
}

func (db *DB) mark() string             { return db.prefix + "r" }
func (db *DB) record(key string) string { return db.prefix + "r/" + key }

// position is what the mark says.
type position struct {
	revision store.Revision
	offset   int64
}

func markOf(r *clientv3.GetResponse) (position, error) {
	if len(r.Kvs) == 0 {
		return position{}, errors.New("the mark of the store's revision is gone: something else has written to the cluster; restore a backup into an empty one")
	}
	offset, err := parseOffset(r.Kvs[0].Value)
	return position{store.Revision(r.Kvs[0].ModRevision + offset), offset}, err
}

func parseOffset(value []byte) (int64, error) {
	offset, err := strconv.ParseInt(string(value), 10, 64)
	if err != nil || offset < 0 {
		return 0, fmt.Errorf("the mark of the store's revision is %.40q, which no version of hallmark writes; restore a backup into an empty cluster", value)
	}
	return offset, nil
}

// Close waits for the commits and reads under way and releases the store and
// its client. A second call returns what the first returned.
func (db *DB) Close() error {
	db.closing.Do(func() {
		db.end(store.ErrClosed)
		db.calls.Wait()
		close(db.queue)
		db.workers.Wait()
		if err := db.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			db.closeErr = fmt.Errorf("store: close the connection to etcd: %w", err)
		}
	})
	return db.closeErr
}

// end makes every call from now on fail with err.
func (db *DB) end(err error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.ended == nil || err == store.ErrClosed {
		db.ended = err
	}
	db.stop()
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

// Read implements [store.Store]. It reads page by page, all as of the revision
// of the first, which the cluster keeps for minutes.
func (db *DB) Read(ctx context.Context, prefix string, yield func(store.Record) error) (store.Revision, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	if err := db.enter(); err != nil {
		return 0, err
	}
	defer db.calls.Done()

	from := db.record(prefix)
	end := clientv3.GetPrefixRangeEnd(from)
	limit := int64(firstPage)
	var page *clientv3.GetResponse
	var at position
	err := db.ask(ctx, func(ctx context.Context) error {
		r, err := db.client.Txn(ctx).Then(clientv3.OpGet(db.mark()),
			clientv3.OpGet(from, clientv3.WithRange(end), clientv3.WithLimit(limit))).Commit()
		if err != nil {
			return err
		}
		page = (*clientv3.GetResponse)(r.Responses[1].GetResponseRange())
		page.Header = r.Header // a part of a transaction has none of its own
		at, err = markOf((*clientv3.GetResponse)(r.Responses[0].GetResponseRange()))
		return err
	})
	if err != nil {
		return 0, err
	}
	asOf := page.Header.Revision
	for {
		bytes := 0
		for _, kv := range page.Kvs {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			bytes += len(kv.Key) + len(kv.Value)
			rec := store.Record{
				Key:      string(kv.Key[len(db.record("")):]),
				Value:    present(kv.Value),
				Revision: store.Revision(kv.ModRevision + at.offset),
			}
			if err := yield(rec); err != nil {
				return 0, err
			}
		}
		if !page.More || len(page.Kvs) == 0 {
			return at.revision, nil
		}
		limit = min(max(limit*pageBytes/int64(bytes+1), 1), 2*limit, maxPage)
		from := string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		err := db.ask(ctx, func(ctx context.Context) (err error) {
			page, err = db.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(limit), clientv3.WithRev(asOf))
			return err
		})
		if err != nil {
			return 0, err
		}
	}
}

// present is the value of a key that exists: never nil.
func present(value []byte) []byte {
	if value == nil {
		return []byte{}
	}
	return value
}

// ask makes a request that only reads, again if the cluster is silent, until
// readTime has passed.
func (db *DB) ask(ctx context.Context, request func(context.Context) error) error {
	within, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	for {
		once, done := context.WithTimeout(within, answerTime)
		err := request(once)
		done()
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case within.Err() != nil || !passing(err):
			return fmt.Errorf("read from etcd: %w", describe(err))
		}
		pause(within)
	}
}

// Ready returns why the store cannot be read, or nil. It does not need a
// majority: what a server has in memory is of use without one.
func (db *DB) Ready(ctx context.Context) error {
	if err := db.state(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if _, err := db.client.Get(ctx, db.mark(), clientv3.WithSerializable()); err != nil {
		return fmt.Errorf("read from etcd: %w", describe(err))
	}
	return nil
}

// pause waits a moment between two tries.
func pause(ctx context.Context) {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
	}
}

// passing reports whether an error of the cluster, or its silence, may be over
// in a moment: it has no leader, or is too busy.
func passing(err error) bool {
	switch code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown, codes.Internal:
		return true
	}
	return errors.Is(err, rpctypes.ErrTooManyRequests)
}

// code returns the gRPC code of an error; OK, if it has none.
func code(err error) codes.Code {
	var e rpctypes.EtcdError
	switch {
	case errors.As(err, &e):
		return e.Code()
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	}
	if s, ok := grpcstatus.FromError(err); ok {
		return s.Code()
	}
	return codes.OK
}

// describe says what an error of the cluster means.
func describe(err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%w: the space quota of the etcd cluster is used up (%v)", store.ErrFull, err)
	case errors.Is(err, rpctypes.ErrCompacted):
		return fmt.Errorf("the state was compacted while it was being read; try again: %w", err)
	case passing(err):
		return fmt.Errorf("%w (%v)", store.ErrNoQuorum, err)
	}
	return err
}
