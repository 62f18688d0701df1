package authority_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

// retire makes another authority sign and returns the one that did.
func (w *world) retire(a *authority.Authorities, kind registry.AuthorityKind) *registry.Authority {
	w.tb.Helper()
	former, _, _ := a.State(kind)
	next, err := a.Prepare(context.Background(), kind)
	if err == nil {
		_, err = a.Activate(context.Background(), kind, next.ID)
	}
	if err != nil {
		w.tb.Fatal(err)
	}
	return w.record(former.ID)
}

// record returns an authority as the registry has it, or nil.
func (w *world) record(id string) *registry.Authority {
	for _, r := range w.registry.View().Authorities() {
		if r.ID == id {
			return r
		}
	}
	return nil
}

// tainted returns the IDs of the authorities that a bundle marks as tainted.
func tainted(b *bundle.Bundle) (ids []string) {
	for _, x := range b.X509Authorities {
		if x.Tainted {
			ids = append(ids, string(x.Certificate.SubjectKeyId))
		}
	}
	for _, k := range slices.Concat(b.JWTAuthorities, b.WITAuthorities) {
		if k.Tainted {
			ids = append(ids, k.KeyID)
		}
	}
	return ids
}

func expectKind(t *testing.T, err error, kind registry.ErrorKind, text string) {
	t.Helper()
	if e, ok := errors.AsType[*registry.Error](err); !ok || e.Kind != kind || !strings.Contains(err.Error(), text) {
		t.Errorf("got error %v, want one of kind %d with %q", err, kind, text)
	}
}

func TestTaintMarksRecordAndBundleAndNothingElse(t *testing.T) {
	for _, kind := range everyKind {
		w := newWorld(t)
		a := w.open()
		old := w.retire(a, kind)
		signs, before := w.signing(a, kind), w.registry.View()
		got, err := a.Taint(context.Background(), kind, old.ID)
		if err != nil {
			t.Fatal(err)
		}
		if got.ID != old.ID || !got.Tainted || got.State != registry.Old {
			t.Errorf("%s: returned %+v", kind, got)
		}
		after := w.registry.View()
		if after.Revision() != before.Revision()+1 {
			t.Errorf("%s: took %d transactions, want 1", kind, after.Revision()-before.Revision())
		}
		b := w.bundle()
		if n := b.SequenceNumber - before.Bundle(td).SequenceNumber; n != 1 {
			t.Errorf("%s: the sequence number rose by %d, want 1", kind, n)
		}
		want := old.ID
		if kind == registry.X509 {
			want = string(old.Chain[0].SubjectKeyId)
		}
		if ids := tainted(b); len(ids) != 1 || ids[0] != want {
			t.Errorf("%s: the bundle marks %q, want %q alone", kind, ids, want)
		}
		if !w.published(old) || !w.hasKey(old) || !w.record(old.ID).Tainted {
			t.Errorf("%s: it must stay in the bundle, with its key, recorded as tainted", kind)
		}
		if got := w.signing(a, kind); got != signs {
			t.Errorf("%s: %s signs, before %s did", kind, got, signs)
		}

		// Again: nothing happens.
		if _, err := a.Taint(context.Background(), kind, old.ID); err != nil {
			t.Errorf("%s: tainted again: %v", kind, err)
		}
		if n := w.registry.View().Revision() - after.Revision(); n != 0 {
			t.Errorf("%s: tainting again wrote %d times", kind, n)
		}
		// It stays so over a restart.
		if _, _, old := w.open().State(kind); len(old) != 1 || !old[0].Tainted {
			t.Errorf("%s: after a restart it is not tainted", kind)
		}
	}
}

func TestRevokeTakesAnAuthorityOutOfEverything_T25(t *testing.T) {
	for _, kind := range everyKind {
		w := newWorld(t)
		a := w.open()
		old := w.retire(a, kind)
		if _, err := a.Taint(context.Background(), kind, old.ID); err != nil {
			t.Fatal(err)
		}
		before := w.registry.View()
		got, err := a.Revoke(context.Background(), kind, old.ID)
		if err != nil {
			t.Fatal(err)
		}
		if got.ID != old.ID || !got.Tainted {
			t.Errorf("%s: returned %+v", kind, got)
		}
		after := w.registry.View()
		if after.Revision() != before.Revision()+1 || after.Bundle(td).SequenceNumber != before.Bundle(td).SequenceNumber+1 {
			t.Errorf("%s: revision %d → %d, sequence %d → %d; want one more each", kind, before.Revision(), after.Revision(),
				before.Bundle(td).SequenceNumber, after.Bundle(td).SequenceNumber)
		}
		if w.published(old) || w.hasKey(old) || w.record(old.ID) != nil {
			t.Errorf("%s: in the bundle %v, key there %v, recorded %v; want nothing of it", kind, w.published(old), w.hasKey(old), w.record(old.ID) != nil)
		}
		active, _, olds := a.State(kind)
		if len(olds) != 0 || !w.published(active) || w.signing(a, kind) != active.ID {
			t.Errorf("%s: the others are not as they were", kind)
		}
		_, err = a.Revoke(context.Background(), kind, old.ID)
		expectKind(t, err, registry.Invalid, "unexpected authority ID")
	}
}

func TestOnlyAnOldAuthorityIsTaintedAndOnlyATaintedOneRevoked(t *testing.T) {
	ctx := context.Background()
	for _, kind := range everyKind {
		w := newWorld(t)
		a := w.open()
		active := w.signing(a, kind)
		for name, do := range map[string]func(context.Context, registry.AuthorityKind, string) (*registry.Authority, error){"taint": a.Taint, "revoke": a.Revoke} {
			_, err := do(ctx, kind, "")
			expectKind(t, err, registry.Invalid, "no authority ID provided")
			_, err = do(ctx, kind, "0123")
			expectKind(t, err, registry.Invalid, "unexpected authority ID")
			_, err = do(ctx, kind, active)
			expectKind(t, err, registry.FailedPrecondition, "it is the one that signs; activate another one first")
			prepared, err := a.Prepare(ctx, kind)
			if err != nil {
				t.Fatal(err)
			}
			_, err = do(ctx, kind, prepared.ID)
			expectKind(t, err, registry.FailedPrecondition, "unable to "+name+" "+kind.String()+" authority "+prepared.ID+": it is prepared")
		}
		old := w.retire(a, kind)
		_, err := a.Revoke(ctx, kind, old.ID)
		expectKind(t, err, registry.FailedPrecondition, "it is not tainted; taint it first")
		other := everyKind[0]
		if other == kind {
			other = everyKind[1]
		}
		_, err = a.Taint(ctx, other, old.ID) // an ID of the other kind
		expectKind(t, err, registry.Invalid, "unexpected authority ID")
		if !w.published(old) || !w.hasKey(old) || w.record(old.ID).Tainted {
			t.Errorf("%s: attempts that failed have changed it", kind)
		}
	}
}

func TestBeforeThereIsAnAuthorityNoneCanBeTainted(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	_, err := w.registry.ChangeAuthorities(context.Background(), func(_ *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		return registry.AuthorityChange{Delete: all}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range everyKind {
		if _, err := a.Taint(context.Background(), kind, "0123"); !errors.Is(err, authority.ErrUnavailable) {
			t.Errorf("%s: taint: %v", kind, err)
		}
		if _, err := a.Revoke(context.Background(), kind, "0123"); !errors.Is(err, authority.ErrUnavailable) {
			t.Errorf("%s: revoke: %v", kind, err)
		}
	}
}

func TestARevocationThatTheStoreRefusedCanBeTriedAgain(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	old := w.retire(a, registry.X509)
	if _, err := a.Taint(context.Background(), registry.X509, old.ID); err != nil {
		t.Fatal(err)
	}
	w.store.fail.Store(true)
	if _, err := a.Revoke(context.Background(), registry.X509, old.ID); !errors.Is(err, errDisk) {
		t.Fatalf("got error %v, want the store's", err)
	}
	if !w.published(old) || w.record(old.ID) == nil {
		t.Error("half of it has happened")
	}
	w.store.fail.Store(false)
	w.rotate(a) // that the key is gone already must not disturb
	if _, err := a.Revoke(context.Background(), registry.X509, old.ID); err != nil {
		t.Fatal(err)
	}
	if w.published(old) || w.record(old.ID) != nil {
		t.Error("it was not revoked")
	}
}

func TestTaintAndRevokeConcernTheKeyUnderWhicheverCertificateItIsInTheBundle(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	old := w.retire(a, registry.X509)
	signer, err := w.keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: old.KeyName})
	if err != nil {
		t.Fatal(err)
	}
	tmpl := *old.Chain[0]
	tmpl.SerialNumber = big.NewInt(7)
	der, err := x509.CreateCertificate(rand.Reader, &tmpl, &tmpl, signer.Public().(*ecdsa.PublicKey), signer)
	if err != nil {
		t.Fatal(err)
	}
	twin, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.registry.ChangeBundle(context.Background(), td, func(b *bundle.Bundle) error {
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: twin})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Taint(context.Background(), registry.X509, old.ID); err != nil {
		t.Fatal(err)
	}
	if ids := tainted(w.bundle()); len(ids) != 2 {
		t.Errorf("%d authorities are marked, want both of the key", len(ids))
	}
	if _, err := a.Revoke(context.Background(), registry.X509, old.ID); err != nil {
		t.Fatal(err)
	}
	if b := w.bundle(); len(b.X509Authorities) != 1 || b.HasX509(twin) {
		t.Errorf("the bundle is %s; want the one that signs alone", b)
	}
}

func TestAnotherServersAuthorityIsTaintedAndRevokedOnceItSignsNoMore(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	here, keys := w.open(), authority.NewMemoryKeys()
	there := w.open(func(o *authority.Options) { o.Server, o.Keys = "server-2", keys })
	has := func(name string) bool {
		_, err := keys.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: name})
		return err == nil
	}
	for _, kind := range everyKind {
		_, err := here.Taint(ctx, kind, w.signing(there, kind))
		expectKind(t, err, registry.FailedPrecondition, `it is active on server "server-2"; activate another one there first`)
		old := w.retire(there, kind)
		w.rotate(there)
		if _, err := here.Taint(ctx, kind, old.ID); err != nil {
			t.Fatal(err)
		}
		if !w.record(old.ID).Tainted || !has(old.KeyName) {
			t.Errorf("%s: not tainted, or its key is gone", kind)
		}
		if _, err := here.Revoke(ctx, kind, old.ID); err != nil {
			t.Fatal(err)
		}
		if w.published(old) || w.record(old.ID) != nil {
			t.Errorf("%s: it is still there", kind)
		}
		w.rotate(there)
		if has(old.KeyName) {
			t.Errorf("%s: its server has not deleted the key", kind)
		}
		active, _, _ := there.State(kind)
		if !has(active.KeyName) || w.signing(there, kind) != active.ID {
			t.Errorf("%s: the other server can sign no more", kind)
		}
	}
}

func TestTheAuthoritiesOfAServerThatIsLostAreRevokedByOneOfItsName(t *testing.T) {
	ctx := context.Background()
	w := newWorld(t)
	lost := w.signing(w.open(), registry.X509)
	w.keys = authority.NewMemoryKeys()
	w.add(time.Minute)
	a := w.open()
	if _, err := a.Taint(ctx, registry.X509, lost); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Revoke(ctx, registry.X509, lost); err != nil {
		t.Fatal(err)
	}
	if w.record(lost) != nil || len(w.bundle().X509Authorities) != 1 {
		t.Error("it is still there")
	}
}
