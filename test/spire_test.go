package test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	authorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hallmark-id/hallmark/test/harness"
)

// spireServer is a server as whoever knows only SPIRE's contracts sees it.
type spireServer struct {
	address string
	admin   *grpc.ClientConn
}

func startSPIREServer(t testing.TB) *spireServer {
	t.Helper()
	dir := devDir(t)
	s := &spireServer{address: harness.FreeAddress(t)}
	config, socket := filepath.Join(dir, "server.yaml"), filepath.Join(dir, "admin.sock")
	text := fmt.Sprintf("trust_domain: example.org\nlisten: %s\ndata_dir: %s/data\nadmin_socket: %s\nlog: {level: warn}\n", s.address, dir, socket)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Command{Args: []string{"server", "run", "-c", config}}.Start(t).
		WaitReady(t, "server", "health", "--admin-socket", socket)
	s.admin = harness.Dial(t, socket)
	return s
}

// spireAgent does what SPIRE's agent does, call by call.
type spireAgent struct {
	t      testing.TB
	server *spireServer
	bundle *x509bundle.Bundle
	id     *types.SPIFFEID
	conn   *grpc.ClientConn // with its SVID
}

func newCSR(t testing.TB) (*ecdsa.PrivateKey, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

// bootstrap fetches the bundle from the admin socket, as an operator would.
func bootstrap(t testing.TB, s *spireServer) *spireAgent {
	t.Helper()
	b, err := bundlev1.NewBundleClient(s.admin).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	a := &spireAgent{t: t, server: s}
	a.trust(b)
	return a
}

func (a *spireAgent) trust(b *types.Bundle) {
	a.t.Helper()
	a.bundle = x509bundle.New(spiffeid.RequireTrustDomainFromString(b.TrustDomain))
	for _, x := range b.X509Authorities {
		cert, err := x509.ParseCertificate(x.Asn1)
		if err != nil {
			a.t.Fatal(err)
		}
		a.bundle.AddX509Authority(cert)
	}
}

func (a *spireAgent) dial(config *tls.Config) *grpc.ClientConn {
	a.t.Helper()
	conn, err := grpc.NewClient(a.server.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { conn.Close() })
	return conn
}

var serverID = tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/spire/server"))

// attest attests with a join token and connects with the SVID.
func (a *spireAgent) attest(token string) error {
	a.t.Helper()
	key, csr := newCSR(a.t)
	stream, err := agentv1.NewAgentClient(a.dial(tlsconfig.TLSClientConfig(a.bundle, serverID))).AttestAgent(a.t.Context())
	if err != nil {
		return err
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		return err
	}
	answer, err := stream.Recv()
	if err != nil {
		return err
	}
	if answer.GetResult().GetReattestable() {
		a.t.Error("an agent with a join token may attest again")
	}
	a.use(answer.GetResult().GetSvid(), key)
	return nil
}

// use verifies an SVID of the agent and connects with it.
func (a *spireAgent) use(svid *types.X509SVID, key *ecdsa.PrivateKey) {
	a.t.Helper()
	own := &x509svid.SVID{ID: spiffeid.RequireFromPath(a.bundle.TrustDomain(), svid.Id.Path), PrivateKey: key, Certificates: a.verify(svid)}
	a.id = svid.Id
	a.conn = a.dial(tlsconfig.MTLSClientConfig(own, a.bundle, serverID))
}

func (a *spireAgent) verify(svid *types.X509SVID) []*x509.Certificate {
	a.t.Helper()
	id, _, err := x509svid.ParseAndVerify(svid.CertChain, a.bundle)
	if err != nil {
		a.t.Fatal(err)
	}
	if want := "spiffe://" + svid.Id.TrustDomain + svid.Id.Path; id.String() != want {
		a.t.Fatalf("the SVID is of %q, the answer says %q", id, want)
	}
	var chain []*x509.Certificate
	for _, der := range svid.CertChain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			a.t.Fatal(err)
		}
		chain = append(chain, cert)
	}
	return chain
}

func (a *spireAgent) entries() entryv1.EntryClient { return entryv1.NewEntryClient(a.conn) }

// sync is SyncAuthorizedEntries as SPIRE's agent uses it: everything at once,
// or revisions first and then those that it lacks.
func (a *spireAgent) sync() map[string]*types.Entry {
	a.t.Helper()
	stream, err := a.entries().SyncAuthorizedEntries(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	send := func(r *entryv1.SyncAuthorizedEntriesRequest) {
		if err := stream.Send(r); err != nil {
			a.t.Fatal(err)
		}
	}
	out := map[string]*types.Entry{}
	var lacking []string
	send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true, Selectors: true, RevisionNumber: true}})
	for more := true; more; {
		res, err := stream.Recv()
		if err != nil {
			a.t.Fatal(err)
		}
		for _, e := range res.Entries {
			out[e.Id] = e
		}
		for _, r := range res.EntryRevisions {
			lacking = append(lacking, r.Id)
		}
		more = res.More
	}
	slices.Sort(lacking)
	for page := range slices.Chunk(lacking, 500) {
		send(&entryv1.SyncAuthorizedEntriesRequest{Ids: page})
		for more := true; more; {
			res, err := stream.Recv()
			if err != nil {
				a.t.Fatal(err)
			}
			for _, e := range res.Entries {
				out[e.Id] = e
			}
			more = res.More
		}
	}
	if err := stream.CloseSend(); err != nil {
		a.t.Fatal(err)
	}
	return out
}

func newToken(t testing.TB, s *spireServer) string {
	t.Helper()
	token, err := agentv1.NewAgentClient(s.admin).CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 60})
	if err != nil {
		t.Fatal(err)
	}
	return token.Value
}

func createEntries(t testing.TB, s *spireServer, parent *types.SPIFFEID, from, n int) (ids []string) {
	t.Helper()
	for n > 0 {
		size := min(n, 1000)
		request := &entryv1.BatchCreateEntryRequest{}
		for i := range size {
			request.Entries = append(request.Entries, &types.Entry{
				SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/w/%d", from+i)},
				ParentId:  parent,
				Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", from+i)}},
				Hint:      fmt.Sprintf("hint-%d", (from+i)%10),
			})
		}
		res, err := entryv1.NewEntryClient(s.admin).BatchCreateEntry(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res.Results {
			if r.Status.Code != int32(codes.OK) {
				t.Fatal(r.Status)
			}
			ids = append(ids, r.Entry.Id)
		}
		from, n = from+size, n-size
	}
	return ids
}

func wantCode(t testing.TB, what string, err error, code codes.Code, reason types.PermissionDeniedDetails_Reason) {
	t.Helper()
	st := status.Convert(err)
	if st.Code() != code {
		t.Errorf("%s: %v, want %v", what, err, code)
		return
	}
	if code != codes.PermissionDenied {
		return
	}
	for _, d := range st.Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok && d.Reason == reason {
			return
		}
	}
	t.Errorf("%s: no detail %v in %v", what, reason, st.Details())
}

// TestSPIREAgentLivesItsLife: attest, sync by both calls, sign, renew, be
// renewed because of a tainted authority, be evicted, attest anew, be banned.
func TestSPIREAgentLivesItsLife(t *testing.T) {
	t.Parallel()
	s := startSPIREServer(t)
	ctx := t.Context()
	a := bootstrap(t, s)
	token := newToken(t, s)
	if err := a.attest(token); err != nil {
		t.Fatal(err)
	}
	if want := "/spire/agent/join_token/" + token; a.id.Path != want {
		t.Errorf("the agent is %q, want %q", a.id.Path, want)
	}
	second := bootstrap(t, s)
	wantCode(t, "a used token", second.attest(token), codes.InvalidArgument, 0)

	// A page of 500 and less comes whole, more than that in two steps.
	ids := createEntries(t, s, a.id, 0, 500)
	if got := a.sync(); len(got) != 500 || got[ids[7]].GetSpiffeId().GetPath() != "/w/7" {
		t.Errorf("sync of a page: %d entries", len(got))
	}
	ids = append(ids, createEntries(t, s, a.id, 500, 700)...)
	if got := a.sync(); len(got) != 1200 || len(got[ids[1100]].GetSelectors()) != 1 {
		t.Errorf("sync of more: %d entries", len(got))
	}
	all, err := a.entries().GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
	if err != nil || len(all.Entries) != 1200 {
		t.Errorf("GetAuthorizedEntries: %d entries, %v", len(all.GetEntries()), err)
	}

	// Sign a batch, with one entry that is another's and one bad CSR.
	foreign := createEntries(t, s, &types.SPIFFEID{TrustDomain: "example.org", Path: "/elsewhere"}, 5000, 1)
	_, csr := newCSR(t)
	request := &svidv1.BatchNewX509SVIDRequest{}
	for _, id := range ids[:100] {
		request.Params = append(request.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
	}
	request.Params = append(request.Params, &svidv1.NewX509SVIDParams{EntryId: foreign[0], Csr: csr}, &svidv1.NewX509SVIDParams{EntryId: ids[0], Csr: []byte("x")})
	signed, err := svidv1.NewSVIDClient(a.conn).BatchNewX509SVID(ctx, request)
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range signed.Results[:100] {
		if r.Status.Code != 0 || r.Svid.Id.Path != fmt.Sprintf("/w/%d", i) {
			t.Fatalf("item %d: %v, %v", i, r.Status, r.Svid.GetId())
		}
		a.verify(r.Svid)
	}
	if got := codes.Code(signed.Results[100].Status.Code); got != codes.NotFound {
		t.Errorf("another's entry: %v", got)
	}
	if got := codes.Code(signed.Results[101].Status.Code); got != codes.InvalidArgument {
		t.Errorf("a bad CSR: %v", got)
	}
	jwt, err := svidv1.NewSVIDClient(a.conn).NewJWTSVID(ctx, &svidv1.NewJWTSVIDRequest{EntryId: ids[0], Audience: []string{"a"}})
	if err != nil || jwt.Svid.Token == "" {
		t.Errorf("NewJWTSVID: %v", err)
	}

	// Renew. The old SVID is good until the new one is presented.
	old := a.conn
	a.renew()
	if _, err := agentv1.NewAgentClient(old).PostStatus(ctx, &agentv1.PostStatusRequest{CurrentBundleSerial: 1}); err != nil {
		t.Errorf("the old SVID before the new one was presented: %v", err)
	}
	a.sync()
	_, err = agentv1.NewAgentClient(old).PostStatus(ctx, &agentv1.PostStatusRequest{})
	wantCode(t, "the old SVID after that", err, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	a.surviveTaint()

	// Evicted: it drops its SVID and attests again, with another token.
	if _, err := agentv1.NewAgentClient(s.admin).DeleteAgent(ctx, &agentv1.DeleteAgentRequest{Id: a.id}); err != nil {
		t.Fatal(err)
	}
	_, err = a.entries().GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
	wantCode(t, "evicted", err, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	if err := a.attest(newToken(t, s)); err != nil {
		t.Fatal(err)
	}
	if got := a.sync(); len(got) != 0 {
		t.Errorf("as another agent it is authorized for %d entries of the former", len(got))
	}

	// Banned.
	if _, err := agentv1.NewAgentClient(s.admin).BanAgent(ctx, &agentv1.BanAgentRequest{Id: a.id}); err != nil {
		t.Fatal(err)
	}
	_, err = a.entries().GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
	wantCode(t, "banned", err, codes.PermissionDenied, types.PermissionDeniedDetails_AGENT_BANNED)
}

func (a *spireAgent) renew() {
	a.t.Helper()
	key, csr := newCSR(a.t)
	renewed, err := agentv1.NewAgentClient(a.conn).RenewAgent(a.t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	if err != nil {
		a.t.Fatal(err)
	}
	a.use(renewed.Svid, key)
}

// surviveTaint lets the operator replace, taint and revoke the authority that
// signed the agent's SVID, and does what an agent does then.
func (a *spireAgent) surviveTaint() {
	a.t.Helper()
	ctx := a.t.Context()
	fetch := func() *types.Bundle {
		b, err := bundlev1.NewBundleClient(a.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
		if err != nil {
			a.t.Fatal(err)
		}
		a.trust(b)
		return b
	}
	authorities := authorityv1.NewLocalAuthorityClient(a.server.admin)
	state, err := authorities.GetX509AuthorityState(ctx, &authorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	first := state.Active.AuthorityId
	prepared, err := authorities.PrepareX509Authority(ctx, &authorityv1.PrepareX509AuthorityRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	fetch() // the agent has the next authority before it signs
	if _, err := authorities.ActivateX509Authority(ctx, &authorityv1.ActivateX509AuthorityRequest{AuthorityId: prepared.PreparedAuthority.AuthorityId}); err != nil {
		a.t.Fatal(err)
	}
	if _, err := authorities.TaintX509Authority(ctx, &authorityv1.TaintX509AuthorityRequest{AuthorityId: first}); err != nil {
		a.t.Fatal(err)
	}
	tainted := 0
	for _, x := range fetch().X509Authorities {
		if x.Tainted {
			tainted++
		}
	}
	if tainted != 1 {
		a.t.Errorf("%d authorities of the bundle are tainted, want one", tainted)
	}
	a.renew() // because of it
	a.sync()
	if _, err := authorities.RevokeX509Authority(ctx, &authorityv1.RevokeX509AuthorityRequest{AuthorityId: first}); err != nil {
		a.t.Fatal(err)
	}
	if n := len(fetch().X509Authorities); n != 1 {
		a.t.Errorf("the bundle has %d X.509 authorities after the revocation, want one", n)
	}
	a.sync()
}

// TestSPIREControllerManagesEntries: create, list by every filter, update by
// mask, delete, and page through 50,000.
func TestSPIREControllerManagesEntries(t *testing.T) {
	t.Parallel()
	s := startSPIREServer(t)
	ctx := t.Context()
	client := entryv1.NewEntryClient(s.admin)
	id := func(path string) *types.SPIFFEID { return &types.SPIFFEID{TrustDomain: "example.org", Path: path} }
	sel := func(values ...string) (out []*types.Selector) {
		for _, v := range values {
			out = append(out, &types.Selector{Type: "unix", Value: v})
		}
		return out
	}
	created, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{
		{Id: "a", SpiffeId: id("/a"), ParentId: id("/p"), Selectors: sel("uid:1"), Hint: "x", Downstream: true},
		{Id: "b", SpiffeId: id("/b"), ParentId: id("/p"), Selectors: sel("uid:1", "gid:1"), Hint: "y"},
		{Id: "c", SpiffeId: id("/c"), ParentId: id("/q"), Selectors: sel("gid:1", "path:/c"), Hint: "x"},
		{Id: "dup", SpiffeId: id("/a"), ParentId: id("/p"), Selectors: sel("uid:1")},
		{Id: "bad", SpiffeId: id("/bad"), ParentId: id("/p")},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.OK, codes.OK, codes.AlreadyExists, codes.InvalidArgument} {
		if got := codes.Code(created.Results[i].Status.Code); got != want {
			t.Errorf("create item %d: %v, want %v", i, created.Results[i].Status, want)
		}
	}
	if created.Results[3].Entry.GetId() != "a" {
		t.Errorf("the similar entry is %v", created.Results[3].Entry)
	}
	match := func(behavior types.SelectorMatch_MatchBehavior, values ...string) *entryv1.ListEntriesRequest_Filter {
		return &entryv1.ListEntriesRequest_Filter{BySelectors: &types.SelectorMatch{Match: behavior, Selectors: sel(values...)}}
	}
	for name, c := range map[string]struct {
		filter *entryv1.ListEntriesRequest_Filter
		want   []string
	}{
		"none":       {nil, []string{"a", "b", "c"}},
		"SPIFFE ID":  {&entryv1.ListEntriesRequest_Filter{BySpiffeId: id("/b")}, []string{"b"}},
		"parent":     {&entryv1.ListEntriesRequest_Filter{ByParentId: id("/p")}, []string{"a", "b"}},
		"exact":      {match(types.SelectorMatch_MATCH_EXACT, "gid:1", "uid:1"), []string{"b"}},
		"subset":     {match(types.SelectorMatch_MATCH_SUBSET, "gid:1", "uid:1"), []string{"a", "b"}},
		"superset":   {match(types.SelectorMatch_MATCH_SUPERSET, "gid:1"), []string{"b", "c"}},
		"any":        {match(types.SelectorMatch_MATCH_ANY, "uid:1", "path:/c"), []string{"a", "b", "c"}},
		"hint":       {&entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("x")}, []string{"a", "c"}},
		"downstream": {&entryv1.ListEntriesRequest_Filter{ByDownstream: wrapperspb.Bool(true)}, []string{"a"}},
		"two":        {&entryv1.ListEntriesRequest_Filter{ByParentId: id("/p"), ByHint: wrapperspb.String("y")}, []string{"b"}},
	} {
		list, err := client.ListEntries(ctx, &entryv1.ListEntriesRequest{Filter: c.filter})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, e := range list.Entries {
			got = append(got, e.Id)
		}
		if slices.Sort(got); !slices.Equal(got, c.want) {
			t.Errorf("by %s: %v, want %v", name, got, c.want)
		}
	}

	updated, err := client.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{
		Entries:   []*types.Entry{{Id: "b", Hint: "z", SpiffeId: id("/ignored")}, {Id: "nobody", Hint: "z"}},
		InputMask: &types.EntryMask{Hint: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	if b := updated.Results[0].Entry; b.GetHint() != "z" || b.GetSpiffeId().GetPath() != "/b" || b.GetRevisionNumber() != 1 {
		t.Errorf("updated by mask: %v, %v", updated.Results[0].Status, b)
	}
	if got := codes.Code(updated.Results[1].Status.Code); got != codes.NotFound {
		t.Errorf("update of none: %v", got)
	}
	deleted, err := client.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{"a", "nobody", "b", "c"}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []codes.Code{codes.OK, codes.NotFound, codes.OK, codes.OK} {
		if got := codes.Code(deleted.Results[i].Status.Code); got != want {
			t.Errorf("delete item %d: %v, want %v", i, got, want)
		}
	}

	const many = 50_000
	createEntries(t, s, id("/p"), 0, many)
	count, err := client.CountEntries(ctx, &entryv1.CountEntriesRequest{})
	if err != nil || count.Count != many {
		t.Errorf("count is %d, %v", count.GetCount(), err)
	}
	seen, token, last := map[string]bool{}, "", ""
	for page := 0; page == 0 || token != ""; page++ {
		list, err := client.ListEntries(ctx, &entryv1.ListEntriesRequest{PageSize: 1000, PageToken: token, OutputMask: &types.EntryMask{SpiffeId: true}})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range list.Entries {
			if seen[e.Id] || e.Id <= last || len(e.Selectors) > 0 {
				t.Fatalf("page %d: entry %s twice, out of order or more than the mask", page, e.Id)
			}
			seen[e.Id], last = true, e.Id
		}
		if page == 20 { // what comes and goes meanwhile disturbs no page
			createEntries(t, s, id("/other"), many, 10)
		}
		token = list.NextPageToken
	}
	if len(seen) < many || len(seen) > many+10 {
		t.Errorf("pages hold %d entries", len(seen))
	}
	if _, err := client.ListEntries(context.Background(), &entryv1.ListEntriesRequest{PageToken: "\x00nonsense"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a made-up page token: %v", err)
	}
}
