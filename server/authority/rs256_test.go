package authority_test

import (
	"context"
	"crypto/rsa"
	"slices"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

func withRS256(o *authority.Options) { o.JWTRS256, o.WIT = true, false }

// signsRS256 returns the authority that signs with RS256.
func signsRS256(t *testing.T, a *authority.Authorities) *authority.JWT {
	t.Helper()
	j, err := a.JWTRS256()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := j.Signer.Public().(*rsa.PublicKey); !ok || j.Algorithm != jose.RS256 {
		t.Fatalf("it is a %T for %s", j.Signer.Public(), j.Algorithm)
	}
	return j
}

func TestAnAuthorityForRS256IsInTheBundleBesideTheOtherAndRotatesWithIt(t *testing.T) {
	w := newWorld(t)
	a := w.open(withRS256)
	ec, err := a.JWT()
	if err != nil {
		t.Fatal(err)
	}
	first := signsRS256(t, a)
	if b := w.bundle(); ec.Algorithm != jose.ES256 || len(b.JWTAuthorities) != 2 || b.JWTKey(first.ID) == nil || b.JWTKey(ec.ID) == nil {
		t.Fatalf("signs with %s; bundle %s", ec.Algorithm, b)
	}
	// By schedule.
	w.add(13 * time.Hour)
	w.rotate(a)
	_, prepared, _ := a.State(registry.JWTRS256)
	if prepared == nil || !w.published(prepared) || signsRS256(t, a).ID != first.ID {
		t.Fatal("at half of its life another is not prepared, in the bundle and silent")
	}
	w.add(8 * time.Hour)
	w.rotate(a)
	if got := signsRS256(t, a).ID; got != prepared.ID || w.bundle().JWTKey(first.ID) == nil {
		t.Errorf("%s signs, want %s; the old one in the bundle: %v", got, prepared.ID, w.bundle().JWTKey(first.ID) != nil)
	}
	// On demand, with the other.
	next, err := a.Prepare(context.Background(), registry.JWT)
	if err != nil {
		t.Fatal(err)
	}
	_, nextRSA, _ := a.State(registry.JWTRS256)
	if _, err := a.Activate(context.Background(), registry.JWT, next.ID); err != nil {
		t.Fatal(err)
	}
	if nextRSA == nil || signsRS256(t, a).ID != nextRSA.ID || w.signing(a, registry.JWT) != next.ID {
		t.Error("both kinds were not replaced")
	}
	// What may have leaked goes.
	if _, err := a.Taint(context.Background(), registry.JWTRS256, prepared.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Revoke(context.Background(), registry.JWTRS256, prepared.ID); err != nil {
		t.Fatal(err)
	}
	if w.published(prepared) || w.hasKey(prepared) {
		t.Error("a revoked one is there")
	}
	// And a restart finds the one that signs.
	if got := signsRS256(t, w.open(withRS256)).ID; got != nextRSA.ID {
		t.Errorf("after a restart %s signs, want %s", got, nextRSA.ID)
	}
}

func TestAnAuthorityForRS256ThatNoProfileNeedsSignsNoMoreAndStaysUntilItEnds(t *testing.T) {
	w := newWorld(t)
	was, _, _ := w.open(withRS256).State(registry.JWTRS256)
	a := w.open(withoutWIT)
	if j, err := a.JWTRS256(); err == nil || slices.Contains(a.Kinds(), registry.JWTRS256) {
		t.Errorf("%v signs", j)
	}
	if got := w.record(was.ID); got == nil || got.State != registry.Old || !w.published(was) {
		t.Errorf("it is %+v; what it signed must verify", got)
	}
	w.add(25 * time.Hour)
	w.rotate(a)
	if w.published(was) || w.hasKey(was) || w.record(was.ID) != nil {
		t.Error("it is there after its end")
	}
}
