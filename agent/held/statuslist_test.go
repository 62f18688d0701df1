package held_test

import (
	"bytes"
	"testing"
	"testing/synctest"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
)

// revokes is a status list, as a server sends it.
func revokes(t *testing.T, id string, revision int64, indexes ...int) *held.StatusList {
	t.Helper()
	list, err := statuslist.New(1, 64)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range indexes {
		list.Set(i, statuslist.Invalid)
	}
	l, err := held.NewStatusList(id, revision, list.Compress())
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestStatusList_SL12_ARevokedJWTSVIDIsNotHandedOutAgain(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		n.Statuses("https://status.example.org/status/aa")
		first, other := n.jwt("x"), n.jwt("y")
		before := digest.Sum(n.Digest())
		n.Apply(held.Change{Revision: 100, StatusLists: []*held.StatusList{revokes(t, "aa", 7, 0), revokes(t, "bb", 8, 1)}})
		before.AddStatusList("aa", 7)
		before.AddStatusList("bb", 8)
		if !bytes.Equal(n.Digest(), before[:]) {
			t.Error("the digest lacks the lists")
		}
		second := n.jwt("x")
		if second == first {
			t.Error("a revoked token is served")
		}
		want(t, "another audience's, of an index that another list revokes", n.jwt("y"), other)
		// The next one is revoked before it is signed: yet another is asked for.
		n.Apply(held.Change{Revision: 101, StatusLists: []*held.StatusList{revokes(t, "aa", 9, 0, 2, 3)}})
		if third := n.jwt("x"); third == first || third == second {
			t.Error("a token that was revoked is served")
		}
		want(t, "calls", len(n.JWTCalls()), 5)
		n.Apply(held.Change{Revision: 102, GoneStatusLists: []string{"aa", "bb"}})
		before = digest.Sum(n.Digest())
		n.Apply(held.Change{Revision: 103, GoneStatusLists: []string{"aa"}})
		if !bytes.Equal(n.Digest(), before[:]) {
			t.Error("a list that is not there was taken out")
		}
	})
}

func TestStatusList_SL12_ARevokedWITSVIDIsReplacedAtOnce(t *testing.T) {
	onNode(t, 0, func(n *node) {
		n.Statuses("https://status.example.org/status/aa")
		e := n.Entry("a", nil, "unix:uid:1")
		n.sync()
		s := n.subscribeWIT("unix:uid:1")
		first := n.wit(s.Update(), e)
		n.Apply(held.Change{Revision: 100, StatusLists: []*held.StatusList{revokes(t, "aa", 7, 0)}})
		synctest.Wait()
		if second := n.wit(s.Update(), e); second.Token == first.Token || second.Key == first.Key {
			t.Error("it is not replaced, or by one of the same key")
		}
	})
}

func TestAStatusListThatCannotBeReadRevokesNothing(t *testing.T) {
	withJWT(t, nil, func(n *node, _ *entry.Entry) {
		n.Statuses("https://status.example.org/status/aa")
		first := n.jwt("x")
		l, err := held.NewStatusList("aa", 1, []byte("garbage"))
		if err == nil {
			t.Error("garbage is a status list")
		}
		if _, err := held.NewStatusList("aa", 1, make([]byte, 2<<20)); err == nil {
			t.Error("a list of 2 MiB is taken")
		}
		before := digest.Sum(n.Digest())
		n.Apply(held.Change{Revision: 100, StatusLists: []*held.StatusList{l}})
		before.AddStatusList("aa", 1) // which the server counts
		if !bytes.Equal(n.Digest(), before[:]) {
			t.Error("it does not count in the digest")
		}
		want(t, "the token", n.jwt("x"), first)
	})
}
