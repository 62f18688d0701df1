package peercred

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Bounds of what is read of one process, in bytes. A process may be in 65,536
// groups, each of up to ten digits.
const (
	maxStat     = 4 << 10
	maxStatus   = 1 << 20
	typicalFile = 2 << 10
)

// Status is what /proc says of a process's users and groups. The four values
// are real, effective, saved and file system.
type Status struct {
	UIDs   [4]uint32
	GIDs   [4]uint32
	Groups []uint32 // supplementary
	// Nested says that the process has a PID namespace of its own, below that
	// of /proc: it knows processes by other PIDs than we do.
	Nested bool
	// Tracer is the process that traces it (ptrace(2)), and so reads and
	// changes its memory; 0 if none does that /proc shows.
	Tracer int32
}

// EffectiveUID returns the user ID that the process acts as.
func (s Status) EffectiveUID() uint32 { return s.UIDs[1] }

// EffectiveGID returns the group ID that the process acts as.
func (s Status) EffectiveGID() uint32 { return s.GIDs[1] }

// ReadStatus reads /proc/PID/status. The caller checks afterwards that the
// process is still the one it means.
func ReadStatus(pid int32) (Status, error) {
	b, err := ReadProc(pid, "status", maxStatus)
	if err != nil {
		return Status{}, err
	}
	s, err := parseStatus(b)
	if err != nil {
		return Status{}, fmt.Errorf("read /proc/%d/status: %w", pid, err)
	}
	return s, nil
}

func parseStatus(b []byte) (Status, error) {
	var s Status
	var seen int
	for line := range bytes.Lines(b) {
		key, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		var err error
		switch string(key) {
		case "Uid":
			seen |= 1
			err = parseFour(&s.UIDs, value)
		case "Gid":
			seen |= 2
			err = parseFour(&s.GIDs, value)
		case "NSpid": // the PID in each namespace, from that of /proc inwards; since Linux 4.1
			s.Nested = len(bytes.Fields(value)) > 1
		case "TracerPid":
			seen |= 8
			var n uint64
			n, err = strconv.ParseUint(string(bytes.TrimSpace(value)), 10, 31)
			s.Tracer = int32(n)
		case "Groups":
			seen |= 4
			for f := range bytes.FieldsSeq(value) {
				var n uint64
				if n, err = strconv.ParseUint(string(f), 10, 32); err != nil {
					break
				}
				s.Groups = append(s.Groups, uint32(n))
			}
		}
		if err != nil {
			return Status{}, fmt.Errorf("line %q: %w", key, err)
		}
	}
	if seen != 15 {
		return Status{}, errors.New("a line of Uid, Gid, TracerPid and Groups is missing")
	}
	return s, nil
}

func parseFour(into *[4]uint32, value []byte) error {
	i := 0
	for f := range bytes.FieldsSeq(value) {
		if i == len(into) {
			return errors.New("more than four values")
		}
		n, err := strconv.ParseUint(string(f), 10, 32)
		if err != nil {
			return err
		}
		into[i] = uint32(n)
		i++
	}
	if i != len(into) {
		return fmt.Errorf("%d values instead of four", i)
	}
	return nil
}

// stat is what /proc/PID/stat says of a process.
type stat struct {
	state  byte
	parent int32  // 0: none that /proc shows
	start  uint64 // clock ticks since boot
}

// Birth is where a process comes from.
type Birth struct {
	// Parent is the process that it is a child of now; 0 if /proc shows none.
	// When a parent ends, another takes its place.
	Parent int32
	// Start is when it was started, in hundredths of a second since boot.
	// With the PID it names one process.
	Start uint64
}

// ReadBirth reads /proc/PID/stat. It fails with [ErrEnded] if the process has
// ended. The caller checks afterwards that the process is still the one it
// means.
func ReadBirth(pid int32) (Birth, error) {
	s, err := readStat(pid)
	if err != nil {
		return Birth{}, err
	}
	if s.ended() {
		return Birth{}, fmt.Errorf("pid %d: %w", pid, ErrEnded)
	}
	return Birth{Parent: s.parent, Start: s.start}, nil
}

// ended reports whether the process is dead and only waits for its parent.
func (s stat) ended() bool { return s.state == 'Z' || s.state == 'X' || s.state == 'x' }

func readStat(pid int32) (stat, error) {
	b, err := ReadProc(pid, "stat", maxStat)
	if err != nil {
		return stat{}, err
	}
	s, err := parseStat(b)
	if err != nil {
		return stat{}, fmt.Errorf("read /proc/%d/stat: %w", pid, err)
	}
	return s, nil
}

// Fields of proc_pid_stat(5), counted from the one after the command's name.
const (
	statState  = 0  // field 3
	statParent = 1  // field 4
	statStart  = 19 // field 22
)

func parseStat(b []byte) (stat, error) {
	// The command's name is in parentheses and may hold anything, those too.
	_, rest, ok := bytes.Cut(b, []byte("("))
	end := bytes.LastIndexByte(rest, ')')
	if !ok || end < 0 {
		return stat{}, errors.New("no command name")
	}
	var s stat
	i := 0
	for f := range bytes.FieldsSeq(rest[end+1:]) {
		switch i {
		case statState:
			if len(f) != 1 {
				return stat{}, fmt.Errorf("state %q is not one letter", f)
			}
			s.state = f[0]
		case statParent:
			n, err := strconv.ParseUint(string(f), 10, 31)
			if err != nil {
				return stat{}, fmt.Errorf("parent: %w", err)
			}
			s.parent = int32(n)
		case statStart:
			n, err := strconv.ParseUint(string(f), 10, 64)
			if err != nil {
				return stat{}, fmt.Errorf("start time: %w", err)
			}
			s.start = n
			return s, nil
		}
		i++
	}
	return stat{}, fmt.Errorf("%d fields after the command name; the start time is missing", i)
}

// ReadProc reads a file below /proc/PID, of at most limit bytes. The caller
// checks afterwards that the process is still the one it means. It goes around
// package os, whose files are prepared for waiting: the kernel makes these
// while they are read.
func ReadProc(pid int32, name string, limit int) ([]byte, error) {
	path := "/proc/" + strconv.Itoa(int(pid)) + "/" + name
	fd, err := open(path)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 0, typicalFile)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return b, nil
		}
		b = b[:len(b)+n]
		if len(b) > limit {
			return nil, fmt.Errorf("read %s: larger than %d bytes", path, limit)
		}
		if len(b) == cap(b) {
			b = slices.Grow(b, len(b))
		}
	}
}

func open(path string) (fd int, err error) {
	for {
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}
