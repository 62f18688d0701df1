package feed_test

import (
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/registry"
)

// TestStatusListsThatRevokeAnythingAreSentToAgentsThatTakeThem has one agent that
// does not, as older ones.
func TestStatusListsThatRevokeAnythingAreSentToAgentsThatTakeThem(t *testing.T) {
	w := newWorld(t)
	older := w.agent("older")
	taker := w.newAgent(w.node("taker"))
	taker.open(w)
	taker.toServ <- &hallmarkv1.FollowRequest{TakesStatusLists: true}
	taker.next(0)
	list, err := statuslist.New(1, registry.StatusListSize)
	must(t, err)
	put := func(bits []byte, ends time.Time) {
		t.Helper()
		must(t, w.registry.PutStatusList(t.Context(), w.registry.View().StatusList("aa"), &registry.StatusList{ID: "aa", URI: "https://a/aa", Server: "main", EndsAt: ends, Bits: bits}))
		w.inStep()
	}
	put(nil, time.Now().Add(time.Hour))
	if n := taker.count(); n != 1 {
		t.Errorf("of a list that revokes nothing it was sent %d messages", n-1)
	}
	list.Set(9, statuslist.Invalid)
	put(list.Compress(), time.Now().Add(time.Hour))
	last := taker.next(1)[1]
	if len(last.RevokedTokens) != 1 || last.RevokedTokens[0].ListId != "aa" || last.RevokedTokens[0].Revision != int64(w.registry.View().StatusList("aa").Revision()) {
		t.Errorf("it was sent %v", last)
	}
	if got, err := statuslist.Decompress(1, last.RevokedTokens[0].Bits); err != nil || got.Count() != 1 {
		t.Errorf("the list that was sent: %v", err)
	}
	put(nil, time.Now().Add(time.Hour))
	if last := taker.next(2)[2]; len(last.GoneRevokedTokens) != 1 || len(last.RevokedTokens) != 0 {
		t.Errorf("once nothing is revoked it was sent %v", last)
	}
	if n := older.count(); n != 1 {
		t.Errorf("one that takes none was sent %v", older.next(0)[1:])
	}
	must(t, older.disconnect())
	must(t, taker.disconnect())
}
