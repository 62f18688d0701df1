package cgroup_test

import (
	"os"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/attestors/cgroup"
)

const (
	id    = "5f8dee3eb0440d25619edfcc5d10679627ec854a7373add3fc994681024093cd"
	other = "0b1c1b0ac95e0cb4a3b8f5e4d3c2b1a09f8e7d6c5b4a39281706f5e4d3c2b1a0"
	uid   = "2c48913c-b29f-11e7-9350-020968147796"
)

func TestAPathNamesTheContainerOfEachRuntime(t *testing.T) {
	under := strings.ReplaceAll(uid, "-", "_")
	plain := strings.ReplaceAll(uid, "-", "")
	for _, c := range []struct {
		name, line, path, pod string
	}{
		{"docker, cgroupfs", "4:memory:/docker/" + id, "/docker/" + id, ""},
		{"docker, systemd", "0::/system.slice/docker-" + id + ".scope", "/system.slice/docker-" + id + ".scope", ""},
		{"docker, a group of the program's own below", "0::/docker/" + id + "/init", "/docker/" + id, ""},
		{"docker in docker: the outer one", "0::/docker/" + id + "/docker/" + other, "/docker/" + id, ""},
		{"docker, seen from another cgroup namespace", "0::/../../docker/" + id, "/../../docker/" + id, ""},
		{"podman, cgroupfs", "0::/libpod_parent/libpod-" + id, "/libpod_parent/libpod-" + id, ""},
		{"podman, a pod", "0::/libpod_parent/" + other + "/libpod-" + id, "/libpod_parent/" + other + "/libpod-" + id, ""},
		{"podman, a pod of systemd", "0::/machine.slice/machine-libpod_pod_" + other + ".slice/libpod-" + id + ".scope/container",
			"/machine.slice/machine-libpod_pod_" + other + ".slice/libpod-" + id + ".scope", ""},
		{"podman, rootless", "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope/container",
			"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id + ".scope", ""},
		{"kubernetes, cgroupfs, guaranteed", "4:memory:/kubepods/pod" + uid + "/" + id, "/kubepods/pod" + uid + "/" + id, uid},
		{"kubernetes, cgroupfs, burstable", "4:memory:/kubepods/burstable/pod" + uid + "/" + id, "/kubepods/burstable/pod" + uid + "/" + id, uid},
		{"kubernetes, systemd, containerd", "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope",
			"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope", uid},
		{"kubernetes, systemd, CRI-O", "0::/kubepods.slice/kubepods-pod" + under + ".slice/crio-" + id + ".scope/container",
			"/kubepods.slice/kubepods-pod" + under + ".slice/crio-" + id + ".scope", uid},
		{"kubernetes, systemd, docker", "1:name=systemd:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/docker-" + id + ".scope",
			"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/docker-" + id + ".scope", uid},
		{"kubernetes, systemd, a kubelet with a root of its own", "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope",
			"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope", uid},
		{"kubernetes, drivers that differ", "4:memory:/system.slice/containerd.service/kubepods-besteffort-pod" + under + ".slice:cri-containerd:" + id,
			"/system.slice/containerd.service/kubepods-besteffort-pod" + under + ".slice:cri-containerd:" + id, uid},
		{"kubernetes, a static pod", "4:memory:/kubepods/burstable/pod" + plain + "/" + id, "/kubepods/burstable/pod" + plain + "/" + id, plain},
		{"kubernetes in a container of docker", "0::/kubelet.slice/kubelet-kubepods.slice/pod" + uid + "/" + id, "/kubelet.slice/kubelet-kubepods.slice/pod" + uid + "/" + id, uid},
	} {
		t.Run(c.name, func(t *testing.T) {
			g, err := cgroup.Parse([]byte("7:cpuset:/\n" + c.line + "\n"))
			if err != nil {
				t.Fatal(err)
			}
			got, ok, err := g.Container()
			if err != nil || !ok {
				t.Fatalf("no container: %v", err)
			}
			if got.ID != id || got.Path != c.path || got.PodUID != c.pod {
				t.Errorf("got %+v", got)
			}
			if !got.Holds(g) {
				t.Error("it does not hold the process it was found by")
			}
		})
	}
}

func TestAProcessOutsideOfContainersIsInNone(t *testing.T) {
	for name, line := range map[string]string{
		"root":                  "0::/",
		"a service":             "0::/system.slice/nginx.service",
		"a session":             "0::/user.slice/user-1000.slice/session-3.scope",
		"a group of 32 digits":  "4:memory:/process_api/9b2ce684501260855fe926399b0a4be9",
		"a group of 65 digits":  "0::/docker/" + id + "0",
		"capital letters":       "0::/docker/" + strings.ToUpper(id),
		"podman's monitor":      "0::/machine.slice/libpod-conmon-" + id + ".scope",
		"CRI-O's monitor":       "0::/system.slice/crio-conmon-" + id + ".scope",
		"a pod of podman":       "0::/libpod_parent/" + id,
		"a pod's sandbox group": "0::/kubepods/besteffort/pod" + uid,
		"a build":               "0::/docker/buildkit/kv3zqk4e",
		"an unknown runtime":    "0::/system.slice/thing-" + id + ".scope",
	} {
		t.Run(name, func(t *testing.T) {
			g, err := cgroup.Parse([]byte(line + "\n"))
			if err != nil {
				t.Fatal(err)
			}
			if c, ok, err := g.Container(); ok || err != nil {
				t.Errorf("got %+v, %v", c, err)
			}
		})
	}
}

func TestHierarchiesThatDisagreeAreAnError(t *testing.T) {
	g, err := cgroup.Parse([]byte("4:memory:/docker/" + id + "\n0::/docker/" + other + "\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := g.Container(); err == nil || !strings.Contains(err.Error(), "two containers") {
		t.Errorf("got %v", err)
	}
}

func TestAContainerHoldsItsGroupAndThoseBelow(t *testing.T) {
	c := cgroup.Container{ID: id, Hierarchy: "memory", Path: "/docker/" + id}
	for path, holds := range map[string]bool{
		"/docker/" + id:                              true,
		"/docker/" + id + "/own":                     true,
		"/docker/" + id + "0":                        false,
		"/docker/" + other:                           false,
		"/user.slice/user@1000.service/docker/" + id: false,
	} {
		if got := c.Holds(cgroup.Groups{"memory": path, "": "/docker/" + id}); got != holds {
			t.Errorf("%s: %v", path, got)
		}
	}
	if c.Holds(cgroup.Groups{"": "/docker/" + id}) {
		t.Error("it holds a process that is not in the hierarchy at all")
	}
}

func TestMalformedLinesAreRefused(t *testing.T) {
	for _, text := range []string{
		"memory", "4:memory", "4:memory:docker", "0::/a\n0::/b\n", "4:memory:/a\n5:memory:/b\n",
		strings.Repeat("x", 10), "\n",
	} {
		if _, err := cgroup.Parse([]byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func TestTheGroupsOfThisProcess(t *testing.T) {
	g, err := cgroup.Of(int32(os.Getpid()))
	if err != nil || len(g) == 0 {
		t.Fatalf("got %v, %v", g, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("4:memory:/docker/" + id + "\n0::/\n"))
	f.Add([]byte("0::/kubepods.slice/kubepods-pod2c48913c_b29f_11e7_9350_020968147796.slice:cri-containerd:" + id))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := cgroup.Parse(b)
		if err != nil {
			return
		}
		c, ok, err := g.Container()
		if err != nil || !ok {
			return
		}
		if len(c.ID) != 64 || !strings.HasPrefix(g[c.Hierarchy], c.Path) || !strings.Contains(c.Path, c.ID) || !c.Holds(g) {
			t.Errorf("%q gives %+v", b, c)
		}
	})
}
