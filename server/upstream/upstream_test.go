package upstream_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/test/harness"
)

// issued issues an SVID, and checks that whoever has nothing but the bundle's
// roots accepts it.
func issued(t *testing.T, w *world, a *authority.Authorities) *issue.X509SVID {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	issuer := issue.New(issue.Options{TrustDomain: td, Authorities: a, Now: w.time})
	id := spiffeid.RequireFromPath(td, "/web")
	svid, err := issuer.WorkloadX509(t.Context(), &entry.Entry{ID: "e", SPIFFEID: id}, csr)
	must(t, err)
	roots := x509bundle.New(td)
	for _, x := range w.bundle().X509Authorities {
		roots.AddX509Authority(x.Certificate)
	}
	if got, _, err := x509svid.ParseAndVerify(svid.Chain, roots, x509svid.WithTime(w.time())); err != nil || got != id {
		t.Fatalf("the SVID does not verify: %v, %v", got, err)
	}
	return svid
}

func TestUpstream_ID26_X12_X16_RF05_RF06_RF07_RF08_RF11_SVIDsVerifyWithTheRootAlone(t *testing.T) {
	harness.NeedCommand(t, "openssl")
	eachKind(t, func(t *testing.T, w *world) {
		a := w.open()
		svid := issued(t, w, a)
		if len(svid.Chain) != 3 {
			t.Errorf("the chain has %d certificates; want the leaf, the server's authority and the CA's issuing one", len(svid.Chain))
		}
		if b := w.bundle(); len(b.X509Authorities) != 1 || !b.X509Authorities[0].Certificate.Equal(w.ca.Root()) {
			t.Errorf("the bundle has %d roots; want that of the CA", len(b.X509Authorities))
		}
		x, err := a.X509()
		must(t, err)
		if own := x.Certificate; own.NotAfter.After(x.Chain[1].NotAfter) || len(own.URIs) != 1 || own.URIs[0].String() != td.IDString() {
			t.Errorf("the authority is of %v until %v", own.URIs, own.NotAfter)
		}
		var files []string
		for i, der := range svid.Chain {
			path := filepath.Join(w.dir, "cert"+string(rune('0'+i))+".pem")
			must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
			files = append(files, path)
		}
		root := filepath.Join(w.dir, "root.pem")
		must(t, os.WriteFile(root, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.ca.Root().Raw}), 0o600))
		out, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", root, "-untrusted", files[1], "-untrusted", files[2], files[0]).CombinedOutput()
		if err != nil {
			t.Errorf("openssl: %v\n%s", err, out)
		}
	})
}

func TestARestartGoesOnWithTheAuthorityThatThereIs(t *testing.T) {
	eachKind(t, func(t *testing.T, w *world) {
		before, err := w.open().X509()
		must(t, err)
		up := w.open()
		w.down(true)
		must(t, func() error { _, err := up.Rotate(t.Context()); return err }())
		after, err := up.X509()
		must(t, err)
		if before.ID != after.ID {
			t.Errorf("%s signs after the restart, %s before", after.ID, before.ID)
		}
		issued(t, w, up)
	})
}

func TestAnAuthorityIsRenewedByTheTimeThatTheUpstreamGave(t *testing.T) {
	eachKind(t, func(t *testing.T, w *world) {
		w.ca.Most(6 * time.Hour) // 24 are asked for
		hours := 12
		if w.conf.Disk != nil { // which gives what is asked for
			hours = 48
		}
		a := w.open()
		first, err := a.X509()
		must(t, err)
		if life := first.Certificate.NotAfter.Sub(w.time()); life > 6*time.Hour && w.conf.Disk == nil {
			t.Fatalf("the authority lives for %v", life)
		}
		began := w.time()
		for h := 1; h <= hours; h++ {
			w.rotate(a, began.Add(time.Duration(h)*time.Hour))
			svid := issued(t, w, a)
			if left := svid.ExpiresAt.Sub(w.time()); left < 59*time.Minute {
				t.Errorf("after %d hours an SVID lives for %v", h, left)
			}
		}
		if last, err := a.X509(); err != nil || last.ID == first.ID {
			t.Errorf("the first authority still signs, %v", err)
		}
		if n := len(w.bundle().X509Authorities); n != 1 {
			t.Errorf("the bundle has %d roots", n)
		}
	})
}

func TestWithTheUpstreamDownTheServerGoesOnWithWhatItHas(t *testing.T) {
	eachKind(t, func(t *testing.T, w *world) {
		a := w.open()
		first, err := a.X509()
		must(t, err)
		jwt, err := a.JWT()
		must(t, err)
		w.down(true)
		w.add(13 * time.Hour) // the next authority is due
		next, err := a.Rotate(t.Context())
		must(t, err)
		if wait := next.Sub(w.time()); wait <= 0 || wait > time.Second {
			t.Errorf("after the first failure it waits for %v", wait)
		}
		longest := time.Duration(0)
		for range 12 {
			w.add(max(next.Sub(w.time()), 0))
			next, err = a.Rotate(t.Context())
			must(t, err)
			longest = max(longest, next.Sub(w.time()))
		}
		if longest < 10*time.Second || longest > time.Minute {
			t.Errorf("after many failures it waits for %v", longest)
		}
		if x, err := a.X509(); err != nil || x != first {
			t.Errorf("signs with %v, %v", x, err)
		}
		if j, err := a.JWT(); err != nil || j != jwt && j.ID == "" {
			t.Errorf("JWTs are signed with %v, %v", j, err)
		}
		issued(t, w, a)
		kind, _, asked := a.UpstreamState()
		if failure := a.UpstreamFailure(); failure == nil || kind == "" || asked[0].FailingSince.IsZero() || asked[0].NextTry.IsZero() {
			t.Errorf("it says of the upstream: %v, %+v", failure, asked)
		}
		w.down(false)
		w.add(time.Minute)
		_, err = a.Rotate(t.Context())
		must(t, err)
		if _, prepared, _ := a.State(registry.X509); prepared == nil || a.UpstreamFailure() != nil {
			t.Errorf("after the outage: prepared %v, failure %v", prepared, a.UpstreamFailure())
		}
	})
}

func TestAServerStartsWithTheUpstreamDownAndWaits(t *testing.T) {
	eachKind(t, func(t *testing.T, w *world) {
		up := w.tryOpen(t)
		w.down(true)
		a := up()
		if _, err := a.X509(); !errors.Is(err, authority.ErrUnavailable) {
			t.Errorf("signs without an authority: %v", err)
		}
		if _, err := a.JWT(); err != nil {
			t.Errorf("JWTs need no upstream of this kind: %v", err)
		}
		if a.UpstreamFailure() == nil {
			t.Error("it does not say that the upstream fails")
		}
		w.down(false)
		w.add(time.Minute)
		_, err := a.Rotate(t.Context())
		must(t, err)
		issued(t, w, a)
	})
}

func TestARootThatTheUpstreamHasNoLongerStaysUntilNothingLeadsToIt(t *testing.T) {
	eachKind(t, func(t *testing.T, w *world) {
		a := w.open()
		before := w.ca.Root()
		w.ca.Rotate(t)
		if w.conf.Disk != nil {
			w.ca.Files(t, w.dir)
		}
		began := w.time()
		seen, both := false, false
		for h := 1; h <= 60; h++ {
			w.rotate(a, began.Add(time.Duration(h)*time.Hour))
			issued(t, w, a)
			both = both || w.published(before) && w.published(w.ca.Root())
			if active, _, _ := a.State(registry.X509); authority.RootOf(active, w.bundle()).Equal(before) && !w.published(before) {
				t.Fatal("the root of the authority that signs is gone")
			}
			seen = seen || w.published(w.ca.Root())
		}
		if !seen || !both || w.published(before) {
			t.Errorf("the new root was published: %v, with the old one: %v; the old one still is: %v", seen, both, w.published(before))
		}
	})
}

func TestAnUpstreamThatLeavesTheNameOutIsToldWhatIsWrong(t *testing.T) {
	eachKind(t, func(t *testing.T, w *world) {
		if w.conf.Disk != nil {
			t.Skip("the server itself signs there")
		}
		w.ca.Change(func(c *x509.Certificate) { c.URIs = nil })
		a := w.open()
		if err := a.UpstreamFailure(); err == nil || !strings.Contains(err.Error(), "spiffe://example.org") || !strings.Contains(err.Error(), "URI") {
			t.Errorf("it says %v", err)
		}
	})
}
