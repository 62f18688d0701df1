package docker_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/docker"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

// IDs of containers that only the tests' own daemon knows.
const (
	id      = "5f8dee3eb0440d25619edfcc5d10679627ec854a7373add3fc994681024093cd"
	other   = "0b1c1b0ac95e0cb4a3b8f5e4d3c2b1a09f8e7d6c5b4a39281706f5e4d3c2b1a0"
	imageID = "sha256:1385acea7301ff819a8dee220857ccb119b4179c961485159a0e2a93d8e88b0c"
)

// TestMain runs the tests, or a user's own podman as far as the attestor sees
// it: something that answers on a socket.
func TestMain(m *testing.M) {
	socket := os.Getenv("DOCKER_TEST_SOCKET")
	if socket == "" {
		os.Exit(m.Run())
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, os.Getenv("DOCKER_TEST_ANSWER"))
	}))
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

// inGroup starts a process in a control group.
func inGroup(t testing.TB, path string) int32 {
	t.Helper()
	return int32(harness.InGroup(t, path).Process.Pid)
}

// answer is a daemon's description of a container.
func answer(id string, pid int32, running bool) string {
	b, err := json.Marshal(map[string]any{
		"Id": id, "Name": "/web-1", "Image": imageID,
		"State":  map[string]any{"Running": running, "Pid": pid},
		"Config": map[string]any{"Image": "web", "Labels": map[string]string{"app": "web"}, "Env": []string{"TIER=gold"}},
	})
	if err != nil {
		panic(err)
	}
	return string(b)
}

// serve serves a daemon of the test's own.
func serve(t testing.TB, h http.HandlerFunc) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "docker.sock")
	l, err := net.Listen("unix", socket)
	must(t, err)
	server := &http.Server{Handler: h}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return socket
}

func TestWhatADaemonAnswersIsChecked(t *testing.T) {
	for _, engine := range []struct {
		name, group string
		make        func(socket string) (*docker.Attestor, error)
	}{
		{docker.Name, "/hallmark-test/docker/", func(socket string) (*docker.Attestor, error) { return docker.New(docker.Config{Socket: socket}) }},
		{docker.PodmanName, "/hallmark-test/libpod_parent/libpod-", func(socket string) (*docker.Attestor, error) {
			return docker.NewPodman(docker.PodmanConfig{Socket: socket})
		}},
	} {
		t.Run(engine.name, func(t *testing.T) { checkAnswers(t, engine.group, engine.make) })
	}
}

func checkAnswers(t *testing.T, group string, attestor func(socket string) (*docker.Attestor, error)) {
	inside := inGroup(t, group+id)
	outside := inGroup(t, group+other)
	for _, c := range []struct {
		name string
		h    http.HandlerFunc
		want string // of the error; empty: no selectors and no error
	}{
		{"a container that it does not know", func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) }, ""},
		{"an error", func(w http.ResponseWriter, r *http.Request) { http.Error(w, "out of memory", 500) }, "500 Internal Server Error"},
		{"another container", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer(other, inside, true)) }, "it answered about"},
		{"a process that is in another container", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer(id, outside, true)) }, "not in a control group of that ID"},
		{"a process that is in no container", func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, answer(id, int32(os.Getpid()), true))
		}, "not in a control group of that ID"},
		{"a process that has ended", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer(id, 1<<22, true)) }, "control group of its first process"},
		{"a negative process", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer(id, -1, true)) }, "does not run"},
		{"a container that does not run", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer(id, inside, false)) }, "does not run"},
		{"no JSON", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }, "read its answer"},
		{"half an answer", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer(id, inside, true)[:40]) }, "read its answer"},
		{"an answer without end", func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				w.Write(make([]byte, 1<<20))
			}
		}, "longer than"},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/x", http.StatusFound)
		}, "302 Found"},
		{"a closed connection", func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a, err := attestor(serve(t, c.h))
			must(t, err)
			got, err := a.Attest(t.Context(), attestors.Process{PID: inside})
			if len(got) != 0 {
				t.Errorf("got %v", got)
			}
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestAGroupThatOnlyBearsAContainersIDIsNotIts(t *testing.T) {
	inside := inGroup(t, "/hallmark-test/docker/"+id)
	socket := serve(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, answer(id, inside, true)) })
	a, err := docker.New(docker.Config{Socket: socket})
	must(t, err)
	if got := attest(t, a, inside); !slices.Contains(got, "docker:label:app:web") {
		t.Fatalf("the container's own process has %q", got)
	}
	for _, path := range []string{
		"/hallmark-test/user.slice/docker/" + id,
		"/hallmark-test/user.slice/docker-" + id + ".scope",
		"/hallmark-test/" + id,
	} {
		t.Run(path, func(t *testing.T) {
			got, err := a.Attest(t.Context(), attestors.Process{PID: inGroup(t, path)})
			if len(got) != 0 || err == nil || !strings.Contains(err.Error(), "is not its group") {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	t.Run("below another container", func(t *testing.T) {
		nested := inGroup(t, "/hallmark-test/docker/"+other+"/docker/"+id)
		got, err := a.Attest(t.Context(), attestors.Process{PID: nested})
		if len(got) != 0 || err == nil || !strings.Contains(err.Error(), "it answered about") { // it was asked about the outer one
			t.Errorf("got %v, %v", got, err)
		}
	})
	t.Run("below its own", func(t *testing.T) {
		if got := attest(t, a, inGroup(t, "/hallmark-test/docker/"+id+"/init")); !slices.Contains(got, "docker:label:app:web") {
			t.Errorf("got %q", got)
		}
	})
}

func TestADaemonThatHangsIsGivenUp(t *testing.T) {
	inside := inGroup(t, "/hallmark-test/docker/"+id)
	asked := make(chan struct{}, 10)
	socket := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done()
	})
	a, err := docker.New(docker.Config{Socket: socket})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	if _, err := a.Attest(ctx, attestors.Process{PID: inside}); err == nil || !strings.Contains(err.Error(), "context canceled") {
		t.Errorf("got %v", err)
	}
}

func TestAContainerThatIsJustStartingIsWaitedFor(t *testing.T) {
	inside := inGroup(t, "/hallmark-test/docker/"+id)
	var calls atomic.Int32
	socket := serve(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, answer(id, inside, calls.Add(1) > 3))
	})
	a, err := docker.New(docker.Config{Socket: socket})
	must(t, err)
	if got := attest(t, a, inside); !slices.Contains(got, "docker:label:app:web") {
		t.Errorf("got %q", got)
	}
}

func TestABurstAsksTheDaemonOnce(t *testing.T) {
	inside := inGroup(t, "/hallmark-test/docker/"+id)
	var calls atomic.Int32
	socket := serve(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		io.WriteString(w, answer(id, inside, true))
	})
	a, err := docker.New(docker.Config{Socket: socket})
	must(t, err)
	var wait sync.WaitGroup
	for range 100 {
		wait.Go(func() {
			got, err := a.Attest(t.Context(), attestors.Process{PID: inside})
			// Which puts them in order, as every caller does with its own.
			if set := selector.NewSet(got...); err != nil || !slices.Contains(set.Strings(), "docker:label:app:web") {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	wait.Wait()
	if n := calls.Load(); n > 4 { // the container and its image, and once more if the burst took long
		t.Errorf("100 attestations made %d calls", n)
	}
}

func TestARootlessPodmanIsBelievedOnlyWhereItsUserIs(t *testing.T) {
	const uid, stranger = 61234, 61235
	inside := inGroup(t, fmt.Sprintf("/user.slice/user-%d.slice/user@%d.service/user.slice/libpod-%s.scope", uid, uid, id))
	dir := fmt.Sprintf("/run/user/%d/podman", uid)
	must(t, os.MkdirAll(dir, 0o755))
	t.Cleanup(func() { os.RemoveAll(filepath.Dir(dir)) })
	must(t, os.Chown(dir, uid, uid))

	own := func(t *testing.T, listens int) {
		cmd := exec.Command(copyOfTest(t))
		cmd.Env = []string{"DOCKER_TEST_SOCKET=" + dir + "/podman.sock", "DOCKER_TEST_ANSWER=" + answer(id, inside, true), "GORACE=atexit_sleep_ms=0"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(listens), Gid: uint32(listens)}}
		must(t, os.Chown(dir, listens, listens))
		in, err := cmd.StdinPipe()
		must(t, err)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		t.Cleanup(func() { in.Close(); cmd.Wait(); os.Remove(dir + "/podman.sock") })
		buf := make([]byte, 5)
		if _, err := io.ReadFull(out, buf); err != nil || string(buf) != "ready" {
			t.Fatalf("the daemon did not start: %q, %v", buf, err)
		}
	}
	root := serve(t, func(w http.ResponseWriter, r *http.Request) {
		t.Error("root's podman was asked about a user's container")
	})
	t.Run("a user whose podman is believed", func(t *testing.T) {
		own(t, uid)
		a, err := docker.NewPodman(docker.PodmanConfig{Socket: root, RootlessUIDs: []uint32{uid}})
		must(t, err)
		got := attest(t, a, inside)
		if !slices.Contains(got, "podman:label:app:web") || !slices.Contains(got, fmt.Sprintf("podman:rootless_uid:%d", uid)) {
			t.Errorf("got %q", got)
		}
	})
	t.Run("any other user", func(t *testing.T) {
		own(t, uid)
		a, err := docker.NewPodman(docker.PodmanConfig{Socket: root, RootlessUIDs: []uint32{stranger}})
		must(t, err)
		if got := attest(t, a, inside); len(got) != 0 {
			t.Errorf("got %q", got)
		}
	})
	t.Run("somebody else listens in the user's place", func(t *testing.T) {
		own(t, stranger)
		a, err := docker.NewPodman(docker.PodmanConfig{Socket: root, RootlessUIDs: []uint32{uid}})
		must(t, err)
		got, err := a.Attest(t.Context(), attestors.Process{PID: inside})
		if len(got) != 0 || err == nil || !strings.Contains(err.Error(), "not user 61234") {
			t.Errorf("got %v, %v", got, err)
		}
	})
}

// copyOfTest copies this test where other users may run it.
func copyOfTest(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(t, os.Chmod(dir, 0o755))
	b, err := os.ReadFile(os.Args[0])
	must(t, err)
	path := filepath.Join(dir, "test")
	harness.WriteProgram(t, path, b)
	return path
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	for want, try := range map[string]func() (*docker.Attestor, error){
		"give an absolute path": func() (*docker.Attestor, error) { return docker.New(docker.Config{Socket: "docker.sock"}) },
		"no name of a variable": func() (*docker.Attestor, error) { return docker.New(docker.Config{Env: []string{"A=B"}}) },
		"the most is 100":       func() (*docker.Attestor, error) { return docker.New(docker.Config{Env: make([]string, 101)}) },
		"which is root": func() (*docker.Attestor, error) {
			return docker.NewPodman(docker.PodmanConfig{RootlessUIDs: []uint32{0}})
		},
	} {
		if _, err := try(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
