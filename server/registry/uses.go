package registry

import (
	"context"
	"encoding/hex"
	"errors"
	"time"

	"google.golang.org/protobuf/proto"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// storedUse is a token of an outside issuer that was used.
type storedUse struct {
	key      string
	endsAt   time.Time
	revision store.Revision
}

// useGrace is how long a use is remembered after its token has ended, for servers
// whose clock is behind.
const useGrace = 5 * time.Minute

func useFromRecord(rec store.Record) (*storedUse, error) {
	var r hallmarkv1.UsedToken
	if err := proto.Unmarshal(rec.Value, &r); err != nil {
		return nil, err
	}
	return &storedUse{rec.Key, timeOf(r.EndsAt), rec.Revision}, nil
}

// UseToken notes that a token of an outside issuer, known by a hash, is used now,
// which is once, on whichever server: of any number of callers one succeeds, and
// the others get an [Error] of the kind AlreadyExists. It is forgotten some time
// after the token has ended.
func (r *Registry) UseToken(ctx context.Context, token [32]byte, endsAt time.Time) error {
	txn, err := putTxn(useKey(token), 0, &hallmarkv1.UsedToken{EndsAt: unixOf(endsAt.Add(time.Second))})
	if err != nil {
		return err
	}
	res := r.commit(ctx, txn)[0]
	if errors.Is(res.Err, store.ErrConflict) {
		return &Error{Kind: AlreadyExists, Msg: "the token was used before"}
	}
	if res.Err == nil {
		_, res.Err = r.await(ctx, res.Revision)
	}
	return res.Err
}

func useKey(token [32]byte) string { return usePrefix + hex.EncodeToString(token[:]) }

// UsedToken reports whether a token of an outside issuer, known by a hash, was
// used.
func (v *View) UsedToken(token [32]byte) bool {
	_, used := v.uses.Get(&storedUse{key: useKey(token)})
	return used
}

// UsedTokens returns how many used tokens are remembered.
func (v *View) UsedTokens() int { return v.uses.Len() }

// endedUses returns what forgets those of tokens that have ended, at most so many.
func (v *View) endedUses(now time.Time, most int) (txns []store.Txn) {
	v.uses.Scan(func(u *storedUse) bool {
		if now.After(u.endsAt.Add(useGrace)) {
			txns = append(txns, store.Txn{
				If: []store.Condition{{Key: u.key, Revision: u.revision}},
				Do: []store.Write{{Key: u.key}},
			})
		}
		return len(txns) < most
	})
	return txns
}
