package issuer

import (
	"crypto/sha256"
	"errors"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

var (
	// ErrUsed means that a token was used before.
	ErrUsed = errors.New("the token was used before: it is good for one use")
	// ErrBusy means that it cannot be known whether a token was used before, as
	// too many were in too short a time.
	ErrBusy = errors.New("too many tokens were used: try again in a moment")
)

// sweepEvery is how often tokens that have ended are looked for, at most.
const sweepEvery = time.Second

// Uses remembers the tokens that were used until they end, in memory: of this
// process, since it started. It is safe for concurrent use.
type Uses struct {
	most int

	mu    sync.Mutex
	used  map[[sha256.Size]byte]use
	by    map[string]int // how many of used are an issuer's
	swept time.Time
}

type use struct {
	issuer string
	until  time.Time
}

// NewUses makes a memory of at most so many tokens.
func NewUses(most int) *Uses {
	return &Uses{most: most, used: make(map[[sha256.Size]byte]use), by: make(map[string]int)}
}

// Use notes that a token is used now, which is once. An issuer's tokens may take
// as much room as they leave free, so that one issuer alone takes half and the
// others are still served.
func (u *Uses) Use(t *Token, now time.Time) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if now.Sub(u.swept) >= sweepEvery {
		u.sweep(now)
	}
	if _, used := u.used[t.use]; used || !u.swept.Before(t.until) { // what ended before the last sweep may have been used
		return ErrUsed
	}
	if free := u.most - len(u.used); u.by[t.Issuer] >= free {
		return ErrBusy
	}
	u.used[t.use] = use{t.Issuer, t.until}
	u.by[t.Issuer]++
	return nil
}

// Forget takes back that a token was used, for a caller that could not go on.
func (u *Uses) Forget(t *Token) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, used := u.used[t.use]; used {
		u.forget(t.use)
	}
}

// forget takes a token that was used out.
func (u *Uses) forget(id [sha256.Size]byte) {
	by := u.used[id].issuer
	delete(u.used, id)
	if u.by[by]--; u.by[by] == 0 {
		delete(u.by, by)
	}
}

func (u *Uses) sweep(now time.Time) {
	u.swept = now
	for id, used := range u.used {
		if now.Before(used.until) {
			continue
		}
		u.forget(id)
	}
}

// Known returns a hash that a token is known by, the same for whatever else is
// signed with its issuer and ID, and when no validator takes it any more.
func (t *Token) Known() (hash [sha256.Size]byte, until time.Time) { return t.use, t.until }

// useOf returns what a token is remembered by: its issuer and jti, or else what
// is signed of it. The signature is no part of it: of some algorithms, whoever
// has one can write it in another way.
func useOf(t *Token, parsed *jwt.Token) [sha256.Size]byte {
	if t.ID == "" {
		return parsed.Digest()
	}
	return sha256.Sum256([]byte("jti\x00" + t.Issuer + "\x00" + t.ID))
}
