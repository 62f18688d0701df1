package held

import (
	"container/list"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/hallmark-id/hallmark/pkg/entry"
)

const (
	// maxJWTs is how many JWT-SVIDs are cached: a few MB.
	maxJWTs = 4096
	// maxFlights is how many JWT-SVIDs are being signed at once.
	maxFlights = 64
	// jwtTimeout is how long signing one may take.
	jwtTimeout = 10 * time.Second
	// jwtPatience is how long a caller waits for a new JWT-SVID while there is
	// a cached one that is still valid.
	jwtPatience = time.Second
	// jwtRetry is how long a cached JWT-SVID is served without another attempt
	// after one that failed.
	jwtRetry = 5 * time.Second
)

// jwt is the JWT-SVIDs of one entry for one audience.
type jwt struct {
	s         *slot
	audience  string // key in s.jwts
	result    JWTResult
	signature signature
	renewAt   time.Time
	place     *list.Element // in jwtCache; nil while there is no result
	flight    *flight       // nil: none is being signed
	notBefore time.Time     // of the next attempt
}

// flight is one signing that callers wait for together.
type flight struct {
	done   chan struct{}
	result JWTResult
	err    error
}

// jwtCache has all cached JWT-SVIDs, most recently used first.
type jwtCache struct{ order list.List }

// drop forgets the JWT-SVIDs of a slot. Those who wait for one being signed
// still get it.
func (c *jwtCache) drop(s *slot) {
	for _, j := range s.jwts {
		c.remove(j)
	}
	s.jwts = nil
}

func (c *jwtCache) remove(j *jwt) {
	if j.place != nil {
		c.order.Remove(j.place)
		j.place = nil
	}
	if j.s.jwts[j.audience] == j {
		delete(j.s.jwts, j.audience)
	}
}

// recheck forgets the JWT-SVIDs that were revoked, or whose key is distrusted.
func (c *jwtCache) recheck(h *Held) {
	for e := c.order.Front(); e != nil; {
		j := e.Value.(*jwt)
		e = e.Next()
		if h.distrustsSigned(j.signature) {
			c.remove(j)
		}
	}
}

// JWT returns a JWT-SVID of an entry for an audience, whose order counts. It is
// a cached one while that has more than half of its life left, or while it is
// valid and the server cannot sign another; callers that want the same share
// one signing. Those of entries with JWTIncludeJTI are always new.
//
// The entry is one that [Held.Look] returned. The error is [ErrNotHeld] if it
// is not held any more as it was then, or that of the [Signer] or of ctx.
func (h *Held) JWT(ctx context.Context, e *entry.Entry, audience []string) (JWTResult, error) {
	if e.JWTIncludeJTI {
		return h.unsharedJWT(ctx, e, audience)
	}
	key := audienceKey(audience)
	for ticket := false; ; {
		j, f, ok, err := h.findJWT(ctx, e, key, audience, ticket)
		switch {
		case err != nil:
			return JWTResult{}, err
		case ok && f == nil:
			return j, nil
		case f != nil:
			return await(ctx, f, j, ok)
		}
		// A new one is to be signed: that takes a ticket.
		select {
		case h.tickets <- struct{}{}:
			ticket = true
		case <-ctx.Done():
			return JWTResult{}, ctx.Err()
		}
	}
}

// findJWT returns a cached JWT-SVID (ok), a signing to wait for (f), both (the
// cached one is good if that takes too long), or neither: come again with a
// ticket, which it uses or gives back.
func (h *Held) findJWT(ctx context.Context, e *entry.Entry, key string, audience []string, ticket bool) (cached JWTResult, f *flight, ok bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if ticket {
		defer func() {
			if ticket {
				<-h.tickets
			}
		}()
	}
	now := h.now()
	s := h.slots[e.ID]
	switch {
	case s == nil || s.entry != e || !s.mayBeServed(now):
		return JWTResult{}, nil, false, ErrNotHeld
	case h.stopped:
		return JWTResult{}, nil, false, errors.New("the agent is stopping")
	}
	j := s.jwts[key]
	if j != nil && j.place != nil && now.Before(j.result.ExpiresAt) {
		cached, ok = j.result, true
		h.jwts.order.MoveToFront(j.place)
		if j.flight == nil && (now.Before(j.renewAt) || now.Before(j.notBefore)) {
			return cached, nil, true, nil
		}
	}
	if j != nil && j.flight != nil {
		return cached, j.flight, ok, nil
	}
	if !ticket {
		return JWTResult{}, nil, false, nil
	}
	if j == nil {
		j = &jwt{s: s, audience: key}
		if s.jwts == nil {
			s.jwts = make(map[string]*jwt)
		}
		s.jwts[key] = j
	}
	ticket = false // the flight gives it back
	f = &flight{done: make(chan struct{})}
	j.flight = f
	h.flights.Add(1)
	go h.fly(j, e, audience, trace.SpanContextFromContext(ctx))
	return cached, f, ok, nil
}

// await waits for a signing. If there is a cached JWT-SVID it does not wait
// long, and does not fail.
func await(ctx context.Context, f *flight, cached JWTResult, ok bool) (JWTResult, error) {
	var patience <-chan time.Time
	if ok {
		timer := time.NewTimer(jwtPatience)
		defer timer.Stop()
		patience = timer.C
	}
	select {
	case <-f.done:
		if f.err != nil && ok && !errors.Is(f.err, ErrNotHeld) {
			return cached, nil
		}
		return f.result, f.err
	case <-patience:
		return cached, nil
	case <-ctx.Done():
		return JWTResult{}, ctx.Err()
	}
}

// fly signs one JWT-SVID. It does not stop when those who asked first have
// gone: others may wait too. It is in the trace of the one who asked first.
func (h *Held) fly(j *jwt, e *entry.Entry, audience []string, asker trace.SpanContext) {
	defer h.flights.Done()
	ctx, span := h.traces.Root(h.ctx, "sign a JWT-SVID", asker)
	defer span.End()
	result, err := h.signJWT(ctx, e, audience)
	if err == nil {
		h.metrics.Signed.WithLabelValues("jwt").Inc()
	} else {
		h.metrics.SigningFailures.WithLabelValues("jwt").Inc()
	}
	<-h.tickets

	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	if j.s.entry != e || !j.s.mayBeServed(now) {
		result, err = JWTResult{}, ErrNotHeld
	}
	f := j.flight
	f.result, f.err = result, err
	j.flight = nil
	close(f.done)
	dropped := j.s.jwts[j.audience] != j
	switch {
	case errors.Is(err, ErrNotHeld):
	case err != nil:
		h.log.Warn("signing a JWT-SVID failed", "entry", e.ID, "spiffe_id", e.SPIFFEID, "error", err)
		j.notBefore = now.Add(jwtRetry + rand.N(jwtRetry))
		if j.place == nil && !dropped {
			delete(j.s.jwts, j.audience)
		}
	case dropped: // what was cached was distrusted meanwhile
	default:
		h.cacheJWT(j, result, now)
	}
}

func (h *Held) cacheJWT(j *jwt, result JWTResult, now time.Time) {
	j.signature = signatureOf(result.Token)
	if h.distrustsSigned(j.signature) {
		h.jwts.remove(j)
		return // good for those who wait, not for others
	}
	j.result, j.notBefore = result, time.Time{}
	j.renewAt = now.Add(result.ExpiresAt.Sub(now) / 2)
	if j.place != nil {
		h.jwts.order.MoveToFront(j.place)
		return
	}
	j.place = h.jwts.order.PushFront(j)
	if h.jwts.order.Len() > maxJWTs {
		h.jwts.remove(h.jwts.order.Back().Value.(*jwt))
	}
}

func (h *Held) unsharedJWT(ctx context.Context, e *entry.Entry, audience []string) (JWTResult, error) {
	select {
	case h.tickets <- struct{}{}:
	case <-ctx.Done():
		return JWTResult{}, ctx.Err()
	}
	defer func() { <-h.tickets }()
	if !h.has(e) {
		return JWTResult{}, ErrNotHeld
	}
	result, err := h.signJWT(ctx, e, audience)
	if err == nil && !h.has(e) {
		return JWTResult{}, ErrNotHeld
	}
	return result, err
}

// has reports whether an entry is held as it is here.
func (h *Held) has(e *entry.Entry) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.slots[e.ID]
	return s != nil && s.entry == e && s.mayBeServed(h.now())
}

func (h *Held) signJWT(ctx context.Context, e *entry.Entry, audience []string) (JWTResult, error) {
	ctx, cancel := context.WithTimeout(ctx, jwtTimeout)
	defer cancel()
	result, err := h.signer.SignJWT(ctx, e.ID, audience)
	if err == nil && h.distrustsJWT(result.Token) {
		// It was revoked, or its key was tainted or revoked, while it was under way;
		// another is good, and signed by another key.
		result, err = h.signer.SignJWT(ctx, e.ID, audience)
	}
	if err != nil {
		return JWTResult{}, err
	}
	if !h.now().Before(result.ExpiresAt) {
		return JWTResult{}, fmt.Errorf("the server sent a JWT-SVID that expired at %v; compare the clocks of node and server", result.ExpiresAt)
	}
	return result, nil
}

func (h *Held) distrustsJWT(token string) bool {
	signed := signatureOf(token)
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.distrustsSigned(signed)
}

// distrustsSigned reports whether a JWT-SVID is not to be handed out again.
func (h *Held) distrustsSigned(s signature) bool {
	return h.trust.distrustsKey(s.keyID) || h.revoked(s.status)
}

func audienceKey(audience []string) string {
	var b []byte
	for _, a := range audience {
		b = append(binary.AppendUvarint(b, uint64(len(a))), a...)
	}
	return string(b)
}
