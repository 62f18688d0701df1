package test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestASilentConnectionIsClosedOnEveryListener: whoever connects and says
// nothing does not keep a place.
func TestASilentConnectionIsClosedOnEveryListener(t *testing.T) {
	t.Parallel()
	serverHTTP, agentHTTP := harness.FreeAddress(t), harness.FreeAddress(t)
	d := harness.NewDomain(t, harness.Settings{
		Server: "telemetry: {listen: " + serverHTTP + "}\n", Agent: "telemetry: {listen: " + agentHTTP + "}\n",
	})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	const most = 20 * time.Second // the longest of the limits is 10s
	for name, address := range map[string]string{
		"server, TCP": d.Address, "server, admin socket": d.AdminSocket, "server, HTTP": serverHTTP,
		"agent, workload socket": d.Socket, "agent, admin socket": d.AgentSocket, "agent, HTTP": agentHTTP,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			network := "tcp"
			if filepath.IsAbs(address) {
				network = "unix"
			}
			conn, err := net.Dial(network, address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetReadDeadline(time.Now().Add(most))
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("it is open after %v", most)
			}
		})
	}
}

// TestAnOversizedCallOfTheAgentsAdminSocketIsRefused, in its message and in its
// metadata.
func TestAnOversizedCallOfTheAgentsAdminSocketIsRefused(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	startDev(t, dir)
	admin := hallmarkv1.NewAgentAdminServiceClient(harness.Dial(t, filepath.Join(dir, "agent.sock")))
	large := strings.Repeat("x", 128<<10)
	req := &hallmarkv1.GetStatusRequest{}
	req.ProtoReflect().SetUnknown(append([]byte{0xfa, 0x3f, 0x80, 0x80, 0x08}, large...)) // field 1023, 128 KiB
	if _, err := admin.GetStatus(t.Context(), req); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message of 128 KiB: %v", err)
	}
	if _, err := admin.GetStatus(metadata.AppendToOutgoingContext(t.Context(), "x", large), &hallmarkv1.GetStatusRequest{}); err == nil {
		t.Error("metadata of 128 KiB was accepted")
	}
	if _, err := admin.GetStatus(t.Context(), &hallmarkv1.GetStatusRequest{}); err != nil {
		t.Error(err)
	}
}

// TestCallsAtOnceOnOneConnectionAreBounded: HTTP/2 tells the client how many
// there may be, and one that keeps to it waits.
func TestCallsAtOnceOnOneConnectionAreBounded(t *testing.T) {
	t.Parallel()
	d := harness.NewDomain(t, harness.Settings{})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/root", 0)
	for name, c := range map[string]struct {
		target string
		creds  credentials.TransportCredentials
		method string // one that waits, for a message or for ever
		most   int
	}{
		"server, TCP":            {d.Address, credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}), agentv1.Agent_AttestAgent_FullMethodName, 100},
		"server, admin socket":   {"unix:" + d.AdminSocket, insecure.NewCredentials(), grpc_health_v1.Health_Watch_FullMethodName, 100},
		"agent, workload socket": {"unix:" + d.Socket, insecure.NewCredentials(), workload.SpiffeWorkloadAPI_FetchX509Bundles_FullMethodName, 100},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, err := grpc.NewClient(c.target, grpc.WithTransportCredentials(c.creds))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			open := func(wait time.Duration) error {
				ctx := metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true")
				ctx, cancel := context.WithCancel(ctx) // ends with the connection
				late := time.AfterFunc(wait, cancel)
				defer late.Stop()
				_, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, c.method)
				return err
			}
			if err := open(10 * time.Second); err != nil { // the first one learns the limit
				t.Fatal(err)
			}
			for i := range c.most - 1 {
				if err := open(10 * time.Second); err != nil {
					t.Fatalf("call %d of %d: %v", i+2, c.most, err)
				}
			}
			if err := open(500 * time.Millisecond); status.Code(err) != codes.Canceled {
				t.Errorf("one call more: %v; it should wait", err)
			}
		})
	}
}
