// Package tracetest is a collector of traces for tests: a real receiver of OTLP
// over gRPC, which keeps what it is sent. Start one with [NewCollector].
package tracetest

import (
	"context"
	"encoding/hex"
	"net"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
)

// Span is a span and the program that sent it.
type Span struct {
	*trace.Span
	Service string
}

// Trace returns the ID of the span's trace.
func (s Span) Trace() string { return hex.EncodeToString(s.TraceId) }

// Collector takes spans.
type Collector struct {
	collector.UnimplementedTraceServiceServer
	Endpoint string // for telemetry.traces.endpoint

	mu    sync.Mutex
	spans []Span
	more  chan struct{} // closed when there are more
}

// NewCollector starts a collector on loopback that ends with the test.
func NewCollector(t testing.TB) *Collector {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &Collector{Endpoint: "http://" + l.Addr().String(), more: make(chan struct{})}
	s := grpc.NewServer()
	collector.RegisterTraceServiceServer(s, c)
	go s.Serve(l)
	t.Cleanup(s.Stop)
	return c
}

// Export takes spans, as OTLP has it.
func (c *Collector) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, rs := range r.ResourceSpans {
		service := ""
		for _, a := range rs.Resource.GetAttributes() {
			if a.Key == "service.name" {
				service = a.Value.GetStringValue()
			}
		}
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				c.spans = append(c.spans, Span{s, service})
			}
		}
	}
	close(c.more)
	c.more = make(chan struct{})
	return &collector.ExportTraceServiceResponse{}, nil
}

// Wait returns all spans once they are enough.
func (c *Collector) Wait(t testing.TB, enough func([]Span) bool) []Span {
	t.Helper()
	late := time.After(30 * time.Second)
	for {
		c.mu.Lock()
		spans, more := c.spans, c.more
		c.mu.Unlock()
		if enough(spans) {
			return spans
		}
		select {
		case <-more:
		case <-late:
			for _, s := range spans {
				t.Logf("%s %s: %s", s.Trace(), s.Service, s.Name)
			}
			t.Fatal("the collector did not get the spans that were waited for")
		}
	}
}
