package telemetry_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

func open(t *testing.T, c telemetry.Config) *telemetry.Server {
	t.Helper()
	s, err := telemetry.Open(telemetry.Options{Config: c, Registry: telemetry.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func get(t *testing.T, s *telemetry.Server, path string) (code int, body string) {
	t.Helper()
	resp, err := http.Get("http://" + s.Address().String() + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, strings.TrimSpace(string(b))
}

func TestReadyGivesTheReasonUntilTheProgramIsReady(t *testing.T) {
	s := open(t, telemetry.Config{Listen: "127.0.0.1:0"})
	expect := func(code int, body string) {
		t.Helper()
		if gotCode, got := get(t, s, "/ready"); gotCode != code || got != body {
			t.Errorf("/ready: %d %s; expected %d %s", gotCode, got, code, body)
		}
	}
	expect(503, `{"ready":false,"reason":"it is starting"}`)
	s.Ready(func(context.Context) error { return errors.New("there is no active X.509 authority") })
	expect(503, `{"ready":false,"reason":"there is no active X.509 authority"}`)
	s.Ready(func(context.Context) error { return nil })
	expect(200, `{"ready":true}`)
	var wrong []string
	s.Warn(func() []string { return wrong })
	expect(200, `{"ready":true}`)
	wrong = []string{"a target fails"}
	expect(200, `{"ready":true,"warnings":["a target fails"]}`)
}

func TestLiveAndMetricsAnswer(t *testing.T) {
	s := open(t, telemetry.Config{Listen: "127.0.0.1:0"})
	if code, body := get(t, s, "/live"); code != 200 || body != `{"live":true}` {
		t.Errorf("/live: %d %s", code, body)
	}
	if code, body := get(t, s, "/metrics"); code != 200 || !strings.Contains(body, "go_goroutines ") || !strings.Contains(body, "process_open_fds ") {
		t.Errorf("/metrics: %d %.200s", code, body)
	}
}

func TestProfilesAreServedOnlyIfTheyAreOn(t *testing.T) {
	for _, on := range []bool{false, true} {
		s := open(t, telemetry.Config{Listen: "127.0.0.1:0", PProf: on})
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/cmdline"} {
			if code, _ := get(t, s, path); (code == 200) != on {
				t.Errorf("pprof %v: %s: %d", on, path, code)
			}
		}
	}
}

func TestNothingIsServedWithoutAnAddress(t *testing.T) {
	s := open(t, telemetry.Config{})
	if s.Address() != nil {
		t.Errorf("listens on %v", s.Address())
	}
	s.Ready(nil)
}

func TestOpenNamesTheSettingOfAnAddressInUse(t *testing.T) {
	s := open(t, telemetry.Config{Listen: "127.0.0.1:0"})
	_, err := telemetry.Open(telemetry.Options{Config: telemetry.Config{Listen: s.Address().String()}, Registry: telemetry.NewRegistry()})
	if err == nil || !strings.Contains(err.Error(), "telemetry.listen") {
		t.Error(err)
	}
}

func TestOversizedHeadersAndBodiesAreRefused(t *testing.T) {
	s := open(t, telemetry.Config{Listen: "127.0.0.1:0"})
	conn, err := net.Dial("tcp", s.Address().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /live HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("a", 64<<10))
	b, _ := io.ReadAll(io.LimitReader(conn, 100))
	if !strings.HasPrefix(string(b), "HTTP/1.1 431") {
		t.Errorf("64 KiB of headers: %q", b)
	}
	resp, err := http.Post("http://"+s.Address().String()+"/metrics", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %s", resp.Status)
	}
}

func TestCheckRefusesWhatCannotBeMeant(t *testing.T) {
	for _, c := range []struct {
		config telemetry.Config
		key    string // "" is none
	}{
		{telemetry.Config{}, ""},
		{telemetry.Config{Listen: "127.0.0.1:9988", PProf: true}, ""},
		{telemetry.Config{Listen: "[::1]:9988", PProf: true}, ""},
		{telemetry.Config{Listen: "0.0.0.0:9988"}, ""},
		{telemetry.Config{Listen: ":9988"}, ""},
		{telemetry.Config{Listen: "0.0.0.0:9988", PProf: true}, "pprof"},
		{telemetry.Config{Listen: ":9988", PProf: true}, "pprof"},
		{telemetry.Config{Listen: "192.0.2.1:9988", PProf: true}, "pprof"},
		{telemetry.Config{Listen: "host.example:9988", PProf: true}, "pprof"},
		{telemetry.Config{PProf: true}, "pprof"},
		{telemetry.Config{Listen: "9988"}, "listen"},
		{telemetry.Config{Listen: "127.0.0.1:http-alt"}, "listen"},
		{telemetry.Config{Listen: "127.0.0.1:70000"}, "listen"},
	} {
		got := ""
		c.config.Check(func(key, _ string, _ ...any) { got += key })
		if got != c.key {
			t.Errorf("%+v: complains about %q; expected %q", c.config, got, c.key)
		}
	}
}

func TestCallsAreCountedByMethodAndCode(t *testing.T) {
	r := prometheus.NewRegistry()
	c := telemetry.NewCalls(r, "test", "a test")
	c.Call("/a/B", nil, time.Millisecond)
	c.Call("/a/B", nil, time.Second)
	c.Call("/a/B", status.Error(codes.NotFound, ""), time.Second)
	c.Stream("/a/S", status.Error(codes.Code(4711), ""))
	if err := testutil.GatherAndCompare(r, strings.NewReader(`
# HELP test_calls_total Calls of a test that have ended, streams among them, by gRPC method and code.
# TYPE test_calls_total counter
test_calls_total{code="NotFound",method="/a/B"} 1
test_calls_total{code="OK",method="/a/B"} 2
test_calls_total{code="Unknown",method="/a/S"} 1
`), "test_calls_total"); err != nil {
		t.Error(err)
	}
	if n := testutil.CollectAndCount(r, "test_call_duration_seconds"); n != 1 {
		t.Errorf("%d methods have a latency; a stream has none", n)
	}
}

func BenchmarkCall(b *testing.B) {
	c := telemetry.NewCalls(prometheus.NewRegistry(), "test", "a test")
	for b.Loop() {
		c.Call("/a/B", nil, time.Millisecond)
	}
}

func TestConnectionsBeyondTheMostWaitForTheirTurn(t *testing.T) {
	s := open(t, telemetry.Config{Listen: "127.0.0.1:0"})
	for range telemetry.MaxConnections { // they say nothing until the server closes them
		conn, err := net.Dial("tcp", s.Address().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	conn, err := net.Dial("tcp", s.Address().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /live HTTP/1.0\r\n\r\n")
	conn.SetReadDeadline(time.Now().Add(time.Second))
	if n, err := conn.Read(make([]byte, 1)); n != 0 {
		t.Errorf("one connection more was served (%v)", err)
	}
	conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	if b, err := io.ReadAll(conn); !strings.HasPrefix(string(b), "HTTP/1.0 200") {
		t.Errorf("once the silent ones were closed: %q, %v", b, err)
	}
}
