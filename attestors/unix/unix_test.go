package unix_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/unix"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

// The test binary is also the process that is attested.
func TestMain(m *testing.M) {
	if os.Getenv("UNIX_TEST_PROCESS") == "" {
		os.Exit(m.Run())
	}
	if os.Getenv("UNIX_TEST_PROCESS") == "parent" { // leaves a child behind
		child := exec.Command(os.Args[0])
		child.Env = []string{"UNIX_TEST_PROCESS=1", "GORACE=atexit_sleep_ms=0"}
		child.Stdin = os.Stdin
		if err := child.Start(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(child.Process.Pid)
		os.Exit(0)
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run starts a copy of the test binary at path and returns its PID.
func run(t *testing.T, path string, cred *syscall.Credential) int32 {
	t.Helper()
	b, err := os.ReadFile(os.Args[0])
	must(t, err)
	harness.WriteProgram(t, path, b)
	return runFile(t, path, cred)
}

func runFile(t *testing.T, path string, cred *syscall.Credential) int32 {
	t.Helper()
	for dir := filepath.Dir(path); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755))
	}
	cmd := exec.Command(path)
	cmd.Dir = "/"
	cmd.Env = []string{"UNIX_TEST_PROCESS=1", "GORACE=atexit_sleep_ms=0"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
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

func attest(t *testing.T, c unix.Config, p attestors.Process) []string {
	t.Helper()
	a, err := unix.New(c)
	must(t, err)
	got, err := a.Attest(t.Context(), p)
	must(t, err)
	return selector.NewSet(got...).Strings()
}

func self() attestors.Process {
	return attestors.Process{PID: int32(os.Getpid()), UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}
}

func TestAProcessHasItsUserAndGroups(t *testing.T) {
	got := attest(t, unix.Config{}, self())
	want := []string{"unix:uid:" + strconv.Itoa(os.Geteuid()), "unix:gid:" + strconv.Itoa(os.Getegid())}
	if u, err := user.Current(); err == nil {
		want = append(want, "unix:user:"+u.Username)
	}
	if g, err := user.LookupGroupId(strconv.Itoa(os.Getegid())); err == nil {
		want = append(want, "unix:group:"+g.Name)
	}
	for _, w := range want {
		if !slices.Contains(got, w) {
			t.Errorf("%s is missing of %v", w, got)
		}
	}
	for _, s := range got {
		if strings.HasPrefix(s, "unix:path:") || strings.HasPrefix(s, "unix:sha256:") {
			t.Errorf("%s is there without being configured", s)
		}
	}
}

func TestSupplementaryGroupsAndUnknownNames(t *testing.T) {
	harness.NeedRoot(t)
	const nobodyKnows = 3_000_000_017
	pid := run(t, filepath.Join(t.TempDir(), "p"), &syscall.Credential{Uid: nobodyKnows, Gid: nobodyKnows, Groups: []uint32{0, nobodyKnows + 1}})
	got := attest(t, unix.Config{}, attestors.Process{PID: pid, UID: nobodyKnows, GID: nobodyKnows})
	want := []string{
		"unix:gid:3000000017", "unix:supplementary_gid:0", "unix:supplementary_gid:3000000018",
		"unix:supplementary_group:root", "unix:uid:3000000017",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestAProcessThatChangedItsUserSinceItConnectedHasNoSelectors(t *testing.T) {
	a, err := unix.New(unix.Config{})
	must(t, err)
	for _, p := range []attestors.Process{
		{PID: self().PID, UID: self().UID + 1, GID: self().GID},
		{PID: self().PID, UID: self().UID, GID: self().GID + 1},
	} {
		got, err := a.Attest(t.Context(), p)
		if err == nil || len(got) != 0 {
			t.Errorf("got %v, %v", got, err)
		}
	}
}

func TestAnEndedProcessHasNoSelectors(t *testing.T) {
	cmd := exec.Command("/bin/true")
	must(t, cmd.Run())
	a, err := unix.New(unix.Config{})
	must(t, err)
	if got, err := a.Attest(t.Context(), attestors.Process{PID: int32(cmd.Process.Pid)}); err == nil {
		t.Errorf("got %v", got)
	}
}

func TestTheProgramIsKnownByPathAndHash(t *testing.T) {
	path := filepath.Join(t.TempDir(), "program")
	pid := run(t, path, nil)
	b, err := os.ReadFile(path)
	must(t, err)
	h := sha256.Sum256(b)
	p := attestors.Process{PID: pid, UID: self().UID, GID: self().GID}
	want := []string{"unix:path:" + path, "unix:sha256:" + hex.EncodeToString(h[:])}

	both := unix.Config{Path: true, SHA256: true}
	check := func(when string) {
		t.Helper()
		got := attest(t, both, p)
		for _, w := range want {
			if !slices.Contains(got, w) {
				t.Errorf("%s: %s is missing of %v", when, w, got)
			}
		}
	}
	check("installed")
	must(t, os.Remove(path))
	check("deleted")
	must(t, os.WriteFile(path, []byte("something else"), 0o755))
	check("replaced")
	must(t, os.WriteFile(path+" (deleted)", []byte("a trap"), 0o755))
	check("beside one with the mark in its name")
}

func TestAFileMayBeNamedLikeADeletedOne(t *testing.T) {
	path := filepath.Join(t.TempDir(), "program (deleted)")
	pid := run(t, path, nil)
	got := attest(t, unix.Config{Path: true}, attestors.Process{PID: pid, UID: self().UID, GID: self().GID})
	if !slices.Contains(got, "unix:path:"+path) {
		t.Errorf("got %v", got)
	}
}

func TestTheHashIsThatOfTheProgramAsItIsNow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "program")
	a, err := unix.New(unix.Config{SHA256: true})
	must(t, err)
	hash := func(pid int32) string {
		t.Helper()
		got, err := a.Attest(t.Context(), attestors.Process{PID: pid, UID: self().UID, GID: self().GID})
		must(t, err)
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/exe", pid))
		must(t, err)
		h := sha256.Sum256(b)
		want := selector.Selector{Type: "unix", Value: "sha256:" + hex.EncodeToString(h[:])}
		if !slices.Contains(got, want) {
			t.Errorf("%v is missing of %v", want, got)
		}
		return want.Value
	}
	first := run(t, path, nil)
	a1 := hash(first)
	must(t, os.Chtimes(path, time.Time{}, time.Now().Add(-time.Hour)))
	if a1 != hash(first) {
		t.Error("the same program has another hash")
	}
	must(t, os.Remove(path))
	b, err := os.ReadFile(os.Args[0])
	must(t, err)
	harness.WriteProgram(t, path, append(b, "more"...))
	second := runFile(t, path, nil)
	if a1 == hash(second) {
		t.Error("another program has the same hash")
	}
	hash(first)
}

func TestALargeProgramHasNoHashButTheOtherSelectors(t *testing.T) {
	a, err := unix.New(unix.Config{Path: true, SHA256: true, MaxSize: 1000})
	must(t, err)
	got, err := a.Attest(t.Context(), self())
	if err == nil || !strings.Contains(err.Error(), "max_size") {
		t.Errorf("error is %v", err)
	}
	s := selector.NewSet(got...).Strings()
	if !slices.ContainsFunc(s, func(s string) bool { return strings.HasPrefix(s, "unix:path:") }) ||
		slices.ContainsFunc(s, func(s string) bool { return strings.HasPrefix(s, "unix:sha256:") }) {
		t.Errorf("got %v", s)
	}
}

func TestHashingStopsWhenNobodyWaits(t *testing.T) {
	a, err := unix.New(unix.Config{SHA256: true})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.Attest(ctx, self()); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}

func TestANegativeSizeIsRefused(t *testing.T) {
	if _, err := unix.New(unix.Config{MaxSize: -1}); err == nil {
		t.Error("no error")
	}
}

// BenchmarkAttest attests a process by its user and groups, and by its program
// too, whose hash is known after the first time.
func BenchmarkAttest(b *testing.B) {
	for name, c := range map[string]unix.Config{"user": {}, "program": {Path: true, SHA256: true}} {
		b.Run(name, func(b *testing.B) {
			a, err := unix.New(c)
			if err != nil {
				b.Fatal(err)
			}
			p := self()
			harness.Attestations(b, func() int64 { return 0 }, nil, func() error {
				_, err := a.Attest(b.Context(), p)
				return err
			})
		})
	}
}
