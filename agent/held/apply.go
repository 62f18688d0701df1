package held

import (
	"crypto"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Apply applies a change. When it returns, [Held.Digest], [Held.Revision] and
// every reader see it, and subscribers that it concerns are woken. The entries
// and bundles given are not changed afterwards.
func (h *Held) Apply(c Change) {
	now := h.now()
	h.mu.Lock()
	defer h.mu.Unlock()

	rematch := make(map[*view]struct{})
	if c.Complete {
		h.log.Debug("synchronized", "revision", c.Revision, "entries", len(c.Entries), "bundles", len(c.Bundles),
			"x509_ttl", c.X509TTL, "jwt_ttl", c.JWTTTL)
		h.dropUnnamed(c, rematch)
	}
	for _, id := range c.GoneEntries {
		if s := h.slots[id]; s != nil {
			h.removeEntry(s, rematch)
		}
	}
	for _, e := range c.Entries {
		h.putEntry(e, rematch)
	}
	for _, td := range c.GoneBundles {
		h.removeBundle(td)
	}
	for _, b := range c.Bundles {
		h.putBundle(b)
	}
	h.takeCRLs(c)
	h.takeStatusLists(c)
	for v := range rematch {
		h.rematch(v, now)
		v.changed()
	}
	h.balance(now)

	h.revision = c.Revision
	if c.Complete && !h.synced {
		h.synced = true
		close(h.first)
		for _, v := range h.views.all { // what was unknown is known now
			v.changed()
		}
	}
	for k := range kinds {
		h.schedules[k].serverIsBack(now)
	}
	h.poke()
}

func (h *Held) dropUnnamed(c Change, rematch map[*view]struct{}) {
	entries := make(map[string]bool, len(c.Entries))
	for _, e := range c.Entries {
		entries[e.ID] = true
	}
	for id, s := range h.slots {
		if !entries[id] {
			h.removeEntry(s, rematch)
		}
	}
	bundles := make(map[spiffeid.TrustDomain]bool, len(c.Bundles))
	for _, b := range c.Bundles {
		bundles[b.TrustDomain] = true
	}
	for td := range h.bundles {
		if !bundles[td] {
			h.removeBundle(td)
		}
	}
}

func (h *Held) putEntry(e *entry.Entry, rematch map[*view]struct{}) {
	s := h.slots[e.ID]
	if s != nil && sameEntry(s.entry, e) {
		return // told again by a complete change: what was signed for it is good
	}
	if s == nil {
		s = &slot{entry: e, views: make(map[*view]struct{})}
		h.credential(s, x509Kind)
		h.slots[e.ID] = s
	} else {
		h.unindex(s)
		h.sum.SubEntry(s.entry.ID, s.entry.RevisionNumber, unix(s.entry.CreatedAt))
		for v := range s.views {
			rematch[v] = struct{}{}
		}
		for c := range s.held() {
			if s.entry.SPIFFEID != e.SPIFFEID {
				c.svid = nil // an identity that was taken away
			}
			c.settle() // what failed for the old one may succeed now
		}
		h.jwts.drop(s)
		s.entry = e
	}
	h.sum.AddEntry(e.ID, e.RevisionNumber, unix(e.CreatedAt))
	h.addIndex(s)
	for v := range h.views.matching(e.Selectors) {
		rematch[v] = struct{}{}
	}
	h.place(s)
}

// sameEntry reports whether two entries are equal in everything. A complete
// change may name very many that are.
func sameEntry(a, b *entry.Entry) bool {
	return a.ID == b.ID && a.SPIFFEID == b.SPIFFEID && a.ParentID == b.ParentID && a.Selectors.Equal(b.Selectors) &&
		a.X509SVIDTTL == b.X509SVIDTTL && a.JWTSVIDTTL == b.JWTSVIDTTL &&
		slices.Equal(a.DNSNames, b.DNSNames) && slices.Equal(a.FederatesWith, b.FederatesWith) && a.Hint == b.Hint &&
		a.Admin == b.Admin && a.Downstream == b.Downstream && a.StoreSVID == b.StoreSVID &&
		a.DisableX509Prefetch == b.DisableX509Prefetch && a.JWTIncludeJTI == b.JWTIncludeJTI &&
		a.ExpiresAt.Equal(b.ExpiresAt) && a.CreatedAt.Equal(b.CreatedAt) && a.RevisionNumber == b.RevisionNumber
}

func (h *Held) removeEntry(s *slot, rematch map[*view]struct{}) {
	for v := range s.views {
		rematch[v] = struct{}{}
	}
	delete(h.slots, s.entry.ID)
	h.unindex(s)
	h.sum.SubEntry(s.entry.ID, s.entry.RevisionNumber, unix(s.entry.CreatedAt))
	h.jwts.drop(s)
	s.gone = true
	h.place(s)
}

// addIndex puts the slot under one of its selectors: the one that fewest
// others are under, so that whoever has a common selector, such as that of a
// user, does not have to look at every entry that asks for it.
func (h *Held) addIndex(s *slot) {
	if len(s.entry.Selectors) == 0 {
		return // it would match everybody; no valid entry is so
	}
	best := s.entry.Selectors[0]
	for _, x := range s.entry.Selectors[1:] {
		if len(h.index[x]) < len(h.index[best]) {
			best = x
		}
	}
	s.under = best
	if h.index[best] == nil {
		h.index[best] = make(map[*slot]struct{})
	}
	h.index[best][s] = struct{}{}
}

func (h *Held) unindex(s *slot) {
	delete(h.index[s.under], s)
	if len(h.index[s.under]) == 0 {
		delete(h.index, s.under)
	}
}

// match returns the slots that a set of selectors is entitled to.
func (h *Held) match(selectors selector.Set, include func(*slot) bool) []*slot {
	var out []*slot
	for _, x := range selectors {
		for s := range h.index[x] {
			if s.entry.Selectors.SubsetOf(selectors) && include(s) {
				out = append(out, s)
			}
		}
	}
	return out
}

func (h *Held) putBundle(b *bundle.Bundle) {
	old := h.bundles[b.TrustDomain]
	if old != nil {
		if sameBundle(old, b) {
			return // told again by a complete change
		}
		h.sum.SubBundle(old.TrustDomain.Name(), old.SequenceNumber)
	}
	h.bundles[b.TrustDomain] = b
	h.sum.AddBundle(b.TrustDomain.Name(), b.SequenceNumber)
	h.bundleChanged(b.TrustDomain, b)
}

func (h *Held) removeBundle(td spiffeid.TrustDomain) {
	old := h.bundles[td]
	if old == nil {
		return
	}
	delete(h.bundles, td)
	h.sum.SubBundle(td.Name(), old.SequenceNumber)
	h.bundleChanged(td, nil)
}

// bundleChanged wakes whom a bundle concerns, and renews what was signed by an
// authority that is not trusted any more, or soon will not be.
func (h *Held) bundleChanged(td spiffeid.TrustDomain, b *bundle.Bundle) {
	for w := range h.watches {
		wake(w.c)
	}
	if td != h.trustDomain {
		for _, v := range h.views.all {
			if v.federatesWith(td) {
				v.changed()
			}
		}
		return
	}
	for _, v := range h.views.all {
		v.changed()
	}
	h.trust = trustIn(b)
	h.jwts.recheck(h)
	h.recheck()
}

// recheck renews what is not to be relied on any more.
func (h *Held) recheck() {
	now := h.now()
	for _, s := range h.slots {
		for c := range s.held() {
			if c.svid == nil {
				continue
			}
			if distrusted := h.distrusts(c.svid); distrusted != c.distrusted {
				c.distrusted = distrusted
				c.settle()
				h.reschedule(c, now)
			}
		}
	}
}

func sameBundle(a, b *bundle.Bundle) bool {
	return a.SequenceNumber == b.SequenceNumber && a.RefreshHint == b.RefreshHint &&
		slices.EqualFunc(a.X509Authorities, b.X509Authorities, func(x, y bundle.X509Authority) bool {
			return x.Tainted == y.Tainted && x.Certificate.Equal(y.Certificate)
		}) &&
		slices.EqualFunc(a.JWTAuthorities, b.JWTAuthorities, sameKey) &&
		slices.EqualFunc(a.WITAuthorities, b.WITAuthorities, sameKey)
}

func sameKey(a, b bundle.JWTAuthority) bool {
	key, ok := a.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return a.KeyID == b.KeyID && a.Tainted == b.Tainted && a.ExpiresAt.Equal(b.ExpiresAt) && ok && key.Equal(b.PublicKey)
}
