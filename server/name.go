package server

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// maxName is the length of a server's name; it is part of keys and certificates.
const maxName = 63

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)

func checkName(name string) error {
	if len(name) > maxName || !validName.MatchString(name) {
		return fmt.Errorf("%.80q is no name of a server; it has at most %d small letters, digits, dots and hyphens, and begins and ends with a letter or digit", name, maxName)
	}
	return nil
}

// serverName returns the server's name in the registry: the configured one,
// else the one that an earlier start has chosen and kept in the data directory.
// A server that keeps nothing has one for this run.
func (s *settings) serverName() (string, error) { return s.serverNameOr("") }

// serverNameOr is serverName; at a first start, the name is the given one.
func (s *settings) serverNameOr(chosen string) (string, error) {
	if s.Name != "" {
		return s.Name, nil
	}
	if chosen == "" {
		chosen = "server-" + strings.ToLower(rand.Text()[:10])
	}
	if s.Store.Memory != nil {
		return chosen, nil
	}
	path := filepath.Join(s.DataDir, "name")
	data, err := os.ReadFile(path)
	if err == nil {
		name := strings.TrimSpace(string(data))
		if err := checkName(name); err != nil {
			return "", fmt.Errorf("read the server's name from %s: %w; restore the file, or set name", path, err)
		}
		return name, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read the server's name: %w", err)
	}
	if err := os.MkdirAll(s.DataDir, 0o700); err != nil {
		return "", fmt.Errorf("keep the server's name: %w; set data_dir to a directory that this user may write to", err)
	}
	// Whole or not at all: half a name would be another server's.
	err = os.WriteFile(path+".new", []byte(chosen+"\n"), 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return "", fmt.Errorf("keep the server's name: %w", err)
	}
	return chosen, nil
}
