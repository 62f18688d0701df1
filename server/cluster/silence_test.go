package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestConnectionsBetweenMembersEndWhenNothingComesBack runs two members in this
// process, so that it has both ends of what they talk over. That the kernel then
// ends a silent connection is what TestChaos shows.
func TestConnectionsBetweenMembersEndWhenNothingComesBack(t *testing.T) {
	first := options(t, "one")
	one, err := Start(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	second, s := options(t, "two"), memory(t)
	secret, _, err := Invite(t.Context(), s, time.Now(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one.Admit(t.Context(), s, secret, "two", second.Advertise, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(second.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(second.saveCA(one.ca), writeFile(second.membersFile(), fmt.Appendf(nil, "one=https://%s,two=https://%s", first.Advertise, second.Advertise))); err != nil {
		t.Fatal(err)
	}
	two, err := Start(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	defer two.Close()

	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	theirs, err := net.Dial("tcp", other.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()

	harness.Eventually(t, "connections that are not silent for ever", func(context.Context) error {
		if err := errors.Join(one.endSilent(), two.endSilent()); err != nil {
			return err
		}
		for _, at := range []string{first.Listen, second.Listen} {
			waits := patienceAt(t, at)
			// Each member dials the other, and both ends are here.
			if len(waits) < 2 {
				return fmt.Errorf("at %s there are %d ends of connections", at, len(waits))
			}
			for _, wait := range waits {
				if wait != silence {
					return fmt.Errorf("at %s one waits %v", at, wait)
				}
			}
		}
		return nil
	})
	for _, wait := range patienceAt(t, other.Addr().String()) {
		if wait != 0 {
			t.Errorf("a connection of others ends after %v", wait)
		}
	}
}

// patienceAt returns how long connections of this process at an address wait for
// what is sent to be acknowledged; 0 is as long as TCP does by itself.
func patienceAt(t *testing.T, address string) (waits []time.Duration) {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		var fd int
		fmt.Sscan(f.Name(), &fd)
		here, errHere := unix.Getsockname(fd)
		there, errThere := unix.Getpeername(fd)
		if errHere != nil || errThere != nil || portOf(here) != port && portOf(there) != port {
			continue
		}
		ms, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT)
		if err == nil {
			waits = append(waits, time.Duration(ms)*time.Millisecond)
		}
	}
	return waits
}

func portOf(a unix.Sockaddr) string {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return fmt.Sprint(a.Port)
	case *unix.SockaddrInet6:
		return fmt.Sprint(a.Port)
	}
	return ""
}
