package revocation_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/pkg/revocation"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

var now = time.Unix(1_800_000_000, 0)

// signer is an authority, or a leaf that plays one.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func authority(name string, parent *signer, change func(*x509.Certificate)) *signer {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(100 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId: []byte("key of " + name),
	}
	if change != nil {
		change(template)
	}
	if parent == nil {
		parent = &signer{template, key}
	}
	der := must(x509.CreateCertificate(rand.Reader, template, parent.cert, key.Public(), parent.key))
	return &signer{must(x509.ParseCertificate(der)), key}
}

func (s *signer) leaf(serial int64) *x509.Certificate {
	l := authority("", s, func(c *x509.Certificate) {
		c.SerialNumber, c.Subject, c.IsCA, c.KeyUsage, c.SubjectKeyId = big.NewInt(serial), pkix.Name{}, false, x509.KeyUsageDigitalSignature, nil
		c.URIs = []*url.URL{must(url.Parse("spiffe://example.org/web"))}
	})
	return l.cert
}

// crl signs a CRL that revokes serial numbers.
func (s *signer) crl(number int64, change func(*x509.RevocationList), serials ...int64) []byte {
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: now.Add(-time.Minute), NextUpdate: now.Add(time.Hour)}
	for _, n := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(n), RevocationTime: now})
	}
	if change != nil {
		change(list)
	}
	return must(x509.CreateRevocationList(rand.Reader, list, s.cert, s.key))
}

func lists(at *time.Time) *revocation.Lists {
	return revocation.New(func() time.Time { return *at })
}

func TestARevokedCertificateIsRefusedAndOthersAreNot(t *testing.T) {
	at := now
	ca, other := authority("one", nil, nil), authority("two", nil, nil)
	l := lists(&at)
	check := func(c *x509.Certificate, want error) {
		t.Helper()
		if err := l.Check(c, []*x509.Certificate{other.cert, ca.cert}); !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("serial %v: %v, want %v", c.SerialNumber, err, want)
		}
	}
	check(ca.leaf(7), nil) // nothing was revoked
	if err := l.Update([][]byte{ca.crl(1, nil, 7, 8)}); err != nil {
		t.Fatal(err)
	}
	check(ca.leaf(7), revocation.ErrRevoked)
	check(ca.leaf(8), revocation.ErrRevoked)
	check(ca.leaf(9), nil)
	check(other.leaf(7), nil) // a serial number is that of an authority
	// The next one has it no more: its certificate has ended.
	if err := l.Update([][]byte{ca.crl(2, nil, 8)}); err != nil {
		t.Fatal(err)
	}
	check(ca.leaf(7), nil)
	check(ca.leaf(8), revocation.ErrRevoked)
}

func TestIntermediatesAreChecked(t *testing.T) {
	at := now
	root := authority("root", nil, nil)
	between := authority("between", root, func(c *x509.Certificate) { c.SerialNumber = big.NewInt(5) })
	l := lists(&at)
	if err := l.Update([][]byte{root.crl(1, nil, 5), between.crl(1, nil, 7)}); err != nil {
		t.Fatal(err)
	}
	issuers := []*x509.Certificate{between.cert, root.cert}
	if err := l.Check(between.leaf(7), issuers); !errors.Is(err, revocation.ErrRevoked) {
		t.Error(err)
	}
	if err := l.Check(between.cert, issuers); !errors.Is(err, revocation.ErrRevoked) {
		t.Error(err)
	}
	if err := l.Check(between.leaf(8), issuers); err != nil {
		t.Error(err)
	}
}

// TestAttacks is what somebody who can put CRLs in the way of a verifier could
// try: of each it says what becomes of a certificate that was revoked (7) and of
// one that was not (9).
func TestAttacks(t *testing.T) {
	ca, mallory := authority("one", nil, nil), authority("mallory", nil, nil)
	impostor := authority("one", nil, nil) // the same name and key identifier, another key
	leafCA := authority("one", ca, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature })
	leafCA.cert.KeyUsage |= x509.KeyUsageCRLSign // so that go signs with it
	noSign := authority("quiet", nil, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign })
	quietCRL := func() []byte {
		as := *noSign.cert
		as.KeyUsage |= x509.KeyUsageCRLSign
		return (&signer{&as, noSign.key}).crl(1, nil, 7)
	}()
	good := ca.crl(10, nil, 7)
	tampered := bytes.Clone(good)
	tampered[len(tampered)-1] ^= 1
	critical := func(l *x509.RevocationList) {
		l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}}}
	}
	delta := func(l *x509.RevocationList) {
		l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 9}}}
	}
	entryCritical := func(l *x509.RevocationList) {
		l.RevokedCertificateEntries[0].ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 29}, Critical: true, Value: []byte{0x30, 0}}}
	}
	huge := func(l *x509.RevocationList) {
		l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: make([]byte, revocation.MaxCRL)}}
	}
	for name, c := range map[string]struct {
		issuer      *signer
		before      [][]byte // the good update that came first
		update      [][]byte
		later       time.Duration
		revoked, ok error // of 7 and of 9
	}{
		"none":                              {update: nil},
		"good":                              {update: [][]byte{good}, revoked: revocation.ErrRevoked},
		"of another authority alone":        {update: [][]byte{mallory.crl(1, nil, 9)}},
		"of another key with the same name": {update: [][]byte{impostor.crl(99, nil, 9)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"of another key, beside the good":   {update: [][]byte{impostor.crl(99, nil, 9), good}, revoked: revocation.ErrRevoked},
		"of another key, after the good":    {before: [][]byte{good}, update: [][]byte{impostor.crl(99, nil, 9)}, revoked: revocation.ErrRevoked},
		"signed by a leaf":                  {update: [][]byte{leafCA.crl(99, nil, 9)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"signed by one that may not":        {issuer: noSign, update: [][]byte{quietCRL}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"tampered with":                     {update: [][]byte{tampered}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"tampered with, after the good":     {before: [][]byte{good}, update: [][]byte{tampered}, revoked: revocation.ErrRevoked},
		"stale":                             {update: [][]byte{good}, later: 2 * time.Hour, revoked: revocation.ErrRevoked, ok: revocation.ErrUnknown},
		"rolled back":                       {before: [][]byte{good}, update: [][]byte{ca.crl(9, nil)}, revoked: revocation.ErrRevoked},
		"left out":                          {before: [][]byte{good}, update: nil, revoked: revocation.ErrRevoked},
		"left out, and ended":               {before: [][]byte{good}, update: nil, later: 2 * time.Hour, revoked: revocation.ErrRevoked, ok: revocation.ErrUnknown},
		"of the future":                     {update: [][]byte{ca.crl(1, func(l *x509.RevocationList) { l.ThisUpdate = now.Add(10 * time.Minute) }, 7)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"of a delta":                        {update: [][]byte{ca.crl(1, delta, 7)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"of a critical extension":           {update: [][]byte{ca.crl(1, critical, 7)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"of an indirect entry":              {update: [][]byte{ca.crl(1, entryCritical, 7)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"huge":                              {update: [][]byte{ca.crl(1, huge, 7)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"garbage":                           {update: [][]byte{[]byte("garbage")}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"garbage beside the good":           {update: [][]byte{good, {0x30, 0}}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"followed by something":             {update: [][]byte{append(bytes.Clone(good), 0)}, revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
		"very many":                         {update: make([][]byte, revocation.MaxCRLs+1), revoked: revocation.ErrUnknown, ok: revocation.ErrUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			at := now
			l := lists(&at)
			issuer := c.issuer
			if issuer == nil {
				issuer = ca
			}
			check := func(serial int64, want error) {
				t.Helper()
				err := l.Check(issuer.leaf(serial), []*x509.Certificate{mallory.cert, impostor.cert, issuer.cert})
				if want == nil && err != nil || !errors.Is(err, want) {
					t.Errorf("serial %d: %v, want %v", serial, err, want)
				}
			}
			if c.before != nil {
				if err := l.Update(c.before); err != nil {
					t.Fatal(err)
				}
				check(7, revocation.ErrRevoked)
			}
			_ = l.Update(c.update)
			at = at.Add(c.later)
			check(7, c.revoked)
			check(9, c.ok)
		})
	}
}

func TestOneThatWasLeftOutIsForgottenOnceItHasEnded(t *testing.T) {
	at := now
	ca := authority("one", nil, nil)
	l := lists(&at)
	for range 2 {
		if err := l.Update([][]byte{ca.crl(1, nil, 7)}); err != nil {
			t.Fatal(err)
		}
		if err := l.Check(ca.leaf(7), []*x509.Certificate{ca.cert}); !errors.Is(err, revocation.ErrRevoked) {
			t.Fatal(err)
		}
	}
	at = at.Add(2 * time.Hour)
	if err := l.Update(nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Check(ca.leaf(7), []*x509.Certificate{ca.cert}); err != nil {
		t.Error(err)
	}
}

func TestACertificateWhoseIssuerIsNotThereIsNotLetThrough(t *testing.T) {
	at := now
	ca, other := authority("one", nil, nil), authority("two", nil, nil)
	l := lists(&at)
	if err := l.Update([][]byte{ca.crl(1, nil, 7)}); err != nil {
		t.Fatal(err)
	}
	if err := l.Check(ca.leaf(9), []*x509.Certificate{other.cert}); !errors.Is(err, revocation.ErrUnknown) {
		t.Error(err)
	}
}

func FuzzUpdate(f *testing.F) {
	ca := authority("one", nil, nil)
	leaf := ca.leaf(7)
	f.Add(ca.crl(1, nil, 7))
	f.Add(ca.crl(2, nil))
	f.Add([]byte{0x30, 0})
	f.Fuzz(func(t *testing.T, der []byte) {
		at := now
		l := lists(&at)
		if err := l.Update([][]byte{ca.crl(5, nil, 7)}); err != nil {
			t.Fatal(err)
		}
		if err := l.Check(leaf, []*x509.Certificate{ca.cert}); !errors.Is(err, revocation.ErrRevoked) {
			t.Fatal(err)
		}
		_ = l.Update([][]byte{der})
		if err := l.Check(leaf, []*x509.Certificate{ca.cert}); err == nil {
			t.Errorf("a certificate that was revoked is let through after % x", der)
		}
	})
}

func BenchmarkUpdate10000(b *testing.B) {
	ca := authority("one", nil, nil)
	serials := make([]int64, 10_000)
	for i := range serials {
		serials[i] = 1<<62 + int64(i)
	}
	der, leaf := ca.crl(1, nil, serials...), ca.leaf(7)
	at := now
	l := lists(&at)
	b.ReportMetric(float64(len(der)), "bytes")
	for b.Loop() {
		if err := l.Update([][]byte{der}); err != nil {
			b.Fatal(err)
		}
		if err := l.Check(leaf, []*x509.Certificate{ca.cert}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkCheck(b *testing.B) {
	ca := authority("one", nil, nil)
	leaf := ca.leaf(7)
	at := now
	l := lists(&at)
	if err := l.Update([][]byte{ca.crl(1, nil, 8)}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := l.Check(leaf, []*x509.Certificate{ca.cert}); err != nil {
			b.Fatal(err)
		}
	}
}
