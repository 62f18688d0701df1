package peercred

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MaxPath is how long the path of a Unix socket may be, in bytes: the kernel's
// sun_path, less its final zero.
const MaxPath = 107

// probeTimeout is how long an existing socket has to say whether somebody
// listens on it. The kernel answers at once unless its queue is full.
const probeTimeout = time.Second

// Listen listens on a Unix socket at path, with mode's permission bits whatever
// the umask; it is never open to more than that. It creates the parent
// directory if there is none and replaces a socket that nobody listens on. It
// fails if somebody does, if there is something else at path, or if path is
// longer than [MaxPath].
//
// Closing the listener removes the socket, unless another has taken its place.
func Listen(path string, mode os.FileMode) (net.Listener, error) {
	l, err := listen(path, mode.Perm())
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

func listen(path string, mode os.FileMode) (_ net.Listener, err error) {
	switch {
	case path == "":
		return nil, errors.New("the path of the socket is empty")
	case path[0] == '@' || path[0] == 0:
		return nil, errors.New("abstract sockets have no permissions; give the path of a file")
	case len(path) > MaxPath:
		return nil, fmt.Errorf("the path is %d bytes long and the kernel takes %d for a socket; choose a shorter one", len(path), MaxPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// A socket's file gets the mode of its descriptor, less the umask.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		control := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(mode)) })
		return errors.Join(control, err)
	}}
	nl, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, bare(err)
	}
	l := &listener{UnixListener: nl.(*net.UnixListener), path: path}
	l.SetUnlinkOnClose(false) // it does not look what it unlinks
	if l.id, err = chmodSocket(path, mode); err != nil {
		l.UnixListener.Close()
		os.Remove(path)
		return nil, err
	}
	return l, nil
}

// removeStale removes the socket of a process that is gone.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() != os.ModeSocket:
		return errors.New("there is something that is not a socket; remove it or choose another path")
	}
	c, err := net.DialTimeout("unix", path, probeTimeout)
	switch {
	case err == nil:
		c.Close()
		return errors.New("another process listens there already; stop it or choose another path")
	case errors.Is(err, syscall.ECONNREFUSED):
		return os.Remove(path)
	case errors.Is(err, os.ErrNotExist):
		return nil
	}
	return fmt.Errorf("find out whether somebody listens there already: %w", bare(err))
}

// chmodSocket gives a socket its mode, and returns which file it is.
func chmodSocket(path string, mode os.FileMode) (fileID, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fileID{}, fmt.Errorf("open it: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fileID{}, fmt.Errorf("look at it: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fileID{}, errors.New("somebody has put something else in its place")
	}
	// fchmod(2) refuses O_PATH descriptors; this is the same file, whatever is
	// at path by now.
	if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", fd), uint32(mode)); err != nil {
		return fileID{}, fmt.Errorf("set its mode: %w", err)
	}
	return fileID{dev: uint64(st.Dev), inode: st.Ino}, nil
}

type fileID struct{ dev, inode uint64 }

type listener struct {
	*net.UnixListener
	path string
	id   fileID
	once sync.Once
}

func (l *listener) Close() error {
	l.once.Do(func() {
		var st unix.Stat_t
		if unix.Lstat(l.path, &st) == nil && (fileID{uint64(st.Dev), st.Ino}) == l.id {
			os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}

// bare takes the operation and address off a network error, which the caller
// says better.
func bare(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}
