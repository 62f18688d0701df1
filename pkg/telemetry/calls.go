package telemetry

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Calls counts the calls of a gRPC server by method and code, and how long
// those with one answer took. Its methods may be called concurrently.
type Calls struct {
	total   *prometheus.CounterVec
	seconds *prometheus.HistogramVec
	methods sync.Map // *calls, by full method name
}

// calls are those of one method, looked up once.
type calls struct {
	seconds prometheus.Observer
	codes   [codes.Unauthenticated + 1]atomic.Pointer[prometheus.Counter] // those that came
}

// LatencyBuckets are the bounds, in seconds, of what takes a round trip on a
// good day and several seconds on a bad one.
var LatencyBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// NewCalls makes the metrics <name>_calls_total and <name>_call_duration_seconds.
// A nil registerer registers nothing.
func NewCalls(r prometheus.Registerer, name, what string) *Calls {
	make := promauto.With(r)
	return &Calls{
		total: make.NewCounterVec(prometheus.CounterOpts{
			Name: name + "_calls_total",
			Help: "Calls of " + what + " that have ended, streams among them, by gRPC method and code.",
		}, []string{"method", "code"}),
		seconds: make.NewHistogramVec(prometheus.HistogramOpts{
			Name:    name + "_call_duration_seconds",
			Help:    "How long calls of " + what + " took, by gRPC method; streams are not among them.",
			Buckets: LatencyBuckets,
		}, []string{"method"}),
	}
}

// Call counts a call with one answer that has ended. The method must be one of
// a bounded number.
func (c *Calls) Call(method string, err error, took time.Duration) {
	m := c.method(method)
	m.seconds.Observe(took.Seconds())
	m.count(c, method, err)
}

// Stream counts a stream that has ended. The method must be one of a bounded
// number.
func (c *Calls) Stream(method string, err error) { c.method(method).count(c, method, err) }

func (c *Calls) method(name string) *calls {
	if m, ok := c.methods.Load(name); ok {
		return m.(*calls)
	}
	m, _ := c.methods.LoadOrStore(name, &calls{seconds: &lazy{of: c.seconds, method: name}})
	return m.(*calls)
}

// lazy is a histogram that exists from its first observation: a stream has
// none.
type lazy struct {
	of     *prometheus.HistogramVec
	method string
	once   sync.Once
	made   prometheus.Observer
}

func (l *lazy) Observe(v float64) {
	l.once.Do(func() { l.made = l.of.WithLabelValues(l.method) })
	l.made.Observe(v)
}

func (m *calls) count(c *Calls, method string, err error) {
	code := status.Code(err)
	if int(code) >= len(m.codes) { // no code of gRPC's
		code = codes.Unknown
	}
	counter := m.codes[code].Load()
	if counter == nil {
		made := c.total.WithLabelValues(method, code.String())
		counter = &made
		m.codes[code].Store(counter)
	}
	(*counter).Inc()
}
