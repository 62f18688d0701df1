package feed_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/feed"
)

func TestASilentStreamBeatsWithRevisionAndDigest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.agent("a")
		a.expect(w)
		w.create(&entry.Entry{SPIFFEID: id("/other"), ParentID: agentID("b")})
		began := time.Now()
		a.next(1)
		if took := time.Since(began); took != feed.Heartbeat {
			t.Errorf("the heartbeat came after %v", took)
		}
		m := a.next(1)[1]
		if m.Complete || m.Revision != int64(w.registry.View().Revision()) || len(m.Entries)+len(m.Bundles) > 0 {
			t.Errorf("the heartbeat is %v", m)
		}
		for n := range 5 {
			a.next(n)
		}
		a.expect(w)
		must(t, a.disconnect())
	})
}

func TestAnAgentThatDoesNotReadLosesItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.agent("a")
		a.expect(w)
		a.hold <- struct{}{}
		w.create(&entry.Entry{SPIFFEID: id("/1"), ParentID: a.node})
		synctest.Wait()
		began := time.Now()
		if err := a.wait(); !errors.Is(err, feed.ErrSlow) || time.Since(began) != feed.SendTimeout {
			t.Errorf("the stream ended after %v with %v", time.Since(began), err)
		}
	})
}

func TestChangesAddUpWhileAnAgentDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.agent("a")
		a.expect(w)
		a.hold <- struct{}{}
		e := w.create(&entry.Entry{SPIFFEID: id("/1"), ParentID: a.node})
		synctest.Wait()
		for range 100 {
			w.update(e.ID, func(e *entry.Entry) { e.Hint += "x" })
		}
		w.delete(w.create(&entry.Entry{SPIFFEID: id("/2"), ParentID: a.node}).ID)
		time.Sleep(feed.SendTimeout - time.Second)
		<-a.hold
		a.expect(w)
		if n := a.count(); n > 3 {
			t.Errorf("102 changes came in %d messages", n-1)
		}
		must(t, a.disconnect())
	})
}

func TestAnAgentThatIsBannedWhileItDoesNotReadGetsNoFurtherMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.agent("a")
		a.expect(w)
		a.hold <- struct{}{}
		w.create(&entry.Entry{SPIFFEID: id("/1"), ParentID: a.node})
		synctest.Wait()
		w.create(&entry.Entry{SPIFFEID: id("/2"), ParentID: a.node})
		must(t, w.registry.DeleteNode(t.Context(), a.node))
		<-a.hold
		if err := a.wait(); !errors.Is(err, feed.ErrNodeGone) {
			t.Errorf("the stream ended with %v", err)
		}
		if n := a.count(); n != 2 {
			t.Errorf("it was sent %d messages, want the first and the one under way", n)
		}
	})
}

func TestAnAgentThatDoesNotSayWhatItHasLosesItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.newAgent(w.node("a"))
		a.open(w)
		began := time.Now()
		if err := a.wait(); !errors.Is(err, feed.ErrSlow) || time.Since(began) != feed.HelloTimeout {
			t.Errorf("the stream ended after %v with %v", time.Since(began), err)
		}
		if n := w.inStep(); n != 0 {
			t.Errorf("%d agents are in step", n)
		}
	})
}
