package held_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

func ttl(d time.Duration) func(*entry.Entry) { return func(e *entry.Entry) { e.X509SVIDTTL = d } }

func svid(u *held.Update) *held.X509SVID { return u.Identities[0].SVID }

func TestX509SVIDsAreSignedAheadUpToTheLimit(t *testing.T) {
	onNode(t, 3, func(n *node) {
		for i := range 5 {
			n.Entry(fmt.Sprint("e", i), nil, fmt.Sprint("unix:uid:", i))
		}
		n.Entry("unwanted", noPrefetch, "unix:uid:9")
		n.sync()
		_, svids := n.Counts()
		want(t, "SVIDs held", svids, 3)
		var wanting []*held.Subscription
		for i := range 5 {
			s := n.subscribe(fmt.Sprint("unix:uid:", i))
			n.verify(svid(s.Update()), fmt.Sprint("e", i))
			wanting = append(wanting, s)
		}
		_, svids = n.Counts()
		want(t, "SVIDs that workloads want", svids, 5)
		for i, s := range wanting {
			s.Close()
			s.Close()
			_ = i
		}
		synctest.Wait()
		_, svids = n.Counts()
		want(t, "SVIDs held when nobody wants them", svids, 3)
		for i, kept := range []bool{false, false, true, true, true} {
			if status, _ := n.Status(fmt.Sprint("e", i)); (status.SVID != nil) != kept {
				t.Errorf("e%d: held is %v; those asked for longest ago go first", i, !kept)
			}
		}
		calls := len(n.X509Calls())
		n.subscribe("unix:uid:4")
		want(t, "calls for one that is held", len(n.X509Calls()), calls)
	})
}

func TestRoomThatIsFreeIsUsed(t *testing.T) {
	onNode(t, 1, func(n *node) {
		a := n.Entry("a", nil, "unix:uid:1")
		n.Entry("b", nil, "unix:uid:2")
		n.sync()
		n.Delete(a)
		n.Apply(held.Change{GoneEntries: []string{"a", "b"}, Entries: nil})
		n.sync()
		if status, _ := n.Status("b"); status.SVID == nil {
			t.Error("b has no X509-SVID")
		}
	})
}

func TestAnX509SVIDNotPrefetchedIsNotRenewedOnceNobodyWantsIt(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", noPrefetch, "unix:uid:1")
		n.sync()
		s := n.Subscribe(t.Context(), heldtest.Selectors("unix:uid:1"))
		synctest.Wait()
		time.Sleep(2 * heldtest.X509TTL)
		renewed := len(n.X509Calls())
		if renewed < 3 {
			t.Errorf("%d calls while it was wanted", renewed)
		}
		s.Close()
		if status, _ := n.Status("a"); status.SVID == nil {
			t.Error("it was dropped at once")
		}
		time.Sleep(2 * heldtest.X509TTL)
		want(t, "calls", len(n.X509Calls()), renewed)
		if status, _ := n.Status("a"); status.SVID != nil {
			t.Error("it is still held")
		}
	})
}

func TestSigningIsBatched(t *testing.T) {
	onNode(t, 5000, func(n *node) {
		for i := range 1200 {
			n.Entry(fmt.Sprint("e", i), nil, "unix:uid:1")
		}
		n.sync()
		_, svids := n.Counts()
		want(t, "SVIDs", svids, 1200)
		var sizes []int
		for _, c := range n.X509Calls() {
			sizes = append(sizes, len(c))
		}
		slices.Sort(sizes)
		if !slices.Equal(sizes, []int{200, 500, 500}) {
			t.Errorf("calls of %v", sizes)
		}
	})
}

func TestWhatComesWhileCallsAreUnderWayGoesInTheNext(t *testing.T) {
	onNode(t, 0, func(n *node) {
		for i := range 50 {
			n.Entry(fmt.Sprint("e", i), noPrefetch, fmt.Sprint("unix:uid:", i))
		}
		n.sync()
		release := n.Hold()
		for i := range 50 {
			n.subscribe(fmt.Sprint("unix:uid:", i))
		}
		under := len(n.X509Calls())
		if under < 1 || under > 8 {
			t.Errorf("%d calls are under way", under)
		}
		want(t, "the first goes alone and at once", len(n.X509Calls()[0]), 1)
		release()
		synctest.Wait()
		_, svids := n.Counts()
		want(t, "SVIDs", svids, 50)
		want(t, "calls", len(n.X509Calls()), under+1)
	})
}

func TestAWorkloadThatWaitsGoesBeforeWhatNobodyAskedFor(t *testing.T) {
	onNode(t, 5000, func(n *node) {
		n.Entry("urgent", noPrefetch, "unix:uid:7")
		n.sync()
		for i := range 1600 {
			n.Entry(fmt.Sprint("e", i), nil, "unix:uid:1")
		}
		release := n.Hold()
		n.sync()
		n.subscribe("unix:uid:7")
		calls := n.X509Calls()
		if last := calls[len(calls)-1]; !slices.Equal(last, []string{"urgent"}) {
			t.Errorf("the last call asks for %d entries", len(last))
		}
		release()
		synctest.Wait()
		_, svids := n.Counts()
		want(t, "SVIDs", svids, 1601)
	})
}

func TestAnX509SVIDIsRenewedAtHalfOfItsLife(t *testing.T) {
	onNode(t, 0, func(n *node) {
		for i := range 200 {
			n.Entry(fmt.Sprint("e", i), nil, "unix:uid:1")
		}
		n.sync()
		s := n.subscribe("unix:uid:1")
		woken(s)
		first := s.Update()
		time.Sleep(heldtest.X509TTL * 44 / 100)
		want(t, "calls before", len(n.X509Calls()), 1)
		time.Sleep(heldtest.X509TTL * 12 / 100)
		if calls := len(n.X509Calls()); calls < 50 {
			t.Errorf("%d calls renewed 200 X509-SVIDs: they are not spread", calls)
		}
		if !woken(s) {
			t.Error("nobody was woken")
		}
		for i, x := range s.Update().Identities {
			old := first.Identities[i].SVID
			if x.SVID == old || slices.Equal(x.SVID.Key, old.Key) || !x.SVID.ExpiresAt.After(old.ExpiresAt) {
				t.Errorf("%s was not renewed with a new key", x.Entry.ID)
			}
		}
	})
}

func TestShortLivedX509SVIDsAreValidAtAnyTime(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", ttl(time.Minute), "unix:uid:1")
		n.sync()
		s := n.subscribe("unix:uid:1")
		for range 600 {
			time.Sleep(time.Second)
			n.verify(svid(s.Update()), "a")
		}
	})
}

func TestWithoutTheServerWhatIsHeldIsServedUntilItExpires(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("long", nil, "unix:uid:1")
		n.Entry("short", ttl(10*time.Minute), "unix:uid:2")
		n.sync()
		long, short := n.subscribe("unix:uid:1"), n.subscribe("unix:uid:2")
		n.Down(errors.New("connection refused"))
		calls := len(n.X509Calls())
		time.Sleep(10*time.Minute - time.Nanosecond)
		n.verify(svid(short.Update()), "short")
		time.Sleep(time.Nanosecond)
		if u := short.Update(); svid(u) != nil || u.Identities[0].Err == nil || !u.Ready {
			t.Errorf("an expired X509-SVID is served: %+v", u)
		}
		synctest.Wait()
		if !woken(short) {
			t.Error("nobody was told that it expired")
		}
		time.Sleep(45 * time.Minute)
		n.verify(svid(long.Update()), "long")
		if tried := len(n.X509Calls()) - calls; tried < 10 || tried > 200 {
			t.Errorf("tried %d times in 55 minutes", tried)
		}
		time.Sleep(6 * time.Minute)
		if svid(long.Update()) != nil {
			t.Error("an expired X509-SVID is served")
		}
		n.Down(nil)
		n.Apply(held.Change{Revision: 5}) // the feed is back, so the server is
		time.Sleep(time.Second)
		n.verify(svid(long.Update()), "long")
		n.verify(svid(short.Update()), "short")
	})
}

func TestAfterAnAbsenceTheMostUrgentComeFirst(t *testing.T) {
	onNode(t, 0, func(n *node) {
		for i := range 600 {
			n.Entry(fmt.Sprintf("e%03d", i), ttl(time.Hour+time.Duration(599-i)*time.Second), "unix:uid:1")
		}
		n.sync()
		n.Down(errors.New("away"))
		time.Sleep(50 * time.Minute)
		before := len(n.X509Calls())
		n.Down(nil)
		time.Sleep(2 * time.Minute)
		calls := n.X509Calls()[before:]
		if len(calls) != 3 || !slices.Equal(calls[0], []string{"e599"}) {
			t.Fatalf("%d calls, the first with %d entries from %v", len(calls), len(calls[0]), calls[0][0])
		}
		slices.SortFunc(calls, func(a, b []string) int { return len(b) - len(a) })
		if len(calls[0]) != 500 || calls[0][0] != "e598" || slices.Contains(calls[0], "e000") {
			t.Errorf("then %d entries from %v", len(calls[0]), calls[0][0])
		}
	})
}

func TestAnEntryThatCannotBeSignedDoesNotHoldUpOthers(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("bad", noPrefetch, "unix:uid:1")
		n.Entry("good", noPrefetch, "unix:uid:1")
		n.Break("bad", errors.New("refused"))
		n.sync()
		s := n.subscribe("unix:uid:1")
		u := s.Update()
		if !u.Ready || u.Identities[0].SVID != nil || u.Identities[0].Err == nil {
			t.Errorf("update is %+v", u.Identities[0])
		}
		n.verify(u.Identities[1].SVID, "good")
		time.Sleep(30 * time.Minute)
		tried := 0
		for _, c := range n.X509Calls() {
			if slices.Contains(c, "bad") {
				tried++
			}
		}
		if tried < 10 || tried > 100 {
			t.Errorf("tried %d times in 30 minutes", tried)
		}
		n.Break("bad", nil)
		woken(s)
		time.Sleep(time.Minute)
		if !woken(s) {
			t.Error("nobody was woken")
		}
		n.verify(svid(s.Update()), "bad")
	})
}

func TestAChangedEntryIsSignedAnewWhileTheOldIsServed(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", nil, "unix:uid:1")
		n.sync()
		s := n.subscribe("unix:uid:1")
		woken(s)
		old := svid(s.Update())
		release := n.Hold()
		n.Server.Update(e, func(e *entry.Entry) { e.DNSNames = []string{"a.example.org"} })
		n.sync()
		if svid(s.Update()) != old {
			t.Error("the old one is not served")
		}
		release()
		synctest.Wait()
		if !woken(s) {
			t.Error("nobody was woken")
		}
		cert := n.verify(svid(s.Update()), "a")
		if !slices.Equal(cert.DNSNames, []string{"a.example.org"}) {
			t.Errorf("names are %v", cert.DNSNames)
		}
	})
}

func TestAChangeWhileItIsBeingSignedIsSignedAgain(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", nil, "unix:uid:1")
		release := n.Hold()
		n.sync()
		s := n.subscribe("unix:uid:1")
		n.Server.Update(e, func(e *entry.Entry) { e.Hint = "new" })
		n.sync()
		release()
		synctest.Wait()
		want(t, "calls", len(n.X509Calls()), 2)
		n.verify(svid(s.Update()), "a")
		want(t, "hint", s.Update().Identities[0].Entry.Hint, "new")
	})
}

func TestX509SVID_A24_AnIdentityThatIsTakenAwayVanishesAtOnce(t *testing.T) {
	other := func(e *entry.Entry) { e.SPIFFEID = heldtest.New(t).Entry("renamed", nil, "unix:uid:9").SPIFFEID }
	for name, c := range map[string]struct {
		change func(n *node, e *entry.Entry)
		left   []string
	}{
		"deleted": {func(n *node, e *entry.Entry) { n.Delete(e) }, nil},
		"selectors do not match": {func(n *node, e *entry.Entry) {
			n.Server.Update(e, func(e *entry.Entry) { e.Selectors = heldtest.Selectors("unix:uid:2") })
		}, nil},
		"renamed": {func(n *node, e *entry.Entry) { n.Server.Update(e, other) }, []string{"a"}},
		"expired": {func(n *node, e *entry.Entry) { n.Server.Update(e, func(e *entry.Entry) { e.ExpiresAt = time.Now() }) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			onNode(t, 0, func(n *node) {
				e := n.Entry("a", nil, "unix:uid:1")
				n.sync()
				s := n.subscribe("unix:uid:1")
				woken(s)
				release := n.Hold()
				c.change(n, e)
				n.Apply(n.Complete())
				u := s.Update()
				if got := identityIDs(u); !slices.Equal(got, c.left) || !woken(s) {
					t.Errorf("identities are %v", got)
				}
				for _, i := range u.Identities {
					if i.SVID != nil {
						t.Error("the old X509-SVID is served")
					}
				}
				release()
				synctest.Wait()
				for _, i := range s.Update().Identities {
					n.verify(i.SVID, "renamed")
				}
			})
		})
	}
}

func TestAnAnswerForAnEntryThatIsGoneIsDiscarded(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", nil, "unix:uid:1")
		release := n.Hold()
		n.sync()
		s := n.subscribe("unix:uid:1")
		n.Delete(e)
		n.sync()
		woken(s)
		release()
		synctest.Wait()
		if len(s.Update().Identities) != 0 || woken(s) {
			t.Error("it came back")
		}
	})
}

func TestATaintedAuthoritysX509SVIDsAreRenewedAtOnce(t *testing.T) {
	for name, distrust := range map[string]func(*node){
		"tainted": func(n *node) { n.Taint() },
		"revoked": func(n *node) { n.Revoke() },
	} {
		t.Run(name, func(t *testing.T) {
			onNode(t, 0, func(n *node) {
				n.Entry("a", nil, "unix:uid:1")
				n.sync()
				s := n.subscribe("unix:uid:1")
				old := svid(s.Update())
				n.Rotate()
				n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
				synctest.Wait()
				if svid(s.Update()) != old {
					t.Error("a new authority alone replaced it")
				}
				distrust(n)
				n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
				synctest.Wait()
				if svid(s.Update()) == old {
					t.Error("it was not replaced")
				}
				n.verify(svid(s.Update()), "a")
				want(t, "calls", len(n.X509Calls()), 2)
			})
		})
	}
}

func TestAServerThatStillSignsWithATaintedAuthorityIsNotHammered(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", nil, "unix:uid:1")
		n.sync()
		s := n.subscribe("unix:uid:1")
		n.Taint()
		n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
		time.Sleep(10 * time.Minute)
		if calls := len(n.X509Calls()); calls < 3 || calls > 60 {
			t.Errorf("%d calls in ten minutes", calls)
		}
		n.verify(svid(s.Update()), "a")
		n.Rotate()
		n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
		time.Sleep(2 * time.Minute)
		calls := len(n.X509Calls())
		time.Sleep(10 * time.Minute)
		want(t, "calls after it signs with another", len(n.X509Calls()), calls)
	})
}

// signer signs as it is told to.
type signer struct {
	*heldtest.Server
	x509 func(ctx context.Context, requests []held.X509Request) ([]held.X509Result, error)
}

func (s signer) SignX509(ctx context.Context, requests []held.X509Request) ([]held.X509Result, error) {
	return s.x509(ctx, requests)
}

func TestWhatASignerMustNotAnswerIsRefused(t *testing.T) {
	type sign = func(*heldtest.Server, context.Context, []held.X509Request) ([]held.X509Result, error)
	for name, answer := range map[string]sign{
		"nothing": func(*heldtest.Server, context.Context, []held.X509Request) ([]held.X509Result, error) {
			return nil, nil
		},
		"no certificates": func(*heldtest.Server, context.Context, []held.X509Request) ([]held.X509Result, error) {
			return []held.X509Result{{}}, nil
		},
		"not a certificate": func(*heldtest.Server, context.Context, []held.X509Request) ([]held.X509Result, error) {
			return []held.X509Result{{Chain: [][]byte{{1, 2, 3}}}}, nil
		},
		"another identity": func(s *heldtest.Server, ctx context.Context, r []held.X509Request) ([]held.X509Result, error) {
			r[0].EntryID = "other"
			return s.SignX509(ctx, r)
		},
		"another key": func(s *heldtest.Server, ctx context.Context, r []held.X509Request) ([]held.X509Result, error) {
			var mine []held.X509Request
			thief := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: signer{s, func(_ context.Context, r []held.X509Request) ([]held.X509Result, error) {
				mine = r
				return nil, errors.New("enough")
			}}})
			thief.Apply(s.Complete())
			short, cancel := context.WithTimeout(ctx, time.Millisecond)
			defer cancel()
			thief.Run(short)
			mine = slices.DeleteFunc(mine, func(r held.X509Request) bool { return r.EntryID != "a" })
			return s.SignX509(ctx, mine)
		},
		"an expired one": func(s *heldtest.Server, ctx context.Context, r []held.X509Request) ([]held.X509Result, error) {
			results, err := s.SignX509(ctx, r)
			time.Sleep(10 * time.Second)
			return results, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				server := heldtest.New(t)
				server.Entry("a", func(e *entry.Entry) { e.X509SVIDTTL = 10 * time.Second }, "unix:uid:1")
				server.Entry("other", noPrefetch, "unix:uid:2")
				h := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: signer{server,
					func(ctx context.Context, r []held.X509Request) ([]held.X509Result, error) {
						return answer(server, ctx, r)
					}}})
				h.Apply(server.Complete())
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				h.Run(ctx)
				status, _ := h.Status("a")
				if status.SVID != nil || status.Err == nil {
					t.Errorf("status is %+v", status)
				}
			})
		})
	}
}

func TestChangesAndReadersMayComeAtOnce(t *testing.T) {
	server := heldtest.New(t)
	h := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: server, Limit: 5})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	const enough = 40 // changes, and SVIDs that readers saw
	var entries []*entry.Entry
	for i := range 20 {
		entries = append(entries, server.Entry(fmt.Sprint("e", i), nil, fmt.Sprint("unix:uid:", i%5)))
	}
	h.Apply(server.Complete())
	var wg sync.WaitGroup
	var served, changed atomic.Int64
	turn := make(chan struct{})
	wg.Go(func() { h.Run(ctx) })
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			for range 20 { // readers get a turn
				select {
				case <-turn:
				case <-ctx.Done():
				}
			}
			switch i % 4 {
			case 0:
				server.Rotate()
				h.Apply(held.Change{Bundles: []*bundle.Bundle{server.Bundle()}})
				server.Revoke()
				h.Apply(held.Change{Bundles: []*bundle.Bundle{server.Bundle()}})
			case 1:
				h.Apply(held.Change{GoneEntries: []string{fmt.Sprint("e", i%20)}})
			default:
				e := server.Update(entries[i%20], func(e *entry.Entry) { e.RevisionNumber = int64(i) })
				h.Apply(held.Change{Entries: []*entry.Entry{e}})
			}
			changed.Add(1)
		}
	})
	for i := range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				select {
				case turn <- struct{}{}:
				case <-ctx.Done():
				}
				set := heldtest.Selectors(fmt.Sprint("unix:uid:", i))
				s := h.Subscribe(t.Context(), set)
				for _, x := range s.Update().Identities {
					if x.SVID != nil {
						served.Add(1)
					}
				}
				for _, e := range h.Match(set) {
					if _, err := h.JWT(ctx, e, []string{"x"}); err != nil && !errors.Is(err, held.ErrNotHeld) && ctx.Err() == nil {
						t.Error(err)
					}
				}
				h.Entries()
				h.Digest()
				h.Counts()
				s.Close()
				if served.Load() >= enough && changed.Load() >= enough {
					cancel()
				}
			}
		})
	}
	wg.Wait()
	if served.Load() < enough || changed.Load() < enough {
		t.Errorf("%d SVIDs were served over %d changes", served.Load(), changed.Load())
	}
}
