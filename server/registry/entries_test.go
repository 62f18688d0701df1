package registry_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
)

func TestAnEntryIsCompletedWhenItIsCreated(t *testing.T) {
	c := &clock{}
	c.Advance(1500 * time.Millisecond)
	r := start(t, newStore(t), c.Now)
	given := newEntry("/a", agentID("a"))
	given.RevisionNumber, given.CreatedAt, given.Hint = 7, epoch.Add(-time.Hour), "hint"
	e := create(t, r, given)
	if e.ID == "" || e.RevisionNumber != 0 || !e.CreatedAt.Equal(epoch.Add(time.Second)) || e.Hint != "hint" {
		t.Errorf("got %+v", e)
	}
	if given.ID != "" || given.RevisionNumber != 7 {
		t.Error("the entry given was changed")
	}
	named := newEntry("/b", agentID("a"))
	named.ID = "my-own.ID_1"
	if e := create(t, r, named); e.ID != named.ID || r.View().Entry(named.ID) == nil {
		t.Errorf("got ID %q, want the one given", e.ID)
	}
}

func TestEveryEntryOfABatchHasItsOwnResult(t *testing.T) {
	r := start(t, newStore(t), nil)
	existing := create(t, r, newEntry("/exists", agentID("a")))
	sameID := newEntry("/other", agentID("a"))
	sameID.ID = existing.ID
	results := r.CreateEntries(t.Context(), []*entry.Entry{
		newEntry("/new", agentID("a")),
		newEntry("/exists", agentID("a")),
		{},
		newEntry("/new", agentID("a")), // as the first
		sameID,
		newEntry("/new", agentID("b")),
	})
	var got []registry.ErrorKind
	for _, res := range results {
		got = append(got, kindOf(res.Err))
		if (res.Entry != nil) != (res.Err == nil || kindOf(res.Err) == registry.AlreadyExists) {
			t.Errorf("entry %v with error %v", res.Entry, res.Err)
		}
	}
	if want := []registry.ErrorKind{0, registry.AlreadyExists, registry.Invalid, registry.AlreadyExists, registry.AlreadyExists, 0}; !slices.Equal(got, want) {
		t.Errorf("got kinds %v, want %v", got, want)
	}
	if results[1].Entry.ID != existing.ID || results[3].Entry.ID != results[0].Entry.ID || results[4].Entry.ID != existing.ID {
		t.Error("AlreadyExists does not carry the entry that exists")
	}
	if n := r.View().EntryCount(); n != 3 {
		t.Errorf("there are %d entries, want 3", n)
	}
}

func TestOfAHundredWhoCreateTheSameEntryOneSucceeds(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil)}
	var group sync.WaitGroup
	results := make([]registry.EntryResult, 100)
	for i := range results {
		group.Go(func() {
			e := newEntry("/same", agentID("a"), "unix:uid:1", "unix:gid:2")
			e.Hint = fmt.Sprint(i) // does not count
			results[i] = servers[i%2].CreateEntries(t.Context(), []*entry.Entry{e})[0]
		})
	}
	group.Wait()
	var winner *entry.Entry
	for _, res := range results {
		if res.Err == nil {
			if winner != nil {
				t.Fatal("two were created")
			}
			winner = res.Entry
		}
	}
	if winner == nil {
		t.Fatal("none was created")
	}
	for _, res := range results {
		if res.Err != nil && (kindOf(res.Err) != registry.AlreadyExists || res.Entry == nil || res.Entry.ID != winner.ID || res.Entry.Hint != winner.Hint) {
			t.Errorf("got %v with error %v, want the entry that exists", res.Entry, res.Err)
		}
	}
}

func TestConcurrentUpdatesOfAnEntryLoseNothing(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil)}
	e := create(t, servers[0], newEntry("/a", agentID("a")))
	converge(t, servers...)
	const updates = 100
	var group sync.WaitGroup
	revisions := make([]int64, updates)
	for i := range updates {
		group.Go(func() {
			res := servers[i%2].UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: e.ID, Change: func(e *entry.Entry) error {
				e.DNSNames = append(slices.Clone(e.DNSNames), fmt.Sprintf("n%d", i))
				return nil
			}}})[0]
			if res.Err != nil {
				t.Error(res.Err)
				return
			}
			revisions[i] = res.Entry.RevisionNumber
		})
	}
	group.Wait()
	slices.Sort(revisions)
	for i, rev := range revisions {
		if rev != int64(i+1) {
			t.Fatalf("revision numbers are not dense: %v", revisions)
		}
	}
	converge(t, servers...)
	for _, r := range servers {
		if got := r.View().Entry(e.ID); got.RevisionNumber != updates || len(got.DNSNames) != updates {
			t.Errorf("got revision %d with %d names, want %d of both", got.RevisionNumber, len(got.DNSNames), updates)
		}
	}
}

func TestAnUpdateKeepsWhatItMayNotChange(t *testing.T) {
	c := &clock{}
	r := start(t, newStore(t), c.Now)
	e := create(t, r, newEntry("/a", agentID("a")))
	c.Advance(time.Hour)
	res := r.UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: e.ID, Change: func(e *entry.Entry) error {
		e.ID, e.CreatedAt, e.RevisionNumber = "other", c.Now(), 99
		e.SPIFFEID, e.ParentID, e.Selectors = id("/b"), agentID("b"), newEntry("/x", serverID, "unix:b:2", "unix:a:1").Selectors
		return nil
	}}})[0]
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	v := r.View()
	if got := v.Entry(e.ID); got == nil || got.RevisionNumber != 1 || !got.CreatedAt.Equal(e.CreatedAt) || got.SPIFFEID != id("/b") {
		t.Errorf("got %+v", got)
	}
	if v.Entry("other") != nil || v.EntryCount() != 1 {
		t.Error("an update made another entry")
	}
	for name, n := range map[string]int{
		"old parent":    len(slices.Collect(v.EntriesByParent(agentID("a")))),
		"old SPIFFE ID": len(slices.Collect(v.EntriesBySPIFFEID(id("/a")))),
	} {
		if n != 0 {
			t.Errorf("the entry is still found by its %s", name)
		}
	}
	// What it was is free again, what it is is taken.
	create(t, r, newEntry("/a", agentID("a")))
	if err := r.CreateEntries(t.Context(), []*entry.Entry{newEntry("/b", agentID("b"), "unix:a:1", "unix:b:2")})[0].Err; kindOf(err) != registry.AlreadyExists {
		t.Errorf("an entry similar to an updated one: %v", err)
	}
}

func TestAnUpdateThatFailsChangesNothing(t *testing.T) {
	r := start(t, newStore(t), nil)
	e := create(t, r, newEntry("/a", agentID("a")))
	other := create(t, r, newEntry("/b", agentID("a")))
	no := errors.New("no")
	results := r.UpdateEntries(t.Context(), []registry.EntryUpdate{
		{ID: e.ID, Change: func(e *entry.Entry) error { e.Hint, e.Selectors[0].Value = "x", "uid:0"; return no }},
		{ID: e.ID, Change: func(e *entry.Entry) error { e.Selectors = nil; return nil }},
		{ID: "none", Change: func(e *entry.Entry) error { return nil }},
		{ID: e.ID, Change: func(e *entry.Entry) error { e.SPIFFEID = id("/b"); return nil }},
	})
	if !errors.Is(results[0].Err, no) || kindOf(results[1].Err) != registry.Invalid || kindOf(results[2].Err) != registry.NotFound || kindOf(results[3].Err) != registry.AlreadyExists {
		t.Errorf("got %v", results)
	}
	if results[3].Entry == nil || results[3].Entry.ID != other.ID {
		t.Errorf("got %v, want the similar entry %s", results[3].Entry, other.ID)
	}
	if got := r.View().Entry(e.ID); got.RevisionNumber != 0 || got.Hint != "" || got.Selectors[0].Value != "uid:1000" {
		t.Errorf("got %+v", got)
	}
}

func TestOneEntryTwiceInABatchIsUpdatedTwice(t *testing.T) {
	r := start(t, newStore(t), nil)
	e := create(t, r, newEntry("/a", agentID("a")))
	add := func(name string) registry.EntryUpdate {
		return registry.EntryUpdate{ID: e.ID, Change: func(e *entry.Entry) error {
			e.DNSNames = append(slices.Clone(e.DNSNames), name)
			return nil
		}}
	}
	for _, res := range r.UpdateEntries(t.Context(), []registry.EntryUpdate{add("a"), add("b"), add("c")}) {
		if res.Err != nil {
			t.Error(res.Err)
		}
	}
	if got := r.View().Entry(e.ID); got.RevisionNumber != 3 || !slices.Equal(slices.Sorted(slices.Values(got.DNSNames)), []string{"a", "b", "c"}) {
		t.Errorf("got %+v", got)
	}
}

func TestADeletedEntryMakesRoomForASimilarOne(t *testing.T) {
	r := start(t, newStore(t), nil)
	e := create(t, r, newEntry("/a", agentID("a")))
	errs := r.DeleteEntries(t.Context(), []string{e.ID, "none", e.ID})
	if errs[0] != nil || kindOf(errs[1]) != registry.NotFound || kindOf(errs[2]) != registry.NotFound {
		t.Errorf("got errors %v", errs)
	}
	create(t, r, newEntry("/a", agentID("a")))
}

func TestOfManyWhoDeleteAnEntryOneSucceeds(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil)}
	e := create(t, servers[0], newEntry("/a", agentID("a")))
	converge(t, servers...)
	var group sync.WaitGroup
	var succeeded atomic.Int64
	for i := range 20 {
		group.Go(func() {
			switch err := servers[i%2].DeleteEntries(t.Context(), []string{e.ID})[0]; {
			case err == nil:
				succeeded.Add(1)
			case kindOf(err) != registry.NotFound:
				t.Error(err)
			}
		})
	}
	group.Wait()
	if n := succeeded.Load(); n != 1 {
		t.Errorf("%d succeeded", n)
	}
}

func TestListsAreInTheOrderOfIDsAndBeginWhereAsked(t *testing.T) {
	r := start(t, newStore(t), nil)
	for _, name := range []string{"c", "a", "e", "b", "d"} {
		e := newEntry("/same", agentID("a"), "unix:name:"+name)
		e.ID = name
		create(t, r, e)
		apart := newEntry("/apart", agentID("b"), "unix:name:"+name)
		apart.ID = name + "x"
		create(t, r, apart)
		put(t, r, newNode(name))
		setBundle(t, r, spiffeid.RequireTrustDomainFromString(name+".org"))
	}
	v := r.View()
	ids := func(entries []*entry.Entry) (s string) {
		for _, e := range entries {
			s += e.ID + " "
		}
		return s
	}
	for _, c := range []struct{ what, got, want string }{
		{"all", ids(slices.Collect(v.Entries(""))), "a ax b bx c cx d dx e ex "},
		{"all after b", ids(slices.Collect(v.Entries("b"))), "bx c cx d dx e ex "},
		{"all after what is not there", ids(slices.Collect(v.Entries("bb"))), "bx c cx d dx e ex "},
		{"by parent", ids(slices.Collect(v.EntriesByParent(agentID("a")))), "a b c d e "},
		{"by parent after b", ids(slices.Collect(v.EntriesByParentAfter(agentID("a"), "b"))), "c d e "},
		{"by parent after bx", ids(slices.Collect(v.EntriesByParentAfter(agentID("a"), "bx"))), "c d e "},
		{"by parent after the last", ids(slices.Collect(v.EntriesByParentAfter(agentID("a"), "e"))), ""},
		{"by unknown parent", ids(slices.Collect(v.EntriesByParent(agentID("none")))), ""},
		{"by SPIFFE ID", ids(slices.Collect(v.EntriesBySPIFFEID(id("/apart")))), "ax bx cx dx ex "},
		{"by SPIFFE ID after c", ids(slices.Collect(v.EntriesBySPIFFEIDAfter(id("/apart"), "c"))), "cx dx ex "},
		{"by SPIFFE ID after cx", ids(slices.Collect(v.EntriesBySPIFFEIDAfter(id("/apart"), "cx"))), "dx ex "},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %q, want %q", c.what, c.got, c.want)
		}
	}
	nodes := func(after string) (s string) {
		for n := range v.Nodes(after) {
			s += strings.TrimPrefix(n.ID.Path(), "/spire/agent/test/") + " "
		}
		return s
	}
	for after, want := range map[string]string{"": "a b c d e ", agentID("b").String(): "c d e ", agentID("bb").String(): "c d e ", agentID("e").String(): "", agentID("b").String() + "%": "c d e "} {
		if got := nodes(after); got != want {
			t.Errorf("nodes after %q: got %q, want %q", after, got, want)
		}
	}
	for after, want := range map[string]int{"": 5, "b.org": 3, "b": 4, "e.org": 0} {
		n := 0
		for range v.Bundles(after) {
			n++
		}
		if n != want {
			t.Errorf("bundles after %q: got %d, want %d", after, n, want)
		}
	}
	for range v.Entries("") {
		break // an iteration may end early
	}
}

func TestWhatHasExpiredIsOutAtOnceAndPrunedSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newMemory(), time.Now)
		put(t, r, newNode("a"))
		synctest.Wait() // the pruner has nothing to do and sleeps
		kept := create(t, r, newEntry("/kept", agentID("a")))
		e := newEntry("/brief", agentID("a"))
		e.ExpiresAt = time.Now().Truncate(time.Second).Add(5 * time.Second)
		brief := create(t, r, e)
		sub := r.Subscribe(agentID("a"))
		defer sub.Close()

		at := e.ExpiresAt.Add(-time.Nanosecond)
		if got := r.View().Authorized(agentID("a"), at); len(got) != 2 {
			t.Errorf("authorized for %d entries before the end, want 2", len(got))
		}
		if got := r.View().Authorized(agentID("a"), e.ExpiresAt); len(got) != 1 || got[0].ID != kept.ID {
			t.Errorf("authorized for %v at the end", got)
		}
		if r.View().IsAuthorized(agentID("a"), brief, e.ExpiresAt) {
			t.Error("authorized for an entry that has expired")
		}

		<-sub.C // it is deleted
		if late := time.Since(e.ExpiresAt); late < 0 || late > time.Second {
			t.Errorf("it was deleted %v after its end", late)
		}
		if v, d := sub.Take(); !slices.Equal(d.Entries, []string{brief.ID}) || v.Entry(brief.ID) != nil || v.EntryCount() != 1 {
			t.Errorf("got %+v", d)
		}
		create(t, r, e) // a similar one may be made again
	})
}

func TestManyEntriesThatExpireTogetherAreAllPruned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := start(t, newMemory(), time.Now)
		var entries []*entry.Entry
		for i := range 2500 {
			e := newEntry(fmt.Sprintf("/e%d", i), agentID("a"))
			e.ExpiresAt = time.Now().Truncate(time.Second).Add(time.Minute)
			entries = append(entries, e)
		}
		for _, res := range r.CreateEntries(t.Context(), entries) {
			if res.Err != nil {
				t.Fatal(res.Err)
			}
		}
		time.Sleep(time.Minute + 5*time.Second)
		synctest.Wait()
		if n := r.View().EntryCount(); n != 0 {
			t.Errorf("%d are left", n)
		}
	})
}
