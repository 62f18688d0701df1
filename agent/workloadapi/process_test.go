package workloadapi_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/workloadapi"
)

// The test binary is also the workloads.
const roleEnv = "WORKLOADAPI_TEST_ROLE"

func TestMain(m *testing.M) {
	role := strings.Fields(os.Getenv(roleEnv))
	if len(role) == 0 {
		os.Exit(m.Run())
	}
	switch role[0] {
	case "parent": // connects, leaves the connection to a child, and lives until stdin ends
		conn, err := net.Dial("unix", role[1])
		check(err)
		f, err := conn.(*net.UnixConn).File()
		check(err)
		child := helper("child")
		child.ExtraFiles = []*os.File{f}
		child.Stdout = os.Stdout
		check(child.Start())
		io.Copy(io.Discard, os.Stdin)
	case "child": // uses the connection it was left
		conn, err := net.FileConn(os.NewFile(3, "inherited"))
		check(err)
		inherited := grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return conn, nil })
		stream, err := client("passthrough:inherited", inherited).FetchX509SVID(withHeader(), &workload.X509SVIDRequest{})
		check(err)
		m, err := stream.Recv()
		check(err)
		fmt.Println(m.Svids[0].SpiffeId)
		_, err = stream.Recv()
		fmt.Println(status.Code(err))
	case "load": // makes calls: kind, socket, how many
		n, err := strconv.Atoi(role[3])
		check(err)
		call := loads[role[1]]
		reused := client("unix://" + role[2])
		check(call(role[2], reused))
		fmt.Println("ready")
		bufio.NewReader(os.Stdin).ReadString('\n')
		for range n {
			check(call(role[2], reused))
		}
		fmt.Println("done")
	}
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func client(target string, options ...grpc.DialOption) workload.SpiffeWorkloadAPIClient {
	conn, err := grpc.NewClient(target, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	check(err)
	return workload.NewSpiffeWorkloadAPIClient(conn)
}

func withHeader() context.Context {
	return metadata.AppendToOutgoingContext(context.Background(), workloadapi.Header, "true")
}

func helper(role ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", roleEnv+"="+strings.Join(role, " "))
	cmd.Stderr = os.Stderr
	return cmd
}

func TestWorkloadEndpoint_E29_AStreamEndsWithItsProcessThoughAChildHoldsTheConnection(t *testing.T) {
	a := start(t)
	a.Entry("web", nil, "unix:uid:1")
	a.sync()
	parent := helper("parent", a.path)
	stdin, err := parent.StdinPipe()
	must(t, err)
	r, w, err := os.Pipe()
	must(t, err)
	parent.Stdout = w
	must(t, parent.Start())
	w.Close()
	out := bufio.NewReader(r)
	line, err := out.ReadString('\n')
	must(t, err)
	if line != "spiffe://example.org/web\n" {
		t.Errorf("while its parent lives the child got %q", line)
	}
	stdin.Close()
	must(t, parent.Wait())
	if line, err = out.ReadString('\n'); err != nil || line != "Unavailable\n" {
		t.Errorf("after its parent ended the child got %q, %v", line, err)
	}
}

var loads = map[string]func(path string, reused workload.SpiffeWorkloadAPIClient) error{
	"x509-reused": func(_ string, c workload.SpiffeWorkloadAPIClient) error { return firstX509(c) },
	"x509-new": func(path string, _ workload.SpiffeWorkloadAPIClient) error {
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		return firstX509(workload.NewSpiffeWorkloadAPIClient(conn))
	},
	"jwt-cached": func(_ string, c workload.SpiffeWorkloadAPIClient) error {
		_, err := c.FetchJWTSVID(withHeader(), &workload.JWTSVIDRequest{Audience: []string{"x"}})
		return err
	},
}

func firstX509(c workload.SpiffeWorkloadAPIClient) error {
	ctx, cancel := context.WithCancel(withHeader())
	defer cancel()
	s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		return err
	}
	_, err = s.Recv()
	return err
}

func BenchmarkFetchX509SVIDReusedConnection(b *testing.B) { benchmark(b, "x509-reused") }
func BenchmarkFetchX509SVIDNewConnection(b *testing.B)    { benchmark(b, "x509-new") }
func BenchmarkFetchJWTSVIDCached(b *testing.B)            { benchmark(b, "jwt-cached") }

// The floor: gRPC alone, with a response of the same size.
func BenchmarkFloorStreamReusedConnection(b *testing.B) { floor(b, "x509-reused") }
func BenchmarkFloorStreamNewConnection(b *testing.B)    { floor(b, "x509-new") }
func BenchmarkFloorUnary(b *testing.B)                  { floor(b, "jwt-cached") }

type empty struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
}

func (empty) FetchX509SVID(_ *workload.X509SVIDRequest, s grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if err := s.Send(&workload.X509SVIDResponse{Crl: [][]byte{make([]byte, 1500)}}); err != nil {
		return err
	}
	<-s.Context().Done()
	return s.Context().Err()
}

func (empty) FetchJWTSVID(context.Context, *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	return &workload.JWTSVIDResponse{Svids: []*workload.JWTSVID{{Svid: strings.Repeat("x", 500)}}}, nil
}

func floor(b *testing.B, kind string) {
	path := filepath.Join(b.TempDir(), "s")
	l, err := net.Listen("unix", path)
	must(b, err)
	server := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(server, empty{})
	done := make(chan error)
	go func() { done <- server.Serve(l) }()
	measure(b, kind, path)
	server.Stop()
	<-done
}

// benchmark measures the agent, which attests by the real unix attestor.
func benchmark(b *testing.B, kind string) {
	a := start(b, realUnix(b), func(o *workloadapi.Options) { o.Limits.CallsOfUser = 1e9 })
	a.Entry("web", nil, "unix:uid:"+strconv.Itoa(os.Geteuid()))
	for i := range 100 {
		a.Entry("e"+strconv.Itoa(i), nil, "unix:uid:"+strconv.Itoa(100_000+i))
	}
	a.sync()
	for _, svids := a.held.Counts(); svids < 101; _, svids = a.held.Counts() {
		runtime.Gosched() // what is signed ahead is not what is measured
	}
	measure(b, kind, a.path)
}

// measure measures the CPU of this process while another makes calls.
func measure(b *testing.B, kind, path string) {
	load := helper("load", kind, path, strconv.Itoa(b.N))
	stdin, err := load.StdinPipe()
	must(b, err)
	stdout, err := load.StdoutPipe()
	must(b, err)
	must(b, load.Start())
	out := bufio.NewReader(stdout)
	_, err = out.ReadString('\n')
	must(b, err)
	before := cpu(b)
	b.ResetTimer()
	stdin.Write([]byte("\n"))
	_, err = out.ReadString('\n')
	must(b, err)
	b.StopTimer()
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N), "agent-cpu-µs/op")
	stdin.Close()
	load.Wait()
}

func cpu(t testing.TB) time.Duration {
	var u syscall.Rusage
	must(t, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
