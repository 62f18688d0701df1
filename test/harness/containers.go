package harness

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Containers is a container engine of the test's own: dockerd, or podman with
// its API served. It touches nothing of the machine's engine, if that has one,
// and no network.
type Containers struct {
	Socket string // of docker's API

	command []string // of the engine's client
	env     []string
}

// Container is one that runs.
type Container struct {
	ID  string
	PID int32 // of its first process, in the test's PID namespace
}

// Docker starts dockerd in a network namespace without a network. It skips the
// test where that is not possible.
func Docker(t testing.TB) *Containers {
	t.Helper()
	NeedRoot(t)
	for _, name := range []string{"dockerd", "docker", "containerd", "unshare"} {
		NeedCommand(t, name)
	}
	dir := shortDir(t)
	e := &Containers{Socket: filepath.Join(dir, "docker.sock")}
	e.command = []string{"docker", "-H", "unix://" + e.Socket}
	// A mount namespace with the host's mounts, as it is: "ip netns exec" would
	// hide the control groups of version 1.
	daemon := Command{Path: "/usr/bin/unshare", Args: []string{"--net", "dockerd",
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"-H", "unix://" + e.Socket, "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=vfs",
	}}.Start(t)
	t.Cleanup(func() {
		e.removeAll(t)
		daemon.Stop(t)
	})
	Eventually(t, "dockerd", func(context.Context) error {
		select {
		case <-daemon.Done():
			t.Fatalf("dockerd ended:\n%s", daemon.Stderr())
		default:
		}
		_, err := e.try("version")
		return err
	})
	return e
}

// Podman serves the API of a podman of root's. It skips the test where that is
// not possible.
func Podman(t testing.TB) *Containers {
	t.Helper()
	NeedRoot(t)
	for _, name := range []string{"podman", "runc"} {
		NeedCommand(t, name)
	}
	dir := shortDir(t)
	conf := filepath.Join(dir, "containers.conf")
	// No limits that need CAP_SYS_RESOURCE, which a sandbox may lack.
	must(t, os.WriteFile(conf, []byte("[containers]\ndefault_ulimits=[\"nofile=1024:2048\",\"nproc=1024:1024\"]\n"), 0o644))
	e := &Containers{Socket: filepath.Join(dir, "podman.sock"), env: []string{"CONTAINERS_CONF=" + conf}}
	e.command = []string{"podman", "--root", filepath.Join(dir, "data"), "--runroot", filepath.Join(dir, "run"),
		"--cgroup-manager=cgroupfs", "--events-backend=file", "--storage-driver=vfs", "--runtime", "runc"}
	served := Command{Path: "/usr/bin/podman", Env: e.env,
		Args: append(e.command[1:len(e.command):len(e.command)], "system", "service", "--time=0", "unix://"+e.Socket)}.Start(t)
	t.Cleanup(func() {
		e.removeAll(t)
		served.Stop(t)
	})
	Eventually(t, "podman system service", func(context.Context) error {
		_, err := os.Stat(e.Socket)
		return err
	})
	return e
}

// Import makes an image of one static program, which its containers run.
func (e *Containers) Import(t testing.TB, image, program string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.tar")
	must(t, os.WriteFile(file, layerOf(t, program), 0o644))
	e.must(t, "import", "--change", `ENTRYPOINT ["/app"]`, file, image)
}

// layerOf is the layer of an image that has a program as /app.
func layerOf(t testing.TB, program string) []byte {
	t.Helper()
	b, err := os.ReadFile(program)
	must(t, err)
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	must(t, w.WriteHeader(&tar.Header{Name: "app", Mode: 0o755, Size: int64(len(b))}))
	_, err = w.Write(b)
	must(t, err)
	must(t, w.Close())
	return layer.Bytes()
}

// Run starts a container, with the arguments of the client's command run.
func (e *Containers) Run(t testing.TB, args ...string) Container {
	t.Helper()
	out := strings.Fields(e.must(t, append([]string{"run", "-d", "--network", "none"}, args...)...))
	c := Container{ID: out[len(out)-1]}
	var all []struct{ State struct{ Pid int32 } }
	must(t, json.Unmarshal([]byte(e.must(t, "inspect", c.ID)), &all))
	if len(all) != 1 || all[0].State.Pid == 0 {
		t.Fatalf("container %s does not run:\n%s", c.ID, e.must(t, "logs", c.ID))
	}
	c.PID = all[0].State.Pid
	return c
}

// Remove stops and removes a container.
func (e *Containers) Remove(t testing.TB, c Container) {
	t.Helper()
	e.must(t, "rm", "-f", c.ID)
}

// Client runs a command of the engine's client and returns what it printed.
func (e *Containers) Client(args ...string) (string, error) { return e.try(args...) }

func (e *Containers) removeAll(t testing.TB) {
	out, err := e.try("ps", "-aq")
	if err != nil {
		t.Logf("list containers: %v", err)
		return
	}
	if ids := strings.Fields(out); len(ids) > 0 {
		if _, err := e.try(append([]string{"rm", "-f"}, ids...)...); err != nil {
			t.Logf("remove containers: %v", err)
		}
	}
}

func (e *Containers) must(t testing.TB, args ...string) string {
	t.Helper()
	out, err := e.try(args...)
	must(t, err)
	return out
}

func (e *Containers) try(args ...string) (string, error) {
	all := append(e.command[:len(e.command):len(e.command)], args...)
	cmd := exec.Command(all[0], all[1:]...)
	cmd.Env = append(os.Environ(), e.env...)
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(all, " "), err, exit.Stderr)
	}
	return string(out), err
}

// shortDir makes a directory whose path leaves room for a socket's.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
