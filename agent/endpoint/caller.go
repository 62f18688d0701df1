package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/status"

	agentworkload "github.com/hallmark-id/hallmark/agent/workload"
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
	// deniedLogged is how long a process that has no identity is not logged
	// again.
	deniedLogged = 10 * time.Second
	// maxRemembered is how many users without connections, and how many
	// processes without an identity, are remembered.
	maxRemembered = 4096
)

// caller is one connection and the process at its other end.
type caller struct {
	peer *peercred.Peer
	user *user

	attesting chan struct{} // cap 1: a lock that can be given up
	known     atomic.Pointer[attested]
}

type attested struct {
	selectors selector.Set
	until     time.Time
}

// user is what all processes of a UID do together.
type user struct {
	connections int
	streams     int
	calls       *rate.Limiter
}

// callers are all connections, and the bounds they keep to.
type callers struct {
	limits Limits
	byPeer sync.Map // *peercred.Peer → *caller

	mu     sync.Mutex
	total  int
	users  map[uint32]*user
	pids   map[int32]int       // connections
	denied map[int32]time.Time // when last logged
}

func (l Limits) withDefaults() Limits {
	orDefault(&l.Connections, DefaultConnections)
	orDefault(&l.ConnectionsOfUser, DefaultConnectionsOfUser)
	orDefault(&l.ConnectionsOfPID, DefaultConnectionsOfPID)
	orDefault(&l.StreamsOfUser, DefaultStreamsOfUser)
	orDefault(&l.CallsOfUser, DefaultCallsOfUser)
	return l
}

// burst is how many calls a user may make at once.
func (l Limits) burst() int { return int(2*l.CallsOfUser) + 1 }

// SetLimits changes the limits of a server that runs. Connections and streams
// beyond the new ones stay open; no more are added.
func (s *Server) SetLimits(l Limits) {
	cs := &s.callers
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.limits = l.withDefaults()
	for _, u := range cs.users {
		u.calls.SetLimit(rate.Limit(cs.limits.CallsOfUser))
		u.calls.SetBurst(cs.limits.burst())
	}
}

func (cs *callers) init(l Limits) {
	cs.limits = l.withDefaults()
	cs.users = make(map[uint32]*user)
	cs.pids = make(map[int32]int)
	cs.denied = make(map[int32]time.Time)
}

func orDefault[T int | float64](v *T, or T) {
	if *v <= 0 {
		*v = or
	}
}

// admit decides on a new connection. What it refuses it refuses at once:
// a connection that waits in the kernel's queue could outlive its process.
func (s *Server) admit(p *peercred.Peer) (release func(), err error) {
	cs := &s.callers
	cs.mu.Lock()
	defer cs.mu.Unlock()
	u := cs.users[p.UID]
	if u == nil {
		cs.forgetIdle()
		u = &user{calls: rate.NewLimiter(rate.Limit(cs.limits.CallsOfUser), cs.limits.burst())}
		cs.users[p.UID] = u
	}
	switch {
	case cs.total >= cs.limits.Connections:
		return nil, fmt.Errorf("%v: there are %d connections already", p, cs.total)
	case u.connections >= cs.limits.ConnectionsOfUser:
		return nil, fmt.Errorf("%v: its user has %d connections already", p, u.connections)
	case cs.pids[p.PID] >= cs.limits.ConnectionsOfPID:
		return nil, fmt.Errorf("%v: it has %d connections already", p, cs.pids[p.PID])
	case !u.calls.Allow():
		return nil, fmt.Errorf("%v: its user makes more than %v calls a second", p, cs.limits.CallsOfUser)
	}
	cs.total++
	u.connections++
	cs.pids[p.PID]++
	cs.byPeer.Store(p, &caller{peer: p, user: u, attesting: make(chan struct{}, 1)})
	return func() { cs.release(p, u) }, nil
}

func (cs *callers) release(p *peercred.Peer, u *user) {
	cs.byPeer.Delete(p)
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.total--
	u.connections--
	if cs.pids[p.PID]--; cs.pids[p.PID] == 0 {
		delete(cs.pids, p.PID)
	}
}

// forgetIdle makes room for another user. A user who is remembered without
// connections keeps its rate, whatever it does in the meantime.
func (cs *callers) forgetIdle() {
	if len(cs.users) < maxRemembered {
		return
	}
	for uid, u := range cs.users {
		if u.connections == 0 && u.streams == 0 {
			delete(cs.users, uid)
		}
	}
}

func (cs *callers) openStream(c *caller) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.user.streams >= cs.limits.StreamsOfUser {
		return false
	}
	c.user.streams++
	return true
}

func (cs *callers) closeStream(c *caller) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.user.streams--
}

// callerOf returns the connection that a call came on.
func (s *Server) callerOf(ctx context.Context) (*caller, error) {
	p, err := peercred.FromContext(ctx)
	if err != nil {
		s.log.Error("a call came without a peer", "error", err)
		return nil, errNone
	}
	c, ok := s.callers.byPeer.Load(p)
	if !ok {
		return nil, errNone // its connection is closed
	}
	return c.(*caller), nil
}

// identify returns the selectors of the process that makes a call. The error is
// one for the caller.
func (s *Server) identify(ctx context.Context) (*caller, selector.Set, error) {
	c, err := s.callerOf(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := s.waitSynced(ctx); err != nil {
		return nil, nil, err
	}
	if set, ok, err := s.knownSelectors(c); ok || err != nil {
		return c, set, err
	}
	// Calls that come together on one connection share one attestation.
	select {
	case c.attesting <- struct{}{}:
		defer func() { <-c.attesting }()
	case <-ctx.Done():
		return nil, nil, status.FromContextError(ctx.Err()).Err()
	}
	if set, ok, err := s.knownSelectors(c); ok || err != nil {
		return c, set, err
	}
	started := s.now()
	set, results, err := s.o.Attestor.Attest(ctx, c.peer)
	if err != nil {
		if ctx.Err() != nil {
			return nil, nil, status.FromContextError(ctx.Err()).Err()
		}
		return nil, nil, s.ended(c, err)
	}
	failed := slices.ContainsFunc(results, func(r agentworkload.Result) bool { return r.Err != nil })
	if failed && s.now().Sub(started) < slowAttestation {
		return c, set, nil // the next call may get more
	}
	c.known.Store(&attested{set, s.now().Add(selectorsLifetime)})
	return c, set, nil
}

// waitSynced waits a while for an agent that has just started to learn what
// it may give out: a client that is told to try again does so much later.
func (s *Server) waitSynced(ctx context.Context) error {
	if s.o.Held.Synced() {
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	if s.o.Held.WaitSynced(wait) == nil {
		return nil
	}
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	return errNotYet
}

// knownSelectors returns the selectors of an earlier call. They are the
// process's as long as that runs.
func (s *Server) knownSelectors(c *caller) (selector.Set, bool, error) {
	known := c.known.Load()
	if known == nil || !s.now().Before(known.until) {
		return nil, false, nil
	}
	if err := c.peer.Alive(); err != nil {
		return nil, false, s.ended(c, err)
	}
	return known.selectors, true, nil
}

func (s *Server) ended(c *caller, err error) error {
	s.denied(c, err)
	return errNone
}

var errNoEntry = errors.New("no entry matches its selectors")

// denied logs why a caller gets nothing, and not for each of its attempts.
func (s *Server) denied(c *caller, why error, attrs ...any) {
	cs, now := &s.callers, s.now()
	cs.mu.Lock()
	last, known := cs.denied[c.peer.PID]
	quiet := known && now.Sub(last) < deniedLogged
	if !quiet {
		if len(cs.denied) >= maxRemembered {
			clear(cs.denied)
		}
		cs.denied[c.peer.PID] = now
	}
	cs.mu.Unlock()
	if quiet {
		return
	}
	attrs = append([]any{"pid", c.peer.PID, "uid", c.peer.UID, "reason", why}, attrs...)
	s.log.Info("no identity issued", attrs...)
}

// noEntry denies a caller that no entry is for.
func (s *Server) noEntry(c *caller, set selector.Set) error {
	s.denied(c, errNoEntry, "selectors", logged{set})
	return errNone
}

// logged writes selectors only if the log is on.
type logged struct{ selector.Set }

func (l logged) String() string { return fmt.Sprint(l.Set.Strings()) }

// MarshalText writes the selectors for a log.
func (l logged) MarshalText() ([]byte, error) { return []byte(l.String()), nil }
