// Package held is what this node holds: the registration entries it is
// authorized for, the bundles its workloads need, and the SVIDs signed for
// them. Its main type is [Held].
//
// The feed tells it what changed ([Held.Apply]); it asks a [Signer] for what is
// wanted, renews it in time, and drops what is no longer the node's to give.
// Readers come with the selectors that a workload was attested to have:
// [Held.Look] returns what they entitle to, [Held.Subscribe] keeps X509-SVIDs
// for them and says when anything changed, [Held.SubscribeWIT] does so with
// WIT-SVIDs, and [Held.JWT] returns a JWT-SVID.
//
// Private keys are made here, one for each issuance, and stay in memory.
//
// One goroutine, [Held.Run], decides what is signed and when. Changes and
// readers touch the state under one lock, for no longer than their own size,
// and never wait for the server.
package held

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/metrics"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

// Signer obtains SVIDs from the server. All methods may be called concurrently.
type Signer interface {
	// SignX509 signs X509-SVIDs for up to [MaxBatch] entries. It returns one
	// result for each request, in their order, or an error for the whole call.
	SignX509(ctx context.Context, requests []X509Request) ([]X509Result, error)
	// SignWIT is SignX509 for WIT-SVIDs.
	SignWIT(ctx context.Context, requests []WITRequest) ([]WITResult, error)
	// SignJWT signs a JWT-SVID of one entry for an audience.
	SignJWT(ctx context.Context, entryID string, audience []string) (JWTResult, error)
}

// MaxBatch is how many SVIDs are asked for in one call, at most.
const MaxBatch = 500

// X509Request asks for one X509-SVID.
type X509Request struct {
	EntryID string
	CSR     []byte // DER; the server takes only the public key from it
}

// X509Result answers one X509Request: either Chain and ExpiresAt, or Err.
type X509Result struct {
	Chain     [][]byte // DER, leaf first
	ExpiresAt time.Time
	Err       error
}

// JWTResult is a signed JWT-SVID.
type JWTResult struct {
	Token     string
	IssuedAt  time.Time
	ExpiresAt time.Time
}

// ErrNotHeld says that an entry is not held any more, or not as it was: what
// matched it must be matched again.
var ErrNotHeld = errors.New("the entry is gone or has changed")

// Options of [New]. TrustDomain and Signer are required.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Signer      Signer
	// Limit is how many X509-SVIDs are signed before a workload asked for
	// them, and kept after, and how many WIT-SVIDs are kept after; 0 is
	// [DefaultLimit]. Those of workloads that are being served are held in any
	// case.
	Limit   int
	Now     func() time.Time  // nil is time.Now
	Log     *slog.Logger      // nil is silent
	Metrics *metrics.Metrics  // nil: none
	Traces  *telemetry.Traces // nil: none
}

// DefaultLimit is how many X509-SVIDs are held unasked: a busy node's worth.
const DefaultLimit = 1000

// Change is one step of the feed, applied at once.
type Change struct {
	// Complete says that this is everything: what it does not name is gone.
	Complete bool
	Revision int64 // of the state after this change

	Entries         []*entry.Entry // new and changed
	GoneEntries     []string       // IDs
	Bundles         []*bundle.Bundle
	GoneBundles     []spiffeid.TrustDomain
	CRLs            []*CRL        // new and changed
	GoneCRLs        []string      // IDs of authorities
	StatusLists     []*StatusList // new and changed
	GoneStatusLists []string      // IDs
	X509TTL         time.Duration // the trust domain's default lifetimes, for the log; 0 if not told
	JWTTTL          time.Duration
}

// Held holds the entries, bundles and SVIDs of this node. Make one with [New];
// all methods may be called concurrently.
type Held struct {
	trustDomain spiffeid.TrustDomain
	signer      Signer
	limit       int
	now         func() time.Time
	log         *slog.Logger
	metrics     *metrics.Metrics
	traces      *telemetry.Traces

	wake    chan struct{}   // of Run
	ctx     context.Context // of signing JWT-SVIDs, which several callers may wait for
	cancel  context.CancelFunc
	flights sync.WaitGroup // of those
	tickets chan struct{}  // bounds them

	mu       sync.Mutex
	stopped  bool
	revision int64
	synced   bool
	first    chan struct{} // closed when synced is set
	sum      digest.Sum
	slots    map[string]*slot // by entry ID
	index    map[selector.Selector]map[*slot]struct{}
	bundles  map[spiffeid.TrustDomain]*bundle.Bundle
	watches  map[*BundleWatch]struct{}
	trust    *trust // of the own bundle
	crls     crls
	lists    map[string]*StatusList // by ID
	views    views
	jwts     jwtCache

	schedules [kinds]schedule
}

// New makes a Held that holds nothing yet.
func New(o Options) *Held {
	h := &Held{
		trustDomain: o.TrustDomain,
		signer:      o.Signer,
		limit:       o.Limit,
		now:         o.Now,
		log:         o.Log,
		metrics:     o.Metrics,
		traces:      o.Traces,
		wake:        make(chan struct{}, 1),
		first:       make(chan struct{}),
		tickets:     make(chan struct{}, maxFlights),
		slots:       make(map[string]*slot),
		index:       make(map[selector.Selector]map[*slot]struct{}),
		bundles:     make(map[spiffeid.TrustDomain]*bundle.Bundle),
		watches:     make(map[*BundleWatch]struct{}),
		crls:        crls{all: make(map[string]*CRL)},
		lists:       make(map[string]*StatusList),
	}
	if h.limit <= 0 {
		h.limit = DefaultLimit
	}
	if h.now == nil {
		h.now = time.Now
	}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	if h.metrics == nil {
		h.metrics = metrics.New(nil)
	}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.views.init()
	for k := range kinds {
		h.schedules[k].init(k)
	}
	return h
}

// Digest returns the digest of the entries, bundles, CRLs and status lists held, as package
// digest defines it: 16 bytes.
func (h *Held) Digest() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	sum := h.sum
	return sum[:]
}

// Revision returns the revision of the last change applied, 0 before the first.
func (h *Held) Revision() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.revision
}

// Synced reports whether a complete change has been applied: before, nothing
// can be said about what a workload is entitled to.
func (h *Held) Synced() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.synced
}

// WaitSynced waits until a complete change has been applied, and returns ctx's
// error if that ends first.
func (h *Held) WaitSynced(ctx context.Context) error {
	select {
	case <-h.first:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// NextExpiry returns when the first SVID that is wanted ends; zero if none is
// held. Whoever cannot reach the server should have tried well before.
func (h *Held) NextExpiry() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	var first time.Time
	for _, s := range h.slots {
		for c := range s.held() {
			if svid := c.valid(now); svid != nil && c.kept() {
				first = earlier(first, svid.ends())
			}
		}
	}
	return first
}

// Match returns the entries whose selectors are all among those given and that
// the Workload API may serve, oldest first.
func (h *Held) Match(selectors selector.Set) []*entry.Entry { return h.Look(selectors).Entries }

// Entries returns every entry held, oldest first.
func (h *Held) Entries() []*entry.Entry {
	h.mu.Lock()
	out := make([]*entry.Entry, 0, len(h.slots))
	for _, s := range h.slots {
		out = append(out, s.entry)
	}
	h.mu.Unlock()
	slices.SortFunc(out, compareEntries)
	return out
}

// compareEntries puts older entries first. The order of the identities that a
// workload is told of comes from it; Workload API §8 makes the first the
// default one, so it must not depend on anything that changes.
func compareEntries(a, b *entry.Entry) int {
	if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
		return c
	}
	return strings.Compare(a.ID, b.ID)
}

// Bundle returns the bundle of a trust domain, or nil.
func (h *Held) Bundle(td spiffeid.TrustDomain) *bundle.Bundle {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.bundles[td]
}

// Counts returns how many entries and X509-SVIDs are held.
func (h *Held) Counts() (entries, svids int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	for _, s := range h.slots {
		if s.credentials[x509Kind].valid(now) != nil {
			svids++
		}
	}
	return len(h.slots), svids
}

// Status is how an entry's X509-SVID is.
type Status struct {
	SVID    *X509SVID // nil: none is held
	Err     error     // why the last attempt to sign one failed
	RetryAt time.Time // when the next attempt is made after that
}

// Status returns how an entry's X509-SVID is; ok is false if it is not held.
func (h *Held) Status(entryID string) (status Status, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.slots[entryID]
	if s == nil {
		return Status{}, false
	}
	c := s.credentials[x509Kind]
	status = Status{SVID: c.x509(h.now()), Err: c.err}
	if c.err != nil {
		status.RetryAt = later(c.retryAt, c.schedule.callRetryAt)
	}
	return status, true
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// earlier returns the earlier of two times, of which zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// poke has Run look at its schedule again.
func (h *Held) poke() { wake(h.wake) }

// wake sends to a channel of capacity 1, unless what it sent before still
// waits there.
func wake(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
