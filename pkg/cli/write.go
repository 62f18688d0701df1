package cli

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// The files of one identity, by its place in the answer. The SVID comes last:
// who waits for it finds the others there.
var (
	x509Files = []string{"bundle.%d.pem", "svid.%d.key", "svid.%d.pem"}
	jwtFiles  = []string{"svid.%d.jwt"}
	witFiles  = []string{"svid.%d.jwk", "svid.%d.wit"}
)

// writeX509 writes each SVID as svid.N.pem, svid.N.key and bundle.N.pem, each
// file atomically, and removes those of SVIDs that are no longer there.
func writeX509(dir string, svids []*x509svid.SVID, roots [][]*x509.Certificate) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write SVIDs: %w", err)
	}
	for i, s := range svids {
		key, err := keyPEM(s)
		if err != nil {
			return err
		}
		for j, data := range [][]byte{certificatesPEM(roots[i]...), []byte(key), certificatesPEM(s.Certificates...)} {
			mode := fs.FileMode(0o644)
			if j == 1 {
				mode = 0o600
			}
			if err := writeFile(filepath.Join(dir, fmt.Sprintf(x509Files[j], i)), data, mode); err != nil {
				return err
			}
		}
	}
	return removeFrom(dir, len(svids), x509Files)
}

// writeJWT writes each token as svid.N.jwt, and removes those of SVIDs that are
// no longer there.
func writeJWT(dir string, items []jwtItem) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write SVIDs: %w", err)
	}
	for i, item := range items {
		if err := writeFile(filepath.Join(dir, fmt.Sprintf(jwtFiles[0], i)), []byte(item.Token), 0o600); err != nil {
			return err
		}
	}
	return removeFrom(dir, len(items), jwtFiles)
}

// writeWIT writes each WIT-SVID as svid.N.wit and its private key as svid.N.jwk,
// each file atomically, and removes those of SVIDs that are no longer there.
func writeWIT(dir string, items []*witItem) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write SVIDs: %w", err)
	}
	for i, item := range items {
		if err := writeFile(filepath.Join(dir, fmt.Sprintf(witFiles[0], i)), item.key, 0o600); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(dir, fmt.Sprintf(witFiles[1], i)), []byte(item.Token), 0o644); err != nil {
			return err
		}
	}
	return removeFrom(dir, len(items), witFiles)
}

// removeFrom removes the files of the SVID in a place and of those after it.
func removeFrom(dir string, place int, names []string) error {
	for i := place; ; i++ {
		gone := 0
		for _, name := range names {
			err := os.Remove(filepath.Join(dir, fmt.Sprintf(name, i)))
			if err == nil {
				gone++
			} else if !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove an SVID that is no longer given: %w", err)
			}
		}
		if gone == 0 {
			return nil
		}
	}
}

// bundleList names the files of bundles that were written to a directory, a
// line each, so that those of trust domains that are gone can be removed and
// nobody else's.
const bundleList = ".hallmark-bundles"

// writeBundles writes files of bundles, each atomically, and removes those that
// an earlier call left and this one has not.
func writeBundles(dir string, files map[string][]byte) error {
	list := filepath.Join(dir, bundleList)
	text, err := os.ReadFile(list)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read which bundles were written: %w", err)
	}
	if len(files) == 0 && len(text) == 0 {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write bundles: %w", err)
	}
	// Whatever happens in between, the list has at least what is there.
	names := slices.Sorted(maps.Keys(files))
	if err := writeFile(list, append(bytes.Clone(text), lines(names)...), 0o644); err != nil {
		return err
	}
	for _, name := range names {
		if err := writeFile(filepath.Join(dir, name), files[name], 0o644); err != nil {
			return err
		}
	}
	for name := range strings.Lines(string(text)) {
		name = strings.TrimSuffix(name, "\n")
		if _, there := files[name]; there || name != filepath.Base(name) || !filepath.IsLocal(name) {
			continue
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove a bundle that is no longer given: %w", err)
		}
	}
	return writeFile(list, lines(names), 0o644)
}

func lines(names []string) []byte {
	var out []byte
	for _, name := range names {
		out = append(append(out, name...), '\n')
	}
	return out
}

// writeFile replaces a file: readers see the old content or the new one.
func writeFile(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer os.Remove(f.Name()) // fails once it was renamed
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
