package registry

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

const (
	statusPrefix = "status/" // <status list ID>

	// StatusListSize is how many tokens a status list is of: 128 KiB, and some 200
	// bytes as it is sent while nothing is revoked.
	StatusListSize = 1 << 20
	// maxStatusLists is how many there may be at once, on all servers.
	maxStatusLists = 10_000
)

// StatusList says which tokens of one list were revoked. It does not change.
type StatusList struct {
	ID      string // 32 hexadecimal digits
	URI     string // at which it is served
	Server  string // that gives out its indexes
	EndsAt  time.Time
	Bits    []byte           // as it is sent, zlib; nil: nothing is revoked
	List    *statuslist.List // of Bits; nil: nothing is revoked
	Revoked int              // tokens
	Applied store.Revision   // of the newest revocation that is in it, as far as it concerns it

	revision store.Revision
}

// Revision returns the revision that wrote the list as it is.
func (l *StatusList) Revision() store.Revision { return l.revision }

// Has reports whether the token with an index was revoked.
func (l *StatusList) Has(index int) bool {
	if l == nil || l.List == nil {
		return false
	}
	s, ok := l.List.Status(index)
	return ok && s != statuslist.Valid
}

func statusListFromRecord(id string, rec store.Record) (*StatusList, error) {
	var r hallmarkv1.StatusList
	if err := proto.Unmarshal(rec.Value, &r); err != nil {
		return nil, err
	}
	l := &StatusList{ID: id, URI: r.Uri, Server: r.Server, EndsAt: timeOf(r.EndsAt), Applied: store.Revision(r.Applied), revision: rec.Revision}
	if len(r.Bits) == 0 {
		return l, nil
	}
	list, err := statuslist.Decompress(1, r.Bits)
	if err != nil {
		return nil, err
	}
	l.Bits, l.List, l.Revoked = r.Bits, list, list.Count()
	return l, nil
}

// PutStatusList writes a status list: its URI, Server, EndsAt, Bits and Applied.
// It fails with [store.ErrConflict] if it is not the one given as old (nil:
// there is none) any more.
func (r *Registry) PutStatusList(ctx context.Context, old, l *StatusList) error {
	var rev store.Revision
	if old != nil {
		rev = old.revision
	} else if n := r.View().statusLists.Len(); n >= maxStatusLists {
		return &Error{Kind: FailedPrecondition, Msg: fmt.Sprintf("there are %d status lists, the most there may be; each goes when its tokens have ended", n)}
	}
	txn, err := putTxn(statusPrefix+l.ID, rev, &hallmarkv1.StatusList{
		Uri: l.URI, Server: l.Server, EndsAt: unixOf(l.EndsAt), Bits: l.Bits, Applied: int64(l.Applied),
	})
	if err != nil {
		return err
	}
	res := r.commit(ctx, txn)[0]
	if res.Err == nil {
		_, res.Err = r.await(ctx, res.Revision)
	}
	return res.Err
}

// StatusList returns the status list of an ID, or nil.
func (v *View) StatusList(id string) *StatusList {
	l, _ := v.statusLists.Get(&StatusList{ID: id})
	return l
}

// StatusLists yields the status lists of all servers, by ID.
func (v *View) StatusLists() iter.Seq[*StatusList] {
	return func(yield func(*StatusList) bool) { v.statusLists.Scan(yield) }
}

// LiveStatusLists returns the status lists of which a token may not have ended by
// now.
func (v *View) LiveStatusLists(now time.Time) (live []*StatusList) {
	for l := range v.StatusLists() {
		if now.Before(l.EndsAt) {
			live = append(live, l)
		}
	}
	return live
}

func (f *fold) applyStatusList(id string, rec store.Record) error {
	if rec.Value == nil {
		f.statusLists.delete(&StatusList{ID: id})
		return nil
	}
	l, err := statusListFromRecord(id, rec)
	if err == nil {
		f.statusLists.set(l)
	}
	return err
}

func lessStatusList(a, b *StatusList) bool { return cmp.Less(a.ID, b.ID) }
