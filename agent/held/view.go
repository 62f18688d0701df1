package held

import (
	"container/list"
	"context"
	"encoding/binary"
	"iter"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.opentelemetry.io/otel/trace"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Update is everything that a set of selectors is entitled to, at one moment.
// It is shared and does not change.
type Update struct {
	// Entries are those that match, oldest first.
	Entries []*entry.Entry
	// Identities are the entries that a workload is told of, in the same
	// order. Where two have the same hint the later one is not among them:
	// hints are unique in one message (Workload API §5.2.1).
	Identities []Identity
	Bundle     *bundle.Bundle   // of the own trust domain; nil until it is known
	Federated  []*bundle.Bundle // that the entries federate with and that are known, by name
	// Ready says that each identity has an X509-SVID, or that signing it has
	// failed: nothing better is to be had at once.
	Ready bool
	// CRLs are those of the own trust domain's authorities that have revoked
	// anything, DER, in the order of the authorities' IDs.
	CRLs [][]byte
	// WITs are the WIT-SVIDs of the entries; nil unless somebody subscribes to
	// them.
	WITs map[*entry.Entry]WITIdentity

	all   []Identity // of Entries
	until time.Time  // when something in it expires; zero is never
	memo  sync.Map
}

// Only returns the update as it is for somebody who may have these entries
// alone.
func (u *Update) Only(may func(*entry.Entry) bool) *Update {
	only := &Update{Bundle: u.Bundle, CRLs: u.CRLs, until: u.until}
	for _, i := range u.all {
		if may(i.Entry) {
			only.all = append(only.all, i)
		}
	}
	if u.WITs != nil {
		only.WITs = maps.Clone(u.WITs)
		maps.DeleteFunc(only.WITs, func(e *entry.Entry, _ WITIdentity) bool { return !may(e) })
	}
	only.tell()
	for _, b := range u.Federated {
		if slices.ContainsFunc(only.Entries, func(e *entry.Entry) bool { return slices.Contains(e.FederatesWith, b.TrustDomain) }) {
			only.Federated = append(only.Federated, b)
		}
	}
	return only
}

// tell sets what follows from all, and returns the entries that Identities
// leaves out.
func (u *Update) tell() (dropped []*entry.Entry) {
	identities := make(map[*entry.Entry]Identity, len(u.all))
	for _, i := range u.all {
		u.Entries = append(u.Entries, i.Entry)
		identities[i.Entry] = i
	}
	kept, dropped := DistinctHints(u.Entries)
	u.Ready = true
	for _, e := range kept {
		i := identities[e]
		u.Identities = append(u.Identities, i)
		u.Ready = u.Ready && (i.SVID != nil || i.Err != nil)
	}
	return dropped
}

// Identity is an entry with its X509-SVID.
type Identity struct {
	Entry *entry.Entry
	SVID  *X509SVID // nil if none is held now
	Err   error     // why the last attempt to sign one failed
}

// WITIdentity is an entry's WIT-SVID.
type WITIdentity struct {
	SVID *WITSVID // nil if none is held now
	Err  error    // why the last attempt to sign one failed
}

// Memo returns what make made the first time it was called with this key.
// All streams with the same selectors so share one encoding of an update.
func (u *Update) Memo(key any, make func() any) any {
	if v, ok := u.memo.Load(key); ok {
		return v
	}
	v, _ := u.memo.LoadOrStore(key, make())
	return v
}

// DistinctHints returns the entries without those that have the same hint as
// an earlier one, and those. Entries without a hint all stay.
func DistinctHints(entries []*entry.Entry) (kept, dropped []*entry.Entry) {
	seen := make(map[string]bool, len(entries))
	for _, e := range entries {
		if e.Hint != "" && seen[e.Hint] {
			dropped = append(dropped, e)
			continue
		}
		seen[e.Hint] = true
		kept = append(kept, e)
	}
	return kept, dropped
}

// Subscription says when what a set of selectors is entitled to changes. Close
// it.
type Subscription struct {
	// C receives after a change. Several changes may give one.
	C <-chan struct{}

	h     *Held
	c     chan struct{}
	v     *view
	wants kind // the SVIDs that it wants; kinds: none
}

// Subscribe follows X509-SVIDs and bundles. While it is open, X509-SVIDs of
// all entries that match are signed and renewed. The context says in which
// trace a workload waits for them, and nothing else.
func (h *Held) Subscribe(ctx context.Context, selectors selector.Set) *Subscription {
	return h.subscribe(selectors, x509Kind, trace.SpanFromContext(ctx))
}

// SubscribeWIT is Subscribe for WIT-SVIDs.
func (h *Held) SubscribeWIT(ctx context.Context, selectors selector.Set) *Subscription {
	return h.subscribe(selectors, witKind, trace.SpanFromContext(ctx))
}

// SubscribeBundles follows the entries that match and their bundles. It is not
// woken for SVIDs and does not ask for any.
func (h *Held) SubscribeBundles(selectors selector.Set) *Subscription {
	return h.subscribe(selectors, kinds, nil)
}

func (h *Held) subscribe(selectors selector.Set, wants kind, asker trace.Span) *Subscription {
	c := make(chan struct{}, 1)
	s := &Subscription{C: c, h: h, c: c, wants: wants}
	h.mu.Lock()
	defer h.mu.Unlock()
	s.v = h.viewOf(selectors)
	h.views.unrest(s.v)
	s.v.subscribers[s] = struct{}{}
	h.want(s.v, wants, +1)
	if wants != kinds && asker.IsRecording() {
		for _, wanted := range s.v.matched {
			if c := h.credential(wanted, wants); c.svid == nil {
				c.asker = asker
			}
		}
	}
	return s
}

// Update returns the state as it is now.
func (s *Subscription) Update() *Update {
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	return s.h.update(s.v)
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.h.mu.Lock()
	defer s.h.mu.Unlock()
	if _, ok := s.v.subscribers[s]; !ok {
		return
	}
	delete(s.v.subscribers, s)
	s.h.want(s.v, s.wants, -1)
	if len(s.v.subscribers) == 0 {
		s.h.rest(s.v)
	}
}

// Look returns what a set of selectors is entitled to now. It signs nothing.
func (h *Held) Look(selectors selector.Set) *Update {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.update(h.viewOf(selectors))
}

// view is what one set of selectors is entitled to. Processes that are alike
// share one.
type view struct {
	key         string
	selectors   selector.Set
	matched     []*slot // oldest first
	subscribers map[*Subscription]struct{}
	wanting     [kinds]int    // how many of them want SVIDs of each kind
	update      *Update       // nil: make it anew
	resting     *list.Element // while nobody subscribes to it
	dropped     []*entry.Entry
}

// changed wakes all subscribers.
func (v *view) changed() {
	v.update = nil
	for s := range v.subscribers {
		wake(s.c)
	}
}

// svidChanged wakes those who want SVIDs of a kind.
func (v *view) svidChanged(k kind) {
	v.update = nil
	for s := range v.subscribers {
		if s.wants == k {
			wake(s.c)
		}
	}
}

func (v *view) federatesWith(td spiffeid.TrustDomain) bool {
	return slices.ContainsFunc(v.matched, func(s *slot) bool { return slices.Contains(s.entry.FederatesWith, td) })
}

// maxResting is how many views are remembered while nobody subscribes to them,
// so that a workload's next call finds its own made.
const maxResting = 256

// views are all views, and what finds them.
type views struct {
	all     map[string]*view // by key
	index   map[selector.Selector]map[*view]struct{}
	resting list.List // *view, most recently used first
}

func (vs *views) init() {
	vs.all = make(map[string]*view)
	vs.index = make(map[selector.Selector]map[*view]struct{})
}

// matching yields the views that have all these selectors.
func (vs *views) matching(selectors selector.Set) iter.Seq[*view] {
	if len(selectors) == 0 {
		return func(func(*view) bool) {}
	}
	rarest := selectors[0]
	for _, x := range selectors[1:] {
		if len(vs.index[x]) < len(vs.index[rarest]) {
			rarest = x
		}
	}
	return func(yield func(*view) bool) {
		for v := range vs.index[rarest] {
			if selectors.SubsetOf(v.selectors) && !yield(v) {
				return
			}
		}
	}
}

func (vs *views) unrest(v *view) {
	if v.resting != nil {
		vs.resting.Remove(v.resting)
		v.resting = nil
	}
}

func viewKey(selectors selector.Set) string {
	n := 0
	for _, x := range selectors {
		n += len(x.Type) + len(x.Value) + 4
	}
	b := make([]byte, 0, n)
	for _, x := range selectors {
		b = append(binary.AppendUvarint(b, uint64(len(x.Type))), x.Type...)
		b = append(binary.AppendUvarint(b, uint64(len(x.Value))), x.Value...)
	}
	return string(b)
}

// viewOf returns the view of a set of selectors; a new one rests.
func (h *Held) viewOf(selectors selector.Set) *view {
	key := viewKey(selectors)
	v := h.views.all[key]
	if v == nil {
		v = &view{key: key, selectors: selectors, subscribers: make(map[*Subscription]struct{})}
		h.views.all[key] = v
		for _, x := range selectors {
			if h.views.index[x] == nil {
				h.views.index[x] = make(map[*view]struct{})
			}
			h.views.index[x][v] = struct{}{}
		}
		h.rematch(v, h.now())
		h.rest(v)
	} else if v.resting != nil {
		h.views.resting.MoveToFront(v.resting)
	}
	return v
}

// rest remembers a view that nobody subscribes to, and forgets the one that
// nobody asked for longest.
func (h *Held) rest(v *view) {
	v.resting = h.views.resting.PushFront(v)
	if h.views.resting.Len() <= maxResting {
		return
	}
	old := h.views.resting.Remove(h.views.resting.Back()).(*view)
	delete(h.views.all, old.key)
	for _, x := range old.selectors {
		delete(h.views.index[x], old)
		if len(h.views.index[x]) == 0 {
			delete(h.views.index, x)
		}
	}
	for _, s := range old.matched {
		delete(s.views, old)
	}
}

// want counts a subscriber that wants SVIDs of a kind in (+1) or out (-1).
func (h *Held) want(v *view, k kind, by int) {
	if k == kinds {
		return
	}
	was := v.wanting[k] > 0
	v.wanting[k] += by
	if is := v.wanting[k] > 0; is != was {
		for _, s := range v.matched {
			h.watch(h.credential(s, k), by)
		}
		if k == witKind {
			v.update = nil // which has them for subscribers only
		}
		h.balance(h.now())
		h.poke()
	}
}

// rematch finds the slots of a view anew.
func (h *Held) rematch(v *view, now time.Time) {
	matched := h.match(v.selectors, func(s *slot) bool { return s.mayBeServed(now) })
	slices.SortFunc(matched, func(a, b *slot) int { return compareEntries(a.entry, b.entry) })
	old := v.matched
	v.matched, v.update = matched, nil
	for _, s := range matched {
		if _, ok := s.views[v]; !ok {
			s.views[v] = struct{}{}
			h.watchFor(v, s, +1)
		}
	}
	is := make(map[*slot]bool, len(matched))
	for _, s := range matched {
		is[s] = true
	}
	for _, s := range old {
		if !is[s] {
			delete(s.views, v)
			h.watchFor(v, s, -1)
		}
	}
}

// watchFor counts a view in or out of those that want what a slot has.
func (h *Held) watchFor(v *view, s *slot, by int) {
	for k, wanting := range v.wanting {
		if wanting > 0 {
			h.watch(h.credential(s, kind(k)), by)
		}
	}
}

// update returns the view's state, made anew if anything changed or expired.
func (h *Held) update(v *view) *Update {
	now := h.now()
	if u := v.update; u != nil && (u.until.IsZero() || now.Before(u.until)) {
		return u
	}
	if slices.ContainsFunc(v.matched, func(s *slot) bool { return s.entry.Expired(now) }) {
		h.rematch(v, now)
	}
	u := &Update{Bundle: h.bundles[h.trustDomain], CRLs: h.crls.der}
	federated := make(map[spiffeid.TrustDomain]bool)
	for _, s := range v.matched {
		c := s.credentials[x509Kind]
		svid := c.x509(now)
		u.all = append(u.all, Identity{Entry: s.entry, SVID: svid, Err: c.err})
		u.until = earlier(u.until, s.entry.ExpiresAt)
		if svid != nil {
			u.until = earlier(u.until, svid.ExpiresAt)
		}
		for _, td := range s.entry.FederatesWith {
			if b := h.bundles[td]; b != nil && !federated[td] {
				federated[td] = true
				u.Federated = append(u.Federated, b)
			}
		}
	}
	slices.SortFunc(u.Federated, func(a, b *bundle.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
	if v.wanting[witKind] > 0 {
		u.WITs = make(map[*entry.Entry]WITIdentity, len(v.matched))
		for _, s := range v.matched {
			c := h.credential(s, witKind)
			svid := c.wit(now)
			if svid != nil {
				u.until = earlier(u.until, svid.ExpiresAt)
			}
			u.WITs[s.entry] = WITIdentity{SVID: svid, Err: c.err}
		}
	}
	dropped := u.tell()
	if !slices.Equal(dropped, v.dropped) {
		v.dropped = dropped
		for _, e := range dropped {
			h.log.Warn("an identity is left out: an older entry that matches too has the same hint",
				"entry", e.ID, "spiffe_id", e.SPIFFEID, "hint", e.Hint)
		}
	}
	v.update = u
	return u
}
