package azureimds_test

import (
	"crypto/x509"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/azureimds"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestADocumentThatProvesNothingIsRefused goes through answers to a nonce by which
// nobody must become a node.
func TestADocumentThatProvesNothingIsRefused(t *testing.T) {
	azure, config := world(t, machine())
	s := newServer(t, config)
	other := func(change func(*harness.AzureMachine)) harness.AzureMachine {
		m := machine()
		change(&m)
		return m
	}
	// by signs a document by a certificate that is issued as a test wants it.
	by := func(change func(*x509.Certificate), issuer *x509.Certificate, more ...*x509.Certificate) func(string) []byte {
		c := &x509.Certificate{DNSNames: []string{"metadata.azure.com"}}
		change(c)
		key := azure.RootKey
		if issuer == nil {
			issuer, key = nil, nil
		}
		cert, certKey := harness.IssueRSA(t, c, issuer, key)
		return func(nonce string) []byte {
			return response(t, "pkcs7", harness.SignCMS(t, []byte(fresh(machine(), nonce)), cert, certKey, more...))
		}
	}
	signed := func(doc func(nonce string) string) func(string) []byte {
		return func(nonce string) []byte { return response(t, "pkcs7", azure.Sign(t, doc(nonce))) }
	}
	good := signed(func(nonce string) string { return fresh(machine(), nonce) })
	seen := ""
	for name, c := range map[string]struct {
		answer func(nonce string) []byte
		want   string
	}{
		"a self-signed certificate":    {by(func(*x509.Certificate) {}, nil), "does not lead to an authority"},
		"another's on the Web":         {by(func(c *x509.Certificate) { c.DNSNames = []string{"www.example.org"} }, azure.Root), "none of Azure's metadata services"},
		"one whose name ends alike":    {by(func(c *x509.Certificate) { c.DNSNames = []string{"evilmetadata.azure.com"} }, azure.Root), "none of Azure's metadata services"},
		"one with the name inside":     {by(func(c *x509.Certificate) { c.DNSNames = []string{"metadata.azure.com.evil.org"} }, azure.Root), "none of Azure's metadata services"},
		"one with the name as subject": {by(func(c *x509.Certificate) { c.DNSNames, c.Subject.CommonName = nil, "metadata.azure.com" }, azure.Root), "none of Azure's metadata services"},
		"an expired certificate": {by(func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-48*time.Hour), time.Now().Add(-24*time.Hour)
		}, azure.Root), "has expired, or is not valid yet"},
		"one whose issuer is elsewhere": {by(func(c *x509.Certificate) { c.IssuingCertificateURL = []string{"http://169.254.169.254/pkiops/x"} }, nil), "does not lead to an authority"},
		"one whose issuer is a file":    {by(func(c *x509.Certificate) { c.IssuingCertificateURL = []string{"file:///pki/etc/passwd"} }, nil), "does not lead to an authority"},
		"one whose issuer is a query": {by(func(c *x509.Certificate) {
			c.IssuingCertificateURL = []string{"http://" + config.CAIssuerHosts[0] + "/pki?x=y"}
		}, nil), "does not lead to an authority"},
		"one that says a true issuer": {by(func(c *x509.Certificate) {
			c.IssuingCertificateURL = []string{"http://" + config.CAIssuerHosts[0] + harness.AzureIssuerPath}
		}, nil, azure.Intermediate, azure.Root), "does not lead to an authority"},
		"a stranger's signature": {func(nonce string) []byte {
			_, key := harness.IssueRSA(t, &x509.Certificate{}, nil, nil)
			return response(t, "pkcs7", harness.SignCMS(t, []byte(fresh(machine(), nonce)), azure.Leaf, key))
		}, "signature is wrong"},
		"another nonce":             {signed(func(string) string { return fresh(machine(), "1234567890") }), "another nonce"},
		"no nonce":                  {signed(func(string) string { return fresh(machine(), "") }), "another nonce"},
		"a foreign subscription":    {signed(func(n string) string { return fresh(other(func(m *harness.AzureMachine) { m.Subscription = app }), n) }), "may not attest here"},
		"a subscription of none":    {signed(func(n string) string { return fresh(other(func(m *harness.AzureMachine) { m.Subscription = "" }), n) }), "no subscription ID"},
		"a machine that is a path":  {signed(func(n string) string { return fresh(other(func(m *harness.AzureMachine) { m.ID = "../../server" }), n) }), "no machine's ID"},
		"a machine that is a query": {signed(func(n string) string { return fresh(other(func(m *harness.AzureMachine) { m.ID = vm + "' or '1" }), n) }), "no machine's ID"},
		"no machine":                {signed(func(n string) string { return fresh(other(func(m *harness.AzureMachine) { m.ID = "" }), n) }), "no machine's ID"},
		"an expired document": {signed(func(n string) string {
			return harness.AzureDocument(machine(), n, time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour))
		}), "has expired"},
		"a document of tomorrow": {signed(func(n string) string {
			return harness.AzureDocument(machine(), n, time.Now().Add(24*time.Hour), time.Now().Add(48*time.Hour))
		}), "not yet made"},
		"no time": {signed(func(n string) string { return strings.Replace(fresh(machine(), n), "timeStamp", "timeStam", 1) }), "from when to when"},
		"a time of no form": {signed(func(n string) string {
			return strings.Replace(fresh(machine(), n), `"createdOn":"`, `"createdOn":"x`, 1)
		}), "malformed attested document"},
		"no JSON":             {signed(func(string) string { return "<html>" }), "malformed attested document"},
		"another encoding":    {func(n string) []byte { return response(t, "jws", azure.Sign(t, fresh(machine(), n))) }, "not as pkcs7"},
		"nothing signed":      {func(string) []byte { return response(t, "pkcs7", "") }, "holds no document"},
		"half a signature":    {func(n string) []byte { return response(t, "pkcs7", azure.Sign(t, fresh(machine(), n))[:800]) }, "no PKCS #7"},
		"no base64":           {func(string) []byte { return response(t, "pkcs7", "<html>") }, "not base64"},
		"a huge signature":    {func(string) []byte { return response(t, "pkcs7", strings.Repeat("A", 40<<10)) }, "the most is"},
		"a huge answer":       {func(string) []byte { return make([]byte, 70<<10) }, "the most is"},
		"an empty answer":     {func(string) []byte { return nil }, "malformed"},
		"null":                {func(string) []byte { return []byte("null") }, "holds no document"},
		"the nonce":           {func(n string) []byte { return []byte(n) }, "malformed"},
		"without certificate": {func(n string) []byte { return response(t, "pkcs7", withoutCertificate(t, azure, fresh(machine(), n))) }, "does not bring the certificate"},
		"a replayed document": {func(n string) []byte {
			if seen == "" { // of an attestation that went through
				if _, err := s.Verify(t.Context(), []byte("x"), answering(func(n string) []byte { seen = string(good(n)); return []byte(seen) })); err != nil {
					t.Error(err)
				}
			}
			return []byte(seen)
		}, "another nonce"},
	} {
		e, err := s.Verify(t.Context(), []byte("x"), answering(c.answer))
		if err == nil || e != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	if _, err := s.Verify(t.Context(), make([]byte, 70<<10), answering(good)); err == nil {
		t.Error("a huge payload is taken")
	}
	if _, err := s.Verify(t.Context(), []byte("x"), answering(good)); err != nil {
		t.Errorf("the true one is refused: %v", err)
	}
}

// withoutCertificate signs a document, and brings another certificate than that.
func withoutCertificate(t testing.TB, azure *harness.Azure, doc string) string {
	t.Helper()
	leaf := *azure.Leaf
	leaf.Raw = azure.Root.Raw
	return harness.SignCMS(t, []byte(doc), &leaf, azure.Key)
}

// TestWhatComesByPlainHTTPIsNotKeptUnlessItIsTrue has someone on the way answer with
// another certificate: it admits nobody, and nothing of it stays.
func TestWhatComesByPlainHTTPIsNotKeptUnlessItIsTrue(t *testing.T) {
	azure, config := world(t, machine())
	s, agent := newServer(t, config), newAgent(t, azure, azureimds.AgentConfig{})
	fake, _ := harness.IssueRSA(t, &x509.Certificate{
		Subject: azure.Intermediate.Subject, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	azure.Break(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(fake.Raw) })
	if _, err := attest(t, s, agent); err == nil || errors.Is(err, attestors.ErrUnavailable) {
		t.Errorf("error is %v", err)
	}
	azure.Break(nil)
	if _, err := attest(t, s, agent); err != nil {
		t.Errorf("the true one is refused afterwards: %v", err)
	}
}

// TestNothingIsFetchedForAStranger counts what someone can have the server fetch
// who has no document over its nonce.
func TestNothingIsFetchedForAStranger(t *testing.T) {
	fetched := 0
	host := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { fetched++ }))
	defer host.Close()
	_, config := world(t, machine())
	config.CAIssuerHosts = []string{strings.TrimPrefix(host.URL, "http://")}
	s := newServer(t, config)
	cert, key := harness.IssueRSA(t, &x509.Certificate{DNSNames: []string{"metadata.azure.com"}, IssuingCertificateURL: []string{host.URL + "/pki/x.crt"}}, nil, nil)
	for _, doc := range []func(n string) string{
		func(string) string { return fresh(machine(), "0") },
		func(n string) string {
			m := machine()
			m.Subscription = app
			return fresh(m, n)
		},
	} {
		if _, err := s.Verify(t.Context(), []byte("x"), answering(func(n string) []byte {
			return response(t, "pkcs7", harness.SignCMS(t, []byte(doc(n)), cert, key))
		})); err == nil {
			t.Error("admitted")
		}
	}
	if fetched != 0 {
		t.Errorf("%d were fetched", fetched)
	}
}

func FuzzVerify(f *testing.F) {
	azure, config := world(f, machine())
	s := newServer(f, config)
	f.Add(response(f, "pkcs7", azure.Sign(f, fresh(machine(), "1234567890"))))
	f.Add(response(f, "pkcs7", "AAAA"))
	f.Add([]byte(`{"document": {"encoding": 1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := s.Verify(t.Context(), []byte("x"), answering(func(string) []byte { return data })); err == nil {
			t.Error("admitted without the nonce")
		}
	})
}
