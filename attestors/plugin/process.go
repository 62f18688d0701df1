package plugin

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
)

const (
	maxProgram = 1 << 30         // bytes
	drain      = 1 * time.Second // for what a program wrote before it ended
)

// process is one run of a program. It is what go-plugin calls a runner.
type process struct {
	config Config
	log    *slog.Logger
	dir    string // of its sockets and its temporary files, for this user alone

	stdout  *os.File
	exited  chan struct{} // closed when it has ended and was waited for
	relayed chan struct{} // closed when all of its log was written

	mu      sync.Mutex
	cmd     *exec.Cmd
	started bool
	dead    bool // there is nothing to kill
	killed  bool
	err     error // how it ended
}

var _ runner.Runner = (*process)(nil)

func newProcess(c Config, log *slog.Logger) *process {
	return &process{config: c, log: log, exited: make(chan struct{}), relayed: make(chan struct{})}
}

// make is called by go-plugin with a command that has the environment that the
// protocol needs, and a directory of its own.
func (p *process) make(_ hclog.Logger, cmd *exec.Cmd, dir string) (runner.Runner, error) {
	p.cmd, p.dir = cmd, dir
	return p, nil
}

// open opens the program and verifies it. What is run afterwards is the file
// that was opened; only its owner, who is trusted, can change that.
func (c Config) open() (_ *os.File, err error) {
	f, err := os.OpenFile(c.Command, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no file", c.Command)
	case !ok || owner.Uid != 0 && int(owner.Uid) != os.Geteuid():
		return nil, fmt.Errorf("%s belongs to another user; let it belong to root", c.Command)
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("%s can be changed by other users; take that from them with \"chmod go-w\"", c.Command)
	case c.InsecureNoChecksum:
		return f, nil
	}
	sum := sha256.New()
	n, err := io.Copy(sum, io.LimitReader(f, maxProgram+1))
	if err != nil {
		return nil, err
	}
	if n > maxProgram {
		return nil, fmt.Errorf("%s is larger than %d bytes", c.Command, maxProgram)
	}
	got := sum.Sum(nil)
	if want, err := hex.DecodeString(c.Checksum); err != nil || subtle.ConstantTimeCompare(want, got) != 1 {
		return nil, fmt.Errorf("checksum of %s is not the configured one, so it is not run; it is %x", c.Command, got)
	}
	return f, nil
}

// Start starts it. The thread that calls must live as long as it: the kernel
// kills it when that thread ends.
func (p *process) Start(context.Context) (err error) {
	program, err := p.config.open()
	if err != nil {
		return err
	}
	defer program.Close()
	stdout, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer out.Close()
	stderr, errs, err := os.Pipe()
	if err != nil {
		stdout.Close()
		return err
	}
	defer errs.Close()

	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd.Path = fmt.Sprintf("/proc/self/fd/%d", program.Fd())
	p.cmd.Err = nil // of looking up a command without a name
	p.cmd.Args = append([]string{p.config.Command}, p.config.Args...)
	p.cmd.Dir = p.dir
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = nil, out, errs
	p.cmd.Env = append(p.cmd.Env, "TMPDIR="+p.dir, "PATH=/usr/local/bin:/usr/bin:/bin")
	for _, name := range p.config.Env {
		if value, ok := os.LookupEnv(name); ok {
			p.cmd.Env = append(p.cmd.Env, name+"="+value)
		}
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if p.killed {
		err = errors.New("it was stopped before it began")
	} else {
		err = p.cmd.Start()
	}
	if err != nil {
		stdout.Close()
		stderr.Close()
		return fmt.Errorf("start %s: %w", p.config.Command, err)
	}
	p.started, p.stdout = true, stdout
	go func() {
		defer close(p.relayed)
		defer stderr.Close()
		relay(stderr, p.log)
	}()
	go p.reap(stdout, stderr)
	return nil
}

// reap waits for the end, and ends with it what it started in its group. While
// the process has not been waited for, no other can have its number.
func (p *process) reap(pipes ...*os.File) {
	pid := p.cmd.Process.Pid
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	_ = unix.Kill(-pid, unix.SIGKILL)
	p.dead = true
	p.mu.Unlock()
	p.err = p.cmd.Wait()
	for _, pipe := range pipes { // what it started elsewhere may hold them
		_ = pipe.SetReadDeadline(time.Now().Add(drain))
	}
	close(p.exited)
}

func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.killed = true
	if p.started && !p.dead {
		_ = unix.Kill(-p.cmd.Process.Pid, unix.SIGKILL)
	}
}

// ended says how the process ended.
func (p *process) ended() error {
	if p.err != nil {
		return fmt.Errorf("it ended: %w", p.err)
	}
	return errors.New("it ended by itself")
}

// Wait waits for its end.
func (p *process) Wait(context.Context) error {
	<-p.exited
	return p.err
}

// Kill kills it.
func (p *process) Kill(context.Context) error {
	p.kill()
	return nil
}

// Stdout has the first line of the protocol.
func (p *process) Stdout() io.ReadCloser { return p.stdout }

// Stderr is empty: relay reads it.
func (p *process) Stderr() io.ReadCloser { return io.NopCloser(strings.NewReader("")) }

// Name is that of the program.
func (p *process) Name() string { return p.config.Command }

// ID is not empty, so that go-plugin cleans up what did not start.
func (p *process) ID() string { return p.config.Command }

// Diagnose says what go-plugin adds to an error.
func (p *process) Diagnose(context.Context) string {
	return "is it a plugin of this kind, made with SPIRE's SDK?"
}

// PluginToHost refuses every address but that of a socket in the directory which
// only this user can reach: elsewhere another process may answer.
func (p *process) PluginToHost(network, address string) (string, string, error) {
	if network != "unix" || filepath.Dir(filepath.Clean(address)) != p.dir {
		return "", "", fmt.Errorf("it serves at %q of %q, not at a Unix socket in its TMPDIR", address, network)
	}
	return network, address, nil
}

// HostToPlugin leaves an address as it is.
func (p *process) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}
