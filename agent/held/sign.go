package held

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/pkg/entry"
)

const (
	// maxCalls is how many calls to sign X509-SVIDs are under way at once. One
	// of them is kept for workloads that wait.
	maxCalls = 4
	// callTimeout is how long such a call may take: the server signs a full
	// batch in a tenth of a second.
	callTimeout = 30 * time.Second
	// longestSleep is how long Run sleeps, whatever its schedule says: timers
	// do not advance while a machine is suspended, and X509-SVIDs expire by
	// the wall clock.
	longestSleep = 30 * time.Second
	// renewalJitter is how far before and after half of its life an X509-SVID
	// is renewed, as a part of its life: what was signed together is not
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

// job is one X509-SVID that is being signed.
type job struct {
	s     *slot
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
	c := &h.schedule
	for c.due.Len() > 0 && !c.due.slots[0].at.After(now) {
		h.elapsed(c.due.take(), now)
	}
	h.balance(now)
	for {
		jobs := h.takeBatch(now)
		if len(jobs) == 0 {
			break
		}
		batches = append(batches, jobs)
	}
	sleep = longestSleep
	if c.due.Len() > 0 {
		sleep = min(sleep, c.due.slots[0].at.Sub(now))
	}
	if c.ready.Len() > 0 && c.callRetryAt.After(now) {
		sleep = min(sleep, c.callRetryAt.Sub(now))
	}
	return batches, sleep
}

// elapsed handles a slot whose time has come.
func (h *Held) elapsed(s *slot, now time.Time) {
	if s.entry.Expired(now) {
		h.leave(s)
		s.svid = nil
		h.jwts.drop(s)
		for v := range s.views {
			h.rematch(v, now)
			v.changed()
		}
	} else if s.svid != nil && s.valid(now) == nil {
		h.log.Error("an X509-SVID expired before it could be renewed", "entry", s.entry.ID,
			"spiffe_id", s.entry.SPIFFEID, "error", s.err)
		s.svid = nil
		for v := range s.views {
			v.svidChanged()
		}
	}
	h.reschedule(s, now)
}

// takeBatch takes the most urgent X509-SVIDs to be signed in one call: the
// first goes at once, and what comes while calls are under way goes with the
// next.
func (h *Held) takeBatch(now time.Time) []job {
	c := &h.schedule
	if c.ready.Len() == 0 || c.calls >= maxCalls {
		return nil
	}
	most := MaxBatch
	if c.callFailures > 0 { // one call for the most urgent one finds out whether the server is back
		if c.calls > 0 || c.callRetryAt.After(now) {
			return nil
		}
		most = 1
	}
	// What nobody waits for does not make others wait.
	patient := c.ready.slots[0].urgency() == background
	if patient && c.calls >= maxCalls-1 {
		return nil
	}
	var jobs []job
	for len(jobs) < most && c.ready.Len() > 0 && (c.ready.slots[0].urgency() == background) == patient {
		s := c.ready.take()
		s.signing = true
		jobs = append(jobs, job{s: s, entry: s.entry, asker: s.asker})
		s.asker = nil
		h.reschedule(s, now)
	}
	c.calls++
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
	ctx, span := h.traces.Root(ctx, "sign X509-SVIDs", asker)
	defer span.End()
	svids, errs, err := h.request(ctx, jobs)
	if ctx.Err() != nil {
		return // not the server's failure
	}
	h.signed(jobs, svids, errs, err)
	h.poke()
}

func (h *Held) request(ctx context.Context, jobs []job) (svids []*X509SVID, errs []error, err error) {
	requests := make([]X509Request, len(jobs))
	for i := range jobs {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, fmt.Errorf("generate a key: %w", err)
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			return nil, nil, fmt.Errorf("make a certificate request: %w", err)
		}
		jobs[i].key = key
		requests[i] = X509Request{EntryID: jobs[i].entry.ID, CSR: csr}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	results, err := h.signer.SignX509(ctx, requests)
	if err != nil {
		return nil, nil, err
	}
	if len(results) != len(jobs) {
		return nil, nil, fmt.Errorf("the server answered %d of %d requests", len(results), len(jobs))
	}
	svids = make([]*X509SVID, len(jobs))
	errs = make([]error, len(jobs))
	for i, r := range results {
		if r.Err != nil {
			errs[i] = r.Err
			continue
		}
		svids[i], errs[i] = newX509SVID(jobs[i], r.Chain)
	}
	return svids, errs, nil
}

// newX509SVID checks that a chain is of the key and the SPIFFE ID asked for.
func newX509SVID(j job, chain [][]byte) (*X509SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("the server sent an X509-SVID without certificates")
	}
	x := &X509SVID{}
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the X509-SVID: %w", i, err)
		}
		if i == 0 {
			if !j.key.PublicKey.Equal(cert.PublicKey) {
				return nil, errors.New("the server sent an X509-SVID of another key")
			}
			if len(cert.URIs) != 1 || cert.URIs[0].String() != j.entry.SPIFFEID.String() {
				return nil, fmt.Errorf("the server sent an X509-SVID of %v; the entry is of %s", cert.URIs, j.entry.SPIFFEID)
			}
		}
		x.Chain = append(x.Chain, der...)
		x.ExpiresAt = earlier(x.ExpiresAt, cert.NotAfter)
		if len(cert.AuthorityKeyId) > 0 {
			x.issuers = append(x.issuers, string(cert.AuthorityKeyId))
		}
	}
	key, err := x509.MarshalPKCS8PrivateKey(j.key)
	if err != nil {
		return nil, fmt.Errorf("encode the key of the X509-SVID: %w", err)
	}
	x.Key = key
	return x, nil
}

// signed takes in what came of one batch.
func (h *Held) signed(jobs []job, svids []*X509SVID, errs []error, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	c := &h.schedule
	c.calls--
	if err != nil {
		h.metrics.X509Failures.Add(float64(len(jobs)))
		c.callFailures++
		c.callFailedAt, c.callRetryAt = now, now.Add(backoff(c.callFailures))
		h.log.Log(context.Background(), levelOf(c.callFailures), "signing X509-SVIDs failed",
			"requests", len(jobs), "error", err, "retry_in", c.callRetryAt.Sub(now))
		for _, j := range jobs {
			j.s.signing = false
			h.failed(j.s, err)
			h.reschedule(j.s, now)
		}
		return
	}
	c.callFailures = 0
	for i, j := range jobs {
		s := j.s
		s.signing = false
		switch {
		case s.gone || !h.keeps(s) || s.entry.SPIFFEID != j.entry.SPIFFEID:
			// What it was signed for is not wanted any more.
		case errs[i] == nil && !now.Before(svids[i].ExpiresAt):
			h.itemFailed(s, fmt.Errorf("the server sent an X509-SVID that expired at %v; compare the clocks of node and server", svids[i].ExpiresAt), now)
		case errs[i] != nil:
			h.itemFailed(s, errs[i], now)
		default:
			h.deliver(j, svids[i], now)
		}
		h.reschedule(s, now)
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

// failed notes why a slot has no new X509-SVID.
func (h *Held) failed(s *slot, err error) {
	first := s.err == nil
	s.err = err
	if s.svid == nil && first {
		for v := range s.views {
			v.svidChanged() // those who wait for it need not any more
		}
	}
}

func (h *Held) itemFailed(s *slot, err error, now time.Time) {
	h.metrics.X509Failures.Inc()
	s.failures++
	s.retryAt = now.Add(backoff(s.failures))
	h.log.Log(context.Background(), levelOf(s.failures), "signing an X509-SVID failed", "entry", s.entry.ID,
		"spiffe_id", s.entry.SPIFFEID, "error", err, "retry_in", s.retryAt.Sub(now))
	h.failed(s, err)
}

// deliver puts a new X509-SVID in the place of the old.
func (h *Held) deliver(j job, svid *X509SVID, now time.Time) {
	h.metrics.X509Signed.Inc()
	s := j.s
	life := svid.ExpiresAt.Sub(now)
	s.svid, s.signedFor, s.distrusted = svid, j.entry, h.trust.distrusts(svid)
	s.renewAt = now.Add(life/2 + time.Duration((2*mathrand.Float64()-1)*renewalJitter*float64(life)))
	if s.distrusted {
		// It is good for the moment; a better one comes once the server signs
		// with another authority.
		s.failures++
		s.retryAt = now.Add(backoff(s.failures))
		s.err = nil
	} else {
		s.settle()
	}
	h.log.Debug("an X509-SVID was signed", "entry", s.entry.ID, "spiffe_id", s.entry.SPIFFEID, "expires_at", svid.ExpiresAt)
	for v := range s.views {
		v.svidChanged()
	}
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
