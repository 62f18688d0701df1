package held_test

import (
	"fmt"
	"testing"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

const (
	benchEntries   = 10_000
	benchWorkloads = 1_000
)

// large makes a Held with many entries of one user, and as many subscribers as
// a full node has. Nothing is signed.
func large(b *testing.B) (*heldtest.Server, *held.Held, []*entry.Entry) {
	server := heldtest.New(b)
	h := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: server})
	var entries []*entry.Entry
	for i := range benchEntries {
		entries = append(entries, server.Entry(fmt.Sprint("e", i), nil, "unix:uid:0", fmt.Sprint("k8s:pod:", i)))
	}
	h.Apply(server.Complete())
	for i := range benchWorkloads {
		b.Cleanup(h.Subscribe(b.Context(), workloadSelectors(i)).Close)
	}
	return server, h, entries
}

func workloadSelectors(i int) selector.Set {
	return heldtest.Selectors("unix:uid:0", "unix:gid:0", "k8s:ns:shop", fmt.Sprint("k8s:pod:", i))
}

func BenchmarkMatchAnew(b *testing.B) {
	_, h, _ := large(b)
	i := 0
	for b.Loop() {
		i++
		if len(h.Match(workloadSelectors(i%benchEntries))) != 1 {
			b.Fatal("no match")
		}
	}
}

func BenchmarkSubscribeAgain(b *testing.B) {
	_, h, _ := large(b)
	set := workloadSelectors(1)
	for b.Loop() {
		s := h.Subscribe(b.Context(), set)
		s.Update()
		s.Close()
	}
}

func BenchmarkApplyOneChange(b *testing.B) {
	server, h, entries := large(b)
	i := 0
	for b.Loop() {
		i++
		e := server.Update(entries[i%benchEntries], func(e *entry.Entry) { e.RevisionNumber = int64(i) })
		h.Apply(held.Change{Entries: []*entry.Entry{e}})
	}
}

func BenchmarkApplyTheSameAgain(b *testing.B) {
	server, h, _ := large(b)
	c := server.Complete()
	for i, e := range c.Entries {
		same := *e
		c.Entries[i] = &same
	}
	for b.Loop() {
		h.Apply(c)
	}
}
