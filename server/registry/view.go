package registry

import (
	"cmp"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/tidwall/btree"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/store"
)

// View is the whole state as of one revision. It is immutable: hold it as long
// as its answers should agree with each other, and no longer, as it keeps what
// has changed since in memory. Its methods do no I/O and are safe for
// concurrent use.
type View struct {
	revision    store.Revision
	digest      digest.Sum
	td          spiffeid.TrustDomain
	entries     tree[*storedEntry] // by ID
	byParent    tree[*storedEntry] // by parent ID, ID
	bySPIFFEID  tree[*storedEntry] // by SPIFFE ID, ID
	byExpiry    tree[*storedEntry] // by end, ID; only those that end
	aliases     tree[*storedEntry] // by first selector, ID; node aliases only
	interior    tree[*storedEntry] // by parent ID, ID; only those whose SPIFFE ID is a parent, and no aliases
	nodes       tree[*Node]        // by ID
	bySelector  tree[nodeSelector] // by selector, node ID
	tokens      tree[*storedToken] // by key
	uses        tree[*storedUse]   // by key
	bundles     tree[*storedBundle]
	authorities tree[*Authority]  // by key
	federations tree[*Federation] // by trust domain
	revocations tree[*Revocation] // by key
	crls        tree[*CRL]        // by authority ID
	statusLists tree[*StatusList] // by ID
}

type tree[T any] = *btree.BTreeG[T]

// storedEntry is an entry and the revision that wrote it: what a write demands
// to be unchanged.
type storedEntry struct {
	entry.Entry
	revision store.Revision
}

type storedToken struct {
	key string
	JoinToken
	revision store.Revision
}

type storedBundle struct {
	*bundle.Bundle
	revision store.Revision
}

type nodeSelector struct {
	selector selector.Selector
	node     *Node
}

func compareIDs(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) }

func lessByID(a, b *storedEntry) bool { return a.ID < b.ID }

func lessByParent(a, b *storedEntry) bool {
	return cmp.Or(compareIDs(a.ParentID, b.ParentID), strings.Compare(a.ID, b.ID)) < 0
}

func lessBySPIFFEID(a, b *storedEntry) bool {
	return cmp.Or(compareIDs(a.SPIFFEID, b.SPIFFEID), strings.Compare(a.ID, b.ID)) < 0
}

func lessByExpiry(a, b *storedEntry) bool {
	return cmp.Or(a.ExpiresAt.Compare(b.ExpiresAt), strings.Compare(a.ID, b.ID)) < 0
}

func lessByFirstSelector(a, b *storedEntry) bool {
	return cmp.Or(a.Selectors[0].Compare(b.Selectors[0]), strings.Compare(a.ID, b.ID)) < 0
}

func lessNode(a, b *Node) bool { return compareIDs(a.ID, b.ID) < 0 }

func lessNodeSelector(a, b nodeSelector) bool {
	return cmp.Or(a.selector.Compare(b.selector), compareIDs(a.node.ID, b.node.ID)) < 0
}

// Revision returns the revision that the view shows.
func (v *View) Revision() store.Revision { return v.revision }

// Digest sums up which records the view has, each by its key and the revision
// that wrote it. Two views of one revision have the same, on whichever server.
func (v *View) Digest() digest.Sum { return v.digest }

// TrustDomain returns the trust domain that the registry is for.
func (v *View) TrustDomain() spiffeid.TrustDomain { return v.td }

func (v *View) stored(id string) *storedEntry {
	e, _ := v.entries.Get(&storedEntry{Entry: entry.Entry{ID: id}})
	return e
}

// Entry returns the entry with an ID, or nil.
func (v *View) Entry(id string) *entry.Entry {
	if e := v.stored(id); e != nil {
		return &e.Entry
	}
	return nil
}

// EntryCount returns how many entries there are.
func (v *View) EntryCount() int { return v.entries.Len() }

// Entries yields the entries whose ID sorts after the one given, by ID.
func (v *View) Entries(after string) iter.Seq[*entry.Entry] {
	return func(yield func(*entry.Entry) bool) {
		v.entries.Ascend(&storedEntry{Entry: entry.Entry{ID: after}}, func(e *storedEntry) bool {
			return (after != "" && e.ID == after) || yield(&e.Entry)
		})
	}
}

// EntriesByParent yields the entries with a parent ID, by ID.
func (v *View) EntriesByParent(id spiffeid.ID) iter.Seq[*entry.Entry] {
	return v.EntriesByParentAfter(id, "")
}

// EntriesByParentAfter yields the entries with a parent ID whose own ID sorts
// after the one given, by ID.
func (v *View) EntriesByParentAfter(id spiffeid.ID, after string) iter.Seq[*entry.Entry] {
	return func(yield func(*entry.Entry) bool) {
		parent := id
		v.byParent.Ascend(&storedEntry{Entry: entry.Entry{ParentID: id, ID: after}}, func(e *storedEntry) bool {
			if e.ParentID != parent {
				return false
			}
			parent = e.ParentID // the string that all of them share: equal at one look
			return after != "" && e.ID == after || yield(&e.Entry)
		})
	}
}

// EntriesBySPIFFEID yields the entries with a SPIFFE ID, by ID.
func (v *View) EntriesBySPIFFEID(id spiffeid.ID) iter.Seq[*entry.Entry] {
	return v.EntriesBySPIFFEIDAfter(id, "")
}

// EntriesBySPIFFEIDAfter yields the entries with a SPIFFE ID whose own ID sorts
// after the one given, by ID.
func (v *View) EntriesBySPIFFEIDAfter(id spiffeid.ID, after string) iter.Seq[*entry.Entry] {
	return func(yield func(*entry.Entry) bool) {
		v.bySPIFFEID.Ascend(&storedEntry{Entry: entry.Entry{SPIFFEID: id, ID: after}}, func(e *storedEntry) bool {
			return e.SPIFFEID == id && (after != "" && e.ID == after || yield(&e.Entry))
		})
	}
}

// Node returns the node with an ID, or nil.
func (v *View) Node(id spiffeid.ID) *Node {
	n, _ := v.nodes.Get(&Node{ID: id})
	return n
}

// NodeCount returns how many nodes there are.
func (v *View) NodeCount() int { return v.nodes.Len() }

// Nodes yields the nodes whose ID sorts after the one given, by ID.
func (v *View) Nodes(after string) iter.Seq[*Node] {
	return func(yield func(*Node) bool) {
		visit := func(n *Node) bool {
			return (after != "" && n.ID.String() <= after) || yield(n)
		}
		if pivot, err := spiffeid.FromString(after); err == nil {
			v.nodes.Ascend(&Node{ID: pivot}, visit)
		} else {
			v.nodes.Scan(visit)
		}
	}
}

// Bundle returns the bundle of a trust domain, or nil.
func (v *View) Bundle(td spiffeid.TrustDomain) *bundle.Bundle {
	if b, rev := v.storedBundle(td); rev > 0 {
		return b
	}
	return nil
}

// storedBundle returns the bundle of a trust domain and the revision that
// wrote it, or an empty bundle and 0.
func (v *View) storedBundle(td spiffeid.TrustDomain) (*bundle.Bundle, store.Revision) {
	if b, ok := v.bundles.Get(&storedBundle{Bundle: &bundle.Bundle{TrustDomain: td}}); ok {
		return b.Bundle, b.revision
	}
	return &bundle.Bundle{TrustDomain: td}, 0
}

// Bundles yields the bundles whose trust domain sorts after the one given, by
// name; this trust domain's own is among them.
func (v *View) Bundles(after string) iter.Seq[*bundle.Bundle] {
	return func(yield func(*bundle.Bundle) bool) {
		v.bundles.Scan(func(b *storedBundle) bool {
			return b.TrustDomain.Name() <= after || yield(b.Bundle)
		})
	}
}

// Authorities returns the authorities of every server, the oldest first.
func (v *View) Authorities() []*Authority {
	all := v.authorities.Items()
	slices.SortStableFunc(all, func(a, b *Authority) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return all
}

func (v *View) authorityRevision(a *Authority) store.Revision {
	if old, ok := v.authorities.Get(a); ok {
		return old.revision
	}
	return 0
}

// Authorized returns the entries that a node is authorized for at a time, by
// ID: those whose parent is the node, or an alias of the node, and on down
// through their own SPIFFE IDs. It is empty for an unknown or banned node.
func (v *View) Authorized(node spiffeid.ID, now time.Time) []*entry.Entry {
	n := v.Node(node)
	if n == nil || n.Banned {
		return nil
	}
	var out []*entry.Entry
	var ends []int // of the runs in out that are in order
	for p := range v.standsFor(n, now) {
		for e := range v.EntriesByParent(p) {
			if !e.Expired(now) {
				out = append(out, e)
			}
		}
		ends = append(ends, len(out))
	}
	return mergeRuns(out, ends)
}

// standsFor yields the IDs whose entries a node is authorized for: its own,
// those of its aliases, and on down. It costs as much as there are, and entries
// whose own SPIFFE IDs are parents.
func (v *View) standsFor(n *Node, now time.Time) iter.Seq[spiffeid.ID] {
	return func(yield func(spiffeid.ID) bool) {
		parents := []spiffeid.ID{n.ID}
		for alias := range v.aliasesOf(n, now) {
			parents = append(parents, alias.SPIFFEID)
		}
		seen := make(map[spiffeid.ID]bool, len(parents))
		for len(parents) > 0 {
			p := parents[len(parents)-1]
			parents = parents[:len(parents)-1]
			if seen[p] {
				continue
			}
			seen[p] = true
			if !yield(p) {
				return
			}
			v.interior.Ascend(&storedEntry{Entry: entry.Entry{ParentID: p}}, func(e *storedEntry) bool {
				if e.ParentID != p {
					return false
				}
				if !e.Expired(now) {
					parents = append(parents, e.SPIFFEID)
				}
				return true
			})
		}
	}
}

// mergeRuns puts entries in the order of their IDs that consist of runs, each
// in order, which end at the indexes given. There are few: one a parent.
func mergeRuns(entries []*entry.Entry, ends []int) []*entry.Entry {
	if len(ends) < 2 {
		return entries
	}
	merged := make([]*entry.Entry, 0, len(entries))
	for len(ends) > 1 {
		merged = merged[:0]
		var mergedEnds []int
		start := 0
		for i := 0; i < len(ends); i += 2 {
			a, b := entries[start:ends[i]], []*entry.Entry(nil)
			if i+1 < len(ends) {
				b = entries[ends[i]:ends[i+1]]
			}
			start += len(a) + len(b)
			for len(a) > 0 && len(b) > 0 {
				if len(a) < len(b) {
					a, b = b, a
				}
				before := 0             // of the longer, what comes before the first of the shorter
				if len(a) > 16*len(b) { // a node's alias has a thousand entries, the node itself one
					before, _ = slices.BinarySearchFunc(a, b[0].ID, func(e *entry.Entry, id string) int { return strings.Compare(e.ID, id) })
				}
				for before < len(a) && a[before].ID < b[0].ID {
					before++
				}
				merged, a = append(merged, a[:before]...), a[before:]
				merged, b = append(merged, b[0]), b[1:]
			}
			merged = append(append(merged, a...), b...)
			mergedEnds = append(mergedEnds, len(merged))
		}
		entries, merged, ends = merged, entries, mergedEnds
	}
	return entries
}

// aliasesOf yields the node aliases that a node matches.
func (v *View) aliasesOf(n *Node, now time.Time) iter.Seq[*storedEntry] {
	return func(yield func(*storedEntry) bool) {
		for _, s := range n.match {
			more := true
			v.aliases.Ascend(firstSelectorPivot(s), func(e *storedEntry) bool {
				if e.Selectors[0] != s {
					return false
				}
				if !e.Expired(now) && e.Selectors.SubsetOf(n.match) {
					more = yield(e)
				}
				return more
			})
			if !more {
				return
			}
		}
	}
}

func firstSelectorPivot(s selector.Selector) *storedEntry {
	return &storedEntry{Entry: entry.Entry{Selectors: selector.Set{s}}}
}

// IsAuthorized reports whether a node is authorized for an entry at a time. It
// gives the same answer as looking for the entry in [View.Authorized]. It costs
// as much as the entry has ancestors, if they are few, and else as much as the
// node stands for: where thousands of nodes share an ID, that is little.
func (v *View) IsAuthorized(node spiffeid.ID, e *entry.Entry, now time.Time) bool {
	n := v.Node(node)
	if n == nil || n.Banned || e.Expired(now) {
		return false
	}
	const fewAncestors = 64
	found, looked := false, 0
	v.ancestors(e.ParentID, now, func(p spiffeid.ID, named *storedEntry) bool {
		found = p == node || named != nil && named.IsAlias() && named.Selectors.SubsetOf(n.match)
		looked++
		return !found && looked < fewAncestors
	})
	if found || looked < fewAncestors {
		return found
	}
	for p := range v.standsFor(n, now) {
		if p == e.ParentID {
			return true
		}
	}
	return false
}

// ancestors calls yield for a parent ID and every one above it, and with each
// entry that has one of them as its SPIFFE ID, node aliases among them, until
// yield returns false.
func (v *View) ancestors(parent spiffeid.ID, now time.Time, yield func(p spiffeid.ID, named *storedEntry) bool) {
	queue := []spiffeid.ID{parent}
	var seen map[spiffeid.ID]bool // made when a second level is reached
	for len(queue) > 0 {
		p := queue[0]
		queue = queue[1:]
		if seen[p] {
			continue
		}
		if !yield(p, nil) {
			return
		}
		more := true
		v.bySPIFFEID.Ascend(&storedEntry{Entry: entry.Entry{SPIFFEID: p}}, func(e *storedEntry) bool {
			if e.SPIFFEID != p {
				return false
			}
			if e.Expired(now) {
				return true
			}
			if !e.IsAlias() {
				if seen == nil {
					seen = make(map[spiffeid.ID]bool)
				}
				queue = append(queue, e.ParentID)
			}
			more = yield(p, e)
			return more
		})
		if !more {
			return
		}
		if seen != nil {
			seen[p] = true
		}
	}
}
