package api_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/big"
	"strings"
	"testing"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func (w *world) revoke(r ...*hallmarkv1.Revocation) (*hallmarkv1.RevokeSVIDsResponse, error) {
	w.t.Helper()
	return hallmarkv1.NewAdminServiceClient(w.admin()).RevokeSVIDs(w.t.Context(), &hallmarkv1.RevokeSVIDsRequest{Revocations: r})
}

// followed opens an agent's push stream and returns how it ended.
func (w *world) followed(conn *grpc.ClientConn) (ended <-chan error) {
	w.t.Helper()
	stream, err := hallmarkv1.NewFeedServiceClient(conn).Follow(w.t.Context())
	must(w.t, err)
	must(w.t, stream.Send(&hallmarkv1.FollowRequest{TakesCrls: true}))
	m, err := stream.Recv()
	must(w.t, err)
	must(w.t, stream.Send(&hallmarkv1.FollowRequest{Revision: m.Revision}))
	c := make(chan error, 1)
	go func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				c <- err
				return
			}
			_ = stream.Send(&hallmarkv1.FollowRequest{Revision: m.Revision})
		}
	}()
	return c
}

// TestAnAgentWhoseSVIDIsRevokedIsLetInNoMore revokes it by serial number, and with
// all that was issued through the agent.
func TestAnAgentWhoseSVIDIsRevokedIsLetInNoMore(t *testing.T) {
	w := newWorld(t)
	for name, of := range map[string]func(*svid) *hallmarkv1.Revocation{
		"its certificate": func(a *svid) *hallmarkv1.Revocation {
			return &hallmarkv1.Revocation{SerialNumber: a.leaf().SerialNumber.Bytes(), AuthorityId: hex.EncodeToString(a.leaf().AuthorityKeyId)}
		},
		"its serial number": func(a *svid) *hallmarkv1.Revocation {
			return &hallmarkv1.Revocation{SerialNumber: a.leaf().SerialNumber.Bytes()}
		},
		"the node": func(a *svid) *hallmarkv1.Revocation { return &hallmarkv1.Revocation{NodeId: a.id.String()} },
	} {
		t.Run(name, func(t *testing.T) {
			agent, other := w.newAgent(), w.newAgent()
			conn := w.connect(agent)
			ended, goesOn := w.followed(conn), w.followed(w.connect(other))
			resp, err := w.revoke(of(agent))
			must(t, err)
			if !resp.Authorities[0].Covered || resp.AgentsMissing {
				t.Errorf("revoke says %v", resp)
			}
			if err := <-ended; reason(err) != types.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
				t.Errorf("the stream ended with %v", err)
			}
			stream, err := hallmarkv1.NewFeedServiceClient(conn).Follow(t.Context())
			if err == nil {
				_, err = stream.Recv()
			}
			expectReason(t, err, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
			select {
			case err := <-goesOn:
				t.Errorf("another agent's stream ended: %v", err)
			default:
			}
		})
	}
}

func TestRevokeSaysWhatItCannotRevoke(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		r    *hallmarkv1.Revocation
		code codes.Code
		text string
	}{
		{&hallmarkv1.Revocation{SerialNumber: []byte{1}}, codes.NotFound, "issued no SVID with serial number 1"},
		{&hallmarkv1.Revocation{SerialNumber: []byte{1}, AuthorityId: "00"}, codes.NotFound, "no X.509 authority 00"},
		{&hallmarkv1.Revocation{SerialNumber: bytes.Repeat([]byte{0xaa}, 20)}, codes.NotFound, "status list aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa, which this trust domain does not have"},
		{&hallmarkv1.Revocation{SpiffeId: "spiffe://example.org/spire/server"}, codes.InvalidArgument, "replace the authority"},
		{&hallmarkv1.Revocation{NodeId: "spiffe://example.org/web"}, codes.InvalidArgument, "not an agent's"},
		{&hallmarkv1.Revocation{SpiffeId: "web"}, codes.InvalidArgument, "scheme"},
		{&hallmarkv1.Revocation{}, codes.InvalidArgument, "name one of them"},
	} {
		_, err := w.revoke(c.r)
		expectCode(t, err, c.code, c.text)
	}
}

func TestWhatWasIssuedIsListedWithItsAgentAndState(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	leaf := w.workload(agent, "/listed").leaf()
	admin := hallmarkv1.NewAdminServiceClient(w.admin())
	list := func(req *hallmarkv1.ListSVIDsRequest) *hallmarkv1.ListSVIDsResponse {
		t.Helper()
		resp, err := admin.ListSVIDs(t.Context(), req)
		must(t, err)
		return resp
	}
	of := list(&hallmarkv1.ListSVIDsRequest{SpiffeId: "spiffe://example.org/listed"})
	if len(of.Svids) != 1 || of.Svids[0].SerialNumber != leaf.SerialNumber.String() || of.Svids[0].NodeId != agent.id.String() || of.Svids[0].Revoked {
		t.Fatalf("listed: %v", of)
	}
	if got := list(&hallmarkv1.ListSVIDsRequest{NodeId: agent.id.String()}); got.Total != 2 { // its own, too
		t.Errorf("through the agent: %v", got)
	}
	_, err := w.revoke(&hallmarkv1.Revocation{SpiffeId: "spiffe://example.org/listed", Reason: 1})
	must(t, err)
	if got := list(&hallmarkv1.ListSVIDsRequest{SerialNumber: leaf.SerialNumber.String()}); len(got.Svids) != 1 || !got.Svids[0].Revoked {
		t.Errorf("after it was revoked: %v", got)
	}
	all, err := admin.ListRevocations(t.Context(), &hallmarkv1.ListRevocationsRequest{})
	must(t, err)
	if len(all.Revocations) != 1 || all.Revocations[0].Reason != 1 || len(all.Authorities) != 1 || !all.Authorities[0].Covered || all.Authorities[0].Revoked != 1 {
		t.Errorf("revocations: %v", all)
	}
	for _, bad := range []*hallmarkv1.ListSVIDsRequest{{Limit: -1}, {Limit: 10_001}, {SerialNumber: "x"}, {SerialNumber: new(big.Int).Lsh(big.NewInt(1), 161).String()}} {
		if _, err := admin.ListSVIDs(t.Context(), bad); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
}

// TestStatusList_SL12_TokensAreRevokedListedAndShown revokes a JWT-SVID by what
// its claim status says, and those of an identity.
func TestStatusList_SL12_TokensAreRevokedListedAndShown(t *testing.T) {
	w := startWorld(t, features{statuses: true})
	agent := w.newAgent()
	svids, admin := svidv1.NewSVIDClient(w.connect(agent)), hallmarkv1.NewAdminServiceClient(w.admin())
	e := w.create(agent, "/web")
	sign := func() (serial []byte) {
		t.Helper()
		resp, err := svids.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: e.Id, Audience: []string{"api"}})
		must(t, err)
		svid, err := jwtsvid.Validate(resp.Svid.Token, []string{"api"}, w.registry.View().Bundle, w.now())
		must(t, err)
		ref, ok, err := statuslist.ReferenceOf(svid.Claims)
		if err != nil || !ok || ref.URI[:34] != "https://status.example.org/status/" {
			t.Fatalf("its status is at %v, %v, %v", ref, ok, err)
		}
		number, ok := ref.Serial()
		if !ok {
			t.Fatalf("%v has no serial number", ref)
		}
		return number[:]
	}
	states := func() string {
		t.Helper()
		resp, err := admin.ListSVIDs(t.Context(), &hallmarkv1.ListSVIDsRequest{SpiffeId: "spiffe://example.org/web"})
		must(t, err)
		out := ""
		for _, s := range resp.Svids {
			out += fmt.Sprintf("%s through %s revoked=%v; ", s.Kind, strings.TrimPrefix(s.NodeId, agent.id.String()), s.Revoked)
		}
		return out
	}
	first := sign()
	sign()
	resp, err := w.revoke(&hallmarkv1.Revocation{SerialNumber: first})
	must(t, err)
	if len(resp.Authorities) != 0 || len(resp.StatusLists) != 1 || !resp.StatusLists[0].Covered || resp.StatusLists[0].Server != "test" || resp.StatusLists[0].Revoked != 1 {
		t.Errorf("revoke says %v", resp)
	}
	if got, want := states(), "jwt through  revoked=false; jwt through  revoked=true; "; got != want {
		t.Errorf("listed: %s; want %s", got, want)
	}
	shown, err := admin.ListSVIDs(t.Context(), &hallmarkv1.ListSVIDsRequest{SerialNumber: new(big.Int).SetBytes(first).String()})
	must(t, err)
	if len(shown.Svids) != 1 || !shown.Svids[0].Revoked || shown.Svids[0].Kind != "jwt" {
		t.Errorf("shown: %v", shown)
	}
	resp, err = w.revoke(&hallmarkv1.Revocation{SpiffeId: "spiffe://example.org/web"})
	must(t, err)
	if len(resp.StatusLists) != 1 || !resp.StatusLists[0].Covered || resp.StatusLists[0].Revoked != 2 {
		t.Errorf("revoke of the identity says %v", resp)
	}
	sign() // issued after, it is good
	if got, want := states(), "jwt through  revoked=false; jwt through  revoked=true; jwt through  revoked=true; "; got != want {
		t.Errorf("listed: %s; want %s", got, want)
	}
	all, err := admin.ListRevocations(t.Context(), &hallmarkv1.ListRevocationsRequest{})
	must(t, err)
	if len(all.Revocations) != 2 || len(all.StatusLists) != 1 || !all.StatusLists[0].Covered || all.StatusLists[0].Lists != 1 {
		t.Errorf("revocations: %v", all)
	}
}
