package peercred

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
)

// Options of [New]. The zero value admits every process.
type Options struct {
	// RequireOwner admits only processes of root and of the user that this
	// process runs as: for sockets that administer.
	RequireOwner bool
	// MaxConnections is how many connections are served at once; more are closed.
	// 0 is no bound.
	MaxConnections int
	// Admit, if set, decides on each connection once its process is pinned. An
	// error refuses it. The function that it returns is called once, when the
	// connection is closed; it may be nil.
	Admit func(*Peer) (release func(), err error)
	Log   *slog.Logger // of refused connections; nil is silent
}

// New makes credentials for a gRPC server on Unix sockets.
func New(o Options) credentials.TransportCredentials {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &transport{
		o:      o,
		euid:   uint32(os.Geteuid()),
		refuse: rate.NewLimiter(refusedLogged, refusedLoggedBurst),
	}
}

// How many refused connections are logged, a second: whoever is refused can
// try as often as it likes.
const (
	refusedLogged      = rate.Limit(1)
	refusedLoggedBurst = 10
)

type transport struct {
	o      Options
	euid   uint32
	refuse *rate.Limiter
	open   atomic.Int64 // connections
}

// ServerHandshake pins the process at the other end.
func (t *transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, p, err := t.admit(raw)
	if err != nil {
		if t.refuse.Allow() {
			t.o.Log.Warn("connection refused", "socket", raw.LocalAddr().String(), "reason", err.Error())
		}
		return nil, nil, err
	}
	return c, p, nil
}

func (t *transport) admit(raw net.Conn) (net.Conn, *Peer, error) {
	p, err := pinPeer(raw, pidfdOf)
	if err != nil {
		return nil, nil, err
	}
	if t.o.RequireOwner && !p.administers(t.euid) {
		p.Close()
		return nil, nil, fmt.Errorf("%v is neither of root nor of uid %d, which this socket serves", p, t.euid)
	}
	c := &conn{Conn: raw, peer: p, open: &t.open}
	if n := t.open.Add(1); t.o.MaxConnections > 0 && n > int64(t.o.MaxConnections) {
		t.open.Add(-1)
		p.Close()
		return nil, nil, fmt.Errorf("%v: there are %d connections already", p, t.o.MaxConnections)
	}
	if t.o.Admit != nil {
		release, err := t.o.Admit(p)
		if err != nil {
			t.open.Add(-1)
			p.Close()
			return nil, nil, err
		}
		c.release = release
	}
	if p.pidfd != nil {
		c.watch.Add(1)
		go func() {
			defer c.watch.Done()
			if p.Wait() == nil {
				raw.Close() // the server sees the end of the connection and closes c
			}
		}()
	}
	return c, p, nil
}

// ClientHandshake fails: these are a server's credentials.
func (t *transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are for servers; a client of a Unix socket needs none")
}

// Info says what these credentials are.
func (t *transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

// Clone returns the same credentials: they do not change.
func (t *transport) Clone() credentials.TransportCredentials { return t }

// OverrideServerName does nothing: there is no server name.
func (t *transport) OverrideServerName(string) error { return nil }

// conn is a connection that holds its peer, and is closed when that ends.
type conn struct {
	net.Conn
	peer    *Peer
	open    *atomic.Int64 // connections, of which this is one
	release func()
	watch   sync.WaitGroup
	once    sync.Once
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.open.Add(-1)
		c.peer.Close()
		c.watch.Wait()
		if c.release != nil {
			c.release()
		}
	})
	return err
}

// pinPeer pins the process that connected. It asks the kernel for a pidfd of
// it with the function given, and falls back on older kernels.
func pinPeer(raw net.Conn, pidfd func(fd int) (int, error)) (*Peer, error) {
	u, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("identify the peer: %T is not a connection of a Unix socket", raw)
	}
	sc, err := u.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("identify the peer: %w", err)
	}
	var p *Peer
	control := sc.Control(func(fd uintptr) { p, err = pinSocket(int(fd), pidfd) })
	if err = errors.Join(control, err); err != nil {
		return nil, fmt.Errorf("identify the peer: %w", err)
	}
	return p, nil
}

func pinSocket(fd int, pidfd func(int) (int, error)) (*Peer, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	if cred.Pid <= 0 {
		return nil, errors.New("the peer's PID is not visible in this PID namespace; " +
			"run in the host's PID namespace (in Kubernetes, hostPID: true) to serve processes outside of your own")
	}
	p := newPeer(cred.Pid)
	p.UID, p.GID = cred.Uid, cred.Gid

	pfd, err := pidfd(fd)
	switch {
	case err == nil:
		if err := p.adopt(pfd); err != nil {
			return nil, err
		}
	case errors.Is(err, unix.ENOPROTOOPT): // before Linux 6.5
		if err := p.openPeer(fd); err != nil {
			p.Close()
			return nil, fmt.Errorf("pid %d: %w", p.PID, err)
		}
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODATA):
		return nil, fmt.Errorf("pid %d, which connected: %w", p.PID, ErrEnded)
	default:
		return nil, fmt.Errorf("SO_PEERPIDFD: %w", err)
	}
	// A child that inherited the socket of a process that has ended is not that
	// process.
	if err := p.Alive(); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func pidfdOf(fd int) (int, error) {
	return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
}

// openPeer opens the process by its PID, and checks that this is the one that
// connected: between connecting and here it may have ended and its PID may
// have been given to another. The one that connected holds the other end of
// the socket.
func (p *Peer) openPeer(fd int) error {
	if err := p.open(); err != nil {
		return err
	}
	s, err := ReadStatus(p.PID)
	if err != nil {
		return err
	}
	if s.EffectiveUID() != p.UID || s.EffectiveGID() != p.GID {
		return fmt.Errorf("it is of uid %d, gid %d now and connected as uid %d, gid %d", s.EffectiveUID(), s.EffectiveGID(), p.UID, p.GID)
	}
	inode, err := peerInode(fd)
	if err != nil {
		return nil // no sock_diag here: user, group and pidfd are what there is
	}
	holds, err := holdsSocket(p.PID, inode)
	if errors.Is(err, os.ErrPermission) {
		return nil // not ours to look into; likewise
	}
	if err != nil {
		return err
	}
	if !holds {
		return fmt.Errorf("it does not hold the socket that connected: %w", ErrEnded)
	}
	return nil
}
