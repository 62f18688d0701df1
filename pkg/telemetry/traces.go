package telemetry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	collectorv1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracev1 "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/stats"

	"github.com/hallmark-id/hallmark/pkg/version"
)

// TracesConfig says where traces go: which calls led to which, across agent and
// server, and how long each part took.
type TracesConfig struct {
	// Endpoint is the URL of a collector that takes OTLP over gRPC, like
	// http://127.0.0.1:4317, or https://… for TLS. Default: none, there are no
	// traces.
	Endpoint string `yaml:"endpoint" env:"expand"`
	// CA is a PEM file of the authorities that vouch for an https endpoint.
	// Default: those of the system.
	CA string `yaml:"ca" env:"expand"`
	// Ratio is the part of the traces that is kept, above 0 and up to 1. What an
	// agent keeps, its server keeps too. Default 0.1.
	Ratio float64 `yaml:"ratio"`
}

const defaultRatio = 0.1 // a busy agent makes thousands of calls a second

// check finds what cannot be meant.
func (c TracesConfig) check(wrong func(key, format string, args ...any)) {
	if c.Ratio < 0 || c.Ratio > 1 {
		wrong("traces.ratio", "telemetry.traces.ratio is %v; it is the part of the traces that is kept, above 0 and up to 1", c.Ratio)
	}
	if c.Endpoint == "" {
		if c != (TracesConfig{}) {
			wrong("traces.endpoint", "telemetry.traces.endpoint is missing; set it to the URL of a collector like http://127.0.0.1:4317")
		}
		return
	}
	switch u, err := url.Parse(c.Endpoint); {
	case err != nil, u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", u.User != nil, u.Path != "" && u.Path != "/", u.RawQuery != "", u.Fragment != "":
		// Not the URL itself: it may have a password in it.
		wrong("traces.endpoint", "telemetry.traces.endpoint is not http://HOST:PORT or https://HOST:PORT, for example http://127.0.0.1:4317")
	case u.Port() == "":
		wrong("traces.endpoint", "telemetry.traces.endpoint has no port; collectors listen on 4317, write %s://%s:4317", u.Scheme, u.Hostname())
	case u.Scheme == "http" && c.CA != "":
		wrong("traces.ca", "telemetry.traces.ca is for an https endpoint; remove it, or write https")
	}
	if c.CA != "" {
		if _, err := readRoots(c.CA); err != nil {
			wrong("traces.ca", "telemetry.traces.ca: %v", err)
		}
	}
}

func readRoots(path string) (*x509.CertPool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s has no PEM certificate", path)
	}
	return roots, nil
}

// Bounds of the export. Nothing ever waits for it: what does not fit is
// dropped.
const (
	maxSpans      = 2048             // that wait to be sent
	exportTime    = 10 * time.Second // for one batch
	exportBackoff = 30 * time.Second // at most, between attempts to reach the collector
)

// Traces records spans: what a program does for a call, and for how long. It
// sends them to a collector. A nil *Traces records nothing, and its options are
// none.
//
// A span has a name, like that of a method, when it began and ended, the address
// of the other side and the text of an error. What a call carries, tokens and
// requests for certificates among it, is in none.
type Traces struct {
	provider *sdktrace.TracerProvider
	grpc     []otelgrpc.Option
}

// TracesOptions are the options of [OpenTraces].
type TracesOptions struct {
	Config      TracesConfig
	Service     string // name of the program, like hallmark-server
	TrustDomain string
	Log         *slog.Logger // nil is silent
}

// OpenTraces starts to export, if the configuration names a collector; else it
// returns nil. It does not wait for the collector. Whoever calls it closes what
// it returns.
func OpenTraces(o TracesOptions) (*Traces, error) {
	if o.Config.Endpoint == "" {
		return nil, nil
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	collector, err := dialCollector(o.Config)
	if err != nil {
		return nil, err
	}
	out, err := otlptrace.New(context.Background(), collector)
	if err != nil {
		return nil, fmt.Errorf("telemetry.traces: %w", err)
	}
	ratio := o.Config.Ratio
	if ratio == 0 {
		ratio = defaultRatio
	}
	host, _ := os.Hostname()
	attrs := []attribute.KeyValue{
		attribute.String("service.name", o.Service),
		attribute.String("service.version", version.String()),
		attribute.String("service.instance.id", host+"/"+strconv.Itoa(os.Getpid())),
		attribute.String("host.name", host),
		attribute.String("spiffe.trust_domain", o.TrustDomain),
	}
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))),
		sdktrace.WithResource(resource.NewSchemaless(attrs...)),
		sdktrace.WithBatcher(&exporter{SpanExporter: out, endpoint: o.Config.Endpoint, log: o.Log},
			sdktrace.WithMaxQueueSize(maxSpans), sdktrace.WithExportTimeout(exportTime)),
	)
	o.Log.Info("traces are exported", "endpoint", o.Config.Endpoint, "ratio", ratio)
	return &Traces{provider: provider, grpc: []otelgrpc.Option{
		otelgrpc.WithTracerProvider(provider),
		otelgrpc.WithMeterProvider(metricnoop.NewMeterProvider()), // [Calls] counts
		otelgrpc.WithPropagators(propagation.TraceContext{}),
	}}, nil
}

// collectorClient sends spans in one call a batch, without trying again: the
// exporters of OpenTelemetry do more, and make every gRPC server and client of
// the program offer compression.
type collectorClient struct{ conn *grpc.ClientConn }

// dialCollector makes a client. It connects with the first batch.
func dialCollector(c TracesConfig) (*collectorClient, error) {
	u, err := url.Parse(c.Endpoint)
	if err != nil {
		return nil, fmt.Errorf("telemetry.traces.endpoint: %w", err)
	}
	creds := insecure.NewCredentials()
	if u.Scheme == "https" {
		config := &tls.Config{MinVersion: tls.VersionTLS12}
		if c.CA != "" {
			if config.RootCAs, err = readRoots(c.CA); err != nil {
				return nil, fmt.Errorf("telemetry.traces.ca: %w", err)
			}
		}
		creds = credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient(u.Host, grpc.WithTransportCredentials(creds), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
			BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: exportBackoff,
		}}))
	if err != nil {
		return nil, fmt.Errorf("telemetry.traces.endpoint: %w", err)
	}
	return &collectorClient{conn}, nil
}

// Start does nothing: there is nothing to wait for.
func (c *collectorClient) Start(context.Context) error { return nil }

// Stop closes the connection.
func (c *collectorClient) Stop(context.Context) error { return c.conn.Close() }

// UploadTraces sends a batch.
func (c *collectorClient) UploadTraces(ctx context.Context, spans []*tracev1.ResourceSpans) error {
	resp, err := collectorv1.NewTraceServiceClient(c.conn).Export(ctx, &collectorv1.ExportTraceServiceRequest{ResourceSpans: spans})
	if err != nil {
		return err
	}
	if rejected := resp.GetPartialSuccess(); rejected.GetRejectedSpans() > 0 {
		return fmt.Errorf("it rejected %d spans: %s", rejected.RejectedSpans, rejected.ErrorMessage)
	}
	return nil
}

// Close sends what waits, if the collector takes it at once, and stops.
func (t *Traces) Close() error {
	if t == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return nil
}

// exporter says once that the collector is not there, not for each batch.
type exporter struct {
	sdktrace.SpanExporter
	endpoint string
	log      *slog.Logger
	failing  atomic.Bool
}

// ExportSpans sends a batch. It never fails: what is to be said was said.
func (e *exporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	switch err := e.SpanExporter.ExportSpans(ctx, spans); {
	case err != nil && !e.failing.Swap(true):
		e.log.Warn("the collector of telemetry.traces does not take spans; they are dropped until it does", "endpoint", e.endpoint, "error", err)
	case err == nil && e.failing.Swap(false):
		e.log.Info("the collector of telemetry.traces takes spans again", "endpoint", e.endpoint)
	}
	return nil
}

// Root begins a span of its own trace, or of that of another span, where from is
// valid: one that waits for this one, though no call leads from it to here.
func (t *Traces) Root(ctx context.Context, name string, from trace.SpanContext) (context.Context, trace.Span) {
	if t == nil {
		return ctx, none
	}
	if from.IsValid() {
		return t.provider.Tracer(scope).Start(trace.ContextWithSpanContext(ctx, from), name)
	}
	return t.provider.Tracer(scope).Start(ctx, name, trace.WithNewRoot())
}

const scope = "github.com/hallmark-id/hallmark"

// Span begins a part of the span that a context is in. Where that is none, or
// none that is kept, it does nothing and costs next to nothing.
func Span(ctx context.Context, name string) (context.Context, trace.Span) {
	in := trace.SpanFromContext(ctx)
	if !in.IsRecording() {
		return ctx, none
	}
	return in.TracerProvider().Tracer(scope).Start(ctx, name)
}

// none is a span that records nothing.
var none = trace.SpanFromContext(context.Background())

// ServerOptions make a gRPC server record each call but those of the methods
// left out. The trace of a caller is gone on with if trusted says so of the
// call's context: others could have everything kept, or pass for a part of a
// trace that they are not.
func (t *Traces) ServerOptions(trusted func(context.Context) bool, leftOut map[string]bool) []grpc.ServerOption {
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(slices.Concat(t.grpc, []otelgrpc.Option{
		otelgrpc.WithPublicEndpointFn(func(ctx context.Context, _ *stats.RPCTagInfo) bool { return !trusted(ctx) }),
		otelgrpc.WithFilter(func(info *stats.RPCTagInfo) bool { return !leftOut[info.FullMethodName] }),
	})...))}
}

// DialOptions make a gRPC client record each call but those of the methods left
// out, and pass its trace on.
func (t *Traces) DialOptions(leftOut map[string]bool) []grpc.DialOption {
	if t == nil {
		return nil
	}
	return []grpc.DialOption{grpc.WithStatsHandler(otelgrpc.NewClientHandler(slices.Concat(t.grpc, []otelgrpc.Option{
		otelgrpc.WithFilter(func(info *stats.RPCTagInfo) bool { return !leftOut[info.FullMethodName] }),
	})...))}
}
