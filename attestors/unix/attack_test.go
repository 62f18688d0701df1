package unix_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/unix"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

// copyTo copies the test binary.
func copyTo(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(os.Args[0])
	must(t, err)
	harness.WriteProgram(t, path, b)
	return path
}

// started starts a process that says when it is ready and waits, and returns
// its PID. It ends with the test.
func started(t *testing.T, cmd *exec.Cmd, env ...string) int32 {
	t.Helper()
	cmd.Env = append([]string{"UNIX_TEST_PROCESS=1", "GORACE=atexit_sleep_ms=0"}, env...)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	_, err = bufio.NewReader(out).ReadString('\n')
	must(t, err)
	return int32(cmd.Process.Pid)
}

// everything is all that the attestor can tell.
var everything = unix.Config{Path: true, SHA256: true, Parents: unix.MaxParents, StartTime: true, Traced: true}

// What a hostile workload tries in order to be taken for another, here for the
// program "trusted" or its child, and what comes of it.
func TestAttacksOfAProcess(t *testing.T) {
	dir := t.TempDir()
	trusted := copyTo(t, filepath.Join(dir, "trusted"))
	evil := copyTo(t, filepath.Join(dir, "evil"))
	own := func(pid int32) attestors.Process {
		return attestors.Process{PID: pid, UID: self().UID, GID: self().GID}
	}
	for _, c := range []struct {
		name   string
		attack func(t *testing.T) attestors.Process
		path   string // what its program is said to be; empty: it has no selectors
		refuse string // of the error, if it has none
	}{
		{"it calls itself trusted in argv[0]", func(t *testing.T) attestors.Process {
			return own(started(t, &exec.Cmd{Path: evil, Args: []string{trusted}}))
		}, evil, ""},
		{"it names trusted as its script", func(t *testing.T) attestors.Process {
			return own(started(t, &exec.Cmd{Path: evil, Args: []string{"python3", trusted}}))
		}, evil, ""},
		{"it calls itself trusted in its environment", func(t *testing.T) attestors.Process {
			return own(started(t, exec.Command(evil), "_="+trusted, "PWD="+dir))
		}, evil, ""},
		{"it runs by a symbolic link called trusted", func(t *testing.T) attestors.Process {
			link := filepath.Join(t.TempDir(), "trusted")
			must(t, os.Symlink(evil, link))
			return own(started(t, exec.Command(link)))
		}, evil, ""},
		{"it is moved to the place of trusted while it runs", func(t *testing.T) attestors.Process {
			d := t.TempDir()
			from := copyTo(t, filepath.Join(d, "mover"))
			pid := started(t, exec.Command(from))
			must(t, os.Remove(from))
			must(t, os.Symlink(trusted, from)) // the path leads to trusted, the process does not
			return own(pid)
		}, "mover", ""},
		{"its file's name ends like that of a deleted one", func(t *testing.T) attestors.Process {
			return own(started(t, exec.Command(copyTo(t, trusted+" (deleted)"))))
		}, trusted + " (deleted)", ""},
		{"its file's name holds a line's end and a selector", func(t *testing.T) attestors.Process {
			return own(started(t, exec.Command(copyTo(t, filepath.Join(dir, "x\nuid:0")))))
		}, filepath.Join(dir, "x\nuid:0"), ""},
		{"its command's name holds lines of another's status", func(t *testing.T) attestors.Process {
			return own(started(t, exec.Command(copyTo(t, filepath.Join(dir, "x)\nUid:\t0")))))
		}, filepath.Join(dir, "x)\nUid:\t0"), ""},
		{"it was another user when it connected", func(t *testing.T) attestors.Process {
			p := own(started(t, exec.Command(evil)))
			p.UID++
			return p
		}, "", "must connect again"},
		{"it was in another group when it connected", func(t *testing.T) attestors.Process {
			p := own(started(t, exec.Command(evil)))
			p.GID++
			return p
		}, "", "must connect again"},
		{"it has ended", func(t *testing.T) attestors.Process {
			cmd := exec.Command("/bin/true")
			must(t, cmd.Run())
			return own(int32(cmd.Process.Pid))
		}, "", "find the users and groups"},
		{"it claims to be no process", func(t *testing.T) attestors.Process { return own(0) }, "", "find the users and groups"},
		{"it claims a PID that is none", func(t *testing.T) attestors.Process { return own(-1) }, "", "find the users and groups"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := unix.New(everything)
			must(t, err)
			p := c.attack(t)
			got, err := a.Attest(t.Context(), p)
			if c.path == "" {
				if len(got) != 0 || err == nil || !strings.Contains(err.Error(), c.refuse) {
					t.Errorf("got %v, %v; want the error %q", got, err, c.refuse)
				}
				return
			}
			must(t, err)
			uid := "unix:uid:" + strconv.FormatUint(uint64(p.UID), 10)
			for _, s := range selector.NewSet(got...).Strings() {
				if path, ok := strings.CutPrefix(s, "unix:path:"); ok && path != c.path && filepath.Base(path) != c.path {
					t.Errorf("its program is said to be %q; want %q", path, c.path)
				}
				if strings.HasPrefix(s, "unix:uid:") && s != uid || strings.HasPrefix(s, "unix:script") || s == "unix:path:"+trusted ||
					s == "unix:parent_path:"+trusted {
					t.Errorf("got %q", s)
				}
			}
		})
	}
}

func TestTheParentsAreThoseOfNow(t *testing.T) {
	pid := started(t, exec.Command(os.Args[0]))
	p := attestors.Process{PID: pid, UID: self().UID, GID: self().GID}
	exe, err := os.Executable()
	must(t, err)
	for most := range 3 {
		got := attest(t, unix.Config{Parents: most}, p)
		var nearest, above int
		for _, s := range got {
			switch {
			case s == "unix:parent_path:"+exe:
				nearest++
			case strings.HasPrefix(s, "unix:parent_path:"):
				t.Errorf("got %s", s)
			case strings.HasPrefix(s, "unix:ancestor_path:"):
				above++
			}
		}
		if nearest != min(most, 1) || above > max(most-1, 0) {
			t.Errorf("of at most %d parents it has %v", most, got)
		}
	}
}

// An orphan is adopted: it is no longer the child of the program that started
// it, nor of one that has its PID by now.
func TestAnOrphanIsNotTheChildOfWhoStartedIt(t *testing.T) {
	trusted := copyTo(t, filepath.Join(t.TempDir(), "trusted"))
	in, keep, err := os.Pipe() // holds the orphan until the test ends
	must(t, err)
	t.Cleanup(func() { keep.Close() })
	cmd := exec.Command(trusted)
	cmd.Env = []string{"UNIX_TEST_PROCESS=parent", "GORACE=atexit_sleep_ms=0"}
	cmd.Stdin = in
	out, err := cmd.Output() // once it has ended, and been waited for
	in.Close()
	must(t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(out)))
	must(t, err)
	a, err := unix.New(unix.Config{Path: true, Parents: 1})
	must(t, err)
	// Who adopted it may be beyond the agent's sight; then there is an error.
	got, err := a.Attest(t.Context(), attestors.Process{PID: int32(n), UID: self().UID, GID: self().GID})
	s := selector.NewSet(got...).Strings()
	if !slices.Contains(s, "unix:path:"+trusted) || slices.Contains(s, "unix:parent_path:"+trusted) {
		t.Errorf("got %v, %v", s, err)
	}
}

func TestATracedProcessSaysSo(t *testing.T) {
	runtime.LockOSThread() // a tracer is a thread
	defer runtime.UnlockOSThread()
	pid := started(t, exec.Command(os.Args[0]))
	p := attestors.Process{PID: pid, UID: self().UID, GID: self().GID}
	if got := attest(t, unix.Config{Traced: true}, p); !slices.Contains(got, "unix:traced:false") || slices.Contains(got, "unix:traced:true") {
		t.Errorf("before, got %v", got)
	}
	if err := syscall.PtraceAttach(int(pid)); err != nil {
		harness.Skip(t, fmt.Sprintf("no process may be traced here: %v", err))
	}
	var status syscall.WaitStatus
	_, err := syscall.Wait4(int(pid), &status, 0, nil)
	must(t, err)
	if got := attest(t, unix.Config{Traced: true}, p); !slices.Contains(got, "unix:traced:true") || slices.Contains(got, "unix:traced:false") {
		t.Errorf("while it is traced, got %v", got)
	}
	must(t, syscall.PtraceDetach(int(pid)))
}

func TestTheStartTellsOneRunFromTheNext(t *testing.T) {
	pid := started(t, exec.Command(os.Args[0]))
	birth, err := peercred.ReadBirth(pid)
	must(t, err)
	want := "unix:start_time:" + strconv.FormatUint(birth.Start, 10)
	if got := attest(t, unix.Config{StartTime: true}, attestors.Process{PID: pid, UID: self().UID, GID: self().GID}); !slices.Contains(got, want) {
		t.Errorf("%s is missing of %v", want, got)
	}
}

func TestParentsAreBounded(t *testing.T) {
	for _, n := range []int{-1, unix.MaxParents + 1} {
		if _, err := unix.New(unix.Config{Parents: n}); err == nil || !strings.Contains(err.Error(), "parents") {
			t.Errorf("%d: %v", n, err)
		}
	}
}
