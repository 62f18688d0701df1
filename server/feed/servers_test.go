package feed_test

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/store"
)

func TestAgentsAreToldWhereTheServersAreAndWhenThatChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.feed.SetServers(&hallmarkv1.Servers{Addresses: []string{"b:1", "a:1"}})
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
		w.feed.SetServers(&hallmarkv1.Servers{Addresses: []string{"a:1", "b:1"}}) // the same
		w.feed.SetServers(&hallmarkv1.Servers{Addresses: []string{"c:1", "a:1", "b:1"}})
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

// lagging is a store of which this server hears late, as it is of several: what
// others have written is there for who asks, if a majority can be reached.
type lagging struct {
	store.Store
	late atomic.Pointer[chan struct{}] // closed when changes come; nil: they come at once
	cut  atomic.Bool                   // no majority can be reached
}

func (l *lagging) Watch(ctx context.Context, after store.Revision, yield func([]store.Change) error) error {
	return l.Store.Watch(ctx, after, func(changes []store.Change) error {
		if late := l.late.Load(); late != nil {
			select {
			case <-*late:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return yield(changes)
	})
}

func (l *lagging) Read(ctx context.Context, prefix string, yield func(store.Record) error) (store.Revision, error) {
	if l.cut.Load() {
		return 0, store.ErrNoQuorum
	}
	return l.Store.Read(ctx, prefix, yield)
}

// TestAServerThatIsBehindDoesNotSetAnAgentBack is about an agent that comes from
// another server, which has told it of a deletion.
func TestAServerThatIsBehindDoesNotSetAnAgentBack(t *testing.T) {
	for name, cut := range map[string]bool{"it catches up": false, "it is cut off": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shared := &lagging{}
				w := newWorldOver(t, func(s store.Store) store.Store { shared.Store = s; return shared })
				node := w.node("a")
				gone := w.create(&entry.Entry{SPIFFEID: id("/gone"), ParentID: node})
				late := make(chan struct{})
				shared.late.Store(&late)
				r := shared.Commit(t.Context(), store.Txn{Do: []store.Write{{Key: "entry/" + gone.ID}}})[0] // by the other server
				must(t, r.Err)
				shared.cut.Store(cut)

				a := w.newAgent(node)
				a.open(w)
				a.toServ <- &hallmarkv1.FollowRequest{Revision: int64(r.Revision), Digest: make([]byte, 16)}
				synctest.Wait()
				if cut {
					if err := a.wait(); !errors.Is(err, feed.ErrBehind) {
						t.Errorf("the stream ended with %v", err)
					}
					close(late)
					return
				}
				if a.count() > 0 {
					t.Errorf("before it had caught up it sent %v", a.next(0))
				}
				close(late)
				for _, m := range a.next(0) {
					if len(m.Entries) > 0 || m.Revision < int64(r.Revision) {
						t.Errorf("it sent %v; the agent has revision %d", m, r.Revision)
					}
				}
				must(t, a.disconnect())
			})
		})
	}
}
