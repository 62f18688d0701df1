package api

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
)

// agentService is SPIRE's Agent API: how nodes become agents, and what
// operators do about them.
type agentService struct {
	agentv1.UnsafeAgentServer // every call is here: one that is missing does not compile
	*API
}

// Bounds of an attestation.
const (
	attestTimeout = time.Minute
	maxPayload    = 64 << 10 // bytes, of the evidence and of each response to a challenge
	maxChallenges = 10
)

// Bounds of a join token.
const maxTokenTTL = 365 * 24 * time.Hour

var errNoAgent = callErrorf(codes.NotFound, "agent not found")

// AttestAgent makes an agent of a node that proves what it is.
func (s *agentService) AttestAgent(stream agentv1.Agent_AttestAgentServer) error {
	ctx, cancel := context.WithTimeout(stream.Context(), attestTimeout)
	defer cancel()
	if err := s.limitAttesting(ctx); err != nil {
		return err
	}
	first, err := receive(ctx, stream)
	if err != nil {
		return err
	}
	params := first.GetParams()
	switch {
	case params == nil:
		return invalidArgument("malformed param: missing params; they come first")
	case params.GetData().GetType() == "":
		return invalidArgument("malformed param: missing attestation data type")
	case len(params.Data.Payload) == 0:
		return invalidArgument("malformed param: missing attestation data payload")
	case len(params.Data.Payload) > maxPayload:
		return invalidArgument("attestation data payload is %d bytes long; the most is %d", len(params.Data.Payload), maxPayload)
	}
	note(ctx, slog.String("attestor", clip(params.Data.Type)))
	attestor := s.attestors[params.Data.Type]
	if attestor == nil {
		return callErrorf(codes.FailedPrecondition, "could not find node attestor type %q", clip(params.Data.Type))
	}
	// Before the evidence, which may be good only once.
	csr := params.GetParams().GetCsr()
	if _, err := issue.ParseCSR(csr); err != nil {
		return status(err)
	}

	challenges := 0
	verifying, span := telemetry.Span(ctx, "attest "+params.Data.Type)
	evidence, err := attestor.Verify(verifying, params.Data.Payload, func(ctx context.Context, challenge []byte) ([]byte, error) {
		if challenges++; challenges > maxChallenges {
			return nil, fmt.Errorf("attestation took more than %d challenges", maxChallenges)
		}
		return s.challenge(ctx, stream, challenge)
	})
	span.End()
	if err != nil {
		return attestError(err)
	}
	node, svid, err := s.admit(ctx, params.Data.Type, evidence, csr)
	if err != nil {
		return err
	}
	note(ctx, slog.String("agent", node.ID.String()), slog.String("serial", node.SerialNumber))
	settle(ctx)
	return stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Result_{
		Result: &agentv1.AttestAgentResponse_Result{Svid: x509SVIDToWire(svid), Reattestable: node.CanReattest},
	}})
}

// receive waits for a message of an attesting node.
func receive(ctx context.Context, stream agentv1.Agent_AttestAgentServer) (*agentv1.AttestAgentRequest, error) {
	type received struct {
		req *agentv1.AttestAgentRequest
		err error
	}
	c := make(chan received, 1)
	go func() { // ends, at the latest, when this call returns: gRPC then ends the stream
		req, err := stream.Recv()
		c <- received{req, err}
	}()
	select {
	case r := <-c:
		return r.req, r.err
	case <-ctx.Done():
		return nil, status(context.Cause(ctx))
	}
}

func (s *agentService) challenge(ctx context.Context, stream agentv1.Agent_AttestAgentServer, challenge []byte) ([]byte, error) {
	if err := stream.Send(&agentv1.AttestAgentResponse{Step: &agentv1.AttestAgentResponse_Challenge{Challenge: challenge}}); err != nil {
		return nil, err
	}
	req, err := receive(ctx, stream)
	if err != nil {
		return nil, err
	}
	response, ok := req.Step.(*agentv1.AttestAgentRequest_ChallengeResponse)
	switch {
	case !ok:
		return nil, invalidArgument("a challenge was not answered with a response to it")
	case len(response.ChallengeResponse) > maxPayload:
		return nil, invalidArgument("response to a challenge is %d bytes long; the most is %d", len(response.ChallengeResponse), maxPayload)
	}
	return response.ChallengeResponse, nil
}

// attestError makes the error of a node whose evidence was refused. What the
// attestor says is for the node to read.
func attestError(err error) error {
	err = status(err)
	if cause := hiddenCause(err); cause != nil {
		return invalidArgument("failed to attest: %v", cause)
	}
	return err
}

// admit makes a node of evidence that was verified.
func (s *agentService) admit(ctx context.Context, attestor string, evidence *attestors.Evidence, csr []byte) (*registry.Node, *issue.X509SVID, error) {
	id, err := spiffeid.FromPath(s.td, agentPath+evidence.Path)
	if err == nil && !strings.HasPrefix(evidence.Path, attestor+"/") {
		err = fmt.Errorf("it does not begin with %q", attestor+"/")
	}
	if err == nil && len(id.String()) > entry.MaxSPIFFEID {
		err = fmt.Errorf("it is too long")
	}
	if err != nil {
		return nil, nil, status(fmt.Errorf("node attestor %q returned the path %q: %w", attestor, evidence.Path, err))
	}
	node := &registry.Node{
		ID:              id,
		AttestationType: attestor,
		Selectors:       selector.NewSet(evidence.Selectors...),
		CanReattest:     evidence.CanReattest,
		AttestedAt:      s.now().Truncate(time.Second),
	}
	if old := s.registry.View().Node(id); old != nil {
		if old.Banned {
			return nil, nil, errBanned
		}
		if evidence.Once {
			return nil, nil, s.used(id)
		}
		node.AgentVersion = old.AgentVersion
	}
	svid, err := s.issuer.NodeX509(ctx, id, csr)
	if err != nil {
		return nil, nil, status(err)
	}
	node.SerialNumber, node.ExpiresAt, node.AuthorityID = svid.SerialNumber, svid.ExpiresAt, svid.AuthorityID
	put := s.registry.PutNode
	if evidence.Once {
		put = s.registry.CreateNode
	}
	if err := put(ctx, node); err != nil {
		if old := s.registry.View().Node(id); old != nil && old.Banned {
			return nil, nil, errBanned
		}
		var told *registry.Error
		if errors.As(err, &told) && told.Kind == registry.AlreadyExists {
			return nil, nil, s.used(id)
		}
		return nil, nil, status(err)
	}
	return node, svid, nil
}

// used makes the error of a node whose proof admits once, and has an agent. Either
// its agent has lost what it had, or somebody else was first: an operator must
// find out which, and so the log says it too.
func (s *agentService) used(id spiffeid.ID) error {
	s.log.Warn("a node whose proof admits once attested again; if its agent has lost its identity, evict it, or else somebody has a copy of the proof", "agent", id)
	return callErrorf(codes.PermissionDenied, "failed to attest: this node has an agent already, %s; if that has lost its identity, let it attest anew with \"hallmark node evict\"", id)
}

var errBanned = permissionDenied(types.PermissionDeniedDetails_AGENT_BANNED, "failed to attest: agent is banned")

// RenewAgent issues the next SVID of the calling agent. Until that is first
// presented, the present one goes on.
func (s *agentService) RenewAgent(ctx context.Context, req *agentv1.RenewAgentRequest) (*agentv1.RenewAgentResponse, error) {
	node := callerFrom(ctx).Node
	if node.CanReattest {
		return nil, permissionDenied(types.PermissionDeniedDetails_AGENT_MUST_REATTEST, "agent must reattest instead of renew")
	}
	if req.Params == nil {
		return nil, invalidArgument("params cannot be nil")
	}
	if err := s.limitSigning(ctx, 1); err != nil {
		return nil, err
	}
	svid, err := s.issuer.NodeX509(ctx, node.ID, req.Params.Csr)
	if err != nil {
		return nil, status(err)
	}
	_, err = s.registry.UpdateNode(ctx, node.ID, func(n *registry.Node) error {
		if n.Banned {
			return errAgentBanned
		}
		n.NewSerialNumber, n.NewExpiresAt, n.NewAuthorityID = svid.SerialNumber, svid.ExpiresAt, svid.AuthorityID
		return nil
	})
	if err != nil {
		return nil, status(err)
	}
	return &agentv1.RenewAgentResponse{Svid: x509SVIDToWire(svid)}, nil
}

// PostStatus records the version of the calling agent.
func (s *agentService) PostStatus(ctx context.Context, req *agentv1.PostStatusRequest) (*agentv1.PostStatusResponse, error) {
	node := callerFrom(ctx).Node
	if req.AgentVersion != "" && req.AgentVersion != node.AgentVersion {
		_, err := s.registry.UpdateNode(ctx, node.ID, func(n *registry.Node) error {
			n.AgentVersion = req.AgentVersion
			return nil
		})
		if err != nil {
			return nil, status(err)
		}
	}
	return &agentv1.PostStatusResponse{}, nil
}

// CreateJoinToken makes a join token: the one given, or a random one.
func (s *agentService) CreateJoinToken(ctx context.Context, req *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	ttl := time.Duration(req.Ttl) * time.Second
	switch {
	case ttl <= 0:
		return nil, invalidArgument("ttl is required, you must provide one")
	case ttl > maxTokenTTL:
		return nil, invalidArgument("ttl is %v; the most is %v", ttl, maxTokenTTL)
	}
	token := req.Token
	if token == "" {
		token = uuid.NewString()
	}
	t := registry.JoinToken{ExpiresAt: s.now().Add(ttl).Truncate(time.Second)}
	if req.AgentId != nil {
		id, err := idFromWire(req.AgentId)
		if err != nil {
			return nil, invalidArgument("invalid agent ID: %v", err)
		}
		t.AgentID = id
	}
	if err := s.registry.CreateJoinToken(ctx, token, t); err != nil {
		return nil, status(err)
	}
	return &types.JoinToken{Value: token, ExpiresAt: t.ExpiresAt.Unix()}, nil
}

// CountAgents counts the agents that a filter lets through.
func (s *agentService) CountAgents(ctx context.Context, req *agentv1.CountAgentsRequest) (*agentv1.CountAgentsResponse, error) {
	view := s.registry.View()
	if req.Filter == nil {
		return &agentv1.CountAgentsResponse{Count: int32(view.NodeCount())}, nil
	}
	f := req.Filter
	lets, err := nodeFilter(&agentv1.ListAgentsRequest_Filter{
		ByAttestationType: f.ByAttestationType,
		BySelectorMatch:   f.BySelectorMatch,
		ByBanned:          f.ByBanned,
		ByCanReattest:     f.ByCanReattest,
		ByExpiresBefore:   f.ByExpiresBefore,
	})
	if err != nil {
		return nil, err
	}
	n := int32(0)
	for range filtered(view.Nodes(""), lets) {
		n++
	}
	return &agentv1.CountAgentsResponse{Count: n}, nil
}

// ListAgents lists the agents that a filter lets through, by ID.
func (s *agentService) ListAgents(ctx context.Context, req *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	p, err := newPage(req.PageSize, req.PageToken)
	if err != nil {
		return nil, err
	}
	lets, err := nodeFilter(req.Filter)
	if err != nil {
		return nil, err
	}
	nodes, next := collectPage(p, filtered(s.registry.View().Nodes(p.after), lets), func(n *registry.Node) string { return n.ID.String() })
	resp := &agentv1.ListAgentsResponse{Agents: make([]*types.Agent, len(nodes)), NextPageToken: next}
	for i, n := range nodes {
		resp.Agents[i] = nodeToWire(n, req.OutputMask)
	}
	return resp, nil
}

// GetAgent returns one agent.
func (s *agentService) GetAgent(ctx context.Context, req *agentv1.GetAgentRequest) (*types.Agent, error) {
	id, err := s.agentID(req.Id)
	if err != nil {
		return nil, err
	}
	n := s.registry.View().Node(id)
	if n == nil {
		return nil, errNoAgent
	}
	return nodeToWire(n, req.OutputMask), nil
}

// DeleteAgent forgets an agent: what it has is worth nothing from now on, and
// it may attest again.
func (s *agentService) DeleteAgent(ctx context.Context, req *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	id, err := s.agentID(req.Id)
	if err != nil {
		return nil, err
	}
	if err := s.registry.DeleteNode(ctx, id); err != nil {
		return nil, status(err)
	}
	return &emptypb.Empty{}, nil
}

// BanAgent shuts an agent out until it is deleted.
func (s *agentService) BanAgent(ctx context.Context, req *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	id, err := s.agentID(req.Id)
	if err != nil {
		return nil, err
	}
	_, err = s.registry.UpdateNode(ctx, id, func(n *registry.Node) error {
		n.Banned = true
		return nil
	})
	if err != nil {
		return nil, status(err)
	}
	return &emptypb.Empty{}, nil
}

// agentID reads the ID of an agent of this trust domain.
func (s *agentService) agentID(w *types.SPIFFEID) (spiffeid.ID, error) {
	id, err := idFromWire(w)
	if err == nil && !id.MemberOf(s.td) {
		err = fmt.Errorf("%q is not in this server's trust domain %q", id, s.td.Name())
	}
	if err == nil && !isAgent(id) {
		err = fmt.Errorf("%q is not the ID of an agent; that begins with %q", id, s.td.IDString()+agentPath)
	}
	if err != nil {
		return id, invalidArgument("invalid agent ID: %v", err)
	}
	return id, nil
}

// expiresBefore are the forms in which a time may be given: SPIRE's, and two
// that people write.
var expiresBefore = []string{"2006-01-02 15:04:05 -0700 -07", "2006-01-02 15:04:05 -0700 MST", time.RFC3339}

// nodeFilter reads which agents a caller asks for.
func nodeFilter(w *agentv1.ListAgentsRequest_Filter) (lets []func(*registry.Node) bool, err error) {
	if typ := w.GetByAttestationType(); typ != "" {
		lets = append(lets, func(n *registry.Node) bool { return n.AttestationType == typ })
	}
	if m := w.GetBySelectorMatch(); m != nil {
		matches, err := selectorFilter(m)
		if err != nil {
			return nil, invalidArgument("malformed filter: %v", err)
		}
		lets = append(lets, func(n *registry.Node) bool { return len(n.Selectors) > 0 && matches(n.Selectors) })
	}
	if b := w.GetByBanned(); b != nil {
		lets = append(lets, func(n *registry.Node) bool { return n.Banned == b.Value })
	}
	if b := w.GetByCanReattest(); b != nil {
		lets = append(lets, func(n *registry.Node) bool { return n.CanReattest == b.Value })
	}
	if text := w.GetByExpiresBefore(); text != "" {
		var before time.Time
		err := errors.New("no form")
		for _, form := range expiresBefore {
			if before, err = time.Parse(form, text); err == nil {
				break
			}
		}
		if err != nil {
			return nil, invalidArgument("malformed filter: %q is no time; write one like 2006-01-02T15:04:05Z", clip(text))
		}
		lets = append(lets, func(n *registry.Node) bool { return n.ExpiresAt.Before(before) })
	}
	return lets, nil
}

// filtered yields the nodes that every function lets through.
func filtered(nodes iter.Seq[*registry.Node], lets []func(*registry.Node) bool) iter.Seq[*registry.Node] {
	return func(yield func(*registry.Node) bool) {
	next:
		for n := range nodes {
			for _, let := range lets {
				if !let(n) {
					continue next
				}
			}
			if !yield(n) {
				return
			}
		}
	}
}

// wholeAgent is what a missing mask of an agent means.
var wholeAgent = &types.AgentMask{
	AttestationType: true, X509SvidSerialNumber: true, X509SvidExpiresAt: true,
	Selectors: true, Banned: true, CanReattest: true, AgentVersion: true,
}

func nodeToWire(n *registry.Node, mask *types.AgentMask) *types.Agent {
	if mask == nil {
		mask = wholeAgent
	}
	w := &types.Agent{Id: idToWire(n.ID)}
	if mask.AttestationType {
		w.AttestationType = n.AttestationType
	}
	if mask.X509SvidSerialNumber {
		w.X509SvidSerialNumber = n.SerialNumber
	}
	if mask.X509SvidExpiresAt {
		w.X509SvidExpiresAt = timeToWire(n.ExpiresAt)
	}
	if mask.Selectors {
		w.Selectors = selectorsToWire(n.Selectors)
	}
	if mask.Banned {
		w.Banned = n.Banned
	}
	if mask.CanReattest {
		w.CanReattest = n.CanReattest
	}
	if mask.AgentVersion {
		w.AgentVersion = n.AgentVersion
	}
	return w
}
