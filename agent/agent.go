// Package agent is the node's side of a trust domain: it proves what its node
// is, holds the identities that are its node's to give, and gives them to
// processes.
//
// [Run] puts it together from its parts and runs it: the node's own identity
// and its connection to the server (node), the push stream (feed), what is
// held and signed (held), the attestation of processes (workload), and the
// sockets in front (workloadapi, admin, broker). [Check] checks a configuration
// ([Config]).
package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/agent/admin"
	"github.com/hallmark-id/hallmark/agent/broker"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/feed"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/metrics"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/workload"
	"github.com/hallmark-id/hallmark/agent/workloadapi"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/loglevel"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/pkg/version"
)

// Check checks a configuration. It starts nothing.
func Check(src config.Source) error {
	_, err := load(src)
	return err
}

// Run runs an agent until the context ends (nil) or it cannot go on without
// its operator: the error says what to do. It calls ready once all sockets
// are there; processes that come before the node has its identity, or before
// the server has said what it is authorized for, are told to try again. It logs
// to the standard error.
func Run(ctx context.Context, src config.Source, ready func()) error {
	began := time.Now()
	s, err := load(src)
	if err != nil {
		return err
	}
	configured, err := s.Log.ParseLevel()
	if err != nil {
		return err
	}
	level := loglevel.New(configured)
	log, err := s.Log.LoggerAt(os.Stderr, level)
	if err != nil {
		return err
	}
	measured := telemetry.NewRegistry()
	counted := metrics.New(measured)
	watched, err := telemetry.Open(telemetry.Options{Config: s.Telemetry, Registry: measured, Log: log})
	if err != nil {
		return err
	}
	defer watched.Close()
	traces, err := telemetry.OpenTraces(telemetry.TracesOptions{
		Config: s.Telemetry.Traces, Service: "hallmark-agent", TrustDomain: s.td.Name(), Log: log,
	})
	if err != nil {
		return err
	}
	defer traces.Close()
	var h *held.Held
	n, err := node.Open(node.Options{
		TrustDomain: s.td,
		Server:      s.Server, OtherServers: s.OtherServers,
		Dir:         s.DataDir,
		TPM:         s.NodeKey.tpm(),
		Attestor:    s.node,
		TrustBundle: s.trust,
		Join:        s.join,
		Insecure:    s.InsecureBootstrap,
		NextExpiry:  func() time.Time { return h.NextExpiry() },
		Log:         log,
		Traces:      traces,
	})
	if err != nil {
		return err
	}
	defer n.Close()
	workloads, err := listen("socket", s.Socket, workloadapi.SocketMode)
	if err != nil {
		return err
	}
	defer workloads.Close()
	mode := os.FileMode(admin.SocketMode)
	if len(s.delegates) > 0 {
		mode = admin.DelegatesSocketMode
	}
	operators, err := listen("admin_socket", s.AdminSocket, mode)
	if err != nil {
		return err
	}
	defer operators.Close()
	var brokers net.Listener
	if len(s.brokers) > 0 {
		if brokers, err = listen("broker.socket", s.Broker.Socket, broker.SocketMode); err != nil {
			return err
		}
		defer brokers.Close()
	}

	h = held.New(held.Options{TrustDomain: s.td, Signer: n, Limit: s.HeldSVIDs, Log: log, Metrics: counted, Traces: traces})
	f := feed.New(feed.Options{TrustDomain: s.td, Node: n, Held: h, Log: log})
	attestor := workload.New(workload.Options{Attestors: s.workloads, Log: log, Metrics: counted})
	api := workloadapi.New(workloadapi.Options{
		Listener: workloads, Held: h, Attestor: attestor, Limits: s.Limits.endpoint(),
		WIT: s.Experimental.WIT, Log: log, Metrics: counted, Traces: traces,
	})
	console := admin.New(admin.Options{
		Listener: operators, TrustDomain: s.td, Server: s.Server, Held: h, Attestor: attestor, Log: log,
		LogLevel: level, Delegates: s.delegates, Limits: s.Limits.endpoint(), Traces: traces,
		Connection: func() admin.Connection {
			c := connection(n.Status(), f.Status())
			c.Chain, c.Authorities = n.Chain(), n.Authorities()
			return c
		},
	})
	serve := []server{api, console}
	if brokers != nil {
		log.Warn("the Broker API is on; its standard may still change", "socket", s.Broker.Socket)
		serve = append(serve, broker.New(broker.Options{
			Listener: brokers, TrustDomain: s.td, Identity: n, Held: h, Attestor: attestor, Policies: s.brokers,
			Limits: s.Limits.endpoint(), Log: log, Metrics: counted, Traces: traces,
		}))
	}

	// What serves ends first; what it stands on, after it.
	base, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	below, base := errgroup.WithContext(base)
	below.Go(func() error {
		err := n.Run(base)
		if errors.Is(err, node.ErrBanned) {
			// At once, before anything is wound down.
			h.Apply(held.Change{Complete: true})
			log.Error("this agent was banned; nothing is served any more", "error", err)
		}
		return err
	})
	for _, p := range s.plugins {
		below.Go(func() error {
			p.Run(base, log)
			return nil
		})
	}
	below.Go(func() error { return f.Run(base) })
	below.Go(func() error { return h.Run(base) })

	serving, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(base, func() { end(context.Cause(base)) })()
	above, serving := errgroup.WithContext(serving)
	for _, one := range serve {
		above.Go(func() error { return one.Run(serving) })
	}
	above.Go(func() error {
		s.follow(serving, src, func(l endpoint.Limits) {
			for _, one := range serve {
				one.SetLimits(l)
			}
		}, level, log)
		return nil
	})

	metrics.RegisterState(measured, func() metrics.State { return state(h, n, f) })
	watched.Ready(func(context.Context) error { return readiness(ctx, connection(n.Status(), f.Status())) })
	log.Info("agent is ready", "trust_domain", s.td.Name(), "server", s.Server, "socket", s.Socket,
		"admin_socket", s.AdminSocket, "version", version.String(), "took", time.Since(began).Round(time.Millisecond))
	ready()
	err = above.Wait()
	stop()
	if failed := below.Wait(); failed != nil && !errors.Is(failed, context.Canceled) {
		return failed
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		log.Info("agent has stopped")
		return nil
	}
	return err
}

// server serves one socket.
type server interface {
	Run(context.Context) error
	SetLimits(endpoint.Limits)
}

// connection is how the agent stands with its server: in step, or the reason
// that comes first.
func connection(n node.Status, f feed.Status) admin.Connection {
	c := admin.Connection{AgentID: n.ID, SVIDExpiresAt: n.ExpiresAt, Server: n.Server, Connected: f.InStep, SyncedAt: f.SyncedAt, LastError: n.LastError}
	if c.LastError == nil {
		c.LastError = f.LastError
	}
	return c
}

// listen listens on a socket that the configuration names by key.
func listen(key, path string, mode os.FileMode) (net.Listener, error) {
	l, err := peercred.Listen(path, mode)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", key, err)
	}
	return l, nil
}
