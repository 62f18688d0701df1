package doctor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Free is what a file system has left.
type Free struct {
	Bytes uint64 // that others than root may take
	Files uint64
}

// freeSpace asks the file system of a path.
func freeSpace(path string) (Free, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return Free{}, err
	}
	f := Free{Bytes: s.Bavail * uint64(s.Bsize), Files: s.Ffree}
	if s.Files == 0 { // a file system without a fixed number of them
		f.Files = 1 << 32
	}
	return f, nil
}

// How much a server and an agent need. A server's store writes tables of many
// megabytes at once; an agent only its SVID and the bundle. Below least they
// fail soon, below enough someone should look.
var (
	serverSpace = space{least: 64 << 20, enough: 1 << 30}
	agentSpace  = space{least: 1 << 20, enough: 32 << 20}
)

type space struct{ least, enough uint64 } // bytes

const leastFiles = 100 // that can still be made

func (d *examination) serverFiles(_ context.Context, p *part) {
	d.files(p, "server", d.Server, serverSpace)
}

func (d *examination) agentFiles(_ context.Context, p *part) {
	d.files(p, "agent", d.Agent, agentSpace)
}

// files looks at a program's configuration and at its directories.
func (d *examination) files(p *part, program string, g *Program, need space) {
	switch {
	case g.File == "":
		p.skip("configuration", "no file was found; name it with -c to have it checked too")
		return
	case errors.Is(g.Err, fs.ErrPermission):
		p.skip("configuration", "this user may not read %s", g.File)
		return
	case g.Err != nil:
		p.fail("configuration", fmt.Sprintf("Correct the file; \"hallmark %s validate -c %s\" checks it again.", program, g.File), "%v", g.Err)
		return
	}
	p.ok("configuration", "%s is valid", g.File)
	seen := make(map[uint64]bool) // file systems
	for _, dir := range g.Layout.DataDirs {
		info, ok := p.directory(dir, g.Socket)
		if !ok {
			continue
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || !seen[st.Dev] {
			d.space(p, dir, need)
			if ok {
				seen[st.Dev] = true
			}
		}
	}
}

// directory looks at one that a program keeps its data in, whose socket shows as
// which user it runs. It reports false if there is none to look at.
func (p *part) directory(dir, socket string) (fs.FileInfo, bool) {
	const check = "data directory"
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.ok(check, "%s is not there yet; it is made at the first start", dir)
		return nil, false
	case errors.Is(err, fs.ErrPermission):
		p.skip(check, "this user may not look at %s", dir)
		return nil, false
	case err != nil:
		p.fail(check, "", "%v", err)
		return nil, false
	case !info.IsDir():
		p.fail(check, "Move it away, or name another path in the configuration.", "%s is no directory", dir)
		return nil, false
	}
	mode := info.Mode().Perm()
	var runs uint32 // the user; root may write anyway
	if made, err := os.Stat(socket); err == nil {
		if st, ok := made.Sys().(*syscall.Stat_t); ok {
			runs = st.Uid
		}
	}
	switch {
	case mode&0o022 != 0:
		p.fail(check, "chmod 0700 "+dir, "other users may write to %s, mode %04o", dir, mode)
	case mode&0o077 != 0:
		p.warn(check, "chmod 0700 "+dir, "other users may look into %s, mode %04o", dir, mode)
	case runs != 0 && !ownedBy(info, runs):
		p.fail(check, fmt.Sprintf("chown -R %d %s", runs, dir), "%s is of %s, but the program runs as %s", dir, owner(info), userName(runs))
	default:
		p.ok(check, "%s, mode %04o, of %s", dir, mode, owner(info))
	}
	return info, true
}

// space looks at what a directory's file system has left.
func (d *examination) space(p *part, dir string, need space) {
	left, err := d.Free(dir)
	switch {
	case err != nil:
		p.skip("disk", "%s: %v", dir, err)
	case left.Bytes < need.least || left.Files == 0:
		p.fail("disk", "Make room now: without it nothing new can be kept.", "%s has %s and %d files left", dir, size(left.Bytes), left.Files)
	case left.Bytes < need.enough || left.Files < leastFiles:
		p.warn("disk", "Make room, or move it to a larger disk.", "%s has %s and %d files left", dir, size(left.Bytes), left.Files)
	default:
		p.ok("disk", "%s has %s left", dir, size(left.Bytes))
	}
}

func size(bytes uint64) string {
	if bytes >= 10<<30 {
		return fmt.Sprintf("%d GiB", bytes>>30)
	}
	return fmt.Sprintf("%d MiB", bytes>>20)
}

func owner(info fs.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "an unknown user"
	}
	return userName(st.Uid)
}

func userName(uid uint32) string {
	name := strconv.Itoa(int(uid))
	if u, err := user.LookupId(name); err == nil {
		return u.Username
	}
	return "user " + name
}

// socket looks at a socket and whether somebody listens on it. It returns the
// process that does, nil if that is not known. It reports false if there is no
// use in asking it anything.
func (p *part) socket(ctx context.Context, program, path string, mode fs.FileMode) (*unix.Ucred, bool) {
	const check = "socket"
	start := "Start the " + program + "; its log says why it ended, if it did."
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		p.fail(check, start, "no %s runs: there is no socket %s", program, path)
		return nil, false
	case errors.Is(err, fs.ErrPermission):
		p.skip(check, "this user may not look at %s", path)
		return nil, false
	case err != nil:
		p.fail(check, "", "%v", err)
		return nil, false
	case info.Mode().Type() != fs.ModeSocket:
		p.fail(check, "Remove it, and start the "+program+" again.", "%s is no socket", path)
		return nil, false
	}
	cred, err := connect(ctx, path)
	got := info.Mode().Perm()
	switch {
	case errors.Is(err, fs.ErrPermission) && mode&0o077 == 0:
		p.skip(check, "%s is for root and %s only; run this as one of them to have the %s looked at", path, owner(info), program)
		return nil, false
	case errors.Is(err, fs.ErrPermission):
		p.fail(check, "Let every user search the directories above it, and start the "+program+" again if the socket's mode is wrong.",
			"this user may not open %s, mode %04o; its mode should be %04o", path, got, mode)
		return nil, false
	case errors.Is(err, syscall.ECONNREFUSED):
		p.fail(check, start, "nobody listens on %s: the %s that made it is gone", path, program)
		return nil, false
	case err != nil:
		p.fail(check, start, "%s does not answer: %v", path, err)
		return nil, false
	case got != mode:
		p.fail(check, fmt.Sprintf("chmod %04o %s", mode, path), "%s has mode %04o; it should be %04o", path, got, mode)
	case cred != nil && !ownedBy(info, cred.Uid):
		p.warn(check, "Start the "+program+" again, which makes the socket anew.", "%s is of %s, but the %s runs as %s", path, owner(info), program, userName(cred.Uid))
	default:
		p.ok(check, "%s, mode %04o, of %s", path, got, owner(info))
	}
	return cred, true
}

func ownedBy(info fs.FileInfo, uid uint32) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return !ok || st.Uid == uid
}

// connect opens a connection to a socket and says who listens on it.
func connect(ctx context.Context, path string) (*unix.Ucred, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	if control := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); control != nil {
		err = control
	}
	return cred, err
}

// spareDescriptors are those that a program needs besides connections.
const spareDescriptors = 256

// descriptors compares how many files a program may have open to how many
// connections it takes.
func (p *part) descriptors(g *Program, cred *unix.Ucred) {
	const check = "file descriptors"
	if cred == nil || cred.Pid <= 0 || g.Layout.Connections == 0 {
		return // its process, or its limit, is not known
	}
	most, err := openFiles(cred.Pid)
	need := g.Layout.Connections*g.Layout.Descriptors + spareDescriptors
	switch {
	case err != nil:
		p.skip(check, "%v", err)
	case most < uint64(need):
		p.warn(check, fmt.Sprintf("Raise it (LimitNOFILE=%d in a systemd unit), or lower limits.connections.", need),
			"process %d may open %d files, but limits.connections %d needs %d", cred.Pid, most, g.Layout.Connections, need)
	default:
		p.ok(check, "process %d may open %d files; %d connections need %d", cred.Pid, most, g.Layout.Connections, need)
	}
}

// openFiles returns how many files a process may have open.
func openFiles(pid int32) (uint64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(io.LimitReader(f, 16<<10))
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "Max open files"); ok {
			if soft := strings.Fields(rest); len(soft) > 0 && soft[0] != "unlimited" {
				return strconv.ParseUint(soft[0], 10, 64)
			}
			return 1 << 62, nil
		}
	}
	return 0, fmt.Errorf("/proc/%d/limits says nothing of open files", pid)
}

// until is how long something lasts yet.
func (d *examination) until(t time.Time) string {
	left := t.Sub(d.Now())
	if left <= 0 {
		return "ended " + span(left) + " ago"
	}
	return "ends in " + span(left)
}
