package bundle_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"math/big"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

func newCA(t testing.TB, serial int64) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func newBundle(t testing.TB) *bundle.Bundle {
	ca1, key := newCA(t, 1)
	ca2, witKey := newCA(t, 2)
	return &bundle.Bundle{
		TrustDomain:     spiffeid.RequireTrustDomainFromString("example.org"),
		X509Authorities: []bundle.X509Authority{{Certificate: ca1}, {Certificate: ca2, Tainted: true}},
		JWTAuthorities:  []bundle.JWTAuthority{{KeyID: "k1", PublicKey: key.Public(), ExpiresAt: time.Unix(99, 0), Tainted: true}},
		WITAuthorities:  []bundle.JWTAuthority{{KeyID: "w1", PublicKey: witKey.Public(), ExpiresAt: time.Unix(98, 0), Tainted: true}},
		SequenceNumber:  7,
		RefreshHint:     5 * time.Minute,
	}
}

func TestRecordsKeepEveryField(t *testing.T) {
	b := newBundle(t)
	rec, err := b.Record()
	if err != nil {
		t.Fatal(err)
	}
	got, err := bundle.FromRecord(rec)
	if err != nil {
		t.Fatal(err)
	}
	if got.TrustDomain != b.TrustDomain || got.SequenceNumber != 7 || got.RefreshHint != 5*time.Minute {
		t.Errorf("got %v", got)
	}
	if len(got.X509Authorities) != 2 || got.X509Authorities[0].Tainted || !got.X509Authorities[1].Tainted ||
		!got.HasX509(b.X509Authorities[0].Certificate) || !got.HasX509(b.X509Authorities[1].Certificate) {
		t.Errorf("X.509 authorities differ: %+v", got.X509Authorities)
	}
	if w := got.WITAuthorities[0]; w.KeyID != "w1" || !w.Tainted || !w.ExpiresAt.Equal(time.Unix(98, 0)) || !b.WITAuthorities[0].PublicKey.(*ecdsa.PublicKey).Equal(w.PublicKey) {
		t.Errorf("WIT authority differs: %+v", w)
	}
	a := got.JWTAuthorities[0]
	if a.KeyID != "k1" || !a.Tainted || !a.ExpiresAt.Equal(time.Unix(99, 0)) || !b.JWTAuthorities[0].PublicKey.(*ecdsa.PublicKey).Equal(a.PublicKey) {
		t.Errorf("JWT authority differs: %+v", a)
	}
}

func TestWorkloadAPI_A19_BundleIsConcatenatedDER(t *testing.T) {
	b := newBundle(t)
	certs, err := x509.ParseCertificates(b.DER())
	if err != nil {
		t.Fatal(err)
	}
	if len(certs) != 2 || !certs[0].Equal(b.X509Authorities[0].Certificate) || !certs[1].Equal(b.X509Authorities[1].Certificate) {
		t.Errorf("DER holds %d certificates", len(certs))
	}
	if !b.Pool().Equal(func() *x509.CertPool {
		p := x509.NewCertPool()
		p.AddCert(certs[1])
		p.AddCert(certs[0])
		return p
	}()) {
		t.Error("the pool differs from the DER")
	}
}

func TestWorkloadAPI_A33_A34_JWKSIsPlainAndHoldsJWTKeysOnly(t *testing.T) {
	b := newBundle(t)
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(b.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	if len(set.Keys) != 1 || set.Keys[0].KeyID != "k1" || !set.Keys[0].IsPublic() {
		t.Errorf("got %s", b.JWKS())
	}
	if b.JWTKey("k1") == nil || b.JWTKey("k2") != nil {
		t.Error("keys are not found by their ID")
	}
	empty := &bundle.Bundle{}
	if got := string(empty.JWKS()); got != `{"keys":[]}` {
		t.Errorf("an empty bundle is %s", got)
	}
}

func TestWorkloadAPI_W44_WITKeysAreASetOfTheirOwn(t *testing.T) {
	b := newBundle(t)
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(b.WITJWKS(), &set); err != nil {
		t.Fatal(err)
	}
	if len(set.Keys) != 1 || set.Keys[0].KeyID != "w1" || !set.Keys[0].IsPublic() {
		t.Errorf("got %s", b.WITJWKS())
	}
	if b.WITKey("w1") == nil || b.WITKey("k1") != nil || b.JWTKey("w1") != nil {
		t.Error("keys are not found by their ID and kind")
	}
	if !b.HasKeyID("k1") || !b.HasKeyID("w1") || b.HasKeyID("x") {
		t.Error("key IDs are those of both kinds")
	}
	if got := string((&bundle.Bundle{}).WITJWKS()); got != `{"keys":[]}` {
		t.Errorf("an empty bundle is %s", got)
	}
}

func TestAChangedCloneLeavesTheOriginal(t *testing.T) {
	b := newBundle(t)
	before := bytes.Clone(b.DER())
	c := b.Clone()
	c.X509Authorities = append(c.X509Authorities[:0], c.X509Authorities[1])
	c.JWTAuthorities[0].KeyID, c.WITAuthorities[0].KeyID = "other", "other"
	if !bytes.Equal(b.DER(), before) || b.WITAuthorities[0].KeyID != "w1" || b.JWTAuthorities[0].KeyID != "k1" || b.X509Authorities[0].Tainted {
		t.Error("the original changed")
	}
	if bytes.Equal(c.DER(), before) {
		t.Error("the clone kept the derived form of the original")
	}
}

func TestRootHashesAreOfTheDER(t *testing.T) {
	b := newBundle(t)
	sum := sha256.Sum256(b.X509Authorities[1].Certificate.Raw)
	if got := b.RootHashes(); len(got) != 2 || !bytes.Equal(got[1], sum[:]) {
		t.Errorf("got %x", got)
	}
}

func TestTheDocumentOfABundleIsAlwaysTheSame(t *testing.T) {
	b := newBundle(t)
	for n := range 10 {
		_, key := newCA(t, int64(n))
		b.JWTAuthorities = append(b.JWTAuthorities, bundle.JWTAuthority{KeyID: string(rune('a' + n)), PublicKey: key.Public()})
	}
	first, err := b.Document()
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if again, err := b.Clone().Document(); err != nil || !bytes.Equal(first, again) {
			t.Fatalf("it is %s, %v, and was %s", again, err, first)
		}
	}
}
