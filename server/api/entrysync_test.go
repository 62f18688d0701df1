package api

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/server/registry"
)

// syncing is a stream of SyncAuthorizedEntries of agent a.
type syncing struct {
	t      *testing.T
	stream entryv1.Entry_SyncAuthorizedEntriesClient
}

func (w *records) sync(t *testing.T) *syncing {
	t.Helper()
	stream, err := w.entries.SyncAuthorizedEntries(as(t, testAgent("a")))
	if err != nil {
		t.Fatal(err)
	}
	return &syncing{t, stream}
}

func (s *syncing) send(mask *types.EntryMask, ids ...string) {
	s.t.Helper()
	if err := s.stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask, Ids: ids}); err != nil {
		s.t.Fatal(err)
	}
}

func (s *syncing) recv() *entryv1.SyncAuthorizedEntriesResponse {
	s.t.Helper()
	resp, err := s.stream.Recv()
	if err != nil {
		s.t.Fatal(err)
	}
	return resp
}

// pages receives pages to the last and returns their sizes and what they hold.
func (s *syncing) pages() (sizes []int, revisions []*entryv1.EntryRevision, entries []*types.Entry) {
	s.t.Helper()
	for {
		resp := s.recv()
		sizes = append(sizes, len(resp.EntryRevisions)+len(resp.Entries))
		revisions, entries = append(revisions, resp.EntryRevisions...), append(entries, resp.Entries...)
		if !resp.More {
			return sizes, revisions, entries
		}
	}
}

func newSyncRecords(t *testing.T, page, entries int) *records {
	t.Helper()
	w := newRecords(t)
	w.service.syncPage = page
	if err := w.registry.PutNode(t.Context(), &registry.Node{ID: testAgent("a"), AttestationType: "test"}); err != nil {
		t.Fatal(err)
	}
	var batch []*types.Entry
	for i := range entries {
		e := wireEntry(fmt.Sprintf("/w%d", i), idToWire(testAgent("a")))
		e.Id = fmt.Sprintf("e%02d", i)
		batch = append(batch, e)
	}
	other := wireEntry("/other", idToWire(testAgent("b")))
	other.Id = "other"
	w.create(t, append(batch, other)...)
	return w
}

func idsOf(entries []*types.Entry) (ids []string) {
	for _, e := range entries {
		ids = append(ids, e.Id)
	}
	return ids
}

func TestASyncOfUpToAPageSendsTheEntriesWhole(t *testing.T) {
	for _, n := range []int{0, 1, 5} {
		w := newSyncRecords(t, 5, n)
		s := w.sync(t)
		s.send(nil)
		resp := s.recv()
		if len(resp.Entries) != n || len(resp.EntryRevisions) != 0 || resp.More {
			t.Errorf("%d entries: got %v", n, resp)
		}
		for _, e := range resp.Entries {
			if want, err := w.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: e.Id}); err != nil || !proto.Equal(e, want) {
				t.Errorf("got %v, want %v, %v", e, want, err)
			}
		}
		if err := s.stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.stream.Recv(); err != io.EOF {
			t.Errorf("after the agent closed its side: %v", err)
		}
	}
}

func TestASyncOfMoreSendsRevisionsAndThenWhatIsAskedFor(t *testing.T) {
	w := newSyncRecords(t, 5, 12)
	if _, err := w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: "e03", Hint: "new"}}, InputMask: &types.EntryMask{Hint: true}}); err != nil {
		t.Fatal(err)
	}
	s := w.sync(t)
	s.send(&types.EntryMask{RevisionNumber: true, Hint: true})
	sizes, revisions, entries := s.pages()
	if !slices.Equal(sizes, []int{5, 5, 2}) || len(entries) != 0 {
		t.Errorf("pages of %v revisions, and %d entries", sizes, len(entries))
	}
	for i, r := range revisions {
		want := &entryv1.EntryRevision{Id: fmt.Sprintf("e%02d", i), CreatedAt: w.now.Unix()}
		if i == 3 {
			want.RevisionNumber = 1
		}
		if !proto.Equal(r, want) {
			t.Errorf("got %v, want %v", r, want)
		}
	}

	for _, c := range []struct {
		ask   []string
		sizes []int
		want  []string
	}{
		{[]string{"e03"}, []int{1}, []string{"e03"}},
		{[]string{"e11", "e01", "e05", "e01"}, []int{3}, []string{"e01", "e05", "e11"}},
		{[]string{"e00", "e01", "e02", "e03", "e04"}, []int{5}, []string{"e00", "e01", "e02", "e03", "e04"}},
		{[]string{"e00", "e01", "e02", "e03", "e04", "e05", "e06"}, []int{5, 2}, []string{"e00", "e01", "e02", "e03", "e04", "e05", "e06"}},
		{[]string{"none", "other", "e07", ""}, []int{1}, []string{"e07"}}, // neither what is another agent's nor what is not there
		{[]string{"none"}, []int{0}, nil},
		{nil, []int{0}, nil},
	} {
		s.send(nil, c.ask...)
		sizes, _, entries := s.pages()
		if !slices.Equal(sizes, c.sizes) || !slices.Equal(idsOf(entries), c.want) {
			t.Errorf("asked for %v: got pages of %v with %v", c.ask, sizes, idsOf(entries))
		}
		for _, e := range entries { // masked as the first request demanded
			if want := (&types.Entry{Id: e.Id}); e.Id == "e03" {
				want.RevisionNumber, want.Hint = 1, "new"
				if !proto.Equal(e, want) {
					t.Errorf("got %v, want %v", e, want)
				}
			} else if !proto.Equal(e, want) {
				t.Errorf("got %v, want %v", e, want)
			}
		}
	}
}

func TestASyncBeginsWithARequestThatIsValid(t *testing.T) {
	w := newSyncRecords(t, 5, 1)
	for text, req := range map[string]*entryv1.SyncAuthorizedEntriesRequest{
		"specifying IDs":                   {Ids: []string{"e00"}},
		"revision number cannot be masked": {OutputMask: &types.EntryMask{SpiffeId: true}},
	} {
		s := w.sync(t)
		if err := s.stream.Send(req); err != nil {
			t.Fatal(err)
		}
		_, err := s.stream.Recv()
		wantCode(t, text, err, codes.InvalidArgument, text)
	}
	s := w.sync(t)
	if err := s.stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.stream.Recv(); err != io.EOF {
		t.Errorf("a stream without a request: %v", err)
	}
}

func TestARequestOfASyncIsBounded(t *testing.T) {
	w := newSyncRecords(t, 5, 1)
	s := w.sync(t)
	s.send(nil)
	s.recv()
	s.send(nil, make([]string, maxSyncIDs+1)...)
	_, err := s.stream.Recv()
	wantCode(t, "too many IDs", err, codes.InvalidArgument, "the most is")
}

func TestTheMessagesOfASyncAreBounded(t *testing.T) {
	w := newSyncRecords(t, 500, 0)
	var batch []*types.Entry
	for i := range 20 { // each 300 kB
		e := wireEntry(fmt.Sprintf("/w%d", i), idToWire(testAgent("a")))
		e.Selectors = nil
		for j := range 75 {
			e.Selectors = append(e.Selectors, &types.Selector{Type: "a", Value: fmt.Sprintf("%04000d", j)})
		}
		e.Id = fmt.Sprintf("e%02d", i)
		if batch = append(batch, e); len(batch) == 5 {
			w.create(t, batch...)
			batch = nil
		}
	}
	s := w.sync(t)
	s.send(nil)
	_, revisions, entries := s.pages()
	if len(revisions) != 20 || len(entries) != 0 { // whole, they are too large for one message
		t.Fatalf("got %d revisions and %d entries", len(revisions), len(entries))
	}
	var ids []string
	for _, r := range revisions {
		ids = append(ids, r.Id)
	}
	s.send(nil, ids...)
	sizes, _, entries := s.pages()
	if !slices.Equal(idsOf(entries), ids) || len(sizes) != 4 {
		t.Errorf("got pages of %v with %v", sizes, idsOf(entries))
	}
}

func TestASyncShowsTheNewestState(t *testing.T) {
	w := newSyncRecords(t, 5, 8)
	s := w.sync(t)
	s.send(nil)
	s.pages()
	if _, err := w.entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"e01"}}); err != nil {
		t.Fatal(err)
	}
	moved := &types.Entry{Id: "e02", ParentId: idToWire(testAgent("b"))}
	changed := &types.Entry{Id: "e03", Hint: "new"}
	for mask, e := range map[*types.EntryMask]*types.Entry{{ParentId: true}: moved, {Hint: true}: changed} {
		if _, err := w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}, InputMask: mask}); err != nil {
			t.Fatal(err)
		}
	}
	s.send(nil, "e00", "e01", "e02", "e03")
	if _, _, entries := s.pages(); !slices.Equal(idsOf(entries), []string{"e00", "e03"}) || entries[1].Hint != "new" {
		t.Errorf("got %v", entries)
	}
}

func TestASyncEndsWhenItsAgentIsNoLongerAdmitted(t *testing.T) {
	for name, c := range map[string]struct {
		out    func(*records) error
		reason types.PermissionDeniedDetails_Reason
	}{
		"banned": {func(w *records) error {
			_, err := w.registry.UpdateNode(context.Background(), testAgent("a"), func(n *registry.Node) error { n.Banned = true; return nil })
			return err
		}, types.PermissionDeniedDetails_AGENT_BANNED},
		"deleted": {func(w *records) error {
			return w.registry.DeleteNode(context.Background(), testAgent("a"))
		}, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED},
	} {
		t.Run(name, func(t *testing.T) {
			w := newSyncRecords(t, 5, 8)
			s := w.sync(t)
			s.send(nil)
			s.pages()
			if err := c.out(w); err != nil {
				t.Fatal(err)
			}
			_, err := s.stream.Recv() // the agent asks for nothing: it is told all the same
			wantReason(t, err, c.reason)

			s = w.sync(t)
			s.send(nil)
			_, err = s.stream.Recv()
			wantReason(t, err, c.reason)
		})
	}
}

func wantReason(t *testing.T, err error, want types.PermissionDeniedDetails_Reason) {
	t.Helper()
	st := grpcstatus.Convert(err)
	if st.Code() == codes.PermissionDenied {
		for _, d := range st.Details() {
			if d, ok := d.(*types.PermissionDeniedDetails); ok && d.Reason == want {
				return
			}
		}
	}
	t.Errorf("got error %v with details %v, want PermissionDenied with %v", err, st.Details(), want)
}

func TestASyncDoesNotWaitForever(t *testing.T) {
	w := newSyncRecords(t, 5, 8)
	w.service.syncIdle = time.Millisecond
	_, err := w.sync(t).stream.Recv() // the agent sends nothing
	wantCode(t, "idle", err, codes.DeadlineExceeded, "no request for 1ms")
}

func TestASyncSurvivesChangesThatDoNotConcernIt(t *testing.T) {
	w := newSyncRecords(t, 5, 8)
	s := w.sync(t)
	s.send(nil)
	s.pages()
	for i := range 20 {
		w.create(t, wireEntry(fmt.Sprintf("/new%d", i), idToWire(testAgent("a")), "unix:uid:"+strings.Repeat("1", i+1)))
	}
	s.send(nil, "e00")
	if _, _, entries := s.pages(); len(entries) != 1 {
		t.Errorf("got %v", entries)
	}
}
