package feed_test

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/feed"
)

func TestAgentsAreToldWhereTheServersAreAndWhenThatChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.feed.SetServers([]string{"b:1", "a:1"})
		a := w.agent("a")
		a.expect(w)
		told := func(messages []*hallmarkv1.FollowResponse) []string {
			return messages[len(messages)-1].GetServers().GetAddresses()
		}
		if got := told(a.next(0)); !slices.Equal(got, []string{"a:1", "b:1"}) {
			t.Errorf("at first: %v", got)
		}
		w.create(&entry.Entry{SPIFFEID: id("/1"), ParentID: a.node})
		if m := a.next(1); m[1].Servers != nil {
			t.Errorf("with a change of something else: %v", m[1])
		}
		began := time.Now()
		w.feed.SetServers([]string{"a:1", "b:1"}) // the same
		w.feed.SetServers([]string{"c:1", "a:1", "b:1"})
		if got := told(a.next(2)); !slices.Equal(got, []string{"a:1", "b:1", "c:1"}) || time.Since(began) != 0 {
			t.Errorf("after a change: %v, %v later", got, time.Since(began))
		}
		if m := a.next(3); m[3].Servers != nil || time.Since(began) != feed.Heartbeat {
			t.Errorf("with a heartbeat: %v, %v later", m[3], time.Since(began))
		}
		must(t, a.disconnect())
	})
}

func TestOfAServerThatIsAloneNothingIsSaid(t *testing.T) {
	w := newWorld(t)
	a := w.agent("a")
	a.expect(w)
	for _, m := range a.next(0) {
		if m.Servers != nil {
			t.Errorf("it was sent %v", m)
		}
	}
	must(t, a.disconnect())
}

// TestAServerThatIsBehindDoesNotSetAnAgentBack is about an agent that comes from
// another server, which has shown it more.
func TestAServerThatIsBehindDoesNotSetAnAgentBack(t *testing.T) {
	for what, catchesUp := range map[string]bool{"that catches up": true, "that does not": false} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.feed.SetServers([]string{"a:1", "b:1"})
				node := w.node("a")
				a := w.newAgent(node)
				a.open(w)
				now := w.registry.View().Revision()
				began := time.Now()
				a.toServ <- &hallmarkv1.FollowRequest{Revision: int64(now) + 2, Digest: make([]byte, 16)}
				w.create(&entry.Entry{SPIFFEID: id("/1"), ParentID: node})
				synctest.Wait()
				if !catchesUp {
					if err := a.wait(); !errors.Is(err, feed.ErrBehind) || time.Since(began) < feed.CatchUpTime {
						t.Errorf("the stream ended after %v with %v", time.Since(began), err)
					}
					return
				}
				w.create(&entry.Entry{SPIFFEID: id("/2"), ParentID: node})
				a.next(0)
				a.expect(w)
				if m := a.next(0)[0]; m.Revision < int64(now)+2 && !m.More {
					t.Errorf("it was sent revision %d, had %d", m.Revision, now+2)
				}
				must(t, a.disconnect())
			})
		})
	}
}
