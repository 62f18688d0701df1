package federation

import (
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/server/registry"
)

// Outcome is what has come of a server's fetches of a trust domain's bundle,
// since it started.
type Outcome struct {
	Fetched  time.Time // the last that was good; zero: none was
	Tried    time.Time // the last of all
	Failures int       // since the last good one
	Reason   string    // why the last failed; empty: it did not
}

// Outcomes remembers what has come of fetches. The zero value is ready; it is
// safe for concurrent use.
type Outcomes struct {
	mu  sync.Mutex
	all map[spiffeid.TrustDomain]outcome
}

type outcome struct {
	Outcome
	url string // that was asked
}

// Note remembers what has come of a fetch by a relationship: the reason why it
// failed, or nothing.
func (o *Outcomes) Note(f *registry.Federation, now time.Time, reason string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.all == nil {
		o.all = make(map[spiffeid.TrustDomain]outcome)
	}
	next := outcome{Outcome{Fetched: now, Tried: now}, f.EndpointURL}
	if reason != "" {
		was := o.all[f.TrustDomain]
		next.Outcome = Outcome{Fetched: was.Fetched, Tried: now, Failures: was.Failures + 1, Reason: reason}
	}
	o.all[f.TrustDomain] = next
}

// Of returns what has come of the fetches by a relationship; zero: there were
// none.
func (o *Outcomes) Of(f *registry.Federation) Outcome {
	o.mu.Lock()
	defer o.mu.Unlock()
	if found := o.all[f.TrustDomain]; found.url == f.EndpointURL {
		return found.Outcome
	}
	return Outcome{}
}
