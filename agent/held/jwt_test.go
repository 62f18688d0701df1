package held_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

// jwt asks for a JWT-SVID of the only entry of uid 1.
func (n *node) jwt(audience ...string) string {
	n.t.Helper()
	got, err := n.JWT(n.t.Context(), n.Match(heldtest.Selectors("unix:uid:1"))[0], audience)
	if err != nil {
		n.t.Fatal(err)
	}
	if !time.Now().Before(got.ExpiresAt) {
		n.t.Error("an expired JWT-SVID was served")
	}
	return got.Token
}

func withJWT(t *testing.T, change func(*entry.Entry), body func(n *node, e *entry.Entry)) {
	t.Helper()
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", change, "unix:uid:1")
		n.sync()
		body(n, e)
	})
}

func TestAJWTSVIDIsCachedUntilHalfOfItsLife(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		first := n.jwt("x")
		time.Sleep(heldtest.JWTTTL/2 - time.Nanosecond)
		want(t, "before", n.jwt("x"), first)
		time.Sleep(time.Nanosecond)
		second := n.jwt("x")
		if second == first {
			t.Error("it was not renewed")
		}
		want(t, "calls", len(n.JWTCalls()), 2)
	})
}

func TestJWTSVID_A28_EachAudienceInItsOrderHasItsOwn(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		for _, audience := range [][]string{{"x"}, {"y"}, {"x", "y"}, {"y", "x"}, {"xy"}, {"x\x01y"}, {"\x01x"}} {
			token := n.jwt(audience...)
			payload, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
			if err != nil {
				t.Fatal(err)
			}
			quoted := strings.ReplaceAll(fmt.Sprintf("%q", audience), `" "`, `","`)
			quoted = strings.ReplaceAll(quoted, `\x01`, `\u0001`)
			if !strings.Contains(string(payload), `"aud":`+quoted) {
				t.Errorf("asked for %s, got %s", quoted, payload)
			}
			n.jwt(audience...)
		}
		want(t, "calls", len(n.JWTCalls()), 7)
	})
}

func TestCallersThatWantTheSameJWTSVIDShareOneSigning(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		release := n.Hold()
		var wg sync.WaitGroup
		tokens := make([]string, 100)
		for i := range tokens {
			wg.Go(func() { tokens[i] = n.jwt("x") })
		}
		impatient, cancel := context.WithCancel(n.t.Context())
		wg.Go(func() {
			if _, err := n.JWT(impatient, n.Entries()[0], []string{"x"}); !errors.Is(err, context.Canceled) {
				t.Errorf("error is %v", err)
			}
		})
		synctest.Wait()
		cancel()
		synctest.Wait()
		release()
		wg.Wait()
		want(t, "calls", len(n.JWTCalls()), 1)
		for _, token := range tokens {
			want(t, "token", token, tokens[0])
		}
	})
}

func TestTheFirstCallerMayGoWhileOthersWait(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		release := n.Hold()
		ctx, cancel := context.WithCancel(n.t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { n.JWT(ctx, n.Entries()[0], []string{"x"}) })
		synctest.Wait()
		wg.Go(func() { n.jwt("x") })
		synctest.Wait()
		cancel()
		synctest.Wait()
		release()
		wg.Wait()
		want(t, "calls", len(n.JWTCalls()), 1)
	})
}

func TestManyDifferentJWTSVIDsAreSignedOnlySoManyAtOnce(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		release := n.Hold()
		var wg sync.WaitGroup
		for i := range 300 {
			wg.Go(func() { n.jwt(fmt.Sprint(i)) })
		}
		synctest.Wait()
		if calls := len(n.JWTCalls()); calls > 64 {
			t.Errorf("%d at once", calls)
		}
		release()
		wg.Wait()
		want(t, "calls", len(n.JWTCalls()), 300)
	})
}

func TestJWTSVIDsWithAnIDAreNotCached(t *testing.T) {
	withJWT(t, func(e *entry.Entry) { e.JWTIncludeJTI = true }, func(n *node, e *entry.Entry) {
		first := n.jwt("x")
		if n.jwt("x") == first {
			t.Error("the same was served twice")
		}
		n.Delete(e)
		matched := n.Entries()[0]
		n.sync()
		if _, err := n.JWT(n.t.Context(), matched, []string{"x"}); !errors.Is(err, held.ErrNotHeld) {
			t.Errorf("error is %v", err)
		}
	})
}

func TestWithoutTheServerACachedJWTSVIDIsServedWhileItIsValid(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		first := n.jwt("x")
		n.Down(errors.New("away"))
		for range 29 {
			time.Sleep(10 * time.Second)
			want(t, "token", n.jwt("x"), first)
		}
		if calls := len(n.JWTCalls()); calls < 3 || calls > 30 {
			t.Errorf("%d calls", calls)
		}
		time.Sleep(10 * time.Second)
		if _, err := n.JWT(n.t.Context(), n.Entries()[0], []string{"x"}); err == nil {
			t.Error("an expired one was served")
		}
		n.Down(nil)
		n.jwt("x")
	})
}

func TestAServerThatHangsDoesNotDelayACachedJWTSVIDForLong(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		first := n.jwt("x")
		time.Sleep(heldtest.JWTTTL * 3 / 4)
		release := n.Hold()
		start := time.Now()
		want(t, "token", n.jwt("x"), first)
		if waited := time.Since(start); waited > 2*time.Second {
			t.Errorf("it took %v", waited)
		}
		release()
		synctest.Wait()
		if n.jwt("x") == first {
			t.Error("the new one is not served")
		}
	})
}

func TestAnEntryThatChangedOrIsGoneHasNoCachedJWTSVID(t *testing.T) {
	withJWT(t, nil, func(n *node, e *entry.Entry) {
		n.jwt("x")
		matched := n.Entries()[0]
		e = n.Server.Update(e, func(e *entry.Entry) { e.Hint = "new" })
		n.sync()
		if _, err := n.JWT(n.t.Context(), matched, []string{"x"}); !errors.Is(err, held.ErrNotHeld) {
			t.Errorf("as it was: error is %v", err)
		}
		n.jwt("x")
		want(t, "calls", len(n.JWTCalls()), 2)
		matched = n.Entries()[0]
		release := n.Hold()
		done := make(chan error)
		go func() { _, err := n.JWT(n.t.Context(), matched, []string{"y"}); done <- err }()
		synctest.Wait()
		n.Delete(e)
		n.sync()
		release()
		if err := <-done; !errors.Is(err, held.ErrNotHeld) {
			t.Errorf("gone while it was signed: error is %v", err)
		}
		if _, err := n.JWT(n.t.Context(), matched, []string{"x"}); !errors.Is(err, held.ErrNotHeld) {
			t.Errorf("gone: error is %v", err)
		}
	})
}

func TestADistrustedKeysJWTSVIDsAreDropped(t *testing.T) {
	for name, distrust := range map[string]func(*node){
		"tainted": func(n *node) { n.Taint() },
		"revoked": func(n *node) { n.Revoke() },
	} {
		t.Run(name, func(t *testing.T) {
			withJWT(t, nil, func(n *node, _ *entry.Entry) {
				first := n.jwt("x")
				n.Rotate()
				n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
				want(t, "with another key beside it", n.jwt("x"), first)
				distrust(n)
				n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
				if n.jwt("x") == first {
					t.Error("it is still served")
				}
			})
		})
	}
}

func TestOnlySoManyJWTSVIDsAreCached(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		n.jwt("oldest")
		n.jwt("used")
		for i := range 4095 {
			n.jwt(fmt.Sprint(i))
			if i%1000 == 0 {
				n.jwt("used")
			}
		}
		calls := len(n.JWTCalls())
		n.jwt("used")
		want(t, "calls for one that is used", len(n.JWTCalls()), calls)
		n.jwt("oldest")
		want(t, "calls for the oldest", len(n.JWTCalls()), calls+1)
	})
}

func TestAfterRunNoJWTSVIDIsSigned(t *testing.T) {
	server := heldtest.New(t)
	server.Entry("a", nil, "unix:uid:1")
	h := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: server})
	h.Apply(server.Complete())
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	h.Run(ctx)
	if _, err := h.JWT(t.Context(), h.Entries()[0], []string{"x"}); err == nil {
		t.Error("no error")
	}
}
