package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	realagent "github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/attestors/jointoken"
	"github.com/hallmark-id/hallmark/pkg/config"
)

// workload is this process as a workload: a whole agent in it, and an open
// stream of its Workload API.
type workload struct {
	server *server
	client *workloadapi.Client
	base   *types.Entry // held all the time, so that the stream goes on
	agent  spiffeid.ID  // of the agent
	stop   context.CancelFunc
	ended  chan struct{}
	failed error // why the agent ended; set before ended is closed

	updates chan update
}

// update is what a message of the stream holds.
type update struct {
	ids []string // SPIFFE IDs
	at  time.Time
}

func newWorkload(ctx context.Context, s *server) (_ *workload, err error) {
	j, err := s.token(ctx, workloadPath)
	if err != nil {
		return nil, err
	}
	encoded, err := j.Encode()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(s.plan.Dir, "agent")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "workload.sock")
	agent, err := spiffeid.FromSegments(s.td, "spire", "agent", jointoken.Name, j.Token)
	if err != nil {
		return nil, err
	}
	w := &workload{server: s, agent: agent, ended: make(chan struct{}), updates: make(chan update, 16)}
	ctx, w.stop = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close(context.WithoutCancel(ctx)))
		}
	}()
	src := config.Source{Data: fmt.Appendf(nil, "join: %s\ndata_dir: %s\nsocket: %s\nadmin_socket: %s\nlog: {level: error}\n",
		encoded, filepath.Join(dir, "data"), socket, filepath.Join(dir, "agent.sock"))}
	ready := make(chan struct{})
	go func() {
		defer close(w.ended)
		w.failed = realagent.Run(ctx, src, func() { close(ready) })
	}()
	select {
	case <-ready:
	case <-w.ended:
		return nil, fmt.Errorf("start the agent: %w", w.failed)
	}
	if w.client, err = workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket)); err != nil {
		return nil, err
	}
	w.base = w.entry("base")
	if err := s.create(ctx, w.base); err != nil {
		return nil, err
	}
	go func() { _ = w.client.WatchX509Context(ctx, w) }() // ends with ctx
	_, err = w.until(ctx, func(ids []string) bool { return slices.Contains(ids, w.spiffeID("base")) })
	return w, err
}

func (w *workload) close(ctx context.Context) error {
	w.stop()
	<-w.ended
	var err error
	if w.client != nil {
		err = w.client.Close()
	}
	if w.server.own() {
		return err // it goes with all it has
	}
	if w.base != nil {
		err = errors.Join(err, w.server.remove(ctx, w.base.Id))
	}
	return errors.Join(err, w.server.evict(ctx, w.agent))
}

func (w *workload) spiffeID(name string) string {
	id := w.server.id(workloadPath + "/" + name)
	return "spiffe://" + id.TrustDomain + id.Path
}

// entry makes an entry for this process.
func (w *workload) entry(name string) *types.Entry {
	e := w.server.newEntry(workloadPath+"/"+name, workloadPath)
	e.Selectors[0].Value = fmt.Sprintf("uid:%d", os.Getuid())
	return e
}

// OnX509ContextUpdate implements [workloadapi.X509ContextWatcher].
func (w *workload) OnX509ContextUpdate(c *workloadapi.X509Context) {
	u := update{at: time.Now()}
	for _, s := range c.SVIDs {
		u.ids = append(u.ids, s.ID.String())
	}
	w.updates <- u
}

// OnX509ContextWatchError implements [workloadapi.X509ContextWatcher]. The
// client tries again by itself: before the first entry it is denied.
func (w *workload) OnX509ContextWatchError(error) {}

// until waits for a message of which is holds, and returns when it came.
func (w *workload) until(ctx context.Context, is func(ids []string) bool) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		select {
		case u := <-w.updates:
			if is(u.ids) {
				return u.at, nil
			}
		case <-w.ended:
			return time.Time{}, fmt.Errorf("the agent ended: %w", w.failed)
		case <-ctx.Done():
			return time.Time{}, fmt.Errorf("the workload's stream did not show the change: %w", ctx.Err())
		}
	}
}

// follow creates and deletes entries of the workload, and returns how long each
// took to show on its stream.
func (w *workload) follow(ctx context.Context, samples int) (created, deleted []time.Duration, err error) {
	for i := range samples {
		name := fmt.Sprintf("sample-%d", i)
		e, id := w.entry(name), w.spiffeID(name)
		has := func(ids []string) bool { return slices.Contains(ids, id) }
		began := time.Now()
		if err := w.server.create(ctx, e); err != nil {
			return nil, nil, err
		}
		at, err := w.until(ctx, has)
		if err != nil {
			return nil, nil, err
		}
		created = append(created, at.Sub(began))
		began = time.Now()
		if err := w.server.remove(ctx, e.Id); err != nil {
			return nil, nil, err
		}
		if at, err = w.until(ctx, func(ids []string) bool { return !has(ids) }); err != nil {
			return nil, nil, err
		}
		deleted = append(deleted, at.Sub(began))
	}
	return created, deleted, nil
}

// connected waits, after a restart of the server, until changes reach the
// workload again.
func (w *workload) connected(ctx context.Context) error {
	_, _, err := w.follow(ctx, 1)
	return err
}
