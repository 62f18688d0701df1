package endpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Trusted is a caller whose process holds an identity that the configuration
// trusts with the identities of other workloads.
type Trusted struct {
	ID     spiffeid.ID // the one that it is trusted for
	Caller *Caller

	e         *Endpoint
	selectors selector.Set
}

var errUntrusted = errors.New("none of its identities is trusted with those of others")

// Trust attests the process that makes a call, and returns it if an entry gives
// it an identity that trusted says yes to. Everybody else is denied.
func (e *Endpoint) Trust(ctx context.Context, trusted func(spiffeid.ID) bool) (*Trusted, error) {
	c, selectors, err := e.Identify(ctx)
	if err != nil {
		return nil, err
	}
	entries := e.o.Held.Match(selectors)
	i := slices.IndexFunc(entries, func(n *entry.Entry) bool { return trusted(n.SPIFFEID) })
	if i < 0 {
		return nil, e.Deny(c, errUntrusted, "selectors", logged{selectors})
	}
	return &Trusted{ID: entries[i].SPIFFEID, Caller: c, e: e, selectors: selectors}, nil
}

// Check denies a caller that has ended, or has lost the identity that it was
// trusted for.
func (t *Trusted) Check() error { return t.check(t.e.o.Held.Look(t.selectors)) }

func (t *Trusted) check(u *held.Update) error {
	if err := t.e.Alive(t.Caller); err != nil {
		return err
	}
	if !slices.ContainsFunc(u.Entries, func(n *entry.Entry) bool { return n.SPIFFEID == t.ID }) {
		return t.e.Deny(t.Caller, fmt.Errorf("its entry for %s is gone", t.ID))
	}
	return nil
}

// While returns a context that ends as soon as the caller is not trusted any
// more; its cause is the error for the caller. Stop it.
func (t *Trusted) While(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	sub := t.e.o.Held.SubscribeBundles(t.selectors)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for {
			if err := t.check(sub.Update()); err != nil {
				cancel(err)
				return
			}
			select {
			case <-sub.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return ctx, func() { cancel(nil); <-watched; sub.Close() }
}

// Named is a process that a trusted caller named by its PID.
type Named struct {
	Selectors selector.Set

	by   *Trusted
	peer *peercred.Peer
	gone error
}

// ErrForeignPID is for a caller that lives in a PID namespace of its own: the
// process that it means has another PID here, and the one that has this PID
// here is another.
var ErrForeignPID = status.Error(codes.InvalidArgument, "PIDs are those of the agent's PID namespace, and the caller lives in another; "+
	"run it in the agent's (in Kubernetes, with hostPID: true)")

// Name pins and attests the process that has a PID, a positive one. Close what
// it returns. The error is one for the caller: gone if there is no such
// process.
func (t *Trusted) Name(ctx context.Context, pid int32, gone error) (*Named, error) {
	caller, err := peercred.ReadStatus(t.Caller.Peer.PID)
	if err != nil {
		return nil, t.e.Deny(t.Caller, err)
	}
	if err := t.e.Alive(t.Caller); err != nil { // so what was read was the caller's
		return nil, err
	}
	if caller.Nested {
		return nil, ErrForeignPID
	}
	p, err := peercred.Pin(pid)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // the ID of a thread
		return nil, gone
	}
	var set selector.Set
	if err == nil {
		if set, _, err = t.e.o.Attestor.Attest(ctx, p); err != nil {
			p.Close()
		}
	}
	switch {
	case err == nil:
		return &Named{Selectors: set, by: t, peer: p, gone: gone}, nil
	case errors.Is(err, peercred.ErrEnded):
		return nil, gone
	case ctx.Err() != nil:
		return nil, Ended(ctx)
	}
	t.e.log.Warn("a process that was named could not be looked at", "pid", pid, "error", err)
	return nil, status.Error(codes.Unavailable, "the process could not be looked at; try again later")
}

// Check returns an error once the process has ended, or its caller is not
// trusted any more.
func (n *Named) Check() error {
	if n.peer.Alive() != nil {
		return n.gone
	}
	return n.by.Check()
}

// While returns a context that ends as soon as Check would return an error;
// that is its cause. Stop it; that closes n.
func (n *Named) While(ctx context.Context) (_ context.Context, stop func()) {
	ctx, stopTrust := n.by.While(ctx)
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if n.peer.Wait() == nil {
			cancel(n.gone)
		}
	}()
	return ctx, func() { cancel(nil); n.peer.Close(); <-watched; stopTrust() }
}
