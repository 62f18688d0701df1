package node_test

import (
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/agent/node"
)

const newToken = "join-token-2"

// impostor lets the server present a certificate of the first authority from
// now on, as somebody could who has its key, and revokes that authority.
func (w *world) impostor(t *testing.T, r *running) {
	t.Helper()
	leaked := w.Authorities[0]
	w.Rotate()
	w.Revoke()
	if err := r.SetBundle(w.CurrentBundle()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	r.connected(t)
	w.Lock()
	defer w.Unlock()
	w.ServerSigner = leaked
	w.Authorities = append(w.Authorities, leaked) // it says so, too
}

func TestARevokedAuthorityVouchesForNoServerByATrustBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		w.AgentTTL = 10 * time.Minute
		r := w.run(t)
		r.connected(t)
		w.impostor(t, r)
		attested := w.CallCount("AttestAgent")
		w.Stop()
		w.Start()
		time.Sleep(15 * time.Minute) // also when its SVID has ended, and it must attest
		if s := r.Status(); s.Connected || w.CallCount("AttestAgent") != attested {
			t.Errorf("it attested to whoever has the key: %+v", s)
		}
		wantError(t, r.Status().LastError, "not trusted")
		r.stop()
		r = w.run(t) // and after a restart
		time.Sleep(5 * time.Minute)
		if s := r.Status(); s.Connected || w.CallCount("AttestAgent") != attested {
			t.Errorf("after a restart it attested to whoever has the key: %+v", s)
		}
	})
}

func TestARevokedAuthorityVouchesForNoServerByAJoinString(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		w.AgentTTL = 10 * time.Minute
		before := w.Join(newToken) // it pins what is revoked after
		r := w.run(t)
		r.connected(t)
		w.impostor(t, r)
		r.stop()
		w.Stop()
		w.Start()
		w.options.TrustBundle, w.options.Join, w.options.Attestor = nil, before, joinToken(t, newToken)
		r = w.run(t)
		time.Sleep(15 * time.Minute)
		if s := r.Status(); s.Connected || len(w.Seen) != 0 {
			t.Errorf("it sent its token to whoever has the key: %+v", s)
		}
		wantError(t, r.Status().LastError, "none of its roots is pinned")
	})
}

func TestAnAuthorityThatComesBackIsNotDisowned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		r := w.run(t)
		r.connected(t)
		with := w.CurrentBundle()
		w.Rotate()
		without := w.CurrentBundle()
		without.X509Authorities = without.X509Authorities[1:]
		if err := r.SetBundle(without); err != nil {
			t.Fatal(err)
		}
		with.X509Authorities = append(with.X509Authorities, without.X509Authorities...)
		if err := r.SetBundle(with); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		r.connected(t)
		if _, err := os.Stat(filepath.Join(w.options.Dir, "disowned.pem")); !os.IsNotExist(err) {
			t.Errorf("it is remembered: %v", err)
		}
	})
}

func TestANodeThatMissedARotationStartsAnewFromItsNewJoinString(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		r.stop()
		w.Rotate()
		w.Revoke()

		// With what it has it cannot know the server.
		r = w.run(t)
		time.Sleep(time.Minute)
		if r.Status().Connected {
			t.Error("it trusts a server that nobody vouches for")
		}
		r.stop()

		w.options.Join, w.options.Attestor = w.Join(newToken), joinToken(t, newToken)
		r = w.run(t)
		began := time.Now()
		if l := r.connected(t); l.ID().Path() != "/spire/agent/join_token/"+newToken || time.Since(began) > time.Second {
			t.Errorf("after %v it is %s", time.Since(began), l.ID())
		}
	})
}

func TestADamagedListOfRevokedAuthoritiesIsNotPassedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		r := w.run(t)
		r.connected(t)
		r.stop()
		for _, damage := range []string{"nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
			if err := os.WriteFile(filepath.Join(w.options.Dir, "disowned.pem"), []byte(damage), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := node.Open(w.options)
			wantError(t, err, "disowned.pem is damaged")
		}
	})
}
