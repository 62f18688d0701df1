// Package cgroup finds out which container a process is in, by the control
// groups that the kernel says it belongs to: what the attestors for containers
// and pods begin with. [Of] reads those of a process, [Groups.Container] finds
// the container in them.
//
// A path alone proves little: whoever was given a part of the tree to manage
// (a user by systemd, a container with a cgroup namespace of its own) can make
// groups below it under any name, that of another's container included.
// Therefore the outermost name counts, never an inner one, and an attestor
// compares the path to one that its runtime vouches for, by [Container.Holds].
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/hallmark-id/hallmark/pkg/peercred"
)

// Bounds of what is taken from one process. The kernel has a line for each
// hierarchy, of which there are some fifteen, with a path of up to 4,096 bytes.
const (
	maxFile  = 256 << 10 // bytes
	maxLines = 64
)

// Groups are the control groups of one process: the path in each hierarchy.
// The key is the hierarchy's controllers as the kernel writes them, such as
// "memory", "cpu,cpuacct" or "name=systemd", and empty for that of version 2.
type Groups map[string]string

// Of reads the groups of a process, as seen from the caller's cgroup namespace.
// The caller makes sure afterwards that the process is still the one it means.
func Of(pid int32) (Groups, error) {
	b, err := peercred.ReadProc(pid, "cgroup", maxFile)
	if err != nil {
		return nil, err
	}
	g, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("read /proc/%d/cgroup: %w", pid, err)
	}
	return g, nil
}

// Parse reads the lines of cgroups(7): hierarchy number, controllers and path,
// with colons between them.
func Parse(b []byte) (Groups, error) {
	g := make(Groups)
	for line := range bytes.Lines(b) {
		_, rest, ok := strings.Cut(strings.TrimSuffix(string(line), "\n"), ":")
		controllers, path, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 || !strings.HasPrefix(path, "/") {
			return nil, errors.New("a line is not of the form number:controllers:/path")
		}
		if _, twice := g[controllers]; twice {
			return nil, fmt.Errorf("the hierarchy %q is there twice", controllers)
		}
		if len(g) == maxLines {
			return nil, fmt.Errorf("more than %d lines", maxLines)
		}
		g[controllers] = path
	}
	return g, nil
}

// Container is a container as the path of a control group names it.
type Container struct {
	ID        string // 64 hexadecimal digits, lower case
	Hierarchy string // where it was found: a key of Groups
	Path      string // of the group that bears the ID
	// PodUID is that of the Kubernetes pod that the path names before the
	// container, with dashes; empty if it names none.
	PodUID string
}

// Container finds the container that a process is in; ok is false if it is in
// none. It fails if the hierarchies name different ones, which no runtime does.
func (g Groups) Container() (c Container, ok bool, err error) {
	for hierarchy, path := range g {
		found, is := outermost(path)
		if !is {
			continue
		}
		found.Hierarchy = hierarchy
		switch {
		case !ok:
			c, ok = found, true
		case c.ID != found.ID:
			return Container{}, false, fmt.Errorf("its control groups are of two containers, %s and %s", min(c.ID, found.ID), max(c.ID, found.ID))
		case hierarchy < c.Hierarchy:
			c = found
		}
	}
	return c, ok, nil
}

// Holds reports whether a process with those groups is in the container: in
// its group, in the hierarchy where it was found, or in one below.
func (c Container) Holds(g Groups) bool {
	path, ok := g[c.Hierarchy]
	return ok && (path == c.Path || strings.HasPrefix(path, c.Path+"/"))
}

// idLength is that of the IDs of docker, podman and the runtimes of Kubernetes.
// Nothing shorter counts: many a program names its groups by 32 digits.
const idLength = 64

// outermost returns the first container that a path names.
func outermost(path string) (c Container, ok bool) {
	end, above := 0, ""
	for segment := range strings.SplitSeq(path[1:], "/") {
		end += 1 + len(segment)
		slice, name := segment, segment
		if parts := strings.Split(segment, ":"); len(parts) == 3 { // containerd with the other driver than its kubelet
			slice, name = parts[0], parts[1]+"-"+parts[2]
		}
		if uid, ok := podUID(slice); ok {
			c.PodUID = uid
		}
		// Podman's own pods have 64 digits too, which are no container's.
		if id, ok := containerID(name); ok && (name != id || above != "libpod_parent") {
			c.ID, c.Path = id, path[:end]
			return c, true
		}
		above = segment
	}
	return Container{}, false
}

// containerID reads the name of a container's group: the ID as it is, or after
// the name of the runtime, maybe as a scope of systemd. The monitor that podman
// and CRI-O run beside each container has a group with its ID too
// (libpod-conmon-…, crio-conmon-…), but is not in it.
func containerID(segment string) (string, bool) {
	name := strings.TrimSuffix(segment, ".scope")
	if i := strings.LastIndexByte(name, '-'); i >= 0 {
		switch runtime := name[:i]; runtime {
		case "docker", "libpod", "cri-containerd", "crio":
			name = name[i+1:]
		default:
			return "", false
		}
	}
	if len(name) != idLength || strings.Trim(name, hexDigits) != "" {
		return "", false
	}
	return name, true
}

const hexDigits = "0123456789abcdef"

// podUID reads the name of a pod's group: pod<UID>, or, as a slice of systemd,
// kubepods…-pod<UID with underscores>.slice, with the kubelet's own root before
// it if it has one. The UID of a static pod has no dashes.
func podUID(segment string) (string, bool) {
	name := segment
	if slice, ok := strings.CutSuffix(segment, ".slice"); ok {
		i := strings.LastIndex(slice, "-pod")
		if i < 0 || !strings.Contains("-"+slice[:i], "-kubepods") {
			return "", false
		}
		name = strings.ReplaceAll(slice[i+1:], "_", "-")
	}
	uid, ok := strings.CutPrefix(name, "pod")
	digits := strings.ReplaceAll(uid, "-", "")
	if !ok || len(digits) != 32 || strings.Trim(digits, hexDigits) != "" {
		return "", false
	}
	return uid, true
}
