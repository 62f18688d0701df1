// Package tokenstatus has tokens (JWT-SVIDs and WIT-SVIDs) revoked by status
// lists (draft-ietf-oauth-status-list, "TSL" below; package statuslist has their
// form).
//
// [Lists] gives each token of this server a place: an index in one of this
// server's lists. The place is the token's serial number, by which the journal
// knows it and by which it is revoked. Run follows the registry, makes lists
// before their indexes are given out, and writes what is revoked into them, from
// where every server of the trust domain pushes it to agents and serves it
// ([Handler]), whoever made the list.
//
// A list is one run's of one server: its name is drawn at random when it is made,
// so that no place is given out twice, whatever was restarted or restored.
// Indexes are drawn at random too: they say nothing of order, and a list that is
// looked at says nothing of how many tokens it is of. A list goes once all of its
// tokens have ended.
package tokenstatus

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

const (
	// Path is where lists are served, each under its ID.
	Path = "/status/"

	// fill is how many indexes of a list are given out before the next is made, and
	// most until that is there: a draw that hits one that is taken is repeated, which
	// takes 4 on average at the end.
	fill = registry.StatusListSize / 2
	most = registry.StatusListSize / 4 * 3

	// takeWait is how long a token waits for a list.
	takeWait = 5 * time.Second
	// skew is how far the clocks of servers may differ, where what was issued after a
	// revocation is told from what was before it: at the start.
	skew      = time.Minute
	retryWait = 2 * time.Second
	maxWait   = time.Minute // the clock may be set
)

// Place is where the status of a token is.
type Place struct {
	Serial    [20]byte // of the token: list and index
	URI       string   // of the list
	Index     uint32
	ExpiresAt time.Time // of the token, at most
}

// Options are what [Lists] are made of.
type Options struct {
	Registry *registry.Registry
	Server   string // this server's name
	Journal  *journal.Journal
	// URL is what URIs of this server's lists begin with, [Path] included. Empty: no
	// token gets a place, and only those of other servers and of earlier runs are
	// kept.
	URL     string
	Now     func() time.Time // nil: time.Now
	Log     *slog.Logger     // nil: none
	Metrics *metrics.Metrics // nil: none
}

// Lists are the status lists of this server. Its Run may be called once.
type Lists struct {
	o     Options
	seen  *registry.View // the last one that was looked at whole
	began store.Revision // what is newer is seen as it comes

	wake chan struct{}

	mu       sync.Mutex
	random   *rand.ChaCha8
	wanted   bool                 // a token has asked
	current  *open                // indexes are drawn from it; nil: none yet
	made     chan struct{}        // closed and replaced as current is
	retired  map[string]time.Time // when the last token of a list ends, by the list's ID; of this run
	failures bool                 // making one fails, which is logged
}

// open is a list of which indexes are drawn.
type open struct {
	id    string
	uri   string
	ends  time.Time // of its tokens, at most
	last  time.Time // of those that it has
	taken int
	used  []uint64 // a bit for each index
}

// New makes lists; there are none until [Lists.Run].
func New(o Options) *Lists {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	var seed [32]byte
	crand.Read(seed[:]) // never fails
	return &Lists{
		o: o, began: o.Registry.View().Revision(), random: rand.NewChaCha8(seed),
		wake: make(chan struct{}, 1), made: make(chan struct{}), retired: make(map[string]time.Time),
	}
}

// Take draws the place of a token that is to end at a time. It waits until there
// is a list, for 5 seconds at most; then the error is [authority.ErrUnavailable]:
// a token that could not be revoked is not to go out.
func (l *Lists) Take(ctx context.Context, expires time.Time) (Place, error) {
	var late <-chan time.Time
	for {
		p, made, ok := l.draw(expires)
		if ok {
			return p, nil
		}
		l.poke()
		if late == nil {
			timer := time.NewTimer(takeWait)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case <-made:
		case <-late:
			return Place{}, fmt.Errorf("%w: there is no status list for the token", authority.ErrUnavailable)
		case <-ctx.Done():
			return Place{}, ctx.Err()
		}
	}
}

// draw draws a place, or returns what is closed once there is another list.
func (l *Lists) draw(expires time.Time) (Place, <-chan struct{}, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wanted = true
	c := l.current
	if c == nil || c.taken >= most {
		return Place{}, l.made, false
	}
	var index uint32
	for {
		index = uint32(l.random.Uint64() % registry.StatusListSize) // a power of two
		if bit := uint64(1) << (index % 64); c.used[index/64]&bit == 0 {
			c.used[index/64] |= bit
			break
		}
	}
	if c.taken++; c.taken == fill {
		l.poke()
	}
	if expires.After(c.ends) {
		expires = c.ends
	}
	if expires.After(c.last) {
		c.last = expires
	}
	serial, _ := statuslist.Serial(c.id, index)
	return Place{Serial: serial, URI: c.uri, Index: index, ExpiresAt: expires}, nil, true
}

// poke has Run look.
func (l *Lists) poke() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Run keeps the lists until the context ends. It returns the context's error.
func (l *Lists) Run(ctx context.Context) error {
	var next time.Time
	for {
		changed, view, now := l.o.Registry.Changed(), l.o.Registry.View(), l.o.Now()
		made, err := l.extend(ctx, view, now)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			next = now.Add(retryWait)
		case made:
			continue // what is in the view now
		case !view.SameRevocations(l.seen) || !now.Before(next):
			next = l.publish(ctx, view, now)
		}
		timer := time.NewTimer(min(next.Sub(l.o.Now()), maxWait))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-changed:
		case <-l.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// extend makes a list if one is needed: the first, as a token asks for it, or
// the next, as half of the current is given out or another authority will sign
// for longer. It reports whether it has.
func (l *Lists) extend(ctx context.Context, view *registry.View, now time.Time) (bool, error) {
	if l.o.URL == "" {
		return false, nil
	}
	var ends time.Time // of what this server's authorities sign
	for _, a := range view.Authorities() {
		if a.Server == l.o.Server && a.Kind != registry.X509 && a.ExpiresAt.After(ends) {
			ends = a.ExpiresAt
		}
	}
	l.mu.Lock()
	c := l.current
	needed := l.wanted && ends.After(now) && (c == nil || c.taken >= fill || c.ends.Before(ends))
	l.mu.Unlock()
	if !needed {
		return false, nil
	}
	var random [16]byte
	crand.Read(random[:]) // never fails
	id := statuslist.NewID(random)
	fresh := &open{id: id, uri: l.o.URL + id, ends: ends, used: make([]uint64, registry.StatusListSize/64)}
	err := l.o.Registry.PutStatusList(ctx, nil, &registry.StatusList{
		ID: id, URI: fresh.uri, Server: l.o.Server, EndsAt: ends, Applied: view.Revision(),
	})
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil && !l.failures {
			l.failures = true
			l.o.Log.Error("no status list can be made; once there is none left, no tokens are issued", "error", err)
		}
		return false, err
	}
	l.failures = false
	if c != nil {
		l.retired[c.id] = c.last
	}
	l.current = fresh
	close(l.made)
	l.made = make(chan struct{})
	l.o.Log.Debug("a status list was made", "list", id)
	return true, nil
}

// publish brings the lists to what a view says, and returns when to look again
// whatever comes.
func (l *Lists) publish(ctx context.Context, view *registry.View, now time.Time) time.Time {
	all := true
	revoked, lists := 0, 0
	work := l.revokedTokens(view)
	for list := range view.StatusLists() {
		own := list.Server == l.o.Server
		fresh, err := l.updated(list, own, work)
		if err == nil && fresh != nil {
			err = l.o.Registry.PutStatusList(ctx, list, fresh)
		}
		switch {
		case err != nil && ctx.Err() == nil:
			all = false
			if !errors.Is(err, store.ErrConflict) { // else another server has set what it sets; look again
				l.o.Log.Error("what was revoked is not in its status list", "list", list.ID, "error", err)
			}
		case fresh != nil && fresh.Revoked > list.Revoked:
			l.o.Log.Info("tokens were revoked", "list", list.ID, "revoked", fresh.Revoked-list.Revoked, "in_list", fresh.Revoked)
			revoked += fresh.Revoked - list.Revoked
		}
		if own {
			lists++
			revoked += list.Revoked
		}
	}
	l.o.Metrics.StatusLists.Set(float64(lists))
	l.o.Metrics.RevokedTokens.Set(float64(revoked))
	if !all {
		return now.Add(retryWait)
	}
	l.seen = view
	l.mu.Lock()
	for id := range l.retired {
		if view.StatusList(id) == nil {
			delete(l.retired, id)
		}
	}
	l.mu.Unlock()
	return now.Add(maxWait)
}

// pending is what is revoked by a view.
type pending struct {
	applied store.Revision   // of the newest revocation
	tokens  map[string][]int // indexes, by list: of any server
}

// revokedTokens finds the tokens that are revoked and may not be in their lists:
// those that were named, and those that this server has issued of identities and
// through agents.
func (l *Lists) revokedTokens(view *registry.View) (work pending) {
	work.tokens = make(map[string][]int)
	var since store.Revision = 1<<63 - 1 // what all own lists have
	for list := range view.StatusLists() {
		if list.Server == l.o.Server {
			since = min(since, list.Applied)
		}
	}
	add := func(serial []byte) {
		if id, index, ok := statuslist.Place(serial); ok && index < registry.StatusListSize {
			work.tokens[id] = append(work.tokens[id], index)
		}
	}
	// Until when what was issued is meant, Unix seconds, by identity and by agent.
	ids, nodes := make(map[string]int64), make(map[string]int64)
	for r := range view.Revocations() {
		work.applied = max(work.applied, r.Revision())
		switch {
		case len(r.SerialNumber) > 0:
			add(r.SerialNumber)
		case r.Revision() > since:
			// As it comes, it is about all that there is. One that an earlier run has
			// seen, and not finished with, is told by the clock from what came after it.
			before := r.RevokedAt.Add(skew).Unix()
			if r.Revision() > l.began {
				before = 1<<63 - 1
			}
			of, name := ids, r.SPIFFEID.String()
			if !r.Node.IsZero() {
				of, name = nodes, r.Node.String()
			}
			of[name] = max(of[name], before)
		}
	}
	if len(ids)+len(nodes) == 0 {
		return work
	}
	for _, v := range l.o.Journal.Find(func(v *journal.SVID) bool { // once for all: it looks at each
		return statuslist.IsSerial(v.Serial[:]) && (v.IssuedAt <= ids[v.ID] || v.IssuedAt <= nodes[v.Node])
	}) {
		add(v.Serial[:])
	}
	return work
}

// updated returns a list with what is revoked, or nil if it has that.
func (l *Lists) updated(list *registry.StatusList, own bool, work pending) (*registry.StatusList, error) {
	fresh := *list
	changed := false
	for _, index := range work.tokens[list.ID] {
		if fresh.Has(index) {
			continue
		}
		if !changed {
			changed = true
			if fresh.List == nil {
				var err error
				if fresh.List, err = statuslist.New(1, registry.StatusListSize); err != nil {
					return nil, err
				}
			} else {
				fresh.List = fresh.List.Clone()
			}
		}
		fresh.List.Set(index, statuslist.Invalid)
		fresh.Revoked++
	}
	if changed {
		fresh.Bits = fresh.List.Compress()
	}
	if own && work.applied > fresh.Applied {
		fresh.Applied, changed = work.applied, true
	}
	l.mu.Lock()
	last, retired := l.retired[list.ID]
	l.mu.Unlock()
	if retired && last.Before(fresh.EndsAt) {
		fresh.EndsAt, changed = last, true
	}
	if !changed {
		return nil, nil
	}
	return &fresh, nil
}

// Covered reports whether a list has a revocation that a revision wrote, as far
// as it concerns it.
func Covered(l *registry.StatusList, r *registry.Revocation, revision store.Revision) bool {
	if len(r.SerialNumber) > 0 {
		id, index, ok := statuslist.Place(r.SerialNumber)
		return !ok || id != l.ID || l.Has(index)
	}
	return l.Applied >= revision
}
