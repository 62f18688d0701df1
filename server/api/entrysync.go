package api

import (
	"cmp"
	"context"
	"errors"
	"io"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
)

const (
	// defaultSyncPage is how many entries or revisions go into one message. It
	// is SPIRE's figure.
	defaultSyncPage = 500
	// maxSyncBytes bounds the entries of one message well below the 4 MiB that
	// gRPC clients take unless told otherwise. One entry is at most 1 MiB.
	maxSyncBytes = 2 << 20
	// maxSyncIDs bounds the IDs of one request. A message of gRPC's default
	// size holds about as many UUIDs.
	maxSyncIDs = 1 << 17
	// defaultSyncIdle bounds the wait for a request. An agent asks at once for
	// what it lacks, and then closes its side.
	defaultSyncIdle = 5 * time.Minute
)

// SyncAuthorizedEntries sends the calling agent its entries whole, if they are
// few, or else their revisions, and then the entries that it asks for. Every
// message is made from the newest state: an agent that is banned, or an entry
// that is deleted, in the middle of a sync is out from then on.
func (s *entryService) SyncAuthorizedEntries(stream entryv1.Entry_SyncAuthorizedEntriesServer) error {
	sync := &entrySync{
		entryService: s,
		stream:       stream,
		agent:        callerFrom(stream.Context()).ID,
		page:         cmp.Or(s.syncPage, defaultSyncPage),
		changes:      s.registry.Subscribe(callerFrom(stream.Context()).ID),
	}
	defer sync.changes.Close()

	req, err := sync.receive()
	if err != nil || req == nil {
		return err
	}
	switch {
	case len(req.Ids) > 0:
		return invalidArgument("specifying IDs on initial request is not supported")
	case req.OutputMask != nil && !req.OutputMask.RevisionNumber:
		return invalidArgument("revision number cannot be masked")
	}
	sync.mask = req.OutputMask
	if err := sync.begin(); err != nil {
		return err
	}
	for {
		req, err := sync.receive()
		if err != nil || req == nil {
			return err
		}
		if err := sync.answer(req.Ids); err != nil {
			return err
		}
	}
}

// entrySync is one stream of SyncAuthorizedEntries.
type entrySync struct {
	*entryService
	stream  entryv1.Entry_SyncAuthorizedEntriesServer
	agent   spiffeid.ID
	mask    *types.EntryMask
	page    int
	changes *registry.Subscription
}

// receive waits for a request. It returns nil when the agent has closed its
// side, and fails when the agent waits too long or is no longer admitted.
func (s *entrySync) receive() (*entryv1.SyncAuthorizedEntriesRequest, error) {
	type received struct {
		req *entryv1.SyncAuthorizedEntriesRequest
		err error
	}
	c := make(chan received, 1)
	go func() { // ends, at the latest, when this call returns: gRPC then ends the stream
		req, err := s.stream.Recv()
		c <- received{req, err}
	}()
	idle := cmp.Or(s.syncIdle, defaultSyncIdle)
	timer := time.NewTimer(idle)
	defer timer.Stop()
	for {
		select {
		case r := <-c:
			if errors.Is(r.err, io.EOF) {
				return nil, nil
			}
			return r.req, r.err
		case <-s.changes.C:
			view, _ := s.changes.Take()
			if err := s.stillAdmitted(s.stream.Context(), view, s.agent); err != nil {
				return nil, err
			}
		case <-s.stream.Context().Done():
			return nil, context.Cause(s.stream.Context())
		case <-timer.C:
			return nil, callErrorf(codes.DeadlineExceeded, "no request for %v; open a new stream", idle)
		}
	}
}

// begin sends all entries, if they go into one message, or else all revisions.
func (s *entrySync) begin() error {
	view := s.registry.View()
	if err := s.stillAdmitted(s.stream.Context(), view, s.agent); err != nil {
		return err
	}
	entries := view.Authorized(s.agent, s.now())
	if len(entries) <= s.page {
		whole, rest := s.fill(entries)
		if len(rest) == 0 {
			return s.stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: whole})
		}
	}
	for len(entries) > 0 {
		part := entries[:min(s.page, len(entries))]
		entries = entries[len(part):]
		if err := s.stillAdmitted(s.stream.Context(), s.registry.View(), s.agent); err != nil {
			return err
		}
		resp := &entryv1.SyncAuthorizedEntriesResponse{More: len(entries) > 0}
		resp.ProtoReflect().SetUnknown(encodeRevisions(part))
		if err := s.stream.Send(resp); err != nil {
			return err
		}
	}
	return nil
}

// Fields of a response and of an EntryRevision.
const (
	entryRevisionsField = 1
	idField             = 1
	revisionNumberField = 2
	createdAtField      = 3
)

// encodeRevisions encodes the field entry_revisions of a response. Agents of
// SPIRE ask for it every few seconds, and it has a part for each entry they
// have: a message of messages costs several times as much.
func encodeRevisions(entries []*entry.Entry) []byte {
	const each = 64 // bytes of one with a UUID, and some room
	b := make([]byte, 0, each*len(entries))
	varint := func(field protowire.Number, v int64) {
		if v != 0 {
			b = protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), uint64(v))
		}
	}
	sizeOf := func(v int64) int {
		if v == 0 {
			return 0
		}
		return 1 + protowire.SizeVarint(uint64(v)) // the fields' tags are one byte long
	}
	for _, e := range entries {
		created := timeToWire(e.CreatedAt)
		size := 1 + protowire.SizeBytes(len(e.ID)) + sizeOf(e.RevisionNumber) + sizeOf(created)
		b = protowire.AppendVarint(protowire.AppendTag(b, entryRevisionsField, protowire.BytesType), uint64(size))
		b = protowire.AppendString(protowire.AppendTag(b, idField, protowire.BytesType), e.ID)
		varint(revisionNumberField, e.RevisionNumber)
		varint(createdAtField, created)
	}
	return b
}

// answer sends the entries with the IDs given, by ID and each once. It leaves
// out those that the agent is not, or no longer, authorized for: an agent
// cannot tell them from those that do not exist.
func (s *entrySync) answer(ids []string) error {
	if len(ids) > maxSyncIDs {
		return invalidArgument("%d entries requested at once; the most is %d", len(ids), maxSyncIDs)
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	for {
		view := s.registry.View()
		if err := s.stillAdmitted(s.stream.Context(), view, s.agent); err != nil {
			return err
		}
		now := s.now()
		var entries []*entry.Entry // a page of them, and one to know of more
		i := 0
		for ; i < len(ids) && len(entries) <= s.page; i++ {
			if e := view.Entry(ids[i]); e != nil && view.IsAuthorized(s.agent, e, now) {
				entries = append(entries, e)
			}
		}
		ws, rest := s.fill(entries[:min(s.page, len(entries))])
		more := len(ws) < len(entries)
		if err := s.stream.Send(&entryv1.SyncAuthorizedEntriesResponse{Entries: ws, More: more}); err != nil {
			return err
		}
		if !more {
			return nil
		}
		// Go on with the first entry that did not go into the message.
		next := entries[len(entries)-1].ID
		if len(rest) > 0 {
			next = rest[0].ID
		}
		at, _ := slices.BinarySearch(ids, next)
		ids = ids[at:]
	}
}

// fill turns entries into the wire's form, as many as go into one message, and
// returns the rest.
func (s *entrySync) fill(entries []*entry.Entry) (ws []*types.Entry, rest []*entry.Entry) {
	size := 0
	ws = make([]*types.Entry, 0, len(entries))
	for i, e := range entries {
		w := entryToWire(e, s.mask)
		if size += proto.Size(w); size > maxSyncBytes && len(ws) > 0 {
			return ws, entries[i:]
		}
		ws = append(ws, w)
	}
	return ws, nil
}
