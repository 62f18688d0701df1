package test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestExampleConfigurationsRun runs conf/server.yaml and conf/agent.yaml with
// the commands that they name, in an empty directory.
func TestExampleConfigurationsRun(t *testing.T) {
	t.Parallel()
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
	harness.Eventually(t, "its identity", func(context.Context) error { // the agent may not have the entry at once
		out, stderr, code := run("fetch", "x509", "--socket", "hallmark-data/workload.sock").Try(t)
		if code != 0 || !strings.Contains(out, "spiffe://example.org/me") {
			return fmt.Errorf("exit status %d\n%s%s", code, out, stderr)
		}
		return nil
	})
}

// TestExampleConfigurationsFitTheirSchema validates them as an editor does, by
// the schema that their first line names.
func TestExampleConfigurationsFitTheirSchema(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("..", "conf", "*.yaml"))
	if err != nil || len(files) < 2 {
		t.Fatalf("there are %d examples (%v)", len(files), err)
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(text), "\n")
		named, ok := strings.CutPrefix(first, "# yaml-language-server: $schema=")
		if !ok {
			t.Errorf("%s: the first line names no schema", path)
			continue
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(path), named)); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		var config any
		if err := yaml.Unmarshal(text, &config); err != nil {
			t.Fatal(err)
		}
		if err := harness.Schema(t, strings.TrimSuffix(filepath.Base(named), ".json")).Validate(config); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
}
