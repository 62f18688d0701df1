package harness

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// LAN is hosts of a test that reach each other over a bridge, in network
// namespaces of their own. Nothing of it is seen outside.
type LAN struct {
	prefix string // of the namespaces' names
	bridge string // the namespace that has the bridge
	hosts  int
}

var lans atomic.Int32

// NewLAN makes a network without hosts. It needs root.
func NewLAN(t testing.TB) *LAN {
	t.Helper()
	NeedRoot(t)
	NeedCommand(t, "ip")
	NeedCommand(t, "nsenter")
	NeedCommand(t, "iptables")
	n := &LAN{prefix: fmt.Sprintf("hm%d-%d", os.Getpid(), lans.Add(1))}
	n.bridge = n.prefix + "-bridge"
	n.add(t, n.bridge)
	ip(t, "-n", n.bridge, "link", "add", "br0", "type", "bridge")
	ip(t, "-n", n.bridge, "link", "set", "br0", "up")
	return n
}

// add makes a namespace, which goes with the test.
func (n *LAN) add(t testing.TB, namespace string) {
	t.Helper()
	ip(t, "netns", "add", namespace)
	t.Cleanup(func() { ip(t, "netns", "delete", namespace) })
}

// Host is a machine of a [LAN].
type Host struct {
	Address   string // IPv4, of this network only
	namespace string
	bridge    string // the namespace of the other end of its cable
	cable     string // that end
}

// Host adds one.
func (n *LAN) Host(t testing.TB) *Host {
	t.Helper()
	n.hosts++
	h := &Host{
		Address:   fmt.Sprintf("10.77.0.%d", n.hosts),
		namespace: fmt.Sprintf("%s-%d", n.prefix, n.hosts),
		bridge:    n.bridge,
		cable:     fmt.Sprintf("port%d", n.hosts),
	}
	n.add(t, h.namespace)
	ip(t, "-n", h.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", h.cable, "netns", h.bridge)
	ip(t, "-n", h.bridge, "link", "set", h.cable, "master", "br0", "up")
	ip(t, "-n", h.namespace, "address", "add", h.Address+"/24", "dev", "eth0")
	ip(t, "-n", h.namespace, "link", "set", "eth0", "up")
	ip(t, "-n", h.namespace, "link", "set", "lo", "up")
	return h
}

// On makes a command one that runs on the host.
func (h *Host) On(t testing.TB, c Command) Command {
	t.Helper()
	if c.Path == "" {
		c.Path = Binary(t)
	}
	c.Args = append([]string{"--net=/var/run/netns/" + h.namespace, c.Path}, c.Args...)
	c.Path = "nsenter" // which becomes the program: no process between
	return c
}

// Network is the host's, for commands of other users.
func (h *Host) Network(t testing.TB) *Network {
	t.Helper()
	return inNamespace(t, func() error {
		f, err := os.Open("/var/run/netns/" + h.namespace)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
	})
}

// DropPort has the host lose without a word whatever comes to a TCP port.
func (h *Host) DropPort(t testing.TB, port string) {
	t.Helper()
	h.iptables(t, "-A", "INPUT", "-p", "tcp", "--dport", port, "-j", "DROP")
}

// Drop has the host lose without a word whatever comes from another one.
func (h *Host) Drop(t testing.TB, from *Host) {
	t.Helper()
	h.iptables(t, "-A", "INPUT", "-s", from.Address, "-j", "DROP")
}

// Heal undoes every [Host.Drop] and [Host.DropPort].
func (h *Host) Heal(t testing.TB) {
	t.Helper()
	h.iptables(t, "-F", "INPUT")
}

func (h *Host) iptables(t testing.TB, args ...string) {
	t.Helper()
	command(t, "nsenter", append([]string{"--net=/var/run/netns/" + h.namespace, "iptables", "-w"}, args...)...)
}

func ip(t testing.TB, args ...string) {
	t.Helper()
	command(t, "ip", args...)
}

func command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}
