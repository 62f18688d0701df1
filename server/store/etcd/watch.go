package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/hallmark-id/hallmark/server/store"
)

const (
	// keepRevisions is how many of etcd's revisions remain for those who watch
	// or read; the contract demands 10,000 changes, and some are no change.
	keepRevisions = 20_000

	// compactEvery is how often the rest is given up. What was there at one
	// compaction remains until the next, so that a read has this long.
	compactEvery = 5 * time.Minute
)

// Watch implements [store.Store]. It goes on through changes of the leader and
// losses of the connection, from where it was.
func (db *DB) Watch(ctx context.Context, after store.Revision, yield func([]store.Change) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(db.base, cancel)()
	broken := false
	for {
		err := db.follow(ctx, &after, yield)
		switch {
		case db.state() != nil:
			return db.state()
		case ctx.Err() != nil:
			return ctx.Err()
		case err != errBroken:
			return err
		}
		if !broken {
			db.log.Warn("the watch of the etcd cluster has ended; trying again", "after", after)
		}
		broken = true
		pause(ctx)
	}
}

// errBroken: the watch ended for a reason that may pass.
var errBroken = errors.New("watch of etcd has ended")

// follow watches once. It moves after on with each change that yield has taken.
func (db *DB) follow(ctx context.Context, after *store.Revision, yield func([]store.Change) error) error {
	offset := db.offset.Load()
	from := int64(*after) - offset + 1
	if from < 1 { // before an Advance
		return store.ErrCompacted
	}
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for r := range db.client.Watch(ctx, db.mark(), clientv3.WithPrefix(), clientv3.WithRev(from)) {
		if r.CompactRevision != 0 {
			return store.ErrCompacted
		}
		if err := r.Err(); err != nil {
			if passing(err) || errors.Is(err, rpctypes.ErrNoLeader) {
				break
			}
			return fmt.Errorf("watch etcd: %w", err)
		}
		changes, err := db.changes(r.Events, offset)
		if err != nil {
			return err
		}
		if len(changes) == 0 {
			continue
		}
		if err := yield(changes); err != nil {
			return err
		}
		*after = changes[len(changes)-1].Revision
	}
	return errBroken
}

// changes turns events into changes, one a revision. Etcd never splits a
// revision between answers.
func (db *DB) changes(events []*clientv3.Event, offset int64) ([]store.Change, error) {
	var changes []store.Change
	for _, e := range events {
		revision := store.Revision(e.Kv.ModRevision + offset)
		if len(changes) == 0 || changes[len(changes)-1].Revision != revision {
			changes = append(changes, store.Change{Revision: revision})
		}
		if string(e.Kv.Key) == db.mark() {
			if now, err := parseOffset(e.Kv.Value); err != nil {
				return nil, err
			} else if now != offset { // a backup was restored: nothing is as it was
				db.offset.Store(now)
				return nil, store.ErrCompacted
			}
			continue
		}
		rec := store.Record{Key: strings.TrimPrefix(string(e.Kv.Key), db.record("")), Revision: revision}
		if e.Type == mvccpb.Event_PUT {
			rec.Value = present(e.Kv.Value)
		}
		last := &changes[len(changes)-1]
		last.Writes = append(last.Writes, rec)
	}
	return changes, nil
}

// compact gives up old revisions, until the store is closed. Every server does
// it: what one has given up is gone for all, and asking again does no harm.
func (db *DB) compact() {
	ticker := time.NewTicker(compactEvery)
	defer ticker.Stop()
	var seen int64
	for {
		select {
		case <-db.base.Done():
			return
		case <-ticker.C:
		}
		now, err := db.compactOnce(db.base, seen)
		if err != nil && db.base.Err() == nil {
			db.log.Warn("old revisions could not be given up; trying again", "error", err, "in", compactEvery)
		}
		seen = now
	}
}

// compactOnce gives up what is older than seen, but for the last keepRevisions,
// and returns etcd's revision.
func (db *DB) compactOnce(ctx context.Context, seen int64) (now int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, readTime)
	defer cancel()
	r, err := db.client.Get(ctx, db.mark())
	if err != nil {
		return seen, err
	}
	now = r.Header.Revision
	if to := min(seen, now-keepRevisions); to > 0 {
		_, err = db.client.Compact(ctx, to)
		if errors.Is(err, rpctypes.ErrCompacted) {
			err = nil
		}
	}
	return now, err
}
