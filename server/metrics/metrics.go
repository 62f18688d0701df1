// Package metrics names everything that a server counts for its operator's
// monitoring: [Metrics] has a field for each, and what counts increments it
// where the thing happens. docs/metrics.md is made from it.
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/pkg/version"
)

// Metrics is what a server counts as it goes. Make it with [New].
type Metrics struct {
	Calls              *telemetry.Calls
	Refusals           *prometheus.CounterVec // by method and code
	ConnectionsRefused prometheus.Counter

	Issued         *prometheus.CounterVec // by kind and reason
	TokenExchanges *prometheus.CounterVec // requests to the token endpoint, by issuer and outcome

	UpstreamRequests *prometheus.CounterVec // by what the authority above is asked for, and outcome

	Agents   prometheus.Gauge // connected
	PushStep prometheus.Histogram

	Revoked       prometheus.Gauge // certificates in the CRLs of this server
	StatusLists   prometheus.Gauge // of this server
	RevokedTokens prometheus.Gauge // in them

	BundleRefreshes *prometheus.CounterVec // of foreign bundles, by trust domain and outcome
	BundleRefreshed *prometheus.GaugeVec   // when one was last fetched, by trust domain

	PublishTries         *prometheus.CounterVec // by target and outcome
	PublishRepairs       *prometheus.CounterVec // documents that somebody else changed or deleted, by target
	PublishedAt          *prometheus.GaugeVec   // when a target was last seen to have all, by target
	PublishedSequence    *prometheus.GaugeVec   // of the bundle that a target has, by target
	ActivatedUnpublished *prometheus.CounterVec // authorities, by kind

	Commits       prometheus.Counter // transactions
	CommitSeconds prometheus.Histogram
	Majority      prometheus.Gauge
}

// New makes the metrics and registers them. A nil registerer registers
// nothing: they count for nobody.
func New(r prometheus.Registerer) *Metrics {
	make := promauto.With(r)
	m := &Metrics{
		Calls: telemetry.NewCalls(r, "hallmark_server_grpc", "the server's APIs"),
		Refusals: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_refusals_total",
			Help: "Calls refused before they began, because the caller may not make them, by gRPC method (unknown: none of the server's) and code.",
		}, []string{"method", "code"}),
		ConnectionsRefused: make.NewCounter(prometheus.CounterOpts{
			Name: "hallmark_server_connections_refused_total",
			Help: "Connections over TCP refused because there were too many.",
		}),
		Issued: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_issued_total",
			Help: "Credentials issued, by kind (x509, jwt, wit) and reason (workload, node, mint, downstream, server).",
		}, []string{"kind", "reason"}),
		TokenExchanges: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_token_exchanges_total",
			Help: "Requests to the token endpoint, by issuer of the token (unknown: none that is trusted, or none was reached) and outcome (OK, or the error of OAuth).",
		}, []string{"issuer", "outcome"}),
		UpstreamRequests: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_upstream_requests_total",
			Help: "Requests to the authority above the server's, by what was asked for (sign: an X.509 authority's certificate, publish: a JWT or WIT authority, bundle: what is to be trusted) and outcome (ok, failed).",
		}, []string{"request", "outcome"}),
		Agents: make.NewGauge(prometheus.GaugeOpts{
			Name: "hallmark_server_agents_connected",
			Help: "Agents that hold a push stream.",
		}),
		PushStep: make.NewHistogram(prometheus.HistogramOpts{
			Name:    "hallmark_server_push_acknowledgement_seconds",
			Help:    "How long it took from sending a change to an agent until it acknowledged everything that was sent to it.",
			Buckets: telemetry.LatencyBuckets,
		}),
		Revoked: make.NewGauge(prometheus.GaugeOpts{
			Name: "hallmark_server_revoked_certificates",
			Help: "Certificates in the CRLs of this server's authorities.",
		}),
		StatusLists: make.NewGauge(prometheus.GaugeOpts{
			Name: "hallmark_server_status_lists",
			Help: "Status lists of this server whose tokens have not all ended.",
		}),
		RevokedTokens: make.NewGauge(prometheus.GaugeOpts{
			Name: "hallmark_server_revoked_tokens",
			Help: "Tokens that are revoked in the status lists of this server.",
		}),
		BundleRefreshes: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_bundle_refreshes_total",
			Help: "Fetches of foreign bundles by schedule, by trust domain and outcome (ok, failed).",
		}, []string{"trust_domain", "outcome"}),
		BundleRefreshed: make.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hallmark_server_bundle_refreshed_timestamp_seconds",
			Help: "When a foreign bundle was last fetched by schedule, by trust domain, in seconds since 1970; 0: not since the server's start.",
		}, []string{"trust_domain"}),
		PublishTries: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_publish_tries_total",
			Help: "Tries to bring a target of publish up to date, or to see that it is, by target and outcome (ok, failed).",
		}, []string{"target", "outcome"}),
		PublishRepairs: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_publish_repairs_total",
			Help: "Published documents that somebody else had changed or deleted and that were put back, by target.",
		}, []string{"target"}),
		PublishedAt: make.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hallmark_server_published_timestamp_seconds",
			Help: "When a target of publish was last seen to have the newest documents, by target, in seconds since 1970; 0: not since the server's start. It is looked at every 5 minutes.",
		}, []string{"target"}),
		PublishedSequence: make.NewGaugeVec(prometheus.GaugeOpts{
			Name: "hallmark_server_published_sequence_number",
			Help: "Sequence number of the bundle that the documents in a target of publish are made of, by target; 0: it is not known.",
		}, []string{"target"}),
		ActivatedUnpublished: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_server_authorities_activated_unpublished_total",
			Help: "Authorities that began to sign before every target of publish had them, by kind: those who read such a target refuse what they sign.",
		}, []string{"kind"}),
		Commits: make.NewCounter(prometheus.CounterOpts{
			Name: "hallmark_server_store_transactions_total",
			Help: "Transactions committed to the store.",
		}),
		CommitSeconds: make.NewHistogram(prometheus.HistogramOpts{
			Name:    "hallmark_server_store_commit_duration_seconds",
			Help:    "How long commits to the store took, synced; transactions that come together share one.",
			Buckets: telemetry.LatencyBuckets,
		}),
		Majority: make.NewGauge(prometheus.GaugeOpts{
			Name: "hallmark_server_store_majority",
			Help: "1 while a majority of the servers that keep the store can be reached, 0 while none can: then nothing can be changed, and what is known is served. Of a server that is alone it is 1.",
		}),
	}
	m.Majority.Set(1)
	make.NewGaugeVec(prometheus.GaugeOpts{
		Name: "hallmark_server_build_info",
		Help: "1, with the version of the program.",
	}, []string{"version"}).WithLabelValues(version.String()).Set(1)
	// From the start, so that the first one shows as an increase.
	for _, reason := range []string{"workload", "node", "mint", "downstream", "server"} {
		m.Issued.WithLabelValues("x509", reason)
	}
	for _, reason := range []string{"workload", "mint"} {
		m.Issued.WithLabelValues("jwt", reason)
	}
	return m
}

// State is what a server tells of its present state when it is asked.
type State struct {
	Entries, Nodes int
	Revision       int64
	LiveSVIDs      int                  // issued by this server, and not ended
	AgentsBehind   int                  // connected, and have not acknowledged all they were sent
	AuthorityEnds  map[string]time.Time // of the active one, by kind
	// UpstreamFailing is set if there is an authority above: whether what it was
	// asked for last failed.
	UpstreamFailing *bool
}

var (
	entries   = prometheus.NewDesc("hallmark_server_entries", "Registration entries.", nil, nil)
	nodes     = prometheus.NewDesc("hallmark_server_nodes", "Nodes that have attested, banned ones among them.", nil, nil)
	live      = prometheus.NewDesc("hallmark_server_svids_live", "X509-SVIDs and other certificates that this server issued and that have not ended, as its journal has them; some may have ended within a minute.", nil, nil)
	revision  = prometheus.NewDesc("hallmark_server_revision", "Revision of the registry; it grows with each transaction.", nil, nil)
	behind    = prometheus.NewDesc("hallmark_server_agents_behind", "Connected agents that have not yet acknowledged everything that was sent to them.", nil, nil)
	failing   = prometheus.NewDesc("hallmark_server_upstream_failing", "1 while what the authority above the server's was asked for last failed, else 0. Not there without one.", nil, nil)
	authority = prometheus.NewDesc("hallmark_server_authority_expiry_timestamp_seconds", "When the active authority expires, in seconds since 1970, by kind; subtract time() for what is left.", []string{"kind"}, nil)
)

// RegisterState registers what is found out only when monitoring asks. Now is
// called each time.
func RegisterState(r prometheus.Registerer, now func() State) { r.MustRegister(state(now)) }

type state func() State

// Describe implements [prometheus.Collector].
func (state) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{entries, nodes, live, revision, behind, failing, authority} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (now state) Collect(ch chan<- prometheus.Metric) {
	s := now()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(entries, float64(s.Entries))
	gauge(nodes, float64(s.Nodes))
	gauge(live, float64(s.LiveSVIDs))
	gauge(revision, float64(s.Revision))
	gauge(behind, float64(s.AgentsBehind))
	if f := s.UpstreamFailing; f != nil {
		value := 0.0
		if *f {
			value = 1
		}
		gauge(failing, value)
	}
	for kind, ends := range s.AuthorityEnds {
		gauge(authority, float64(ends.Unix()), kind)
	}
}
