package doctor_test

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/doctor"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// expect fails the test unless something is said of a check, in these words.
func expect(t *testing.T, found []doctor.Finding, check string, s doctor.Status, message, remedy string) {
	t.Helper()
	for _, f := range found {
		if f.Check == check && f.Status == s && strings.Contains(f.Message, message) && strings.Contains(f.Remedy, remedy) {
			return
		}
	}
	t.Errorf("nothing is said of %s: %s %q → %q, but %+v", check, s, message, remedy, found)
}

func TestWhereNothingIsItSaysWhatToStart(t *testing.T) {
	expect(t, doctor.Examine(t.Context(), doctor.Options{}), "sockets", doctor.Failed, "neither a server nor an agent", "hallmark dev")
}

func TestADiskThatIsNearlyFullIsFound(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	p := &doctor.Program{Socket: filepath.Join(dir, "none"), File: "x.yaml", Layout: config.Layout{DataDirs: []string{dir, dir}}}
	for _, c := range []struct {
		free          doctor.Free
		server, agent doctor.Status
	}{
		{doctor.Free{Bytes: 50 << 30, Files: 1e6}, doctor.OK, doctor.OK},
		{doctor.Free{Bytes: 100 << 20, Files: 1e6}, doctor.Warning, doctor.OK},
		{doctor.Free{Bytes: 10 << 20, Files: 1e6}, doctor.Failed, doctor.Warning},
		{doctor.Free{Bytes: 100, Files: 1e6}, doctor.Failed, doctor.Failed},
		{doctor.Free{Bytes: 50 << 30, Files: 50}, doctor.Warning, doctor.Warning},
		{doctor.Free{Bytes: 50 << 30}, doctor.Failed, doctor.Failed},
	} {
		free := func(path string) (doctor.Free, error) {
			if path != dir {
				return doctor.Free{}, errors.New("another directory")
			}
			return c.free, nil
		}
		for part, want := range map[string]doctor.Status{"server": c.server, "agent": c.agent} {
			o := doctor.Options{Free: free}
			if part == "server" {
				o.Server = p
			} else {
				o.Agent = p
			}
			n := 0
			for _, f := range doctor.Examine(t.Context(), o) {
				if f.Check == "disk" {
					if n++; f.Status != want {
						t.Errorf("%+v: the %s has %+v", c.free, part, f)
					}
				}
			}
			if n != 1 {
				t.Errorf("one file system was looked at %d times", n)
			}
		}
	}
}

func TestAnUnreadableConfigurationIsNoMistakeInIt(t *testing.T) {
	found := doctor.Examine(t.Context(), doctor.Options{Server: &doctor.Program{Socket: "/none", File: "/etc/x.yaml", Err: fs.ErrPermission}})
	expect(t, found, "configuration", doctor.Skipped, "this user may not read /etc/x.yaml", "")
}

// server is one whose answers are what a test wants.
type server struct {
	hallmarkv1.UnimplementedAdminServiceServer
	agentv1.UnimplementedAgentServer
	connections []*hallmarkv1.Connection
	asked       int
	catchUp     bool // before it is asked a second time
	keys        string
}

func (s *server) GetServer(context.Context, *hallmarkv1.GetServerRequest) (*hallmarkv1.GetServerResponse, error) {
	return &hallmarkv1.GetServerResponse{TrustDomain: "example.org", Version: "0.0.1", Address: "127.0.0.1:1", KeysProblem: s.keys}, nil
}

func (s *server) ListConnections(context.Context, *hallmarkv1.ListConnectionsRequest) (*hallmarkv1.ListConnectionsResponse, error) {
	if s.asked++; s.asked > 1 && s.catchUp {
		for _, c := range s.connections {
			c.Behind = false
		}
	}
	return &hallmarkv1.ListConnectionsResponse{Connections: s.connections}, nil
}

func (s *server) ListAuthorities(context.Context, *hallmarkv1.ListAuthoritiesRequest) (*hallmarkv1.ListAuthoritiesResponse, error) {
	return &hallmarkv1.ListAuthoritiesResponse{Authorities: []*hallmarkv1.Authority{
		{Id: "1", Kind: hallmarkv1.Authority_KIND_JWT, State: hallmarkv1.Authority_STATE_PREPARED, Server: "main"},
	}}, nil
}

func (s *server) ListAgents(context.Context, *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	return &agentv1.ListAgentsResponse{Agents: []*types.Agent{
		{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/away"}, X509SvidExpiresAt: time.Now().Add(time.Minute).Unix()},
		{Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/spire/agent/gone"}, X509SvidExpiresAt: time.Now().Add(-time.Minute).Unix(), CanReattest: true},
	}}, nil
}

// examine examines a server on a socket.
func (s *server) examine(t *testing.T, layout config.Layout) []doctor.Finding {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := peercred.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	hallmarkv1.RegisterAdminServiceServer(g, s)
	agentv1.RegisterAgentServer(g, s)
	go g.Serve(l)
	t.Cleanup(g.Stop)
	return doctor.Examine(t.Context(), doctor.Options{Server: &doctor.Program{Socket: path, Layout: layout}})
}

func TestAnAgentThatDoesNotAcknowledgeIsFound(t *testing.T) {
	id := "spiffe://example.org/spire/agent/slow"
	slow := &server{connections: []*hallmarkv1.Connection{{AgentId: id, Behind: true, AcknowledgedRevision: 7}}}
	expect(t, slow.examine(t, config.Layout{}), "agents", doctor.Warning, id+" did not acknowledge", "overloaded")
	quick := &server{connections: []*hallmarkv1.Connection{{AgentId: id, Behind: true, AcknowledgedRevision: 7}}, catchUp: true}
	for _, f := range quick.examine(t, config.Layout{}) {
		if strings.Contains(f.Message, "did not acknowledge") {
			t.Errorf("an agent that has just been sent something is complained of: %+v", f)
		}
	}
}

func TestAServerThatIsNotWellIsFound(t *testing.T) {
	found := new(server).examine(t, config.Layout{Connections: 1 << 40, Descriptors: 1})
	expect(t, found, "status", doctor.Failed, "does not say whether it serves", "log")
	expect(t, found, "version", doctor.Warning, "the server is of version 0.0.1", "Start the server again")
	expect(t, found, "authorities", doctor.Failed, "server main has no active jwt authority", "hallmark authority rotate jwt")
	expect(t, found, "agents", doctor.Warning, "/spire/agent/away hold no stream", "hallmark doctor")
	expect(t, found, "agents", doctor.Warning, "/spire/agent/gone had an SVID that ended", "hallmark node purge")
	expect(t, found, "file descriptors", doctor.Warning, "limits.connections 1099511627776 needs 1099511628032", "LimitNOFILE=1099511628032")
}

func TestAServerThatCannotUseItsKeysIsFound(t *testing.T) {
	with := &server{keys: "the keys of the authorities cannot be used now: AWS KMS: no answer in time"}
	expect(t, with.examine(t, config.Layout{}), "keys", doctor.Failed, "AWS KMS: no answer in time", "keys.kms.uri")
}

func TestAServerThatDoesNotAnswerIsNotWaitedForLong(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := peercred.Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close() // it is silent until the test ends
		}
	}()
	found := doctor.Examine(t.Context(), doctor.Options{Server: &doctor.Program{Socket: path}})
	expect(t, found, "status", doctor.Failed, "no answer in time", "log")
}

func TestWhatIsNoSocketIsFound(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	found := doctor.Examine(t.Context(), doctor.Options{Agent: &doctor.Program{Socket: path}})
	expect(t, found, "socket", doctor.Failed, path+" is no socket", "Remove it")
}

// TestWhatAnswersIsNoServer: the agent's server is dialed even if the agent is
// not there, and something else listens.
func TestWhatAnswersIsNoServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte("SSH-2.0-x\r\n"))
			c.Close()
		}
	}()
	found := doctor.Examine(t.Context(), doctor.Options{Agent: &doctor.Program{Socket: "/none",
		Layout: config.Layout{Server: l.Addr().String(), TrustDomain: "example.org"}}})
	expect(t, found, "connection", doctor.Failed, "does not speak TLS as a server does", "proxy")
}
