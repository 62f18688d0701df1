package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestARegistrationMovesOverByOneCommand imports from one server's API socket,
// and from what its commands print, into another: twice, as an import may be
// repeated.
func TestARegistrationMovesOverByOneCommand(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "h") // sockets need short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	serve := func(name, domain string) func(args ...string) (string, string, int) {
		t.Helper()
		file := filepath.Join(dir, name+".yaml")
		text := fmt.Sprintf("trust_domain: %s\nlisten: %s\ndata_dir: %s\nadmin_socket: %s.sock\n", domain, harness.FreeAddress(t), filepath.Join(dir, name), filepath.Join(dir, name))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		harness.Command{Args: []string{"server", "run", "-c", file}}.Start(t).WaitOutput(t, "server is ready")
		return func(args ...string) (string, string, int) {
			return harness.Command{Args: append(args, "--admin-socket", filepath.Join(dir, name+".sock"))}.Try(t)
		}
	}
	from, to, other := serve("from", "example.org"), serve("to", "example.org"), serve("other", "other.org")
	ok := func(out, stderr string, code int) string {
		t.Helper()
		if code != 0 {
			t.Fatalf("exit status %d\n%s%s", code, out, stderr)
		}
		return out
	}
	bundle := filepath.Join(dir, "other.json")
	if err := os.WriteFile(bundle, []byte(ok(other("bundle", "show", "-o", "spiffe"))), 0o600); err != nil {
		t.Fatal(err)
	}
	ok(from("federation", "create", "other.org", "--url", "https://other.org/bundle", "--endpoint-spiffe-id", "spiffe://other.org/spire/server", "--bundle", bundle))
	ok(from("entry", "create", "--id", "web", "--spiffe-id", "/web", "--parent-id", "/spire/agent/x", "--selector", "unix:uid:1",
		"--federates-with", "other.org", "--x509-ttl", "10m", "--dns", "web.internal", "--hint", "h", "--jwt-jti"))

	socket := filepath.Join(dir, "from.sock")
	if out := ok(to("import", "spire", socket, "--dry-run")); !strings.Contains(out, "WOULD BE CREATED") {
		t.Errorf("the plan is\n%s", out)
	}
	if out := ok(to("entry", "count")); strings.TrimSpace(out) != "0" {
		t.Errorf("a dry run has created %s entries", out)
	}
	for _, want := range []string{"created", "already there"} {
		out := ok(to("import", "spire", "unix://"+socket, "-o", "json"))
		if n := strings.Count(out, `"outcome": "`+want+`"`); n != 3 {
			t.Errorf("%d of 3 items are %s:\n%s", n, want, out)
		}
	}
	for _, args := range [][]string{{"federation", "list"}, {"bundle", "list", "-o", "json"}, {"entry", "list"}} {
		if a, b := ok(from(args...)), ok(to(args...)); a != b {
			t.Errorf("%v differs:\n%s\n%s", args, a, b)
		}
	}
	// Another trust domain's entries come only when that is asked for, and what
	// cannot come is named.
	if out, stderr, code := other("import", "spire", socket); code != 2 || !strings.Contains(stderr, "nothing was imported") {
		t.Errorf("exit status %d\n%s%s", code, out, stderr)
	}
	out, _, code := other("import", "spire", socket, "--rewrite-trust-domain")
	if code != 1 || !strings.Contains(out, "failed: entry spiffe://other.org/web (web)") {
		t.Errorf("exit status %d\n%s", code, out)
	}
}
