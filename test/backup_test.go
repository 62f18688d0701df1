package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestBackupIsRestoredIntoAnotherServer copies a running server, and with the
// copy and the keys another one goes on where it was. A damaged copy restores
// nothing.
func TestBackupIsRestoredIntoAnotherServer(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	config := func(name string) string {
		path := filepath.Join(dir, name+".yaml")
		text := fmt.Sprintf("trust_domain: example.org\nlisten: 127.0.0.1:0\ndata_dir: %s/%s\nadmin_socket: %s/%s.sock\n", dir, name, dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	serve := func(name string) *harness.Process {
		p := harness.Command{Args: []string{"server", "run", "-c", filepath.Join(dir, name+".yaml")}}.Start(t)
		p.WaitReady(t, "server", "health", "--admin-socket", filepath.Join(dir, name+".sock"))
		return p
	}
	ask := func(name string, args ...string) string {
		return harness.Command{Args: append(args, "--admin-socket", filepath.Join(dir, name+".sock"))}.Run(t)
	}
	config("old")
	old := serve("old")
	ask("old", "entry", "create", "--id", "web", "--spiffe-id", "/web", "--parent-id", "/node", "--selector", "unix:uid:5")
	backup := filepath.Join(dir, "backup")
	ask("old", "server", "backup", backup)
	entries, authorities := ask("old", "entry", "list"), ask("old", "authority", "list")
	old.Stop(t)

	data, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	damaged := filepath.Join(dir, "damaged")
	if err := os.WriteFile(damaged, data, 0o600); err != nil {
		t.Fatal(err)
	}
	restore := func(file string) harness.Command {
		return harness.Command{Args: []string{"server", "restore", "-c", filepath.Join(dir, "new.yaml"), "--yes", file}}
	}
	config("new")
	if _, stderr, code := restore(damaged).Try(t); code != 1 || !strings.Contains(stderr, "backup") {
		t.Errorf("a damaged backup: exit status %d\n%s", code, stderr)
	}
	restore(backup).Run(t) // into a store that is still empty
	if _, stderr, code := restore(backup).Try(t); code != 1 || !strings.Contains(stderr, "empty") {
		t.Errorf("a second restore: exit status %d\n%s", code, stderr)
	}
	if out, err := exec.Command("cp", "-a", filepath.Join(dir, "old", "keys"), filepath.Join(dir, "new")).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
	serve("new")
	if got := ask("new", "entry", "list"); got != entries {
		t.Errorf("entries are\n%s, they were\n%s", got, entries)
	}
	if got := ask("new", "authority", "list"); firstColumns(got) != firstColumns(authorities) {
		t.Errorf("authorities are\n%s, they were\n%s", got, authorities)
	}
}
