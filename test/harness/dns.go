package harness

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// DNS is a server of the DNS on loopback, which knows the addresses of some names.
type DNS struct {
	Address string

	mu    sync.Mutex
	names map[string][]netip.Addr
	asked map[string]int
}

// NewDNS starts one that knows nothing, in a network; nil is that of the test.
func NewDNS(t testing.TB, network *Network) *DNS {
	t.Helper()
	d := &DNS{names: make(map[string][]netip.Addr), asked: make(map[string]int)}
	var conn net.PacketConn
	var err error
	open := func() { conn, err = net.ListenPacket("udp", "127.0.0.1:0") }
	if network != nil {
		network.run(open)
	} else {
		open()
	}
	must(t, err)
	d.Address = conn.LocalAddr().String()
	served := make(chan struct{})
	go func() {
		defer close(served)
		buf := make([]byte, 1<<10)
		for {
			n, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			if answer, err := d.answer(buf[:n]); err == nil {
				_, _ = conn.WriteTo(answer, from)
			}
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-served
	})
	return d
}

// Set gives a name its addresses.
func (d *DNS) Set(name string, addresses ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.names[name] = nil
	for _, a := range addresses {
		d.names[name] = append(d.names[name], netip.MustParseAddr(a))
	}
}

// Asked is how often a name was looked up, of any type.
func (d *DNS) Asked(name string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.asked[name]
}

func (d *DNS) answer(query []byte) ([]byte, error) {
	var p dnsmessage.Parser
	header, err := p.Start(query)
	if err != nil {
		return nil, err
	}
	q, err := p.Question()
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	name := strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))
	d.asked[name]++
	addresses, known := d.names[name]
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: header.ID, Response: true, Authoritative: true, RecursionAvailable: true},
		Questions: []dnsmessage.Question{q},
	}
	if !known {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range addresses {
		r := dnsmessage.Resource{Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}}
		switch {
		case q.Type == dnsmessage.TypeA && a.Is4():
			r.Body = &dnsmessage.AResource{A: a.As4()}
		case q.Type == dnsmessage.TypeAAAA && a.Is6():
			r.Body = &dnsmessage.AAAAResource{AAAA: a.As16()}
		default:
			continue
		}
		m.Answers = append(m.Answers, r)
	}
	return m.Pack()
}
