package authority_test

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// start is when the tests' clocks begin.
var start = time.Date(2026, 3, 1, 12, 0, 0, 123456789, time.UTC)

var bothKinds = []registry.AuthorityKind{registry.X509, registry.JWT}

// world is a registry in memory, a key manager and a clock: what outlives a
// server.
type world struct {
	tb       testing.TB
	registry *registry.Registry
	store    *faultyStore
	keys     apiv1.KeyManager
	log      *events

	mu  sync.Mutex
	now time.Time
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	db, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		tb.Fatal(err)
	}
	w := &world{tb: tb, store: &faultyStore{Store: db}, keys: authority.NewMemoryKeys(), log: newEvents(), now: start}
	ctx, cancel := context.WithCancel(context.Background())
	w.registry, err = registry.Open(ctx, registry.Options{Store: w.store, TrustDomain: td, Now: w.time})
	if err != nil {
		tb.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.registry.Run(ctx)
	}()
	tb.Cleanup(func() {
		cancel()
		<-done
		if err := db.Close(); err != nil {
			tb.Error(err)
		}
	})
	return w
}

func (w *world) time() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) add(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

// tryOpen starts a server's authorities, as a start or restart of it would.
func (w *world) tryOpen(change ...func(*authority.Options)) (*authority.Authorities, error) {
	o := authority.Options{
		Registry: w.registry, Keys: w.keys, TrustDomain: td, Server: "server-1",
		Now: w.time, Log: slog.New(w.log),
	}
	for _, c := range change {
		c(&o)
	}
	return authority.Open(context.Background(), o)
}

func (w *world) open(change ...func(*authority.Options)) *authority.Authorities {
	w.tb.Helper()
	a, err := w.tryOpen(change...)
	if err != nil {
		w.tb.Fatal(err)
	}
	return a
}

func (w *world) rotate(a *authority.Authorities) time.Time {
	w.tb.Helper()
	next, err := a.Rotate(context.Background())
	if err != nil {
		w.tb.Fatal(err)
	}
	return next
}

func (w *world) bundle() *bundle.Bundle { return w.registry.View().Bundle(td) }

// published reports whether an authority is in the bundle.
func (w *world) published(r *registry.Authority) bool {
	if r.Kind == registry.X509 {
		return w.bundle().HasX509(r.Chain[0])
	}
	return w.bundle().JWTKey(r.ID) != nil
}

func (w *world) hasKey(r *registry.Authority) bool {
	_, err := w.keys.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: r.KeyName})
	return err == nil
}

// signing returns the ID of the authority that signs.
func (w *world) signing(a *authority.Authorities, kind registry.AuthorityKind) string {
	w.tb.Helper()
	if kind == registry.X509 {
		x, err := a.X509()
		if err != nil {
			w.tb.Fatal(err)
		}
		return x.ID
	}
	j, err := a.JWT()
	if err != nil {
		w.tb.Fatal(err)
	}
	return j.ID
}

func signError(a *authority.Authorities, kind registry.AuthorityKind) (err error) {
	if kind == registry.X509 {
		_, err = a.X509()
	} else {
		_, err = a.JWT()
	}
	return err
}

// faultyStore is a store that fails when told to.
type faultyStore struct {
	store.Store
	fail atomic.Bool // writes nothing and says so
	lie  atomic.Bool // writes, and says it did not
}

var errDisk = errors.New("disk on fire")

func (s *faultyStore) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	if s.fail.Load() {
		out := make([]store.Result, len(txns))
		for i := range out {
			out[i].Err = errDisk
		}
		return out
	}
	out := s.Store.Commit(ctx, txns...)
	if s.lie.Load() {
		for i := range out {
			out[i] = store.Result{Err: errDisk}
		}
	}
	return out
}

// events is a log whose lines can be waited for.
type events struct {
	lines chan string
}

func newEvents() *events { return &events{lines: make(chan string, 10_000)} }

func (e *events) Enabled(context.Context, slog.Level) bool { return true }
func (e *events) WithAttrs([]slog.Attr) slog.Handler       { return e }
func (e *events) WithGroup(string) slog.Handler            { return e }
func (e *events) Handle(_ context.Context, r slog.Record) error {
	e.lines <- r.Message
	return nil
}

// await waits for a number of lines with a message.
func (e *events) await(tb testing.TB, n int, message string) {
	tb.Helper()
	timeout := time.After(30 * time.Second)
	for n > 0 {
		select {
		case line := <-e.lines:
			if line == message {
				n--
			}
		case <-timeout:
			tb.Fatalf("no line %q in the log", message)
		}
	}
}

func TestAFirstStartMakesAndActivatesAnAuthorityOfEachKind(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	for _, kind := range bothKinds {
		active, prepared, old := a.State(kind)
		if active == nil || prepared != nil || len(old) != 0 {
			t.Fatalf("%s: active %v, prepared %v, %d old; want one that is active", kind, active, prepared, len(old))
		}
		if got := w.signing(a, kind); got != active.ID {
			t.Errorf("%s: %s signs, but %s is active", kind, got, active.ID)
		}
		if !w.published(active) {
			t.Errorf("%s: the active authority is not in the bundle", kind)
		}
		if life := active.ExpiresAt.Sub(active.CreatedAt); life != 24*time.Hour {
			t.Errorf("%s: lives %s, want the default of 24h", kind, life)
		}
	}
	x, err := a.X509()
	if err != nil {
		t.Fatal(err)
	}
	if x.Remote || len(x.Chain) != 0 {
		t.Errorf("a self-signed authority with a key in software has Remote %v and a chain of %d", x.Remote, len(x.Chain))
	}
	again, err := a.X509()
	if err != nil || again != x {
		t.Error("the same authority came as another pointer")
	}
}

func TestASecondStartWithItsKeysContinues_JW06(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir() + "/keys"
	w.keys = diskKeys(t, dir)
	a := w.open()
	w.add(13 * time.Hour)
	w.rotate(a) // the next ones are prepared
	w.keys = diskKeys(t, dir)
	b := w.open()
	for _, kind := range bothKinds {
		active, prepared, _ := a.State(kind)
		if got := w.signing(b, kind); got != active.ID {
			t.Errorf("%s: %s signs after a restart, %s before", kind, got, active.ID)
		}
		if _, p, _ := b.State(kind); p == nil || p.ID != prepared.ID {
			t.Errorf("%s: another authority is prepared after a restart", kind)
		}
	}
	w.add(8 * time.Hour)
	w.rotate(b) // the prepared ones sign: their keys were found again
	for _, kind := range bothKinds {
		w.signing(b, kind)
	}
}

func TestAuthoritiesWhoseKeysAreLostStayInTheBundleAndOthersTakeTheirPlace(t *testing.T) {
	for name, lose := range map[string]func(w *world, r *registry.Authority){
		"gone": func(w *world, r *registry.Authority) {
			if err := w.keys.(apiv1.KeyDeleter).DeleteKey(&apiv1.DeleteKeyRequest{Name: r.KeyName}); err != nil {
				t.Fatal(err)
			}
		},
		"another one": func(w *world, r *registry.Authority) {
			if err := w.keys.(apiv1.KeyDeleter).DeleteKey(&apiv1.DeleteKeyRequest{Name: r.KeyName}); err != nil {
				t.Fatal(err)
			}
			createKey(t, w.keys, r.KeyName)
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			a := w.open()
			lost := make(map[registry.AuthorityKind]*registry.Authority)
			for _, kind := range bothKinds {
				lost[kind], _, _ = a.State(kind)
				lose(w, lost[kind])
			}
			w.add(time.Hour)
			b := w.open()
			for _, kind := range bothKinds {
				active, _, old := b.State(kind)
				if active == nil || active.ID == lost[kind].ID {
					t.Fatalf("%s: no other authority is active", kind)
				}
				if len(old) != 1 || old[0].ID != lost[kind].ID {
					t.Errorf("%s: the lost authority is not an old one", kind)
				}
				if !w.published(lost[kind]) {
					t.Errorf("%s: the lost authority has left the bundle", kind)
				}
				if got := w.signing(b, kind); got != active.ID {
					t.Errorf("%s: %s signs, but %s is active", kind, got, active.ID)
				}
			}
		})
	}
}

func TestAKeyManagerThatFailsIsNotAKeyThatIsLost(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.keys = &brokenKeys{KeyManager: w.keys}
	if _, err := w.tryOpen(); !errors.Is(err, errDevice) {
		t.Fatalf("got error %v, want the key manager's", err)
	}
	for _, r := range w.registry.View().Authorities() {
		if r.State != registry.Active {
			t.Errorf("%s authority is %s after the key manager has failed", r.Kind, r.State)
		}
	}
}

var errDevice = errors.New("no answer from the device")

type brokenKeys struct{ apiv1.KeyManager }

func (k *brokenKeys) CreateSigner(*apiv1.CreateSignerRequest) (crypto.Signer, error) {
	return nil, errDevice
}

func TestRotationGoesThroughItsStatesOnSchedule(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	for _, kind := range bothKinds {
		first, _, _ := a.State(kind)
		if kind == registry.JWT { // the X.509 case has moved the clock
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
	a := w.open(func(o *authority.Options) { o.X509Lifetime, o.JWTLifetime = year, year })
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
	for _, kind := range bothKinds {
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
			for _, kind := range bothKinds {
				if err := signError(a, kind); !errors.Is(err, authority.ErrUnavailable) {
					t.Fatalf("%s: got error %v from an expired authority", kind, err)
				}
			}
			w.rotate(a)
			for _, kind := range bothKinds {
				active, prepared, old := a.State(kind)
				if active == nil || !active.CreatedAt.Equal(w.time().Truncate(time.Second)) || prepared != nil || len(old) != 0 {
					t.Fatalf("%s: active %v, prepared %v, %d old; want a new one alone", kind, active, prepared, len(old))
				}
				if w.signing(a, kind) != active.ID || !w.published(active) {
					t.Errorf("%s: the new one does not sign or is not in the bundle", kind)
				}
			}
			if b := w.bundle(); len(b.X509Authorities) != 1 || len(b.JWTAuthorities) != 1 {
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
	for _, kind := range bothKinds {
		_, p, _ := a.State(kind)
		prepared[kind] = p.ID
	}
	w.add(12 * time.Hour) // the first has expired, the prepared one lives
	w.rotate(a)
	for _, kind := range bothKinds {
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
	for _, kind := range bothKinds {
		active, _, _ := a.State(kind)
		wrong[kind] = active.ID
	}
	if err := signError(a, registry.X509); !errors.Is(err, authority.ErrUnavailable) {
		t.Fatalf("got error %v from a certificate that is not valid yet", err)
	}
	w.rotate(a)
	for _, kind := range bothKinds {
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
	w.log.await(t, 2, "authority activated")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- a.Run(ctx) }()
	w.add(72 * time.Hour) // Run sleeps for a minute of the test's time
	if err := signError(a, registry.X509); err != nil && !errors.Is(err, authority.ErrUnavailable) {
		t.Fatal(err)
	}
	w.log.await(t, 2, "authority activated")
	for _, kind := range bothKinds {
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
	if made := counting.made.Load(); made != 3 {
		t.Errorf("%d keys were made; want 2 for the active ones and 1 that waits for the next try", made)
	}
	w.store.fail.Store(false)
	w.rotate(a)
	if made := counting.made.Load(); made != 4 {
		t.Errorf("%d keys were made; want 4, of which one waited", made)
	}
	for _, kind := range bothKinds {
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
	for _, kind := range bothKinds {
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
	for _, kind := range bothKinds {
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
	for _, kind := range bothKinds {
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
	if n := len(w.registry.View().Authorities()); n != 2 {
		t.Errorf("%d authorities are left after all old ones have expired; want 2", n)
	}
	if _, err := a.Prepare(ctx, registry.JWT); err != nil {
		t.Error(err)
	}
}

func TestAnAuthorityThatIsNotInTheBundleNeverSigns(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	ctx := context.Background()
	for _, kind := range bothKinds {
		next, err := a.Prepare(ctx, kind)
		if err != nil {
			t.Fatal(err)
		}
		clear := func(b *bundle.Bundle) error {
			b.X509Authorities, b.JWTAuthorities = nil, nil
			return nil
		}
		if _, err := w.registry.ChangeBundle(ctx, td, clear); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Activate(ctx, kind, next.ID); err == nil {
			t.Errorf("%s: activated although it is not in the bundle", kind)
		}
		w.rotate(a) // mends it
		for _, kind := range bothKinds {
			active, _, _ := a.State(kind)
			if !w.published(active) || w.signing(a, kind) != active.ID {
				t.Errorf("%s: what signs is not in the bundle", kind)
			}
		}
	}
}

func TestServersThatShareARegistryHaveTheirOwnAuthorities(t *testing.T) {
	w := newWorld(t)
	first := w.open()
	second := w.open(func(o *authority.Options) { o.Server, o.Keys = "server-2", authority.NewMemoryKeys() })
	for _, kind := range bothKinds {
		if w.signing(first, kind) == w.signing(second, kind) {
			t.Errorf("%s: both servers sign with one authority", kind)
		}
	}
	if b := w.bundle(); len(b.X509Authorities) != 2 || len(b.JWTAuthorities) != 2 {
		t.Fatalf("the bundle is %s; want the authorities of both servers", b)
	}
	// The second never comes back. The first keeps its own, and a day after
	// the end forgets the other's.
	for w.time().Before(start.Add(48*time.Hour + time.Minute)) {
		w.add(time.Hour)
		w.rotate(first)
	}
	for _, r := range w.registry.View().Authorities() {
		if r.Server != "server-1" {
			t.Errorf("%s authority of %s is still recorded a day after its end", r.Kind, r.Server)
		}
	}
}

func TestImpossibleOptionsAreRefused(t *testing.T) {
	w := newWorld(t)
	for name, change := range map[string]func(*authority.Options){
		"no name":        func(o *authority.Options) { o.Server = "" },
		"short X.509":    func(o *authority.Options) { o.X509Lifetime = time.Second },
		"long X.509":     func(o *authority.Options) { o.X509Lifetime = authority.MaxLifetime + 1 },
		"negative JWT":   func(o *authority.Options) { o.JWTLifetime = -time.Hour },
		"unknown key":    func(o *authority.Options) { o.X509KeyType = 99 },
		"name of a path": func(o *authority.Options) { o.Server = "a/b" },
	} {
		if _, err := w.tryOpen(change); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

func TestConcurrentRotationsAgree(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	w.add(25 * time.Hour)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := a.Rotate(context.Background()); err != nil {
				t.Error(err)
			}
			for _, kind := range bothKinds {
				if err := signError(a, kind); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(w.registry.View().Authorities()); n != 2 { // those that expired an hour ago are gone
		t.Errorf("%d authorities; want one of each kind", n)
	}
}
