package peercred

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestASocketHasTheModeAskedForWhateverTheUmask(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o777} {
		for _, mode := range []os.FileMode{0o600, 0o777} {
			path := filepath.Join(t.TempDir(), "s")
			old := syscall.Umask(umask)
			l, err := Listen(path, mode)
			syscall.Umask(old)
			must(t, err)
			info, err := os.Stat(path)
			must(t, err)
			if got := info.Mode().Perm(); got != mode {
				t.Errorf("umask %o: mode is %o, want %o", umask, got, mode)
			}
			l.Close()
		}
	}
}

func TestListenMakesTheParentDirectoryAndCloseRemovesTheSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b", "s")
	l, err := Listen(path, 0o600)
	must(t, err)
	must(t, l.Close())
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("after Close: %v", err)
	}
	if l.Close() == nil {
		t.Error("closing twice gives no error")
	}
}

func TestAStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	stale.Close()
	l, err := Listen(path, 0o600)
	must(t, err)
	l.Close()
}

func TestASocketInUseIsLeftAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path, 0o600)
	must(t, err)
	defer l.Close()
	if _, err := Listen(path, 0o600); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("error is %v", err)
	}
	c, err := net.Dial("unix", path)
	must(t, err)
	c.Close()
}

func TestOnlyItsOwnSocketIsRemoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	old, err := Listen(path, 0o600)
	must(t, err)
	must(t, os.Remove(path))
	l, err := Listen(path, 0o600)
	must(t, err)
	defer l.Close()
	old.Close()
	c, err := net.Dial("unix", path)
	must(t, err)
	c.Close()
}

func TestImpossiblePathsAreExplained(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	must(t, os.WriteFile(file, nil, 0o600))
	long := filepath.Join(dir, strings.Repeat("x", MaxPath))
	for path, want := range map[string]string{
		"":             "empty",
		"@abstract":    "abstract",
		file:           "not a socket",
		file + "/s":    "not a directory",
		long:           "choose a shorter one",
		dir:            "not a socket",
		"\x00abstract": "abstract",
	} {
		if _, err := Listen(path, 0o600); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error is %v, want one that says %q", path, err, want)
		}
	}
	if b, err := os.ReadFile(file); err != nil || len(b) != 0 {
		t.Error("the file in the way was touched")
	}
}

func TestThePathMayBeAsLongAsTheKernelTakes(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "")
	must(t, err)
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, strings.Repeat("x", MaxPath-len(dir)-1))
	l, err := Listen(path, 0o600)
	must(t, err)
	l.Close()
	if _, err := Listen(path+"x", 0o600); err == nil {
		t.Errorf("a path of %d bytes was taken", len(path)+1)
	}
}
