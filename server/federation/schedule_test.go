package federation_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/server/federation"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
)

// world is relationships that a test changes, and what is fetched.
type world struct {
	mu      sync.Mutex
	all     map[string]federation.Relationship
	changed chan struct{}
	fetch   func(context.Context, string) error // nil: it succeeds
	fetched []string                            // trust domain and how long after the start
	began   time.Time
	metrics *metrics.Metrics
}

// inWorld runs a test with a schedule, in a bubble.
func inWorld(t *testing.T, test func(*world)) {
	synctest.Test(t, func(t *testing.T) {
		w := &world{all: make(map[string]federation.Relationship), changed: make(chan struct{}), began: time.Now(), metrics: metrics.New(nil)}
		s := federation.NewSchedule(federation.ScheduleOptions{Relationships: w.relationships, Refresh: w.refresh, Metrics: w.metrics})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()
		test(w)
		stop()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("it ended with %v", err)
		}
	})
}

func (w *world) relationships() (all []federation.Relationship, changed <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.all {
		all = append(all, r)
	}
	return all, w.changed
}

func (w *world) refresh(ctx context.Context, td spiffeid.TrustDomain) error {
	w.mu.Lock()
	w.fetched = append(w.fetched, fmt.Sprint(td.Name(), " ", time.Since(w.began).Truncate(time.Minute)))
	fetch := w.fetch
	w.mu.Unlock()
	if fetch != nil {
		return fetch(ctx, td.Name())
	}
	return nil
}

// set makes or changes a relationship; an empty URL deletes it.
func (w *world) set(name, url string, known bool, hint time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if url == "" {
		delete(w.all, name)
	} else {
		w.all[name] = federation.Relationship{
			Federation: &registry.Federation{TrustDomain: spiffeid.RequireTrustDomainFromString(name), EndpointURL: url},
			Known:      known, Hint: hint,
		}
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

// count returns how many fetches there were since it was last called.
func (w *world) count() int {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(w.fetched)
	w.fetched = nil
	return n
}

func TestFederation_F39_ABundleIsFetchedAtOnceAndThenAgainAndAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		w.set("a.org", "https://a.org", true, time.Hour)
		if n := w.count(); n != 1 {
			t.Errorf("fetched %d times at once", n)
		}
		time.Sleep(24 * time.Hour)
		if n := w.count(); n < 24 || n > 27 { // each up to a tenth early
			t.Errorf("fetched %d times in a day by the hour", n)
		}
	})
}

func TestFederation_F04_T23_TheIntervalIsThatOfTheHint(t *testing.T) {
	for name, c := range map[string]struct {
		known bool
		hint  time.Duration
		want  time.Duration
	}{
		"ten minutes":           {true, 10 * time.Minute, 10 * time.Minute},
		"none: five minutes":    {true, 0, 5 * time.Minute},
		"a second: a minute":    {true, time.Second, time.Minute},
		"a year: a day":         {true, 365 * 24 * time.Hour, 24 * time.Hour},
		"no bundle: one minute": {false, 0, time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(w *world) {
				w.set("a.org", "https://a.org", c.known, c.hint)
				w.count()
				time.Sleep(c.want * 89 / 100)
				if n := w.count(); n != 0 {
					t.Errorf("fetched %d times before %v", n, c.want)
				}
				time.Sleep(c.want * 12 / 100)
				if n := w.count(); n != 1 {
					t.Errorf("fetched %d times after %v", n, c.want)
				}
			})
		})
	}
}

func TestFederation_F40_F41_AFetchThatFailsWaitsForTheNextIntervalAndIsCounted(t *testing.T) {
	inWorld(t, func(w *world) {
		w.fetch = func(context.Context, string) error { return errors.New("no route to host") }
		w.set("a.org", "https://a.org", true, 10*time.Minute)
		w.count()
		time.Sleep(time.Hour)
		if n := w.count(); n < 6 || n > 7 {
			t.Errorf("fetched %d times in an hour by ten minutes", n)
		}
		if n := testutil.ToFloat64(w.metrics.BundleRefreshes.WithLabelValues("a.org", "failed")); n < 6 {
			t.Errorf("%v failures are counted", n)
		}
		if at := testutil.ToFloat64(w.metrics.BundleRefreshed.WithLabelValues("a.org")); at != 0 {
			t.Errorf("it counts as fetched at %v", at)
		}
		w.mu.Lock()
		w.fetch = nil
		w.mu.Unlock()
		time.Sleep(10 * time.Minute)
		w.count()
		if at := testutil.ToFloat64(w.metrics.BundleRefreshed.WithLabelValues("a.org")); at == 0 {
			t.Error("it does not count as fetched")
		}
	})
}

func TestFederation_F42_ARelationshipThatIsDeletedIsNotFetched(t *testing.T) {
	inWorld(t, func(w *world) {
		w.set("a.org", "https://a.org", true, time.Minute)
		w.count()
		w.set("a.org", "", false, 0)
		time.Sleep(time.Hour)
		if n := w.count(); n != 0 {
			t.Errorf("fetched %d times", n)
		}
		if n := testutil.CollectAndCount(w.metrics.BundleRefreshes) + testutil.CollectAndCount(w.metrics.BundleRefreshed); n != 0 {
			t.Errorf("%d metrics are left", n)
		}
	})
}

func TestARelationshipThatChangedIsFetchedAtOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		w.set("a.org", "https://a.org", true, time.Hour)
		w.set("b.org", "https://b.org", true, time.Hour)
		w.count()
		w.set("a.org", "https://a.org", true, time.Hour) // its bundle changed
		if n := w.count(); n != 0 {
			t.Errorf("fetched %d times though nothing of them changed", n)
		}
		w.set("a.org", "https://elsewhere.org", true, time.Hour)
		if n := w.count(); n != 1 {
			t.Errorf("fetched %d times", n)
		}
	})
}

func TestARelationshipThatChangesDuringAFetchIsFetchedAgain(t *testing.T) {
	inWorld(t, func(w *world) {
		answer := make(chan struct{})
		w.fetch = func(context.Context, string) error { <-answer; return nil }
		w.set("a.org", "https://a.org", true, time.Hour)
		w.count()
		w.set("a.org", "https://elsewhere.org", true, time.Hour)
		if n := w.count(); n != 0 {
			t.Errorf("%d fetches of one trust domain at once", n+1)
		}
		close(answer)
		if n := w.count(); n != 1 {
			t.Errorf("fetched %d times", n)
		}
	})
}

func TestOneEndpointThatHangsKeepsNoOtherWaiting(t *testing.T) {
	inWorld(t, func(w *world) {
		w.fetch = func(ctx context.Context, name string) error {
			if name == "slow.org" {
				<-ctx.Done()
			}
			return nil
		}
		w.set("slow.org", "https://slow.org", true, time.Minute)
		w.set("a.org", "https://a.org", true, time.Minute)
		w.count()
		time.Sleep(10 * time.Minute)
		if n := w.count(); n < 10 {
			t.Errorf("fetched %d times", n)
		}
	})
}

func TestFewFetchesAreUnderWayAtOnce(t *testing.T) {
	inWorld(t, func(w *world) {
		answer := make(chan struct{})
		w.fetch = func(context.Context, string) error { <-answer; return nil }
		for i := range 100 {
			w.set(fmt.Sprintf("d%d.org", i), "https://example.org", true, time.Hour)
		}
		if n := w.count(); n != 8 {
			t.Errorf("%d fetches are under way", n)
		}
		close(answer)
		if n := w.count(); n != 92 {
			t.Errorf("%d fetches came after", n)
		}
	})
}
