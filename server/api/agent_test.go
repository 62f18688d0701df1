package api_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/jointoken"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/api"
	"github.com/hallmark-id/hallmark/server/registry"
)

func TestAJoinTokenWorksOnce(t *testing.T) {
	w := newWorld(t)
	token := w.token()
	key := newKey(t)
	res, err := attest(t.Context(), w.connect(nil), jointoken.Name, token, newCSR(t, key))
	must(t, err)
	if res.Reattestable || res.Svid.Id.Path != "/spire/agent/join_token/"+token {
		t.Errorf("the result is %v", res)
	}
	agent := newSVID(t, res.Svid, key)
	_, err = entryv1.NewEntryClient(w.connect(agent)).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	must(t, err)
	_, err = attest(t.Context(), w.connect(nil), jointoken.Name, token, newCSR(t, newKey(t)))
	expectCode(t, err, codes.InvalidArgument, "join token does not exist or has already been used")
	_, err = attest(t.Context(), w.connect(nil), jointoken.Name, "a-guess", newCSR(t, newKey(t)))
	expectCode(t, err, codes.InvalidArgument, "join token does not exist or has already been used")
	if lines := w.log.lines("audit", "AttestAgent", "outcome=OK", "agent="+agent.id.String()); len(lines) != 1 {
		t.Errorf("the attestation was recorded %d times", len(lines))
	}
	if lines := w.log.lines("audit", "AttestAgent", "outcome=InvalidArgument"); len(lines) != 2 {
		t.Errorf("failed attestations were recorded %d times", len(lines))
	}
}

func TestAJoinTokenExpires(t *testing.T) {
	w := newWorld(t)
	token := w.token()
	w.sleep(11 * time.Minute)
	_, err := attest(t.Context(), w.connect(nil), jointoken.Name, token, newCSR(t, newKey(t)))
	expectCode(t, err, codes.InvalidArgument, "join token expired 1m")
}

func TestOfAHundredUsersOfOneTokenOneBecomesAnAgent(t *testing.T) {
	w := newWorld(t)
	token := w.token()
	conns := []*grpc.ClientConn{w.connect(nil), w.connect(nil), w.connect(nil), w.connect(nil)}
	csr := newCSR(t, newKey(t))
	var admitted atomic.Int32
	errs := make(chan error)
	for i := range 100 {
		go func() {
			_, err := attest(t.Context(), conns[i%len(conns)], jointoken.Name, token, csr)
			if err == nil {
				admitted.Add(1)
			}
			errs <- err
		}()
	}
	for range 100 {
		if err := <-errs; err != nil {
			expectCode(t, err, codes.InvalidArgument, "join token does not exist or has already been used")
		}
	}
	if n := admitted.Load(); n != 1 || w.registry.View().NodeCount() != 1 {
		t.Errorf("%d were admitted, and there are %d agents", n, w.registry.View().NodeCount())
	}
}

func TestABannedNodeCannotAttestAgainUntilItIsDeleted(t *testing.T) {
	w := newWorld(t)
	agents := agentv1.NewAgentClient(w.admin())
	again := func(token string) error {
		_, err := agents.CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, Token: token})
		must(t, err)
		_, err = attest(t.Context(), w.connect(nil), jointoken.Name, token, newCSR(t, newKey(t)))
		return err
	}
	must(t, again("one"))
	node := wireID(id("/spire/agent/join_token/one"))
	_, err := agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: node})
	must(t, err)
	err = again("one")
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_BANNED)
	expectCode(t, err, codes.PermissionDenied, "failed to attest: agent is banned")
	_, err = agents.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: node})
	must(t, err)
	must(t, again("one"))
}

func TestARefusedCSRDoesNotUseUpTheToken(t *testing.T) {
	w := newWorld(t)
	token := w.token()
	_, err := attest(t.Context(), w.connect(nil), jointoken.Name, token, []byte("no csr"))
	expectCode(t, err, codes.InvalidArgument, "malformed CSR")
	_, err = attest(t.Context(), w.connect(nil), jointoken.Name, token, nil)
	expectCode(t, err, codes.InvalidArgument, "missing CSR")
	_, err = attest(t.Context(), w.connect(nil), jointoken.Name, token, newCSR(t, newKey(t)))
	must(t, err)
}

func TestAMalformedAttestationIsRefused(t *testing.T) {
	w := newWorld(t)
	csr := newCSR(t, newKey(t))
	for _, c := range []struct {
		typ, payload, text string
		code               codes.Code
	}{
		{"", "x", "missing attestation data type", codes.InvalidArgument},
		{"join_token", "", "missing attestation data payload", codes.InvalidArgument},
		{"join_token", strings.Repeat("x", 64<<10+1), "the most is 65536", codes.InvalidArgument},
		{"join_token", "not/a/token", "join token is malformed", codes.InvalidArgument},
		{"magic", "x", `could not find node attestor type "magic"`, codes.FailedPrecondition},
	} {
		_, err := attest(t.Context(), w.connect(nil), c.typ, c.payload, csr)
		expectCode(t, err, c.code, c.text)
	}
	stream, err := agentv1.NewAgentClient(w.connect(nil)).AttestAgent(t.Context())
	must(t, err)
	must(t, stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: []byte("x")}}))
	_, err = stream.Recv()
	expectCode(t, err, codes.InvalidArgument, "missing params")
}

// scripted is an attestor that does what its payload says.
type scripted struct{}

func (scripted) Verify(ctx context.Context, payload []byte, challenge func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	verb, arg, _ := strings.Cut(string(payload), " ")
	switch verb {
	case "challenge":
		for i := range len(arg) {
			response, err := challenge(ctx, []byte(arg[i:i+1]))
			if err != nil {
				return nil, err
			}
			if string(response) != strings.ToUpper(arg[i:i+1]) {
				return nil, errors.New("wrong response")
			}
		}
		return &attestors.Evidence{Path: "scripted/" + arg, CanReattest: true, Selectors: []selector.Selector{{Type: "scripted", Value: arg}}}, nil
	case "path":
		return &attestors.Evidence{Path: arg, CanReattest: true}, nil
	case "once":
		return &attestors.Evidence{Path: arg, Once: true}, nil
	case "panic":
		panic("boom")
	}
	return nil, errors.New("the evidence is bad")
}

func withScripted(o *api.Options) { o.NodeAttestors["scripted"] = scripted{} }

// converse attests with a node that answers challenges with answer.
func converse(t *testing.T, conn *grpc.ClientConn, payload string, answer func([]byte) *agentv1.AttestAgentRequest) (*agentv1.AttestAgentResponse_Result, error) {
	t.Helper()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(t.Context())
	must(t, err)
	must(t, stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "scripted", Payload: []byte(payload)},
		Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, newKey(t))},
	}}}))
	for {
		resp, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if resp.GetResult() != nil {
			return resp.GetResult(), nil
		}
		_ = stream.Send(answer(resp.GetChallenge()))
	}
}

func response(b []byte) *agentv1.AttestAgentRequest {
	return &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: b}}
}

func upper(b []byte) *agentv1.AttestAgentRequest { return response([]byte(strings.ToUpper(string(b)))) }

func TestAnAttestorMayChallengeTheNode(t *testing.T) {
	w := newWorld(t, withScripted)
	conn := w.connect(nil)
	res, err := converse(t, conn, "challenge abc", upper)
	must(t, err)
	if !res.Reattestable || res.Svid.Id.Path != "/spire/agent/scripted/abc" {
		t.Errorf("the result is %v", res)
	}
	n := w.registry.View().Node(id("/spire/agent/scripted/abc"))
	if n.AttestationType != "scripted" || !n.CanReattest || len(n.Selectors) != 1 || n.Selectors[0].String() != "scripted:abc" {
		t.Errorf("the node is %+v", n)
	}
	_, err = converse(t, conn, "challenge abc", response)
	expectCode(t, err, codes.InvalidArgument, "failed to attest: wrong response")
	_, err = converse(t, conn, "challenge abcdefghijk", upper)
	expectCode(t, err, codes.InvalidArgument, "more than 10 challenges")
	_, err = converse(t, conn, "challenge a", func([]byte) *agentv1.AttestAgentRequest { return response(make([]byte, 64<<10+1)) })
	expectCode(t, err, codes.InvalidArgument, "the most is 65536")
	_, err = converse(t, conn, "challenge a", func([]byte) *agentv1.AttestAgentRequest {
		return &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{}}
	})
	expectCode(t, err, codes.InvalidArgument, "not answered with a response")
}

func TestAnAttestorCannotNameAnIDThatIsNotItsOwn(t *testing.T) {
	w := newWorld(t, withScripted)
	for _, path := range []string{"", "other/x", "scripted", "../server", "scripted/../../server", "scripted//x", "scripted/" + strings.Repeat("x", 3000)} {
		_, err := converse(t, w.connect(nil), "path "+path, upper)
		expectCode(t, err, codes.Internal, "internal error")
	}
	if n := w.registry.View().NodeCount(); n != 0 {
		t.Errorf("there are %d agents", n)
	}
}

// TestAProofThatAdmitsOnce is about proofs that others may have a copy of: the
// first one becomes the agent, even of many at the same time, and nobody else until
// that one is evicted.
func TestAProofThatAdmitsOnce(t *testing.T) {
	w := newWorld(t, withScripted)
	conns := []*grpc.ClientConn{w.connect(nil), w.connect(nil), w.connect(nil)}
	key := newKey(t)
	csr := newCSR(t, key)
	var admitted atomic.Pointer[agentv1.AttestAgentResponse_Result]
	var count atomic.Int32
	errs := make(chan error)
	for i := range 60 {
		go func() {
			res, err := attest(t.Context(), conns[i%len(conns)], "scripted", "once scripted/x", csr)
			if err == nil {
				count.Add(1)
				admitted.Store(res)
			}
			errs <- err
		}()
	}
	for range 60 {
		if err := <-errs; err != nil {
			expectCode(t, err, codes.PermissionDenied, "this node has an agent already")
		}
	}
	if n := count.Load(); n != 1 {
		t.Fatalf("%d were admitted", n)
	}
	if len(w.log.lines("admits once", "agent=spiffe://example.org/spire/agent/scripted/x")) == 0 {
		t.Error("the log does not say that a proof was used again")
	}
	if admitted.Load().Reattestable {
		t.Error("the agent is told to attest again, which it cannot")
	}
	// The agent goes on by what it has.
	first := w.connect(newSVID(t, admitted.Load().Svid, key))
	_, err := agentv1.NewAgentClient(first).RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: csr}})
	must(t, err)
	// An expired one has its name still.
	w.sleep(2 * time.Hour)
	_, err = attest(t.Context(), conns[0], "scripted", "once scripted/x", csr)
	expectCode(t, err, codes.PermissionDenied, "hallmark node evict")

	agents := agentv1.NewAgentClient(w.admin())
	node := wireID(id("/spire/agent/scripted/x"))
	_, err = agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: node})
	must(t, err)
	_, err = attest(t.Context(), conns[0], "scripted", "once scripted/x", csr)
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_BANNED)
	_, err = agents.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: node})
	must(t, err)
	_, err = attest(t.Context(), conns[0], "scripted", "once scripted/x", csr)
	must(t, err)
}

func TestAPanicFailsOneCallAndNoOther(t *testing.T) {
	w := newWorld(t, withScripted)
	conn := w.connect(nil)
	_, err := converse(t, conn, "panic", upper)
	expectCode(t, err, codes.Internal, "internal error")
	_, err = converse(t, conn, "path scripted/fine", upper)
	must(t, err)
	if lines := w.log.lines("a call panicked", "boom", "agent_test.go"); len(lines) != 1 {
		t.Errorf("the panic was logged %d times", len(lines))
	}
}

func TestAnAgentThatCanReattestDoesNotRenew(t *testing.T) {
	w := newWorld(t, withScripted)
	key := newKey(t)
	res, err := attest(t.Context(), w.connect(nil), "scripted", "path scripted/x", newCSR(t, key))
	must(t, err)
	agents := agentv1.NewAgentClient(w.connect(newSVID(t, res.Svid, key)))
	_, err = agents.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(t, key)}})
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	// When it attests again, what it had is worth nothing.
	_, err = attest(t.Context(), w.connect(nil), "scripted", "path scripted/x", newCSR(t, newKey(t)))
	must(t, err)
	_, err = agents.PostStatus(t.Context(), &agentv1.PostStatusRequest{})
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
}

func TestRenewalNeedsACSR(t *testing.T) {
	w := newWorld(t)
	agents := agentv1.NewAgentClient(w.connect(w.newAgent()))
	_, err := agents.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{})
	expectCode(t, err, codes.InvalidArgument, "params cannot be nil")
	_, err = agents.RenewAgent(t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{}})
	expectCode(t, err, codes.InvalidArgument, "missing CSR")
}

func TestAttestationsFromOneAddressAreLimited(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.AttestPerSecond = 1 })
	conn := w.connect(nil)
	ctx, cancel := context.WithCancel(t.Context())
	errs := make(chan error)
	for range 20 { // two at once, then some that wait for their turn
		go func() {
			_, err := attest(ctx, conn, jointoken.Name, "x", nil)
			errs <- err
		}()
	}
	refused := 0
	for range 20 {
		switch err := <-errs; grpcstatus.Code(err) {
		case codes.InvalidArgument, codes.Canceled:
		default:
			expectCode(t, err, codes.ResourceExhausted, "more than 1 a second")
			refused++
			cancel()
		}
	}
	if refused == 0 {
		t.Error("20 attestations at once were let through")
	}
	cancel()
}

func TestJoinTokensHaveBounds(t *testing.T) {
	w := newWorld(t)
	agents := agentv1.NewAgentClient(w.admin())
	for _, c := range []struct {
		req  *agentv1.CreateJoinTokenRequest
		code codes.Code
		text string
	}{
		{&agentv1.CreateJoinTokenRequest{}, codes.InvalidArgument, "ttl is required"},
		{&agentv1.CreateJoinTokenRequest{Ttl: -1}, codes.InvalidArgument, "ttl is required"},
		{&agentv1.CreateJoinTokenRequest{Ttl: 1 << 30}, codes.InvalidArgument, "the most is"},
		{&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "a/b"}, codes.InvalidArgument, "join token may hold"},
		{&agentv1.CreateJoinTokenRequest{Ttl: 60, Token: strings.Repeat("x", 256)}, codes.InvalidArgument, "join token is 256"},
		{&agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: &types.SPIFFEID{TrustDomain: "other.org", Path: "/x"}}, codes.InvalidArgument, "not"},
		{&agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: &types.SPIFFEID{TrustDomain: "example.org"}}, codes.InvalidArgument, ""},
	} {
		_, err := agents.CreateJoinToken(t.Context(), c.req)
		expectCode(t, err, c.code, c.text)
	}
	_, err := agents.CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "same"})
	must(t, err)
	_, err = agents.CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, Token: "same"})
	expectCode(t, err, codes.AlreadyExists, "join token already exists")
	if lines := w.log.lines("same"); len(lines) != 0 {
		t.Errorf("the token is in the log: %q", lines)
	}
}

func TestATokenWithAnAgentIDGivesTheAgentThatIDToo(t *testing.T) {
	w := newWorld(t)
	token, err := agentv1.NewAgentClient(w.admin()).CreateJoinToken(t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 60, AgentId: wireID(id("/node"))})
	must(t, err)
	key := newKey(t)
	res, err := attest(t.Context(), w.connect(nil), jointoken.Name, token.Value, newCSR(t, key))
	must(t, err)
	agent := newSVID(t, res.Svid, key)
	w.create(&svid{id: id("/node")}, "/svc")
	got, err := entryv1.NewEntryClient(w.connect(agent)).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	must(t, err)
	if !slices.ContainsFunc(got.Entries, func(e *types.Entry) bool { return e.SpiffeId.Path == "/svc" }) {
		t.Errorf("the agent gets %v", got.Entries)
	}
}

func TestAgentsAreListedByPagesFiltersAndMasks(t *testing.T) {
	w := newWorld(t)
	agents := agentv1.NewAgentClient(w.admin())
	soon, late := time.Now().Add(time.Hour), time.Now().Add(48*time.Hour)
	for i := range 10 {
		n := &registry.Node{
			ID: id(fmt.Sprintf("/spire/agent/test/%d", i)), AttestationType: "test", SerialNumber: "1", ExpiresAt: soon,
			CanReattest: i%2 == 0, Banned: i == 3, AgentVersion: "1.0",
			Selectors: selector.NewSet(selector.Selector{Type: "test", Value: fmt.Sprint(i % 3)}, selector.Selector{Type: "test", Value: "all"}),
		}
		if i >= 8 {
			n.AttestationType, n.ExpiresAt, n.Selectors = "other", late, nil
		}
		must(t, w.registry.PutNode(t.Context(), n))
	}
	match := func(m types.SelectorMatch_MatchBehavior, values ...string) *types.SelectorMatch {
		out := &types.SelectorMatch{Match: m}
		for _, v := range values {
			out.Selectors = append(out.Selectors, &types.Selector{Type: "test", Value: v})
		}
		return out
	}
	for _, c := range []struct {
		name   string
		filter *agentv1.ListAgentsRequest_Filter
		want   string
	}{
		{"none", nil, "0123456789"},
		{"type", &agentv1.ListAgentsRequest_Filter{ByAttestationType: "other"}, "89"},
		{"banned", &agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(true)}, "3"},
		{"not banned", &agentv1.ListAgentsRequest_Filter{ByBanned: wrapperspb.Bool(false)}, "012456789"},
		{"can reattest", &agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true)}, "02468"},
		{"two", &agentv1.ListAgentsRequest_Filter{ByCanReattest: wrapperspb.Bool(true), ByAttestationType: "other"}, "8"},
		{"exact", &agentv1.ListAgentsRequest_Filter{BySelectorMatch: match(types.SelectorMatch_MATCH_EXACT, "1", "all")}, "147"},
		{"superset", &agentv1.ListAgentsRequest_Filter{BySelectorMatch: match(types.SelectorMatch_MATCH_SUPERSET, "all")}, "01234567"},
		{"subset", &agentv1.ListAgentsRequest_Filter{BySelectorMatch: match(types.SelectorMatch_MATCH_SUBSET, "0", "1", "all")}, "013467"},
		{"any", &agentv1.ListAgentsRequest_Filter{BySelectorMatch: match(types.SelectorMatch_MATCH_ANY, "0", "2")}, "02356"},
		{"expires before", &agentv1.ListAgentsRequest_Filter{ByExpiresBefore: soon.Add(time.Hour).UTC().Format("2006-01-02 15:04:05 -0700 -07")}, "01234567"},
		{"expires before, RFC 3339", &agentv1.ListAgentsRequest_Filter{ByExpiresBefore: soon.Add(time.Hour).Format(time.RFC3339)}, "01234567"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got, token string
			for {
				list, err := agents.ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: c.filter, PageSize: 3, PageToken: token})
				must(t, err)
				for _, a := range list.Agents {
					got += strings.TrimPrefix(a.Id.Path, "/spire/agent/test/")
				}
				if token = list.NextPageToken; token == "" {
					break
				}
			}
			if got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
			f := c.filter
			count, err := agents.CountAgents(t.Context(), &agentv1.CountAgentsRequest{Filter: &agentv1.CountAgentsRequest_Filter{
				ByAttestationType: f.GetByAttestationType(), BySelectorMatch: f.GetBySelectorMatch(), ByBanned: f.GetByBanned(),
				ByCanReattest: f.GetByCanReattest(), ByExpiresBefore: f.GetByExpiresBefore(),
			}})
			must(t, err)
			if int(count.Count) != len(c.want) {
				t.Errorf("counted %d, want %d", count.Count, len(c.want))
			}
		})
	}
	for _, f := range []*agentv1.ListAgentsRequest_Filter{
		{ByExpiresBefore: "tomorrow"},
		{BySelectorMatch: &types.SelectorMatch{}},
		{BySelectorMatch: match(99, "all")},
	} {
		_, err := agents.ListAgents(t.Context(), &agentv1.ListAgentsRequest{Filter: f})
		expectCode(t, err, codes.InvalidArgument, "malformed filter")
	}
	whole, err := agents.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: wireID(id("/spire/agent/test/4"))})
	must(t, err)
	if want := (&types.Agent{
		Id: wireID(id("/spire/agent/test/4")), AttestationType: "test", X509SvidSerialNumber: "1", X509SvidExpiresAt: soon.Unix(), CanReattest: true, AgentVersion: "1.0",
		Selectors: []*types.Selector{{Type: "test", Value: "1"}, {Type: "test", Value: "all"}},
	}); !proto.Equal(whole, want) {
		t.Errorf("got %v, want %v", whole, want)
	}
	masked, err := agents.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: whole.Id, OutputMask: &types.AgentMask{CanReattest: true}})
	must(t, err)
	if want := (&types.Agent{Id: whole.Id, CanReattest: true}); !proto.Equal(masked, want) {
		t.Errorf("got %v, want %v", masked, want)
	}
}

func TestAgentsThatAreNoneAreNotFound(t *testing.T) {
	w := newWorld(t)
	agents := agentv1.NewAgentClient(w.admin())
	for _, c := range []struct {
		id   *types.SPIFFEID
		code codes.Code
	}{
		{nil, codes.InvalidArgument},
		{&types.SPIFFEID{TrustDomain: "other.org", Path: "/spire/agent/x/y"}, codes.InvalidArgument},
		{wireID(id("/workload")), codes.InvalidArgument},
		{wireID(id("/spire/agent/x/y")), codes.NotFound},
	} {
		_, err := agents.GetAgent(t.Context(), &agentv1.GetAgentRequest{Id: c.id})
		expectCode(t, err, c.code, "agent")
		_, err = agents.DeleteAgent(t.Context(), &agentv1.DeleteAgentRequest{Id: c.id})
		expectCode(t, err, c.code, "agent")
		_, err = agents.BanAgent(t.Context(), &agentv1.BanAgentRequest{Id: c.id})
		expectCode(t, err, c.code, "agent")
	}
}

func TestAnAgentPostsItsVersion(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	agents := agentv1.NewAgentClient(w.connect(agent))
	_, err := agents.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1.2.3"})
	must(t, err)
	rev := w.registry.View().Revision()
	_, err = agents.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: "1.2.3"})
	must(t, err)
	if v := w.registry.View(); v.Node(agent.id).AgentVersion != "1.2.3" || v.Revision() != rev {
		t.Errorf("the node is %+v at revision %d, was %d", v.Node(agent.id), v.Revision(), rev)
	}
	_, err = agents.PostStatus(t.Context(), &agentv1.PostStatusRequest{AgentVersion: strings.Repeat("x", 256)})
	expectCode(t, err, codes.InvalidArgument, "the most is 255")
}
