package plugin_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/plugin"
	"github.com/hallmark-id/hallmark/test/harness"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// config runs the example that is written with SPIRE's SDK. It is built once.
func config(t testing.TB, what, data string) plugin.Config {
	t.Helper()
	path := harness.Program(t, "github.com/hallmark-id/hallmark/test/plugin")
	checksum.Do(func() {
		program, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		checksum.text = fmt.Sprintf("%x", sha256.Sum256(program))
	})
	return plugin.Config{Command: path, Args: []string{what}, Checksum: checksum.text, Data: data}
}

var checksum struct {
	sync.Once
	text string
}

// copied is the example in a file of the test's own.
func copied(t testing.TB, from string) string {
	t.Helper()
	program, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "plugin")
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// logged is a log that is read while it is written.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logged) has(t testing.TB, words ...string) {
	t.Helper()
	harness.Eventually(t, fmt.Sprintf("%q in the log", words), func(context.Context) error {
		text := l.String()
		for _, w := range words {
			if !strings.Contains(text, w) {
				return fmt.Errorf("no %q in:\n%s", w, text[max(0, len(text)-4000):])
			}
		}
		return nil
	})
}

// run runs a plugin until the test ends, or stop is called.
func run(t testing.TB, p interface {
	Run(context.Context, *slog.Logger)
}) (log *logged, stop func()) {
	t.Helper()
	log = &logged{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.Run(ctx, slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return log, stop
}

func workload(t testing.TB, data string) (*plugin.Workload, *logged) {
	t.Helper()
	w := newWorkload(t, config(t, "workload", data))
	log, _ := run(t, w)
	return w, log
}

// newWorkload makes a plugin that is started again at once.
func newWorkload(t testing.TB, c plugin.Config) *plugin.Workload {
	t.Helper()
	w, err := plugin.NewWorkload("example", c, td)
	if err != nil {
		t.Fatal(err)
	}
	w.Hurry()
	return w
}

func self() attestors.Process { return attestors.Process{PID: int32(os.Getpid())} }

// pid finds the number of the plugin's process in what it gave.
func pid(t testing.TB, w *plugin.Workload) int {
	t.Helper()
	n := 0
	harness.Eventually(t, "selectors of the plugin", func(ctx context.Context) error {
		got, err := w.Attest(ctx, self())
		if err != nil {
			return err
		}
		for _, s := range got {
			if text, ok := strings.CutPrefix(s.String(), "example:plugin:"); ok {
				n, err = strconv.Atoi(text)
			}
		}
		return err
	})
	return n
}

func TestAProcessIsAttestedByAPlugin(t *testing.T) {
	t.Parallel()
	w, _ := workload(t, "")
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	got, err := w.Attest(t.Context(), self())
	if err != nil {
		t.Fatal(err)
	}
	if want := "example:comm:" + strings.TrimSpace(string(comm)); len(got) != 2 || got[0].String() != want {
		t.Errorf("selectors are %v; want %s", got, want)
	}
}

func TestAPluginThatIsKilledIsStartedAgain(t *testing.T) {
	t.Parallel()
	w, log := workload(t, "")
	first := pid(t, w)
	if err := unix.Kill(first, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	log.has(t, "it ended: signal: killed")
	if second := pid(t, w); second == first {
		t.Errorf("it is still process %d", first)
	}
}

func TestAPluginIsEndedWithItsHostAndLeavesNothing(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		t.Run(fmt.Sprintf("stopped=%t", stopped), func(t *testing.T) {
			tmp, err := os.MkdirTemp("", "hallmark-") // a socket's path is short
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(tmp) })
			c := config(t, "workload", "") // what is built for all tests is elsewhere
			t.Setenv("TMPDIR", tmp)
			w := newWorkload(t, c)
			_, stop := run(t, w)
			n := pid(t, w)
			if stopped { // it cannot answer any more
				if err := unix.Kill(n, unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			}
			stop()
			if err := unix.Kill(n, 0); !errors.Is(err, unix.ESRCH) {
				t.Errorf("process %d is still there: %v", n, err)
			}
			if left, _ := filepath.Glob(filepath.Join(tmp, "plugin-dir*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if _, err := w.Attest(t.Context(), self()); err == nil {
				t.Error("it attests still")
			}
		})
	}
}

func TestAPluginThatMisbehavesGivesNothing(t *testing.T) {
	for mode, says := range map[string]string{
		"crash": "it ended: exit status 3",
		"panic": "the plugin panics",
		"flood": "plugin wrote more than is logged",
		"hang":  "it hangs: 3 answers in a row",
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			file := filepath.Join(t.TempDir(), "misbehave")
			w := newWorkload(t, config(t, "workload", fmt.Sprintf("mode = %q\nfile = %q\n", mode, file)))
			if mode == "hang" {
				w.Impatient()
			}
			log, _ := run(t, w)
			first := pid(t, w)
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				got, err := w.Attest(t.Context(), self())
				if mode != "flood" && (err == nil || len(got) > 0) {
					t.Errorf("it gave %v, %v", got, err)
				}
			}
			log.has(t, says)
			if n := len(log.String()); n > 1<<20 {
				t.Errorf("its log is %d bytes long", n)
			}
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			if again := pid(t, w); mode != "flood" && again == first {
				t.Errorf("it is still process %d", first)
			}
		})
	}
	for mode, says := range map[string]string{
		"many": "1001 selectors", "fail": `Internal: "it fails"`, "huge": "larger than max",
		"long": "selector", "control": "no readable text", "empty": "selector",
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			w, _ := workload(t, fmt.Sprintf("mode = %q\n", mode))
			if got, err := w.Attest(t.Context(), self()); err == nil || len(got) > 0 || !strings.Contains(err.Error(), says) {
				t.Errorf("it gave %v, %v", got, err)
			}
		})
	}
}

func TestAPluginCannotGiveSelectorsOfAnotherType(t *testing.T) {
	t.Parallel()
	w, _ := workload(t, `mode = "usurper"`)
	got, err := w.Attest(t.Context(), self())
	if err != nil || fmt.Sprint(got) != "[example:unix:uid:0]" {
		t.Errorf("it gave %v, %v", got, err)
	}
}

func TestAProgramThatIsNotWhatItShouldBeIsNotRun(t *testing.T) {
	t.Parallel()
	script := []byte("#!/bin/sh\ntouch \"$1\"\n")
	says := func(line string) func(*testing.T, *plugin.Config) {
		return func(_ *testing.T, c *plugin.Config) { c.Args = []string{"says", line} }
	}
	for name, c := range map[string]struct {
		spoil func(t *testing.T, c *plugin.Config)
		says  string
	}{
		"another checksum": {func(_ *testing.T, c *plugin.Config) { c.Checksum = strings.Repeat("0", 64) }, "checksum of"},
		"changed": {func(t *testing.T, c *plugin.Config) {
			c.Command = filepath.Join(t.TempDir(), "plugin")
			if err := os.WriteFile(c.Command, script, 0o755); err != nil {
				t.Fatal(err)
			}
		}, "checksum of"},
		"writable by others": {func(t *testing.T, c *plugin.Config) {
			c.Command = copied(t, c.Command)
			if err := os.Chmod(c.Command, 0o757); err != nil {
				t.Fatal(err)
			}
		}, "can be changed by other users"},
		"of another user": {func(t *testing.T, c *plugin.Config) {
			harness.NeedRoot(t)
			c.Command = copied(t, c.Command)
			if err := os.Chown(c.Command, 65534, -1); err != nil {
				t.Fatal(err)
			}
		}, "belongs to another user"},
		"a directory":           {func(_ *testing.T, c *plugin.Config) { c.Command = filepath.Dir(c.Command) }, "is no file"},
		"gone":                  {func(_ *testing.T, c *plugin.Config) { c.Command += ".gone" }, "no such file"},
		"another kind":          {func(_ *testing.T, c *plugin.Config) { c.Args = []string{"server"} }, "made with SPIRE's SDK"},
		"no plugin":             {func(_ *testing.T, c *plugin.Config) { c.Args = nil }, "made with SPIRE's SDK"},
		"configuration refused": {func(_ *testing.T, c *plugin.Config) { c.Data = `mode = "refuse"` }, "no such mode"},
		"a port":                {says("1|1|tcp|127.0.0.1:1|grpc"), "not at a Unix socket in its TMPDIR"},
		"another's socket":      {says("1|1|unix|/tmp/plugin.sock|grpc"), "not at a Unix socket in its TMPDIR"},
		"another protocol":      {says("9|1|unix|x|grpc"), "incompatible core API version"},
		"a certificate":         {withCertificate, "first line is not that of a plugin"},
		"a line without end":    {says(strings.Repeat("x", 100<<10)), "made with SPIRE's SDK"},
		"a long line":           {says(strings.Repeat("y", 50<<10)), "Unrecognized remote plugin message"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conf := config(t, "workload", "")
			c.spoil(t, &conf)
			w := newWorkload(t, conf)
			log, stop := run(t, w)
			log.has(t, c.says)
			if got, err := w.Attest(t.Context(), self()); err == nil {
				t.Errorf("it gave %v", got)
			}
			stop()
			for line := range strings.Lines(log.String()) {
				if len(line) > 8<<10 {
					t.Errorf("a line of %d bytes is logged", len(line))
				}
			}
		})
	}
}

// withCertificate has a program answer as if it had been asked for TLS, at a
// socket where it may be.
func withCertificate(t *testing.T, c *plugin.Config) {
	cert := harness.NewAuthority(t).Server(t, "localhost").Certificate[0]
	c.Args = []string{"says", "1|1|unix|TMPDIR/x|grpc|" + base64.RawStdEncoding.EncodeToString(cert)}
}

func TestAProgramThatDoesNotBeginIsGivenUp(t *testing.T) {
	t.Parallel()
	c := config(t, "workload", "")
	c.Args = []string{"mute"}
	w := newWorkload(t, c)
	w.ImpatientAtStart()
	log, _ := run(t, w)
	log.has(t, "it did not start within 1s")
	if got, err := w.Attest(t.Context(), self()); err == nil {
		t.Errorf("it gave %v", got)
	}
}

func TestTheHalfOfTheAgentIsNoHalfOfTheServer(t *testing.T) {
	t.Parallel()
	p, err := plugin.NewServer("example", config(t, "agent", ""), plugin.Options{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	log, _ := run(t, p)
	log.has(t, "it does not serve spire.plugin.server.nodeattestor.v1.NodeAttestor")
	if e, err := p.Verify(t.Context(), []byte("node-1"), nil); !errors.Is(err, attestors.ErrUnavailable) {
		t.Errorf("it gave %v, %v", e, err)
	}
}

func TestAPluginGetsNoEnvironmentButWhatIsNamed(t *testing.T) {
	t.Setenv("HALLMARK_SECRET", "secret")
	t.Setenv("HALLMARK_WANTED", "wanted")
	c := config(t, "workload", "")
	c.Env = []string{"HALLMARK_WANTED"}
	w := newWorkload(t, c)
	run(t, w)
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid(t, w)))
	if err != nil {
		t.Fatal(err)
	}
	if text := string(env); strings.Contains(text, "HALLMARK_SECRET") || !strings.Contains(text, "HALLMARK_WANTED=wanted") {
		t.Errorf("its environment is %q", text)
	}
}

// node has an agent's half prove to a server's half what it is.
func node(t *testing.T, own *logged, mode string, known ...string) (*attestors.Evidence, int, error) {
	t.Helper()
	s, err := plugin.NewServer("example", config(t, "server", fmt.Sprintf("mode = %q\n", mode)), plugin.Options{
		TrustDomain: td, Log: slog.New(slog.NewTextHandler(own, nil)),
		Agents: func(id spiffeid.ID) bool { return len(known) > 0 && id.String() == known[0] },
	})
	if err != nil {
		t.Fatal(err)
	}
	s.Hurry()
	a := agentsHalf(t, "")
	run(t, s)
	payload, err := a.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	challenges := 0
	evidence, err := s.Verify(t.Context(), payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		challenges++
		return a.Respond(ctx, challenge)
	})
	return evidence, challenges, err
}

// agentsHalf runs an agent's half.
func agentsHalf(t *testing.T, mode string) *plugin.Agent {
	t.Helper()
	a, err := plugin.NewAgent("example", config(t, "agent", fmt.Sprintf("mode = %q\n", mode)), td)
	if err != nil {
		t.Fatal(err)
	}
	a.Hurry()
	run(t, a)
	return a
}

func TestANodeIsAttestedByAPlugin(t *testing.T) {
	t.Parallel()
	e, challenges, err := node(t, &logged{}, "")
	if err != nil {
		t.Fatal(err)
	}
	if e.Path != "example/node-1" || fmt.Sprint(e.Selectors) != "[example:node:node-1]" || !e.CanReattest || challenges != 1 {
		t.Errorf("evidence is %+v after %d challenges", e, challenges)
	}
	if e, _, err = node(t, &logged{}, "", "spiffe://example.org/spire/agent/example/node-1"); err != nil || len(e.Selectors) != 2 {
		t.Errorf("of a node that is known: %+v, %v", e, err)
	}
}

func TestAProofOfAPluginIsBounded(t *testing.T) {
	t.Parallel()
	for mode, says := range map[string]string{"large": "65537 bytes", "fail": "it fails", "crash": "Unavailable", "panic": "Unavailable"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			if proof, err := agentsHalf(t, mode).Proof(t.Context()); err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("it gave %d bytes, %v", len(proof), err)
			}
		})
	}
}

// A plugin that reads nothing of what it is sent is not waited for.
func TestAPluginThatDoesNotListenIsGivenUp(t *testing.T) {
	t.Parallel()
	a, err := plugin.NewAgent("example", config(t, "agent", `mode = "deaf"`), td)
	if err != nil {
		t.Fatal(err)
	}
	a.Impatient()
	run(t, a)
	harness.Eventually(t, "a proof", func(ctx context.Context) error {
		_, err := a.Proof(t.Context())
		return err
	})
	for range 100 {
		if _, err = a.Respond(t.Context(), make([]byte, 64<<10)); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "did not answer in time") {
		t.Errorf("error is %v", err)
	}
}

func TestAPluginSpeaksForItsOwnNodesAlone(t *testing.T) {
	t.Parallel()
	const elsewhere = "is not below spiffe://example.org/spire/agent/example/"
	for mode, says := range map[string]string{
		"foreign": elsewhere, "other": elsewhere, "workload": elsewhere, "itself": elsewhere,
		"many": "1001 selectors", "challenges": "more than 10 challenges",
		"crash": "Unavailable", "panic": "Unavailable", "fail": "it fails",
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			var own logged
			e, challenges, err := node(t, &own, mode)
			if !errors.Is(err, attestors.ErrUnavailable) || e != nil {
				t.Errorf("evidence is %+v, %v", e, err)
			}
			if !strings.Contains(own.String(), says) {
				t.Errorf("the log does not say %q:\n%s", says, own.String())
			}
			if challenges > 11 {
				t.Errorf("it sent %d challenges", challenges)
			}
		})
	}
}

func TestANodeThatAnswersWronglyIsToldSo(t *testing.T) {
	t.Parallel()
	s, err := plugin.NewServer("example", config(t, "server", ""), plugin.Options{TrustDomain: td, Agents: func(spiffeid.ID) bool { return false }})
	if err != nil {
		t.Fatal(err)
	}
	run(t, s)
	_, err = s.Verify(t.Context(), []byte("node-1"), func(context.Context, []byte) ([]byte, error) { return []byte("no"), nil })
	if err == nil || errors.Is(err, attestors.ErrUnavailable) || !strings.Contains(err.Error(), "that was not the challenge") {
		t.Errorf("error is %v", err)
	}
}

func TestAConfigurationIsChecked(t *testing.T) {
	sum := strings.Repeat("0", 64)
	for name, c := range map[string]plugin.Config{
		"unix":    {Command: "/x", Checksum: sum},
		"a/b":     {Command: "/x", Checksum: sum},
		"..":      {Command: "/x", Checksum: sum},
		"a:b":     {Command: "/x", Checksum: sum},
		"command": {Checksum: sum},
		"path":    {Command: "x", Checksum: sum},
		"none":    {Command: "/x"},
		"both":    {Command: "/x", Checksum: sum, InsecureNoChecksum: true},
		"short":   {Command: "/x", Checksum: "00"},
		"env":     {Command: "/x", Checksum: sum, Env: []string{"A=b"}},
	} {
		if err := c.Check(name); err == nil {
			t.Errorf("%s is taken: %+v", name, c)
		}
	}
	if err := (plugin.Config{Command: "/x", InsecureNoChecksum: true}).Check("example"); err != nil {
		t.Error(err)
	}
}

// BenchmarkAttest asks the example, which reads the name of the process.
func BenchmarkAttest(b *testing.B) {
	w, _ := workload(b, "")
	calls := int64(0)
	harness.Attestations(b, func() int64 { return calls }, nil, func() error {
		calls++ // it knows nothing from before
		_, err := w.Attest(b.Context(), self())
		return err
	})
}
