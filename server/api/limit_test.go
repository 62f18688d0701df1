package api

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
)

func TestTheSizeOfALimiterDoesNotDependOnHowManyCall(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	l := newLimiter(10, 20, func() time.Time { return now })
	for i := range 5 * limiterSize {
		if err := l.wait(t.Context(), fmt.Sprint(i), 1); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(l.young) + len(l.old); n > 2*limiterSize {
		t.Errorf("it holds %d callers", n)
	}
}

func TestALimiterForgetsNoneThatIsOverItsRate(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	l := newLimiter(10, 20, func() time.Time { return now })
	spend := func() (n int) {
		for ; n < 1000; n++ {
			r := l.of("caller", now).ReserveN(now, 1)
			if r.DelayFrom(now) > 0 {
				r.CancelAt(now)
				break
			}
		}
		return n
	}
	if n := spend(); n != 20 {
		t.Errorf("it let %d through at once, want 20", n)
	}
	now = now.Add(limiterTurn + time.Second)
	l.of("other", now) // a new generation
	if n := spend(); n != 20 {
		t.Errorf("after a while it let %d through, want 20", n)
	}
	now = now.Add(time.Second)
	if n := spend(); n != 10 {
		t.Errorf("after a second it let %d through, want 10", n)
	}
	// More than would ever fit is refused, and takes nothing.
	now = now.Add(time.Minute)
	if err := l.wait(t.Context(), "caller", 21); grpcstatus.Code(err) != codes.ResourceExhausted {
		t.Errorf("21 at once: %v", err)
	}
	if n := spend(); n != 20 {
		t.Errorf("it let %d through, want 20", n)
	}
}

func TestCallersAreToldApartByAddressOrNetwork(t *testing.T) {
	for address, want := range map[string]string{
		"192.0.2.1:1":              "192.0.2.1",
		"[::ffff:192.0.2.1]:1":     "192.0.2.1",
		"[2001:db8:1:2:3:4:5:6]:1": "2001:db8:1:2::/64",
		"[2001:db8:1:2:ff::1]:2":   "2001:db8:1:2::/64",
		"[fe80::1%eth0]:1":         "fe80::/64",
		"[2001:db8:1:3::1]:1":      "2001:db8:1:3::/64",
		"@":                        "@",
		"somewhere:1":              "somewhere",
	} {
		if got := network(address); got != want {
			t.Errorf("%s counts as %s, want %s", address, got, want)
		}
	}
}

func TestARateThatIsChangedHoldsForCallersThatAreKnown(t *testing.T) {
	now := time.Now()
	l := newLimiter(1, 1, func() time.Time { return now })
	known := l.of("known", now)
	known.AllowN(now, 1)
	l.set(100, 50)
	now = now.Add(time.Second)
	for _, caller := range []string{"known", "new"} {
		if r := l.of(caller, now); !r.AllowN(now, 50) || r.AllowN(now, 1) {
			t.Errorf("%s: the new rate does not hold", caller)
		}
	}
	if l.of("known", now) != known {
		t.Error("a caller was forgotten")
	}
}
