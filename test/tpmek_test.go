package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestANodeAttestsByItsTPMAndLosesItsNameWithWhatItBooted attests an agent by its
// TPM, gives its processes an identity by what the machine has booted, and has
// something else be booted.
func TestANodeAttestsByItsTPMAndLosesItsNameWithWhatItBooted(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	maker := harness.NewTPMMaker(t)
	tpm := maker.NewTPM(t)
	dir := filepath.Dir(maker.CA)
	if err := os.Chmod(maker.CA, 0o644); err != nil {
		t.Fatal(err)
	}
	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("x509: {agent_lifetime: 4s}\nnode_attestors: {tpm_ek: {endorsement_ca_path: %s, pcrs: [0, 7]}}\n", maker.CA),
		Agent:  fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {tpm_ek: {tpm_device_path: %s}}\n", dir, tpm.Socket),
	})
	d.StartServer(t)
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")

	// The machines that booted what they should have a name of their own.
	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server",
		"--selector", "tpm_ek:manufacturer:id:00001014", "--selector", "tpm_ek:pcr:sha256:7:"+strings.Repeat("0", 64))
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}
	if out := d.Admin(t, "node", "list"); !strings.Contains(out, "spiffe://example.org/spire/agent/tpm_ek/") {
		t.Errorf("node list printed:\n%s", out)
	}

	device, err := linuxudstpm.Open(tpm.Socket)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(7), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}.Execute(device)
	if err := errors.Join(err, device.Close()); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, "the loss of the identity", func(context.Context) error {
		if out, _, code := fetch.Try(t); code == 0 {
			return fmt.Errorf("fetch x509 printed:\n%s", out)
		}
		return nil
	})
}
