package httpchallenge

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/attestors"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// AllowedDNSPatterns are regular expressions, in Go's syntax, of the names that
	// may attest. A name matches as a whole. Required.
	AllowedDNSPatterns []string `yaml:"allowed_dns_patterns"`
	// RequiredPort is the one port that agents may listen at. Default: any that
	// allow_non_root_ports allows.
	RequiredPort int `yaml:"required_port"`
	// AllowNonRootPorts lets agents listen at ports from 1024 on, where every
	// process of the node may. Default false.
	AllowNonRootPorts bool `yaml:"allow_non_root_ports"`
	// AllowReattestation lets a name attest that has an agent already. It excludes
	// ports from 1024 on. Default: a name attests once, until its agent is evicted.
	AllowReattestation bool `yaml:"allow_reattestation"`
	// Networks are the networks in which nodes are, like 10.1.0.0/16. A name that
	// has another address is not asked there. Default: all public addresses; none
	// of private networks, of the server's host, or of metadata services.
	Networks []string `yaml:"networks"`
	// Resolver is the server of the DNS, IP address and port, that names are looked
	// up with. Default: that of the operating system, and its file of hosts.
	Resolver string `yaml:"resolver" env:"expand"`
}

const (
	maxListed    = 1000 // of each list; more is a mistake in writing
	maxPattern   = 1 << 10
	maxAddresses = 4 // of a name, that are asked
	maxRunning   = 32
	logged       = 10 // failures, before it is one a second

	// fetchTime is how long looking up the name and asking it may take.
	fetchTime = 10 * time.Second
	// nonceSize is bytes of a nonce; what is served is it in base64, and white space.
	nonceSize = 32
	maxBody   = 64
)

// Options of [New].
type Options struct {
	Log *slog.Logger // nil is silent
}

// Server is the half on the server.
type Server struct {
	c        ServerConfig
	log      *slog.Logger
	names    []*regexp.Regexp
	networks []netip.Prefix // none: all that is public
	resolver *net.Resolver
	running  *semaphore.Weighted
	loud     rate.Sometimes // why names did not answer
}

var _ attestors.Server = (*Server)(nil)

// New makes the server's half. It fails if the configuration makes no sense.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{
		c: c, log: o.Log, resolver: net.DefaultResolver,
		running: semaphore.NewWeighted(maxRunning), loud: rate.Sometimes{First: logged, Interval: time.Second},
	}
	for name, n := range map[string]int{"allowed_dns_patterns": len(c.AllowedDNSPatterns), "networks": len(c.Networks)} {
		if n > maxListed {
			return nil, fmt.Errorf("%s has %d items; the most is %d", name, n, maxListed)
		}
	}
	switch {
	case len(c.AllowedDNSPatterns) == 0:
		return nil, errors.New(`allowed_dns_patterns is missing; write which names may attest, like 'p[0-9]+\.example\.com', as anybody can have one of their own`)
	case c.RequiredPort < 0 || c.RequiredPort > maxPort:
		return nil, fmt.Errorf("required_port is %d; it is between 1 and %d", c.RequiredPort, maxPort)
	case c.RequiredPort >= rootPorts && !c.AllowNonRootPorts:
		return nil, fmt.Errorf("required_port is %d, where every process may listen; set allow_non_root_ports, or a port below %d", c.RequiredPort, rootPorts)
	case c.AllowReattestation && c.AllowNonRootPorts && (c.RequiredPort == 0 || c.RequiredPort >= rootPorts):
		return nil, errors.New("allow_reattestation and allow_non_root_ports exclude each other: every process of a node could become its agent; remove one of the two")
	}
	for _, text := range c.AllowedDNSPatterns {
		if text == "" || len(text) > maxPattern {
			return nil, fmt.Errorf("allowed_dns_patterns has one of %d bytes; it has between 1 and %d", len(text), maxPattern)
		}
		if _, err := regexp.Compile(text); err != nil {
			return nil, fmt.Errorf("allowed_dns_patterns: %w", err)
		}
		s.names = append(s.names, regexp.MustCompile(`^(?:`+text+`)$`))
	}
	for _, text := range c.Networks {
		n, err := netip.ParsePrefix(text)
		if err != nil || n != n.Masked() || n.Addr().Is4In6() {
			return nil, fmt.Errorf("networks has %q; write a network like 10.1.0.0/16", text)
		}
		s.networks = append(s.networks, n)
	}
	if c.Resolver != "" {
		at, err := netip.ParseAddrPort(c.Resolver)
		if err != nil || at.Port() == 0 {
			return nil, fmt.Errorf("resolver is %q; write IP address and port, like 10.0.0.53:53", c.Resolver)
		}
		s.resolver = &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, at.String())
		}}
	}
	return s, nil
}

// Verify asks the node at its name for the nonce that it was told.
func (s *Server) Verify(ctx context.Context, data []byte, ask func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	p, err := parsePayload(data)
	if err != nil {
		return nil, err
	}
	switch {
	case !slices.ContainsFunc(s.names, func(r *regexp.Regexp) bool { return r.MatchString(p.HostName) }):
		return nil, fmt.Errorf("%s may not attest here", p.HostName)
	case s.c.RequiredPort != 0 && p.Port != s.c.RequiredPort:
		return nil, fmt.Errorf("port %d may not be used here; it is %d", p.Port, s.c.RequiredPort)
	case p.Port >= rootPorts && !s.c.AllowNonRootPorts:
		return nil, fmt.Errorf("port %d may not be used here; listen at one below %d", p.Port, rootPorts)
	}
	random := make([]byte, nonceSize)
	rand.Read(random) // never fails
	nonce := base64.URLEncoding.EncodeToString(random)
	c, err := json.Marshal(challenge{nonce})
	if err != nil {
		return nil, err
	}
	if _, err := ask(ctx, c); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	if err := s.running.Acquire(ctx, 1); err != nil {
		s.loud.Do(func() {
			s.log.Error("http_challenge cannot attest nodes now", "error", fmt.Sprintf("%d earlier attestations are not finished", maxRunning))
		})
		return nil, attestors.ErrUnavailable
	}
	defer s.running.Release(1)
	if err := s.fetch(ctx, p, nonce); err != nil {
		// The node is nobody yet: what there is to find at that name, it does not learn.
		s.loud.Do(func() {
			s.log.Warn("a node did not serve its nonce", "attestor", Name, "hostname", p.HostName, "port", p.Port, "error", err)
		})
		return nil, fmt.Errorf("nonce was not at http://%s%s; the server's log says why", net.JoinHostPort(p.HostName, strconv.Itoa(p.Port)), path(p.AgentName))
	}
	return &attestors.Evidence{
		Path:        Name + "/" + p.HostName,
		Selectors:   attestors.SelectorsOf(Name, []string{"hostname:" + p.HostName}),
		CanReattest: s.c.AllowReattestation,
		Once:        !s.c.AllowReattestation,
	}, nil
}

// fetch asks the node, at one of the addresses that its name has. What is
// connected to is what was looked at: the name is looked up once.
func (s *Server) fetch(ctx context.Context, p *payload, nonce string) error {
	all, err := s.resolver.LookupNetIP(ctx, "ip", p.HostName+".") // the dot keeps it from being looked up below the server's own domain
	if err != nil {
		return err
	}
	var addresses []netip.Addr
	var refused []string
	for _, addr := range all {
		if addr = addr.Unmap(); s.allowed(addr) {
			addresses = append(addresses, addr)
		} else {
			refused = append(refused, addr.String())
		}
	}
	if len(addresses) == 0 {
		return fmt.Errorf("it has no address that may be asked, but %s; networks lists those of nodes", attestors.Clip(strings.Join(refused, ", ")))
	}
	err = nil
	for _, addr := range addresses[:min(len(addresses), maxAddresses)] {
		one := s.fetchAt(ctx, netip.AddrPortFrom(addr, uint16(p.Port)), p, nonce)
		if one == nil {
			return nil
		}
		err = errors.Join(err, fmt.Errorf("%s: %w", addr, one))
	}
	return err
}

func (s *Server) fetchAt(ctx context.Context, at netip.AddrPort, p *payload, nonce string) error {
	client := &http.Client{
		Transport: &http.Transport{ // and no proxy
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", at.String())
			},
			DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(p.HostName, strconv.Itoa(p.Port))+path(p.AgentName), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("it answered with status %d", resp.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxBody+1))
	if err != nil {
		return err
	}
	if len(body) > maxBody || subtle.ConstantTimeCompare([]byte(strings.TrimSpace(string(body))), []byte(nonce)) != 1 {
		return errors.New("it answered with something else than the nonce")
	}
	return nil
}

// special are addresses that are nobody's own on the internet, besides those that
// [netip.Addr] knows of. IANA's registries of special-purpose addresses.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),   // shared by carriers
	netip.MustParsePrefix("192.0.0.0/24"),    // of protocols
	netip.MustParsePrefix("192.0.2.0/24"),    // of documentation, here and below
	netip.MustParsePrefix("198.18.0.0/15"),   // of benchmarks
	netip.MustParsePrefix("198.51.100.0/24"), //
	netip.MustParsePrefix("203.0.113.0/24"),  //
	netip.MustParsePrefix("240.0.0.0/4"),     // reserved, and broadcast
	netip.MustParsePrefix("::/96"),           // an IPv4 address within, here and below
	netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("100::/64"), // of nobody
	netip.MustParsePrefix("2001::/23"),
	netip.MustParsePrefix("2001:db8::/32"),
	netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("fec0::/10"),
}

// allowed reports whether a node may be at an address. With a zone it is of one of
// the server's own links, and never is.
func (s *Server) allowed(addr netip.Addr) bool {
	within := func(n netip.Prefix) bool { return n.Contains(addr) }
	switch {
	case addr.Zone() != "":
		return false
	case len(s.networks) > 0:
		return slices.ContainsFunc(s.networks, within)
	}
	return addr.IsGlobalUnicast() && !addr.IsPrivate() && !slices.ContainsFunc(special, within)
}
