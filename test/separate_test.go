package test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/test/harness"
)

const (
	echoUID   = 61003
	callerUID = 61004
	nobodyUID = 61005
)

// TestSeparateProcesses runs server, agent and two services as four users. The
// services' SVIDs live so shortly that they are renewed throughout; server and
// agent are killed and come back; no handshake between the services fails.
//
// HALLMARK_SOAK=10m makes it last that long, with SVIDs of one minute.
func TestSeparateProcesses(t *testing.T) {
	t.Parallel()
	lifetime, rounds := 12*time.Second, 1
	pause := func(d time.Duration) { time.Sleep(d) } // the passing of time is what is tested
	if soak, err := time.ParseDuration(os.Getenv("HALLMARK_SOAK")); err == nil {
		lifetime = time.Minute
		rounds = int((soak + 3*lifetime - 1) / (3 * lifetime))
	}
	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("x509: {svid_lifetime: %s}\n", lifetime),
	})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/echo", echoUID)
	d.Entry(t, "/caller", callerUID)

	// Another user's process has its own identity, and only that.
	out := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: callerUID}.Run(t)
	if !strings.Contains(out, "spiffe://example.org/caller") || strings.Contains(out, "spiffe://example.org/echo") {
		t.Fatalf("the caller's user was given:\n%s", out)
	}
	_, stderr, code := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: nobodyUID}.Try(t)
	if code == 0 || !strings.Contains(stderr, "PermissionDenied") && !strings.Contains(stderr, "no identity") {
		t.Fatalf("a user without an entry: exit status %d\n%s", code, stderr)
	}

	p := startPair(t, d.Socket, echoUID, "spiffe://example.org/echo", callerUID, "spiffe://example.org/caller")
	p.waitFor(t, "first requests", func(n tally) bool { return n.Requests > 10 })
	for range rounds {
		pause(lifetime)
		d.Server.Kill()
		pause(lifetime / 4) // less than half a life: nobody may notice
		d.StartServer(t)
		pause(lifetime)
		d.Agent.Kill()
		d.StartAgent(t, "") // its own identity survives on disk
		pause(lifetime * 3 / 4)
	}
	p.waitFor(t, "renewals", func(n tally) bool { return n.SVIDs >= 3*rounds })
	if code := p.caller.Stop(t); code != 0 {
		t.Errorf("the caller ended with %d", code)
	}
	n := p.seen()
	t.Logf("%d handshakes with %d SVIDs, %d failed", n.Requests, n.SVIDs, n.Failures)
	if n.Failures > 0 || n.Requests < 100 {
		t.Errorf("%+v", n)
	}
	if code := d.Agent.Stop(t); code != 0 {
		t.Errorf("the agent ended with %d", code)
	}
	if code := d.Server.Stop(t); code != 0 {
		t.Errorf("the server ended with %d", code)
	}
}
