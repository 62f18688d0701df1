package k8s

import (
	"path"
	"strings"

	"github.com/hallmark-id/hallmark/attestors/cgroup"
)

// groups are the control groups that a kubelet makes those of its pods in: for
// each class of service one, and one for pods whose resources are guaranteed.
// Only root can make groups there.
type groups []string

// newGroups returns those of kubelets with the usual roots (that of kind's
// nodes among them) or, besides them, with another one.
func newGroups(root string) groups {
	var out groups
	for _, root := range []string{"", "/kubelet", root} {
		plain := root + "/kubepods" // the driver cgroupfs
		out = append(out, plain, plain+"/burstable", plain+"/besteffort")

		// The driver systemd, whose slices bear the names of all those above them.
		slices, name := "", ""
		for segment := range strings.SplitSeq(plain[1:], "/") {
			name += segment
			slices += "/" + name + ".slice"
			name += "-"
		}
		out = append(out, slices, slices+"/"+name+"burstable.slice", slices+"/"+name+"besteffort.slice")
	}
	return out
}

// runtimeServices are those of systemd in whose groups containerd makes the
// containers of a kubelet that has the other driver.
var runtimeServices = []string{"containerd", "docker", "k3s", "k3s-agent", "rke2-server", "rke2-agent"}

// made reports whether a container's group is where a kubelet has it made.
func (g groups) made(c cgroup.Container) bool {
	above, name := path.Split(c.Path)
	above = strings.TrimSuffix(above, "/")
	if strings.Contains(name, ":") { // SLICE:RUNTIME:ID
		if above == "" {
			return true
		}
		for _, service := range runtimeServices {
			if above == "/system.slice/"+service+".service" {
				return true
			}
		}
		return false
	}
	if ofOwnPod(c) {
		return true
	}
	// What is above the pod's group. An agent in a container may see it from its
	// own group: as that many steps up and the rest of the way.
	parent := above[:max(strings.LastIndexByte(above, '/'), 0)]
	rest, up := parent, false
	for {
		after, ok := strings.CutPrefix(rest, "/..")
		if !ok {
			break
		}
		rest, up = after, true
	}
	for _, made := range g {
		if parent == made || up && strings.HasSuffix(made, rest) && (rest == "" || rest[0] == '/') {
			return true
		}
	}
	return false
}

// ofOwnPod reports whether a container's group is seen as one beside the
// agent's own, which makes it one of the same pod.
func ofOwnPod(c cgroup.Container) bool {
	return path.Base(c.Path) == strings.TrimPrefix(c.Path, "/../")
}
