package badger_test

import (
	"testing"

	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/server/store/storetest"
)

func open(t testing.TB, o badger.Options) *badger.DB {
	t.Helper()
	db, err := badger.Open(o)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return db
}

func TestTheContractHoldsInADirectory(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) (store.Store, func() store.Store) {
		dir := t.TempDir()
		db := open(t, badger.Options{Dir: dir})
		return db, func() store.Store {
			if err := db.Close(); err != nil {
				t.Fatalf("Close: %v", err)
			}
			db = open(t, badger.Options{Dir: dir})
			return db
		}
	})
}

func TestTheContractHoldsInMemory(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) (store.Store, func() store.Store) {
		return open(t, badger.Options{InMemory: true}), nil
	})
}
