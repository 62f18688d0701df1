package registry_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// model does the same as a registry, by the simplest means: it looks at
// everything for every question.
type model struct {
	entries map[string]*entry.Entry
	nodes   map[spiffeid.ID]*registry.Node
}

func (m *model) similar(e *entry.Entry) string {
	for _, other := range m.entries {
		if other.ID != e.ID && other.Key() == e.Key() {
			return other.ID
		}
	}
	return ""
}

// authorized is the definition: what stands under the node, under an alias
// that it matches, or under an entry that it is authorized for.
func (m *model) authorized(node spiffeid.ID, now time.Time) map[string]bool {
	out := make(map[string]bool)
	n := m.nodes[node]
	if n == nil || n.Banned {
		return out
	}
	own := selector.NewSet(append(slices.Clone(n.Selectors), registry.SpiffeIDSelector(node))...)
	names := map[spiffeid.ID]bool{node: true}
	for _, e := range m.entries {
		if e.ParentID == serverID && !e.Expired(now) && e.Selectors.SubsetOf(own) {
			names[e.SPIFFEID] = true
		}
	}
	for again := true; again; {
		again = false
		for _, e := range m.entries {
			if !out[e.ID] && names[e.ParentID] && !e.Expired(now) {
				out[e.ID], names[e.SPIFFEID], again = true, true, true
			}
		}
	}
	return out
}

// follower keeps what a node is authorized for, as a push stream does: from
// what its subscription notes alone.
type follower struct {
	node spiffeid.ID
	sub  *registry.Subscription
	held map[string]int64 // revision numbers by entry ID
}

func (f *follower) load(v *registry.View, now time.Time) {
	f.held = make(map[string]int64)
	for _, e := range v.Authorized(f.node, now) {
		f.held[e.ID] = e.RevisionNumber
	}
}

func (f *follower) follow(now time.Time) (*registry.View, registry.Delta) {
	v, d := f.sub.Take()
	if d.Resync || d.NodeGone {
		f.load(v, now)
	}
	for _, id := range d.Entries {
		if e := v.Entry(id); e != nil && v.IsAuthorized(f.node, e, now) {
			f.held[id] = e.RevisionNumber
		} else {
			delete(f.held, id)
		}
	}
	return v, d
}

// unpruned is a store in which whatever deletes but the test finds that another
// came first: a pruner acts at moments that a model cannot know.
type unpruned struct{ store.Store }

type testsOwn struct{}

func (s unpruned) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	deletes := slices.ContainsFunc(txns, func(t store.Txn) bool { return t.Do[0].Value == nil })
	if !deletes || ctx.Value(testsOwn{}) != nil {
		return s.Store.Commit(ctx, txns...)
	}
	out := make([]store.Result, len(txns))
	for i := range out {
		out[i].Err = store.ErrConflict
	}
	return out
}

// A small world, so that things meet: nested parents, cycles, aliases that
// share an ID, entries that have an agent's or an alias's ID as their parent.
var (
	worldIDs     = []spiffeid.ID{id("/a"), id("/b"), id("/c"), id("/d"), id("/e")}
	worldNodes   = []spiffeid.ID{agentID("1"), agentID("2"), agentID("3")}
	worldParents = slices.Concat(worldIDs, worldNodes, []spiffeid.ID{serverID, serverID, serverID, serverID, agentID("none")})
)

func someSelectors(rnd *rand.Rand) selector.Set {
	var set []selector.Selector
	for n := 1 + rnd.IntN(4)/3; n > 0; n-- {
		if rnd.IntN(8) == 0 {
			set = append(set, registry.SpiffeIDSelector(worldNodes[rnd.IntN(len(worldNodes))]))
		} else {
			set = append(set, selector.Selector{Type: "k", Value: string(rune('a' + rnd.IntN(3)))})
		}
	}
	return selector.NewSet(set...)
}

func pick[T any](rnd *rand.Rand, from []T) T { return from[rnd.IntN(len(from))] }

// someChange draws a change of one entry; it may be made more than once.
func someChange(rnd *rand.Rand, now time.Time) func(*entry.Entry) {
	spiffeID, parent, selectors, hint := pick(rnd, worldIDs), pick(rnd, worldParents), someSelectors(rnd), fmt.Sprint(rnd.IntN(100))
	end := now.Add(time.Duration(rnd.IntN(5)-1) * time.Hour).Truncate(time.Second)
	switch rnd.IntN(6) {
	case 0:
		return func(e *entry.Entry) { e.SPIFFEID = spiffeID }
	case 1:
		return func(e *entry.Entry) { e.ParentID = parent }
	case 2:
		return func(e *entry.Entry) { e.Selectors = selectors }
	case 3:
		return func(e *entry.Entry) { e.ExpiresAt = end }
	case 4:
		return func(e *entry.Entry) { e.ExpiresAt = time.Time{} }
	}
	return func(e *entry.Entry) { e.Hint = hint }
}

func TestRandomChangesAgreeWithTheDefinition(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			s := unpruned{newStore(t)}
			c := &clock{}
			r := start(t, s, c.Now)
			var midway *registry.Registry // loads what is there, then follows
			steps := 0
			randomWalk(t, rand.New(rand.NewPCG(seed, 0)), c, r, r, 300, 1, func() {
				if steps++; steps == 150 {
					midway = start(t, s, c.Now)
				}
			})
			converge(t, midway)
			if got, want := describe(midway.View(), c.Now()), describe(r.View(), c.Now()); got != want {
				t.Errorf("loaded midway:\n%s\nfolded:\n%s", got, want)
			}
			again, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: td, Now: c.Now})
			if err != nil {
				t.Fatal(err)
			}
			if got, want := describe(again.View(), c.Now()), describe(r.View(), c.Now()); got != want {
				t.Errorf("loaded:\n%s\nfolded:\n%s", got, want)
			}
		})
	}
}

// What happens on one server reaches another in groups, whose changes may have
// to do with each other.
func TestGroupsOfRandomChangesAgreeWithTheDefinition(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			c := &clock{}
			g := newGrouping()
			there, here := start(t, unpruned{g.memory}, c.Now), start(t, unpruned{g}, c.Now)
			randomWalk(t, rand.New(rand.NewPCG(seed, 1)), c, there, here, 1000, 2, func() {
				g.release()
				converge(t, here)
			})
		})
	}
}

// randomWalk changes the registry there, step by step, and looks each time
// that as many steps have been made as a group has what the registry here
// shows and tells.
func randomWalk(t *testing.T, rnd *rand.Rand, c *clock, there, here *registry.Registry, steps, group int, arrive func()) {
	t.Helper()
	m := &model{entries: make(map[string]*entry.Entry), nodes: make(map[spiffeid.ID]*registry.Node)}
	converge(t, there) // makes an entry
	for e := range there.View().Entries("") {
		m.entries[e.ID] = e
	}
	arrive()
	var followers []*follower
	for _, node := range worldNodes {
		f := &follower{node: node, sub: here.Subscribe(node), held: make(map[string]int64)}
		defer f.sub.Close()
		followers = append(followers, f)
	}
	var did []string
	advanced := false
	for step := range steps {
		if rnd.IntN(10*group) == 0 {
			c.Advance(time.Hour)
			advanced = true
		} else {
			did = append(did, randomStep(t, rnd, there, m, c.Now()))
		}
		if step%group != group-1 {
			continue
		}
		arrive()
		check(t, here.View(), m, c.Now())
		for _, f := range followers {
			v, d := f.follow(c.Now())
			if advanced { // what time alone changes, a follower knows by itself
				f.load(v, c.Now())
			}
			want := make(map[string]int64)
			for id := range m.authorized(f.node, c.Now()) {
				want[id] = m.entries[id].RevisionNumber
			}
			if !maps.Equal(f.held, want) {
				t.Fatalf("step %d (%v): told %+v, the follower of %s holds %v, want %v", step, did, d, f.node, f.held, want)
			}
		}
		if t.Failed() {
			t.Fatalf("step %d (%v)", step, did)
		}
		did, advanced = nil, false
	}
}

// randomStep does one thing, or several in one batch, to the registry and to
// the model, and compares what they say of it.
func randomStep(t *testing.T, rnd *rand.Rand, r *registry.Registry, m *model, now time.Time) string {
	t.Helper()
	ctx := context.WithValue(t.Context(), testsOwn{}, true)
	ids := slices.Sorted(maps.Keys(m.entries))
	ids = slices.DeleteFunc(ids, func(id string) bool { return m.entries[id].SPIFFEID == markerID })
	switch n := rnd.IntN(20); {
	case n < 8 && len(ids) < 30 || len(ids) == 0:
		var batch []*entry.Entry
		for range 1 + rnd.IntN(3) {
			e := &entry.Entry{ID: fmt.Sprint(rnd.Uint32()), SPIFFEID: pick(rnd, worldIDs), ParentID: pick(rnd, worldParents), Selectors: someSelectors(rnd)}
			if rnd.IntN(3) == 0 {
				e.ExpiresAt = now.Add(time.Duration(1+rnd.IntN(3)) * time.Hour)
			}
			batch = append(batch, e)
		}
		for i, res := range r.CreateEntries(ctx, batch) {
			switch similar := m.similar(batch[i]); {
			case res.Err == nil && similar == "":
				m.entries[res.Entry.ID] = res.Entry
			case kindOf(res.Err) == registry.AlreadyExists && similar == res.Entry.ID && similar != "":
			default:
				t.Errorf("create: %v, %v; similar is %q", res.Entry, res.Err, similar)
			}
		}
		return "create"
	case n < 13:
		// One at a time: of two in a batch, either may come first.
		change := someChange(rnd, now)
		update := registry.EntryUpdate{ID: pick(rnd, ids), Change: func(e *entry.Entry) error {
			change(e)
			return nil
		}}
		e := *m.entries[update.ID]
		change(&e)
		e.RevisionNumber++
		similar := m.similar(&e)
		switch res := r.UpdateEntries(ctx, []registry.EntryUpdate{update})[0]; {
		case res.Err == nil && similar == "":
			if res.Entry.RevisionNumber != e.RevisionNumber || res.Entry.Key() != e.Key() {
				t.Errorf("update: got %+v, want %+v", res.Entry, e)
			}
			m.entries[e.ID] = &e
		case kindOf(res.Err) == registry.AlreadyExists && similar != "":
		default:
			t.Errorf("update: %v, %v; similar is %q", res.Entry, res.Err, similar)
		}
		return "update"
	case n < 16:
		batch := []string{pick(rnd, ids), pick(rnd, ids), pick(rnd, ids), "none"}
		for i, err := range r.DeleteEntries(ctx, batch) {
			if _, ok := m.entries[batch[i]]; ok != (err == nil) {
				t.Errorf("delete %s: %v", batch[i], err)
			}
			delete(m.entries, batch[i])
		}
		return "delete"
	case n < 18:
		node := &registry.Node{ID: pick(rnd, worldNodes), AttestationType: "test", Selectors: someSelectors(rnd)}
		old := m.nodes[node.ID]
		if err := r.PutNode(ctx, node); (err == nil) == (old != nil && old.Banned) {
			t.Errorf("attest: %v", err)
		} else if err == nil {
			m.nodes[node.ID] = node
		}
		return "attest"
	case n < 19:
		node, selectors, ban := pick(rnd, worldNodes), someSelectors(rnd), rnd.IntN(3) == 0
		_, err := r.UpdateNode(ctx, node, func(n *registry.Node) error {
			n.Selectors, n.Banned = selectors, ban
			return nil
		})
		if _, ok := m.nodes[node]; ok != (err == nil) {
			t.Errorf("update node: %v", err)
		} else if ok {
			m.nodes[node] = &registry.Node{ID: node, Selectors: selectors, Banned: ban}
		}
		return "update node"
	default:
		node := pick(rnd, worldNodes)
		if err := r.DeleteNode(ctx, node); (err == nil) != (m.nodes[node] != nil) {
			t.Errorf("evict: %v", err)
		} else if err == nil {
			delete(m.nodes, node)
			own := selector.Set{registry.SpiffeIDSelector(node)}
			maps.DeleteFunc(m.entries, func(_ string, e *entry.Entry) bool {
				return e.ParentID == node && e.Selectors.Equal(own)
			})
		}
		return "evict"
	}
}

// check compares everything that a view answers with the model.
func check(t *testing.T, v *registry.View, m *model, now time.Time) {
	t.Helper()
	if v.EntryCount() != len(m.entries) || v.NodeCount() != len(m.nodes) {
		t.Errorf("there are %d entries and %d nodes, want %d and %d", v.EntryCount(), v.NodeCount(), len(m.entries), len(m.nodes))
	}
	for id, want := range m.entries {
		got := v.Entry(id)
		if got == nil || got.Key() != want.Key() || got.RevisionNumber != want.RevisionNumber || got.Hint != want.Hint || !got.ExpiresAt.Equal(want.ExpiresAt) {
			t.Errorf("got entry %+v, want %+v", got, want)
		}
	}
	for _, id := range slices.Concat(worldParents, worldIDs) {
		byParent, bySPIFFEID := 0, 0
		for _, e := range m.entries {
			if e.ParentID == id {
				byParent++
			}
			if e.SPIFFEID == id {
				bySPIFFEID++
			}
		}
		if got := len(slices.Collect(v.EntriesByParent(id))); got != byParent {
			t.Errorf("%d entries under %s, want %d", got, id, byParent)
		}
		if got := len(slices.Collect(v.EntriesBySPIFFEID(id))); got != bySPIFFEID {
			t.Errorf("%d entries of %s, want %d", got, id, bySPIFFEID)
		}
	}
	for _, node := range append(slices.Clone(worldNodes), agentID("none"), serverID) {
		want := m.authorized(node, now)
		got := v.Authorized(node, now)
		if !slices.IsSortedFunc(got, func(a, b *entry.Entry) int { return strings.Compare(a.ID, b.ID) }) {
			t.Errorf("the entries of %s are not in order", node)
		}
		for _, e := range got {
			if !want[e.ID] {
				t.Errorf("%s is authorized for %s, or twice", node, e.ID)
			}
			delete(want, e.ID)
		}
		for id := range want {
			t.Errorf("%s is not authorized for %s", node, id)
		}
		want = m.authorized(node, now)
		for e := range v.Entries("") {
			if v.IsAuthorized(node, e, now) != want[e.ID] {
				t.Errorf("IsAuthorized(%s, %s) is %v", node, e.ID, !want[e.ID])
			}
		}
	}
}
