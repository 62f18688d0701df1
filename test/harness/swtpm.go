package harness

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// TPMMaker is a manufacturer of TPMs, with authorities of its own.
type TPMMaker struct {
	CA string // PEM file of the authority that signs endorsement keys' certificates

	dir string
}

// NewTPMMaker founds one. Its authorities are made with its first TPM.
func NewTPMMaker(t testing.TB) *TPMMaker {
	t.Helper()
	NeedCommand(t, "swtpm")
	NeedCommand(t, "swtpm_setup")
	NeedCommand(t, "swtpm_localca")
	localca, err := exec.LookPath("swtpm_localca")
	must(t, err)
	dir := tempDir(t)
	m := &TPMMaker{dir: dir, CA: filepath.Join(dir, "issuercert.pem")}
	must(t, os.WriteFile(filepath.Join(dir, "setup.conf"), fmt.Appendf(nil,
		"create_certs_tool = %[2]s\ncreate_certs_tool_config = %[1]s/localca.conf\ncreate_certs_tool_options = %[1]s/localca.options\n", dir, localca), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "localca.conf"), fmt.Appendf(nil,
		"statedir = %[1]s\nsigningkey = %[1]s/signkey.pem\nissuercert = %[1]s/issuercert.pem\ncertserial = %[1]s/certserial\n", dir), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "localca.options"),
		[]byte("--tpm-manufacturer id:00001014\n--tpm-model swtpm\n--tpm-version 2\n--platform-manufacturer Hallmark\n--platform-version 1\n--platform-model Test\n"), 0o644))
	return m
}

// TPM is an emulated one, swtpm.
type TPM struct {
	Socket string // of commands; everybody may use it, one at a time

	dir string
	run *exec.Cmd // nil: taken away
}

// NewTPM makes a TPM and runs it until the test ends. It has an endorsement key,
// and a certificate of that which the maker has signed.
func (m *TPMMaker) NewTPM(t testing.TB) *TPM {
	t.Helper()
	dir := tempDir(t)
	setup := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", dir, "--config", filepath.Join(m.dir, "setup.conf"),
		"--createek", "--create-ek-cert", "--lock-nvram", "--overwrite", "--runas", "root")
	if out, err := setup.CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup: %v\n%s", err, out)
	}
	tpm := &TPM{Socket: filepath.Join(dir, "tpm"), dir: dir}
	t.Cleanup(func() { tpm.TakeAway(t) })
	tpm.BringBack(t)
	return tpm
}

// TakeAway makes the TPM go, as when its machine is switched off.
func (tpm *TPM) TakeAway(t testing.TB) {
	t.Helper()
	if tpm.run != nil {
		_ = tpm.run.Process.Kill()
		_ = tpm.run.Wait()
		tpm.run = nil
	}
}

// BringBack undoes TakeAway: the TPM starts anew, with what it keeps.
func (tpm *TPM) BringBack(t testing.TB) {
	t.Helper()
	_ = os.Remove(tpm.Socket) // which the one before has left
	tpm.run = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+tpm.dir, "--server", "type=unixio,mode=0666,path="+tpm.Socket,
		"--ctrl", "type=unixio,path="+tpm.Socket+".ctrl", "--flags", "not-need-init,startup-clear")
	tpm.run.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, tpm.run.Start())
	Eventually(t, "the TPM", func(ctx context.Context) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", tpm.Socket)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// tempDir makes a directory whose path is short enough for sockets.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-tpm-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	return dir
}
