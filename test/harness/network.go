package harness

import (
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// MetadataAddress is where instances of clouds find their metadata service.
const MetadataAddress = "169.254.169.254"

// Network is a network namespace with nothing but loopback, on which the address
// of clouds' metadata services is too. What runs in it reaches nothing outside.
type Network struct{ do chan func() }

// NewNetwork makes one, which is gone once the test has ended. It needs root.
func NewNetwork(t testing.TB) *Network {
	t.Helper()
	NeedRoot(t)
	NeedCommand(t, "ip")
	return inNamespace(t, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		for _, args := range [][]string{{"link", "set", "lo", "up"}, {"address", "add", MetadataAddress + "/32", "dev", "lo"}} {
			if err := exec.Command("ip", args...).Run(); err != nil {
				return err
			}
		}
		return nil
	})
}

// inNamespace returns the network namespace into which a function takes its
// thread.
func inNamespace(t testing.TB, enter func() error) *Network {
	t.Helper()
	n := &Network{do: make(chan func())}
	made, ended := make(chan error), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread()
		outside, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			made <- err
			return
		}
		defer outside.Close()
		// The thread goes back to where the others are. Were it to end, it would take
		// along every process that was ever started from it (see Command.Start).
		defer func() {
			if err := unix.Setns(int(outside.Fd()), unix.CLONE_NEWNET); err == nil {
				runtime.UnlockOSThread()
			}
		}()
		if err := enter(); err != nil {
			made <- err
			return
		}
		made <- nil
		for f := range n.do {
			f()
		}
	}()
	must(t, <-made)
	t.Cleanup(func() {
		close(n.do)
		<-ended
	})
	return n
}

// run runs a function in the namespace. What it starts or opens stays in there.
func (n *Network) run(f func()) {
	done := make(chan struct{})
	n.do <- func() {
		defer close(done)
		f()
	}
	<-done
}

// Serve serves HTTP at an address of the namespace until the test ends.
func (n *Network) Serve(t testing.TB, address string, handler http.Handler) {
	t.Helper()
	var l net.Listener
	var err error
	n.run(func() { l, err = net.Listen("tcp", address) })
	must(t, err)
	s := &http.Server{Handler: handler}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Close()
		<-ended
	})
}
