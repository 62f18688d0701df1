package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/nodeattestor/v1"
	workloadattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/agent/workloadattestor/v1"
	serverattestorv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/nodeattestor/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

var (
	agentKind    = kind{"NodeAttestor", "spire.plugin.agent.nodeattestor.v1.NodeAttestor"}
	serverKind   = kind{"NodeAttestor", "spire.plugin.server.nodeattestor.v1.NodeAttestor"}
	workloadKind = kind{"WorkloadAttestor", "spire.plugin.agent.workloadattestor.v1.WorkloadAttestor"}
)

// clipped bounds the text of an error that a plugin gave, on one line.
func clipped(err error) error {
	st := status.Convert(err)
	return fmt.Errorf("%s: %q", st.Code(), attestors.Clip(strings.ToValidUTF8(st.Message(), "?")))
}

// Agent proves what a node is by an external program.
type Agent struct {
	*supervisor
	mu       sync.Mutex // of the conversation: there is one at a time
	stream   agentattestorv1.NodeAttestor_AidAttestationClient
	ctx      context.Context // of the conversation
	cancel   context.CancelCauseFunc
	instance *instance
}

// NewAgent makes the agent's half of a node attestor. It starts nothing.
func NewAgent(name string, c Config, td spiffeid.TrustDomain) (*Agent, error) {
	s, err := newSupervisor(name, agentKind, c, td)
	if err != nil {
		return nil, err
	}
	return &Agent{supervisor: s}, nil
}

// Proof returns the plugin's payload. The conversation with the plugin goes on
// until the context ends, or the next one begins.
func (a *Agent) Proof(ctx context.Context) ([]byte, error) {
	i, err := a.get(ctx)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cancel != nil {
		a.cancel(errors.New("another attempt has begun"))
	}
	a.ctx, a.cancel = context.WithCancelCause(ctx)
	a.instance, a.stream = i, nil
	return a.receive((*agentattestorv1.PayloadOrChallengeResponse).GetPayload, func() (err error) {
		a.stream, err = agentattestorv1.NewNodeAttestorClient(i.conn).AidAttestation(a.ctx)
		return err
	})
}

// Respond has the plugin answer a challenge of the server.
func (a *Agent) Respond(_ context.Context, challenge []byte) ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stream == nil {
		return nil, errors.New("there is no conversation with the plugin")
	}
	if len(challenge) > maxPayload {
		return nil, fmt.Errorf("challenge is %d bytes long; the most is %d", len(challenge), maxPayload)
	}
	return a.receive((*agentattestorv1.PayloadOrChallengeResponse).GetChallengeResponse, func() error {
		_ = a.stream.Send(&agentattestorv1.Challenge{Challenge: challenge}) // Recv says what is wrong
		return nil
	})
}

// receive returns a part of what the plugin answers to what ask sends.
func (a *Agent) receive(part func(*agentattestorv1.PayloadOrChallengeResponse) []byte, ask func() error) ([]byte, error) {
	answer, err := step(a.ctx, a.instance, a.cancel, a.times.step, func() (*agentattestorv1.PayloadOrChallengeResponse, error) {
		if err := ask(); err != nil {
			return nil, err
		}
		return a.stream.Recv()
	})
	switch {
	case errors.Is(err, io.EOF):
		return nil, errors.New("plugin ended the conversation")
	case errors.Is(err, errHung):
		return nil, err
	case err != nil:
		return nil, clipped(err)
	}
	out := part(answer)
	if len(out) == 0 || len(out) > maxPayload {
		return nil, fmt.Errorf("plugin gave %d bytes of what was asked for; between 1 and %d are allowed", len(out), maxPayload)
	}
	return out, nil
}

// Server verifies what a node is by an external program.
type Server struct {
	*supervisor
	log *slog.Logger
}

// Profile says of a node attestor, by its name, that nothing is known of what it
// is worth.
func Profile(name string) attestors.Profile {
	return attestors.Profile{
		Name:      name,
		Strength:  attestors.Unknown,
		Needed:    "what satisfies the program that is configured under this name",
		Selectors: []attestors.Form{{Value: "VALUE", Meaning: "what the program says"}},
		Page:      "docs/how-to/plugins.md",
	}
}

// Options of [NewServer].
type Options struct {
	TrustDomain spiffeid.TrustDomain
	Agents      func(spiffeid.ID) bool // whether there is such an agent
	Log         *slog.Logger           // nil is silent
}

// NewServer makes the server's half of a node attestor. It starts nothing.
func NewServer(name string, c Config, o Options) (*Server, error) {
	s, err := newSupervisor(name, serverKind, c, o.TrustDomain)
	if err != nil {
		return nil, err
	}
	s.agents = o.Agents
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Server{supervisor: s, log: o.Log.With("plugin", name)}, nil
}

// Verify has the plugin check a payload. What the plugin says of the node holds
// only if it speaks for its own name, in this trust domain.
func (s *Server) Verify(ctx context.Context, payload []byte, challenge func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	i, err := s.get(ctx)
	if err != nil {
		return nil, s.unavailable(err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var stream serverattestorv1.NodeAttestor_AttestClient
	request := &serverattestorv1.AttestRequest{Request: &serverattestorv1.AttestRequest_Payload{Payload: payload}}
	for range maxChallenges + 1 {
		response, err := step(ctx, i, cancel, s.times.step, func() (_ *serverattestorv1.AttestResponse, err error) {
			if stream == nil {
				if stream, err = serverattestorv1.NewNodeAttestorClient(i.conn).Attest(ctx); err != nil {
					return nil, err
				}
			}
			_ = stream.Send(request) // Recv says what is wrong
			return stream.Recv()
		})
		if err != nil {
			return nil, s.refused(err)
		}
		switch r := response.Response.(type) {
		case *serverattestorv1.AttestResponse_AgentAttributes:
			evidence, err := s.evidence(r.AgentAttributes)
			if err != nil {
				return nil, s.unavailable(err)
			}
			return evidence, nil
		case *serverattestorv1.AttestResponse_Challenge:
			if len(r.Challenge) > maxPayload {
				return nil, s.unavailable(fmt.Errorf("challenge is %d bytes long; the most is %d", len(r.Challenge), maxPayload))
			}
			answer, err := challenge(ctx, r.Challenge)
			if err != nil {
				return nil, err
			}
			request = &serverattestorv1.AttestRequest{Request: &serverattestorv1.AttestRequest_ChallengeResponse{ChallengeResponse: answer}}
		default:
			return nil, s.unavailable(errors.New("it answered with neither challenge nor result"))
		}
	}
	return nil, s.unavailable(fmt.Errorf("it sent more than %d challenges", maxChallenges))
}

func (s *Server) evidence(a *serverattestorv1.AgentAttributes) (*attestors.Evidence, error) {
	_, path, err := agentID(a.GetSpiffeId(), s.name, s.td)
	if err != nil {
		return nil, err
	}
	selectors, err := selectors(s.name, a.GetSelectorValues())
	if err != nil {
		return nil, err
	}
	return &attestors.Evidence{Path: path, Selectors: selectors, CanReattest: a.GetCanReattest()}, nil
}

// unavailable is for what is not the node's fault, nor for it to know.
func (s *Server) unavailable(err error) error {
	s.log.Error("a node could not be attested by a plugin", "error", err)
	return attestors.ErrUnavailable
}

// refused tells what a plugin said of the node from what ails the plugin.
func (s *Server) refused(err error) error {
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.NotFound:
		return fmt.Errorf("plugin %s refused it: %q", s.name, attestors.Clip(status.Convert(err).Message()))
	}
	return s.unavailable(err)
}

// agentID reads the ID of an agent that a plugin may name: of the own trust
// domain, below the plugin's name. It returns also the part after /spire/agent/.
func agentID(text, name string, td spiffeid.TrustDomain) (spiffeid.ID, string, error) {
	id, err := spiffeid.FromString(text)
	if err != nil || len(text) > maxID {
		return spiffeid.ID{}, "", fmt.Errorf("%q is no SPIFFE ID of an agent", attestors.Clip(text))
	}
	path, ok := strings.CutPrefix(id.Path(), "/spire/agent/")
	if !ok || !id.MemberOf(td) || !strings.HasPrefix(path, name+"/") {
		return spiffeid.ID{}, "", fmt.Errorf("%q is not below spiffe://%s/spire/agent/%s/, where the agents of this plugin are", attestors.Clip(text), td.Name(), name)
	}
	return id, path, nil
}

const maxID = 2048 // bytes; SPIFFE-ID §2.3

// selectors makes selectors of what a plugin gave: all of them, or none if one
// is not what it should be.
func selectors(name string, values []string) ([]selector.Selector, error) {
	if len(values) > maxSelectors {
		return nil, fmt.Errorf("it gave %d selectors; the most is %d", len(values), maxSelectors)
	}
	out := make([]selector.Selector, 0, len(values))
	for _, value := range values {
		if !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
			return nil, fmt.Errorf("it gave the selector %q, which is no readable text", attestors.Clip(value))
		}
		s, err := selector.New(name, value)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return selector.NewSet(out...), nil
}

// Workload attests processes by an external program.
type Workload struct{ *supervisor }

// NewWorkload makes a workload attestor. It starts nothing.
func NewWorkload(name string, c Config, td spiffeid.TrustDomain) (*Workload, error) {
	s, err := newSupervisor(name, workloadKind, c, td)
	if err != nil {
		return nil, err
	}
	return &Workload{supervisor: s}, nil
}

// Attest asks the plugin about a process, by its PID in the agent's namespace.
func (w *Workload) Attest(ctx context.Context, process attestors.Process) ([]selector.Selector, error) {
	waiting, stop := context.WithTimeout(ctx, w.times.call)
	defer stop()
	i, err := w.get(waiting)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	answer, err := step(ctx, i, cancel, w.times.call, func() (*workloadattestorv1.AttestResponse, error) {
		return workloadattestorv1.NewWorkloadAttestorClient(i.conn).Attest(ctx, &workloadattestorv1.AttestRequest{Pid: process.PID})
	})
	switch {
	case errors.Is(err, errHung):
		return nil, err
	case err != nil:
		return nil, clipped(err)
	}
	return selectors(w.name, answer.GetSelectorValues())
}
