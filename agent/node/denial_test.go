package node_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
)

func TestABannedAgentStopsAndForgetsItsIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		w.Lock()
		w.Nodes[tokenAgent].Banned = true
		w.Unlock()
		if _, err := r.SignJWT(t.Context(), "x", []string{"a"}); status.Code(errors.Unwrap(err)) != codes.PermissionDenied {
			t.Errorf("call of a banned agent: %v", err)
		}
		if err := r.ended(t); !errors.Is(err, node.ErrBanned) {
			t.Errorf("Run returned %v", err)
		}
		if s := r.Status(); s.Connected || !s.ID.IsZero() {
			t.Errorf("status of a banned agent is %+v", s)
		}
		w.options.Attestor = nil
		_, err := node.Open(w.options)
		wantError(t, err, "no identity yet")
	})
}

func TestABannedAgentIsNotAttestedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		w.Nodes[testAgent] = &nodetest.Node{Banned: true}
		if err := w.run(t).ended(t); !errors.Is(err, node.ErrBanned) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// The server's other answers to an agent that it does not accept any more.
var denials = []types.PermissionDeniedDetails_Reason{
	types.PermissionDeniedDetails_AGENT_EXPIRED,
	types.PermissionDeniedDetails_AGENT_NOT_ATTESTED,
	types.PermissionDeniedDetails_AGENT_NOT_ACTIVE,
	types.PermissionDeniedDetails_AGENT_MUST_REATTEST,
}

func TestADeniedAgentAttestsAgainIfItCan(t *testing.T) {
	for _, reason := range denials {
		t.Run(reason.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := reattesting(t)
				r := w.run(t)
				r.connected(t)
				w.Lock()
				w.Denial = reason
				w.Unlock()
				time.Sleep(40 * time.Minute)
				if n := w.CallCount("AttestAgent"); n != 2 {
					t.Errorf("attested %d times, want twice", n)
				}
				r.connected(t)
			})
		})
	}
}

func TestANodeWhoseProofIsRefusedGoesOnUntilItsSVIDEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		r := w.run(t)
		link := r.connected(t)
		w.Lock()
		w.Denial = types.PermissionDeniedDetails_AGENT_MUST_REATTEST
		refused := true
		w.Before = func(_ context.Context, method string) error {
			if refused && strings.HasSuffix(method, "/AttestAgent") {
				return status.Error(codes.PermissionDenied, "the certificate has expired")
			}
			return nil
		}
		w.Unlock()
		time.Sleep(50 * time.Minute)
		if n := w.CallCount("AttestAgent"); n < 3 {
			t.Errorf("attested %d times, want several attempts in the second half of the SVID's life", n)
		}
		if r.connected(t) != link {
			t.Error("the link was given up although its SVID is valid")
		}
		w.Lock()
		refused = false // its operator has mended it
		w.Unlock()
		time.Sleep(5 * time.Minute)
		if r.connected(t) == link || !r.Status().ExpiresAt.After(time.Now().Add(50*time.Minute)) {
			t.Errorf("no new SVID: %+v", r.Status())
		}
	})
}

func TestADeniedAgentThatCannotAttestAgainEndsWithARemedy(t *testing.T) {
	for _, reason := range denials {
		t.Run(reason.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := joining(t)
				w.Denial = reason
				r := w.run(t)
				r.connected(t)
				time.Sleep(40 * time.Minute)
				wantError(t, r.ended(t), reason.String(), "hallmark token generate")
			})
		})
	}
}

func TestAnEvictedAgentAttestsAgainOnItsNextCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		w.Entries["e"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/e")
		r := w.run(t)
		r.connected(t)
		w.Lock()
		delete(w.Nodes, testAgent)
		w.Unlock()
		if _, err := r.SignJWT(t.Context(), "e", []string{"a"}); err == nil {
			t.Error("an evicted agent is served")
		}
		synctest.Wait()
		if _, err := r.SignJWT(t.Context(), "e", []string{"a"}); err != nil {
			t.Errorf("after it attested again: %v", err)
		}
	})
}

func TestAServerThatKeepsDenyingWhatItAttestedIsNotHammered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		w.Before = func(_ context.Context, method string) error {
			if strings.HasSuffix(method, "NewJWTSVID") {
				return nodetest.Deny(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
			}
			return nil
		}
		r := w.run(t)
		for start := time.Now(); time.Since(start) < 10*time.Minute; {
			r.connected(t)
			_, err := r.SignJWT(t.Context(), "e", []string{"a"})
			if err == nil {
				t.Fatal("not denied")
			}
			synctest.Wait()
		}
		if n := w.CallCount("AttestAgent"); n > 150 {
			t.Errorf("attested %d times in 10 minutes", n)
		}
	})
}

func TestAnSVIDThatExpiredDuringTheServersAbsence(t *testing.T) {
	t.Run("is replaced by attesting again", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := reattesting(t)
			r := w.run(t)
			r.connected(t)
			w.Stop()
			time.Sleep(2 * time.Hour)
			w.Start()
			r.connected(t)
			if n := w.CallCount("AttestAgent"); n != 2 {
				t.Errorf("attested %d times, want twice", n)
			}
		})
	})
	t.Run("ends an agent whose join token was used, once the server is back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := joining(t)
			r := w.run(t)
			r.connected(t)
			w.Stop()
			time.Sleep(2 * time.Hour)
			select {
			case err := <-r.err:
				t.Fatalf("ended while the server was away: %v", err)
			default:
			}
			w.Start()
			wantError(t, r.ended(t), "cannot be given again", "hallmark token generate")
			if len(w.Seen) != 1 {
				t.Errorf("the token was sent %d times", len(w.Seen))
			}
		})
	})
	t.Run("is reported at start", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := joining(t)
			r := w.run(t)
			r.connected(t)
			r.stop()
			time.Sleep(2 * time.Hour)
			_, err := node.Open(w.options)
			wantError(t, err, "expired at", "hallmark token generate")

			w.Tokens["join-token-2"] = true
			w.options.Attestor = joinToken(t, "join-token-2")
			if l := w.run(t).connected(t); l.ID().Path() != "/spire/agent/join_token/join-token-2" {
				t.Errorf("with a new token the agent is %s", l.ID())
			}
		})
	})
}
