package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"
)

// The modes of what is published: everybody reads it.
const (
	fileMode      = 0o644
	directoryMode = 0o755
)

// lockPoll is between two looks whether another server has finished.
const lockPoll = 10 * time.Millisecond

// directory is a store of files. What is below the directory is reached without
// leaving it, whatever links there are.
type directory struct {
	DirectoryConfig
	server string // whose temporary files are told apart by it
}

func (d *directory) String() string { return d.Path }

func (d *directory) open() (*os.Root, error) {
	root, err := os.OpenRoot(d.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the directory %s is not there; make it, and let the server's user write to it", d.Path)
	case err != nil:
		return nil, d.explain(err)
	}
	return root, nil
}

// explain says of an error what to do about it.
func (d *directory) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w; let the server's user write to %s and what is in it", err, d.Path)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w; make room for it", err)
	}
	return err
}

func (d *directory) read(_ context.Context, name string) (*object, error) {
	root, err := d.open()
	if err != nil {
		return nil, err
	}
	defer root.Close()
	found, err := read(root, name)
	return found, d.explain(err)
}

// read returns what is in a file. Of what is no file with the right mode the
// version alone is returned, so that another takes its place.
func read(root *os.Root, name string) (*object, error) {
	info, err := root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, fmt.Errorf("%s is a directory; remove it, or publish elsewhere", name)
	case !info.Mode().IsRegular():
		return &object{version: info.Mode().String()}, nil
	}
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, err
	}
	o := &object{text: text, version: info.Mode().String() + string(text)}
	// A web server says the rest itself.
	if info.Mode().Perm() == fileMode && len(text) <= maxDocument {
		o.kind, o.cache = anyValue, anyValue
	}
	return o, nil
}

// write puts a file in the place of another, whole or not at all. Another server
// that publishes to the same directory waits meanwhile; over file systems that have
// no locks it does not.
func (d *directory) write(ctx context.Context, name string, was, next *object) error {
	root, err := d.open()
	if err != nil {
		return err
	}
	defer root.Close()
	return d.explain(d.replace(ctx, root, name, was, next))
}

func (d *directory) replace(ctx context.Context, root *os.Root, name string, was, next *object) error {
	lock, err := root.Open(".")
	if err != nil {
		return err
	}
	defer lock.Close()
	for errors.Is(unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK) {
		select {
		case <-time.After(lockPoll):
		case <-ctx.Done():
			return fmt.Errorf("%s is locked by another process; end it", d.Path)
		}
	}
	switch now, err := read(root, name); {
	case err != nil:
		return err
	case (now == nil) != (was == nil), now != nil && now.version != was.version:
		return errChanged
	}
	dir, base := path.Split(name)
	if dir != "" {
		if err := makeDirectories(root, path.Clean(dir)); err != nil {
			return err
		}
	}
	temporary := dir + "." + base + "." + d.server + ".tmp"
	if err := root.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a server that was killed
		return err
	}
	if err := writeFile(root, temporary, next.text); err != nil {
		_ = root.Remove(temporary)
		return err
	}
	if err := root.Rename(temporary, name); err != nil {
		_ = root.Remove(temporary)
		return err
	}
	return syncDirectory(root, path.Clean(dir))
}

// makeDirectories makes those that are missing, readable by everybody whatever the
// server's umask is.
func makeDirectories(root *os.Root, dir string) error {
	if dir == "." {
		return nil
	}
	if err := makeDirectories(root, path.Dir(dir)); err != nil {
		return err
	}
	switch err := root.Mkdir(dir, directoryMode); {
	case errors.Is(err, fs.ErrExist):
		return nil
	case err != nil:
		return err
	}
	if err := root.Chmod(dir, directoryMode); err != nil {
		return err
	}
	return syncDirectory(root, path.Dir(dir))
}

func writeFile(root *os.Root, name string, text []byte) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, fileMode)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Chmod(fileMode), f.Sync(), f.Close())
}

func syncDirectory(root *os.Root, dir string) error {
	f, err := root.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
