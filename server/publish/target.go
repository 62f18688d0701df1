package publish

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/oidc"
)

const (
	// checkEvery is how often a target is looked at that has everything; somewhat
	// earlier, so that servers which started together do not look together.
	checkEvery = 5 * time.Minute
	early      = 0.2 // the part of it by which it may come earlier
	// minRetry and maxRetry are after how long a target is tried again that has
	// failed: doubled each time, and up to half less.
	minRetry = time.Second
	maxRetry = 5 * time.Minute
	// attemptTime bounds one try of all documents of a target.
	attemptTime = 30 * time.Second
	// catchUp is how long a document may be newer than what this server knows: it
	// learns of changes of the other servers' in less.
	catchUp = time.Minute
	// maxRaces is how often a document is written again in one try because another
	// server was faster.
	maxRaces = 5
	// maxDocument bounds a document, in bytes.
	maxDocument = 1 << 20

	contentType = "application/json"
	anyValue    = "*" // of what the store does not keep
)

// errChanged says that an object is another than the one in whose place one was to
// be written.
var errChanged = errors.New("another server writes there all the time; it is tried again")

// store is where a target's objects are. Names are paths that were checked.
type store interface {
	// String names the place, for people.
	String() string
	// read returns an object; nil: there is none. The error is [errChanged] if it has
	// changed meanwhile.
	read(ctx context.Context, name string) (*object, error)
	// write puts an object in the place of the one that was read, or of none (nil).
	// The error is [errChanged] if there is another by now.
	write(ctx context.Context, name string, was, next *object) error
}

// object is what is under a name.
type object struct {
	text    []byte
	kind    string // content type, or [anyValue]
	cache   string // cache control, likewise
	version string // of what was read, unlike that of any other; for store.write
}

// has reports whether an object that was read is the one that is to be there.
func (o *object) has(next *object) bool {
	same := func(a, b string) bool { return a == b || a == anyValue }
	return string(o.text) == string(next.text) && same(o.kind, next.kind) && same(o.cache, next.cache)
}

// document is an object that a target is to have.
type document struct {
	name string
	object
}

// target is a place and what this server knows of it.
type target struct {
	config Config
	store  store
	o      *Options
	log    *slog.Logger

	trying sync.Mutex        // one try at a time; before mu
	has    map[string]string // texts of documents that were there at the last look, by name; under trying

	mu sync.Mutex
	outcome
}

// outcome is what has come of the tries.
type outcome struct {
	past      []publication // the newest last
	sequence  uint64        // of the documents there; 0: none known
	newest    uint64        // of this server's bundle at the last try
	published time.Time     // of the last good try
	tried     time.Time
	failures  int // since the last good try
	failure   string
	next      time.Time
	ahead     time.Time // since when a document is newer than this server's; zero: none is
}

func newTarget(c Config, s store, o *Options) *target {
	t := &target{config: c, store: s, o: o, log: o.Log.With("target", c.Name), has: make(map[string]string)}
	o.Metrics.PublishTries.WithLabelValues(c.Name, "ok")
	o.Metrics.PublishTries.WithLabelValues(c.Name, "failed")
	o.Metrics.PublishRepairs.WithLabelValues(c.Name)
	o.Metrics.PublishedAt.WithLabelValues(c.Name)
	o.Metrics.PublishedSequence.WithLabelValues(c.Name)
	return t
}

// State is how a target is.
type State string

// The states of a target.
const (
	Pending State = "pending" // it was not tried yet
	Current State = "current" // it has the newest documents that this server knows, or newer ones
	Failing State = "failing" // the last try failed
)

// Status is how a target is.
type Status struct {
	Name        string
	Place       string   // for people
	Documents   []string // their paths in it
	State       State
	Sequence    uint64    // of the bundle that the documents there are made of; 0: it is not known
	Newest      uint64    // of this server's bundle when it was last tried
	PublishedAt time.Time // when the target was last seen to have all; zero: not since the start
	TriedAt     time.Time
	NextTry     time.Time
	Failures    int    // since PublishedAt
	Error       string // why the last try failed
}

func (t *target) status() Status {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Status{
		Name: t.config.Name, Place: t.store.String(), Documents: t.config.paths(), State: Current,
		Sequence: t.sequence, Newest: t.newest, PublishedAt: t.published, TriedAt: t.tried, NextTry: t.next,
		Failures: t.failures, Error: t.failure,
	}
	switch {
	case t.tried.IsZero():
		s.State = Pending
	case t.failures > 0:
		s.State = Failing
	}
	return s
}

// documents are those of a bundle, keys before what names them.
func (t *target) documents(b *bundle.Bundle) (all []document, err error) {
	add := func(name string, text []byte, age time.Duration) {
		all = append(all, document{name, object{text: text, kind: contentType, cache: fmt.Sprintf("public, max-age=%d", age/time.Second)}})
	}
	for _, issuer := range t.config.Issuers {
		metadata, keys, err := oidc.Documents(issuer.URL, b)
		if err != nil {
			return nil, err
		}
		at, above := issuer.paths()
		add(at, keys, t.o.MaxAge)
		add(above, metadata, t.o.MaxAge)
	}
	if t.config.Bundle != "" {
		text, err := b.Document()
		if err != nil {
			return nil, err
		}
		add(t.config.Bundle, text, b.RefreshHint/2)
	}
	for _, d := range all {
		if len(d.text) > maxDocument {
			return nil, fmt.Errorf("%s is %d bytes long, and the most is %d; revoke authorities that are not needed", d.name, len(d.text), maxDocument)
		}
	}
	return all, nil
}

// try brings a target up to date, and returns when to try next.
func (t *target) try(ctx context.Context, b *bundle.Bundle) (wait time.Duration) {
	t.trying.Lock()
	defer t.trying.Unlock()
	there, err := t.publish(ctx, b)
	if err != nil && ctx.Err() != nil {
		return 0 // the server ends
	}
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tried = now
	if b != nil {
		t.newest = b.SequenceNumber
	}
	if newer := (*newerError)(nil); errors.As(err, &newer) {
		there = newer.there
		if t.ahead.IsZero() {
			t.ahead = now
		}
		if now.Sub(t.ahead) < catchUp { // another server's: what it knows is soon known here
			t.log.Debug("the target has a newer document than this server knows", "document", newer.name, "sequence_number", there)
			t.sequence, t.next = there, now.Add(minRetry)
			return minRetry
		}
	} else {
		t.ahead = time.Time{}
	}
	t.sequence = cmp.Or(there, t.sequence)
	t.o.Metrics.PublishedSequence.WithLabelValues(t.config.Name).Set(float64(t.sequence))
	if err != nil {
		t.o.Metrics.PublishTries.WithLabelValues(t.config.Name, "failed").Inc()
		wait = min(minRetry<<min(t.failures, 20), maxRetry)
		wait -= time.Duration(rand.Float64() * 0.5 * float64(wait))
		t.failures++
		t.failure, t.next = strings.ReplaceAll(err.Error(), "\n", "; "), now.Add(wait)
		level := slog.LevelDebug // it is loud when the number of failures doubles
		if t.failures&(t.failures-1) == 0 {
			level = slog.LevelWarn
		}
		t.log.Log(ctx, level, "the target does not get what is to be published; who reads it knows nothing of later keys until it does",
			"place", t.store, "failures", t.failures, "error", t.failure, "next", t.next)
		return wait
	}
	if t.failures > 0 {
		t.log.Info("the target has what is published again", "place", t.store)
	}
	t.o.Metrics.PublishTries.WithLabelValues(t.config.Name, "ok").Inc()
	t.o.Metrics.PublishedAt.WithLabelValues(t.config.Name).Set(float64(now.Unix()))
	t.published, t.failures, t.failure = now, 0, ""
	t.remember(b, now)
	wait = checkEvery - time.Duration(rand.Float64()*early*float64(checkEvery))
	t.next = now.Add(wait)
	return wait
}

// publish brings the documents of a target up to date, and returns the sequence
// number that all of them have; 0: it is not known.
func (t *target) publish(ctx context.Context, b *bundle.Bundle) (sequence uint64, err error) {
	if b == nil {
		return 0, errors.New("there is no bundle yet")
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTime)
	defer cancel()
	all, err := t.documents(b)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, d := range all {
		if err := t.put(ctx, d, b.SequenceNumber); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", d.name, err))
		}
	}
	if len(errs) > 0 {
		return 0, errors.Join(errs...)
	}
	return b.SequenceNumber, nil
}

// newerError says that a document is newer than this server's.
type newerError struct {
	name         string
	there, known uint64
}

func (e *newerError) Error() string {
	return fmt.Sprintf("its sequence number is %d, and this server knows of none after %d: another trust domain publishes there, or somebody has changed it; "+
		"give the target a place of its own, or delete the document", e.there, e.known)
}

// put brings one document up to date.
func (t *target) put(ctx context.Context, d document, sequence uint64) error {
	for range maxRaces {
		was, err := t.store.read(ctx, d.name)
		switch {
		case errors.Is(err, errChanged):
			continue
		case err != nil:
			return err
		}
		known := t.has[d.name]
		if was != nil {
			if there := sequenceOf(was.text); there > sequence {
				return &newerError{d.name, there, sequence}
			}
			if was.has(&d.object) {
				t.has[d.name] = string(d.text)
				return nil
			}
		}
		switch err := t.store.write(ctx, d.name, was, &d.object); {
		case errors.Is(err, errChanged):
			continue
		case err != nil:
			return err
		}
		t.has[d.name] = string(d.text)
		switch repaired := known == string(d.text); {
		case repaired && was == nil:
			t.log.Warn("a document was gone from the target and is put back; if nobody deleted it on purpose, look who may write there", "document", d.name)
			t.o.Metrics.PublishRepairs.WithLabelValues(t.config.Name).Inc()
		case repaired:
			t.log.Warn("a document of the target was changed by somebody else and is put back; look who may write there", "document", d.name)
			t.o.Metrics.PublishRepairs.WithLabelValues(t.config.Name).Inc()
		default:
			t.log.Info("document published", "place", t.store, "document", d.name, "sequence_number", sequence)
		}
		return nil
	}
	return errChanged
}

// sequenceOf returns the sequence number in a document; 0: it has none, or is none.
func sequenceOf(text []byte) uint64 {
	var d struct {
		Sequence uint64 `json:"spiffe_sequence"`
	}
	if json.Unmarshal(text, &d) != nil {
		return 0
	}
	return d.Sequence
}
