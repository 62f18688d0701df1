package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// Systemd boots a system in a container that has this machine's /usr, network
// and the directories given, at the same paths: systemd as the first process, a
// system bus, the user agent, and units by their names, some of which it starts.
// It skips the test where that is not possible.
func Systemd(t testing.TB, units map[string]string, started []string, shared ...string) *Process {
	t.Helper()
	NeedRoot(t)
	for _, name := range []string{"systemd-nspawn", "dbus-daemon"} {
		NeedCommand(t, name)
	}
	root := shortDir(t)
	must(t, os.Chmod(root, 0o755))
	system := filepath.Join(root, "etc/systemd/system")
	must(t, os.MkdirAll(system, 0o755))
	for _, dir := range []string{"usr", "var", "run", "tmp", "proc", "sys", "dev"} {
		must(t, os.Mkdir(filepath.Join(root, dir), 0o755))
	}
	for _, name := range []string{"bin", "sbin", "lib", "lib64"} {
		must(t, os.Symlink("usr/"+name, filepath.Join(root, name)))
	}
	units["test.target"] = "[Unit]\nRequires=dbus.socket\nAfter=dbus.socket\n"
	for name, text := range units {
		must(t, os.WriteFile(filepath.Join(system, name), []byte(text), 0o644))
	}
	must(t, os.Symlink("test.target", filepath.Join(system, "default.target")))
	must(t, os.Mkdir(filepath.Join(system, "test.target.wants"), 0o755))
	for _, name := range started {
		must(t, os.Symlink("../"+name, filepath.Join(system, "test.target.wants", name)))
	}
	for name, text := range map[string]string{
		"etc/passwd":     fmt.Sprintf("root:x:0:0::/:/bin/sh\nmessagebus:x:101:101::/:/bin/false\nagent:x:%d:%[1]d::/:/bin/false\n", AgentUID),
		"etc/group":      fmt.Sprintf("root:x:0:\nmessagebus:x:101:\nagent:x:%d:\n", AgentUID),
		"etc/os-release": "ID=test\n",
		"etc/machine-id": "0123456789abcdef0123456789abcdef\n", // else it enables all that is installed
	} {
		must(t, os.WriteFile(filepath.Join(root, name), []byte(text), 0o644))
	}
	args := []string{"-D", root, "--bind-ro=/usr", "--register=no", "--keep-unit", "--boot", "--console=pipe", "--link-journal=no"}
	slices.Sort(shared)
	for _, dir := range slices.Compact(shared) {
		args = append(args, fmt.Sprintf("--bind=%s", dir))
	}
	booted := Command{Path: "/usr/bin/systemd-nspawn", Args: args}.Start(t)
	t.Cleanup(func() {
		Eventually(t, "the end of the container", func(context.Context) error {
			booted.Signal(syscall.SIGTERM) // one halts it, another does not wait for that
			select {
			case <-booted.Done():
				return nil
			default:
				return errors.New("it runs")
			}
		})
		left, _ := filepath.Glob("/sys/fs/cgroup/*/payload")
		more, _ := filepath.Glob("/sys/fs/cgroup/*/supervisor")
		for _, group := range append(left, more...) {
			os.Remove(group) // unless it is another's, and so not empty
		}
	})
	return booted
}
