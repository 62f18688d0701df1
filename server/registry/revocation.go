package registry

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/store"
)

const (
	revocationPrefix = "revocation/" // <kind>/<what>
	crlPrefix        = "crl/"        // <X.509 authority ID>
)

// MaxRevocations is how many revocations there may be at once. Whoever has more
// to revoke replaces the authority.
const MaxRevocations = 100_000

// revocationGrace is how long a revocation is kept after all that it is about
// has ended: for verifiers whose clock is behind.
const revocationGrace = 5 * time.Minute

// maxSerial is the most octets of a serial number. RFC 5280 §4.1.2.2.
const maxSerial = 20

// maxReason is the highest reason of a revocation. RFC 5280 §5.3.1.
const maxReason = 10

// Revocation takes back what was issued before it: one certificate or token, all of
// a SPIFFE ID, or the SVID of an agent and all that was issued through it. Do not
// change one that a [View] returned.
type Revocation struct {
	SerialNumber []byte // of one certificate, without leading zeros; or of one token ([statuslist.IsSerial])
	AuthorityID  string // of a certificate: the X.509 authority that signed it
	SPIFFEID     spiffeid.ID
	Node         spiffeid.ID
	RevokedAt    time.Time
	EndsAt       time.Time // when all that it is about has ended
	Reason       int       // RFC 5280 §5.3.1; 0: unspecified

	key      string
	unknown  []byte
	revision store.Revision
}

// Revision returns the revision that made the revocation.
func (r *Revocation) Revision() store.Revision { return r.revision }

// Record returns the stored form.
func (r *Revocation) Record() *hallmarkv1.Revocation {
	rec := &hallmarkv1.Revocation{
		SerialNumber: r.SerialNumber, AuthorityId: r.AuthorityID,
		RevokedAt: unixOf(r.RevokedAt), EndsAt: unixOf(r.EndsAt), Reason: int32(r.Reason),
	}
	if !r.SPIFFEID.IsZero() {
		rec.SpiffeId = r.SPIFFEID.String()
	}
	if !r.Node.IsZero() {
		rec.NodeId = r.Node.String()
	}
	rec.ProtoReflect().SetUnknown(r.unknown)
	return rec
}

func (r *Revocation) keyOf() string {
	switch {
	case len(r.SerialNumber) > 0:
		return revocationPrefix + "serial/" + r.AuthorityID + "/" + hex.EncodeToString(r.SerialNumber)
	case !r.Node.IsZero():
		return revocationPrefix + "node/" + hashed(r.Node)
	}
	return revocationPrefix + "id/" + hashed(r.SPIFFEID)
}

// hashed is an ID in a key, which has a bound.
func hashed(id spiffeid.ID) string {
	sum := sha256.Sum256([]byte(id.String()))
	return hex.EncodeToString(sum[:])
}

func revocationFromRecord(rec store.Record) (*Revocation, error) {
	var r hallmarkv1.Revocation
	if err := proto.Unmarshal(rec.Value, &r); err != nil {
		return nil, err
	}
	out := &Revocation{
		SerialNumber: r.SerialNumber, AuthorityID: r.AuthorityId,
		RevokedAt: timeOf(r.RevokedAt), EndsAt: timeOf(r.EndsAt), Reason: int(r.Reason),
		key: rec.Key, unknown: r.ProtoReflect().GetUnknown(), revision: rec.Revision,
	}
	for _, id := range []struct {
		text string
		to   *spiffeid.ID
	}{{r.SpiffeId, &out.SPIFFEID}, {r.NodeId, &out.Node}} {
		if id.text == "" {
			continue
		}
		var err error
		if *id.to, err = spiffeid.FromString(id.text); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// validate checks what a caller wants to revoke.
func (r *Revocation) validate(td spiffeid.TrustDomain) error {
	targets := 0
	for _, set := range []bool{len(r.SerialNumber) > 0, !r.SPIFFEID.IsZero(), !r.Node.IsZero()} {
		if set {
			targets++
		}
	}
	switch {
	case targets != 1:
		return invalid("a revocation is of a serial number, a SPIFFE ID or a node: name one of them")
	case len(r.SerialNumber) > maxSerial || len(r.SerialNumber) > 0 && r.SerialNumber[0] == 0:
		return invalid("a serial number is a positive number of at most %d octets", maxSerial)
	case statuslist.IsSerial(r.SerialNumber) != (r.AuthorityID == "") && len(r.SerialNumber) > 0:
		return invalid("the serial number of a certificate is that of an authority: name it; that of a token names its status list")
	case r.Reason < 0 || r.Reason > maxReason || r.Reason == 7 || r.Reason == 8 || r.Reason == 6:
		return invalid("reason %d is none for which an SVID is revoked for good", r.Reason)
	}
	for _, id := range []spiffeid.ID{r.SPIFFEID, r.Node} {
		if !id.IsZero() && (!id.MemberOf(td) || id.Path() == "") {
			return invalid("SPIFFE ID %q is not one of this server's trust domain %q", id, td.Name())
		}
	}
	return nil
}

// Revoke records revocations, all or none, and returns a view that has them. Of
// a certificate that is revoked already nothing changes. An agent whose SVID is
// revoked is let in by no SVID that it has: it has to attest again.
func (r *Registry) Revoke(ctx context.Context, revocations []*Revocation) (*View, error) {
	if len(revocations) == 0 {
		return nil, invalid("nothing to revoke was named")
	}
	writes := 0 // and conditions
	for _, x := range revocations {
		if writes += 2; !x.Node.IsZero() {
			writes += 2
		}
		if err := x.validate(r.td); err != nil {
			return nil, err
		}
	}
	if writes > store.MaxWrites {
		return nil, invalid("%d revocations in one call; the most is %d, or %d of nodes: send several", len(revocations), store.MaxWrites/2, store.MaxWrites/4)
	}
	return r.change(ctx, func(v *View) (store.Txn, error) {
		var txn store.Txn
		if v.revocations.Len()+len(revocations) > MaxRevocations {
			return txn, &Error{Kind: FailedPrecondition, Msg: fmt.Sprintf(
				"there are %d revocations; the most is %d: replace the authority instead (hallmark authority rotate, taint, revoke)", v.revocations.Len(), MaxRevocations)}
		}
		put := func(key string, rev store.Revision, m proto.Message) error {
			one, err := putTxn(key, rev, m)
			txn.If, txn.Do = append(txn.If, one.If...), append(txn.Do, one.Do...)
			return err
		}
		done := make(map[string]bool, len(revocations))
		for _, x := range revocations {
			key := x.keyOf()
			old, _ := v.revocations.Get(&Revocation{key: key})
			if done[key] || old != nil && len(x.SerialNumber) > 0 {
				continue
			}
			done[key] = true
			var rev store.Revision
			if old != nil {
				rev = old.revision
			}
			if err := put(key, rev, x.Record()); err != nil {
				return txn, err
			}
			n := v.Node(x.Node)
			if n == nil || n.SerialNumber == "" && n.NewSerialNumber == "" {
				continue
			}
			out := *n
			out.SerialNumber, out.NewSerialNumber, out.NewAuthorityID, out.NewExpiresAt = "", "", "", time.Time{}
			if err := put(nodeKey(n.ID), n.revision, out.record()); err != nil {
				return txn, err
			}
		}
		return txn, nil
	})
}

// Revocations yields all revocations.
func (v *View) Revocations() iter.Seq[*Revocation] {
	return func(yield func(*Revocation) bool) { v.revocations.Scan(yield) }
}

// Revocation returns the revocation of what another one is about, or nil.
func (v *View) Revocation(of *Revocation) *Revocation {
	r, _ := v.revocations.Get(&Revocation{key: of.keyOf()})
	return r
}

// RevocationCount returns how many revocations there are.
func (v *View) RevocationCount() int { return v.revocations.Len() }

// SameRevocations reports whether two views agree in all revocations, CRLs, status
// lists and authorities. It costs nothing.
func (v *View) SameRevocations(o *View) bool {
	return o != nil && v.revocations == o.revocations && v.crls == o.crls && v.statusLists == o.statusLists && v.authorities == o.authorities
}

// CRL is the certificate revocation list of an X.509 authority of this trust
// domain. It does not change.
type CRL struct {
	AuthorityID string
	DER         []byte // nil: nothing of the authority was revoked yet, and none was signed
	Number      uint64 // RFC 5280 §5.2.3; 0 without DER
	NextUpdate  time.Time
	Revoked     []RevokedCertificate
	Applied     store.Revision // of the newest revocation that is in it, as far as it concerns it

	bySerial map[string]struct{}
	revision store.Revision
}

// RevokedCertificate is an entry of a CRL.
type RevokedCertificate struct {
	SerialNumber []byte // without leading zeros
	RevokedAt    time.Time
	EndsAt       time.Time // when the certificate ends, and its entry with it
	Reason       int
}

// Has reports whether a certificate's serial number is in the list.
func (c *CRL) Has(serial []byte) bool {
	if c == nil {
		return false
	}
	_, ok := c.bySerial[string(serial)]
	return ok
}

func crlFromRecord(id string, rec store.Record) (*CRL, error) {
	var r hallmarkv1.RevocationList
	if err := proto.Unmarshal(rec.Value, &r); err != nil {
		return nil, err
	}
	c := &CRL{AuthorityID: id, Applied: store.Revision(r.Applied), revision: rec.Revision}
	if len(r.Crl) == 0 {
		return c, nil
	}
	list, err := x509.ParseRevocationList(r.Crl)
	if err != nil {
		return nil, err
	}
	if len(list.RevokedCertificateEntries) != len(r.EndsAt) || list.Number == nil || !list.Number.IsUint64() {
		return nil, fmt.Errorf("the CRL has %d certificates, of %d of which the end is known", len(list.RevokedCertificateEntries), len(r.EndsAt))
	}
	c.DER, c.Number, c.NextUpdate = r.Crl, list.Number.Uint64(), list.NextUpdate
	c.Revoked = make([]RevokedCertificate, len(r.EndsAt))
	c.bySerial = make(map[string]struct{}, len(r.EndsAt))
	for i, e := range list.RevokedCertificateEntries {
		serial := e.SerialNumber.Bytes()
		c.Revoked[i] = RevokedCertificate{serial, e.RevocationTime, timeOf(r.EndsAt[i]), e.ReasonCode}
		c.bySerial[string(serial)] = struct{}{}
	}
	return c, nil
}

// PutCRL writes the CRL of an authority: its DER, Applied, and the ends of what
// is in it, in its order. It fails with [store.ErrConflict] if the authority's
// CRL is not the one given as old (nil: there is none) any more.
func (r *Registry) PutCRL(ctx context.Context, old, c *CRL) error {
	rec := &hallmarkv1.RevocationList{Crl: c.DER, Applied: int64(c.Applied)}
	for _, e := range c.Revoked {
		rec.EndsAt = append(rec.EndsAt, unixOf(e.EndsAt))
	}
	var rev store.Revision
	if old != nil {
		rev = old.revision
	}
	txn, err := putTxn(crlPrefix+c.AuthorityID, rev, rec)
	if err != nil {
		return err
	}
	res := r.commit(ctx, txn)[0]
	if res.Err == nil {
		_, res.Err = r.await(ctx, res.Revision)
	}
	return res.Err
}

// CRL returns the CRL of an authority, or nil.
func (v *View) CRL(authorityID string) *CRL {
	c, _ := v.crls.Get(&CRL{AuthorityID: authorityID})
	return c
}

// CRLs yields the CRLs of all authorities, by the authority's ID.
func (v *View) CRLs() iter.Seq[*CRL] {
	return func(yield func(*CRL) bool) { v.crls.Scan(yield) }
}

// IssuedBy returns the X.509 authorities that may have signed what has not ended
// by now: all that have signed at all.
func (v *View) IssuedBy(now time.Time) []*Authority {
	return slices.DeleteFunc(v.Authorities(), func(a *Authority) bool {
		return a.Kind != X509 || a.State == Prepared || now.After(a.ExpiresAt)
	})
}

// endedRevocations returns what forgets revocations and status lists of what has
// ended, and the CRLs of authorities that are no more.
func (v *View) endedRevocations(now time.Time, most int) (txns []store.Txn) {
	forget := func(key string, rev store.Revision) {
		txns = append(txns, store.Txn{If: []store.Condition{{Key: key, Revision: rev}}, Do: []store.Write{{Key: key}}})
	}
	v.revocations.Scan(func(r *Revocation) bool {
		if now.After(r.EndsAt.Add(revocationGrace)) {
			forget(r.key, r.revision)
		}
		return len(txns) < most
	})
	v.statusLists.Scan(func(l *StatusList) bool {
		if now.After(l.EndsAt.Add(revocationGrace)) {
			forget(statusPrefix+l.ID, l.revision)
		}
		return len(txns) < most
	})
	is := make(map[string]bool)
	for _, a := range v.Authorities() {
		if a.Kind == X509 {
			is[a.ID] = true
		}
	}
	v.crls.Scan(func(c *CRL) bool {
		if !is[c.AuthorityID] {
			forget(crlPrefix+c.AuthorityID, c.revision)
		}
		return len(txns) < most
	})
	return txns
}

func (f *fold) applyRevocation(rec store.Record) error {
	if rec.Value == nil {
		f.revocations.delete(&Revocation{key: rec.Key})
		return nil
	}
	r, err := revocationFromRecord(rec)
	if err == nil {
		f.revocations.set(r)
	}
	return err
}

func (f *fold) applyCRL(id string, rec store.Record) error {
	if rec.Value == nil {
		f.crls.delete(&CRL{AuthorityID: id})
		return nil
	}
	c, err := crlFromRecord(id, rec)
	if err == nil {
		f.crls.set(c)
	}
	return err
}

func lessRevocation(a, b *Revocation) bool { return a.key < b.key }

func lessCRL(a, b *CRL) bool { return cmp.Less(a.AuthorityID, b.AuthorityID) }

// SerialNumber returns a serial number as revocations have it: without leading
// zeros.
func SerialNumber(b []byte) []byte { return []byte(strings.TrimLeft(string(b), "\x00")) }
