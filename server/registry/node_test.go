package registry_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/registry"
)

func TestANodeKeepsEveryField(t *testing.T) {
	s := newStore(t)
	r := start(t, s, nil)
	n := newNode("a", "test:b:2", "test:a:1")
	n.NewSerialNumber, n.NewExpiresAt = "2", epoch.Add(2*time.Hour)
	n.CanReattest, n.AgentVersion = true, "1.2.3"
	put(t, r, n)
	got := r.View().Node(n.ID)
	if got.ID != n.ID || got.AttestationType != "test" || !got.Selectors.Equal(n.Selectors) ||
		got.SerialNumber != "1" || !got.ExpiresAt.Equal(n.ExpiresAt) || got.NewSerialNumber != "2" || !got.NewExpiresAt.Equal(n.NewExpiresAt) ||
		got.Banned || !got.CanReattest || got.AgentVersion != "1.2.3" || !got.AttestedAt.Equal(n.AttestedAt) {
		t.Errorf("got %+v", got)
	}
	if r.View().NodeCount() != 1 || r.View().Node(agentID("b")) != nil {
		t.Error("there are other nodes")
	}
}

func TestABannedNodeIsRefusedAndGetsNothing(t *testing.T) {
	r := start(t, newStore(t), nil)
	put(t, r, newNode("a"))
	e := create(t, r, newEntry("/w", agentID("a")))
	if _, err := r.UpdateNode(t.Context(), agentID("a"), func(n *registry.Node) error { n.Banned = true; return nil }); err != nil {
		t.Fatal(err)
	}
	v := r.View()
	if v.Authorized(agentID("a"), epoch) != nil || v.IsAuthorized(agentID("a"), e, epoch) {
		t.Error("a banned node is authorized for something")
	}
	if err := r.PutNode(t.Context(), newNode("a")); kindOf(err) != registry.FailedPrecondition {
		t.Errorf("a banned node attested: %v", err)
	}
	// Evicted, it may attest again.
	if err := r.DeleteNode(t.Context(), agentID("a")); err != nil {
		t.Fatal(err)
	}
	put(t, r, newNode("a"))
	if len(r.View().Authorized(agentID("a"), epoch)) != 1 {
		t.Error("attested again, it is authorized for nothing")
	}
}

// TestOneOfManyCreatesANode tries it through two servers of the same store.
func TestOneOfManyCreatesANode(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil)}
	for i := range 20 {
		name := fmt.Sprint(i)
		errs := make([]error, 8)
		var group sync.WaitGroup
		for j := range errs {
			group.Go(func() { errs[j] = servers[j%2].CreateNode(t.Context(), newNode(name)) })
		}
		group.Wait()
		created := 0
		for _, err := range errs {
			if err == nil {
				created++
			} else if kindOf(err) != registry.AlreadyExists {
				t.Error(err)
			}
		}
		if created != 1 {
			t.Errorf("node %s was created %d times", name, created)
		}
	}
	if _, err := servers[0].UpdateNode(t.Context(), agentID("0"), func(n *registry.Node) error { n.Banned = true; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := servers[0].CreateNode(t.Context(), newNode("0")); kindOf(err) != registry.FailedPrecondition {
		t.Errorf("a banned node: %v", err)
	}
}

func TestABanHoldsAgainstConcurrentAttestation(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil)}
	for i := range 20 {
		name := fmt.Sprint(i)
		put(t, servers[0], newNode(name))
		var group sync.WaitGroup
		group.Go(func() {
			if _, err := servers[0].UpdateNode(t.Context(), agentID(name), func(n *registry.Node) error { n.Banned = true; return nil }); err != nil {
				t.Error(err)
			}
		})
		group.Go(func() {
			if err := servers[1].PutNode(t.Context(), newNode(name)); err != nil && kindOf(err) != registry.FailedPrecondition {
				t.Error(err)
			}
		})
		group.Wait()
	}
	converge(t, servers...)
	for i := range 20 {
		if n := servers[1].View().Node(agentID(fmt.Sprint(i))); !n.Banned {
			t.Errorf("node %d is not banned any more", i)
		}
	}
}

func TestUpdatingANode(t *testing.T) {
	r := start(t, newStore(t), nil)
	put(t, r, newNode("a", "test:a:1"))
	before := r.View().Revision()
	n, err := r.UpdateNode(t.Context(), agentID("a"), func(n *registry.Node) error {
		n.ID, n.SerialNumber = agentID("b"), "7"
		n.Selectors = selector.Set{{Type: "test", Value: "b:2"}}
		return nil
	})
	if err != nil || n.ID != agentID("a") || n.SerialNumber != "7" {
		t.Errorf("got %+v, %v", n, err)
	}
	if r.View().Node(agentID("b")) != nil {
		t.Error("an update has renamed a node")
	}
	if r.View().Revision() != before+1 {
		t.Errorf("an update took revisions %d to %d", before, r.View().Revision())
	}
	if _, err := r.UpdateNode(t.Context(), agentID("a"), func(n *registry.Node) error { n.SerialNumber = "7"; return nil }); err != nil || r.View().Revision() != before+1 {
		t.Errorf("an update that changes nothing was written: %v", err)
	}
	no := errors.New("no")
	for what, c := range map[string]struct {
		id     spiffeid.ID
		change func(*registry.Node) error
		ok     func(error) bool
	}{
		"unknown": {agentID("none"), func(*registry.Node) error { return nil }, func(err error) bool { return kindOf(err) == registry.NotFound }},
		"refused": {agentID("a"), func(n *registry.Node) error { n.Banned = true; return no }, func(err error) bool { return errors.Is(err, no) }},
		"version": {agentID("a"), func(n *registry.Node) error { n.AgentVersion = strings.Repeat("v", 256); return nil }, func(err error) bool { return kindOf(err) == registry.Invalid }},
	} {
		if _, err := r.UpdateNode(t.Context(), c.id, c.change); !c.ok(err) {
			t.Errorf("%s: got error %v", what, err)
		}
	}
	if r.View().Node(agentID("a")).Banned {
		t.Error("an update that failed changed the node")
	}
}

func TestConcurrentUpdatesOfANodeLoseNothing(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil)}
	put(t, servers[0], newNode("a"))
	converge(t, servers...)
	var group sync.WaitGroup
	for i := range 60 {
		group.Go(func() {
			if _, err := servers[i%2].UpdateNode(t.Context(), agentID("a"), func(n *registry.Node) error {
				n.AgentVersion += "x"
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	converge(t, servers...)
	if got := servers[0].View().Node(agentID("a")).AgentVersion; len(got) != 60 {
		t.Errorf("%d of 60 updates are there", len(got))
	}
}

func TestInvalidNodesAreRefused(t *testing.T) {
	r := start(t, newStore(t), nil)
	foreign, long := newNode("a"), newNode("a")
	foreign.ID = spiffeid.RequireFromString("spiffe://other.org/spire/agent/a")
	long.AgentVersion = strings.Repeat("v", 256)
	for what, n := range map[string]*registry.Node{"foreign": foreign, "version": long} {
		if err := r.PutNode(t.Context(), n); kindOf(err) != registry.Invalid {
			t.Errorf("%s: got error %v", what, err)
		}
	}
	if err := r.DeleteNode(t.Context(), agentID("none")); kindOf(err) != registry.NotFound {
		t.Errorf("delete an unknown node: %v", err)
	}
}

// sharing makes nodes that all have one further ID, and an entry under that.
func sharing(t testing.TB, r *registry.Registry, nodes int) *entry.Entry {
	t.Helper()
	var aliases []*entry.Entry
	for i := range nodes {
		id := agentID(fmt.Sprintf("sharer-%04d", i))
		put(t, r, newNode(fmt.Sprintf("sharer-%04d", i)))
		aliases = append(aliases, newEntry("/shared", id, registry.SpiffeIDSelector(id).String()))
	}
	createAll(t, r, aliases)
	shared := newEntry("/of-all", id("/shared"), "unix:uid:1")
	createAll(t, r, []*entry.Entry{shared})
	for e := range r.View().EntriesBySPIFFEID(shared.SPIFFEID) {
		return e
	}
	t.Fatal("the shared entry is not there")
	return nil
}

func TestAnEntryIsOfEveryNodeThatSharesItsParent(t *testing.T) {
	r := start(t, newStore(t), nil)
	shared := sharing(t, r, 200)
	put(t, r, newNode("stranger"))
	v := r.View()
	for i := range 200 {
		if node := agentID(fmt.Sprintf("sharer-%04d", i)); !v.IsAuthorized(node, shared, epoch) {
			t.Errorf("%s is not authorized", node)
		}
	}
	if v.IsAuthorized(agentID("stranger"), shared, epoch) {
		t.Error("a node that does not share the ID is authorized")
	}
	last := agentID("sharer-0199")
	for e := range v.EntriesByParent(last) {
		if err := r.DeleteEntries(t.Context(), []string{e.ID})[0]; err != nil {
			t.Fatal(err)
		}
	}
	if r.View().IsAuthorized(last, shared, epoch) {
		t.Error("a node that does not share the ID any more is authorized")
	}
}
