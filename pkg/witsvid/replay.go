package witsvid

import (
	"crypto/sha256"
	"errors"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
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
	used  map[[sha256.Size]byte]use
	by    map[spiffeid.ID]int // how many of used are a caller's
	swept time.Time
}

// use is one proof that was used.
type use struct {
	by    spiffeid.ID
	until time.Time
}

func newReplays(most int) replays {
	return replays{most: most, used: make(map[[sha256.Size]byte]use), by: make(map[spiffeid.ID]int)}
}

// use notes that a proof is used now, which is once. A caller may take as much
// room as it leaves free, so that one alone takes half and the others are still
// served.
func (p *replays) use(by spiffeid.ID, proof [sha256.Size]byte, until, now time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Sub(p.swept) >= sweepEvery {
		p.sweep(now)
	}
	_, used := p.used[proof]
	if used || !p.swept.Before(until) { // what ended before the last sweep may have been used
		return errReplayed
	}
	if free := p.most - len(p.used); p.by[by] >= free {
		return ErrBusy
	}
	p.used[proof] = use{by, until}
	p.by[by]++
	return nil
}

// sweep forgets the proofs that have expired.
func (p *replays) sweep(now time.Time) {
	p.swept = now
	for proof, u := range p.used {
		if now.Before(u.until) {
			continue
		}
		delete(p.used, proof)
		if p.by[u.by]--; p.by[u.by] == 0 {
			delete(p.by, u.by)
		}
	}
}
