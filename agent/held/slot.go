package held

import (
	"container/heap"
	"container/list"
	"iter"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// kind is a kind of SVID that is held.
type kind int

const (
	x509Kind kind = iota
	witKind
	kinds // how many there are
)

// String names the kind in metrics.
func (k kind) String() string {
	if k == witKind {
		return "wit"
	}
	return "x509"
}

// name names the kind in the log.
func (k kind) name() string {
	if k == witKind {
		return "WIT-SVID"
	}
	return "X509-SVID"
}

// svid is a signed SVID with its key: an [X509SVID] or a [WITSVID].
type svid interface {
	ends() time.Time
	distrusted(t *trust) bool // is to be replaced before its time
}

// slot is one entry that is held, and its SVIDs.
type slot struct {
	entry *entry.Entry
	gone  bool              // not held any more
	under selector.Selector // where Held.index has it
	views map[*view]struct{}

	credentials [kinds]*credential // nil: nobody wanted one of the kind yet
	jwts        map[string]*jwt    // by audience
}

// held yields the credentials that there are.
func (s *slot) held() iter.Seq[*credential] {
	return func(yield func(*credential) bool) {
		for _, c := range s.credentials {
			if c != nil && !yield(c) {
				return
			}
		}
	}
}

// credential is the SVID of one kind of an entry that is held.
type credential struct {
	slot     *slot
	schedule *schedule // of its kind

	svid       svid
	signedFor  *entry.Entry // what svid was signed for; not the slot's entry, once that changed
	distrusted bool         // svid's authority is tainted, or not in the bundle
	renewAt    time.Time    // of svid

	signing  bool       // a call is under way
	asker    trace.Span // of a workload that waits for the next one; nil: none is recorded
	failures int        // in a row
	err      error
	retryAt  time.Time

	watchers int           // views with subscribers that want the SVID
	home     *list.List    // schedule.unasked, schedule.spare or nil
	place    *list.Element // in home

	at           time.Time // when to look at it, in schedule.due
	dueI, readyI int       // 1 + its index there; 0: not there
}

// credential returns the slot's credential of a kind.
func (h *Held) credential(s *slot, k kind) *credential {
	if s.credentials[k] == nil {
		s.credentials[k] = &credential{slot: s, schedule: &h.schedules[k]}
	}
	return s.credentials[k]
}

// valid returns the SVID unless it has expired.
func (c *credential) valid(now time.Time) svid {
	if c.svid == nil || !now.Before(c.svid.ends()) {
		return nil
	}
	return c.svid
}

// outdated reports whether the SVID should be replaced before its time.
func (c *credential) outdated() bool {
	return c.svid != nil && (c.signedFor != c.slot.entry || c.distrusted)
}

// settle forgets earlier failures.
func (c *credential) settle() { c.failures, c.err, c.retryAt = 0, nil, time.Time{} }

// ahead reports whether the SVID is signed before a workload asks for it. Else
// it is not renewed once nobody wants it.
func (c *credential) ahead() bool {
	return c.schedule.kind == x509Kind && !c.slot.entry.DisableX509Prefetch
}

// What the order of signing depends on.
const (
	awaited    = iota // a workload waits for it
	renewal           // by how long the old one still lasts
	background        // nobody asked for it yet
)

func (c *credential) urgency() int {
	switch {
	case c.watchers > 0 && (c.svid == nil || c.outdated()):
		return awaited
	case c.svid != nil:
		return renewal
	}
	return background
}

func moreUrgent(a, b *credential) bool {
	ua, ub := a.urgency(), b.urgency()
	if ua != ub {
		return ua < ub
	}
	if ua == renewal && !a.svid.ends().Equal(b.svid.ends()) {
		return a.svid.ends().Before(b.svid.ends())
	}
	return compareEntries(a.slot.entry, b.slot.entry) < 0
}

func isDueBefore(a, b *credential) bool { return a.at.Before(b.at) }

// queue is a heap of credentials that knows where each one is.
type queue struct {
	all   []*credential
	less  func(a, b *credential) bool
	index func(*credential) *int // 1 + the index
}

func (q *queue) Len() int           { return len(q.all) }
func (q *queue) Less(i, j int) bool { return q.less(q.all[i], q.all[j]) }
func (q *queue) Swap(i, j int) {
	q.all[i], q.all[j] = q.all[j], q.all[i]
	*q.index(q.all[i]), *q.index(q.all[j]) = i+1, j+1
}
func (q *queue) Push(x any) {
	c := x.(*credential)
	q.all = append(q.all, c)
	*q.index(c) = len(q.all)
}
func (q *queue) Pop() any {
	last := len(q.all) - 1
	c := q.all[last]
	q.all[last] = nil
	q.all = q.all[:last]
	*q.index(c) = 0
	return c
}

func (q *queue) put(c *credential) { heap.Push(q, c) }
func (q *queue) take() *credential { return heap.Pop(q).(*credential) }
func (q *queue) remove(c *credential) {
	if i := *q.index(c); i > 0 {
		heap.Remove(q, i-1)
	}
}

// schedule is what is to be signed of one kind, and when. A server that fails
// to sign one kind does not keep the other waiting.
type schedule struct {
	kind  kind
	due   queue // by when something is to be done
	ready queue // to be signed now, most urgent first

	watched int       // those with watchers
	unasked list.List // kept without watchers, most recently asked for first
	spare   list.List // not kept, for want of room

	calls        int // under way
	callFailures int // in a row
	callFailedAt time.Time
	callRetryAt  time.Time
}

func (c *schedule) init(k kind) {
	c.kind = k
	c.due = queue{less: isDueBefore, index: func(c *credential) *int { return &c.dueI }}
	c.ready = queue{less: moreUrgent, index: func(c *credential) *int { return &c.readyI }}
}

// Waits after failures. The first is short because a server that restarts is
// back soon; the longest bounds how long one that is back goes unnoticed.
const (
	firstWait   = 500 * time.Millisecond
	longestWait = time.Minute
)

// backoff returns how long to wait after so many failures in a row: doubling,
// with the second half random, so that agents that failed together do not come
// back together.
func backoff(failures int) time.Duration {
	d := longestWait
	if shift := failures - 1; shift < 10 {
		d = min(firstWait<<max(shift, 0), longestWait)
	}
	return d/2 + rand.N(d/2)
}

// serverIsBack ends the wait after calls that failed: the feed has just heard
// from the server.
func (c *schedule) serverIsBack(now time.Time) {
	if soon := c.callFailedAt.Add(firstWait); soon.Before(c.callRetryAt) {
		c.callRetryAt = soon
	}
}

// kept reports whether the SVID is wanted.
func (c *credential) kept() bool { return c.watchers > 0 || c.home == &c.schedule.unasked }

func (c *credential) settleIn(home *list.List, front bool) {
	c.leave()
	c.home = home
	if front {
		c.place = home.PushFront(c)
	} else {
		c.place = home.PushBack(c)
	}
}

func (c *credential) leave() {
	if c.home != nil {
		c.home.Remove(c.place)
		c.home, c.place = nil, nil
	}
}

// mayBeServed reports whether the Workload API may serve the slot's identity.
func (s *slot) mayBeServed(now time.Time) bool {
	return !s.gone && !s.entry.StoreSVID && !s.entry.Expired(now)
}

// place finds the homes of what a slot has that is new, changed or gone.
func (h *Held) place(s *slot) {
	now := h.now()
	for c := range s.held() {
		switch {
		case !s.mayBeServed(now):
			c.leave()
			c.svid = nil
		case c.watchers == 0 && c.home == nil && c.ahead():
			c.settleIn(&c.schedule.spare, false)
		}
		h.reschedule(c, now)
	}
}

// watch counts a view that wants the SVID in (+1) or out (-1).
func (h *Held) watch(c *credential, by int) {
	was := c.watchers > 0
	c.watchers += by
	if c.watchers > 0 == was {
		return
	}
	c.schedule.watched += by
	now := h.now()
	switch {
	case !c.slot.mayBeServed(now):
		return
	case by > 0:
		c.leave()
	default:
		c.settleIn(&c.schedule.unasked, true)
	}
	h.reschedule(c, now)
}

// balance keeps as many SVIDs of each kind as the limit allows: it lets go of
// those asked for longest ago, or takes in those not asked for yet.
func (h *Held) balance(now time.Time) {
	for i := range h.schedules {
		on := &h.schedules[i]
		for on.watched+on.unasked.Len() > h.limit && on.unasked.Len() > 0 {
			c := on.unasked.Back().Value.(*credential)
			c.forget()
			if c.ahead() {
				c.settleIn(&on.spare, true)
			}
			h.reschedule(c, now)
		}
		for on.watched+on.unasked.Len() < h.limit && on.spare.Len() > 0 {
			c := on.spare.Front().Value.(*credential)
			c.settleIn(&on.unasked, false)
			h.reschedule(c, now)
		}
	}
}

// forget lets go of the SVID.
func (c *credential) forget() {
	c.leave()
	c.svid = nil
	c.settle()
	for v := range c.slot.views {
		v.update = nil // nobody who wants the SVID subscribes
	}
}

// reschedule puts a credential into the queues where it belongs.
func (h *Held) reschedule(c *credential, now time.Time) {
	on, e := c.schedule, c.slot.entry
	on.due.remove(c)
	on.ready.remove(c)
	if c.slot.gone {
		return
	}
	c.at = e.ExpiresAt
	if e.Expired(now) {
		return
	}
	if c.kept() && !c.signing {
		sign := c.renewAt
		if c.svid == nil || c.outdated() {
			sign = now
		}
		sign = later(sign, c.retryAt)
		switch {
		case sign.After(now):
			c.at = earlier(c.at, sign)
		case c.watchers == 0 && !c.ahead():
			c.forget() // nobody asked for it again
		default:
			on.ready.put(c)
		}
	}
	if c.svid != nil {
		c.at = earlier(c.at, c.svid.ends())
	}
	if !c.at.IsZero() {
		on.due.put(c)
	}
}
