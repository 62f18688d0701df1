package registry_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// While servers are upgraded one after the other, one of the newer version
// writes into a record what those of the older do not know. It is still there
// after an older one has changed the record.
func TestWhatANewerVersionWroteOutlastsAChange(t *testing.T) {
	s := newStore(t)
	c := &clock{}
	foreign := spiffeid.RequireTrustDomainFromString("foreign.test")
	older := start(t, s, c.Now)
	web := create(t, older, newEntry("/web", agentID("a"), "unix:uid:1"))
	put(t, older, newNode("a"))
	if _, err := older.CreateFederation(t.Context(), registry.Federation{TrustDomain: foreign, EndpointURL: "https://foreign.test/"}, func(_ *registry.View, b *bundle.Bundle) error {
		b.SequenceNumber = 5
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	// The newer version.
	newer := protowire.AppendBytes(protowire.AppendTag(nil, 5000, protowire.BytesType), []byte("of a newer version"))
	keys := []string{"entry/" + web.ID, "node/" + agentID("a").String(), "federation/" + foreign.Name(), "bundle/" + foreign.Name()}
	for _, key := range keys {
		rec := read(t, s, key)
		res := s.Commit(t.Context(), store.Txn{
			If: []store.Condition{{Key: key, Revision: rec.Revision}},
			Do: []store.Write{{Key: key, Value: append(bytes.Clone(rec.Value), newer...)}},
		})[0]
		if res.Err != nil {
			t.Fatal(res.Err)
		}
	}

	if err := older.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if res := older.UpdateEntries(t.Context(), []registry.EntryUpdate{{ID: web.ID, Change: func(e *entry.Entry) error { e.Hint = "changed"; return nil }}})[0]; res.Err != nil {
		t.Fatal(res.Err)
	}
	if _, err := older.UpdateNode(t.Context(), agentID("a"), func(n *registry.Node) error { n.AgentVersion = "changed"; return nil }); err != nil {
		t.Fatal(err)
	}
	again := newNode("a")
	again.AgentVersion = "attested again"
	put(t, older, again)
	if _, err := older.UpdateFederation(t.Context(), foreign, func(f *registry.Federation) { f.EndpointURL = "https://changed.test/" }, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := older.ChangeBundle(t.Context(), foreign, func(b *bundle.Bundle) error { b.SequenceNumber = 6; return nil }); err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		if rec := read(t, s, key); !bytes.Contains(rec.Value, newer) {
			t.Errorf("%s lost what the newer version wrote: %q", key, rec.Value)
		}
	}
	if e := older.View().Entry(web.ID); e.Hint != "changed" {
		t.Errorf("the entry is %+v", e)
	}
}

func read(t *testing.T, s store.Store, key string) (found store.Record) {
	t.Helper()
	if _, err := s.Read(t.Context(), key, func(rec store.Record) error {
		if rec.Key == key {
			rec.Value = bytes.Clone(rec.Value)
			found = rec
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(found.Key, key) {
		t.Fatalf("there is no record %s", key)
	}
	return found
}
