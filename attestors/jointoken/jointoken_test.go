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

// What someone without a token tries. What cannot be one is refused before it
// is looked up.
func TestAttacksWithoutAToken(t *testing.T) {
	const form = "join token is malformed"
	for _, c := range []struct{ name, payload, want string }{
		{"nothing", "", "is empty"},
		{"a token longer than any", strings.Repeat("x", jointoken.MaxToken+1), "256 bytes long"},
		{"a payload of the largest size", strings.Repeat("x", 64<<10), "65536 bytes long"},
		{"the path of another agent", "a/b", form},
		{"the path of the server", "../server", form},
		{"the segment of oneself", ".", form},
		{"the segment above", "..", form},
		{"a query", "the-token?x=1", form},
		{"a fragment", "the-token#x", form},
		{"an escaped separator", "a%2fb", form},
		{"a space after a good token", "the-token ", form},
		{"a line's end after a good token", "the-token\n", form},
		{"a zero byte after a good token", "the-token\x00", form},
		{"bytes that are no text", "t\xff", form},
		{"a letter that only looks alike", "the-tоken", form},
		{"JSON", `{"token":"the-token"}`, form},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := jointoken.New(func(_ context.Context, token string) error {
				t.Errorf("%q was looked up", token)
				return nil
			})
			if _, err := s.Verify(t.Context(), []byte(c.payload), nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v; want %q", err, c.want)
			} else if len(c.payload) > 2 && strings.Contains(err.Error(), c.payload) {
				t.Errorf("the error holds the token: %v", err)
			}
			if _, err := jointoken.NewAgent(c.payload); err == nil {
				t.Error("it makes an agent's half")
			}
		})
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
