package witsvid

import (
	"crypto/sha256"
	"errors"
	"sync"
	"time"
)

// ErrBusy means that a proof cannot be told from one used before, as too many
// were in too short a time. It is the server's trouble, not the caller's.
var ErrBusy = errors.New("too many requests: try again in a moment")

var errReplayed = errors.New("the proof was used before: make one for each request")

// sweepEvery is how often expired proofs are looked for, at most.
const sweepEvery = time.Second

// replays remembers the proofs that were used until they expire.
type replays struct {
	most int

	mu    sync.Mutex
	until map[[sha256.Size]byte]time.Time
	swept time.Time
}

// use notes that a proof is used now, which is once.
func (p *replays) use(proof [sha256.Size]byte, until, now time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Sub(p.swept) >= sweepEvery {
		p.swept = now
		for k, ends := range p.until {
			if !now.Before(ends) {
				delete(p.until, k)
			}
		}
	}
	_, used := p.until[proof]
	if used || !p.swept.Before(until) { // what ended before the last sweep may have been used
		return errReplayed
	}
	if len(p.until) >= p.most {
		return ErrBusy
	}
	p.until[proof] = until
	return nil
}
