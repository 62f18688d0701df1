package endpoint

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

const (
	// selectorsLifetime is how long the selectors of a process are used again
	// on one connection. A process may change its groups or its labels; it is
	// not worth attesting it for each of several calls that come together.
	selectorsLifetime = 3 * time.Second
	// slowAttestation is how long an attestation may take that is not worth
	// repeating at once, though an attestor failed: one that hangs would delay
	// each call by its whole deadline.
	slowAttestation = time.Second
	// startWait is how long a call waits for an agent that has just started.
	startWait = 2 * time.Second
	// quietFor is how long a process that was denied, or given the same kind of
	// SVID, is not logged again above the level debug.
	quietFor = 10 * time.Second
)

// Caller is one connection and the process at its other end.
type Caller struct {
	Peer *peercred.Peer

	user      *user
	attesting chan struct{} // cap 1: a lock that can be given up
	known     atomic.Pointer[attested]
}

type attested struct {
	selectors selector.Set
	until     time.Time
}

// Caller returns the connection that a call came on.
func (e *Endpoint) Caller(ctx context.Context) (*Caller, error) {
	p, err := peercred.FromContext(ctx)
	if err != nil {
		e.log.Error("a call came without a peer", "error", err)
		return nil, ErrDenied
	}
	c, ok := e.callers.byPeer.Load(p)
	if !ok {
		return nil, ErrDenied // its connection is closed
	}
	return c.(*Caller), nil
}

// Identify returns the process that makes a call and its selectors. The error
// is one for the caller.
func (e *Endpoint) Identify(ctx context.Context) (*Caller, selector.Set, error) {
	c, err := e.Caller(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := e.waitSynced(ctx); err != nil {
		return nil, nil, err
	}
	if set, ok, err := e.knownSelectors(c); ok || err != nil {
		return c, set, err
	}
	// Calls that come together on one connection share one attestation.
	select {
	case c.attesting <- struct{}{}:
		defer func() { <-c.attesting }()
	case <-ctx.Done():
		return nil, nil, Ended(ctx)
	}
	if set, ok, err := e.knownSelectors(c); ok || err != nil {
		return c, set, err
	}
	started := e.now()
	set, results, err := e.o.Attestor.Attest(ctx, c.Peer)
	if err != nil {
		if ctx.Err() != nil {
			return nil, nil, Ended(ctx)
		}
		return nil, nil, e.Deny(c, err)
	}
	failed := slices.ContainsFunc(results, func(r workload.Result) bool { return r.Err != nil })
	if failed && e.now().Sub(started) < slowAttestation {
		return c, set, nil // the next call may get more
	}
	c.known.Store(&attested{set, e.now().Add(selectorsLifetime)})
	return c, set, nil
}

// waitSynced waits a while for an agent that has just started to learn what
// it may give out: a client that is told to try again does so much later.
func (e *Endpoint) waitSynced(ctx context.Context) error {
	if e.o.Held.Synced() {
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	if e.o.Held.WaitSynced(wait) == nil {
		return nil
	}
	if ctx.Err() != nil {
		return Ended(ctx)
	}
	return ErrNotReady
}

// knownSelectors returns the selectors of an earlier call. They are the
// process's as long as that runs.
func (e *Endpoint) knownSelectors(c *Caller) (selector.Set, bool, error) {
	known := c.known.Load()
	if known == nil || !e.now().Before(known.until) {
		return nil, false, nil
	}
	if err := e.Alive(c); err != nil {
		return nil, false, err
	}
	return known.selectors, true, nil
}

// Alive denies a caller whose process has ended.
func (e *Endpoint) Alive(c *Caller) error {
	if err := c.Peer.Alive(); err != nil {
		return e.Deny(c, err)
	}
	return nil
}

var errNoEntry = errors.New("no entry matches its selectors")

// DenyUnmatched denies a caller that no entry is for.
func (e *Endpoint) DenyUnmatched(c *Caller, set selector.Set) error {
	return e.Deny(c, errNoEntry, "selectors", logged{set})
}

// Deny logs why a caller gets nothing. It returns [ErrDenied].
func (e *Endpoint) Deny(c *Caller, why error, attrs ...any) error {
	const what = "no identity issued"
	if level, on := e.recorded(c, what); on {
		attrs = append([]any{"pid", c.Peer.PID, "uid", c.Peer.UID, "reason", why}, attrs...)
		e.log.Log(context.Background(), level, what, attrs...)
	}
	return ErrDenied
}

// Given logs of which IDs a caller gets SVIDs. For most calls nothing is
// logged, and nothing allocated.
func (e *Endpoint) Given(c *Caller, what string, ids iter.Seq[spiffeid.ID], audience []string) {
	level, on := e.recorded(c, what)
	if !on {
		return
	}
	attrs := []any{"pid", c.Peer.PID, "uid", c.Peer.UID, "spiffe_ids", slices.Collect(ids)}
	if audience != nil {
		attrs = append(attrs, "audience", audience)
	}
	e.log.Log(context.Background(), level, what, attrs...)
}

// recorded says how loud something about a process is logged, and whether it is
// at all: not for each of its calls above the level debug.
func (e *Endpoint) recorded(c *Caller, what string) (level slog.Level, on bool) {
	cs, now, of := &e.callers, e.now(), event{c.Peer.PID, what}
	cs.mu.Lock()
	if last, known := cs.logged[of]; known && now.Sub(last) < quietFor {
		level = slog.LevelDebug
	} else {
		if len(cs.logged) >= maxRemembered {
			clear(cs.logged)
		}
		cs.logged[of] = now
	}
	cs.mu.Unlock()
	return level, e.log.Enabled(context.Background(), level)
}

// logged writes selectors only if the log is on.
type logged struct{ selector.Set }

func (l logged) String() string { return fmt.Sprint(l.Set.Strings()) }

// MarshalText writes the selectors for a log.
func (l logged) MarshalText() ([]byte, error) { return []byte(l.String()), nil }
