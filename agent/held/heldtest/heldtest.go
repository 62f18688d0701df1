// Package heldtest stands in for a server in tests of what an agent holds: a
// [Server] keeps entries, has authorities and signs for both.
package heldtest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// TrustDomain is the one of every Server.
var TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// Node is the parent of entries that name none.
var Node = spiffeid.RequireFromPath(TrustDomain, "/spire/agent/test")

// Lifetimes of what a Server signs, unless an entry or a test says otherwise.
const (
	X509TTL = time.Hour
	JWTTTL  = 5 * time.Minute
	WITTTL  = time.Hour
)

// Server is a server in memory. It implements [held.Signer].
type Server struct {
	t   testing.TB
	now func() time.Time

	mu       sync.Mutex
	revision int64
	entries  map[string]*entry.Entry
	created  time.Time
	seq      uint64
	x509     []*authority // the last one signs
	jwt      []*authority
	wit      []*authority
	noWIT    error
	down     error
	broken   map[string]error
	hold     chan struct{}
	waiting  chan struct{} // closed once a call waits on hold
	reached  bool          // it is closed
	x509s    [][]string
	jwts     []string
	wits     [][]string
	statuses string // URI of the status list; empty: tokens have none
	given    int    // indexes of it
}

type authority struct {
	key     *ecdsa.PrivateKey
	cert    *x509.Certificate // of X.509 authorities
	id      string            // of JWT and WIT authorities
	tainted bool
}

// New makes a server with one authority of each kind.
func New(t testing.TB) *Server {
	s := &Server{t: t, now: time.Now, entries: make(map[string]*entry.Entry), broken: make(map[string]error), created: time.Now()}
	s.Rotate()
	return s
}

// Rotate adds an authority of each kind, which signs from now on.
func (s *Server) Rotate() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	n := s.seq
	a := &authority{key: s.key()}
	now := s.now()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(int64(n)),
		Subject:               pkix.Name{CommonName: fmt.Sprintf("authority %d", n)},
		URIs:                  []*url.URL{TrustDomain.ID().URL()},
		NotBefore:             now.Add(-time.Minute),
		NotAfter:              now.Add(1000 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	a.cert = s.certify(template, template, a.key.Public(), a.key)
	s.x509 = append(s.x509, a)
	s.jwt = append(s.jwt, &authority{key: s.key(), id: fmt.Sprintf("key-%d", n)})
	s.wit = append(s.wit, &authority{key: s.key(), id: fmt.Sprintf("wit-%d", n)})
}

// CRL signs a CRL of the authority that signs X509-SVIDs, and returns it with the
// authority's ID.
func (s *Server) CRL(number int64, serials ...*big.Int) (authority string, der []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a := s.x509[len(s.x509)-1]
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: s.now(), NextUpdate: s.now().Add(time.Hour)}
	for _, serial := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: s.now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	s.must(err)
	return hex.EncodeToString(a.cert.SubjectKeyId), der
}

// Taint marks the first authority of each kind.
func (s *Server) Taint() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	s.x509[0].tainted, s.jwt[0].tainted, s.wit[0].tainted = true, true, true
}

// Revoke takes the first authority of each kind away.
func (s *Server) Revoke() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	s.x509, s.jwt, s.wit = s.x509[1:], s.jwt[1:], s.wit[1:]
}

// Bundle returns the bundle of the trust domain.
func (s *Server) Bundle() *bundle.Bundle {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := &bundle.Bundle{TrustDomain: TrustDomain, SequenceNumber: s.seq}
	for _, a := range s.x509 {
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: a.cert, Tainted: a.tainted})
	}
	for _, a := range s.jwt {
		b.JWTAuthorities = append(b.JWTAuthorities, bundle.JWTAuthority{KeyID: a.id, PublicKey: a.key.Public(), Tainted: a.tainted})
	}
	for _, a := range s.wit {
		b.WITAuthorities = append(b.WITAuthorities, bundle.JWTAuthority{KeyID: a.id, PublicKey: a.key.Public(), Tainted: a.tainted})
	}
	return b
}

// ForeignBundle makes the bundle of another trust domain.
func (s *Server) ForeignBundle(name string) *bundle.Bundle {
	b := New(s.t).Bundle()
	b.TrustDomain = spiffeid.RequireTrustDomainFromString(name)
	return b
}

// Entry makes an entry for /id that all of the selectors must match, and keeps
// it. Each is created a second after the one before.
func (s *Server) Entry(id string, change func(*entry.Entry), selectors ...string) *entry.Entry {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.created = s.created.Add(time.Second).Truncate(time.Second)
	e := &entry.Entry{
		ID: id, SPIFFEID: spiffeid.RequireFromPath(TrustDomain, "/"+id), ParentID: Node,
		Selectors: Selectors(selectors...), CreatedAt: s.created,
	}
	if change != nil {
		change(e)
	}
	if err := e.Validate(TrustDomain); err != nil {
		s.t.Fatal(err)
	}
	s.entries[e.ID] = e
	return e
}

// Update changes a copy of an entry and keeps it.
func (s *Server) Update(e *entry.Entry, change func(*entry.Entry)) *entry.Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := *e
	c.RevisionNumber++
	change(&c)
	s.entries[c.ID] = &c
	return &c
}

// Delete deletes an entry.
func (s *Server) Delete(e *entry.Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.entries, e.ID)
}

// Complete returns a change that is everything the server has.
func (s *Server) Complete(more ...*bundle.Bundle) held.Change {
	c := held.Change{Complete: true, Bundles: append([]*bundle.Bundle{s.Bundle()}, more...), X509TTL: X509TTL, JWTTTL: JWTTTL}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision++
	c.Revision = s.revision
	for _, e := range s.entries {
		c.Entries = append(c.Entries, e)
	}
	return c
}

// Selectors parses selectors.
func Selectors(selectors ...string) selector.Set {
	var out []selector.Selector
	for _, text := range selectors {
		x, err := selector.Parse(text)
		if err != nil {
			panic(err)
		}
		out = append(out, x)
	}
	return selector.NewSet(out...)
}

// Down makes every call fail, until it is given nil.
func (s *Server) Down(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down = err
}

// RefuseWIT makes every call to sign WIT-SVIDs fail, until it is given nil.
func (s *Server) RefuseWIT(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.noWIT = err
}

// Break makes signing for one entry fail, until it is given nil.
func (s *Server) Break(id string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken[id] = err
}

// Hold makes calls wait until the function that it returns is called.
func (s *Server) Hold() (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	hold := make(chan struct{})
	s.hold, s.waiting, s.reached = hold, make(chan struct{}), false
	return sync.OnceFunc(func() {
		s.mu.Lock()
		s.hold = nil
		s.mu.Unlock()
		close(hold)
	})
}

// Waiting returns what is closed once a call waits since Hold.
func (s *Server) Waiting() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.waiting
}

// X509Calls returns the entries of each call to sign X509-SVIDs so far.
func (s *Server) X509Calls() [][]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.x509s)
}

// JWTCalls returns the entry of each call to sign a JWT-SVID so far.
func (s *Server) JWTCalls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.jwts)
}

// WITCalls returns the entries of each call to sign WIT-SVIDs so far.
func (s *Server) WITCalls() [][]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.wits)
}

func (s *Server) wait(ctx context.Context) error {
	s.mu.Lock()
	hold, down := s.hold, s.down
	if hold != nil && !s.reached {
		s.reached = true
		close(s.waiting)
	}
	s.mu.Unlock()
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return down
}

// SignX509 signs as a server does.
func (s *Server) SignX509(ctx context.Context, requests []held.X509Request) ([]held.X509Result, error) {
	var ids []string
	for _, r := range requests {
		ids = append(ids, r.EntryID)
	}
	s.mu.Lock()
	s.x509s = append(s.x509s, ids)
	s.mu.Unlock()
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	results := make([]held.X509Result, len(requests))
	for i, r := range requests {
		results[i] = s.signX509(r)
	}
	return results, nil
}

func (s *Server) signX509(r held.X509Request) held.X509Result {
	csr, err := x509.ParseCertificateRequest(r.CSR)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		return held.X509Result{Err: err}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[r.EntryID]
	if err := s.broken[r.EntryID]; err != nil {
		return held.X509Result{Err: err}
	}
	if e == nil {
		return held.X509Result{Err: errors.New("entry not found or not authorized")}
	}
	ttl := X509TTL
	if e.X509SVIDTTL != 0 {
		ttl = e.X509SVIDTTL
	}
	now := s.now()
	ca := s.x509[len(s.x509)-1]
	cert := s.certify(&x509.Certificate{
		SerialNumber: new(big.Int).SetBytes([]byte(rand.Text()[:16])),
		URIs:         []*url.URL{e.SPIFFEID.URL()},
		DNSNames:     e.DNSNames,
		NotBefore:    now.Add(-10 * time.Second),
		NotAfter:     now.Add(ttl),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, ca.cert, csr.PublicKey, ca.key)
	return held.X509Result{Chain: [][]byte{cert.Raw}, ExpiresAt: cert.NotAfter}
}

// SignJWT signs as a server does.
func (s *Server) SignJWT(ctx context.Context, entryID string, audience []string) (held.JWTResult, error) {
	s.mu.Lock()
	s.jwts = append(s.jwts, entryID)
	s.mu.Unlock()
	if err := s.wait(ctx); err != nil {
		return held.JWTResult{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[entryID]
	if err := s.broken[entryID]; err != nil {
		return held.JWTResult{}, err
	}
	if e == nil {
		return held.JWTResult{}, errors.New("entry not found or not authorized")
	}
	ttl := JWTTTL
	if e.JWTSVIDTTL != 0 {
		ttl = e.JWTSVIDTTL
	}
	now := s.now()
	claims := map[string]any{"sub": e.SPIFFEID.String(), "aud": audience, "exp": now.Add(ttl).Unix(), "iat": now.Unix()}
	if e.JWTIncludeJTI {
		claims["jti"] = fmt.Sprint(len(s.jwts))
	}
	s.addStatus(claims)
	a := s.jwt[len(s.jwt)-1]
	return held.JWTResult{Token: s.token(a, "JWT", claims), IssuedAt: now, ExpiresAt: now.Add(ttl)}, nil
}

// SignWIT signs as a server does.
func (s *Server) SignWIT(ctx context.Context, requests []held.WITRequest) ([]held.WITResult, error) {
	var ids []string
	for _, r := range requests {
		ids = append(ids, r.EntryID)
	}
	s.mu.Lock()
	s.wits = append(s.wits, ids)
	refused := s.noWIT
	s.mu.Unlock()
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	if refused != nil {
		return nil, refused
	}
	results := make([]held.WITResult, len(requests))
	for i, r := range requests {
		results[i] = s.signWIT(r)
	}
	return results, nil
}

func (s *Server) signWIT(r held.WITRequest) held.WITResult {
	key, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil {
		return held.WITResult{Err: err}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[r.EntryID]
	if err := s.broken[r.EntryID]; err != nil {
		return held.WITResult{Err: err}
	}
	if e == nil {
		return held.WITResult{Err: errors.New("entry not found or not authorized")}
	}
	claims := map[string]any{
		"sub": e.SPIFFEID.String(), "exp": s.now().Add(WITTTL).Unix(),
		"cnf": map[string]any{"jwk": jose.JSONWebKey{Key: key, Algorithm: r.Algorithm}},
	}
	s.addStatus(claims)
	return held.WITResult{Token: s.token(s.wit[len(s.wit)-1], "wit+jwt", claims)}
}

// Statuses has tokens name a status list by its URI, and indexes of it from 0.
func (s *Server) Statuses(uri string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.statuses = uri
}

func (s *Server) addStatus(claims map[string]any) {
	if s.statuses == "" {
		return
	}
	claims["status"] = map[string]any{"status_list": map[string]any{"idx": s.given, "uri": s.statuses}}
	s.given++
}

// Token signs claims besides those that name the identity and its end.
func (s *Server) Token(id string, claims map[string]any) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := map[string]any{"sub": TrustDomain.IDString() + "/" + id, "exp": s.now().Add(JWTTTL).Unix()}
	maps.Copy(all, claims)
	a := s.jwt[len(s.jwt)-1]
	return s.token(a, "JWT", all)
}

func (s *Server) token(a *authority, typ jose.ContentType, claims map[string]any) string {
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.key, KeyID: a.id}},
		(&jose.SignerOptions{}).WithType(typ))
	s.must(err)
	payload, err := json.Marshal(claims)
	s.must(err)
	signed, err := signer.Sign(payload)
	s.must(err)
	token, err := signed.CompactSerialize()
	s.must(err)
	return token
}

func (s *Server) key() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	return key
}

func (s *Server) certify(template, parent *x509.Certificate, pub crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	s.must(err)
	cert, err := x509.ParseCertificate(der)
	s.must(err)
	return cert
}

func (s *Server) must(err error) {
	if err != nil {
		panic(err)
	}
}
