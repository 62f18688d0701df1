// Package bundle defines the bundle: the public authorities of a trust domain.
//
// A [Bundle] is immutable. Its derived forms (the pool for verification, the
// concatenated DER and the JWK Set that the Workload API serves) are made once
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
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// X509Authority is one root of a bundle.
type X509Authority struct {
	Certificate *x509.Certificate
	Tainted     bool // trusted still, but what it signed is being replaced
}

// JWTAuthority is one JWT key of a bundle.
type JWTAuthority struct {
	KeyID     string
	PublicKey crypto.PublicKey
	ExpiresAt time.Time // zero is never
	Tainted   bool
}

// Bundle is the public authorities of one trust domain. Do not change it after
// it is shared; make another.
type Bundle struct {
	TrustDomain     spiffeid.TrustDomain
	X509Authorities []X509Authority
	JWTAuthorities  []JWTAuthority
	SequenceNumber  uint64        // rises by one at each change
	RefreshHint     time.Duration // whole seconds; 0 is unset

	once    sync.Once
	derived derived
}

type derived struct {
	pool *x509.CertPool
	der  []byte
	jwks []byte
	keys map[string]crypto.PublicKey
}

func (b *Bundle) derive() *derived {
	b.once.Do(func() {
		d := &b.derived
		d.pool = x509.NewCertPool()
		for _, a := range b.X509Authorities {
			d.pool.AddCert(a.Certificate)
			d.der = append(d.der, a.Certificate.Raw...)
		}
		set := jose.JSONWebKeySet{Keys: []jose.JSONWebKey{}}
		d.keys = make(map[string]crypto.PublicKey, len(b.JWTAuthorities))
		for _, a := range b.JWTAuthorities {
			d.keys[a.KeyID] = a.PublicKey
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: a.PublicKey, KeyID: a.KeyID})
		}
		d.jwks, _ = json.Marshal(set) // public keys that were parsed always encode
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
func (b *Bundle) JWKS() []byte { return b.derive().jwks }

// JWTKey returns the JWT authority with a key ID, or nil.
func (b *Bundle) JWTKey(kid string) crypto.PublicKey { return b.derive().keys[kid] }

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
	}
	for i, a := range r.X509Authorities {
		cert, err := x509.ParseCertificate(a.Asn1)
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: X.509 authority %d: %w", td.Name(), i, err)
		}
		b.X509Authorities = append(b.X509Authorities, X509Authority{Certificate: cert, Tainted: a.Tainted})
	}
	for _, a := range r.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(a.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: JWT authority %q: %w", td.Name(), a.KeyId, err)
		}
		b.JWTAuthorities = append(b.JWTAuthorities, JWTAuthority{
			KeyID: a.KeyId, PublicKey: key, Tainted: a.Tainted, ExpiresAt: timeOf(a.ExpiresAt),
		})
	}
	return b, nil
}

// Record returns the stored form. It fails if a JWT authority has a key of an
// unknown kind.
func (b *Bundle) Record() (*hallmarkv1.Bundle, error) {
	r := &hallmarkv1.Bundle{
		TrustDomain:    b.TrustDomain.Name(),
		SequenceNumber: b.SequenceNumber,
		RefreshHint:    int64(b.RefreshHint / time.Second),
	}
	for _, a := range b.X509Authorities {
		r.X509Authorities = append(r.X509Authorities, &hallmarkv1.X509Authority{Asn1: a.Certificate.Raw, Tainted: a.Tainted})
	}
	for _, a := range b.JWTAuthorities {
		der, err := x509.MarshalPKIXPublicKey(a.PublicKey)
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: JWT authority %q: %w", r.TrustDomain, a.KeyID, err)
		}
		r.JwtAuthorities = append(r.JwtAuthorities, &hallmarkv1.JWTAuthority{
			KeyId: a.KeyID, PublicKey: der, Tainted: a.Tainted, ExpiresAt: unixOf(a.ExpiresAt),
		})
	}
	return r, nil
}

// Clone returns a copy that may be changed, without derived forms.
func (b *Bundle) Clone() *Bundle {
	return &Bundle{
		TrustDomain:     b.TrustDomain,
		X509Authorities: slices.Clone(b.X509Authorities),
		JWTAuthorities:  slices.Clone(b.JWTAuthorities),
		SequenceNumber:  b.SequenceNumber,
		RefreshHint:     b.RefreshHint,
	}
}

// String names the bundle and what it holds, for logs.
func (b *Bundle) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s #%d: %d X.509, %d JWT", b.TrustDomain.Name(), b.SequenceNumber, len(b.X509Authorities), len(b.JWTAuthorities))
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
