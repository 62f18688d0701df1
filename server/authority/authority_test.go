package authority_test

import (
	"context"
	"crypto"
	"errors"
	"log/slog"
	"strings"
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

var everyKind = []registry.AuthorityKind{registry.X509, registry.JWT, registry.WIT}

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
		WIT: true, Now: w.time, Log: slog.New(w.log),
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
	if r.Kind == registry.WIT {
		return w.bundle().WITKey(r.ID) != nil
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
	sign := a.JWT
	if kind == registry.WIT {
		sign = a.WIT
	}
	j, err := sign()
	if err != nil {
		w.tb.Fatal(err)
	}
	return j.ID
}

func signError(a *authority.Authorities, kind registry.AuthorityKind) (err error) {
	switch kind {
	case registry.X509:
		_, err = a.X509()
	case registry.JWT:
		_, err = a.JWT()
	case registry.WIT:
		_, err = a.WIT()
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

// count returns how many lines with the beginning of a message there are that
// nobody has waited for yet. They are gone then.
func (e *events) count(message string) (n int) {
	for len(e.lines) > 0 {
		if strings.HasPrefix(<-e.lines, message) {
			n++
		}
	}
	return n
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
	for _, kind := range everyKind {
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

func TestNoIDBeginsLikeAFlag(t *testing.T) {
	seen := map[string]bool{}
	for first := range 256 {
		id := authority.IDOf(append([]byte{byte(first)}, make([]byte, 31)...))
		if strings.HasPrefix(id, "-") {
			t.Errorf("%q", id)
		}
		seen[id] = true
	}
	if len(seen) < 252 { // those of four begin with an underscore instead
		t.Errorf("%d IDs of 256 keys", len(seen))
	}
}

func TestASecondStartWithItsKeysContinues_JW06(t *testing.T) {
	w := newWorld(t)
	dir := t.TempDir() + "/keys"
	w.keys = diskKeys(t, dir)
	a := w.open()
	w.add(13 * time.Hour)
	w.rotate(a) // the next ones are prepared
	closed(t, w.keys)
	w.keys = diskKeys(t, dir)
	b := w.open()
	for _, kind := range everyKind {
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
	for _, kind := range everyKind {
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
			for _, kind := range everyKind {
				lost[kind], _, _ = a.State(kind)
				lose(w, lost[kind])
			}
			w.add(time.Hour)
			b := w.open()
			for _, kind := range everyKind {
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

func TestServersThatShareARegistryHaveTheirOwnAuthorities(t *testing.T) {
	w := newWorld(t)
	first := w.open()
	second := w.open(func(o *authority.Options) { o.Server, o.Keys = "server-2", authority.NewMemoryKeys() })
	for _, kind := range everyKind {
		if w.signing(first, kind) == w.signing(second, kind) {
			t.Errorf("%s: both servers sign with one authority", kind)
		}
	}
	if b := w.bundle(); len(b.X509Authorities) != 2 || len(b.JWTAuthorities) != 2 || len(b.WITAuthorities) != 2 {
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
		"short WIT":      func(o *authority.Options) { o.WITLifetime = time.Second },
		"unknown WIT":    func(o *authority.Options) { o.WITKeyType = -1 },
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
			for _, kind := range everyKind {
				if err := signError(a, kind); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if n := len(w.registry.View().Authorities()); n != len(everyKind) { // those that expired an hour ago are gone
		t.Errorf("%d authorities; want one of each kind", n)
	}
}
