package peercred

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/hallmark-id/hallmark/test/harness"
)

// The test binary is also the processes at the other end of the socket.
const roleEnv = "PEERCRED_TEST_ROLE"

func TestMain(m *testing.M) {
	switch role, arg, _ := strings.Cut(os.Getenv(roleEnv), " "); role {
	case "":
		os.Exit(m.Run())
	case "connect": // connect to arg, then live until stdin ends
		connectTo(arg)
		fmt.Println("connected")
		io.Copy(io.Discard, os.Stdin)
	case "bequeath": // connect to arg, hand the socket to a child; live until stdin ends
		f, err := connectTo(arg).File()
		check(err)
		child := helper("idle")
		child.ExtraFiles = []*os.File{f}
		r, w, err := os.Pipe() // the child ends with the test, which holds no end of it
		check(err)
		child.Stdin = r
		child.ExtraFiles = append(child.ExtraFiles, w)
		check(child.Start())
		fmt.Println(child.Process.Pid)
		io.Copy(io.Discard, os.Stdin)
	case "idle":
		fmt.Println("idle")
		io.Copy(io.Discard, os.Stdin)
	}
}

func connectTo(path string) *net.UnixConn {
	c, err := net.Dial("unix", path)
	check(err)
	return c.(*net.UnixConn)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func helper(role string, args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", roleEnv+"="+strings.Join(append([]string{role}, args...), " "))
	cmd.Stderr = os.Stderr
	return cmd
}

// process is a helper that runs until it is told to end.
type process struct {
	cmd   *exec.Cmd
	stdin io.Closer
	line  string // the first it printed
}

func start(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	stdin, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, err := bufio.NewReader(stdout).ReadString('\n')
	must(t, err)
	p := &process{cmd, stdin, strings.TrimSpace(line)}
	t.Cleanup(p.end)
	return p
}

func (p *process) pid() int32 { return int32(p.cmd.Process.Pid) }

// end ends the process and waits until its PID is free.
func (p *process) end() {
	p.stdin.Close()
	p.cmd.Wait()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func listenAt(t *testing.T) net.Listener {
	t.Helper()
	l, err := Listen(filepath.Join(t.TempDir(), "s"), 0o777)
	must(t, err)
	must(t, os.Chmod(filepath.Dir(l.Addr().String()), 0o755))
	must(t, os.Chmod(filepath.Dir(filepath.Dir(l.Addr().String())), 0o755))
	t.Cleanup(func() { l.Close() })
	return l
}

func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	c, err := l.Accept()
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// withoutPeerPidfd stands for a kernel before 6.5.
func withoutPeerPidfd(int) (int, error) { return -1, unix.ENOPROTOOPT }

var kernels = map[string]func(int) (int, error){
	"with SO_PEERPIDFD": pidfdOf,
	"before Linux 6.5":  withoutPeerPidfd,
}

func TestAPeerIsTheProcessThatConnectedUntilItEnds(t *testing.T) {
	for name, pidfd := range kernels {
		t.Run(name, func(t *testing.T) {
			l := listenAt(t)
			proc := start(t, helper("connect", l.Addr().String()))
			p, err := pinPeer(accept(t, l), pidfd)
			must(t, err)
			defer p.Close()
			if p.PID != proc.pid() || p.UID != uint32(os.Geteuid()) || p.GID != uint32(os.Getegid()) {
				t.Errorf("peer is %v, want pid %d of the test's user", p, proc.pid())
			}
			must(t, p.Alive())
			proc.end()
			if err := p.Alive(); !errors.Is(err, ErrEnded) {
				t.Errorf("after the process ended Alive says %v", err)
			}
		})
	}
}

func TestAProcessIsToldByItsStartWhereThereIsNoPidfd(t *testing.T) {
	proc := start(t, helper("idle"))
	s, err := readStat(proc.pid())
	must(t, err)
	p := newPeer(proc.pid())
	p.start = s.start
	must(t, p.Alive())
	p.start--
	if err := p.Alive(); !errors.Is(err, ErrEnded) {
		t.Errorf("a process that started at another time: %v", err)
	}
	p.start = s.start
	proc.cmd.Process.Kill()
	var info unix.Siginfo // wait, and leave it a zombie
	must(t, unix.Waitid(unix.P_PID, int(proc.pid()), &info, unix.WEXITED|unix.WNOWAIT, nil))
	if err := p.Alive(); !errors.Is(err, ErrEnded) {
		t.Errorf("a zombie: %v", err)
	}
	proc.end()
	if err := p.Alive(); !errors.Is(err, ErrEnded) {
		t.Errorf("a reaped process: %v", err)
	}
}

func TestE29_AChildThatInheritedTheSocketOfAnEndedProcessIsRefused(t *testing.T) {
	for name, pidfd := range kernels {
		t.Run(name, func(t *testing.T) {
			l := listenAt(t)
			proc := start(t, helper("bequeath", l.Addr().String()))
			killLater(t, proc.line)
			proc.end()
			if p, err := pinPeer(accept(t, l), pidfd); !errors.Is(err, ErrEnded) {
				t.Errorf("got %v, %v", p, err)
			}
		})
	}
}

func killLater(t *testing.T, pid string) {
	n, err := strconv.Atoi(pid)
	must(t, err)
	t.Cleanup(func() { syscall.Kill(n, syscall.SIGKILL) })
}

func TestE29_AProcessThatGotTheRecycledPIDIsRefused(t *testing.T) {
	if os.Getpid() != 1 {
		// In a PID namespace of its own the test decides on the next PID.
		harness.NeedRoot(t)
		cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
		cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	must(t, unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	must(t, unix.Mount("proc", "/proc", "proc", 0, ""))
	for name, pidfd := range kernels {
		if p, err := pinPeer(recycled(t), pidfd); !errors.Is(err, ErrEnded) {
			t.Errorf("%s: got %v, %v", name, p, err)
		}
	}
}

// recycled returns a connection of a process that has ended and whose PID another
// has by now. A thread of the test's own may get the PID first, which is rare: it
// tries again with another.
func recycled(t *testing.T) net.Conn {
	t.Helper()
	for range 50 {
		l := listenAt(t)
		attacker := start(t, helper("bequeath", l.Addr().String()))
		attacker.end() // its child keeps the connection
		must(t, os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(int(attacker.pid()-1))), 0))
		victim := start(t, helper("idle"))
		if victim.pid() == attacker.pid() {
			return accept(t, l)
		}
		t.Logf("the process has pid %d, not that of the attacker, %d", victim.pid(), attacker.pid())
	}
	t.Fatal("no process got the PID of another")
	return nil
}

func TestAConnectionEndsWithItsProcess(t *testing.T) {
	l := listenAt(t)
	proc := start(t, helper("bequeath", l.Addr().String()))
	killLater(t, proc.line)
	released := make(chan struct{})
	creds := New(Options{Admit: func(*Peer) (func(), error) { return func() { close(released) }, nil }})
	c, info, err := creds.ServerHandshake(accept(t, l))
	must(t, err)
	must(t, info.(*Peer).Alive())
	proc.end() // the child still holds the socket
	if n, err := c.Read(make([]byte, 1)); err == nil {
		t.Errorf("read %d bytes of a connection whose process has ended", n)
	}
	c.Close()
	c.Close()
	<-released
	if err := info.(*Peer).Alive(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after the connection was closed Alive says %v", err)
	}
}

func TestAnAdminSocketServesOnlyRootAndItsOwnUser(t *testing.T) {
	harness.NeedRoot(t)
	for _, c := range []struct {
		name string
		euid uint32
		uid  uint32
		ok   bool
	}{
		{"root, of root", 0, 0, true},
		{"another user, of root", 0, 1234, false},
		{"the same user", 1234, 1234, true},
		{"root, of a user", 1234, 0, true},
		{"another user", 1234, 1235, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := listenAt(t)
			creds := New(Options{RequireOwner: true}).(*transport)
			creds.euid = c.euid
			start(t, connectAs(t, c.uid, l))
			conn, _, err := creds.ServerHandshake(accept(t, l))
			if (err == nil) != c.ok {
				t.Errorf("error is %v", err)
			}
			if err == nil {
				conn.Close()
			}
		})
	}
}

// connectAs makes a process of another user that connects; it runs a copy of
// the test binary that the user may read.
func connectAs(t *testing.T, uid uint32, l net.Listener) *exec.Cmd {
	t.Helper()
	cmd := helper("connect", l.Addr().String())
	bin := filepath.Join(filepath.Dir(l.Addr().String()), "helper")
	b, err := os.ReadFile(os.Args[0])
	must(t, err)
	harness.WriteProgram(t, bin, b)
	cmd.Path, cmd.Dir = bin, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd
}

func TestARefusedConnectionIsNotAdmitted(t *testing.T) {
	l := listenAt(t)
	start(t, helper("connect", l.Addr().String()))
	refused := errors.New("too many")
	creds := New(Options{Admit: func(*Peer) (func(), error) { return nil, refused }})
	if _, _, err := creds.ServerHandshake(accept(t, l)); !errors.Is(err, refused) {
		t.Errorf("error is %v", err)
	}
}

func TestOnlyUnixSocketsHavePeers(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, _, err := New(Options{}).ServerHandshake(a); err == nil {
		t.Error("a pipe was accepted")
	}
}

func TestAGRPCCallKnowsItsProcess(t *testing.T) {
	l := listenAt(t)
	var got *Peer
	var alive error
	server := grpc.NewServer(grpc.Creds(New(Options{})), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			var err error
			if got, err = FromContext(ctx); err != nil {
				return nil, err
			}
			alive = got.Alive()
			return handler(ctx, req)
		}))
	healthpb.RegisterHealthServer(server, health.NewServer())
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	cc, err := grpc.NewClient("unix://"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
	must(t, err)
	if got.PID != int32(os.Getpid()) || alive != nil {
		t.Errorf("the call came from %v (%v), want pid %d", got, alive, os.Getpid())
	}
	cc.Close()
	server.GracefulStop()
	must(t, <-done)
	if _, err := FromContext(t.Context()); err == nil {
		t.Error("a context outside of a call has a peer")
	}
}

func TestPinHoldsAProcessByItsPID(t *testing.T) {
	proc := start(t, helper("idle"))
	p, err := Pin(proc.pid())
	must(t, err)
	defer p.Close()
	if p.UID != uint32(os.Geteuid()) {
		t.Errorf("uid is %d", p.UID)
	}
	must(t, p.Alive())
	proc.end()
	if err := p.Alive(); !errors.Is(err, ErrEnded) {
		t.Errorf("after the process ended Alive says %v", err)
	}
	if _, err := Pin(proc.pid()); !errors.Is(err, ErrEnded) {
		t.Errorf("pinning an ended process says %v", err)
	}
	for _, pid := range []int32{0, -1} {
		if _, err := Pin(pid); err == nil {
			t.Errorf("pid %d was pinned", pid)
		}
	}
}

func TestWaitLastsUntilTheProcessEndsOrThePeerIsClosed(t *testing.T) {
	pin := func(t *testing.T, proc *process, pidfd bool) *Peer {
		p := newPeer(proc.pid())
		if pidfd {
			must(t, p.open())
			return p
		}
		s, err := readStat(proc.pid())
		must(t, err)
		p.start = s.start
		return p
	}
	for name, pidfd := range map[string]bool{"with a pidfd": true, "without one": false} {
		t.Run(name, func(t *testing.T) {
			proc := start(t, helper("idle"))
			ends, closes := pin(t, proc, pidfd), pin(t, proc, pidfd)
			ended, closed := make(chan error, 1), make(chan error, 1)
			go func() { ended <- ends.Wait() }()
			go func() { closed <- closes.Wait() }()
			closes.Close()
			if err := <-closed; err == nil {
				t.Error("of a closed peer Wait says that its process has ended")
			}
			select {
			case err := <-ended:
				t.Fatalf("while the process runs Wait says %v", err)
			default:
			}
			proc.end()
			must(t, <-ended)
			ends.Close()
		})
	}
}

func TestConnectionsBeyondTheMostAreRefusedUntilOneIsClosed(t *testing.T) {
	l := listenAt(t)
	creds := New(Options{MaxConnections: 2})
	connect := func() (net.Conn, error) {
		start(t, helper("connect", l.Addr().String()))
		c, _, err := creds.ServerHandshake(accept(t, l))
		return c, err
	}
	first, err := connect()
	must(t, err)
	_, err = connect()
	must(t, err)
	if _, err := connect(); err == nil || !strings.Contains(err.Error(), "there are 2 connections already") {
		t.Errorf("error is %v", err)
	}
	first.Close()
	first.Close() // once more changes nothing
	_, err = connect()
	must(t, err)
	if _, err := connect(); err == nil {
		t.Error("a third connection was served")
	}
}
