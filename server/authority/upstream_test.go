package authority_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"math/big"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

// ca is a certificate with its key.
type ca struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// newCA makes a CA below another (nil: it is a root).
func newCA(t testing.TB, w *world, cn string, above *ca, change ...func(*x509.Certificate)) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return newCAWith(t, w, cn, above, key, change...)
}

func newCAWith(t testing.TB, w *world, cn string, above *ca, key crypto.Signer, change ...func(*x509.Certificate)) *ca {
	t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(authority.Serial()), Subject: pkix.Name{CommonName: cn},
		NotBefore: w.time().Add(-time.Hour), NotAfter: w.time().Add(30 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	for _, c := range change {
		c(tmpl)
	}
	parent, signer := tmpl, key
	if above != nil {
		parent, signer = above.cert, above.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{cert, key}
}

// above is an upstream in this process, which can lie.
type above struct {
	t testing.TB
	w *world

	mu     sync.Mutex
	signer *ca   // nil: it is out of order
	chain  []*ca // between signer and the root
	roots  []*x509.Certificate
	lie    func(tmpl *x509.Certificate, public *any)                         // before it signs
	swap   func(chain, roots []*x509.Certificate) (_, _ []*x509.Certificate) // after it has signed
	tells  *bundle.Bundle                                                    // what is to be trusted; nil: it is out of order
	whole  bool
	keys   []bundle.JWTAuthority // that were published
}

func newAbove(w *world) *above {
	root := newCA(w.tb, w, "root", nil)
	return &above{t: w.tb, w: w, signer: root, roots: []*x509.Certificate{root.cert}}
}

func (u *above) Name() (kind, address string) { return "test", "here" }

var errOutOfOrder = errors.New("out of order")

func (u *above) Sign(_ context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.signer == nil {
		return nil, nil, errOutOfOrder
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	id, err := authority.KeyID(spki)
	if err != nil {
		return nil, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(authority.Serial()), Subject: csr.Subject, URIs: csr.URIs, SubjectKeyId: id,
		NotBefore: u.w.time().Add(-time.Minute), NotAfter: u.w.time().Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, MaxPathLen: -1,
	}
	public := any(csr.PublicKey)
	if u.lie != nil {
		u.lie(tmpl, &public)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, u.signer.cert, public, u.signer.key)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	chain = []*x509.Certificate{cert}
	for _, c := range u.chain {
		chain = append(chain, c.cert)
	}
	roots = u.roots
	if u.swap != nil {
		chain, roots = u.swap(chain, roots)
	}
	return chain, roots, nil
}

func (u *above) set(change func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	change()
}

// following is an above that says what is to be trusted, and publishes.
type following struct{ *above }

func (u following) Bundle(context.Context) (*bundle.Bundle, bool, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.tells == nil {
		return nil, false, errOutOfOrder
	}
	b := u.tells.Clone()
	if u.whole {
		b.JWTAuthorities = append(b.JWTAuthorities, u.keys...)
	}
	return b, u.whole, nil
}

// publishing is a server above.
type publishing struct{ following }

func (u publishing) Publish(_ context.Context, _ registry.AuthorityKind, key bundle.JWTAuthority) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.tells == nil {
		return errOutOfOrder
	}
	if !slices.ContainsFunc(u.keys, func(k bundle.JWTAuthority) bool { return k.KeyID == key.KeyID }) {
		u.keys = append(u.keys, key)
	}
	return nil
}

func below(up authority.Upstream) func(*authority.Options) {
	return func(o *authority.Options) { o.Upstream, o.WIT = up, false }
}

// What a hostile or mistaken upstream returns is refused, each by what is wrong
// with it, and leaves nothing behind.
func TestUpstream_X09_X10_X11_X14_X16_X17_X21_ID24_RF07_RF11_RF17_WhatLiesIsRefused(t *testing.T) {
	tamper := func(change func(*x509.Certificate)) func(*above) {
		return func(u *above) { u.lie = func(c *x509.Certificate, _ *any) { change(c) } }
	}
	swap := func(change func(u *above, chain, roots []*x509.Certificate) (_, _ []*x509.Certificate)) func(*above) {
		return func(u *above) {
			u.swap = func(chain, roots []*x509.Certificate) (_, _ []*x509.Certificate) { return change(u, chain, roots) }
		}
	}
	// under makes the upstream sign with an authority below its root.
	under := func(change ...func(*x509.Certificate)) func(*above) {
		return func(u *above) {
			u.signer = newCA(u.t, u.w, "issuing", u.signer, change...)
			u.chain = []*ca{u.signer}
		}
	}
	rooted := func(change ...func(*x509.Certificate)) func(*above) {
		return func(u *above) {
			u.signer = newCA(u.t, u.w, "another root", nil, change...)
			u.roots = []*x509.Certificate{u.signer.cert}
		}
	}
	uri := func(text string) *url.URL {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	for name, test := range map[string]struct {
		lie  func(*above)
		says string
	}{
		"another key": {func(u *above) {
			u.lie = func(_ *x509.Certificate, public *any) { *public = newCA(t, u.w, "x", nil).key.Public() }
		}, "not of this server's key"},
		"no certificate": {swap(func(_ *above, _, roots []*x509.Certificate) (_, _ []*x509.Certificate) { return nil, roots }), "no certificate"},
		"no root":        {swap(func(_ *above, chain, _ []*x509.Certificate) (_, _ []*x509.Certificate) { return chain, nil }), "no root"},
		"another root": {swap(func(u *above, chain, _ []*x509.Certificate) (_, _ []*x509.Certificate) {
			return chain, []*x509.Certificate{newCA(t, u.w, "root", nil).cert}
		}), "none of the 1 roots signed"},
		"a root that is a leaf": {rooted(func(c *x509.Certificate) { c.IsCA = false }), "not that of an authority"},
		"itself as a root": {swap(func(_ *above, chain, roots []*x509.Certificate) (_, _ []*x509.Certificate) {
			return chain, append([]*x509.Certificate{chain[0]}, roots...)
		}), "among the roots"},
		"a leaf":                   {tamper(func(c *x509.Certificate) { c.IsCA = false; c.MaxPathLen = 0 }), "not that of an authority"},
		"without keyCertSign":      {tamper(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), "keyCertSign"},
		"no URI":                   {tamper(func(c *x509.Certificate) { c.URIs = nil }), "the URI spiffe://example.org"},
		"another trust domain":     {tamper(func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://evil.example")} }), "evil.example"},
		"a workload's URI":         {tamper(func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://example.org/web")} }), "example.org/web"},
		"a second URI":             {tamper(func(c *x509.Certificate) { c.URIs = append(c.URIs, uri("spiffe://evil.example")) }), "alone"},
		"no subject":               {tamper(func(c *x509.Certificate) { c.Subject = pkix.Name{} }), "no subject"},
		"its issuer's subject":     {tamper(func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "root"} }), "name of its issuer"},
		"a long key ID":            {tamper(func(c *x509.Certificate) { c.SubjectKeyId = make([]byte, 100) }), "subject key identifier of 100 bytes"},
		"expired":                  {tamper(func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(30 * time.Second) }), "ends at"},
		"nearly expired":           {tamper(func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(65 * time.Second) }), "10s are needed"},
		"valid later":              {tamper(func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Hour) }), "are the clocks right"},
		"valid longer than its CA": {tamper(func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(365 * 24 * time.Hour) }), "longer than"},
		"only for mail":            {tamper(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageEmailProtection} }), "would not verify"},
		"only for servers":         {tamper(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), "would not verify"},
		"constrained to elsewhere": {tamper(func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"evil.example"}, true
		}), "would not verify"},
		"an unknown critical extension": {tamper(func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}}
		}), "would not verify"},
		"a root of path length 0":                      {rooted(func(c *x509.Certificate) { c.MaxPathLenZero = true }), "would not verify"},
		"an issuing authority of path length 0":        {under(func(c *x509.Certificate) { c.MaxPathLenZero = true }), "would not verify"},
		"an issuing authority of another trust domain": {under(func(c *x509.Certificate) { c.URIs = []*url.URL{uri("spiffe://evil.example")} }), "evil.example"},
		"an issuing authority that has expired":        {under(func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(time.Minute) }), "has expired"},
		"an issuing authority that is left out": {func(u *above) {
			under()(u)
			u.chain = nil
		}, "none of the 1 roots signed"},
		"a chain in disorder": {func(u *above) {
			first := newCA(t, u.w, "first", u.signer)
			second := newCA(t, u.w, "second", first)
			u.signer, u.chain = second, []*ca{first, second}
		}, "not signed by the next"},
		"a long chain": {func(u *above) {
			for range 20 {
				u.signer = newCA(t, u.w, "one more", u.signer)
				u.chain = append([]*ca{u.signer}, u.chain...)
			}
		}, "the most is 8"},
		"very many roots": {swap(func(u *above, chain, roots []*x509.Certificate) (_, _ []*x509.Certificate) {
			for range 101 {
				roots = append(roots, newCA(t, u.w, "root", nil).cert)
			}
			return chain, roots
		}), "the most is 100"},
		"a weak root": {func(u *above) {
			key, err := rsa.GenerateKey(rand.Reader, 1024)
			if err != nil {
				t.Fatal(err)
			}
			u.signer = newCAWith(t, u.w, "weak", nil, key)
			u.roots = []*x509.Certificate{u.signer.cert}
		}, "1024 bits"},
		"nothing at all": {func(u *above) { u.signer = nil }, "out of order"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			u := newAbove(w)
			test.lie(u)
			a := w.open(below(u))
			if err := a.UpstreamFailure(); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("it says %v, want %q", err, test.says)
			}
			if _, err := a.X509(); !errors.Is(err, authority.ErrUnavailable) {
				t.Errorf("it signs all the same: %v", err)
			}
			if n := len(w.bundle().X509Authorities); n != 0 {
				t.Errorf("%d roots are published", n)
			}
		})
	}
}

func TestUpstream_ItGetsNoOtherTrustDomainsRootIn(t *testing.T) {
	w := newWorld(t)
	u := newAbove(w)
	foreign := newCA(t, w, "foreign", nil)
	partner := spiffeid.RequireTrustDomainFromString("partner.example")
	_, err := w.registry.ChangeBundle(t.Context(), partner, func(b *bundle.Bundle) error {
		b.TrustDomain = partner
		b.X509Authorities = []bundle.X509Authority{{Certificate: foreign.cert}}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	u.roots = append(u.roots, foreign.cert)
	a := w.open(below(u))
	if err := a.UpstreamFailure(); err == nil || !strings.Contains(err.Error(), "partner.example") {
		t.Errorf("it says %v", err)
	}
	u.tells, u.whole = &bundle.Bundle{TrustDomain: td, X509Authorities: []bundle.X509Authority{{Certificate: foreign.cert}}}, true
	a = w.open(below(publishing{following{u}}))
	if err := a.Follow(t.Context()); err == nil || !strings.Contains(err.Error(), "partner.example") || w.bundle().HasX509(foreign.cert) {
		t.Errorf("it follows: %v", err)
	}
}

func TestUpstream_JWTAuthoritiesReachTheServerAboveBeforeTheySign(t *testing.T) {
	w := newWorld(t)
	u := publishing{following{newAbove(w)}}
	u.whole = true
	a := w.open(below(u)) // it is out of order
	if _, err := a.JWT(); !errors.Is(err, authority.ErrUnavailable) {
		t.Errorf("a JWT authority signs that nobody else knows: %v", err)
	}
	other := newCA(t, w, "a sibling's", nil).key.Public()
	u.set(func() {
		u.tells = &bundle.Bundle{
			TrustDomain: td, X509Authorities: []bundle.X509Authority{{Certificate: u.roots[0]}},
			JWTAuthorities: []bundle.JWTAuthority{{KeyID: "sibling", PublicKey: other, ExpiresAt: w.time().Add(time.Hour)}},
		}
	})
	w.add(time.Minute)
	w.rotate(a)
	j, err := a.JWT()
	if err != nil || len(u.keys) != 1 || u.keys[0].KeyID != j.ID {
		t.Fatalf("%v; published above: %v", err, u.keys)
	}
	if err := a.Follow(t.Context()); err != nil || w.bundle().JWTKey("sibling") == nil || w.bundle().JWTKey(j.ID) == nil {
		t.Errorf("the bundle is %v, %v", w.bundle(), err)
	}
	// What has ended stays above for a while, but does not come back here again
	// and again.
	u.set(func() {
		u.tells.JWTAuthorities = append(u.tells.JWTAuthorities, bundle.JWTAuthority{KeyID: "ended", PublicKey: newCA(t, w, "x", nil).key.Public(), ExpiresAt: w.time().Add(-time.Hour)})
	})
	before := w.bundle().SequenceNumber
	for range 3 {
		if err := a.Follow(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.rotate(a)
	}
	if b := w.bundle(); b.JWTKey("ended") != nil || b.SequenceNumber != before {
		t.Errorf("a key that has ended: %v; the bundle has changed %d times", b.JWTKey("ended"), b.SequenceNumber-before)
	}
	// One of a server below goes up, and stays only as long as it is there.
	forwarded := bundle.JWTAuthority{KeyID: "below", PublicKey: newCA(t, w, "x", nil).key.Public()}
	err = a.Forward(t.Context(), registry.JWT, forwarded, func(k bundle.JWTAuthority) error {
		_, err := w.registry.ChangeBundle(t.Context(), td, func(b *bundle.Bundle) error {
			b.JWTAuthorities = append(b.JWTAuthorities, k)
			return nil
		})
		return err
	})
	if err != nil || len(u.keys) != 2 {
		t.Fatalf("forwarded: %v, %v", u.keys, err)
	}
	// The server above loses everything: what is this server's is published again,
	// what is not is gone.
	u.set(func() { u.keys, u.tells.JWTAuthorities = nil, nil })
	if err := a.Follow(t.Context()); err != nil {
		t.Fatal(err)
	}
	if b := w.bundle(); b.JWTKey("sibling") != nil || b.JWTKey("below") != nil || b.JWTKey(j.ID) == nil || len(u.keys) != 1 {
		t.Errorf("the bundle is %v; published above: %v", b, u.keys)
	}
	if _, err := a.Revoke(t.Context(), registry.JWT, j.ID); err == nil {
		t.Error("it revokes what it cannot take back")
	}
	u.set(func() { u.tells = nil })
	if err := a.Forward(t.Context(), registry.JWT, forwarded, func(bundle.JWTAuthority) error { t.Error("kept"); return nil }); err == nil {
		t.Error("it forwards to a server that is out of order")
	}
}

func TestUpstream_ATaintedRootAboveIsLeftBeforeItIsMarked(t *testing.T) {
	w := newWorld(t)
	u := publishing{following{newAbove(w)}}
	old := u.signer
	u.whole, u.tells = true, &bundle.Bundle{TrustDomain: td, X509Authorities: []bundle.X509Authority{{Certificate: old.cert}}}
	a := w.open(below(u))
	first := w.signing(a, registry.X509)
	marked := func() bool {
		return slices.ContainsFunc(w.bundle().X509Authorities, func(x bundle.X509Authority) bool { return x.Tainted })
	}
	// It is tainted above while that still signs with it: no mark is made here.
	u.set(func() { u.tells.X509Authorities[0].Tainted = true })
	if err := a.Follow(t.Context()); err == nil || marked() || w.signing(a, registry.X509) != first {
		t.Errorf("follows: %v, marked: %v", err, marked())
	}
	next := newCA(t, w, "next root", nil)
	u.set(func() {
		u.signer, u.roots = next, []*x509.Certificate{old.cert, next.cert}
		u.tells.X509Authorities = append(u.tells.X509Authorities, bundle.X509Authority{Certificate: next.cert})
	})
	w.add(time.Minute)
	if err := a.Follow(t.Context()); err != nil || !marked() || w.signing(a, registry.X509) == first {
		t.Errorf("follows: %v, marked: %v", err, marked())
	}
	if active, _, _ := a.State(registry.X509); !authority.RootOf(active, w.bundle()).Equal(next.cert) {
		t.Error("it does not lead to the new root")
	}
	// What is revoked above is trusted no more here, at once.
	u.set(func() { u.tells.X509Authorities = u.tells.X509Authorities[1:] })
	if err := a.Follow(t.Context()); err != nil || w.bundle().HasX509(old.cert) {
		t.Errorf("follows: %v; the revoked root is in the bundle", err)
	}
}

func TestUpstream_ARootIsTaintedAndRevokedOnceNothingThatSignsLeadsToIt(t *testing.T) {
	w := newWorld(t)
	u := newAbove(w)
	a := w.open(below(u))
	old := u.signer
	id := strings.ToUpper(hex.EncodeToString(old.cert.SubjectKeyId))
	refused := func(err error, kind registry.ErrorKind, says string) {
		t.Helper()
		var refusal *registry.Error
		if !errors.As(err, &refusal) || refusal.Kind != kind || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want %q", err, says)
		}
	}
	refused(a.TaintUpstream(t.Context(), ""), registry.Invalid, "no subject key ID")
	refused(a.TaintUpstream(t.Context(), "beef"), registry.Invalid, "unexpected authority ID")
	refused(a.TaintUpstream(t.Context(), id), registry.FailedPrecondition, "leads to it")
	active, _, _ := a.State(registry.X509)
	_, err := a.Taint(t.Context(), registry.X509, active.ID)
	refused(err, registry.FailedPrecondition, "no root")

	next := newCA(t, w, "next root", nil)
	u.set(func() { u.signer, u.roots = next, []*x509.Certificate{next.cert} })
	prepared, err := a.Prepare(t.Context(), registry.X509)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Activate(t.Context(), registry.X509, prepared.ID); err != nil {
		t.Fatal(err)
	}
	refused(a.RevokeUpstream(t.Context(), id), registry.FailedPrecondition, "not tainted")
	if err := a.TaintUpstream(t.Context(), id); err != nil || !w.bundle().X509Authorities[0].Tainted {
		t.Fatalf("taint: %v", err)
	}
	if err := a.RevokeUpstream(t.Context(), id); err != nil || w.bundle().HasX509(old.cert) || !w.bundle().HasX509(next.cert) {
		t.Errorf("revoke: %v", err)
	}
	refused(w.open(below(nil)).TaintUpstream(t.Context(), id), registry.FailedPrecondition, "no upstream")
}

func TestUpstream_ItTakesOverFromAnAuthorityThatIsItsOwnRootAndBack(t *testing.T) {
	w := newWorld(t)
	alone := w.open(below(nil))
	own, _, _ := alone.State(registry.X509)
	u := newAbove(w)
	a := w.open(below(u))
	for range 20 {
		next := w.rotate(a)
		if active, _, _ := a.State(registry.X509); active.ID != own.ID {
			break
		}
		w.add(max(next.Sub(w.time()), time.Second))
	}
	active, _, _ := a.State(registry.X509)
	if active.ID == own.ID || !authority.RootOf(active, w.bundle()).Equal(u.signer.cert) || !w.bundle().HasX509(own.Chain[0]) {
		t.Fatalf("authority %s signs; the one before is in the bundle: %v", active.ID, w.bundle().HasX509(own.Chain[0]))
	}
	if w.time().Sub(start) > time.Hour {
		t.Errorf("it took %v", w.time().Sub(start))
	}
	back := w.open(below(nil))
	for range 400 {
		next := w.rotate(back)
		if !w.bundle().HasX509(u.signer.cert) {
			break
		}
		w.add(max(next.Sub(w.time()), time.Minute))
	}
	if w.bundle().HasX509(u.signer.cert) {
		t.Error("the root of the upstream stays although nothing leads to it")
	}
}
