package feed_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/registry"
)

var partner = spiffeid.RequireTrustDomainFromString("partner.test")

func TestAnAgentWithNothingGetsEverythingItIsAuthorizedForAndNothingElse(t *testing.T) {
	w := newWorld(t)
	node := w.node("a")
	w.node("b")
	w.create(&entry.Entry{SPIFFEID: id("/mine"), ParentID: node})
	w.create(&entry.Entry{SPIFFEID: id("/other"), ParentID: agentID("b")})
	a := w.connect(w.newAgent(node))
	a.expect(w)
	first := a.next(0)[0]
	if !first.Complete || first.Defaults.GetX509SvidTtl() != 3600 || first.Defaults.GetJwtSvidTtl() != 300 {
		t.Errorf("the first message is %v", first)
	}
	must(t, a.disconnect())
}

func TestChangesArriveAsDeltas(t *testing.T) {
	w := newWorld(t)
	a := w.agent("a", "test:zone:1")
	a.expect(w)
	mine := w.create(&entry.Entry{SPIFFEID: id("/mine"), ParentID: a.node})
	a.expect(w)
	w.update(mine.ID, func(e *entry.Entry) { e.Hint = "new" })
	a.expect(w)
	if e := a.entries[mine.ID]; e.Hint != "new" || e.RevisionNumber != 1 {
		t.Errorf("the update did not arrive: %v", e)
	}
	// A subtree appears and disappears with the alias above it.
	alias := w.create(&entry.Entry{SPIFFEID: id("/zone"), ParentID: id("/spire/server"), Selectors: set("test:zone:1")})
	w.create(&entry.Entry{SPIFFEID: id("/zone/svc"), ParentID: id("/zone")})
	w.create(&entry.Entry{SPIFFEID: id("/zone/svc/sub"), ParentID: id("/zone/svc")})
	a.expect(w)
	if len(a.entries) != 3 {
		t.Errorf("the agent has %d entries, want 3", len(a.entries))
	}
	w.delete(alias.ID)
	a.expect(w)
	if len(a.entries) != 1 {
		t.Errorf("the agent has %d entries, want 1", len(a.entries))
	}
	// The node's selectors change.
	w.create(&entry.Entry{SPIFFEID: id("/zone"), ParentID: id("/spire/server"), Selectors: set("test:zone:2")})
	w.node("a", "test:zone:2")
	a.expect(w)
	if len(a.entries) != 3 {
		t.Errorf("the agent has %d entries, want 3", len(a.entries))
	}
	for _, m := range a.next(0)[1:] {
		if m.Complete {
			t.Errorf("the whole was sent again: %v", m)
		}
	}
	must(t, a.disconnect())
}

func TestAnEntryThatIsRecreatedWithinASecondArrives(t *testing.T) {
	w := newWorld(t)
	a := w.agent("a")
	for i := range 20 {
		w.create(&entry.Entry{ID: "again", SPIFFEID: id(fmt.Sprintf("/run/%d", i)), ParentID: a.node})
		a.expect(w)
		if got := a.entries["again"].SpiffeId; got != id(fmt.Sprintf("/run/%d", i)).String() {
			t.Fatalf("the agent holds %s in round %d", got, i)
		}
		w.delete("again")
	}
	must(t, a.disconnect())
}

func TestBundlesAreSentWhileAnEntryFederatesWithThem(t *testing.T) {
	w := newWorld(t)
	a := w.agent("a")
	w.changeBundle(partner)
	a.expect(w)
	if len(a.bundles) != 1 {
		t.Errorf("the agent has bundles that none of its entries names: %v", a.bundles)
	}
	one := w.create(&entry.Entry{SPIFFEID: id("/one"), ParentID: a.node, FederatesWith: []spiffeid.TrustDomain{partner}})
	two := w.create(&entry.Entry{SPIFFEID: id("/two"), ParentID: a.node, FederatesWith: []spiffeid.TrustDomain{partner}})
	a.expect(w)
	if len(a.bundles) != 2 {
		t.Errorf("the agent lacks the partner's bundle: %v", a.bundles)
	}
	w.changeBundle(partner)
	w.changeBundle(td)
	a.expect(w)
	w.delete(one.ID)
	a.expect(w)
	must(t, w.registry.DeleteBundle(t.Context(), partner, registry.Dissociate))
	a.expect(w)
	w.changeBundle(partner)
	w.update(two.ID, func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{partner} })
	a.expect(w)
	if len(a.bundles) != 2 {
		t.Errorf("the agent lacks the partner's bundle: %v", a.bundles)
	}
	w.update(two.ID, func(e *entry.Entry) { e.FederatesWith = nil })
	a.expect(w)
	if len(a.bundles) != 1 {
		t.Errorf("the agent keeps the partner's bundle: %v", a.bundles)
	}
	must(t, a.disconnect())
}

func TestWhatAnAgentHoldsIsAlwaysWhatTheRegistrySays(t *testing.T) {
	w := newWorld(t)
	agents := []*agent{w.agent("a", "test:zone:1"), w.agent("b", "test:zone:1", "test:rack:1"), w.agent("c")}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	parents := []spiffeid.ID{agents[0].node, agents[1].node, agents[2].node, id("/zone"), id("/svc/1"), id("/svc/2"), id("/svc/3")}
	foreign := []spiffeid.TrustDomain{partner, spiffeid.RequireTrustDomainFromString("other.test")}
	var live []string
	random := func(e *entry.Entry) {
		e.ParentID = parents[rnd.IntN(len(parents))]
		e.SPIFFEID = id(fmt.Sprintf("/svc/%d", rnd.IntN(5)))
		e.Selectors = set(fmt.Sprintf("unix:uid:%d", rnd.IntN(1000)))
		if e.FederatesWith = nil; rnd.IntN(3) == 0 {
			e.FederatesWith = foreign[:1+rnd.IntN(2)]
		}
	}
	alias := func() {
		e := &entry.Entry{SPIFFEID: id("/zone"), ParentID: id("/spire/server"), Selectors: set([]string{"test:zone:1", "test:rack:1", "test:zone:2"}[rnd.IntN(3)])}
		if res := w.registry.CreateEntries(t.Context(), []*entry.Entry{e})[0]; res.Err == nil {
			live = append(live, res.Entry.ID)
		}
	}
	pick := func() (id string, i int) { i = rnd.IntN(len(live)); return live[i], i }
	for round := range 150 {
		for range 1 + rnd.IntN(8) {
			switch op := rnd.IntN(20); {
			case op < 7 || len(live) == 0:
				e := &entry.Entry{}
				random(e)
				if res := w.registry.CreateEntries(t.Context(), []*entry.Entry{e})[0]; res.Err == nil {
					live = append(live, res.Entry.ID)
				}
			case op < 11:
				which, _ := pick()
				w.registry.UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: which, Change: func(e *entry.Entry) error {
					if !e.IsAlias() {
						random(e)
					}
					return nil
				}}})
			case op < 14:
				which, i := pick()
				live = slices.Delete(live, i, i+1)
				w.delete(which)
			case op < 15:
				alias()
			case op < 16:
				w.changeBundle(foreign[rnd.IntN(2)])
			case op < 17:
				must(t, ignore(w.registry.DeleteBundle(t.Context(), foreign[rnd.IntN(2)], registry.Dissociate), registry.NotFound))
			case op < 18:
				w.changeBundle(td)
			case op < 19:
				w.node("c", []string{"test:zone:2", "test:rack:1"}[rnd.IntN(2)])
			default:
				a := agents[rnd.IntN(len(agents))]
				must(t, a.disconnect())
				w.connect(a)
			}
		}
		for _, a := range agents {
			a.expect(w)
		}
		if n := w.inStep(); n != len(agents) {
			t.Fatalf("round %d: %d agents are in step, want %d", round, n, len(agents))
		}
	}
	for _, a := range agents {
		must(t, a.disconnect())
	}
}

func ignore(err error, kind registry.ErrorKind) error {
	var e *registry.Error
	if errors.As(err, &e) && e.Kind == kind {
		return nil
	}
	return err
}

func TestAnAgentThatReturnsInStepIsSentNothingAgain(t *testing.T) {
	w := newWorld(t)
	a := w.agent("a")
	w.create(&entry.Entry{SPIFFEID: id("/mine"), ParentID: a.node})
	a.expect(w)
	must(t, a.disconnect())
	w.create(&entry.Entry{SPIFFEID: id("/other"), ParentID: agentID("b")}) // of no concern to it
	w.connect(a)
	a.expect(w)
	if m := a.next(0); len(m) != 1 || m[0].Complete || len(m[0].Entries)+len(m[0].Bundles) > 0 || m[0].Revision != int64(w.registry.View().Revision()) {
		t.Errorf("it was sent %v", m)
	}
	w.create(&entry.Entry{SPIFFEID: id("/later"), ParentID: a.node})
	a.expect(w)
	must(t, a.disconnect())
}

func TestAnAgentThatReturnsWithAnythingElseIsSentTheWhole(t *testing.T) {
	w := newWorld(t)
	a := w.agent("a")
	w.create(&entry.Entry{SPIFFEID: id("/mine"), ParentID: a.node})
	a.expect(w)
	must(t, a.disconnect())
	good := a.hello()
	for name, hello := range map[string]*hallmarkv1.FollowRequest{
		"another digest":                   {Revision: good.Revision, Digest: make([]byte, 16)},
		"no digest":                        {Revision: good.Revision},
		"no revision":                      {Digest: good.Digest},
		"a revision of the store's future": {Revision: good.Revision + 1000, Digest: good.Digest},
	} {
		a := w.newAgent(a.node)
		a.open(w)
		a.toServ <- hello
		a.next(0)
		a.expect(w)
		if !a.next(0)[0].Complete {
			t.Errorf("with %s it was not sent the whole", name)
		}
		must(t, a.disconnect())
	}
}

func TestALargeSetIsCutIntoMessagesThatBelongTogether(t *testing.T) {
	w := newWorld(t)
	node := w.node("a")
	var many []*entry.Entry
	for i := range 1000 {
		many = append(many, &entry.Entry{SPIFFEID: id(fmt.Sprintf("/svc/%d", i)), ParentID: node, Selectors: set("unix:uid:1"), Hint: strings.Repeat("x", 1000)})
	}
	for _, res := range w.registry.CreateEntries(t.Context(), many) {
		must(t, res.Err)
	}
	a := w.connect(w.newAgent(node))
	a.expect(w)
	messages := a.next(0)
	if len(messages) < 4 {
		t.Errorf("a megabyte came in %d messages", len(messages))
	}
	for i, m := range messages {
		if size := proto.Size(m); size > 256<<10 {
			t.Errorf("message %d has %d bytes", i, size)
		}
		if m.Complete != (i == 0) || m.More != (i < len(messages)-1) {
			t.Errorf("message %d of %d: complete %v, more %v", i, len(messages), m.Complete, m.More)
		}
	}
	must(t, a.disconnect())
}

func TestABannedOrDeletedNodeLosesItsStreamAtOnce(t *testing.T) {
	for name, shut := range map[string]func(*world, spiffeid.ID) error{
		"banned": func(w *world, node spiffeid.ID) error {
			_, err := w.registry.UpdateNode(t.Context(), node, func(n *registry.Node) error { n.Banned = true; return nil })
			return err
		},
		"deleted": func(w *world, node spiffeid.ID) error { return w.registry.DeleteNode(t.Context(), node) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			a := w.agent("a")
			a.expect(w)
			must(t, shut(w, a.node))
			if err := a.wait(); !errors.Is(err, feed.ErrNodeGone) {
				t.Errorf("the stream ended with %v", err)
			}
			again := w.newAgent(a.node)
			again.open(w)
			again.toServ <- again.hello()
			if err := again.wait(); !errors.Is(err, feed.ErrNodeGone) || again.count() > 0 {
				t.Errorf("a new stream ended with %v after %d messages", err, again.count())
			}
		})
	}
}

func TestANewStreamTakesThePlaceOfTheOld(t *testing.T) {
	w := newWorld(t)
	old := w.agent("a")
	old.expect(w)
	fresh := w.connect(w.newAgent(old.node))
	if err := old.wait(); !errors.Is(err, feed.ErrReplaced) {
		t.Errorf("the old stream ended with %v", err)
	}
	w.create(&entry.Entry{SPIFFEID: id("/mine"), ParentID: old.node})
	fresh.expect(w)
	if c := w.feed.Connections(); len(c) != 1 || c[0].Node != old.node || c[0].AgentVersion != "test" || c[0].Acknowledged != w.registry.View().Revision() {
		t.Errorf("the connections are %+v", c)
	}
	must(t, fresh.disconnect())
	if c := w.feed.Connections(); len(c) != 0 {
		t.Errorf("the connections are %+v", c)
	}
}

func TestNonsenseEndsTheStream(t *testing.T) {
	for name, requests := range map[string][]*hallmarkv1.FollowRequest{
		"negative revision":       {{Revision: -1}},
		"short digest":            {{Digest: []byte("short")}},
		"long version":            {{AgentVersion: strings.Repeat("x", 256)}},
		"acknowledges the future": {{}, {Revision: 1 << 40}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			a := w.newAgent(w.node("a"))
			a.open(w)
			for _, r := range requests {
				a.toServ <- r
			}
			if err := a.wait(); !errors.Is(err, feed.ErrProtocol) {
				t.Errorf("the stream ended with %v", err)
			}
		})
	}
}

func TestAnAgentIsInStepOnlyOnceItHasAcknowledgedWhatConcernsIt(t *testing.T) {
	w := newWorld(t)
	slow := w.newAgent(w.node("slow"))
	slow.manual = true
	w.connect(slow)
	quick := w.agent("quick")
	slow.toServ <- &hallmarkv1.FollowRequest{Revision: slow.next(0)[0].Revision}
	w.inStep()

	// What does not concern it does not wait for it.
	w.create(&entry.Entry{SPIFFEID: id("/other"), ParentID: quick.node})
	if n := w.inStep(); n != 2 {
		t.Errorf("%d agents are in step, want 2", n)
	}
	if slow.count() != 1 {
		t.Errorf("the slow agent was sent something: %v", slow.next(1))
	}
	// What concerns it does.
	w.changeBundle(td)
	rev := w.registry.View().Revision()
	slow.next(1)
	for begin := time.Now(); ; { // until the quick one has acknowledged
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		_, err := w.feed.WaitAcked(ctx, rev)
		cancel()
		if err == nil || time.Since(begin) > 30*time.Second {
			t.Fatalf("waiting for a silent agent: %v", err)
		}
		if strings.Contains(err.Error(), "1 of 2 connected agents") && strings.Contains(err.Error(), slow.node.String()) {
			break
		}
	}
	if c := w.feed.Connections(); c[1].Node != slow.node || c[1].Acknowledged >= rev || !c[1].Behind || c[0].Behind {
		t.Errorf("the connections are %+v, of revision %d", c, rev)
	}
	slow.toServ <- &hallmarkv1.FollowRequest{Revision: int64(rev)}
	if n := w.inStep(); n != 2 {
		t.Errorf("%d agents are in step, want 2", n)
	}
	// One that goes away is not waited for.
	w.changeBundle(td)
	slow.next(2)
	must(t, slow.disconnect())
	if n := w.inStep(); n != 1 {
		t.Errorf("%d agents are in step, want 1", n)
	}
	must(t, quick.disconnect())
}

func TestTheVersionOfAnAgentIsKeptWithItsNode(t *testing.T) {
	w := newWorld(t)
	a := w.agent("a")
	a.expect(w)
	must(t, a.disconnect())
	w.feed.Wait()
	if v := w.registry.View().Node(a.node).AgentVersion; v != "test" {
		t.Errorf("the node has version %q", v)
	}
}

func TestAStreamThatIsCancelledEndsWithTheCause(t *testing.T) {
	w := newWorld(t)
	cause := errors.New("stopping")
	ctx, cancel := context.WithCancelCause(w.ctx)
	w.ctx = ctx
	a := w.agent("a")
	cancel(cause)
	if err := a.wait(); err != cause {
		t.Errorf("the stream ended with %v", err)
	}
}
