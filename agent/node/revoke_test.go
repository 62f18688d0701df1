package node_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/agent/node"
)

// fall revokes the authority that signed everything so far, at once, and tells
// the node of it.
func (w *world) fall(t *testing.T, r *running) {
	t.Helper()
	w.Rotate()
	w.Revoke()
	if err := r.SetBundle(w.CurrentBundle()); err != nil {
		t.Fatal(err)
	}
}

// replaced waits until a link is done and returns the next one.
func (r *running) replaced(t *testing.T, l *node.Link) *node.Link {
	t.Helper()
	select {
	case <-l.Done():
	case <-time.After(time.Minute):
		t.Fatal("the link stays")
	}
	return r.connected(t)
}

func TestAnAgentWhoseAuthorityWasRevokedAttestsAgainIfItCan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		r := w.run(t)
		l := r.connected(t)
		w.fall(t, r)
		r.replaced(t, l)
		time.Sleep(time.Second)
		r.connected(t)
		if n := w.CallCount("AttestAgent"); n != 2 {
			t.Errorf("attested %d times, want twice", n)
		}
		if _, err := r.SignJWT(t.Context(), "x", []string{"a"}); err == nil {
			t.Error("no entry, but a token")
		}
	})
}

func TestAnAgentWhoseAuthorityWasRevokedAndThatCannotAttestAgainEndsWithTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		w.fall(t, r)
		wantError(t, r.ended(t), "AGENT_NOT_ATTESTED", "agent is denied", "cannot be given again", "hallmark token generate")
	})
}

func TestAnAgentThatRenewedAfterTheTaintDoesNotNoticeTheRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		l := r.connected(t)
		w.Rotate()
		w.Lock()
		w.Authorities[0].Tainted = true
		w.Unlock()
		if err := r.SetBundle(w.CurrentBundle()); err != nil {
			t.Fatal(err)
		}
		l = r.replaced(t, l)
		w.Revoke()
		if err := r.SetBundle(w.CurrentBundle()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		select {
		case <-l.Done():
			t.Error("the link was replaced")
		default:
		}
		if renewed, attested := w.CallCount("RenewAgent"), w.CallCount("AttestAgent"); renewed != 1 || attested != 1 {
			t.Errorf("renewed %d times and attested %d times, want once each", renewed, attested)
		}
	})
}

func TestAServerWhoseAuthorityWasRevokedMustProveItselfAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.ServerSigner = w.Authorities[0]
		w.Rotate() // it signs the node's SVID
		w.options.Join = w.Join(token)
		r := w.run(t)
		l := r.connected(t)
		w.Lock()
		w.Authorities[0].Tainted = true
		w.Unlock()
		if err := r.SetBundle(w.CurrentBundle()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		select {
		case <-l.Done():
			t.Fatal("a tainted authority vouches no more")
		default:
		}
		w.Revoke()
		if err := r.SetBundle(w.CurrentBundle()); err != nil {
			t.Fatal(err)
		}
		// Whoever still presents the old certificate is not trusted.
		time.Sleep(time.Minute)
		if s := r.Status(); s.Connected || s.ID != tokenAgent {
			t.Errorf("status is %+v", s)
		}
		wantError(t, r.Status().LastError, "server's certificate is not trusted")
		w.Lock()
		w.ServerSigner = nil
		w.Unlock()
		r.replaced(t, l)
		if renewed, attested := w.CallCount("RenewAgent"), w.CallCount("AttestAgent"); renewed != 0 || attested != 1 {
			t.Errorf("renewed %d times and attested %d times, want 0 and 1", renewed, attested)
		}
	})
}
