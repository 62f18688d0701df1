package registry

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// JoinToken admits one agent, once. Only its hash is stored.
type JoinToken struct {
	ExpiresAt time.Time
	AgentID   spiffeid.ID // a further ID under which the agent's entries may stand; zero if none
}

const (
	maxToken = 255 // characters
	// tokenGrace is how long an expired token is remembered, so that whoever
	// brings it is told that it expired and not that it never was.
	tokenGrace = time.Hour
)

// tokenKey holds a hash of the token: a reader of the store or of a backup
// learns no token. Looking the hash up also takes the same time whichever part
// of a guess is right.
func tokenKey(token string) string {
	sum := sha256.Sum256([]byte(token))
	return tokenPrefix + hex.EncodeToString(sum[:])
}

func tokenFromRecord(rec store.Record) (*storedToken, error) {
	var r hallmarkv1.JoinToken
	if err := proto.Unmarshal(rec.Value, &r); err != nil {
		return nil, err
	}
	t := &storedToken{key: rec.Key, JoinToken: JoinToken{ExpiresAt: timeOf(r.ExpiresAt)}, revision: rec.Revision}
	if r.AgentId != "" {
		id, err := spiffeid.FromString(r.AgentId)
		if err != nil {
			return nil, err
		}
		t.AgentID = id
	}
	return t, nil
}

// JoinTokenNodeID returns the SPIFFE ID of the agent that a join token admits.
func JoinTokenNodeID(td spiffeid.TrustDomain, token string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, "spire", "agent", "join_token", token)
}

// CreateJoinToken stores the hash of a join token. The token is 1 to 255
// characters that may stand in the path of a SPIFFE ID.
func (r *Registry) CreateJoinToken(ctx context.Context, token string, t JoinToken) error {
	if token == "" || len(token) > maxToken {
		return invalid("join token is %d characters long; it must be 1 to %d", len(token), maxToken)
	}
	if _, err := JoinTokenNodeID(r.td, token); err != nil {
		return invalid("join token may hold letters, digits, '-', '_' and '.' only")
	}
	rec := &hallmarkv1.JoinToken{ExpiresAt: unixOf(t.ExpiresAt)}
	if !t.AgentID.IsZero() {
		if !t.AgentID.MemberOf(r.td) || t.AgentID.Path() == "" || entry.Reserved(t.AgentID) {
			return invalid("agent ID %q is not a workload's ID in this server's trust domain %q", t.AgentID, r.td.Name())
		}
		rec.AgentId = t.AgentID.String()
	}
	_, err := r.change(ctx, func(v *View) (store.Txn, error) {
		if _, ok := v.tokens.Get(&storedToken{key: tokenKey(token)}); ok {
			return store.Txn{}, &Error{Kind: AlreadyExists, Msg: "join token already exists"}
		}
		return putTxn(tokenKey(token), 0, rec)
	})
	return err
}

// ConsumeJoinToken uses up a join token: of any number of callers, one
// succeeds. If the token was made with an agent ID, the entry that gives the
// agent this ID is created with it; not earlier, because it names the token.
func (r *Registry) ConsumeJoinToken(ctx context.Context, token string) (JoinToken, error) {
	unusable := &Error{Kind: Invalid, Msg: "join token does not exist or has already been used"}
	if token == "" || len(token) > maxToken {
		return JoinToken{}, unusable
	}
	nodeID, err := JoinTokenNodeID(r.td, token)
	if err != nil {
		return JoinToken{}, unusable
	}
	var used JoinToken
	_, err = r.change(ctx, func(v *View) (store.Txn, error) {
		t, ok := v.tokens.Get(&storedToken{key: tokenKey(token)})
		if !ok {
			return store.Txn{}, unusable
		}
		now := r.now()
		if !now.Before(t.ExpiresAt) {
			ago := now.Sub(t.ExpiresAt).Round(time.Second)
			return store.Txn{}, &Error{Kind: Invalid, Msg: fmt.Sprintf("join token expired %v ago; make a new one with \"hallmark token generate\"", ago)}
		}
		used = t.JoinToken
		txn := store.Txn{
			If: []store.Condition{{Key: t.key, Revision: t.revision}},
			Do: []store.Write{{Key: t.key}},
		}
		if used.AgentID.IsZero() {
			return txn, nil
		}
		alias := &entry.Entry{
			ID:        uuid.NewString(),
			SPIFFEID:  used.AgentID,
			ParentID:  nodeID,
			Selectors: selector.Set{SpiffeIDSelector(nodeID)},
			CreatedAt: now.Truncate(time.Second),
			// It is no workload's: its selector is one of nodes.
			DisableX509Prefetch: true,
		}
		if err := alias.Validate(r.td); err != nil {
			return store.Txn{}, &Error{Kind: Invalid, Msg: err.Error()}
		}
		for e := range v.EntriesByParent(nodeID) {
			if e.Key() == alias.Key() {
				return txn, nil // of an earlier token of the same text
			}
		}
		txn.If = append(txn.If, store.Condition{Key: similarKey(alias)})
		value, err := proto.Marshal(alias.Record())
		if err != nil {
			return store.Txn{}, err
		}
		txn.Do = append(txn.Do, store.Write{Key: entryKey(alias.ID), Value: value}, store.Write{Key: similarKey(alias), Value: []byte(alias.ID)})
		return txn, nil
	})
	var e *Error
	if errors.As(err, &e) && e.Kind == Contended {
		err = unusable
	}
	if err != nil {
		return JoinToken{}, err
	}
	return used, nil
}
