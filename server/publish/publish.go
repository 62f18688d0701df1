// Package publish writes what verifies SVIDs to where others fetch it: the SPIFFE
// bundle document, and the discovery document and keys of OpenID Connect issuers.
// It is for servers that relying parties cannot reach.
//
// A [Publisher], made by [New], has targets ([Config]): a directory that a web
// server serves, a bucket of Amazon S3 or of Google Cloud Storage, or a container of
// Azure Blob Storage. [Publisher.Run] publishes at the start and at each change of
// the bundle, and looks now and then whether all is still there as it was written.
//
// All servers of a trust domain publish. Each document has the sequence number of
// the bundle that it is made of; a server reads what is there, leaves what is newer,
// and writes in the place of what it has read or not at all, so that none puts an
// older document over a newer one.
//
// Clouds are asked without their clients for storage, by a few requests of HTTP, with
// the credentials of package cloudauth: service/s3 and azblob add 7 MB each to a
// binary, cloud.google.com/go/storage 30 MB and 36 modules.
//
// An authority is to be published before it signs: package authority asks
// [Publisher.Ready] before it activates one.
package publish

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
)

// Options are what [New] needs. Targets and Bundle are required.
type Options struct {
	Targets []Config // that [CheckAll] finds nothing wrong with
	Server  string   // this server's name
	// Bundle returns the newest bundle of the trust domain, nil before there is one,
	// and a channel that is closed when it may have changed since.
	Bundle func() (*bundle.Bundle, <-chan struct{})
	// MaxAge is for how long relying parties may keep the documents of an issuer:
	// less than a key is published before it signs, whole seconds.
	MaxAge  time.Duration
	Log     *slog.Logger     // nil: none
	Metrics *metrics.Metrics // nil: none
}

// Publisher publishes to its targets. It is safe for concurrent use.
type Publisher struct {
	o       Options
	targets []*target

	mu      sync.Mutex
	changed chan struct{} // closed when a target has been tried
}

// New makes a publisher. It asks nobody anything yet.
func New(o Options) *Publisher {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = metrics.New(nil)
	}
	p := &Publisher{o: o, changed: make(chan struct{})}
	for _, c := range o.Targets {
		p.targets = append(p.targets, newTarget(c, c.store(o.Server), &p.o))
	}
	return p
}

// FromRegistry returns the bundle of a registry's own trust domain, for [Options].
func FromRegistry(r *registry.Registry) func() (*bundle.Bundle, <-chan struct{}) {
	return func() (*bundle.Bundle, <-chan struct{}) {
		changed := r.Changed()
		return r.View().Bundle(r.TrustDomain()), changed
	}
}

// Run publishes until the context ends, and returns its error.
func (p *Publisher) Run(ctx context.Context) error {
	var running sync.WaitGroup
	for _, t := range p.targets {
		running.Go(func() { p.follow(ctx, t) })
	}
	running.Wait()
	<-ctx.Done()
	return ctx.Err()
}

// follow publishes to a target until the context ends.
func (p *Publisher) follow(ctx context.Context, t *target) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var tried *bundle.Bundle
	for ctx.Err() == nil {
		b, changed := p.o.Bundle()
		if b == tried {
			select {
			case <-ctx.Done():
				return
			case <-changed:
				continue
			case <-timer.C:
			}
		}
		timer.Reset(t.try(ctx, b))
		tried = b
		p.tell()
	}
}

// Publish tries all targets once, and returns why one or more failed. [Publisher.Run]
// does it by itself.
func (p *Publisher) Publish(ctx context.Context) error {
	var failed error
	for _, t := range p.targets {
		b, _ := p.o.Bundle()
		t.try(ctx, b)
		if s := t.status(); s.Error != "" {
			failed = fmt.Errorf("publish to %s: %s", s.Name, s.Error)
		}
	}
	p.tell()
	return failed
}

// tell wakes those who wait for a target.
func (p *Publisher) tell() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *Publisher) tried() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// Targets returns how each target is, in the order of the configuration.
func (p *Publisher) Targets() []Status {
	all := make([]Status, len(p.targets))
	for i, t := range p.targets {
		all[i] = t.status()
	}
	return all
}
