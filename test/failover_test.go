package test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"

	"github.com/hallmark-id/hallmark/test/harness"
)

// serverOf returns the server that an agent is connected to, by name.
func (s *servers) serverOf(t *testing.T, agent string) string {
	t.Helper()
	out := harness.Command{Args: []string{"agent", "health", "-o", "json", "--admin-socket", s.path(agent + ".sock")}}.Run(t)
	var health struct{ Server string }
	if err := json.Unmarshal([]byte(out), &health); err != nil {
		t.Fatal(err)
	}
	for name := range s.processes {
		if text, err := os.ReadFile(s.path(name + ".yaml")); err == nil && strings.Contains(string(text), "listen: "+health.Server+"\n") {
			return name
		}
	}
	t.Fatalf("agent health names no server of the cluster: %s", out)
	return ""
}

// TestAWorkloadHearsOfChangesThroughAnotherServer kills the server that an agent
// is connected to, then stops the next one in order. The agent was told of one
// server only, and learns of the others from that.
func TestAWorkloadHearsOfChangesThroughAnotherServer(t *testing.T) {
	t.Parallel()
	s := newServers(t)
	s.form(t, "s1", "s2", "s3")
	token := strings.TrimSpace(s.command("s1", "token", "generate", "--agent-id", "/node").Run(t))
	agent := harness.Command{Args: []string{"agent", "run", "--join", token, "--data-dir", s.path("agent"),
		"--socket", s.path("workload.sock"), "--admin-socket", s.path("agent.sock")}}.Start(t)
	agent.WaitReady(t, "agent", "health", "--admin-socket", s.path("agent.sock"))

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	updates := make(chan *workloadapi.X509Context, 64)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		_ = workloadapi.WatchX509Context(ctx, watcher(updates), workloadapi.WithAddr("unix://"+s.path("workload.sock")))
	}()
	defer func() { stop(); <-watched }()
	var holds []string
	// change creates an entry at a server and waits until the workload's stream
	// shows it.
	change := func(server, id string) {
		t.Helper()
		client := entryv1.NewEntryClient(s.dial(t, server))
		harness.Eventually(t, "a write at "+server, func(ctx context.Context) error {
			if s.entries(t, server)[id] { // one that was not answered may have been done
				return nil
			}
			return createFor(ctx, client, id, fmt.Sprintf("uid:%d", os.Getuid()))
		})
		harness.Eventually(t, id+" on the workload's stream", func(context.Context) error {
			for {
				select {
				case u := <-updates:
					holds = nil
					for _, svid := range u.SVIDs {
						holds = append(holds, svid.ID.Path())
					}
				default:
					if slices.Contains(holds, "/w/"+id) {
						return nil
					}
					return fmt.Errorf("it holds %v", holds)
				}
			}
		})
	}
	change("s2", "first")
	harness.Eventually(t, "three servers that the agent knows", func(context.Context) error {
		known, err := os.ReadFile(filepath.Join(s.path("agent"), "servers"))
		if n := len(strings.Fields(string(known))); err == nil && n != 3 {
			err = fmt.Errorf("it knows %d", n)
		}
		return err
	})
	other := map[string]string{"s1": "s2", "s2": "s3", "s3": "s1"}
	for _, way := range []string{"killed", "stopped"} {
		gone := s.serverOf(t, "agent")
		began := time.Now()
		if way == "killed" {
			s.processes[gone].Kill()
		} else {
			s.processes[gone].Stop(t)
		}
		ended := time.Now()
		change(other[gone], way)
		now := s.serverOf(t, "agent")
		t.Logf("%s was %s in %v; the workload heard of a change through %s %v later", gone, way,
			ended.Sub(began).Round(time.Millisecond), now, time.Since(ended).Round(time.Millisecond))
		if now == gone {
			t.Errorf("the agent says that it is connected to %s, which was %s", gone, way)
		}
		s.run(t, gone)
		s.ready(t, gone)
	}
	if code := agent.Stop(t); code != 0 {
		t.Errorf("the agent ended with status %d", code)
	}
}
