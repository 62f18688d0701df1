package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/hallmark-id/hallmark/agent/admin"
	"github.com/hallmark-id/hallmark/agent/feed"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/metrics"
	"github.com/hallmark-id/hallmark/agent/node"
)

// readiness returns why an agent is not in step with its server, or nil. It is
// for one that serves the Workload API until the context ends; what it holds it
// gives to processes even if it is not ready.
func readiness(running context.Context, c admin.Connection) error {
	switch {
	case running.Err() != nil:
		return errors.New("the agent is stopping")
	case c.Connected:
		return nil
	case c.LastError != nil:
		return fmt.Errorf("the agent is not in step with the server: %w", c.LastError)
	}
	return errors.New("the agent is not in step with the server yet")
}

// state is how an agent is, for its metrics.
func state(h *held.Held, n *node.Node, f *feed.Feed) metrics.State {
	s := metrics.State{
		Revision:   h.Revision(),
		InStep:     f.Status().InStep,
		Drifts:     f.Status().Drifts,
		NextExpiry: h.NextExpiry(),
		NodeExpiry: n.Status().ExpiresAt,
	}
	s.Entries, s.SVIDs = h.Counts()
	return s
}
