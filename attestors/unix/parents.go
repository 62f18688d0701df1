package unix

import (
	"errors"
	"fmt"
	"os"

	"github.com/hallmark-id/hallmark/pkg/peercred"
)

// errMoved is that a process got another parent while its parents were read.
var errMoved = errors.New("its parents changed while they were read; it must ask again")

// parents returns the paths of the programs of the processes above one, nearest
// first, at most so many. There are fewer if the line ends before: at the first
// process, at one outside of the agent's PID namespace or, above the parent, at
// one that the agent may not look into.
//
// Only the process itself is pinned. A parent may end at any time and its PID be
// another's, so each link is read twice, around what is read of the parent: a
// child still has a parent of that PID, started at that time, only if what was
// read between was its parent's.
func parents(pid int32, most int) ([]string, error) {
	var paths []string
	child, err := peercred.ReadBirth(pid)
	if err != nil {
		return nil, err
	}
	for range most {
		if child.Parent == 0 {
			break
		}
		parent, err := peercred.ReadBirth(child.Parent)
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", child.Parent, err)
		}
		exe, err := openProgram(child.Parent)
		if errors.Is(err, os.ErrPermission) && len(paths) > 0 {
			break // of what is further up there is less to tell
		}
		if err != nil {
			return nil, err
		}
		exe.file.Close()
		again, err := peercred.ReadBirth(child.Parent)
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", child.Parent, err)
		}
		now, err := peercred.ReadBirth(pid)
		if err != nil {
			return nil, err
		}
		if again != parent || now != child {
			return nil, errMoved
		}
		paths = append(paths, exe.path)
		pid, child = child.Parent, parent
	}
	return paths, nil
}
