package api_test

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmark-id/hallmark/server/api"
	"github.com/hallmark-id/hallmark/server/registry"
)

// matrix is who may call what, as SPIRE's documentation has it, with our own
// services: service, then callers and methods.
const matrix = `
spire.api.server.svid.v1.SVID
	local admin: MintX509SVID MintJWTSVID MintWITSVID
	agent: BatchNewX509SVID NewJWTSVID BatchNewWITSVID
	downstream: NewDownstreamX509CA
spire.api.server.bundle.v1.Bundle
	local admin: AppendBundle CountBundles ListFederatedBundles BatchCreateFederatedBundle BatchUpdateFederatedBundle BatchSetFederatedBundle BatchDeleteFederatedBundle
	local admin agent: GetFederatedBundle
	downstream: PublishJWTAuthority PublishWITAuthority
	local admin agent downstream workload stranger none: GetBundle
spire.api.server.entry.v1.Entry
	local admin: CountEntries ListEntries GetEntry BatchCreateEntry BatchUpdateEntry BatchDeleteEntry
	agent: GetAuthorizedEntries SyncAuthorizedEntries
spire.api.server.agent.v1.Agent
	local admin: CountAgents ListAgents GetAgent DeleteAgent BanAgent CreateJoinToken
	agent: RenewAgent PostStatus
	local admin agent downstream workload stranger none: AttestAgent
spire.api.server.localauthority.v1.LocalAuthority
	local admin: GetJWTAuthorityState PrepareJWTAuthority ActivateJWTAuthority TaintJWTAuthority RevokeJWTAuthority
	local admin: GetX509AuthorityState PrepareX509Authority ActivateX509Authority TaintX509Authority TaintX509UpstreamAuthority RevokeX509Authority RevokeX509UpstreamAuthority
	local admin: GetWITAuthorityState PrepareWITAuthority ActivateWITAuthority TaintWITAuthority RevokeWITAuthority
spire.api.server.trustdomain.v1.TrustDomain
	local admin: ListFederationRelationships GetFederationRelationship BatchCreateFederationRelationship BatchUpdateFederationRelationship BatchDeleteFederationRelationship RefreshBundle
spire.api.server.debug.v1.Debug
	local: GetInfo
spire.api.server.logger.v1.Logger
	local: GetLogger SetLogLevel ResetLogLevel
grpc.health.v1.Health
	local: Check List Watch
grpc.reflection.v1.ServerReflection
	local: ServerReflectionInfo
grpc.reflection.v1alpha.ServerReflection
	local: ServerReflectionInfo
hallmark.v1.FeedService
	agent: Follow
hallmark.v1.AdminService
	local: GetServer Backup ListAuthorities RotateAuthority ListConnections GetJoinInfo ListNodeAttestors AwaitAgents ExplainToken LintIssuers RevokeSVIDs ListSVIDs ListRevocations ListBundleFetches ListPublishTargets
hallmark.v1.ClusterService
	local: ListServers Invite RemoveServer
	local admin agent downstream workload stranger none: Join
not.a.Service
	: Method
spire.api.server.entry.v1.Entry
	: NotAMethod
`

func parseMatrix() map[string][]string {
	out := make(map[string][]string)
	var service string
	for _, line := range strings.Split(strings.TrimSpace(matrix), "\n") {
		callers, names, ok := strings.Cut(strings.TrimPrefix(line, "\t"), ":")
		if !ok {
			service = line
			continue
		}
		for _, name := range strings.Fields(names) {
			out["/"+service+"/"+name] = strings.Fields(callers)
		}
	}
	return out
}

func TestEveryMethodAdmitsExactlyItsCallers(t *testing.T) {
	t.Run("without WIT", func(t *testing.T) { everyMethodAdmitsExactlyItsCallers(t, newWorld(t)) })
	t.Run("with WIT", func(t *testing.T) { everyMethodAdmitsExactlyItsCallers(t, newWITWorld(t)) })
}

func everyMethodAdmitsExactlyItsCallers(t *testing.T, w *world) {
	agent := w.newAgent()
	callers := map[string]*grpc.ClientConn{
		"local":      w.admin(),
		"admin":      w.connect(w.workload(agent, "/admin", func(e *types.Entry) { e.Admin = true })),
		"agent":      w.connect(agent),
		"downstream": w.connect(w.workload(agent, "/downstream", func(e *types.Entry) { e.Downstream = true })),
		"workload":   w.connect(w.workload(agent, "/workload")),
		"stranger":   w.connect(selfSigned(t, "spiffe://example.org/admin")),
		"none":       w.connect(nil),
	}
	expected := parseMatrix()
	// Every method that is registered anywhere is in the matrix, and so is every
	// method of the table.
	tcp, admin := api.Services(w.api)
	for _, services := range []map[string]grpc.ServiceInfo{tcp, admin} {
		for service, info := range services {
			for _, m := range info.Methods {
				if _, ok := expected["/"+service+"/"+m.Name]; !ok {
					t.Errorf("the matrix lacks /%s/%s", service, m.Name)
				}
			}
		}
	}
	for _, name := range api.Methods() {
		if _, ok := expected[name]; !ok {
			t.Errorf("the matrix lacks %s", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(expected)) {
		for caller, conn := range callers {
			err := call(t.Context(), conn, name)
			denied := grpcstatus.Code(err) == codes.PermissionDenied
			if want := !slices.Contains(expected[name], caller); denied != want {
				t.Errorf("%s calls %s: %v, want denied: %v", caller, name, err, want)
			}
			if denied && caller != "stranger" && !strings.Contains(err.Error(), "authorization denied for method "+name) {
				t.Errorf("%s calls %s: %v", caller, name, err)
			}
		}
	}
}

// call calls any method with an empty request.
func call(ctx context.Context, conn *grpc.ClientConn, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, name)
	if err != nil {
		return err
	}
	_ = stream.SendMsg(&emptypb.Empty{}) // Recv tells
	_ = stream.CloseSend()
	return stream.RecvMsg(&emptypb.Empty{})
}

func TestAConfiguredAdminIDAdministers(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.AdminIDs = append(o.AdminIDs, id("/ops")) })
	ops := w.workload(w.newAgent(), "/ops")
	_, err := entryv1.NewEntryClient(w.connect(ops)).CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
	must(t, err)
}

func TestAnAdminWhoseEntryIsDeletedIsDeniedAtOnce(t *testing.T) {
	w := newWorld(t)
	boss := w.workload(w.newAgent(), "/boss", func(e *types.Entry) { e.Admin = true })
	entries := entryv1.NewEntryClient(w.connect(boss))
	list, err := entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	must(t, err)
	_, err = entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{list.Entries[0].Id}})
	must(t, err)
	_, err = entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	expectCode(t, err, codes.PermissionDenied, "authorization denied for method")
}

func TestAnAgentIsToldWhyItIsDenied(t *testing.T) {
	w := newWorld(t)
	admin := agentv1.NewAgentClient(w.admin())
	check := func(s *svid) error {
		_, err := entryv1.NewEntryClient(w.connect(s)).GetAuthorizedEntries(w.t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		return err
	}

	deleted := w.newAgent()
	must(t, check(deleted))
	_, err := admin.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: wireID(deleted.id)})
	must(t, err)
	expectReason(t, check(deleted), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)

	banned := w.newAgent()
	_, err = admin.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: wireID(banned.id)})
	must(t, err)
	expectReason(t, check(banned), types.PermissionDeniedDetails_AGENT_BANNED)

	// It presents a certificate with its ID that was signed for a workload.
	old := w.newAgent()
	_, err = w.registry.UpdateNode(t.Context(), old.id, func(n *registry.Node) error { n.SerialNumber = "1"; return nil })
	must(t, err)
	expectReason(t, check(old), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	expectReason(t, check(selfSigned(t, banned.id.String())), types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)

	expired := w.newAgent()
	conn := w.connect(expired)
	_, err = entryv1.NewEntryClient(conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	must(t, err)
	w.sleep(time.Until(expired.leaf().NotAfter) + time.Second)
	_, err = entryv1.NewEntryClient(conn).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_EXPIRED)
	// It can fetch the bundle all the same, as anyone can.
	_, err = bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	must(t, err)
}

func TestARenewedSVIDTakesOverWhenItIsFirstPresented(t *testing.T) {
	w := newWorld(t)
	old := w.newAgent()
	check := func(s *svid) error {
		_, err := entryv1.NewEntryClient(w.connect(s)).GetAuthorizedEntries(w.t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		return err
	}
	forgotten := w.renew(old)
	fresh := w.renew(old) // another one: that before is worth nothing
	must(t, check(old))
	expectReason(t, check(forgotten), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	before := w.registry.View().Revision()
	errs := make(chan error)
	for range 20 { // at once: it is activated only once
		go func() { errs <- check(fresh) }()
	}
	for range 20 {
		must(t, <-errs)
	}
	if n := w.registry.View().Revision() - before; n != 1 {
		t.Errorf("presenting the renewed SVID wrote %d times", n)
	}
	expectReason(t, check(old), types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	n := w.registry.View().Node(old.id)
	if n.SerialNumber != fresh.leaf().SerialNumber.String() || n.NewSerialNumber != "" || !n.ExpiresAt.Equal(fresh.leaf().NotAfter) {
		t.Errorf("the node is %+v", n)
	}
}

func TestACertificateThatIsNoSVIDIsRefusedWithTheReason(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		name string
		svid *svid
		text string
	}{
		{"no URI", selfSigned(t), "no URI SAN"},
		{"two URIs", selfSigned(t, "spiffe://example.org/a", "spiffe://example.org/b"), "more than one URI SAN"},
		{"another scheme", selfSigned(t, "https://example.org/a"), "no X509-SVID"},
		{"another trust domain", selfSigned(t, "spiffe://other.org/a"), "authorization denied for method"},
		{"another authority", selfSigned(t, "spiffe://example.org/a"), "does not verify"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := entryv1.NewEntryClient(w.connect(c.svid)).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
			expectCode(t, err, codes.PermissionDenied, c.text)
		})
	}
	// With an SVID as an intermediate, a workload cannot make itself an admin.
	agent := w.newAgent()
	forged := forge(t, w.workload(agent, "/workload"), "spiffe://example.org/admin")
	w.create(agent, "/admin", func(e *types.Entry) { e.Admin = true })
	_, err := entryv1.NewEntryClient(w.connect(forged)).ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	expectCode(t, err, codes.PermissionDenied, "does not verify")
}

func TestAnAuthorityThatLeavesTheBundleNoLongerVouches(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	entries := entryv1.NewEntryClient(w.connect(agent))
	_, err := entries.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	must(t, err)
	w.dropAuthorities()
	_, err = entries.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
}

func TestDenialsAreLoggedButNotWithoutBound(t *testing.T) {
	w := newWorld(t)
	entries := entryv1.NewEntryClient(w.connect(w.workload(w.newAgent(), "/workload")))
	for range 100 {
		_, err := entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
		expectCode(t, err, codes.PermissionDenied, "")
	}
	lines := w.log.lines("call denied", "ListEntries", "presented=spiffe://example.org/workload")
	if len(lines) == 0 || len(lines) > 60 {
		t.Errorf("100 denials were logged %d times", len(lines))
	}
}
