// Package unix attests a process by what the kernel says of it: its user, its
// groups and, where configured, its program. Make an [Attestor] with [New].
//
// The selectors, all of type "unix", are named as SPIRE's are:
//
//	uid:1000                  effective user ID
//	user:alice                its name, if it has one
//	gid:1000                  effective group ID
//	group:alice               its name, if it has one
//	supplementary_gid:4       one for each supplementary group
//	supplementary_group:adm   its name, if it has one
//	path:/usr/bin/app         the program, as its own mount namespace names it
//	sha256:9f86d08…           of the program's file
//
// and, beyond SPIRE's, where configured:
//
//	parent_path:/usr/sbin/cron    the program of the parent
//	ancestor_path:/usr/bin/init   the program of each process further up
//	start_time:8412345            hundredths of a second since boot
//	traced:false                  whether a debugger holds it
//
// Nothing is told of the script that an interpreter runs: what there is to go
// by, its arguments and open files, is the process's own to change.
//
// path and sha256 tell the programs of one user apart only against mistakes:
// whoever runs as a user can make any program of that user do its will, and
// can, in a mount namespace of its own, run any file under any path. Give
// programs that must not trust each other users of their own.
package unix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Name is the attestor's name and the type of its selectors.
const Name = "unix"

// Config is the configuration of the attestor. The zero value is the default:
// users and groups, which cost nothing to find out and cannot be forged.
type Config struct {
	// Path adds the selector path. The agent must be allowed to look into the
	// processes it attests: it runs as root or as their user.
	Path bool `yaml:"path"`
	// SHA256 adds the selector sha256. Each program is read once, until its
	// file changes.
	SHA256 bool `yaml:"sha256"`
	// MaxSize is how large a program's file may be to be read for sha256, in
	// bytes. A larger one has no such selector. Default 1073741824, 1 GiB.
	MaxSize int64 `yaml:"max_size"`
	// Parents is for how many processes up from the attested one the program's
	// path is a selector: parent_path for the first, ancestor_path for those
	// above it. At most 16. Like path, it takes an agent that may look into
	// processes. Default 0.
	Parents int `yaml:"parents"`
	// StartTime adds the selector start_time, which tells one run of a program
	// from the next.
	StartTime bool `yaml:"start_time"`
	// Traced adds the selector traced, true or false: whether another process
	// traces this one, by ptrace(2), while it is attested.
	Traced bool `yaml:"traced"`
}

// MaxParents is the most that Parents may be: what supervisors, shells and
// containers' shims stack up is less.
const MaxParents = 16

// DefaultMaxSize is how large a program is read by default, in bytes: large
// ones with all their data embedded fit, and it is read within the time that
// an attestation may take.
const DefaultMaxSize = 1 << 30

// Attestor is the workload half; there is no other.
type Attestor struct {
	config Config
	names  names
	sums   sums
}

var _ attestors.Workload = (*Attestor)(nil)

// New makes an attestor. It fails if MaxSize or Parents is out of bounds.
func New(c Config) (*Attestor, error) {
	if c.MaxSize < 0 {
		return nil, fmt.Errorf("max_size of the unix attestor is %d; give a number of bytes, or 0 for %d", c.MaxSize, DefaultMaxSize)
	}
	if c.Parents < 0 || c.Parents > MaxParents {
		return nil, fmt.Errorf("parents of the unix attestor is %d; give a number from 0 to %d", c.Parents, MaxParents)
	}
	if c.MaxSize == 0 {
		c.MaxSize = DefaultMaxSize
	}
	return &Attestor{config: c}, nil
}

// Attest returns the selectors of a process. If its program cannot be found
// out it returns the others together with the error.
//
// A process whose user or group changed after it connected has none: a child
// that shares the connection would speak in the name of the set-user-ID program
// that its parent became. It gets selectors on a new connection.
func (a *Attestor) Attest(ctx context.Context, p attestors.Process) ([]selector.Selector, error) {
	status, err := peercred.ReadStatus(p.PID)
	if err != nil {
		return nil, fmt.Errorf("find the users and groups of process %d: %w", p.PID, err)
	}
	uid, gid := status.EffectiveUID(), status.EffectiveGID()
	if uid != p.UID || gid != p.GID {
		return nil, fmt.Errorf("process %d connected as uid %d, gid %d and is uid %d, gid %d now; it must connect again",
			p.PID, p.UID, p.GID, uid, gid)
	}

	out := make([]selector.Selector, 0, 6+2*len(status.Groups))
	add := func(kind, value string) {
		if s, err := selector.New(Name, kind+":"+value); err == nil { // it fails if longer than any registered one
			out = append(out, s)
		}
	}
	add("uid", strconv.FormatUint(uint64(uid), 10))
	if name := a.names.user(uid); name != "" {
		add("user", name)
	}
	add("gid", strconv.FormatUint(uint64(gid), 10))
	if name := a.names.group(gid); name != "" {
		add("group", name)
	}
	for _, g := range status.Groups {
		add("supplementary_gid", strconv.FormatUint(uint64(g), 10))
		if name := a.names.group(g); name != "" {
			add("supplementary_group", name)
		}
	}
	if a.config.Traced {
		add("traced", strconv.FormatBool(status.Tracer != 0))
	}
	if a.config.StartTime {
		birth, err := peercred.ReadBirth(p.PID)
		if err != nil {
			return out, fmt.Errorf("find when process %d started: %w", p.PID, err)
		}
		add("start_time", strconv.FormatUint(birth.Start, 10))
	}
	var missing error // why there are no selectors of parents
	if a.config.Parents > 0 {
		paths, err := parents(p.PID, a.config.Parents)
		if err != nil {
			missing = fmt.Errorf("find the parents of process %d: %w", p.PID, err)
		}
		for i, path := range paths {
			if i == 0 {
				add("parent_path", path)
			} else {
				add("ancestor_path", path)
			}
		}
	}
	if !a.config.Path && !a.config.SHA256 {
		return out, missing
	}

	exe, err := openProgram(p.PID)
	if err != nil {
		return out, errors.Join(missing, err)
	}
	defer exe.file.Close()
	if a.config.Path {
		add("path", exe.path)
	}
	if a.config.SHA256 {
		sum, err := a.sums.of(ctx, exe.file, a.config.MaxSize)
		if err != nil {
			return out, errors.Join(missing, fmt.Errorf("hash the program of process %d, %s: %w", p.PID, exe.path, err))
		}
		add("sha256", sum)
	}
	return out, missing
}

type program struct {
	file *os.File
	path string // in the process's mount namespace
}

// deletedMark is what the kernel puts after the path of a file that has no name
// any more, because a package update replaced it, say.
const deletedMark = " (deleted)"

func openProgram(pid int32) (program, error) {
	link := "/proc/" + strconv.Itoa(int(pid)) + "/exe"
	path, err := os.Readlink(link)
	if err != nil {
		return program{}, explain(fmt.Errorf("find the program of process %d: %w", pid, err))
	}
	// The link leads to the file itself, in whatever mount namespace, deleted
	// or not.
	f, err := os.Open(link)
	if err != nil {
		return program{}, explain(fmt.Errorf("open the program of process %d: %w", pid, err))
	}
	// A file may also really be named so; then it still has a name.
	if base, ok := strings.CutSuffix(path, deletedMark); ok {
		n, err := links(f)
		if err != nil {
			f.Close()
			return program{}, fmt.Errorf("look at the program of process %d: %w", pid, err)
		}
		if n == 0 {
			path = base
		}
	}
	return program{f, path}, nil
}

func explain(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w; run the agent as root, or turn off path and sha256 of the unix attestor", err)
	}
	return err
}

// names remembers the names of users and groups, which live in files that are
// read line by line.
type names struct {
	mu     sync.Mutex
	users  map[uint32]name
	groups map[uint32]name
}

type name struct {
	name  string // empty: it has none
	until time.Time
}

const (
	nameLifetime = 10 * time.Second // a renamed user is noticed after this
	maxNames     = 4096             // of each kind
)

func (n *names) user(id uint32) string {
	return n.lookup(&n.users, id, func(s string) (string, error) {
		u, err := user.LookupId(s)
		if err != nil {
			return "", err
		}
		return u.Username, nil
	})
}

func (n *names) group(id uint32) string {
	return n.lookup(&n.groups, id, func(s string) (string, error) {
		g, err := user.LookupGroupId(s)
		if err != nil {
			return "", err
		}
		return g.Name, nil
	})
}

func (n *names) lookup(known *map[uint32]name, id uint32, find func(string) (string, error)) string {
	now := time.Now()
	n.mu.Lock()
	k, ok := (*known)[id]
	n.mu.Unlock()
	if ok && now.Before(k.until) {
		return k.name
	}
	// An ID without a name, and one whose name cannot be found out now, give
	// no selector.
	found, err := find(strconv.FormatUint(uint64(id), 10))
	if err != nil {
		found = ""
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if *known == nil || len(*known) >= maxNames {
		*known = make(map[uint32]name)
	}
	(*known)[id] = name{found, now.Add(nameLifetime)}
	return found
}
