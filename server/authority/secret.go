package authority

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// Bounds of what is in a secret's file, in bytes.
const (
	maxSecret = 1024
	// minKeySecret is the shortest secret that key files are encrypted with: it
	// is read from a file, so that nobody has to remember it.
	minKeySecret = 16
)

// ReadSecret reads a secret from a file: all of it but the end of its last
// line. The file may be readable by a group, as those that systemd and
// Kubernetes hand to a service are, but by nobody else; it belongs to this user
// or to root.
func ReadSecret(path string) (string, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe must not hang the server
	if err != nil {
		return "", fmt.Errorf("open the secret: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("open the secret: %w", err)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("open the secret: %s is not a file", path)
	}
	if err := private("secret file", path, info, 0o037, "600"); err != nil {
		return "", err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return "", fmt.Errorf("read the secret: %w", err)
	}
	text := bytes.TrimRight(data, "\r\n")
	switch {
	case len(data) > maxSecret:
		return "", fmt.Errorf("the secret file %s is longer than %d bytes; write one line", path, maxSecret)
	case len(text) == 0:
		return "", fmt.Errorf("the secret file %s is empty", path)
	case bytes.ContainsAny(text, "\r\n\x00"):
		return "", fmt.Errorf("the secret file %s is not one line of text", path)
	}
	return string(text), nil
}

// CheckPrivate checks that nobody but a file's owner and its group can read it,
// and that the owner is this user or root. The error names the file, and what it
// is.
func CheckPrivate(what, path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return private(what, path, info, 0o037, "600")
}

// private checks that a file or directory has none of some permissions for
// others than its owner, and that the owner is this user or root.
func private(what, path string, info fs.FileInfo, forbidden fs.FileMode, mode string) error {
	if info.Mode().Perm()&forbidden != 0 {
		return fmt.Errorf("%s %s is open to other users (mode %04o); run: chmod %s %s", what, path, info.Mode().Perm(), mode, path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s %s belongs to user %d, but user %d runs this server; run: chown %d %s", what, path, st.Uid, os.Geteuid(), os.Geteuid(), path)
	}
	return nil
}

// checkKeySecret refuses a secret that could be found by trying. Empty is none.
func checkKeySecret(secret string) error {
	if secret != "" && len(secret) < minKeySecret {
		return fmt.Errorf("the secret of the key files has %d characters; it needs %d: make one with \"openssl rand -base64 32\"", len(secret), minKeySecret)
	}
	return nil
}
