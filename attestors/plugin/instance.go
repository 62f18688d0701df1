package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	// The SDK keeps this package for SPIRE, whose place is taken here: it is the
	// only way to the generated code of the first and the last call, without which
	// no plugin serves. What it offers in Go may change with a version of the SDK,
	// and then this does not compile. What goes over the wire cannot change:
	// plugins are not built anew for each version of their host.
	"github.com/spiffe/spire-plugin-sdk/private"
	agentstorev1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/server/agentstore/v1"
	configv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/service/common/config/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	configService     = "spire.service.common.config.v1.Config"
	agentStoreService = "spire.hostservice.server.agentstore.v1.AgentStore"
)

var errHung = errors.New("it did not answer in time")

// instance is a plugin that serves.
type instance struct {
	conn  *grpc.ClientConn
	late  atomic.Int32 // answers in a row that did not come in time
	once  sync.Once
	stuck chan struct{} // closed when there were too many
}

// step runs one step of a conversation, all of it: also opening a stream and
// sending on it can wait for the plugin. cancel ends it, and the context, when the
// answer does not come in time.
func step[T any](ctx context.Context, i *instance, cancel context.CancelCauseFunc, limit time.Duration, f func() (T, error)) (T, error) {
	timer := time.AfterFunc(limit, func() { cancel(errHung) })
	v, err := f()
	if !timer.Stop() {
		if i.late.Add(1) >= maxHung {
			i.once.Do(func() { close(i.stuck) })
		}
		var none T
		return none, errHung
	}
	switch code := status.Code(err); {
	case code == codes.Canceled && ctx.Err() == nil: // the connection is closed on our side
		err = status.Error(codes.Unavailable, "it has ended")
	case code != codes.Canceled && code != codes.DeadlineExceeded:
		i.late.Store(0)
	}
	return v, err
}

// serve runs the program once, until it ends, hangs or the context ends. It
// returns why.
func (s *supervisor) serve(ctx context.Context, log *slog.Logger) error {
	// The kernel kills the program with the thread that started it.
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- s.serveOnThread(ctx, log)
	}()
	return <-done
}

func (s *supervisor) serveOnThread(ctx context.Context, log *slog.Logger) error {
	p := newProcess(s.config, log)
	b := &bridge{store: agentStore{name: s.name, td: s.td, has: s.agents}}
	// Once it serves, its standard output and error come by gRPC; what go-plugin
	// writes of its own, and panics, still come by the process's.
	said, says := io.Pipe()
	var relayed sync.WaitGroup
	relayed.Go(func() { relay(said, log) })
	defer relayed.Wait()
	defer says.Close()
	client := goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: goplugin.HandshakeConfig{
			ProtocolVersion: 1, MagicCookieKey: s.kind.name, MagicCookieValue: s.kind.name,
		},
		Plugins:          goplugin.PluginSet{s.kind.name: b},
		RunnerFunc:       p.make,
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		SkipHostEnv:      true,
		SyncStdout:       says,
		SyncStderr:       says,
		StartTimeout:     s.times.start,
		Logger:           hclog.NewNullLogger(),
		GRPCDialOptions: []grpc.DialOption{grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage))},
	})
	starting, cancel := context.WithTimeout(ctx, s.times.start)
	defer cancel()
	unwatch := context.AfterFunc(starting, p.kill) // much of go-plugin heeds no context
	i, err := s.begin(starting, client)
	inTime := unwatch()
	defer s.end(p, b, client, i)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case !inTime:
		return fmt.Errorf("it did not start within %v", s.times.start)
	case err != nil:
		return err
	}
	s.set(i, nil)
	log.Info("plugin serves", "command", s.config.Command, "pid", p.cmd.Process.Pid)
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-p.exited:
		return p.ended()
	case <-i.stuck:
		return fmt.Errorf("it hangs: %d answers in a row did not come in time", maxHung)
	}
}

// connect starts the program and connects to it. Some first lines of a program
// make go-plugin panic, such as one with a certificate, which was not asked for.
func connect(client *goplugin.Client) (rpc goplugin.ClientProtocol, err error) {
	defer func() {
		if recover() != nil {
			err = errors.New("its first line is not that of a plugin")
		}
	}()
	if rpc, err = client.Client(); err != nil {
		return nil, errors.New(bounded(err.Error())) // it holds the first line
	}
	return rpc, nil
}

// begin starts the program and makes it ready.
func (s *supervisor) begin(ctx context.Context, client *goplugin.Client) (*instance, error) {
	rpc, err := connect(client)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	raw, err := rpc.Dispense(s.kind.name)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	conn, ok := raw.(*grpc.ClientConn)
	if !ok {
		return nil, errors.New("connect: no connection")
	}
	var offered []string
	if s.agents != nil {
		offered = []string{agentStoreService}
	}
	services, err := private.Init(ctx, conn, offered)
	if err != nil {
		return nil, fmt.Errorf("initialize: %w", clipped(err))
	}
	if !slices.Contains(services, s.kind.service) {
		return nil, fmt.Errorf("it does not serve %s; is it a plugin of another kind or version?", s.kind.service)
	}
	switch {
	case slices.Contains(services, configService):
		_, err := configv1.NewConfigClient(conn).Configure(ctx, &configv1.ConfigureRequest{
			CoreConfiguration: &configv1.CoreConfiguration{TrustDomain: s.td.Name()},
			HclConfiguration:  s.config.Data,
		})
		if err != nil {
			return nil, fmt.Errorf("it refused its configuration: %w", clipped(err))
		}
	case s.config.Data != "":
		return nil, errors.New("it takes no configuration; remove data")
	}
	return &instance{conn: conn, stuck: make(chan struct{})}, nil
}

// end ends the program, whatever its state, and removes what it leaves.
func (s *supervisor) end(p *process, b *bridge, client *goplugin.Client, i *instance) {
	s.mu.Lock()
	if s.live == i && i != nil {
		s.live, s.why = nil, errors.New("it has just ended")
	}
	s.mu.Unlock()
	timer := time.AfterFunc(s.times.stop, p.kill)
	defer timer.Stop()
	if i != nil {
		ctx, cancel := context.WithTimeout(context.Background(), s.times.stop)
		_ = private.Deinit(ctx, i.conn) // it is ended in any case
		cancel()
	}
	client.Kill()
	b.stop()
	if p.started {
		p.kill()
		<-p.exited
		<-p.relayed
		p.stdout.Close()
	}
	if p.dir != "" {
		_ = os.RemoveAll(p.dir)
	}
}

// bridge connects to a plugin and serves what it may ask of its host.
type bridge struct {
	goplugin.NetRPCUnsupportedPlugin
	store  agentStore
	server *grpc.Server
	served chan struct{}
}

// GRPCServer is the plugin's side, which is not here.
func (b *bridge) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error {
	return errors.New("not a plugin")
}

// GRPCClient returns the connection. The number of the service is SPIRE's.
func (b *bridge) GRPCClient(_ context.Context, broker *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	l, err := broker.Accept(private.HostServiceProviderID)
	if err != nil {
		return nil, err
	}
	b.server = grpc.NewServer(grpc.MaxConcurrentStreams(100), grpc.MaxRecvMsgSize(maxPayload))
	if b.store.has != nil {
		agentstorev1.RegisterAgentStoreServer(b.server, b.store)
	}
	b.served = make(chan struct{})
	go func() {
		defer close(b.served)
		_ = b.server.Serve(l) // ends with stop
	}()
	return conn, nil
}

func (b *bridge) stop() {
	if b.server != nil {
		b.server.Stop()
		<-b.served
	}
}

// agentStore tells a plugin of the server whether an agent that it attests is
// there already.
type agentStore struct {
	agentstorev1.UnimplementedAgentStoreServer
	name string
	td   spiffeid.TrustDomain
	has  func(spiffeid.ID) bool
}

// GetAgentInfo answers for agents of the plugin itself.
func (a agentStore) GetAgentInfo(_ context.Context, req *agentstorev1.GetAgentInfoRequest) (*agentstorev1.GetAgentInfoResponse, error) {
	id, _, err := agentID(req.AgentId, a.name, a.td)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	if !a.has(id) {
		return nil, status.Error(codes.NotFound, "there is no such agent")
	}
	return &agentstorev1.GetAgentInfoResponse{Info: &agentstorev1.AgentInfo{AgentId: id.String()}}, nil
}
