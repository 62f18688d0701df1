package telemetry_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/pkg/telemetry/tracetest"
	"github.com/hallmark-id/hallmark/test/harness"
)

func openTraces(t testing.TB, endpoint string, log *slog.Logger) *telemetry.Traces {
	t.Helper()
	traces, err := telemetry.OpenTraces(telemetry.TracesOptions{
		Config: telemetry.TracesConfig{Endpoint: endpoint, Ratio: 1}, Service: "test", TrustDomain: "example.org", Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { traces.Close() })
	return traces
}

// called makes one call of a server with these options, as part of a trace of
// the caller's, and returns the server's span of it.
func called(t *testing.T, trusted bool) tracetest.Span {
	t.Helper()
	collector := tracetest.NewCollector(t)
	traces := openTraces(t, collector.Endpoint, nil)
	s := grpc.NewServer(traces.ServerOptions(func(context.Context) bool { return trusted }, map[string]bool{grpc_health_v1.Health_List_FullMethodName: true})...)
	grpc_health_v1.RegisterHealthServer(s, health.NewServer())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+callersTrace+"-00f067aa0ba902b7-01")
	client := grpc_health_v1.NewHealthClient(conn)
	if _, err := client.List(ctx, &grpc_health_v1.HealthListRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Fatal(err)
	}
	s.GracefulStop()
	traces.Close()
	spans := collector.Wait(t, func(all []tracetest.Span) bool { return len(all) > 0 })
	if len(spans) != 1 || spans[0].Name != "grpc.health.v1.Health/Check" || spans[0].Service != "test" {
		t.Fatalf("recorded %v; expected the call that is not left out", spans)
	}
	return spans[0]
}

const callersTrace = "4bf92f3577b34da6a3ce929d0e0e4736"

func TestATrustedCallersTraceIsGoneOnWith(t *testing.T) {
	if got := called(t, true).Trace(); got != callersTrace {
		t.Errorf("the span is of trace %s", got)
	}
}

func TestAnotherCallersTraceIsOnlyLinked(t *testing.T) {
	span := called(t, false)
	if span.Trace() == callersTrace || len(span.ParentSpanId) != 0 {
		t.Errorf("the span is of trace %s, below %x", span.Trace(), span.ParentSpanId)
	}
	if len(span.Links) != 1 {
		t.Errorf("it has links %v", span.Links)
	}
}

func TestWithoutTracesNothingIsRecordedAndNothingAllocated(t *testing.T) {
	none, err := telemetry.OpenTraces(telemetry.TracesOptions{})
	if err != nil || none != nil {
		t.Fatalf("%v, %v", none, err)
	}
	if n := len(none.ServerOptions(nil, nil)) + len(none.DialOptions(nil)); n != 0 {
		t.Errorf("%d options", n)
	}
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() {
		ctx, root := none.Root(ctx, "root", trace.SpanContext{})
		_, span := telemetry.Span(ctx, "part")
		span.End()
		root.End()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}

func TestACollectorThatIsDownIsNamedOnce(t *testing.T) {
	log := &syncBuffer{}
	traces := openTraces(t, "http://"+harness.FreeAddress(t), slog.New(slog.NewTextHandler(log, nil)))
	for range 3 {
		_, span := traces.Root(t.Context(), "root", trace.SpanContext{})
		span.End()
		traces.Flush(10 * time.Second)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "collector of telemetry.traces") {
		t.Errorf("logged:\n%s", log)
	}
}

func TestACollectorThatHangsHoldsNothingUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // nobody answers what connects
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	traces := openTraces(t, "http://"+l.Addr().String(), nil)
	began := time.Now()
	for range 10_000 { // several times what may wait
		_, span := traces.Root(t.Context(), "root", trace.SpanContext{})
		span.End()
	}
	traces.Close()
	if took := time.Since(began); took > 8*time.Second { // a batch may take longer
		t.Errorf("it took %v to record and to close", took)
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestCheckRefusesTracesThatCannotBeMeant(t *testing.T) {
	for _, c := range []struct {
		config telemetry.TracesConfig
		key    string // "" is none
	}{
		{telemetry.TracesConfig{}, ""},
		{telemetry.TracesConfig{Endpoint: "http://127.0.0.1:4317"}, ""},
		{telemetry.TracesConfig{Endpoint: "https://collector.example.org:4317/", Ratio: 1}, ""},
		{telemetry.TracesConfig{Ratio: 0.5}, "traces.endpoint"},
		{telemetry.TracesConfig{Endpoint: "127.0.0.1:4317"}, "traces.endpoint"},
		{telemetry.TracesConfig{Endpoint: "http://127.0.0.1"}, "traces.endpoint"},
		{telemetry.TracesConfig{Endpoint: "http://user:secret@127.0.0.1:4317"}, "traces.endpoint"},
		{telemetry.TracesConfig{Endpoint: "http://127.0.0.1:4317/v1/traces"}, "traces.endpoint"},
		{telemetry.TracesConfig{Endpoint: "http://127.0.0.1:4317", Ratio: 1.5}, "traces.ratio"},
		{telemetry.TracesConfig{Endpoint: "http://127.0.0.1:4317", Ratio: -1}, "traces.ratio"},
		{telemetry.TracesConfig{Endpoint: "https://127.0.0.1:4317", CA: "/does/not/exist"}, "traces.ca"},
		{telemetry.TracesConfig{Endpoint: "https://127.0.0.1:4317", CA: "traces_test.go"}, "traces.ca"},
	} {
		got := ""
		telemetry.Config{Traces: c.config}.Check(func(key, format string, _ ...any) {
			got += key
			if strings.Contains(format, "secret") {
				t.Errorf("the complaint shows a password: %s", format)
			}
		})
		if got != c.key {
			t.Errorf("%+v: complains about %q; expected %q", c.config, got, c.key)
		}
	}
}

func BenchmarkSpanWithoutTraces(b *testing.B) {
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		_, span := telemetry.Span(ctx, "part")
		span.End()
	}
}
