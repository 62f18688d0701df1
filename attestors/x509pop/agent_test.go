package x509pop_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hallmark-id/hallmark/attestors/x509pop"
)

// challengeOf is SPIRE's form of a challenge: the other kind is null.
func challengeOf(t testing.TB, kind string, nonce []byte) []byte {
	other := map[string]string{"ecdsa_signature": "rsa_signature", "rsa_signature": "ecdsa_signature"}[kind]
	return message{kind: {"nonce": nonce}, other: nil}.bytes(t)
}

// TestOpenSSLVerifiesWhatANodeSigns checks the signatures by another hand: they
// are over both nonces, the server's first.
func TestOpenSSLVerifiesWhatANodeSigns(t *testing.T) {
	root := newRoot(t, "root")
	dir := t.TempDir()
	server := []byte("0123456789abcdef0123456789abcdef")
	for kind, id := range map[string]*identity{
		"ecdsa_signature": root.node(t, nil),
		"rsa_signature":   root.issue(t, rsaKeys()[0], nil),
	} {
		agent := id.agent(t)
		if _, err := agent.Proof(t.Context()); err != nil {
			t.Fatal(err)
		}
		answer, err := agent.Respond(t.Context(), challengeOf(t, kind, server))
		if err != nil {
			t.Fatal(err)
		}
		m := parse(t, answer)[kind]
		public, err := x509.MarshalPKIXPublicKey(id.key.Public())
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "public.pem"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}))
		write(t, filepath.Join(dir, "nonces"), append(server, m["nonce"]...))
		args := []string{"dgst", "-sha256", "-verify", "public.pem", "-signature", "signature", "nonces"}
		if kind == "rsa_signature" {
			write(t, filepath.Join(dir, "signature"), m["signature"])
			args = append([]string{"dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:auto"}, args[2:]...)
		} else {
			// OpenSSL wants both numbers in one structure, which it makes itself.
			write(t, filepath.Join(dir, "rs.cnf"), fmt.Appendf(nil, "asn1=SEQUENCE:rs\n[rs]\nr=INTEGER:0x%X\ns=INTEGER:0x%X\n", m["r"], m["s"]))
			openssl(t, dir, "asn1parse", "-genconf", "rs.cnf", "-out", "signature", "-noout")
		}
		if out := openssl(t, dir, args...); !strings.Contains(out, "Verified OK") {
			t.Errorf("%s: %s", kind, out)
		}
	}
}

// TestSPIREsAgentIsAdmitted answers as SPIRE's agent does: null for the kind
// that was not asked for, and for RSA the longest salt that fits.
func TestSPIREsAgentIsAdmitted(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	for _, id := range []*identity{root.node(t, nil), root.issue(t, rsaKeys()[0], nil)} {
		for range 20 { // numbers of every length
			if _, err := s.Verify(t.Context(), id.payload(t), func(_ context.Context, challenge []byte) ([]byte, error) {
				for _, kind := range []string{`"rsa_signature":`, `"ecdsa_signature":`} { // both are there, one of them null
					if !strings.Contains(string(challenge), kind) {
						t.Errorf("challenge is %s", challenge)
					}
				}
				return respond(t, id.key, challenge).bytes(t), nil
			}); err != nil {
				t.Errorf("%T: %v", id.key, err)
			}
		}
	}
}

func TestNumbersOfFullLengthAreTaken(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	id := root.node(t, nil)
	if _, err := s.Verify(t.Context(), id.payload(t), func(_ context.Context, challenge []byte) ([]byte, error) {
		m := respond(t, id.key, challenge)
		for _, number := range []string{"r", "s"} {
			m["ecdsa_signature"][number] = new(big.Int).SetBytes(m["ecdsa_signature"][number]).FillBytes(make([]byte, 32))
		}
		return m.bytes(t), nil
	}); err != nil {
		t.Error(err)
	}
}

func TestAPayloadWithNewFieldsIsTaken(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	id := root.node(t, nil)
	data, err := json.Marshal(map[string]any{"certificates": [][]byte{id.cert.Raw}, "later": map[string]int{"x": 1}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Verify(t.Context(), data, id.agentAfterProof(t).Respond); err != nil {
		t.Error(err)
	}
}

// agentAfterProof makes an agent that waits for a challenge.
func (id *identity) agentAfterProof(t testing.TB) *x509pop.Agent {
	t.Helper()
	a := id.agent(t)
	if _, err := a.Proof(t.Context()); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestARotatedCertificateIsPickedUp(t *testing.T) {
	root := newRoot(t, "root")
	s := trusting(t, root)
	first, second := root.node(t, nil), root.intermediate(t, "middle").node(t, nil)
	files := first.files(t)
	agent := newAgent(t, files)
	if e := mustAttest(t, s, agent); e.Path != "x509pop/"+sha1Of(first.cert) {
		t.Errorf("path is %s", e.Path)
	}
	second.rewrite(t, files)
	if e := mustAttest(t, s, agent); e.Path != "x509pop/"+sha1Of(second.cert) {
		t.Errorf("path is %s", e.Path)
	}
}

func TestACertificateRotatedDuringAnAttestationDoesNotBreakIt(t *testing.T) {
	root := newRoot(t, "root")
	first := root.node(t, nil)
	files := first.files(t)
	agent := newAgent(t, files)
	proof, err := agent.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := trusting(t, root).Verify(t.Context(), proof, func(ctx context.Context, challenge []byte) ([]byte, error) {
		root.node(t, nil).rewrite(t, files)
		return agent.Respond(ctx, challenge)
	}); err != nil {
		t.Error(err)
	}
}

func TestAHalfRotatedCertificateIsNotShown(t *testing.T) {
	root := newRoot(t, "root")
	files := root.node(t, nil).files(t)
	write(t, files.CertificatePath, pemOf(root.node(t, nil).cert)) // and the key later
	_, err := newAgent(t, files).Proof(t.Context())
	if err == nil || !strings.Contains(err.Error(), files.PrivateKeyPath) || !strings.Contains(err.Error(), "does not belong") {
		t.Errorf("error is %v", err)
	}
}

func TestProofNamesTheFileThatIsWrong(t *testing.T) {
	root := newRoot(t, "root")
	dir := t.TempDir()
	file := func(name string, data []byte) string { return write(t, filepath.Join(dir, name), data) }
	block := func(typ string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}) }
	good := root.node(t, nil)
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	edDER, err := x509.MarshalPKCS8PrivateKey(ed)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(good.key)
	if err != nil {
		t.Fatal(err)
	}
	file("plain", block("PRIVATE KEY", key))
	openssl(t, dir, "pkey", "-in", "plain", "-aes128", "-passout", "pass:secret", "-out", "encrypted.key")
	openssl(t, dir, "ec", "-in", "plain", "-aes128", "-passout", "pass:secret", "-out", "legacy.key")
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	var ten []*x509.Certificate
	for range 10 {
		ten = append(ten, root.cert)
	}
	bulky := root.node(t, func(c *x509.Certificate) {
		for i := range 3000 {
			c.DNSNames = append(c.DNSNames, fmt.Sprintf("host-%d.example.org", i))
		}
	})

	type files = x509pop.AgentConfig
	set := func(change func(*files)) files {
		c := good.files(t)
		change(&c)
		return c
	}
	of := func(id *identity) files { return id.files(t) }
	for name, c := range map[string]struct {
		files files
		want  []string
	}{
		"no key":                 {set(func(c *files) { c.PrivateKeyPath = filepath.Join(dir, "no.key") }), []string{"no.key: no such file"}},
		"no certificate":         {set(func(c *files) { c.CertificatePath = filepath.Join(dir, "no.pem") }), []string{"no.pem: no such file"}},
		"no intermediates":       {set(func(c *files) { c.IntermediatesPath = filepath.Join(dir, "no.pem") }), []string{"no.pem: no such file"}},
		"a directory":            {set(func(c *files) { c.CertificatePath = dir }), []string{dir, "no regular file"}},
		"a pipe":                 {set(func(c *files) { c.PrivateKeyPath = pipe }), []string{pipe, "no regular file"}},
		"an empty certificate":   {set(func(c *files) { c.CertificatePath = file("empty.pem", nil) }), []string{"empty.pem: no certificate"}},
		"an empty key":           {set(func(c *files) { c.PrivateKeyPath = file("empty.key", nil) }), []string{"empty.key: no private key"}},
		"DER":                    {set(func(c *files) { c.CertificatePath = file("der.pem", good.cert.Raw) }), []string{"der.pem: no certificate", "PEM"}},
		"half a certificate":     {set(func(c *files) { c.CertificatePath = file("half.pem", pemOf(good.cert)[:100]) }), []string{"half.pem", "malformed"}},
		"a request":              {set(func(c *files) { c.CertificatePath = file("request.pem", block("CERTIFICATE REQUEST", nil)) }), []string{"request.pem", "CERTIFICATE REQUEST"}},
		"no DER in it":           {set(func(c *files) { c.CertificatePath = file("bad.pem", block("CERTIFICATE", []byte("x"))) }), []string{"bad.pem: PEM block 1"}},
		"a bad intermediate":     {set(func(c *files) { c.IntermediatesPath = file("bad.pem", block("CERTIFICATE", []byte("x"))) }), []string{"bad.pem: PEM block 1"}},
		"a key of another":       {set(func(c *files) { c.PrivateKeyPath = of(root.node(t, nil)).PrivateKeyPath }), []string{"does not belong"}},
		"a malformed key":        {set(func(c *files) { c.PrivateKeyPath = file("bad.key", block("PRIVATE KEY", []byte("x"))) }), []string{"bad.key: the private key is malformed"}},
		"a malformed SEC 1 key":  {set(func(c *files) { c.PrivateKeyPath = file("bad.key", block("EC PRIVATE KEY", []byte("x"))) }), []string{"bad.key: the private key is malformed"}},
		"a malformed PKCS 1 key": {set(func(c *files) { c.PrivateKeyPath = file("bad.key", block("RSA PRIVATE KEY", []byte("x"))) }), []string{"bad.key: the private key is malformed"}},
		"a key of another kind":  {set(func(c *files) { c.PrivateKeyPath = file("ssh.key", block("OPENSSH PRIVATE KEY", []byte("x"))) }), []string{"ssh.key", "OPENSSH PRIVATE KEY"}},
		"an encrypted key":       {set(func(c *files) { c.PrivateKeyPath = filepath.Join(dir, "encrypted.key") }), []string{"encrypted.key", "is encrypted"}},
		"an old encrypted key":   {set(func(c *files) { c.PrivateKeyPath = filepath.Join(dir, "legacy.key") }), []string{"legacy.key", "is encrypted"}},
		"an Ed25519 key":         {set(func(c *files) { c.PrivateKeyPath = file("ed.key", block("PRIVATE KEY", edDER)) }), []string{"ed.key", "not supported"}},
		"a large key file":       {set(func(c *files) { c.PrivateKeyPath = file("large.key", make([]byte, 65<<10)) }), []string{"large.key is larger than 65536 bytes"}},
		"a large chain file":     {set(func(c *files) { c.CertificatePath = file("large.pem", make([]byte, 513<<10)) }), []string{"large.pem is larger than 524288 bytes"}},
		"eleven certificates":    {set(func(c *files) { c.IntermediatesPath = file("ten.pem", pemOf(ten...)) }), []string{"cert.pem and", "ten.pem hold 11 certificates"}},
		"a payload too large":    {of(bulky), []string{"cert.pem make a proof of"}},
		"an authority":           {of(root.intermediate(t, "middle")), []string{"cert.pem: ", "certificate authority"}},
		"no digitalSignature":    {of(root.node(t, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })), []string{"cert.pem: ", "digitalSignature"}},
	} {
		agent := newAgent(t, c.files)
		_, err := agent.Proof(t.Context())
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error is %v, want one with %q", name, err, want)
			}
		}
		if answer, err := agent.Respond(t.Context(), challengeOf(t, "ecdsa_signature", make([]byte, 32))); err == nil {
			t.Errorf("%s: a challenge is answered by %s", name, answer)
		}
	}
}

func TestAChallengeThatIsNoneIsNotAnswered(t *testing.T) {
	root := newRoot(t, "root")
	ec, rs := root.node(t, nil), root.issue(t, rsaKeys()[0], nil)
	nonce := make([]byte, 32)
	for name, c := range map[string]struct {
		id        *identity
		challenge []byte
	}{
		"nothing":           {ec, nil},
		"null":              {ec, []byte("null")},
		"an empty object":   {ec, []byte("{}")},
		"an unknown kind":   {ec, []byte(`{"ed25519_signature":{"nonce":"AAAA"}}`)},
		"no nonce":          {ec, []byte(`{"ecdsa_signature":{}}`)},
		"a short nonce":     {ec, challengeOf(t, "ecdsa_signature", nonce[:31])},
		"a long nonce":      {rs, challengeOf(t, "rsa_signature", append(nonce, 0))},
		"one bad of two":    {ec, message{"ecdsa_signature": {"nonce": nonce}, "rsa_signature": {"nonce": nil}}.bytes(t)},
		"for RSA":           {ec, challengeOf(t, "rsa_signature", nonce)},
		"for ECDSA":         {rs, challengeOf(t, "ecdsa_signature", nonce)},
		"trailing JSON":     {ec, append(challengeOf(t, "ecdsa_signature", nonce), "{}"...)},
		"a trailing letter": {ec, append(challengeOf(t, "ecdsa_signature", nonce), 'x')},
		"far too much":      {ec, append(challengeOf(t, "ecdsa_signature", nonce), strings.Repeat(" ", 5000)...)},
	} {
		if answer, err := c.id.agentAfterProof(t).Respond(t.Context(), c.challenge); err == nil {
			t.Errorf("%s is answered by %s", name, answer)
		}
	}
}

func TestAProofAnswersOneChallenge(t *testing.T) {
	agent := newRoot(t, "root").node(t, nil).agentAfterProof(t)
	challenge := challengeOf(t, "ecdsa_signature", make([]byte, 32))
	if _, err := agent.Respond(t.Context(), challenge); err != nil {
		t.Fatal(err)
	}
	if answer, err := agent.Respond(t.Context(), challenge); err == nil {
		t.Errorf("answered again by %s", answer)
	}
}

func TestAnAgentNeedsItsPaths(t *testing.T) {
	for want, c := range map[string]x509pop.AgentConfig{
		"private_key_path is missing": {CertificatePath: "cert.pem"},
		"certificate_path is missing": {PrivateKeyPath: "key.pem"},
	} {
		if _, err := x509pop.NewAgent(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
}

func TestTheKeyIsNotShown(t *testing.T) {
	id := newRoot(t, "root").node(t, nil)
	agent := id.agentAfterProof(t)
	if shown := fmt.Sprintf("%v %+v %#v %s", agent, agent, agent, agent); shown != strings.Repeat(" x509pop", 4)[1:] {
		t.Errorf("shown as %s", shown)
	}
}

func TestMain(m *testing.M) {
	// What openssl writes must not depend on this machine's settings.
	os.Setenv("OPENSSL_CONF", os.DevNull)
	os.Exit(m.Run())
}
