package etcd

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/hallmark-id/hallmark/server/store"
)

const (
	// presence is how long a server counts as there after it was last heard of,
	// in seconds.
	presence = 10
	// presentEvery is how often each says that it is there.
	presentEvery = 3 * time.Second
	// alone is after how many times that it could not there is no majority: a
	// new leader is there before.
	alone = 2
)

// Server is one of those that have the store open.
type Server struct {
	Name     string         `json:"-"`
	Address  string         `json:"address"` // host:port that agents dial
	Version  string         `json:"version"`
	Since    time.Time      `json:"since"`
	Revision store.Revision `json:"revision"` // that it showed some seconds ago
	Leads    bool           `json:"-"`        // does what one of them has to do for all
	Arrival  int64          `json:"-"`        // higher of one that came later
}

// servers is who is there, as of the last look.
type servers struct {
	mu    sync.Mutex
	list  []Server
	until time.Time // how long it may be believed
}

// Announce tells the other servers of this one, and finds out who they are,
// until the context ends. Shown says which revision the server shows; seen is
// told who is there, after each look.
func (db *DB) Announce(ctx context.Context, self Server, shown func() store.Revision, seen func([]Server)) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(db.base, cancel)()
	var lease clientv3.LeaseID
	defer func() {
		if lease == 0 {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerTime)
		defer cancel()
		_, _ = db.client.Revoke(ctx, lease) // else it ends by itself
	}()
	ticker := time.NewTicker(presentEvery)
	defer ticker.Stop()
	said, failures := store.Revision(-1), 0
	for {
		self.Revision = shown()
		held, err := db.present(ctx, self, lease, self.Revision != said)
		if err == nil {
			lease, said = held, self.Revision
			if failures >= alone {
				db.log.Info("a majority of the servers can be reached again: changes are taken")
			}
			failures = 0
			db.metrics.Majority.Set(1)
			if list, err := db.Servers(); err == nil {
				seen(list)
			}
		} else if ctx.Err() == nil {
			said = -1
			if failures++; failures == alone {
				db.log.Error("no majority of the servers can be reached: nothing can be changed, no node attests or renews; what is known is served", "error", describe(err))
				db.metrics.Majority.Set(0)
			}
			db.log.Debug("the other servers could not be told that this one is there", "error", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// present keeps this server's key, of a lease, and looks at those of all.
func (db *DB) present(ctx context.Context, self Server, lease clientv3.LeaseID, changed bool) (clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, presentEvery)
	defer cancel()
	asked := time.Now()
	if lease != 0 {
		if _, err := db.client.KeepAliveOnce(ctx, lease); err != nil {
			if passing(err) {
				return lease, err
			}
			lease = 0 // it has ended
		}
	}
	if lease == 0 {
		granted, err := db.client.Grant(ctx, presence)
		if err != nil {
			return 0, err
		}
		lease, changed = granted.ID, true
	}
	key := db.prefix + "s/" + self.Name
	if changed {
		value, err := json.Marshal(self)
		if err != nil {
			return lease, err
		}
		if _, err := db.client.Put(ctx, key, string(value), clientv3.WithLease(lease)); err != nil {
			return 0, err
		}
	}
	all, err := db.client.Get(ctx, db.prefix+"s/", clientv3.WithPrefix())
	if err != nil {
		return lease, err
	}
	before, now := db.servers.set(all, len(db.prefix+"s/"), asked.Add(presence*time.Second))
	for name := range before {
		if !now[name] {
			db.log.Warn("a server of the trust domain is not heard of any more", "name", name)
		}
	}
	for name := range now {
		if !before[name] && name != db.name {
			db.log.Info("a server of the trust domain is there", "name", name)
		}
	}
	return lease, nil
}

// set takes in what a look has found, and returns who was there before and is
// now.
func (s *servers) set(all *clientv3.GetResponse, prefix int, until time.Time) (before, now map[string]bool) {
	list := make([]Server, len(all.Kvs))
	leader := -1
	for i, kv := range all.Kvs {
		_ = json.Unmarshal(kv.Value, &list[i]) // what another version wrote is left out
		list[i].Name, list[i].Arrival = string(kv.Key[prefix:]), kv.CreateRevision
		if leader < 0 || kv.CreateRevision < all.Kvs[leader].CreateRevision {
			leader = i
		}
	}
	if leader >= 0 {
		list[leader].Leads = true // the one that is there for longest
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before, now = names(s.list), names(list)
	s.list, s.until = list, until
	return before, now
}

func names(list []Server) map[string]bool {
	out := make(map[string]bool, len(list))
	for _, s := range list {
		out[s.Name] = true
	}
	return out
}

// Servers returns the servers that have the store open, by name.
func (db *DB) Servers() ([]Server, error) {
	db.servers.mu.Lock()
	defer db.servers.mu.Unlock()
	if !time.Now().Before(db.servers.until) {
		return nil, fmt.Errorf("it is not known which servers are there: %w", store.ErrNoQuorum)
	}
	return append([]Server(nil), db.servers.list...), nil
}

// Leads reports whether this server is the one to do what one has to do for
// all. For a moment two may think so, or none.
func (db *DB) Leads() bool {
	list, err := db.Servers()
	if err != nil {
		return false
	}
	for _, s := range list {
		if s.Leads {
			return s.Name == db.name
		}
	}
	return false
}
