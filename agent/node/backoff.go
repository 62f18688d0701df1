package node

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff spaces out attempts: the first retry comes at once but not for all
// agents in the same moment, later ones at a random time that grows (full
// jitter). The zero value is ready for use; it is not safe for concurrent use.
type Backoff struct{ failures int }

const (
	// A server that was restarted has its agents back within a third of a
	// second, spread enough that their handshakes queue instead of colliding.
	firstRetryMin, firstRetryMax = 50 * time.Millisecond, 300 * time.Millisecond

	backoffBase = 200 * time.Millisecond
	backoffMax  = 30 * time.Second
)

// Next returns how long to wait after one more failure: 50 to 300 ms after the
// first, then between 50 ms and a bound that doubles from 400 ms to 30 s.
func (b *Backoff) Next() time.Duration {
	b.failures++
	if b.failures == 1 {
		return between(firstRetryMin, firstRetryMax)
	}
	bound := backoffMax
	if shift := b.failures - 1; shift < 16 { // beyond, it would overflow
		bound = min(bound, backoffBase<<shift)
	}
	return between(firstRetryMin, bound)
}

// Reset makes the next failure a first one.
func (b *Backoff) Reset() { b.failures = 0 }

func between(low, high time.Duration) time.Duration {
	return low + rand.N(high-low)
}

// sleep waits for a time or for ctx to end.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
