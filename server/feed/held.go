package feed

import (
	"cmp"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
)

// held is what an agent holds once it has applied all that was sent: entries
// and bundles as the registry's own values, so that holding them costs a
// pointer each and two versions are told apart by identity.
type held struct {
	own     spiffeid.TrustDomain
	entries map[string]*entry.Entry // by ID
	bundles map[spiffeid.TrustDomain]*bundle.Bundle
	wanted  map[spiffeid.TrustDomain]int // how many entries federate with it
	takes   bool                         // the agent takes CRLs
	crls    map[string]*registry.CRL     // by authority ID; nil: none

	takesLists bool                            // the agent takes status lists
	lists      map[string]*registry.StatusList // by ID; nil: none
	sum        digest.Sum
}

func newHeld(own spiffeid.TrustDomain) held {
	return held{
		own:     own,
		entries: make(map[string]*entry.Entry),
		bundles: make(map[spiffeid.TrustDomain]*bundle.Bundle),
		wanted:  map[spiffeid.TrustDomain]int{own: 1},
	}
}

// difference is what an agent must be told.
type difference struct {
	entries     []*entry.Entry // new and changed
	goneEntries []string
	bundles     []*bundle.Bundle // new and changed
	goneBundles []spiffeid.TrustDomain
	crls        []*registry.CRL        // new and changed
	goneCRLs    []string               // authority IDs
	lists       []*registry.StatusList // new and changed
	goneLists   []string               // IDs
}

func (d *difference) empty() bool {
	return len(d.entries)+len(d.goneEntries)+len(d.bundles)+len(d.goneBundles)+len(d.crls)+len(d.goneCRLs)+len(d.lists)+len(d.goneLists) == 0
}

// difference makes h what a node is to hold, and returns what that changes.
// Its cost is that of the whole set.
func (h *held) difference(view *registry.View, node spiffeid.ID, now time.Time) difference {
	var d difference
	all := view.Authorized(node, now)
	touched := make(map[spiffeid.TrustDomain]bool)
	if len(h.entries) > 0 {
		keep := make(map[string]bool, len(all))
		for _, e := range all {
			keep[e.ID] = true
		}
		for id := range h.entries {
			if !keep[id] {
				h.drop(id, &d, touched)
			}
		}
		slices.Sort(d.goneEntries)
	} else {
		h.entries = make(map[string]*entry.Entry, len(all))
	}
	for _, e := range all {
		if h.entries[e.ID] != e {
			h.put(e, &d, touched)
		}
	}
	for td := range h.wanted {
		touched[td] = true
	}
	for td := range h.bundles {
		touched[td] = true
	}
	h.reconcile(view, touched, &d)
	h.takeRevoked(view, &d)
	return d
}

// change makes h what a node is to hold after a delta, and returns what that
// changes. Its cost is that of the delta.
func (h *held) change(view *registry.View, node spiffeid.ID, now time.Time, delta registry.Delta) difference {
	var d difference
	touched := make(map[spiffeid.TrustDomain]bool)
	slices.Sort(delta.Entries)
	for _, id := range delta.Entries {
		e := view.Entry(id)
		switch {
		case e == nil || !view.IsAuthorized(node, e, now):
			h.drop(id, &d, touched)
		case h.entries[id] != e:
			h.put(e, &d, touched)
		}
	}
	for _, td := range delta.Bundles {
		touched[td] = true
	}
	h.reconcile(view, touched, &d)
	if delta.Revoked {
		h.takeRevoked(view, &d)
	}
	return d
}

// takeRevoked looks at the CRLs and status lists.
func (h *held) takeRevoked(view *registry.View, d *difference) {
	h.takeCRLs(view, d)
	h.takeLists(view, d)
}

// takeLists looks at the status lists: those that revoke anything are held.
func (h *held) takeLists(view *registry.View, d *difference) {
	if !h.takesLists {
		return
	}
	is := make(map[string]bool)
	for l := range view.StatusLists() {
		if l.Revoked == 0 {
			continue
		}
		is[l.ID] = true
		old := h.lists[l.ID]
		if old == l {
			continue
		}
		if old != nil {
			h.sum.SubStatusList(old.ID, int64(old.Revision()))
		}
		if h.lists == nil {
			h.lists = make(map[string]*registry.StatusList)
		}
		h.lists[l.ID] = l
		h.sum.AddStatusList(l.ID, int64(l.Revision()))
		d.lists = append(d.lists, l)
	}
	for id, old := range h.lists {
		if !is[id] {
			h.sum.SubStatusList(id, int64(old.Revision()))
			delete(h.lists, id)
			d.goneLists = append(d.goneLists, id)
		}
	}
	slices.Sort(d.goneLists)
}

// takeCRLs looks at the CRLs: those that revoke anything are held.
func (h *held) takeCRLs(view *registry.View, d *difference) {
	if !h.takes {
		return
	}
	is := make(map[string]bool)
	for c := range view.CRLs() {
		if len(c.Revoked) == 0 {
			continue
		}
		is[c.AuthorityID] = true
		old := h.crls[c.AuthorityID]
		if old != nil && old.Number == c.Number {
			continue
		}
		if old != nil {
			h.sum.SubCRL(old.AuthorityID, old.Number)
		}
		if h.crls == nil {
			h.crls = make(map[string]*registry.CRL)
		}
		h.crls[c.AuthorityID] = c
		h.sum.AddCRL(c.AuthorityID, c.Number)
		d.crls = append(d.crls, c)
	}
	for id, old := range h.crls {
		if !is[id] {
			h.sum.SubCRL(id, old.Number)
			delete(h.crls, id)
			d.goneCRLs = append(d.goneCRLs, id)
		}
	}
	slices.Sort(d.goneCRLs)
}

func (h *held) put(e *entry.Entry, d *difference, touched map[spiffeid.TrustDomain]bool) {
	if old := h.entries[e.ID]; old != nil {
		h.remove(old, touched)
	}
	h.entries[e.ID] = e
	h.sum.AddEntry(e.ID, e.RevisionNumber, unix(e.CreatedAt))
	for _, td := range e.FederatesWith {
		h.wanted[td]++
		touched[td] = true
	}
	d.entries = append(d.entries, e)
}

func (h *held) drop(id string, d *difference, touched map[spiffeid.TrustDomain]bool) {
	old := h.entries[id]
	if old == nil {
		return
	}
	h.remove(old, touched)
	d.goneEntries = append(d.goneEntries, id)
}

func (h *held) remove(e *entry.Entry, touched map[spiffeid.TrustDomain]bool) {
	delete(h.entries, e.ID)
	h.sum.SubEntry(e.ID, e.RevisionNumber, unix(e.CreatedAt))
	for _, td := range e.FederatesWith {
		if h.wanted[td]--; h.wanted[td] == 0 {
			delete(h.wanted, td)
		}
		touched[td] = true
	}
}

// reconcile looks at the bundles of trust domains: the own one is always held,
// others while an entry federates with them.
func (h *held) reconcile(view *registry.View, touched map[spiffeid.TrustDomain]bool, d *difference) {
	for td := range touched {
		old := h.bundles[td]
		var b *bundle.Bundle
		if h.wanted[td] > 0 {
			b = view.Bundle(td)
		}
		if b == old {
			continue
		}
		if old != nil {
			h.sum.SubBundle(td.Name(), old.SequenceNumber)
		}
		if b == nil {
			delete(h.bundles, td)
			d.goneBundles = append(d.goneBundles, td)
			continue
		}
		h.bundles[td] = b
		h.sum.AddBundle(td.Name(), b.SequenceNumber)
		d.bundles = append(d.bundles, b)
	}
	slices.SortFunc(d.bundles, func(a, b *bundle.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
	slices.SortFunc(d.goneBundles, func(a, b spiffeid.TrustDomain) int { return cmp.Compare(a.Name(), b.Name()) })
}

// unix is a time as records have it: 0 for none.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
