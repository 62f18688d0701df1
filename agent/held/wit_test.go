package held_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

func (n *node) subscribeWIT(selectors ...string) *held.Subscription {
	s := n.SubscribeWIT(context.Background(), heldtest.Selectors(selectors...))
	n.t.Cleanup(s.Close)
	synctest.Wait()
	return s
}

// wit returns the WIT-SVID of an entry, verified with its key.
func (n *node) wit(u *held.Update, e *entry.Entry) *held.WITSVID {
	n.t.Helper()
	got := u.WITs[e]
	if got.SVID == nil {
		n.t.Fatalf("%s has no WIT-SVID: %v", e.ID, got.Err)
	}
	keys := make(map[string]crypto.PublicKey)
	for _, a := range n.Server.Bundle().WITAuthorities {
		keys[a.KeyID] = a.PublicKey
	}
	svid, err := witsvid.ParseAndValidate(got.SVID.Token, witbundle.FromWITAuthorities(heldtest.TrustDomain, keys))
	if err != nil {
		n.t.Fatal(err)
	}
	var key jose.JSONWebKey
	if err := json.Unmarshal([]byte(got.SVID.Key), &key); err != nil || key.IsPublic() || key.Algorithm != "ES256" {
		n.t.Fatalf("the key is %v, %v", key, err)
	}
	if public := key.Public(); !public.Key.(interface{ Equal(crypto.PublicKey) bool }).Equal(svid.PublicKey) {
		n.t.Error("the key is not that of the token")
	}
	if svid.ID != e.SPIFFEID || !svid.Expiry.Equal(got.SVID.ExpiresAt) {
		n.t.Errorf("the token is of %s until %s", svid.ID, svid.Expiry)
	}
	return got.SVID
}

func TestWITSVIDsAreSignedOnDemandAndShared_W16(t *testing.T) {
	onNode(t, 0, func(n *node) {
		a, b := n.Entry("a", nil, "unix:uid:1"), n.Entry("b", nil, "unix:uid:1")
		n.Entry("other", nil, "unix:uid:2")
		n.sync()
		want(t, "signed before anybody asks", len(n.WITCalls()), 0)
		if n.Look(heldtest.Selectors("unix:uid:1")).WITs != nil {
			t.Error("there are WIT-SVIDs though nobody subscribes to them")
		}
		s := n.subscribeWIT("unix:uid:1")
		if calls := n.WITCalls(); len(calls) != 1 || !slices.Equal(calls[0], []string{"a", "b"}) {
			t.Errorf("calls are %v, want one for both", calls)
		}
		if !woken(s) {
			t.Error("the subscriber is not woken")
		}
		u := s.Update()
		first := n.wit(u, a)
		if second := n.wit(u, b); second.Key == first.Key {
			t.Error("two identities have one key")
		}
		same := n.subscribeWIT("unix:uid:1")
		if got := n.wit(same.Update(), a); got != first {
			t.Error("another process of the workload got another WIT-SVID")
		}
		more := n.subscribeWIT("unix:uid:1", "unix:gid:1") // another set of selectors, one identity
		if got := n.wit(more.Update(), a); got != first {
			t.Error("another process with the identity got another WIT-SVID")
		}
		want(t, "calls", len(n.WITCalls()), 1)
		want(t, "X509-SVIDs signed for it", len(n.X509Calls()), 1) // ahead, as always
	})
}

func TestWITSVIDsAreRenewedAtHalfOfTheirLifeWhileSomebodyWantsThem(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", nil, "unix:uid:1")
		n.sync()
		s := n.subscribeWIT("unix:uid:1")
		first := n.wit(s.Update(), e)
		time.Sleep(26 * time.Minute)
		synctest.Wait()
		want(t, "calls before half of its life", len(n.WITCalls()), 1)
		time.Sleep(8 * time.Minute)
		synctest.Wait()
		want(t, "calls after it", len(n.WITCalls()), 2)
		second := n.wit(s.Update(), e)
		if second.Key == first.Key || !second.ExpiresAt.After(first.ExpiresAt) {
			t.Error("it is not another one with a key of its own")
		}
		s.Close()
		other := n.subscribeWIT("unix:uid:1") // soon after: it is still there
		if got := n.wit(other.Update(), e); got != second {
			t.Error("it was let go of at once")
		}
		other.Close()
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		want(t, "calls once nobody wants it", len(n.WITCalls()), 2)
		n.wit(n.subscribeWIT("unix:uid:1").Update(), e)
		want(t, "calls when it is wanted again", len(n.WITCalls()), 3)
	})
}

func TestOnlySoManyWITSVIDsAreKeptAndNoneOfThemCostsAnX509SVID(t *testing.T) {
	onNode(t, 3, func(n *node) {
		for i := range 5 {
			n.Entry(fmt.Sprint("e", i), nil, fmt.Sprint("unix:uid:", i))
		}
		n.sync()
		for i := range 5 {
			n.subscribeWIT(fmt.Sprint("unix:uid:", i)).Close()
		}
		synctest.Wait()
		want(t, "calls", len(n.WITCalls()), 5)
		n.subscribeWIT("unix:uid:4")
		want(t, "calls for one asked for just before", len(n.WITCalls()), 5)
		n.subscribeWIT("unix:uid:0")
		want(t, "calls for one asked for long before", len(n.WITCalls()), 6)
		_, svids := n.Counts()
		want(t, "X509-SVIDs", svids, 3)
	})
}

func TestWITSVID_W45_AnIdentityThatIsTakenAwayVanishesAtOnce(t *testing.T) {
	onNode(t, 0, func(n *node) {
		a, b := n.Entry("a", nil, "unix:uid:1"), n.Entry("b", nil, "unix:uid:1")
		n.sync()
		s := n.subscribeWIT("unix:uid:1")
		n.wit(s.Update(), a)
		old := n.wit(s.Update(), b)
		n.Delete(a)
		renamed := n.Update(b, func(e *entry.Entry) { e.SPIFFEID = spiffeid.RequireFromPath(heldtest.TrustDomain, "/renamed") })
		release := n.Hold()
		n.sync()
		u := s.Update()
		if len(u.WITs) != 1 || u.WITs[renamed].SVID != nil || u.WITs[renamed].Err != nil {
			t.Errorf("WIT-SVIDs are %v", u.WITs)
		}
		release()
		synctest.Wait()
		if got := n.wit(s.Update(), renamed); got.Key == old.Key {
			t.Error("the key of the old identity is used again")
		}
	})
}

func TestAnEntryThatEndsTakesItsWITSVIDWithIt(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", func(e *entry.Entry) { e.ExpiresAt = time.Now().Add(10 * time.Minute).Truncate(time.Second) }, "unix:uid:1")
		n.sync()
		s := n.subscribeWIT("unix:uid:1")
		n.wit(s.Update(), e)
		woken(s)
		time.Sleep(10*time.Minute + time.Second)
		synctest.Wait()
		if u := s.Update(); len(u.Entries) != 0 || len(u.WITs) != 0 || !woken(s) {
			t.Errorf("update is %+v", u)
		}
	})
}

func TestWITSVIDsWhoseAuthorityFellAreReplacedAtOnce(t *testing.T) {
	for name, fall := range distrust {
		t.Run(name, func(t *testing.T) {
			onNode(t, 0, func(n *node) {
				e := n.Entry("a", nil, "unix:uid:1")
				n.sync()
				s := n.subscribeWIT("unix:uid:1")
				first := n.wit(s.Update(), e)
				woken(s)
				began := time.Now()
				fall(n, nil)
				synctest.Wait()
				if got := n.wit(s.Update(), e); got == first || got.Key == first.Key || !woken(s) {
					t.Error("it is not replaced")
				}
				want(t, "time it took", time.Since(began), 0)
				want(t, "calls", len(n.WITCalls()), 2)
			})
			// And while the first one was on its way.
			onSlowNode(t, fall, func(n *node, arm func()) {
				arm()
				s := n.subscribeWIT("unix:uid:1")
				time.Sleep(time.Second)
				synctest.Wait()
				n.wit(s.Update(), n.Entries()[0])
				want(t, "calls", len(n.WITCalls()), 2)
			})
		})
	}
}

func TestAWITSVIDOfAnotherAuthorityStaysWhenOneFalls(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", nil, "unix:uid:1")
		n.Rotate() // the second signs
		n.sync()
		s := n.subscribeWIT("unix:uid:1")
		first := n.wit(s.Update(), e)
		n.Taint()
		n.publish()
		n.Revoke()
		n.publish()
		synctest.Wait()
		if got := n.wit(s.Update(), e); got != first {
			t.Error("it was replaced")
		}
	})
}

func TestAChangeOfTheWITAuthoritiesAloneIsNoticed(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", nil, "unix:uid:1")
		n.sync()
		s := n.SubscribeBundles(heldtest.Selectors("unix:uid:1"))
		defer s.Close()
		woken(s)
		n.sync()
		if woken(s) {
			t.Error("being told the same again woke somebody")
		}
		for what, change := range map[string]func(*bundle.JWTAuthority){
			"mark":   func(a *bundle.JWTAuthority) { a.Tainted = true },
			"end":    func(a *bundle.JWTAuthority) { a.ExpiresAt = time.Unix(4e9, 0) },
			"key ID": func(a *bundle.JWTAuthority) { a.KeyID = "other" },
		} {
			b := n.Server.Bundle() // of the same sequence number
			change(&b.WITAuthorities[0])
			n.Apply(held.Change{Bundles: []*bundle.Bundle{b}})
			if !woken(s) || n.Held.Bundle(heldtest.TrustDomain) != b {
				t.Errorf("a change of a %s was not noticed", what)
			}
		}
	})
}

func TestAServerWithoutWITDoesNotKeepX509SVIDsWaiting(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", nil, "unix:uid:1")
		refusal := errors.New("not switched on")
		n.RefuseWIT(refusal)
		n.sync()
		s := n.subscribeWIT("unix:uid:1")
		for range 20 {
			time.Sleep(time.Minute)
		}
		synctest.Wait()
		e := n.Entries()[0]
		if got := s.Update().WITs[e]; got.SVID != nil || !errors.Is(got.Err, refusal) {
			t.Errorf("got %v", got)
		}
		if calls := len(n.WITCalls()); calls < 10 || calls > 60 {
			t.Errorf("asked %d times in twenty minutes", calls)
		}
		began := time.Now()
		b := n.Entry("b", nil, "unix:uid:1")
		x := n.subscribe("unix:uid:1")
		n.sync()
		n.verify(x.Update().Identities[1].SVID, b.ID)
		want(t, "time until an X509-SVID came", time.Since(began), 0)
		n.RefuseWIT(nil)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		n.wit(s.Update(), e)
	})
}

func newPublicKey() []byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		panic(err)
	}
	return der
}

// liar answers what it was not asked for.
type liar struct {
	*heldtest.Server
	answer func([]held.WITRequest) ([]held.WITResult, error)
}

func (l *liar) SignWIT(_ context.Context, requests []held.WITRequest) ([]held.WITResult, error) {
	return l.answer(requests)
}

func TestAWITSVIDThatIsNotWhatWasAskedForIsNotUsed(t *testing.T) {
	for reason, answer := range map[string]func(s *heldtest.Server, requests []held.WITRequest) ([]held.WITResult, error){
		"what is no WIT-SVID": func(*heldtest.Server, []held.WITRequest) ([]held.WITResult, error) {
			return []held.WITResult{{Token: "a.b.c"}}, nil
		},
		"what is no WIT-SVID:": func(s *heldtest.Server, _ []held.WITRequest) ([]held.WITResult, error) {
			got, err := s.SignJWT(context.Background(), "a", []string{"x"})
			return []held.WITResult{{Token: got.Token}}, err
		},
		"a WIT-SVID of spiffe://example.org/b; the entry is of spiffe://example.org/a": func(s *heldtest.Server, r []held.WITRequest) ([]held.WITResult, error) {
			r[0].EntryID = "b"
			return s.SignWIT(context.Background(), r)
		},
		"a WIT-SVID of another key": func(s *heldtest.Server, r []held.WITRequest) ([]held.WITResult, error) {
			return s.SignWIT(context.Background(), []held.WITRequest{{EntryID: "a", PublicKey: newPublicKey(), Algorithm: "ES256"}})
		},
		"answered 0 of 1 requests": func(*heldtest.Server, []held.WITRequest) ([]held.WITResult, error) { return nil, nil },
		"answered 2 of 1 requests": func(*heldtest.Server, []held.WITRequest) ([]held.WITResult, error) {
			return make([]held.WITResult, 2), nil
		},
	} {
		t.Run(reason, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := heldtest.New(t)
				e := server.Entry("a", nil, "unix:uid:1")
				server.Entry("b", nil, "unix:uid:2")
				h := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: &liar{server, func(r []held.WITRequest) ([]held.WITResult, error) { return answer(server, r) }}})
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error)
				go func() { done <- h.Run(ctx) }()
				h.Apply(server.Complete())
				s := h.SubscribeWIT(t.Context(), heldtest.Selectors("unix:uid:1"))
				synctest.Wait()
				got := s.Update().WITs[e]
				if got.SVID != nil || got.Err == nil || !strings.Contains(got.Err.Error(), reason) {
					t.Errorf("got %v, want an error with %q", got, reason)
				}
				s.Close()
				cancel()
				<-done
			})
		})
	}
}
