package authority_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/test/harness"
)

// x509KeyTypes are those of which keys are made in an instant.
var x509KeyTypes = []authority.KeyType{authority.ECP256, authority.ECP384, authority.RSA2048}

// eachCertificate runs a test with an authority's certificate of each key type.
func eachCertificate(t *testing.T, test func(*testing.T, *x509.Certificate)) {
	for _, keyType := range x509KeyTypes {
		t.Run(keyType.String(), func(t *testing.T) {
			a := newWorld(t).open(func(o *authority.Options) { o.X509KeyType = keyType })
			x, err := a.X509()
			if err != nil {
				t.Fatal(err)
			}
			test(t, x.Certificate)
		})
	}
}

func extension(cert *x509.Certificate, oid string) (critical, present bool) {
	for _, e := range cert.Extensions {
		if e.Id.String() == oid {
			return e.Critical, true
		}
	}
	return false, false
}

func TestX509SVID_X09_X10_ID24_ID25_ASigningCertificateHasTheTrustDomainsIDAlone(t *testing.T) {
	eachCertificate(t, func(t *testing.T, cert *x509.Certificate) {
		if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://example.org" {
			t.Errorf("URIs are %v", cert.URIs)
		}
		if len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) != 0 {
			t.Error("it has other names")
		}
	})
}

func TestX509SVID_X14_X18_X29_ASigningCertificateIsACAWithoutConstraints(t *testing.T) {
	eachCertificate(t, func(t *testing.T, cert *x509.Certificate) {
		if !cert.IsCA || cert.MaxPathLen != -1 {
			t.Errorf("cA %v, path length %d", cert.IsCA, cert.MaxPathLen)
		}
		if critical, present := extension(cert, "2.5.29.19"); !present || !critical { // RF-06
			t.Error("basicConstraints is missing or not critical")
		}
		for name, oid := range map[string]string{"nameConstraints": "2.5.29.30", "extKeyUsage": "2.5.29.37"} {
			if _, present := extension(cert, oid); present {
				t.Errorf("it has %s", name)
			}
		}
	})
}

func TestX509SVID_X19_X20_X21_X26_ASigningCertificateSignsCertificatesAndCRLsOnly(t *testing.T) {
	eachCertificate(t, func(t *testing.T, cert *x509.Certificate) {
		if want := x509.KeyUsageCertSign | x509.KeyUsageCRLSign; cert.KeyUsage != want {
			t.Errorf("key usages are %b, want %b", cert.KeyUsage, want)
		}
		if critical, present := extension(cert, "2.5.29.15"); !present || !critical {
			t.Error("keyUsage is missing or not critical")
		}
	})
}

func TestRFC5280_RF01_RF02_SerialNumbersArePositiveRandomAndAtMostTwentyOctets(t *testing.T) {
	seen := make(map[string]bool)
	var or, and [20]byte
	for i := range and {
		and[i] = 0xff
	}
	for range 10_000 {
		serial := authority.Serial()
		if len(serial) != 20 || serial[0]&0x80 != 0 || serial[0] == 0 {
			t.Fatalf("serial %x is not 20 octets, positive and without a leading zero", serial)
		}
		if seen[string(serial)] {
			t.Fatalf("serial %x came twice", serial)
		}
		seen[string(serial)] = true
		for i, b := range serial {
			or[i] |= b
			and[i] &= b
		}
	}
	if want := append([]byte{0x7f}, bytes.Repeat([]byte{0xff}, 19)...); !bytes.Equal(or[:], want) {
		t.Errorf("bits that were ever 1: %x, want %x", or, want)
	}
	if want := append([]byte{0x40}, make([]byte, 19)...); !bytes.Equal(and[:], want) {
		t.Errorf("bits that were always 1: %x, want %x", and, want)
	}
}

func TestRFC5280_RF03_AuthoritiesHaveDistinctNames(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	first, _, _ := a.State(registry.X509)
	second, err := a.Prepare(context.Background(), registry.X509)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first.Chain[0].RawSubject, second.Chain[0].RawSubject) {
		t.Error("two authorities have one name")
	}
	for _, r := range []*registry.Authority{first, second} {
		name := r.Chain[0].Subject
		if name.CommonName != "example.org" || len(name.Organization) != 1 || name.SerialNumber != r.ID {
			t.Errorf("the name is %s", name)
		}
	}
	long := authority.Name(spiffeid.RequireTrustDomainFromString(strings.Repeat("a", 255)), []byte{1})
	if n := len(long.CommonName); n != 64 {
		t.Errorf("the common name for a long trust domain has %d characters; the most is 64", n)
	}
}

func TestRFC5280_RF04_RF05_KeyIdentifiers(t *testing.T) {
	eachCertificate(t, func(t *testing.T, cert *x509.Certificate) {
		if critical, present := extension(cert, "2.5.29.14"); !present || critical || len(cert.SubjectKeyId) != 20 {
			t.Error("the subject key identifier is missing, critical or not 160 bits")
		}
		if _, present := extension(cert, "2.5.29.35"); present {
			t.Error("a self-signed certificate has an authority key identifier")
		}
	})
}

func TestAuthorityIDs_X509IsTheSubjectKeyIDAndJWTTheThumbprint_JW06(t *testing.T) {
	a := newWorld(t).open()
	x, err := a.X509()
	if err != nil {
		t.Fatal(err)
	}
	if want := hex.EncodeToString(x.Certificate.SubjectKeyId); x.ID != want {
		t.Errorf("X.509 authority ID is %s, want %s", x.ID, want)
	}
	j, err := a.JWT()
	if err != nil {
		t.Fatal(err)
	}
	thumbprint, err := (&jose.JSONWebKey{Key: j.Signer.Public()}).Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if want := authority.IDOf(thumbprint); j.ID != want {
		t.Errorf("JWT authority ID is %s, want %s of the thumbprint", j.ID, want)
	}
}

func TestCertificatesBeginALittleBeforeAndEndWithTheirAuthority(t *testing.T) {
	w := newWorld(t)
	a := w.open(func(o *authority.Options) { o.X509Lifetime = 90 * time.Minute })
	active, _, _ := a.State(registry.X509)
	cert := active.Chain[0]
	if want := start.Truncate(time.Second).Add(-10 * time.Second); !cert.NotBefore.Equal(want) {
		t.Errorf("begins at %s, want %s", cert.NotBefore, want)
	}
	if want := start.Truncate(time.Second).Add(90 * time.Minute); !cert.NotAfter.Equal(want) || !active.ExpiresAt.Equal(want) {
		t.Errorf("ends at %s and the authority at %s, want %s", cert.NotAfter, active.ExpiresAt, want)
	}
}

func TestKeyTypesAreThoseConfigured(t *testing.T) {
	for _, keyType := range append(x509KeyTypes, authority.RSA4096) {
		if keyType == authority.RSA4096 && testing.Short() {
			continue // its key takes seconds to make
		}
		a := newWorld(t).open(func(o *authority.Options) { o.JWTKeyType = keyType })
		j, err := a.JWT()
		if err != nil {
			t.Fatal(err)
		}
		want := map[authority.KeyType]jose.SignatureAlgorithm{
			authority.ECP256: jose.ES256, authority.ECP384: jose.ES384, authority.RSA2048: jose.RS256, authority.RSA4096: jose.RS256,
		}[keyType]
		if j.Algorithm != want { // J-06
			t.Errorf("%s: algorithm is %s, want %s", keyType, j.Algorithm, want)
		}
		var got string
		switch key := j.Signer.Public().(type) {
		case *ecdsa.PublicKey:
			got = map[elliptic.Curve]string{elliptic.P256(): "ec-p256", elliptic.P384(): "ec-p384"}[key.Curve]
		case *rsa.PublicKey:
			got = map[int]string{2048: "rsa-2048", 4096: "rsa-4096"}[key.N.BitLen()]
		}
		if got != keyType.String() {
			t.Errorf("the key is a %s, want %s", got, keyType)
		}
	}
}

func TestRFC5280_RF20_LintersFindNothingWrongWithASigningCertificate(t *testing.T) {
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{
		IncludeSources: lint.SourceList{lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC6962, lint.RFC8813, lint.Community},
	})
	if err != nil {
		t.Fatal(err)
	}
	eachCertificate(t, func(t *testing.T, cert *x509.Certificate) {
		parsed, err := zx509.ParseCertificate(cert.Raw)
		if err != nil {
			t.Fatal(err)
		}
		for name, result := range zlint.LintCertificateEx(parsed, registry).Results {
			if result.Status > lint.Pass {
				t.Errorf("%s: %s %s", name, result.Status, result.Details)
			}
		}
	})
}

func TestRFC5280_RF20_OpenSSLAcceptsASigningCertificate(t *testing.T) {
	harness.NeedCommand(t, "openssl")
	eachCertificate(t, func(t *testing.T, cert *x509.Certificate) {
		file := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("openssl", "verify", "-x509_strict", "-no_check_time", "-CAfile", file, file).CombinedOutput()
		if err != nil {
			t.Errorf("openssl verify: %v\n%s", err, out)
		}
	})
}

func TestX509SVID_X12_AnAuthorityThatAnotherSignedIsPartOfTheChainOfItsSVIDs(t *testing.T) {
	w := newWorld(t)
	root, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certificate := func(cn string, public crypto.PublicKey, parent *x509.Certificate, signer crypto.Signer) *x509.Certificate {
		t.Helper()
		tmpl := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn}, URIs: []*url.URL{td.ID().URL()},
			NotBefore: start.Add(-time.Minute), NotAfter: start.Add(24 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		if parent == nil {
			parent = tmpl
		}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, public, signer)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	top := certificate("root", root.Public(), nil, root)
	public := createKey(t, w.keys, "x509-below")
	below := certificate("below", public, top, root)
	_, err = w.registry.ChangeAuthorities(t.Context(), func(own *bundle.Bundle, _ []*registry.Authority) (registry.AuthorityChange, error) {
		own.X509Authorities = append(own.X509Authorities, bundle.X509Authority{Certificate: top})
		return registry.AuthorityChange{Put: []*registry.Authority{{
			ID: hex.EncodeToString(below.SubjectKeyId), Kind: registry.X509, State: registry.Active, Server: "server-1",
			KeyName: "x509-below", PublicKey: public, Chain: []*x509.Certificate{below}, CreatedAt: start, ExpiresAt: below.NotAfter,
		}}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	x, err := w.open().X509()
	if err != nil {
		t.Fatal(err)
	}
	if !x.Certificate.Equal(below) || len(x.Chain) != 1 || !x.Chain[0].Equal(below) {
		t.Errorf("%s signs, with a chain of %d certificates; want %q, and it alone", x.Certificate.Subject, len(x.Chain), "CN=below")
	}
}
