package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// A system of its own boots in a container: systemd, its bus, and the agent and
// its workloads as units.
func TestUnitsGetTheirIdentities(t *testing.T) {
	t.Parallel()
	d := harness.NewDomain(t, harness.Settings{Agent: "workload_attestors:\n  unix: {}\n  systemd: {}\n"})
	d.StartServer(t)
	for _, unit := range []string{"web", "db@1"} {
		d.Admin(t, "entry", "create", "--spiffe-id", "/"+unit[:2], "--parent-id", "/node", "--selector", "systemd:id:"+unit+".service")
	}
	out := filepath.Join(d.Dir, "agent") // of the agent's user
	fetch := func(name string) string {  // until the agent serves
		return fmt.Sprintf(`[Unit]
StartLimitIntervalSec=0
[Service]
Type=oneshot
User=agent
Restart=on-failure
RestartSec=200ms
ExecStart=/bin/sh -c '%s fetch x509 --socket %s >%s/%s.out 2>%[3]s/%[4]s.err; echo $? >%[3]s/%[4]s.status; exec test ! $$(cat %[3]s/%[4]s.status) = 5'
`, harness.Binary(t), d.Socket, out, name)
	}
	booted := harness.Systemd(t, map[string]string{
		"hallmark-agent.service": fmt.Sprintf("[Service]\nUser=agent\nExecStart=%s agent run -c %s/agent.yaml --join %s\nStandardError=append:%[4]s/agent.log\n",
			harness.Binary(t), d.Dir, d.Join(t), out),
		"web.service":      fetch("web"),
		"db@.service":      fetch("db-%i"),
		"stranger.service": fetch("stranger"),
	}, []string{"hallmark-agent.service", "web.service", "db@1.service", "db@2.service", "stranger.service"}, d.Dir, filepath.Dir(harness.Binary(t)))

	defer func() {
		if b, _ := os.ReadFile(filepath.Join(out, "agent.log")); t.Failed() {
			t.Logf("the agent's log:\n%s", b)
		}
	}()
	for name, want := range map[string]string{"web": "spiffe://example.org/we\n", "db-1": "spiffe://example.org/db\n", "db-2": "", "stranger": ""} {
		read := func(kind string) string {
			b, _ := os.ReadFile(filepath.Join(out, name+"."+kind))
			return string(b)
		}
		harness.Eventually(t, name, func(context.Context) error {
			select {
			case <-booted.Done():
				t.Fatalf("the system ended: %s", booted.Stderr())
			default:
			}
			if status := read("status"); status == "" || status == "5\n" {
				return errors.New("it has not reached the agent yet: " + read("err"))
			}
			return nil
		})
		switch got, complaint := read("out"), read("err"); {
		case want != "" && (!strings.HasPrefix(got, want) || strings.Count(got, "spiffe://") != 1):
			t.Errorf("%s got %s%s", name, got, complaint)
		case want == "" && (got != "" || !strings.Contains(complaint, "no identity")):
			t.Errorf("%s got %s%s", name, got, complaint)
		}
	}
}
