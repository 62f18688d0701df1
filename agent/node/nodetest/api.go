package nodetest

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

type bundleAPI struct {
	bundlev1.UnimplementedBundleServer
	s *Server
}

func (a bundleAPI) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	a.s.Lock()
	defer a.s.Unlock()
	if a.s.Bundle != nil {
		return a.s.Bundle, nil
	}
	return a.s.apiBundle(), nil
}

func (s *Server) apiBundle() *types.Bundle {
	out := &types.Bundle{TrustDomain: TrustDomain.Name(), SequenceNumber: s.Sequence}
	for _, authority := range s.Authorities {
		out.X509Authorities = append(out.X509Authorities, &types.X509Certificate{Asn1: authority.Certificate.Raw, Tainted: authority.Tainted})
	}
	return out
}

// APIBundle returns the server's bundle as GetBundle answers it.
func (s *Server) APIBundle() *types.Bundle {
	s.Lock()
	defer s.Unlock()
	return s.apiBundle()
}

type agentAPI struct {
	agentv1.UnimplementedAgentServer
	s *Server
}

func (a agentAPI) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	s := a.s
	request, err := stream.Recv()
	if err != nil {
		return err
	}
	params := request.GetParams()
	var id spiffeid.ID
	reattestable := false
	switch params.GetData().GetType() {
	case "join_token":
		token := string(params.Data.Payload)
		s.Lock()
		s.Seen = append(s.Seen, token)
		unused := s.Tokens[token]
		s.Tokens[token] = false
		s.Unlock()
		if !unused {
			return status.Error(codes.InvalidArgument, "join token does not exist or has already been used")
		}
		id = spiffeid.RequireFromPath(TrustDomain, "/spire/agent/join_token/"+token)
		s.Lock()
		if !s.AttestAs.IsZero() {
			id = s.AttestAs
		}
		s.Unlock()
	case "test":
		s.Lock()
		challenges := s.Challenges
		reattestable = s.Reattestable
		s.Unlock()
		for i := range challenges {
			challenge := fmt.Appendf(nil, "challenge %d", i)
			if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}}); err != nil {
				return err
			}
			answer, err := stream.Recv()
			if err != nil {
				return err
			}
			if !bytes.Equal(answer.GetChallengeResponse(), append([]byte("answer to "), challenge...)) {
				return status.Error(codes.PermissionDenied, "wrong answer")
			}
		}
		id = spiffeid.RequireFromPath(TrustDomain, "/spire/agent/test/"+string(params.Data.Payload))
	default:
		return status.Error(codes.FailedPrecondition, "attestor is not configured")
	}

	s.Lock()
	if node := s.Nodes[id]; node != nil && node.Banned {
		s.Unlock()
		return Deny(types.PermissionDeniedDetails_AGENT_BANNED)
	}
	svid, cert, err := s.issue(id, params.GetParams().GetCsr())
	if err == nil {
		s.Nodes[id] = &Node{Serial: cert.SerialNumber.String()}
	}
	s.Unlock()
	if err != nil {
		return err
	}
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: svid, Reattestable: reattestable},
	}})
}

func (a agentAPI) RenewAgent(ctx context.Context, r *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	s := a.s
	id, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	s.Lock()
	defer s.Unlock()
	if s.Denial != 0 {
		return nil, Deny(s.Denial)
	}
	as := id
	if !s.RenewAs.IsZero() {
		as = s.RenewAs
	}
	svid, cert, err := s.issue(as, r.GetParams().GetCsr())
	if err != nil {
		return nil, err
	}
	s.Nodes[id].NewSerial = cert.SerialNumber.String()
	return &agentv1.RenewAgentResponse{Svid: svid}, nil
}

type svidAPI struct {
	svidv1.UnimplementedSVIDServer
	s *Server
}

func (a svidAPI) BatchNewX509SVID(ctx context.Context, r *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	s := a.s
	if _, err := s.caller(ctx); err != nil {
		return nil, err
	}
	s.Lock()
	defer s.Unlock()
	out := &svidv1.BatchNewX509SVIDResponse{}
	for _, p := range r.Params {
		id, ok := s.Entries[p.EntryId]
		if !ok {
			out.Results = append(out.Results, &svidv1.BatchNewX509SVIDResponse_Result{
				Status: &types.Status{Code: int32(codes.NotFound), Message: "entry not found or not authorized"},
			})
			continue
		}
		svid, _, err := s.issue(id, p.Csr)
		if err != nil {
			st := status.Convert(err)
			out.Results = append(out.Results, &svidv1.BatchNewX509SVIDResponse_Result{
				Status: &types.Status{Code: int32(st.Code()), Message: st.Message()},
			})
			continue
		}
		out.Results = append(out.Results, &svidv1.BatchNewX509SVIDResponse_Result{Status: &types.Status{}, Svid: svid})
	}
	return out, nil
}

func (a svidAPI) BatchNewWITSVID(ctx context.Context, r *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	s := a.s
	if _, err := s.caller(ctx); err != nil {
		return nil, err
	}
	s.Lock()
	defer s.Unlock()
	out := &svidv1.BatchNewWITSVIDResponse{}
	for _, p := range r.Params {
		result := &svidv1.BatchNewWITSVIDResponse_Result{Status: &types.Status{Code: int32(codes.NotFound), Message: "entry not found or not authorized"}}
		if id, ok := s.Entries[p.EntryId]; ok {
			result.Status = &types.Status{}
			result.Svid = &types.WITSVID{Token: fmt.Sprintf("token of %s for %s, %s", id, p.PublicKey, p.SigningAlgorithm)}
		}
		out.Results = append(out.Results, result)
	}
	return out, nil
}

func (a svidAPI) NewJWTSVID(ctx context.Context, r *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	s := a.s
	if _, err := s.caller(ctx); err != nil {
		return nil, err
	}
	s.Lock()
	defer s.Unlock()
	id, ok := s.Entries[r.EntryId]
	if !ok {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	return &svidv1.NewJWTSVIDResponse{Svid: &types.JWTSVID{
		Token:     fmt.Sprintf("token of %s for %v", id, r.Audience),
		IssuedAt:  time.Now().Unix(),
		ExpiresAt: time.Now().Add(5 * time.Minute).Unix(),
	}}, nil
}

type feedAPI struct {
	hallmarkv1.UnimplementedFeedServiceServer
	s *Server
}

// Follow runs the test's own function, for an authorized agent; without one it
// says nothing until the client goes.
func (a feedAPI) Follow(stream grpc.BidiStreamingServer[hallmarkv1.FollowRequest, hallmarkv1.FollowResponse]) error {
	id, err := a.s.caller(stream.Context())
	if err != nil {
		return err
	}
	a.s.Lock()
	follow := a.s.Follow
	a.s.Unlock()
	if follow != nil {
		return follow(id, stream)
	}
	<-stream.Context().Done()
	return nil
}
