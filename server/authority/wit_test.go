package authority_test

import (
	"context"
	"crypto"
	"errors"
	"slices"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

func withoutWIT(o *authority.Options) { o.WIT = false }

func kindsOf(all []*registry.Authority) (kinds []registry.AuthorityKind) {
	for _, r := range all {
		if !slices.Contains(kinds, r.Kind) {
			kinds = append(kinds, r.Kind)
		}
	}
	return kinds
}

func TestWithoutTheFlagThereIsNothingOfWIT(t *testing.T) {
	w := newWorld(t)
	a := w.open(withoutWIT)
	w.rotate(a)
	if got := a.Kinds(); slices.Contains(got, registry.WIT) {
		t.Errorf("kinds are %v", got)
	}
	if got := kindsOf(w.registry.View().Authorities()); slices.Contains(got, registry.WIT) || len(w.bundle().WITAuthorities) != 0 {
		t.Errorf("authorities of %v, bundle %s", got, w.bundle())
	}
	if _, err := a.WIT(); !errors.Is(err, authority.ErrUnavailable) {
		t.Errorf("signs all the same: %v", err)
	}
}

func TestSwitchedOffWhatAnEarlierRunHadOfWITGoes(t *testing.T) {
	w := newWorld(t)
	first := w.open()
	w.retire(first, registry.WIT) // an old one and an active one
	if _, err := first.Prepare(context.Background(), registry.WIT); err != nil {
		t.Fatal(err)
	}
	second := w.open(func(o *authority.Options) { o.Server = "server-2" })
	theirs, _, _ := second.State(registry.WIT)
	var mine []*registry.Authority
	for _, r := range w.registry.View().Authorities() {
		if r.Kind == registry.WIT && r.Server == "server-1" {
			mine = append(mine, r)
		}
	}
	if len(mine) != 3 {
		t.Fatalf("there are %d authorities, want 3", len(mine))
	}
	if _, err := w.registry.ChangeBundle(context.Background(), td, func(b *bundle.Bundle) error {
		b.WITAuthorities = append(b.WITAuthorities, bundle.JWTAuthority{KeyID: "downstream", PublicKey: theirs.PublicKey})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	before := w.registry.View()

	w.open(withoutWIT)
	for _, r := range mine {
		if w.published(r) || w.hasKey(r) || w.record(r.ID) != nil {
			t.Errorf("of the %s one: in the bundle %v, key there %v, recorded %v; want nothing", r.State, w.published(r), w.hasKey(r), w.record(r.ID) != nil)
		}
	}
	if b := w.bundle(); len(b.WITAuthorities) != 1 || b.WITAuthorities[0].KeyID != theirs.ID || !w.hasKey(theirs) {
		t.Errorf("the bundle is %s; want the WIT authority of the other server alone", b)
	}
	if after := w.registry.View(); after.Revision() != before.Revision()+1 {
		t.Errorf("took %d transactions, want 1", after.Revision()-before.Revision())
	}

	again := w.open() // and on again
	if active, _, _ := again.State(registry.WIT); active == nil || !w.published(active) || w.signing(again, registry.WIT) != active.ID {
		t.Errorf("switched on again, %v is active", active)
	}
}

func TestWITSVID_W04_W33_EachKeyOfTheBundleHasAnIDOfItsOwn(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	for range 5 {
		for _, kind := range everyKind {
			w.retire(a, kind)
		}
	}
	b, seen := w.bundle(), map[string]bool{}
	for _, k := range slices.Concat(b.JWTAuthorities, b.WITAuthorities) {
		if seen[k.KeyID] {
			t.Errorf("key ID %q is there twice", k.KeyID)
		}
		seen[k.KeyID] = true
		thumbprint, err := (&jose.JSONWebKey{Key: k.PublicKey}).Thumbprint(crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		if want := authority.IDOf(thumbprint); k.KeyID != want {
			t.Errorf("key ID is %s, want %s of the thumbprint", k.KeyID, want)
		}
	}
	if len(b.JWTAuthorities) != 6 || len(b.WITAuthorities) != 6 {
		t.Errorf("the bundle is %s", b)
	}
}

// Whatever signs with a key that is in doubt is in doubt.
func TestAKeyThatIsInDoubtIsSoForEveryKindItIsPublishedFor(t *testing.T) {
	w := newWorld(t)
	a := w.open()
	ctx := context.Background()
	old := w.retire(a, registry.WIT)
	if _, err := w.registry.ChangeBundle(ctx, td, func(b *bundle.Bundle) error {
		b.JWTAuthorities = append(b.JWTAuthorities, bundle.JWTAuthority{KeyID: "twin", PublicKey: old.PublicKey})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Taint(ctx, registry.WIT, old.ID); err != nil {
		t.Fatal(err)
	}
	if ids := tainted(w.bundle()); !slices.Equal(ids, []string{"twin", old.ID}) {
		t.Errorf("%q are marked, want both of the key", ids)
	}
	if _, err := a.Revoke(ctx, registry.WIT, old.ID); err != nil {
		t.Fatal(err)
	}
	if w.published(old) || w.bundle().JWTKey("twin") != nil {
		t.Errorf("the bundle is %s", w.bundle())
	}
}
