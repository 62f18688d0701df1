// Package api is the server as its callers see it: SPIRE's server contracts
// and our own, one file a service.
//
// [New] makes an [API] of what it serves from; [API.Run] serves it on two
// listeners: TCP with TLS 1.3 for agents, workloads and whoever wants to
// become an agent, and the admin socket for operators on the same machine. Who
// may call what is decided in one table (authorize.go); which gRPC code an
// error has, in one function (errors.go).
package api

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/loglevel"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
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
)

// Options are what an API serves from.
type Options struct {
	Store         store.Store // for backups only
	Registry      *registry.Registry
	Authorities   *authority.Authorities
	Issuer        *issue.Issuer
	Feed          *feed.Feed
	Journal       *journal.Journal            // of what Issuer issues
	NodeAttestors map[string]attestors.Server // by name; how nodes may attest
	Profiles      []attestors.Profile         // of those, and of others that are not configured
	Exchange      *exchange.Exchange          // nil: no tokens of outside issuers are taken
	Publisher     *publish.Publisher          // nil: nothing is published elsewhere
	Cluster       *Cluster                    // nil: the server is alone
	Federation    *federation.Client          // fetches foreign bundles; nil: one with the system's roots
	AdminIDs      []spiffeid.ID               // administer besides the entries with admin set
	Advertise     string                      // host:port that agents dial; empty: that of the TCP listener
	Limits        Limits
	Now           func() time.Time  // nil: time.Now
	Log           *slog.Logger      // nil: none
	Metrics       *metrics.Metrics  // nil: none
	Traces        *telemetry.Traces // nil: none
	LogLevel      *loglevel.Var     // of Log; nil: one that is nobody's
}

// API serves the server's contracts. Each service is a struct that embeds it,
// in the file of its name.
type API struct {
	store       store.Store
	registry    *registry.Registry
	authorities *authority.Authorities
	wit         bool // there are WIT authorities
	issuer      *issue.Issuer
	feed        *feed.Feed
	journal     *journal.Journal
	attestors   map[string]attestors.Server
	profiles    []attestors.Profile
	exchange    *exchange.Exchange
	publisher   *publish.Publisher
	cluster     *Cluster
	federation  *federation.Client
	fetches     federation.Outcomes
	adminIDs    map[spiffeid.ID]bool
	advertise   string
	td          spiffeid.TrustDomain
	now         func() time.Time
	log         *slog.Logger
	metrics     *metrics.Metrics

	limits   atomic.Pointer[Limits] // set by SetLimits
	attests  *limiter
	signs    *limiter
	calls    *limiter
	refusals *limiter // of records, by caller

	tcp, admin *grpc.Server
	started    time.Time
	address    string // of the TCP listener; set by Run

	stopping context.Context // ends when streams have to
	stop     context.CancelFunc
	running  sync.WaitGroup // services whose call has ended
}

// How many denied calls of one caller, and connections, are logged a second.
const (
	refusalsLogged      = 2
	refusalsLoggedBurst = 20
)

// grace is how long calls may go on when the server stops.
const grace = 5 * time.Second

// New makes an API. It serves once, by [API.Run].
func New(o Options) *API {
	a := &API{
		store:       o.Store,
		registry:    o.Registry,
		authorities: o.Authorities,
		wit:         slices.Contains(o.Authorities.Kinds(), registry.WIT),
		issuer:      o.Issuer,
		feed:        o.Feed,
		journal:     o.Journal,
		attestors:   o.NodeAttestors,
		profiles:    o.Profiles,
		exchange:    o.Exchange,
		publisher:   cmp.Or(o.Publisher, publish.New(publish.Options{})),
		cluster:     o.Cluster,
		federation:  cmp.Or(o.Federation, &federation.Client{}),
		adminIDs:    make(map[spiffeid.ID]bool),
		advertise:   o.Advertise,
		td:          o.Registry.TrustDomain(),
		now:         o.Now,
		log:         o.Log,
		metrics:     o.Metrics,
	}
	if a.now == nil {
		a.now = time.Now
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.metrics == nil {
		a.metrics = metrics.New(nil)
	}
	for _, id := range o.AdminIDs {
		a.adminIDs[id] = true
	}
	a.attests, a.signs, a.calls = newLimiter(0, 0, a.now), newLimiter(0, 0, a.now), newLimiter(0, 0, a.now)
	a.refusals = newLimiter(refusalsLogged, refusalsLoggedBurst, a.now)
	a.SetLimits(o.Limits)
	a.started = a.now()
	a.stopping, a.stop = context.WithCancel(context.Background())

	options := append(serverOptions(), o.Traces.ServerOptions(a.vouchedFor, untraced)...)
	options = append(options,
		grpc.UnaryInterceptor(a.unary),
		grpc.StreamInterceptor(a.stream),
		grpc.UnknownServiceHandler(unknown),
	)
	a.tcp = grpc.NewServer(append(options,
		grpc.Creds(a.tlsCredentials()),
		grpc.InTapHandle(a.refuseEarly),
		grpc.ReadBufferSize(0), // TLS has a buffer below; and there are thousands of connections
	)...)
	a.admin = grpc.NewServer(append(options, grpc.Creds(peercred.New(peercred.Options{RequireOwner: true, MaxConnections: maxAdminConnections, Log: a.log})))...)
	for _, s := range []*grpc.Server{a.tcp, a.admin} {
		entryv1.RegisterEntryServer(s, &entryService{API: a})
		bundlev1.RegisterBundleServer(s, &bundleService{API: a})
		agentv1.RegisterAgentServer(s, &agentService{API: a})
		svidv1.RegisterSVIDServer(s, &svidService{API: a})
		trustdomainv1.RegisterTrustDomainServer(s, &trustDomainService{API: a})
		localauthorityv1.RegisterLocalAuthorityServer(s, &authorityService{API: a})
		hallmarkv1.RegisterClusterServiceServer(s, &clusterService{API: a})
	}
	hallmarkv1.RegisterFeedServiceServer(a.tcp, &feedService{API: a})
	hallmarkv1.RegisterAdminServiceServer(a.admin, &adminService{API: a})
	debugv1.RegisterDebugServer(a.admin, &debugService{API: a})
	loggerv1.RegisterLoggerServer(a.admin, &loggerService{level: cmp.Or(o.LogLevel, loglevel.New(slog.LevelInfo))})
	grpc_health_v1.RegisterHealthServer(a.admin, &healthService{API: a})
	reflection.Register(a.admin)
	return a
}

// Run serves on both listeners until the context ends, then lets calls end for
// a few seconds. It closes the listeners.
func (a *API) Run(ctx context.Context, tcp, admin net.Listener) error {
	a.address = tcp.Addr().String()
	refused := rate.NewLimiter(refusalsLogged, refusalsLoggedBurst)
	bounded := &boundedListener{
		Listener: tcp,
		most:     func() int64 { return int64(a.limits.Load().Connections) },
		refused: func(addr net.Addr) {
			a.metrics.ConnectionsRefused.Inc()
			if refused.Allow() {
				a.log.Warn("connection refused: there are too many", "address", addr.String(), "most", a.limits.Load().Connections)
			}
		},
	}
	defer context.AfterFunc(ctx, a.stop)()
	err := serve(ctx, grace, map[*grpc.Server]net.Listener{a.tcp: bounded, a.admin: admin})
	a.stop()
	a.running.Wait()
	a.feed.Wait()
	return err
}
