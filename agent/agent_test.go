package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/digest"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// world is a server with one entry, for this process, on a TCP port.
type world struct {
	*nodetest.Server
	dir, address string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Server: nodetest.New(t), dir: t.TempDir()}
	w.Entries["web"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/web")
	web := &hallmarkv1.Entry{
		Id: "web", SpiffeId: "spiffe://example.org/web", ParentId: "spiffe://example.org/spire/agent/join_token/the-token",
		Selectors: []*hallmarkv1.Selector{{Type: "unix", Value: fmt.Sprint("uid:", os.Getuid())}}, CreatedAt: 1,
	}
	own, err := w.CurrentBundle().Record()
	if err != nil {
		t.Fatal(err)
	}
	var sum digest.Sum
	sum.AddEntry(web.Id, 0, 1)
	sum.AddBundle(own.TrustDomain, own.SequenceNumber)
	w.Follow = func(_ spiffeid.ID, s grpc.BidiStreamingServer[hallmarkv1.FollowRequest, hallmarkv1.FollowResponse]) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		if err := s.Send(&hallmarkv1.FollowResponse{
			Revision: 5, Complete: true, Entries: []*hallmarkv1.Entry{web}, Bundles: []*hallmarkv1.Bundle{own}, Digest: sum[:],
		}); err != nil {
			return err
		}
		<-s.Context().Done()
		return nil
	}
	w.listen(t)
	return w
}

// listen makes the server reachable over TCP.
func (w *world) listen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.address = l.Addr().String()
	var running sync.WaitGroup
	t.Cleanup(func() { l.Close(); running.Wait() })
	running.Go(func() {
		for {
			outside, err := l.Accept()
			if err != nil {
				return
			}
			inside, err := w.Dial(t.Context(), nodetest.Address)
			if err != nil {
				outside.Close()
				continue
			}
			running.Go(func() { defer outside.Close(); _, _ = io.Copy(outside, inside) })
			running.Go(func() { defer inside.Close(); _, _ = io.Copy(inside, outside) })
		}
	})
}

func (w *world) socket() string { return filepath.Join(w.dir, "w.sock") }
func (w *world) admin() string  { return filepath.Join(w.dir, "a.sock") }

func (w *world) source(t *testing.T) config.Source {
	t.Helper()
	join, err := w.Join("the-token").Encode()
	if err != nil {
		t.Fatal(err)
	}
	return config.Source{Name: "agent.yaml", Data: fmt.Appendf(nil, "server: %s\ndata_dir: %s/data\nsocket: %s\nadmin_socket: %s\njoin: %s\nlog: {level: error}\n",
		w.address, w.dir, w.socket(), w.admin(), join)}
}

// run runs an agent until the test ends or stop is called, and waits until it
// is ready.
func run(t *testing.T, src config.Source) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- agent.Run(ctx, src, func() { close(ready) }) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	t.Cleanup(func() { _ = stop() })
	select {
	case <-ready:
	case err := <-done:
		done <- err
		t.Fatalf("the agent ended before it was ready: %v", err)
	}
	return stop
}

func (w *world) client(t *testing.T) *workloadapi.Client {
	t.Helper()
	c, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+w.socket()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) status(t *testing.T) (*hallmarkv1.GetStatusResponse, error) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+w.admin(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return hallmarkv1.NewAgentAdminServiceClient(conn).GetStatus(t.Context(), &hallmarkv1.GetStatusRequest{})
}

func TestAProcessGetsItsIdentityFromAnAgentWithAJoinString(t *testing.T) {
	w := newWorld(t)
	src := w.source(t)
	stop := run(t, src)

	// Ready or not, the library asks until it is answered.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(w.client(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != "spiffe://example.org/web" {
		t.Errorf("identity is %s", svid.ID)
	}

	s, err := w.status(t)
	if err != nil {
		t.Fatal(err)
	}
	if s.AgentId != "spiffe://example.org/spire/agent/join_token/the-token" || !s.Connected || s.Revision != 5 || s.Entries != 1 ||
		s.Svids != 1 || s.Server != w.address || s.LastError != "" {
		t.Errorf("status is %v", s)
	}

	if err := stop(); err != nil {
		t.Errorf("stopped with %v", err)
	}
	for _, path := range []string{w.socket(), w.admin()} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there (%v)", path, err)
		}
	}

	// It starts again with its own identity.
	run(t, src)
	again, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(w.client(t)))
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if n := w.CallCount("AttestAgent"); n != 1 {
		t.Errorf("attested %d times, want once", n)
	}
}

func TestAnAgentIsReadyWithoutAServer(t *testing.T) {
	w := newWorld(t)
	w.Stop()
	stop := run(t, w.source(t))
	if _, err := w.client(t).FetchX509SVID(t.Context()); err == nil || !strings.Contains(err.Error(), "not ready") {
		t.Errorf("a process is told %v", err)
	}
	s, err := w.status(t)
	if err != nil {
		t.Fatal(err)
	}
	if s.Connected || s.AgentId != "" {
		t.Errorf("status is %v", s)
	}
	if err := stop(); err != nil {
		t.Errorf("stopped with %v", err)
	}
}

func TestABannedAgentStopsServingAndEnds(t *testing.T) {
	w := newWorld(t)
	follow := w.Follow
	ban := make(chan struct{})
	w.Follow = func(id spiffeid.ID, s grpc.BidiStreamingServer[hallmarkv1.FollowRequest, hallmarkv1.FollowResponse]) error {
		done := make(chan error, 1)
		go func() { done <- follow(id, s) }()
		select {
		case <-ban:
			return nodetest.Deny(types.PermissionDeniedDetails_AGENT_BANNED)
		case err := <-done:
			return err
		}
	}
	done := make(chan error, 1)
	ready := make(chan struct{})
	go func() { done <- agent.Run(t.Context(), w.source(t), func() { close(ready) }) }()
	<-ready
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClient(w.client(t)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()

	close(ban)
	select {
	case err = <-done:
	case <-ctx.Done():
		t.Fatal("the agent goes on")
	}
	if !errors.Is(err, node.ErrBanned) || !strings.Contains(err.Error(), "hallmark node evict") {
		t.Errorf("Run returned %v", err)
	}
	if _, err := os.Stat(w.socket()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there (%v)", err)
	}
}

func TestAnAgentThatCannotStartSaysWhy(t *testing.T) {
	w := newWorld(t)
	src := w.source(t)
	run(t, src)
	err := agent.Run(t.Context(), src, func() { t.Error("it is ready") })
	if err == nil || !strings.Contains(err.Error(), "in use by another agent") {
		t.Errorf("second agent: %v", err)
	}

	src.Set = []config.Setting{{Path: "data_dir", Value: filepath.Join(w.dir, "other")}}
	err = agent.Run(t.Context(), src, func() { t.Error("it is ready") })
	if err == nil || !strings.Contains(err.Error(), "socket: listen on "+w.socket()) {
		t.Errorf("second socket: %v", err)
	}

	src.Set = []config.Setting{{Path: "held_svids", Value: "-1", From: "--held-svids"}}
	if err := agent.Run(t.Context(), src, func() { t.Error("it is ready") }); err == nil || !strings.Contains(err.Error(), "held_svids") {
		t.Errorf("bad configuration: %v", err)
	}
}
