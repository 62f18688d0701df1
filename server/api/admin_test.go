package api_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/api"
	"github.com/hallmark-id/hallmark/server/publish"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

func (w *world) adminService() hallmarkv1.AdminServiceClient {
	w.t.Helper()
	return hallmarkv1.NewAdminServiceClient(w.admin())
}

// follower is an agent with a push stream.
type follower struct {
	*svid
	stream hallmarkv1.FeedService_FollowClient
}

// follow opens a push stream and takes what comes first.
func (w *world) follow(s *svid) *follower {
	w.t.Helper()
	stream, err := hallmarkv1.NewFeedServiceClient(w.connect(s)).Follow(w.t.Context())
	must(w.t, err)
	must(w.t, stream.Send(&hallmarkv1.FollowRequest{AgentVersion: "test"}))
	f := &follower{s, stream}
	f.next(w)
	return f
}

// next takes a message and acknowledges it.
func (f *follower) next(w *world) *hallmarkv1.FollowResponse {
	w.t.Helper()
	m, err := f.stream.Recv()
	must(w.t, err)
	must(w.t, f.stream.Send(&hallmarkv1.FollowRequest{Revision: m.Revision}))
	return m
}

func TestTheServerSaysWhatItIs(t *testing.T) {
	w := newWorld(t)
	got, err := w.adminService().GetServer(t.Context(), &hallmarkv1.GetServerRequest{})
	must(t, err)
	if got.TrustDomain != "example.org" || got.Address != w.address || got.Version == "" || got.Revision != int64(w.registry.View().Revision()) || time.Now().Unix()-got.StartedAt > 60 {
		t.Errorf("got %v", got)
	}
}

// RFC 9110 §6.6.1. "hallmark doctor" learns by it how far clocks are apart.
func TestEveryAnswerSaysTheServersTime(t *testing.T) {
	w := newWorld(t)
	w.sleep(3 * time.Minute)
	var header metadata.MD
	_, err := bundlev1.NewBundleClient(w.connect(nil)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}, grpc.Header(&header))
	must(t, err)
	if len(header.Get("date")) != 1 {
		t.Fatalf("the header is %v", header)
	}
	date, err := http.ParseTime(header.Get("date")[0])
	if apart := w.now().Sub(date); err != nil || apart < 0 || apart > 30*time.Second {
		t.Errorf("it says %v (%v), and it is %v", date, err, w.now())
	}
}

func TestABackupCanBeRestored(t *testing.T) {
	w := newWorld(t)
	e := w.create(w.newAgent(), "/a")
	stream, err := w.adminService().Backup(t.Context(), &hallmarkv1.BackupRequest{})
	must(t, err)
	var copied bytes.Buffer
	for {
		m, err := stream.Recv()
		must(t, err)
		copied.Write(m.Data)
		if m.Done {
			if m.Revision != int64(w.registry.View().Revision()) {
				t.Errorf("the copy is of revision %d", m.Revision)
			}
			break
		}
	}
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	defer db.Close()
	_, err = store.Restore(t.Context(), db, &copied)
	must(t, err)
	reg, err := registry.Open(t.Context(), registry.Options{Store: db, TrustDomain: td})
	must(t, err)
	if reg.View().Entry(e.Id) == nil || reg.View().NodeCount() != 1 {
		t.Error("the restored registry lacks something")
	}
}

func TestAuthoritiesRotateOnceEveryConnectedAgentKnows(t *testing.T) {
	w := newWorld(t)
	admin := w.adminService()
	agents := []*follower{w.follow(w.newAgent()), w.follow(w.newAgent())}
	for _, kind := range []hallmarkv1.Authority_Kind{hallmarkv1.Authority_KIND_X509, hallmarkv1.Authority_KIND_JWT} {
		type answer struct {
			resp *hallmarkv1.RotateAuthorityResponse
			err  error
		}
		answered := make(chan answer)
		go func() {
			resp, err := admin.RotateAuthority(t.Context(), &hallmarkv1.RotateAuthorityRequest{Kind: kind})
			answered <- answer{resp, err}
		}()
		for _, a := range agents {
			if m := a.next(w); len(m.Bundles) != 1 {
				t.Errorf("an agent was sent %v", m)
			}
		}
		a := <-answered
		must(t, a.err)
		if a.resp.Agents != 2 || a.resp.Activated.State != hallmarkv1.Authority_STATE_ACTIVE || a.resp.Activated.Kind != kind {
			t.Errorf("the answer is %v", a.resp)
		}
	}
	// The agent's old SVID is still good, and what is signed now verifies.
	w.verify(mustSign(w, agents[0].svid))
	list, err := admin.ListAuthorities(t.Context(), &hallmarkv1.ListAuthoritiesRequest{})
	must(t, err)
	if len(list.Authorities) != 4 {
		t.Errorf("there are %d authorities, want 4", len(list.Authorities))
	}
}

// mustSign has the server sign an X509-SVID of an entry of the agent.
func mustSign(w *world, agent *svid) *types.X509SVID {
	w.t.Helper()
	s := w.workload(agent, "/signed")
	return &types.X509SVID{CertChain: s.tls.Certificate, Id: wireID(s.id)}
}

func TestAnAuthorityDoesNotSignOnDemandBeforeEveryTargetHasIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "www")
	var published *publish.Publisher
	w := newWorld(t, func(o *api.Options) {
		published = publish.New(publish.Options{
			Targets: []publish.Config{{Name: "web", Bundle: "bundle.json", Directory: &publish.DirectoryConfig{Path: dir}}},
			Server:  "test", Bundle: publish.FromRegistry(o.Registry),
		})
		o.Publisher = published
	})
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = published.Run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	admin := w.adminService()
	before, err := w.authorities().GetJWTAuthorityState(t.Context(), &localauthorityv1.GetJWTAuthorityStateRequest{})
	must(t, err)
	_, err = admin.RotateAuthority(t.Context(), &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_JWT, Wait: 1})
	expectCode(t, err, codes.DeadlineExceeded, "is prepared but does not sign: after 1s, it is not published to web: bundle.json: the directory")
	after, err := w.authorities().GetJWTAuthorityState(t.Context(), &localauthorityv1.GetJWTAuthorityStateRequest{})
	must(t, err)
	if after.Active.AuthorityId != before.Active.AuthorityId || after.Prepared == nil {
		t.Errorf("before: %v; after: %v", before, after)
	}
	list, err := admin.ListPublishTargets(t.Context(), &hallmarkv1.ListPublishTargetsRequest{})
	must(t, err)
	if s := list.Targets[0]; s.Name != "web" || s.Place != dir || s.State != "failing" || s.Failures == 0 || s.Error == "" || s.PublishedAt != 0 || s.TriedAt == 0 {
		t.Errorf("the target is %v", s)
	}

	must(t, os.Mkdir(dir, 0o755))
	resp, err := admin.RotateAuthority(t.Context(), &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_JWT})
	must(t, err)
	text, err := os.ReadFile(filepath.Join(dir, "bundle.json"))
	must(t, err)
	if !strings.Contains(string(text), resp.Activated.Id) {
		t.Errorf("%s signs, and the target has %s", resp.Activated.Id, text)
	}
}

func TestAnAuthorityDoesNotSignBeforeASilentAgentKnowsIt(t *testing.T) {
	w := newWorld(t)
	admin, agent := w.adminService(), w.follow(w.newAgent())
	before, err := w.authorities().GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	must(t, err)
	_, err = admin.RotateAuthority(t.Context(), &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_X509, Wait: 1})
	expectCode(t, err, codes.DeadlineExceeded, "1 of 1 connected agents have not acknowledged")
	after, err := w.authorities().GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	must(t, err)
	if after.Active.AuthorityId != before.Active.AuthorityId || after.Prepared == nil {
		t.Errorf("before: %v; after: %v", before, after)
	}
	list, err := admin.ListConnections(t.Context(), &hallmarkv1.ListConnectionsRequest{})
	must(t, err)
	if len(list.Connections) != 1 || list.Connections[0].AgentId != agent.id.String() || list.Connections[0].AgentVersion != "test" || list.Connections[0].Address == "" ||
		list.Connections[0].AcknowledgedRevision >= int64(w.registry.View().Revision()) {
		t.Errorf("the connections are %v", list.Connections)
	}
	for _, bad := range []*hallmarkv1.RotateAuthorityRequest{{}, {Kind: 7}, {Kind: 1, Wait: -1}, {Kind: 1, Wait: 1 << 30}} {
		_, err = admin.RotateAuthority(t.Context(), bad)
		expectCode(t, err, codes.InvalidArgument, "")
	}
}

func TestAnOperatorLearnsWhenAChangeHasReachedEveryAgent(t *testing.T) {
	w := newWorld(t)
	admin := w.adminService()
	got, err := admin.AwaitAgents(t.Context(), &hallmarkv1.AwaitAgentsRequest{})
	must(t, err)
	if got.Agents != 0 {
		t.Errorf("with no agent: %v", got)
	}
	agent := w.follow(w.newAgent())
	_, err = w.authorities().PrepareX509Authority(t.Context(), &localauthorityv1.PrepareX509AuthorityRequest{})
	must(t, err)
	_, err = admin.AwaitAgents(t.Context(), &hallmarkv1.AwaitAgentsRequest{Wait: 1})
	expectCode(t, err, codes.DeadlineExceeded, "1 of 1 connected agents have not acknowledged")
	agent.next(w)
	got, err = admin.AwaitAgents(t.Context(), &hallmarkv1.AwaitAgentsRequest{})
	must(t, err)
	if got.Agents != 1 || got.Revision != int64(w.registry.View().Revision()) {
		t.Errorf("with an agent that has acknowledged all: %v", got)
	}
	for _, bad := range []int32{-1, 1 << 30} {
		_, err = admin.AwaitAgents(t.Context(), &hallmarkv1.AwaitAgentsRequest{Wait: bad})
		expectCode(t, err, codes.InvalidArgument, "wait is")
	}
}

func (w *world) authorities() localauthorityv1.LocalAuthorityClient {
	w.t.Helper()
	return localauthorityv1.NewLocalAuthorityClient(w.admin())
}

func TestSPIREsCallsPrepareAndActivateAuthorities(t *testing.T) {
	w := newWorld(t)
	a := w.authorities()
	was, err := a.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	must(t, err)
	if was.Active == nil || was.Prepared != nil || was.Old != nil {
		t.Errorf("at first: %v", was)
	}
	_, err = a.ActivateX509Authority(t.Context(), &localauthorityv1.ActivateX509AuthorityRequest{})
	expectCode(t, err, codes.InvalidArgument, "no authority ID provided")
	_, err = a.ActivateX509Authority(t.Context(), &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: "x"})
	expectCode(t, err, codes.FailedPrecondition, "no x509 authority is prepared")
	prepared, err := a.PrepareX509Authority(t.Context(), &localauthorityv1.PrepareX509AuthorityRequest{})
	must(t, err)
	_, err = a.ActivateX509Authority(t.Context(), &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: "x"})
	expectCode(t, err, codes.InvalidArgument, "unexpected authority ID")
	_, err = a.ActivateX509Authority(t.Context(), &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: prepared.PreparedAuthority.AuthorityId})
	must(t, err)
	is, err := a.GetX509AuthorityState(t.Context(), &localauthorityv1.GetX509AuthorityStateRequest{})
	must(t, err)
	if is.Active.AuthorityId != prepared.PreparedAuthority.AuthorityId || is.Old.AuthorityId != was.Active.AuthorityId || is.Active.ExpiresAt == 0 {
		t.Errorf("at last: %v", is)
	}
	jwt, err := a.PrepareJWTAuthority(t.Context(), &localauthorityv1.PrepareJWTAuthorityRequest{})
	must(t, err)
	_, err = a.ActivateJWTAuthority(t.Context(), &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: jwt.PreparedAuthority.AuthorityId})
	must(t, err)
	state, err := a.GetJWTAuthorityState(t.Context(), &localauthorityv1.GetJWTAuthorityStateRequest{})
	must(t, err)
	if state.Active.AuthorityId != jwt.PreparedAuthority.AuthorityId {
		t.Errorf("the JWT authorities: %v", state)
	}
	_, err = a.TaintX509Authority(t.Context(), &localauthorityv1.TaintX509AuthorityRequest{})
	expectCode(t, err, codes.InvalidArgument, "no authority ID provided")
}

func TestJoinInfoSaysWhereAndPinsTheRoots(t *testing.T) {
	w := newWorld(t)
	got, err := w.adminService().GetJoinInfo(t.Context(), &hallmarkv1.GetJoinInfoRequest{})
	must(t, err)
	root := w.registry.View().Bundle(td).X509Authorities[0].Certificate
	sum := sha256.Sum256(root.Raw)
	if got.Address != w.address || got.TrustDomain != "example.org" || len(got.RootHashes) != 1 || !bytes.Equal(got.RootHashes[0], sum[:]) {
		t.Errorf("got %v", got)
	}
	w = newWorld(t, func(o *api.Options) { o.Advertise = "server.example.org:8081" })
	got, err = w.adminService().GetJoinInfo(t.Context(), &hallmarkv1.GetJoinInfoRequest{})
	must(t, err)
	if got.Address != "server.example.org:8081" {
		t.Errorf("got %v", got)
	}
}

func TestHealthIsThatOfTheAuthorities(t *testing.T) {
	w := newWorld(t)
	health := grpc_health_v1.NewHealthClient(w.admin())
	resp, err := health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	must(t, err)
	if resp.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("it is %v", resp.Status)
	}
	_, err = health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "x"})
	expectCode(t, err, codes.NotFound, "")
	w.sleep(48 * time.Hour) // the authorities have expired
	resp, err = health.Check(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	must(t, err)
	if resp.Status != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("it is %v", resp.Status)
	}
}

func TestWhoeverWatchesTheHealthLearnsOfItsChange(t *testing.T) {
	w := newWorld(t)
	health := grpc_health_v1.NewHealthClient(w.admin())
	all, err := health.List(t.Context(), &grpc_health_v1.HealthListRequest{})
	must(t, err)
	if len(all.Statuses) != 1 || all.Statuses[""].GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		t.Errorf("the list is %v", all)
	}
	next := func(stream grpc_health_v1.Health_WatchClient, want grpc_health_v1.HealthCheckResponse_ServingStatus) {
		t.Helper()
		if resp, err := stream.Recv(); err != nil || resp.Status != want {
			t.Errorf("got %v, %v; want %v", resp, err, want)
		}
	}
	unknown, err := health.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: "x"})
	must(t, err)
	next(unknown, grpc_health_v1.HealthCheckResponse_SERVICE_UNKNOWN)
	stream, err := health.Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	must(t, err)
	next(stream, grpc_health_v1.HealthCheckResponse_SERVING)
	w.sleep(48 * time.Hour) // the authorities have expired
	next(stream, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	_ = w.stop()
	_, err = stream.Recv()
	expectCode(t, err, codes.Unavailable, "stopping")
}

func TestTheStreamPushesWhatTheAgentIsAuthorizedFor(t *testing.T) {
	w := newWorld(t)
	agent := w.follow(w.newAgent())
	e := w.create(agent.svid, "/a")
	if m := agent.next(w); len(m.Entries) != 1 || m.Entries[0].SpiffeId != "spiffe://example.org/a" {
		t.Errorf("the agent was sent %v", m)
	}
	_, err := entryv1.NewEntryClient(w.admin()).BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{e.Id}})
	must(t, err)
	if m := agent.next(w); len(m.GoneEntries) != 1 || m.GoneEntries[0] != e.Id {
		t.Errorf("the agent was sent %v", m)
	}
}

func TestABannedOrDeletedAgentLosesItsStreamAndLearnsWhy(t *testing.T) {
	w := newWorld(t)
	agents := agentv1.NewAgentClient(w.admin())
	banned, deleted := w.follow(w.newAgent()), w.follow(w.newAgent())
	_, err := agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(banned.id)})
	must(t, err)
	_, err = banned.stream.Recv()
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_BANNED)
	_, err = agents.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wireID(deleted.id)})
	must(t, err)
	_, err = deleted.stream.Recv()
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
}

func TestASecondStreamAndNonsenseAreToldApart(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	old := w.follow(agent)
	fresh := w.follow(agent)
	_, err := old.stream.Recv()
	expectCode(t, err, codes.Aborted, "another stream")
	must(t, fresh.stream.Send(&hallmarkv1.FollowRequest{Revision: 1 << 40}))
	_, err = fresh.stream.Recv()
	expectCode(t, err, codes.InvalidArgument, "acknowledges revision")
}

func TestTheServerSaysWhatItsAttestorsAreWorth(t *testing.T) {
	w := newWorld(t)
	resp, err := hallmarkv1.NewAdminServiceClient(w.admin()).ListNodeAttestors(t.Context(), &hallmarkv1.ListNodeAttestorsRequest{})
	must(t, err)
	if len(resp.NodeAttestors) != 2 {
		t.Fatalf("it has %v", resp.NodeAttestors)
	}
	token, tpm := resp.NodeAttestors[0], resp.NodeAttestors[1]
	if token.Name != "join_token" || !token.Configured || token.Strength != "bearer" || token.Needed == "" || len(token.Selectors) != 0 {
		t.Errorf("join tokens: %v", token)
	}
	if tpm.Name != "tpm_ek" || tpm.Configured || tpm.Strength != "hardware" || tpm.Page != "docs/attestors/tpm_ek.md" || tpm.Selectors[0].Form != "tpm_ek:ek:sha256:HASH" {
		t.Errorf("TPMs: %v", tpm)
	}
}
