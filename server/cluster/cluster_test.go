package cluster

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/test/harness"
)

func options(t *testing.T, name string) Options {
	t.Helper()
	address := harness.FreeAddress(t)
	return Options{Dir: filepath.Join(t.TempDir(), "etcd"), Name: name, Listen: address, Advertise: address, Log: slog.New(slog.DiscardHandler)}
}

func memory(t *testing.T) store.Store {
	t.Helper()
	s, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestAnInvitationIsGoodOnceAndUntilItExpires(t *testing.T) {
	s, now := memory(t), time.Unix(1_800_000_000, 0)
	secret, expires, err := Invite(t.Context(), s, now, time.Minute)
	if err != nil || !expires.Equal(now.Add(time.Minute)) {
		t.Fatalf("Invite: until %v, %v", expires, err)
	}
	for what, guess := range map[string]string{"none": "", "another": secret[1:] + "A", "its beginning": secret[:20]} {
		if _, err := invited(t.Context(), s, guess, now); !errors.Is(err, ErrNotInvited) {
			t.Errorf("secret that is %s: %v", what, err)
		}
	}
	if _, err := invited(t.Context(), s, secret, expires); !errors.Is(err, ErrNotInvited) {
		t.Errorf("when it has expired: %v", err)
	}
	invitation, err := invited(t.Context(), s, secret, now)
	if err != nil {
		t.Fatal(err)
	}
	var used atomic.Int64
	var group sync.WaitGroup
	for range 10 {
		group.Go(func() {
			if err := redeem(t.Context(), s, invitation); err == nil {
				used.Add(1)
			} else if !errors.Is(err, ErrNotInvited) {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if used.Load() != 1 {
		t.Errorf("it was good %d times", used.Load())
	}
	if _, err := invited(t.Context(), s, secret, now); !errors.Is(err, ErrNotInvited) {
		t.Errorf("once it was used: %v", err)
	}
}

func TestOfAnInvitationOnlyAHashIsKept(t *testing.T) {
	s := memory(t)
	secret, _, err := Invite(t.Context(), s, time.Now(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Read(t.Context(), "", func(r store.Record) error {
		if strings.Contains(r.Key+string(r.Value), secret) {
			t.Errorf("record %s has the secret", r.Key)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestOpenInvitationsAreBoundedAndExpiredOnesGo(t *testing.T) {
	s, now := memory(t), time.Unix(1_800_000_000, 0)
	for range maxInvitations {
		if _, _, err := Invite(t.Context(), s, now, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := Invite(t.Context(), s, now, time.Minute); !errors.Is(err, ErrTooManyInvitations) {
		t.Errorf("one more: %v", err)
	}
	if _, _, err := Invite(t.Context(), s, now.Add(time.Minute), time.Minute); err != nil {
		t.Errorf("when they have expired: %v", err)
	}
	n := 0
	if _, err := s.Read(t.Context(), "", func(store.Record) error { n++; return nil }); err != nil || n != 1 {
		t.Errorf("%d records are left, %v", n, err)
	}
}

func TestWhatAMemberKeepsIsItsUsersAlone(t *testing.T) {
	o := options(t, "one")
	m, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for path, want := range map[string]os.FileMode{o.Dir: 0o700, o.caFile(): 0o600, o.certFile(): 0o600, o.dataDir(): 0o700} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v: %v", path, info.Mode().Perm(), want, err)
		}
	}
}

func TestACertificateIsRenewedInTime(t *testing.T) {
	o := options(t, "one")
	if err := os.Mkdir(o.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	authority, err := newCA(now)
	if err != nil {
		t.Fatal(err)
	}
	read := func() *x509.Certificate {
		data, err := os.ReadFile(o.certFile())
		if err != nil {
			t.Fatal(err)
		}
		der, _, err := decode(data)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	if err := o.renew(authority, false, now); err != nil {
		t.Fatal(err)
	}
	first := read()
	if err := o.renew(authority, false, now.Add(certLife-renewAt-time.Hour)); err != nil || !read().Equal(first) {
		t.Errorf("it was renewed before its time: %v", err)
	}
	if err := o.renew(authority, false, now.Add(certLife-renewAt+time.Hour)); err != nil || read().Equal(first) {
		t.Errorf("it was not renewed in time: %v", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(authority.cert)
	host, _, _ := net.SplitHostPort(o.Advertise)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := first.Verify(x509.VerifyOptions{Roots: roots, DNSName: host, KeyUsages: []x509.ExtKeyUsage{usage}, CurrentTime: now}); err != nil {
			t.Errorf("it does not verify: %v", err)
		}
	}
}

// TestNobodyWithoutACertificateTalksToAMember is why members have an authority:
// whoever could talk to one could write the store.
func TestNobodyWithoutACertificateTalksToAMember(t *testing.T) {
	o := options(t, "one")
	m, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	stranger := options(t, "stranger")
	if err := os.Mkdir(stranger.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	// It knows all but the authority's key: it has one of its own.
	members := fmt.Sprintf("one=https://%s,stranger=https://%s", o.Advertise, stranger.Advertise)
	if err := writeFile(stranger.membersFile(), []byte(members)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if s, err := Start(ctx, stranger); err == nil {
		s.Close()
		t.Error("it takes part")
	}
	if peers := m.Peers(); len(peers) != 1 {
		t.Errorf("the members are %v", peers)
	}
}

func TestAStrangerDoesNotLearnWhichServersThereAre(t *testing.T) {
	m, err := Start(t.Context(), options(t, "one"))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s := memory(t)
	for _, name := range []string{"one", "two"} {
		if _, err := m.Admit(t.Context(), s, "a guess", name, "127.0.0.1:1", time.Now()); !errors.Is(err, ErrNotInvited) {
			t.Errorf("as %s: %v", name, err)
		}
	}
	secret, _, err := Invite(t.Context(), s, time.Now(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Admit(t.Context(), s, secret, "one", "127.0.0.1:1", time.Now()); !errors.Is(err, ErrNameTaken) {
		t.Errorf("one that is invited, as one: %v", err)
	}
	if _, err := invited(t.Context(), s, secret, time.Now()); err != nil {
		t.Errorf("with another name it cannot come any more: %v", err)
	}
}

func TestTheLastServerAndOneThatIsNoneAreNotRemoved(t *testing.T) {
	m, err := Start(t.Context(), options(t, "one"))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Remove(t.Context(), "one"); !errors.Is(err, ErrLast) {
		t.Errorf("the last: %v", err)
	}
	if err := m.Remove(t.Context(), "two"); !errors.Is(err, ErrNoServer) {
		t.Errorf("one that is none: %v", err)
	}
	if err := m.Remove(t.Context(), ""); !errors.Is(err, ErrNoServer) {
		t.Errorf("none: %v", err)
	}
}
