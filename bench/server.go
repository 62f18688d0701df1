package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/procfs"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/pkg/join"
	"github.com/hallmark-id/hallmark/pkg/sizing"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const (
	trustDomain = "bench.test" // of a server that is ours
	startPoll   = 5 * time.Millisecond
	stopTimeout = time.Minute
	maxMessage  = 64 << 20 // bytes; a page of entries can be large
	tokenTTL    = 600      // seconds
)

// server is the one that is measured.
type server struct {
	plan   sizing.Plan
	socket string
	conn   *grpc.ClientConn
	pid    int
	td     spiffeid.TrustDomain
	below  string      // path of everything that this measurement registers
	join   join.String // but for the token

	cmd    *exec.Cmd // nil: it is not ours
	stderr bytes.Buffer
	exited chan struct{}
}

// open starts a server, or reaches the one that the plan names.
func open(ctx context.Context, plan sizing.Plan) (_ *server, err error) {
	s := &server{plan: plan, socket: plan.AdminSocket, below: "/bench/" + uuid.NewString()[:8]}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.socket == "" {
		s.socket = filepath.Join(plan.Dir, "server.sock")
		if err := s.configure(); err != nil {
			return nil, err
		}
		if _, err := s.start(ctx); err != nil {
			return nil, err
		}
	} else if err := s.connect(); err != nil {
		return nil, err
	}
	return s, s.learn(ctx)
}

// own reports whether the server was started for the measurement.
func (s *server) own() bool { return s.plan.AdminSocket == "" }

func (s *server) configFile() string { return filepath.Join(s.plan.Dir, "server.yaml") }

// configure writes the configuration of a server of our own. It listens on a
// port that is free now, to keep it over a restart. All simulated agents come
// from one address, whose limit must not be what is measured.
func (s *server) configure() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	address := l.Addr().String()
	l.Close()
	return os.WriteFile(s.configFile(), fmt.Appendf(nil, `trust_domain: %s
listen: %s
data_dir: %s
admin_socket: %s
limits: {connections: 50000, attest_per_second: 100000}
log: {level: error}
`, trustDomain, address, filepath.Join(s.plan.Dir, "data"), s.socket), 0o600)
}

// start starts a server of our own and returns how long it took to serve.
func (s *server) start(ctx context.Context) (time.Duration, error) {
	s.stderr.Reset()
	s.cmd = exec.Command(s.plan.Binary, "server", "run", "-c", s.configFile())
	s.cmd.Stderr = &s.stderr
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	began := time.Now()
	if err := s.cmd.Start(); err != nil {
		return 0, fmt.Errorf("start the server: %w", err)
	}
	s.exited = make(chan struct{})
	go func() {
		defer close(s.exited)
		_ = s.cmd.Wait() // what it says on its standard error is enough
	}()
	s.pid = s.cmd.Process.Pid
	if err := s.connect(); err != nil {
		return 0, err
	}
	for {
		_, err := s.admin().GetServer(ctx, &hallmarkv1.GetServerRequest{}, grpc.WaitForReady(false))
		if err == nil {
			return time.Since(began), nil
		}
		select {
		case <-s.exited:
			return 0, fmt.Errorf("the server ended: %s", bytes.TrimSpace(s.stderr.Bytes()))
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(startPoll):
		}
	}
}

// stop ends a server of our own in order.
func (s *server) stop() error {
	if s.cmd == nil {
		return nil
	}
	select {
	case <-s.exited:
		return nil
	default:
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop the server: %w", err)
	}
	select {
	case <-s.exited:
		return nil
	case <-time.After(stopTimeout):
		_ = s.cmd.Process.Kill()
		<-s.exited
		return fmt.Errorf("the server did not end within %v and was killed", stopTimeout)
	}
}

// restart ends a server of our own and starts it again. It returns how long
// that took to serve.
func (s *server) restart(ctx context.Context) (time.Duration, error) {
	if err := s.stop(); err != nil {
		return 0, err
	}
	return s.start(ctx)
}

func (s *server) close() error {
	var err error
	if s.conn != nil {
		err = s.conn.Close()
	}
	return errors.Join(err, s.stop())
}

func (s *server) connect() error {
	if s.conn != nil {
		return nil
	}
	var err error
	s.conn, err = grpc.NewClient("unix:"+s.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), // the kernel says who is at the other end
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: startPoll, Multiplier: 1, MaxDelay: startPoll},
			MinConnectTimeout: time.Minute, // unless told, a connection gets no longer than the backoff
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil || s.cmd != nil {
		return err
	}
	raw, err := net.Dial("unix", s.socket)
	if err != nil {
		return fmt.Errorf("reach the server: %w", err)
	}
	defer raw.Close()
	control, err := raw.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var failed error
	if err := control.Control(func(fd uintptr) { peer, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("find the server's process: %w", failed)
	}
	s.pid = int(peer.Pid)
	return nil
}

// learn asks the server what its agents need.
func (s *server) learn(ctx context.Context) error {
	info, err := s.admin().GetJoinInfo(ctx, &hallmarkv1.GetJoinInfoRequest{})
	if err != nil {
		return fmt.Errorf("ask the server how agents reach it: %w", err)
	}
	if s.td, err = spiffeid.TrustDomainFromString(info.TrustDomain); err != nil {
		return fmt.Errorf("the server's trust domain: %w", err)
	}
	s.join = join.String{TrustDomain: s.td, Server: info.Address}
	for _, hash := range info.RootHashes {
		if len(hash) != len(join.Root{}) {
			return fmt.Errorf("the server gave a root hash of %d bytes; it must have %d", len(hash), len(join.Root{}))
		}
		s.join.Roots = append(s.join.Roots, join.Root(hash))
	}
	return nil
}

func (s *server) admin() hallmarkv1.AdminServiceClient {
	return hallmarkv1.NewAdminServiceClient(s.conn)
}
func (s *server) entries() entryv1.EntryClient { return entryv1.NewEntryClient(s.conn) }
func (s *server) agents() agentv1.AgentClient  { return agentv1.NewAgentClient(s.conn) }

// id returns a SPIFFE ID of this measurement.
func (s *server) id(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: s.td.Name(), Path: s.below + path}
}

// token makes a join token that gives its agent a further SPIFFE ID.
func (s *server) token(ctx context.Context, alias string) (join.String, error) {
	t, err := s.agents().CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: tokenTTL, AgentId: s.id(alias)})
	if err != nil {
		return join.String{}, fmt.Errorf("create a join token: %w", err)
	}
	j := s.join
	j.Token = t.Value
	return j, nil
}

// newNode makes the identity and connection of a simulated agent.
func (s *server) newNode(ctx context.Context, alias string) (*node.Node, error) {
	j, err := s.token(ctx, alias)
	if err != nil {
		return nil, err
	}
	attestor, err := node.JoinToken(j.Token)
	if err != nil {
		return nil, err
	}
	return node.Open(node.Options{TrustDomain: s.td, Server: j.Server, Attestor: attestor, Join: &j, InMemory: true})
}

// evict has the server forget an agent.
func (s *server) evict(ctx context.Context, id spiffeid.ID) error {
	_, err := s.agents().DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}})
	if err != nil && status.Code(err) != codes.NotFound {
		return fmt.Errorf("evict %s: %w", id, err)
	}
	return nil
}

// usage is what the server's process has used.
type usage struct {
	cpu    time.Duration
	memory float64 // bytes, resident and anonymous
}

func (s *server) usage() (usage, error) {
	p, err := procfs.NewProc(s.pid)
	if err != nil {
		return usage{}, fmt.Errorf("look at the server's process: %w", err)
	}
	stat, err := p.Stat()
	if err != nil {
		return usage{}, fmt.Errorf("look at the server's process: %w", err)
	}
	st, err := p.NewStatus()
	if err != nil {
		return usage{}, fmt.Errorf("look at the server's process: %w", err)
	}
	return usage{time.Duration(stat.CPUTime() * float64(time.Second)), float64(st.RssAnon)}, nil
}

// cost returns the CPU time that the server uses while f runs.
func (s *server) cost(f func() error) (time.Duration, error) {
	before, err := s.usage()
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	after, err := s.usage()
	return after.cpu - before.cpu, err
}

// atRest waits until the server has little to do, as after the merging of what
// was written in bulk. It gives up after a minute: another may keep it busy.
func (s *server) atRest(ctx context.Context) error {
	const look, little = time.Second, 0.05 // of a core
	for range time.Minute / look {
		cost, err := s.cost(func() error { return sleep(ctx, look) })
		if err != nil || cost.Seconds() < little*look.Seconds() {
			return err
		}
	}
	return nil
}
