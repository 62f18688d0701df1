package api_test

import (
	"bytes"
	"encoding/hex"
	"math/big"
	"testing"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

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
