package tpmek_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	pkixname "crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/tpm"
	"github.com/hallmark-id/hallmark/attestors/tpmek"
	"github.com/hallmark-id/hallmark/test/harness"
)

func hexOf(data []byte) string { return hex.EncodeToString(data) }

func zeros() string { return strings.Repeat("0", 64) }

func open(t testing.TB, d *harness.TPM) *tpm.Device {
	t.Helper()
	dev, err := tpm.Open(t.Context(), d.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	return dev
}

func TestANodeAttestsByItsTPM(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	device := maker.NewTPM(t)
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: maker.CA, PCRs: []uint{7, 0}})
	agent := newAgent(t, tpmek.AgentConfig{Device: device.Socket})
	evidence := mustAttest(t, s, agent)

	proof, err := agent.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(mustRead(t, maker.CA))
	hash := hashOf(t, unmarshal[payload](t, proof).EK)
	want := []string{
		"tpm_ek:ca:sha256:" + hashOf(t, block.Bytes),
		"tpm_ek:ek:sha256:" + hash,
		"tpm_ek:manufacturer:id:00001014",
		"tpm_ek:model:swtpm",
		"tpm_ek:pcr:sha256:0:" + zeros(),
		"tpm_ek:pcr:sha256:7:" + zeros(),
		"tpm_ek:version:id:20191023",
	}
	got := values(evidence)
	// The version is that of the emulator's library.
	if i := len(got) - 1; i >= 0 && strings.HasPrefix(got[i], "tpm_ek:version:id:") {
		want[len(want)-1] = got[i]
	}
	if !slices.Equal(got, want) || evidence.Path != "tpm_ek/"+hash || !evidence.CanReattest {
		t.Errorf("evidence is %+v, want the selectors %q", evidence, want)
	}
}

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestATPMIsLeftAsItWasAndAnotherHasAnotherName(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	agent := newAgent(t, tpmek.AgentConfig{Device: maker.NewTPM(t).Socket})
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: maker.CA})
	first := mustAttest(t, s, agent)
	for range 8 { // it has room for three keys
		if again := mustAttest(t, s, agent); again.Path != first.Path {
			t.Errorf("it was %s and is now %s", first.Path, again.Path)
		}
	}
	if other := mustAttest(t, s, newAgent(t, tpmek.AgentConfig{Device: maker.NewTPM(t).Socket})); other.Path == first.Path {
		t.Error("two TPMs have one name")
	}
}

func TestWhatTheMachineBootedIsASelector(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	device := maker.NewTPM(t)
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: maker.CA, PCRs: []uint{7}})
	agent := newAgent(t, tpmek.AgentConfig{Device: device.Socket})
	event := sha256.Sum256([]byte("another boot loader"))
	dev := open(t, device)
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(7), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: event[:]}}},
	}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	dev.Close() // the emulator serves one at a time
	sum := sha256.Sum256(append(make([]byte, 32), event[:]...))
	if got, want := values(mustAttest(t, s, agent)), "tpm_ek:pcr:sha256:7:"+hexOf(sum[:]); !slices.Contains(got, want) {
		t.Errorf("selectors are %q, without %s", got, want)
	}
}

// endorse certifies an endorsement key, as the operator of machines without a
// manufacturer's certificate would.
func endorse(t testing.TB, public crypto.PublicKey) (ca, cert string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkixname.Name{CommonName: "our TPMs"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: root.NotBefore, NotAfter: root.NotAfter,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
	}
	make := func(name string, c *x509.Certificate, public crypto.PublicKey) string {
		der, err := x509.CreateCertificate(rand.Reader, c, root, public, key)
		if err != nil {
			t.Fatal(err)
		}
		return write(t, name, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	}
	return make("ca.pem", root, key.Public()), make("ek.pem", leaf, public)
}

func TestAnECCEndorsementKeyWillDo(t *testing.T) {
	t.Parallel()
	device := harness.NewTPMMaker(t).NewTPM(t)
	c := tpmek.AgentConfig{Device: device.Socket, EndorsementKey: "p-256"}
	proof, err := newAgent(t, c).Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p := unmarshal[payload](t, proof)
	if p.Cert != nil {
		t.Fatal("swtpm has a certificate of a P-256 key now; it had none")
	}
	hash := hashOf(t, p.EK)
	want := []string{"tpm_ek:ek:sha256:" + hash, "tpm_ek:pcr:sha256:7:" + zeros()}
	listed := newServer(t, tpmek.ServerConfig{EKHashes: []string{strings.ToUpper(hash)}, PCRs: []uint{7}})
	if evidence := mustAttest(t, listed, newAgent(t, c)); evidence.Path != "tpm_ek/"+hash || !slices.Equal(values(evidence), want) {
		t.Errorf("evidence is %+v", evidence)
	}

	key, err := x509.ParsePKIXPublicKey(p.EK)
	if err != nil {
		t.Fatal(err)
	}
	ca, cert := endorse(t, key)
	certified := newServer(t, tpmek.ServerConfig{EndorsementCAPath: ca})
	if _, err := attest(t, certified, newAgent(t, c)); err == nil || !strings.Contains(err.Error(), "no certificate of its endorsement key") {
		t.Errorf("without the certificate: %v", err)
	}
	c.CertificatePath = cert
	if evidence := mustAttest(t, certified, newAgent(t, c)); evidence.Path != "tpm_ek/"+hash {
		t.Errorf("evidence is %+v", evidence)
	}
}

func TestWhatIsConfiguredMustHoldTogether(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	agent := newAgent(t, tpmek.AgentConfig{Device: maker.NewTPM(t).Socket})
	proof, err := agent.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hash, other := hashOf(t, unmarshal[payload](t, proof).EK), strings.Repeat("ab", 32)
	ca, _ := endorse(t, newForger(t).ak.Public())
	list := write(t, "list", []byte("# ours\n\n"+other+"  rack 7\n"+hash+"\track 8"))
	for name, c := range map[string]struct {
		config tpmek.ServerConfig
		want   string // empty: admitted
	}{
		"listed":                         {tpmek.ServerConfig{EKHashes: []string{other, hash}}, ""},
		"listed in the file":             {tpmek.ServerConfig{EKHashesPath: list}, ""},
		"listed in one of two":           {tpmek.ServerConfig{EKHashesPath: list, EKHashes: []string{other}}, ""},
		"listed and certified":           {tpmek.ServerConfig{EKHashesPath: list, EndorsementCAPath: maker.CA}, ""},
		"not listed":                     {tpmek.ServerConfig{EKHashes: []string{other}}, "is not one of those"},
		"certified, but not listed":      {tpmek.ServerConfig{EKHashes: []string{other}, EndorsementCAPath: maker.CA}, "is not one of those"},
		"listed, but of another's maker": {tpmek.ServerConfig{EKHashes: []string{hash}, EndorsementCAPath: ca}, "does not lead to an authority"},
	} {
		if _, err := attest(t, newServer(t, c.config), agent); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAChangedListCountsAtOnce(t *testing.T) {
	t.Parallel()
	f := newForger(t)
	hash := hashOf(t, pkix(t, f.ek.Public()))
	path := write(t, "list", []byte(hash))
	s := newServer(t, tpmek.ServerConfig{EKHashesPath: path})
	try := func() error {
		_, err := s.Verify(t.Context(), f.payload(t), func(_ context.Context, c []byte) ([]byte, error) {
			return f.sign(t, tpm2.Marshal(quote(f.activate(t, unmarshal[challenge](t, c)), nil, nil)), nil), nil
		})
		return err
	}
	if err := try(); err != nil {
		t.Error(err)
	}
	for text, unavailable := range map[string]bool{"": false, "# none": false, strings.Repeat("ab", 32): false, hash[:62]: true, "?": true} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := try(); err == nil || errors.Is(err, attestors.ErrUnavailable) != unavailable || strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := try(); !errors.Is(err, attestors.ErrUnavailable) {
		t.Errorf("removed: %v", err)
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	t.Parallel()
	good := []string{strings.Repeat("ab", 32)}
	for name, c := range map[string]struct {
		config tpmek.ServerConfig
		want   string
	}{
		"nothing":         {tpmek.ServerConfig{}, "which TPMs are trusted"},
		"PCRs alone":      {tpmek.ServerConfig{PCRs: []uint{7}}, "which TPMs are trusted"},
		"no such file":    {tpmek.ServerConfig{EndorsementCAPath: "/no"}, "endorsement_ca_path: stat /no"},
		"no such list":    {tpmek.ServerConfig{EKHashesPath: "/no"}, "ek_hashes_path: stat /no"},
		"a short hash":    {tpmek.ServerConfig{EKHashes: []string{good[0], good[0][:40]}}, "ek_hashes: line 2"},
		"no hash":         {tpmek.ServerConfig{EKHashes: []string{"ek"}}, "no SHA-256"},
		"PCR 24":          {tpmek.ServerConfig{EKHashes: good, PCRs: []uint{7, 24}}, "no PCR 24"},
		"one PCR twice":   {tpmek.ServerConfig{EKHashes: good, PCRs: []uint{7, 0, 7}}, "ascending"},
		"a CA that is no": {tpmek.ServerConfig{EndorsementCAPath: write(t, "ca", good0())}, "no certificate in it"},
	} {
		_, err := tpmek.New(c.config, tpmek.Options{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	if _, err := tpmek.NewAgent(tpmek.AgentConfig{EndorsementKey: "rsa"}); err == nil || !strings.Contains(err.Error(), "rsa-2048 or p-256") {
		t.Errorf("agent: %v", err)
	}
}

func good0() []byte { return []byte("none\n") }

func TestAnAgentSaysWhatIsWrongWithItsTPM(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	one, two := maker.NewTPM(t), maker.NewTPM(t)
	file := write(t, "file", nil)
	for want, c := range map[string]tpmek.AgentConfig{
		"no such file":                    {Device: "/no"},
		"is neither a device nor":         {Device: file},
		"no certificate in it":            {Device: one.Socket, CertificatePath: file},
		"/no.pem: no such file":           {Device: one.Socket, CertificatePath: "/no.pem"},
		"open the TPM: stat /dev/tpmrm0:": {}, // where there is none
	} {
		if c.Device == "" {
			if _, err := os.Stat(tpm.DefaultDevice); err == nil {
				continue
			}
		}
		_, err := newAgent(t, c).Proof(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error is %v, want one with %q", c, err, want)
		}
	}
	// The certificate of another TPM convinces the server, until it challenges.
	dev := open(t, two)
	der, err := dev.EndorsementCertificate(tpm.RSA2048)
	if err != nil || der == nil {
		t.Fatal(err)
	}
	dev.Close()
	borrowed := write(t, "ek.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: maker.CA})
	if _, err := attest(t, s, newAgent(t, tpmek.AgentConfig{Device: one.Socket, CertificatePath: borrowed})); err == nil || !strings.Contains(err.Error(), "that of this TPM?") {
		t.Errorf("another's certificate: %v", err)
	}
}

func TestAnAgentAnswersOneChallengeAProof(t *testing.T) {
	t.Parallel()
	maker := harness.NewTPMMaker(t)
	agent := newAgent(t, tpmek.AgentConfig{Device: maker.NewTPM(t).Socket})
	s := newServer(t, tpmek.ServerConfig{EndorsementCAPath: maker.CA})
	if _, err := agent.Respond(t.Context(), []byte(`{"credential": "AAAA", "secret": "AAAA"}`)); err == nil || !strings.Contains(err.Error(), "follows no proof") {
		t.Errorf("without a proof: %v", err)
	}
	proof, err := agent.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), proof, func(ctx context.Context, c []byte) ([]byte, error) {
		answer, err := agent.Respond(ctx, c)
		if _, again := agent.Respond(ctx, c); again == nil {
			t.Error("a second challenge is answered")
		}
		return answer, err
	}); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "null", "{}", "[]", `{"credential": "AAAA"}`, `{"secret": "AAAA"}`, `{"credential": "AAAA", "secret": "AAAA"}`,
		`{"credential": "AAAA", "secret": "AAAA", "pcrs": [24]}`, `{"credential": "AAAA", "secret": "AAAA", "pcrs": [7, 7]}`,
		`{"credential": "AAAA", "secret": "AAAA", "pcrs": [-1]}`, `{"credential": "` + strings.Repeat("AAAA", 3000) + `"}`} {
		if _, err := agent.Proof(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := agent.Respond(t.Context(), []byte(bad)); err == nil {
			t.Errorf("%.60q is answered", bad)
		}
	}
	mustAttest(t, s, agent) // and the TPM is as before
}

func TestATPMThatHangsIsWaitedForNoLongerThanAllowed(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "tpm")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Read(make([]byte, 1)) // the command has come; it is never answered
		cancel()
		<-t.Context().Done()
	}()
	if _, err := newAgent(t, tpmek.AgentConfig{Device: path}).Proof(ctx); err == nil {
		t.Error("a TPM that says nothing has attested")
	}
}

func TestATPMThatTalksNonsenseIsSurvived(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"nothing":       "",
		"half a header": "\x80\x01\x00",
		"no length":     "\x80\x01\x00\x00\x00\x00\x00\x00\x00\x00",
		"a huge length": "\x80\x01\xff\xff\xff\xff\x00\x00\x00\x00",
		"cut off":       "\x80\x01\x00\x00\x00\x40\x00\x00\x00\x00\x00",
		"an empty one":  "\x80\x01\x00\x00\x00\x0a\x00\x00\x00\x00",
		"an error":      "\x80\x01\x00\x00\x00\x0a\x00\x00\x01\x01",
		"letters":       "hello hello hello hello",
	} {
		path := filepath.Join(t.TempDir(), "tpm")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = conn.Read(make([]byte, 4096))
			_, _ = conn.Write([]byte(answer))
		}()
		if _, err := newAgent(t, tpmek.AgentConfig{Device: path}).Proof(t.Context()); err == nil {
			t.Errorf("%s: attested", name)
		}
		l.Close()
	}
}
