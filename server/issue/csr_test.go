package issue_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/issue"
)

func TestCSR_RF19_SupportedKeysAreAccepted(t *testing.T) {
	for name, signer := range map[string]crypto.Signer{
		"P-256":    newKey(t, elliptic.P256()),
		"P-384":    newKey(t, elliptic.P384()),
		"P-521":    newKey(t, elliptic.P521()),
		"RSA-2048": newRSA(t, 2048),
		"Ed25519":  newEd25519(t),
	} {
		csr, err := issue.ParseCSR(newCSRFor(t, signer, nil))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !csr.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(signer.Public()) {
			t.Errorf("%s: got another key", name)
		}
	}
}

func TestCSR_RF19_WeakAndUnknownKeysAreRefusedWithWhatIsSupported(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0") // else Go refuses to make such a request
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	exponent := *newRSA(t, 2048)
	exponent.E = 3
	even := *newRSA(t, 2048)
	even.E = 65538
	huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 8192, 1), E: 65537}
	for name, csr := range map[string][]byte{
		"P-224":      newCSRFor(t, newKey(t, elliptic.P224()), nil),
		"RSA-1024":   newCSRFor(t, small, nil),
		"RSA-8193":   forgeCSR(t, huge),
		"exponent 3": forgeCSR(t, &exponent.PublicKey),
		"even":       forgeCSR(t, &even.PublicKey),
	} {
		_, err := issue.ParseCSR(csr)
		wantInvalid(t, err)
		if !strings.Contains(err.Error(), "RSA with 2048 to 8192 bits") && !strings.Contains(err.Error(), "65537") {
			t.Errorf("%s: the error %q does not say what is supported", name, err)
		}
	}
}

// forgeCSR makes a request of a public key whose signature is not one.
func forgeCSR(tb testing.TB, public crypto.PublicKey) []byte {
	tb.Helper()
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		tb.Fatal(err)
	}
	return assembleCSR(tb, []byte{0x30, 0x00}, spki, nil, func([]byte) []byte { return make([]byte, 256) })
}

// assembleCSR makes a request out of its parts: the name, the public key and
// the value of the extension with the alternative names (nil: none). It says
// that it is signed with RSA and SHA-256.
func assembleCSR(tb testing.TB, subject, spki, names []byte, sign func(body []byte) []byte) []byte {
	tb.Helper()
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(0)
		b.AddBytes(subject)
		b.AddBytes(spki)
		b.AddASN1(cbasn1.Tag(0).ContextSpecific().Constructed(), func(b *cryptobyte.Builder) {
			if names == nil {
				return
			}
			b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}) // extensionRequest
				b.AddASN1(cbasn1.SET, func(b *cryptobyte.Builder) {
					b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
							b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{2, 5, 29, 17})
							b.AddASN1OctetString(names)
						})
					})
				})
			})
		})
	})
	body, err := b.Bytes()
	if err != nil {
		tb.Skip(err) // a fuzzed part too large
	}
	b = cryptobyte.NewBuilder(nil)
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(body)
		b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 11}) // sha256WithRSA
			b.AddASN1NULL()
		})
		b.AddASN1BitString(sign(body))
	})
	out, err := b.Bytes()
	if err != nil {
		tb.Skip(err)
	}
	return out
}

func TestCSR_RF19_ItsSignatureIsVerified(t *testing.T) {
	good := newCSR(t, nil)
	other := newCSR(t, nil)
	var parsed, foreign struct {
		Body      asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}
	for der, into := range map[*[]byte]any{&good: &parsed, &other: &foreign} {
		if _, err := asn1.Unmarshal(*der, into); err != nil {
			t.Fatal(err)
		}
	}
	parsed.Signature = foreign.Signature
	swapped, err := asn1.Marshal(parsed)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	sha1CSR := assembleSHA1(t)
	for name, csr := range map[string][]byte{
		"of another request": swapped, "with a bit flipped": flipped, "with SHA-1": sha1CSR,
		"forged": forgeCSR(t, newRSA(t, 2048).Public()),
	} {
		_, err := issue.ParseCSR(csr)
		if err == nil {
			t.Errorf("a signature %s was accepted", name)
			continue
		}
		wantInvalid(t, err)
	}
}

// assembleSHA1 makes a request that is signed, rightly, with SHA-1.
func assembleSHA1(tb testing.TB) []byte {
	tb.Helper()
	key := newRSA(tb, 2048)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		tb.Fatal(err)
	}
	csr := assembleCSR(tb, []byte{0x30, 0x00}, spki, nil, func(body []byte) []byte {
		digest := sha1.Sum(body)
		signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA1, digest[:])
		if err != nil {
			tb.Fatal(err)
		}
		return signature
	})
	oid := []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01}
	return bytes.Replace(csr, append(oid, 11), append(oid, 5), 1) // sha1WithRSA
}

func TestCSRsThatAreMalformedOrTooLargeAreRefused(t *testing.T) {
	good := newCSR(t, nil)
	for name, csr := range map[string][]byte{
		"missing":   nil,
		"truncated": good[:len(good)-1],
		"trailing":  append(bytes.Clone(good), 0),
		"garbage":   []byte("-----BEGIN CERTIFICATE REQUEST-----"),
		"too large": newCSR(t, &x509.CertificateRequest{DNSNames: []string{strings.Repeat("a", issue.MaxCSR)}}),
	} {
		if _, err := issue.ParseCSR(csr); err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			wantInvalid(t, err)
		}
	}
}

func TestEveryRequestWithACSRIsRefusedForABadOne(t *testing.T) {
	h := newHouse(t)
	ctx, bad := context.Background(), forgeCSR(t, newRSA(t, 2048).Public())
	_, err := h.WorkloadX509(ctx, workload(t), bad)
	wantInvalid(t, err)
	_, err = h.NodeX509(ctx, spiffeid.RequireFromPath(td, "/spire/agent/x/1"), bad)
	wantInvalid(t, err)
	_, err = h.MintX509(ctx, bad, 0)
	wantInvalid(t, err)
	_, err = h.DownstreamCA(ctx, bad, 0)
	wantInvalid(t, err)
}

func TestMintX509UsesNamesAndSubjectOfTheRequest(t *testing.T) {
	h := newHouse(t)
	for name, c := range map[string]struct {
		request x509.CertificateRequest
		subject string
	}{
		"no subject": {x509.CertificateRequest{}, ""},
		"names":      {x509.CertificateRequest{DNSNames: []string{"db.example.org", "db"}}, "CN=db.example.org"},
		"subject":    {x509.CertificateRequest{Subject: pkix.Name{Country: []string{"CH"}, Organization: []string{"Zunft & Söhne"}, CommonName: "db"}}, "CN=db,O=Zunft & Söhne,C=CH"},
		"subject without a common name": {
			x509.CertificateRequest{Subject: pkix.Name{Organization: []string{"Zunft"}}, DNSNames: []string{"db.example.org"}},
			"CN=db.example.org,O=Zunft",
		},
		"subject and names": {
			x509.CertificateRequest{Subject: pkix.Name{CommonName: "db user"}, DNSNames: []string{"db.example.org"}},
			"CN=db user",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c.request.URIs = []*url.URL{uri(t, "spiffe://example.org/db")}
			svid, err := h.MintX509(context.Background(), newCSR(t, &c.request), time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			cert := parse(t, svid.Chain[0])
			if got := cert.Subject.String(); got != c.subject {
				t.Errorf("subject is %q, want %q", got, c.subject)
			}
			if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://example.org/db" || svid.ID.Path() != "/db" {
				t.Errorf("URIs are %v", cert.URIs)
			}
			if strings.Join(cert.DNSNames, " ") != strings.Join(c.request.DNSNames, " ") {
				t.Errorf("DNS names are %v, want %v", cert.DNSNames, c.request.DNSNames)
			}
			if san := extension(cert, "2.5.29.17"); san.Critical != (c.subject == "") {
				t.Error("the criticality of subjectAltName is wrong")
			}
		})
	}
}

func TestMintX509TakesNothingElseFromTheRequest(t *testing.T) {
	h := newHouse(t)
	ca, err := asn1.Marshal(struct{ CA bool }{true})
	if err != nil {
		t.Fatal(err)
	}
	svid, err := h.MintX509(context.Background(), newCSR(t, &x509.CertificateRequest{
		URIs: []*url.URL{uri(t, "spiffe://example.org/db")},
		ExtraExtensions: []pkix.Extension{
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: ca},
			{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}},
		},
	}), 0)
	if err != nil {
		t.Fatal(err)
	}
	if cert := parse(t, svid.Chain[0]); cert.IsCA || len(cert.Extensions) != 6 {
		t.Errorf("cA %v, %d extensions", cert.IsCA, len(cert.Extensions))
	}
}

func TestMintX509_X01_X06_RefusesOtherNames(t *testing.T) {
	h := newHouse(t)
	id := uri(t, "spiffe://example.org/db")
	many := make([]string, entry.MaxNames+1)
	for i := range many {
		many[i] = "n" + big.NewInt(int64(i)).String() + ".example.org"
	}
	attribute := func(oid asn1.ObjectIdentifier, value any) pkix.Name {
		return pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{{Type: oid, Value: value}}}
	}
	for name, request := range map[string]x509.CertificateRequest{
		"no URI":            {DNSNames: []string{"db.example.org"}},
		"two URIs":          {URIs: []*url.URL{id, uri(t, "spiffe://example.org/web")}},
		"the same twice":    {URIs: []*url.URL{id, id}},
		"another URI":       {URIs: []*url.URL{uri(t, "https://example.org/db")}},
		"no path":           {URIs: []*url.URL{uri(t, "spiffe://example.org")}},
		"a slash":           {URIs: []*url.URL{uri(t, "spiffe://example.org/")}},
		"other domain":      {URIs: []*url.URL{uri(t, "spiffe://other.org/db")}},
		"the server":        {URIs: []*url.URL{uri(t, "spiffe://example.org/spire/server")}},
		"an agent":          {URIs: []*url.URL{uri(t, "spiffe://example.org/spire/agent/x/1")}},
		"the namespace":     {URIs: []*url.URL{uri(t, "spiffe://example.org/spire")}},
		"query":             {URIs: []*url.URL{uri(t, "spiffe://example.org/db?a=b")}},
		"upper case":        {URIs: []*url.URL{{Scheme: "spiffe", Host: "Example.org", Path: "/db"}}},
		"too long":          {URIs: []*url.URL{uri(t, "spiffe://example.org/"+strings.Repeat("a", 2048))}},
		"an address":        {URIs: []*url.URL{id}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 1)}},
		"mail":              {URIs: []*url.URL{id}, EmailAddresses: []string{"a@example.org"}},
		"bad DNS name":      {URIs: []*url.URL{id}, DNSNames: []string{"-db"}},
		"DNS name twice":    {URIs: []*url.URL{id}, DNSNames: []string{"db", "DB"}},
		"wildcard inside":   {URIs: []*url.URL{id}, DNSNames: []string{"a.*.b"}},
		"many DNS names":    {URIs: []*url.URL{id}, DNSNames: many},
		"long common name":  {URIs: []*url.URL{id}, Subject: pkix.Name{CommonName: strings.Repeat("a", 65)}},
		"control character": {URIs: []*url.URL{id}, Subject: pkix.Name{CommonName: "a\x00b"}},
		"country":           {URIs: []*url.URL{id}, Subject: pkix.Name{Country: []string{"CHE"}}},
		"country in UTF-8":  {URIs: []*url.URL{id}, Subject: pkix.Name{Country: []string{"ÖÖ"}}},
		"unknown attribute": {URIs: []*url.URL{id}, Subject: attribute(asn1.ObjectIdentifier{1, 2, 3}, "x")},
		"number":            {URIs: []*url.URL{id}, Subject: attribute(asn1.ObjectIdentifier{2, 5, 4, 3}, 5)},
		"many attributes":   {URIs: []*url.URL{id}, Subject: pkix.Name{Organization: strings.Split(strings.Repeat("a", 17), "")}},
	} {
		_, err := h.MintX509(context.Background(), newCSR(t, &request), 0)
		if err == nil {
			t.Errorf("%s: minted", name)
			continue
		}
		wantInvalid(t, err)
	}
	good := newCSR(t, &x509.CertificateRequest{URIs: []*url.URL{id}})
	for _, ttl := range []time.Duration{-time.Second, time.Millisecond} {
		_, err := h.MintX509(context.Background(), good, ttl)
		wantInvalid(t, err)
	}
}

func TestMintX509_ID04_AnEmptyFragmentOrQueryIsRefused(t *testing.T) {
	h := newHouse(t)
	key := newRSA(t, 2048)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	for id, valid := range map[string]bool{
		"spiffe://example.org/db": true, "spiffe://example.org/db#": false, "spiffe://example.org/db?": false, "SPIFFE://example.org/db": false,
	} {
		_, err := h.MintX509(context.Background(), signedCSR(t, key, []byte{0x30, 0x00}, spki, names(id)), 0)
		if valid && err != nil {
			t.Errorf("%s: %v", id, err)
		}
		if !valid {
			wantInvalid(t, err)
		}
	}
}

// names encodes alternative names with one URI.
func names(id string) []byte {
	b := cryptobyte.NewBuilder(nil)
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1(cbasn1.Tag(6).ContextSpecific(), func(b *cryptobyte.Builder) { b.AddBytes([]byte(id)) })
	})
	return b.BytesOrPanic()
}

func signedCSR(tb testing.TB, key *rsa.PrivateKey, subject, spki, names []byte) []byte {
	tb.Helper()
	return assembleCSR(tb, subject, spki, names, func(body []byte) []byte {
		digest := sha256.Sum256(body)
		signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
		if err != nil {
			tb.Fatal(err)
		}
		return signature
	})
}

func FuzzParseCSR(f *testing.F) {
	f.Add(newCSR(f, nil))
	f.Add(hostileCSR(f, newKey(f, elliptic.P256())))
	f.Add(newCSRFor(f, newRSA(f, 2048), nil))
	f.Add(newCSRFor(f, newEd25519(f), nil))
	f.Add(forgeCSR(f, newRSA(f, 2048).Public()))
	h := newHouse(f)
	e := workload(f)
	f.Fuzz(func(t *testing.T, der []byte) {
		csr, err := issue.ParseCSR(der)
		if err != nil {
			wantInvalid(t, err)
			return
		}
		svid, err := h.WorkloadX509(context.Background(), e, der)
		if err != nil {
			t.Fatalf("parsed, but not issued: %v", err)
		}
		cert := parse(t, svid.Chain[0])
		if !cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }).Equal(csr.PublicKey) {
			t.Error("issued for another key")
		}
		if len(cert.URIs) != 1 || cert.URIs[0].String() != e.SPIFFEID.String() || len(cert.DNSNames) != 0 {
			t.Errorf("issued for %v, %v", cert.URIs, cert.DNSNames)
		}
	})
}

// FuzzMintX509 puts any bytes where a request, rightly signed, has its subject
// and its names.
func FuzzMintX509(f *testing.F) {
	key := newRSA(f, 2048)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte{0x30, 0x00}, names("spiffe://example.org/db"))
	subject, err := asn1.Marshal(pkix.Name{Country: []string{"CH"}, Organization: []string{"Zunft & Söhne"}, CommonName: "db"}.ToRDNSequence())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(subject, names("spiffe://example.org/db#"))
	f.Add(subject, []byte{0x30, 0x00})
	h := newHouse(f)
	f.Fuzz(func(t *testing.T, subject, names []byte) {
		svid, err := h.MintX509(context.Background(), signedCSR(t, key, subject, spki, names), 0)
		if err != nil {
			wantInvalid(t, err)
			return
		}
		cert := parse(t, svid.Chain[0])
		if len(cert.URIs) != 1 || cert.URIs[0].String() != svid.ID.String() || !svid.ID.MemberOf(td) || svid.ID.Path() == "" {
			t.Errorf("minted for %v", cert.URIs)
		}
		for _, name := range cert.DNSNames {
			if err := entry.ValidateDNSName(name); err != nil {
				t.Error(err)
			}
		}
		if cert.IsCA || len(cert.Extensions) != 6 || len(cert.IPAddresses)+len(cert.EmailAddresses) != 0 {
			t.Error("minted more than was allowed")
		}
	})
}
