package publish_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"log/slog"
	"math/big"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/publish"
	"github.com/hallmark-id/hallmark/server/registry"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const issuer = "https://id.example.org"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// source is the bundle that servers know.
type source struct {
	mu      sync.Mutex
	bundle  *bundle.Bundle
	changed chan struct{}
}

func (s *source) get() (*bundle.Bundle, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundle, s.changed
}

func (s *source) set(b *bundle.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bundle = b
	close(s.changed)
	s.changed = make(chan struct{})
}

func newSource(b *bundle.Bundle) *source { return &source{bundle: b, changed: make(chan struct{})} }

// newBundle makes a bundle with a root and one JWT authority for each ID.
func newBundle(t testing.TB, sequence uint64, ids ...string) *bundle.Bundle {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<36, 0), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: td.Name()}},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	root, err := x509.ParseCertificate(der)
	must(t, err)
	b := &bundle.Bundle{TrustDomain: td, SequenceNumber: sequence, RefreshHint: 5 * time.Minute, X509Authorities: []bundle.X509Authority{{Certificate: root}}}
	for _, id := range ids {
		b = with(t, b, id)
	}
	b.SequenceNumber = sequence
	return b
}

// with is the next bundle, which has one more JWT authority.
func with(t testing.TB, b *bundle.Bundle, id string) *bundle.Bundle {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	next := b.Clone()
	next.JWTAuthorities = append(next.JWTAuthorities, bundle.JWTAuthority{KeyID: id, PublicKey: key.Public(), ExpiresAt: time.Unix(1<<36, 0)})
	next.SequenceNumber++
	return next
}

// authority is the record of a JWT authority of a bundle.
func authority(b *bundle.Bundle, id string) *registry.Authority {
	return &registry.Authority{Kind: registry.JWT, State: registry.Prepared, ID: id, PublicKey: b.JWTKey(id)}
}

// world is a publisher, and what it says.
type world struct {
	*publish.Publisher
	*source
	log     *buffer
	metrics *prometheus.Registry
}

// newWorld makes a publisher that nobody runs yet.
func newWorld(t testing.TB, name string, s *source, targets ...publish.Config) *world {
	t.Helper()
	publish.CheckAll(targets, func(path string, err error) { t.Fatalf("publish.%s: %v", path, err) })
	w := &world{source: s, log: &buffer{}, metrics: prometheus.NewRegistry()}
	w.Publisher = publish.New(publish.Options{
		Targets: targets, Server: name, Bundle: s.get, MaxAge: 5 * time.Minute,
		Log: slog.New(slog.NewTextHandler(w.log, nil)), Metrics: metrics.New(w.metrics),
	})
	return w
}

// value returns that of a metric of the target web; with an outcome, of that one.
func (w *world) value(t testing.TB, name, outcome string) float64 {
	t.Helper()
	families, err := w.metrics.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.Metric {
			labels := make(map[string]string)
			for _, l := range m.Label {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["outcome"] == outcome {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no metric %s of %q", name, outcome)
	return 0
}

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// sequence returns that of a document.
func sequence(t testing.TB, text []byte) uint64 {
	t.Helper()
	var d struct {
		Sequence *uint64 `json:"spiffe_sequence"`
	}
	must(t, json.Unmarshal(text, &d))
	if d.Sequence == nil {
		t.Fatalf("no sequence number is in %s", text)
	}
	return *d.Sequence
}

// everything is a target of all documents.
func everything(c publish.Config) publish.Config {
	c.Name, c.Bundle, c.Issuers = "web", "bundle.json", []publish.IssuerConfig{{URL: issuer}, {URL: issuer + "/shop", Prefix: "shop"}}
	return c
}

// paths are those of everything.
var paths = []string{"keys", ".well-known/openid-configuration", "shop/keys", "shop/.well-known/openid-configuration", "bundle.json"}
