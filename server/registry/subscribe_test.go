package registry_test

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
)

// told reports whether a subscription has something to take.
func told(sub *registry.Subscription) bool {
	select {
	case <-sub.C:
		return true
	default:
		return false
	}
}

func subscribe(t *testing.T, r *registry.Registry, name string) *registry.Subscription {
	sub := r.Subscribe(agentID(name))
	t.Cleanup(sub.Close)
	return sub
}

func TestOnlyThoseAChangeConcernsAreToldOfIt(t *testing.T) {
	r := start(t, newStore(t), nil)
	put(t, r, newNode("a", "rack:1"))
	put(t, r, newNode("b", "rack:2"))
	create(t, r, newEntry("/rack-1", serverID, "rack:1"))
	parent := create(t, r, newEntry("/parent", id("/rack-1")))
	a, b := subscribe(t, r, "a"), subscribe(t, r, "b")

	var want []string
	want = append(want, create(t, r, newEntry("/x", agentID("a"))).ID)
	want = append(want, create(t, r, newEntry("/y", id("/rack-1"))).ID)
	want = append(want, create(t, r, newEntry("/z", id("/parent"))).ID)
	create(t, r, newEntry("/elsewhere", agentID("c")))
	if !told(a) || told(b) {
		t.Errorf("told are a: %v, b: %v; want a only", told(a), told(b))
	}
	slices.Sort(want)
	// Several changes add up to one delta, each entry once.
	if res := r.UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: want[0], Change: func(e *entry.Entry) error { e.Hint = "h"; return nil }}})[0]; res.Err != nil {
		t.Fatal(res.Err)
	}
	v, d := a.Take()
	slices.Sort(d.Entries)
	if d.Resync || d.NodeGone || len(d.Bundles) > 0 || !slices.Equal(d.Entries, want) || v.Entry(want[0]).Hint != "h" {
		t.Errorf("got %+v, want entries %v", d, want)
	}
	if _, d := a.Take(); d.Resync || len(d.Entries) > 0 {
		t.Errorf("taken again: %+v", d)
	}

	// An entry that others stand under changes more than itself.
	told(a)
	if res := r.UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: parent.ID, Change: func(e *entry.Entry) error { e.ParentID = agentID("b"); return nil }}})[0]; res.Err != nil {
		t.Fatal(res.Err)
	}
	for name, sub := range map[string]*registry.Subscription{"a": a, "b": b} {
		if _, d := sub.Take(); !d.Resync {
			t.Errorf("%s was told %+v, want a resync", name, d)
		}
	}
}

func TestEveryoneIsToldOfABundle(t *testing.T) {
	r := start(t, newStore(t), nil)
	a, b := subscribe(t, r, "a"), subscribe(t, r, "b")
	setBundle(t, r, td, newAuthority(t, "own"))
	setBundle(t, r, otherTD, newAuthority(t, "other"))
	if err := r.DeleteBundle(t.Context(), otherTD, registry.Restrict); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []*registry.Subscription{a, b} {
		_, d := sub.Take()
		slices.SortFunc(d.Bundles, spiffeid.TrustDomain.Compare)
		if !told(sub) || !slices.Equal(d.Bundles, []spiffeid.TrustDomain{td, otherTD}) || d.Resync {
			t.Errorf("told %+v", d)
		}
	}
}

func TestAStreamOfANodeThatIsBannedOrDeletedIsTold(t *testing.T) {
	r := start(t, newStore(t), nil)
	for _, name := range []string{"a", "b"} {
		put(t, r, newNode(name))
	}
	a, b := subscribe(t, r, "a"), subscribe(t, r, "b")
	if _, err := r.UpdateNode(t.Context(), agentID("a"), func(n *registry.Node) error { n.Banned = true; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteNode(t.Context(), agentID("b")); err != nil {
		t.Fatal(err)
	}
	for name, sub := range map[string]*registry.Subscription{"a": a, "b": b} {
		if !told(sub) {
			t.Errorf("%s was not told", name)
		}
		if _, d := sub.Take(); !d.NodeGone {
			t.Errorf("%s was told %+v", name, d)
		}
	}
	// Let in again, it may have everything again.
	if _, err := r.UpdateNode(t.Context(), agentID("a"), func(n *registry.Node) error { n.Banned = false; return nil }); err != nil {
		t.Fatal(err)
	}
	put(t, r, newNode("b"))
	for name, sub := range map[string]*registry.Subscription{"a": a, "b": b} {
		if _, d := sub.Take(); !d.Resync || d.NodeGone {
			t.Errorf("let in again, %s was told %+v", name, d)
		}
	}
	// A renewal concerns no one.
	put(t, r, newNode("c"))
	c := subscribe(t, r, "c")
	if _, err := r.UpdateNode(t.Context(), agentID("c"), func(n *registry.Node) error { n.SerialNumber = "9"; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, d := c.Take(); d.Resync || d.NodeGone {
		t.Errorf("after a renewal, told %+v", d)
	}
}

func TestAStreamThatIsFarBehindIsToldToLookAtEverything(t *testing.T) {
	r := start(t, newStore(t), nil)
	put(t, r, newNode("a"))
	sub := subscribe(t, r, "a")
	var entries []*entry.Entry
	for i := range 5000 {
		entries = append(entries, newEntry(fmt.Sprintf("/w%d", i), agentID("a")))
	}
	for _, res := range r.CreateEntries(t.Context(), entries) {
		if res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	if v, d := sub.Take(); !d.Resync || len(d.Entries) != 0 || v.EntryCount() != 5000 {
		t.Errorf("told of %d entries, resync %v", len(d.Entries), d.Resync)
	}
}

func TestAClosedSubscriptionIsToldNothing(t *testing.T) {
	r := start(t, newStore(t), nil)
	put(t, r, newNode("a"))
	one, two := subscribe(t, r, "a"), subscribe(t, r, "a")
	one.Close()
	one.Close()
	create(t, r, newEntry("/w", agentID("a")))
	if told(one) || !told(two) {
		t.Error("the wrong one was told")
	}
}

// A view that a subscriber takes shows what it was told up to then and nothing
// else: a stream can say by it which revision its agent is in step with.
func TestATakenViewIsExactlyWhatWasTold(t *testing.T) {
	r := start(t, newStore(t), nil)
	for i := range 300 { // whom a change concerns takes a while to find out
		put(t, r, newNode(fmt.Sprintf("n%d", i), "k:1"))
	}
	put(t, r, newNode("a", "k:1"))
	create(t, r, newEntry("/alias", serverID, "k:1"))
	f := &follower{node: agentID("a"), sub: subscribe(t, r, "a")}
	f.load(r.View(), epoch)

	var group sync.WaitGroup
	stop := make(chan struct{})
	for w := range 3 {
		group.Go(func() {
			parents := []spiffeid.ID{agentID("a"), id("/alias"), agentID("b")}
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				var batch []*entry.Entry
				for j := range 10 {
					batch = append(batch, newEntry(fmt.Sprintf("/w%d-%d-%d", w, i, j), parents[(i+j)%3]))
				}
				var updates []registry.EntryUpdate
				var ids []string
				for j, res := range r.CreateEntries(t.Context(), batch) {
					if res.Err != nil {
						t.Error(res.Err)
						return
					}
					ids = append(ids, res.Entry.ID)
					updates = append(updates, registry.EntryUpdate{ID: res.Entry.ID, Change: func(e *entry.Entry) error {
						e.ParentID = parents[(i+j+1)%3]
						return nil
					}})
				}
				for _, res := range r.UpdateEntries(t.Context(), updates) {
					if res.Err != nil {
						t.Error(res.Err)
					}
				}
				for _, err := range r.DeleteEntries(t.Context(), ids[i%2:]) {
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for range 200 {
		<-f.sub.C
		v, d := f.follow(epoch)
		want := make(map[string]int64)
		for _, e := range v.Authorized(agentID("a"), epoch) {
			want[e.ID] = e.RevisionNumber
		}
		if !maps.Equal(f.held, want) {
			t.Errorf("told %+v, holds %d entries, want the %d of revision %d", d, len(f.held), len(want), v.Revision())
			break
		}
	}
	close(stop)
	group.Wait()
}
