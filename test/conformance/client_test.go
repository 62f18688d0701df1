package conformance

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/test/harness"
)

// fetchFunc answers the client's call of a number, from 1.
type fetchFunc func(call int64, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error

// standIn is a Workload API that answers clients as a test wants and counts
// what they do.
type standIn struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	socket string
	fetch  fetchFunc

	calls, validated, bare atomic.Int64
}

func newStandIn(t testing.TB, fetch fetchFunc) *standIn {
	t.Helper()
	s := &standIn{fetch: fetch}
	s.socket = serveWorkload(t, s)
	return s
}

// serveWorkload serves a Workload API until the test ends, and returns its
// socket.
func serveWorkload(t testing.TB, api workload.SpiffeWorkloadAPIServer) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "w.sock")
	l, err := net.Listen("unix", socket)
	must(t, err)
	g := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(g, api)
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-served })
	return socket
}

func (s *standIn) check(ctx context.Context) {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("workload.spiffe.io"); len(v) != 1 || v[0] != "true" {
		s.bare.Add(1)
	}
}

func (s *standIn) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	s.check(stream.Context())
	return s.fetch(s.calls.Add(1), stream)
}

func (s *standIn) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	s.check(ctx)
	s.validated.Add(1)
	return nil, status.Error(codes.InvalidArgument, "no such token")
}

// watch starts `hallmark fetch x509 --watch`, which finds the endpoint in its
// environment.
func (s *standIn) watch(t testing.TB) *harness.Process {
	t.Helper()
	return harness.Command{Args: []string{"fetch", "x509", "--watch", "-o", "json"}, Env: []string{"SPIFFE_ENDPOINT_SOCKET=unix://" + s.socket}}.Start(t)
}

// after waits until the client has called so often, and says how long it took.
func (s *standIn) after(t testing.TB, calls int64) time.Duration {
	t.Helper()
	began := time.Now()
	harness.Eventually(t, "calls of the client", func(context.Context) error {
		if n := s.calls.Load(); n < calls {
			return status.Errorf(codes.Unavailable, "so far %d", n)
		}
		return nil
	})
	return time.Since(began)
}

func TestEndpoint_E06_E11_A38_ClientsFindTheEndpointAndSendTheHeader(t *testing.T) {
	s := newStandIn(t, func(int64, grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
		return status.Error(codes.PermissionDenied, "no identity")
	})
	env := []string{"SPIFFE_ENDPOINT_SOCKET=unix://" + s.socket}
	if _, _, code := (harness.Command{Args: []string{"fetch", "x509"}, Env: env}).Try(t); code != 4 {
		t.Errorf("exit status %d", code)
	}
	harness.Command{Args: []string{"validate", "jwt", "a.b.c", "--audience", "us"}, Env: env}.Try(t)
	if s.calls.Load() != 1 || s.validated.Load() != 1 || s.bare.Load() != 0 {
		t.Errorf("%d fetches, %d validations, %d calls without the header", s.calls.Load(), s.validated.Load(), s.bare.Load())
	}
}

func TestEndpoint_E18_AnInvalidCallIsNotRepeated(t *testing.T) {
	s := newStandIn(t, func(int64, grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
		return status.Error(codes.InvalidArgument, "no")
	})
	if code := s.watch(t).Wait(t); code == 0 {
		t.Error("the command succeeded")
	}
	if n := s.calls.Load(); n != 1 {
		t.Errorf("it called %d times", n)
	}
}

func TestEndpoint_E20_E22_ClientsTryAgainAndNotAtOnce(t *testing.T) {
	for _, code := range []codes.Code{codes.Unavailable, codes.PermissionDenied} {
		t.Run(code.String(), func(t *testing.T) {
			t.Parallel()
			s := newStandIn(t, func(int64, grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
				return status.Error(code, "not now")
			})
			s.watch(t)
			s.after(t, 1)
			if took := s.after(t, 3); took < time.Second {
				t.Errorf("it called twice more within %v", took)
			}
		})
	}
}

func TestWorkloadAPI_A04_A12_AClientComesAgainAndKeepsWhatItHas(t *testing.T) {
	w := theWorld(t)
	good := w.fetch(t, "/self")
	s := newStandIn(t, func(call int64, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
		switch call {
		case 1: // then the stream ends
			return stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{good}})
		case 2: // without what is mandatory
			if err := stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{SpiffeId: good.SpiffeId}}}); err != nil {
				return err
			}
		}
		<-stream.Context().Done()
		return nil
	})
	p := s.watch(t)
	s.after(t, 2)
	p.WaitOutput(t, "trying again")
	if n := strings.Count(p.Stdout(), good.SpiffeId); n != 1 {
		t.Errorf("the SVID was printed %d times:\n%s", n, p.Stdout())
	}
}

func TestEndpoint_E12_E13_E14_AddressesOfOtherFormsAreRefused(t *testing.T) {
	for _, address := range []string{
		"http://127.0.0.1:1", "npipe://x", "unix://host/path", "unix:relative", "unix:///path?query", "unix:///path#fragment", "unix://u@/path", "unix:",
		"tcp://localhost:1", "tcp://127.0.0.1", "tcp://127.0.0.1:1/path", "tcp://127.0.0.1:1?query", "tcp://u@127.0.0.1:1",
	} {
		t.Run(address, func(t *testing.T) {
			_, stderr, code := harness.Command{Args: []string{"fetch", "x509"}, Env: []string{"SPIFFE_ENDPOINT_SOCKET=" + address}}.Try(t)
			if code != 2 || !strings.Contains(stderr, "write unix:///PATH or tcp://ADDRESS:PORT") {
				t.Errorf("exit status %d, %s", code, stderr)
			}
		})
	}
}
