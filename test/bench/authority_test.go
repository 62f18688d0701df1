package bench

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/test/harness"
)

// fleet is a server and many whole agents in this process, each with an
// identity of its own, an entry, and workloads that watch their SVIDs.
type fleet struct {
	b         *testing.B
	server    int // its process
	admin     hallmarkv1.AdminServiceClient
	authority localauthorityv1.LocalAuthorityClient
	watches   []*watch
	dirs      []string // of the agents
}

// watch is a workload on an open stream.
type watch struct {
	mu      sync.Mutex
	more    chan struct{}
	at      time.Time       // of the last message
	signer  string          // key ID of the authority that signed its SVID
	trusted map[string]bool // key IDs of the authorities in its bundle
}

// startFleet starts agents with a number of workloads each.
func startFleet(b *testing.B, agents, workloads int) *fleet {
	b.Helper()
	d, conn := startServer(b)
	f := &fleet{b: b, server: d.Server.PID(), admin: hallmarkv1.NewAdminServiceClient(conn), authority: localauthorityv1.NewLocalAuthorityClient(conn)}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	b.Cleanup(func() { stop(); running.Wait() })
	for i := range agents {
		parent, dir := fmt.Sprintf("/node/%d", i), filepath.Join(d.Dir, fmt.Sprint(i))
		if _, err := entryv1.NewEntryClient(conn).BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
			SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/w/%d", i)},
			ParentId:  &types.SPIFFEID{TrustDomain: "example.org", Path: parent},
			Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
		}}}); err != nil {
			b.Fatal(err)
		}
		token, err := agentv1.NewAgentClient(conn).CreateJoinToken(ctx, &agentv1.CreateJoinTokenRequest{
			Ttl: 600, AgentId: &types.SPIFFEID{TrustDomain: "example.org", Path: parent},
		})
		if err != nil {
			b.Fatal(err)
		}
		src := config.Source{Data: fmt.Appendf(nil,
			"trust_domain: example.org\nserver: %s\ndata_dir: %s/data\nsocket: %s/w.sock\nadmin_socket: %s/a.sock\nlog: {level: error}\n"+
				"insecure_bootstrap: true\nnode_attestor: {join_token: {token: %s}}\n", // the benchmark's own server
			d.Address, dir, dir, dir, token.Value)}
		if err := os.Mkdir(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		f.dirs = append(f.dirs, dir)
		ready := make(chan struct{})
		running.Go(func() {
			if err := agent.Run(ctx, src, func() { close(ready) }); err != nil {
				b.Error(err)
			}
		})
		select {
		case <-ready:
		case <-time.After(30 * time.Second):
			b.Fatal("an agent is not ready")
		}
		for range workloads {
			f.watch(ctx, &running, filepath.Join(dir, "w.sock"))
		}
	}
	f.await(func(w *watch) bool { return w.signer != "" })
	return f
}

func (f *fleet) watch(ctx context.Context, running *sync.WaitGroup, socket string) {
	client, conn := dialWorkload(f.b, &harness.Domain{Socket: socket})
	w := &watch{more: make(chan struct{})}
	f.watches = append(f.watches, w)
	running.Go(func() {
		defer conn.Close()
		for ctx.Err() == nil { // until the agent has its identity it says: try again
			stream, err := client.FetchX509SVID(secured(ctx), &workload.X509SVIDRequest{}, grpc.WaitForReady(true))
			if err != nil {
				continue
			}
			for {
				msg, err := stream.Recv()
				if err != nil {
					break
				}
				w.note(msg)
			}
			time.Sleep(10 * time.Millisecond)
		}
	})
}

func (w *watch) note(msg *workload.X509SVIDResponse) {
	at, signer, trusted := time.Now(), "", make(map[string]bool)
	for _, s := range msg.Svids {
		if chain, err := x509.ParseCertificates(s.X509Svid); err == nil {
			signer = hex.EncodeToString(chain[0].AuthorityKeyId)
		}
		if roots, err := x509.ParseCertificates(s.Bundle); err == nil {
			for _, r := range roots {
				trusted[hex.EncodeToString(r.SubjectKeyId)] = true
			}
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at, w.signer, w.trusted = at, signer, trusted
	close(w.more)
	w.more = make(chan struct{})
}

// await waits until something is so for every workload, and returns when it
// became so.
func (f *fleet) await(is func(*watch) bool) (at []time.Time) {
	f.b.Helper()
	deadline := time.After(time.Minute)
	for i, w := range f.watches {
		for {
			w.mu.Lock()
			so, when, more := is(w), w.at, w.more
			w.mu.Unlock()
			if so {
				at = append(at, when)
				break
			}
			select {
			case <-more:
			case <-deadline:
				f.b.Fatalf("workload %d has waited for a minute", i)
			}
		}
	}
	return at
}

// rotate lets a new X.509 authority sign and returns the ID of the old one.
func (f *fleet) rotate() (old string) {
	f.b.Helper()
	ctx, cancel := context.WithTimeout(f.b.Context(), time.Minute)
	defer cancel()
	state, err := f.authority.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err == nil {
		_, err = f.admin.RotateAuthority(ctx, &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_X509, Wait: 30})
	}
	if err != nil {
		f.b.Fatal(err)
	}
	return state.Active.AuthorityId
}

func (f *fleet) taint(id string) {
	f.b.Helper()
	if _, err := f.authority.TaintX509Authority(f.b.Context(), &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id}); err != nil {
		f.b.Fatal(err)
	}
}

func (f *fleet) revoke(id string) {
	f.b.Helper()
	if _, err := f.authority.RevokeX509Authority(f.b.Context(), &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id}); err != nil {
		f.b.Fatal(err)
	}
}

// users returns how many agents use an SVID that an authority signed.
func (f *fleet) users(id string) int {
	f.b.Helper()
	all, err := f.admin.ListAuthorities(f.b.Context(), &hallmarkv1.ListAuthoritiesRequest{})
	if err != nil {
		f.b.Fatal(err)
	}
	for i, a := range all.Authorities {
		if a.Id == id {
			return int(all.Uses[i].Agents)
		}
	}
	f.b.Fatalf("there is no authority %s", id)
	return 0
}

// BenchmarkTaint is the time from the call that taints an authority until each
// of 200 agents has renewed its own SVID, as the server sees it (agent-*), and
// until its workload has a new one on its open stream.
func BenchmarkTaint(b *testing.B) {
	f := startFleet(b, 200, 1)
	var agents, workloads latencies
	var server, all, rounds float64
	for b.Loop() {
		old := f.rotate()
		before := f.users(old)
		if before != 200 {
			b.Fatalf("%d agents use an SVID of the old authority", before)
		}
		serverBefore, agentsBefore := cpu(b, f.server), cpu(b, os.Getpid())
		start := time.Now()
		f.taint(old)
		for before > 0 {
			now := f.users(old)
			for range before - now {
				agents = append(agents, time.Since(start))
			}
			before = now
			time.Sleep(5 * time.Millisecond) // a call costs the server as much as a renewal
			if time.Since(start) > time.Minute {
				b.Fatalf("%d agents have not renewed after a minute", before)
			}
		}
		for _, at := range f.await(func(w *watch) bool { return w.signer != old }) {
			workloads = append(workloads, at.Sub(start))
		}
		used := cpu(b, f.server) - serverBefore
		server += float64(used) / 200e6
		all += float64(used+cpu(b, os.Getpid())-agentsBefore) / 200e6
		rounds++
		f.revoke(old)
	}
	b.ReportMetric(server/rounds, "server-cpu-ms/agent")
	b.ReportMetric(all/rounds, "cpu-ms/agent")
	workloads.report(b)
	agents.reportAs(b, "agent-")
}

// BenchmarkRevoke is the time from the call that revokes an authority until it
// is out of the bundle on every one of 20 open streams of each of 5 agents.
func BenchmarkRevoke(b *testing.B) {
	f := startFleet(b, 5, 20)
	var l latencies
	for b.Loop() {
		old := f.rotate()
		f.taint(old)
		f.await(func(w *watch) bool { return w.signer != old })
		for f.users(old) > 0 {
			time.Sleep(5 * time.Millisecond)
		}
		start := time.Now()
		f.revoke(old)
		for _, at := range f.await(func(w *watch) bool { return !w.trusted[old] }) {
			l = append(l, at.Sub(start))
		}
	}
	l.report(b)
}
