package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestANodeWithACertificateNeedsNoToken attests an agent by a certificate that
// openssl made, gives its processes an identity by what the certificate says of
// the node, and has it attest again, before its SVID ends, by the certificate
// that has taken the first one's place.
func TestANodeWithACertificateNeedsNoToken(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	harness.NeedCommand(t, "openssl")
	dir, err := os.MkdirTemp("", "hallmark-x509pop-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	openssl := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "openssl", args...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	ec := []string{"-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"}
	openssl(append([]string{"req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=nodes", "-days", "1",
		"-addext", "keyUsage=critical,keyCertSign"}, ec...)...)
	// As a rotation should, this replaces each file as a whole.
	certificate := func(serial, rack string) {
		t.Helper()
		openssl(append([]string{"req", "-new", "-keyout", "new.key", "-out", "new.csr", "-subj", "/CN=host-1"}, ec...)...)
		extensions := "keyUsage=critical,digitalSignature\nsubjectAltName=URI:x509pop://example.org/rack/" + rack + "\n"
		if err := os.WriteFile(filepath.Join(dir, "node.cnf"), []byte(extensions), 0o600); err != nil {
			t.Fatal(err)
		}
		openssl("x509", "-req", "-in", "new.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-set_serial", serial, "-days", "1", "-extfile", "node.cnf", "-out", "new.pem")
		for _, file := range []string{"key", "pem"} {
			if err := errors.Join(os.Chown(filepath.Join(dir, "new."+file), harness.AgentUID, -1),
				os.Rename(filepath.Join(dir, "new."+file), filepath.Join(dir, "node."+file))); err != nil {
				t.Fatal(err)
			}
		}
	}
	certificate("0x1001", "r7")

	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("x509: {agent_lifetime: 4s}\nnode_attestors: {x509pop: {ca_bundle_path: %s/ca.pem, agent_path_template: 'x509pop/{{ .Subject.CommonName }}'}}\n", dir),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {x509pop: {private_key_path: %s/node.key, certificate_path: %s/node.pem}}\n",
			dir, dir, dir),
	})
	d.StartServer(t)
	bundle := d.Admin(t, "bundle", "show", "-o", "pem")
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(bundle), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")

	// The nodes of a rack have a name of their own, under which entries stand.
	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server", "--selector", "x509pop:san:rack:r7")
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}

	certificate("0x1002", "r8")
	const agent = "spiffe://example.org/spire/agent/x509pop/host-1"
	harness.Eventually(t, "the second certificate's selectors", func(context.Context) error {
		shown := d.Admin(t, "node", "show", agent, "-o", "json")
		for _, want := range []string{`"x509pop:serialnumber:1002"`, `"x509pop:san:rack:r8"`, `"x509pop:subject:cn:host-1"`} {
			if !strings.Contains(shown, want) {
				return fmt.Errorf("no %s in\n%s", want, shown)
			}
		}
		return nil
	})
	// It is no longer in the rack.
	harness.Eventually(t, "the loss of the identity", func(context.Context) error {
		if out, _, code := fetch.Try(t); code == 0 {
			return fmt.Errorf("fetch x509 printed:\n%s", out)
		}
		return nil
	})
}
