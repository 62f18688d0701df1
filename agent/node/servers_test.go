package node_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// servers are addresses at which one trust domain answers, each of which may be
// down, or silent.
type servers struct {
	dial func(context.Context, string) (net.Conn, error)

	mu     sync.Mutex
	down   map[string]bool
	silent map[string]bool
	conns  map[string][]net.Conn
	hangs  map[string]chan struct{} // closed when what an address sends arrives no more
	dialed []string
}

// spread gives a world's server several addresses.
func (w *world) spread(addresses ...string) *servers {
	s := &servers{dial: w.options.Dial, down: map[string]bool{}, silent: map[string]bool{}, conns: map[string][]net.Conn{}, hangs: map[string]chan struct{}{}}
	for _, a := range addresses {
		s.hangs[a] = make(chan struct{})
	}
	w.options.Server, w.options.OtherServers = addresses[0], addresses[1:]
	w.options.Dial = s.connect
	return s
}

func (s *servers) connect(ctx context.Context, address string) (net.Conn, error) {
	s.mu.Lock()
	s.dialed = append(s.dialed, address)
	down, silent := s.down[address], s.silent[address]
	s.mu.Unlock()
	if silent {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if down {
		return nil, errors.New("connection refused")
	}
	conn, err := s.dial(ctx, nodetest.Address)
	if err == nil {
		s.mu.Lock()
		if hangs := s.hangs[address]; hangs != nil {
			conn = &hanging{Conn: conn, hangs: hangs, closed: make(chan struct{})}
		}
		s.conns[address] = append(s.conns[address], conn)
		s.mu.Unlock()
	}
	return conn, err
}

// hanging is a connection on which nothing arrives once its server hangs.
type hanging struct {
	net.Conn
	hangs, closed chan struct{}
	once          sync.Once
}

func (h *hanging) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	select {
	case <-h.hangs:
		<-h.closed
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

func (h *hanging) Close() error {
	h.once.Do(func() { close(h.closed) })
	return h.Conn.Close()
}

// kill takes an address away, with its connections.
func (s *servers) kill(address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.down[address] = true
	for _, c := range s.conns[address] {
		c.Close()
	}
}

// tried returns the addresses that were dialed since it was last asked.
func (s *servers) tried() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.dialed
	s.dialed = nil
	return out
}

// next waits for another link than one.
func (r *running) next(t *testing.T, last *node.Link) *node.Link {
	t.Helper()
	<-last.Done()
	return r.connected(t)
}

func TestANodeGoesToAnotherServerInLessThanASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		s := w.spread("a.test:1", "b.test:1", "c.test:1")
		n := w.run(t)
		link := n.connected(t)
		for range 2 {
			server := n.Status().Server
			s.tried()
			s.kill(server)
			killed := time.Now()
			link = n.next(t, link)
			if took := time.Since(killed); took >= time.Second {
				t.Errorf("it took %v", took)
			}
			if now, tried := n.Status().Server, s.tried(); now == server || slices.Contains(tried, server) {
				t.Errorf("%s was gone; it tried %v and is at %s", server, tried, now)
			}
		}
	})
}

func TestACallGoesToAnotherServerWhenItsOwnHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
		s := w.spread("a.test:1", "b.test:1", "c.test:1")
		n := w.run(t)
		n.connected(t)
		server := n.Status().Server
		close(s.hangs[server])
		began := time.Now()
		if _, err := n.SignJWT(t.Context(), "a", []string{"x"}); err != nil {
			t.Errorf("%v", err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v", took)
		}
		if now := n.Status().Server; now == server {
			t.Errorf("it is still at %s", now)
		}
	})
}

func TestACallWaitsForAServerThatIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
		w.spread("a.test:1", "b.test:1")
		n := w.run(t)
		n.connected(t)
		server := n.Status().Server
		w.Lock()
		w.Before = func(_ context.Context, method string) error {
			if strings.HasSuffix(method, "/NewJWTSVID") {
				time.Sleep(8 * time.Second)
			}
			return nil
		}
		w.Unlock()
		if _, err := n.SignJWT(t.Context(), "a", []string{"x"}); err != nil {
			t.Errorf("%v", err)
		}
		if now := n.Status().Server; now != server {
			t.Errorf("it went from %s to %s", server, now)
		}
	})
}

func TestAConnectionOnWhichNothingComesIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		s := w.spread("a.test:1", "b.test:1")
		n := w.run(t)
		link := n.connected(t)
		client := hallmarkv1.NewFeedServiceClient(link.Conn())
		if _, err := client.Follow(t.Context()); err != nil { // as agents do for as long as they run
			t.Fatal(err)
		}
		server := n.Status().Server
		close(s.hangs[server])
		began := time.Now()
		n.next(t, link)
		if took, now := time.Since(began), n.Status().Server; now == server || took > 25*time.Second {
			t.Errorf("after %v it is at %s", took, now)
		}
	})
}

func TestNodesSpreadOverTheServers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := map[string]bool{}
		for range 60 { // that one of three is never the first has a chance of 1 in 10^10
			w := joining(t)
			w.spread("a.test:1", "b.test:1", "c.test:1")
			n := w.run(t)
			n.connected(t)
			all[n.Status().Server] = true
			n.stop()
		}
		if len(all) != 3 {
			t.Errorf("they are all at %v", all)
		}
	})
}

func TestANodeStaysWithItsServerWhenItRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.spread("a.test:1", "b.test:1", "c.test:1", "d.test:1", "e.test:1")
		n := w.run(t)
		link := n.connected(t)
		server := n.Status().Server
		for range 5 {
			if link = n.next(t, link); n.Status().Server != server {
				t.Fatalf("it went from %s to %s", server, n.Status().Server)
			}
		}
	})
}

// That of two servers one is told of only makes the node's share of the other
// all of it.
func TestANodeGoesToAServerThatHasCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		s := w.spread("a.test:1")
		n := w.run(t)
		link := n.connected(t)
		tell := func(address string, arrival int64) {
			n.SetServers(&hallmarkv1.Servers{Addresses: []string{address}, Last: address, Arrival: arrival})
		}
		stays := func(at, why string) {
			t.Helper()
			time.Sleep(time.Minute)
			synctest.Wait()
			if now := n.Status().Server; now != at {
				t.Errorf("%s: it is at %s", why, now)
			}
		}
		tell("b.test:1", 7)
		stays("a.test:1", "it was there when the node came")
		tell("b.test:1", 7)
		stays("a.test:1", "it is told of again")
		tell("b.test:1", 6)
		stays("a.test:1", "another one knew of an earlier time")
		tell("b.test:1", 8)
		stays("b.test:1", "it has come")
		<-link.Done()
		tell("b.test:1", 9)
		s.tried()
		stays("b.test:1", "it has come back")
		if tried := s.tried(); len(tried) > 0 {
			t.Errorf("it dialed %v, where it was", tried)
		}
		s.kill("a.test:1")
		tell("a.test:1", 10)
		stays("b.test:1", "it has come and gone")
	})
}

func TestEachAddressOfANameIsAServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		s := w.spread("servers.test:1")
		w.options.Lookup = func(_ context.Context, host string) ([]string, error) {
			if host != "servers.test" {
				return nil, fmt.Errorf("no such host: %s", host)
			}
			return []string{"192.0.2.1", "192.0.2.2", "2001:db8::3"}, nil
		}
		s.down["192.0.2.1:1"], s.down["[2001:db8::3]:1"] = true, true
		w.run(t).connected(t)
		if tried := s.tried(); !slices.Contains(tried, "192.0.2.2:1") {
			t.Errorf("it tried %v", tried)
		}
	})
}

func TestAServerThatIsSilentHoldsUpLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		s := w.spread("a.test:1", "b.test:1", "c.test:1")
		s.silent["a.test:1"], s.silent["b.test:1"] = true, true
		began := time.Now()
		w.run(t).connected(t)
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v past %v", took, s.tried())
		}
	})
}

func TestWhatTheServerTellsOfOthersOutlastsARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		s := w.spread("a.test:1")
		n := w.run(t)
		n.connected(t)
		n.SetServers(&hallmarkv1.Servers{Addresses: []string{"a.test:1", "told.test:1", "no port", "0.0.0.0:1", strings.Repeat("x", 300) + ":1"}})
		n.stop()
		s.kill("a.test:1")
		s.tried()
		n = w.run(t)
		n.connected(t)
		if n.Status().Server != "told.test:1" {
			t.Errorf("it is at %s", n.Status().Server)
		}
		for _, address := range s.tried() {
			if address != "a.test:1" && address != "told.test:1" {
				t.Errorf("it tried %q", address)
			}
		}
	})
}

func TestAFileOfServersThatIsDamagedIsNoObstacle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		if err := os.WriteFile(w.options.Dir+"/servers", []byte("\x00\xff :0\nb.test:70000\nhallmark"), 0o600); err != nil {
			t.Fatal(err)
		}
		w.run(t).connected(t)
	})
}

// TestANodeThatCannotRenewAtOneServerDoesAtAnother is about a server that is cut
// off from the others: it serves what it has, and can write nothing.
func TestANodeThatCannotRenewAtOneServerDoesAtAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.spread("a.test:1", "b.test:1")
		n := w.run(t)
		n.connected(t)
		cut := n.Status().Server
		w.Lock()
		w.Before = func(ctx context.Context, method string) error {
			md, _ := metadata.FromIncomingContext(ctx)
			if strings.HasSuffix(method, "/RenewAgent") && slices.Contains(md.Get(":authority"), cut) {
				return status.Error(codes.Unavailable, "no majority")
			}
			return nil
		}
		w.Unlock()
		first := n.Status().ExpiresAt
		time.Sleep(40 * time.Minute) // past the time of renewal, before the end
		synctest.Wait()
		n.connected(t)
		if s := n.Status(); !s.ExpiresAt.After(first) || s.Server == cut {
			t.Errorf("at %s it has an SVID until %v, had one until %v at %s", s.Server, s.ExpiresAt, first, cut)
		}
	})
}
