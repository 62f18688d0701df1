package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/pkg/sizing"
)

const (
	batch    = 1000    // entries created, deleted or listed in one call
	writers  = 2       // batches under way at once
	syncMost = 100_000 // entries of the node that syncs
	syncs    = 20      // how often it does
)

// Entries measures a server at each of the plan's numbers of entries. With an
// error it returns what was measured before.
func Entries(ctx context.Context, plan sizing.Plan) (_ *sizing.Report, err error) {
	s, report, err := begin(ctx, plan, "entries")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close()) }()
	r := &registry{server: s, report: report}
	defer func() { err = errors.Join(err, r.clear(context.WithoutCancel(ctx))) }()
	w, err := newWorkload(ctx, s)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.close(context.WithoutCancel(ctx))) }()
	for i, n := range plan.Sizes {
		if err := r.measure(ctx, n, w); err != nil {
			report.Cut(i)
			return report, fmt.Errorf("with %d entries: %w", n, err)
		}
	}
	return report, nil
}

// registry is the entries of a measurement.
type registry struct {
	*server
	report *sizing.Report
	filled int
}

func (r *registry) measure(ctx context.Context, n int, w *workload) error {
	r.note("creating entries up to %d", n)
	if err := r.fill(ctx, n); err != nil {
		return err
	}
	r.note("%d entries: waiting until what was written is merged", n)
	if err := r.atRest(ctx); err != nil {
		return err
	}
	r.note("%d entries: from a change to the workload, %d times", n, r.plan.Samples)
	created, deleted, err := w.follow(ctx, r.plan.Samples)
	if err != nil {
		return err
	}
	r.report.AddTimes("entry create → SVID on an open stream", created)
	r.report.AddTimes("entry delete → gone from the stream", deleted)
	r.note("%d entries: listing all, in pages of %d", n, batch)
	if err := r.list(ctx); err != nil {
		return err
	}
	r.note("%d entries: syncing %d as SPIRE's agents do", n, min(n, syncMost))
	if err := r.sync(ctx); err != nil {
		return err
	}
	before, err := r.usage()
	if err != nil {
		return err
	}
	r.report.Add("memory of the server", "MB", "after filling", before.memory/1e6)
	if !r.own() {
		return nil
	}
	r.note("%d entries: restarting the server", n)
	took, err := r.restart(ctx)
	if err != nil {
		return err
	}
	after, err := r.usage()
	if err != nil {
		return err
	}
	r.report.Add("memory of the server", "MB", "after a restart", after.memory/1e6)
	r.report.Add("start of the server", "s", "until it serves", took.Seconds())
	r.report.Add("start of the server", "s", "CPU", after.cpu.Seconds())
	return w.connected(ctx)
}

// entry is the i-th entry of a cluster: its node's, with three selectors. The
// first ones are of one node.
func (r *registry) entry(i int) *types.Entry {
	parent := syncPath
	if i >= syncMost {
		parent = fmt.Sprintf("%s/%d", nodesPath, i%1000)
	}
	team, name := fmt.Sprintf("team-%d", i%200), fmt.Sprintf("service-%d", i)
	return &types.Entry{
		Id:       r.entryID(i),
		SpiffeId: r.id("/ns/" + team + "/sa/" + name), ParentId: r.id(parent),
		Selectors: []*types.Selector{{Type: "k8s", Value: "ns:" + team}, {Type: "k8s", Value: "sa:" + name}, {Type: "k8s", Value: "container-name:main"}},
	}
}

// entryID is as long as the IDs that the server makes.
func (r *registry) entryID(i int) string {
	return fmt.Sprintf("bench-%s-%021d", path.Base(r.below), i)
}

// fill creates entries until there are n, and others beside them one at a time.
func (r *registry) fill(ctx context.Context, n int) error {
	first, began := r.filled, time.Now()
	r.filled = n
	var took, cost time.Duration
	singles, err := r.probed(ctx, func() (err error) {
		cost, err = r.cost(func() error { return r.createUpTo(ctx, first, n) })
		took = time.Since(began)
		return err
	})
	if err != nil {
		return err
	}
	r.report.Add("entries created, in batches of 1,000", "thousand/s", "synced", float64(n-first)/took.Seconds()/1000)
	r.report.Add("an entry of a batch of 1,000", "µs", "CPU of the server", float64(cost.Microseconds())/float64(n-first))
	r.report.AddTimes("create one entry meanwhile", singles)
	return nil
}

func (r *registry) createUpTo(ctx context.Context, first, n int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(writers)
	for i := first; i < n && ctx.Err() == nil; i += batch {
		g.Go(func() error {
			entries := make([]*types.Entry, min(batch, n-i))
			for j := range entries {
				entries[j] = r.entry(i + j)
			}
			return r.create(ctx, entries...)
		})
	}
	return g.Wait()
}

// clear deletes what fill created, from a server that stays.
func (r *registry) clear(ctx context.Context) error {
	if r.own() {
		return nil
	}
	ids := make([]string, r.filled)
	for i := range ids {
		ids[i] = r.entryID(i)
	}
	return r.remove(ctx, ids...)
}

// list lists all entries, and checks that they come in order.
func (r *registry) list(ctx context.Context) error {
	var pages []time.Duration
	var last string
	n := 0
	cost, err := r.cost(func() error {
		req := &entryv1.ListEntriesRequest{PageSize: batch, OutputMask: &types.EntryMask{}}
		for {
			began := time.Now()
			resp, err := r.entries().ListEntries(ctx, req)
			if err != nil {
				return fmt.Errorf("list entries: %w", err)
			}
			pages = append(pages, time.Since(began))
			n += len(resp.Entries)
			for _, e := range resp.Entries {
				if e.Id <= last {
					return fmt.Errorf("list entries: %q came after %q", e.Id, last)
				}
				last = e.Id
			}
			if req.PageToken = resp.NextPageToken; req.PageToken == "" {
				return nil
			}
		}
	})
	if err != nil {
		return err
	}
	if n < r.filled {
		return fmt.Errorf("list entries: %d came of %d", n, r.filled)
	}
	r.report.Add("a page of 1,000 IDs", "ms", "p50", milliseconds(sizing.Quantile(pages, 0.50)))
	r.report.Add("a page of 1,000 IDs", "ms", "p99", milliseconds(sizing.Quantile(pages, 0.99)))
	r.report.Add("a page of 1,000 IDs", "ms", "CPU", milliseconds(cost)/float64(len(pages)))
	return nil
}

// sync is what an agent of SPIRE does every few seconds, when nothing has
// changed for it.
func (r *registry) sync(ctx context.Context) error {
	n, err := r.newNode(ctx, syncPath)
	if err != nil {
		return err
	}
	run, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = n.Run(run) // that it failed shows in Link
	}()
	defer func() { <-ended }()
	defer stop()
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	link, err := n.Link(waiting)
	if err != nil {
		return fmt.Errorf("connect the node that syncs: %w (%v)", err, n.Status().LastError)
	}
	defer link.Release()
	client := entryv1.NewEntryClient(link.Conn())
	want := min(r.filled, syncMost)
	cost, err := r.cost(func() error {
		for range syncs {
			if err := syncOnce(ctx, client, want); err != nil {
				return fmt.Errorf("sync entries: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	r.report.Add("unchanged sync of SPIRE's call, up to 100,000 entries", "ms", "CPU", milliseconds(cost)/syncs)
	return r.evict(ctx, n.Status().ID)
}

func syncOnce(ctx context.Context, client entryv1.EntryClient, want int) error {
	stream, err := client.SyncAuthorizedEntries(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
		return err
	}
	n := 0
	for more := true; more; {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		n, more = n+len(resp.EntryRevisions)+len(resp.Entries), resp.More
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	if _, err := stream.Recv(); err != io.EOF {
		return fmt.Errorf("the server did not end the sync: %v", err)
	}
	if n < want { // the node's own alias may be one more
		return fmt.Errorf("%d entries came; there are %d", n, want)
	}
	return nil
}
