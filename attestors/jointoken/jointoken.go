// Package jointoken attests a node by a secret that its operator was given
// once: the join token.
//
// The payload is the token itself. [NewAgent] makes the half that sends it,
// [New] the half that checks it, by a function that consumes the token.
//
// As in SPIRE, the agent's SPIFFE ID contains the token
// (spiffe://TRUST-DOMAIN/spire/agent/join_token/TOKEN), because registrations
// name it as their parent. That is harmless: a token is consumed by its first
// use, so the one in the ID is worthless. For the same reason the node cannot
// attest again with it, and has no selectors.
package jointoken

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name on the wire and in configuration.
const Name = "join_token"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Bearer,
	Needed:   "a token that was not used yet: from its operator, a shell's history, a script",
	Page:     "docs/attestors/join_token.md",
}

// MaxToken is the longest token, in bytes.
const MaxToken = 255

// Validate checks a token's form: 1 to [MaxToken] letters, digits, '-', '_'
// and '.', and neither "." nor "..", since it becomes a segment of the agent's
// SPIFFE ID. The error does not hold the token.
func Validate(token string) error {
	switch n := len(token); {
	case n == 0:
		return errors.New("join token is empty")
	case n > MaxToken:
		return fmt.Errorf("join token is %d bytes long; the most is %d", n, MaxToken)
	case spiffeid.ValidatePathSegment(token) != nil:
		return errors.New("join token is malformed: letters, digits, '-', '_' and '.' are allowed")
	}
	return nil
}

// Agent is the half on the node.
type Agent struct{ token string }

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half for a token. It fails if the token cannot be
// one.
func NewAgent(token string) (*Agent, error) {
	if err := Validate(token); err != nil {
		return nil, err
	}
	return &Agent{token: token}, nil
}

// Proof returns the token.
func (a *Agent) Proof(context.Context) ([]byte, error) { return []byte(a.token), nil }

// Respond fails: a join token is not challenged.
func (a *Agent) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("server sent a challenge, which join_token does not have")
}

// String keeps the token out of logs.
func (a *Agent) String() string { return Name }

// GoString keeps the token out of logs.
func (a *Agent) GoString() string { return Name }

// LogValue keeps the token out of logs.
func (a *Agent) LogValue() slog.Value { return slog.StringValue(Name) }

// Server is the half on the server.
type Server struct {
	consume func(ctx context.Context, token string) error
}

var _ attestors.Server = (*Server)(nil)

// New makes the server's half. It calls consume for each token that has the
// form of one; of all callers with one token, consume lets exactly one pass.
// Its error is told to the node, so it says no more than that the token does
// not exist or was used, or that it expired.
func New(consume func(ctx context.Context, token string) error) *Server {
	return &Server{consume: consume}
}

// Verify consumes the token.
func (s *Server) Verify(ctx context.Context, payload []byte, _ func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	token := string(payload)
	if err := Validate(token); err != nil {
		return nil, err
	}
	if err := s.consume(ctx, token); err != nil {
		return nil, err
	}
	return &attestors.Evidence{Path: Name + "/" + token}, nil
}
