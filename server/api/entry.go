package api

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/registry"
)

// entryService is SPIRE's Entry API over the registry.
type entryService struct {
	entryv1.UnsafeEntryServer // every call is here: one that is missing does not compile
	*API

	syncPage int           // entries on one page of SyncAuthorizedEntries; 0: defaultSyncPage
	syncIdle time.Duration // how long SyncAuthorizedEntries waits for a request; 0: defaultSyncIdle
}

// CountEntries counts the entries that a filter lets through.
func (s *entryService) CountEntries(ctx context.Context, req *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	view := s.registry.View()
	if req.Filter == nil {
		return &entryv1.CountEntriesResponse{Count: int32(view.EntryCount())}, nil
	}
	f, err := newEntryFilter(req.Filter, view.TrustDomain())
	if err != nil {
		return nil, err
	}
	n := int32(0)
	for range f.entries(view, "") {
		n++
	}
	return &entryv1.CountEntriesResponse{Count: n}, nil
}

// ListEntries lists the entries that a filter lets through, by ID.
func (s *entryService) ListEntries(ctx context.Context, req *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	p, err := newPage(req.PageSize, req.PageToken)
	if err != nil {
		return nil, err
	}
	view := s.registry.View()
	f, err := newEntryFilter(req.Filter, view.TrustDomain())
	if err != nil {
		return nil, err
	}
	entries, next := collectPage(p, f.entries(view, p.after), func(e *entry.Entry) string { return e.ID })
	return &entryv1.ListEntriesResponse{Entries: entriesToWire(entries, req.OutputMask), NextPageToken: next}, nil
}

// GetEntry returns one entry.
func (s *entryService) GetEntry(ctx context.Context, req *entryv1.GetEntryRequest) (*types.Entry, error) {
	if req.Id == "" {
		return nil, invalidArgument("missing entry ID")
	}
	e := s.registry.View().Entry(req.Id)
	if e == nil {
		return nil, callErrorf(codes.NotFound, "entry not found")
	}
	return entryToWire(e, req.OutputMask), nil
}

// BatchCreateEntry creates entries, each on its own.
func (s *entryService) BatchCreateEntry(ctx context.Context, req *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	if err := checkBatch(len(req.Entries)); err != nil {
		return nil, err
	}
	results := make([]*entryv1.BatchCreateEntryResponse_Result, len(req.Entries))
	entries := make([]*entry.Entry, 0, len(req.Entries))
	places := make([]int, 0, len(req.Entries)) // in the request, of each of entries
	for i, w := range req.Entries {
		set, err := entryFromWire(w, nil)
		if err != nil {
			results[i] = &entryv1.BatchCreateEntryResponse_Result{Status: itemStatus(s.log, invalidArgument("%s", err))}
			continue
		}
		e := &entry.Entry{ID: w.Id}
		set(e)
		entries, places = append(entries, e), append(places, i)
	}
	for i, res := range s.registry.CreateEntries(ctx, entries) {
		result := &entryv1.BatchCreateEntryResponse_Result{Status: itemStatus(s.log, res.Err)}
		if res.Entry != nil {
			result.Entry = entryToWire(res.Entry, req.OutputMask) // the new one, or the one that exists already
		}
		results[places[i]] = result
	}
	return &entryv1.BatchCreateEntryResponse{Results: results}, nil
}

// BatchUpdateEntry changes the fields of entries that the input mask names,
// each entry on its own.
func (s *entryService) BatchUpdateEntry(ctx context.Context, req *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	if err := checkBatch(len(req.Entries)); err != nil {
		return nil, err
	}
	results := make([]*entryv1.BatchUpdateEntryResponse_Result, len(req.Entries))
	updates := make([]registry.EntryUpdate, 0, len(req.Entries))
	places := make([]int, 0, len(req.Entries))
	for i, w := range req.Entries {
		set, err := entryFromWire(w, req.InputMask)
		if err == nil && w.Id == "" {
			err = fmt.Errorf("missing entry ID")
		}
		if err != nil {
			results[i] = &entryv1.BatchUpdateEntryResponse_Result{Status: itemStatus(s.log, invalidArgument("%s", err))}
			continue
		}
		updates = append(updates, registry.EntryUpdate{ID: w.Id, Change: func(e *entry.Entry) error {
			set(e)
			return nil
		}})
		places = append(places, i)
	}
	for i, res := range s.registry.UpdateEntries(ctx, updates) {
		result := &entryv1.BatchUpdateEntryResponse_Result{Status: itemStatus(s.log, res.Err)}
		if res.Err == nil {
			result.Entry = entryToWire(res.Entry, req.OutputMask)
		}
		results[places[i]] = result
	}
	return &entryv1.BatchUpdateEntryResponse{Results: results}, nil
}

// BatchDeleteEntry deletes entries, each on its own.
func (s *entryService) BatchDeleteEntry(ctx context.Context, req *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	if err := checkBatch(len(req.Ids)); err != nil {
		return nil, err
	}
	results := make([]*entryv1.BatchDeleteEntryResponse_Result, len(req.Ids))
	ids := make([]string, 0, len(req.Ids))
	places := make([]int, 0, len(req.Ids))
	for i, id := range req.Ids {
		if id == "" {
			results[i] = &entryv1.BatchDeleteEntryResponse_Result{Status: itemStatus(s.log, invalidArgument("missing entry ID"))}
			continue
		}
		ids, places = append(ids, id), append(places, i)
	}
	for i, err := range s.registry.DeleteEntries(ctx, ids) {
		results[places[i]] = &entryv1.BatchDeleteEntryResponse_Result{Id: ids[i], Status: itemStatus(s.log, err)}
	}
	return &entryv1.BatchDeleteEntryResponse{Results: results}, nil
}

// GetAuthorizedEntries returns what the calling agent is authorized for.
func (s *entryService) GetAuthorizedEntries(ctx context.Context, req *entryv1.GetAuthorizedEntriesRequest) (*entryv1.GetAuthorizedEntriesResponse, error) {
	entries := s.registry.View().Authorized(callerFrom(ctx).ID, s.now())
	return &entryv1.GetAuthorizedEntriesResponse{Entries: entriesToWire(entries, req.OutputMask)}, nil
}

func entriesToWire(entries []*entry.Entry, mask *types.EntryMask) []*types.Entry {
	ws := make([]*types.Entry, len(entries))
	for i, e := range entries {
		ws[i] = entryToWire(e, mask)
	}
	return ws
}

// maxFilter bounds the selectors or trust domains of a filter: enough for all
// that a node or workload may have.
const maxFilter = 1000

// entryFilter lets entries through for which all that it demands holds.
type entryFilter struct {
	spiffeID spiffeid.ID // zero: any
	parentID spiffeid.ID // zero: any
	demands  []func(*entry.Entry) bool
}

// wireEntryFilter is what the filters of CountEntries and ListEntries share.
type wireEntryFilter interface {
	GetBySpiffeId() *types.SPIFFEID
	GetByParentId() *types.SPIFFEID
	GetBySelectors() *types.SelectorMatch
	GetByFederatesWith() *types.FederatesWithMatch
	GetByHint() *wrapperspb.StringValue
	GetByDownstream() *wrapperspb.BoolValue
}

func newEntryFilter(w wireEntryFilter, td spiffeid.TrustDomain) (*entryFilter, error) {
	f := &entryFilter{}
	var err error
	if id := w.GetBySpiffeId(); id != nil {
		if f.spiffeID, err = filterID(id, td); err != nil {
			return nil, invalidArgument("malformed SPIFFE ID filter: %s", err)
		}
	}
	if id := w.GetByParentId(); id != nil {
		if f.parentID, err = filterID(id, td); err != nil {
			return nil, invalidArgument("malformed parent ID filter: %s", err)
		}
		if !f.spiffeID.IsZero() { // then that index is used
			f.demand(func(e *entry.Entry) bool { return e.ParentID == f.parentID })
		}
	}
	if m := w.GetBySelectors(); m != nil {
		matches, err := selectorFilter(m)
		if err != nil {
			return nil, invalidArgument("malformed selector filter: %s", err)
		}
		f.demand(func(e *entry.Entry) bool { return matches(e.Selectors) })
	}
	if m := w.GetByFederatesWith(); m != nil {
		matches, err := federatesFilter(m)
		if err != nil {
			return nil, invalidArgument("malformed federates with filter: %s", err)
		}
		f.demand(func(e *entry.Entry) bool { return matches(e.FederatesWith) })
	}
	if hint := w.GetByHint(); hint != nil {
		f.demand(func(e *entry.Entry) bool { return e.Hint == hint.Value })
	}
	if downstream := w.GetByDownstream(); downstream != nil {
		f.demand(func(e *entry.Entry) bool { return e.Downstream == downstream.Value })
	}
	return f, nil
}

func (f *entryFilter) demand(d func(*entry.Entry) bool) { f.demands = append(f.demands, d) }

// entries yields the entries of a view that the filter lets through and whose
// ID sorts after the one given, by ID. It goes through the narrowest index.
func (f *entryFilter) entries(v *registry.View, after string) iter.Seq[*entry.Entry] {
	var candidates iter.Seq[*entry.Entry]
	switch {
	case !f.spiffeID.IsZero():
		candidates = v.EntriesBySPIFFEIDAfter(f.spiffeID, after)
	case !f.parentID.IsZero():
		candidates = v.EntriesByParentAfter(f.parentID, after)
	default:
		candidates = v.Entries(after)
	}
	if len(f.demands) == 0 {
		return candidates
	}
	return func(yield func(*entry.Entry) bool) {
		for e := range candidates {
			if !slices.ContainsFunc(f.demands, func(d func(*entry.Entry) bool) bool { return !d(e) }) && !yield(e) {
				return
			}
		}
	}
}

func filterID(w *types.SPIFFEID, td spiffeid.TrustDomain) (spiffeid.ID, error) {
	id, err := idFromWire(w)
	if err == nil && !id.MemberOf(td) {
		err = fmt.Errorf("%q is not in this server's trust domain %q", id, td.Name())
	}
	return id, err
}

func selectorFilter(m *types.SelectorMatch) (func(selector.Set) bool, error) {
	if err := checkFilter(len(m.Selectors), "selector"); err != nil {
		return nil, err
	}
	wanted := selectorsFromWire(m.Selectors)
	for _, s := range wanted {
		if _, err := selector.New(s.Type, s.Value); err != nil {
			return nil, err
		}
	}
	wanted = selector.NewSet(wanted...)
	switch m.Match {
	case types.SelectorMatch_MATCH_EXACT:
		return wanted.Equal, nil
	case types.SelectorMatch_MATCH_SUBSET:
		return func(set selector.Set) bool { return set.SubsetOf(wanted) }, nil // no entry has none
	case types.SelectorMatch_MATCH_SUPERSET:
		return wanted.SubsetOf, nil
	case types.SelectorMatch_MATCH_ANY:
		return func(set selector.Set) bool { return slices.ContainsFunc(set, wanted.Contains) }, nil
	}
	return nil, fmt.Errorf("unknown match behavior %d", m.Match)
}

func federatesFilter(m *types.FederatesWithMatch) (func([]spiffeid.TrustDomain) bool, error) {
	if err := checkFilter(len(m.TrustDomains), "trust domain"); err != nil {
		return nil, err
	}
	wanted := make(map[spiffeid.TrustDomain]bool, len(m.TrustDomains))
	for _, name := range m.TrustDomains {
		td, err := trustDomainFromWire(name)
		if err != nil {
			return nil, err
		}
		wanted[td] = true
	}
	// An entry names no trust domain twice, so counting is enough.
	common := func(tds []spiffeid.TrustDomain) (n int) {
		for _, td := range tds {
			if wanted[td] {
				n++
			}
		}
		return n
	}
	switch m.Match {
	case types.FederatesWithMatch_MATCH_EXACT:
		return func(tds []spiffeid.TrustDomain) bool { n := common(tds); return n == len(tds) && n == len(wanted) }, nil
	case types.FederatesWithMatch_MATCH_SUBSET:
		return func(tds []spiffeid.TrustDomain) bool { return len(tds) > 0 && common(tds) == len(tds) }, nil
	case types.FederatesWithMatch_MATCH_SUPERSET:
		return func(tds []spiffeid.TrustDomain) bool { return common(tds) == len(wanted) }, nil
	case types.FederatesWithMatch_MATCH_ANY:
		return func(tds []spiffeid.TrustDomain) bool { return common(tds) > 0 }, nil
	}
	return nil, fmt.Errorf("unknown match behavior %d", m.Match)
}

func checkFilter(n int, what string) error {
	switch {
	case n == 0:
		return fmt.Errorf("empty %s set", what)
	case n > maxFilter:
		return fmt.Errorf("%d %ss; the most is %d", n, what, maxFilter)
	}
	return nil
}
