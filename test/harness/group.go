package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Group makes a control group, in one hierarchy, and returns its directory:
// what a runtime does, and what whoever has a part of the tree can do below it.
// It is removed at the test's end.
func Group(t testing.TB, path string) string {
	t.Helper()
	NeedRoot(t)
	made := "/sys/fs/cgroup/memory" // version 1
	if _, err := os.Stat(made); err != nil {
		made = "/sys/fs/cgroup"
	}
	for name := range strings.SplitSeq(path[1:], "/") {
		made = filepath.Join(made, name)
		if os.Mkdir(made, 0o755) == nil {
			dir := made
			t.Cleanup(func() { // after the process's end, the innermost first
				Eventually(t, "remove "+dir, func(context.Context) error { return os.Remove(dir) })
			})
		}
	}
	return made
}

// InGroup starts a process that does nothing in a control group of its own.
func InGroup(t testing.TB, path string) *exec.Cmd {
	t.Helper()
	dir := Group(t, path)
	cmd := exec.Command("sleep", "infinity")
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), fmt.Append(nil, cmd.Process.Pid), 0o644))
	return cmd
}
