package workloadapi_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	agentworkload "github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/agent/workloadapi"
	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/unix"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

// agent is a Workload API on a socket, what it serves, and a client of it.
type agent struct {
	api *workloadapi.Server
	*heldtest.Server
	held   *held.Held
	path   string
	conn   *grpc.ClientConn
	client workload.SpiffeWorkloadAPIClient
	log    *lines
	t      testing.TB

	mu       sync.Mutex
	is       []string // the selectors that the attestor gives
	attested int
	err      error
	panics   bool
	now      time.Time // zero: by the clock
}

// Attest gives the selectors that the test wants.
func (a *agent) Attest(context.Context, attestors.Process) ([]selector.Selector, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.attested++
	if a.panics {
		panic("a bug")
	}
	return heldtest.Selectors(a.is...), a.err
}

func (a *agent) isNow(selectors ...string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.is = selectors
}

func (a *agent) clock() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now.IsZero() {
		return time.Now()
	}
	return a.now
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

type option func(*workloadapi.Options)

// start starts an agent whose attestor takes every process for uid 1.
func start(t testing.TB, options ...option) *agent {
	t.Helper()
	a := &agent{Server: heldtest.New(t), is: []string{"unix:uid:1"}, path: filepath.Join(t.TempDir(), "s"), log: &lines{}, t: t}
	log := slog.New(slog.NewTextHandler(a.log, nil))
	a.held = held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: a.Server, Log: log})
	l, err := peercred.Listen(a.path, workloadapi.SocketMode)
	must(t, err)
	o := workloadapi.Options{
		Listener: l, Held: a.held, Now: a.clock, Log: log,
		Attestor: agentworkload.New(agentworkload.Options{Attestors: map[string]attestors.Workload{"unix": a}, Log: log}),
	}
	for _, change := range options {
		change(&o)
	}
	api := workloadapi.New(o)
	a.api = api
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.held.Run(ctx) })
	wg.Go(func() {
		if err := api.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	a.conn = a.dial()
	a.client = workload.NewSpiffeWorkloadAPIClient(a.conn)
	return a
}

// realUnix attests by what the process really is.
func realUnix(t testing.TB) option {
	attestor, err := unix.New(unix.Config{})
	must(t, err)
	return func(o *workloadapi.Options) {
		o.Attestor = agentworkload.New(agentworkload.Options{Attestors: map[string]attestors.Workload{"unix": attestor}})
	}
}

func (a *agent) dial() *grpc.ClientConn {
	a.t.Helper()
	conn, err := grpc.NewClient("unix://"+a.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(a.t, err)
	a.t.Cleanup(func() { conn.Close() })
	return conn
}

// sync applies all that the server has.
func (a *agent) sync(more ...*bundle.Bundle) { a.held.Apply(a.Complete(more...)) }

// call returns a context for a call, with the header and a bound.
func (a *agent) call() context.Context {
	return metadata.AppendToOutgoingContext(a.bare(), workloadapi.Header, "true")
}

func (a *agent) bare() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	a.t.Cleanup(cancel)
	return ctx
}

// x509 opens a stream of X509-SVIDs.
func (a *agent) x509() grpc.ServerStreamingClient[workload.X509SVIDResponse] {
	a.t.Helper()
	s, err := a.client.FetchX509SVID(a.call(), &workload.X509SVIDRequest{})
	must(a.t, err)
	return s
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

func wantCode(t testing.TB, err error, code codes.Code) {
	t.Helper()
	if got := status.Code(err); got != code {
		t.Errorf("error is %v, want code %v", err, code)
	}
}

func idsOf(m *workload.X509SVIDResponse) []string {
	var out []string
	for _, s := range m.Svids {
		out = append(out, strings.TrimPrefix(s.SpiffeId, "spiffe://example.org/"))
	}
	return out
}

func wantIDs(t testing.TB, m *workload.X509SVIDResponse, want ...string) {
	t.Helper()
	if got := idsOf(m); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// verifyX509 checks a message as a workload would.
func (a *agent) verifyX509(m *workload.X509SVIDResponse) {
	a.t.Helper()
	for _, s := range m.Svids {
		certs, err := x509.ParseCertificates(s.X509Svid)
		must(a.t, err)
		key, err := x509.ParsePKCS8PrivateKey(s.X509SvidKey)
		must(a.t, err)
		if !key.(*ecdsa.PrivateKey).PublicKey.Equal(certs[0].PublicKey) {
			a.t.Error("the key is not that of the certificate")
		}
		roots, err := x509.ParseCertificates(s.Bundle)
		must(a.t, err)
		pool := x509.NewCertPool()
		for _, r := range roots {
			pool.AddCert(r)
		}
		if _, err := certs[0].Verify(x509.VerifyOptions{Roots: pool}); err != nil {
			a.t.Error(err)
		}
		if certs[0].URIs[0].String() != s.SpiffeId {
			a.t.Errorf("%s got a certificate of %v", s.SpiffeId, certs[0].URIs)
		}
	}
}

func TestARealClientGetsEverything(t *testing.T) {
	a := start(t)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	a.Entry("web", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other}; e.Hint = "internal" }, "unix:uid:1")
	a.sync(a.ForeignBundle("other.org"))
	ctx, addr := a.bare(), spiffe.WithAddr("unix://"+a.path)

	source, err := spiffe.NewX509Source(ctx, spiffe.WithClientOptions(addr))
	must(t, err)
	defer source.Close()
	svid, err := source.GetX509SVID()
	must(t, err)
	if svid.ID.String() != "spiffe://example.org/web" || svid.Hint != "internal" {
		t.Errorf("X509-SVID is of %v, hint %q", svid.ID, svid.Hint)
	}
	for _, td := range []spiffeid.TrustDomain{heldtest.TrustDomain, other} {
		if _, err := source.GetX509BundleForTrustDomain(td); err != nil {
			t.Error(err)
		}
	}
	jwts, err := spiffe.NewJWTSource(ctx, spiffe.WithClientOptions(addr))
	must(t, err)
	defer jwts.Close()
	if _, err := jwts.GetJWTBundleForTrustDomain(other); err != nil {
		t.Error(err)
	}
	client, err := spiffe.New(ctx, addr)
	must(t, err)
	defer client.Close()
	bundles, err := client.FetchX509Bundles(ctx)
	must(t, err)
	if bundles.Len() != 2 {
		t.Errorf("%d X.509 bundles", bundles.Len())
	}
}

func TestWorkloadEndpoint_E07_E08_TheHeaderIsDemandedOfEveryCall(t *testing.T) {
	a := start(t)
	a.Entry("web", nil, "unix:uid:1")
	a.sync()
	methods := map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			s, err := a.client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			must(t, err)
			_, err = s.Recv()
			return err
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			s, err := a.client.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			must(t, err)
			_, err = s.Recv()
			return err
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			s, err := a.client.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			must(t, err)
			_, err = s.Recv()
			return err
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := a.client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"x"}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := a.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: a.jwt("x").Svids[0].Svid})
			return err
		},
	}
	for method, call := range methods {
		t.Run(method, func(t *testing.T) {
			must(t, call(a.call()))
			wantCode(t, call(a.bare()), codes.InvalidArgument)
			for _, values := range [][]string{{"TRUE"}, {"1"}, {""}, {"false"}, {"false", "true"}, {"true", "true"}, {"true,true"}, {"x"}} {
				ctx := a.bare()
				for _, v := range values {
					ctx = metadata.AppendToOutgoingContext(ctx, workloadapi.Header, v)
				}
				if err := call(ctx); status.Code(err) != codes.InvalidArgument {
					t.Errorf("%q: error is %v", values, err)
				}
			}
		})
	}
}

func TestWorkloadEndpoint_E19_AnAgentThatIsNotReadyIsUnavailable(t *testing.T) {
	a := start(t)
	_, err := a.x509().Recv()
	wantCode(t, err, codes.Unavailable)
	_, err = a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}})
	wantCode(t, err, codes.Unavailable)
	a.held.Apply(held.Change{Complete: true, Entries: []*entry.Entry{a.Entry("web", nil, "unix:uid:1")}})
	for _, err := range []error{
		second(a.client.FetchJWTBundles(a.call(), &workload.JWTBundlesRequest{})),
		second(a.client.FetchX509Bundles(a.call(), &workload.X509BundlesRequest{})),
	} {
		wantCode(t, err, codes.Unavailable) // the own bundle is not known
	}
}

func second[T any](s grpc.ServerStreamingClient[T], err error) error {
	if err != nil {
		return err
	}
	_, err = s.Recv()
	return err
}

func TestWorkloadEndpoint_E21_A23_A26_NobodyWithoutAnEntryGetsAnything(t *testing.T) {
	a := start(t)
	a.Entry("of-others", nil, "unix:uid:2")
	a.Entry("of-more", nil, "unix:uid:1", "unix:gid:7")
	a.Entry("stored", func(e *entry.Entry) { e.StoreSVID = true }, "unix:uid:1")
	a.sync()
	_, x := a.x509().Recv()
	_, j := a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}})
	_, v := a.client.ValidateJWTSVID(a.call(), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: "x"})
	for _, err := range []error{
		x, j, v,
		second(a.client.FetchJWTBundles(a.call(), &workload.JWTBundlesRequest{})),
		second(a.client.FetchX509Bundles(a.call(), &workload.X509BundlesRequest{})),
	} {
		if s := status.Convert(err); s.Code() != codes.PermissionDenied || s.Message() != "no identity issued" {
			t.Errorf("error is %v", err)
		}
	}
	if n := a.log.count("no entry matches its selectors"); n != 1 {
		t.Errorf("the reason is %d times in the log, want once", n)
	}
	if a.log.count("[unix:uid:1]") != 1 {
		t.Error("the selectors are not in the log")
	}
}

func TestWorkloadEndpoint_E23_W41_UnknownAndIncubatingCallsAreUnimplemented(t *testing.T) {
	a := start(t)
	a.sync()
	for _, method := range []string{"/SpiffeWorkloadAPI/FetchNothing", "/spiffe.broker.API/FetchX509SVID", "/x/y"} {
		err := a.conn.Invoke(a.call(), method, &workload.X509SVIDRequest{}, &workload.X509SVIDResponse{})
		wantCode(t, err, codes.Unimplemented)
	}
	wantCode(t, second(a.client.FetchWITSVID(a.call(), &workload.WITSVIDRequest{})), codes.Unimplemented)
	wantCode(t, second(a.client.FetchWITBundles(a.call(), &workload.WITBundlesRequest{})), codes.Unimplemented)
}

func TestWorkloadEndpoint_E09_E24_E27_ReflectionTellsTheStandardService(t *testing.T) {
	a := start(t)
	a.sync()
	ask := func(ctx context.Context) (*reflectionpb.ServerReflectionResponse, error) {
		s, err := reflectionpb.NewServerReflectionClient(a.conn).ServerReflectionInfo(ctx)
		must(t, err)
		s.Send(&reflectionpb.ServerReflectionRequest{ // it fails if the call was refused already; Recv says why
			MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "SpiffeWorkloadAPI"},
		})
		return s.Recv()
	}
	_, err := ask(a.bare())
	wantCode(t, err, codes.InvalidArgument)
	m, err := ask(a.call())
	must(t, err)
	var file descriptorpb.FileDescriptorProto
	must(t, proto.Unmarshal(m.GetFileDescriptorResponse().FileDescriptorProto[0], &file))
	if len(file.Service) != 1 || len(file.Service[0].Method) != 7 || file.GetPackage() != "" {
		t.Errorf("services are %v", file.Service)
	}
	stream, err := reflectionpb.NewServerReflectionClient(a.conn).ServerReflectionInfo(a.call())
	must(t, err)
	must(t, stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}))
	list, err := stream.Recv()
	must(t, err)
	var names []string
	for _, s := range list.GetListServicesResponse().Service {
		names = append(names, s.Name)
	}
	if want := []string{"SpiffeWorkloadAPI", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}; !slices.Equal(names, want) {
		t.Errorf("services are %v", names)
	}
}

func TestWorkloadEndpoint_E29_SelectorsAreOfOneConnectionAndNotForLong(t *testing.T) {
	a := start(t)
	a.Entry("one", nil, "unix:uid:1")
	a.Entry("two", nil, "unix:uid:2")
	a.sync()
	a.now = time.Now()
	wantIDs(t, recv(t, a.x509()), "one")
	a.isNow("unix:uid:2")
	for range 5 {
		wantIDs(t, recv(t, a.x509()), "one")
	}
	if a.attested != 1 {
		t.Errorf("attested %d times", a.attested)
	}
	another := workload.NewSpiffeWorkloadAPIClient(a.dial())
	s, err := another.FetchX509SVID(a.call(), &workload.X509SVIDRequest{})
	must(t, err)
	wantIDs(t, recv(t, s), "two")
	a.mu.Lock()
	a.now = a.now.Add(5 * time.Second)
	a.mu.Unlock()
	wantIDs(t, recv(t, a.x509()), "two")
}

func TestAnAttestorThatFailsIsAskedAgainByTheNextCall(t *testing.T) {
	a := start(t)
	a.Entry("one", nil, "unix:uid:1")
	a.sync()
	a.err, a.panics = nil, true
	_, err := a.x509().Recv()
	wantCode(t, err, codes.PermissionDenied)
	a.mu.Lock()
	a.err, a.panics = errors.New("in part"), false
	a.mu.Unlock()
	wantIDs(t, recv(t, a.x509()), "one")
	wantIDs(t, recv(t, a.x509()), "one")
	if a.attested != 3 {
		t.Errorf("attested %d times", a.attested)
	}
}

func TestConnectionsStreamsAndCallsAreBounded(t *testing.T) {
	t.Run("connections", func(t *testing.T) {
		a := start(t, func(o *workloadapi.Options) { o.Limits.ConnectionsOfPID = 2 })
		a.Entry("web", nil, "unix:uid:1")
		a.sync()
		recv(t, a.x509())
		second := a.dial()
		s, err := workload.NewSpiffeWorkloadAPIClient(second).FetchX509SVID(a.call(), &workload.X509SVIDRequest{})
		must(t, err)
		recv(t, s)
		third := workload.NewSpiffeWorkloadAPIClient(a.dial())
		_, err = third.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}})
		wantCode(t, err, codes.Unavailable)
		second.Close()
		_, err = third.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}}, grpc.WaitForReady(true))
		must(t, err)
	})
	t.Run("streams", func(t *testing.T) {
		a := start(t, func(o *workloadapi.Options) { o.Limits.StreamsOfUser = 3 })
		a.Entry("web", nil, "unix:uid:1")
		a.sync()
		for range 3 {
			recv(t, a.x509())
		}
		_, err := a.x509().Recv()
		wantCode(t, err, codes.Unavailable)
	})
	t.Run("streams, once the limit has changed", func(t *testing.T) {
		a := start(t, func(o *workloadapi.Options) { o.Limits.StreamsOfUser = 3 })
		a.Entry("web", nil, "unix:uid:1")
		a.sync()
		recv(t, a.x509())
		a.api.SetLimits(endpoint.Limits{StreamsOfUser: 1})
		_, err := a.x509().Recv()
		wantCode(t, err, codes.Unavailable)
		a.api.SetLimits(endpoint.Limits{})
		recv(t, a.x509())
	})
	t.Run("calls, once the limit has changed", func(t *testing.T) {
		a := start(t)
		a.Entry("web", nil, "unix:uid:1")
		a.sync()
		a.api.SetLimits(endpoint.Limits{CallsOfUser: 5})
		refused := 0
		for range 100 {
			if _, err := a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}}); err != nil {
				wantCode(t, err, codes.Unavailable)
				refused++
			}
		}
		if refused < 50 {
			t.Errorf("%d of 100 calls were refused", refused)
		}
	})
	t.Run("calls", func(t *testing.T) {
		a := start(t, func(o *workloadapi.Options) { o.Limits.CallsOfUser = 5 })
		a.Entry("web", nil, "unix:uid:1")
		a.sync()
		refused := 0
		for range 100 {
			if _, err := a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}}); err != nil {
				wantCode(t, err, codes.Unavailable)
				refused++
			}
		}
		if refused < 50 || refused > 95 {
			t.Errorf("%d of 100 calls were refused", refused)
		}
	})
	t.Run("messages", func(t *testing.T) {
		a := start(t)
		a.sync()
		_, err := a.client.ValidateJWTSVID(a.call(), &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: strings.Repeat("x", 65<<10)})
		wantCode(t, err, codes.ResourceExhausted)
		ctx := metadata.AppendToOutgoingContext(a.call(), "x", strings.Repeat("x", 17<<10))
		if _, err := a.client.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: "x"}); err == nil {
			t.Error("17 KiB of headers were taken")
		}
	})
}

func TestAnAgentThatStopsEndsItsStreams(t *testing.T) {
	a := &agent{}
	var stream grpc.ServerStreamingClient[workload.X509SVIDResponse]
	t.Run("agent", func(t *testing.T) {
		a = start(t)
		a.Entry("web", nil, "unix:uid:1")
		a.sync()
		ctx := metadata.AppendToOutgoingContext(context.Background(), workloadapi.Header, "true")
		conn, err := grpc.NewClient("unix://"+a.path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		must(t, err)
		stream, err = workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		must(t, err)
		recv(t, stream)
	})
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable || errors.Is(err, io.EOF) {
		t.Errorf("error is %v", err)
	}
}

func TestWhatAProcessIsGivenIsLoggedOnceAndWithoutTheSecret(t *testing.T) {
	a := start(t)
	a.Entry("web", nil, "unix:uid:1")
	a.sync()
	for range 3 {
		recv(t, a.x509())
	}
	var token string
	for range 3 {
		m, err := a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"shop"}})
		must(t, err)
		token = m.Svids[0].Svid
	}
	for _, text := range []string{`msg="X509-SVIDs given" pid=`, `msg="JWT-SVIDs given" pid=`} {
		harness.Eventually(t, text, func(context.Context) error { // what is sent is logged after
			if a.log.count(text) == 0 {
				return errors.New("it is not in the log")
			}
			return nil
		})
		if n := a.log.count(text); n != 1 {
			t.Errorf("%s is %d times in the log, want once", text, n)
		}
	}
	if a.log.count("spiffe_ids=[spiffe://example.org/web] audience=[shop]") != 1 {
		t.Error("the log does not say which JWT-SVID was given, and for whom")
	}
	if token == "" || a.log.count(token) != 0 {
		t.Error("the JWT-SVID is in the log")
	}
}
