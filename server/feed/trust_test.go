package feed_test

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/registry"
)

func TestAnAgentWhoseSVIDVerifiesNoMoreIsToldOfTheBundleAndNothingElse(t *testing.T) {
	w := newWorld(t)
	a := w.newAgent(w.node("a"))
	revoked := errors.New("signed by an unknown authority")
	sequence := w.registry.View().Bundle(td).SequenceNumber
	a.verify = func(v *registry.View) error {
		if v.Bundle(td).SequenceNumber > sequence {
			return revoked
		}
		return nil
	}
	w.connect(a)
	// While the first is unread, the others come together, as one change.
	a.hold <- struct{}{}
	w.create(&entry.Entry{SPIFFEID: id("/before"), ParentID: a.node})
	w.changeBundle(td)
	w.create(&entry.Entry{SPIFFEID: id("/secret"), ParentID: a.node})
	<-a.hold
	if err := a.wait(); !errors.Is(err, feed.ErrUntrusted) || !errors.Is(err, revoked) {
		t.Fatalf("ended with %v, want ErrUntrusted and the reason", err)
	}
	must(t, a.wrong)
	if b := a.bundles[td.Name()]; b.SequenceNumber != sequence+1 {
		t.Errorf("the agent has bundle %d, want %d", b.SequenceNumber, sequence+1)
	}
	for _, e := range a.entries {
		if strings.HasSuffix(e.SpiffeId, "/secret") {
			t.Error("an entry was sent after the SVID verified no more")
		}
	}
}

func TestAnAgentWhoseSVIDDoesNotVerifyIsSentNothing(t *testing.T) {
	w := newWorld(t)
	a := w.newAgent(w.node("a"))
	a.verify = func(*registry.View) error { return errors.New("no") }
	a.open(w)
	a.toServ <- a.hello()
	if err := a.wait(); !errors.Is(err, feed.ErrUntrusted) || a.count() != 0 {
		t.Errorf("ended with %v after %d messages", err, a.count())
	}
}

func TestAnSVIDIsVerifiedAgainOnlyWhenTheOwnBundleHasChanged(t *testing.T) {
	w := newWorld(t)
	a := w.newAgent(w.node("a"))
	var asked atomic.Int32
	a.verify = func(*registry.View) error { asked.Add(1); return nil }
	w.connect(a)
	for _, path := range []string{"/a", "/b", "/c"} {
		w.create(&entry.Entry{SPIFFEID: id(path), ParentID: a.node})
		a.expect(w)
	}
	w.changeBundle(partner)
	a.expect(w)
	if n := asked.Load(); n != 1 {
		t.Errorf("verified %d times, want once", n)
	}
	w.changeBundle(td)
	a.expect(w)
	if n := asked.Load(); n != 2 {
		t.Errorf("verified %d times after the bundle has changed, want twice", n)
	}
	must(t, a.disconnect())
}
