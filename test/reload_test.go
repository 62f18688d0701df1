package test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// rewrite changes a daemon's file and has it read that again.
func rewrite(t *testing.T, p *harness.Process, file string, change func(string) string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(change(string(text))), 0o644); err != nil {
		t.Fatal(err)
	}
	p.Signal(syscall.SIGHUP)
}

func TestReloadTakesOverLogLevelAndLimitsAndNamesWhatNeedsARestart(t *testing.T) {
	t.Parallel()
	d := harness.NewDomain(t, harness.Settings{Server: "log: {level: info}\n", Agent: "log: {level: info}\n"})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	for name, c := range map[string]struct {
		process  *harness.Process
		limit    string
		restart  string // a line that needs one
		restarts string // its key
	}{
		"server.yaml": {d.Server, "attest_per_second", "advertise: other.example.org:1\n", "advertise"},
		"agent.yaml":  {d.Agent, "calls_per_second", "held_svids: 7\n", "held_svids"},
	} {
		file := filepath.Join(d.Dir, name)
		rewrite(t, c.process, file, func(s string) string {
			return strings.Replace(s, "level: info", "level: debug", 1) + c.restart + "limits: {" + c.limit + ": 7}\n"
		})
		c.process.WaitOutput(t, "key=log.level from=info to=debug")
		c.process.WaitOutput(t, "key=limits."+c.limit+" from=0 to=7")
		c.process.WaitOutput(t, "keys="+c.restarts)
		c.process.WaitOutput(t, "changed=2 need_restart=1")

		// A file that is wrong changes nothing, not even what is right in it.
		rewrite(t, c.process, file, func(s string) string {
			return strings.Replace(s, "level: debug", "level: error", 1) + "no_such_key: 1\n"
		})
		c.process.WaitOutput(t, "everything stays as it was")
		c.process.WaitOutput(t, name+":")
		c.process.WaitOutput(t, "no_such_key")

		// It goes on from what is in force.
		rewrite(t, c.process, file, func(s string) string {
			return strings.Replace(strings.Replace(s, "no_such_key: 1\n", "", 1), "level: error", "level: info", 1)
		})
		c.process.WaitOutput(t, "key=log.level from=debug to=info")
		if out := c.process.Stderr(); strings.Contains(out, "to=error") {
			t.Errorf("%s: a wrong file was taken over in part:\n%s", name, out)
		}
	}
	d.Entry(t, "/web", 61003) // both still serve
	if code := d.Agent.Stop(t); code != 0 {
		t.Errorf("the agent's exit status is %d", code)
	}
	if code := d.Server.Stop(t); code != 0 {
		t.Errorf("the server's exit status is %d", code)
	}
}
