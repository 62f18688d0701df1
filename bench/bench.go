// Package bench measures what a server costs and how that grows, for sizing an
// installation.
//
// [Entries] measures a server with ever more registration entries, [Agents] one
// with ever more connected agents. Both drive a real server, as its operators
// and agents do: over its admin socket, and over mutual TLS with identities that
// the server attested. The simulated agents are the agent's own packages node
// and feed, and so attest, connect, come back and renew as agents do; they
// hold no workloads. Latency to a workload is measured through a whole agent.
//
// CPU time and memory are read from /proc, so the server has to run on this
// machine, and shares its processors with what loads it.
package bench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/sizing"
	"github.com/hallmark-id/hallmark/pkg/version"
)

// What a measurement registers stands under these, below a path of its own.
const (
	nodesPath    = "/node"     // parents of entries that concern nobody connected
	syncPath     = "/sync"     // the node that syncs as SPIRE's agents do
	fleetPath    = "/fleet"    // every simulated agent
	workloadPath = "/workload" // the node of the workload
)

// begin checks a plan and opens its server.
func begin(ctx context.Context, plan sizing.Plan, subject string) (*server, *sizing.Report, error) {
	if err := plan.Check(); err != nil {
		return nil, nil, err
	}
	s, err := open(ctx, plan)
	if err != nil {
		return nil, nil, err
	}
	return s, &sizing.Report{
		Subject: subject,
		Machine: fmt.Sprintf("%d CPUs, %s/%s", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH),
		Version: version.String(),
		Sizes:   plan.Sizes,
	}, nil
}

func (s *server) note(format string, args ...any) {
	if s.plan.Note != nil {
		s.plan.Note(fmt.Sprintf(format, args...))
	}
}

// newEntry makes an entry that names its own workload.
func (s *server) newEntry(path, parent string) *types.Entry {
	return &types.Entry{
		Id: uuid.NewString(), SpiffeId: s.id(path), ParentId: s.id(parent),
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:4294967294"}},
	}
}

// create creates entries; each has to be new.
func (s *server) create(ctx context.Context, entries ...*types.Entry) error {
	resp, err := s.entries().BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: entries, OutputMask: &types.EntryMask{}})
	if err != nil {
		return fmt.Errorf("create entries: %w", err)
	}
	for _, r := range resp.Results {
		if code := codes.Code(r.Status.GetCode()); code != codes.OK {
			return fmt.Errorf("create entry: %s: %s", code, r.Status.GetMessage())
		}
	}
	return nil
}

// remove deletes entries.
func (s *server) remove(ctx context.Context, ids ...string) error {
	for group := range slices.Chunk(ids, batch) {
		resp, err := s.entries().BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: group})
		if err != nil {
			return fmt.Errorf("delete entries: %w", err)
		}
		for _, r := range resp.Results {
			if code := codes.Code(r.Status.GetCode()); code != codes.OK && code != codes.NotFound {
				return fmt.Errorf("delete entry: %s: %s", code, r.Status.GetMessage())
			}
		}
	}
	return nil
}

// probeEvery is how often a probe creates an entry: rarely enough not to be a
// load itself.
const probeEvery = 20 * time.Millisecond

// probed runs f, and meanwhile creates and deletes single entries that concern
// nobody. It returns how long the creations took.
func (s *server) probed(ctx context.Context, f func() error) (took []time.Duration, err error) {
	done := make(chan struct{})
	var g errgroup.Group
	var once sync.Once
	end := func() { once.Do(func() { close(done) }) }
	defer end()
	g.Go(func() error {
		ticker := time.NewTicker(probeEvery)
		defer ticker.Stop()
		for {
			e := s.newEntry("/probe", nodesPath+"/probe")
			began := time.Now()
			if err := s.create(ctx, e); err != nil {
				return err
			}
			took = append(took, time.Since(began))
			if err := s.remove(ctx, e.Id); err != nil {
				return err
			}
			select {
			case <-ticker.C:
			case <-done:
				return nil
			}
		}
	})
	err = f()
	end()
	return took, errors.Join(err, g.Wait())
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
