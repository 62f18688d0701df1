package cli_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/pkg/cli"
)

func TestMain(m *testing.M) {
	// Under the race detector each process would wait a second when it ends.
	os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	testscript.Main(m, map[string]func(){
		"hallmark": func() {
			os.Exit(cli.Main(cli.Programs{
				RunServer: runServer, CheckServer: checkServer, RestoreServer: restoreServer, ReencryptKeys: reencryptKeys,
				RunAgent: runAgent, CheckAgent: checkAgent,
				ServerLayout: serverLayout, AgentLayout: agentLayout,
				BenchEntries: runBench("entries"), BenchAgents: runBench("agents"),
			}))
		},
		// What scripts run inside of `hallmark dev --`.
		"exit-with": func() {
			fmt.Println("inside:", os.Getenv("SPIFFE_ENDPOINT_SOCKET"))
			var code int
			fmt.Sscan(os.Args[1], &code)
			os.Exit(code)
		},
	})
}

// TestScripts runs the terminal sessions in testdata. In them
//
//	server [PATH]   starts a server that listens at the admin socket of "hallmark dev", or at PATH
//	agent [refuse]  starts an agent at its sockets; one that refuses has nothing for anyone
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			dir, err := os.MkdirTemp("", "h") // sockets need short paths
			if err != nil {
				return err
			}
			env.Defer(func() { os.RemoveAll(dir) })
			env.Setenv("TMPDIR", dir)
			env.Setenv("HOME", dir)
			env.Setenv("XDG_STATE_HOME", dir)
			env.Setenv("DEV", filepath.Join(dir, "hallmark", "dev"))
			u, err := user.Current()
			if err != nil {
				return err
			}
			env.Setenv("FAKE_ID", "spiffe://example.org/user/"+u.Username)
			env.Values[renewals{}] = &fakeAgents{}
			env.Setenv("GORACE", os.Getenv("GORACE"))
			for _, name := range []string{"SPIFFE_ENDPOINT_SOCKET", "HALLMARK_ADMIN_SOCKET", "HALLMARK_AGENT_SOCKET", "NO_COLOR"} {
				env.Setenv(name, "")
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"server": func(ts *testscript.TestScript, _ bool, args []string) {
				path := filepath.Join(ts.Getenv("DEV"), "admin.sock")
				s := newFakeServer()
				if s.wit = slices.Equal(args, []string{"wit"}); s.wit {
					args = nil
				}
				if len(args) == 1 {
					path = args[0]
				}
				s.agents = []*types.Agent{
					{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/join_token/one"}, AttestationType: "join_token",
						X509SvidSerialNumber: "17", X509SvidExpiresAt: time.Now().Add(time.Hour + 10*time.Second).Unix(), AgentVersion: "1.2.3"},
					{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/join_token/two"}, AttestationType: "join_token",
						X509SvidSerialNumber: "18", X509SvidExpiresAt: time.Now().Add(-time.Hour).Unix(), AgentVersion: "1.2.0"},
				}
				background(ts, func(ctx context.Context, ready func()) error { return s.serve(ctx, path, ready) })
				if len(args) == 0 {
					ts.Setenv("HALLMARK_ADMIN_SOCKET", path)
				}
			},
			"agent": func(ts *testscript.TestScript, _ bool, args []string) {
				f := &fakeAgent{ca: newAuthority(), refuse: len(args) == 1 && args[0] != "wit", wit: slices.Equal(args, []string{"wit"}), renew: make(chan struct{})}
				ts.Value(renewals{}).(*fakeAgents).last = f
				workload, admin := filepath.Join(ts.Getenv("DEV"), "workload.sock"), filepath.Join(ts.Getenv("DEV"), "agent.sock")
				background(ts, func(ctx context.Context, ready func()) error { return f.serve(ctx, workload, admin, ready) })
				ts.Setenv("SPIFFE_ENDPOINT_SOCKET", "unix://"+workload)
				ts.Setenv("HALLMARK_AGENT_SOCKET", admin)
			},
			// status N COMMAND... runs a command that must exit with N.
			"status": func(ts *testscript.TestScript, _ bool, args []string) {
				err := ts.Exec(args[1], args[2:]...)
				code := 0
				var exit *exec.ExitError
				if errors.As(err, &exit) {
					code = exit.ExitCode()
				} else {
					ts.Check(err)
				}
				if fmt.Sprint(code) != args[0] {
					ts.Fatalf("exit status %d, want %s", code, args[0])
				}
			},
			// renew gives one stream of the agent new SVIDs.
			"renew": func(ts *testscript.TestScript, _ bool, _ []string) {
				ts.Value(renewals{}).(*fakeAgents).last.renew <- struct{}{}
			},
			// await FILE waits until a file is there; ! until it is not.
			"await": func(ts *testscript.TestScript, neg bool, args []string) {
				deadline := time.After(time.Minute)
				for tick := time.NewTicker(5 * time.Millisecond); ; {
					if _, err := os.Stat(ts.MkAbs(args[0])); (err == nil) != neg {
						tick.Stop()
						return
					}
					select {
					case <-tick.C:
					case <-deadline:
						ts.Fatalf("%s: waited in vain", args[0])
					}
				}
			},
			// stale PATH leaves a socket that nobody listens on.
			"stale": func(ts *testscript.TestScript, _ bool, args []string) {
				l, err := net.ListenUnix("unix", &net.UnixAddr{Name: args[0], Net: "unix"})
				ts.Check(err)
				l.SetUnlinkOnClose(false)
				l.Close()
			},
			// port NAME listens on a port and names its address.
			"port": func(ts *testscript.TestScript, _ bool, args []string) {
				l, err := net.Listen("tcp", "127.0.0.1:0")
				ts.Check(err)
				ts.Defer(func() { l.Close() })
				ts.Setenv(args[0], l.Addr().String())
			},
			// mode MODE FILE checks a file's permissions.
			"mode": func(ts *testscript.TestScript, neg bool, args []string) {
				info, err := os.Stat(ts.MkAbs(args[1]))
				ts.Check(err)
				if got := fmt.Sprintf("%04o", info.Mode().Perm()); (got == args[0]) == neg {
					ts.Fatalf("mode of %s is %s", args[1], got)
				}
			},
		},
	})
}

// fakeAgents are the agents of one script.
type fakeAgents struct{ last *fakeAgent }

type renewals struct{} // the key of fakeAgents

// background runs something until the script ends.
func background(ts *testscript.TestScript, run func(ctx context.Context, ready func()) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ready := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		if err := run(ctx, sync.OnceFunc(func() { close(ready) })); err != nil && ctx.Err() == nil {
			panic(err)
		}
	})
	ts.Defer(func() { cancel(); running.Wait() })
	<-ready
}

// TestEveryCommandHasHelpWithAnExample walks down the tree of commands as a
// user would.
func TestEveryCommandHasHelpWithAnExample(t *testing.T) {
	if testing.Short() {
		t.Skip()
	}
	var walk func(path []string)
	walk = func(path []string) {
		help := cli.Help(path...)
		for _, want := range []string{"Usage:\n  hallmark", "Examples:\n", "Exit status: 0 ok"} {
			if !strings.Contains(help, want) {
				t.Errorf("help of %q lacks %q:\n%s", strings.Join(path, " "), want, help)
			}
		}
		for line := range strings.Lines(help) {
			if n := len([]rune(strings.TrimRight(line, "\n"))); n > 120 && !strings.Contains(line, "hallmark ") {
				t.Errorf("help of %q has a line of %d characters: %s", strings.Join(path, " "), n, line)
			}
		}
		for _, name := range cli.Commands(path...) {
			walk(append(append([]string{}, path...), name))
		}
	}
	walk(nil)
}
