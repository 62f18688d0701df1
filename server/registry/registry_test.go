package registry_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

var (
	td       = spiffeid.RequireTrustDomainFromString("example.org")
	serverID = spiffeid.RequireFromPath(td, entry.ServerPath)
	epoch    = time.Unix(1_800_000_000, 0)
)

// clock is a time that a test moves by hand.
type clock struct{ offset atomic.Int64 }

func (c *clock) Now() time.Time          { return epoch.Add(time.Duration(c.offset.Load())) }
func (c *clock) Advance(d time.Duration) { c.offset.Add(int64(d)) }

func newStore(t testing.TB) store.Store {
	t.Helper()
	db, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

// start opens a registry over a store and runs it until the test ends.
func start(t testing.TB, s store.Store, now func() time.Time) *registry.Registry {
	t.Helper()
	r, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: td, Now: now})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) && !errors.Is(err, store.ErrClosed) {
			t.Errorf("Run ended with %v", err)
		}
	})
	return r
}

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func agentID(name string) spiffeid.ID { return id("/spire/agent/test/" + name) }

func newEntry(path string, parent spiffeid.ID, selectors ...string) *entry.Entry {
	e := &entry.Entry{SPIFFEID: id(path), ParentID: parent}
	if len(selectors) == 0 {
		selectors = []string{"unix:uid:1000"}
	}
	for _, s := range selectors {
		x, err := selector.Parse(s)
		if err != nil {
			panic(err)
		}
		e.Selectors = append(e.Selectors, x)
	}
	e.Selectors = selector.NewSet(e.Selectors...)
	return e
}

func newNode(name string, selectors ...string) *registry.Node {
	n := &registry.Node{ID: agentID(name), AttestationType: "test", SerialNumber: "1", ExpiresAt: epoch.Add(time.Hour), AttestedAt: epoch}
	for _, s := range selectors {
		x, err := selector.Parse(s)
		if err != nil {
			panic(err)
		}
		n.Selectors = append(n.Selectors, x)
	}
	n.Selectors = selector.NewSet(n.Selectors...)
	return n
}

func create(t testing.TB, r *registry.Registry, e *entry.Entry) *entry.Entry {
	t.Helper()
	res := r.CreateEntries(t.Context(), []*entry.Entry{e})[0]
	if res.Err != nil {
		t.Fatalf("create %s: %v", e.SPIFFEID, res.Err)
	}
	return res.Entry
}

func put(t testing.TB, r *registry.Registry, n *registry.Node) {
	t.Helper()
	if err := r.PutNode(t.Context(), n); err != nil {
		t.Fatal(err)
	}
}

func kindOf(err error) registry.ErrorKind {
	var e *registry.Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return 0
}

// describe writes down all that a view answers, so that two views can be
// compared.
func describe(v *registry.View, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d entries, %d nodes\n", v.EntryCount(), v.NodeCount())
	for e := range v.Entries("") {
		fmt.Fprintf(&b, "entry %s %s under %s %v #%d\n", e.ID, e.SPIFFEID, e.ParentID, e.Selectors.Strings(), e.RevisionNumber)
		if v.Entry(e.ID) != e {
			b.WriteString("  but cannot be looked up\n")
		}
		for name, found := range map[string]bool{
			"parent":    slices.Contains(slices.Collect(v.EntriesByParent(e.ParentID)), e),
			"SPIFFE ID": slices.Contains(slices.Collect(v.EntriesBySPIFFEID(e.SPIFFEID)), e),
		} {
			if !found {
				fmt.Fprintf(&b, "  but not by its %s\n", name)
			}
		}
	}
	for n := range v.Nodes("") {
		fmt.Fprintf(&b, "node %s %v banned=%v serial=%s", n.ID, n.Selectors.Strings(), n.Banned, n.SerialNumber)
		for _, e := range v.Authorized(n.ID, now) {
			fmt.Fprintf(&b, " %s", e.ID)
		}
		b.WriteString("\n")
	}
	for x := range v.Bundles("") {
		fmt.Fprintf(&b, "bundle %v\n", x)
	}
	for _, a := range v.Authorities() {
		fmt.Fprintf(&b, "authority %s %s %s\n", a.Server, a.ID, a.State)
	}
	fmt.Fprintf(&b, "digest %s\n", v.Digest())
	return b.String()
}

var markerID = id("/marker")

// converge waits until every registry shows all that the store they share had
// when it was called. A write that conflicts catches up with the store.
func converge(t testing.TB, rs ...*registry.Registry) {
	t.Helper()
	marker := newEntry(markerID.Path(), agentID("marker"))
	for _, r := range append(rs[:1:1], rs...) {
		if err := r.CreateEntries(t.Context(), []*entry.Entry{marker})[0].Err; err != nil && kindOf(err) != registry.AlreadyExists {
			t.Fatal(err)
		}
	}
}

func TestWhatIsStoredIsThereAfterALoad(t *testing.T) {
	s := newStore(t)
	c := &clock{}
	r := start(t, s, c.Now)
	fill(t, r)
	again, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: td, Now: c.Now})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := describe(again.View(), c.Now()), describe(r.View(), c.Now()); got != want {
		t.Errorf("loaded:\n%s\nfolded:\n%s", got, want)
	}
	if again.View().Revision() != r.View().Revision() {
		t.Errorf("loaded revision %d, folded %d", again.View().Revision(), r.View().Revision())
	}
}

// fill writes some of every kind of record, changes some and deletes some.
func fill(t testing.TB, r *registry.Registry) {
	t.Helper()
	put(t, r, newNode("a", "rack:1", "zone:x"))
	put(t, r, newNode("b", "rack:2", "zone:x"))
	put(t, r, newNode("gone"))
	create(t, r, newEntry("/zone-x", serverID, "zone:x"))
	create(t, r, newEntry("/web", id("/zone-x")))
	moved := create(t, r, newEntry("/db", agentID("a")))
	deleted := create(t, r, newEntry("/deleted", agentID("a")))
	if err := r.DeleteEntries(t.Context(), []string{deleted.ID})[0]; err != nil {
		t.Fatal(err)
	}
	if err := r.DeleteNode(t.Context(), agentID("gone")); err != nil {
		t.Fatal(err)
	}
	for _, res := range r.UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: moved.ID, Change: func(e *entry.Entry) error {
		e.ParentID = agentID("b")
		return nil
	}}}) {
		if res.Err != nil {
			t.Fatal(res.Err)
		}
	}
	if err := r.CreateJoinToken(t.Context(), "token", registry.JoinToken{ExpiresAt: epoch.Add(time.Hour), AgentID: id("/host")}); err != nil {
		t.Fatal(err)
	}
	setBundle(t, r, td, newAuthority(t, "own"))
	setBundle(t, r, spiffeid.RequireTrustDomainFromString("other.org"), newAuthority(t, "other"))
}

func TestAStoreOfAnotherTrustDomainIsRefused(t *testing.T) {
	s := newStore(t)
	start(t, s, nil)
	_, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")})
	if err == nil || !strings.Contains(err.Error(), "example.org") || !strings.Contains(err.Error(), "trust_domain") {
		t.Errorf("got error %v, want one that names the store's trust domain and the remedy", err)
	}
}

func TestARecordThatCannotBeReadIsNamed(t *testing.T) {
	for _, key := range []string{"entry/x", "node/spiffe://example.org/spire/agent/x", "node/nonsense", "token/x", "bundle/example.org", "authority/a/x509/b"} {
		s := newStore(t)
		if err := s.Commit(t.Context(), store.Txn{Do: []store.Write{{Key: key, Value: []byte("nonsense")}}})[0].Err; err != nil {
			t.Fatal(err)
		}
		if _, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: td}); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("got error %v, want one that names %q", err, key)
		}
	}
}

func TestRecordsOfOtherVersionsAreLeftAlone(t *testing.T) {
	s := newStore(t)
	r := start(t, s, nil)
	if err := s.Commit(t.Context(), store.Txn{Do: []store.Write{{Key: "application/x", Value: []byte("from the future")}}})[0].Err; err != nil {
		t.Fatal(err)
	}
	create(t, r, newEntry("/a", serverID))
	if _, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: td}); err != nil {
		t.Error(err)
	}
}

func TestAWriteIsInTheViewWhenItReturns(t *testing.T) {
	r := start(t, newStore(t), nil)
	for i := range 100 {
		e := create(t, r, newEntry(fmt.Sprintf("/w%d", i), agentID("a")))
		if r.View().Entry(e.ID) == nil {
			t.Fatal("an entry is not there after its creation returned")
		}
		if err := r.DeleteEntries(t.Context(), []string{e.ID})[0]; err != nil {
			t.Fatal(err)
		}
		if r.View().Entry(e.ID) != nil {
			t.Fatal("an entry is there after its deletion returned")
		}
	}
}

func TestAViewStaysAsItIsWhileOthersWrite(t *testing.T) {
	c := &clock{}
	r := start(t, newStore(t), c.Now)
	fill(t, r)
	var entries []*entry.Entry
	for i := range 300 {
		entries = append(entries, newEntry(fmt.Sprintf("/w%d", i), agentID("a")))
	}
	var ids []string
	for _, res := range r.CreateEntries(t.Context(), entries) {
		if res.Err != nil {
			t.Fatal(res.Err)
		}
		ids = append(ids, res.Entry.ID)
	}

	var group sync.WaitGroup
	stop := make(chan struct{})
	for w := range 2 {
		group.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				e := create(t, r, newEntry(fmt.Sprintf("/x%d-%d", w, i), agentID("b")))
				r.DeleteEntries(t.Context(), []string{ids[(2*i+w)%len(ids)], e.ID})
				put(t, r, newNode(fmt.Sprintf("n%d", i%7), "rack:1", fmt.Sprintf("zone:%d", i%5)))
			}
		})
	}
	for i := range 20 {
		v := r.View()
		was := describe(v, c.Now())
		for j := range 10 {
			create(t, r, newEntry(fmt.Sprintf("/y%d-%d", i, j), agentID("a")))
		}
		if is := describe(v, c.Now()); is != was {
			t.Fatalf("a view has changed from\n%s\nto\n%s", was, is)
		}
	}
	close(stop)
	group.Wait()
}

func TestTwoServersOverOneStoreConverge(t *testing.T) {
	s := newStore(t)
	c := &clock{}
	servers := []*registry.Registry{start(t, s, c.Now), start(t, s, c.Now)}
	var group sync.WaitGroup
	created := make([]atomic.Int64, 50)
	for n := range 4 {
		r := servers[n%2]
		group.Go(func() {
			for i := range created {
				res := r.CreateEntries(t.Context(), []*entry.Entry{newEntry(fmt.Sprintf("/w%d", i), agentID("a"))})[0]
				switch {
				case res.Err == nil:
					created[i].Add(1)
				case kindOf(res.Err) != registry.AlreadyExists || res.Entry == nil || res.Entry.SPIFFEID != id(fmt.Sprintf("/w%d", i)):
					t.Errorf("create: %v, %v", res.Entry, res.Err)
				}
			}
		})
	}
	group.Wait()
	for i := range created {
		if n := created[i].Load(); n != 1 {
			t.Errorf("entry %d was created %d times", i, n)
		}
	}
	converge(t, servers...)
	a, b := describe(servers[0].View(), c.Now()), describe(servers[1].View(), c.Now())
	if a != b {
		t.Errorf("one server has\n%s\nthe other\n%s", a, b)
	}
	if n := servers[0].View().EntryCount(); n != len(created)+1 { // and the marker
		t.Errorf("there are %d entries, want %d", n, len(created)+1)
	}
}

// lapsing is a store whose watches break off when told, as if what they would
// have shown next were no longer known, and that can fail its commits.
type lapsing struct {
	store.Store
	mu     sync.Mutex
	lapse  chan struct{} // closed: watches fail with ErrCompacted
	hold   chan struct{} // not nil: new watches wait for it
	failed error         // what Commit fails with, if not nil
}

func newLapsing(s store.Store) *lapsing { return &lapsing{Store: s, lapse: make(chan struct{})} }

func (l *lapsing) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	l.mu.Lock()
	failed := l.failed
	l.mu.Unlock()
	if failed == nil {
		return l.Store.Commit(ctx, txns...)
	}
	out := make([]store.Result, len(txns))
	for i := range out {
		out[i].Err = failed
	}
	return out
}

func (l *lapsing) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = err
}

func (l *lapsing) Watch(ctx context.Context, after store.Revision, yield func([]store.Change) error) error {
	l.mu.Lock()
	lapse := l.lapse
	l.mu.Unlock()
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-lapse:
			cancel()
		case <-inner.Done():
		}
	}()
	err := l.Store.Watch(inner, after, func(changes []store.Change) error {
		select {
		case <-lapse:
			return store.ErrCompacted
		default:
			return yield(changes)
		}
	})
	if ctx.Err() == nil {
		l.mu.Lock()
		hold := l.hold
		l.mu.Unlock()
		select {
		case <-hold:
		case <-ctx.Done():
		}
		return store.ErrCompacted
	}
	return err
}

// lapseUntil breaks the watches off, and lets them be opened again when the
// function returned is called.
func (l *lapsing) lapseUntil() (resume func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	hold := make(chan struct{})
	l.hold = hold
	close(l.lapse)
	l.lapse = make(chan struct{})
	return func() { close(hold) }
}

func TestARegistryThatFellBehindItsStoreLoadsItAnew(t *testing.T) {
	db := newStore(t)
	c := &clock{}
	behind := newLapsing(db)
	r, other := start(t, behind, c.Now), start(t, db, c.Now)
	put(t, r, newNode("a"))
	put(t, r, newNode("b"))
	gone := create(t, r, newEntry("/gone", agentID("a")))
	a, b := r.Subscribe(agentID("a")), r.Subscribe(agentID("b"))
	defer a.Close()
	defer b.Close()

	resume := behind.lapseUntil()
	create(t, other, newEntry("/new", agentID("a")))
	if err := other.DeleteEntries(t.Context(), []string{gone.ID})[0]; err != nil {
		t.Fatal(err)
	}
	if err := other.DeleteNode(t.Context(), agentID("b")); err != nil {
		t.Fatal(err)
	}
	resume()

	converge(t, r, other)
	if got, want := describe(r.View(), c.Now()), describe(other.View(), c.Now()); got != want {
		t.Errorf("loaded anew:\n%s\nwant:\n%s", got, want)
	}
	<-a.C
	if v, d := a.Take(); !d.Resync || describe(v, c.Now()) != describe(r.View(), c.Now()) {
		t.Errorf("a subscriber got %+v at revision %d, want a resync at %d", d, v.Revision(), r.View().Revision())
	}
	<-b.C
	if _, d := b.Take(); !d.NodeGone {
		t.Errorf("the subscriber of a node that was deleted meanwhile got %+v", d)
	}
	// It follows the store as before.
	e := create(t, r, newEntry("/after", agentID("a")))
	<-a.C
	if _, d := a.Take(); d.Resync || !slices.Equal(d.Entries, []string{e.ID}) {
		t.Errorf("after that, a subscriber got %+v, want entry %s", d, e.ID)
	}
}

func TestAFailureOfTheStoreIsTheResultOfTheWrite(t *testing.T) {
	s := newLapsing(newStore(t))
	r := start(t, s, nil)
	e := create(t, r, newEntry("/a", agentID("a")))
	full := errors.New("disk is full")
	s.fail(full)
	for what, err := range map[string]error{
		"create": r.CreateEntries(t.Context(), []*entry.Entry{newEntry("/b", agentID("a"))})[0].Err,
		"update": r.UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: e.ID, Change: func(*entry.Entry) error { return nil }}})[0].Err,
		"delete": r.DeleteEntries(t.Context(), []string{e.ID})[0],
		"attest": r.PutNode(t.Context(), newNode("a")),
		"token":  r.CreateJoinToken(t.Context(), "t", registry.JoinToken{ExpiresAt: time.Now().Add(time.Hour)}),
	} {
		if !errors.Is(err, full) {
			t.Errorf("%s: got error %v, want %v", what, err, full)
		}
	}
	s.fail(nil)
	create(t, r, newEntry("/b", agentID("a")))
}

func TestWritesEndWhenTheRegistryHasStopped(t *testing.T) {
	s := newStore(t)
	r, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	create(t, r, newEntry("/a", agentID("a")))
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Run ended with %v", err)
	}
	if err := r.CreateEntries(t.Context(), []*entry.Entry{newEntry("/b", agentID("a"))})[0].Err; err == nil {
		t.Error("a write succeeded that no view will show")
	}
}

func TestAWriteEndsWithItsContext(t *testing.T) {
	s := newStore(t)
	r, err := registry.Open(t.Context(), registry.Options{Store: s, TrustDomain: td}) // does not run
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- r.PutNode(ctx, newNode("a")) }()
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
