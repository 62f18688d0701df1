package upstream_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/server/upstream"
	"github.com/hallmark-id/hallmark/test/harness"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a registry in memory, a key manager, a clock, and a CA above.
type world struct {
	t        testing.TB
	registry *registry.Registry
	keys     apiv1.KeyManager
	ca       *harness.UpstreamCA
	dir      string
	conf     upstream.Config
	down     func(bool) // has the upstream fail, or not

	mu  sync.Mutex
	now time.Time
}

func newWorld(t testing.TB) *world {
	t.Helper()
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	w := &world{t: t, keys: authority.NewMemoryKeys(), dir: t.TempDir(), now: time.Now().Truncate(time.Second)}
	w.ca = harness.NewUpstreamCA(t, w.time)
	w.down = func(down bool) {
		if down {
			w.ca.Break(func(rw http.ResponseWriter, _ *http.Request) {
				http.Error(rw, "out of order", http.StatusServiceUnavailable)
			})
		} else {
			w.ca.Break(nil)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.registry, err = registry.Open(ctx, registry.Options{Store: db, TrustDomain: td, Now: w.time})
	must(t, err)
	done := make(chan struct{})
	go func() { defer close(done); w.registry.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		must(t, db.Close())
	})
	return w
}

func (w *world) time() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) add(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

// serve serves an API over HTTP and returns its URL.
func (w *world) serve(h http.Handler) string {
	s := httptest.NewServer(h)
	w.t.Cleanup(s.Close)
	return s.URL
}

func (w *world) file(name, text string) string {
	path := filepath.Join(w.dir, name)
	must(w.t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// kinds are the upstreams, each with the same CA behind it.
var kinds = []struct {
	name  string
	setUp func(*world)
}{
	{"disk", func(w *world) {
		certificate, key, roots := w.ca.Files(w.t, w.dir)
		w.conf = upstream.Config{Disk: &upstream.DiskConfig{Certificate: certificate, Key: key}, Bundle: roots}
		w.down = func(down bool) {
			if down {
				must(w.t, os.Rename(key, key+".away"))
			} else {
				must(w.t, os.Rename(key+".away", key))
			}
		}
	}},
	{"vault", func(w *world) {
		w.conf = upstream.Config{Vault: &upstream.VaultConfig{
			Address: w.serve(w.ca.Vault(nil)), AppRole: &upstream.VaultAppRole{RoleID: harness.VaultRole, SecretIDFile: w.file("secret", harness.VaultSecret+"\n")},
		}}
	}},
	{"step_ca", func(w *world) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(w.t, err)
		jwk := &jose.JSONWebKey{Key: key, KeyID: "provisioner-key", Algorithm: "ES256"}
		data, err := json.Marshal(jwk)
		must(w.t, err)
		public := jwk.Public()
		ca := harness.NewAuthority(w.t)
		w.conf = upstream.Config{StepCA: &upstream.StepCAConfig{
			Address: w.serve(w.ca.StepCA("spiffe", &public, ca.Pool())), Root: ca.Path, Provisioner: "spiffe", JWK: &upstream.StepCAJWK{KeyFile: w.file("key.json", string(data))},
		}}
	}},
	{"aws_pca", func(w *world) {
		w.t.Setenv("AWS_ACCESS_KEY_ID", "AKIAHALLMARK")
		w.t.Setenv("AWS_SECRET_ACCESS_KEY", "secret of the key")
		w.conf = upstream.Config{AWSPCA: &upstream.AWSPCAConfig{
			CertificateAuthorityARN: harness.UpstreamARN, Endpoint: w.serve(w.ca.AWSPCA("AKIAHALLMARK", "secret of the key")),
		}}
	}},
	{"gcp_cas", func(w *world) {
		google := harness.NewGCP(w.t, harness.GCPInstance{})
		w.conf = upstream.Config{GCPCAS: &upstream.GCPCASConfig{
			Pool: harness.UpstreamPool, Endpoint: w.serve(w.ca.GCPCAS()), MetadataAddress: w.serve(google.Metadata(w.t)),
		}}
	}},
}

// eachKind runs a test over every kind of upstream.
func eachKind(t *testing.T, test func(*testing.T, *world)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			w := newWorld(t)
			k.setUp(w)
			if _, err := w.conf.Check(); err != nil {
				t.Fatal(err)
			}
			test(t, w)
		})
	}
}

// open starts a server's authorities, as a start or restart of it would.
func (w *world) open() *authority.Authorities {
	w.t.Helper()
	return w.tryOpen(w.t)()
}

// tryOpen makes the upstream, and returns what opens the authorities: files must
// be there when a server starts, but the upstream need not answer.
func (w *world) tryOpen(t testing.TB) func() *authority.Authorities {
	t.Helper()
	up, err := upstream.New(w.conf, upstream.Options{TrustDomain: td, Now: w.time})
	must(t, err)
	return func() *authority.Authorities {
		a, err := authority.Open(context.Background(), authority.Options{
			Registry: w.registry, Keys: w.keys, TrustDomain: td, Server: "main", Upstream: up, Now: w.time,
		})
		must(t, err)
		return a
	}
}

// rotate does what is due, until a time.
func (w *world) rotate(a *authority.Authorities, until time.Time) {
	w.t.Helper()
	for range 1000 {
		must(w.t, a.Follow(w.t.Context()))
		next, err := a.Rotate(w.t.Context())
		must(w.t, err)
		if !next.Before(until) {
			w.add(until.Sub(w.time()))
			return
		}
		w.add(max(next.Sub(w.time()), time.Second))
	}
	w.t.Fatal("it rotates without end")
}

func (w *world) bundle() *bundle.Bundle { return w.registry.View().Bundle(td) }

func (w *world) published(root *x509.Certificate) bool {
	return w.bundle() != nil && w.bundle().HasX509(root)
}
