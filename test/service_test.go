package test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestMain runs the tests, or, where the environment says so, one of the
// services that they set against each other: processes of other users, which
// know of Hallmark only what go-spiffe's client tells them.
func TestMain(m *testing.M) {
	switch os.Getenv("TEST_SERVICE") {
	case "":
		code := m.Run()
		harness.Cleanup()
		os.Exit(code)
	case "echo":
		exit(echo(os.Getenv("TEST_PEER")))
	case "caller":
		exit(call(os.Getenv("TEST_PEER"), os.Getenv("TEST_ADDRESS")))
	case "federated-echo":
		exit(federatedEcho(os.Getenv("TEST_PEER"), os.Getenv("TEST_ADDRESS")))
	case "federated-caller":
		exit(federatedCall(os.Getenv("TEST_PEER"), os.Getenv("TEST_ADDRESS")))
	case "mesh":
		exit(mesh(os.Getenv("TEST_ADMIN_SOCKET"), os.Getenv("TEST_BROKER_SOCKET"), os.Getenv("TEST_PID")))
	}
	exit(fmt.Errorf("unknown service"))
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// startService starts a service of this test binary as another user.
func startService(t testing.TB, uid int, socket string, env ...string) *harness.Process {
	t.Helper()
	return startServiceIn(t, nil, uid, socket, env...)
}

// startServiceIn does so in a network; nil: that of the test.
func startServiceIn(t testing.TB, network *harness.Network, uid int, socket string, env ...string) *harness.Process {
	t.Helper()
	return harness.Command{Path: harness.Self(t), UID: uid, Network: network, Env: append(env, "SPIFFE_ENDPOINT_SOCKET=unix://"+socket)}.Start(t)
}

// echo accepts mTLS connections from one SPIFFE ID and sends back what comes.
func echo(peer string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(peer))))
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	fmt.Println("listening", listener.Addr())
	for {
		conn, err := listener.Accept()
		if err != nil {
			return nil
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			_, _ = io.CopyN(conn, conn, 4)
		}()
	}
}

// tally is what a caller has seen so far; it prints a JSON line of
// it after each call.
type tally struct {
	Requests int      `json:"requests"`
	Failures int      `json:"failures"`
	Errors   []string `json:"errors"`  // the first few
	SVIDs    int      `json:"svids"`   // how many of its own it has used
	Issuers  int      `json:"issuers"` // how many authorities signed them
}

// call makes an mTLS connection after another to an echo service.
func call(peer, address string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(peer)))
	return keepCalling(ctx, source, 30*time.Millisecond, func() error { return ping(config, address) })
}

// keepCalling makes one call after another, at a pace, and prints what has come of
// them.
func keepCalling(ctx context.Context, source *workloadapi.X509Source, pace time.Duration, once func() error) error {
	var n tally
	serials, issuers := map[string]bool{}, map[string]bool{}
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for ctx.Err() == nil {
		svid, err := source.GetX509SVID()
		if err == nil {
			serials[svid.Certificates[0].SerialNumber.String()] = true
			issuers[string(svid.Certificates[0].AuthorityKeyId)] = true
			err = once()
		}
		n.Requests++
		if err != nil {
			n.Failures++
			if len(n.Errors) < 5 {
				n.Errors = append(n.Errors, time.Now().Format(time.TimeOnly)+" "+err.Error())
			}
		}
		n.SVIDs, n.Issuers = len(serials), len(issuers)
		if err := json.NewEncoder(os.Stdout).Encode(n); err != nil {
			return err
		}
		<-tick.C
	}
	return json.NewEncoder(os.Stdout).Encode(n)
}

func ping(config *tls.Config, address string) error {
	dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: 20 * time.Second}, Config: config}
	conn, err := dialer.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	answer := make([]byte, 4)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	if string(answer) != "ping" {
		return fmt.Errorf("the answer is %q", answer)
	}
	return nil
}

// pair is two services that talk to each other.
type pair struct {
	echo, caller *harness.Process
}

func startPair(t testing.TB, socket string, echoUID int, echoID string, callerUID int, callerID string) *pair {
	t.Helper()
	p := &pair{echo: startService(t, echoUID, socket, "TEST_SERVICE=echo", "TEST_PEER="+callerID)}
	p.echo.WaitOutput(t, "listening ")
	_, address, _ := strings.Cut(strings.TrimSpace(p.echo.Stdout()), " ")
	p.caller = startService(t, callerUID, socket, "TEST_SERVICE=caller", "TEST_PEER="+echoID, "TEST_ADDRESS="+address)
	return p
}

// address is where the echo service listens.
func (p *pair) address(t testing.TB) string {
	t.Helper()
	for _, e := range p.caller.Env {
		if address, ok := strings.CutPrefix(e, "TEST_ADDRESS="); ok {
			return address
		}
	}
	t.Fatal("the caller was not told where the echo service listens")
	return ""
}

// seen returns the caller's newest tally.
func (p *pair) seen() (n tally) {
	lines := strings.Split(strings.TrimSpace(p.caller.Stdout()), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		if json.Unmarshal([]byte(lines[i]), &n) == nil {
			return n
		}
	}
	return tally{}
}

// waitFor waits until the tally fulfils a condition.
func (p *pair) waitFor(t testing.TB, what string, ok func(tally) bool) {
	t.Helper()
	harness.Eventually(t, what, func(context.Context) error {
		if n := p.seen(); !ok(n) {
			return fmt.Errorf("so far %+v", n)
		}
		return nil
	})
}
