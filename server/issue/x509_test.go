package issue_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/test/harness"
)

// hostileCSR asks for everything that a workload must not have.
func hostileCSR(tb testing.TB, signer crypto.Signer) []byte {
	tb.Helper()
	value := func(v any) []byte {
		der, err := asn1.Marshal(v)
		if err != nil {
			tb.Fatal(err)
		}
		return der
	}
	return newCSRFor(tb, signer, &x509.CertificateRequest{
		Subject:        pkix.Name{CommonName: "admin.example.org", Organization: []string{"Evil"}},
		DNSNames:       []string{"admin.example.org"},
		EmailAddresses: []string{"root@example.org"},
		IPAddresses:    []net.IP{net.IPv4(127, 0, 0, 1)},
		URIs:           []*url.URL{uri(tb, "spiffe://example.org/admin"), uri(tb, "https://example.org/")},
		ExtraExtensions: []pkix.Extension{
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: value(struct{ CA bool }{true})},
			{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: value(asn1.BitString{Bytes: []byte{0x06}, BitLength: 7})},
			{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}},
		},
	})
}

type leafCase struct {
	h    *house
	e    *entry.Entry
	cert *x509.Certificate
}

// eachLeaf runs a test with leaves of every kind of authority, key and entry.
func eachLeaf(t *testing.T, test func(*testing.T, leafCase)) {
	authorities := map[string]crypto.Signer{
		"P-256 authority":    newKey(t, elliptic.P256()),
		"P-384 authority":    newKey(t, elliptic.P384()),
		"RSA-2048 authority": newRSA(t, 2048),
	}
	subjects := map[string]crypto.Signer{
		"P-256":    newKey(t, elliptic.P256()),
		"P-384":    newKey(t, elliptic.P384()),
		"P-521":    newKey(t, elliptic.P521()),
		"RSA-2048": newRSA(t, 2048),
		"Ed25519":  newEd25519(t),
	}
	entries := map[string]*entry.Entry{
		"no names": workload(t),
		"names": workload(t, func(e *entry.Entry) {
			e.DNSNames = []string{"web.example.org", "a_b.example.org", "*.web.example.net"}
		}),
		"wildcard first": workload(t, func(e *entry.Entry) { e.DNSNames = []string{"*.example.org"} }),
		"long name":      workload(t, func(e *entry.Entry) { e.DNSNames = []string{strings.Repeat("a.", 32) + "b", "short.example"} }),
		"longest ID": workload(t, func(e *entry.Entry) {
			e.SPIFFEID = spiffeid.RequireFromPath(td, "/"+strings.Repeat("a", entry.MaxSPIFFEID-len("spiffe://example.org/")))
		}),
	}
	for a, signer := range authorities {
		h := newHouse(t)
		h.keys.set(newX509Authority(t, signer, nil))
		for s, subject := range subjects {
			for n, e := range entries {
				if n != "names" && a+s != "P-256 authorityP-256" {
					continue // names and keys do not depend on each other
				}
				t.Run(a+"/"+s+"/"+n, func(t *testing.T) {
					svid, err := h.WorkloadX509(context.Background(), e, hostileCSR(t, subject))
					if err != nil {
						t.Fatal(err)
					}
					cert := parse(t, svid.Chain[0])
					if !cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(subject.Public()) {
						t.Fatal("the certificate is for another key than the request")
					}
					test(t, leafCase{h, e, cert})
				})
			}
		}
	}
}

func extension(cert *x509.Certificate, oid string) *pkix.Extension {
	for _, e := range cert.Extensions {
		if e.Id.String() == oid {
			return &e
		}
	}
	return nil
}

func TestX509SVID_X01_X04_NamesAreThoseOfTheEntryAlone(t *testing.T) {
	eachLeaf(t, func(t *testing.T, c leafCase) {
		if len(c.cert.URIs) != 1 || c.cert.URIs[0].String() != c.e.SPIFFEID.String() {
			t.Errorf("URIs are %v, want %s alone", c.cert.URIs, c.e.SPIFFEID)
		}
		if !slices.Equal(c.cert.DNSNames, c.e.DNSNames) {
			t.Errorf("DNS names are %v, want %v in this order", c.cert.DNSNames, c.e.DNSNames)
		}
		if len(c.cert.IPAddresses)+len(c.cert.EmailAddresses) != 0 {
			t.Error("it has other names")
		}
	})
}

func TestX509SVID_X07_RF09_TheSubjectIsTheFirstDNSNameOrEmptyWithCriticalNames(t *testing.T) {
	eachLeaf(t, func(t *testing.T, c leafCase) {
		want := ""
		if len(c.e.DNSNames) > 0 && len(c.e.DNSNames[0]) <= 64 {
			want = c.e.DNSNames[0]
		}
		if c.cert.Subject.CommonName != want || len(c.cert.Subject.Names) > 1 {
			t.Errorf("subject is %q, want common name %q alone", c.cert.Subject, want)
		}
		empty := bytes.Equal(c.cert.RawSubject, []byte{0x30, 0x00})
		if empty != (want == "") {
			t.Errorf("subject is %x", c.cert.RawSubject)
		}
		if san := extension(c.cert, "2.5.29.17"); san == nil || san.Critical != empty {
			t.Error("subjectAltName is missing, or its criticality is wrong")
		}
	})
}

func TestX509SVID_X15_X19_X20_X23_X24_X25_X27_X28_ALeafAuthenticatesAndNoMore(t *testing.T) {
	eachLeaf(t, func(t *testing.T, c leafCase) {
		if bc := extension(c.cert, "2.5.29.19"); bc == nil || c.cert.IsCA || !c.cert.BasicConstraintsValid {
			t.Error("basicConstraints is missing, or says cA")
		}
		if c.cert.KeyUsage != x509.KeyUsageDigitalSignature {
			t.Errorf("key usages are %b, want digitalSignature alone", c.cert.KeyUsage)
		}
		if ku := extension(c.cert, "2.5.29.15"); ku == nil || !ku.Critical {
			t.Error("keyUsage is missing or not critical")
		}
		if want := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}; !slices.Equal(c.cert.ExtKeyUsage, want) || len(c.cert.UnknownExtKeyUsage) != 0 {
			t.Errorf("extended key usages are %v, want %v", c.cert.ExtKeyUsage, want)
		}
		if len(c.cert.Extensions) != 6 {
			t.Errorf("it has %d extensions, want 6", len(c.cert.Extensions))
		}
	})
}

func TestRFC5280_RF01_RF04_RF05_RF12_TheFrameOfALeaf(t *testing.T) {
	serials := make(map[string]bool)
	eachLeaf(t, func(t *testing.T, c leafCase) {
		serial := c.cert.SerialNumber
		if serial.Sign() <= 0 || serial.BitLen() < 128 || len(serial.Bytes()) > 20 || serials[serial.String()] {
			t.Errorf("serial %x is not positive, of at least 128 bits in at most 20 octets, and unique", serial)
		}
		serials[serial.String()] = true
		if c.cert.Version != 3 {
			t.Errorf("version %d", c.cert.Version)
		}
		root := c.h.root()
		if !bytes.Equal(c.cert.RawIssuer, root.RawSubject) { // RF-03
			t.Error("the issuer is not, byte by byte, the authority's subject")
		}
		if aki := extension(c.cert, "2.5.29.35"); aki == nil || aki.Critical || !bytes.Equal(c.cert.AuthorityKeyId, root.SubjectKeyId) {
			t.Error("authorityKeyIdentifier is missing, critical or another")
		}
		spki, err := x509.MarshalPKIXPublicKey(c.cert.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(spki, c.cert.RawSubjectPublicKeyInfo) {
			t.Error("the public key is not in its canonical form")
		}
		keyID, err := authority.KeyID(spki)
		if err != nil {
			t.Fatal(err)
		}
		if ski := extension(c.cert, "2.5.29.14"); ski == nil || ski.Critical || !bytes.Equal(c.cert.SubjectKeyId, keyID) {
			t.Error("subjectKeyIdentifier is missing, critical or another")
		}
		if err := c.cert.CheckSignatureFrom(root); err != nil {
			t.Error(err)
		}
	})
}

// captureSigner is the key of an authority, and holds on to what is signed.
type captureSigner struct {
	crypto.Signer
	digest []byte
}

func (s *captureSigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	s.digest = bytes.Clone(digest)
	return s.Signer.Sign(rand, digest, opts)
}

func TestRFC5280_ALeafIsByteByByteWhatTheStandardLibraryWouldSign(t *testing.T) {
	eachLeaf(t, func(t *testing.T, c leafCase) {
		template := &x509.Certificate{
			SerialNumber:          c.cert.SerialNumber,
			Subject:               pkix.Name{CommonName: c.cert.Subject.CommonName},
			NotBefore:             c.cert.NotBefore,
			NotAfter:              c.cert.NotAfter,
			KeyUsage:              x509.KeyUsageDigitalSignature,
			ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
			BasicConstraintsValid: true,
			SubjectKeyId:          c.cert.SubjectKeyId,
			DNSNames:              c.e.DNSNames,
			URIs:                  []*url.URL{c.e.SPIFFEID.URL()},
		}
		der, err := x509.CreateCertificate(rand.Reader, template, c.h.root(), c.cert.PublicKey, c.h.keys.x509.Signer)
		if err != nil {
			t.Fatal(err)
		}
		if want := parse(t, der); !bytes.Equal(c.cert.RawTBSCertificate, want.RawTBSCertificate) {
			t.Errorf("got  %x\nwant %x", c.cert.RawTBSCertificate, want.RawTBSCertificate)
		}
	})
}

func TestX509SVID_X30_GoSpiffeAcceptsALeaf(t *testing.T) {
	eachLeaf(t, func(t *testing.T, c leafCase) {
		bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{c.h.root()})
		id, chains, err := x509svid.Verify([]*x509.Certificate{c.cert}, bundle, x509svid.WithTime(start))
		if err != nil || id != c.e.SPIFFEID || len(chains) != 1 {
			t.Errorf("got ID %s, %d chains, error %v", id, len(chains), err)
		}
	})
}

func TestRFC5280_RF20_LintersFindNothingWrongWithALeaf(t *testing.T) {
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{
		IncludeSources: lint.SourceList{lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC6962, lint.RFC8813, lint.Community},
	})
	if err != nil {
		t.Fatal(err)
	}
	// These do not hold for SVIDs, or for names that entries may have.
	accepted := map[string]string{
		"w_rfc_dnsname_underscore_in_trd": "names with underscores are in use inside of networks",
	}
	eachLeaf(t, func(t *testing.T, c leafCase) {
		parsed, err := zx509.ParseCertificate(c.cert.Raw)
		if err != nil {
			t.Fatal(err)
		}
		for name, result := range zlint.LintCertificateEx(parsed, registry).Results {
			if result.Status > lint.Pass && accepted[name] == "" {
				t.Errorf("%s: %s %s", name, result.Status, result.Details)
			}
		}
	})
}

func writePEM(tb testing.TB, dir, name string, certs ...[]byte) string {
	tb.Helper()
	var out []byte
	for _, der := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, out, 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

// openssl runs it, or skips the test.
func openssl(t *testing.T, args ...string) string {
	t.Helper()
	harness.NeedCommand(t, "openssl")
	out, err := exec.Command("openssl", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestRFC5280_RF20_OpenSSLAcceptsALeaf(t *testing.T) {
	eachLeaf(t, func(t *testing.T, c leafCase) {
		dir := t.TempDir()
		root, leaf := writePEM(t, dir, "root.pem", c.h.root().Raw), writePEM(t, dir, "leaf.pem", c.cert.Raw)
		for _, purpose := range []string{"sslclient", "sslserver"} {
			openssl(t, "verify", "-x509_strict", "-no_check_time", "-purpose", purpose, "-CAfile", root, leaf)
		}
		if strings.HasSuffix(t.Name(), "P-256/names") {
			out := openssl(t, "asn1parse", "-in", leaf)
			for _, want := range []string{"X509v3 Subject Alternative Name", "X509v3 Key Usage", "UTCTIME"} {
				if !strings.Contains(out, want) {
					t.Errorf("openssl asn1parse does not show %q:\n%s", want, out)
				}
			}
		}
	})
}

func TestRFC5280_RF10_TimesAfter2049AreGeneralizedTime(t *testing.T) {
	h := newHouse(t)
	h.clock.t = time.Date(2049, 12, 31, 23, 59, 30, 0, time.UTC)
	h.keys.set(newX509Authority(t, newKey(t, elliptic.P256()), func(c *x509.Certificate) { c.NotAfter = h.clock.t.AddDate(10, 0, 0) }))
	cert := h.leaf(t, workload(t))
	for want, tag := range map[string]byte{"491231235920Z": 23, "20500101005930Z": 24} {
		if !bytes.Contains(cert.RawTBSCertificate, append([]byte{tag, byte(len(want))}, want...)) {
			t.Errorf("%q with tag %d is not in the certificate", want, tag)
		}
	}
	if !cert.NotAfter.Equal(h.clock.t.Add(time.Hour)) {
		t.Errorf("ends at %s", cert.NotAfter)
	}
}

func TestX509LifetimesAreTheEntrysOrTheDefault(t *testing.T) {
	h := newHouse(t, func(o *issue.Options) { o.X509TTL, o.AgentTTL = 2*time.Hour, 3*time.Hour })
	now := start.Truncate(time.Second)
	check := func(what string, svid *issue.X509SVID, err error, ttl time.Duration) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		cert := parse(t, svid.Chain[0])
		if want := now.Add(ttl); !cert.NotAfter.Equal(want) || !svid.ExpiresAt.Equal(want) {
			t.Errorf("%s: ends at %s and says %s, want %s", what, cert.NotAfter, svid.ExpiresAt, want)
		}
		if want := now.Add(-10 * time.Second); !cert.NotBefore.Equal(want) {
			t.Errorf("%s: begins at %s, want %s", what, cert.NotBefore, want)
		}
		if svid.SerialNumber != cert.SerialNumber.String() {
			t.Errorf("%s: serial number %s, but the certificate has %s", what, svid.SerialNumber, cert.SerialNumber)
		}
	}
	ctx := context.Background()
	svid, err := h.WorkloadX509(ctx, workload(t), newCSR(t, nil))
	check("default", svid, err, 2*time.Hour)
	svid, err = h.WorkloadX509(ctx, workload(t, func(e *entry.Entry) { e.X509SVIDTTL, e.Hint = time.Minute, "internal" }), newCSR(t, nil))
	check("entry", svid, err, time.Minute)
	if svid.Hint != "internal" {
		t.Errorf("the hint is %q, want the entry's", svid.Hint)
	}
	svid, err = h.NodeX509(ctx, spiffeid.RequireFromPath(td, "/spire/agent/join_token/1"), newCSR(t, nil))
	check("node", svid, err, 3*time.Hour)
	csr := newCSR(t, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/web")}})
	svid, err = h.MintX509(ctx, csr, 0)
	check("minted with the default", svid, err, 2*time.Hour)
	svid, err = h.MintX509(ctx, csr, 90*time.Second)
	check("minted", svid, err, 90*time.Second)
	svid, err = h.DownstreamCA(ctx, newCSR(t, nil), 4*time.Hour)
	check("downstream", svid, err, 4*time.Hour)
}

func TestRFC5280_RF11_NoCertificateOutlivesOrPredatesItsAuthority(t *testing.T) {
	h := newHouse(t)
	h.keys.set(newX509Authority(t, newKey(t, elliptic.P256()), func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = start.Add(-5*time.Second), start.Add(30*time.Minute)
	}))
	root := h.root()
	ctx := context.Background()
	e := workload(t, func(e *entry.Entry) { e.X509SVIDTTL = 100 * 24 * time.Hour })
	for name, issued := range map[string]func() (*issue.X509SVID, error){
		"workload":   func() (*issue.X509SVID, error) { return h.WorkloadX509(ctx, e, newCSR(t, nil)) },
		"downstream": func() (*issue.X509SVID, error) { return h.DownstreamCA(ctx, newCSR(t, nil), 0) },
		"node": func() (*issue.X509SVID, error) {
			return h.NodeX509(ctx, spiffeid.RequireFromPath(td, "/spire/agent/x/1"), newCSR(t, nil))
		},
	} {
		svid, err := issued()
		if err != nil {
			t.Fatal(err)
		}
		cert := parse(t, svid.Chain[0])
		if !cert.NotAfter.Equal(root.NotAfter) || !cert.NotBefore.Equal(root.NotBefore) {
			t.Errorf("%s: valid from %s to %s, the authority from %s to %s", name, cert.NotBefore, cert.NotAfter, root.NotBefore, root.NotAfter)
		}
	}
	h.clock.add(30 * time.Minute)
	if _, err := h.WorkloadX509(ctx, e, newCSR(t, nil)); !errors.Is(err, authority.ErrUnavailable) {
		t.Errorf("got error %v from an authority at its end, want ErrUnavailable", err)
	}
}

func TestX509SVID_X12_AnIntermediateAuthoritysChainFollowsTheLeaf(t *testing.T) {
	h := newHouse(t)
	root := h.keys.x509
	key := newKey(t, elliptic.P256())
	made, err := h.DownstreamCA(context.Background(), newCSRFor(t, key, nil), 0)
	if err != nil {
		t.Fatal(err)
	}
	intermediate := parse(t, made.Chain[0])
	h.keys.set(&authority.X509{ID: "sub", Certificate: intermediate, Chain: []*x509.Certificate{intermediate}, Signer: key})
	svid, err := h.WorkloadX509(context.Background(), workload(t), newCSR(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	if len(svid.Chain) != 2 || !bytes.Equal(svid.Chain[1], intermediate.Raw) {
		t.Fatalf("the chain has %d certificates; want the leaf and the intermediate", len(svid.Chain))
	}
	bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{root.Certificate})
	if _, _, err := x509svid.ParseAndVerify(svid.Chain, bundle, x509svid.WithTime(start)); err != nil {
		t.Error(err)
	}
	dir := t.TempDir()
	openssl(t, "verify", "-x509_strict", "-no_check_time", "-CAfile", writePEM(t, dir, "root.pem", root.Certificate.Raw),
		"-untrusted", writePEM(t, dir, "sub.pem", intermediate.Raw), writePEM(t, dir, "leaf.pem", svid.Chain[0]))
}

func TestDownstreamCA_X09_X10_X14_X21_X26_X29_IsASigningCertificateOfTheTrustDomain(t *testing.T) {
	h := newHouse(t)
	key := newKey(t, elliptic.P256())
	svid, err := h.DownstreamCA(context.Background(), hostileCSR(t, key), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert := parse(t, svid.Chain[0])
	if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://example.org" || svid.ID != td.ID() {
		t.Errorf("URIs are %v", cert.URIs)
	}
	if len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) != 0 {
		t.Error("it has other names")
	}
	if !cert.IsCA || cert.MaxPathLen != -1 || !extension(cert, "2.5.29.19").Critical {
		t.Errorf("cA %v, path length %d", cert.IsCA, cert.MaxPathLen)
	}
	if want := x509.KeyUsageCertSign | x509.KeyUsageCRLSign; cert.KeyUsage != want || !extension(cert, "2.5.29.15").Critical {
		t.Errorf("key usages are %b, want %b", cert.KeyUsage, want)
	}
	if len(cert.ExtKeyUsage) != 0 || len(cert.Extensions) != 5 {
		t.Errorf("%d extended key usages, %d extensions; want 0 and 5", len(cert.ExtKeyUsage), len(cert.Extensions))
	}
	if cert.Subject.CommonName != "example.org" || bytes.Equal(cert.RawSubject, h.root().RawSubject) { // RF-03
		t.Errorf("subject is %s", cert.Subject)
	}
	if !bytes.Equal(cert.AuthorityKeyId, h.root().SubjectKeyId) { // RF-05
		t.Error("authorityKeyIdentifier is not the authority's")
	}
}

func TestDownstreamCA_X16_RF07_ThePathLengthOfTheAuthorityIsHonoured(t *testing.T) {
	h := newHouse(t)
	for above, want := range map[int]int{2: 1, 1: 0, 0: -1} {
		h.keys.set(newX509Authority(t, newKey(t, elliptic.P256()), func(c *x509.Certificate) {
			c.MaxPathLen, c.MaxPathLenZero = above, above == 0
		}))
		svid, err := h.DownstreamCA(context.Background(), newCSR(t, nil), 0)
		if above == 0 {
			if err == nil {
				t.Error("an authority of path length 0 signed another")
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := parse(t, svid.Chain[0]).MaxPathLen; got != want {
			t.Errorf("below path length %d it is %d, want %d", above, got, want)
		}
	}
}

func TestDownstreamCA_X16_RF07_ThePathLengthOfEveryAuthorityAboveIsHonoured(t *testing.T) {
	h := newHouse(t)
	limited := func(most int) *authority.X509 {
		return newX509Authority(t, newKey(t, elliptic.P256()), func(c *x509.Certificate) {
			c.MaxPathLen, c.MaxPathLenZero = most, most == 0
		})
	}
	for above, want := range map[int]int{3: 1, 2: 0, 1: -1} {
		own, over := limited(-1), limited(above)
		h.keys.set(&authority.X509{ID: "sub", Certificate: own.Certificate, Signer: own.Signer, Chain: []*x509.Certificate{own.Certificate, over.Certificate}})
		svid, err := h.DownstreamCA(context.Background(), newCSR(t, nil), 0)
		if want < 0 {
			wantInvalid(t, err)
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := parse(t, svid.Chain[0]).MaxPathLen; got != want {
			t.Errorf("two below path length %d it is %d, want %d", above, got, want)
		}
	}
}

func TestNodeIDsAreThoseOfAgents(t *testing.T) {
	h := newHouse(t)
	for _, id := range []spiffeid.ID{
		{},
		td.ID(),
		spiffeid.RequireFromPath(td, "/web"),
		spiffeid.RequireFromPath(td, "/spire/server"),
		spiffeid.RequireFromPath(td, "/spire/agent"),
		spiffeid.RequireFromString("spiffe://other.org/spire/agent/x/1"),
	} {
		_, err := h.NodeX509(context.Background(), id, newCSR(t, nil))
		wantInvalid(t, err)
	}
	id := spiffeid.RequireFromPath(td, "/spire/agent/join_token/1")
	svid, err := h.NodeX509(context.Background(), id, hostileCSR(t, newKey(t, elliptic.P256())))
	if err != nil {
		t.Fatal(err)
	}
	cert := parse(t, svid.Chain[0])
	if got, err := x509svid.IDFromCert(cert); err != nil || got != id || svid.ID != id || len(cert.DNSNames) != 0 {
		t.Errorf("got ID %s, %s, DNS names %v, error %v", got, svid.ID, cert.DNSNames, err)
	}
}

func TestWithoutAnAuthorityNothingIsIssued(t *testing.T) {
	h := newHouse(t)
	h.keys.set(nil)
	if _, err := h.WorkloadX509(context.Background(), workload(t), newCSR(t, nil)); !errors.Is(err, authority.ErrUnavailable) {
		t.Errorf("got error %v", err)
	}
	if _, err := h.ServerTLS(); !errors.Is(err, authority.ErrUnavailable) {
		t.Errorf("got error %v", err)
	}
}

func TestACancelledRequestIsNotSigned(t *testing.T) {
	h := newHouse(t)
	signer := &captureSigner{Signer: h.keys.x509.Signer}
	h.keys.set(&authority.X509{ID: "test", Certificate: h.root(), Signer: signer})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := h.WorkloadX509(ctx, workload(t), newCSR(t, nil)); !errors.Is(err, context.Canceled) || signer.digest != nil {
		t.Errorf("got error %v; signed: %v", err, signer.digest != nil)
	}
	if _, err := h.WorkloadJWT(ctx, workload(t), []string{"a"}); !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v", err)
	}
}

// faultySigner signs something else than it was asked to.
type faultySigner struct{ crypto.Signer }

func (s *faultySigner) Sign(rand io.Reader, _ []byte, opts crypto.SignerOpts) ([]byte, error) {
	digest := sha256.Sum256([]byte("something else"))
	return s.Signer.Sign(rand, digest[:], opts)
}

func TestWhatAFaultyDeviceSignsDoesNotLeaveTheHouse(t *testing.T) {
	h := newHouse(t)
	faulty := &faultySigner{h.keys.x509.Signer}
	root := h.root()
	for _, remote := range []bool{true, false} { // without the check it would
		h.keys.set(&authority.X509{ID: "test", Certificate: root, Signer: faulty, Remote: remote})
		if _, err := h.WorkloadX509(context.Background(), workload(t), newCSR(t, nil)); (err != nil) != remote {
			t.Errorf("X.509, remote %v: got error %v", remote, err)
		}
		h.keys.jwt = &authority.JWT{ID: "test", Algorithm: "ES256", Signer: faulty, ExpiresAt: start.Add(time.Hour), Remote: remote}
		if _, err := h.WorkloadJWT(context.Background(), workload(t), []string{"a"}); (err != nil) != remote {
			t.Errorf("JWT, remote %v: got error %v", remote, err)
		}
	}
	h.keys.set(&authority.X509{ID: "good", Certificate: root, Signer: faulty.Signer, Remote: true})
	if _, err := h.WorkloadX509(context.Background(), workload(t), newCSR(t, nil)); err != nil {
		t.Errorf("a device that works: %v", err)
	}
}

func TestSerialNumbersInDecimal(t *testing.T) {
	h := newHouse(t)
	svid, err := h.WorkloadX509(context.Background(), workload(t), newCSR(t, nil))
	if err != nil {
		t.Fatal(err)
	}
	n, ok := new(big.Int).SetString(svid.SerialNumber, 10)
	if !ok || n.Cmp(parse(t, svid.Chain[0]).SerialNumber) != 0 {
		t.Errorf("serial number %s is not the certificate's", svid.SerialNumber)
	}
}
