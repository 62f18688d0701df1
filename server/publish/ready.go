package publish

import (
	"context"
	"fmt"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

// maxPast bounds what a target remembers of what was published there.
const maxPast = 64

// publication is a bundle that a target has had from a time on.
type publication struct {
	bundle *bundle.Bundle
	at     time.Time
}

// remember notes that a target has a bundle.
func (t *target) remember(b *bundle.Bundle, now time.Time) {
	if n := len(t.past); n > 0 && t.past[n-1].bundle == b {
		return
	}
	t.past = append(t.past, publication{b, now})
	if len(t.past) > maxPast {
		t.past = t.past[1:]
	}
}

// concerns reports whether a target's readers verify what an authority signs.
func (t *target) concerns(r *registry.Authority) bool {
	token := r.Kind == registry.JWT || r.Kind == registry.JWTRS256
	return t.config.Bundle != "" || token && len(t.config.Issuers) > 0
}

// ready returns from when a target's readers know an authority, or why they do not.
func (t *target) ready(r *registry.Authority) (from time.Time, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := len(t.past) - 1; i >= 0 && authority.Published(r, t.past[i].bundle); i-- {
		keep := t.o.MaxAge
		if t.config.Bundle != "" { // clients ask again after the hint
			keep = max(keep, t.past[i].bundle.RefreshHint)
		}
		from = t.past[i].at.Add(keep)
	}
	switch {
	case !from.IsZero():
		return from, nil
	case t.failures > 0:
		return from, fmt.Errorf("it is not published to %s: %s", t.config.Name, t.failure)
	}
	return from, fmt.Errorf("it is not published to %s yet", t.config.Name)
}

// Ready returns from when all who read what is published know an authority, or, as
// an error, where it is not published yet. It implements [authority.Publication].
func (p *Publisher) Ready(r *registry.Authority) (from time.Time, err error) {
	for _, t := range p.targets {
		if !t.concerns(r) {
			continue
		}
		at, err := t.ready(r)
		if err != nil {
			return time.Time{}, err
		}
		if at.After(from) {
			from = at
		}
	}
	return from, nil
}

// Overtaken says in the log and metrics that an authority signs before all who read
// what is published know it. It implements [authority.Publication].
func (p *Publisher) Overtaken(r *registry.Authority, err error) {
	p.o.Metrics.ActivatedUnpublished.WithLabelValues(r.Kind.String()).Inc()
	p.o.Log.Error("an authority signs that is not published everywhere: those who read the target refuse what it signs until it is; run \"hallmark publish list\" for what to mend",
		"kind", r.Kind, "id", r.ID, "error", err)
}

// Await waits until an authority is published wherever it is to be, or the context
// ends: then the error says where it is not.
func (p *Publisher) Await(ctx context.Context, r *registry.Authority) error {
	for {
		tried := p.tried()
		_, err := p.Ready(r)
		if err == nil {
			return nil
		}
		select {
		case <-tried:
		case <-ctx.Done():
			return err
		}
	}
}
