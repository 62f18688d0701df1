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

const (
	// loneName is the name of a server that shares its store with no other.
	loneName = "main"
	// maxName is the length of a server's name; it is part of keys and
	// certificates.
	maxName = 63
)

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)

func checkName(name string) error {
	if len(name) > maxName || !validName.MatchString(name) {
		return fmt.Errorf("%.80q is no name of a server; it has at most %d small letters, digits, dots and hyphens, and begins and ends with a letter or digit", name, maxName)
	}
	return nil
}

// serverName returns the server's name in the registry: the configured one,
// else the one that the data directory holds, else loneName; a server that
// shares its store chooses one and keeps it.
func (s *settings) serverName() (string, error) {
	name, err := s.knownName()
	switch {
	case err != nil || name != "":
		return name, err
	case s.Store.Etcd == nil:
		return loneName, nil
	}
	return s.keepName("server-" + strings.ToLower(rand.Text()[:10]))
}

// goesOnAs is serverName of a server that had a name with another configuration.
func (s *settings) goesOnAs(was string) (string, error) {
	name, err := s.knownName()
	if err != nil || name != "" {
		return name, err
	}
	return s.keepName(was)
}

func (s *settings) nameFile() string { return filepath.Join(s.DataDir, "name") }

// knownName returns the name that was configured or kept; empty: none.
func (s *settings) knownName() (string, error) {
	if s.Name != "" {
		return s.Name, nil
	}
	data, err := os.ReadFile(s.nameFile())
	switch name := strings.TrimSpace(string(data)); {
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	case err != nil:
		return "", fmt.Errorf("read the server's name: %w", err)
	default:
		if err := checkName(name); err != nil {
			return "", fmt.Errorf("read the server's name from %s: %w; restore the file, or set name", s.nameFile(), err)
		}
		return name, nil
	}
}

func (s *settings) keepName(name string) (string, error) {
	path := s.nameFile()
	// Whole or not at all: half a name would be another server's.
	err := os.MkdirAll(s.DataDir, 0o700)
	if err == nil {
		err = os.WriteFile(path+".new", []byte(name+"\n"), 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return "", fmt.Errorf("keep the server's name: %w; set data_dir to a directory that this user may write to", err)
	}
	return name, nil
}
