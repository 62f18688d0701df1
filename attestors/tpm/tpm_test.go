package tpm_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors/tpm"
)

// An emulator serves one at a time: who finds its queue full waits for a place.
func TestWhoFindsAnEmulatorsQueueFullWaits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tpm")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	must(t, err)
	defer syscall.Close(fd)
	must(t, syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}))
	must(t, syscall.Listen(fd, 0))
	for err == nil {
		var conn net.Conn
		if conn, err = net.Dial("unix", path); err == nil {
			defer conn.Close()
		}
	}
	if !errors.Is(err, syscall.EAGAIN) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if d, err := tpm.Open(ctx, path); err == nil {
		d.Close()
		t.Fatal("there was a place in the queue")
	} else if late := net.Error(nil); ctx.Err() == nil && !(errors.As(err, &late) && late.Timeout()) { // a dialer looks at the time itself
		t.Errorf("it has not waited: %v", err)
	}
	opened := make(chan error, 1)
	go func() {
		d, err := tpm.Open(t.Context(), path)
		if err == nil {
			err = d.Close()
		}
		opened <- err
	}()
	served, _, err := syscall.Accept(fd)
	must(t, err)
	defer syscall.Close(served)
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
