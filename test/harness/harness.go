// Package harness runs the real hallmark binary for the tests in this tree:
// it builds it once, starts it as whichever user, and stops what it started.
package harness

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait; it is far above what anything takes, also where
// many others work.
const patience = time.Minute

var built struct {
	sync.Mutex
	dir      string
	programs map[string]string // path by package or name
}

// Binary builds the hallmark binary, static, once, and returns its path. Any
// user may run it, in a container too. Call [Cleanup] when all tests are done.
func Binary(t testing.TB) string {
	t.Helper()
	return Program(t, "github.com/hallmark-id/hallmark")
}

// Program builds what Binary does of another command of this repository, by its
// package.
func Program(t testing.TB, pkg string) string {
	t.Helper()
	return program(t, pkg, func(out string) {
		cmd := exec.Command("go", "build", "-ldflags=-w", "-o", out, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", pkg, err, said)
		}
	})
}

// Self returns the path of a copy of the test binary that any user may run.
func Self(t testing.TB) string {
	t.Helper()
	return program(t, "self", func(out string) {
		self, err := os.Executable()
		must(t, err)
		b, err := os.ReadFile(self)
		must(t, err)
		WriteProgram(t, out, b)
	})
}

// program makes a program once, and returns its path.
func program(t testing.TB, name string, write func(out string)) string {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	if path, ok := built.programs[name]; ok {
		return path
	}
	if built.dir == "" {
		dir, err := os.MkdirTemp("", "hallmark-test-")
		if err != nil {
			t.Fatal(err)
		}
		built.dir, built.programs = dir, make(map[string]string)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(built.dir, path.Base(name))
	write(out)
	built.programs[name] = out
	return out
}

// Cleanup removes what was built.
func Cleanup() {
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
}

// Command says what to run and as whom.
type Command struct {
	Path string   // "": the hallmark binary
	Args []string // without the program's name
	Env  []string // besides PATH and HOME
	Dir  string
	UID  int // 0: as the test; others need root

	Network *Network // nil: that of the test
}

func (c Command) cmd(t testing.TB) *exec.Cmd {
	t.Helper()
	path := c.Path
	if path == "" {
		path = Binary(t)
	}
	cmd := exec.Command(path, c.Args...)
	cmd.Dir = c.Dir
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}, c.Env...)
	// It does not outlive the test; nor the thread that starts it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if c.UID != 0 {
		NeedRoot(t)
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(c.UID), Gid: uint32(c.UID)}
	}
	return cmd
}

// NeedRoot skips a test that must act as several users, unless it runs as
// root. In CI it fails instead.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "needs root")
	}
}

// NeedCommand skips a test that needs a program which is not installed. In CI
// it fails instead.
func NeedCommand(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		Skip(t, name+" is not installed; test/install installs it")
	}
}

// Long skips a test that takes a minute of a machine's time, unless it is asked
// for: "make bridges" does.
func Long(t testing.TB) {
	t.Helper()
	if !IsLong() {
		t.Skip("it is long; make bridges runs it")
	}
}

// IsLong reports whether tests shall take the time that it takes to show all:
// "make bridges" and "make soak" have them do so.
func IsLong() bool { return os.Getenv("HALLMARK_LONG") != "" }

// Skip skips the test for a reason; in CI (CI=true) it fails it.
func Skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("in CI nothing may be missing: %s", why)
	}
	t.Skip(why)
}

// Run runs a command to its end and returns what it printed. It fails the test
// if the command fails.
func (c Command) Run(t testing.TB) string {
	t.Helper()
	out, stderr, code := c.Try(t)
	if code != 0 {
		t.Fatalf("hallmark %s: exit status %d\nstdout:\n%s\nstderr:\n%s", strings.Join(c.Args, " "), code, out, stderr)
	}
	return out
}

// Try runs a command to its end and returns what it printed and its exit
// status.
func (c Command) Try(t testing.TB) (stdout, stderr string, code int) {
	t.Helper()
	p := c.Start(t)
	code = p.Wait(t)
	return p.Stdout(), p.Stderr(), code
}

// Start starts a command. The test kills it at its end if it still runs.
func (c Command) Start(t testing.TB) *Process {
	t.Helper()
	cmd := c.cmd(t)
	p := &Process{Command: c, cmd: cmd, done: make(chan struct{})}
	p.out.more, p.err.more = make(chan struct{}), make(chan struct{})
	cmd.Stdout, cmd.Stderr = &p.out, &p.err
	var err error
	if c.Network == nil {
		err = cmd.Start()
	} else {
		c.Network.run(func() { err = cmd.Start() })
	}
	if err != nil {
		t.Fatalf("start %s: %v", cmd.Path, err)
	}
	go func() {
		defer close(p.done)
		p.failure = cmd.Wait()
	}()
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("%s\nstdout:\n%s\nstderr:\n%s", strings.Join(cmd.Args, " "), tail(p.Stdout()), tail(p.Stderr()))
		}
	})
	return p
}

// WriteProgram writes a program that can be run at once: nothing is forked
// meanwhile, which would hold its file open for writing until it has become
// another program (ETXTBSY).
func WriteProgram(t testing.TB, path string, program []byte) {
	t.Helper()
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	must(t, os.WriteFile(path, program, 0o755))
}

func tail(s string) string {
	const most = 8 << 10
	if len(s) > most {
		return "..." + s[len(s)-most:]
	}
	return s
}

// Process is a command that was started.
type Process struct {
	Command
	cmd     *exec.Cmd
	out     output
	err     output
	done    chan struct{}
	failure error
}

// PID returns its process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Stdout returns what it has printed so far.
func (p *Process) Stdout() string { return p.out.String() }

// Stderr returns what it has printed so far.
func (p *Process) Stderr() string { return p.err.String() }

// Done is closed when it has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for its end and returns its exit status.
func (p *Process) Wait(t testing.TB) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Fatalf("%s has not ended after %v\nstderr:\n%s", strings.Join(p.cmd.Args, " "), patience, tail(p.Stderr()))
	}
	return p.cmd.ProcessState.ExitCode()
}

// Stop asks it to end (SIGTERM) and returns its exit status.
func (p *Process) Stop(t testing.TB) int {
	t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	return p.Wait(t)
}

// Signal sends a signal.
func (p *Process) Signal(s os.Signal) { _ = p.cmd.Process.Signal(s) }

// Kill ends it at once (SIGKILL) and waits until it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// WaitOutput waits until its output (stdout and stderr) contains a text.
func (p *Process) WaitOutput(t testing.TB, text string) {
	t.Helper()
	deadline := time.After(patience)
	for {
		outMore, errMore := p.out.next(), p.err.next()
		if strings.Contains(p.Stdout(), text) || strings.Contains(p.Stderr(), text) {
			return
		}
		select {
		case <-outMore:
		case <-errMore:
		case <-p.done:
			if strings.Contains(p.Stdout(), text) || strings.Contains(p.Stderr(), text) {
				return
			}
			t.Fatalf("%s ended (%v) without printing %q\nstdout:\n%s\nstderr:\n%s", strings.Join(p.cmd.Args, " "), p.failure, text, tail(p.Stdout()), tail(p.Stderr()))
		case <-deadline:
			t.Fatalf("%s has not printed %q after %v\nstdout:\n%s\nstderr:\n%s", strings.Join(p.cmd.Args, " "), text, patience, tail(p.Stdout()), tail(p.Stderr()))
		}
	}
}

// output collects what a process prints and tells when there is more.
type output struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{}
}

var _ io.Writer = (*output)(nil)

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.more)
	o.more = make(chan struct{})
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func (o *output) next() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.more
}

// Eventually calls try until it returns nil, and fails the test with its last
// error if it does not in good time.
func Eventually(t testing.TB, what string, try func(ctx context.Context) error) {
	t.Helper()
	// In a cleanup the test's own context has ended.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	for {
		began := time.Now()
		err := try(ctx)
		if err == nil {
			return
		}
		select {
		// A try that runs a command costs a tenth of a second of a processor: one
		// that waits leaves as much time to what it waits for.
		case <-time.After(max(20*time.Millisecond, time.Since(began))):
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		}
	}
}
