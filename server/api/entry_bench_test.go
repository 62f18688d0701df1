package api

import (
	"fmt"
	"io"
	"testing"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hallmark-id/hallmark/server/registry"
)

const benchEntries = 100_000

// benchEntry is the i-th entry of a cluster.
func benchEntry(i int) *types.Entry {
	return wireEntry(fmt.Sprintf("/ns/team-%d/sa/service-%d", i%200, i), idToWire(testAgent("a")),
		fmt.Sprintf("k8s:ns:team-%d", i%200), fmt.Sprintf("k8s:sa:service-%d", i), "k8s:container-name:main")
}

func benchBatch(i, n int) []*types.Entry {
	batch := make([]*types.Entry, n)
	for j := range batch {
		batch[j] = benchEntry(i + j)
	}
	return batch
}

func newFullRecords(b *testing.B) *records {
	w := newRecords(b)
	if err := w.registry.PutNode(b.Context(), &registry.Node{ID: testAgent("a"), AttestationType: "test"}); err != nil {
		b.Fatal(err)
	}
	for i := 0; i < benchEntries; i += 1000 {
		w.create(b, benchBatch(i, 1000)...)
	}
	return w
}

// BenchmarkListEntries lists 100,000 entries, over gRPC, in pages of 1,000.
func BenchmarkListEntries(b *testing.B) {
	w := newFullRecords(b)
	for name, req := range map[string]*entryv1.ListEntriesRequest{
		"all":       {},
		"by parent": {Filter: &entryv1.ListEntriesRequest_Filter{ByParentId: idToWire(testAgent("a"))}},
		"IDs only":  {OutputMask: &types.EntryMask{}},
		"none": {Filter: &entryv1.ListEntriesRequest_Filter{ByHint: wrapperspb.String("none"), BySelectors: &types.SelectorMatch{
			Match: types.SelectorMatch_MATCH_SUPERSET, Selectors: wireSelectors("k8s:container-name:main")}}},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				n := 0
				req.PageSize, req.PageToken = 1000, ""
				for {
					resp, err := w.entries.ListEntries(b.Context(), req)
					if err != nil {
						b.Fatal(err)
					}
					n += len(resp.Entries)
					if req.PageToken = resp.NextPageToken; req.PageToken == "" {
						break
					}
				}
				if n != benchEntries && name != "none" {
					b.Fatalf("got %d entries", n)
				}
			}
		})
	}
}

// BenchmarkBatchCreateEntry creates entries, over gRPC, 1,000 a call.
func BenchmarkBatchCreateEntry(b *testing.B) {
	w := newRecords(b)
	i := 0
	for b.Loop() {
		w.create(b, benchBatch(i, 1000)...)
		i += 1000
	}
	b.ReportMetric(float64(i)/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkSyncAuthorizedEntries syncs an agent that has its 100,000 entries
// already, client and server together.
func BenchmarkSyncAuthorizedEntries(b *testing.B) {
	w := newFullRecords(b)
	for b.Loop() {
		stream, err := w.entries.SyncAuthorizedEntries(as(b, testAgent("a")))
		if err != nil {
			b.Fatal(err)
		}
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{}); err != nil {
			b.Fatal(err)
		}
		n := 0
		for more := true; more; {
			resp, err := stream.Recv()
			if err != nil {
				b.Fatal(err)
			}
			n, more = n+len(resp.EntryRevisions), resp.More
		}
		if err := stream.CloseSend(); err != nil {
			b.Fatal(err)
		}
		if _, err := stream.Recv(); err != io.EOF || n != benchEntries {
			b.Fatalf("%d revisions, %v", n, err)
		}
	}
}
