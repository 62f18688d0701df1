package test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestPluginsOfSPIREAttestNodesAndWorkloads has an agent attest by a plugin on
// both sides, and a process get its identity by what a third plugin says of it.
// Beside them run one that is not what its checksum says, one that hangs and one
// that ends at each call, and processes get their identities all the while; so
// do they when the plugin itself was killed, or the agent.
func TestPluginsOfSPIREAttestNodesAndWorkloads(t *testing.T) {
	harness.NeedRoot(t)
	dir, err := os.MkdirTemp("", "hallmark-plugins-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // the agent's user reads the bundle
		t.Fatal(err)
	}
	program := harness.Program(t, "github.com/hallmark-id/hallmark/test/plugin")
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	plugin := func(what, checksum, data string) string {
		return fmt.Sprintf("{command: %s, args: [%s], checksum: '%s', data: %q}", program, what, checksum, data)
	}
	sum := fmt.Sprintf("%x", sha256.Sum256(data))
	misbehave := filepath.Join(dir, "misbehave") // while it is there they do
	if err := os.WriteFile(misbehave, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("node_attestors:\n  join_token: {}\n  plugins:\n    example: %s\n    changed: %s\n    liar: %s\n",
			plugin("server", sum, ""), plugin("server", strings.Repeat("0", 64), ""), plugin("server", sum, `mode = "other"`)),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {plugins: {example: %s}}\n"+
			"workload_attestors:\n  unix: {}\n  plugins:\n    example: %s\n    changed: %s\n    hangs: %s\n    crashes: %s\n    many: %s\n",
			dir, plugin("agent", sum, ""), plugin("workload", sum, ""), plugin("workload", strings.Repeat("0", 64), ""),
			plugin("workload", sum, "mode = \"hang\"\nfile = \""+misbehave+"\"\n"), plugin("workload", sum, "mode = \"crash\"\nfile = \""+misbehave+"\"\n"),
			plugin("workload", sum, `mode = "many"`)),
	})
	d.StartServer(t)
	d.Server.WaitOutput(t, "is not the configured one, so it is not run")
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")

	const agent = "spiffe://example.org/spire/agent/example/node-1"
	harness.Eventually(t, "the node", func(context.Context) error {
		if out := d.Admin(t, "node", "list", "-o", "json"); !strings.Contains(out, agent) {
			return fmt.Errorf("nodes are %s", out)
		}
		return nil
	})
	if shown := d.Admin(t, "node", "show", agent, "-o", "json"); !strings.Contains(shown, `"example:node:node-1"`) {
		t.Errorf("the node is\n%s", shown)
	}
	d.Admin(t, "entry", "create", "--spiffe-id", "/by-plugin", "--parent-id", agent, "--selector", "example:comm:hallmark")
	d.Admin(t, "entry", "create", "--spiffe-id", "/by-uid", "--parent-id", agent, "--selector", fmt.Sprintf("unix:uid:%d", echoUID+1))

	byPlugin := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	byUID := harness.Command{Args: byPlugin.Args, UID: echoUID + 1}
	// both asks more at once than the answers that a plugin may owe.
	both := func(when string) {
		t.Helper()
		harness.Eventually(t, "identities "+when, func(context.Context) error {
			asked := map[*harness.Process]string{}
			for range 2 {
				asked[byPlugin.Start(t)] = "spiffe://example.org/by-plugin"
				asked[byUID.Start(t)] = "spiffe://example.org/by-uid"
			}
			var missing error
			for p, id := range asked {
				if code := p.Wait(t); code != 0 || !strings.Contains(p.Stdout(), id) {
					missing = fmt.Errorf("%s: fetch x509 printed:\n%s%s", id, p.Stdout(), p.Stderr())
				}
			}
			return missing
		})
	}
	both("at first")
	for _, said := range []string{"is not the configured one, so it is not run", "it ended: exit status 3", "it hangs: 3 answers", "1001 selectors"} {
		harness.Eventually(t, said, func(context.Context) error {
			if !strings.Contains(d.Agent.Stderr(), said) {
				byPlugin.Try(t)
				return fmt.Errorf("the agent's log has no %q", said)
			}
			return nil
		})
	}
	both("while others fail")
	if err := os.Remove(misbehave); err != nil {
		t.Fatal(err)
	}

	killed := children(t, d.Agent.PID(), program)
	for _, pid := range killed {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
	both("after every plugin was killed")

	left := children(t, d.Agent.PID(), program)
	d.Agent.Kill()
	harness.Eventually(t, "the end of the plugins of an agent that was killed", func(context.Context) error {
		for _, pid := range left {
			if stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil && !strings.Contains(string(stat), ") Z ") {
				return fmt.Errorf("process %d is still there", pid)
			}
		}
		return nil
	})
	d.StartAgent(t, "")
	both("after the agent was killed")
}

// children are the processes of a program that a process has started.
func children(t *testing.T, parent int, program string) (pids []int) {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", parent))
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		text, _ := os.ReadFile(list) // a thread may have ended
		for field := range strings.FieldsSeq(string(text)) {
			var pid int
			if _, err := fmt.Sscan(field, &pid); err != nil {
				t.Fatal(err)
			}
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err == nil && exe == program {
				pids = append(pids, pid)
			}
		}
	}
	if len(pids) == 0 {
		t.Fatal("there are no plugins")
	}
	return pids
}
