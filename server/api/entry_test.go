package api

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

// records is the Entry and Bundle APIs over a registry of their own, with
// callers that are whoever they say: who may call what is tested elsewhere.
type records struct {
	registry *registry.Registry
	entries  entryv1.EntryClient
	bundles  bundlev1.BundleClient
	service  *entryService
	now      time.Time
}

var recordsTD = spiffeid.RequireTrustDomainFromString("example.org")

func wireID(path string) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: "example.org", Path: path}
}

func testAgent(name string) spiffeid.ID {
	return spiffeid.RequireFromPath(recordsTD, "/spire/agent/test/"+name)
}

const callerHeader = "test-caller"

// as makes a context whose calls come from an agent.
func as(t testing.TB, agent spiffeid.ID) context.Context {
	return metadata.AppendToOutgoingContext(t.Context(), callerHeader, agent.String())
}

func testCaller(ctx context.Context) context.Context {
	c := &Caller{Kind: local}
	if v := metadata.ValueFromIncomingContext(ctx, callerHeader); len(v) == 1 {
		c = &Caller{Kind: agent, ID: spiffeid.RequireFromString(v[0])}
	}
	return context.WithValue(ctx, callerKey{}, c)
}

func newRecords(t testing.TB) *records {
	t.Helper()
	db, err := badger.Open(badger.Options{InMemory: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	w := &records{now: time.Unix(1_800_000_000, 0)}
	now := func() time.Time { return w.now }
	if w.registry, err = registry.Open(t.Context(), registry.Options{Store: db, TrustDomain: recordsTD, Now: now}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); w.registry.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })

	a := &API{registry: w.registry, authorities: new(authority.Authorities), td: recordsTD, now: now, log: slog.New(slog.DiscardHandler)}
	w.service = &entryService{API: a}
	server := grpc.NewServer(
		grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			return handler(testCaller(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			return handler(srv, &serverStream{ss, testCaller(ss.Context())})
		}),
	)
	entryv1.RegisterEntryServer(server, w.service)
	bundlev1.RegisterBundleServer(server, &bundleService{API: a})
	listener := bufconn.Listen(1 << 20)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	conn, err := grpc.NewClient("passthrough:test",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	w.entries, w.bundles = entryv1.NewEntryClient(conn), bundlev1.NewBundleClient(conn)
	return w
}

func wireEntry(path string, parent *types.SPIFFEID, selectors ...string) *types.Entry {
	e := &types.Entry{SpiffeId: wireID(path), ParentId: parent}
	if len(selectors) == 0 {
		selectors = []string{"unix:uid:1000"}
	}
	e.Selectors = wireSelectors(selectors...)
	return e
}

func wireSelectors(selectors ...string) (ws []*types.Selector) {
	for _, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		ws = append(ws, &types.Selector{Type: typ, Value: value})
	}
	return ws
}

// create creates entries that must succeed.
func (w *records) create(t testing.TB, entries ...*types.Entry) []*types.Entry {
	t.Helper()
	resp, err := w.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: entries})
	if err != nil {
		t.Fatal(err)
	}
	var out []*types.Entry
	for i, r := range resp.Results {
		if codes.Code(r.Status.Code) != codes.OK {
			t.Fatalf("create entry %d: %v", i, r.Status)
		}
		out = append(out, r.Entry)
	}
	return out
}

func wantCode(t testing.TB, what string, err error, want codes.Code, text string) {
	t.Helper()
	if got := grpcstatus.Code(err); got != want || !strings.Contains(grpcstatus.Convert(err).Message(), text) {
		t.Errorf("%s: got error %v, want %v with %q", what, err, want, text)
	}
}

func wantStatus(t testing.TB, what string, got *types.Status, want codes.Code, text string) {
	t.Helper()
	if codes.Code(got.GetCode()) != want || !strings.Contains(got.GetMessage(), text) {
		t.Errorf("%s: got status %v, want %v with %q", what, got, want, text)
	}
}

// whole is an entry with every field set that a client may set.
func whole() *types.Entry {
	return &types.Entry{
		Id: "my-entry", SpiffeId: wireID("/web"), ParentId: wireID("/host"), Selectors: wireSelectors("unix:uid:1", "unix:gid:2"),
		X509SvidTtl: 60, JwtSvidTtl: 30, FederatesWith: []string{"other.org"}, Admin: true, Downstream: true, StoreSvid: true,
		ExpiresAt: 1_900_000_000, DnsNames: []string{"a.example.org", "b.example.org"}, Hint: "hint",
		AdditionalAttributes: &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true, JwtSvidIncludeJti: true},
	}
}

func TestACreatedEntryHasEveryFieldThatItWasGiven(t *testing.T) {
	w := newRecords(t)
	given := whole()
	want := proto.Clone(given).(*types.Entry)
	want.CreatedAt = w.now.Unix()
	slices.Reverse(want.Selectors) // sorted
	given.CreatedAt, given.RevisionNumber = 5, 7
	got := w.create(t, given)[0]
	if !proto.Equal(got, want) {
		t.Errorf("created %v\nwant    %v", got, want)
	}
	got, err := w.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "my-entry"})
	if err != nil || !proto.Equal(got, want) {
		t.Errorf("got  %v, %v\nwant %v", got, err, want)
	}
}

func TestAPathMayLackItsLeadingSlash(t *testing.T) {
	w := newRecords(t)
	e := wireEntry("web", &types.SPIFFEID{TrustDomain: "example.org", Path: "host"})
	if got := w.create(t, e)[0]; got.SpiffeId.Path != "/web" || got.ParentId.Path != "/host" {
		t.Errorf("got %v", got)
	}
}

// masks are the fields of an entry that a mask can name, each as a mask.
func masks() map[string]*types.EntryMask {
	out := make(map[string]*types.EntryMask)
	fields := (&types.EntryMask{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		m := &types.EntryMask{}
		m.ProtoReflect().Set(fields.Get(i), protoreflect.ValueOfBool(true))
		out[string(fields.Get(i).Name())] = m
	}
	return out
}

func TestAnOutputMaskLetsItsFieldsThroughAndTheID(t *testing.T) {
	w := newRecords(t)
	w.create(t, whole())
	resp, err := w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{ // so that no field is zero
		Entries: []*types.Entry{whole()}, InputMask: &types.EntryMask{Hint: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	full := resp.Results[0].Entry
	for name, mask := range masks() {
		got, err := w.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "my-entry", OutputMask: mask})
		if err != nil {
			t.Fatal(err)
		}
		want := &types.Entry{Id: full.Id}
		field := full.ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name(name))
		if !full.ProtoReflect().Has(field) {
			t.Fatalf("the test leaves %s empty", name)
		}
		want.ProtoReflect().Set(field, full.ProtoReflect().Get(field))
		if !proto.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	got, err := w.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "my-entry", OutputMask: &types.EntryMask{}})
	if err != nil || !proto.Equal(got, &types.Entry{Id: "my-entry"}) {
		t.Errorf("an empty mask lets through %v, %v", got, err)
	}
}

func TestAnInputMaskTakesItsFieldsOnly(t *testing.T) {
	readOnly := map[string]bool{"revision_number": true, "created_at": true}
	for name, mask := range masks() {
		t.Run(name, func(t *testing.T) {
			w := newRecords(t)
			before := wireEntry("/before", wireID("/parent"))
			before.Id = "my-entry"
			before = w.create(t, before)[0]
			w.now = w.now.Add(time.Hour)
			given := whole()
			given.RevisionNumber, given.CreatedAt = 99, 99
			resp, err := w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{given}, InputMask: mask})
			if err != nil {
				t.Fatal(err)
			}
			slices.Reverse(given.Selectors) // sorted
			want := before
			if !readOnly[name] {
				field := given.ProtoReflect().Descriptor().Fields().ByName(protoreflect.Name(name))
				want.ProtoReflect().Set(field, given.ProtoReflect().Get(field))
			}
			want.RevisionNumber = 1
			wantStatus(t, name, resp.Results[0].Status, codes.OK, "OK")
			if !proto.Equal(resp.Results[0].Entry, want) {
				t.Errorf("got  %v\nwant %v", resp.Results[0].Entry, want)
			}
		})
	}
}

func TestWithoutAMaskAnUpdateTakesEverything(t *testing.T) {
	w := newRecords(t)
	w.create(t, whole())
	bare := wireEntry("/web", wireID("/host"))
	bare.Id = "my-entry"
	resp, err := w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{bare}})
	if err != nil {
		t.Fatal(err)
	}
	want := proto.Clone(bare).(*types.Entry)
	want.RevisionNumber, want.CreatedAt = 1, w.now.Unix()
	if got := resp.Results[0].Entry; !proto.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestTheItemsOfABatchHaveTheirOwnStatus(t *testing.T) {
	w := newRecords(t)
	existing := w.create(t, wireEntry("/exists", wireID("/host")))[0]
	foreign := wireEntry("/x", wireID("/host"))
	foreign.SpiffeId.TrustDomain = "other.org"
	malformed := wireEntry("/x", &types.SPIFFEID{TrustDomain: "Example Org", Path: "/x"})
	late := wireEntry("/late", wireID("/host"))
	late.ExpiresAt = 1 << 40
	early := wireEntry("/early", wireID("/host"))
	early.ExpiresAt = -1
	created, err := w.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{
		Entries:    []*types.Entry{wireEntry("/new", wireID("/host")), wireEntry("/exists", wireID("/host")), {}, foreign, malformed, late, early, wireEntry("/new", wireID("/host"))},
		OutputMask: &types.EntryMask{SpiffeId: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		code codes.Code
		text string
		id   string
	}{
		{codes.OK, "OK", created.Results[0].Entry.GetId()},
		{codes.AlreadyExists, "similar entry already exists", existing.Id},
		{codes.InvalidArgument, "spiffe_id: SPIFFE ID is missing", ""},
		{codes.InvalidArgument, "not in this server's trust domain", ""},
		{codes.InvalidArgument, "parent_id: ", ""},
		{codes.InvalidArgument, "after the year 9999", ""},
		{codes.InvalidArgument, "before 1970", ""},
		{codes.AlreadyExists, "similar entry already exists", created.Results[0].Entry.GetId()},
	} {
		wantStatus(t, fmt.Sprint("create ", i), created.Results[i].Status, c.code, c.text)
		if created.Results[i].Entry.GetId() != c.id || created.Results[i].Entry.GetSelectors() != nil {
			t.Errorf("create %d: got entry %v, want %q, masked", i, created.Results[i].Entry, c.id)
		}
	}

	hint := func(id string) *types.Entry { return &types.Entry{Id: id, Hint: "h"} }
	updated, err := w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries:    []*types.Entry{hint("none"), hint(existing.Id), hint(""), {Id: existing.Id, Hint: strings.Repeat("h", 1025)}},
		InputMask:  &types.EntryMask{Hint: true},
		OutputMask: &types.EntryMask{Hint: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, "update 0", updated.Results[0].Status, codes.NotFound, "entry not found")
	wantStatus(t, "update 1", updated.Results[1].Status, codes.OK, "OK")
	wantStatus(t, "update 2", updated.Results[2].Status, codes.InvalidArgument, "missing entry ID")
	wantStatus(t, "update 3", updated.Results[3].Status, codes.InvalidArgument, "hint")
	if !proto.Equal(updated.Results[1].Entry, hint(existing.Id)) {
		t.Errorf("got %v", updated.Results[1].Entry)
	}
	if updated, err = w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{
		Entries:   []*types.Entry{{Id: existing.Id, SpiffeId: wireID("/new")}},
		InputMask: &types.EntryMask{SpiffeId: true},
	}); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, "update into a similar entry", updated.Results[0].Status, codes.AlreadyExists, "similar")
	if updated.Results[0].Entry != nil {
		t.Errorf("a failed update shows %v", updated.Results[0].Entry)
	}

	deleted, err := w.entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"none", existing.Id, "", existing.Id}})
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, "delete 0", deleted.Results[0].Status, codes.NotFound, "entry not found")
	wantStatus(t, "delete 1", deleted.Results[1].Status, codes.OK, "OK")
	wantStatus(t, "delete 2", deleted.Results[2].Status, codes.InvalidArgument, "missing entry ID")
	wantStatus(t, "delete 3", deleted.Results[3].Status, codes.NotFound, "entry not found")
	if deleted.Results[0].Id != "none" || deleted.Results[1].Id != existing.Id {
		t.Errorf("got %v", deleted.Results)
	}
}

func TestABatchIsBounded(t *testing.T) {
	w := newRecords(t)
	_, err := w.entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: make([]string, maxBatch+1)})
	wantCode(t, "delete", err, codes.InvalidArgument, "send several")
	many := make([]*types.Entry, maxBatch+1)
	for i := range many {
		many[i] = &types.Entry{}
	}
	_, err = w.entries.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: many})
	wantCode(t, "create", err, codes.InvalidArgument, "send several")
	_, err = w.entries.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: many})
	wantCode(t, "update", err, codes.InvalidArgument, "send several")
}

func TestAnUnknownEntryIsNotFound(t *testing.T) {
	w := newRecords(t)
	_, err := w.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: "none"})
	wantCode(t, "unknown", err, codes.NotFound, "entry not found")
	_, err = w.entries.GetEntry(t.Context(), &entryv1.GetEntryRequest{})
	wantCode(t, "empty", err, codes.InvalidArgument, "missing entry ID")
}

func TestFilters(t *testing.T) {
	w := newRecords(t)
	for id, e := range map[string]*types.Entry{
		"1": {SpiffeId: wireID("/a"), ParentId: wireID("/p"), Selectors: wireSelectors("a:1", "b:2", "c:3"), FederatesWith: []string{"one.org", "two.org", "three.org"}, Hint: "x"},
		"2": {SpiffeId: wireID("/a"), ParentId: wireID("/q"), Selectors: wireSelectors("a:1", "b:2"), FederatesWith: []string{"one.org", "two.org"}, Downstream: true},
		"3": {SpiffeId: wireID("/b"), ParentId: wireID("/p"), Selectors: wireSelectors("a:1"), FederatesWith: []string{"one.org"}},
		"4": {SpiffeId: wireID("/b"), ParentId: wireID("/q"), Selectors: wireSelectors("d:4"), Hint: "x", Downstream: true},
	} {
		e.Id = id
		w.create(t, e)
	}
	type filter = entryv1.ListEntriesRequest_Filter
	selectors := func(m types.SelectorMatch_MatchBehavior, s ...string) *types.SelectorMatch {
		return &types.SelectorMatch{Match: m, Selectors: wireSelectors(s...)}
	}
	federates := func(m types.FederatesWithMatch_MatchBehavior, names ...string) *types.FederatesWithMatch {
		return &types.FederatesWithMatch{Match: m, TrustDomains: names}
	}
	for _, c := range []struct {
		name   string
		filter *filter
		want   string
	}{
		{"none", nil, "1234"},
		{"empty", &filter{}, "1234"},
		{"SPIFFE ID", &filter{BySpiffeId: wireID("/a")}, "12"},
		{"SPIFFE ID of none", &filter{BySpiffeId: wireID("/c")}, ""},
		{"parent", &filter{ByParentId: wireID("/p")}, "13"},
		{"both IDs", &filter{BySpiffeId: wireID("/b"), ByParentId: wireID("/q")}, "4"},
		{"hint", &filter{ByHint: wrapperspb.String("x")}, "14"},
		{"no hint", &filter{ByHint: wrapperspb.String("")}, "23"},
		{"downstream", &filter{ByDownstream: wrapperspb.Bool(true)}, "24"},
		{"not downstream", &filter{ByDownstream: wrapperspb.Bool(false)}, "13"},
		{"exact selectors", &filter{BySelectors: selectors(types.SelectorMatch_MATCH_EXACT, "b:2", "a:1")}, "2"},
		{"subset of selectors", &filter{BySelectors: selectors(types.SelectorMatch_MATCH_SUBSET, "b:2", "a:1", "e:5")}, "23"},
		{"superset of selectors", &filter{BySelectors: selectors(types.SelectorMatch_MATCH_SUPERSET, "b:2", "a:1")}, "12"},
		{"any selector", &filter{BySelectors: selectors(types.SelectorMatch_MATCH_ANY, "c:3", "d:4", "e:5")}, "14"},
		{"exact trust domains", &filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_EXACT, "two.org", "one.org", "one.org")}, "2"},
		{"subset of trust domains", &filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_SUBSET, "spiffe://two.org", "one.org")}, "23"},
		{"superset of trust domains", &filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_SUPERSET, "two.org", "one.org")}, "12"},
		{"any trust domain", &filter{ByFederatesWith: federates(types.FederatesWithMatch_MATCH_ANY, "two.org", "four.org")}, "12"},
		{"everything at once", &filter{BySpiffeId: wireID("/a"), ByParentId: wireID("/p"), ByHint: wrapperspb.String("x"), ByDownstream: wrapperspb.Bool(false),
			BySelectors: selectors(types.SelectorMatch_MATCH_ANY, "a:1"), ByFederatesWith: federates(types.FederatesWithMatch_MATCH_ANY, "one.org")}, "1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for size := range int32(4) { // whole, and in pages
				got, token := "", ""
				for {
					resp, err := w.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{Filter: c.filter, PageSize: size, PageToken: token, OutputMask: &types.EntryMask{}})
					if err != nil {
						t.Fatal(err)
					}
					if n := len(resp.Entries); size > 0 && n > int(size) || size > 0 && resp.NextPageToken != "" && n != int(size) {
						t.Errorf("a page of %d has %d entries", size, n)
					}
					for _, e := range resp.Entries {
						got += e.Id
					}
					if token = resp.NextPageToken; token == "" {
						break
					}
				}
				if got != c.want {
					t.Errorf("pages of %d: got %q, want %q", size, got, c.want)
				}
			}
			var count *entryv1.CountEntriesRequest_Filter
			if f := c.filter; f != nil {
				count = &entryv1.CountEntriesRequest_Filter{BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors, ByFederatesWith: f.ByFederatesWith, ByHint: f.ByHint, ByDownstream: f.ByDownstream}
			}
			if resp, err := w.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: count}); err != nil || int(resp.Count) != len(c.want) {
				t.Errorf("counted %v, %v, want %d", resp, err, len(c.want))
			}
		})
	}
}

func TestMalformedListRequestsAreRefused(t *testing.T) {
	w := newRecords(t)
	type filter = entryv1.ListEntriesRequest_Filter
	tooMany := &types.SelectorMatch{}
	for i := range maxFilter + 1 {
		tooMany.Selectors = append(tooMany.Selectors, &types.Selector{Type: "a", Value: fmt.Sprint(i)})
	}
	for text, req := range map[string]*entryv1.ListEntriesRequest{
		"page size is negative":                          {PageSize: -1},
		"malformed page token":                           {PageToken: "nonsense"},
		"malformed SPIFFE ID filter":                     {Filter: &filter{BySpiffeId: &types.SPIFFEID{TrustDomain: "other.org", Path: "/a"}}},
		"malformed parent ID filter":                     {Filter: &filter{ByParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/a//b"}}},
		"malformed selector filter: empty":               {Filter: &filter{BySelectors: &types.SelectorMatch{}}},
		"malformed selector filter: selector":            {Filter: &filter{BySelectors: &types.SelectorMatch{Selectors: wireSelectors("a:")}}},
		"malformed selector filter: unknown match":       {Filter: &filter{BySelectors: &types.SelectorMatch{Selectors: wireSelectors("a:1"), Match: 9}}},
		"malformed selector filter: 1001":                {Filter: &filter{BySelectors: tooMany}},
		"malformed federates with filter: empty":         {Filter: &filter{ByFederatesWith: &types.FederatesWithMatch{}}},
		"malformed federates with filter: trust domain":  {Filter: &filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"NO"}}}},
		"malformed federates with filter: unknown match": {Filter: &filter{ByFederatesWith: &types.FederatesWithMatch{TrustDomains: []string{"a.org"}, Match: 9}}},
	} {
		_, err := w.entries.ListEntries(t.Context(), req)
		wantCode(t, text, err, codes.InvalidArgument, text)
		if req.Filter == nil {
			continue
		}
		_, err = w.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{Filter: &entryv1.CountEntriesRequest_Filter{
			BySpiffeId: req.Filter.BySpiffeId, ByParentId: req.Filter.ByParentId, BySelectors: req.Filter.BySelectors, ByFederatesWith: req.Filter.ByFederatesWith,
		}})
		wantCode(t, "count: "+text, err, codes.InvalidArgument, text)
	}
}

func TestPagesStayInStepWhileEntriesComeAndGo(t *testing.T) {
	w := newRecords(t)
	for _, id := range []string{"b", "d", "f", "h"} {
		e := wireEntry("/"+id, wireID("/p"))
		e.Id = id
		w.create(t, e)
	}
	page := func(token string) (string, string) {
		resp, err := w.entries.ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 2, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		ids := ""
		for _, e := range resp.Entries {
			ids += e.Id
		}
		return ids, resp.NextPageToken
	}
	first, token := page("")
	if _, err := w.entries.BatchDeleteEntry(t.Context(), &entryv1.BatchDeleteEntryRequest{Ids: []string{"d", "f"}}); err != nil { // d is where the token stands
		t.Fatal(err)
	}
	for _, id := range []string{"a", "g"} {
		e := wireEntry("/"+id, wireID("/p"))
		e.Id = id
		w.create(t, e)
	}
	if second, rest := page(token); first != "bd" || second != "gh" || rest != "" {
		t.Errorf("got %q, then %q and token %q", first, second, rest)
	}
}

func TestAnAgentGetsTheEntriesItIsAuthorizedFor(t *testing.T) {
	w := newRecords(t)
	if err := w.registry.PutNode(t.Context(), &registry.Node{ID: testAgent("a"), AttestationType: "test"}); err != nil {
		t.Fatal(err)
	}
	w.create(t, wireEntry("/mine", idToWire(testAgent("a"))), wireEntry("/nested", wireID("/mine")), wireEntry("/others", idToWire(testAgent("b"))))
	resp, err := w.entries.GetAuthorizedEntries(as(t, testAgent("a")), &entryv1.GetAuthorizedEntriesRequest{OutputMask: &types.EntryMask{SpiffeId: true}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range resp.Entries {
		got = append(got, e.SpiffeId.Path)
		if e.Id == "" || e.ParentId != nil {
			t.Errorf("got %v, want it masked", e)
		}
	}
	slices.Sort(got)
	if !slices.Equal(got, []string{"/mine", "/nested"}) {
		t.Errorf("got %v", got)
	}
	if resp, err := w.entries.GetAuthorizedEntries(as(t, testAgent("b")), &entryv1.GetAuthorizedEntriesRequest{}); err != nil || len(resp.Entries) != 0 {
		t.Errorf("an agent that has not attested got %v, %v", resp, err)
	}
}

func newEntryOf(set func(*entry.Entry)) *entry.Entry {
	e := &entry.Entry{}
	set(e)
	return e
}
