package harness

import (
	"context"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"
)

// Attestations measures how a process is attested: how often a second, one after
// the other, how long it takes, and how many questions it costs a daemon, by the
// number of those that it was asked so far. ready, if there is one, prepares each
// and is not measured.
func Attestations(b *testing.B, asked func() int64, ready func(), attest func() error) {
	b.Helper()
	var took []time.Duration
	var total time.Duration
	before := asked()
	for b.Loop() {
		if ready != nil {
			ready()
		}
		began := time.Now()
		if err := attest(); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
		total += took[len(took)-1]
	}
	Latencies(b, took)
	b.ReportMetric(float64(len(took))/total.Seconds(), "attestations/s")
	b.ReportMetric(float64(asked()-before)/float64(len(took)), "calls/op")
	b.ReportMetric(0, "ns/op") // with what is not measured
}

// Latencies reports the median and the slowest of a hundred.
func Latencies(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-µs")
}

// Counted serves on a Unix socket what another serves, and counts the requests of
// HTTP.
func Counted(t testing.TB, socket string) (counted string, asked *atomic.Int64) {
	t.Helper()
	asked = new(atomic.Int64)
	counted = filepath.Join(shortDir(t), "counted.sock")
	l, err := net.Listen("unix", counted)
	must(t, err)
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "daemon"})
	proxy.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		proxy.ServeHTTP(w, r)
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	return counted, asked
}
