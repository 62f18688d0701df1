package admin_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/admin"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/pkg/version"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/test/harness"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type attestor func(attestors.Process) ([]selector.Selector, error)

func (a attestor) Attest(_ context.Context, p attestors.Process) ([]selector.Selector, error) {
	return a(p)
}

// lines is a log that tests look at.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// waitFor waits until the log has a text: what is sent to a client may reach it
// before the log has it.
func (l *lines) waitFor(t testing.TB, text string) {
	t.Helper()
	harness.Eventually(t, "a line of the log", func(context.Context) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if !strings.Contains(l.b.String(), text) {
			return fmt.Errorf("the log lacks %q", text)
		}
		return nil
	})
}

type agent struct {
	*heldtest.Server
	log        *lines
	held       *held.Held
	conn       *grpc.ClientConn
	client     hallmarkv1.AgentAdminServiceClient
	path       string
	connection admin.Connection
	stop       func()
}

// start starts an agent whose attestor gives these selectors.
func start(t *testing.T, selectors ...string) *agent {
	return startWith(t, nil, selectors...)
}

func startWith(t *testing.T, change func(*admin.Options), selectors ...string) *agent {
	t.Helper()
	a := &agent{Server: heldtest.New(t), path: filepath.Join(t.TempDir(), "s"), log: &lines{}}
	a.held = held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: a.Server})
	l, err := peercred.Listen(a.path, admin.SocketMode)
	must(t, err)
	o := admin.Options{
		Log:      slog.New(slog.NewTextHandler(a.log, nil)),
		Listener: l, TrustDomain: heldtest.TrustDomain, Server: "server.example.org:8081", Held: a.held,
		Attestor: workload.New(workload.Options{Attestors: map[string]attestors.Workload{
			"broken": attestor(func(attestors.Process) ([]selector.Selector, error) { return nil, errors.New("no runtime") }),
			"unix": attestor(func(p attestors.Process) ([]selector.Selector, error) {
				return append(heldtest.Selectors(selectors...), selector.Selector{Type: "unix", Value: fmt.Sprint("pid:", p.PID)}), nil
			}),
		}}),
		Connection: func() admin.Connection { return a.connection },
	}
	if change != nil {
		change(&o)
	}
	api := admin.New(o)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.held.Run(ctx) })
	wg.Go(func() {
		if err := api.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
	a.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(a.stop)
	conn, err := grpc.NewClient("unix://"+a.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	a.conn = conn
	a.client = hallmarkv1.NewAgentAdminServiceClient(conn)
	return a
}

// settle applies what the server has and waits until everything is signed or
// has failed.
func (a *agent) settle(t *testing.T, selectors ...string) {
	t.Helper()
	a.held.Apply(a.Complete())
	s := a.held.Subscribe(t.Context(), heldtest.Selectors(selectors...))
	defer s.Close()
	for !s.Update().Ready {
		<-s.C
	}
}

func TestTheSocketIsForTheOwner(t *testing.T) {
	a := start(t)
	info, err := os.Stat(a.path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode is %o", info.Mode().Perm())
	}
}

func TestStatusSaysHowTheAgentIs(t *testing.T) {
	a := start(t)
	r, err := a.client.GetStatus(t.Context(), &hallmarkv1.GetStatusRequest{})
	must(t, err)
	if r.AgentId != "" || r.Connected || r.Revision != 0 || r.SvidExpiresAt != 0 || r.LastError != "" {
		t.Errorf("before it is attested: %v", r)
	}
	a.Entry("web", nil, "unix:uid:1")
	a.Entry("bad", nil, "unix:uid:1")
	a.Break("bad", errors.New("refused"))
	a.settle(t, "unix:uid:1")
	end := time.Now().Add(time.Hour)
	a.connection = admin.Connection{AgentID: heldtest.Node, SVIDExpiresAt: end, Connected: true, LastError: errors.New("away"),
		Authorities: []*x509.Certificate{{Raw: []byte("root")}}}
	r, err = a.client.GetStatus(t.Context(), &hallmarkv1.GetStatusRequest{})
	must(t, err)
	if r.AgentId != heldtest.Node.String() || r.TrustDomain != "example.org" || r.Version != version.String() ||
		r.Server != "server.example.org:8081" || !r.Connected || r.Revision != 1 || r.SvidExpiresAt != end.Unix() ||
		r.Entries != 2 || r.Svids != 1 || r.LastError != "away" || len(r.Authorities) != 1 || string(r.Authorities[0]) != "root" || time.Since(time.Unix(r.StartedAt, 0)) > time.Minute {
		t.Errorf("got %v", r)
	}
}

func TestExplainComparesAProcessToEachEntry(t *testing.T) {
	a := start(t, "unix:uid:1", "unix:gid:1")
	a.connection.AgentID = heldtest.Node
	a.Entry("misses-two", nil, "unix:uid:2", "unix:gid:2", "unix:uid:1")
	a.Entry("misses-one", nil, "unix:uid:1", "unix:gid:2")
	a.Entry("matches", func(e *entry.Entry) { e.Hint = "x" }, "unix:uid:1")
	a.Entry("stored", func(e *entry.Entry) { e.StoreSVID = true }, "unix:uid:1")
	a.Entry("expired", func(e *entry.Entry) { e.ExpiresAt = time.Now().Add(-time.Hour) }, "unix:uid:1")
	a.Entry("same-hint", func(e *entry.Entry) { e.Hint = "x" }, "unix:uid:1")
	a.Entry("refused", nil, "unix:gid:1")
	a.Break("refused", errors.New("the authority is away"))
	a.settle(t, "unix:uid:1", "unix:gid:1")
	pid := int32(os.Getpid())
	r, err := a.client.Explain(t.Context(), &hallmarkv1.ExplainRequest{Pid: pid})
	must(t, err)
	if got := entry.SelectorsFromRecord(r.Selectors).Strings(); !slices.Equal(got, []string{"unix:gid:1", fmt.Sprint("unix:pid:", pid), "unix:uid:1"}) {
		t.Errorf("selectors are %v", got)
	}
	if r.Pid != pid || r.AgentId != heldtest.Node.String() || r.Total != 7 {
		t.Errorf("got %v", r)
	}
	if b, u := r.Attestors[0], r.Attestors[1]; b.Name != "broken" || b.Error != "no runtime" || b.Selectors != 0 ||
		u.Name != "unix" || u.Error != "" || u.Selectors != 3 {
		t.Errorf("attestors are %v", r.Attestors)
	}
	want := []struct{ id, missing, reason string }{
		{"matches", "", ""},
		{"stored", "", "store_svid"},
		{"expired", "", "expired at"},
		{"same-hint", "", `same hint, "x"`},
		{"refused", "", "signing its X509-SVID failed: the authority is away; the next attempt is in"},
		{"misses-one", "unix:gid:2", ""},
		{"misses-two", "unix:gid:2 unix:uid:2", ""},
	}
	for i, w := range want {
		m := r.Matches[i]
		missing := strings.Join(entry.SelectorsFromRecord(m.Missing).Strings(), " ")
		if m.Entry.Id != w.id || m.Matched != (w.missing == "") || missing != w.missing || !strings.Contains(m.Reason, w.reason) || (w.reason == "") != (m.Reason == "") {
			t.Errorf("match %d is %v, want %v", i, m, w)
		}
	}
}

func TestExplainTellsOfAThousandEntriesAtMost(t *testing.T) {
	a := start(t, "unix:uid:1")
	for i := range 1100 {
		a.Entry(fmt.Sprint("e", i), func(e *entry.Entry) { e.DisableX509Prefetch = true }, "unix:uid:2")
	}
	a.Entry("mine", func(e *entry.Entry) { e.DisableX509Prefetch = true }, "unix:uid:1")
	a.held.Apply(a.Complete())
	r, err := a.client.Explain(t.Context(), &hallmarkv1.ExplainRequest{Pid: int32(os.Getpid())})
	must(t, err)
	if r.Total != 1101 || len(r.Matches) != 1000 || r.Matches[0].Entry.Id != "mine" {
		t.Errorf("%d of %d, first %s", len(r.Matches), r.Total, r.Matches[0].Entry.Id)
	}
}

func TestExplainNeedsAProcessThatRuns(t *testing.T) {
	a := start(t)
	ended := exec.Command("/bin/true")
	must(t, ended.Run())
	for pid, code := range map[int32]codes.Code{0: codes.InvalidArgument, -3: codes.InvalidArgument, int32(ended.Process.Pid): codes.NotFound} {
		_, err := a.client.Explain(t.Context(), &hallmarkv1.ExplainRequest{Pid: pid})
		if status.Code(err) != code {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
}

func TestAPanicTakesDownOneCallOnly(t *testing.T) {
	a := start(t)
	a.connection.AgentID = spiffeid.ID{}
	a.connection.LastError = panics{}
	if _, err := a.client.GetStatus(t.Context(), &hallmarkv1.GetStatusRequest{}); status.Code(err) != codes.Internal {
		t.Errorf("error is %v", err)
	}
	a.connection.LastError = nil
	_, err := a.client.GetStatus(t.Context(), &hallmarkv1.GetStatusRequest{})
	must(t, err)
}

type panics struct{}

func (panics) Error() string { panic("a bug") }
