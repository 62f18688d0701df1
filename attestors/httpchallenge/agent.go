package httpchallenge

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"github.com/hallmark-id/hallmark/attestors"
)

// AgentConfig is the configuration of the half on the node.
type AgentConfig struct {
	// Hostname is the node's name in the DNS, in lower case. Default: the name that
	// the operating system has for the host.
	Hostname string `yaml:"hostname" env:"expand"`
	// Agentname tells several agents apart that are behind one port: at most 32
	// letters, digits and -. Default: default.
	Agentname string `yaml:"agentname"`
	// Port is where the agent listens while it attests. Default: any that is free,
	// which servers allow that allow ports from 1024 on.
	Port int `yaml:"port"`
	// AdvertisedPort is where the server asks, if a proxy hands on what comes there.
	// Default: port.
	AdvertisedPort int `yaml:"advertised_port"`
	// Address is the IP address at which the agent listens. Default: all.
	Address string `yaml:"address"`
}

const (
	serveTimeout   = 5 * time.Second // for a request, and for its answer
	maxConnections = 16              // at once
	maxHeader      = 8 << 10         // bytes
)

// Agent is the half on the node.
type Agent struct {
	config AgentConfig

	mu       sync.Mutex
	listener net.Listener // of the last proof; nil once it was answered
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It does not listen yet.
func NewAgent(c AgentConfig) (*Agent, error) {
	if c.Hostname == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("hostname is missing, and the operating system has none: %w", err)
		}
		c.Hostname = strings.TrimSuffix(strings.ToLower(name), ".")
	}
	if c.Agentname == "" {
		c.Agentname = defaultAgent
	}
	if err := checkHost(c.Hostname); err != nil {
		return nil, err
	}
	if err := checkAgent(c.Agentname); err != nil {
		return nil, err
	}
	for name, port := range map[string]int{"port": c.Port, "advertised_port": c.AdvertisedPort} {
		if port < 0 || port > maxPort {
			return nil, fmt.Errorf("%s is %d; it is between 1 and %d", name, port, maxPort)
		}
	}
	if c.Address != "" {
		if _, err := netip.ParseAddr(c.Address); err != nil {
			return nil, fmt.Errorf("address is %q; write an IP address", c.Address)
		}
	}
	return &Agent{config: c}, nil
}

// Proof listens, until the context ends, and says where.
func (a *Agent) Proof(ctx context.Context) ([]byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.listener != nil {
		a.listener.Close()
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", net.JoinHostPort(a.config.Address, strconv.Itoa(a.config.Port)))
	if err != nil {
		return nil, fmt.Errorf("listen for the server's request: %w", err)
	}
	context.AfterFunc(ctx, func() { l.Close() })
	a.listener = l
	port := a.config.AdvertisedPort
	if port == 0 {
		port = l.Addr().(*net.TCPAddr).Port
	}
	return json.Marshal(payload{HostName: a.config.Hostname, AgentName: a.config.Agentname, Port: port})
}

// Respond serves the server's nonce until the context ends.
func (a *Agent) Respond(ctx context.Context, data []byte) ([]byte, error) {
	a.mu.Lock()
	l := a.listener
	a.listener = nil
	a.mu.Unlock()
	if l == nil {
		return nil, errors.New("server sent a challenge that follows no proof; http_challenge has one for each")
	}
	var c challenge
	if len(data) > maxChallenge || json.Unmarshal(data, &c) != nil || !nonceForm.MatchString(c.Nonce) {
		l.Close()
		return nil, errors.New("server's challenge is no nonce of 16 to 64 letters, digits, -, _ and =")
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+path(a.config.Agentname), func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		io.WriteString(w, c.Nonce+"\n")
	})
	server := &http.Server{
		Handler: mux, ReadTimeout: serveTimeout, WriteTimeout: serveTimeout, IdleTimeout: serveTimeout, MaxHeaderBytes: maxHeader,
	}
	context.AfterFunc(ctx, func() { server.Close() })
	go server.Serve(netutil.LimitListener(l, maxConnections)) // ends with the context
	return []byte("\n"), nil                                  // SPIRE's server wants something
}
