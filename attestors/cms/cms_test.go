package cms_test

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors/cms"
	"github.com/hallmark-id/hallmark/test/harness"
)

func TestAMessageIsGoodForItsSignersCertificateAlone(t *testing.T) {
	cert, key := harness.SignerCertificate(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), 2048)
	other, _ := harness.SignerCertificate(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), 2048)
	m, err := cms.Parse(harness.SignCMS(t, []byte("the document"), cert, key, other))
	if err != nil {
		t.Fatal(err)
	}
	if m.Signer() == nil || !m.Signer().Equal(cert) || len(m.Certificates()) != 2 {
		t.Errorf("it brings %d certificates", len(m.Certificates()))
	}
	if got, err := m.Verify(cert, time.Now()); err != nil || string(got) != "the document" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := m.Verify(other, time.Now()); err == nil {
		t.Error("another certificate that it brings verifies it")
	}
	for _, now := range []time.Time{time.Now().Add(-2 * time.Hour), time.Now().Add(2 * time.Hour)} {
		if _, err := m.Verify(cert, now); err == nil {
			t.Errorf("it is good at %v", now)
		}
	}
}

// TestAMessageOfManyLayersIsRefused has the reader take apart what is nested as
// deeply as its bound lets it be.
func TestAMessageOfManyLayersIsRefused(t *testing.T) {
	const layers = 12 << 10
	for name, raw := range map[string][]byte{
		"without end": bytes.Repeat([]byte{0x30, 0x80}, layers),
		"with ends":   append(bytes.Repeat([]byte{0x30, 0x80}, layers/2), make([]byte, layers)...),
		// Every second part goes on far beyond the one that it is in: a reader that
		// follows both takes twice the time for each pair.
		"sticking out": append(bytes.Repeat([]byte{0x30, 0x02, 0x30, 0x7f}, 40), make([]byte, 1<<10)...),
		"side by side": append([]byte{0x30, 0x80}, bytes.Repeat([]byte{0x05, 0x81, 0x01, 0x01}, layers/2)...),
	} {
		if _, err := cms.Parse(base64.StdEncoding.EncodeToString(raw)); err == nil {
			t.Errorf("%s: it is a message", name)
		}
	}
	if _, err := cms.Parse(strings.Repeat("A", 40<<10)); err == nil || !strings.Contains(err.Error(), "the most is") {
		t.Errorf("error is %v", err)
	}
}

// TestMessagesOfOpenSSL reads what is encoded as AWS does it (BER of indefinite
// length), and with nothing but a signature in it.
func TestMessagesOfOpenSSL(t *testing.T) {
	harness.NeedCommand(t, "openssl")
	dir := t.TempDir()
	openssl := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "openssl", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("openssl %q: %v\n%s", args, err, out)
		}
	}
	read := func(name string) []byte {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key", "-out", "cert", "-subj", "/O=clouds", "-days", "2")
	block, _ := pem.Decode(read("cert"))
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	const doc = `{"accountId": "123456789012"}`
	if err := os.WriteFile(filepath.Join(dir, "doc"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	sign := []string{"-sign", "-in", "doc", "-signer", "cert", "-inkey", "key", "-nodetach", "-binary", "-md", "sha256", "-outform", "DER", "-out", "out"}
	for name, args := range map[string][]string{
		"of indefinite length": append([]string{"cms", "-stream"}, sign...),
		"DER":                  append([]string{"cms"}, sign...),
		"nothing but that":     append([]string{"smime", "-nocerts", "-noattr"}, sign...),
	} {
		openssl(args...)
		m, err := cms.Parse(base64.StdEncoding.EncodeToString(read("out")))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := m.Verify(cert, time.Now()); err != nil || string(got) != doc {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	cert, key := harness.SignerCertificate(f, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), 2048)
	raw, err := base64.StdEncoding.DecodeString(harness.SignCMS(f, []byte("the document"), cert, key))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add(raw[:len(raw)/2])
	f.Add([]byte{0x30, 0x80, 0, 0})
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, err := cms.Parse(base64.StdEncoding.EncodeToString(raw))
		if err != nil {
			return
		}
		if got, err := m.Verify(cert, time.Now()); err == nil && string(got) != "the document" {
			t.Errorf("verified %q", got)
		}
	})
}
