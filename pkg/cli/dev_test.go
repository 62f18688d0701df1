package cli_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// devSession is a `hallmark dev` that runs.
type devSession struct {
	cmd    *exec.Cmd
	stdout *bufio.Reader
	stderr bytes.Buffer
}

func devDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "h") // sockets need short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func startDev(t testing.TB, dir string, args ...string) *devSession {
	t.Helper()
	u, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	s := &devSession{cmd: exec.CommandContext(ctx, "hallmark", append([]string{"dev", "--dir", dir, "--listen", "127.0.0.1:0"}, args...)...)}
	s.cmd.Env = append(os.Environ(), "FAKE_ID=spiffe://example.org/user/"+u.Username, "HOME="+dir, "XDG_STATE_HOME=")
	s.cmd.Stderr = &s.stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	s.stdout = bufio.NewReader(out)
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return s
}

// until reads the output up to a line that holds the text.
func (s *devSession) until(t testing.TB, text string) string {
	t.Helper()
	var b strings.Builder
	for {
		line, err := s.stdout.ReadString('\n')
		b.WriteString(line)
		if strings.Contains(line, text) {
			return b.String()
		}
		if err != nil {
			t.Fatalf("no %q in the output: %v\n%s%s", text, err, b.String(), s.stderr.String())
		}
	}
}

func (s *devSession) end(t testing.TB, sig syscall.Signal) string {
	t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	rest, _ := io.ReadAll(s.stdout)
	err := s.cmd.Wait()
	if sig == syscall.SIGINT && err != nil {
		t.Fatalf("after an interrupt: %v\n%s", err, s.stderr.String())
	}
	return string(rest)
}

func TestDevSaysWhoYouAreAndWhatToTry(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	s := startDev(t, dir)
	got := s.until(t, "Ctrl-C")
	for _, want := range []string{
		`(?m)^  ● Hallmark is running  after \S+s$`,
		`(?m)^  You are  spiffe://example\.org/user/\S+$`,
		`(?m)^  until    \d\d:\d\d:\d\d, in 1h; it renews itself$`,
		`(?m)^    export SPIFFE_ENDPOINT_SOCKET=unix://` + regexp.QuoteMeta(dir) + `/workload\.sock$`,
		`hallmark fetch x509`, `hallmark explain`, `hallmark demo mtls`,
	} {
		if !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("the output has no %s:\n%s", want, got)
		}
	}
	if rest := s.end(t, syscall.SIGINT); !strings.Contains(rest, "Stopping; state stays in "+dir) {
		t.Errorf("at the end: %q", rest)
	}
}

func TestDevStartsAgainAfterAnyEnd(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	mark := filepath.Join(dir, "agent", "mark")
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGINT, syscall.SIGKILL, syscall.SIGTERM} {
		s := startDev(t, dir)
		s.until(t, "Ctrl-C")
		if err := os.WriteFile(mark, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		s.end(t, sig)
		if _, err := os.Stat(mark); err != nil {
			t.Errorf("the agent's directory did not survive: %v", err)
		}
	}
	// A new server does not know the old agent: its identity goes too.
	if err := os.RemoveAll(filepath.Join(dir, "server")); err != nil {
		t.Fatal(err)
	}
	s := startDev(t, dir, "--", "true")
	if err := s.cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, s.stderr.String())
	}
	if _, err := os.Stat(mark); err == nil {
		t.Error("the identity of an agent outlived its server")
	}
}

func TestASecondDevInOneDirectoryIsTold(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	first := startDev(t, dir)
	first.until(t, "Ctrl-C")
	second := startDev(t, dir)
	err := second.cmd.Wait()
	if got := second.stderr.String(); err == nil || !strings.Contains(got, "hallmark dev runs already in") ||
		!strings.Contains(got, "--dir DIR or --ephemeral") {
		t.Errorf("got %v\n%s", err, got)
	}
	first.end(t, syscall.SIGINT)
}

func TestDevPassesSignalsToItsCommand(t *testing.T) {
	t.Parallel()
	s := startDev(t, devDir(t), "--", "sh", "-c", `trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.02; done`)
	s.until(t, "ready")
	rest := s.end(t, syscall.SIGTERM)
	if code := s.cmd.ProcessState.ExitCode(); code != 3 || !strings.Contains(rest, "told") {
		t.Errorf("exit status %d, output %q\n%s", code, rest, s.stderr.String())
	}
}

func TestDevBringsAnAgentBackThatLostItsIdentity(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	s := startDev(t, dir, "--", "sh", "-c", `kill -WINCH $PPID; while ! test -e "`+dir+`/agent/twice"; do sleep 0.02; done`)
	if err := s.cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, s.stderr.String())
	}
}
