package federation

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
)

const (
	// defaultInterval is how often a bundle is fetched whose publisher does not
	// say. SPIFFE Federation §4.1.
	defaultInterval = 5 * time.Minute
	// maxFetches is how many are under way at once.
	maxFetches = 8
	// early is the part of an interval by which a fetch may come before its end,
	// so that servers which started together do not ask together.
	early = 0.1
)

// Relationship is a federation relationship, and how often its bundle is to be
// fetched.
type Relationship struct {
	*registry.Federation
	Known bool          // there is a bundle of the trust domain
	Hint  time.Duration // of that bundle; zero: it has none
}

// ScheduleOptions are what a schedule needs. Relationships and Refresh are
// required.
type ScheduleOptions struct {
	// Relationships returns those that there are, and a channel that is closed
	// when they may have changed since.
	Relationships func() ([]Relationship, <-chan struct{})
	// Refresh fetches the bundle of a trust domain and stores it.
	Refresh func(context.Context, spiffeid.TrustDomain) error
	Log     *slog.Logger     // nil is silent
	Metrics *metrics.Metrics // nil: none
}

// Schedule fetches the bundles of all relationships: of a new one at once, and
// then as often as the bundle says. After a fetch that failed it waits as long
// as after one that did not (SPIFFE Federation §6.2), and the last good bundle
// stays.
type Schedule struct {
	o    ScheduleOptions
	due  map[spiffeid.TrustDomain]*due
	done chan result
	open int // fetches under way
}

// due is when one bundle is to be fetched next.
type due struct {
	of       *registry.Federation // as it was when that was decided
	at       time.Time
	fetching bool
	failures int // in a row
}

// result is what came of a fetch.
type result struct {
	of  *registry.Federation // as it was then
	err error
}

// NewSchedule makes a schedule; [Schedule.Run] keeps to it.
func NewSchedule(o ScheduleOptions) *Schedule {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	return &Schedule{o: o, due: make(map[spiffeid.TrustDomain]*due), done: make(chan result, maxFetches)}
}

// FromRegistry returns the relationships of a registry, for
// [ScheduleOptions].
func FromRegistry(r *registry.Registry) func() ([]Relationship, <-chan struct{}) {
	return func() ([]Relationship, <-chan struct{}) {
		changed := r.Changed()
		view := r.View()
		var all []Relationship
		for f := range view.Federations("") {
			rel := Relationship{Federation: f}
			if b := view.Bundle(f.TrustDomain); b != nil {
				rel.Known, rel.Hint = true, b.RefreshHint
			}
			all = append(all, rel)
		}
		return all, changed
	}
}

// Run fetches until the context ends, and returns its error.
func (s *Schedule) Run(ctx context.Context) error {
	var fetches sync.WaitGroup
	defer fetches.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		all, changed := s.o.Relationships()
		s.reconcile(all)
		now := time.Now()
		next := now.Add(maxRefreshHint)
		for _, d := range s.due {
			switch {
			case d.fetching:
			case d.at.After(now):
				next = earlier(next, d.at)
			case s.open < maxFetches:
				d.fetching = true
				s.open++
				of := d.of
				fetches.Go(func() { s.done <- result{of, s.o.Refresh(ctx, of.TrustDomain)} })
			}
		}
		timer.Reset(next.Sub(now))
		select {
		case <-changed:
		case <-timer.C:
		case r := <-s.done:
			s.open--
			all, _ := s.o.Relationships()
			s.fetched(ctx, r, all)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// reconcile takes in what relationships there are.
func (s *Schedule) reconcile(all []Relationship) {
	there := make(map[spiffeid.TrustDomain]bool, len(all))
	for _, r := range all {
		there[r.TrustDomain] = true
		switch d := s.due[r.TrustDomain]; {
		case d == nil:
			s.due[r.TrustDomain] = &due{of: r.Federation}
			s.o.Metrics.BundleRefreshed.WithLabelValues(r.TrustDomain.Name())
		case d.of.EndpointURL != r.EndpointURL || d.of.EndpointID != r.EndpointID:
			d.of, d.at, d.failures = r.Federation, time.Time{}, 0
		}
	}
	for td, d := range s.due {
		if !there[td] && !d.fetching {
			delete(s.due, td)
			s.o.Metrics.BundleRefreshed.DeleteLabelValues(td.Name())
			for _, outcome := range []string{"ok", "failed"} {
				s.o.Metrics.BundleRefreshes.DeleteLabelValues(td.Name(), outcome)
			}
		}
	}
}

// fetched notes what came of a fetch, and when the next is due.
func (s *Schedule) fetched(ctx context.Context, r result, all []Relationship) {
	d := s.due[r.of.TrustDomain]
	d.fetching = false
	if ctx.Err() != nil || d.of != r.of {
		return // the relationship was changed meanwhile, and is due
	}
	interval := minRefreshHint // until there is a bundle
	for _, rel := range all {
		switch {
		case rel.TrustDomain != r.of.TrustDomain || !rel.Known:
		case rel.Hint == 0:
			interval = defaultInterval
		default:
			interval = min(max(rel.Hint, minRefreshHint), maxRefreshHint)
		}
	}
	d.at = time.Now().Add(interval - time.Duration(rand.Float64()*early*float64(interval)))
	name := r.of.TrustDomain.Name()
	if r.err == nil {
		if d.failures > 0 {
			s.o.Log.Info("the bundle can be fetched again", "trust_domain", name)
		}
		d.failures = 0
		s.o.Metrics.BundleRefreshes.WithLabelValues(name, "ok").Inc()
		s.o.Metrics.BundleRefreshed.WithLabelValues(name).SetToCurrentTime()
		return
	}
	d.failures++
	s.o.Metrics.BundleRefreshes.WithLabelValues(name, "failed").Inc()
	level := slog.LevelDebug // it is loud when the number of failures doubles
	if d.failures&(d.failures-1) == 0 {
		level = slog.LevelWarn
	}
	s.o.Log.Log(ctx, level, "the bundle of a trust domain could not be fetched; what is known of it stays",
		"trust_domain", name, "url", d.of.EndpointURL, "failures", d.failures, "error", r.err, "next", d.at)
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
