// Package telemetry lets an operator's monitoring see how a program is: its
// metrics, whether it lives, and whether it is ready.
//
// [Open] starts a [Server] of HTTP on the address of a [Config]:
//
//	/metrics       the metrics of one registry, as Prometheus reads them
//	/live          200 as long as the process answers
//	/ready         200, or 503 with the reason in JSON
//	/debug/pprof/  profiles, if the configuration allows them
//
// There is no authentication, and metrics are no secrets; profiles may be, so
// they are served to this machine only. [Calls] counts the calls of a gRPC
// server. [OpenTraces] exports where the time of a call went.
package telemetry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Config is the part "telemetry" of a configuration.
type Config struct {
	// Listen is the host:port on which metrics and health are served over HTTP,
	// to whoever can reach it. Default: none, they are not served.
	Listen string `yaml:"listen" env:"expand"`
	// PProf serves Go's profiles below /debug/pprof/ as well. They show what is
	// in the memory of the process, so listen must be a loopback address then.
	PProf bool `yaml:"pprof"`
	// Traces says where traces go. Default: nowhere.
	Traces TracesConfig `yaml:"traces"`
}

// Check finds what cannot be meant. It tells wrong the key, below "telemetry.",
// and what is the matter with it.
func (c Config) Check(wrong func(key, format string, args ...any)) {
	c.Traces.check(wrong)
	if c.Listen == "" {
		if c.PProf {
			wrong("pprof", "pprof is on, but telemetry.listen is not set; set it to an address like 127.0.0.1:9988")
		}
		return
	}
	host, port, err := net.SplitHostPort(c.Listen)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		wrong("listen", "telemetry.listen: %v; write host:port, for example 127.0.0.1:9988", err)
		return
	}
	if ip, _ := netip.ParseAddr(host); c.PProf && !ip.Unmap().IsLoopback() {
		wrong("pprof", "pprof is on, but telemetry.listen %s is not a loopback address: profiles show what is in memory; listen on 127.0.0.1:%s or turn pprof off", c.Listen, port)
	}
}

// NewRegistry makes the registry of one program's metrics. It has those of Go's
// runtime and of the process already.
func NewRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// Bounds of the HTTP server. Monitoring comes a few times a minute.
const (
	headerTime     = 5 * time.Second  // for the headers of a request to come
	readTime       = 10 * time.Second // for a request to come
	writeTime      = 30 * time.Second // for an answer to leave
	profileTime    = 3 * time.Minute  // the same where there are profiles: they take as long as was asked
	idleTime       = 2 * time.Minute  // of a connection without requests
	maxHeader      = 8 << 10          // bytes
	maxConnections = 32
	maxGathering   = 4                // of /metrics at once; 503 beyond
	gatherTime     = 10 * time.Second // for /metrics
	readyTime      = 2 * time.Second  // for the answer to whether the program is ready
	stopTime       = time.Second      // for requests to end when the program does
)

// ErrStarting is why a program is not ready until it said how to find out.
var ErrStarting = errors.New("it is starting")

// Server serves metrics and health.
type Server struct {
	http    *http.Server // nil: nothing is served
	address net.Addr
	serving sync.WaitGroup
	log     *slog.Logger

	mu    sync.Mutex
	ready func(context.Context) error // nil: starting
	warn  func() []string             // nil: nothing
}

// Options of [Open].
type Options struct {
	Config   Config
	Registry prometheus.Gatherer
	Log      *slog.Logger // nil is silent
}

// Open starts to serve. Whoever calls it closes the server. With nothing to
// listen on, it does nothing, and neither do the server's methods.
func Open(o Options) (*Server, error) {
	s := &Server{log: o.Log}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if o.Config.Listen == "" {
		return s, nil
	}
	l, err := net.Listen("tcp", o.Config.Listen)
	if err != nil {
		return nil, fmt.Errorf("telemetry: %w; choose another address for telemetry.listen", err)
	}
	s.address = l.Addr()
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(s.log.Handler(), slog.LevelError),
		MaxRequestsInFlight: maxGathering,
		Timeout:             gatherTime,
	}))
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, health{Live: new(true)})
	})
	mux.HandleFunc("GET /ready", s.serveReady)
	write := writeTime
	if o.Config.PProf {
		write = profileTime
		mux.HandleFunc("GET /debug/pprof/", pprof.Index) // the named ones, too
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	s.http = &http.Server{
		Handler:           http.MaxBytesHandler(mux, 0), // no request has a body
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       readTime,
		WriteTimeout:      write,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	s.serving.Go(func() {
		// The program's work is more than to be watched: it goes on without.
		if err := s.http.Serve(netutil.LimitListener(l, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("metrics and health are not served any more", "error", err)
		}
	})
	s.log.Info("metrics and health are served", "url", "http://"+s.address.String()+"/metrics", "pprof", o.Config.PProf)
	return s, nil
}

// Address returns the address that is listened on; nil: none.
func (s *Server) Address() net.Addr { return s.address }

// Ready says how to find out whether the program is ready: why it is not, or
// nil. The error is shown to whoever asks. The context ends after a short
// while.
func (s *Server) Ready(ready func(context.Context) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready = ready
}

// Warn says how to find out what is wrong with a program that is ready all the same.
// It is shown to whoever asks.
func (s *Server) Warn(warn func() []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.warn = warn
}

// Close stops the server and waits for it.
func (s *Server) Close() error {
	if s.http == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
	s.serving.Wait()
	return nil
}

// health is the answer of /live and /ready.
type health struct {
	Live   *bool  `json:"live,omitempty"`
	Ready  *bool  `json:"ready,omitempty"`
	Reason string `json:"reason,omitempty"` // why not

	Warnings []string `json:"warnings,omitempty"` // what is wrong all the same
}

func (s *Server) serveReady(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	ready, warn := s.ready, s.warn
	s.mu.Unlock()
	err := ErrStarting
	if ready != nil {
		ctx, cancel := context.WithTimeout(r.Context(), readyTime)
		defer cancel()
		err = ready(ctx)
	}
	if err != nil {
		answer(w, http.StatusServiceUnavailable, health{Ready: new(false), Reason: err.Error()})
		return
	}
	h := health{Ready: new(true)}
	if warn != nil {
		h.Warnings = warn()
	}
	answer(w, http.StatusOK, h)
}

func answer(w http.ResponseWriter, code int, h health) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(h) // an error means that nobody reads it
}
