package conformance

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/test/harness"
)

// named gives a certificate names as they are, whatever Go thinks of them.
func named(uris ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		var names []asn1.RawValue
		for _, u := range uris {
			names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
		}
		der, err := asn1.Marshal(names)
		if err != nil {
			panic(err)
		}
		c.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}}
	}
}

func parsedURL(text string) *url.URL {
	u, err := url.Parse(text)
	if err != nil {
		panic(err)
	}
	return u
}

func TestX509SVID_X04_X08_X30_GoodClientsAreLetIn(t *testing.T) {
	w := theWorld(t)
	for name, change := range map[string]func(*x509.Certificate){
		"empty subject, critical names": nil,
		"other names beside the URI": func(c *x509.Certificate) {
			c.ExtraExtensions = nil
			c.URIs = []*url.URL{parsedURL(adminID)}
			c.DNSNames, c.EmailAddresses, c.IPAddresses = []string{"a.example.org"}, []string{"a@example.org"}, []net.IP{net.IPv4(10, 0, 0, 1)}
		},
		"a subject": func(c *x509.Certificate) { c.Subject.CommonName = "operator" },
	} {
		t.Run(name, func(t *testing.T) {
			if err := w.over(t, w.forge(t, change)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestX509SVID_X02_X03_X05_X30_X31_X32_X33_X34_A13_RF14_RF17_BadClientsAreRefused(t *testing.T) {
	w := theWorld(t)
	for name, change := range map[string]func(*x509.Certificate){
		"X02 two SPIFFE IDs":                 named(adminID, "spiffe://example.org/other"),
		"X02 a SPIFFE ID twice":              named(adminID, adminID),
		"X02 a SPIFFE ID and a URL":          named(adminID, "https://example.org/"),
		"X03 no URI":                         func(c *x509.Certificate) { c.ExtraExtensions, c.DNSNames = nil, []string{"operator.example.org"} },
		"X31 cA":                             func(c *x509.Certificate) { c.IsCA = true },
		"X05 X31 cA and keyCertSign":         func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign },
		"X32 keyCertSign":                    func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"X32 cRLSign":                        func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign },
		"X33 another scheme":                 named("https://example.org/operator"),
		"X34 root path":                      named("spiffe://example.org"),
		"X34 root path with a slash":         named("spiffe://example.org/"),
		"X30 expired":                        func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
		"X30 not yet valid":                  func(c *x509.Certificate) { c.NotBefore = time.Now().Add(10 * time.Minute) },
		"A13 RF14 another trust domain":      named("spiffe://other.org/operator"),
		"A13 RF14 a subdomain of ours":       named("spiffe://sub.example.org/operator"),
		"RF17 an unknown critical extension": func(c *x509.Certificate) { critical(c, 1, 2, 3, 4) },
		"RF17 critical policy constraints":   func(c *x509.Certificate) { critical(c, 2, 5, 29, 36) },
	} {
		t.Run(name, func(t *testing.T) {
			wantRefusal(t, w.over(t, w.forge(t, change)))
		})
	}
}

func critical(c *x509.Certificate, oid ...int) {
	c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: oid, Critical: true, Value: []byte{0x30, 0x03, 0x80, 0x01, 0x00}})
}

func wantRefusal(t testing.TB, err error) {
	t.Helper()
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated, codes.Unavailable: // the last: the handshake failed
	default:
		t.Errorf("the answer is %v, want a refusal", err)
	}
}

func TestX509SVID_X13_ASigningCertificateIsNoPeer(t *testing.T) {
	w := theWorld(t)
	wantRefusal(t, w.over(t, tls.Certificate{Certificate: [][]byte{w.ca.Raw}, PrivateKey: w.caKey}))
}

// intermediate makes an authority below the trust domain's own.
func (w *world) intermediate(t testing.TB, change func(*x509.Certificate)) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	pair := w.forge(t, func(c *x509.Certificate) {
		named("spiffe://example.org")(c)
		c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign, nil
		c.Subject.CommonName = "below"
		if change != nil {
			change(c)
		}
	})
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	must(t, err)
	return cert, pair.PrivateKey.(crypto.Signer)
}

func TestX509SVID_X12_X17_X30_RF07_RF13_ChainsAreValidatedWhole(t *testing.T) {
	w := theWorld(t)
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		deeper bool
		ok     bool
	}{
		"X12 an intermediate":            {ok: true},
		"X12 two intermediates":          {deeper: true, ok: true},
		"RF07 deeper than pathLen":       {change: func(c *x509.Certificate) { c.MaxPathLenZero = true }, deeper: true},
		"RF07 as deep as pathLen":        {change: func(c *x509.Certificate) { c.MaxPathLenZero = true }, ok: true},
		"X30 an intermediate without cA": {change: func(c *x509.Certificate) { c.IsCA = false }},
		"X30 expired intermediate":       {change: func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }},
		"X17 RF13 within its constraint": {change: func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
		}, ok: true},
		"X17 RF13 outside its constraint": {change: func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.org"}, true
		}},
		"X17 RF13 excluded": {change: func(c *x509.Certificate) {
			c.ExcludedURIDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
		}},
	} {
		t.Run(name, func(t *testing.T) {
			ca, key := w.intermediate(t, c.change)
			chain := [][]byte{ca.Raw}
			if c.deeper {
				pair := forgeBy(t, ca, key, func(c *x509.Certificate) {
					named("spiffe://example.org")(c)
					c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
					c.Subject.CommonName = "deeper"
				})
				var err error
				ca, err = x509.ParseCertificate(pair.Certificate[0])
				must(t, err)
				key = pair.PrivateKey.(crypto.Signer)
				chain = append([][]byte{ca.Raw}, chain...)
			}
			leaf := forgeBy(t, ca, key, nil)
			leaf.Certificate = append(leaf.Certificate, chain...)
			switch err := w.over(t, leaf); {
			case c.ok && err != nil:
				t.Error(err)
			case !c.ok:
				wantRefusal(t, err)
			}
		})
	}
}

func TestX509SVID_X30_ACertificateOfAStrangersAuthorityIsRefused(t *testing.T) {
	w := theWorld(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	twin := *w.ca // all of ours but the key
	twin.PublicKey = key.Public()
	der, err := x509.CreateCertificate(rand.Reader, &twin, &twin, key.Public(), key)
	must(t, err)
	parsed, err := x509.ParseCertificate(der)
	must(t, err)
	wantRefusal(t, w.over(t, forgeBy(t, parsed, key, nil)))
}

func TestX509SVID_X09_X10_X11_X14_X19_X20_X21_X22_X26_X29_ID23_ID24_ID25_ID26_RF06_RF08_TheAuthorityIsAnSVIDOfItsTrustDomain(t *testing.T) {
	w := theWorld(t)
	c := w.ca
	if len(c.URIs) != 1 || c.URIs[0].String() != "spiffe://"+domain {
		t.Errorf("its URIs are %v", c.URIs)
	}
	if !c.IsCA || !c.BasicConstraintsValid {
		t.Error("it is no authority")
	}
	if c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("key usage is %b", c.KeyUsage)
	}
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) != 0 {
		t.Error("it has extended key usages")
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		t.Errorf("it is not self-signed: %v", err)
	}
	for _, oid := range []string{"2.5.29.19", "2.5.29.15"} {
		if !slices.ContainsFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.String() == oid && e.Critical }) {
			t.Errorf("extension %s is missing or not critical", oid)
		}
	}
	leaf, err := x509.ParseCertificate(w.fetch(t, "/self").X509Svid)
	must(t, err)
	if err := leaf.CheckSignatureFrom(c); err != nil {
		t.Errorf("it has not signed the workload's SVID: %v", err)
	}
}

func TestRFC5280_RF20_OpenSSLAndGnuTLSAcceptWhatAWorkloadHolds(t *testing.T) {
	harness.NeedCommand(t, "openssl")
	harness.NeedCommand(t, "certtool")
	w := theWorld(t)
	dir := t.TempDir()
	svid := w.fetch(t, "/self")
	root, leaf := filepath.Join(dir, "root.pem"), filepath.Join(dir, "leaf.pem")
	must(t, os.WriteFile(root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: svid.Bundle}), 0o600))
	must(t, os.WriteFile(leaf, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: svid.X509Svid}), 0o600))
	for _, command := range [][]string{
		{"openssl", "verify", "-x509_strict", "-CAfile", root, leaf},
		{"certtool", "--verify", "--load-ca-certificate", root, "--infile", leaf},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", strings.Join(command, " "), err, out)
		}
	}
}

func TestRFC5280_RF18_NoCRLIsServed(t *testing.T) {
	stream, err := theWorld(t).api().FetchX509SVID(called(t), &workload.X509SVIDRequest{})
	must(t, err)
	m, err := stream.Recv()
	must(t, err)
	if len(m.Crl) != 0 {
		t.Errorf("there are %d CRLs", len(m.Crl))
	}
}

func TestRFC5280_RF21_J33_TheServerSpeaksTLS13AndNothingLess(t *testing.T) {
	w := theWorld(t)
	for _, version := range []uint16{tls.VersionTLS10, tls.VersionTLS11, tls.VersionTLS12} {
		conn, err := tls.Dial("tcp", w.address, &tls.Config{MinVersion: version, MaxVersion: version, InsecureSkipVerify: true})
		if err == nil {
			conn.Close()
			t.Errorf("%s is accepted", tls.VersionName(version))
		}
	}
	conn, err := tls.Dial("tcp", w.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	must(t, err)
	defer conn.Close()
	if v := conn.ConnectionState().Version; v != tls.VersionTLS13 {
		t.Errorf("%s was chosen", tls.VersionName(v))
	}
	// Without TLS there is nothing at all.
	plain, err := grpc.NewClient(w.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer plain.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := entryv1.NewEntryClient(plain).CountEntries(ctx, &entryv1.CountEntriesRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("without TLS the answer is %v", err)
	}
}

func TestBundle_X35_X36_X37_X38_J28_J29_TheDocumentIsOneKeyAnAuthority(t *testing.T) {
	w := theWorld(t)
	out := harness.Command{Args: []string{"bundle", "show", "-o", "spiffe", "--admin-socket", w.admin}}.Run(t)
	var doc struct {
		Keys []map[string]any `json:"keys"`
	}
	must(t, json.Unmarshal([]byte(out), &doc))
	uses := map[any]int{}
	for _, k := range doc.Keys {
		uses[k["use"]]++
		switch k["use"] {
		case "x509-svid":
			if _, ok := k["kid"]; ok {
				t.Error("an X.509 authority has a kid")
			}
			x5c, _ := k["x5c"].([]any)
			if len(x5c) != 1 {
				t.Fatalf("x5c is %v", k["x5c"])
			}
			der, err := base64.StdEncoding.DecodeString(x5c[0].(string))
			must(t, err)
			c, err := x509.ParseCertificate(der)
			must(t, err)
			if err := c.CheckSignatureFrom(c); err != nil {
				t.Errorf("it is not self-signed: %v", err)
			}
		case "jwt-svid":
			if kid, _ := k["kid"].(string); kid == "" {
				t.Error("a JWT authority has no kid")
			}
		default:
			t.Errorf("a key has the use %v", k["use"])
		}
		if _, ok := k["d"]; ok {
			t.Error("a private key is published")
		}
	}
	if uses["x509-svid"] == 0 || uses["jwt-svid"] == 0 {
		t.Errorf("the uses are %v", uses)
	}
}

// token signs claims with the trust domain's own JWT authority.
func (w *world) token(t testing.TB, claims map[string]any) string {
	t.Helper()
	part := func(v any) string {
		b, err := json.Marshal(v)
		must(t, err)
		return base64.RawURLEncoding.EncodeToString(b)
	}
	signed := part(map[string]any{"alg": "ES256", "kid": w.jwtKeyID, "typ": "JWT"}) + "." + part(claims)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, w.jwtKey, sum[:])
	must(t, err)
	return signed + "." + base64.RawURLEncoding.EncodeToString(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
}

func goodClaims() map[string]any {
	return map[string]any{"sub": "spiffe://example.org/web", "aud": []string{"us"}, "exp": time.Now().Add(time.Minute).Unix()}
}

func (w *world) validate(t testing.TB, token string) (*workload.ValidateJWTSVIDResponse, error) {
	t.Helper()
	return w.api().ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: "us", Svid: token})
}

func TestJWTSVID_J25_ClaimsOfOthersPassThrough(t *testing.T) {
	w := theWorld(t)
	claims := goodClaims()
	claims["https://example.org/team"] = "shop"
	claims["nested"] = map[string]any{"a": []any{"b", true}}
	resp, err := w.validate(t, w.token(t, claims))
	must(t, err)
	got := resp.Claims.AsMap()
	if got["https://example.org/team"] != "shop" || fmt.Sprint(got["nested"]) != "map[a:[b true]]" {
		t.Errorf("the claims are %v", got)
	}
}

func TestSPIFFEID_ID27_WhatIsSignedHoldsTheIDAndTheKey(t *testing.T) {
	w := theWorld(t)
	pair := w.forge(t, nil)
	must(t, w.over(t, pair))
	changed := slices.Clone(pair.Certificate[0])
	at := strings.Index(string(changed), "/operator")
	changed[at+1] = 'O'
	wantRefusal(t, w.over(t, tls.Certificate{Certificate: [][]byte{changed}, PrivateKey: pair.PrivateKey}))
	other := w.forge(t, nil)
	if cert, err := x509.ParseCertificate(pair.Certificate[0]); err != nil || !strings.Contains(string(cert.RawTBSCertificate), adminID) {
		t.Errorf("the ID is not in what is signed: %v", err)
	}
	wantRefusal(t, w.over(t, tls.Certificate{Certificate: pair.Certificate, PrivateKey: other.PrivateKey}))

	token := w.token(t, goodClaims())
	parts := strings.Split(token, ".")
	claims := goodClaims()
	claims["sub"] = "spiffe://example.org/admin"
	text, err := json.Marshal(claims)
	must(t, err)
	if _, err := w.validate(t, parts[0]+"."+base64.RawURLEncoding.EncodeToString(text)+"."+parts[2]); status.Code(err) != codes.InvalidArgument {
		t.Errorf("another subject: %v", err)
	}
}
