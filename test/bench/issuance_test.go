package bench

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hallmark-id/hallmark/test/harness"
)

// startServer starts a server and connects to its admin socket.
func startServer(b *testing.B) (*harness.Domain, *grpc.ClientConn) {
	b.Helper()
	d := harness.NewDomain(b, harness.Settings{
		Server: "limits: {sign_per_second: 1000000}\nlog: {level: warn}\n",
		Agent:  "limits: {calls_per_second: 1000000}\nlog: {level: warn}\n",
	})
	d.StartServer(b)
	return d, harness.Dial(b, d.AdminSocket)
}

// BenchmarkMintX509 is an X509-SVID minted on the admin socket. floor-ratio is
// the server's CPU over that of an empty call, the CSR's check and one
// signature.
func BenchmarkMintX509(b *testing.B) {
	d, conn := startServer(b)
	client := svidv1.NewSVIDClient(conn)
	_, csr := newCSR(b, "spiffe://example.org/minted")
	floor, empty := measureRaw(b), emptyCall(b, conn, d.Server.PID())
	var l latencies
	before, n := cpu(b, d.Server.PID()), 0
	for b.Loop() {
		start := time.Now()
		if _, err := client.MintX509SVID(b.Context(), &svidv1.MintX509SVIDRequest{Csr: csr}); err != nil {
			b.Fatal(err)
		}
		l = append(l, time.Since(start))
		n++
	}
	ms := perOp(b, before, cpu(b, d.Server.PID()), n)
	b.ReportMetric(ms/(empty+floor.sign+floor.checkCSR), "floor-ratio")
	b.ReportMetric(empty, "empty-call-cpu-ms")
	l.report(b)
}

// BenchmarkMintJWT is a JWT-SVID minted on the admin socket.
func BenchmarkMintJWT(b *testing.B) {
	d, conn := startServer(b)
	client := svidv1.NewSVIDClient(conn)
	floor, empty := measureRaw(b), emptyCall(b, conn, d.Server.PID())
	var l latencies
	before, n := cpu(b, d.Server.PID()), 0
	for b.Loop() {
		start := time.Now()
		if _, err := client.MintJWTSVID(b.Context(), &svidv1.MintJWTSVIDRequest{
			Id: &types.SPIFFEID{TrustDomain: "example.org", Path: "/minted"}, Audience: []string{"a"},
		}); err != nil {
			b.Fatal(err)
		}
		l = append(l, time.Since(start))
		n++
	}
	ms := perOp(b, before, cpu(b, d.Server.PID()), n)
	b.ReportMetric(ms/(empty+floor.sign), "floor-ratio")
	b.ReportMetric(empty, "empty-call-cpu-ms")
	l.report(b)
}

// BenchmarkAgentIssuance is what an agent asks for over mTLS: batches of
// X509-SVIDs, and a JWT-SVID. CPU is per SVID; floor-ratio is over the
// cryptography alone.
func BenchmarkAgentIssuance(b *testing.B) {
	d, admin := startServer(b)
	agent, id := attest(b, d, admin)
	entries := createEntries(b, admin, id, 100)
	client := svidv1.NewSVIDClient(agent)
	_, csr := newCSR(b, "")
	for _, size := range []int{1, 10, 100} {
		b.Run(fmt.Sprintf("x509-batch-%d", size), func(b *testing.B) {
			request := &svidv1.BatchNewX509SVIDRequest{}
			for _, e := range entries[:size] {
				request.Params = append(request.Params, &svidv1.NewX509SVIDParams{EntryId: e, Csr: csr})
			}
			floor := measureRaw(b)
			var l latencies
			before, n := cpu(b, d.Server.PID()), 0
			for b.Loop() {
				start := time.Now()
				res, err := client.BatchNewX509SVID(b.Context(), request)
				if err != nil {
					b.Fatal(err)
				}
				for _, r := range res.Results {
					if r.Status.Code != 0 {
						b.Fatal(r.Status)
					}
				}
				l = append(l, time.Since(start))
				n += size
			}
			ms := perOp(b, before, cpu(b, d.Server.PID()), n)
			b.ReportMetric(ms/(floor.sign+floor.checkCSR), "floor-ratio")
			l.report(b)
		})
	}
	b.Run("jwt", func(b *testing.B) {
		floor := measureRaw(b)
		var l latencies
		before, n := cpu(b, d.Server.PID()), 0
		for b.Loop() {
			start := time.Now()
			if _, err := client.NewJWTSVID(b.Context(), &svidv1.NewJWTSVIDRequest{EntryId: entries[0], Audience: []string{"a"}}); err != nil {
				b.Fatal(err)
			}
			l = append(l, time.Since(start))
			n++
		}
		ms := perOp(b, before, cpu(b, d.Server.PID()), n)
		b.ReportMetric(ms/floor.sign, "floor-ratio")
		l.report(b)
	})
}

// attest attests as an agent would, by SPIRE's contract, and connects with the
// SVID.
func attest(b *testing.B, d *harness.Domain, admin *grpc.ClientConn) (*grpc.ClientConn, *types.SPIFFEID) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 30*time.Second)
	defer cancel()
	token, err := agentv1.NewAgentClient(admin).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{Ttl: 600})
	if err != nil {
		b.Fatal(err)
	}
	key, csr := newCSR(b, "")
	anonymous := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13} // the benchmark's own server
	first, err := grpc.NewClient(d.Address, grpc.WithTransportCredentials(credentials.NewTLS(anonymous)))
	if err != nil {
		b.Fatal(err)
	}
	defer first.Close()
	stream, err := agentv1.NewAgentClient(first).AttestAgent(ctx)
	if err != nil {
		b.Fatal(err)
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token.Value)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		b.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		b.Fatal(err)
	}
	svid := answer.GetResult().GetSvid()
	cert := tls.Certificate{Certificate: svid.CertChain, PrivateKey: key}
	if _, err := x509.ParseCertificate(svid.CertChain[0]); err != nil {
		b.Fatal(err)
	}
	own := anonymous.Clone()
	own.Certificates = []tls.Certificate{cert}
	conn, err := grpc.NewClient(d.Address, grpc.WithTransportCredentials(credentials.NewTLS(own)))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { conn.Close() })
	return conn, svid.Id
}

func createEntries(b *testing.B, admin *grpc.ClientConn, parent *types.SPIFFEID, n int) (ids []string) {
	b.Helper()
	request := &entryv1.BatchCreateEntryRequest{}
	for i := range n {
		request.Entries = append(request.Entries, &types.Entry{
			SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/w/%d", i)},
			ParentId:  parent,
			Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", 100000+i)}},
		})
	}
	res, err := entryv1.NewEntryClient(admin).BatchCreateEntry(b.Context(), request)
	if err != nil {
		b.Fatal(err)
	}
	for _, r := range res.Results {
		if r.Status.Code != 0 {
			b.Fatal(strings.TrimSpace(r.Status.Message))
		}
		ids = append(ids, r.Entry.Id)
	}
	return ids
}
