package broker_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hallmark-id/hallmark/agent/broker"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

var (
	brokerID = spiffeid.RequireFromPath(heldtest.TrustDomain, "/broker")
	agentID  = spiffeid.RequireFromPath(heldtest.TrustDomain, "/the-agent")
)

// agent is a Broker API on a socket, what it serves, and this process, which is
// a broker as long as the entry for that is there.
type agent struct {
	*heldtest.Server
	held  *held.Held
	path  string
	log   *lines
	entry *entry.Entry // that makes this process the broker
	own   *x509svid.SVID
	conn  *grpc.ClientConn
	api   brokerpb.APIClient
	t     testing.TB

	mu       sync.Mutex
	identity *x509svid.SVID // of the agent
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

func (l *lines) count(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), text)
}

// Attest gives each process its PID as selector.
func (a *agent) Attest(_ context.Context, p attestors.Process) ([]selector.Selector, error) {
	return heldtest.Selectors(pidSelector(p.PID)), nil
}

func pidSelector(pid int32) string { return fmt.Sprint("unix:pid:", pid) }

// GetX509SVID is the agent's identity.
func (a *agent) GetX509SVID() (*x509svid.SVID, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.identity, nil
}

// start starts an agent for which this process is a broker.
func start(t testing.TB, options ...func(*broker.Options)) *agent {
	t.Helper()
	a := &agent{Server: heldtest.New(t), path: filepath.Join(t.TempDir(), "s"), log: &lines{}, t: t}
	log := slog.New(slog.NewTextHandler(a.log, nil))
	a.held = held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: a.Server, Log: log})
	l, err := peercred.Listen(a.path, broker.SocketMode)
	must(t, err)
	o := broker.Options{
		Listener: l, TrustDomain: heldtest.TrustDomain, Identity: a, Held: a.held, Log: log,
		Attestor: workload.New(workload.Options{Attestors: map[string]attestors.Workload{"unix": a}, Log: log}),
		Policies: []broker.Policy{{Broker: brokerID}},
	}
	for _, change := range options {
		change(&o)
	}
	api := broker.New(o)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.held.Run(ctx) })
	wg.Go(func() {
		if err := api.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	a.entry = a.Entry("broker", nil, pidSelector(int32(os.Getpid())))
	a.Entry("the-agent", nil, "test:agent")
	a.sync()
	a.identity, a.own = a.svid("test:agent"), a.svid(a.entry.Selectors.Strings()...)
	a.conn = a.dial(a.own)
	a.api = brokerpb.NewAPIClient(a.conn)
	return a
}

// sync applies all that the server has.
func (a *agent) sync(more ...*bundle.Bundle) { a.held.Apply(a.Complete(more...)) }

// svid has an X509-SVID signed for the one entry that has these selectors.
func (a *agent) svid(selectors ...string) *x509svid.SVID {
	a.t.Helper()
	sub := a.held.Subscribe(a.t.Context(), heldtest.Selectors(selectors...))
	defer sub.Close()
	for {
		u := sub.Update()
		if len(u.Identities) != 1 {
			a.t.Fatalf("%v has %d identities", selectors, len(u.Identities))
		}
		if got := u.Identities[0].SVID; got != nil {
			svid, err := x509svid.ParseRaw(got.Chain, got.Key)
			must(a.t, err)
			return svid
		}
		<-sub.C
	}
}

// roots is the bundle that a broker verifies the agent by.
func (a *agent) roots() *x509bundle.Bundle {
	b := x509bundle.New(heldtest.TrustDomain)
	for _, x := range a.Bundle().X509Authorities {
		b.AddX509Authority(x.Certificate)
	}
	return b
}

// dial connects as go-spiffe's users do, verifying that it is the agent who
// answers.
func (a *agent) dial(svid *x509svid.SVID) *grpc.ClientConn {
	return a.dialWith(credentials.NewTLS(tlsconfig.MTLSClientConfig(svid, a.roots(), tlsconfig.AuthorizeID(agentID))))
}

func (a *agent) dialWith(creds credentials.TransportCredentials) *grpc.ClientConn {
	a.t.Helper()
	conn, err := grpc.NewClient("unix://"+a.path, grpc.WithTransportCredentials(creds))
	must(a.t, err)
	a.t.Cleanup(func() { conn.Close() })
	return conn
}

// call returns a context for a call, with the header and a bound.
func (a *agent) call() context.Context {
	return metadata.AppendToOutgoingContext(a.bare(), broker.Header, "true")
}

func (a *agent) bare() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	a.t.Cleanup(cancel)
	return ctx
}

// process is a workload that lives until the test ends it.
func process(t testing.TB) (pid int32, end func()) {
	t.Helper()
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	end = func() { stdin.Close(); cmd.Wait() }
	t.Cleanup(end)
	return int32(cmd.Process.Pid), end
}

func packed(t testing.TB, m proto.Message) *brokerpb.WorkloadReference {
	t.Helper()
	any, err := anypb.New(m)
	must(t, err)
	return &brokerpb.WorkloadReference{Reference: any}
}

func pidReference(t testing.TB, pid int32) *brokerpb.WorkloadReference {
	t.Helper()
	return packed(t, &brokerpb.WorkloadPIDReference{Pid: pid})
}

// follow opens a stream of a process's X509-SVIDs.
func (a *agent) follow(pid int32) grpc.ServerStreamingClient[brokerpb.SubscribeToX509SVIDResponse] {
	a.t.Helper()
	s, err := a.api.SubscribeToX509SVID(a.call(), &brokerpb.SubscribeToX509SVIDRequest{Reference: pidReference(a.t, pid)})
	must(a.t, err)
	return s
}

// calls are all calls of the API about one reference; each returns the error of
// its first answer.
func calls(api brokerpb.APIClient, r *brokerpb.WorkloadReference) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"SubscribeToX509SVID": func(ctx context.Context) error {
			return first(api.SubscribeToX509SVID(ctx, &brokerpb.SubscribeToX509SVIDRequest{Reference: r}))
		},
		"SubscribeToX509Bundles": func(ctx context.Context) error {
			return first(api.SubscribeToX509Bundles(ctx, &brokerpb.SubscribeToX509BundlesRequest{Reference: r}))
		},
		"SubscribeToJWTBundles": func(ctx context.Context) error {
			return first(api.SubscribeToJWTBundles(ctx, &brokerpb.SubscribeToJWTBundlesRequest{Reference: r}))
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := api.FetchJWTSVID(ctx, &brokerpb.FetchJWTSVIDRequest{Reference: r, Audience: []string{"db"}})
			return err
		},
	}
}

func first[T any](s grpc.ServerStreamingClient[T], err error) error {
	if err != nil {
		return err
	}
	_, err = s.Recv()
	return err
}

func recv[T any](t testing.TB, s grpc.ServerStreamingClient[T]) *T {
	t.Helper()
	m, err := s.Recv()
	must(t, err)
	return m
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantCode(t testing.TB, what string, err error, code codes.Code) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("%s: error is %v, want code %v", what, err, code)
	}
}

// wantReason checks a code and what the error's google.rpc.ErrorInfo says.
func wantReason(t testing.TB, what string, err error, code codes.Code, reason string) {
	t.Helper()
	wantCode(t, what, err, code)
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			if info.Domain != "spiffe.io" || info.Reason != reason {
				t.Errorf("%s: the reason is %s of %s, want %s", what, info.Reason, info.Domain, reason)
			}
			return
		}
	}
	t.Errorf("%s: %v has no ErrorInfo", what, err)
}

func idsOf(m *brokerpb.SubscribeToX509SVIDResponse) []string {
	var out []string
	for _, s := range m.Svids {
		out = append(out, strings.TrimPrefix(s.SpiffeId, "spiffe://example.org/"))
	}
	return out
}

// plain is a connection to the socket that no TLS was spoken on.
func (a *agent) plain() net.Conn {
	a.t.Helper()
	c, err := net.Dial("unix", a.path)
	must(a.t, err)
	a.t.Cleanup(func() { c.Close() })
	return c
}

func certificates(t testing.TB, der []byte) []*x509.Certificate {
	t.Helper()
	certs, err := x509.ParseCertificates(der)
	must(t, err)
	return certs
}
