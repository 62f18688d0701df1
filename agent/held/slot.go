package held

import (
	"container/heap"
	"container/list"
	"encoding/asn1"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// X509SVID is a signed X509-SVID with its key. It does not change.
type X509SVID struct {
	Chain     []byte // concatenated DER, leaf first, as the Workload API carries it
	Key       []byte // unencrypted PKCS#8 DER
	ExpiresAt time.Time

	issuers []string // authority key IDs of the chain's certificates
}

// Certificates returns the DER of each certificate of the chain, leaf first.
func (x *X509SVID) Certificates() [][]byte {
	var out [][]byte
	for rest := x.Chain; len(rest) > 0; {
		var c asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &c); err != nil {
			return out // it was parsed when it was signed
		}
		out = append(out, c.FullBytes)
	}
	return out
}

// slot is one entry that is held, and its X509-SVID.
type slot struct {
	entry *entry.Entry
	gone  bool              // not held any more
	under selector.Selector // where Held.index has it
	views map[*view]struct{}

	svid       *X509SVID
	signedFor  *entry.Entry // what svid was signed for; not entry, once that changed
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

	jwts map[string]*jwt // by audience
}

// valid returns the X509-SVID unless it has expired.
func (s *slot) valid(now time.Time) *X509SVID {
	if s.svid == nil || !now.Before(s.svid.ExpiresAt) {
		return nil
	}
	return s.svid
}

// outdated reports whether the X509-SVID should be replaced before its time.
func (s *slot) outdated() bool { return s.svid != nil && (s.signedFor != s.entry || s.distrusted) }

// settle forgets earlier failures.
func (s *slot) settle() { s.failures, s.err, s.retryAt = 0, nil, time.Time{} }

// What the order of signing depends on.
const (
	awaited    = iota // a workload waits for it
	renewal           // by how long the old one still lasts
	background        // nobody asked for it yet
)

func (s *slot) urgency() int {
	switch {
	case s.watchers > 0 && (s.svid == nil || s.outdated()):
		return awaited
	case s.svid != nil:
		return renewal
	}
	return background
}

func moreUrgent(a, b *slot) bool {
	ua, ub := a.urgency(), b.urgency()
	if ua != ub {
		return ua < ub
	}
	if ua == renewal && !a.svid.ExpiresAt.Equal(b.svid.ExpiresAt) {
		return a.svid.ExpiresAt.Before(b.svid.ExpiresAt)
	}
	return compareEntries(a.entry, b.entry) < 0
}

func isDueBefore(a, b *slot) bool { return a.at.Before(b.at) }

// queue is a heap of slots that knows where each one is.
type queue struct {
	slots []*slot
	less  func(a, b *slot) bool
	index func(*slot) *int // 1 + the index
}

func (q *queue) Len() int           { return len(q.slots) }
func (q *queue) Less(i, j int) bool { return q.less(q.slots[i], q.slots[j]) }
func (q *queue) Swap(i, j int) {
	q.slots[i], q.slots[j] = q.slots[j], q.slots[i]
	*q.index(q.slots[i]), *q.index(q.slots[j]) = i+1, j+1
}
func (q *queue) Push(x any) {
	s := x.(*slot)
	q.slots = append(q.slots, s)
	*q.index(s) = len(q.slots)
}
func (q *queue) Pop() any {
	last := len(q.slots) - 1
	s := q.slots[last]
	q.slots[last] = nil
	q.slots = q.slots[:last]
	*q.index(s) = 0
	return s
}

func (q *queue) put(s *slot) { heap.Push(q, s) }
func (q *queue) take() *slot { return heap.Pop(q).(*slot) }
func (q *queue) remove(s *slot) {
	if i := *q.index(s); i > 0 {
		heap.Remove(q, i-1)
	}
}

// schedule is what is to be signed, and when.
type schedule struct {
	due   queue // by when something is to be done
	ready queue // to be signed now, most urgent first

	watched int       // slots with watchers
	unasked list.List // kept without watchers, most recently asked for first
	spare   list.List // not kept, for want of room

	calls        int // under way
	callFailures int // in a row
	callFailedAt time.Time
	callRetryAt  time.Time
}

func (c *schedule) init() {
	c.due = queue{less: isDueBefore, index: func(s *slot) *int { return &s.dueI }}
	c.ready = queue{less: moreUrgent, index: func(s *slot) *int { return &s.readyI }}
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

// keeps reports whether the slot's X509-SVID is wanted.
func (h *Held) keeps(s *slot) bool {
	return s.watchers > 0 || s.home == &h.schedule.unasked
}

func (h *Held) settleIn(s *slot, home *list.List, front bool) {
	h.leave(s)
	s.home = home
	if front {
		s.place = home.PushFront(s)
	} else {
		s.place = home.PushBack(s)
	}
}

func (h *Held) leave(s *slot) {
	if s.home != nil {
		s.home.Remove(s.place)
		s.home, s.place = nil, nil
	}
}

// mayBeServed reports whether the Workload API may serve the slot's identity.
func (s *slot) mayBeServed(now time.Time) bool {
	return !s.gone && !s.entry.StoreSVID && !s.entry.Expired(now)
}

// place finds the home of a slot that is new, changed or gone.
func (h *Held) place(s *slot) {
	now := h.now()
	switch {
	case !s.mayBeServed(now):
		h.leave(s)
		s.svid = nil
	case s.watchers == 0 && s.home == nil && !s.entry.DisableX509Prefetch:
		h.settleIn(s, &h.schedule.spare, false)
	}
	h.reschedule(s, now)
}

// watch counts a view that wants the slot's X509-SVID in (+1) or out (-1).
func (h *Held) watch(s *slot, by int) {
	was := s.watchers > 0
	s.watchers += by
	if s.watchers > 0 == was {
		return
	}
	h.schedule.watched += by
	now := h.now()
	switch {
	case !s.mayBeServed(now):
		return
	case by > 0:
		h.leave(s)
	default:
		h.settleIn(s, &h.schedule.unasked, true)
	}
	h.reschedule(s, now)
}

// balance keeps as many X509-SVIDs as the limit allows: it lets go of those
// asked for longest ago, or takes in those not asked for yet.
func (h *Held) balance(now time.Time) {
	c := &h.schedule
	for c.watched+c.unasked.Len() > h.limit && c.unasked.Len() > 0 {
		s := c.unasked.Back().Value.(*slot)
		h.forget(s)
		if !s.entry.DisableX509Prefetch {
			h.settleIn(s, &c.spare, true)
		}
		h.reschedule(s, now)
	}
	for c.watched+c.unasked.Len() < h.limit && c.spare.Len() > 0 {
		s := c.spare.Front().Value.(*slot)
		h.settleIn(s, &c.unasked, false)
		h.reschedule(s, now)
	}
}

// forget lets go of a slot's X509-SVID.
func (h *Held) forget(s *slot) {
	h.leave(s)
	s.svid = nil
	s.settle()
	for v := range s.views {
		v.update = nil // nobody who wants the SVID subscribes
	}
}

// reschedule puts a slot into the queues where it belongs.
func (h *Held) reschedule(s *slot, now time.Time) {
	c := &h.schedule
	c.due.remove(s)
	c.ready.remove(s)
	if s.gone {
		return
	}
	s.at = s.entry.ExpiresAt
	if s.entry.Expired(now) {
		return
	}
	if h.keeps(s) && !s.signing {
		sign := s.renewAt
		if s.svid == nil || s.outdated() {
			sign = now
		}
		sign = later(sign, s.retryAt)
		switch {
		case sign.After(now):
			s.at = earlier(s.at, sign)
		case s.watchers == 0 && s.entry.DisableX509Prefetch:
			h.forget(s) // nobody asked for it again
		default:
			c.ready.put(s)
		}
	}
	if s.svid != nil {
		s.at = earlier(s.at, s.svid.ExpiresAt)
	}
	if !s.at.IsZero() {
		c.due.put(s)
	}
}
