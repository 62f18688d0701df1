package issue_test

import (
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func TestWhatAnAuthorityHasSignedIsCounted(t *testing.T) {
	h := newHouse(t)
	first, jwt := h.keys.x509.ID, h.keys.jwt.ID
	expect := func(id string, want int64, last time.Time) {
		t.Helper()
		if n, end := h.Signed(id); n != want || !end.Equal(last) {
			t.Errorf("%s has signed %d, the last until %v; want %d until %v", id, n, end, want, last)
		}
	}
	expect(first, 0, time.Time{})
	node := spiffeid.RequireFromPath(td, "/spire/agent/test/1")
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, newKey(t, elliptic.P256()))
	if err != nil {
		t.Fatal(err)
	}
	sign := func() (authority string, end time.Time) {
		t.Helper()
		svid, err := h.NodeX509(context.Background(), node, csr)
		if err != nil {
			t.Fatal(err)
		}
		return svid.AuthorityID, svid.ExpiresAt
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5 {
				sign()
			}
		})
	}
	wg.Wait()
	by, end := sign()
	if by != first {
		t.Errorf("signed by %s, want %s", by, first)
	}
	expect(first, 41, end)
	h.clock.add(-time.Minute)
	sign() // it ends before the last
	expect(first, 42, end)

	second := *newX509Authority(t, newKey(t, elliptic.P256()), nil)
	second.ID = "second"
	h.keys.set(&second)
	by, end2 := sign()
	if by != h.keys.x509.ID {
		t.Errorf("signed by %s, want the new one", by)
	}
	expect(first, 42, end)
	expect(by, 1, end2)

	token, err := h.MintJWT(context.Background(), spiffeid.RequireFromPath(td, "/a"), []string{"x"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	expect(jwt, 1, token.ExpiresAt)
}
