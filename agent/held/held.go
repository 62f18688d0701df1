// Package held is what this node holds: the registration entries it is
// authorized for, the bundles its workloads need, and the SVIDs signed for
// them. Its main type is [Held].
//
// The feed tells it what changed ([Held.Apply]); it asks a [Signer] for what is
// wanted, renews it in time, and drops what is no longer the node's to give.
// Readers ask with the selectors that a workload was attested to have:
// [Held.Subscribe] for X509-SVIDs and bundles as they change, [Held.Match] and
// [Held.JWT] for JWT-SVIDs.
//
// Private keys are made here, one for each issuance, and stay in memory.
package held

import (
	"context"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Signer obtains SVIDs from the server. All methods may be called concurrently.
type Signer interface {
	// SignX509 signs X509-SVIDs for up to [MaxBatch] entries. It returns one
	// result for each request, in their order, or an error for the whole call.
	SignX509(ctx context.Context, requests []X509Request) ([]X509Result, error)
	// SignJWT signs a JWT-SVID of one entry for an audience.
	SignJWT(ctx context.Context, entryID string, audience []string) (JWTResult, error)
}

// MaxBatch is how many X509-SVIDs are asked for in one call, at most.
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

// Options of [New]. TrustDomain and Signer are required.
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Signer      Signer
	// Limit is how many X509-SVIDs are signed before a workload asked for
	// them; 0 is [DefaultLimit]. Those of workloads that are being served are
	// held in any case.
	Limit int
	Now   func() time.Time // nil is time.Now
	Log   *slog.Logger     // nil is silent
}

// DefaultLimit is how many X509-SVIDs are held unasked: a busy node's worth.
const DefaultLimit = 1000

// Change is one step of the feed, applied at once.
type Change struct {
	// Complete says that this is everything: what it does not name is gone.
	Complete bool
	Revision int64 // of the state after this change

	Entries     []*entry.Entry // new and changed
	GoneEntries []string       // IDs
	Bundles     []*bundle.Bundle
	GoneBundles []spiffeid.TrustDomain
	X509TTL     time.Duration // the trust domain's defaults; 0 leaves what was
	JWTTTL      time.Duration
}

// Held holds the entries, bundles and SVIDs of this node. Make one with [New];
// all methods may be called concurrently.
type Held struct {
	o Options
}

// New makes a Held that holds nothing yet.
func New(o Options) *Held { return &Held{o: o} }

// Run signs and renews until ctx ends.
func (h *Held) Run(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

// Apply applies a change. When it returns, [Held.Digest], [Held.Revision] and
// every reader see it.
func (h *Held) Apply(c Change) {}

// Digest returns the digest of the entries and bundles held, as the feed
// defines it: 16 bytes.
func (h *Held) Digest() []byte { return make([]byte, 16) }

// Revision returns the revision of the last change applied, 0 before the first.
func (h *Held) Revision() int64 { return 0 }

// Synced reports whether a complete change has been applied: before, nothing
// can be said about what a workload is entitled to.
func (h *Held) Synced() bool { return false }

// Match returns the entries whose selectors are all among those given and
// which the Workload API may serve, oldest first.
func (h *Held) Match(selectors selector.Set) []*entry.Entry { return nil }

// Entries returns every entry held, oldest first.
func (h *Held) Entries() []*entry.Entry { return nil }

// Bundle returns the bundle of a trust domain, or nil.
func (h *Held) Bundle(td spiffeid.TrustDomain) *bundle.Bundle { return nil }

// JWT returns a JWT-SVID of a held entry for an audience: a cached one while
// it has more than half of its life left, otherwise a new one.
func (h *Held) JWT(ctx context.Context, e *entry.Entry, audience []string) (JWTResult, error) {
	return JWTResult{}, context.Canceled
}

// Counts returns how many entries and X509-SVIDs are held.
func (h *Held) Counts() (entries, svids int) { return 0, 0 }
