package registry_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

var otherTD = spiffeid.RequireTrustDomainFromString("other.org")

// newAuthority makes a self-signed CA certificate.
func newAuthority(t testing.TB, name string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    epoch, NotAfter: epoch.Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, &x509.Certificate{}, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func setBundle(t testing.TB, r *registry.Registry, td spiffeid.TrustDomain, roots ...*x509.Certificate) *bundle.Bundle {
	t.Helper()
	b, err := r.ChangeBundle(t.Context(), td, func(b *bundle.Bundle) error {
		b.X509Authorities = nil
		for _, root := range roots {
			b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: root})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBundle_T05_TheSequenceNumberRisesAtEveryChangeAndOnlyThen(t *testing.T) {
	r := start(t, newStore(t), nil)
	one, two := newAuthority(t, "one"), newAuthority(t, "two")
	for i, c := range []struct {
		roots []*x509.Certificate
		want  uint64
	}{{nil, 1}, {[]*x509.Certificate{one}, 2}, {[]*x509.Certificate{one}, 2}, {[]*x509.Certificate{one, two}, 3}, {[]*x509.Certificate{two}, 4}} {
		if b := setBundle(t, r, td, c.roots...); b.SequenceNumber != c.want || len(b.X509Authorities) != len(c.roots) {
			t.Errorf("change %d: got %v, want number %d", i, b, c.want)
		}
	}
}

func TestBundle_T05_ARestoreRaisesTheSequenceNumberAboveAllBefore(t *testing.T) {
	s := newStore(t)
	r := start(t, s, nil)
	setBundle(t, r, otherTD)
	setBundle(t, r, td)
	var backup bytes.Buffer
	if _, err := store.Backup(t.Context(), s, &backup); err != nil {
		t.Fatal(err)
	}
	last := setBundle(t, r, td, newAuthority(t, "after the backup")).SequenceNumber
	// The same backup is restored again and again, an hour after the other.
	for i := range 3 {
		s := newStore(t)
		edit := registry.Restored(td, epoch.Add(time.Duration(i)*time.Hour))
		if _, err := store.Restore(t.Context(), s, bytes.NewReader(backup.Bytes()), edit); err != nil {
			t.Fatal(err)
		}
		r := start(t, s, nil)
		if n := r.View().Bundle(td).SequenceNumber; n <= last {
			t.Errorf("restore %d: the bundle has the number %d; %d was published before", i, n, last)
		}
		if n := r.View().Bundle(otherTD).SequenceNumber; n != 1 {
			t.Errorf("restore %d: the foreign bundle has the number %d", i, n)
		}
		for j := range 10 {
			last = setBundle(t, r, td, newAuthority(t, fmt.Sprint(j))).SequenceNumber
		}
	}
}

func TestConcurrentChangesOfABundleLoseNothing(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil)}
	roots := make([]*x509.Certificate, 40)
	var group sync.WaitGroup
	for i := range roots {
		roots[i] = newAuthority(t, fmt.Sprint(i))
		group.Go(func() {
			if _, err := servers[i%2].ChangeBundle(t.Context(), td, func(b *bundle.Bundle) error {
				b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: roots[i]})
				return nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	converge(t, servers...)
	b := servers[0].View().Bundle(td)
	if b.SequenceNumber != uint64(len(roots)) || len(b.X509Authorities) != len(roots) {
		t.Errorf("got %v, want %d authorities after as many changes", b, len(roots))
	}
	for i, root := range roots {
		if !b.HasX509(root) {
			t.Errorf("root %d was lost", i)
		}
	}
}

func TestAChangeThatFailsChangesNothing(t *testing.T) {
	r := start(t, newStore(t), nil)
	setBundle(t, r, td, newAuthority(t, "a"))
	no := errors.New("no")
	if _, err := r.ChangeBundle(t.Context(), td, func(b *bundle.Bundle) error {
		b.X509Authorities[0].Tainted = true
		b.X509Authorities = nil
		return no
	}); !errors.Is(err, no) {
		t.Errorf("got error %v", err)
	}
	if b := r.View().Bundle(td); len(b.X509Authorities) != 1 || b.X509Authorities[0].Tainted || b.SequenceNumber != 1 {
		t.Errorf("the bundle became %v", b)
	}
	if _, err := r.ChangeBundle(t.Context(), td, func(b *bundle.Bundle) error {
		b.TrustDomain = otherTD
		return nil
	}); kindOf(err) != registry.Invalid {
		t.Errorf("renaming a bundle: %v", err)
	}
}

func TestDeletingABundle(t *testing.T) {
	for _, c := range []struct {
		name     string
		mode     registry.DeleteMode
		want     registry.ErrorKind
		entries  int // left
		federate int // of those left, how many name the trust domain
	}{
		{"is refused while entries name it", registry.Restrict, registry.FailedPrecondition, 3, 2},
		{"deletes the entries too", registry.Delete, 0, 1, 0},
		{"takes it off the entries", registry.Dissociate, 0, 3, 0},
		{"is refused in a mode that does not exist", 7, registry.Invalid, 3, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := start(t, newStore(t), nil)
			setBundle(t, r, otherTD, newAuthority(t, "a"))
			create(t, r, newEntry("/apart", agentID("a")))
			for _, path := range []string{"/one", "/two"} {
				e := newEntry(path, agentID("a"))
				e.FederatesWith = []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("third.org"), otherTD}
				create(t, r, e)
			}
			if err := r.DeleteBundle(t.Context(), otherTD, c.mode); kindOf(err) != c.want || err != nil && c.want == 0 {
				t.Errorf("got error %v", err)
			}
			v, federate := r.View(), 0
			for e := range v.Entries("") {
				if slices.Contains(e.FederatesWith, otherTD) {
					federate++
				} else if e.SPIFFEID != id("/apart") && len(e.FederatesWith) != 1 {
					t.Errorf("entry %s federates with %v", e.SPIFFEID, e.FederatesWith)
				}
			}
			if v.EntryCount() != c.entries || federate != c.federate || (v.Bundle(otherTD) == nil) != (c.want == 0) {
				t.Errorf("left are %d entries, %d of them federate; bundle %v", v.EntryCount(), federate, v.Bundle(otherTD))
			}
		})
	}
}

func TestTheOwnBundleAndMissingOnesCannotBeDeleted(t *testing.T) {
	r := start(t, newStore(t), nil)
	setBundle(t, r, td, newAuthority(t, "a"))
	if err := r.DeleteBundle(t.Context(), td, registry.Delete); kindOf(err) != registry.Invalid {
		t.Errorf("own: %v", err)
	}
	if err := r.DeleteBundle(t.Context(), otherTD, registry.Delete); kindOf(err) != registry.NotFound {
		t.Errorf("missing: %v", err)
	}
}

func newRecord(t testing.TB, server, name string, state registry.AuthorityState, created time.Time) *registry.Authority {
	cert := newAuthority(t, name)
	return &registry.Authority{
		ID: name, Kind: registry.X509, State: state, Server: server, KeyName: "key-" + name,
		Chain: []*x509.Certificate{cert}, PublicKey: cert.PublicKey,
		CreatedAt: created, ExpiresAt: created.Add(time.Hour),
	}
}

func TestAuthoritiesChangeTogetherWithTheBundle(t *testing.T) {
	s := newStore(t)
	r := start(t, s, nil)
	second, first := newRecord(t, "s1", "b", registry.Prepared, epoch.Add(time.Minute)), newRecord(t, "s2", "a", registry.Active, epoch)
	v, err := r.ChangeAuthorities(t.Context(), func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		if len(all) != 0 || len(own.X509Authorities) != 0 || own.TrustDomain != td {
			t.Errorf("at first there are %v and %v", own, all)
		}
		own.X509Authorities = append(own.X509Authorities, bundle.X509Authority{Certificate: second.Chain[0]})
		return registry.AuthorityChange{Put: []*registry.Authority{second, first}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	got := v.Authorities()
	if len(got) != 2 || got[0].ID != "a" || got[1].ID != "b" {
		t.Fatalf("got %v, want the oldest first", got)
	}
	if b := got[1]; b.Kind != registry.X509 || b.State != registry.Prepared || b.Server != "s1" || b.KeyName != "key-b" ||
		!bytes.Equal(b.Chain[0].Raw, second.Chain[0].Raw) || !b.CreatedAt.Equal(second.CreatedAt) || !b.ActivatedAt.IsZero() {
		t.Errorf("got %+v", b)
	}
	if !v.Bundle(td).HasX509(second.Chain[0]) {
		t.Error("the bundle lacks what was added with the authority")
	}

	no := errors.New("no")
	if _, err := r.ChangeAuthorities(t.Context(), func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		own.X509Authorities = nil
		return registry.AuthorityChange{Delete: all}, no
	}); !errors.Is(err, no) {
		t.Errorf("got error %v", err)
	}
	if v := r.View(); len(v.Authorities()) != 2 || len(v.Bundle(td).X509Authorities) != 1 {
		t.Error("a change that failed has changed something")
	}

	v, err = r.ChangeAuthorities(t.Context(), func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
		active := *all[1]
		active.State, active.ActivatedAt = registry.Active, epoch.Add(time.Hour)
		return registry.AuthorityChange{Put: []*registry.Authority{&active}, Delete: all[:1]}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := v.Authorities(); len(got) != 1 || got[0].ID != "b" || got[0].State != registry.Active || v.Bundle(td).SequenceNumber != 1 {
		t.Errorf("got %v and bundle %v", got, v.Bundle(td))
	}
}

func TestConcurrentChangesOfAuthoritiesSeeEachOther(t *testing.T) {
	s := newStore(t)
	servers := []*registry.Registry{start(t, s, nil), start(t, s, nil), start(t, s, nil)}
	var group sync.WaitGroup
	for n := range 30 {
		a := newRecord(t, fmt.Sprintf("s%d", n%3), fmt.Sprintf("%02d", n), registry.Active, epoch)
		group.Go(func() {
			if _, err := servers[n%3].ChangeAuthorities(t.Context(), func(own *bundle.Bundle, all []*registry.Authority) (registry.AuthorityChange, error) {
				// As many roots as authorities: what one writer sees agrees.
				if len(own.X509Authorities) != len(all) {
					t.Errorf("%d roots for %d authorities", len(own.X509Authorities), len(all))
				}
				own.X509Authorities = append(own.X509Authorities, bundle.X509Authority{Certificate: a.Chain[0]})
				return registry.AuthorityChange{Put: []*registry.Authority{a}}, nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	converge(t, servers...)
	if v := servers[0].View(); len(v.Authorities()) != 30 || len(v.Bundle(td).X509Authorities) != 30 || v.Bundle(td).SequenceNumber != 30 {
		t.Errorf("got %d authorities and bundle %v", len(v.Authorities()), v.Bundle(td))
	}
}

func TestAnAuthorityOfAnUnknownKindOfKeyIsRefused(t *testing.T) {
	r := start(t, newStore(t), nil)
	if _, err := r.ChangeBundle(t.Context(), td, func(b *bundle.Bundle) error {
		b.JWTAuthorities = append(b.JWTAuthorities, bundle.JWTAuthority{KeyID: "x", PublicKey: "no key"})
		return nil
	}); kindOf(err) != registry.Invalid {
		t.Errorf("got error %v", err)
	}
	if r.View().Bundle(td) != nil {
		t.Error("it was stored")
	}
}

func TestARecordThatIsTooLargeIsRefused(t *testing.T) {
	r := start(t, newStore(t), nil)
	e := newEntry("/a", agentID("a"))
	e.Selectors = nil
	for i := range entry.MaxSelectors {
		e.Selectors = append(e.Selectors, newEntry("/x", serverID, fmt.Sprintf("a:%04000d", i)).Selectors...)
	}
	create(t, r, e) // the largest entry there may be
	if _, err := r.ChangeBundle(t.Context(), td, func(b *bundle.Bundle) error {
		cert := *newAuthority(t, "a")
		cert.Raw = bytes.Repeat([]byte{1}, 2<<20)
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: &cert})
		return nil
	}); err == nil {
		t.Error("a bundle of 2 MiB was stored")
	}
}
