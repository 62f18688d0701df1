// Package peercred tells a server on a Unix socket which process is at the
// other end, and holds on to that process so that another one that gets its
// PID later is never taken for it.
//
// [New] makes gRPC transport credentials; each connection then carries a
// [*Peer] as its authentication information ([FromContext]). [Pin] pins a
// process by its PID instead. [Listen] makes the socket itself. [ReadStatus]
// reads what /proc says of a process's user and groups.
//
// The kernel says who connected (SO_PEERCRED) and, since Linux 6.5, gives a
// descriptor of that very process (SO_PEERPIDFD). On older kernels the process
// is opened by its PID, and what /proc and sock_diag say is compared to rule
// out that the PID changed hands before that. A connection lives no longer than
// its process: when the process ends, the connection is closed, even if a child
// inherited the socket.
package peercred

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// pollInterval is how often a process is looked at that is waited for, where
// there is no pidfd.
const pollInterval = 250 * time.Millisecond

// ErrEnded says that a process has ended, or that its PID belongs to another
// process now.
var ErrEnded = errors.New("the process has ended")

// Peer is a pinned process. It implements [credentials.AuthInfo].
type Peer struct {
	credentials.CommonAuthInfo

	PID int32  // in our PID namespace; positive
	UID uint32 // effective, when it connected
	GID uint32 // effective, when it connected

	start uint64 // clock ticks since boot; set where there is no pidfd

	mu     sync.Mutex
	pidfd  *os.File // nil where the kernel has none
	closed bool
}

// AuthType names what these credentials are.
func (*Peer) AuthType() string { return "unix-peer" }

// String names the process, for logs.
func (p *Peer) String() string {
	return fmt.Sprintf("pid %d (uid %d, gid %d)", p.PID, p.UID, p.GID)
}

// FromContext returns the process that makes a gRPC call. It fails if the
// server does not use this package's credentials.
func FromContext(ctx context.Context) (*Peer, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("the call has no peer")
	}
	c, ok := p.AuthInfo.(interface{ Process() *Peer })
	if !ok {
		return nil, fmt.Errorf("the caller of %v was not identified by its socket", p.Addr)
	}
	return c.Process(), nil
}

// Process returns p. Authentication information that says more of a caller, as
// TLS over the socket does, embeds a *Peer and so is still understood by
// [FromContext].
func (p *Peer) Process() *Peer { return p }

// Owner reports whether the process is of root or of the user that this
// process runs as: of those who may administer.
func (p *Peer) Owner() bool { return p.administers(uint32(os.Geteuid())) }

func (p *Peer) administers(euid uint32) bool { return p.UID == 0 || p.UID == euid }

// Alive returns nil while the process runs, an error that is [ErrEnded] once it
// has ended or its PID was given to another, and [os.ErrClosed] after Close. It
// takes one system call where the kernel has pidfds (Linux 5.3).
func (p *Peer) Alive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("process %d: %w", p.PID, os.ErrClosed)
	}
	if p.pidfd == nil {
		return p.sameStart()
	}
	ended, err := hasEnded(p.pidfd)
	if err != nil {
		return fmt.Errorf("process %d: ask whether it runs: %w", p.PID, err)
	}
	if ended {
		return fmt.Errorf("process %d: %w", p.PID, ErrEnded)
	}
	return nil
}

// sameStart tells a process by when it started, where there is no pidfd.
func (p *Peer) sameStart() error {
	s, err := readStat(p.PID)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ESRCH):
		return fmt.Errorf("process %d: %w", p.PID, ErrEnded)
	case err != nil:
		return err
	case s.start != p.start || s.ended():
		return fmt.Errorf("process %d: %w", p.PID, ErrEnded)
	}
	return nil
}

// Wait blocks until the process has ended (nil) or the peer is closed.
func (p *Peer) Wait() error {
	if p.pidfd == nil {
		for {
			err := p.Alive()
			if errors.Is(err, ErrEnded) {
				return nil
			}
			if err != nil {
				return err
			}
			time.Sleep(pollInterval)
		}
	}
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Read(func(fd uintptr) bool { return readable(int(fd)) })
}

// Close lets go of the process.
func (p *Peer) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if p.pidfd == nil {
		return nil
	}
	return p.pidfd.Close()
}

// Pin pins the process that has a PID now. The caller closes it.
func Pin(pid int32) (*Peer, error) {
	if pid <= 0 {
		return nil, fmt.Errorf("pin process %d: a PID is positive", pid)
	}
	p := newPeer(pid)
	if err := p.open(); err != nil {
		return nil, fmt.Errorf("pin process %d: %w", pid, err)
	}
	s, err := ReadStatus(pid)
	if err == nil {
		p.UID, p.GID = s.EffectiveUID(), s.EffectiveGID()
		err = p.Alive() // what was read was the pinned process's
	}
	if err != nil {
		p.Close()
		return nil, fmt.Errorf("pin process %d: %w", pid, err)
	}
	return p, nil
}

func newPeer(pid int32) *Peer {
	return &Peer{
		// A Unix socket of this host: nobody else reads or changes what is sent.
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		PID:            pid,
	}
}

// open gets a descriptor of the process that has p's PID now, or, where the
// kernel has none, remembers when it started.
func (p *Peer) open() error {
	fd, err := unix.PidfdOpen(int(p.PID), 0)
	switch {
	case err == nil:
		return p.adopt(fd)
	case errors.Is(err, unix.ESRCH):
		return ErrEnded
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM): // old, or forbidden by a seccomp filter
		s, err := readStat(p.PID)
		if errors.Is(err, os.ErrNotExist) {
			return ErrEnded
		}
		p.start = s.start
		return err
	}
	return fmt.Errorf("open a pidfd: %w", err)
}

// adopt takes over a pidfd, which it closes if it fails.
func (p *Peer) adopt(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil { // so that the runtime's poller can wait for it
		unix.Close(fd)
		return fmt.Errorf("make the pidfd non-blocking: %w", err)
	}
	p.pidfd = os.NewFile(uintptr(fd), "pidfd")
	return nil
}

func hasEnded(pidfd *os.File) (ended bool, err error) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return false, err
	}
	err = raw.Control(func(fd uintptr) { ended = readable(int(fd)) })
	return ended, err
}

// readable reports whether a pidfd is readable: its process has ended.
func readable(fd int) bool {
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		// An error or a hangup is as final as an end.
		return err != nil || n > 0
	}
}
