package registry_test

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

func TestOfAHundredWhoUseAJoinTokenOneSucceeds(t *testing.T) {
	s := newStore(t)
	c := &clock{}
	servers := []*registry.Registry{start(t, s, c.Now), start(t, s, c.Now)}
	if err := servers[0].CreateJoinToken(t.Context(), "once", registry.JoinToken{ExpiresAt: epoch.Add(time.Hour), AgentID: id("/host")}); err != nil {
		t.Fatal(err)
	}
	converge(t, servers...)
	var group sync.WaitGroup
	var succeeded atomic.Int64
	for i := range 100 {
		group.Go(func() {
			token, err := servers[i%2].ConsumeJoinToken(t.Context(), "once")
			switch {
			case err == nil:
				succeeded.Add(1)
				if token.AgentID != id("/host") || !token.ExpiresAt.Equal(epoch.Add(time.Hour)) {
					t.Errorf("got %+v", token)
				}
			case kindOf(err) != registry.Invalid || !strings.Contains(err.Error(), "does not exist or has already been used"):
				t.Errorf("got error %v", err)
			case token != registry.JoinToken{}:
				t.Errorf("got %+v with an error", token)
			}
		})
	}
	group.Wait()
	if n := succeeded.Load(); n != 1 {
		t.Errorf("%d succeeded", n)
	}
	converge(t, servers...)
	n := 0
	for range servers[0].View().EntriesBySPIFFEID(id("/host")) {
		n++
	}
	if n != 1 {
		t.Errorf("there are %d aliases for the agent, want 1", n)
	}
}

func TestAJoinTokensAgentHasTheFurtherIDOnceItHasAttested(t *testing.T) {
	c := &clock{}
	r := start(t, newStore(t), c.Now)
	mine := create(t, r, newEntry("/w", id("/host")))
	for round := range 2 { // a second token of the same text makes no second alias
		if err := r.CreateJoinToken(t.Context(), "tok", registry.JoinToken{ExpiresAt: epoch.Add(time.Hour), AgentID: id("/host")}); err != nil {
			t.Fatal(err)
		}
		if n := r.View().EntryCount(); n != 1+round {
			t.Errorf("round %d: there are %d entries before the token was used", round, n)
		}
		if _, err := r.ConsumeJoinToken(t.Context(), "tok"); err != nil {
			t.Fatal(err)
		}
		if n := r.View().EntryCount(); n != 2 {
			t.Errorf("round %d: there are %d entries, want 2", round, n)
		}
	}
	node, err := registry.JoinTokenNodeID(td, "tok")
	if err != nil {
		t.Fatal(err)
	}
	put(t, r, &registry.Node{ID: node, AttestationType: "join_token"})
	if !r.View().IsAuthorized(node, mine, c.Now()) {
		t.Error("the agent is not authorized for what stands under its further ID")
	}
	if err := r.DeleteNode(t.Context(), node); err != nil {
		t.Fatal(err)
	}
	if n := r.View().EntryCount(); n != 1 {
		t.Errorf("there are %d entries after the node was deleted, want 1: its alias names it alone", n)
	}
}

func TestAJoinTokenExpires(t *testing.T) {
	c := &clock{}
	r := start(t, newStore(t), c.Now)
	if err := r.CreateJoinToken(t.Context(), "tok", registry.JoinToken{ExpiresAt: epoch.Add(time.Minute)}); err != nil {
		t.Fatal(err)
	}
	c.Advance(4 * time.Minute)
	if _, err := r.ConsumeJoinToken(t.Context(), "tok"); kindOf(err) != registry.Invalid || !strings.Contains(err.Error(), "expired 3m0s ago") {
		t.Errorf("got error %v", err)
	}
}

func TestExpiredJoinTokensAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemory()
		r := start(t, s, time.Now)
		for i := range 10 {
			if err := r.CreateJoinToken(t.Context(), fmt.Sprint(i), registry.JoinToken{ExpiresAt: time.Now().Add(time.Minute)}); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		if _, err := s.Read(t.Context(), "token/", func(rec store.Record) error {
			t.Errorf("%s is left", rec.Key)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	})
}

func TestJoinTokensAreNotStored(t *testing.T) {
	s := newStore(t)
	r := start(t, s, nil)
	const token = "a-secret-that-nobody-should-read"
	if err := r.CreateJoinToken(t.Context(), token, registry.JoinToken{ExpiresAt: time.Now().Add(time.Hour), AgentID: id("/host")}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(t.Context(), "", func(rec store.Record) error {
		if strings.Contains(rec.Key, token) || strings.Contains(string(rec.Value), token) {
			t.Errorf("record %q holds the token", rec.Key)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestInvalidJoinTokensAreRefused(t *testing.T) {
	r := start(t, newStore(t), nil)
	soon := time.Now().Add(time.Hour)
	for what, c := range map[string]struct {
		token string
		t     registry.JoinToken
		want  registry.ErrorKind
	}{
		"empty":      {"", registry.JoinToken{ExpiresAt: soon}, registry.Invalid},
		"long":       {strings.Repeat("x", 256), registry.JoinToken{ExpiresAt: soon}, registry.Invalid},
		"path":       {"a/b", registry.JoinToken{ExpiresAt: soon}, registry.Invalid},
		"dots":       {"..", registry.JoinToken{ExpiresAt: soon}, registry.Invalid},
		"foreign ID": {"t", registry.JoinToken{ExpiresAt: soon, AgentID: spiffeid.RequireFromString("spiffe://other.org/a")}, registry.Invalid},
		"no path":    {"t", registry.JoinToken{ExpiresAt: soon, AgentID: td.ID()}, registry.Invalid},
		"server":     {"t", registry.JoinToken{ExpiresAt: soon, AgentID: serverID}, registry.Invalid},
	} {
		if err := r.CreateJoinToken(t.Context(), c.token, c.t); kindOf(err) != c.want {
			t.Errorf("%s: got error %v", what, err)
		}
		if _, err := r.ConsumeJoinToken(t.Context(), c.token); kindOf(err) != registry.Invalid {
			t.Errorf("%s: consumed: %v", what, err)
		}
	}
	if err := r.CreateJoinToken(t.Context(), "twice", registry.JoinToken{ExpiresAt: soon}); err != nil {
		t.Fatal(err)
	}
	if err := r.CreateJoinToken(t.Context(), "twice", registry.JoinToken{ExpiresAt: soon}); kindOf(err) != registry.AlreadyExists {
		t.Errorf("the same token again: %v", err)
	}
}
