package api

import (
	"cmp"
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
)

// Limits bound what callers can make the server do. Zero stands for the
// default.
type Limits struct {
	Connections     int // TCP connections at once
	CallsPerSecond  int // calls over TCP of one caller
	AttestPerSecond int // attestations from one IP address
	SignPerSecond   int // signatures for one agent or downstream server
}

func (l Limits) withDefaults() Limits {
	l.Connections = cmp.Or(l.Connections, DefaultConnections)
	l.CallsPerSecond = cmp.Or(l.CallsPerSecond, DefaultCallsPerSecond)
	l.AttestPerSecond = cmp.Or(l.AttestPerSecond, DefaultAttestPerSecond)
	l.SignPerSecond = cmp.Or(l.SignPerSecond, DefaultSignPerSecond)
	return l
}

// SetLimits changes the limits of a server that runs. Connections beyond the new
// limit stay open; no more are added.
func (a *API) SetLimits(l Limits) {
	l = l.withDefaults()
	a.limits.Store(&l)
	// Two seconds' worth at once, and a whole batch in any case.
	a.calls.set(l.CallsPerSecond, 2*l.CallsPerSecond)
	a.attests.set(l.AttestPerSecond, 2*l.AttestPerSecond)
	a.signs.set(l.SignPerSecond, max(2*l.SignPerSecond, maxSignatures))
}

// maxAnonymous is how many connections may be without a valid X509-SVID: the
// rest is for agents, however many others come.
func (l Limits) maxAnonymous() int64 { return int64(max(l.Connections/2, 10)) }

// Defaults of [Limits]: far above what well-behaved agents need, and below
// what one of them needs to be in the way of the others.
const (
	DefaultConnections     = 15_000 // a process has 20,000 descriptors at most, in many places
	DefaultCallsPerSecond  = 4_000  // twice the signatures, each of which may be a call
	DefaultAttestPerSecond = 500    // SPIRE's figure
	DefaultSignPerSecond   = 2_000  // about a quarter of what one core can sign
)

// maxLimitWait is how long a call waits for its turn before it is refused.
const maxLimitWait = 5 * time.Second

// limiter holds a rate for each of many callers. It forgets those that have
// not called for a while, so that its size is bounded whoever calls.
type limiter struct {
	now func() time.Time

	mu        sync.Mutex
	perSecond int
	burst     int
	young     map[string]*rate.Limiter
	old       map[string]*rate.Limiter
	turned    time.Time // when young became old
}

const (
	limiterTurn = 10 * time.Second // longer than a caller needs to fill its bucket again
	limiterSize = 20_000           // callers in each generation
)

func newLimiter(perSecond, burst int, now func() time.Time) *limiter {
	return &limiter{perSecond: perSecond, burst: burst, now: now, young: make(map[string]*rate.Limiter), turned: now()}
}

// set changes the rate of every caller. One that is the same changes nothing.
func (l *limiter) set(perSecond, burst int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.perSecond, l.burst = perSecond, burst
	for _, generation := range []map[string]*rate.Limiter{l.young, l.old} {
		for _, r := range generation {
			r.SetLimit(rate.Limit(perSecond))
			r.SetBurst(burst)
		}
	}
}

// of returns the limiter of a caller.
func (l *limiter) of(caller string, now time.Time) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	if r := l.young[caller]; r != nil {
		return r
	}
	if now.Sub(l.turned) > limiterTurn || len(l.young) >= limiterSize {
		l.old, l.young, l.turned = l.young, make(map[string]*rate.Limiter), now
	}
	r := l.old[caller]
	if r == nil {
		r = rate.NewLimiter(rate.Limit(l.perSecond), l.burst)
	}
	l.young[caller] = r
	return r
}

// wait takes n from a caller's rate. It waits a bounded time for its turn, and
// refuses the call if that is not enough.
func (l *limiter) wait(ctx context.Context, caller string, n int) error {
	now := l.now()
	each := l.of(caller, now)
	r := each.ReserveN(now, n)
	delay := r.DelayFrom(now)
	if !r.OK() || delay > maxLimitWait {
		r.CancelAt(now)
		return callErrorf(codes.ResourceExhausted, "more than %v a second; try again later", float64(each.Limit()))
	}
	if delay == 0 {
		return nil
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		r.CancelAt(l.now())
		return status(ctx.Err())
	}
}

// limitCalls counts a call against the rate of the caller: its ID, or the
// address it comes from.
func (a *API) limitCalls(ctx context.Context, c *Caller) error {
	switch c.Kind {
	case local:
		return nil
	case anyone:
		return a.calls.wait(ctx, network(c.limited), 1)
	}
	return a.calls.wait(ctx, c.limited, 1)
}

// limitAttesting counts an attestation against the rate of the caller's
// address.
func (a *API) limitAttesting(ctx context.Context) error {
	if c := callerFrom(ctx); c.Kind != local {
		return a.attests.wait(ctx, network(c.limited), 1)
	}
	return nil
}

// LimitAddress counts a request over HTTP from an address, host:port, against the
// rate of attestations from there: what it shows is evidence as well.
func (a *API) LimitAddress(ctx context.Context, address string) error {
	return a.attests.wait(ctx, network(address), 1)
}

// LimitIssuer counts a signature for the tokens of an outside issuer against the
// rate that an agent has.
func (a *API) LimitIssuer(ctx context.Context, name string) error {
	return a.signs.wait(ctx, "issuer "+name, 1)
}

// limitSigning counts n signatures against the rate of the caller.
func (a *API) limitSigning(ctx context.Context, n int) error {
	if c := callerFrom(ctx); c.Kind != local {
		return a.signs.wait(ctx, c.limited, n)
	}
	return nil
}

// network returns what counts as one caller of an address host:port: the IPv4
// address, or the IPv6 network of 64 bits, of which a host may use all.
func network(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	ip = ip.Unmap().WithZone("")
	if ip.Is4() {
		return ip.String()
	}
	prefix, err := ip.Prefix(64)
	if err != nil {
		return host
	}
	return prefix.String()
}
