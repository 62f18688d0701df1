package test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/join"
	"github.com/hallmark-id/hallmark/test/harness"
)

// servers are those of a cluster, each with a directory of its own.
type servers struct {
	dir       string
	processes map[string]*harness.Process
}

func newServers(t *testing.T) *servers {
	return &servers{dir: devDir(t), processes: make(map[string]*harness.Process)}
}

func (s *servers) path(name string) string   { return filepath.Join(s.dir, name) }
func (s *servers) socket(name string) string { return s.path(name + ".sock") }

// configure writes a server's configuration.
func (s *servers) configure(t *testing.T, name, address, store string) {
	t.Helper()
	text := fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s\nadmin_socket: %s\n%s", address, s.path(name), s.socket(name), store)
	if err := os.WriteFile(s.path(name+".yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s *servers) embedded(t *testing.T, name string) {
	t.Helper()
	s.configure(t, name, harness.FreeAddress(t), fmt.Sprintf("name: %s\nstore: {etcd: {embedded: {listen: %q}}}\n", name, harness.FreeAddress(t)))
}

// run starts a server without waiting for it.
func (s *servers) run(t *testing.T, name string, more ...string) {
	t.Helper()
	s.processes[name] = harness.Command{Args: append([]string{"server", "run", "-c", s.path(name + ".yaml")}, more...)}.Start(t)
}

func (s *servers) ready(t *testing.T, name string) {
	t.Helper()
	s.processes[name].WaitReady(t, "server", "health", "--admin-socket", s.socket(name))
}

func (s *servers) command(name string, args ...string) harness.Command {
	return harness.Command{Args: append(args, "--admin-socket", s.socket(name))}
}

// form starts a cluster: the first server, and the others by its invitation.
func (s *servers) form(t *testing.T, first string, others ...string) {
	t.Helper()
	s.embedded(t, first)
	s.run(t, first)
	s.ready(t, first)
	for _, name := range others {
		s.embedded(t, name)
		s.run(t, name, "--join", strings.TrimSpace(s.command(first, "cluster", "invite").Run(t)))
		s.ready(t, name)
	}
}

type listed struct {
	Name, Role     string
	Present, Leads bool
}

func (s *servers) list(t *testing.T, name string) (list []listed) {
	t.Helper()
	if err := json.Unmarshal([]byte(s.command(name, "cluster", "list", "-o", "json").Run(t)), &list); err != nil {
		t.Fatal(err)
	}
	return list
}

// leader returns the server whose member leads, by what another says.
func (s *servers) leader(t *testing.T, ask string) (leader string) {
	t.Helper()
	harness.Eventually(t, "a leader", func(context.Context) error {
		for _, l := range s.list(t, ask) {
			if l.Role == "leader" {
				leader = l.Name
				return nil
			}
		}
		return fmt.Errorf("none of %v", s.list(t, ask))
	})
	return leader
}

// entries returns the IDs of the entries that a server knows.
func (s *servers) entries(t *testing.T, name string) map[string]bool {
	t.Helper()
	ids := make(map[string]bool)
	conn := s.dial(t, name)
	defer conn.Close() // a socket takes so many and no more
	client := entryv1.NewEntryClient(conn)
	for page := ""; ; {
		resp, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 1000, PageToken: page})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.Entries {
			ids[e.Id] = true
		}
		if page = resp.NextPageToken; page == "" {
			return ids
		}
	}
}

func (s *servers) dial(t *testing.T, name string) *grpc.ClientConn {
	t.Helper()
	return harness.Dial(t, s.socket(name))
}

func create(ctx context.Context, client entryv1.EntryClient, id string) error {
	return createFor(ctx, client, id, "uid:4242")
}

// createFor creates an entry, of the node that is called so, for a process that
// a selector of unix names.
func createFor(ctx context.Context, client entryv1.EntryClient, id, process string) error {
	resp, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		Id:        id,
		SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/w/" + id},
		ParentId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/node"},
		Selectors: []*types.Selector{{Type: "unix", Value: process}},
	}}})
	if err != nil {
		return err
	}
	if st := resp.Results[0].Status; codes.Code(st.Code) != codes.OK {
		return fmt.Errorf("%v: %s", codes.Code(st.Code), st.Message)
	}
	return nil
}

// TestAServerThatIsLeftAloneServesAndSaysThatItCannotWrite takes two of three
// servers away: what was known is served, agents and their workloads go on, and
// nothing can be written, which the one who tries is told in time.
func TestAServerThatIsLeftAloneServesAndSaysThatItCannotWrite(t *testing.T) {
	t.Parallel()
	s := newServers(t)
	s.form(t, "s1", "s2", "s3")
	token := strings.TrimSpace(s.command("s1", "token", "generate", "--agent-id", "/node").Run(t))
	agent := harness.Command{Args: []string{"agent", "run", "--join", token, "--data-dir", s.path("agent"),
		"--socket", s.path("workload.sock"), "--admin-socket", s.path("agent.sock")}}.Start(t)
	agent.WaitReady(t, "agent", "health", "--admin-socket", s.path("agent.sock"))
	for _, id := range []string{"web", "later"} {
		s.command("s2", "entry", "create", "--id", id, "--spiffe-id", "/"+id, "--parent-id", "/node", "--selector", fmt.Sprintf("unix:uid:%d", os.Getuid())).Run(t)
	}
	fetch := func(audience string) error {
		_, stderr, code := harness.Command{Args: []string{"fetch", "jwt", "--audience", audience, "--spiffe-id", "spiffe://example.org/web", "--socket", s.path("workload.sock")}}.Try(t)
		if code != 0 {
			return fmt.Errorf("status %d: %s", code, stderr)
		}
		return nil
	}
	harness.Eventually(t, "an SVID", func(context.Context) error { return fetch("before") })

	s.processes["s2"].Kill()
	s.processes["s3"].Kill()
	if err := fetch("after"); err != nil { // a new one, which the server signs
		t.Errorf("a JWT-SVID of a server that is alone: %v", err)
	}
	if got := s.entries(t, "s1"); !got["web"] || !got["later"] {
		t.Errorf("the server that is alone knows %v", got)
	}
	s.command("s1", "server", "health").Run(t)
	began := time.Now()
	_, stderr, code := s.command("s1", "entry", "create", "--spiffe-id", "/x", "--parent-id", "/node", "--selector", "unix:uid:1").Try(t)
	if took := time.Since(began); code == 0 || !strings.Contains(stderr, "no majority") || took > 15*time.Second {
		t.Errorf("entry create: status %d after %v\n%s", code, took, stderr)
	}
	s.processes["s1"].WaitOutput(t, "no majority of the servers can be reached: nothing can be changed")
	harness.Eventually(t, "the servers that are away", func(context.Context) error {
		for _, l := range s.list(t, "s1") {
			if l.Name != "s1" && l.Present {
				return fmt.Errorf("%s is said to be present", l.Name)
			}
		}
		return nil
	})

	s.run(t, "s2")
	s.ready(t, "s2")
	harness.Eventually(t, "a write with a majority again", func(ctx context.Context) error {
		return create(ctx, entryv1.NewEntryClient(s.dial(t, "s1")), "again")
	})
	s.processes["s1"].WaitOutput(t, "a majority of the servers can be reached again")
	harness.Eventually(t, "the write at the other server", func(context.Context) error {
		if !s.entries(t, "s2")["again"] {
			return fmt.Errorf("it is not there")
		}
		return nil
	})
}

func TestAClusterBeginsAnewFromABackupAndFromAnotherEngine(t *testing.T) {
	t.Parallel()
	s := newServers(t)
	s.configure(t, "lone", harness.FreeAddress(t), "")
	s.run(t, "lone")
	s.ready(t, "lone")
	s.command("lone", "entry", "create", "--id", "web", "--spiffe-id", "/web", "--parent-id", "/node", "--selector", "unix:uid:5").Run(t)
	authorities := s.command("lone", "authority", "list").Run(t)
	s.command("lone", "server", "backup", s.path("backup")).Run(t)
	s.processes["lone"].Stop(t)

	// The same server with another engine: its authorities sign on.
	text, err := os.ReadFile(s.path("lone.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	moved := string(text) + fmt.Sprintf("store: {etcd: {embedded: {listen: %q}}}\n", harness.FreeAddress(t))
	if err := os.WriteFile(s.path("moved.yaml"), []byte(moved), 0o600); err != nil {
		t.Fatal(err)
	}
	migrate := harness.Command{Args: []string{"server", "migrate", "--from", s.path("lone.yaml"), "--to", s.path("moved.yaml")}}
	if out := migrate.Run(t); !strings.Contains(out, "copied and compared") {
		t.Errorf("server migrate says %q", out)
	}
	if _, stderr, code := migrate.Try(t); code == 0 || !strings.Contains(stderr, "empty") {
		t.Errorf("a second time: status %d\n%s", code, stderr)
	}
	s.processes["lone"] = harness.Command{Args: []string{"server", "run", "-c", s.path("moved.yaml")}}.Start(t)
	s.ready(t, "lone")
	if got := s.command("lone", "authority", "list").Run(t); firstColumns(got) != firstColumns(authorities) {
		t.Errorf("after it was moved the server has the authorities\n%s, had\n%s", got, authorities)
	}
	if !s.entries(t, "lone")["web"] {
		t.Error("the moved server does not know the entry")
	}
	s.processes["lone"].Stop(t)

	// Other servers, from the backup.
	s.embedded(t, "s1")
	harness.Command{Args: []string{"server", "restore", "-c", s.path("s1.yaml"), "--yes", s.path("backup")}}.Run(t)
	s.run(t, "s1")
	s.ready(t, "s1")
	s.embedded(t, "s2")
	s.run(t, "s2", "--join", strings.TrimSpace(s.command("s1", "cluster", "invite").Run(t)))
	s.ready(t, "s2")
	if !s.entries(t, "s2")["web"] {
		t.Error("the server that joined the restored cluster does not know the entry")
	}
}

// firstColumns is a list without what changes with time.
func firstColumns(list string) string {
	var out strings.Builder
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); len(f) > 3 {
			fmt.Fprintln(&out, f[0], f[1], f[2], f[3])
		}
	}
	return out.String()
}

func TestAServerLeavesAndIsNotLetInAgainByTheSameString(t *testing.T) {
	t.Parallel()
	s := newServers(t)
	s.form(t, "s1")
	s.embedded(t, "s2")
	invitation := strings.TrimSpace(s.command("s1", "cluster", "invite").Run(t))
	s.run(t, "s2", "--join", invitation)
	s.ready(t, "s2")
	s.command("s2", "cluster", "leave", "--yes").Run(t)
	s.processes["s2"].WaitOutput(t, "removed from its cluster")
	s.processes["s2"].Wait(t)
	if list := s.list(t, "s1"); len(list) != 1 {
		t.Errorf("after it left, the servers are %v", list)
	}
	if err := create(t.Context(), entryv1.NewEntryClient(s.dial(t, "s1")), "alone"); err != nil {
		t.Errorf("the server that stays cannot write: %v", err)
	}
	s.embedded(t, "s3")
	stranger, err := join.Parse(strings.TrimSpace(s.command("s1", "cluster", "invite").Run(t)))
	if err != nil {
		t.Fatal(err)
	}
	for i := range stranger.Roots {
		stranger.Roots[i][0] ^= 1 // an invitation of another server of that name
	}
	wrong, err := stranger.Encode()
	if err != nil {
		t.Fatal(err)
	}
	_, stderr, code := harness.Command{Args: []string{"server", "run", "-c", s.path("s3.yaml"), "--join", wrong}}.Try(t)
	if code == 0 || !strings.Contains(stderr, "none of its roots is pinned") {
		t.Errorf("a server that the invitation does not pin: status %d\n%s", code, stderr)
	}
	_, stderr, code = harness.Command{Args: []string{"server", "run", "-c", s.path("s3.yaml"), "--join", invitation}}.Try(t)
	if code == 0 || !strings.Contains(stderr, "invitation is not known, was used") {
		t.Errorf("the invitation once more: status %d\n%s", code, stderr)
	}
	agents := strings.TrimSpace(s.command("s1", "token", "generate").Run(t))
	_, stderr, code = harness.Command{Args: []string{"server", "run", "-c", s.path("s3.yaml"), "--join", agents}}.Try(t)
	if code == 0 || !strings.Contains(stderr, "invitation is not known") {
		t.Errorf("with an agent's join string: status %d\n%s", code, stderr)
	}
	if _, stderr, code := s.command("s1", "cluster", "leave", "--yes").Try(t); code == 0 || !strings.Contains(stderr, "only server") {
		t.Errorf("the last leaves: status %d\n%s", code, stderr)
	}
}
