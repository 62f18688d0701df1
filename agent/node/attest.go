package node

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds of an attestation.
const (
	attestTimeout = 2 * time.Minute // evidence may come from hardware or a cloud
	maxChallenges = 10              // as the server half allows
	maxPayload    = 64 << 10        // bytes of proof or response; attestors.Server
)

// Bounds of a certificate chain from the server.
const (
	maxChain       = 10       // certificates
	maxCertificate = 32 << 10 // bytes of DER each
)

// svid is the node's X509-SVID. Only renewAt and tainted are set after it was
// made, before it is shared.
type svid struct {
	id        spiffeid.ID
	key       crypto.Signer
	chain     []*x509.Certificate // leaf first
	expiresAt time.Time
	renewAt   time.Time
	tainted   bool // signed by a tainted authority when it was obtained
}

func (s *svid) leaf() *x509.Certificate { return s.chain[0] }

func (s *svid) tls() *tls.Certificate {
	c := &tls.Certificate{PrivateKey: s.key, Leaf: s.leaf()}
	for _, cert := range s.chain {
		c.Certificate = append(c.Certificate, cert.Raw)
	}
	return c
}

// attest obtains an identity and makes it the node's own.
func (n *Node) attest(ctx context.Context) error {
	s, t, err := n.obtain(ctx)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.trust = t.after(n.trust, n.o.Now())
	n.mu.Unlock()
	n.saveBundle() // before the SVID: an identity on disk has a bundle beside it
	n.adopt(s)
	n.o.Log.Info("node attested", "agent_id", s.id, "attestor", n.o.Attestor.Name)
	return nil
}

// obtain finds the right server, proves to it what this node is, and returns
// what it answers, with the bundle that vouches for it.
func (n *Node) obtain(ctx context.Context) (*svid, *trust, error) {
	ctx, cancel := context.WithTimeout(ctx, attestTimeout)
	defer cancel()
	l, t, err := n.bootstrap(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer l.finish(nil)
	if old := n.lastID(); n.o.Attestor == nil || n.spent(old) {
		return nil, nil, &fatalError{fmt.Errorf("identity of %s has ended, and its proof cannot be given again; %s", old, n.remedy())}
	}
	key, csr, err := n.newKey(ctx)
	if err != nil {
		return nil, nil, err
	}
	result, err := n.prove(ctx, l, csr)
	if err != nil {
		n.leave(l)
		return nil, nil, n.attestError(err)
	}
	s, err := n.checkSVID(result.GetSvid(), key, t, spiffeid.ID{})
	if err != nil {
		return nil, nil, fmt.Errorf("attest: %w", err)
	}
	return s, t, nil
}

// prove runs the AttestAgent conversation on an authenticated link.
func (n *Node) prove(ctx context.Context, l *Link, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithCancel(ctx) // with it ends what the proof has opened
	defer cancel()
	a := n.o.Attestor
	payload, err := a.Agent.Proof(ctx)
	if err != nil {
		return nil, fmt.Errorf("collect the proof: %w", err)
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("proof is %d bytes long; the most is %d", len(payload), maxPayload)
	}
	stream, err := agentv1.NewAgentClient(l.conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	request := &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: a.Name, Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}
	for range maxChallenges + 1 {
		// An error of Send is io.EOF; Recv says what happened.
		_ = stream.Send(request)
		response, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		switch step := response.Step.(type) {
		case *agentv1.AttestAgentResponse_Result_:
			return step.Result, nil
		case *agentv1.AttestAgentResponse_Challenge:
			answer, err := a.Agent.Respond(ctx, step.Challenge)
			if err != nil {
				return nil, fmt.Errorf("answer the server's challenge: %w", err)
			}
			if len(answer) > maxPayload {
				return nil, fmt.Errorf("answer to the server's challenge is %d bytes long; the most is %d", len(answer), maxPayload)
			}
			request = &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}}
		default:
			return nil, errors.New("server answered with neither result nor challenge")
		}
	}
	return nil, fmt.Errorf("server sent more than %d challenges", maxChallenges)
}

// attestError tells an error that another attempt may mend from one that it
// will not: the server looked at the proof and refused it.
func (n *Node) attestError(err error) error {
	if reason, ok := denialReason(err); ok && reason == types.PermissionDeniedDetails_AGENT_BANNED {
		return &fatalError{ErrBanned}
	}
	switch st := status.Convert(err); st.Code() {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated,
		codes.FailedPrecondition, codes.NotFound, codes.Unimplemented:
		return &fatalError{fmt.Errorf("server refused the %s attestation: %s; %s", n.o.Attestor.Name, st.Message(), n.remedy())}
	default:
		return fmt.Errorf("attest: %w", err)
	}
}

// next obtains the SVID that follows that of a link. Where the server wants the
// proof again instead of a renewal, it is given while the link goes on: a proof
// that is refused costs nothing until the present SVID ends.
func (n *Node) next(ctx context.Context, l *Link) (*svid, error) {
	s, err := n.renew(ctx, l)
	if reason, ok := denialReason(err); !ok || reason != types.PermissionDeniedDetails_AGENT_MUST_REATTEST ||
		n.o.Attestor == nil || n.spent(l.svid.id) {
		return s, err
	}
	s, _, err = n.obtain(ctx)
	if err == nil {
		n.o.Log.Info("node attested again", "agent_id", s.id, "attestor", n.o.Attestor.Name)
	}
	return s, err
}

// renew obtains the next SVID on a link of the present one.
func (n *Node) renew(ctx context.Context, l *Link) (*svid, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	key, csr, err := n.newKey(ctx)
	if err != nil {
		return nil, err
	}
	response, err := agentv1.NewAgentClient(l.conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	})
	if err != nil {
		return nil, fmt.Errorf("renew the node's SVID: %w", err)
	}
	s, err := n.checkSVID(response.GetSvid(), key, n.trusted(), l.svid.id)
	if err != nil {
		return nil, fmt.Errorf("renew the node's SVID: %w", err)
	}
	return s, nil
}

// checkSVID takes an SVID from the server if it is what was asked for: for this
// key, of an agent of this trust domain (of want, if that is set), verified by
// the bundle.
func (n *Node) checkSVID(in *types.X509SVID, key crypto.Signer, t *trust, want spiffeid.ID) (*svid, error) {
	chain, err := parseChain(in.GetCertChain())
	if err != nil {
		return nil, err
	}
	id, err := n.verifySVID(chain, t)
	if err != nil {
		return nil, err
	}
	switch {
	case !isAgent(id, n.o.TrustDomain):
		return nil, fmt.Errorf("server sent an SVID of %q, which is no agent of trust domain %q", id, n.o.TrustDomain.Name())
	case !want.IsZero() && id != want:
		return nil, fmt.Errorf("server sent an SVID of %q, not of %q", id, want)
	case !samePublicKey(key, chain[0]):
		return nil, errors.New("server sent an SVID for another key")
	}
	return &svid{id: id, key: key, chain: chain, expiresAt: chain[0].NotAfter}, nil
}

func isAgent(id spiffeid.ID, td spiffeid.TrustDomain) bool {
	return id.MemberOf(td) && strings.HasPrefix(id.Path(), AgentPathPrefix)
}

func samePublicKey(key crypto.Signer, cert *x509.Certificate) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(cert.PublicKey)
}

func parseChain(in [][]byte) ([]*x509.Certificate, error) {
	if len(in) == 0 || len(in) > maxChain {
		return nil, fmt.Errorf("server sent a chain of %d certificates; 1 to %d are allowed", len(in), maxChain)
	}
	out := make([]*x509.Certificate, len(in))
	for i, der := range in {
		if len(der) > maxCertificate {
			return nil, fmt.Errorf("server sent a certificate of %d bytes; the most is %d", len(der), maxCertificate)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("server sent a malformed certificate: %w", err)
		}
		out[i] = cert
	}
	return out, nil
}

// verifySVID checks that a chain is an SVID of this trust domain.
func (n *Node) verifySVID(chain []*x509.Certificate, t *trust) (spiffeid.ID, error) {
	id, _, err := x509svid.Verify(chain, t.x509, x509svid.WithTime(n.o.Now()))
	if err != nil {
		return id, fmt.Errorf("server sent an SVID that its bundle does not verify: %w", err)
	}
	return id, nil
}

// tainted reports whether an SVID must be replaced because of its authority:
// every root it leads to is tainted, or it leads to none any more.
func (n *Node) tainted(s *svid) bool {
	t := n.trusted()
	_, chains, err := x509svid.Verify(s.chain, t.x509, x509svid.WithTime(n.o.Now()))
	if err != nil {
		return true
	}
	tainted := make(map[string]bool)
	for _, a := range t.bundle.X509Authorities {
		if a.Tainted {
			tainted[string(a.Certificate.Raw)] = true
		}
	}
	for _, chain := range chains {
		if !tainted[string(chain[len(chain)-1].Raw)] {
			return false
		}
	}
	return true
}
