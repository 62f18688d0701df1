package admin_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/admin"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/test/harness"
)

// The test binary is also delegates of other users and namespaces.
const roleEnv = "ADMIN_TEST_ROLE"

func TestMain(m *testing.M) {
	role, path, _ := strings.Cut(os.Getenv(roleEnv), " ")
	if role == "" {
		os.Exit(m.Run())
	}
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var delegated error
	if role == "by-pid" {
		_, delegated = svids(ctx, conn, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: int32(os.Getpid())})
	} else {
		_, delegated = svids(ctx, conn, bySelectors("unix:uid:7"))
	}
	_, getStatus := hallmarkv1.NewAgentAdminServiceClient(conn).GetStatus(ctx, &hallmarkv1.GetStatusRequest{})
	_, explain := hallmarkv1.NewAgentAdminServiceClient(conn).Explain(ctx, &hallmarkv1.ExplainRequest{Pid: 1})
	_, debug := debugv1.NewDebugClient(conn).GetInfo(ctx, &debugv1.GetInfoRequest{})
	_, level := loggerv1.NewLoggerClient(conn).SetLogLevel(ctx, &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_DEBUG})
	fmt.Println("delegated", status.Code(delegated), "status", status.Code(getStatus), "explain", status.Code(explain),
		"debug", status.Code(debug), "logger", status.Code(level), "reflection", status.Code(reflect(ctx, conn)))
}

func reflect(ctx context.Context, conn *grpc.ClientConn) error {
	s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return err
	}
	// Send fails if the call was refused already; Recv says why.
	_ = s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	_, err = s.Recv()
	return err
}

var delegate = spiffeid.RequireFromPath(heldtest.TrustDomain, "/delegate")

// startDelegated starts an agent that has one delegate: this process, as long
// as the entry is there.
func startDelegated(t *testing.T, change ...func(*admin.Options)) (*agent, *entry.Entry) {
	t.Helper()
	a := startWith(t, func(o *admin.Options) {
		o.Delegates = []spiffeid.ID{delegate}
		for _, c := range change {
			c(o)
		}
	})
	e := a.Entry("delegate", nil, fmt.Sprint("unix:pid:", os.Getpid()))
	a.held.Apply(a.Complete())
	return a, e
}

// bounded is a context for a call that should not take long.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func bySelectors(selectors ...string) *delegatedv1.SubscribeToX509SVIDsRequest {
	return &delegatedv1.SubscribeToX509SVIDsRequest{Selectors: wire(selectors...)}
}

func wire(selectors ...string) []*types.Selector {
	var out []*types.Selector
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		out = append(out, &types.Selector{Type: typ, Value: value})
	}
	return out
}

// svids opens a stream and returns its first message, or why there is none.
func svids(ctx context.Context, conn *grpc.ClientConn, r *delegatedv1.SubscribeToX509SVIDsRequest) (*delegatedv1.SubscribeToX509SVIDsResponse, error) {
	s, err := delegatedv1.NewDelegatedIdentityClient(conn).SubscribeToX509SVIDs(ctx, r)
	if err != nil {
		return nil, err
	}
	return s.Recv()
}

// follow opens a stream that the test reads from.
func (a *agent) follow(t *testing.T, r *delegatedv1.SubscribeToX509SVIDsRequest) grpc.ServerStreamingClient[delegatedv1.SubscribeToX509SVIDsResponse] {
	t.Helper()
	s, err := delegatedv1.NewDelegatedIdentityClient(a.conn).SubscribeToX509SVIDs(bounded(t), r)
	must(t, err)
	return s
}

func recv[T any](t *testing.T, s grpc.ServerStreamingClient[T]) *T {
	t.Helper()
	m, err := s.Recv()
	must(t, err)
	return m
}

func wantCode(t *testing.T, what string, err error, want codes.Code) {
	t.Helper()
	if status.Code(err) != want {
		t.Errorf("%s: error is %v, want code %v", what, err, want)
	}
}

func pathsOf(m *delegatedv1.SubscribeToX509SVIDsResponse) []string {
	out := []string{}
	for _, s := range m.X509Svids {
		out = append(out, s.X509Svid.Id.Path)
	}
	return out
}

// process is a workload that lives until the test ends it.
func process(t *testing.T) (pid int32, end func()) {
	t.Helper()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	end = func() { stdin.Close(); cmd.Wait() }
	t.Cleanup(end)
	return int32(cmd.Process.Pid), end
}

func TestADelegateGetsTheSVIDsOfAWorkloadBySelectors(t *testing.T) {
	a, _ := startDelegated(t)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	a.Entry("web", func(e *entry.Entry) { e.Hint = "internal"; e.FederatesWith = []spiffeid.TrustDomain{other} }, "unix:uid:7")
	a.Entry("of-others", nil, "unix:uid:8")
	a.held.Apply(a.Complete(a.ForeignBundle("other.org")))
	s := a.follow(t, bySelectors("unix:uid:7", "k8s:ns:shop"))
	m := recv(t, s)
	if got := pathsOf(m); !slices.Equal(got, []string{"/web"}) {
		t.Fatalf("got %v", got)
	}
	got := m.X509Svids[0]
	cert, err := x509.ParseCertificate(got.X509Svid.CertChain[0])
	must(t, err)
	key, err := x509.ParsePKCS8PrivateKey(got.X509SvidKey)
	must(t, err)
	if !key.(*ecdsa.PrivateKey).PublicKey.Equal(cert.PublicKey) || cert.URIs[0].String() != "spiffe://example.org/web" ||
		got.X509Svid.ExpiresAt != cert.NotAfter.Unix() || got.X509Svid.Hint != "internal" || got.X509Svid.Id.TrustDomain != "example.org" {
		t.Errorf("the X509-SVID is %v", got.X509Svid)
	}
	if !slices.Equal(m.FederatesWith, []string{"spiffe://other.org"}) {
		t.Errorf("it federates with %v", m.FederatesWith)
	}
	a.Entry("web2", nil, "k8s:ns:shop")
	a.held.Apply(a.Complete())
	for !slices.Equal(pathsOf(m), []string{"/web", "/web2"}) {
		m = recv(t, s)
	}
	a.log.waitFor(t, "delegate=spiffe://example.org/delegate reference=selectors spiffe_id=spiffe://example.org/web2")
}

func TestADelegateMayAskBeforeThereIsAnything(t *testing.T) {
	a, _ := startDelegated(t)
	s := a.follow(t, bySelectors("unix:uid:7"))
	if m := recv(t, s); len(m.X509Svids) != 0 || len(m.FederatesWith) != 0 {
		t.Errorf("got %v", m)
	}
	e := a.Entry("web", nil, "unix:uid:7")
	a.held.Apply(a.Complete())
	if got := pathsOf(recv(t, s)); !slices.Equal(got, []string{"/web"}) {
		t.Errorf("got %v", got)
	}
	a.Delete(e)
	a.held.Apply(a.Complete())
	if got := pathsOf(recv(t, s)); len(got) != 0 {
		t.Errorf("after the entry was deleted: %v", got)
	}
}

func TestADelegateGetsTheSVIDsOfAProcessUntilItEnds(t *testing.T) {
	a, _ := startDelegated(t)
	pid, end := process(t)
	a.Entry("web", nil, fmt.Sprint("unix:pid:", pid))
	a.held.Apply(a.Complete())
	s := a.follow(t, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: pid})
	if got := pathsOf(recv(t, s)); !slices.Equal(got, []string{"/web"}) {
		t.Errorf("got %v", got)
	}
	end()
	_, err := s.Recv()
	wantCode(t, "after the process ended", err, codes.NotFound)
	_, err = svids(bounded(t), a.conn, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: pid})
	wantCode(t, "of an ended process", err, codes.NotFound)
}

func TestADelegateGetsJWTSVIDs(t *testing.T) {
	a, _ := startDelegated(t)
	pid, end := process(t)
	a.Entry("web", func(e *entry.Entry) { e.Hint = "internal" }, fmt.Sprint("unix:pid:", pid))
	a.Entry("operator", func(e *entry.Entry) { e.Admin = true }, fmt.Sprint("unix:pid:", pid))
	a.held.Apply(a.Complete())
	client := delegatedv1.NewDelegatedIdentityClient(a.conn)
	for name, r := range map[string]*delegatedv1.FetchJWTSVIDsRequest{
		"by pid":       {Audience: []string{"db"}, Pid: pid},
		"by selectors": {Audience: []string{"db"}, Selectors: wire(fmt.Sprint("unix:pid:", pid))},
	} {
		m, err := client.FetchJWTSVIDs(bounded(t), r)
		must(t, err)
		if len(m.Svids) != 1 || m.Svids[0].Id.Path != "/web" || m.Svids[0].Hint != "internal" || m.Svids[0].Token == "" ||
			m.Svids[0].ExpiresAt <= m.Svids[0].IssuedAt {
			t.Errorf("%s: got %v", name, m)
		}
	}
	a.log.waitFor(t, "JWT-SVID issued on behalf of a workload\" delegate=spiffe://example.org/delegate workload_pid="+fmt.Sprint(pid)+" spiffe_id=spiffe://example.org/web")
	_, err := client.FetchJWTSVIDs(bounded(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"db"}, Selectors: wire("unix:uid:8")})
	wantCode(t, "without an entry", err, codes.PermissionDenied)
	end()
	_, err = client.FetchJWTSVIDs(bounded(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"db"}, Pid: pid})
	wantCode(t, "of an ended process", err, codes.NotFound)
}

func TestADelegateGetsAllBundles(t *testing.T) {
	a, _ := startDelegated(t)
	client := delegatedv1.NewDelegatedIdentityClient(a.conn)
	x, err := client.SubscribeToX509Bundles(bounded(t), &delegatedv1.SubscribeToX509BundlesRequest{})
	must(t, err)
	j, err := client.SubscribeToJWTBundles(bounded(t), &delegatedv1.SubscribeToJWTBundlesRequest{})
	must(t, err)
	own := []string{"spiffe://example.org"}
	if got := slices.Collect(maps.Keys(recv(t, x).CaCertificates)); !slices.Equal(got, own) {
		t.Errorf("X.509 bundles of %v", got)
	}
	if got := slices.Collect(maps.Keys(recv(t, j).Bundles)); !slices.Equal(got, own) {
		t.Errorf("JWT bundles of %v", got)
	}
	a.held.Apply(a.Complete(a.ForeignBundle("other.org")))
	both := []string{"spiffe://example.org", "spiffe://other.org"}
	m := recv(t, x).CaCertificates
	if got := slices.Sorted(maps.Keys(m)); !slices.Equal(got, both) {
		t.Errorf("X.509 bundles of %v", got)
	}
	if _, err := x509.ParseCertificates(m["spiffe://other.org"]); err != nil {
		t.Error(err)
	}
	if got := slices.Sorted(maps.Keys(recv(t, j).Bundles)); !slices.Equal(got, both) {
		t.Errorf("JWT bundles of %v", got)
	}
	a.held.Apply(a.Complete())
	if got := slices.Collect(maps.Keys(recv(t, x).CaCertificates)); !slices.Equal(got, own) {
		t.Errorf("after the foreign one was taken away: %v", got)
	}
}

func TestNoDelegateGetsAnAdministratorsOrADownstreamsSVID(t *testing.T) {
	a, _ := startDelegated(t)
	a.Entry("operator", func(e *entry.Entry) { e.Admin = true; e.Hint = "x" }, "unix:uid:7")
	a.Entry("below", func(e *entry.Entry) { e.Downstream = true }, "unix:uid:7")
	a.Entry("stored", func(e *entry.Entry) { e.StoreSVID = true }, "unix:uid:7")
	a.Entry("web", func(e *entry.Entry) { e.Hint = "x" }, "unix:uid:7")
	a.held.Apply(a.Complete())
	if got := pathsOf(recv(t, a.follow(t, bySelectors("unix:uid:7")))); !slices.Equal(got, []string{"/web"}) {
		t.Errorf("got %v", got)
	}
}

// everyDelegatedCall makes each call of the API.
func everyDelegatedCall(t *testing.T, conn *grpc.ClientConn) map[string]error {
	t.Helper()
	client := delegatedv1.NewDelegatedIdentityClient(conn)
	out := make(map[string]error)
	_, out["SubscribeToX509SVIDs"] = svids(bounded(t), conn, bySelectors("unix:uid:7"))
	_, out["SubscribeToX509SVIDs by pid"] = svids(bounded(t), conn, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: int32(os.Getpid())})
	_, out["FetchJWTSVIDs"] = client.FetchJWTSVIDs(bounded(t), &delegatedv1.FetchJWTSVIDsRequest{Audience: []string{"x"}, Selectors: wire("unix:uid:7")})
	x, err := client.SubscribeToX509Bundles(bounded(t), &delegatedv1.SubscribeToX509BundlesRequest{})
	must(t, err)
	_, out["SubscribeToX509Bundles"] = x.Recv()
	j, err := client.SubscribeToJWTBundles(bounded(t), &delegatedv1.SubscribeToJWTBundlesRequest{})
	must(t, err)
	_, out["SubscribeToJWTBundles"] = j.Recv()
	return out
}

func TestOnlyAnAuthorizedDelegateMayAskForOthers(t *testing.T) {
	self := fmt.Sprint("unix:pid:", os.Getpid())
	for name, c := range map[string]struct {
		delegates []spiffeid.ID
		path      string // of this process's identity
	}{
		"root, without delegates":          {nil, "/delegate"},
		"a process without an entry":       {[]spiffeid.ID{delegate}, ""},
		"a process with another identity":  {[]spiffeid.ID{delegate}, "/delegated"},
		"an identity below the delegate's": {[]spiffeid.ID{delegate}, "/delegate/x"},
	} {
		t.Run(name, func(t *testing.T) {
			a := startWith(t, func(o *admin.Options) { o.Delegates = c.delegates })
			a.Entry("web", nil, "unix:uid:7")
			if c.path != "" {
				a.Entry("self", func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(heldtest.TrustDomain, c.path) }, self)
			}
			a.held.Apply(a.Complete())
			for method, err := range everyDelegatedCall(t, a.conn) {
				if s := status.Convert(err); s.Code() != codes.PermissionDenied || s.Message() != "no identity issued" {
					t.Errorf("%s: %v", method, err)
				}
			}
		})
	}
	t.Run("a delegate", func(t *testing.T) {
		a, _ := startDelegated(t)
		a.Entry("web", nil, "unix:uid:7")
		a.held.Apply(a.Complete())
		for method, err := range everyDelegatedCall(t, a.conn) {
			if err != nil {
				t.Errorf("%s: %v", method, err)
			}
		}
	})
}

func TestADelegateWhoseEntryIsDeletedLosesItsStreamsAtOnce(t *testing.T) {
	a, e := startDelegated(t)
	pid, _ := process(t)
	a.Entry("web", nil, "unix:uid:7")
	a.Entry("process", nil, fmt.Sprint("unix:pid:", pid))
	a.held.Apply(a.Complete())
	bundles, err := delegatedv1.NewDelegatedIdentityClient(a.conn).SubscribeToX509Bundles(bounded(t), &delegatedv1.SubscribeToX509BundlesRequest{})
	must(t, err)
	recv(t, bundles)
	x, y := a.follow(t, bySelectors("unix:uid:7")), a.follow(t, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: pid})
	recv(t, x)
	recv(t, y)
	a.Delete(e)
	a.Entry("web2", nil, "unix:uid:7") // in the same change: it must not be sent
	a.held.Apply(a.Complete(a.ForeignBundle("other.org")))
	_, err = bundles.Recv()
	wantCode(t, "bundles", err, codes.PermissionDenied)
	_, err = x.Recv()
	wantCode(t, "X509-SVIDs by selectors", err, codes.PermissionDenied)
	_, err = y.Recv()
	wantCode(t, "X509-SVIDs by PID", err, codes.PermissionDenied)
	for method, err := range everyDelegatedCall(t, a.conn) {
		wantCode(t, method, err, codes.PermissionDenied)
	}
}

func TestADelegatesRequestsAreChecked(t *testing.T) {
	a, _ := startDelegated(t)
	many := make([]string, 1001)
	for i := range many {
		many[i] = fmt.Sprint("unix:uid:", i)
	}
	for name, r := range map[string]*delegatedv1.SubscribeToX509SVIDsRequest{
		"neither":                    {},
		"both":                       {Selectors: wire("unix:uid:7"), Pid: 1},
		"a negative PID":             {Pid: -1},
		"a selector without a type":  {Selectors: []*types.Selector{{Value: "x"}}},
		"a selector without a value": {Selectors: []*types.Selector{{Type: "unix"}}},
		"a colon in a type":          {Selectors: []*types.Selector{{Type: "a:b", Value: "x"}}},
		"an empty selector":          {Selectors: []*types.Selector{{}}},
		"too many":                   {Selectors: wire(many...)},
	} {
		_, err := svids(bounded(t), a.conn, r)
		wantCode(t, name, err, codes.InvalidArgument)
	}
	for name, r := range map[string]*delegatedv1.FetchJWTSVIDsRequest{
		"no audience":       {Pid: 1},
		"an empty audience": {Pid: 1, Audience: []string{""}},
		"neither":           {Audience: []string{"x"}},
		"both":              {Audience: []string{"x"}, Selectors: wire("unix:uid:7"), Pid: 1},
	} {
		_, err := delegatedv1.NewDelegatedIdentityClient(a.conn).FetchJWTSVIDs(bounded(t), r)
		wantCode(t, name, err, codes.InvalidArgument)
	}
}

func TestADelegatesStreamsAreBounded(t *testing.T) {
	a, _ := startDelegated(t, func(o *admin.Options) { o.Limits = endpoint.Limits{StreamsOfUser: 3} })
	for range 3 {
		recv(t, a.follow(t, bySelectors("unix:uid:7")))
	}
	_, err := a.follow(t, bySelectors("unix:uid:7")).Recv()
	wantCode(t, "the fourth", err, codes.Unavailable)
}

func TestADelegateWaitsUntilTheAgentIsInStep(t *testing.T) {
	a := startWith(t, func(o *admin.Options) { o.Delegates = []spiffeid.ID{delegate} })
	_, err := svids(bounded(t), a.conn, bySelectors("unix:uid:7"))
	wantCode(t, "before anything is known", err, codes.Unavailable)
	a.held.Apply(held.Change{Complete: true, Entries: []*entry.Entry{a.Entry("delegate", nil, fmt.Sprint("unix:pid:", os.Getpid()))}})
	for _, method := range []string{"SubscribeToX509Bundles", "SubscribeToJWTBundles"} {
		wantCode(t, method, everyDelegatedCall(t, a.conn)[method], codes.Unavailable)
	}
}

// runAs runs a role of the test binary and returns what it printed.
func (a *agent) runAs(t *testing.T, role string, attr *syscall.SysProcAttr, running func(pid int)) string {
	t.Helper()
	harness.NeedRoot(t)
	dir, err := os.MkdirTemp("", "delegate-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	program, err := os.ReadFile(os.Args[0])
	must(t, err)
	bin := filepath.Join(dir, "delegate")
	harness.WriteProgram(t, bin, program)
	for d := filepath.Dir(a.path); d != "/tmp" && d != "/"; d = filepath.Dir(d) {
		must(t, os.Chmod(d, 0o755))
	}
	// It starts once its entry is there.
	cmd := exec.Command("/bin/sh", "-c", `read line; exec "$0"`, bin)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", roleEnv+"="+role+" "+a.path)
	cmd.Dir, cmd.Stderr, cmd.SysProcAttr = "/", os.Stderr, attr
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	running(cmd.Process.Pid)
	_, err = io.WriteString(in, "go\n")
	must(t, err)
	line, err := bufio.NewReader(out).ReadString('\n')
	must(t, err)
	must(t, cmd.Wait())
	return strings.TrimSpace(line)
}

func TestADelegateOfAnotherUserMayDoNothingElse(t *testing.T) {
	const uid = 61020
	other := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	a, _ := startDelegated(t)
	a.Entry("web", nil, "unix:uid:7")
	must(t, os.Chmod(a.path, 0o666)) // as if it were in the socket's group
	got := a.runAs(t, "delegate", other, func(pid int) {
		a.Update(a.Entry("other", nil, "unix:uid:0"), func(e *entry.Entry) {
			e.SPIFFEID, e.Selectors = delegate, heldtest.Selectors(fmt.Sprint("unix:pid:", pid))
		})
		a.held.Apply(a.Complete())
	})
	if want := "delegated OK status PermissionDenied explain PermissionDenied debug PermissionDenied logger PermissionDenied reflection PermissionDenied"; got != want {
		t.Errorf("a delegate got\n%s\nwant\n%s", got, want)
	}
	got = a.runAs(t, "delegate", other, func(int) {})
	if want := "delegated PermissionDenied status PermissionDenied explain PermissionDenied debug PermissionDenied logger PermissionDenied reflection PermissionDenied"; got != want {
		t.Errorf("another process of its user got\n%s\nwant\n%s", got, want)
	}
	without := start(t)
	without.held.Apply(without.Complete())
	must(t, os.Chmod(without.path, 0o666))
	if got := without.runAs(t, "delegate", other, func(int) {}); !strings.HasPrefix(got, "delegated Unavailable status Unavailable") {
		t.Errorf("where there are no delegates, its connection is not refused: %s", got)
	}
}

func TestAPIDOfAnotherNamespaceIsNotTakenForOneOfOurs(t *testing.T) {
	a, _ := startDelegated(t)
	a.Entry("init", nil, "unix:pid:1")
	got := a.runAs(t, "by-pid", &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, func(pid int) {
		a.Update(a.Entry("other", nil, "unix:uid:0"), func(e *entry.Entry) {
			e.SPIFFEID, e.Selectors = delegate, heldtest.Selectors(fmt.Sprint("unix:pid:", pid))
		})
		a.held.Apply(a.Complete())
	})
	if !strings.HasPrefix(got, "delegated InvalidArgument ") {
		t.Errorf("got %s", got)
	}
}
