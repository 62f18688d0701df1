package sshpop_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/sshpop"
)

var now = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)

func at(when time.Time) func() time.Time { return func() time.Time { return when } }

// keygen runs the real ssh-keygen.
func keygen(t testing.TB, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("ssh-keygen"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("in CI nothing may be missing: ssh-keygen is not installed; test/install installs it")
		}
		t.Skip("ssh-keygen is not installed; test/install installs it")
	}
	cmd := exec.CommandContext(t.Context(), "ssh-keygen", append([]string{"-q"}, args...)...)
	cmd.Env = append(os.Environ(), "TZ=UTC")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen %q: %v\n%s", args, err, out)
	}
}

// authority makes a key of an authority and returns its file.
func authority(t testing.TB, kind string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca")
	keygen(t, "-t", kind, "-N", "", "-C", "hosts' authority", "-f", path)
	return path
}

// host makes a host's key and has it signed, for an hour around now.
func host(t testing.TB, ca, kind string) sshpop.AgentConfig {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ssh_host_"+kind+"_key")
	keygen(t, "-t", kind, "-N", "", "-f", path)
	keygen(t, "-s", ca, "-h", "-I", "the host", "-z", "7", "-n", "host-1.example.org,10.0.0.1", "-V", "20270301110000:20270301130000", path+".pub")
	return sshpop.AgentConfig{HostKeyPath: path}
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t testing.TB, path string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// line is a public key as configuration has it.
func line(key ssh.PublicKey) string { return string(ssh.MarshalAuthorizedKey(key)) }

func newServer(t testing.TB, c sshpop.ServerConfig) *sshpop.Server {
	t.Helper()
	s, err := sshpop.New(c, sshpop.Options{Now: at(now)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func trusting(t testing.TB, keys ...ssh.PublicKey) *sshpop.Server {
	t.Helper()
	var c sshpop.ServerConfig
	for _, key := range keys {
		c.CertAuthorities = append(c.CertAuthorities, line(key))
	}
	return newServer(t, c)
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

// signer makes a key without ssh-keygen, of kinds that it does not make too.
func signer(t testing.TB, key any) ssh.Signer {
	t.Helper()
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ed(t testing.TB) ssh.Signer {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer(t, key)
}

func ec(t testing.TB) ssh.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return signer(t, key)
}

func rsaKey(t testing.TB, bits int) ssh.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return signer(t, key)
}

// certify makes a host's certificate without ssh-keygen, changed as a test wants
// it before it is signed.
func certify(t testing.TB, ca ssh.Signer, key ssh.PublicKey, change func(*ssh.Certificate)) *ssh.Certificate {
	t.Helper()
	c := &ssh.Certificate{
		Key: key, Serial: 7, CertType: ssh.HostCert, KeyId: "the host", ValidPrincipals: []string{"host-1.example.org"},
		ValidAfter: uint64(now.Add(-time.Hour).Unix()), ValidBefore: uint64(now.Add(time.Hour).Unix()),
	}
	if change != nil {
		change(c)
	}
	if err := c.SignCert(rand.Reader, ca); err != nil {
		t.Fatal(err)
	}
	return c
}

func payload(t testing.TB, wire []byte) []byte {
	t.Helper()
	data, err := json.Marshal(map[string][]byte{"Certificate": wire})
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// answer is a response, as SPIRE's agents write it.
type answer struct {
	Nonce     []byte
	Signature *ssh.Signature
}

func (a *answer) bytes(t testing.TB) []byte {
	t.Helper()
	data, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func nonceOf(t testing.TB, challenge []byte) []byte {
	t.Helper()
	var c struct{ Nonce []byte }
	if err := json.Unmarshal(challenge, &c); err != nil {
		t.Fatal(err)
	}
	return c.Nonce
}

// hash is what the two sides sign.
func hash(server, node []byte) []byte {
	sum := sha256.Sum256(append(bytes.Clone(server), node...))
	return sum[:]
}

// respond answers a challenge as SPIRE's agents do, with any key.
func respond(t testing.TB, key ssh.Signer, challenge []byte) *answer {
	t.Helper()
	own := make([]byte, 32)
	rand.Read(own)
	signature, err := key.Sign(rand.Reader, hash(nonceOf(t, challenge), own)) // with SHA-1, if the key is RSA
	if err != nil {
		t.Fatal(err)
	}
	return &answer{own, signature}
}

func fingerprint(key ssh.PublicKey) string {
	sum := sha256.Sum256(key.Marshal())
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

func values(e *attestors.Evidence) []string {
	var out []string
	for _, s := range e.Selectors {
		out = append(out, s.String())
	}
	return out
}
