package registry_test

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

func TestAnIssuersTokenIsUsedOnceOnWhicheverServerAndAfterARestart(t *testing.T) {
	s := newStore(t)
	c := &clock{}
	servers := []*registry.Registry{start(t, s, c.Now), start(t, s, c.Now)}
	token, end := [32]byte{1}, epoch.Add(time.Hour)
	var taken atomic.Int64
	var wait sync.WaitGroup
	for i := range 20 {
		wait.Go(func() {
			switch err := servers[i%2].UseToken(t.Context(), token, end); {
			case err == nil:
				taken.Add(1)
			case kindOf(err) != registry.AlreadyExists:
				t.Error(err)
			}
		})
	}
	wait.Wait()
	if taken.Load() != 1 {
		t.Errorf("it was taken %d times", taken.Load())
	}
	fresh := start(t, s, c.Now)
	if err := fresh.UseToken(t.Context(), token, end); kindOf(err) != registry.AlreadyExists {
		t.Errorf("after a restart: %v", err)
	}
	if err := fresh.UseToken(t.Context(), [32]byte{2}, end); err != nil {
		t.Errorf("another token: %v", err)
	}
	converge(t, servers[0], servers[1], fresh)
	for _, r := range append(servers, fresh) {
		if v := r.View(); !v.UsedToken(token) || v.UsedToken([32]byte{3}) || v.UsedTokens() != 2 {
			t.Error("a server does not know what was used alone")
		}
	}
}

func TestUsedTokensAreForgottenOnceTheyHaveEndedHoweverManyThereAre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemory()
		r := start(t, s, time.Now)
		use := func(n int, lasts time.Duration) {
			t.Helper()
			var id [32]byte
			binary.BigEndian.PutUint64(id[:], uint64(n))
			if err := r.UseToken(t.Context(), id, time.Now().Add(lasts)); err != nil {
				t.Fatal(err)
			}
		}
		const many = 2500 // more than are deleted together
		for n := range many {
			use(n, time.Minute)
		}
		use(many, time.Hour)
		time.Sleep(4 * time.Minute) // a server whose clock is behind may take them yet
		synctest.Wait()
		if n := r.View().UsedTokens(); n != many+1 {
			t.Errorf("%d are known soon after their end, want %d", n, many+1)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		left := 0
		if _, err := s.Read(t.Context(), "used/", func(store.Record) error { left++; return nil }); err != nil {
			t.Fatal(err)
		}
		if n := r.View().UsedTokens(); n != 1 || left != 1 {
			t.Errorf("%d are known and %d stored, want the one that lasts", n, left)
		}
	})
}
