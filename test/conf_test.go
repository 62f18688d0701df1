package test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestExampleConfigurationsRun runs conf/server.yaml and conf/agent.yaml with
// the commands that they name, in an empty directory.
func TestExampleConfigurationsRun(t *testing.T) {
	dir := devDir(t)
	address := harness.FreeAddress(t) // the examples' port may be in use
	for _, name := range []string{"server.yaml", "agent.yaml"} {
		text, err := os.ReadFile(filepath.Join("..", "conf", name))
		if err != nil {
			t.Fatal(err)
		}
		example := strings.ReplaceAll(string(text), "127.0.0.1:8081", address)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(example), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) harness.Command { return harness.Command{Args: args, Dir: dir} }
	run("server", "validate", "-c", "server.yaml").Run(t)
	run("agent", "validate", "-c", "agent.yaml").Run(t)
	admin := "hallmark-data/server.sock"
	run("server", "run", "-c", "server.yaml").Start(t).
		WaitReady(t, "server", "health", "--admin-socket", filepath.Join(dir, admin))
	join := strings.TrimSpace(run("token", "generate", "--agent-id", "/node", "--admin-socket", admin).Run(t))
	run("agent", "run", "-c", "agent.yaml", "--join", join).Start(t).
		WaitReady(t, "agent", "health", "--admin-socket", filepath.Join(dir, "hallmark-data/agent.sock"))
	binary := "unix:path:" + harness.Binary(t)
	run("entry", "create", "--spiffe-id", "/me", "--parent-id", "/node", "--selector", binary, "--admin-socket", admin).Run(t)
	out := run("fetch", "x509", "--socket", "hallmark-data/workload.sock").Run(t)
	if !strings.Contains(out, "spiffe://example.org/me") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}
}
