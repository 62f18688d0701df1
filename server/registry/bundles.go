package registry

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// refreshHint is how often others are told to fetch the own bundle: what they
// do without being told. Federation §4.1.
const refreshHint = 5 * time.Minute

func bundleKey(td spiffeid.TrustDomain) string { return bundlePrefix + td.Name() }

// putBundle adds to a transaction what makes a bundle of an older one: nothing
// if they are equal. A bundle of this trust domain gets the next sequence
// number; a foreign one keeps the number that it came with.
func putBundle(txn *store.Txn, old, b *bundle.Bundle, rev store.Revision) error {
	was, err := encodeBundle(old)
	if err != nil {
		return err
	}
	is, err := encodeBundle(b)
	if err != nil {
		return err
	}
	if rev > 0 && bytes.Equal(was, is) {
		return nil
	}
	if b.SequenceNumber == old.SequenceNumber {
		b.SequenceNumber++
		if is, err = encodeBundle(b); err != nil {
			return err
		}
	}
	txn.If = append(txn.If, store.Condition{Key: bundleKey(b.TrustDomain), Revision: rev})
	txn.Do = append(txn.Do, store.Write{Key: bundleKey(b.TrustDomain), Value: is})
	return nil
}

func encodeBundle(b *bundle.Bundle) ([]byte, error) {
	rec, err := b.Record()
	if err != nil {
		return nil, &Error{Kind: Invalid, Msg: err.Error()}
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(rec)
}

// ChangeBundle changes the bundle of a trust domain, or makes it. The function
// edits a copy, which is empty if there is none yet; it may be called again if
// another writer came first. If the function changed the bundle and left the
// sequence number alone, the number rises by one.
func (r *Registry) ChangeBundle(ctx context.Context, td spiffeid.TrustDomain, change func(*bundle.Bundle) error) (*bundle.Bundle, error) {
	v, err := r.change(ctx, func(v *View) (store.Txn, error) {
		var txn store.Txn
		old, rev := v.storedBundle(td)
		b := old.Clone()
		if err := change(b); err != nil {
			return txn, err
		}
		if b.TrustDomain != td {
			return txn, invalid("bundle is of trust domain %q, not %q", b.TrustDomain.Name(), td.Name())
		}
		err := putBundle(&txn, old, b, rev)
		return txn, err
	})
	if err != nil {
		return nil, err
	}
	if b := v.Bundle(td); b != nil {
		return b, nil
	}
	return nil, errBundleNotFound // deleted right after
}

// Restored is an edit of [store.Restore] that gives the bundle of a trust domain
// a sequence number above all that it was published with. Those after the
// backup are not known. But a number that rises with each change is below the
// milliseconds since 1970, and so is one that an earlier restore gave: no
// bundle changes a thousand times a second. Trust Domain and Bundle §4.1.1.
func Restored(td spiffeid.TrustDomain, now time.Time) store.Edit {
	return func(key string, value []byte) ([]byte, error) {
		if key != bundleKey(td) {
			return value, nil
		}
		var r hallmarkv1.Bundle
		if err := proto.Unmarshal(value, &r); err != nil {
			return nil, err
		}
		r.SequenceNumber = max(r.SequenceNumber+1, uint64(now.UnixMilli()))
		return proto.MarshalOptions{Deterministic: true}.Marshal(&r)
	}
}

var errBundleNotFound = &Error{Kind: NotFound, Msg: "bundle not found"}

// DeleteMode says what becomes of entries that federate with a bundle's trust
// domain when the bundle is deleted.
type DeleteMode int

// The modes of deletion.
const (
	Restrict   DeleteMode = iota // refuse while there are any
	Delete                       // delete them too
	Dissociate                   // take the trust domain off them
)

// DeleteBundle deletes the bundle of a foreign trust domain.
func (r *Registry) DeleteBundle(ctx context.Context, td spiffeid.TrustDomain, mode DeleteMode) error {
	if td == r.td {
		return invalid("the bundle of the server's own trust domain cannot be deleted")
	}
	if r.View().Bundle(td) == nil {
		return errBundleNotFound
	}
	var ids []string
	for e := range r.View().Entries("") {
		if slices.Contains(e.FederatesWith, td) {
			ids = append(ids, e.ID)
		}
	}
	switch {
	case len(ids) == 0:
	case mode == Restrict:
		return &Error{Kind: FailedPrecondition, Msg: fmt.Sprintf("cannot delete bundle; federated with %d registration entries", len(ids))}
	case mode == Delete:
		for ids := range slices.Chunk(ids, deleteGroup) {
			for i, err := range r.DeleteEntries(ctx, ids) {
				if err != nil && err != errEntryNotFound {
					return fmt.Errorf("delete entry %s: %w", ids[i], err)
				}
			}
		}
	case mode == Dissociate:
		for ids := range slices.Chunk(ids, deleteGroup) {
			if err := r.dissociate(ctx, td, ids); err != nil {
				return err
			}
		}
	default:
		return invalid("unknown mode of deletion %d", mode)
	}
	_, err := r.change(ctx, func(v *View) (store.Txn, error) {
		_, rev := v.storedBundle(td)
		if rev == 0 {
			return store.Txn{}, errBundleNotFound
		}
		return store.Txn{
			If: []store.Condition{{Key: bundleKey(td), Revision: rev}},
			Do: []store.Write{{Key: bundleKey(td)}},
		}, nil
	})
	return err
}

// deleteGroup bounds the entries that are written together when a bundle is
// deleted.
const deleteGroup = 1000

// dissociate takes a trust domain off entries.
func (r *Registry) dissociate(ctx context.Context, td spiffeid.TrustDomain, ids []string) error {
	updates := make([]EntryUpdate, len(ids))
	for i, id := range ids {
		updates[i] = EntryUpdate{ID: id, Change: func(e *entry.Entry) error {
			e.FederatesWith = slices.DeleteFunc(slices.Clone(e.FederatesWith), func(f spiffeid.TrustDomain) bool { return f == td })
			return nil
		}}
	}
	for i, res := range r.UpdateEntries(ctx, updates) {
		if res.Err != nil && res.Err != errEntryNotFound {
			return fmt.Errorf("dissociate entry %s: %w", ids[i], res.Err)
		}
	}
	return nil
}
