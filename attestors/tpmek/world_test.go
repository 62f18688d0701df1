package tpmek_test

import (
	"context"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/tpmek"
)

func newServer(t testing.TB, c tpmek.ServerConfig) *tpmek.Server {
	t.Helper()
	s, err := tpmek.New(c, tpmek.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newAgent(t testing.TB, c tpmek.AgentConfig) *tpmek.Agent {
	t.Helper()
	a, err := tpmek.NewAgent(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
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

func write(t testing.TB, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func values(e *attestors.Evidence) []string {
	var out []string
	for _, s := range e.Selectors {
		out = append(out, s.String())
	}
	return out
}

// payload, challenge and response are the messages, without the attestor's own
// types.
type payload struct {
	EK   []byte `json:"endorsement_key"`
	Cert []byte `json:"endorsement_certificate,omitempty"`
	AK   []byte `json:"attestation_key"`
}

type challenge struct {
	Credential []byte `json:"credential"`
	Secret     []byte `json:"secret"`
	PCRs       []uint `json:"pcrs"`
}

type response struct {
	Quote     []byte   `json:"quote"`
	Signature []byte   `json:"signature"`
	PCRs      [][]byte `json:"pcrs"`
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

func pkix(t testing.TB, key crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// hashOf is what lists of endorsement keys hold.
func hashOf(t testing.TB, der []byte) string {
	t.Helper()
	sum := sha256.Sum256(der)
	return hexOf(sum[:])
}

// forger is a TPM in software: its manufacturer has published the key. It can
// sign what no TPM would, and so shows what the server itself looks at.
type forger struct {
	ek *rsa.PrivateKey
	ak *ecdsa.PrivateKey
}

var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func newForger(t testing.TB) *forger {
	t.Helper()
	ak, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &forger{rsaKey(), ak}
}

func (f *forger) payload(t testing.TB) []byte {
	t.Helper()
	return marshal(t, payload{EK: pkix(t, f.ek.Public()), AK: pkix(t, f.ak.Public())})
}

// trusting makes a server that trusts the forger.
func (f *forger) trusting(t testing.TB, pcrs ...uint) *tpmek.Server {
	t.Helper()
	return newServer(t, tpmek.ServerConfig{EKHashes: []string{hashOf(t, pkix(t, f.ek.Public()))}, PCRs: pcrs})
}

// name is that of an attestation key with the attributes that it should have:
// TPM 2.0 Library, part 1, §16.
func (f *forger) name(t testing.TB) []byte {
	t.Helper()
	raw, err := f.ak.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	area := []byte{0, 0x23, 0, 0x0b, 0, 5, 0x04, 0x72, 0, 0, 0, 0x10, 0, 0x18, 0, 0x0b, 0, 3, 0, 0x10, 0, 32}
	area = append(area, raw[1:33]...)
	area = append(append(area, 0, 32), raw[33:]...)
	sum := sha256.Sum256(area)
	return append([]byte{0, 0x0b}, sum[:]...)
}

// activate decrypts a credential: TPM 2.0 Library, part 1, §24.
func (f *forger) activate(t testing.TB, c challenge) []byte {
	t.Helper()
	seed, err := rsa.DecryptOAEP(sha256.New(), nil, f.ek, c.Secret, []byte("IDENTITY\x00"))
	if err != nil {
		t.Fatal(err)
	}
	key := tpm2.KDFa(crypto.SHA256, seed, "STORAGE", f.name(t), nil, 128)
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	sealed := c.Credential[2+32:] // behind the HMAC
	secret := make([]byte, len(sealed))
	//lint:ignore SA1019 it is what TPMs use
	cipher.NewCFBDecrypter(block, make([]byte, aes.BlockSize)).XORKeyStream(secret, sealed)
	return secret[2:]
}

// quote is what a TPM would say, for a test to change.
func quote(secret []byte, pcrs []uint, values [][]byte) tpm2.TPMSAttest {
	h := sha256.New()
	for _, v := range values {
		h.Write(v)
	}
	return tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: secret},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
		}),
	}
}

// sign makes a response about what the forger claims.
func (f *forger) sign(t testing.TB, said []byte, pcrs [][]byte) []byte {
	t.Helper()
	digest := sha256.Sum256(said)
	signature, err := ecdsa.SignASN1(rand.Reader, f.ak, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	return marshal(t, response{said, signature, pcrs})
}

func derOf(t testing.TB, path string) []byte {
	t.Helper()
	block, _ := pem.Decode(mustRead(t, path))
	return block.Bytes
}
