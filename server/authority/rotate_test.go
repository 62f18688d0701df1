package authority_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

func TestRotationGoesThroughItsStatesOnSchedule(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	for _, kind := range everyKind {
		first, _, _ := a.State(kind)
		if kind != registry.X509 { // the case before has moved the clock
			w = newWorld(t)
			a = w.open()
			first, _, _ = a.State(kind)
		}
		at := func(age time.Duration) {
			t.Helper()
			w.add(first.CreatedAt.Add(age).Sub(w.time()))
			w.rotate(a)
		}

		at(12*time.Hour - time.Second)
		if _, prepared, _ := a.State(kind); prepared != nil {
			t.Fatalf("%s: prepared before half of the life", kind)
		}
		at(12 * time.Hour)
		active, second, _ := a.State(kind)
		if second == nil || !w.published(second) || active.ID != first.ID {
			t.Fatalf("%s: at half of the life the next is not prepared and published, or signs already", kind)
		}
		at(20*time.Hour - time.Second)
		if w.signing(a, kind) != first.ID {
			t.Fatalf("%s: the next signs before a sixth of the life is left", kind)
		}
		at(20 * time.Hour)
		active, prepared, old := a.State(kind)
		if active.ID != second.ID || prepared != nil || len(old) != 1 || old[0].ID != first.ID {
			t.Fatalf("%s: with a sixth of the life left the next is not active and the former old", kind)
		}
		if !active.ActivatedAt.Equal(w.time().Truncate(time.Second)) {
			t.Errorf("%s: activated at %s, want %s", kind, active.ActivatedAt, w.time())
		}
		if w.signing(a, kind) != second.ID {
			t.Errorf("%s: the active one does not sign", kind)
		}
		at(24*time.Hour + 5*time.Minute)
		if !w.published(first) || !w.hasKey(first) {
			t.Fatalf("%s: the old one has left the bundle while clocks that are behind accept it", kind)
		}
		at(24*time.Hour + 5*time.Minute + time.Second)
		if w.published(first) || w.hasKey(first) {
			t.Errorf("%s: the expired one is still in the bundle or its key is still there", kind)
		}
		for _, r := range w.registry.View().Authorities() {
			if r.ID == first.ID {
				t.Errorf("%s: the expired one is still recorded", kind)
			}
		}
		if got := w.signing(a, kind); got != second.ID {
			t.Errorf("%s: %s signs, want %s", kind, got, second.ID)
		}
	}
}

func TestLongLivedAuthoritiesArePreparedThirtyAndActivatedSevenDaysBeforeTheirEnd(t *testing.T) {
	w := newWorld(t)
	const year, day = 365 * 24 * time.Hour, 24 * time.Hour
	a := w.open(func(o *authority.Options) { o.X509Lifetime, o.JWTLifetime, o.WITLifetime = year, year, year })
	first, _, _ := a.State(registry.X509)
	next := w.rotate(a)
	if want := first.ExpiresAt.Add(-30 * day); !next.Equal(want) {
		t.Fatalf("the next step is at %s, want %s", next, want)
	}
	w.add(next.Sub(w.time()))
	next = w.rotate(a)
	if want := first.ExpiresAt.Add(-7 * day); !next.Equal(want) {
		t.Fatalf("after preparing, the next step is at %s, want %s", next, want)
	}
}

func TestAnAuthorityThatIsPreparedLateSpreadsBeforeItSigns(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	for _, kind := range everyKind {
		first, _, _ := a.State(kind)
		w.add(first.ExpiresAt.Add(-time.Hour).Sub(w.time())) // the time to activate is long past
		w.rotate(a)
		_, prepared, _ := a.State(kind)
		if prepared == nil || w.signing(a, kind) != first.ID {
			t.Fatalf("%s: the next is not prepared, or signs at once", kind)
		}
		w.add(9 * time.Minute)
		w.rotate(a)
		if w.signing(a, kind) != first.ID {
			t.Fatalf("%s: the next signs 9 minutes after it was published", kind)
		}
		w.add(time.Minute + time.Second)
		w.rotate(a)
		if w.signing(a, kind) != prepared.ID {
			t.Fatalf("%s: the next does not sign 10 minutes after it was published", kind)
		}
	}
}

func TestAClockThatJumpsOverEverythingIsRecoveredFrom(t *testing.T) {
	for name, before := range map[string]time.Duration{"with none prepared": time.Hour, "with one prepared": 13 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			a := w.open()
			w.add(before)
			w.rotate(a)
			w.add(72 * time.Hour)
			for _, kind := range everyKind {
				if err := signError(a, kind); !errors.Is(err, authority.ErrUnavailable) {
					t.Fatalf("%s: got error %v from an expired authority", kind, err)
				}
			}
			w.rotate(a)
			for _, kind := range everyKind {
				active, prepared, old := a.State(kind)
				if active == nil || !active.CreatedAt.Equal(w.time().Truncate(time.Second)) || prepared != nil || len(old) != 0 {
					t.Fatalf("%s: active %v, prepared %v, %d old; want a new one alone", kind, active, prepared, len(old))
				}
				if w.signing(a, kind) != active.ID || !w.published(active) {
					t.Errorf("%s: the new one does not sign or is not in the bundle", kind)
				}
			}
			if b := w.bundle(); len(b.X509Authorities) != 1 || len(b.JWTAuthorities) != 1 || len(b.WITAuthorities) != 1 {
				t.Errorf("the bundle is %s; want what is active alone", b)
			}
		})
	}
}

func TestAPreparedAuthorityTakesOverWhenTheActiveOneHasExpired(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	w.add(13 * time.Hour)
	w.rotate(a)
	prepared := make(map[registry.AuthorityKind]string)
	for _, kind := range everyKind {
		_, p, _ := a.State(kind)
		prepared[kind] = p.ID
	}
	w.add(12 * time.Hour) // the first has expired, the prepared one lives
	w.rotate(a)
	for _, kind := range everyKind {
		if got := w.signing(a, kind); got != prepared[kind] {
			t.Errorf("%s: %s signs, want %s, which was prepared", kind, got, prepared[kind])
		}
	}
}

func TestAClockThatJumpsBackIsRecoveredFrom(t *testing.T) {
	w := newWorld(t)
	w.add(365 * 24 * time.Hour)
	a := w.open()
	w.add(-365 * 24 * time.Hour)
	wrong := make(map[registry.AuthorityKind]string)
	for _, kind := range everyKind {
		active, _, _ := a.State(kind)
		wrong[kind] = active.ID
	}
	if err := signError(a, registry.X509); !errors.Is(err, authority.ErrUnavailable) {
		t.Fatalf("got error %v from a certificate that is not valid yet", err)
	}
	w.rotate(a)
	for _, kind := range everyKind {
		active, _, _ := a.State(kind)
		if active.ID == wrong[kind] || !active.CreatedAt.Equal(start.Truncate(time.Second)) {
			t.Errorf("%s: the authority from the future is still active", kind)
		}
		if w.signing(a, kind) != active.ID {
			t.Errorf("%s: the new one does not sign", kind)
		}
	}
}

func TestRunRecoversAtOnceWhenASignatureFindsNoAuthority(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	w.log.await(t, len(everyKind), "authority activated")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- a.Run(ctx) }()
	w.add(72 * time.Hour) // Run sleeps for a minute of the test's time
	if err := signError(a, registry.X509); err != nil && !errors.Is(err, authority.ErrUnavailable) {
		t.Fatal(err)
	}
	w.log.await(t, len(everyKind), "authority activated")
	for _, kind := range everyKind {
		w.signing(a, kind)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
}

func TestAFailingStoreLeavesTheAuthoritiesAsTheyWereAndNoKeysBehind(t *testing.T) {
	w := newWorld(t)
	counting := &countingKeys{KeyManager: w.keys}
	w.keys = counting
	a := w.open()
	before := w.signing(a, registry.X509)
	w.add(13 * time.Hour)
	w.store.fail.Store(true)
	for range 5 {
		if _, err := a.Rotate(context.Background()); !errors.Is(err, errDisk) {
			t.Fatalf("got error %v, want the store's", err)
		}
	}
	if _, prepared, _ := a.State(registry.X509); prepared != nil || w.signing(a, registry.X509) != before {
		t.Error("something has changed although the store failed")
	}
	if made := counting.made.Load(); made != 4 {
		t.Errorf("%d keys were made; want 3 for the active ones and 1 that waits for the next try", made)
	}
	w.store.fail.Store(false)
	w.rotate(a)
	if made := counting.made.Load(); made != 6 {
		t.Errorf("%d keys were made; want 6, of which one waited", made)
	}
	for _, kind := range everyKind {
		if _, prepared, _ := a.State(kind); prepared == nil {
			t.Errorf("%s: none is prepared after the store has recovered", kind)
		}
	}
}

func TestAWriteThatHappenedAlthoughItFailedIsNotLost(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	w.add(13 * time.Hour)
	w.store.lie.Store(true)
	if _, err := a.Rotate(context.Background()); !errors.Is(err, errDisk) {
		t.Fatalf("got error %v, want the store's", err)
	}
	w.store.lie.Store(false)
	for _, err := a.Rotate(context.Background()); err != nil; _, err = a.Rotate(context.Background()) {
		t.Log(err) // the registry may not have seen the write yet
	}
	w.add(8 * time.Hour)
	w.rotate(a)
	for _, kind := range everyKind {
		active, _, old := a.State(kind)
		if len(old) != 1 || w.signing(a, kind) != active.ID || !w.hasKey(active) {
			t.Errorf("%s: rotation did not go on after a write that failed to be confirmed", kind)
		}
	}
}

type countingKeys struct {
	apiv1.KeyManager
	made atomic.Int32
}

func (k *countingKeys) CreateKey(req *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	k.made.Add(1)
	return k.KeyManager.CreateKey(req)
}

func TestPreparingReplacesWhatIsPrepared(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	for _, kind := range everyKind {
		first, err := a.Prepare(context.Background(), kind)
		if err != nil {
			t.Fatal(err)
		}
		if first.State != registry.Prepared || !w.published(first) {
			t.Fatalf("%s: state %s, in the bundle: %v", kind, first.State, w.published(first))
		}
		second, err := a.Prepare(context.Background(), kind)
		if err != nil {
			t.Fatal(err)
		}
		if _, prepared, _ := a.State(kind); prepared == nil || prepared.ID != second.ID || second.ID == first.ID {
			t.Errorf("%s: the second is not the prepared one", kind)
		}
		if w.published(first) || w.hasKey(first) || !w.published(second) {
			t.Errorf("%s: the first is still in the bundle, or the second is not", kind)
		}
	}
}

func TestActivationOnDemand(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	ctx := context.Background()
	wantKind := func(err error, want registry.ErrorKind) {
		t.Helper()
		if e, ok := errors.AsType[*registry.Error](err); !ok || e.Kind != want {
			t.Errorf("got error %v, want one of kind %d", err, want)
		}
	}
	for _, kind := range everyKind {
		former := w.signing(a, kind)
		_, err := a.Activate(ctx, kind, "")
		wantKind(err, registry.Invalid)
		_, err = a.Activate(ctx, kind, former)
		wantKind(err, registry.FailedPrecondition) // none is prepared
		next, err := a.Prepare(ctx, kind)
		if err != nil {
			t.Fatal(err)
		}
		_, err = a.Activate(ctx, kind, former)
		wantKind(err, registry.Invalid) // another is prepared
		if got := w.signing(a, kind); got != former {
			t.Fatalf("%s: %s signs after attempts that failed, want %s", kind, got, former)
		}
		got, err := a.Activate(ctx, kind, next.ID)
		if err != nil {
			t.Fatal(err)
		}
		if got.State != registry.Active || w.signing(a, kind) != next.ID {
			t.Errorf("%s: state %s, signing is %s, want %s", kind, got.State, w.signing(a, kind), next.ID)
		}
		if _, _, old := a.State(kind); len(old) != 1 || old[0].ID != former || !w.published(old[0]) {
			t.Errorf("%s: the former is not an old one in the bundle", kind)
		}
	}
}

func TestOldAuthoritiesAreBoundedInNumber(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	ctx := context.Background()
	for range 50 {
		next, err := a.Prepare(ctx, registry.JWT)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Activate(ctx, registry.JWT, next.ID); err != nil {
			t.Fatal(err)
		}
	}
	_, err := a.Prepare(ctx, registry.JWT)
	if e, ok := errors.AsType[*registry.Error](err); !ok || e.Kind != registry.FailedPrecondition {
		t.Errorf("got error %v for the 51st, want one of a failed precondition", err)
	}
	w.add(30 * time.Hour)
	w.rotate(a) // more than one transaction takes
	if n := len(w.registry.View().Authorities()); n != len(everyKind) {
		t.Errorf("%d authorities are left after all old ones have expired; want one of each kind", n)
	}
	if _, err := a.Prepare(ctx, registry.JWT); err != nil {
		t.Error(err)
	}
}

func TestAnAuthorityThatIsNotInTheBundleNeverSigns(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	ctx := context.Background()
	for _, kind := range everyKind {
		next, err := a.Prepare(ctx, kind)
		if err != nil {
			t.Fatal(err)
		}
		clear := func(b *bundle.Bundle) error {
			b.X509Authorities, b.JWTAuthorities, b.WITAuthorities = nil, nil, nil
			return nil
		}
		if _, err := w.registry.ChangeBundle(ctx, td, clear); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Activate(ctx, kind, next.ID); err == nil {
			t.Errorf("%s: activated although it is not in the bundle", kind)
		}
		w.rotate(a) // mends it
		for _, kind := range everyKind {
			active, _, _ := a.State(kind)
			if !w.published(active) || w.signing(a, kind) != active.ID {
				t.Errorf("%s: what signs is not in the bundle", kind)
			}
		}
	}
}
