package registry

import (
	"context"
	"crypto"
	"crypto/x509"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

// AuthorityKind says what an authority signs.
type AuthorityKind int

// The kinds of authority.
const (
	X509 AuthorityKind = AuthorityKind(hallmarkv1.Authority_KIND_X509)
	JWT  AuthorityKind = AuthorityKind(hallmarkv1.Authority_KIND_JWT)
	WIT  AuthorityKind = AuthorityKind(hallmarkv1.Authority_KIND_WIT)
	// JWTRS256 signs JWT-SVIDs for relying parties that take RS256 alone. Its keys
	// are among the JWT authorities of a bundle.
	JWTRS256 AuthorityKind = AuthorityKind(hallmarkv1.Authority_KIND_JWT_RS256)
)

func (k AuthorityKind) String() string {
	switch k {
	case X509:
		return "x509"
	case JWT:
		return "jwt"
	case WIT:
		return "wit"
	case JWTRS256:
		return "jwt_rs256"
	}
	return fmt.Sprintf("AuthorityKind(%d)", int(k))
}

// AuthorityState says where an authority is in its life.
type AuthorityState int

// The states of an authority, in their order.
const (
	Prepared AuthorityState = AuthorityState(hallmarkv1.Authority_STATE_PREPARED) // in the bundle, does not sign yet
	Active   AuthorityState = AuthorityState(hallmarkv1.Authority_STATE_ACTIVE)   // signs
	Old      AuthorityState = AuthorityState(hallmarkv1.Authority_STATE_OLD)      // in the bundle, signs no more
)

func (s AuthorityState) String() string {
	switch s {
	case Prepared:
		return "prepared"
	case Active:
		return "active"
	case Old:
		return "old"
	}
	return fmt.Sprintf("AuthorityState(%d)", int(s))
}

// Authority is the public half of a signing key of this trust domain. Do not
// change one that a [View] returned.
type Authority struct {
	ID          string // X.509: subject key id in hex; others: the kid
	Kind        AuthorityKind
	State       AuthorityState
	Server      string              // the server that holds the key
	KeyName     string              // the name of the key in its key manager
	Chain       []*x509.Certificate // X.509: own certificate first
	PublicKey   crypto.PublicKey
	CreatedAt   time.Time
	ActivatedAt time.Time // zero while prepared
	ExpiresAt   time.Time
	Tainted     bool

	unknown  []byte // what a newer version wrote into the record, as it came
	revision store.Revision
}

// Record returns the stored form.
func (a *Authority) Record() (*hallmarkv1.Authority, error) {
	key, err := x509.MarshalPKIXPublicKey(a.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%s authority %s: %w", a.Kind, a.ID, err)
	}
	rec := &hallmarkv1.Authority{
		Id:          a.ID,
		Kind:        hallmarkv1.Authority_Kind(a.Kind),
		State:       hallmarkv1.Authority_State(a.State),
		Server:      a.Server,
		KeyName:     a.KeyName,
		PublicKey:   key,
		CreatedAt:   unixOf(a.CreatedAt),
		ActivatedAt: unixOf(a.ActivatedAt),
		ExpiresAt:   unixOf(a.ExpiresAt),
		Tainted:     a.Tainted,
	}
	for _, cert := range a.Chain {
		rec.Chain = append(rec.Chain, cert.Raw)
	}
	rec.ProtoReflect().SetUnknown(a.unknown)
	return rec, nil
}

func authorityFromRecord(value []byte, rev store.Revision) (*Authority, error) {
	var r hallmarkv1.Authority
	if err := proto.Unmarshal(value, &r); err != nil {
		return nil, err
	}
	key, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil {
		return nil, err
	}
	a := &Authority{
		ID:          r.Id,
		Kind:        AuthorityKind(r.Kind),
		State:       AuthorityState(r.State),
		Server:      r.Server,
		KeyName:     r.KeyName,
		PublicKey:   key,
		CreatedAt:   timeOf(r.CreatedAt),
		ActivatedAt: timeOf(r.ActivatedAt),
		ExpiresAt:   timeOf(r.ExpiresAt),
		Tainted:     r.Tainted,
		unknown:     r.ProtoReflect().GetUnknown(),
		revision:    rev,
	}
	for _, der := range r.Chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		a.Chain = append(a.Chain, cert)
	}
	return a, nil
}

func authorityKey(a *Authority) string {
	return authorityPrefix + a.Server + "/" + a.Kind.String() + "/" + a.ID
}

// AuthorityChange is what a change of the authorities writes.
type AuthorityChange struct {
	Put    []*Authority // new and changed
	Delete []*Authority
}

// ChangeAuthorities changes authorities of this trust domain together with its
// bundle. The function gets a copy of the bundle, which it may edit, and the
// authorities of every server, which it may not; it may be called again if
// another writer came first. The bundle's sequence number rises if it changed.
func (r *Registry) ChangeAuthorities(ctx context.Context, change func(own *bundle.Bundle, all []*Authority) (AuthorityChange, error)) (*View, error) {
	return r.change(ctx, func(v *View) (store.Txn, error) {
		var txn store.Txn
		old, rev := v.storedBundle(r.td)
		own := old.Clone()
		if own.RefreshHint == 0 {
			own.RefreshHint = refreshHint
		}
		c, err := change(own, v.Authorities())
		if err != nil {
			return txn, err
		}
		if err := putBundle(&txn, old, own, rev); err != nil {
			return txn, err
		}
		for _, a := range c.Put {
			rec, err := a.Record()
			if err != nil {
				return txn, err
			}
			value, err := proto.Marshal(rec)
			if err != nil {
				return txn, err
			}
			txn.If = append(txn.If, store.Condition{Key: authorityKey(a), Revision: v.authorityRevision(a)})
			txn.Do = append(txn.Do, store.Write{Key: authorityKey(a), Value: value})
		}
		for _, a := range c.Delete {
			txn.If = append(txn.If, store.Condition{Key: authorityKey(a), Revision: v.authorityRevision(a)})
			txn.Do = append(txn.Do, store.Write{Key: authorityKey(a)})
		}
		return txn, nil
	})
}
