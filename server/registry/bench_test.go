package registry_test

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

const benchEntries = 100_000

// realistic is the i-th entry of a cluster: ID and SPIFFE ID of its own, its
// node's ID as the parent, three Kubernetes selectors.
func realistic(i, nodes int) *entry.Entry {
	e := newEntry(fmt.Sprintf("/ns/team-%d/sa/service-%d", i%200, i), agentID(fmt.Sprintf("node-%04d", i%nodes)),
		fmt.Sprintf("k8s:ns:team-%d", i%200), fmt.Sprintf("k8s:sa:service-%d", i), "k8s:container-name:main")
	e.X509SVIDTTL = time.Hour
	return e
}

func createAll(b testing.TB, r *registry.Registry, entries []*entry.Entry) {
	b.Helper()
	for len(entries) > 0 {
		n := min(1000, len(entries))
		for _, res := range r.CreateEntries(b.Context(), entries[:n]) {
			if res.Err != nil {
				b.Fatal(res.Err)
			}
		}
		entries = entries[n:]
	}
}

// filled is a registry with entries under as many nodes as given.
func filled(b testing.TB, s store.Store, entries, nodes int) *registry.Registry {
	b.Helper()
	r := start(b, s, nil)
	var batch []*entry.Entry
	for i := range entries {
		batch = append(batch, realistic(i, nodes))
	}
	createAll(b, r, batch)
	for i := range nodes {
		put(b, r, newNode(fmt.Sprintf("node-%04d", i)))
	}
	return r
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkMemory loads 100,000 entries from a store, as a server does when it
// starts, and reports what each takes.
func BenchmarkMemory(b *testing.B) {
	s, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	filled(b, s, benchEntries, 100)
	for b.Loop() {
		before := heap()
		r, err := registry.Open(context.Background(), registry.Options{Store: s, TrustDomain: td})
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(int64(heap()-before))/benchEntries, "bytes/entry")
		runtime.KeepAlive(r)
	}
}

func BenchmarkLoad(b *testing.B) {
	s := newStore(b)
	filled(b, s, benchEntries, 100)
	for b.Loop() {
		if _, err := registry.Open(b.Context(), registry.Options{Store: s, TrustDomain: td}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCreate creates entries 1,000 at a time.
func BenchmarkCreate(b *testing.B) {
	r := start(b, newStore(b), nil)
	i := 0
	for b.Loop() {
		var batch []*entry.Entry
		for range 1000 {
			batch = append(batch, realistic(i, 100))
			i++
		}
		createAll(b, r, batch)
	}
	b.ReportMetric(float64(i)/b.Elapsed().Seconds(), "entries/s")
}

func BenchmarkAuthorized(b *testing.B) {
	for _, n := range []int{10, 1000, benchEntries} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r := filled(b, newStore(b), n, 1)
			v, node, now := r.View(), agentID("node-0000"), time.Now()
			b.ReportAllocs()
			for b.Loop() {
				if len(v.Authorized(node, now)) != n {
					b.Fatal("not authorized for all")
				}
			}
		})
	}
}

func BenchmarkIsAuthorized(b *testing.B) {
	r := filled(b, newStore(b), 10_000, 100)
	v, node, now := r.View(), agentID("node-0000"), time.Now()
	var mine *entry.Entry
	for e := range v.EntriesByParent(node) {
		mine = e
		break
	}
	b.ReportAllocs()
	for b.Loop() {
		if !v.IsAuthorized(node, mine, now) {
			b.Fatal("not authorized")
		}
	}
}

// BenchmarkIsAuthorizedByASharedID asks for an entry of an ID that many nodes
// have, as those have that joined with tokens for the same one.
func BenchmarkIsAuthorizedByASharedID(b *testing.B) {
	r := start(b, newStore(b), nil)
	shared := sharing(b, r, 10_000)
	v, node, now := r.View(), agentID("sharer-9999"), time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if !v.IsAuthorized(node, shared, now) {
			b.Fatal("not authorized")
		}
	}
}

// BenchmarkChange is one entry's change among 100,000 and 1,000 push streams,
// from the write to the stream that is told.
func BenchmarkChange(b *testing.B) {
	r := filled(b, newStore(b), benchEntries, 1000)
	var subs []*registry.Subscription
	for i := range 1000 {
		sub := r.Subscribe(agentID(fmt.Sprintf("node-%04d", i)))
		defer sub.Close()
		subs = append(subs, sub)
	}
	var ids []string
	for e := range r.View().EntriesByParent(agentID("node-0007")) {
		ids = append(ids, e.ID)
	}
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		i++
		res := r.UpdateEntries(b.Context(), []registry.EntryUpdate{{ID: ids[i%len(ids)], Change: func(e *entry.Entry) error {
			e.Hint = fmt.Sprint(i)
			return nil
		}}})[0]
		if res.Err != nil {
			b.Fatal(res.Err)
		}
		<-subs[7].C
		if _, d := subs[7].Take(); len(d.Entries) != 1 {
			b.Fatalf("told %+v", d)
		}
	}
}
