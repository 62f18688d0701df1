package harness

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Users of a test domain: nobody else's processes run as them.
const (
	ServerUID = 61001
	AgentUID  = 61002
)

// Domain is a trust domain of one server and one agent, as separate processes
// of different users.
type Domain struct {
	Dir         string
	Address     string // of the server
	AdminSocket string // of the server
	AgentSocket string // of the agent, admin
	Socket      string // the Workload API

	Server, Agent *Process

	serverEnv []string
	network   *Network
}

// Settings are what tests change of a domain's configuration: YAML that is
// appended to it.
type Settings struct {
	Server, Agent string
	TrustDomain   string   // "": example.org
	ServerEnv     []string // of the server's process
	Network       *Network // of both; nil: that of the test
}

// NewDomain lays out a domain: directories, configuration files. Nothing runs
// yet. It needs root.
func NewDomain(t testing.TB, s Settings) *Domain {
	t.Helper()
	NeedRoot(t)
	dir, err := os.MkdirTemp("", "hallmark-domain-") // sockets need a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	td := cmp.Or(s.TrustDomain, "example.org")
	d := &Domain{
		serverEnv:   s.ServerEnv,
		network:     s.Network,
		Dir:         dir,
		Address:     FreeAddress(t),
		AdminSocket: filepath.Join(dir, "server", "admin.sock"),
		AgentSocket: filepath.Join(dir, "agent", "agent.sock"),
		Socket:      filepath.Join(dir, "agent", "workload.sock"),
	}
	for name, uid := range map[string]int{"server": ServerUID, "agent": AgentUID} {
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		must(t, os.Chown(filepath.Join(dir, name), uid, uid))
	}
	d.write(t, "server.yaml", fmt.Sprintf("trust_domain: %s\nlisten: %s\ndata_dir: %s/server/data\nadmin_socket: %s\n%s",
		td, d.Address, dir, d.AdminSocket, s.Server))
	d.write(t, "agent.yaml", fmt.Sprintf("trust_domain: %s\nserver: %s\ndata_dir: %s/agent/data\nsocket: %s\nadmin_socket: %s\n%s",
		td, d.Address, dir, d.Socket, d.AgentSocket, s.Agent))
	return d
}

// Network is that of its server and agent; nil: that of the test.
func (d *Domain) Network() *Network { return d.network }

func (d *Domain) write(t testing.TB, name, text string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(d.Dir, name), []byte(text), 0o644))
}

// StartServer starts the server and waits until it serves.
func (d *Domain) StartServer(t testing.TB) {
	t.Helper()
	d.Server = Command{Args: []string{"server", "run", "-c", filepath.Join(d.Dir, "server.yaml")}, Env: d.serverEnv, UID: ServerUID, Network: d.network}.Start(t)
	d.Server.WaitReady(t, "server", "health", "--admin-socket", d.AdminSocket)
}

// StartAgent starts the agent, with a join string if it is not empty, and
// waits until it is in step with the server.
func (d *Domain) StartAgent(t testing.TB, join string) {
	t.Helper()
	args := []string{"agent", "run", "-c", filepath.Join(d.Dir, "agent.yaml")}
	if join != "" {
		args = append(args, "--join", join)
	}
	d.Agent = Command{Args: args, UID: AgentUID, Network: d.network}.Start(t)
	d.Agent.WaitReady(t, "agent", "health", "--admin-socket", d.AgentSocket)
}

// WaitReady runs a hallmark command until it succeeds, and fails the test if
// the process ends meanwhile.
func (p *Process) WaitReady(t testing.TB, args ...string) {
	t.Helper()
	Eventually(t, "hallmark "+strings.Join(args, " "), func(context.Context) error {
		select {
		case <-p.done:
			t.Fatalf("%s ended: %v\nstderr:\n%s", strings.Join(p.cmd.Args, " "), p.failure, tail(p.Stderr()))
		default:
		}
		if i := slices.Index(args, "--admin-socket"); i >= 0 { // to ask costs more than to look
			if _, err := os.Stat(args[i+1]); err != nil {
				return err
			}
		}
		if out, errOut, code := (Command{Args: args, UID: p.UID}).Try(t); code != 0 {
			return fmt.Errorf("exit status %d: %s%s", code, out, errOut)
		}
		return nil
	})
}

// Admin runs a hallmark command against the server's admin socket, as the
// server's user, and returns what it printed.
func (d *Domain) Admin(t testing.TB, args ...string) string {
	t.Helper()
	return Command{Args: append(args, "--admin-socket", d.AdminSocket), UID: ServerUID}.Run(t)
}

// Join makes a join string. The agent's entries may stand under /node.
func (d *Domain) Join(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(d.Admin(t, "token", "generate", "--agent-id", "/node"))
}

// Entry creates an entry under the agent for the processes of a user.
func (d *Domain) Entry(t testing.TB, path string, uid int, more ...string) {
	t.Helper()
	d.Register(t, append([]string{"--spiffe-id", path, "--parent-id", "/node", "--selector", fmt.Sprintf("unix:uid:%d", uid)}, more...)...)
}

// Register creates an entry. An agent that runs has it on return, which the
// command that creates it does not wait for.
func (d *Domain) Register(t testing.TB, args ...string) {
	t.Helper()
	d.Admin(t, append([]string{"entry", "create"}, args...)...)
	if d.Agent == nil {
		return
	}
	Eventually(t, "an agent has the entry", func(context.Context) error {
		var reached struct{ Agents int }
		if err := json.Unmarshal([]byte(d.Admin(t, "node", "wait", "-o", "json")), &reached); err != nil {
			return err
		}
		if reached.Agents == 0 {
			return errors.New("none is connected")
		}
		return nil
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
