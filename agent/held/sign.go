package held

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/pkg/entry"
)

const (
	// maxCalls is how many calls to sign SVIDs of one kind are under way at once.
	// One of them is kept for workloads that wait.
	maxCalls = 4
	// callTimeout is how long such a call may take: the server signs a full
	// batch in a tenth of a second.
	callTimeout = 30 * time.Second
	// longestSleep is how long Run sleeps, whatever its schedule says: timers
	// do not advance while a machine is suspended, and SVIDs expire by
	// the wall clock.
	longestSleep = 30 * time.Second
	// renewalJitter is how far before and after half of its life an SVID is
	// renewed, as a part of its life: what was signed together is not
	// renewed together.
	renewalJitter = 0.05
)

// Run signs and renews until ctx ends, then waits for what is under way. It
// returns ctx's error. It is called once.
func (h *Held) Run(ctx context.Context) error {
	defer h.stop()
	g, callCtx := errgroup.WithContext(ctx)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		batches, sleep := h.step()
		for _, jobs := range batches {
			g.Go(func() error { h.sign(callCtx, jobs); return nil })
		}
		timer.Reset(sleep)
		select {
		case <-ctx.Done():
			g.Wait()
			return ctx.Err()
		case <-h.wake:
		case <-timer.C:
		}
	}
}

func (h *Held) stop() {
	h.mu.Lock()
	h.stopped = true
	h.mu.Unlock()
	h.cancel()
	h.flights.Wait()
}

// job is one SVID that is being signed. Those of a batch are of one kind.
type job struct {
	c     *credential
	entry *entry.Entry // as it was when it was asked for
	key   *ecdsa.PrivateKey
	asker trace.Span // nil: none
}

// step does what is due now. It returns what is to be signed now, and how long
// nothing else is to be done.
func (h *Held) step() (batches [][]job, sleep time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	for k := range kinds {
		on := &h.schedules[k]
		for on.due.Len() > 0 && !on.due.all[0].at.After(now) {
			h.elapsed(on.due.take(), now)
		}
	}
	h.balance(now)
	sleep = longestSleep
	for k := range kinds {
		on := &h.schedules[k]
		for {
			jobs := h.takeBatch(on, now)
			if len(jobs) == 0 {
				break
			}
			batches = append(batches, jobs)
		}
		if on.due.Len() > 0 {
			sleep = min(sleep, on.due.all[0].at.Sub(now))
		}
		if on.ready.Len() > 0 && on.callRetryAt.After(now) {
			sleep = min(sleep, on.callRetryAt.Sub(now))
		}
	}
	return batches, sleep
}

// elapsed handles a credential whose time has come.
func (h *Held) elapsed(c *credential, now time.Time) {
	s := c.slot
	if s.entry.Expired(now) {
		c.leave()
		c.svid = nil
		h.jwts.drop(s)
		for v := range s.views {
			h.rematch(v, now)
			v.changed()
		}
	} else if c.svid != nil && c.valid(now) == nil {
		h.log.Error("an "+c.schedule.kind.name()+" expired before it could be renewed", "entry", s.entry.ID,
			"spiffe_id", s.entry.SPIFFEID, "error", c.err)
		c.svid = nil
		for v := range s.views {
			v.svidChanged(c.schedule.kind)
		}
	}
	h.reschedule(c, now)
}

// takeBatch takes the most urgent SVIDs to be signed in one call: the first
// goes at once, and what comes while calls are under way goes with the next.
func (h *Held) takeBatch(on *schedule, now time.Time) []job {
	if on.ready.Len() == 0 || on.calls >= maxCalls {
		return nil
	}
	most := MaxBatch
	if on.callFailures > 0 { // one call for the most urgent one finds out whether the server is back
		if on.calls > 0 || on.callRetryAt.After(now) {
			return nil
		}
		most = 1
	}
	// What nobody waits for does not make others wait.
	patient := on.ready.all[0].urgency() == background
	if patient && on.calls >= maxCalls-1 {
		return nil
	}
	var jobs []job
	for len(jobs) < most && on.ready.Len() > 0 && (on.ready.all[0].urgency() == background) == patient {
		c := on.ready.take()
		c.signing = true
		jobs = append(jobs, job{c: c, entry: c.slot.entry, asker: c.asker})
		c.asker = nil
		h.reschedule(c, now)
	}
	on.calls++
	return jobs
}

// sign has one batch signed.
func (h *Held) sign(ctx context.Context, jobs []job) {
	var asker trace.SpanContext // one of many; the others have waited as long
	for _, j := range jobs {
		if j.asker != nil {
			asker = j.asker.SpanContext()
			break
		}
	}
	ctx, span := h.traces.Root(ctx, "sign "+jobs[0].c.schedule.kind.name()+"s", asker)
	defer span.End()
	answers, err := h.request(ctx, jobs)
	if ctx.Err() != nil {
		return // not the server's failure
	}
	h.signed(jobs, answers, err)
	h.poke()
}

// answer is what came of one job.
type answer struct {
	svid svid
	err  error
}

// request has one batch signed, each SVID with a new key.
func (h *Held) request(ctx context.Context, jobs []job) ([]answer, error) {
	for i := range jobs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, fmt.Errorf("generate a key: %w", err)
		}
		jobs[i].key = key
	}
	ask := h.requestX509
	if jobs[0].c.schedule.kind == witKind {
		ask = h.requestWIT
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answers, err := ask(ctx, jobs)
	if err == nil && len(answers) != len(jobs) {
		err = fmt.Errorf("the server answered %d of %d requests", len(answers), len(jobs))
	}
	return answers, err
}

// signed takes in what came of one batch.
func (h *Held) signed(jobs []job, answers []answer, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	on := jobs[0].c.schedule
	on.calls--
	if err != nil {
		h.metrics.SigningFailures.WithLabelValues(on.kind.String()).Add(float64(len(jobs)))
		on.callFailures++
		on.callFailedAt, on.callRetryAt = now, now.Add(backoff(on.callFailures))
		h.log.Log(context.Background(), levelOf(on.callFailures), "signing "+on.kind.name()+"s failed",
			"requests", len(jobs), "error", err, "retry_in", on.callRetryAt.Sub(now))
		for _, j := range jobs {
			j.c.signing = false
			j.c.failed(err)
			h.reschedule(j.c, now)
		}
		return
	}
	on.callFailures = 0
	for i, j := range jobs {
		c, got := j.c, answers[i]
		c.signing = false
		switch {
		case c.slot.gone || !c.kept() || c.slot.entry.SPIFFEID != j.entry.SPIFFEID:
			// What it was signed for is not wanted any more.
		case got.err == nil && !now.Before(got.svid.ends()):
			h.itemFailed(c, fmt.Errorf("the server sent an %s that expired at %v; compare the clocks of node and server", on.kind.name(), got.svid.ends()), now)
		case got.err != nil:
			h.itemFailed(c, got.err, now)
		default:
			h.deliver(j, got.svid, now)
		}
		h.reschedule(c, now)
	}
}

// levelOf keeps failures that repeat from filling the log: it is loud when
// their number doubles.
func levelOf(failures int) slog.Level {
	if failures&(failures-1) == 0 {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// failed notes why there is no new SVID.
func (c *credential) failed(err error) {
	first := c.err == nil
	c.err = err
	if c.svid == nil && first {
		for v := range c.slot.views {
			v.svidChanged(c.schedule.kind) // those who wait for it need not any more
		}
	}
}

func (h *Held) itemFailed(c *credential, err error, now time.Time) {
	kind := c.schedule.kind
	h.metrics.SigningFailures.WithLabelValues(kind.String()).Inc()
	c.failures++
	c.retryAt = now.Add(backoff(c.failures))
	h.log.Log(context.Background(), levelOf(c.failures), "signing an "+kind.name()+" failed", "entry", c.slot.entry.ID,
		"spiffe_id", c.slot.entry.SPIFFEID, "error", err, "retry_in", c.retryAt.Sub(now))
	c.failed(err)
}

// deliver puts a new SVID in the place of the old.
func (h *Held) deliver(j job, svid svid, now time.Time) {
	c := j.c
	kind := c.schedule.kind
	h.metrics.Signed.WithLabelValues(kind.String()).Inc()
	life := svid.ends().Sub(now)
	c.svid, c.signedFor, c.distrusted = svid, j.entry, h.distrusts(svid)
	c.renewAt = now.Add(life/2 + time.Duration((2*mathrand.Float64()-1)*renewalJitter*float64(life)))
	if c.distrusted {
		// It is good for the moment; a better one comes once the server signs
		// with another authority.
		c.failures++
		c.retryAt = now.Add(backoff(c.failures))
		c.err = nil
	} else {
		c.settle()
	}
	h.log.Debug("an "+kind.name()+" was signed", "entry", c.slot.entry.ID, "spiffe_id", c.slot.entry.SPIFFEID, "expires_at", svid.ends())
	for v := range c.slot.views {
		v.svidChanged(kind)
	}
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
