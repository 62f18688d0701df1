package held_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// node is an agent's Held that runs on a clock of its own, and its server.
type node struct {
	*held.Held
	*heldtest.Server
	t *testing.T
}

func onNode(t *testing.T, limit int, body func(n *node)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		server := heldtest.New(t)
		h := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: server, Limit: limit})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- h.Run(ctx) }()
		body(&node{h, server, t})
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

// sync applies all that the server has, and lets what follows happen.
func (n *node) sync(more ...*bundle.Bundle) {
	n.Apply(n.Complete(more...))
	synctest.Wait()
}

func (n *node) subscribe(selectors ...string) *held.Subscription {
	s := n.Subscribe(context.Background(), heldtest.Selectors(selectors...))
	n.t.Cleanup(s.Close)
	synctest.Wait()
	return s
}

func (n *node) verify(svid *held.X509SVID, id string) *x509.Certificate {
	n.t.Helper()
	if svid == nil {
		n.t.Fatalf("%s has no X509-SVID", id)
	}
	certs, err := x509.ParseCertificates(svid.Chain)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := certs[0].Verify(x509.VerifyOptions{Roots: n.Server.Bundle().Pool(), CurrentTime: time.Now()}); err != nil {
		n.t.Error(err)
	}
	if got := certs[0].URIs[0].Path; got != "/"+id {
		n.t.Errorf("X509-SVID is of %s, want %s", got, id)
	}
	key, err := x509.ParsePKCS8PrivateKey(svid.Key)
	if err != nil {
		n.t.Fatal(err)
	}
	if !key.(*ecdsa.PrivateKey).PublicKey.Equal(certs[0].PublicKey) {
		n.t.Error("the key is not that of the certificate")
	}
	return certs[0]
}

func woken(s *held.Subscription) bool {
	select {
	case <-s.C:
		return true
	default:
		return false
	}
}

func ids(entries []*entry.Entry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, e.ID)
	}
	return out
}

func want[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func wantIDs(t *testing.T, what string, got []*entry.Entry, want ...string) {
	t.Helper()
	if !slices.Equal(ids(got), want) {
		t.Errorf("%s: got %v, want %v", what, ids(got), want)
	}
}

func identityIDs(u *held.Update) []string {
	var out []string
	for _, i := range u.Identities {
		out = append(out, i.Entry.ID)
	}
	return out
}

func hint(h string) func(*entry.Entry) { return func(e *entry.Entry) { e.Hint = h } }

func noPrefetch(e *entry.Entry) { e.DisableX509Prefetch = true }

func TestNothingIsKnownBeforeTheFirstCompleteChange(t *testing.T) {
	onNode(t, 0, func(n *node) {
		s := n.subscribe("unix:uid:1")
		u := s.Update()
		if n.Synced() || n.Revision() != 0 || u.Bundle != nil || len(u.Entries) != 0 {
			t.Errorf("update is %+v", u)
		}
		n.sync()
		if !woken(s) || !n.Synced() || n.Revision() != 1 || s.Update().Bundle == nil {
			t.Error("the first change was not told")
		}
	})
}

func TestAWorkloadThatWaitsGetsItsX509SVID(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("web", noPrefetch, "unix:uid:1")
		n.Entry("other", nil, "unix:uid:2")
		n.sync()
		if got := n.Look(heldtest.Selectors("unix:uid:1")); got.Ready || got.Identities[0].SVID != nil {
			t.Error("an X509-SVID that nobody asked for was signed")
		}
		release := n.Hold()
		s := n.subscribe("unix:uid:1", "unix:gid:1")
		if u := s.Update(); u.Ready {
			t.Error("it is ready while it is being signed")
		}
		release()
		<-s.C
		u := s.Update()
		if !u.Ready || len(u.Identities) != 1 {
			t.Fatalf("update is %+v", u)
		}
		n.verify(u.Identities[0].SVID, "web")
	})
}

func TestX509SVID_A39_IdentitiesAreInTheOrderOfTheirCreation(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("z", nil, "unix:uid:1")
		b := n.Entry("b", nil, "unix:uid:1")
		n.Entry("a", func(e *entry.Entry) { e.CreatedAt = b.CreatedAt }, "unix:uid:1")
		n.Entry("0", nil, "unix:uid:1")
		for range 5 {
			n.sync()
			wantIDs(t, "identities", n.Match(heldtest.Selectors("unix:uid:1")), "z", "a", "b", "0")
			wantIDs(t, "all", n.Entries(), "z", "a", "b", "0")
		}
	})
}

func TestX509SVID_A21_TheLaterOfTwoEntriesWithOneHintIsLeftOut(t *testing.T) {
	onNode(t, 0, func(n *node) {
		first := n.Entry("b", hint("internal"), "unix:uid:1")
		n.Entry("a", hint("internal"), "unix:uid:1")
		n.Entry("c", hint("external"), "unix:uid:1")
		n.Entry("d", nil, "unix:uid:1")
		n.Entry("e", nil, "unix:uid:1")
		n.sync()
		look := func() *held.Update { return n.Look(heldtest.Selectors("unix:uid:1")) }
		if got := identityIDs(look()); !slices.Equal(got, []string{"b", "c", "d", "e"}) {
			t.Errorf("identities are %v", got)
		}
		wantIDs(t, "entries", look().Entries, "b", "a", "c", "d", "e")
		n.Delete(first)
		n.sync()
		if got := identityIDs(look()); !slices.Equal(got, []string{"a", "c", "d", "e"}) {
			t.Errorf("after the first was deleted identities are %v", got)
		}
	})
}

func TestAnEntryMatchesWhenAllItsSelectorsAreThere(t *testing.T) {
	onNode(t, 1, func(n *node) {
		random := rand.New(rand.NewPCG(1, 2))
		pick := func(most int) []string {
			var out []string
			for range 1 + random.IntN(most) {
				out = append(out, fmt.Sprintf("t%d:%d", random.IntN(2), random.IntN(6)))
			}
			return out
		}
		entries := make(map[string]*entry.Entry)
		for round := range 30 {
			c := held.Change{Revision: int64(round)}
			for range 20 {
				id := fmt.Sprint("e", random.IntN(100))
				switch old := entries[id]; {
				case old == nil:
					entries[id] = n.Entry(id, nil, pick(4)...)
				case random.IntN(2) == 0:
					entries[id] = n.Update(old, func(e *entry.Entry) { e.Selectors = heldtest.Selectors(pick(4)...) })
				default:
					delete(entries, id)
					c.GoneEntries = append(c.GoneEntries, id)
					continue
				}
				c.GoneEntries = slices.DeleteFunc(c.GoneEntries, func(s string) bool { return s == id })
				c.Entries = slices.DeleteFunc(c.Entries, func(e *entry.Entry) bool { return e.ID == id })
				c.Entries = append(c.Entries, entries[id])
			}
			c.Entries = slices.DeleteFunc(c.Entries, func(e *entry.Entry) bool { return entries[e.ID] == nil })
			n.Apply(c)
			for range 20 {
				set := heldtest.Selectors(pick(8)...)
				var expected []string
				for _, e := range entries {
					if e.Selectors.SubsetOf(set) {
						expected = append(expected, e.ID)
					}
				}
				got := ids(n.Match(set))
				slices.Sort(got)
				slices.Sort(expected)
				if !slices.Equal(got, expected) {
					t.Fatalf("%v matches %v, want %v", set, got, expected)
				}
			}
		}
	})
}

func TestAnEntryWithoutSelectorsMatchesNobody(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := *n.Entry("all", nil, "unix:uid:1")
		e.Selectors = nil
		n.Apply(held.Change{Complete: true, Entries: []*entry.Entry{&e}})
		for _, selectors := range [][]string{nil, {"unix:uid:1"}} {
			wantIDs(t, "entries", n.Match(heldtest.Selectors(selectors...)))
		}
	})
}

func TestAStoredSVIDIsNotServed(t *testing.T) {
	onNode(t, 0, func(n *node) {
		stored := n.Entry("stored", func(e *entry.Entry) { e.StoreSVID = true }, "unix:uid:1")
		served := n.Entry("served", nil, "unix:uid:1")
		n.sync()
		s := n.subscribe("unix:uid:1")
		if got := identityIDs(s.Update()); !slices.Equal(got, []string{"served"}) {
			t.Errorf("identities are %v", got)
		}
		wantIDs(t, "all", n.Entries(), "stored", "served")
		n.Server.Update(served, func(e *entry.Entry) { e.StoreSVID = true })
		n.Server.Update(stored, func(e *entry.Entry) { e.StoreSVID = false })
		n.sync()
		if got := identityIDs(s.Update()); !slices.Equal(got, []string{"stored"}) || !woken(s) {
			t.Errorf("after the flags were changed identities are %v", got)
		}
		n.verify(s.Update().Identities[0].SVID, "stored")
		if _, svids := n.Counts(); svids != 1 {
			t.Errorf("%d SVIDs are held", svids)
		}
	})
}

func TestAnEntryEndsByItself(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("temp", func(e *entry.Entry) { e.ExpiresAt = time.Now().Add(10 * time.Minute) }, "unix:uid:1")
		n.Entry("lasting", nil, "unix:uid:1")
		n.sync()
		s := n.subscribe("unix:uid:1")
		woken(s)
		time.Sleep(10*time.Minute - time.Nanosecond)
		if got := identityIDs(s.Update()); len(got) != 2 || woken(s) {
			t.Errorf("before its end: %v", got)
		}
		time.Sleep(time.Nanosecond)
		if got := identityIDs(s.Update()); !slices.Equal(got, []string{"lasting"}) {
			t.Errorf("at its end: %v", got)
		}
		<-s.C
	})
}

func TestTheDigestIsThatOfEverythingHeld(t *testing.T) {
	onNode(t, 0, func(n *node) {
		check := func(entries []*entry.Entry, bundles ...*bundle.Bundle) {
			t.Helper()
			var sum digest.Sum
			for _, e := range entries {
				sum.AddEntry(e.ID, e.RevisionNumber, e.CreatedAt.Unix())
			}
			for _, b := range bundles {
				sum.AddBundle(b.TrustDomain.Name(), b.SequenceNumber)
			}
			if !slices.Equal(n.Digest(), sum[:]) {
				t.Errorf("digest is %x, want %x", n.Digest(), sum)
			}
		}
		a, b := n.Entry("a", nil, "unix:uid:1"), n.Entry("b", nil, "unix:uid:2")
		foreign := n.ForeignBundle("other.org")
		n.sync(foreign)
		check([]*entry.Entry{a, b}, n.Server.Bundle(), foreign)
		a = n.Server.Update(a, func(e *entry.Entry) { e.Hint = "x" })
		n.Rotate()
		n.Apply(held.Change{Revision: 9, Entries: []*entry.Entry{a}, GoneEntries: []string{"b", "unknown"},
			Bundles: []*bundle.Bundle{n.Server.Bundle()}, GoneBundles: []spiffeid.TrustDomain{foreign.TrustDomain}})
		check([]*entry.Entry{a}, n.Server.Bundle())
		want(t, "revision", n.Revision(), 9)
		n.Apply(held.Change{Complete: true})
		check(nil)
		if !slices.Equal(n.Digest(), make([]byte, 16)) {
			t.Error("the digest of nothing is not zero")
		}
	})
}

func TestBeingToldTheSameAgainChangesNothing(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", func(e *entry.Entry) {
			e.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other.org")}
		}, "unix:uid:1")
		foreign := n.ForeignBundle("other.org")
		n.sync(foreign)
		s := n.subscribe("unix:uid:1")
		b := n.SubscribeBundles(heldtest.Selectors("unix:uid:1"))
		defer b.Close()
		woken(s)
		calls := len(n.X509Calls())
		token, err := n.JWT(n.t.Context(), n.Match(e.Selectors)[0], []string{"x"})
		if err != nil {
			t.Fatal(err)
		}
		matched := n.Match(e.Selectors)[0]
		c := n.Complete(foreign)
		for i, e := range c.Entries { // as from the wire: equal, not the same
			again, err := entry.FromRecord(e.Record())
			if err != nil {
				t.Fatal(err)
			}
			c.Entries[i] = again
		}
		n.Apply(c)
		synctest.Wait()
		if woken(s) || woken(b) || len(n.X509Calls()) != calls {
			t.Error("somebody was woken, or something signed")
		}
		again, err := n.JWT(n.t.Context(), matched, []string{"x"})
		if err != nil || again.Token != token.Token {
			t.Errorf("the cached JWT-SVID is gone: %v", err)
		}
	})
}

func TestAChangeOfAnyFieldIsNoticed(t *testing.T) {
	onNode(t, 0, func(n *node) {
		e := n.Entry("a", nil, "unix:uid:1")
		n.sync()
		held := n.Entries()[0]
		for i := range reflect.TypeFor[entry.Entry]().NumField() {
			changed := *e
			field := reflect.TypeFor[entry.Entry]().Field(i)
			if !field.IsExported() {
				continue
			}
			switch v := reflect.ValueOf(&changed).Elem().Field(i).Addr().Interface().(type) {
			case *string:
				if *v += "x"; field.Name == "ID" {
					continue // another entry
				}
			case *bool:
				*v = !*v
			case *int64:
				*v++
			case *time.Duration:
				*v += time.Second
			case *time.Time:
				*v = v.Add(1e6 * time.Hour)
			case *[]string:
				*v = append(*v, "x.example.org")
			case *spiffeid.ID:
				*v = spiffeid.RequireFromPath(heldtest.TrustDomain, "/other")
			case *[]spiffeid.TrustDomain:
				*v = append(*v, heldtest.TrustDomain)
			case *selector.Set:
				*v = heldtest.Selectors("unix:uid:2")
			default:
				t.Fatalf("field %s is of an unknown kind", field.Name)
			}
			n.sync()
			n.Apply(heldChange(&changed))
			if n.Entries()[0] == held {
				t.Errorf("a change of %s was not noticed", field.Name)
			}
			n.Apply(heldChange(e))
			held = n.Entries()[0]
		}
	})
}

func heldChange(e *entry.Entry) held.Change { return held.Change{Entries: []*entry.Entry{e}} }

func TestABundleWakesThoseItConcerns(t *testing.T) {
	onNode(t, 0, func(n *node) {
		other := spiffeid.RequireTrustDomainFromString("other.org")
		n.Entry("with", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }, "unix:uid:1")
		n.Entry("without", nil, "unix:uid:2")
		n.sync()
		with, without := n.subscribe("unix:uid:1"), n.subscribe("unix:uid:2")
		bundles := n.SubscribeBundles(heldtest.Selectors("unix:uid:1"))
		defer bundles.Close()
		check := func(what string, all bool, federated int) {
			t.Helper()
			synctest.Wait()
			if !woken(with) || !woken(bundles) || woken(without) != all {
				t.Errorf("%s: the wrong ones were woken", what)
			}
			want(t, what+": federated bundles", len(with.Update().Federated), federated)
			want(t, what+": those of another", len(without.Update().Federated), 0)
		}
		woken(with)
		woken(without)
		want(t, "unknown bundles", len(with.Update().Federated), 0)
		n.Apply(held.Change{Bundles: []*bundle.Bundle{n.ForeignBundle("other.org")}})
		check("a new federated bundle", false, 1)
		n.Apply(held.Change{GoneBundles: []spiffeid.TrustDomain{other}})
		check("a federated bundle that is gone", false, 0)
		n.Rotate()
		n.Apply(held.Change{Bundles: []*bundle.Bundle{n.Server.Bundle()}})
		check("the own bundle", true, 0)
		want(t, "own bundle", with.Update().Bundle.SequenceNumber, n.Server.Bundle().SequenceNumber)
		n.Apply(held.Change{Bundles: []*bundle.Bundle{n.ForeignBundle("unrelated.org")}})
		if woken(with) || woken(without) || woken(bundles) {
			t.Error("a bundle that concerns nobody woke somebody")
		}
		if n.Held.Bundle(other) != nil || n.Held.Bundle(heldtest.TrustDomain) == nil {
			t.Error("bundles are not those applied")
		}
	})
}

func TestBundleSubscribersAreNotWokenForSVIDs(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("a", noPrefetch, "unix:uid:1")
		n.sync()
		b := n.SubscribeBundles(heldtest.Selectors("unix:uid:1"))
		defer b.Close()
		synctest.Wait()
		want(t, "calls", len(n.X509Calls()), 0)
		s := n.subscribe("unix:uid:1")
		if !woken(s) || woken(b) {
			t.Error("the wrong one was woken")
		}
		n.Entry("b", nil, "unix:uid:1")
		n.sync()
		if !woken(s) || !woken(b) {
			t.Error("a new entry did not wake both")
		}
	})
}

func TestAMemoIsMadeOnceForAnUpdate(t *testing.T) {
	u := &held.Update{}
	made := 0
	for range 3 {
		if got := u.Memo("key", func() any { made++; return made }); got != 1 {
			t.Errorf("got %v", got)
		}
	}
	want(t, "another key", u.Memo("other", func() any { return 7 }), any(7))
}

func TestTheStatusOfAnEntrySaysWhyItHasNoX509SVID(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Entry("good", nil, "unix:uid:1")
		n.Entry("bad", nil, "unix:uid:2")
		n.Break("bad", errors.New("no such key type"))
		n.sync()
		good, _ := n.Status("good")
		if good.SVID == nil || good.Err != nil {
			t.Errorf("good is %+v", good)
		}
		bad, _ := n.Status("bad")
		if bad.SVID != nil || bad.Err == nil || !strings.Contains(bad.Err.Error(), "no such key type") || !bad.RetryAt.After(time.Now()) {
			t.Errorf("bad is %+v", bad)
		}
		if _, ok := n.Status("none"); ok {
			t.Error("an unknown entry has a status")
		}
		entries, svids := n.Counts()
		want(t, "entries", entries, 2)
		want(t, "svids", svids, 1)
	})
}
