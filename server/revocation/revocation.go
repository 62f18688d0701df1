// Package revocation makes the CRLs of this server's X.509 authorities.
//
// A [Publisher] follows the registry. It finds what each new revocation is about
// in the journal of what was issued, puts it into the CRL of the authority that
// signed it, signs that and writes it to the registry, from where every server
// of the trust domain pushes it to agents and serves it. A CRL is signed anew
// half of its life before its end, and an entry stays in it until its
// certificate has ended.
//
// A revocation that names an identity or an agent is about all that this server
// has issued of it when it sees the revocation. What is issued after that is
// good: agents that see an SVID of theirs in a CRL have another one signed.
package revocation

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

const (
	// Lifetime is how long a CRL is good: from thisUpdate to nextUpdate. It is
	// signed anew at half of it. It is longer than the usual lifetime of an SVID,
	// so that agents that cannot reach a server have no old CRL before they have
	// no good SVID.
	Lifetime = 12 * time.Hour
	// MaxRevoked is how many certificates one authority's CRL may hold: some 530
	// KB. For more, the authority is to be replaced.
	MaxRevoked = 10_000
	// maxBytes bounds the CRLs of all authorities together: a message of the
	// Workload API has them all, and clients take 4 MiB.
	maxBytes = 2 << 20

	// backdate is how much earlier than it was signed a CRL says that it was: for
	// verifiers whose clock is behind.
	backdate = 10 * time.Second
	// skew is how far the clocks of servers may differ, where what was issued
	// after a revocation is told from what was before it: at the start.
	skew = time.Minute
	// keep is how long an entry stays after its certificate has ended: for
	// verifiers whose clock is behind.
	keep = 5 * time.Minute

	// tidy is how long entries that are to go wait for others, from when the CRL was
	// signed: each time that it is signed, it goes to all agents.
	tidy = 10 * time.Minute

	retryWait = 2 * time.Second
	maxWait   = time.Minute // the clock may be set
)

// ErrFull says that an authority's CRL can take no more: the authority is to be
// replaced. It is wrapped.
var ErrFull = errors.New("the CRL is full")

// Options are what a [Publisher] is made of.
type Options struct {
	Registry    *registry.Registry
	Authorities *authority.Authorities
	Journal     *journal.Journal
	// Always has a CRL for each authority, also one that revokes nothing: for
	// those who fetch it.
	Always  bool
	Now     func() time.Time // nil: time.Now
	Log     *slog.Logger     // nil: none
	Metrics *metrics.Metrics // nil: none
}

// Publisher keeps the CRLs of this server's authorities. Its Run may be called
// once.
type Publisher struct {
	o       Options
	seen    *registry.View           // the last one that was looked at whole
	signers map[string]crypto.Signer // by authority ID
	failing map[string]string        // why an authority has no CRL with all that it should, by its ID
	began   store.Revision           // what is newer is seen as it comes
}

// New makes a publisher that does nothing until [Publisher.Run].
func New(o Options) *Publisher {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	return &Publisher{
		o: o, signers: make(map[string]crypto.Signer), failing: make(map[string]string),
		began: o.Registry.View().Revision(),
	}
}

// Run keeps the CRLs until the context ends. It returns the context's error.
func (p *Publisher) Run(ctx context.Context) error {
	var next time.Time
	for {
		changed, view := p.o.Registry.Changed(), p.o.Registry.View()
		if now := p.o.Now(); !view.SameRevocations(p.seen) || !now.Before(next) {
			next = p.publish(ctx, view, now)
		}
		timer := time.NewTimer(min(next.Sub(p.o.Now()), maxWait))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// publish brings the CRLs of all authorities of this server to what a view says,
// and returns when to look again whatever comes.
func (p *Publisher) publish(ctx context.Context, view *registry.View, now time.Time) (next time.Time) {
	next = now.Add(Lifetime)
	all := true
	revoked := 0
	own := make(map[string]bool)
	for _, a := range view.IssuedBy(now) {
		if a.Server != p.o.Authorities.Server() {
			continue
		}
		own[a.ID] = true
		again, count, err := p.update(ctx, view, a, now)
		if err != nil && ctx.Err() == nil {
			all = false
			if p.failing[a.ID] != err.Error() {
				p.o.Log.Error("what was revoked is not in the CRL of its authority", "authority", a.ID, "error", err)
			}
			p.failing[a.ID] = err.Error()
			again = now.Add(retryWait)
		} else {
			delete(p.failing, a.ID)
		}
		revoked += count
		if again.Before(next) {
			next = again
		}
	}
	for id := range p.signers {
		if !own[id] {
			delete(p.signers, id)
		}
	}
	p.o.Metrics.Revoked.Set(float64(revoked))
	if all {
		p.seen = view
	}
	return next
}

// update brings the CRL of one authority to what a view says, and returns when
// it has to be looked at again, and how many certificates are in it.
func (p *Publisher) update(ctx context.Context, view *registry.View, a *registry.Authority, now time.Time) (next time.Time, revoked int, err error) {
	old := view.CRL(a.ID)
	c := &registry.CRL{AuthorityID: a.ID}
	if old != nil {
		c.DER, c.Applied = old.DER, old.Applied
		c.Revoked = slices.DeleteFunc(slices.Clone(old.Revoked), func(r registry.RevokedCertificate) bool { return now.After(r.EndsAt.Add(keep)) })
	}
	had := len(c.Revoked)
	for r := range view.Revocations() {
		if r.Revision() <= c.Applied && old != nil {
			continue
		}
		c.Revoked = append(c.Revoked, p.find(r, a)...)
	}
	added := distinct(&c.Revoked, had)
	switch {
	case len(c.Revoked) > MaxRevoked:
		return next, had, fmt.Errorf("%w: %d of its certificates would be revoked, and the most is %d; replace the authority (hallmark authority rotate, taint, revoke)", ErrFull, len(c.Revoked), MaxRevoked)
	case view.RevocationCount() > 0:
		for r := range view.Revocations() {
			c.Applied = max(c.Applied, r.Revision())
		}
	}
	signed := now
	if old != nil && old.DER != nil {
		signed = old.NextUpdate.Add(-Lifetime)
	}
	dropped := old != nil && had < len(old.Revoked) && !now.Before(signed.Add(tidy))
	next = signed.Add(Lifetime / 2)
	due := old != nil && old.DER != nil && !now.Before(next)
	if added || dropped || due || p.o.Always && c.DER == nil {
		if c.DER, err = p.sign(ctx, view, a, c, old, now); err != nil {
			return next, had, err
		}
		signed, next = now, now.Add(Lifetime/2)
	} else {
		if old != nil {
			c.Revoked = old.Revoked // which its DER has
		}
		if old == nil && c.Applied == 0 || old != nil && c.Applied == old.Applied {
			return firstEnd(c, signed, next), had, nil
		}
	}
	if err := p.o.Registry.PutCRL(ctx, old, c); err != nil {
		return next, had, fmt.Errorf("write the CRL: %w", err)
	}
	if added {
		p.o.Log.Info("certificates were revoked", "authority", a.ID, "revoked", len(c.Revoked)-had, "in_crl", len(c.Revoked), "bytes", len(c.DER))
	}
	return firstEnd(c, signed, next), len(c.Revoked), nil
}

// firstEnd returns when the entry that ends first may go, if that is earlier.
func firstEnd(c *registry.CRL, signed, next time.Time) time.Time {
	first := next
	for _, r := range c.Revoked {
		if end := r.EndsAt.Add(keep + time.Second); end.Before(first) {
			first = end
		}
	}
	if first.Equal(next) {
		return next
	}
	if earliest := signed.Add(tidy); first.Before(earliest) {
		return earliest
	}
	return first
}

// distinct takes out what is there before, and reports whether anything is left
// that was not among the first.
func distinct(all *[]registry.RevokedCertificate, first int) (added bool) {
	if len(*all) == first {
		return false
	}
	seen := make(map[string]bool, len(*all))
	*all = slices.DeleteFunc(*all, func(r registry.RevokedCertificate) bool {
		twice := seen[string(r.SerialNumber)]
		seen[string(r.SerialNumber)] = true
		return twice
	})
	return len(*all) > first
}

// find returns what a revocation is about, of what an authority has signed.
func (p *Publisher) find(r *registry.Revocation, a *registry.Authority) (found []registry.RevokedCertificate) {
	if len(r.SerialNumber) > 0 {
		if r.AuthorityID == a.ID {
			found = append(found, registry.RevokedCertificate{SerialNumber: r.SerialNumber, RevokedAt: r.RevokedAt, EndsAt: r.EndsAt, Reason: r.Reason})
		}
		return found
	}
	// As it comes, it is about all that there is. One that an earlier run has
	// seen, and not finished with, is told by the clock from what came after it.
	before := r.RevokedAt.Add(skew).Unix()
	if r.Revision() > p.began {
		before = 1<<63 - 1
	}
	id, node := r.SPIFFEID.String(), r.Node.String()
	for _, v := range p.o.Journal.Find(func(v *journal.SVID) bool {
		return v.Authority == a.ID && v.IssuedAt <= before && (!r.SPIFFEID.IsZero() && v.ID == id || !r.Node.IsZero() && v.Node == node)
	}) {
		found = append(found, registry.RevokedCertificate{
			SerialNumber: v.SerialNumber(), RevokedAt: r.RevokedAt, EndsAt: time.Unix(v.ExpiresAt, 0), Reason: r.Reason,
		})
	}
	return found
}

// sign makes the CRL of an authority. RFC 5280 §5.
func (p *Publisher) sign(ctx context.Context, view *registry.View, a *registry.Authority, c, old *registry.CRL, now time.Time) ([]byte, error) {
	signer := p.signers[a.ID]
	if signer == nil {
		var err error
		if signer, err = p.o.Authorities.Signer(ctx, a); err != nil {
			return nil, fmt.Errorf("%w: if its SVIDs are not to be trusted, taint and revoke it (hallmark authority taint)", err)
		}
		p.signers[a.ID] = signer
	}
	// The number rises (§5.2.3) also if the store was restored from a backup.
	number := uint64(now.UnixMilli())
	if old != nil && old.Number >= number {
		number = old.Number + 1
	}
	list := &x509.RevocationList{
		Number:     new(big.Int).SetUint64(number),
		ThisUpdate: now.Add(-backdate),
		NextUpdate: now.Add(Lifetime),
	}
	for _, r := range c.Revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: new(big.Int).SetBytes(r.SerialNumber), RevocationTime: r.RevokedAt, ReasonCode: r.Reason,
		})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.Chain[0], signer)
	if err != nil {
		return nil, fmt.Errorf("sign the CRL: %w", err)
	}
	size := len(der)
	for other := range view.CRLs() {
		if other.AuthorityID != a.ID {
			size += len(other.DER)
		}
	}
	if size > maxBytes {
		return nil, fmt.Errorf("%w: those of all authorities would have %d bytes, and the most is %d; replace the authority (hallmark authority rotate, taint, revoke)", ErrFull, size, maxBytes)
	}
	return der, nil
}

// EndOf returns when all that a new revocation is about has ended: an SVID is
// told by the journal or a certificate, everything else ends with the authority
// that signed it.
func EndOf(view *registry.View, j *journal.Journal, r *registry.Revocation, now time.Time) time.Time {
	if len(r.SerialNumber) > 0 {
		for _, v := range j.Find(func(v *journal.SVID) bool {
			return bytes.Equal(v.SerialNumber(), r.SerialNumber) && (v.Authority == r.AuthorityID || r.AuthorityID == "")
		}) {
			return time.Unix(v.ExpiresAt, 0)
		}
	}
	end := now
	list, _, _ := statuslist.Place(r.SerialNumber)
	for _, l := range view.LiveStatusLists(now) {
		if l.EndsAt.After(end) && (len(r.SerialNumber) == 0 || l.ID == list) {
			end = l.EndsAt
		}
	}
	if statuslist.IsSerial(r.SerialNumber) {
		return end
	}
	for _, a := range view.IssuedBy(now) {
		if (r.AuthorityID == "" || a.ID == r.AuthorityID) && a.ExpiresAt.After(end) {
			end = a.ExpiresAt
		}
	}
	return end
}

// Covered reports whether the CRL of an authority has a revocation, as far as it
// concerns it.
func Covered(view *registry.View, a *registry.Authority, r *registry.Revocation, revision store.Revision) bool {
	if len(r.SerialNumber) > 0 && r.AuthorityID != a.ID {
		return true // a token's too
	}
	c := view.CRL(a.ID)
	return c != nil && c.Applied >= revision
}

// CheckTarget refuses what is not revoked this way.
func CheckTarget(id spiffeid.ID) error {
	if id.Path() == entry.ServerPath {
		return &registry.Error{Kind: registry.Invalid, Msg: "the SVIDs of servers are not revoked: replace the authority of the server in question (hallmark authority rotate, taint, revoke)"}
	}
	return nil
}
