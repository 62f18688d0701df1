package registry

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// Node is an attested agent. Do not change one that a [View] returned.
type Node struct {
	ID              spiffeid.ID
	AttestationType string // the attestor, e.g. "join_token"
	Selectors       selector.Set
	SerialNumber    string    // decimal; of the X509-SVID in use
	ExpiresAt       time.Time // its end
	AuthorityID     string    // of the X.509 authority that signed it; empty if not known
	NewSerialNumber string    // decimal; issued, not presented yet; empty if none
	NewExpiresAt    time.Time
	NewAuthorityID  string
	Banned          bool
	CanReattest     bool
	AgentVersion    string // at most 255 characters
	AttestedAt      time.Time

	match    selector.Set // Selectors and the node's own spiffe_id
	unknown  []byte       // what a newer version wrote into the record, as it came
	revision store.Revision
}

// SpiffeIDSelector is the selector that a node has besides those its attestor
// found: its own SPIFFE ID. Aliases made with a join token name it.
func SpiffeIDSelector(id spiffeid.ID) selector.Selector {
	return selector.Selector{Type: "spiffe_id", Value: id.String()}
}

func nodeKey(id spiffeid.ID) string { return nodePrefix + id.String() }

func (n *Node) record() *hallmarkv1.Node {
	r := &hallmarkv1.Node{
		Id:              n.ID.String(),
		AttestationType: n.AttestationType,
		Selectors:       entry.SelectorsRecord(n.Selectors),
		SerialNumber:    n.SerialNumber,
		ExpiresAt:       unixOf(n.ExpiresAt),
		AuthorityId:     n.AuthorityID,
		NewSerialNumber: n.NewSerialNumber,
		NewExpiresAt:    unixOf(n.NewExpiresAt),
		NewAuthorityId:  n.NewAuthorityID,
		Banned:          n.Banned,
		CanReattest:     n.CanReattest,
		AgentVersion:    n.AgentVersion,
		AttestedAt:      unixOf(n.AttestedAt),
	}
	r.ProtoReflect().SetUnknown(n.unknown)
	return r
}

func nodeFromRecord(value []byte, rev store.Revision) (*Node, error) {
	var r hallmarkv1.Node
	if err := proto.Unmarshal(value, &r); err != nil {
		return nil, err
	}
	id, err := spiffeid.FromString(r.Id)
	if err != nil {
		return nil, err
	}
	n := &Node{
		ID:              id,
		AttestationType: r.AttestationType,
		Selectors:       entry.SelectorsFromRecord(r.Selectors),
		SerialNumber:    r.SerialNumber,
		ExpiresAt:       timeOf(r.ExpiresAt),
		AuthorityID:     r.AuthorityId,
		NewSerialNumber: r.NewSerialNumber,
		NewExpiresAt:    timeOf(r.NewExpiresAt),
		NewAuthorityID:  r.NewAuthorityId,
		Banned:          r.Banned,
		CanReattest:     r.CanReattest,
		AgentVersion:    r.AgentVersion,
		AttestedAt:      timeOf(r.AttestedAt),
		revision:        rev,
		unknown:         r.ProtoReflect().GetUnknown(),
	}
	n.match = selector.NewSet(append(slices.Clone(n.Selectors), SpiffeIDSelector(id))...)
	return n, nil
}

// PutNode records a node that has attested, anew or again. A banned node is
// refused with [FailedPrecondition].
func (r *Registry) PutNode(ctx context.Context, node *Node) error {
	return r.putNode(ctx, node, false)
}

// CreateNode records a node that has attested. If there is one of its ID, it is
// refused with [AlreadyExists], also if that came at the same time through
// another server; with [FailedPrecondition] if it is banned.
func (r *Registry) CreateNode(ctx context.Context, node *Node) error {
	return r.putNode(ctx, node, true)
}

func (r *Registry) putNode(ctx context.Context, node *Node, anew bool) error {
	if len(node.AgentVersion) > maxAgentVersion {
		return invalid("agent version is %d characters long; the most is %d", len(node.AgentVersion), maxAgentVersion)
	}
	if !node.ID.MemberOf(r.td) {
		return invalid("agent ID %q is not in this server's trust domain %q", node.ID, r.td.Name())
	}
	_, err := r.change(ctx, func(v *View) (store.Txn, error) {
		var rev store.Revision
		n := *node
		if old := v.Node(node.ID); old != nil {
			if old.Banned {
				return store.Txn{}, &Error{Kind: FailedPrecondition, Msg: "failed to attest: agent is banned"}
			}
			if anew {
				return store.Txn{}, &Error{Kind: AlreadyExists, Msg: "failed to attest: the agent exists"}
			}
			rev, n.unknown = old.revision, old.unknown
		}
		return putTxn(nodeKey(n.ID), rev, n.record())
	})
	return err
}

// UpdateNode changes a node. The function edits a copy, all but its ID; it may
// be called again if another writer came first. Nothing is written if it
// changed nothing.
func (r *Registry) UpdateNode(ctx context.Context, id spiffeid.ID, change func(*Node) error) (*Node, error) {
	v, err := r.change(ctx, func(v *View) (store.Txn, error) {
		old := v.Node(id)
		if old == nil {
			return store.Txn{}, &Error{Kind: NotFound, Msg: "agent not found"}
		}
		n := *old
		if err := change(&n); err != nil {
			return store.Txn{}, err
		}
		if len(n.AgentVersion) > maxAgentVersion {
			return store.Txn{}, invalid("agent version is %d characters long; the most is %d", len(n.AgentVersion), maxAgentVersion)
		}
		n.ID = id
		if proto.Equal(n.record(), old.record()) {
			return store.Txn{}, nil
		}
		return putTxn(nodeKey(id), old.revision, n.record())
	})
	if err != nil {
		return nil, err
	}
	if n := v.Node(id); n != nil {
		return n, nil
	}
	return nil, &Error{Kind: NotFound, Msg: "agent not found"} // deleted right after
}

// DeleteNode forgets a node. It may attest again if its attestor allows. The
// aliases that were made for it alone, with its join token, go too.
func (r *Registry) DeleteNode(ctx context.Context, id spiffeid.ID) error {
	var aliases []string
	_, err := r.change(ctx, func(v *View) (store.Txn, error) {
		old := v.Node(id)
		if old == nil {
			return store.Txn{}, &Error{Kind: NotFound, Msg: "agent not found"}
		}
		own := selector.Set{SpiffeIDSelector(id)}
		aliases = aliases[:0]
		for e := range v.EntriesByParent(id) {
			if e.Selectors.Equal(own) {
				aliases = append(aliases, e.ID)
			}
		}
		return store.Txn{
			If: []store.Condition{{Key: nodeKey(id), Revision: old.revision}},
			Do: []store.Write{{Key: nodeKey(id)}},
		}, nil
	})
	if err != nil {
		return err
	}
	for _, err := range r.DeleteEntries(ctx, aliases) {
		var e *Error
		if err != nil && !(errors.As(err, &e) && e.Kind == NotFound) {
			return err
		}
	}
	return nil
}
