package store

import (
	"context"
	"fmt"
	"io"
	"iter"
)

// Migrate copies all records of a store that nobody writes to into an empty one,
// of another engine, then compares the two record by record. It returns how many
// there are.
func Migrate(ctx context.Context, from, to Store) (records int, err error) {
	if err := CheckRestored(ctx, from); err != nil {
		return 0, err
	}
	r, w := io.Pipe()
	go func() {
		_, err := Backup(ctx, from, w)
		w.CloseWithError(err)
	}()
	records, err = Restore(ctx, to, r)
	r.Close()
	if err != nil {
		return 0, err
	}
	if err := same(ctx, from, to); err != nil {
		return 0, fmt.Errorf("the copy is not what it was made of; delete it and try again: %w", err)
	}
	return records, nil
}

// same returns the first difference of two stores; revisions are none.
func same(ctx context.Context, a, b Store) error {
	var failed error
	nextA, stopA := iter.Pull(records(ctx, a, &failed))
	defer stopA()
	nextB, stopB := iter.Pull(records(ctx, b, &failed))
	defer stopB()
	for {
		x, moreA := nextA()
		y, moreB := nextB()
		switch {
		case failed != nil:
			return failed
		case !moreA && !moreB:
			return nil
		case !moreB || moreA && x.Key < y.Key:
			return fmt.Errorf("record %.80q is missing", x.Key)
		case !moreA || x.Key > y.Key:
			return fmt.Errorf("record %.80q is there and should not be", y.Key)
		case string(x.Value) != string(y.Value):
			return fmt.Errorf("record %.80q has another value", x.Key)
		}
	}
}

// records are those of a store. If they cannot be read, they end, and failed
// says why.
func records(ctx context.Context, s Store, failed *error) iter.Seq[Record] {
	return func(yield func(Record) bool) {
		stopped := false
		_, err := s.Read(ctx, "", func(r Record) error {
			if stopped = !yield(r); stopped {
				return context.Canceled
			}
			return nil
		})
		if err != nil && !stopped {
			*failed = err
		}
	}
}
