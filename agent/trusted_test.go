package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/config"
)

func TestTrustedProcessesAreConfigured(t *testing.T) {
	const base = "trust_domain: example.org\nserver: localhost:8081\n"
	const on = base + "experimental: {broker: true}\nbroker: "
	for name, text := range map[string]string{
		"delegates":       base + "authorized_delegates: [spiffe://example.org/cilium, spiffe://example.org/other]",
		"a broker":        on + "{brokers: [{id: spiffe://example.org/ztunnel}]}",
		"with its policy": on + "{socket: /x, brokers: [{id: spiffe://example.org/a, spiffe_ids: [spiffe://example.org/shop/*], audiences: [db]}, {id: spiffe://example.org/b}]}",
	} {
		if err := check(text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]struct{ text, want string }{
		"no SPIFFE ID":             {base + "authorized_delegates: [cilium]", `SPIFFE ID "cilium"`},
		"a foreign delegate":       {base + "authorized_delegates: [spiffe://other.org/x]", "is not that of a workload in trust domain example.org"},
		"the trust domain":         {base + "authorized_delegates: [spiffe://example.org]", "is not that of a workload in trust domain example.org"},
		"a delegate twice":         {base + "authorized_delegates: [spiffe://example.org/x, spiffe://example.org/x]", "is there twice"},
		"BE24 not switched on":     {base + "broker: {brokers: [{id: spiffe://example.org/a}]}", "set experimental.broker to true"},
		"switched on, no brokers":  {base + "experimental: {broker: true}", "broker names no brokers"},
		"an empty list":            {on + "{brokers: []}", "broker.brokers is empty"},
		"a foreign broker":         {on + "{brokers: [{id: spiffe://other.org/x}]}", "is not that of a workload in trust domain example.org"},
		"a broker without an ID":   {on + "{brokers: [{audiences: [x]}]}", `SPIFFE ID ""`},
		"a broker twice":           {on + "{brokers: [{id: spiffe://example.org/a}, {id: spiffe://example.org/a}]}", "is there twice"},
		"foreign workloads":        {on + "{brokers: [{id: spiffe://example.org/a, spiffe_ids: [spiffe://other.org/*]}]}", "is not of trust domain example.org"},
		"no pattern":               {on + "{brokers: [{id: spiffe://example.org/a, spiffe_ids: [shop]}]}", `SPIFFE ID "shop"`},
		"the Workload API's":       {base + "socket: /w\nexperimental: {broker: true}\nbroker: {socket: /w, brokers: [{id: spiffe://example.org/a}]}", "broker.socket is that of another API"},
		"the operators' socket":    {base + "admin_socket: /w\nexperimental: {broker: true}\nbroker: {socket: /w, brokers: [{id: spiffe://example.org/a}]}", "broker.socket is that of another API"},
		"a long path":              {on + "{socket: /" + strings.Repeat("x", 107) + ", brokers: [{id: spiffe://example.org/a}]}", "108 bytes long"},
		"an experiment of no kind": {base + "experimental: {brokers: true}", "did you mean"},
	} {
		if err := check(c.text); err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "agent.yaml:") {
			t.Errorf("%s: error is %v, want %q", name, err, c.want)
		}
	}
}

// sockets returns the sockets in a directory with their modes.
func sockets(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Type() == os.ModeSocket {
			out = append(out, fmt.Sprintf("%s %o", e.Name(), info.Mode().Perm()))
		}
	}
	return out
}

func TestBrokerEndpoint_BE24_ThereIsNoneUnlessItIsSwitchedOn(t *testing.T) {
	w := newWorld(t)
	src := w.source(t)
	stop := run(t, src)
	if got := sockets(t, w.dir); !slices.Equal(got, []string{"a.sock 600", "w.sock 777"}) {
		t.Errorf("sockets are %v", got)
	}
	if err := stop(); err != nil {
		t.Errorf("stopped with %v", err)
	}
	more := fmt.Sprintf("authorized_delegates: [spiffe://example.org/web]\nexperimental: {broker: true}\nbroker: {socket: %s, brokers: [{id: spiffe://example.org/web}]}\n",
		filepath.Join(w.dir, "b.sock"))
	stop = run(t, config.Source{Name: src.Name, Data: append(src.Data, more...)})
	if got := sockets(t, w.dir); !slices.Equal(got, []string{"a.sock 660", "b.sock 660", "w.sock 777"}) {
		t.Errorf("where it is switched on, sockets are %v", got)
	}
	if err := stop(); err != nil {
		t.Errorf("stopped with %v", err)
	}
	if got := sockets(t, w.dir); len(got) != 0 {
		t.Errorf("once stopped, sockets are %v", got)
	}
}

func TestTheExamplesOfTheDocumentAreGood(t *testing.T) {
	text, err := os.ReadFile("../docs/broker.md")
	if err != nil {
		t.Fatal(err)
	}
	examples := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(text, -1)
	if len(examples) != 2 {
		t.Errorf("%d examples", len(examples))
	}
	for _, e := range examples {
		if err := check("trust_domain: example.org\nserver: localhost:8081\n" + string(e[1])); err != nil {
			t.Errorf("%v:\n%s", err, e[1])
		}
	}
}
