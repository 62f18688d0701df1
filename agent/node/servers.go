package node

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

const (
	serversFile = "servers" // what the server said where the others are; a line each

	MaxServers = 64  // that the node knows, and addresses of one name
	maxAddress = 255 // characters of one

	// lookupTimeout bounds what a name's addresses are waited for.
	lookupTimeout = 5 * time.Second
	// hopTimeout bounds TCP while there is another server to try: one that is gone
	// without a word does not keep the node from the next. A handshake has its
	// time in any case: when all agents of a server come to the others, it waits
	// there for its turn, and to give it up would only make another.
	hopTimeout = 2 * time.Second
	// moveWithin is how long the agents of other servers take to come to one that
	// is new, all together: their handshakes are work for it.
	moveWithin = 30 * time.Second
)

// target is one server to connect to.
type target struct {
	name    string // host:port as it was configured or told
	address string // host:port to dial; an address of that name
	last    bool   // there is none to try after it
}

func (t target) String() string {
	if t.name == t.address {
		return t.name
	}
	return t.name + " (" + t.address + ")"
}

// CheckAddress checks that a node can dial an address.
func CheckAddress(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%.80q is not host:port, for example hallmark.example.org:8081", address)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%q has no port between 1 and 65535", address)
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		return fmt.Errorf("%q names no host; write the name or the IP address of the server's machine", address)
	}
	if len(address) > maxAddress {
		return fmt.Errorf("%.80q… is %d characters long; the most is %d", address, len(address), maxAddress)
	}
	return nil
}

// SetServers tells the node where the servers of the trust domain are, as the
// one that it is connected to says. It keeps them for when that one is away,
// beside those that are configured, also over a restart.
//
// When one has come, or come back, the node goes to it with the chance that makes
// the servers' shares equal: one in as many as there are. It does so some time
// later, and keeps its connection until it has the other.
func (n *Node) SetServers(s *hallmarkv1.Servers) {
	var known []string
	for _, a := range s.GetAddresses() {
		if err := CheckAddress(a); err != nil {
			n.o.Log.Warn("server told of one that cannot be reached", "error", err)
			continue
		}
		known = append(known, a)
	}
	known = known[:min(len(known), MaxServers)]
	n.mu.Lock()
	same := slices.Equal(known, n.servers)
	n.servers = known
	came := n.arrival > 0 && s.GetArrival() > n.arrival && slices.Contains(known, s.GetLast())
	n.arrival = max(n.arrival, s.GetArrival())
	n.mu.Unlock()
	if came && rand.N(len(known)) == 0 {
		time.AfterFunc(rand.N(moveWithin), func() {
			select {
			case n.moves <- s.GetLast():
			default: // about to move already
			}
		})
	}
	if same {
		return
	}
	n.o.Log.Info("the trust domain's servers", "addresses", known)
	if err := n.dir.write(serversFile, []byte(strings.Join(known, "\n"))); err != nil {
		n.o.Log.Error("could not save where the servers are; after a restart the node knows those of its configuration", "error", err)
	}
}

// loadServers takes over where the servers were when the node last ran.
func (n *Node) loadServers() error {
	data, err := n.dir.read(serversFile)
	if err != nil {
		return err
	}
	for line := range strings.FieldsSeq(string(data)) {
		if CheckAddress(line) == nil && len(n.servers) < MaxServers {
			n.servers = append(n.servers, line)
		}
	}
	return nil
}

// targets returns the servers that may be tried, each address of a name for
// itself, in the order to try them: the one that the node stays with, if there
// is one, the others in any order, so that agents spread over them, and last
// the one that it has just left.
func (n *Node) targets(ctx context.Context) []target {
	n.mu.Lock()
	names := append(append([]string{n.o.Server}, n.o.OtherServers...), n.servers...)
	n.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	var all []target
	seen := make(map[string]bool)
	for _, name := range names {
		for _, address := range n.addresses(ctx, name) {
			if !seen[address] {
				seen[address] = true
				all = append(all, target{name: name, address: address})
			}
		}
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	place := func(t target) int {
		switch {
		case t.address == n.stay || t.name == n.stay:
			return 0
		case t.address == n.left:
			return 2
		}
		return 1
	}
	slices.SortStableFunc(all, func(a, b target) int { return place(a) - place(b) })
	all[len(all)-1].last = true // at least Server is there
	return all
}

// addresses returns those of a name. One that cannot be looked up is dialed as
// it is, which says why not.
func (n *Node) addresses(ctx context.Context, name string) []string {
	host, port, _ := net.SplitHostPort(name)
	if _, err := netip.ParseAddr(host); err == nil || n.o.Lookup == nil {
		return []string{name}
	}
	found, err := n.o.Lookup(ctx, host)
	if err != nil || len(found) == 0 {
		return []string{name}
	}
	var out []string
	for _, ip := range found[:min(len(found), MaxServers)] {
		out = append(out, net.JoinHostPort(ip, port))
	}
	return out
}

// reach tries one server after the other until do has made a link.
func (n *Node) reach(ctx context.Context, do func(context.Context, target) (*Link, error)) (*Link, error) {
	var failed error
	targets := n.targets(ctx)
	for _, to := range targets {
		l, err := inTime(ctx, to, do)
		if err == nil {
			n.stay, n.left = to.address, ""
			l.others = len(targets) > 1
			return l, nil
		}
		err = fmt.Errorf("connect to server %s: %w", to, err)
		if failed == nil {
			failed = err
		} else {
			failed = fmt.Errorf("%w; %w", failed, err)
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, failed
}

func inTime(ctx context.Context, to target, do func(context.Context, target) (*Link, error)) (*Link, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return do(ctx, to)
}

// leave has the node try other servers first, as the one of a link is of no use
// to it now.
func (n *Node) leave(l *Link) { n.stay, n.left = "", l.to.address }

// several reports whether there may be another server than that of a link.
func (n *Node) several(l *Link) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return l.others || slices.ContainsFunc(n.servers, func(told string) bool { return told != l.to.name && told != l.to.address })
}
