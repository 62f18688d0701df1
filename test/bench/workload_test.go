package bench

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmark-id/hallmark/test/harness"
)

// startDomain starts a server and an agent with an entry for this process.
func startDomain(b *testing.B) (*harness.Domain, *grpc.ClientConn) {
	b.Helper()
	d, admin := startServer(b)
	d.StartAgent(b, d.Join(b))
	d.Entry(b, "/bench", os.Getuid())
	return d, admin
}

func dialWorkload(b *testing.B, d *harness.Domain) (workload.SpiffeWorkloadAPIClient, *grpc.ClientConn) {
	b.Helper()
	conn, err := grpc.NewClient("unix:"+d.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	return workload.NewSpiffeWorkloadAPIClient(conn), conn
}

func secured(ctx context.Context) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
}

// fetchFirst opens a FetchX509SVID stream, takes its first response and closes
// it.
func fetchFirst(b *testing.B, client workload.SpiffeWorkloadAPIClient) {
	b.Helper()
	ctx, cancel := context.WithCancel(secured(b.Context()))
	defer cancel()
	stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	if err != nil {
		b.Fatal(err)
	}
	if res, err := stream.Recv(); err != nil || len(res.Svids) == 0 {
		b.Fatal(res, err)
	}
}

// BenchmarkFetchX509SVID is the first response of a stream.
func BenchmarkFetchX509SVID(b *testing.B) {
	d, _ := startDomain(b)
	b.Run("reused-connection", func(b *testing.B) {
		client, conn := dialWorkload(b, d)
		defer conn.Close()
		fetchFirst(b, client)
		empty := emptyCall(b, conn, d.Agent.PID())
		var l latencies
		before, n := cpu(b, d.Agent.PID()), 0
		for b.Loop() {
			start := time.Now()
			fetchFirst(b, client)
			l = append(l, time.Since(start))
			n++
		}
		ms := perOp(b, before, cpu(b, d.Agent.PID()), n)
		b.ReportMetric(ms/empty, "empty-ratio")
		l.report(b)
	})
	b.Run("new-connection", func(b *testing.B) {
		const calls = 1000 // an empty call on a new connection each
		before := cpu(b, d.Agent.PID())
		for range calls {
			_, conn := dialWorkload(b, d)
			_ = conn.Invoke(b.Context(), "/None/None", &emptypb.Empty{}, &emptypb.Empty{})
			conn.Close()
		}
		empty := float64(cpu(b, d.Agent.PID())-before) / 1e6 / calls
		var l latencies
		before, n := cpu(b, d.Agent.PID()), 0
		for b.Loop() {
			start := time.Now()
			client, conn := dialWorkload(b, d)
			fetchFirst(b, client)
			conn.Close()
			l = append(l, time.Since(start))
			n++
		}
		ms := perOp(b, before, cpu(b, d.Agent.PID()), n)
		b.ReportMetric(ms/empty, "empty-ratio")
		l.report(b)
	})
}

// BenchmarkFetchJWTSVID is a JWT-SVID that the agent holds, and one that the
// server must sign (CPU of agent and server together).
func BenchmarkFetchJWTSVID(b *testing.B) {
	d, _ := startDomain(b)
	client, conn := dialWorkload(b, d)
	defer conn.Close()
	ctx := secured(b.Context())
	for name, audience := range map[string]func(int) string{
		"cached":   func(int) string { return "one" },
		"uncached": func(n int) string { return fmt.Sprintf("audience-%d-%d", b.N, n) },
	} {
		b.Run(name, func(b *testing.B) {
			if _, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"one"}}); err != nil {
				b.Fatal(err)
			}
			empty := emptyCall(b, conn, d.Agent.PID())
			var l latencies
			all := func() time.Duration { return cpu(b, d.Agent.PID()) + cpu(b, d.Server.PID()) }
			before, n := all(), 0
			for b.Loop() {
				start := time.Now()
				if _, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{audience(n)}}); err != nil {
					b.Fatal(err)
				}
				l = append(l, time.Since(start))
				n++
			}
			ms := perOp(b, before, all(), n)
			b.ReportMetric(ms/empty, "empty-ratio")
			l.report(b)
		})
	}
}

// BenchmarkEntryToSVID is the time from the call that creates an entry to its
// SVID on a stream that is open, and from the deletion to the message without
// it.
func BenchmarkEntryToSVID(b *testing.B) {
	d, admin := startDomain(b)
	client, conn := dialWorkload(b, d)
	defer conn.Close()
	stream, err := client.FetchX509SVID(secured(b.Context()), &workload.X509SVIDRequest{})
	if err != nil {
		b.Fatal(err)
	}
	// until reads messages until one has the ID, or has it no more.
	until := func(id string, want bool) {
		for {
			res, err := stream.Recv()
			if err != nil {
				b.Fatal(err)
			}
			found := false
			for _, s := range res.Svids {
				found = found || s.SpiffeId == id
			}
			if found == want {
				return
			}
		}
	}
	until("spiffe://example.org/bench", true)
	entries := entryv1.NewEntryClient(admin)
	var created, deleted latencies
	n := 0
	for b.Loop() {
		path := fmt.Sprintf("/new/%d", n)
		n++
		start := time.Now()
		res, err := entries.BatchCreateEntry(b.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
			SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: path},
			ParentId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/node"},
			Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
		}}})
		if err != nil {
			b.Fatal(err)
		}
		until("spiffe://example.org"+path, true)
		created = append(created, time.Since(start))
		start = time.Now()
		if _, err := entries.BatchDeleteEntry(b.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{res.Results[0].Entry.Id}}); err != nil {
			b.Fatal(err)
		}
		until("spiffe://example.org"+path, false)
		deleted = append(deleted, time.Since(start))
	}
	created.report(b)
	deletedAt := float64(deleted[0])
	for _, d := range deleted {
		deletedAt = max(deletedAt, float64(d))
	}
	b.ReportMetric(deletedAt/1e6, "delete-max-ms")
}
