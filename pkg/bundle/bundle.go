// Package bundle defines the bundle: the public authorities of a trust domain.
//
// A [Bundle] is immutable. Its derived forms (the pool for verification, the
// concatenated DER and the JWK Sets that the Workload API serves) are made once
// and shared by all readers.
package bundle

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// X509Authority is one root of a bundle.
type X509Authority struct {
	Certificate *x509.Certificate
	Tainted     bool // trusted still, but what it signed is being replaced
	Upstream    bool // of the authority above this trust domain's server: it goes when that has it no more
}

// JWTAuthority is one key of a bundle that signs JWTs: JWT-SVIDs or WIT-SVIDs.
type JWTAuthority struct {
	KeyID     string
	PublicKey crypto.PublicKey
	ExpiresAt time.Time // zero is never
	Tainted   bool
	Upstream  bool // as of an X509Authority
}

// Bundle is the public authorities of one trust domain. Do not change it after
// it is shared; make another.
type Bundle struct {
	TrustDomain     spiffeid.TrustDomain
	X509Authorities []X509Authority
	JWTAuthorities  []JWTAuthority // of JWT-SVIDs
	WITAuthorities  []JWTAuthority // of WIT-SVIDs
	SequenceNumber  uint64         // rises by one at each change
	RefreshHint     time.Duration  // whole seconds; 0 is unset

	unknown []byte // what a newer version wrote into the record, as it came

	once    sync.Once
	derived derived
}

type derived struct {
	pool *x509.CertPool
	der  []byte
	jwt  keySet
	wit  keySet
}

// keySet is keys by their IDs, and as a JWK Set.
type keySet struct {
	keys map[string]crypto.PublicKey
	jwks []byte
}

func newKeySet(as []JWTAuthority) keySet {
	s := keySet{keys: make(map[string]crypto.PublicKey, len(as))}
	set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
	for _, a := range as {
		s.keys[a.KeyID] = a.PublicKey
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: a.PublicKey, KeyID: a.KeyID})
	}
	s.jwks, _ = json.Marshal(set) // public keys that were parsed always encode
	return s
}

func (b *Bundle) derive() *derived {
	b.once.Do(func() {
		d := &b.derived
		d.pool = x509.NewCertPool()
		for _, a := range b.X509Authorities {
			d.pool.AddCert(a.Certificate)
			d.der = append(d.der, a.Certificate.Raw...)
		}
		d.jwt, d.wit = newKeySet(b.JWTAuthorities), newKeySet(b.WITAuthorities)
	})
	return &b.derived
}

// Pool returns the X.509 authorities as a pool of roots. Do not change it.
func (b *Bundle) Pool() *x509.CertPool { return b.derive().pool }

// DER returns the X.509 authorities as concatenated DER, as the Workload API
// carries them. Do not change it.
func (b *Bundle) DER() []byte { return b.derive().der }

// JWKS returns the JWT authorities as a plain JWK Set (RFC 7517), as the
// Workload API carries them. Do not change it.
func (b *Bundle) JWKS() []byte { return b.derive().jwt.jwks }

// JWTKey returns the JWT authority with a key ID, or nil.
func (b *Bundle) JWTKey(kid string) crypto.PublicKey { return b.derive().jwt.keys[kid] }

// WITJWKS returns the WIT authorities as a plain JWK Set, as the Workload API
// carries them. Do not change it.
func (b *Bundle) WITJWKS() []byte { return b.derive().wit.jwks }

// WITKey returns the WIT authority with a key ID, or nil.
func (b *Bundle) WITKey(kid string) crypto.PublicKey { return b.derive().wit.keys[kid] }

// Document returns the SPIFFE bundle document: all authorities as one JWK Set,
// each with the kind of SVID that it signs, the sequence number and the refresh
// hint. Trust Domain and Bundle §4. Of the same bundle it is always the same, byte
// for byte, whichever server makes it.
func (b *Bundle) Document() ([]byte, error) {
	whole := spiffebundle.New(b.TrustDomain)
	whole.SetSequenceNumber(b.SequenceNumber)
	if b.RefreshHint > 0 {
		whole.SetRefreshHint(b.RefreshHint)
	}
	for _, a := range b.X509Authorities {
		whole.AddX509Authority(a.Certificate)
	}
	for _, a := range b.JWTAuthorities {
		if err := whole.AddJWTAuthority(a.KeyID, a.PublicKey); err != nil {
			return nil, fmt.Errorf("JWT authority: %w", err)
		}
	}
	for _, a := range b.WITAuthorities {
		if err := whole.AddWITAuthority(a.KeyID, a.PublicKey); err != nil {
			return nil, fmt.Errorf("WIT authority: %w", err)
		}
	}
	text, err := whole.Marshal()
	if err != nil {
		return nil, err
	}
	// The library has the keys of tokens in no order.
	var d struct {
		Keys     []json.RawMessage `json:"keys"`
		Sequence uint64            `json:"spiffe_sequence"`
		Hint     int64             `json:"spiffe_refresh_hint,omitempty"`
	}
	if err := json.Unmarshal(text, &d); err != nil {
		return nil, err
	}
	slices.SortFunc(d.Keys[len(b.X509Authorities):], func(x, y json.RawMessage) int { return bytes.Compare(x, y) })
	return json.Marshal(d)
}

// HasKeyID reports whether a JWT or WIT authority has a key ID. In one bundle
// it names one key, whatever that signs: WIT-SVID §6.1.
func (b *Bundle) HasKeyID(kid string) bool {
	named := func(a JWTAuthority) bool { return a.KeyID == kid }
	return slices.ContainsFunc(b.JWTAuthorities, named) || slices.ContainsFunc(b.WITAuthorities, named)
}

// HasX509 reports whether the bundle holds the certificate.
func (b *Bundle) HasX509(cert *x509.Certificate) bool {
	return slices.ContainsFunc(b.X509Authorities, func(a X509Authority) bool {
		return bytes.Equal(a.Certificate.Raw, cert.Raw)
	})
}

// RootHashes returns the SHA-256 of each X.509 authority's DER.
func (b *Bundle) RootHashes() [][]byte {
	out := make([][]byte, len(b.X509Authorities))
	for i, a := range b.X509Authorities {
		sum := sha256.Sum256(a.Certificate.Raw)
		out[i] = sum[:]
	}
	return out
}

// FromRecord reads the stored form. It fails if a certificate or key does not
// parse.
func FromRecord(r *hallmarkv1.Bundle) (*Bundle, error) {
	td, err := spiffeid.TrustDomainFromString(r.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	b := &Bundle{
		TrustDomain:    td,
		SequenceNumber: r.SequenceNumber,
		RefreshHint:    time.Duration(r.RefreshHint) * time.Second,
		unknown:        r.ProtoReflect().GetUnknown(),
	}
	for i, a := range r.X509Authorities {
		cert, err := x509.ParseCertificate(a.Asn1)
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: X.509 authority %d: %w", td.Name(), i, err)
		}
		b.X509Authorities = append(b.X509Authorities, X509Authority{Certificate: cert, Tainted: a.Tainted, Upstream: a.Upstream})
	}
	if b.JWTAuthorities, err = jwtAuthorities(r.JwtAuthorities); err != nil {
		return nil, fmt.Errorf("bundle of %s: JWT authority %w", td.Name(), err)
	}
	if b.WITAuthorities, err = jwtAuthorities(r.WitAuthorities); err != nil {
		return nil, fmt.Errorf("bundle of %s: WIT authority %w", td.Name(), err)
	}
	return b, nil
}

func jwtAuthorities(rs []*hallmarkv1.JWTAuthority) ([]JWTAuthority, error) {
	var as []JWTAuthority
	for _, r := range rs {
		key, err := x509.ParsePKIXPublicKey(r.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", r.KeyId, err)
		}
		as = append(as, JWTAuthority{KeyID: r.KeyId, PublicKey: key, Tainted: r.Tainted, Upstream: r.Upstream, ExpiresAt: timeOf(r.ExpiresAt)})
	}
	return as, nil
}

// Record returns the stored form. It fails if an authority has a key of an
// unknown kind.
func (b *Bundle) Record() (*hallmarkv1.Bundle, error) {
	r := &hallmarkv1.Bundle{
		TrustDomain:    b.TrustDomain.Name(),
		SequenceNumber: b.SequenceNumber,
		RefreshHint:    int64(b.RefreshHint / time.Second),
	}
	for _, a := range b.X509Authorities {
		r.X509Authorities = append(r.X509Authorities, &hallmarkv1.X509Authority{Asn1: a.Certificate.Raw, Tainted: a.Tainted, Upstream: a.Upstream})
	}
	var err error
	if r.JwtAuthorities, err = jwtRecords(b.JWTAuthorities); err != nil {
		return nil, fmt.Errorf("bundle of %s: JWT authority %w", r.TrustDomain, err)
	}
	if r.WitAuthorities, err = jwtRecords(b.WITAuthorities); err != nil {
		return nil, fmt.Errorf("bundle of %s: WIT authority %w", r.TrustDomain, err)
	}
	if len(b.unknown) > 0 {
		r.ProtoReflect().SetUnknown(b.unknown)
	}
	return r, nil
}

func jwtRecords(as []JWTAuthority) ([]*hallmarkv1.JWTAuthority, error) {
	var rs []*hallmarkv1.JWTAuthority
	for _, a := range as {
		der, err := x509.MarshalPKIXPublicKey(a.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", a.KeyID, err)
		}
		rs = append(rs, &hallmarkv1.JWTAuthority{KeyId: a.KeyID, PublicKey: der, Tainted: a.Tainted, Upstream: a.Upstream, ExpiresAt: unixOf(a.ExpiresAt)})
	}
	return rs, nil
}

// Clone returns a copy that may be changed, without derived forms.
func (b *Bundle) Clone() *Bundle {
	return &Bundle{
		TrustDomain:     b.TrustDomain,
		X509Authorities: slices.Clone(b.X509Authorities),
		JWTAuthorities:  slices.Clone(b.JWTAuthorities),
		WITAuthorities:  slices.Clone(b.WITAuthorities),
		SequenceNumber:  b.SequenceNumber,
		RefreshHint:     b.RefreshHint,
		unknown:         b.unknown,
	}
}

// String names the bundle and what it holds, for logs.
func (b *Bundle) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s #%d: %d X.509, %d JWT", b.TrustDomain.Name(), b.SequenceNumber, len(b.X509Authorities), len(b.JWTAuthorities))
	if n := len(b.WITAuthorities); n > 0 {
		fmt.Fprintf(&s, ", %d WIT", n)
	}
	return s.String()
}

func timeOf(unix int64) time.Time {
	if unix == 0 {
		return time.Time{}
	}
	return time.Unix(unix, 0)
}

func unixOf(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
