package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/pkg/sizing"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const (
	renewPoll = 20 * time.Millisecond // how often agents are asked for their SVIDs
	// settle is how long after agents have come the server is left alone before
	// its rest is measured.
	settle = 5 * time.Second
)

// Agents measures a server at each of the plan's numbers of connected agents.
// With an error it returns what was measured before.
func Agents(ctx context.Context, plan sizing.Plan) (_ *sizing.Report, err error) {
	s, report, err := begin(ctx, plan, "agents")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	shared := s.newEntry("/shared", fleetPath)
	if err := s.create(ctx, shared); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.remove(context.WithoutCancel(ctx), shared.Id)) }()
	f := &crowd{fleet: newFleet(ctx, s, fleetPath), report: report}
	defer func() { err = errors.Join(err, f.close(context.WithoutCancel(ctx))) }()
	empty, err := s.usage()
	if err != nil {
		return nil, err
	}
	for i, n := range plan.Sizes {
		if err := f.measure(ctx, n, empty.memory); err != nil {
			report.Cut(i)
			return report, fmt.Errorf("with %d agents: %w", n, err)
		}
	}
	return report, nil
}

// crowd is a fleet that is measured.
type crowd struct {
	*fleet
	report *sizing.Report
}

func (f *crowd) measure(ctx context.Context, n int, empty float64) error {
	s := f.server
	s.note("attesting agents up to %d", n)
	if err := s.learn(ctx); err != nil { // its authorities may be others by now
		return err
	}
	first, began := len(f.agents), time.Now()
	cost, err := s.cost(func() error { return f.grow(ctx, n) })
	if err != nil {
		return err
	}
	f.report.Add("attest and connect an agent", "ms", "CPU of the server", milliseconds(cost)/float64(n-first))
	s.note("%d agents attested in %v", n-first, time.Since(began).Round(time.Millisecond))

	s.note("%d agents: one change to all of them, %d times", n, f.plan().Samples)
	if err := f.changes(ctx); err != nil {
		return err
	}
	s.note("%d agents: nothing, for %v", n, f.plan().Idle)
	if err := f.idle(ctx, empty); err != nil {
		return err
	}
	if !s.own() {
		return nil
	}
	s.note("%d agents: restarting the server", n)
	if err := f.reconnect(ctx); err != nil {
		return err
	}
	s.note("%d agents: all renew their SVIDs, as their authority is tainted", n)
	return f.renew(ctx)
}

func (f *crowd) plan() sizing.Plan { return f.server.plan }

// changes makes changes that concern every agent: an entry comes, and goes.
func (f *crowd) changes(ctx context.Context) error {
	var applied, acknowledged []time.Duration
	for range f.plan().Samples {
		e := f.server.newEntry("/change", fleetPath)
		for _, step := range []struct {
			shows func(held.Change) bool
			do    func() error
		}{
			{func(c held.Change) bool { return c.Complete || len(c.Entries) > 0 }, func() error { return f.server.create(ctx, e) }},
			{func(c held.Change) bool { return c.Complete || slices.Contains(c.GoneEntries, e.Id) }, func() error { return f.server.remove(ctx, e.Id) }},
		} {
			w := f.expect(step.shows)
			began := time.Now()
			if err := step.do(); err != nil {
				return err
			}
			took, err := w.wait(ctx, began)
			if err != nil {
				return err
			}
			if err := f.acknowledged(ctx); err != nil {
				return err
			}
			applied, acknowledged = append(applied, took...), append(acknowledged, time.Since(began))
		}
	}
	f.report.AddTimes("one change to all → an agent has it", applied)
	f.report.AddTimes("one change to all → the last has acknowledged", acknowledged)
	return nil
}

// acknowledged waits until the server knows that every agent has what it holds.
func (f *crowd) acknowledged(ctx context.Context) error {
	_, err := f.server.admin().AwaitAgents(ctx, &hallmarkv1.AwaitAgentsRequest{Wait: int32(patience.Seconds())})
	if err != nil {
		return fmt.Errorf("wait until all agents have acknowledged a change: %w", err)
	}
	return nil
}

// idle measures what agents cost to which nothing happens. Memory is measured
// last: meanwhile the server gives back what it does not use.
func (f *crowd) idle(ctx context.Context, empty float64) error {
	if err := sleep(ctx, settle); err != nil {
		return err
	}
	cost, err := f.server.cost(func() error { return sleep(ctx, f.plan().Idle) })
	if err != nil {
		return err
	}
	u, err := f.server.usage()
	if err != nil {
		return err
	}
	f.report.Add("memory of the server for each agent", "kB", "resident", (u.memory-empty)/1000/float64(len(f.agents)))
	if f.plan().Idle > 0 {
		f.report.Add("server at rest", "% of a core", "CPU", 100*cost.Seconds()/f.plan().Idle.Seconds())
	}
	return nil
}

// reconnect restarts the server and waits for all agents to be back. Time and
// cost are those since the new process began: its agents are there before it
// answers an operator.
func (f *crowd) reconnect(ctx context.Context) error {
	if err := f.server.stop(); err != nil {
		return err
	}
	w := f.expect(func(held.Change) bool { return true })
	began := time.Now()
	if _, err := f.server.start(ctx); err != nil {
		return err
	}
	took, err := w.wait(ctx, began)
	if err != nil {
		return err
	}
	u, err := f.server.usage()
	if err != nil {
		return err
	}
	f.report.AddTimes("server restarted → an agent is in step again", took)
	f.report.Add("an agent that comes back", "ms", "CPU of the server", milliseconds(u.cpu)/float64(len(f.agents)))
	return nil
}

// renew makes every agent renew its SVID at once: the authority that signed it
// is tainted.
func (f *crowd) renew(ctx context.Context) error {
	authorities := localauthorityv1.NewLocalAuthorityClient(f.server.conn)
	state, err := authorities.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
	if err != nil {
		return fmt.Errorf("ask for the authorities: %w", err)
	}
	if _, err := f.server.admin().RotateAuthority(ctx, &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_X509}); err != nil {
		return fmt.Errorf("rotate the authority: %w", err)
	}
	old := make(map[*agent]time.Time, len(f.agents))
	for _, a := range f.agents {
		old[a] = a.node.Status().ExpiresAt
	}
	began := time.Now()
	var renewed []time.Duration
	var cost time.Duration
	singles, err := f.server.probed(ctx, func() (err error) {
		cost, err = f.server.cost(func() error {
			if _, err := authorities.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: state.Active.GetAuthorityId()}); err != nil {
				return fmt.Errorf("taint the authority: %w", err)
			}
			renewed, err = awaitRenewal(ctx, old, began)
			return err
		})
		return err
	})
	if err != nil {
		return err
	}
	f.report.AddTimes("all renew at once → an agent has its SVID", renewed)
	f.report.AddTimes("create one entry meanwhile", singles)
	f.report.Add("renew and connect anew", "ms", "CPU of the server", milliseconds(cost)/float64(len(f.agents)))
	return nil
}

// awaitRenewal waits until no agent has the SVID any more that ends when old
// says.
func awaitRenewal(ctx context.Context, old map[*agent]time.Time, since time.Time) (took []time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		for a, end := range old {
			if !a.node.Status().ExpiresAt.Equal(end) {
				took = append(took, time.Since(since))
				delete(old, a)
			}
		}
		if len(old) == 0 {
			return took, nil
		}
		if err := sleep(ctx, renewPoll); err != nil {
			return nil, fmt.Errorf("%d agents have not renewed their SVIDs: %w", len(old), err)
		}
	}
}

// sleep waits for a time or for ctx to end.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
