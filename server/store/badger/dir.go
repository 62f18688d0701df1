package badger

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// lockName is the file whose lock says that a process has the directory. It
// holds the ID of that process and stays when the process goes.
const lockName = "hallmark.lock"

// takeDir makes the directory if it is missing, closes it to others (badger
// makes some of its files readable for all), and locks it until the returned
// file is closed.
func takeDir(dir string) (lock *os.File, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: make its directory: %w", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, fmt.Errorf("store: close its directory to others: %w", err)
	}
	lock, err = os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("store: lock its directory: %w", err)
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		by := "another process"
		if pid, err := io.ReadAll(io.LimitReader(lock, 20)); err == nil && len(pid) > 0 {
			by = "process " + strings.TrimSpace(string(pid))
		}
		return nil, fmt.Errorf("store: %s is in use by %s: the server is running; use the admin commands, which ask it over its admin socket, or stop it first", dir, by)
	}
	if err != nil {
		return nil, fmt.Errorf("store: lock %s: %w", dir, err)
	}
	if err := lock.Truncate(0); err != nil {
		return nil, fmt.Errorf("store: write to %s: %w", dir, err)
	}
	if _, err := lock.WriteAt(fmt.Appendln(nil, os.Getpid()), 0); err != nil {
		return nil, fmt.Errorf("store: write to %s: %w", dir, err)
	}
	return lock, nil
}

// sweep removes the logs of a locked directory that have no content. Badger
// makes a log and then gives it its size, and takes its size away before it
// removes it; if it is killed between the two, it refuses to open what it left.
func sweep(dir string) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if ext := filepath.Ext(f.Name()); ext != ".mem" && ext != ".vlog" {
			continue
		}
		info, err := f.Info()
		if err != nil {
			return err
		}
		if info.Size() > 0 {
			continue
		}
		if err := os.Remove(filepath.Join(dir, f.Name())); err != nil {
			return err
		}
	}
	return nil
}

// syncDir makes sure that the names in a directory are found after a crash.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// freeBytes returns how much room an ordinary user has on the disk of a
// directory.
func freeBytes(dir string) (uint64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return uint64(st.Bavail) * uint64(st.Bsize), nil
}
