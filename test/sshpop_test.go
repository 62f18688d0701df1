package test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAHostAttestsByItsSSHCertificate attests an agent by a host key as sshd has
// it, gives its processes an identity by the host name in its certificate, and
// has it attest again, before its SVID ends, by a certificate of another name.
func TestAHostAttestsByItsSSHCertificate(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	harness.NeedCommand(t, "ssh-keygen")
	dir, err := os.MkdirTemp("", "hallmark-sshpop-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	etc := filepath.Join(dir, "etc/ssh")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	keygen := func(args ...string) {
		t.Helper()
		if out, err := exec.CommandContext(t.Context(), "ssh-keygen", append([]string{"-q"}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("ssh-keygen %q: %v\n%s", args, err, out)
		}
	}
	keygen("-A", "-f", dir) // as a host does when it first starts
	key, ca := filepath.Join(etc, "ssh_host_ed25519_key"), filepath.Join(dir, "ca")
	if err := os.Chown(key, harness.AgentUID, -1); err != nil {
		t.Fatal(err)
	}
	keygen("-t", "ed25519", "-N", "", "-f", ca)
	certify := func(names string) {
		t.Helper()
		keygen("-s", ca, "-h", "-I", "web-1", "-n", names, "-V", "-1m:+1h", key+".pub")
	}
	certify("web-1.example.org,r7.rack")

	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("x509: {agent_lifetime: 4s}\nnode_attestors: {sshpop: {cert_authorities_path: %s.pub, canonical_domain: example.org, agent_path_template: 'sshpop/{{ .Hostname }}'}}\n", ca),
		Agent:  fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {sshpop: {host_key_path: %s}}\n", dir, key),
	})
	d.StartServer(t)
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")

	// The hosts of a rack have a name of their own, under which entries stand.
	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server", "--selector", "sshpop:principal:r7.rack")
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}

	certify("web-1.example.org,r8.rack")
	const agent = "spiffe://example.org/spire/agent/sshpop/web-1"
	harness.Eventually(t, "the second certificate's selectors", func(context.Context) error {
		if shown := d.Admin(t, "node", "show", agent, "-o", "json"); !strings.Contains(shown, `"sshpop:principal:r8.rack"`) {
			return fmt.Errorf("node show printed:\n%s", shown)
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
