package test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestKilledServerLosesNothingAcknowledged kills the server with SIGKILL in
// the middle of writes, twenty times (fifty with "make soak"). Each time it
// starts again, and has every entry whose creation, change or deletion it
// acknowledged, whole.
func TestKilledServerLosesNothingAcknowledged(t *testing.T) {
	t.Parallel()
	kills, writers := 20, 4
	if harness.IsLong() {
		kills = 50
	}
	dir, err := os.MkdirTemp("", "hallmark-crash-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	config := filepath.Join(dir, "server.yaml")
	socket := filepath.Join(dir, "admin.sock")
	text := fmt.Sprintf("trust_domain: example.org\nlisten: 127.0.0.1:0\ndata_dir: %s/data\nadmin_socket: %s\n", dir, socket)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}

	client := entryv1.NewEntryClient(harness.Dial(t, socket))

	var mu sync.Mutex
	want := map[string]string{} // entry ID → hint, as last acknowledged
	pending := map[string]bool{}
	next := 0

	for kill := range kills {
		server := harness.Command{Args: []string{"server", "run", "-c", config}}.Start(t)
		server.WaitReady(t, "server", "health", "--admin-socket", socket)
		harness.Eventually(t, "reconnect", func(ctx context.Context) error {
			_, err := client.CountEntries(ctx, &entryv1.CountEntriesRequest{})
			return err
		})
		checkEntries(t, client, want, pending)

		ctx, stop := context.WithCancel(t.Context())
		var writing sync.WaitGroup
		for range writers {
			writing.Go(func() {
				for ctx.Err() == nil {
					mu.Lock()
					id := fmt.Sprintf("e%d", next)
					next++
					pending[id] = true
					mu.Unlock()
					hint, ok := writeEntry(ctx, client, id)
					mu.Lock()
					if ok {
						delete(pending, id)
						want[id] = hint
					}
					mu.Unlock()
				}
			})
		}
		// Not before something was acknowledged, and at no particular moment.
		acknowledged := func() int { mu.Lock(); defer mu.Unlock(); return len(want) }
		before := acknowledged()
		harness.Eventually(t, "acknowledged writes", func(context.Context) error {
			if acknowledged() == before {
				return fmt.Errorf("none in round %d", kill)
			}
			return nil
		})
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond) // the random moment
		server.Kill()
		stop()
		writing.Wait()
	}
	t.Logf("%d entries acknowledged over %d kills, %d with an unknown outcome", len(want), kills, len(pending))
}

// writeEntry creates an entry and then changes or deletes it; it returns the
// hint that it has by what was acknowledged ("gone": deleted), and false if
// any outcome is unknown.
func writeEntry(ctx context.Context, client entryv1.EntryClient, id string) (hint string, ok bool) {
	e := &types.Entry{
		Id:        id,
		SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/w/" + id},
		ParentId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/node"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
		Hint:      "created",
	}
	created, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	if err != nil || codes.Code(created.Results[0].Status.Code) != codes.OK {
		return "", false
	}
	switch rand.IntN(3) {
	case 0:
		e.Hint = "changed"
		changed, err := client.BatchUpdateEntry(ctx, &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}})
		return "changed", err == nil && codes.Code(changed.Results[0].Status.Code) == codes.OK
	case 1:
		deleted, err := client.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
		return "gone", err == nil && codes.Code(deleted.Results[0].Status.Code) == codes.OK
	}
	return "created", true
}

func checkEntries(t *testing.T, client entryv1.EntryClient, want map[string]string, pending map[string]bool) {
	t.Helper()
	list, err := client.ListEntries(t.Context(), &entryv1.ListEntriesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, e := range list.Entries {
		got[e.Id] = e.Hint
		if e.SpiffeId.GetPath() != "/w/"+e.Id || e.ParentId.GetPath() != "/node" || len(e.Selectors) != 1 {
			t.Fatalf("entry %s is not whole: %v", e.Id, e)
		}
		if _, ok := want[e.Id]; !ok && !pending[e.Id] {
			t.Fatalf("entry %s was never written", e.Id)
		}
	}
	for id, hint := range want {
		switch have, ok := got[id]; {
		case hint == "gone" && ok:
			t.Fatalf("entry %s is back after its deletion was acknowledged", id)
		case hint != "gone" && have != hint:
			t.Fatalf("entry %s: %q was acknowledged, there is %q", id, hint, have)
		}
	}
	// What keeps similar entries apart came back with them, and only with them.
	for id, hint := range want {
		res, err := client.BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
			SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/w/" + id},
			ParentId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/node"},
			Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
			Id:        id,
			Hint:      hint,
		}}})
		if err != nil {
			t.Fatal(err)
		}
		code := codes.Code(res.Results[0].Status.Code)
		if hint == "gone" {
			if code != codes.OK {
				t.Fatalf("entry %s cannot be made again: %v", id, res.Results[0].Status)
			}
			want[id] = "gone-and-back"
			if _, err := client.BatchUpdateEntry(t.Context(), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{{Id: id, Hint: "gone-and-back"}}, InputMask: &types.EntryMask{Hint: true}}); err != nil {
				t.Fatal(err)
			}
		} else if code != codes.AlreadyExists {
			t.Fatalf("a second entry like %s was accepted: %v", id, res.Results[0].Status)
		}
		break // one a round is enough; the map's order makes it a random one
	}
}
