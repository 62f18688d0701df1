package test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	delegatedv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/delegatedidentity/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/hallmark-id/hallmark/test/harness"
)

const meshUID = 61006 // and the group of the sockets

// mesh is a proxy of all workloads of a node: it fetches the X509-SVID of one,
// as a delegate and as a broker, until that ends.
func mesh(adminSocket, brokerSocket, workload string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	pid, err := strconv.ParseInt(workload, 10, 32)
	if err != nil {
		return err
	}
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()

	admin, err := grpc.NewClient("unix://"+adminSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer admin.Close()
	delegated, err := delegatedv1.NewDelegatedIdentityClient(admin).SubscribeToX509SVIDs(ctx, &delegatedv1.SubscribeToX509SVIDsRequest{Pid: int32(pid)})
	var d *delegatedv1.SubscribeToX509SVIDsResponse
	if err == nil {
		d, err = delegated.Recv()
	}
	fmt.Print("delegated ", status.Code(err))
	for _, svid := range d.GetX509Svids() {
		fmt.Print(" ", svid.X509Svid.Id.Path)
	}
	fmt.Println()

	anAgent := func(id spiffeid.ID) error {
		if id.TrustDomain().Name() != "example.org" || !strings.HasPrefix(id.Path(), "/spire/agent/") {
			return fmt.Errorf("%s is no agent", id)
		}
		return nil
	}
	conn, err := grpc.NewClient("unix://"+brokerSocket, grpc.WithTransportCredentials(credentials.NewTLS(
		tlsconfig.MTLSClientConfig(source, source, tlsconfig.AdaptMatcher(anAgent)))))
	if err != nil {
		return err
	}
	defer conn.Close()
	reference, err := anypb.New(&broker.WorkloadPIDReference{Pid: int32(pid)})
	if err != nil {
		return err
	}
	brokered, err := broker.NewAPIClient(conn).SubscribeToX509SVID(metadata.AppendToOutgoingContext(ctx, "broker.spiffe.io", "true"),
		&broker.SubscribeToX509SVIDRequest{Reference: &broker.WorkloadReference{Reference: reference}})
	var b *broker.SubscribeToX509SVIDResponse
	if err == nil {
		b, err = brokered.Recv()
	}
	if err != nil {
		fmt.Println("brokered", status.Code(err))
		return nil
	}
	fmt.Println("brokered", status.Code(err), b.Svids[0].SpiffeId)
	_, dErr := delegated.Recv()
	_, bErr := brokered.Recv()
	fmt.Println("gone", status.Code(dErr), status.Code(bErr))
	return nil
}

func TestBrokerEndpoint_BE01_ADelegateAndBrokerThatIsNotRootServesItsNode(t *testing.T) {
	t.Parallel()
	d := harness.NewDomain(t, harness.Settings{})
	sockets := filepath.Join(d.Dir, "agent")
	brokerSocket := filepath.Join(sockets, "broker.sock")
	for _, err := range []error{
		os.Chown(sockets, harness.AgentUID, meshUID), // the group of the mesh: the sockets get it by the setgid bit
		os.Chmod(sockets, os.ModeSetgid|0o755),
		appendTo(filepath.Join(d.Dir, "agent.yaml"), "authorized_delegates: [spiffe://example.org/mesh]\nexperimental: {broker: true}\nbroker:\n  socket: "+
			brokerSocket+"\n  brokers: [{id: spiffe://example.org/mesh, spiffe_ids: [spiffe://example.org/shop/*]}]\n"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/mesh", meshUID)
	d.Entry(t, "/shop/echo", echoUID)
	d.Entry(t, "/caller", callerUID)
	workload := harness.Command{Path: "/bin/sleep", Args: []string{"600"}, UID: echoUID}.Start(t)

	env := func(pid int) []string {
		return []string{"TEST_SERVICE=mesh", "TEST_ADMIN_SOCKET=" + d.AgentSocket, "TEST_BROKER_SOCKET=" + brokerSocket, "TEST_PID=" + strconv.Itoa(pid)}
	}
	trusted := startService(t, meshUID, d.Socket, env(workload.PID())...)
	trusted.WaitOutput(t, "brokered OK spiffe://example.org/shop/echo\n")
	trusted.WaitOutput(t, "delegated OK /shop/echo\n")
	workload.Kill()
	trusted.WaitOutput(t, "gone NotFound NotFound\n")
	if code := trusted.Wait(t); code != 0 {
		t.Errorf("it ended with %d", code)
	}
	d.Agent.WaitOutput(t, "broker=spiffe://example.org/mesh workload_pid="+strconv.Itoa(workload.PID())+" spiffe_id=spiffe://example.org/shop/echo")
	d.Agent.WaitOutput(t, "delegate=spiffe://example.org/mesh workload_pid="+strconv.Itoa(workload.PID())+" spiffe_id=spiffe://example.org/shop/echo")

	// Out of the policy; a workload that is no broker cannot even connect.
	other := harness.Command{Path: "/bin/sleep", Args: []string{"600"}, UID: callerUID}.Start(t)
	startService(t, meshUID, d.Socket, env(other.PID())...).WaitOutput(t, "brokered PermissionDenied\n")
	outsider := startService(t, callerUID, d.Socket, env(other.PID())...)
	outsider.WaitOutput(t, "brokered Unavailable\n")
	outsider.WaitOutput(t, "delegated Unavailable\n")
}

func appendTo(path, text string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}
