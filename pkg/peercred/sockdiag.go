package peercred

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// What sock_diag(7) calls its requests and answers for Unix sockets, as far as
// golang.org/x/sys does not name them.
const (
	udiagShowPeer    = 0x04 // ask for the inode of the other end
	unixDiagPeer     = 2    // the attribute that holds it
	lenDiagRequest   = 24   // struct unix_diag_req
	lenDiagMessage   = 16   // struct unix_diag_msg
	lenNetlinkHeader = unix.SizeofNlMsghdr
	lenAttribute     = unix.SizeofNlAttr
)

// diagTimeout is how long the kernel may take to answer; it answers at once.
const diagTimeout = time.Second

// peerInode returns the inode of the socket at the other end of fd.
func peerInode(fd int) (uint32, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("find the socket's inode: %w", err)
	}
	nl, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return 0, fmt.Errorf("open sock_diag: %w", err)
	}
	defer unix.Close(nl)
	timeout := unix.NsecToTimeval(diagTimeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(nl, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		return 0, fmt.Errorf("bound sock_diag: %w", err)
	}
	if err := unix.Sendto(nl, diagRequest(uint32(st.Ino)), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, fmt.Errorf("ask sock_diag: %w", err)
	}
	answer := make([]byte, os.Getpagesize())
	n, _, err := unix.Recvfrom(nl, answer, 0)
	if err != nil {
		return 0, fmt.Errorf("read sock_diag: %w", err)
	}
	return parseDiagPeer(answer[:n])
}

func diagRequest(inode uint32) []byte {
	e := binary.NativeEndian
	b := make([]byte, lenNetlinkHeader+lenDiagRequest)
	e.PutUint32(b[0:], uint32(len(b)))
	e.PutUint16(b[4:], unix.SOCK_DIAG_BY_FAMILY)
	e.PutUint16(b[6:], unix.NLM_F_REQUEST)
	r := b[lenNetlinkHeader:]
	r[0] = unix.AF_UNIX
	e.PutUint32(r[4:], ^uint32(0)) // any state
	e.PutUint32(r[8:], inode)
	e.PutUint32(r[12:], udiagShowPeer)
	e.PutUint64(r[16:], ^uint64(0)) // no cookie
	return b
}

// parseDiagPeer reads the other end's inode from an answer of sock_diag.
func parseDiagPeer(b []byte) (uint32, error) {
	e := binary.NativeEndian
	if len(b) < lenNetlinkHeader {
		return 0, errors.New("read sock_diag: short answer")
	}
	length := e.Uint32(b)
	if length < lenNetlinkHeader || uint64(length) > uint64(len(b)) {
		return 0, errors.New("read sock_diag: answer of a wrong length")
	}
	typ, b := e.Uint16(b[4:]), b[lenNetlinkHeader:length]
	switch {
	case typ == unix.NLMSG_ERROR && len(b) >= 4:
		return 0, fmt.Errorf("read sock_diag: %w", unix.Errno(-int32(e.Uint32(b))))
	case typ != unix.SOCK_DIAG_BY_FAMILY || len(b) < lenDiagMessage:
		return 0, fmt.Errorf("read sock_diag: unexpected answer of type %d", typ)
	}
	for b = b[lenDiagMessage:]; len(b) >= lenAttribute; {
		n, typ := int(e.Uint16(b)), e.Uint16(b[2:])
		if n < lenAttribute || n > len(b) {
			break
		}
		if typ == unixDiagPeer && n >= lenAttribute+4 {
			return e.Uint32(b[lenAttribute:]), nil
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return 0, errors.New("read sock_diag: the socket has no peer")
}

// maxDescriptors is how many open files of a process are looked through.
const maxDescriptors = 1 << 20

// holdsSocket reports whether a process has a socket open.
func holdsSocket(pid int32, inode uint32) (bool, error) {
	dir, err := os.Open("/proc/" + strconv.Itoa(int(pid)) + "/fd")
	if err != nil {
		return false, fmt.Errorf("look for its socket: %w", err)
	}
	defer dir.Close()
	want := "socket:[" + strconv.FormatUint(uint64(inode), 10) + "]"
	for range maxDescriptors / 1024 {
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if target, err := os.Readlink(dir.Name() + "/" + name); err == nil && target == want {
				return true, nil
			}
		}
		if err != nil || len(names) == 0 {
			return false, nil
		}
	}
	return false, nil
}
