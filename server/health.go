package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// readiness returns why a server cannot issue anything now, or nil. It is for
// whoever asked, and of a server that runs until its context ends.
func readiness(asked, running context.Context, st store.Store, authorities *authority.Authorities, keys apiv1.KeyManager) error {
	if running.Err() != nil {
		return errors.New("the server is stopping")
	}
	// A prefix of one record, which every store has.
	if _, err := st.Read(asked, "trust-domain", func(store.Record) error { return nil }); err != nil {
		return fmt.Errorf("the store cannot be read: %w", err)
	}
	now := time.Now()
	for _, kind := range authorities.Kinds() {
		switch active, _, _ := authorities.State(kind); {
		case active == nil:
			return fmt.Errorf("there is no active %v authority", kind)
		case !now.Before(active.ExpiresAt):
			return fmt.Errorf("the active %v authority has expired", kind)
		}
	}
	if k, ok := keys.(interface{ Available() error }); ok {
		return k.Available()
	}
	return nil
}

// state is how a server is, for its metrics.
func state(reg *registry.Registry, pushes *feed.Feed, authorities *authority.Authorities) metrics.State {
	view := reg.View()
	s := metrics.State{
		Entries:       view.EntryCount(),
		Nodes:         view.NodeCount(),
		Revision:      int64(view.Revision()),
		AgentsBehind:  pushes.Behind(),
		AuthorityEnds: make(map[string]time.Time),
	}
	for _, kind := range authorities.Kinds() {
		if active, _, _ := authorities.State(kind); active != nil {
			s.AuthorityEnds[kind.String()] = active.ExpiresAt
		}
	}
	return s
}
