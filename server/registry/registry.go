// Package registry is the state of a trust domain in memory: the fold of the
// store's log.
//
// A [Registry] follows its store and keeps everything in it (entries, nodes,
// join tokens, bundles, the authorities' public halves) indexed for the
// questions that the hot paths ask. Ask them of a [View], which is immutable
// and shows one revision; no question touches the store. Writes go to the
// store and return once the fold has applied them, so that a client reads its
// own writes. [Registry.Subscribe] tells a push stream what has changed for
// its node.
//
// The indexes are copy-on-write trees: one goroutine changes them and
// publishes a copy after each group of changes, which costs in proportion to
// the changes.
package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/server/store"
)

// The records, by the prefix of their key.
const (
	entryPrefix      = "entry/"      // <entry ID>
	similarPrefix    = "similar/"    // <hash of SPIFFE ID, parent and selectors> → entry ID
	nodePrefix       = "node/"       // <SPIFFE ID>
	tokenPrefix      = "token/"      // <hash of the token>
	bundlePrefix     = "bundle/"     // <trust domain>
	authorityPrefix  = "authority/"  // <server>/<kind>/<authority ID>
	federationPrefix = "federation/" // <trust domain>
	usePrefix        = "used/"       // <hash of an outside issuer's token>
	trustDomainKey   = "trust-domain"
)

const maxAgentVersion = 255 // characters

// maxTries bounds how often a write is tried again because another writer
// came first: of several servers that change one record, one may be slower each
// time.
const maxTries = 100

// Options are what a registry is made of.
type Options struct {
	Store       store.Store
	TrustDomain spiffeid.TrustDomain
	// Leads says whether this server is the one to delete what has expired, of
	// several that share the store. Nil: it is alone.
	Leads func() bool
	Now   func() time.Time // nil: time.Now
	Log   *slog.Logger     // nil: none
}

// Registry is the state of a trust domain.
type Registry struct {
	store store.Store
	td    spiffeid.TrustDomain
	leads func() bool
	now   func() time.Time
	log   *slog.Logger

	view atomic.Pointer[View]

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at each publication
	told    *View         // the newest view of which every subscription has been told
	stopped error         // why Run has ended, if it has
	subs    map[spiffeid.ID]map[*Subscription]bool

	retrying chan struct{} // held by the one writer that tries again

	fold fold // owned by Open, then by Run
}

// Open loads the state from a store. It fails if the store belongs to another
// trust domain, or holds a record that it cannot read. Writes wait until Run
// has been started.
func Open(ctx context.Context, o Options) (*Registry, error) {
	r := &Registry{
		store:   o.Store,
		td:      o.TrustDomain,
		leads:   o.Leads,
		now:     o.Now,
		log:     o.Log,
		changed: make(chan struct{}),
		subs:    make(map[spiffeid.ID]map[*Subscription]bool),

		retrying: make(chan struct{}, 1),
	}
	if r.leads == nil {
		r.leads = func() bool { return true }
	}
	if r.now == nil {
		r.now = time.Now
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	if err := r.claim(ctx); err != nil {
		return nil, err
	}
	if err := r.load(ctx); err != nil {
		return nil, err
	}
	return r, nil
}

// claim makes sure that the store is this trust domain's: one store, one trust
// domain, for ever.
func (r *Registry) claim(ctx context.Context) error {
	res := r.store.Commit(ctx, store.Txn{
		If: []store.Condition{{Key: trustDomainKey}},
		Do: []store.Write{{Key: trustDomainKey, Value: []byte(r.td.Name())}},
	})[0]
	if res.Err == nil || !errors.Is(res.Err, store.ErrConflict) {
		return res.Err
	}
	_, err := r.store.Read(ctx, trustDomainKey, func(rec store.Record) error {
		if name := string(rec.Value); rec.Key == trustDomainKey && name != r.td.Name() {
			return fmt.Errorf("the store belongs to trust domain %q, not %q; use another data directory, or set trust_domain to %q", name, r.td.Name(), name)
		}
		return nil
	})
	return err
}

// TrustDomain returns the trust domain that the registry is for.
func (r *Registry) TrustDomain() spiffeid.TrustDomain { return r.td }

// View returns the newest state.
func (r *Registry) View() *View { return r.view.Load() }

// Changed returns a channel that is closed when a newer state is published than
// there was at this call. Take a view after it.
func (r *Registry) Changed() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

// Run follows the store and prunes what has expired, until the context ends.
func (r *Registry) Run(ctx context.Context) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	var pruner sync.WaitGroup
	pruner.Go(func() { r.prune(ctx) })
	defer pruner.Wait()
	defer cancel()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.stopped = cmp.Or(err, errors.New("registry has stopped"))
		close(r.changed)
		r.changed = make(chan struct{})
	}()
	for {
		err := r.store.Watch(ctx, r.View().revision, func(changes []store.Change) error {
			r.apply(changes)
			return nil
		})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, store.ErrCompacted):
			r.log.Warn("the registry fell behind its store and loads it anew", "revision", r.View().revision)
			if err := r.load(ctx); err != nil {
				return err
			}
			r.wake(nil)
		default:
			return fmt.Errorf("follow the store: %w", err)
		}
	}
}

// apply folds changes, publishes the view that has them and tells those
// concerned.
func (r *Registry) apply(changes []store.Change) {
	var touched []string
	for _, c := range changes {
		for _, rec := range c.Writes {
			if err := r.fold.apply(rec); err != nil {
				r.log.Error("a record cannot be read and is ignored", "key", rec.Key, "revision", rec.Revision, "error", err)
				continue
			}
			touched = append(touched, rec.Key)
		}
	}
	old := r.View()
	r.view.Store(r.fold.publish(changes[len(changes)-1].Revision, r.td))
	r.wake(r.concerned(old, r.View(), touched))
}

// wake marks what is concerned on the subscriptions (everything, if c is nil)
// and lets those who wait for the new revision go on.
func (r *Registry) wake(c *concern) {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.changed)
	r.changed = make(chan struct{})
	r.told = r.View()
	if c == nil || len(c.bundles) > 0 || c.revoked {
		for node, subs := range r.subs {
			for s := range subs {
				s.mark(c, node)
			}
		}
		return
	}
	for node := range c.nodes {
		for s := range r.subs[node] {
			s.mark(c, node)
		}
	}
}

// await waits until the view shows at least a revision, and whoever subscribed
// has been told of it.
func (r *Registry) await(ctx context.Context, rev store.Revision) (*View, error) {
	for {
		r.mu.Lock()
		changed, told, stopped := r.changed, r.told, r.stopped
		r.mu.Unlock()
		if told.revision >= rev {
			return told, nil
		}
		if stopped != nil {
			return nil, stopped
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// CatchUp waits until the view shows all that the store had when it was called.
func (r *Registry) CatchUp(ctx context.Context) error {
	rev, err := r.store.Read(ctx, trustDomainKey, func(store.Record) error { return nil })
	if err == nil {
		_, err = r.await(ctx, rev)
	}
	return err
}

// turn is a writer's turn to try again. Those before whom another writer came
// take turns: however many change one record at once, each succeeds soon.
type turn struct{ taken bool }

func (t *turn) wait(ctx context.Context, r *Registry) error {
	if t.taken {
		return nil
	}
	select {
	case r.retrying <- struct{}{}:
		t.taken = true
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *turn) end(r *Registry) {
	if t.taken {
		<-r.retrying
	}
}

// change commits the transaction that build makes from the newest view, and
// returns a view that has it. If another writer came first, it builds it again.
// A transaction without writes is not committed.
func (r *Registry) change(ctx context.Context, build func(*View) (store.Txn, error)) (*View, error) {
	var turn turn
	defer turn.end(r)
	for range maxTries {
		v := r.View()
		txn, err := build(v)
		if err != nil {
			return nil, err
		}
		if len(txn.Do) == 0 {
			return v, nil
		}
		res := r.commit(ctx, txn)[0]
		if res.Err == nil {
			return r.await(ctx, res.Revision)
		}
		if !errors.Is(res.Err, store.ErrConflict) {
			return nil, res.Err
		}
		if err := turn.wait(ctx, r); err != nil {
			return nil, err
		}
		if err := r.CatchUp(ctx); err != nil {
			return nil, err
		}
	}
	return nil, &Error{Kind: Contended, Msg: "others keep changing the same records; try again"}
}

// commit hands transactions to the store.
func (r *Registry) commit(ctx context.Context, txns ...store.Txn) []store.Result {
	ctx, span := telemetry.Span(ctx, "store commit")
	defer span.End()
	return r.store.Commit(ctx, txns...)
}

// putTxn writes one record if the key was last written at a revision.
func putTxn(key string, rev store.Revision, m proto.Message) (store.Txn, error) {
	value, err := proto.Marshal(m)
	if err != nil {
		return store.Txn{}, err
	}
	return store.Txn{
		If: []store.Condition{{Key: key, Revision: rev}},
		Do: []store.Write{{Key: key, Value: value}},
	}, nil
}

func timeOf(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0)
}

func unixOf(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
