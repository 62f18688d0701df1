package api

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// The wire's types stop here: what follows turns them into the domain's and
// back. An error names the field that is wrong.

// idFromWire reads a SPIFFE ID. The path may lack its leading slash.
func idFromWire(w *types.SPIFFEID) (spiffeid.ID, error) {
	if w == nil || w.TrustDomain == "" && w.Path == "" {
		return spiffeid.ID{}, errors.New("SPIFFE ID is missing")
	}
	td, err := spiffeid.TrustDomainFromString(w.TrustDomain)
	if err != nil {
		return spiffeid.ID{}, err
	}
	path := w.Path
	if path != "" && !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	return spiffeid.FromPath(td, path)
}

func idToWire(id spiffeid.ID) *types.SPIFFEID {
	if id.IsZero() {
		return nil
	}
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func selectorsFromWire(ws []*types.Selector) selector.Set {
	set := make(selector.Set, len(ws))
	for i, w := range ws {
		set[i] = selector.Selector{Type: w.GetType(), Value: w.GetValue()}
	}
	return set
}

func selectorsToWire(set selector.Set) []*types.Selector {
	values, ws := make([]types.Selector, len(set)), make([]*types.Selector, len(set))
	for i, s := range set {
		w := &values[i]
		w.Type, w.Value = s.Type, s.Value
		ws[i] = w
	}
	return ws
}

// maxUnix is the last second of the year 9999, the end of what certificates
// can say. RFC 5280 §4.1.2.5.
const maxUnix = 253402300799

func timeFromWire(what string, unix int64) (time.Time, error) {
	switch {
	case unix == 0:
		return time.Time{}, nil
	case unix < 0:
		return time.Time{}, fmt.Errorf("%s lies before 1970", what)
	case unix > maxUnix:
		return time.Time{}, fmt.Errorf("%s lies after the year 9999", what)
	}
	return time.Unix(unix, 0), nil
}

func timeToWire(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}

// wholeEntry is what a missing mask of an entry means.
var wholeEntry = &types.EntryMask{
	SpiffeId: true, ParentId: true, Selectors: true, X509SvidTtl: true, FederatesWith: true,
	Admin: true, Downstream: true, ExpiresAt: true, DnsNames: true, RevisionNumber: true,
	StoreSvid: true, JwtSvidTtl: true, Hint: true, CreatedAt: true, AdditionalAttributes: true,
}

// entryToWire turns an entry into the wire's form: its ID and the fields that
// the mask names; all, if there is none.
func entryToWire(e *entry.Entry, mask *types.EntryMask) *types.Entry {
	if mask == nil {
		mask = wholeEntry
	}
	both := new(struct { // one allocation, as lists are long
		entry      types.Entry
		id, parent types.SPIFFEID
	})
	w := &both.entry
	w.Id = e.ID
	if mask.SpiffeId {
		both.id.TrustDomain, both.id.Path = e.SPIFFEID.TrustDomain().Name(), e.SPIFFEID.Path()
		w.SpiffeId = &both.id
	}
	if mask.ParentId {
		both.parent.TrustDomain, both.parent.Path = e.ParentID.TrustDomain().Name(), e.ParentID.Path()
		w.ParentId = &both.parent
	}
	if mask.Selectors {
		w.Selectors = selectorsToWire(e.Selectors)
	}
	if mask.X509SvidTtl {
		w.X509SvidTtl = int32(e.X509SVIDTTL / time.Second)
	}
	if mask.JwtSvidTtl {
		w.JwtSvidTtl = int32(e.JWTSVIDTTL / time.Second)
	}
	if mask.FederatesWith {
		for _, td := range e.FederatesWith {
			w.FederatesWith = append(w.FederatesWith, td.Name())
		}
	}
	if mask.Admin {
		w.Admin = e.Admin
	}
	if mask.Downstream {
		w.Downstream = e.Downstream
	}
	if mask.StoreSvid {
		w.StoreSvid = e.StoreSVID
	}
	if mask.ExpiresAt {
		w.ExpiresAt = timeToWire(e.ExpiresAt)
	}
	if mask.DnsNames {
		w.DnsNames = e.DNSNames
	}
	if mask.Hint {
		w.Hint = e.Hint
	}
	if mask.RevisionNumber {
		w.RevisionNumber = e.RevisionNumber
	}
	if mask.CreatedAt {
		w.CreatedAt = timeToWire(e.CreatedAt)
	}
	if mask.AdditionalAttributes && (e.DisableX509Prefetch || e.JWTIncludeJTI) {
		w.AdditionalAttributes = &types.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: e.DisableX509Prefetch,
			JwtSvidIncludeJti:       e.JWTIncludeJTI,
		}
	}
	return w
}

// entryFromWire reads the fields of an entry that the mask names and that a
// client may set; all of those, if there is no mask. It returns a function
// that puts them into an entry. What they say together is for
// [entry.Entry.Validate] to check.
func entryFromWire(w *types.Entry, mask *types.EntryMask) (set func(*entry.Entry), err error) {
	if w == nil {
		return nil, errors.New("entry is missing")
	}
	if mask == nil {
		mask = wholeEntry
	}
	var from entry.Entry
	if mask.SpiffeId {
		if from.SPIFFEID, err = idFromWire(w.SpiffeId); err != nil {
			return nil, fmt.Errorf("spiffe_id: %w", err)
		}
	}
	if mask.ParentId {
		if from.ParentID, err = idFromWire(w.ParentId); err != nil {
			return nil, fmt.Errorf("parent_id: %w", err)
		}
	}
	if mask.FederatesWith {
		for _, name := range w.FederatesWith {
			td, err := spiffeid.TrustDomainFromString(name)
			if err != nil {
				return nil, fmt.Errorf("federates_with %q: %w", name, err)
			}
			from.FederatesWith = append(from.FederatesWith, td)
		}
	}
	if mask.ExpiresAt {
		if from.ExpiresAt, err = timeFromWire("expires_at", w.ExpiresAt); err != nil {
			return nil, err
		}
	}
	return func(e *entry.Entry) {
		if mask.SpiffeId {
			e.SPIFFEID = from.SPIFFEID
		}
		if mask.ParentId {
			e.ParentID = from.ParentID
		}
		if mask.Selectors {
			e.Selectors = selectorsFromWire(w.Selectors)
		}
		if mask.X509SvidTtl {
			e.X509SVIDTTL = time.Duration(w.X509SvidTtl) * time.Second
		}
		if mask.JwtSvidTtl {
			e.JWTSVIDTTL = time.Duration(w.JwtSvidTtl) * time.Second
		}
		if mask.FederatesWith {
			e.FederatesWith = from.FederatesWith
		}
		if mask.Admin {
			e.Admin = w.Admin
		}
		if mask.Downstream {
			e.Downstream = w.Downstream
		}
		if mask.StoreSvid {
			e.StoreSVID = w.StoreSvid
		}
		if mask.ExpiresAt {
			e.ExpiresAt = from.ExpiresAt
		}
		if mask.DnsNames {
			e.DNSNames = w.DnsNames
		}
		if mask.Hint {
			e.Hint = w.Hint
		}
		if mask.AdditionalAttributes {
			e.DisableX509Prefetch = w.AdditionalAttributes.GetDisableX509SvidPrefetch()
			e.JWTIncludeJTI = w.AdditionalAttributes.GetJwtSvidIncludeJti()
		}
	}, nil
}

// wholeBundle is what a missing mask of a bundle means.
var wholeBundle = &types.BundleMask{
	X509Authorities: true, JwtAuthorities: true, RefreshHint: true, SequenceNumber: true, WitAuthorities: true,
}

// bundleToWire turns a bundle into the wire's form: its trust domain and the
// fields that the mask names; all, if there is none.
func bundleToWire(b *bundle.Bundle, mask *types.BundleMask) (*types.Bundle, error) {
	if mask == nil {
		mask = wholeBundle
	}
	w := &types.Bundle{TrustDomain: b.TrustDomain.Name()}
	if mask.X509Authorities {
		for _, a := range b.X509Authorities {
			w.X509Authorities = append(w.X509Authorities, &types.X509Certificate{Asn1: a.Certificate.Raw, Tainted: a.Tainted})
		}
	}
	if mask.JwtAuthorities {
		var err error
		if w.JwtAuthorities, err = jwtAuthoritiesToWire(b.JWTAuthorities); err != nil {
			return nil, err
		}
	}
	if mask.WitAuthorities {
		var err error
		if w.WitAuthorities, err = witAuthoritiesToWire(b.WITAuthorities); err != nil {
			return nil, err
		}
	}
	if mask.RefreshHint {
		w.RefreshHint = int64(b.RefreshHint / time.Second)
	}
	if mask.SequenceNumber {
		w.SequenceNumber = b.SequenceNumber
	}
	return w, nil
}

func jwtAuthoritiesToWire(as []bundle.JWTAuthority) ([]*types.JWTKey, error) {
	ws := make([]*types.JWTKey, len(as))
	for i, a := range as {
		der, err := x509.MarshalPKIXPublicKey(a.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("encode authority %q: %w", a.KeyID, err)
		}
		ws[i] = &types.JWTKey{PublicKey: der, KeyId: a.KeyID, ExpiresAt: timeToWire(a.ExpiresAt), Tainted: a.Tainted}
	}
	return ws, nil
}

func witAuthoritiesToWire(as []bundle.JWTAuthority) ([]*types.WITKey, error) {
	keys, err := jwtAuthoritiesToWire(as)
	if err != nil {
		return nil, err
	}
	ws := make([]*types.WITKey, len(keys))
	for i, k := range keys {
		ws[i] = &types.WITKey{PublicKey: k.PublicKey, KeyId: k.KeyId, ExpiresAt: k.ExpiresAt, Tainted: k.Tainted}
	}
	return ws, nil
}

// Bounds of one bundle. Together they keep its record below what a store
// takes.
const (
	maxAuthorities = 500       // of one kind
	maxBundleBytes = 512 << 10 // certificates and keys, encoded
	maxKeyID       = 255       // bytes
	minRSABits     = 2048      // NIST SP 800-131A
	maxRSABits     = 8192      // what verifying a token may cost
)

// bundleFromWire reads the fields of a bundle that the mask names; all, if
// there is none. It returns the trust domain and a function that puts the
// fields into a bundle.
func bundleFromWire(w *types.Bundle, mask *types.BundleMask) (td spiffeid.TrustDomain, set func(*bundle.Bundle), err error) {
	if w == nil {
		return td, nil, errors.New("bundle is missing")
	}
	if td, err = trustDomainFromWire(w.TrustDomain); err != nil {
		return td, nil, err
	}
	if mask == nil {
		mask = wholeBundle
	}
	from, err := authoritiesFromWire(w, mask)
	if err != nil {
		return td, nil, err
	}
	if mask.RefreshHint {
		if w.RefreshHint < 0 || w.RefreshHint > math.MaxInt32 {
			return td, nil, fmt.Errorf("refresh hint is %d seconds; it must be 0 to %d", w.RefreshHint, math.MaxInt32)
		}
		from.RefreshHint = time.Duration(w.RefreshHint) * time.Second
	}
	return td, func(b *bundle.Bundle) {
		if mask.X509Authorities {
			b.X509Authorities = from.X509Authorities
		}
		if mask.JwtAuthorities {
			b.JWTAuthorities = from.JWTAuthorities
		}
		if mask.WitAuthorities {
			b.WITAuthorities = from.WITAuthorities
		}
		if mask.RefreshHint {
			b.RefreshHint = from.RefreshHint
		}
		if mask.SequenceNumber {
			b.SequenceNumber = w.SequenceNumber
		}
	}, nil
}

// authoritiesFromWire reads the authorities of a bundle that the mask names.
func authoritiesFromWire(w *types.Bundle, mask *types.BundleMask) (*bundle.Bundle, error) {
	b := &bundle.Bundle{}
	var err error
	if mask.X509Authorities {
		if b.X509Authorities, err = x509AuthoritiesFromWire(w.X509Authorities); err != nil {
			return nil, err
		}
	}
	if mask.JwtAuthorities {
		if b.JWTAuthorities, err = jwtAuthoritiesFromWire("JWT", w.JwtAuthorities); err != nil {
			return nil, err
		}
	}
	if mask.WitAuthorities {
		if b.WITAuthorities, err = jwtAuthoritiesFromWire("WIT", w.WitAuthorities); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func trustDomainFromWire(name string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	if err != nil {
		return td, fmt.Errorf("trust domain %q is not valid: %w", name, err)
	}
	return td, nil
}

func x509AuthoritiesFromWire(ws []*types.X509Certificate) ([]bundle.X509Authority, error) {
	if len(ws) > maxAuthorities {
		return nil, fmt.Errorf("bundle has %d X.509 authorities; the most is %d", len(ws), maxAuthorities)
	}
	as := make([]bundle.X509Authority, 0, len(ws))
	size, seen := 0, make(map[string]bool, len(ws))
	for i, w := range ws {
		if size += len(w.GetAsn1()); size > maxBundleBytes {
			return nil, fmt.Errorf("X.509 authorities are over %d bytes together", maxBundleBytes)
		}
		cert, err := x509.ParseCertificate(w.GetAsn1())
		if err != nil {
			return nil, indexed("X.509 authority", i, err)
		}
		// X509-SVID §4.1: a signing certificate has cA set. A leaf among the
		// roots would be trusted by verifiers that do not look.
		if !cert.BasicConstraintsValid || !cert.IsCA {
			return nil, indexed("X.509 authority", i, errors.New("not a CA certificate"))
		}
		if seen[string(cert.Raw)] {
			continue
		}
		seen[string(cert.Raw)] = true
		as = append(as, bundle.X509Authority{Certificate: cert, Tainted: w.Tainted})
	}
	return as, nil
}

// jwtKey is a key of the wire's that signs JWTs: a [types.JWTKey] or a
// [types.WITKey].
type jwtKey interface {
	comparable
	GetPublicKey() []byte
	GetKeyId() string
	GetExpiresAt() int64
	GetTainted() bool
}

func jwtAuthoritiesFromWire[K jwtKey](kind string, ws []K) ([]bundle.JWTAuthority, error) {
	if len(ws) > maxAuthorities {
		return nil, fmt.Errorf("bundle has %d %s authorities; the most is %d", len(ws), kind, maxAuthorities)
	}
	as := make([]bundle.JWTAuthority, 0, len(ws))
	size := 0
	for i, w := range ws {
		if size += len(w.GetPublicKey()); size > maxBundleBytes {
			return nil, fmt.Errorf("%s authorities are over %d bytes together", kind, maxBundleBytes)
		}
		a, err := jwtAuthorityFromWire(kind, w)
		if err != nil {
			return nil, indexed(kind+" authority", i, err)
		}
		if as, _, err = withJWTAuthority(as, a); err != nil {
			return nil, indexed(kind+" authority", i, err)
		}
	}
	return as, nil
}

func jwtAuthorityFromWire[K jwtKey](kind string, w K) (bundle.JWTAuthority, error) {
	a := bundle.JWTAuthority{KeyID: w.GetKeyId(), Tainted: w.GetTainted()}
	var none K
	switch n := len(a.KeyID); {
	case w == none:
		return a, fmt.Errorf("missing %s authority", kind)
	case n == 0:
		return a, errors.New("missing key ID")
	case n > maxKeyID:
		return a, fmt.Errorf("key ID is %d bytes long; the most is %d", n, maxKeyID)
	}
	key, err := x509.ParsePKIXPublicKey(w.GetPublicKey())
	if err != nil {
		return a, fmt.Errorf("key %q is no PKIX public key: %w", a.KeyID, err)
	}
	switch k := key.(type) { // JWT-SVID §2.1, WIT-SVID §2.3: RSA or ECDSA
	case *ecdsa.PublicKey:
		if k.Curve.Params().BitSize < 256 {
			return a, fmt.Errorf("key %q is on curve %s; P-256 is the least", a.KeyID, k.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return a, fmt.Errorf("key %q is an RSA key of %d bits; it must have %d to %d", a.KeyID, n, minRSABits, maxRSABits)
		}
	default:
		return a, fmt.Errorf("key %q is of type %T; JWTs are signed with RSA or ECDSA", a.KeyID, key)
	}
	a.PublicKey = key
	if a.ExpiresAt, err = timeFromWire("expires_at", w.GetExpiresAt()); err != nil {
		return a, fmt.Errorf("key %q: %w", a.KeyID, err)
	}
	return a, nil
}

// withJWTAuthority adds a JWT authority to those of a bundle unless it is
// there. A key ID names one key: one that names another is refused.
func withJWTAuthority(as []bundle.JWTAuthority, a bundle.JWTAuthority) (_ []bundle.JWTAuthority, added bool, err error) {
	for _, b := range as {
		if b.KeyID != a.KeyID {
			continue
		}
		if !sameKey(b.PublicKey, a.PublicKey) {
			return as, false, fmt.Errorf("key ID %q names another key already", a.KeyID)
		}
		return as, false, nil
	}
	return append(as, a), true, nil
}

// withJWTAuthorities adds authorities of one kind to those of a bundle, of which
// the expired ones go if any is new. In one bundle a key ID names one key,
// whatever that signs (WIT-SVID §6.1): one that is among those of the other
// kind is refused.
func withJWTAuthorities(as, more, other []bundle.JWTAuthority, expired func(bundle.JWTAuthority) bool) ([]bundle.JWTAuthority, error) {
	for _, a := range more {
		if slices.ContainsFunc(other, func(o bundle.JWTAuthority) bool { return o.KeyID == a.KeyID }) {
			return nil, fmt.Errorf("key ID %q names a key that signs other SVIDs already", a.KeyID)
		}
		with, added, err := withJWTAuthority(as, a)
		if err != nil {
			return nil, err
		}
		if added {
			as = slices.DeleteFunc(with, expired)
		}
	}
	return as, nil
}

// sameKey reports whether two public keys are the same.
func sameKey(a, b crypto.PublicKey) bool {
	k, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && k.Equal(b)
}
