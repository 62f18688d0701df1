package jointoken_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors/jointoken"
)

var errUsed = errors.New("join token does not exist or has already been used")

// server knows one token and lets it pass once.
func server(token string) *jointoken.Server {
	return jointoken.New(func(_ context.Context, got string) error {
		if got != token || token == "" {
			return errUsed
		}
		token = ""
		return nil
	})
}

func proof(t *testing.T, token string) []byte {
	t.Helper()
	agent, err := jointoken.NewAgent(token)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := agent.Proof(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return payload
}

func TestATokenAdmitsOneNodeOnce(t *testing.T) {
	s := server("the-token")

	evidence, err := s.Verify(t.Context(), proof(t, "the-token"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if evidence.Path != "join_token/the-token" || len(evidence.Selectors) != 0 || evidence.CanReattest {
		t.Errorf("evidence is %+v", evidence)
	}

	if _, err := s.Verify(t.Context(), proof(t, "the-token"), nil); !errors.Is(err, errUsed) {
		t.Errorf("second use: %v, want %v", err, errUsed)
	}
}

func TestAnUnknownTokenIsRefused(t *testing.T) {
	if _, err := server("the-token").Verify(t.Context(), proof(t, "another"), nil); !errors.Is(err, errUsed) {
		t.Errorf("got %v, want %v", err, errUsed)
	}
}

func TestWhatCannotBeATokenIsNeverLookedUp(t *testing.T) {
	s := jointoken.New(func(_ context.Context, token string) error {
		t.Errorf("%q was looked up", token)
		return nil
	})
	for _, token := range []string{"", strings.Repeat("x", 256), "a/b", "a b", ".", "..", "t\x00", "t\xff", "tök"} {
		if _, err := s.Verify(t.Context(), []byte(token), nil); err == nil {
			t.Errorf("%q is accepted", token)
		} else if token != "" && len(token) > 2 && strings.Contains(err.Error(), token) {
			t.Errorf("the error holds the token: %v", err)
		}
		if _, err := jointoken.NewAgent(token); err == nil {
			t.Errorf("%q makes an agent's half", token)
		}
	}
}

func TestAChallengeIsNotAnswered(t *testing.T) {
	agent, err := jointoken.NewAgent("the-token")
	if err != nil {
		t.Fatal(err)
	}
	if response, err := agent.Respond(t.Context(), []byte("x")); err == nil {
		t.Errorf("answered %q", response)
	}
}

func TestTheTokenIsNotShown(t *testing.T) {
	agent, err := jointoken.NewAgent("the-token")
	if err != nil {
		t.Fatal(err)
	}
	if shown := fmt.Sprintf("%v %+v %#v %s", agent, agent, agent, agent); strings.Contains(shown, "the-token") {
		t.Errorf("the token is shown: %s", shown)
	}
}

func FuzzVerify(f *testing.F) {
	f.Add([]byte("the-token"))
	f.Add([]byte("../server"))
	f.Fuzz(func(t *testing.T, payload []byte) {
		s := jointoken.New(func(context.Context, string) error { return nil })
		evidence, err := s.Verify(t.Context(), payload, nil)
		if err != nil {
			return
		}
		id, err := spiffeid.FromPathf(spiffeid.RequireTrustDomainFromString("example.org"), "/spire/agent/%s", evidence.Path)
		if err != nil || id.Path() != "/spire/agent/join_token/"+string(payload) {
			t.Errorf("payload %q makes ID %v (%v)", payload, id, err)
		}
	})
}
