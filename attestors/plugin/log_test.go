package plugin

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestALogIsBounded(t *testing.T) {
	var out bytes.Buffer
	in := strings.Repeat("x", 1<<20) + "\n" + strings.Repeat(`{"@level":"error","@message":"m","a":"b"}`+"\n", 100_000)
	relay(strings.NewReader(in), slog.New(slog.NewTextHandler(&out, nil)))
	if n := out.Len(); n > 200_000 {
		t.Errorf("%d bytes are logged", n)
	}
	for _, want := range []string{"level=ERROR", "said.a=b", "lines_left_out="} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %s in the log", want)
		}
	}
}

func FuzzLogLine(f *testing.F) {
	f.Add([]byte(`{"@level":"warn","@message":"text","key":[1,{"a":null}]}`))
	f.Add([]byte("plain \xff text"))
	f.Fuzz(func(t *testing.T, line []byte) {
		_, message, fields := parseLine(line)
		if !utf8.ValidString(message) || len(message) > 2*maxText || len(fields) > 1 {
			t.Errorf("message %q, fields %v", message, fields)
		}
	})
}

func FuzzAgentID(f *testing.F) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	for _, id := range []string{
		"spiffe://example.org/spire/agent/example/a", "spiffe://example.org/spire/agent/example/../join_token/a",
		"spiffe://example.org/spire/agent/examples/a", "spiffe://elsewhere.org/spire/agent/example/a",
	} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id, path, err := agentID(text, "example", td)
		if err == nil && (id.String() != "spiffe://example.org/spire/agent/"+path || !strings.HasPrefix(path, "example/") ||
			len(path) == len("example/") || strings.Contains(path, "..") && strings.Contains(path, "/../")) {
			t.Errorf("%q is taken as %s", text, id)
		}
	})
}
