package harness

import (
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
)

// Ports of tests are below those that Linux gives to whoever asks for any
// (net.ipv4.ip_local_port_range), of which each connection takes one.
const firstPort, lastPort = 10_000, 32_767

// FreeAddress returns an address on loopback on which nothing listens. It is the
// test's until that ends: no other test is given it, of whatever process.
func FreeAddress(t testing.TB) string {
	t.Helper()
	for range 1000 {
		address := fmt.Sprintf("127.0.0.1:%d", firstPort+rand.IntN(lastPort-firstPort+1))
		claim, err := net.Listen("unix", "@hallmark-test-"+address)
		if err != nil {
			continue // another test's
		}
		if l, err := net.Listen("tcp", address); err == nil {
			l.Close()
			t.Cleanup(func() { claim.Close() })
			return address
		}
		claim.Close()
	}
	t.Fatal("no port is free")
	return ""
}
