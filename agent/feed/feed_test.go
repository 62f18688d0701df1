package feed_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/feed"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
	"github.com/hallmark-id/hallmark/attestors/jointoken"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/digest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

type (
	request  = hallmarkv1.FollowRequest
	response = hallmarkv1.FollowResponse
	stream   = grpc.BidiStreamingServer[request, response]
)

// holder is what an agent holds, in the simplest form, and what it was told.
type holder struct {
	mu       sync.Mutex
	revision int64
	entries  map[string]*entry.Entry
	bundles  map[string]*bundle.Bundle
	changes  []held.Change
	lose     string // an entry that Apply forgets, as a bug would
}

func newHolder() *holder {
	return &holder{entries: map[string]*entry.Entry{}, bundles: map[string]*bundle.Bundle{}}
}

func (h *holder) Apply(c held.Change) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.changes = append(h.changes, c)
	if c.Complete {
		clear(h.entries)
		clear(h.bundles)
	}
	for _, id := range c.GoneEntries {
		delete(h.entries, id)
	}
	for _, e := range c.Entries {
		if e.ID != h.lose {
			h.entries[e.ID] = e
		}
	}
	for _, td := range c.GoneBundles {
		delete(h.bundles, td.Name())
	}
	for _, b := range c.Bundles {
		h.bundles[b.TrustDomain.Name()] = b
	}
	h.revision = c.Revision
}

func (h *holder) Digest() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	var sum digest.Sum
	for _, e := range h.entries {
		sum.AddEntry(e.ID, e.RevisionNumber, e.CreatedAt.Unix())
	}
	for _, b := range h.bundles {
		sum.AddBundle(b.TrustDomain.Name(), b.SequenceNumber)
	}
	return sum[:]
}

func (h *holder) Revision() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.revision
}

// holds is the IDs held, as text.
func (h *holder) holds() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	ids := slices.Sorted(maps.Keys(h.entries))
	return strings.Join(append(ids, slices.Sorted(maps.Keys(h.bundles))...), " ")
}

func (h *holder) applied() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.changes)
}

// world is a server whose streams the test serves, and an agent.
type world struct {
	*nodetest.Server
	holder  *holder
	node    *node.Node
	feed    *feed.Feed
	streams chan *call
	log     *bytes.Buffer // read after synctest.Wait only
}

// call is one stream, served by the test.
type call struct {
	stream
	agent spiffeid.ID
	hello *request
	end   chan error
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{Server: nodetest.New(t), holder: newHolder(), streams: make(chan *call, 1000), log: &bytes.Buffer{}}
	w.Follow = func(agent spiffeid.ID, s stream) error {
		hello, err := s.Recv()
		if err != nil {
			return err
		}
		c := &call{stream: s, agent: agent, hello: hello, end: make(chan error, 1)}
		w.streams <- c
		select {
		case err := <-c.end:
			return err
		case <-s.Context().Done():
			return s.Context().Err()
		}
	}
	attestor, err := jointoken.NewAgent("token")
	if err != nil {
		t.Fatal(err)
	}
	w.node, err = node.Open(node.Options{
		TrustDomain: nodetest.TrustDomain, Server: nodetest.Address, Dir: t.TempDir(),
		Dial: func(ctx context.Context, _ string) (net.Conn, error) { return w.Dial(ctx, nodetest.Address) }, // whichever it goes to
		Join: w.Join("token"), Attestor: &node.Attestor{Name: jointoken.Name, Agent: attestor},
	})
	if err != nil {
		t.Fatal(err)
	}
	w.feed = feed.New(feed.Options{
		TrustDomain: nodetest.TrustDomain, Node: w.node, Held: w.holder,
		Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = w.node.Run(ctx) })
	running.Go(func() { _ = w.feed.Run(ctx) })
	t.Cleanup(func() { cancel(); running.Wait() })
	return w
}

// accept waits for the agent's next stream.
func (w *world) accept(t *testing.T) *call {
	t.Helper()
	select {
	case c := <-w.streams:
		return c
	case <-time.After(2 * time.Minute):
		t.Fatal("the agent opens no stream")
		return nil
	}
}

// send sends a message.
func (c *call) send(t *testing.T, r *response) {
	t.Helper()
	if err := c.Send(r); err != nil {
		t.Fatal(err)
	}
}

// acked waits for the agent's next acknowledgement.
func (c *call) acked(t *testing.T) int64 {
	t.Helper()
	r, err := c.Recv()
	if err != nil {
		t.Fatalf("no acknowledgement: %v", err)
	}
	return r.Revision
}

// ended waits until the agent has ended the stream and settled.
func (c *call) ended(t *testing.T) {
	t.Helper()
	select {
	case <-c.Context().Done():
	case <-time.After(2 * time.Minute):
		t.Fatal("the stream goes on")
	}
	synctest.Wait()
}

func anEntry(id string, revision int64) *hallmarkv1.Entry {
	return &hallmarkv1.Entry{
		Id: id, SpiffeId: "spiffe://example.org/" + id, ParentId: "spiffe://example.org/spire/agent/join_token/token",
		Selectors:      []*hallmarkv1.Selector{{Type: "unix", Value: "uid:1000"}},
		RevisionNumber: revision, CreatedAt: 1700000000,
	}
}

func (w *world) ownBundle(t *testing.T) *hallmarkv1.Bundle {
	t.Helper()
	record, err := w.CurrentBundle().Record()
	if err != nil {
		t.Fatal(err)
	}
	return record
}

// sum is the digest of records.
func sum(records ...any) []byte {
	var s digest.Sum
	for _, r := range records {
		switch r := r.(type) {
		case *hallmarkv1.Entry:
			s.AddEntry(r.Id, r.RevisionNumber, r.CreatedAt)
		case *hallmarkv1.Bundle:
			s.AddBundle(r.TrustDomain, r.SequenceNumber)
		}
	}
	return s[:]
}

// whole is a complete message.
func (w *world) whole(t *testing.T, revision int64, entries ...*hallmarkv1.Entry) *response {
	t.Helper()
	own := w.ownBundle(t)
	all := []any{own}
	for _, e := range entries {
		all = append(all, e)
	}
	return &response{
		Revision: revision, Complete: true, Entries: entries, Bundles: []*hallmarkv1.Bundle{own}, Digest: sum(all...),
		Defaults: &hallmarkv1.Defaults{X509SvidTtl: 3600, JwtSvidTtl: 300},
	}
}

func (w *world) holds(t *testing.T, want string) {
	t.Helper()
	if got := w.holder.holds(); got != want {
		t.Errorf("agent holds %q, want %q", got, want)
	}
}

func TestAnAgentTakesTheWholeThenChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		if c.hello.Revision != 0 || len(c.hello.Digest) != 0 || c.hello.AgentVersion == "" {
			t.Errorf("a new agent says %v", c.hello)
		}
		if w.feed.Status().InStep {
			t.Error("in step before anything was said")
		}
		a, b := anEntry("a", 0), anEntry("b", 0)
		c.send(t, w.whole(t, 7, a, b))
		if got := c.acked(t); got != 7 {
			t.Errorf("acknowledged %d, want 7", got)
		}
		w.holds(t, "a b example.org")
		if change := w.holder.changes[0]; !change.Complete || change.X509TTL != time.Hour || change.JWTTTL != 5*time.Minute {
			t.Errorf("change is %+v", change)
		}
		if s := w.feed.Status(); !s.InStep || s.LastError != nil {
			t.Errorf("status is %+v", s)
		}

		b2, x := anEntry("b", 1), anEntry("x", 0)
		other := &hallmarkv1.Bundle{TrustDomain: "other.org", SequenceNumber: 3}
		c.send(t, &response{
			Revision: 9, Entries: []*hallmarkv1.Entry{b2, x}, GoneEntries: []string{"a"}, Bundles: []*hallmarkv1.Bundle{other},
			Digest: sum(b2, x, other, w.ownBundle(t)),
		})
		if got := c.acked(t); got != 9 {
			t.Errorf("acknowledged %d, want 9", got)
		}
		w.holds(t, "b x example.org other.org")
		c.send(t, &response{Revision: 12, GoneBundles: []string{"other.org"}, Digest: sum(b2, x, w.ownBundle(t))})
		if got := c.acked(t); got != 12 || w.holder.Revision() != 12 {
			t.Errorf("acknowledged %d, want 12", got)
		}
		w.holds(t, "b x example.org")
	})
}

func TestMessagesOfOneRevisionAreAppliedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		all := []any{w.ownBundle(t)}
		for i := range 5 {
			e := anEntry(fmt.Sprint("e", i), 0)
			all = append(all, e)
			c.send(t, &response{Complete: i == 0, More: true, Entries: []*hallmarkv1.Entry{e}})
		}
		synctest.Wait()
		if n := w.holder.applied(); n != 0 {
			t.Errorf("%d changes are applied before the last message", n)
		}
		c.send(t, &response{Revision: 3, Bundles: []*hallmarkv1.Bundle{w.ownBundle(t)}, Digest: sum(all...)})
		if got := c.acked(t); got != 3 {
			t.Errorf("acknowledged %d, want 3", got)
		}
		if n := w.holder.applied(); n != 1 {
			t.Errorf("applied in %d changes, want 1", n)
		}
		w.holds(t, "e0 e1 e2 e3 e4 example.org")
	})
}

func TestAnUnfinishedStepIsForgottenWithItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		c.send(t, &response{Complete: true, More: true, Entries: []*hallmarkv1.Entry{anEntry("a", 0)}})
		w.Stop()
		w.Start()
		c = w.accept(t)
		b := anEntry("b", 0)
		c.send(t, w.whole(t, 4, b))
		c.acked(t)
		w.holds(t, "b example.org")
	})
}

func TestAnAgentResumesFromWhereItWasWhenTheServerComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		a := anEntry("a", 0)
		c.send(t, w.whole(t, 7, a))
		c.acked(t)
		time.Sleep(time.Minute)
		w.Stop()
		synctest.Wait()
		if s := w.feed.Status(); s.InStep || s.LastError == nil {
			t.Errorf("status without a server is %+v", s)
		}
		w.holds(t, "a example.org")
		w.Start()
		start := time.Now()
		c = w.accept(t)
		if took := time.Since(start); took > 300*time.Millisecond {
			t.Errorf("back after %v", took)
		}
		if c.hello.Revision != 7 || !bytes.Equal(c.hello.Digest, sum(a, w.ownBundle(t))) {
			t.Errorf("agent resumes with %v", c.hello)
		}
		c.send(t, &response{Revision: 7, Digest: c.hello.Digest})
		got := c.acked(t)
		synctest.Wait() // until the feed has noted what it acknowledged
		if s := w.feed.Status(); got != 7 || !s.InStep || s.SyncedAt.Before(start) {
			t.Errorf("acknowledged %d; %+v", got, s)
		}
	})
}

func TestAnAgentGoesToAServerThatItWasToldOfWhenItsOwnCannotServeIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		own := w.ownBundle(t)
		servers := &hallmarkv1.Servers{Addresses: []string{nodetest.Address, "other.test:1"}}
		c.send(t, &response{Revision: 9, Complete: true, Bundles: []*hallmarkv1.Bundle{own}, Digest: sum(own), Servers: servers})
		c.acked(t)
		began := time.Now()
		c.end <- status.Error(codes.Unavailable, "it is behind")
		c = w.accept(t)
		if got, took := w.node.Status().Server, time.Since(began); got != "other.test:1" || took >= time.Second {
			t.Errorf("after %v it is at %s", took, got)
		}
		if c.hello.Revision != 9 {
			t.Errorf("there it says that it has revision %d", c.hello.Revision)
		}
		c.send(t, &response{Revision: 9, Digest: sum(own), Servers: servers})
		c.acked(t)
		c.end <- status.Error(codes.Internal, "a fault") // of the stream alone
		if w.accept(t); w.node.Status().Server != "other.test:1" {
			t.Errorf("it went to %s", w.node.Status().Server)
		}
	})
}

func TestAStreamIsOpenedAgainOnTheConnectionOfARenewedSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		c.send(t, w.whole(t, 7))
		c.acked(t)
		go func() {
			for c.Send(&response{Revision: 7, Digest: sum(w.ownBundle(t))}) == nil {
				select {
				case <-time.After(25 * time.Second):
				case <-c.Context().Done():
				}
			}
		}()
		go func() {
			for {
				if _, err := c.Recv(); err != nil {
					return
				}
			}
		}()
		<-c.Context().Done() // the node renews after some half an hour
		if w.CallCount("RenewAgent") != 1 {
			t.Fatalf("renewed %d times", w.CallCount("RenewAgent"))
		}
		start := time.Now()
		if again := w.accept(t); again.hello.Revision != 7 || time.Since(start) > 0 {
			t.Errorf("opened again after %v with %v", time.Since(start), again.hello)
		}
	})
}

func TestADifferingDigestMakesTheAgentAskForTheWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.holder.lose = "b"
		c := w.accept(t)
		a, b := anEntry("a", 0), anEntry("b", 0)
		c.send(t, w.whole(t, 7, a, b))
		c.ended(t)
		if s := w.feed.Status(); s.Drifts != 1 || s.InStep || !strings.Contains(s.LastError.Error(), "differs") {
			t.Errorf("status is %+v", s)
		}
		if _, err := c.Recv(); err == nil {
			t.Error("a change that did not come through was acknowledged")
		}

		w.holder.lose = ""
		c = w.accept(t)
		if c.hello.Revision != 0 || len(c.hello.Digest) != 0 {
			t.Errorf("agent resumes with %v, want nothing", c.hello)
		}
		c.send(t, w.whole(t, 8, a, b))
		c.acked(t)
		w.holds(t, "a b example.org")
		if s := w.feed.Status(); s.Drifts != 1 || !s.InStep {
			t.Errorf("status is %+v", s)
		}
	})
}

func TestAHeartbeatShowsDrift(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		c.send(t, w.whole(t, 7, anEntry("a", 0)))
		c.acked(t)
		c.send(t, &response{Revision: 7, Digest: sum(anEntry("b", 0))})
		c.ended(t)
		if got := w.accept(t).hello.Revision; got != 0 {
			t.Errorf("agent resumes from %d, want 0", got)
		}
	})
}

func TestADriftThatLastsDoesNotHammerTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.holder.lose = "a"
		n := 0
		for start := time.Now(); time.Since(start) < 10*time.Minute; n++ {
			c := w.accept(t)
			c.send(t, w.whole(t, 7, anEntry("a", 0)))
			c.ended(t)
		}
		if n > 150 {
			t.Errorf("%d streams in 10 minutes", n)
		}
	})
}

func TestASilentStreamIsGivenUpWithItsConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		c.send(t, w.whole(t, 7))
		c.acked(t)
		link, err := w.node.Link(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		link.Release()
		for range 4 {
			time.Sleep(80 * time.Second)
			c.send(t, &response{Revision: 7, Digest: sum(w.ownBundle(t))})
			c.acked(t)
		}
		start := time.Now()
		c.ended(t)
		if took := time.Since(start); took != feed.Silence {
			t.Errorf("given up after %v, want %v", took, feed.Silence)
		}
		<-link.Done()
		if got := w.accept(t).hello.Revision; got != 7 {
			t.Errorf("agent resumes from %d, want 7", got)
		}
	})
}

func TestASilentServerIsGivenUpFromTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		start := time.Now()
		c.ended(t)
		if took := time.Since(start); took != feed.Silence {
			t.Errorf("given up after %v, want %v", took, feed.Silence)
		}
		w.accept(t)
	})
}

func TestTheOwnBundleVouchesForTheNextConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		c.send(t, w.whole(t, 7))
		c.acked(t)
		w.Rotate() // signs the server's certificate from now on
		own := w.ownBundle(t)
		c.send(t, &response{Revision: 8, Bundles: []*hallmarkv1.Bundle{own}, Digest: sum(own)})
		c.acked(t)
		w.Stop()
		w.Start()
		if got := w.accept(t).hello.Revision; got != 8 {
			t.Errorf("agent resumes from %d, want 8", got)
		}
	})
}

func TestADenialReachesTheNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		c.send(t, w.whole(t, 7))
		c.acked(t)
		c.end <- nodetest.Deny(types.PermissionDeniedDetails_AGENT_BANNED)
		synctest.Wait()
		if s := w.node.Status(); s.Connected || !s.ID.IsZero() {
			t.Errorf("status of a banned node is %+v", s)
		}
	})
}

func TestAfterAnotherAttestationTheAgentAsksForTheWhole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		c.send(t, w.whole(t, 7, anEntry("a", 0)))
		c.acked(t)
		// The server knows this agent by another name from now on.
		w.Lock()
		w.Tokens["token"] = true
		w.AttestAs = spiffeid.RequireFromPath(nodetest.TrustDomain, "/spire/agent/join_token/other")
		w.Unlock()
		c.end <- nodetest.Deny(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
		again := w.accept(t)
		if again.agent.Path() != "/spire/agent/join_token/other" || again.hello.Revision != 0 {
			t.Errorf("%s resumes with %v, want nothing", again.agent, again.hello)
		}
	})
}

func TestErrorsOfTheServerAreRetriedAtGrowingIntervals(t *testing.T) {
	for _, err := range []error{
		nil, status.Error(codes.Internal, "x"), status.Error(codes.Unimplemented, "x"), status.Error(codes.Unavailable, "x"),
		status.Error(codes.PermissionDenied, "x"), status.Error(codes.ResourceExhausted, "x"),
	} {
		t.Run(status.Code(err).String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				n := 0
				for start := time.Now(); time.Since(start) < 10*time.Minute; n++ {
					w.accept(t).end <- err
					synctest.Wait()
				}
				if n < 20 || n > 150 {
					t.Errorf("%d streams in 10 minutes", n)
				}
				if w.feed.Status().LastError == nil {
					t.Error("there is no last error")
				}
			})
		})
	}
}

func TestMessagesThatMakeNoSenseEndTheStream(t *testing.T) {
	for want, r := range map[string]*response{
		"asked for the whole":   {Revision: 7, Digest: sum()},
		"digest of 0 bytes":     {Revision: 7, Complete: true},
		"digest of 17 bytes":    {Revision: 7, Complete: true, Digest: make([]byte, 17)},
		"the revision -1":       {Revision: -1, Complete: true, Digest: sum()},
		`trust domain "a b"`:    {Revision: 7, Complete: true, GoneBundles: []string{"a b"}, Digest: sum()},
		"bundle: trust domain":  {Revision: 7, Complete: true, Bundles: []*hallmarkv1.Bundle{{TrustDomain: "a b"}}, Digest: sum()},
		"more than 1048576 rec": {Revision: 7, Complete: true, GoneEntries: make([]string, 1<<20+1), Digest: sum()},
	} {
		t.Run(want, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				c := w.accept(t)
				c.send(t, r)
				c.ended(t)
				synctest.Wait()
				if err := w.feed.Status().LastError; err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("last error is %v, want %q", err, want)
				}
				if n := w.holder.applied(); n != 0 {
					t.Errorf("%d changes are applied", n)
				}
			})
		})
	}
}

func TestAnEntryThatCannotBeReadDoesNotKeepTheOthersAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		a, b := anEntry("a", 0), anEntry("b", 0)
		c.send(t, w.whole(t, 1, a, b))
		c.acked(t)

		strange := anEntry("b", 1)
		strange.SpiffeId = "spiffe+v2://example.org/b"
		x := anEntry("x", 0)
		c.send(t, &response{Revision: 2, Entries: []*hallmarkv1.Entry{strange, x}, Digest: sum(a, strange, x, w.ownBundle(t))})
		if got := c.acked(t); got != 2 {
			t.Errorf("acknowledged %d, want 2", got)
		}
		w.holds(t, "a x example.org") // not the old b either
		if !strings.Contains(w.log.String(), "cannot read") {
			t.Error("no error is logged")
		}

		// It counts when the stream is resumed.
		w.Stop()
		w.Start()
		c = w.accept(t)
		if c.hello.Revision != 2 || !bytes.Equal(c.hello.Digest, sum(a, strange, x, w.ownBundle(t))) {
			t.Errorf("agent resumes with %v", c.hello)
		}
		b2 := anEntry("b", 2)
		c.send(t, &response{Revision: 3, Entries: []*hallmarkv1.Entry{b2}, Digest: sum(a, b2, x, w.ownBundle(t))})
		c.acked(t)
		w.holds(t, "a b x example.org")
	})
}

func TestABundleIsUsedWithoutTheAuthoritiesThatCannotBeRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		c := w.accept(t)
		whole := w.whole(t, 1)
		whole.Bundles[0].X509Authorities = append(whole.Bundles[0].X509Authorities, &hallmarkv1.X509Authority{Asn1: []byte("x")})
		whole.Bundles[0].JwtAuthorities = append(whole.Bundles[0].JwtAuthorities, &hallmarkv1.JWTAuthority{KeyId: "k", PublicKey: []byte("x")})
		c.send(t, whole)
		if got := c.acked(t); got != 1 {
			t.Errorf("acknowledged %d, want 1", got)
		}
		b := w.holder.bundles["example.org"]
		if want := []*x509.Certificate{w.Authorities[0].Certificate}; len(b.X509Authorities) != 1 || !b.HasX509(want[0]) || len(b.JWTAuthorities) != 0 {
			t.Errorf("bundle is %v", b)
		}
	})
}
