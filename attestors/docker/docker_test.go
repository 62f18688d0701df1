package docker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/docker"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// program builds a program that waits, and needs nothing else in its container.
func program(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wait")
	cmd := exec.Command("go", "build", "-o", path, "testdata/wait/main.go")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}

// engines are the real ones, each with the attestor that asks it.
var engines = []struct {
	name  string
	start func(testing.TB) *harness.Containers
	make  func(socket string, env ...string) (*docker.Attestor, error)
}{
	{docker.Name, harness.Docker, func(socket string, env ...string) (*docker.Attestor, error) {
		return docker.New(docker.Config{Socket: socket, Env: env})
	}},
	{docker.PodmanName, harness.Podman, func(socket string, env ...string) (*docker.Attestor, error) {
		return docker.NewPodman(docker.PodmanConfig{Socket: socket, Env: env})
	}},
}

func TestAProcessIsWhatItsContainerIs(t *testing.T) {
	t.Parallel()
	for _, e := range engines {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			engine := e.start(t)
			engine.Import(t, "example.com/shop/web:1.4", program(t))
			a, err := e.make(engine.Socket, "TIER")
			must(t, err)
			web := engine.Run(t, "--name", "web-1", "--label", "app=web", "--label", "com.docker.compose.project=shop",
				"--label", "com.docker.compose.service=web", "-e", "TIER=gold", "-e", "PASSWORD=hunter2", "example.com/shop/web:1.4")
			other := engine.Run(t, "--name", "other", "--label", "app=other", "example.com/shop/web:1.4")

			got := attest(t, a, web.PID)
			for _, want := range []string{
				"container_name:web-1", "image_id:example.com/shop/web:1.4", "label:app:web", "env:TIER=gold",
				"compose_project:shop", "compose_service:web",
			} {
				if !slices.Contains(got, e.name+":"+want) {
					t.Errorf("%s is missing of %q", want, got)
				}
			}
			if !strings.Contains(strings.Join(got, "\n"), e.name+":image_config_digest:sha256:") {
				t.Errorf("the image's digest is missing of %q", got)
			}
			if strings.Contains(strings.Join(got, "\n"), "hunter2") {
				t.Errorf("a variable that was not asked for is in %q", got)
			}
			if got := attest(t, a, other.PID); !slices.Contains(got, e.name+":label:app:other") || slices.Contains(got, e.name+":label:app:web") {
				t.Errorf("the other container has %q", got)
			}
			if got := attest(t, a, int32(os.Getpid())); len(got) != 0 {
				t.Errorf("a process outside has %q", got)
			}

			t.Run("its children too", func(t *testing.T) {
				c := engine.Run(t, "--label", "app=parent", "example.com/shop/web:1.4", "child")
				if got := attest(t, a, childOf(t, c.PID)); !slices.Contains(got, e.name+":label:app:parent") {
					t.Errorf("got %q", got)
				}
			})
			t.Run("the engine is gone", func(t *testing.T) {
				gone, err := e.make(engine.Socket + ".gone")
				must(t, err)
				_, err = gone.Attest(t.Context(), attestors.Process{PID: web.PID})
				if err == nil || !strings.Contains(err.Error(), "start the daemon") {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

// attest returns the selectors of a process, as text.
func attest(t testing.TB, a *docker.Attestor, pid int32) []string {
	t.Helper()
	got, err := a.Attest(t.Context(), attestors.Process{PID: pid})
	must(t, err)
	return selector.NewSet(got...).Strings()
}

// childOf waits for a child of a process and returns its PID. Any thread may
// have started it, and the kernel lists it there.
func childOf(t testing.TB, pid int32) (child int32) {
	t.Helper()
	harness.Eventually(t, "a child", func(context.Context) error {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
		if err != nil {
			return err
		}
		for _, list := range lists {
			if b, err := os.ReadFile(list); err == nil && len(b) > 0 {
				_, err = fmt.Sscan(string(b), &child)
				return err
			}
		}
		return errors.New("it has none yet")
	})
	return child
}

// BenchmarkAttest asks the real engines about the process of a container: the
// first time that the container is seen, and while it is known.
func BenchmarkAttest(b *testing.B) {
	for _, e := range engines {
		b.Run(e.name, func(b *testing.B) {
			engine := e.start(b)
			engine.Import(b, "example.com/shop/web:1.4", program(b))
			web := engine.Run(b, "--label", "app=web", "example.com/shop/web:1.4")
			counted, calls := harness.Counted(b, engine.Socket)
			fresh := func(socket string) *docker.Attestor {
				a, err := e.make(socket)
				must(b, err)
				return a
			}
			b.Run("first", func(b *testing.B) {
				var a *docker.Attestor
				harness.Attestations(b, calls.Load, func() { a = fresh(counted) }, func() error {
					_, err := a.Attest(b.Context(), attestors.Process{PID: web.PID})
					return err
				})
			})
			b.Run("known", func(b *testing.B) {
				a := fresh(counted)
				harness.Attestations(b, calls.Load, nil, func() error {
					_, err := a.Attest(b.Context(), attestors.Process{PID: web.PID})
					return err
				})
			})
		})
	}
}
