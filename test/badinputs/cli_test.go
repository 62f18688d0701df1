package badinputs

import (
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// commands are calls with a mistake each, the exit status, and what the error
// names.
var commands = []struct {
	name string
	args []string
	code int
	says []string
}{
	{"unknown command", []string{"entri"}, 2, []string{"there is no command", "did you mean \"hallmark entry\""}},
	{"unknown flag", []string{"entry", "list", "--selectr", "a:b"}, 2, []string{"has no flag", "did you mean --selector"}},
	{"entry without selector", []string{"entry", "create", "--spiffe-id", "/web", "--parent-id", "/dev"}, 2, []string{"needs --selector"}},
	{"malformed selector", []string{"entry", "create", "--spiffe-id", "/web", "--parent-id", "/dev", "--selector", "unix"}, 2, []string{"selector", "type:value"}},
	{"ID of another trust domain", []string{"entry", "create", "--spiffe-id", "spiffe://other.org/web", "--parent-id", "/dev", "--selector", "unix:uid:1"}, 1, []string{"other.org", "example.org"}},
	{"ID with a query", []string{"entry", "create", "--spiffe-id", "spiffe://example.org/web?a", "--parent-id", "/dev", "--selector", "unix:uid:1"}, 2, []string{"is no SPIFFE ID", "write spiffe://DOMAIN/PATH"}},
	{"reserved ID", []string{"entry", "create", "--spiffe-id", "/spire/server", "--parent-id", "/dev", "--selector", "unix:uid:1"}, 1, []string{"reserved: /spire/ for servers and agents"}},
	{"bad DNS name", []string{"entry", "create", "--spiffe-id", "/web", "--parent-id", "/dev", "--selector", "unix:uid:1", "--dns", "a b"}, 1, []string{"DNS name", "a b"}},
	{"lifetime without unit", []string{"entry", "create", "--spiffe-id", "/web", "--parent-id", "/dev", "--selector", "unix:uid:1", "--x509-ttl", "60"}, 2, []string{"has no unit", "write 60s"}},
	{"entry that is not there", []string{"entry", "show", "none"}, 3, []string{"not found"}},
	{"delete what is not there", []string{"entry", "delete", "none"}, 3, []string{"not found"}},
	{"update what is not there", []string{"entry", "update", "none", "--hint", "x"}, 3, []string{"not found"}},
	{"node that is not there", []string{"node", "show", "/spire/agent/none"}, 3, []string{"not found"}},
	{"ban who is not there", []string{"node", "ban", "/spire/agent/none", "--yes"}, 3, []string{"not found"}},
	{"token for another trust domain", []string{"token", "generate", "--agent-id", "spiffe://other.org/x"}, 1, []string{"other.org"}},
	{"token of no time", []string{"token", "generate", "--ttl", "0s"}, 2, []string{"ttl"}},
	{"no kind of authority", []string{"authority", "rotate", "pgp"}, 2, []string{"\"pgp\" is no kind of authority", "x509, jwt or wit"}},
	{"minting without an ID", []string{"svid", "mint", "x509"}, 2, []string{"needs"}},
	{"minting for another trust domain", []string{"svid", "mint", "x509", "--spiffe-id", "spiffe://other.org/x"}, 1, []string{"other.org"}},
	{"JWT without audience", []string{"svid", "mint", "jwt", "--spiffe-id", "/x"}, 2, []string{"needs --audience"}},
	{"unknown format", []string{"entry", "list", "-o", "xml"}, 2, []string{"table, json, yaml"}},
	{"too many arguments", []string{"entry", "list", "x"}, 2, []string{"takes no argument"}},
	{"invitation that is cut", []string{"federation", "accept", "--yes", "hallmark-federation-v1.abc"}, 2, []string{"its end is missing", "copy the whole line"}},
	{"join string as invitation", []string{"federation", "accept", "--yes", "hallmark-join-v1.abc"}, 2, []string{"not an invitation", "hallmark federation invite"}},
	{"invitation without https", []string{"federation", "invite", "--url", "http://example.org/"}, 2, []string{"write https://HOST:PORT/"}},
	{"no configuration", []string{"server", "validate", "-c", "/none.yaml"}, 1, []string{"/none.yaml", "no such file"}},
	{"setting without value", []string{"server", "validate", "--set", "log.level"}, 2, []string{"write KEY=VALUE"}},
}

func TestBadCommandsAreExplainedAndChangeNothing(t *testing.T) {
	h := newHouse(t)
	before := h.state(t)
	t.Run("all", func(t *testing.T) {
		for _, c := range commands {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				out, stderr, code := harness.Command{Args: c.args, Env: []string{"HALLMARK_ADMIN_SOCKET=" + h.admin}}.Try(t)
				if code != c.code || out != "" {
					t.Errorf("exit status %d, want %d; output %q\n%s", code, c.code, out, stderr)
				}
				says(t, stderr, c.says...)
			})
		}
	})
	h.unchanged(t, before)
	h.serves(t)
}

// TestBadTokensAreExplained asks the Workload API through the command line.
func TestBadTokensAreExplained(t *testing.T) {
	h := newHouse(t)
	for token, want := range map[string]string{
		"abc": "no JWT in compact form", "a.b": "no JWT in compact form", "..": "header: it is empty",
		strings.Repeat("a", 40<<10) + ".a.a": "the most is 32768", "e30.e30.AA": "names no algorithm",
		"eyJhbGciOiJub25lIn0.e30.AA": `"none" is not allowed`, "eyJhbGciOiJIUzI1NiJ9.e30.AA": `"HS256" is not allowed`,
	} {
		t.Run(want, func(t *testing.T) {
			_, stderr, code := harness.Command{Args: []string{"validate", "jwt", token, "--audience", "us", "--socket", h.socket}}.Try(t)
			if code != 1 {
				t.Errorf("exit status %d\n%s", code, stderr)
			}
			says(t, stderr, "the token is not valid", want)
		})
	}
	h.serves(t)
}
