// Package server is the authority of a trust domain: it keeps the registry,
// issues identities and serves agents and operators.
//
// [Run] puts it together from its parts and runs it: the store and the
// registry folded from it, the authorities and the issuer that signs with
// them, the feed that pushes to agents, and the API in front. [Check] checks a
// configuration ([Config]), [Restore] fills an empty store from a backup.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"time"

	"go.step.sm/crypto/kms/apiv1"
	"golang.org/x/sync/errgroup"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/loglevel"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/pkg/version"
	"github.com/hallmark-id/hallmark/server/api"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/exchange"
	"github.com/hallmark-id/hallmark/server/federation"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/publish"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/etcd"
	"github.com/hallmark-id/hallmark/server/tokenstatus"
	"github.com/hallmark-id/hallmark/server/upstream"
	"github.com/hallmark-id/hallmark/server/web"
)

// Run runs a server until the context ends (nil) or it cannot go on. It calls
// ready once it serves. It logs to the standard error.
func Run(ctx context.Context, src config.Source, ready func()) (err error) {
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
		Config: s.Telemetry.Traces, Service: "hallmark-server", TrustDomain: s.TrustDomain, Log: log,
	})
	if err != nil {
		return err
	}
	defer traces.Close()
	// First what fails most often, and quickly.
	tcp, err := api.ListenTCP(s.Listen)
	if err != nil {
		return err
	}
	defer tcp.Close()
	admin, err := api.ListenAdmin(s.AdminSocket)
	if err != nil {
		return err
	}
	defer admin.Close()

	published, err := s.listenBundleEndpoint(log)
	if err != nil {
		return err
	}
	if published != nil {
		defer published.Listener.Close()
	}

	exchanged, err := s.listenTokenExchange(log)
	if err != nil {
		return err
	}
	if exchanged != nil {
		defer exchanged.Listener.Close()
	}

	relied, err := s.listenOIDCIssuer(log)
	if err != nil {
		return err
	}
	if relied != nil {
		defer relied.Listener.Close()
	}

	revoked, err := s.listenCRLEndpoint(log)
	if err != nil {
		return err
	}
	if revoked != nil {
		defer revoked.Listener.Close()
	}

	statuses, err := s.listenStatusListEndpoint(log)
	if err != nil {
		return err
	}
	if statuses != nil {
		defer statuses.Listener.Close()
	}

	name, err := s.serverName()
	if err != nil {
		return err
	}
	st, err := s.openStore(ctx, name, name, log, counted)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	if err := store.CheckRestored(ctx, st); err != nil {
		return err
	}
	reg, err := registry.Open(ctx, registry.Options{Store: st, TrustDomain: s.td, Leads: st.leads(), Log: log})
	if err != nil {
		return fmt.Errorf("open the registry: %w", err)
	}
	keys, err := s.openKeys(name, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, keys.Close()) }()
	above, err := s.openUpstream()
	if err != nil {
		return err
	}
	if above != nil {
		defer func() { err = errors.Join(err, above.Close()) }()
	}
	issued, err := s.openJournal(log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, issued.Close()) }()
	evidence, err := s.makeAttestors(reg, log)
	if err != nil {
		return err
	}

	// What serves ends first; what it stands on, after it.
	base, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	below, base := errgroup.WithContext(base)
	below.Go(func() error { return reg.Run(base) })
	below.Go(func() error {
		runPlugins(base, evidence, log)
		return nil
	})
	if st.member != nil {
		below.Go(func() error { return st.member.Run(base) })
	}
	serving, cancel := context.WithCancelCause(ctx)
	defer context.AfterFunc(base, func() { cancel(context.Cause(base)) })()

	var served *api.API // whose rates hold for the token endpoint too
	var issuer *issue.Issuer
	lists := s.newStatusLists(name, reg, issued, log, counted)
	var endpoint *exchange.Exchange
	documents := s.newDocuments(name, reg, log, counted)
	authorities, err := s.openAuthorities(serving, name, reg, keys, above, documents, log, counted)
	if err == nil {
		issuer = s.newIssuer(authorities, issued, lists, log, counted)
		endpoint, err = s.newExchange(reg, issuer, func() *api.API { return served }, log, counted)
	}
	if err == nil {
		below.Go(func() error { return authorities.Run(base) })
		below.Go(func() error { return issued.Run(base) })
		publisher := s.newPublisher(reg, authorities, issued, log, counted)
		below.Go(func() error { return publisher.Run(base) })
		below.Go(func() error { return documents.Run(base) })
		below.Go(func() error { return lists.Run(base) })
		pushes := feed.New(feed.Options{
			Registry: reg, X509TTL: time.Duration(s.X509.SVIDLifetime), JWTTTL: time.Duration(s.JWT.SVIDLifetime),
			Log: log, Metrics: counted,
		})
		served = s.newAPI(st, name, reg, authorities, issuer, issued, evidence, endpoint, pushes, documents, log, level, counted, traces)
		fetches := federation.NewSchedule(federation.ScheduleOptions{
			Relationships: federation.FromRegistry(reg), Refresh: served.RefreshFederated, Log: log, Metrics: counted,
		})
		below.Go(func() error { return fetches.Run(base) })
		if published != nil {
			below.Go(func() error { return s.publish(base, *published, reg, issuer) })
		}
		if exchanged != nil {
			below.Go(func() error { return s.exchangeTokens(base, *exchanged, endpoint, reg, issuer) })
		}
		if relied != nil {
			below.Go(func() error { return s.serveOIDCIssuer(base, *relied, reg) })
		}
		if revoked != nil {
			below.Go(func() error { return s.serveCRLs(base, *revoked, reg) })
		}
		if statuses != nil {
			below.Go(func() error { return s.serveStatusLists(base, *statuses, reg, authorities, issuer) })
		}
		metrics.RegisterState(measured, func() metrics.State { return state(reg, pushes, authorities, issued) })
		watched.Ready(func(asked context.Context) error { return readiness(asked, ctx, st, authorities) })
		watched.Warn(func() []string { return unpublished(documents) })
		if st.shared != nil {
			self := s.announced(name, tcp)
			tell := func(list []etcd.Server) { pushes.SetServers(addresses(list)) }
			tell([]etcd.Server{self})
			below.Go(func() error {
				return st.shared.Announce(base, self, func() store.Revision { return reg.View().Revision() }, tell)
			})
		}
		log.Info("server is ready", append(describe(reg, authorities),
			"name", name, "trust_domain", s.TrustDomain, "listen", tcp.Addr().String(), "admin_socket", s.AdminSocket,
			"version", version.String(), "took", time.Since(began).Round(time.Millisecond))...)
		ready()
		below.Go(func() error {
			s.follow(base, src, served, level, log)
			return nil
		})
		below.Go(func() error {
			look := time.NewTicker(memoryLook)
			defer look.Stop()
			giveMemoryBack(base, look.C)
			return nil
		})
		err = served.Run(serving, tcp, admin)
	}
	stop()
	if failed := below.Wait(); failed != nil && !errors.Is(failed, context.Canceled) {
		return failed
	}
	if ctx.Err() != nil && (errors.Is(err, ctx.Err()) || errors.Is(err, context.Cause(ctx))) {
		log.Info("server has stopped")
		return nil
	}
	return err
}

func (s *settings) openAuthorities(ctx context.Context, name string, reg *registry.Registry, keys apiv1.KeyManager, above upstream.Upstream, documents *publish.Publisher, log *slog.Logger, counted *metrics.Metrics) (*authority.Authorities, error) {
	o := authority.Options{
		Registry:     reg,
		Keys:         keys,
		TrustDomain:  s.td,
		Server:       name,
		X509Lifetime: time.Duration(s.X509.AuthorityLifetime),
		JWTLifetime:  time.Duration(s.JWT.AuthorityLifetime),
		X509KeyType:  s.X509.KeyType,
		JWTKeyType:   s.JWT.KeyType,
		WIT:          s.Experimental.WIT,
		WITLifetime:  time.Duration(s.WIT.AuthorityLifetime),
		WITKeyType:   s.WIT.KeyType,
		JWTRS256:     slices.ContainsFunc(s.profiles, (*issue.Profile).RS256),
		Publication:  documents,
		Log:          log,
	}
	if above != nil {
		o.Upstream = above
		o.Counts = func(what string, err error) {
			outcome := "ok"
			if err != nil {
				outcome = "failed"
			}
			counted.UpstreamRequests.WithLabelValues(what, outcome).Inc()
		}
	}
	return authority.Open(ctx, o)
}

// openUpstream makes the authority above. It returns nil if there is none.
func (s *settings) openUpstream() (upstream.Upstream, error) {
	if s.Upstream == nil {
		return nil, nil
	}
	return upstream.New(*s.Upstream, upstream.Options{TrustDomain: s.td})
}

func (s *settings) newIssuer(authorities *authority.Authorities, issued *journal.Journal, lists *tokenstatus.Lists, log *slog.Logger, counted *metrics.Metrics) *issue.Issuer {
	if s.StatusListEndpoint == nil {
		lists = nil
	}
	return issue.New(issue.Options{
		Status:      lists,
		TrustDomain: s.td,
		Authorities: authorities,
		Log:         log,
		Metrics:     counted,
		X509TTL:     time.Duration(s.X509.SVIDLifetime),
		JWTTTL:      time.Duration(s.JWT.SVIDLifetime),
		WITTTL:      time.Duration(s.WIT.SVIDLifetime),
		AgentTTL:    time.Duration(s.X509.AgentLifetime),
		JWTIssuer:   s.JWT.Issuer,
		Profiles:    s.profiles,
		Journal:     issued,
		CRLURL:      s.crlURL(),
	})
}

func (s *settings) newAPI(st *opened, name string, reg *registry.Registry, authorities *authority.Authorities, issuer *issue.Issuer, issued *journal.Journal, evidence map[string]attestors.Server, endpoint *exchange.Exchange, pushes *feed.Feed, documents *publish.Publisher, log *slog.Logger, level *loglevel.Var, counted *metrics.Metrics, traces *telemetry.Traces) *api.API {
	return api.New(api.Options{
		Store:         st,
		Registry:      reg,
		Authorities:   authorities,
		Issuer:        issuer,
		Journal:       issued,
		Feed:          pushes,
		NodeAttestors: evidence,
		Profiles:      s.attestorProfiles(),
		Exchange:      endpoint,
		Federation:    &federation.Client{RefuseRedirects: s.Federation.RefuseRedirects},
		Publisher:     documents,
		Cluster:       st.cluster(name),
		AdminIDs:      s.adminIDs,
		Advertise:     s.Advertise,
		Limits:        s.Limits.api(),
		Log:           log,
		LogLevel:      level,
		Metrics:       counted,
		Traces:        traces,
	})
}

// listenBundleEndpoint begins to listen where the bundle is to be published. It
// returns nil if it is not.
func (s *settings) listenBundleEndpoint(log *slog.Logger) (*federation.EndpointOptions, error) {
	c := s.BundleEndpoint
	if c == nil {
		return nil, nil
	}
	o := &federation.EndpointOptions{Log: log}
	if c.HTTPSWeb != nil {
		var err error
		if o.Certificate, err = s.webCertificate("bundle_endpoint", c.HTTPSWeb, log); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("bundle_endpoint.listen: %w; choose another address", err)
	}
	o.Listener = l
	return o, nil
}

// publish publishes the bundle until the context ends.
func (s *settings) publish(ctx context.Context, o federation.EndpointOptions, reg *registry.Registry, issuer *issue.Issuer) error {
	o.Bundle = func() *bundle.Bundle { return reg.View().Bundle(s.td) }
	profile := "https_web"
	if o.Certificate.Get == nil {
		profile, o.Certificate = "https_spiffe", web.Own(issuer.ServerTLS)
	}
	o.Log.Info("the bundle is published", "listen", o.Listener.Addr().String(), "profile", profile)
	return federation.NewEndpoint(o).Run(ctx)
}

// listenTokenExchange begins to listen where tokens are to be exchanged. It
// returns nil if they are not.
func (s *settings) listenTokenExchange(log *slog.Logger) (*web.Options, error) {
	c := s.TokenExchange
	if c == nil {
		return nil, nil
	}
	o := &web.Options{MaxBody: exchange.MaxBody, Log: log}
	if c.HTTPSWeb != nil {
		var err error
		if o.Certificate, err = s.webCertificate("token_exchange", c.HTTPSWeb, log); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return nil, fmt.Errorf("token_exchange.listen: %w; choose another address", err)
	}
	o.Listener = l
	return o, nil
}

// newExchange makes the token endpoint. It returns nil if tokens are not
// exchanged.
func (s *settings) newExchange(reg *registry.Registry, issuer *issue.Issuer, limits func() *api.API, log *slog.Logger, counted *metrics.Metrics) (*exchange.Exchange, error) {
	if s.TokenExchange == nil {
		return nil, nil
	}
	return exchange.New(exchange.Options{
		TrustDomain: s.td, Issuer: s.TokenExchange.Issuer, Issuers: s.TokenExchange.Issuers,
		Registry: reg, Sign: issuer, WIT: s.Experimental.WIT, Log: log, Metrics: counted,
		LimitAddress: func(ctx context.Context, address string) error { return limits().LimitAddress(ctx, address) },
		LimitIssuer:  func(ctx context.Context, name string) error { return limits().LimitIssuer(ctx, name) },
	})
}

// exchangeTokens serves the token endpoint until the context ends.
func (s *settings) exchangeTokens(ctx context.Context, o web.Options, x *exchange.Exchange, reg *registry.Registry, issuer *issue.Issuer) (err error) {
	if o.Certificate.Get == nil {
		o.Certificate = web.Own(issuer.ServerTLS)
	}
	o.Handler = x.Handler()
	if s.sharesTokenExchange() {
		if o.Handler, err = s.oidcIssuer(reg, x.Handler(), o.Log); err != nil {
			return err
		}
	}
	o.Log.Info("tokens are exchanged", "listen", o.Listener.Addr().String(), "issuer", s.TokenExchange.Issuer)
	if err := web.Serve(ctx, o); ctx.Err() == nil {
		return fmt.Errorf("exchange tokens: %w", err)
	}
	return ctx.Err()
}

// describe says what a server has, for the log.
func describe(reg *registry.Registry, authorities *authority.Authorities) (attrs []any) {
	for _, kind := range authorities.Kinds() {
		if active, _, _ := authorities.State(kind); active != nil {
			attrs = append(attrs, kind.String()+"_authority", active.ID)
		}
	}
	if kind, address, _ := authorities.UpstreamState(); kind != "" {
		attrs = append(attrs, "upstream", kind, "upstream_address", address)
	}
	view := reg.View()
	return append(attrs, "entries", view.EntryCount(), "agents", view.NodeCount())
}

// Check checks a configuration, and the files of what is trusted that it names.
// It starts nothing.
func Check(src config.Source) error {
	_, err := load(src)
	return err
}
