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

// TestANodeAttestsByItsDevID attests an agent by a device identity that its owner
// made with the tools of TPMs and openssl, as docs/attestors/tpm_devid.md says,
// and gives its processes an identity by what the certificate says of the node.
func TestANodeAttestsByItsDevID(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	harness.NeedCommand(t, "tpm2_create")
	harness.NeedCommand(t, "openssl")
	maker := harness.NewTPMMaker(t)
	tpm := maker.NewTPM(t)
	dir := filepath.Dir(maker.CA)
	if err := os.Chmod(maker.CA, 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(command string, args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), command, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+tpm.Socket)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %q: %v\n%s", command, args, err, out)
		}
	}
	const made = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|"
	flush := func() { t.Helper(); run("tpm2_flushcontext", "-t") } // which the kernel does with a device
	run("tpm2_createprimary", "-Q", "-C", "o", "-G", "rsa2048:aes128cfb", "-a", made+"noda|restricted|decrypt", "-c", "srk.ctx")
	flush()
	run("tpm2_create", "-Q", "-C", "srk.ctx", "-G", "rsa2048:rsassa-sha256", "-a", made+"sign", "-u", "devid.pub", "-r", "devid.priv")
	flush()
	run("sh", "-c", "tpm2_print -t TPM2B_PUBLIC -f pem devid.pub > key.pem")
	run("openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "1", "-subj", "/CN=machines",
		"-addext", "keyUsage=critical,keyCertSign", "-keyout", "machines.key", "-out", "machines.pem")
	run("openssl", "x509", "-new", "-force_pubkey", "key.pem", "-subj", "/CN=host-1", "-CA", "machines.pem", "-CAkey", "machines.key",
		"-set_serial", "1", "-days", "1", "-out", "devid.pem")
	for _, file := range []string{"devid.pub", "devid.priv", "devid.pem", "machines.pem"} {
		if err := os.Chmod(filepath.Join(dir, file), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("x509: {agent_lifetime: 4s}\nnode_attestors: {tpm_devid: {devid_ca_path: %s/machines.pem, endorsement_ca_path: %s}}\n", dir, maker.CA),
		Agent: fmt.Sprintf("trust_bundle: %[1]s/bundle.pem\nnode_attestor: {tpm_devid: {tpm_device_path: %[2]s, devid_cert_path: %[1]s/devid.pem, devid_priv_path: %[1]s/devid.priv, devid_pub_path: %[1]s/devid.pub}}\n",
			dir, tpm.Socket),
	})
	d.StartServer(t)
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")
	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server", "--selector", "tpm_devid:subject:cn:host-1", "--selector", "tpm_devid:issuer:cn:machines")
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}

	// The machine is renamed: a new certificate of the same key is another node.
	run("openssl", "x509", "-new", "-force_pubkey", "key.pem", "-subj", "/CN=host-2", "-CA", "machines.pem", "-CAkey", "machines.key",
		"-set_serial", "2", "-days", "1", "-out", "devid.new")
	if err := os.Rename(filepath.Join(dir, "devid.new"), filepath.Join(dir, "devid.pem")); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "the loss of the identity", func(context.Context) error {
		if out, _, code := fetch.Try(t); code == 0 {
			return fmt.Errorf("fetch x509 printed:\n%s", out)
		}
		return nil
	})
}
