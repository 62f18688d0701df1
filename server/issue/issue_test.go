package issue_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// start is when the tests' clocks begin.
var start = time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)

// clock is a time that stands still until it is set.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// keys are authorities that the test sets.
type keys struct {
	mu   sync.Mutex
	x509 *authority.X509
	jwt  *authority.JWT
	wit  *authority.JWT
	rsa  *authority.JWT
}

func (k *keys) X509() (*authority.X509, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.x509 == nil {
		return nil, authority.ErrUnavailable
	}
	return k.x509, nil
}

func (k *keys) JWT() (*authority.JWT, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.jwt == nil {
		return nil, authority.ErrUnavailable
	}
	return k.jwt, nil
}

func (k *keys) WIT() (*authority.JWT, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.wit == nil {
		return nil, authority.ErrUnavailable
	}
	return k.wit, nil
}

func (k *keys) JWTRS256() (*authority.JWT, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.rsa == nil {
		return nil, authority.ErrUnavailable
	}
	return k.rsa, nil
}

func (k *keys) set(x *authority.X509) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.x509 = x
}

// house is an issuer with all it needs.
type house struct {
	*issue.Issuer
	clock *clock
	keys  *keys
}

func (h *house) root() *x509.Certificate { return h.keys.x509.Certificate }

func newHouse(tb testing.TB, change ...func(*issue.Options)) *house {
	tb.Helper()
	h := &house{clock: &clock{t: start}, keys: &keys{}}
	h.keys.x509 = newX509Authority(tb, newKey(tb, elliptic.P256()), nil)
	h.keys.jwt = newJWTAuthority(newKey(tb, elliptic.P256()), jose.ES256)
	h.keys.wit = newJWTAuthority(newKey(tb, elliptic.P256()), jose.ES256)
	o := issue.Options{TrustDomain: td, Authorities: h.keys, Now: h.clock.now}
	for _, c := range change {
		c(&o)
	}
	h.Issuer = issue.New(o)
	return h
}

// newX509Authority makes an authority that lives from an hour before start to
// a day after it.
func newX509Authority(tb testing.TB, signer crypto.Signer, change func(*x509.Certificate)) *authority.X509 {
	tb.Helper()
	spki, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		tb.Fatal(err)
	}
	keyID, err := authority.KeyID(spki)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(authority.Serial()),
		Subject:               authority.Name(td, keyID),
		NotBefore:             start.Add(-time.Hour),
		NotAfter:              start.Add(24 * time.Hour),
		URIs:                  []*url.URL{td.ID().URL()},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId:          keyID,
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		tb.Fatal(err)
	}
	return &authority.X509{ID: "test", Certificate: parse(tb, der), Signer: signer}
}

func newJWTAuthority(signer crypto.Signer, algorithm jose.SignatureAlgorithm) *authority.JWT {
	return &authority.JWT{ID: "kid-1", Signer: signer, Algorithm: algorithm, ExpiresAt: start.Add(24 * time.Hour)}
}

func newKey(tb testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// rsaKeys are made once for each size: that takes long.
var rsaKeys sync.Map

func newRSA(tb testing.TB, bits int) *rsa.PrivateKey {
	tb.Helper()
	make := sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, bits) })
	once, _ := rsaKeys.LoadOrStore(bits, make)
	key, err := once.(func() (*rsa.PrivateKey, error))()
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func newEd25519(tb testing.TB) ed25519.PrivateKey {
	tb.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

// newCSR makes a request of a new P-256 key.
func newCSR(tb testing.TB, template *x509.CertificateRequest) []byte {
	tb.Helper()
	return newCSRFor(tb, newKey(tb, elliptic.P256()), template)
}

func newCSRFor(tb testing.TB, signer crypto.Signer, template *x509.CertificateRequest) []byte {
	tb.Helper()
	if template == nil {
		template = &x509.CertificateRequest{}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, signer)
	if err != nil {
		tb.Fatal(err)
	}
	return der
}

func parse(tb testing.TB, der []byte) *x509.Certificate {
	tb.Helper()
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

func uri(tb testing.TB, s string) *url.URL {
	tb.Helper()
	u, err := url.Parse(s)
	if err != nil {
		tb.Fatal(err)
	}
	return u
}

// workload is an entry as the registry would hold it.
func workload(tb testing.TB, change ...func(*entry.Entry)) *entry.Entry {
	tb.Helper()
	e := &entry.Entry{
		ID:        "entry-1",
		SPIFFEID:  spiffeid.RequireFromPath(td, "/web"),
		ParentID:  spiffeid.RequireFromPath(td, "/spire/agent/join_token/1"),
		Selectors: selector.NewSet(selector.Selector{Type: "unix", Value: "uid:1000"}),
	}
	for _, c := range change {
		c(e)
	}
	if err := e.Validate(td); err != nil {
		tb.Fatal(err)
	}
	return e
}

// leaf issues an entry's X509-SVID and returns its certificate.
func (h *house) leaf(tb testing.TB, e *entry.Entry) *x509.Certificate {
	tb.Helper()
	svid, err := h.WorkloadX509(context.Background(), e, newCSR(tb, nil))
	if err != nil {
		tb.Fatal(err)
	}
	return parse(tb, svid.Chain[0])
}

// wantInvalid demands that an error is the request's fault.
func wantInvalid(tb testing.TB, err error) {
	tb.Helper()
	if _, ok := errors.AsType[*issue.InvalidError](err); !ok {
		tb.Fatalf("got error %v, want an InvalidError", err)
	}
}
