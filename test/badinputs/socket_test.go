package badinputs

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmark-id/hallmark/test/harness"
)

func TestBadCallsOfTheWorkloadAPIAreExplained(t *testing.T) {
	h := newHouse(t)
	api := workload.NewSpiffeWorkloadAPIClient(h.agent)
	jwt := func(id string, audience ...string) func() error {
		return func() error {
			_, err := api.FetchJWTSVID(called(t), &workload.JWTSVIDRequest{SpiffeId: id, Audience: audience})
			return err
		}
	}
	validate := func(audience, token string) func() error {
		return func() error {
			_, err := api.ValidateJWTSVID(called(t), &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
			return err
		}
	}
	for name, c := range map[string]struct {
		call func() error
		code codes.Code
		says string
	}{
		"no audience":       {jwt(""), codes.InvalidArgument, "audience"},
		"empty audience":    {jwt("", ""), codes.InvalidArgument, "audience"},
		"malformed ID":      {jwt("web", "us"), codes.InvalidArgument, "spiffe_id: scheme is missing"},
		"another's ID":      {jwt("spiffe://example.org/another", "us"), codes.PermissionDenied, "identity"},
		"validate for none": {validate("", "a.b.c"), codes.InvalidArgument, "audience"},
		"validate nothing":  {validate("us", ""), codes.InvalidArgument, "svid"},
		"validate garbage":  {validate("us", "garbage"), codes.InvalidArgument, "compact form"},
		"no header": {func() error {
			_, err := api.FetchJWTSVID(t.Context(), &workload.JWTSVIDRequest{Audience: []string{"us"}})
			return err
		}, codes.InvalidArgument, "workload.spiffe.io"},
		"wrong header": {func() error {
			_, err := api.FetchJWTSVID(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "1"), &workload.JWTSVIDRequest{Audience: []string{"us"}})
			return err
		}, codes.InvalidArgument, "workload.spiffe.io"},
		"oversized": {jwt("", strings.Repeat("a", 5<<20)), codes.ResourceExhausted, "larger than max"},
		"malformed protobuf": {func() error {
			return h.agent.Invoke(called(t), workload.SpiffeWorkloadAPI_FetchJWTSVID_FullMethodName, []byte{0xff, 0xff}, &emptypb.Empty{}, grpc.ForceCodec(rawCodec{}))
		}, codes.Internal, "unmarshal"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.call()
			if status.Code(err) != c.code {
				t.Errorf("the error is %v, want %v", err, c.code)
			}
			says(t, strings.ToLower(status.Convert(err).Message()), strings.ToLower(c.says))
		})
	}
	h.serves(t)
}

// TestGarbageOnEachListenerDisturbsNobody speaks no protocol that a listener
// knows, and then nothing at all.
func TestGarbageOnEachListenerDisturbsNobody(t *testing.T) {
	h := newHouse(t)
	before := h.state(t)
	for listener, connect := range map[string]func() (net.Conn, error){
		"TCP": func() (net.Conn, error) { return net.Dial("tcp", h.address) },
		"TLS": func() (net.Conn, error) {
			return tls.Dial("tcp", h.address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
		},
		"server socket": func() (net.Conn, error) { return net.Dial("unix", h.admin) },
		"workload":      func() (net.Conn, error) { return net.Dial("unix", h.socket) },
		"agent socket":  func() (net.Conn, error) { return net.Dial("unix", filepath.Join(h.dir, "agent.sock")) },
	} {
		for name, bytes := range map[string]string{
			"zeroes": strings.Repeat("\x00", 4096), "HTTP/1": "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
			"preface and garbage": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + strings.Repeat("\xff", 4096), "nothing": "",
		} {
			t.Run(listener+" "+name, func(t *testing.T) {
				conn, err := connect()
				must(t, err)
				defer conn.Close()
				must(t, conn.SetDeadline(time.Now().Add(5*time.Second)))
				if bytes == "" {
					return
				}
				_, _ = io.WriteString(conn, bytes)
				if _, err := io.Copy(io.Discard, conn); err != nil && strings.Contains(err.Error(), "timeout") {
					t.Errorf("the connection is still open: %v", err)
				}
			})
		}
	}
	h.unchanged(t, before)
	h.serves(t)
}

// runServer runs a server on a directory that something is wrong with, and
// expects that it ends with an error which says so, having changed nothing.
func runServer(t *testing.T, dir string, want ...string) {
	t.Helper()
	file := filepath.Join(dir, "server.yaml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "trust_domain: example.org\nlisten: 127.0.0.1:0\ndata_dir: %s/data\nadmin_socket: %s/admin.sock\n", dir, dir), 0o600))
	before := listing(t, dir)
	_, stderr, code := harness.Command{Args: []string{"server", "run", "-c", file}}.Try(t)
	if code != 1 {
		t.Errorf("exit status %d\n%s", code, stderr)
	}
	says(t, stderr, want...)
	if after := listing(t, dir); after != before {
		t.Errorf("the directory was\n%.2000s\nand is\n%.2000s", before, after)
	}
}

func TestAPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	dir := shortDir(t)
	file := filepath.Join(dir, "server.yaml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "trust_domain: example.org\nlisten: %s\ndata_dir: %s/data\nadmin_socket: %s/admin.sock\n", l.Addr(), dir, dir), 0o600))
	before := listing(t, dir)
	_, stderr, code := harness.Command{Args: []string{"server", "run", "-c", file}}.Try(t)
	if code != 1 {
		t.Errorf("exit status %d", code)
	}
	says(t, stderr, l.Addr().String(), "is in use by another process", "set listen to another address")
	if listing(t, dir) != before {
		t.Error("something was written")
	}
}

func TestASocketsPlaceIsTakenByAFile(t *testing.T) {
	dir := shortDir(t)
	must(t, os.WriteFile(filepath.Join(dir, "admin.sock"), []byte("precious"), 0o600))
	runServer(t, dir, "admin_socket", "admin.sock")
}

func TestADataDirectoryThatIsAFile(t *testing.T) {
	dir := shortDir(t)
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("precious"), 0o600))
	file := filepath.Join(dir, "server.yaml")
	must(t, os.WriteFile(file, fmt.Appendf(nil, "trust_domain: example.org\nlisten: 127.0.0.1:0\ndata_dir: %s/file\nadmin_socket: %s/admin.sock\n", dir, dir), 0o600))
	before := listing(t, dir)
	_, stderr, code := harness.Command{Args: []string{"server", "run", "-c", file}}.Try(t)
	if code != 1 {
		t.Errorf("exit status %d", code)
	}
	says(t, stderr, "not a directory")
	if listing(t, dir) != before {
		t.Error("something was written")
	}
}

// TestADirectoryThatSomethingIsWrongWith starts on what an earlier server left,
// each time with another thing wrong.
func TestADirectoryThatSomethingIsWrongWith(t *testing.T) {
	for name, c := range map[string]struct {
		spoil  func(t *testing.T, dir string)
		domain string
		says   []string
	}{
		"another trust domain": {func(*testing.T, string) {}, "other.org", []string{"example.org", "other.org"}},
		"key open to others": {func(t *testing.T, dir string) { eachKey(t, dir, func(path string) { must(t, os.Chmod(path, 0o644)) }) },
			"example.org", []string{"is open to other users", "chmod 600"}},
		"key directory open to others": {func(t *testing.T, dir string) { must(t, os.Chmod(filepath.Join(dir, "data", "keys"), 0o755)) },
			"example.org", []string{"is open to other users", "chmod 700"}},
		"damaged key": {func(t *testing.T, dir string) {
			eachKey(t, dir, func(path string) { must(t, os.WriteFile(path, []byte("damaged"), 0o600)) })
		}, "example.org", []string{"PEM"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := shortDir(t)
			file := filepath.Join(dir, "server.yaml")
			config := func(domain string) {
				must(t, os.WriteFile(file, fmt.Appendf(nil, "trust_domain: %s\nlisten: 127.0.0.1:0\ndata_dir: %s/data\nadmin_socket: %s/admin.sock\n", domain, dir, dir), 0o600))
			}
			config("example.org")
			p := harness.Command{Args: []string{"server", "run", "-c", file}}.Start(t)
			p.WaitReady(t, "server", "health", "--admin-socket", filepath.Join(dir, "admin.sock"))
			if code := p.Stop(t); code != 0 {
				t.Fatalf("the first server ended with %d", code)
			}
			c.spoil(t, dir)
			config(c.domain)
			keys := listing(t, filepath.Join(dir, "data", "keys"))
			_, stderr, code := harness.Command{Args: []string{"server", "run", "-c", file}}.Try(t)
			if code != 1 {
				t.Errorf("exit status %d", code)
			}
			says(t, stderr, c.says...)
			if now := listing(t, filepath.Join(dir, "data", "keys")); now != keys {
				t.Errorf("the keys were\n%s\nand are\n%s", keys, now)
			}
		})
	}
}

func eachKey(t *testing.T, dir string, do func(path string)) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "data", "keys", "*.pem"))
	must(t, err)
	if len(paths) == 0 {
		t.Fatal("there are no keys")
	}
	for _, path := range paths {
		do(path)
	}
}
