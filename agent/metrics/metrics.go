// Package metrics names everything that an agent counts for its operator's
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

// Metrics is what an agent counts as it goes. Make it with [New].
type Metrics struct {
	Calls   *telemetry.Calls // of the Workload API
	Streams prometheus.Gauge // of the Workload API

	BrokerCalls   *telemetry.Calls // of the Broker API
	BrokerStreams prometheus.Gauge // of the Broker API

	Signed          *prometheus.CounterVec // by kind
	SigningFailures *prometheus.CounterVec // by kind

	AttestationSeconds  *prometheus.HistogramVec // by attestor
	AttestationFailures *prometheus.CounterVec   // by attestor
}

// New makes the metrics and registers them. A nil registerer registers
// nothing: they count for nobody.
func New(r prometheus.Registerer) *Metrics {
	make := promauto.With(r)
	m := &Metrics{
		Calls: telemetry.NewCalls(r, "hallmark_agent_workload", "the Workload API"),
		Streams: make.NewGauge(prometheus.GaugeOpts{
			Name: "hallmark_agent_workload_streams",
			Help: "Streams of the Workload API that are open.",
		}),
		BrokerCalls: telemetry.NewCalls(r, "hallmark_agent_broker", "the Broker API"),
		BrokerStreams: make.NewGauge(prometheus.GaugeOpts{
			Name: "hallmark_agent_broker_streams",
			Help: "Streams of the Broker API that are open.",
		}),
		Signed: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_agent_signed_total",
			Help: "SVIDs that the server signed for this node's workloads, by kind (x509, jwt, wit).",
		}, []string{"kind"}),
		SigningFailures: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_agent_signing_failures_total",
			Help: "SVIDs that were wanted and could not be signed, by kind (x509, jwt, wit); each attempt counts.",
		}, []string{"kind"}),
		AttestationSeconds: make.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "hallmark_agent_attestation_duration_seconds",
			Help:    "How long attestors took to attest a process, by attestor; one that gives no answer counts until nobody waits any more.",
			Buckets: telemetry.LatencyBuckets,
		}, []string{"attestor"}),
		AttestationFailures: make.NewCounterVec(prometheus.CounterOpts{
			Name: "hallmark_agent_attestation_failures_total",
			Help: "Attestations of processes in which an attestor failed or gave no answer in time, by attestor.",
		}, []string{"attestor"}),
	}
	make.NewGaugeVec(prometheus.GaugeOpts{
		Name: "hallmark_agent_build_info",
		Help: "1, with the version of the program.",
	}, []string{"version"}).WithLabelValues(version.String()).Set(1)
	// From the start, so that the first one shows as an increase.
	for _, kind := range []string{"x509", "jwt"} {
		m.Signed.WithLabelValues(kind)
		m.SigningFailures.WithLabelValues(kind)
	}
	return m
}

// State is what an agent tells of its present state when it is asked.
type State struct {
	Entries, SVIDs int // held
	InStep         bool
	Revision       int64
	Drifts         int       // since the start
	NextExpiry     time.Time // of the first SVID that is wanted to end; zero: none is held
	NodeExpiry     time.Time // of the node's own SVID; zero: none
}

var (
	entries    = prometheus.NewDesc("hallmark_agent_entries", "Registration entries that this node is authorized for.", nil, nil)
	svids      = prometheus.NewDesc("hallmark_agent_svids", "X509-SVIDs held and valid.", nil, nil)
	inStep     = prometheus.NewDesc("hallmark_agent_in_step", "1 if the push stream is open and what is held is what the server says, else 0.", nil, nil)
	revision   = prometheus.NewDesc("hallmark_agent_revision", "Revision of the last change applied.", nil, nil)
	drifts     = prometheus.NewDesc("hallmark_agent_drifts_total", "How often what is held differed from what the server says; it is then asked for anew.", nil, nil)
	nextExpiry = prometheus.NewDesc("hallmark_agent_next_expiry_timestamp_seconds", "When the first X509-SVID or WIT-SVID of those wanted expires, in seconds since 1970; subtract time() for what is left. Missing if none is held.", nil, nil)
	nodeExpiry = prometheus.NewDesc("hallmark_agent_node_expiry_timestamp_seconds", "When the node's own X509-SVID expires, in seconds since 1970; subtract time() for what is left. Missing until the node has attested.", nil, nil)
)

// RegisterState registers what is found out only when monitoring asks. Now is
// called each time.
func RegisterState(r prometheus.Registerer, now func() State) { r.MustRegister(state(now)) }

type state func() State

// Describe implements [prometheus.Collector].
func (state) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{entries, svids, inStep, revision, drifts, nextExpiry, nodeExpiry} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (now state) Collect(ch chan<- prometheus.Metric) {
	s := now()
	gauge := func(d *prometheus.Desc, v float64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v)
	}
	gauge(entries, float64(s.Entries))
	gauge(svids, float64(s.SVIDs))
	gauge(revision, float64(s.Revision))
	if s.InStep {
		gauge(inStep, 1)
	} else {
		gauge(inStep, 0)
	}
	ch <- prometheus.MustNewConstMetric(drifts, prometheus.CounterValue, float64(s.Drifts))
	if !s.NextExpiry.IsZero() {
		gauge(nextExpiry, float64(s.NextExpiry.Unix()))
	}
	if !s.NodeExpiry.IsZero() {
		gauge(nodeExpiry, float64(s.NodeExpiry.Unix()))
	}
}
