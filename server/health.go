package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// readiness returns why a server cannot issue anything now, or nil. It is for
// whoever asked, and of a server that runs until its context ends.
func readiness(asked, running context.Context, st *opened, authorities *authority.Authorities) error {
	if running.Err() != nil {
		return errors.New("the server is stopping")
	}
	if err := readable(asked, st); err != nil {
		return fmt.Errorf("the store cannot be read: %w", err)
	}
	now := time.Now()
	for _, kind := range authorities.Kinds() {
		switch active, _, _ := authorities.State(kind); {
		case active == nil:
			return because(fmt.Errorf("there is no active %v authority", kind), authorities.UpstreamFailure())
		case !now.Before(active.ExpiresAt):
			return because(fmt.Errorf("the active %v authority has expired", kind), authorities.UpstreamFailure())
		}
	}
	return authorities.KeysAvailable()
}

// because adds to what is wrong that the authority above has failed, if it has.
func because(wrong, failure error) error {
	if failure == nil {
		return wrong
	}
	return fmt.Errorf("%w; the upstream authority: %w", wrong, failure)
}

// readable returns why the store cannot be read, or nil.
func readable(ctx context.Context, st *opened) error {
	if st.shared != nil {
		// Servers without a majority still issue: what they have in memory is
		// enough. Were none of them ready, agents would be kept from all.
		return st.shared.Ready(ctx)
	}
	// A prefix of one record, which every store has.
	_, err := st.Read(ctx, "trust-domain", func(store.Record) error { return nil })
	return err
}

// state is how a server is, for its metrics.
func state(reg *registry.Registry, pushes *feed.Feed, authorities *authority.Authorities, issued *journal.Journal) metrics.State {
	view := reg.View()
	s := metrics.State{
		Entries:       view.EntryCount(),
		Nodes:         view.NodeCount(),
		Revision:      int64(view.Revision()),
		AgentsBehind:  pushes.Behind(),
		LiveSVIDs:     issued.Live(),
		AuthorityEnds: make(map[string]time.Time),
	}
	if kind, _, _ := authorities.UpstreamState(); kind != "" {
		failing := authorities.UpstreamFailure() != nil
		s.UpstreamFailing = &failing
	}
	for _, kind := range authorities.Kinds() {
		if active, _, _ := authorities.State(kind); active != nil {
			s.AuthorityEnds[kind.String()] = active.ExpiresAt
		}
	}
	return s
}
