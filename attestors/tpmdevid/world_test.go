package tpmdevid_test

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

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/tpm"
	"github.com/hallmark-id/hallmark/attestors/tpmdevid"
	"github.com/hallmark-id/hallmark/test/harness"
)

// authority signs DevID certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{key: newKey(t)}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "machines"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	a.cert = a.sign(t, c, c, a.key.Public())
	return a
}

func (a *authority) sign(t testing.TB, c, parent *x509.Certificate, public crypto.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// certify makes a DevID certificate, changed as a test wants it.
func (a *authority) certify(t testing.TB, public crypto.PublicKey, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "host-1"}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if change != nil {
		change(c)
	}
	return a.sign(t, c, a.cert, public)
}

func pemOf(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
}

func write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// bundle writes the authority as the server reads it.
func (a *authority) bundle(t testing.TB) string {
	return write(t, filepath.Join(t.TempDir(), "ca.pem"), pemOf(a.cert))
}

// devIDTemplate is what owners make their device keys like.
func devIDTemplate(alg tpm2.TPMAlgID) tpm2.TPMTPublic {
	area := tpm.RSAAKTemplate
	if alg == tpm2.TPMAlgECC {
		area = tpm.AKTemplate
		area.ObjectAttributes.NoDA = false
	}
	area.ObjectAttributes.Restricted = false
	return area
}

// provision makes a device key in a TPM and has it certified. password is that of
// the key.
func (a *authority) provision(t testing.TB, device *harness.TPM, area tpm2.TPMTPublic, password string) tpmdevid.AgentConfig {
	t.Helper()
	d := open(t, device)
	defer d.Close()
	parent, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm.StorageTemplate(area.Type))}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	defer tpm2.FlushContext{FlushHandle: parent.ObjectHandle}.Execute(d)
	made, err := tpm2.Create{
		ParentHandle: tpm2.NamedHandle{Handle: parent.ObjectHandle, Name: parent.Name},
		InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: []byte(password)}}},
		InPublic:     tpm2.New2B(area),
	}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	read, err := tpm.ParseArea(made.OutPublic.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	return tpmdevid.AgentConfig{
		Device:        device.Socket,
		DevIDCertPath: write(t, filepath.Join(dir, "devid.pem"), pemOf(a.certify(t, read.Public, nil))),
		DevIDPubPath:  write(t, filepath.Join(dir, "devid.pub"), made.OutPublic.Bytes()),
		DevIDPrivPath: write(t, filepath.Join(dir, "devid.priv"), made.OutPrivate.Buffer),
		DevIDPassword: password,
	}
}

func open(t testing.TB, device *harness.TPM) *tpm.Device {
	t.Helper()
	d, err := tpm.Open(t.Context(), device.Socket)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newAgent(t testing.TB, c tpmdevid.AgentConfig) *tpmdevid.Agent {
	t.Helper()
	a, err := tpmdevid.NewAgent(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newServer(t testing.TB, devID, endorsement string) *tpmdevid.Server {
	t.Helper()
	s, err := tpmdevid.New(tpmdevid.ServerConfig{DevIDCAPath: devID, EndorsementCAPath: endorsement}, tpmdevid.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func proof(t testing.TB, a *tpmdevid.Agent) []byte {
	t.Helper()
	data, err := a.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// attest runs an attestation between the two halves.
func attest(t testing.TB, s attestors.Server, a *tpmdevid.Agent) (*attestors.Evidence, error) {
	t.Helper()
	return s.Verify(t.Context(), proof(t, a), a.Respond)
}

// unasked fails the test if a node is challenged.
func unasked(t testing.TB) func(context.Context, []byte) ([]byte, error) {
	return func(context.Context, []byte) ([]byte, error) {
		t.Error("the node is challenged")
		return nil, context.Canceled
	}
}

// payload, challenge and response are the messages, named as SPIRE's are.
type payload struct {
	DevIDCert              [][]byte
	DevIDPub               []byte
	EKCert                 []byte
	EKPub                  []byte
	AKPub                  []byte
	CertifiedDevID         []byte
	CertificationSignature []byte
}

type challenge struct {
	DevID          []byte
	CredActivation *struct{ Credential, Secret []byte }
}

type response struct {
	DevID          []byte
	CredActivation []byte
}

func marshal(t testing.TB, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func unmarshal[T any](t testing.TB, data []byte) T {
	t.Helper()
	var out T
	if err := json.Unmarshal(data, &out); err != nil {
		t.Fatal(err)
	}
	return out
}
