package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// SoftHSM is a PKCS #11 token in files of its own.
type SoftHSM struct {
	Module  string // the library
	URI     string
	PIN     string
	PINFile string

	tokens string
}

// NewSoftHSM makes a token that this process can use.
func NewSoftHSM(t testing.TB) *SoftHSM {
	t.Helper()
	NeedCommand(t, "softhsm2-util")
	dir := t.TempDir()
	h := &SoftHSM{Module: "/usr/lib/softhsm/libsofthsm2.so", PIN: "482913", PINFile: filepath.Join(dir, "pin"), tokens: filepath.Join(dir, "tokens")}
	h.URI = "pkcs11:module-path=" + h.Module + ";token=hallmark"
	conf := filepath.Join(dir, "softhsm2.conf")
	must(t, os.Mkdir(h.tokens, 0o700))
	must(t, os.WriteFile(h.PINFile, []byte(h.PIN+"\n"), 0o600))
	must(t, os.WriteFile(conf, fmt.Appendf(nil, "directories.tokendir = %s\nobjectstore.backend = file\nlog.level = ERROR\n", h.tokens), 0o600))
	t.Setenv("SOFTHSM2_CONF", conf)
	h.init(t, h.PIN)
	return h
}

func (h *SoftHSM) init(t testing.TB, pin string) {
	t.Helper()
	out, err := exec.Command("softhsm2-util", "--init-token", "--free", "--label", "hallmark", "--pin", pin, "--so-pin", "5678").CombinedOutput()
	if err != nil {
		t.Fatalf("softhsm2-util: %v\n%s", err, out)
	}
}

// TakeAway makes the token go, as when it is pulled out.
func (h *SoftHSM) TakeAway(t testing.TB) {
	t.Helper()
	must(t, os.Rename(h.tokens, h.tokens+".away"))
}

// Replace puts another token of the same label, with another PIN, in its place.
func (h *SoftHSM) Replace(t testing.TB, pin string) {
	t.Helper()
	h.TakeAway(t)
	must(t, os.Mkdir(h.tokens, 0o700))
	h.init(t, pin)
}

// BringBack undoes TakeAway and Replace.
func (h *SoftHSM) BringBack(t testing.TB) {
	t.Helper()
	must(t, os.RemoveAll(h.tokens))
	must(t, os.Rename(h.tokens+".away", h.tokens))
}
