package cluster

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// silence is how long nothing may come back over a connection between
	// members before it is closed, and etcd makes another.
	silence = 3 * time.Second
	// silenceLook is how often new connections are looked for.
	silenceLook = 5 * time.Second
)

// endSilent has the kernel close connections between members over which nothing
// comes back, be it that they are silent or that what is sent is not
// acknowledged.
//
// After servers could not hear each other for a while, TCP would try the
// connections that they had again after about as long, and they would not talk
// until then. Etcd means to give up a silent connection, but does not: its
// read timeout is on the Dial of an [net/http.Transport] whose DialContext goes
// before it (as of 3.7.3), and it leaves nobody a hand in how it dials. So the
// sockets are found among those that this process has open: those at the port
// that members connect to, here or there. That a descriptor becomes another
// connection's meanwhile, or that somebody else listens at a member's port
// elsewhere, does no harm: that connection too is closed if nothing comes back.
func (m *Member) endSilent() error {
	_, listen, _ := net.SplitHostPort(m.o.Listen)
	here := []string{listen}
	var there []string
	for _, p := range m.Peers() {
		if _, port, err := net.SplitHostPort(p.Address); err == nil && p.ID != uint64(m.etcd.Server.MemberID()) {
			there = append(there, port)
		}
	}
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err != nil {
			return err
		}
		if !atPort(unix.Getsockname, fd, here) && !atPort(unix.Getpeername, fd, there) {
			continue
		}
		if err := limitSilence(fd); err != nil {
			return fmt.Errorf("set how long a connection between servers may be silent: %w", err)
		}
	}
	return nil
}

// atPort reports whether an end of a socket is a TCP port of these. It is not if
// the descriptor is no socket, or is closed meanwhile.
func atPort(end func(fd int) (unix.Sockaddr, error), fd int, ports []string) bool {
	var port int
	switch a, _ := end(fd); a := a.(type) {
	case *unix.SockaddrInet4:
		port = a.Port
	case *unix.SockaddrInet6:
		port = a.Port
	default:
		return false
	}
	protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err == nil && protocol == unix.IPPROTO_TCP && slices.Contains(ports, strconv.Itoa(port))
}

// limitSilence has a socket closed after silence. Keep-alive probes go out while
// nothing else does (tcp(7)).
func limitSilence(fd int) error {
	for _, o := range []struct{ level, name, value int }{
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 1},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(silence.Milliseconds())},
	} {
		if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil && err != unix.EBADF && err != unix.ENOTSOCK {
			return err
		}
	}
	return nil
}
