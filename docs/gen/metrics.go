package main

import (
	"bytes"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	agent "github.com/hallmark-id/hallmark/agent/metrics"
	server "github.com/hallmark-id/hallmark/server/metrics"
)

const metricsHead = `# Metrics

<!-- Made by "make generate" from server/metrics and agent/metrics. -->

Server and agent serve their metrics over HTTP, for Prometheus, where the
configuration says so:

` + "```yaml" + `
telemetry:
  listen: 127.0.0.1:9988 # default: none
  pprof: false           # Go's profiles below /debug/pprof/, on loopback only
` + "```" + `

| path | answer |
|---|---|
| /metrics | the metrics below, and those of Go's runtime (go_…) and of the process (process_…) |
| /live | 200 as long as the process answers |
| /ready | 200 if a server's store is open and its authorities are active, and if an agent is in step with its server and serves the Workload API; else 503, and the reason in JSON |

An agent that is not ready goes on giving out what it holds. There is no
authentication: listen where only monitoring can reach. A server and an agent on
one machine need different ports. conf/grafana has a dashboard.
`

// metricsPage returns docs/metrics.md, the reference of the metrics of server and
// agent, from the metrics themselves.
func metricsPage() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(metricsHead)
	for _, p := range []struct {
		title    string
		families func() ([]*dto.MetricFamily, error)
	}{{"Server", serverMetrics}, {"Agent", agentMetrics}} {
		families, err := p.families()
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "\n## %s\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n", p.title)
		for _, f := range families {
			var labels []string
			for _, l := range f.Metric[0].Label {
				labels = append(labels, l.GetName())
			}
			fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, ", "), f.GetHelp())
		}
	}
	return b.Bytes(), nil
}

// serverMetrics returns all metrics of a server, each with a value.
func serverMetrics() ([]*dto.MetricFamily, error) {
	r := prometheus.NewRegistry()
	m := server.New(r)
	m.Calls.Call("", nil, 0)
	m.Refusals.WithLabelValues("", "")
	m.TokenExchanges.WithLabelValues("", "")
	m.BundleRefreshes.WithLabelValues("", "")
	m.UpstreamRequests.WithLabelValues("", "")
	m.BundleRefreshed.WithLabelValues("")
	m.PublishTries.WithLabelValues("", "")
	m.PublishRepairs.WithLabelValues("")
	m.PublishedAt.WithLabelValues("")
	m.PublishedSequence.WithLabelValues("")
	m.ActivatedUnpublished.WithLabelValues("")
	server.RegisterState(r, func() server.State {
		return server.State{AuthorityEnds: map[string]time.Time{"x509": {}}, UpstreamFailing: new(bool)}
	})
	return gather(r)
}

// agentMetrics returns all metrics of an agent, each with a value.
func agentMetrics() ([]*dto.MetricFamily, error) {
	r := prometheus.NewRegistry()
	m := agent.New(r)
	m.Calls.Call("", nil, 0)
	m.BrokerCalls.Call("", nil, 0)
	m.AttestationSeconds.WithLabelValues("")
	m.AttestationFailures.WithLabelValues("")
	agent.RegisterState(r, func() agent.State {
		return agent.State{NextExpiry: time.Unix(1, 0), NodeExpiry: time.Unix(1, 0)}
	})
	return gather(r)
}

// gather fails if a metric that is registered has no value, and so would be
// missing from the reference.
func gather(r *prometheus.Registry) ([]*dto.MetricFamily, error) {
	families, err := r.Gather()
	if err != nil {
		return nil, err
	}
	have := make(map[string]bool)
	for _, f := range families {
		have[f.GetName()] = true
	}
	descs := make(chan *prometheus.Desc)
	go func() { r.Describe(descs); close(descs) }()
	for d := range descs {
		_, rest, _ := strings.Cut(d.String(), `fqName: "`)
		if name, _, _ := strings.Cut(rest, `"`); !have[name] && err == nil {
			err = fmt.Errorf("%s has no value here; give it one in docs/gen", name)
		}
	}
	return families, err
}
