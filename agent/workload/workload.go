// Package workload attests a process that is pinned: it asks every configured
// attestor at once and makes sure that the process is still the same when they
// have answered. Its main type is [Attestor], which the Workload API and the
// explain command share.
package workload

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/agent/metrics"
	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

const (
	// DefaultTimeout is how long attestors have to answer: enough to hash a
	// large program or to wait for a container runtime that is busy.
	DefaultTimeout = 5 * time.Second
	// maxRunning is how many attestations of one attestor run at once. One that
	// hangs (a dead NFS server, a stuck runtime) holds no more than these.
	maxRunning = 128
	// maxSelectors is how many selectors one attestor may give a process: more
	// than the labels and groups that any real one has.
	maxSelectors = 1000
)

// How many failures of one attestor are logged, a second: a process can have
// itself attested as often as it likes.
const (
	failuresLogged      = rate.Limit(1)
	failuresLoggedBurst = 10
)

// Result is what one attestor said.
type Result struct {
	Name      string // of the attestor
	Selectors selector.Set
	Err       error // why some or all selectors are missing
	Took      time.Duration
}

// Options of [New].
type Options struct {
	Attestors map[string]attestors.Workload // by name
	Timeout   time.Duration                 // for all of them together; 0 is DefaultTimeout
	Log       *slog.Logger                  // nil is silent
	Metrics   *metrics.Metrics              // nil: none
}

// Attestor asks all attestors about a process.
type Attestor struct {
	timeout   time.Duration
	log       *slog.Logger
	attestors []named // by name
}

type named struct {
	name     string
	attestor attestors.Workload
	running  *semaphore.Weighted
	loud     *rate.Limiter // of its failures
	seconds  prometheus.Observer
	failures prometheus.Counter
}

// New makes an Attestor.
func New(o Options) *Attestor {
	a := &Attestor{timeout: o.Timeout, log: o.Log}
	if a.timeout <= 0 {
		a.timeout = DefaultTimeout
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	for name, attestor := range o.Attestors {
		a.attestors = append(a.attestors, named{
			name:     name,
			attestor: attestor,
			running:  semaphore.NewWeighted(maxRunning),
			loud:     rate.NewLimiter(failuresLogged, failuresLoggedBurst),
			seconds:  o.Metrics.AttestationSeconds.WithLabelValues(name),
			failures: o.Metrics.AttestationFailures.WithLabelValues(name),
		})
	}
	slices.SortFunc(a.attestors, func(x, y named) int { return strings.Compare(x.name, y.name) })
	return a
}

// Attest returns the selectors of a process, and what each attestor said, by
// name. An attestor that fails, panics or does not answer in time takes only
// its own selectors away. The error is that of the process or of ctx: it has
// ended, or nobody waits any more.
func (a *Attestor) Attest(ctx context.Context, p *peercred.Peer) (selector.Set, []Result, error) {
	if err := p.Alive(); err != nil {
		return nil, nil, fmt.Errorf("attest: %w", err)
	}
	process := attestors.Process{PID: p.PID, UID: p.UID, GID: p.GID}
	ctx, span := telemetry.Span(ctx, "attest a process")
	defer span.End()
	deadline, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()

	type answer struct {
		i int
		Result
	}
	// One that hangs is left behind; its semaphore bounds how many.
	answers := make(chan answer, len(a.attestors))
	results := make([]Result, len(a.attestors))
	started := time.Now()
	for i, n := range a.attestors {
		results[i] = Result{Name: n.name}
		go func() { answers <- answer{i, a.ask(deadline, n, process)} }()
	}
	answered := make([]bool, len(a.attestors))
	for range a.attestors {
		select {
		case got := <-answers:
			results[got.i], answered[got.i] = got.Result, true
			continue
		case <-deadline.Done():
		}
		break
	}
	if err := ctx.Err(); err != nil {
		return nil, nil, fmt.Errorf("attest: %w", err)
	}
	var all []selector.Selector
	for i := range results {
		r := &results[i]
		if !answered[i] {
			r.Err = fmt.Errorf("it gave no answer within %v", a.timeout)
			r.Took = time.Since(started)
		}
		a.attestors[i].seconds.Observe(r.Took.Seconds())
		if r.Err != nil {
			a.attestors[i].failures.Inc()
		}
		if r.Err != nil && a.attestors[i].loud.Allow() {
			a.log.Warn("attestor failed", "attestor", r.Name, "pid", process.PID, "error", r.Err)
		}
		all = append(all, r.Selectors...)
	}
	// What was read under this PID was read of the process only if it still
	// runs.
	if err := p.Alive(); err != nil {
		return nil, nil, fmt.Errorf("attest: %w", err)
	}
	return selector.NewSet(all...), results, nil
}

func (a *Attestor) ask(ctx context.Context, n named, process attestors.Process) (r Result) {
	started := time.Now()
	r.Name = n.name
	defer func() {
		if v := recover(); v != nil {
			a.log.Error("attestor panicked", "attestor", n.name, "pid", process.PID, "panic", v, "stack", string(debug.Stack()))
			r.Selectors, r.Err = nil, fmt.Errorf("it panicked: %v", v)
		}
		r.Took = time.Since(started)
	}()
	if err := n.running.Acquire(ctx, 1); err != nil {
		r.Err = fmt.Errorf("%d earlier attestations are not finished", maxRunning)
		return r
	}
	defer n.running.Release(1)
	got, err := n.attestor.Attest(ctx, process)
	r.Err = err
	if len(got) > maxSelectors {
		r.Err = errors.Join(r.Err, fmt.Errorf("it gave %d selectors; the most is %d", len(got), maxSelectors))
		return r
	}
	for _, s := range got {
		if s.Type != n.name { // it can speak for no other
			r.Err = errors.Join(r.Err, fmt.Errorf("it gave %v, which is not of its type", s))
			return r
		}
	}
	r.Selectors = selector.NewSet(got...)
	return r
}
