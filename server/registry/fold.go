package registry

import (
	"errors"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/tidwall/btree"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// fold is the state that is being changed: a working tree for each index, of
// which publish hands out copies.
type fold struct {
	entries, byParent, bySPIFFEID, byExpiry, aliases, interior index[*storedEntry]
	nodes                                                      index[*Node]
	bySelector                                                 index[nodeSelector]
	tokens                                                     index[*storedToken]
	uses                                                       index[*storedUse]
	bundles                                                    index[*storedBundle]
	authorities                                                index[*Authority]
	federations                                                index[*Federation]
	revocations                                                index[*Revocation]
	crls                                                       index[*CRL]
	statusLists                                                index[*StatusList]

	digest digest.Sum // of all records in them
}

// index is a working tree and its last published copy.
type index[T any] struct {
	work, public *btree.BTreeG[T]
	dirty        bool
}

func newIndex[T any](less func(a, b T) bool) index[T] {
	t := btree.NewBTreeGOptions(less, btree.Options{NoLocks: true})
	return index[T]{work: t, dirty: true}
}

func (x *index[T]) set(item T) { x.work.Set(item); x.dirty = true }

// load fills an empty index with items in its order.
func (x *index[T]) load(sorted []T) {
	for _, item := range sorted {
		x.work.Load(item)
	}
	x.dirty = true
}

func (x *index[T]) delete(item T) {
	if _, ok := x.work.Delete(item); ok {
		x.dirty = true
	}
}

func (x *index[T]) publish() *btree.BTreeG[T] {
	if x.dirty {
		x.public, x.dirty = x.work.Copy(), false
	}
	return x.public
}

func newFold() fold {
	return fold{
		entries:     newIndex(lessByID),
		byParent:    newIndex(lessByParent),
		bySPIFFEID:  newIndex(lessBySPIFFEID),
		byExpiry:    newIndex(lessByExpiry),
		aliases:     newIndex(lessByFirstSelector),
		interior:    newIndex(lessByParent),
		nodes:       newIndex(lessNode),
		bySelector:  newIndex(lessNodeSelector),
		tokens:      newIndex(func(a, b *storedToken) bool { return a.key < b.key }),
		uses:        newIndex(func(a, b *storedUse) bool { return a.key < b.key }),
		bundles:     newIndex(func(a, b *storedBundle) bool { return a.TrustDomain.Compare(b.TrustDomain) < 0 }),
		authorities: newIndex(func(a, b *Authority) bool { return authorityKey(a) < authorityKey(b) }),
		federations: newIndex(lessFederation),
		revocations: newIndex(lessRevocation),
		crls:        newIndex(lessCRL),
		statusLists: newIndex(lessStatusList),
	}
}

func (f *fold) publish(rev store.Revision, td spiffeid.TrustDomain) *View {
	return &View{
		revision:    rev,
		digest:      f.digest,
		td:          td,
		entries:     f.entries.publish(),
		byParent:    f.byParent.publish(),
		bySPIFFEID:  f.bySPIFFEID.publish(),
		byExpiry:    f.byExpiry.publish(),
		aliases:     f.aliases.publish(),
		interior:    f.interior.publish(),
		nodes:       f.nodes.publish(),
		bySelector:  f.bySelector.publish(),
		tokens:      f.tokens.publish(),
		uses:        f.uses.publish(),
		bundles:     f.bundles.publish(),
		authorities: f.authorities.publish(),
		federations: f.federations.publish(),
		revocations: f.revocations.publish(),
		crls:        f.crls.publish(),
		statusLists: f.statusLists.publish(),
	}
}

// apply folds one written record. Keys of no known prefix are another
// version's, and none of ours.
func (f *fold) apply(rec store.Record) error {
	before := f.revisionOf(rec.Key)
	if err := f.put(rec); err != nil {
		return err
	}
	if before > 0 {
		f.digest.SubRecord(rec.Key, int64(before))
	}
	if now := f.revisionOf(rec.Key); now > 0 {
		f.digest.AddRecord(rec.Key, int64(now))
	}
	return nil
}

// revisionOf returns the revision that wrote a record, or 0 if it is not there
// or none of ours. Used tokens are no part of the digest: no agent has anything
// of them.
func (f *fold) revisionOf(key string) store.Revision {
	prefix, rest, _ := strings.Cut(key, "/")
	switch prefix + "/" {
	case entryPrefix:
		if e, ok := f.entries.work.Get(&storedEntry{Entry: entry.Entry{ID: rest}}); ok {
			return e.revision
		}
	case nodePrefix:
		id, err := spiffeid.FromString(rest)
		if n, ok := f.nodes.work.Get(&Node{ID: id}); err == nil && ok {
			return n.revision
		}
	case tokenPrefix:
		if t, ok := f.tokens.work.Get(&storedToken{key: key}); ok {
			return t.revision
		}
	case bundlePrefix:
		td, err := spiffeid.TrustDomainFromString(rest)
		if b, ok := f.bundles.work.Get(&storedBundle{Bundle: &bundle.Bundle{TrustDomain: td}}); err == nil && ok {
			return b.revision
		}
	case federationPrefix:
		td, err := spiffeid.TrustDomainFromString(rest)
		if r, ok := f.federations.work.Get(&Federation{TrustDomain: td}); err == nil && ok {
			return r.revision
		}
	case authorityPrefix:
		if a := f.authority(key); a != nil {
			return a.revision
		}
	case revocationPrefix:
		if r, ok := f.revocations.work.Get(&Revocation{key: key}); ok {
			return r.revision
		}
	case crlPrefix:
		if c, ok := f.crls.work.Get(&CRL{AuthorityID: rest}); ok {
			return c.revision
		}
	case statusPrefix:
		if l, ok := f.statusLists.work.Get(&StatusList{ID: rest}); ok {
			return l.revision
		}
	}
	return 0
}

// authority returns the one of a key, or nil.
func (f *fold) authority(key string) *Authority {
	for _, a := range f.authorities.work.Items() { // a handful
		if authorityKey(a) == key {
			return a
		}
	}
	return nil
}

func (f *fold) put(rec store.Record) error {
	prefix, rest, _ := strings.Cut(rec.Key, "/")
	switch prefix + "/" {
	case entryPrefix:
		return f.applyEntry(rest, rec)
	case nodePrefix:
		return f.applyNode(rest, rec)
	case tokenPrefix:
		if rec.Value == nil {
			f.tokens.delete(&storedToken{key: rec.Key})
			return nil
		}
		t, err := tokenFromRecord(rec)
		if err != nil {
			return err
		}
		f.tokens.set(t)
	case usePrefix:
		if rec.Value == nil {
			f.uses.delete(&storedUse{key: rec.Key})
			return nil
		}
		u, err := useFromRecord(rec)
		if err != nil {
			return err
		}
		f.uses.set(u)
	case bundlePrefix:
		td, err := spiffeid.TrustDomainFromString(rest)
		if err != nil {
			return err
		}
		if rec.Value == nil {
			f.bundles.delete(&storedBundle{Bundle: &bundle.Bundle{TrustDomain: td}})
			return nil
		}
		var r hallmarkv1.Bundle
		if err := proto.Unmarshal(rec.Value, &r); err != nil {
			return err
		}
		b, err := bundle.FromRecord(&r)
		if err != nil {
			return err
		}
		f.bundles.set(&storedBundle{Bundle: b, revision: rec.Revision})
	case federationPrefix:
		return f.applyFederation(rest, rec)
	case revocationPrefix:
		return f.applyRevocation(rec)
	case crlPrefix:
		return f.applyCRL(rest, rec)
	case statusPrefix:
		return f.applyStatusList(rest, rec)
	case authorityPrefix:
		if rec.Value == nil {
			if a := f.authority(rec.Key); a != nil {
				f.authorities.delete(a)
			}
			return nil
		}
		a, err := authorityFromRecord(rec.Value, rec.Revision)
		if err != nil {
			return err
		}
		f.authorities.set(a)
	}
	return nil
}

func entryFromRecord(rec store.Record) (*storedEntry, error) {
	var r hallmarkv1.Entry
	if err := proto.Unmarshal(rec.Value, &r); err != nil {
		return nil, err
	}
	parsed, err := entry.FromRecord(&r)
	if err != nil {
		return nil, err
	}
	if len(parsed.Selectors) == 0 {
		return nil, errors.New("entry has no selectors")
	}
	if err := compact(parsed); err != nil {
		return nil, err
	}
	return &storedEntry{Entry: *parsed, revision: rec.Revision}, nil
}

// compact lays the strings of an entry beside each other. A million entries
// have ten million strings, each of which the collector would look at in every
// round, and which fill their places in memory badly.
func compact(e *entry.Entry) error {
	size := len(e.ID) + len(e.SPIFFEID.String())
	for _, s := range e.Selectors {
		size += len(s.Type) + len(s.Value)
	}
	text := make([]byte, 0, size)
	text = append(append(text, e.ID...), e.SPIFFEID.String()...)
	for i, s := range e.Selectors {
		if i == 0 || s.Type != e.Selectors[i-1].Type { // most have selectors of one type
			text = append(text, s.Type...)
		}
		text = append(text, s.Value...)
	}
	rest := string(text)
	cut := func(like string) (part string) {
		part, rest = rest[:len(like)], rest[len(like):]
		return part
	}
	e.ID = cut(e.ID)
	var err error
	if e.SPIFFEID, err = spiffeid.FromString(cut(e.SPIFFEID.String())); err != nil {
		return err
	}
	typ := ""
	for i, s := range e.Selectors {
		if i == 0 || s.Type != typ {
			typ = cut(s.Type)
		}
		e.Selectors[i] = selector.Selector{Type: typ, Value: cut(s.Value)}
	}
	return nil
}

func (f *fold) applyEntry(id string, rec store.Record) error {
	var e *storedEntry
	if rec.Value != nil {
		var err error
		if e, err = entryFromRecord(rec); err != nil {
			return err
		}
	}
	old, _ := f.entries.work.Get(&storedEntry{Entry: entry.Entry{ID: id}})
	if e == nil && old == nil {
		return nil
	}
	first := false // child of its parent
	if e != nil {
		if sibling := f.childOf(e.ParentID); sibling != nil {
			e.ParentID = sibling.ParentID // one string in memory, and quick to compare
		} else {
			first = true
		}
	}
	if old != nil {
		f.remove(old)
	}
	if e != nil {
		f.add(e)
	}
	// Whether their SPIFFE ID is a parent may have changed of all these.
	if first {
		f.eachOf(e.ParentID, func(p *storedEntry) { f.interior.set(p) })
	}
	if old != nil && f.childOf(old.ParentID) == nil {
		f.eachOf(old.ParentID, func(p *storedEntry) { f.interior.delete(p) })
	}
	return nil
}

func (f *fold) remove(e *storedEntry) {
	f.entries.delete(e)
	f.byParent.delete(e)
	f.bySPIFFEID.delete(e)
	if !e.ExpiresAt.IsZero() {
		f.byExpiry.delete(e)
	}
	if e.IsAlias() {
		f.aliases.delete(e)
	} else {
		f.interior.delete(e)
	}
}

func (f *fold) add(e *storedEntry) {
	f.entries.set(e)
	f.byParent.set(e)
	f.bySPIFFEID.set(e)
	if !e.ExpiresAt.IsZero() {
		f.byExpiry.set(e)
	}
	if e.IsAlias() {
		f.aliases.set(e)
	} else if f.childOf(e.SPIFFEID) != nil {
		f.interior.set(e)
	}
}

// childOf returns an entry that has an ID as its parent, or nil.
func (f *fold) childOf(id spiffeid.ID) (child *storedEntry) {
	f.byParent.work.Ascend(&storedEntry{Entry: entry.Entry{ParentID: id}}, func(e *storedEntry) bool {
		if e.ParentID == id {
			child = e
		}
		return false
	})
	return child
}

// eachOf calls a function with the entries of a SPIFFE ID that are no aliases.
func (f *fold) eachOf(id spiffeid.ID, do func(*storedEntry)) {
	f.bySPIFFEID.work.Ascend(&storedEntry{Entry: entry.Entry{SPIFFEID: id}}, func(e *storedEntry) bool {
		if e.SPIFFEID != id {
			return false
		}
		if !e.IsAlias() {
			do(e)
		}
		return true
	})
}

func (f *fold) applyNode(name string, rec store.Record) error {
	id, err := spiffeid.FromString(name)
	if err != nil {
		return err
	}
	var n *Node
	if rec.Value != nil {
		if n, err = nodeFromRecord(rec.Value, rec.Revision); err != nil {
			return err
		}
	}
	if old, ok := f.nodes.work.Get(&Node{ID: id}); ok {
		for _, s := range old.match {
			f.bySelector.delete(nodeSelector{s, old})
		}
		if n == nil {
			f.nodes.delete(old)
		}
	}
	if n == nil {
		return nil
	}
	f.nodes.set(n)
	for _, s := range n.match {
		f.bySelector.set(nodeSelector{s, n})
	}
	return nil
}
