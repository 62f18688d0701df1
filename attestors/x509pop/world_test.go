package x509pop_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/x509pop"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("example.org")
	now = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)
)

func at(when time.Time) func() time.Time { return func() time.Time { return when } }

// identity is a certificate with its key and what it leads to.
type identity struct {
	cert  *x509.Certificate
	key   crypto.Signer
	above []*x509.Certificate // intermediates, the nearest first
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var serial int64 = 0xa00 // of the next certificate

// issue makes a certificate, valid for an hour around now. A nil issuer is the
// certificate itself; a change of nil changes nothing.
func (issuer *identity) issue(t testing.TB, key crypto.Signer, change func(*x509.Certificate)) *identity {
	t.Helper()
	serial++
	c := &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: "host-1"},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	if change != nil {
		change(c)
	}
	return issuer.sign(t, c, key.Public(), key)
}

func (issuer *identity) sign(t testing.TB, c *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *identity {
	t.Helper()
	parent, signer := c, key
	if issuer != nil {
		parent, signer = issuer.cert, issuer.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	out := &identity{key: key}
	if out.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	if issuer != nil && issuer.cert.Issuer.String() != issuer.cert.Subject.String() {
		out.above = append([]*x509.Certificate{issuer.cert}, issuer.above...)
	}
	return out
}

// asCA changes a template to that of an authority.
func asCA(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.Subject = pkix.Name{CommonName: name}
		c.IsCA, c.BasicConstraintsValid = true, true
		c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
		c.NotBefore, c.NotAfter = now.Add(-24*time.Hour), now.Add(24*time.Hour)
	}
}

func newRoot(t testing.TB, name string) *identity {
	t.Helper()
	return (*identity)(nil).issue(t, newKey(t), asCA(name))
}

// intermediate makes an authority below another.
func (issuer *identity) intermediate(t testing.TB, name string) *identity {
	t.Helper()
	return issuer.issue(t, newKey(t), asCA(name))
}

// node makes a certificate of a node, changed as a test wants it.
func (issuer *identity) node(t testing.TB, change func(*x509.Certificate)) *identity {
	t.Helper()
	return issuer.issue(t, newKey(t), change)
}

func pemOf(certs ...*x509.Certificate) []byte {
	var out []byte
	for _, cert := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	return out
}

func write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// files writes an identity as an agent reads it.
func (id *identity) files(t testing.TB) x509pop.AgentConfig {
	t.Helper()
	dir := t.TempDir()
	c := x509pop.AgentConfig{
		PrivateKeyPath:  filepath.Join(dir, "key.pem"),
		CertificatePath: filepath.Join(dir, "cert.pem"),
	}
	id.rewrite(t, c)
	return c
}

func (id *identity) rewrite(t testing.TB, c x509pop.AgentConfig) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(id.key)
	if err != nil {
		t.Fatal(err)
	}
	write(t, c.PrivateKeyPath, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	write(t, c.CertificatePath, pemOf(append([]*x509.Certificate{id.cert}, id.above...)...))
}

// agent makes the node's half of an identity.
func (id *identity) agent(t testing.TB) *x509pop.Agent {
	t.Helper()
	return newAgent(t, id.files(t))
}

func newAgent(t testing.TB, c x509pop.AgentConfig) *x509pop.Agent {
	t.Helper()
	a, err := x509pop.NewAgent(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// payload is what an identity's agent sends, without an agent's checks.
func (id *identity) payload(t testing.TB) []byte {
	t.Helper()
	chain := [][]byte{id.cert.Raw}
	for _, cert := range id.above {
		chain = append(chain, cert.Raw)
	}
	return payload(t, chain...)
}

func payload(t testing.TB, chain ...[]byte) []byte {
	t.Helper()
	data, err := json.Marshal(map[string]any{"certificates": chain})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// bundle writes a CA bundle.
func bundle(t testing.TB, roots ...*identity) string {
	t.Helper()
	return rewriteBundle(t, filepath.Join(t.TempDir(), "ca.pem"), roots...)
}

func rewriteBundle(t testing.TB, path string, roots ...*identity) string {
	t.Helper()
	var data []byte
	for _, root := range roots {
		data = append(data, pemOf(root.cert)...)
	}
	return write(t, path, data)
}

// newServer makes the server's half, at the time now.
func newServer(t testing.TB, c x509pop.ServerConfig) *x509pop.Server {
	t.Helper()
	s, err := x509pop.New(c, x509pop.Options{TrustDomain: td, Now: at(now)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// trusting makes a server that trusts one authority.
func trusting(t testing.TB, root *identity) *x509pop.Server {
	t.Helper()
	return newServer(t, x509pop.ServerConfig{CABundlePath: bundle(t, root)})
}

// attest runs an attestation between the two halves.
func attest(t testing.TB, s attestors.Server, a attestors.Agent) (*attestors.Evidence, error) {
	t.Helper()
	proof, err := a.Proof(t.Context())
	if err != nil {
		t.Fatalf("agent: %v", err)
	}
	return s.Verify(t.Context(), proof, a.Respond)
}

func mustAttest(t testing.TB, s attestors.Server, a attestors.Agent) *attestors.Evidence {
	t.Helper()
	evidence, err := attest(t, s, a)
	if err != nil {
		t.Fatal(err)
	}
	return evidence
}

// unasked fails the test if a node is challenged.
func unasked(t testing.TB) func(context.Context, []byte) ([]byte, error) {
	return func(context.Context, []byte) ([]byte, error) {
		t.Error("the node is challenged")
		return nil, context.Canceled
	}
}

func values(e *attestors.Evidence) []string {
	var out []string
	for _, s := range e.Selectors {
		out = append(out, s.String())
	}
	return out
}
