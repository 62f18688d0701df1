package issue

import (
	"sync/atomic"
	"time"
)

// tally counts what one authority has signed.
type tally struct {
	svids   atomic.Int64
	expires atomic.Int64 // Unix seconds; the latest
}

func (t *tally) add(expires time.Time) {
	t.svids.Add(1)
	for end := expires.Unix(); ; {
		latest := t.expires.Load()
		if end <= latest || t.expires.CompareAndSwap(latest, end) {
			return
		}
	}
}

// tallyOf returns the tally of an authority; a new one counts from here.
func (i *Issuer) tallyOf(authority string) *tally {
	t, _ := i.signed.LoadOrStore(authority, &tally{})
	return t.(*tally)
}

// Signed returns how many credentials of any kind an authority has signed since
// this server started, and when the one that lasts longest expires; zero if it
// has signed none. IDs of X.509 and JWT authorities do not collide.
func (i *Issuer) Signed(authorityID string) (credentials int64, last time.Time) {
	t, ok := i.signed.Load(authorityID)
	if !ok {
		return 0, time.Time{}
	}
	if end := t.(*tally).expires.Load(); end != 0 {
		last = time.Unix(end, 0)
	}
	return t.(*tally).svids.Load(), last
}
