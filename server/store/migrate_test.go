package store_test

import (
	"context"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/server/store"
)

func TestAMigratedStoreHasEveryRecord(t *testing.T) {
	from, to := sample(t), memory(t)
	want, revision := contents(t, from)
	n, err := store.Migrate(t.Context(), from, to)
	if err != nil || n != len(want) {
		t.Fatalf("Migrate: %d records of %d, %v", n, len(want), err)
	}
	got, now := contents(t, to)
	same(t, got, want)
	if now <= revision {
		t.Errorf("it has revision %d, was at %d", now, revision)
	}
	if _, err := store.Migrate(t.Context(), from, to); err == nil || !strings.Contains(err.Error(), "empty store") {
		t.Errorf("into a store that has records: %v", err)
	}
}

// damaging is a store that keeps something else than what it is given.
type damaging struct {
	store.Store
	damage func(*store.Write)
}

func (d damaging) Commit(ctx context.Context, txns ...store.Txn) []store.Result {
	for _, t := range txns {
		for i := range t.Do {
			d.damage(&t.Do[i])
		}
	}
	return d.Store.Commit(ctx, txns...)
}

func TestACopyThatDiffersIsNoticed(t *testing.T) {
	for what, damage := range map[string]func(*store.Write){
		"another value": func(w *store.Write) {
			if w.Key == "entry/8" {
				w.Value = []byte("other")
			}
		},
		"is missing": func(w *store.Write) {
			if w.Key == "entry/8" {
				w.Value = nil
			}
		},
		"should not be": func(w *store.Write) {
			if w.Key == "entry/8" {
				w.Key = "entry/8000000"
			}
		},
	} {
		_, err := store.Migrate(t.Context(), sample(t), damaging{memory(t), damage})
		if err == nil || !strings.Contains(err.Error(), "not what it was made of") {
			t.Errorf("%s: %v", what, err)
		}
	}
}
