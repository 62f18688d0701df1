package endpoint

import (
	"fmt"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/pkg/peercred"
)

// Limits are bounds for all the processes of one user, or of one PID. 0 is the
// default.
type Limits struct {
	Connections       int     // in all; DefaultConnections
	ConnectionsOfUser int     // DefaultConnectionsOfUser
	ConnectionsOfPID  int     // DefaultConnectionsOfPID
	StreamsOfUser     int     // open at once; DefaultStreamsOfUser
	CallsOfUser       float64 // a second, with bursts of twice as many; DefaultCallsOfUser
}

// Defaults of Limits. On a node all containers often run as one user, so what
// one user may do is what a full node needs; a process needs a few connections
// only. All connections together take two descriptors each.
const (
	DefaultConnections       = 4096
	DefaultConnectionsOfUser = 2048
	DefaultConnectionsOfPID  = 32
	DefaultStreamsOfUser     = 8192
	DefaultCallsOfUser       = 2000
)

// maxRemembered is how many users without connections, and how many events of
// processes that were logged, are remembered.
const maxRemembered = 4096

// user is what all processes of a UID do together.
type user struct {
	connections int
	streams     int
	calls       *rate.Limiter
}

// callers are all connections, and the bounds they keep to.
type callers struct {
	limits Limits
	byPeer sync.Map // *peercred.Peer → *Caller

	mu     sync.Mutex
	total  int
	users  map[uint32]*user
	pids   map[int32]int       // connections
	logged map[event]time.Time // when
}

// event is what is logged of a process.
type event struct {
	pid  int32
	what string
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

// SetLimits changes the limits of an endpoint that runs. Connections and streams
// beyond the new ones stay open; no more are added.
func (e *Endpoint) SetLimits(l Limits) {
	cs := &e.callers
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
	cs.logged = make(map[event]time.Time)
}

func orDefault[T int | float64](v *T, or T) {
	if *v <= 0 {
		*v = or
	}
}

// admit decides on a new connection. What it refuses it refuses at once:
// a connection that waits in the kernel's queue could outlive its process.
func (e *Endpoint) admit(p *peercred.Peer) (release func(), err error) {
	cs := &e.callers
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
	cs.byPeer.Store(p, &Caller{Peer: p, user: u, attesting: make(chan struct{}, 1)})
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

func (cs *callers) openStream(c *Caller) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.user.streams >= cs.limits.StreamsOfUser {
		return false
	}
	c.user.streams++
	return true
}

func (cs *callers) closeStream(c *Caller) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.user.streams--
}
