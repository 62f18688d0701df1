package feed_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func agentID(name string) spiffeid.ID { return id("/spire/agent/test/" + name) }

// world is a registry with a feed over it.
type world struct {
	t        testing.TB
	registry *registry.Registry
	feed     *feed.Feed
	metrics  *metrics.Metrics
	ctx      context.Context // ends, with every stream, when the test does
}

func newWorld(t testing.TB) *world {
	return newWorldOver(t, func(s store.Store) store.Store { return s })
}

// newWorldOver is newWorld over what is made of its store.
func newWorldOver(t testing.TB, over func(store.Store) store.Store) *world {
	t.Helper()
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	reg, err := registry.Open(t.Context(), registry.Options{Store: over(db), TrustDomain: td})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = reg.Run(ctx) })
	streams, end := context.WithCancel(context.Background())
	counted := metrics.New(nil)
	w := &world{
		t: t, ctx: streams, registry: reg, metrics: counted,
		feed: feed.New(feed.Options{Registry: reg, X509TTL: time.Hour, JWTTTL: 5 * time.Minute, Metrics: counted}),
	}
	t.Cleanup(func() {
		end()
		w.feed.Wait()
		cancel()
		running.Wait()
		must(t, db.Close())
	})
	w.changeBundle(td)
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (w *world) node(name string, selectors ...string) spiffeid.ID {
	w.t.Helper()
	must(w.t, w.registry.PutNode(w.t.Context(), &registry.Node{
		ID: agentID(name), AttestationType: "test", SerialNumber: "1", ExpiresAt: time.Now().Add(time.Hour), Selectors: set(selectors...),
	}))
	return agentID(name)
}

func set(texts ...string) selector.Set {
	var out []selector.Selector
	for _, text := range texts {
		s, err := selector.Parse(text)
		if err != nil {
			panic(err)
		}
		out = append(out, s)
	}
	return selector.NewSet(out...)
}

func (w *world) create(e *entry.Entry) *entry.Entry {
	w.t.Helper()
	if e.Selectors == nil {
		e.Selectors = set("unix:uid:1")
	}
	res := w.registry.CreateEntries(w.t.Context(), []*entry.Entry{e})[0]
	must(w.t, res.Err)
	return res.Entry
}

func (w *world) update(id string, change func(*entry.Entry)) {
	w.t.Helper()
	res := w.registry.UpdateEntries(w.t.Context(), []registry.EntryUpdate{{ID: id, Change: func(e *entry.Entry) error {
		change(e)
		return nil
	}}})[0]
	must(w.t, res.Err)
}

func (w *world) delete(id string) {
	w.t.Helper()
	must(w.t, w.registry.DeleteEntries(w.t.Context(), []string{id})[0])
}

// changeBundle gives a trust domain a new JWT authority in place of the old.
func (w *world) changeBundle(of spiffeid.TrustDomain) {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(w.t, err)
	_, err = w.registry.ChangeBundle(w.t.Context(), of, func(b *bundle.Bundle) error {
		b.JWTAuthorities = []bundle.JWTAuthority{{KeyID: rand.Text(), PublicKey: key.Public()}}
		return nil
	})
	must(w.t, err)
}

// inStep waits until every agent has what is in the registry now.
func (w *world) inStep() (agents int) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	n, err := w.feed.WaitAcked(ctx, w.registry.View().Revision())
	must(w.t, err)
	return n
}

// agent is the other end of streams: it applies what it is sent, as agents do,
// and checks that each message makes sense.
type agent struct {
	*call  // the latest
	t      testing.TB
	node   spiffeid.ID
	hold   chan struct{} // while it has a value, messages stay unread
	manual bool          // acknowledges nothing by itself
	verify func(*registry.View) error

	mu       sync.Mutex
	wake     chan struct{}                // closed at each message
	messages []*hallmarkv1.FollowResponse // of the latest call
	begun    []*hallmarkv1.FollowResponse // of the change that is being received
	revision int64
	entries  map[string]*hallmarkv1.Entry
	bundles  map[string]*hallmarkv1.Bundle
	sum      digest.Sum
	wrong    error
}

// call is one stream of an agent.
type call struct {
	agent  *agent
	toServ chan *hallmarkv1.FollowRequest
	eof    chan struct{} // the agent has closed its side
	ended  chan struct{} // the call is over
	result error         // of Follow; read after ended
}

func (w *world) newAgent(node spiffeid.ID) *agent {
	return &agent{
		t: w.t, node: node, hold: make(chan struct{}, 1), wake: make(chan struct{}),
		entries: map[string]*hallmarkv1.Entry{}, bundles: map[string]*hallmarkv1.Bundle{},
	}
}

// connect opens a stream, with what the agent holds from an earlier one, and
// waits until the feed has taken it on.
func (w *world) connect(a *agent) *agent {
	w.t.Helper()
	a.open(w)
	a.toServ <- a.hello()
	a.next(0)
	return a
}

func (a *agent) hello() *hallmarkv1.FollowRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &hallmarkv1.FollowRequest{Revision: a.revision, Digest: bytes.Clone(a.sum[:]), AgentVersion: "test"}
}

func (a *agent) open(w *world) {
	c := &call{agent: a, toServ: make(chan *hallmarkv1.FollowRequest, 100), eof: make(chan struct{}), ended: make(chan struct{})}
	a.mu.Lock()
	a.call, a.messages, a.begun = c, nil, nil
	a.mu.Unlock()
	go func() {
		c.result = w.feed.Follow(w.ctx, c, feed.Peer{Node: a.node, Address: "192.0.2.1:1", Verify: a.verify})
		close(c.ended)
	}()
}

func (w *world) agent(name string, selectors ...string) *agent {
	w.t.Helper()
	return w.connect(w.newAgent(w.node(name, selectors...)))
}

// disconnect ends the agent's side and waits for the call's end.
func (a *agent) disconnect() error {
	close(a.eof)
	return a.wait()
}

func (a *agent) wait() error {
	select {
	case <-a.ended:
		return a.result
	case <-time.After(3 * time.Minute):
		a.t.Error("the stream does not end")
		return nil
	}
}

var errEnded = errors.New("the call is over")

// Recv is what the server receives.
func (c *call) Recv() (*hallmarkv1.FollowRequest, error) {
	select {
	case req := <-c.toServ:
		return req, nil
	case <-c.eof:
		return nil, io.EOF
	case <-c.ended:
		return nil, errEnded
	}
}

// Send is what the server sends.
func (c *call) Send(m *hallmarkv1.FollowResponse) error {
	a := c.agent
	select {
	case a.hold <- struct{}{}:
		<-a.hold
	case <-c.ended:
		return errEnded
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.call != c {
		return errEnded
	}
	a.messages = append(a.messages, m)
	if err := a.apply(m); err != nil && a.wrong == nil {
		a.wrong = err
	}
	close(a.wake)
	a.wake = make(chan struct{})
	if !m.More && !a.manual {
		c.toServ <- &hallmarkv1.FollowRequest{Revision: m.Revision}
	}
	return nil
}

func (a *agent) apply(m *hallmarkv1.FollowResponse) error {
	if size := len(m.Entries) + len(m.Bundles); size == 0 && m.More {
		return errors.New("an empty part")
	}
	if m.Complete && len(a.begun) > 0 {
		return errors.New("complete in the middle of a change")
	}
	a.begun = append(a.begun, m)
	if m.More {
		if m.Revision != 0 || len(m.Digest) != 0 {
			return errors.New("a part has a revision or digest of its own")
		}
		return nil
	}
	parts := a.begun
	a.begun = nil
	if parts[0].Complete {
		clear(a.entries)
		clear(a.bundles)
		a.sum = digest.Sum{}
	}
	for _, part := range parts {
		for _, e := range part.Entries {
			if old := a.entries[e.Id]; old != nil {
				a.sum.SubEntry(old.Id, old.RevisionNumber, old.CreatedAt)
			}
			a.entries[e.Id] = e
			a.sum.AddEntry(e.Id, e.RevisionNumber, e.CreatedAt)
		}
		for _, b := range part.Bundles {
			if old := a.bundles[b.TrustDomain]; old != nil {
				a.sum.SubBundle(old.TrustDomain, old.SequenceNumber)
			}
			a.bundles[b.TrustDomain] = b
			a.sum.AddBundle(b.TrustDomain, b.SequenceNumber)
		}
		for _, id := range part.GoneEntries {
			old := a.entries[id]
			if old == nil {
				return fmt.Errorf("entry %s is gone, which was never sent", id)
			}
			a.sum.SubEntry(old.Id, old.RevisionNumber, old.CreatedAt)
			delete(a.entries, id)
		}
		for _, name := range part.GoneBundles {
			old := a.bundles[name]
			if old == nil {
				return fmt.Errorf("bundle %s is gone, which was never sent", name)
			}
			a.sum.SubBundle(old.TrustDomain, old.SequenceNumber)
			delete(a.bundles, name)
		}
	}
	if m.Revision < a.revision {
		return fmt.Errorf("revision %d after %d", m.Revision, a.revision)
	}
	a.revision = m.Revision
	if string(m.Digest) != string(a.sum[:]) {
		return fmt.Errorf("revision %d: the server's digest is %x, the agent's %s", m.Revision, m.Digest, a.sum)
	}
	return nil
}

// expect waits until the agent has what the registry says it is to hold.
func (a *agent) expect(w *world) {
	a.t.Helper()
	w.inStep()
	a.mu.Lock()
	defer a.mu.Unlock()
	must(a.t, a.wrong)
	view := w.registry.View()
	entries, bundles := map[string]int64{}, map[string]uint64{td.Name(): view.Bundle(td).SequenceNumber}
	var sum digest.Sum
	for _, e := range view.Authorized(a.node, time.Now()) {
		entries[e.ID] = e.RevisionNumber
		sum.AddEntry(e.ID, e.RevisionNumber, e.CreatedAt.Unix())
		for _, f := range e.FederatesWith {
			if b := view.Bundle(f); b != nil {
				bundles[f.Name()] = b.SequenceNumber
			}
		}
	}
	for name, seq := range bundles {
		sum.AddBundle(name, seq)
	}
	got, gotBundles := map[string]int64{}, map[string]uint64{}
	for id, e := range a.entries {
		got[id] = e.RevisionNumber
	}
	for name, b := range a.bundles {
		gotBundles[name] = b.SequenceNumber
	}
	if !maps.Equal(got, entries) || !maps.Equal(gotBundles, bundles) || a.sum != sum {
		a.t.Fatalf("%s holds\n%v\n%v\n%s\nand is to hold\n%v\n%v\n%s", a.node, got, gotBundles, a.sum, entries, bundles, sum)
	}
}

// next waits until the agent was sent more than n messages in this stream, and
// returns them all.
func (a *agent) next(n int) []*hallmarkv1.FollowResponse {
	a.t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		a.mu.Lock()
		messages, wake := slices.Clone(a.messages), a.wake
		a.mu.Unlock()
		if len(messages) > n {
			return messages
		}
		select {
		case <-wake:
		case <-timeout:
			a.t.Fatalf("no message after %d", n)
		}
	}
}

func (a *agent) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.messages)
}
