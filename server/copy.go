package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// copyWriter is the name under which what follows writes to a store: not the
// server's, which would stop if it ran against all advice.
const copyWriter = "copy"

// Restore fills the empty store that a configuration names from a backup, and
// returns how many records that had. The server must not run.
func Restore(ctx context.Context, src config.Source, r io.Reader) (records int, err error) {
	s, err := load(src)
	if err != nil {
		return 0, err
	}
	st, err := s.openCopy(ctx, src, "")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	return store.Restore(ctx, st, r, registry.Restored(s.td, time.Now()))
}

// Migrate copies the store of one configuration into the empty one of another,
// and compares the two. The server must not run. It goes on under its name.
func Migrate(ctx context.Context, from, to config.Source) (records int, err error) {
	was, err := load(from)
	if err != nil {
		return 0, err
	}
	is, err := load(to)
	if err != nil {
		return 0, err
	}
	if was.td != is.td {
		return 0, to.Errorf("trust_domain", "trust_domain is %q, and %q in %s; a store belongs to one trust domain for ever", is.TrustDomain, was.TrustDomain, from.Name)
	}
	name, err := was.serverName()
	if err != nil {
		return 0, err
	}
	old, err := was.openCopy(ctx, from, name)
	if err != nil {
		return 0, fmt.Errorf("open the store to copy: %w", err)
	}
	defer func() { err = errors.Join(err, old.Close()) }()
	fresh, err := is.openCopy(ctx, to, name)
	if err != nil {
		return 0, fmt.Errorf("open the store to copy to: %w", err)
	}
	defer func() { err = errors.Join(err, fresh.Close()) }()
	return store.Migrate(ctx, old, fresh)
}

// openCopy opens the store of a server that does not run. A name is one that the
// server has to have.
func (s *settings) openCopy(ctx context.Context, src config.Source, name string) (*opened, error) {
	if s.Store.Memory != nil {
		return nil, src.Errorf("store", "a store in memory would be lost at once; name another")
	}
	log, err := s.Log.Logger(os.Stderr)
	if err != nil {
		return nil, err
	}
	own, err := s.serverName()
	if name != "" {
		own, err = s.goesOnAs(name)
	}
	if err != nil {
		return nil, err
	}
	if name != "" && own != name {
		return nil, src.Errorf("name", "the server's name is %q here, and %q in the other configuration; set name to %s, or its authorities are another's", own, name, name)
	}
	return s.openStore(ctx, own, copyWriter, log, nil)
}
