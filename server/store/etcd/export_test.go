package etcd

import "context"

const KeepRevisions = keepRevisions

// Compact does what the store does from time to time.
func Compact(db *DB, seen int64) (int64, error) { return db.compactOnce(context.Background(), seen) }
