package harness

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Issuer is an OpenID Connect provider as far as those who validate its tokens
// know it: a discovery document and keys, over TLS.
type Issuer struct {
	URL   string
	CA    string // path of a PEM file
	Key   crypto.Signer
	KeyID string
	// Asked counts the requests.
	Asked atomic.Int64

	server *httptest.Server

	mu      sync.Mutex
	keys    []jose.JSONWebKey
	handler http.HandlerFunc
}

// NewIssuer starts one, with a key for ES256.
func NewIssuer(t testing.TB) *Issuer {
	t.Helper()
	authority := NewAuthority(t)
	i := &Issuer{CA: authority.Path}
	i.server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		i.Asked.Add(1)
		i.mu.Lock()
		h := i.handler
		i.mu.Unlock()
		h(w, r)
	}))
	i.handler = i.Answer
	i.server.TLS = &tls.Config{Certificates: []tls.Certificate{authority.Server(t, "127.0.0.1")}}
	i.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	i.server.StartTLS()
	t.Cleanup(i.server.Close)
	i.URL = i.server.URL
	i.Rotate(t, "key-1")
	return i
}

// Rotate replaces the key by a new one.
func (i *Issuer) Rotate(t testing.TB, id string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.Key, i.KeyID = key, id
	i.keys = []jose.JSONWebKey{{Key: key.Public(), KeyID: id, Algorithm: string(jose.ES256), Use: "sig"}}
}

// Publish makes these the keys that are published.
func (i *Issuer) Publish(keys ...jose.JSONWebKey) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = keys
}

// JWKS returns the keys that are published.
func (i *Issuer) JWKS(t testing.TB) []byte {
	t.Helper()
	i.mu.Lock()
	defer i.mu.Unlock()
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: i.keys})
	must(t, err)
	return data
}

// Handle makes h answer instead of [Issuer.Answer].
func (i *Issuer) Handle(h http.HandlerFunc) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.handler = h
}

// Stop makes the issuer be away for good.
func (i *Issuer) Stop() { i.server.Close() }

// Answer answers as a provider does.
func (i *Issuer) Answer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		_ = json.NewEncoder(w).Encode(map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/jwks"})
	case "/jwks":
		i.mu.Lock()
		keys := i.keys
		i.mu.Unlock()
		_ = json.NewEncoder(w).Encode(jose.JSONWebKeySet{Keys: keys})
	default:
		http.NotFound(w, r)
	}
}

// Claims are those of a token that is good for ten minutes, with others put in,
// or taken out where they are nil.
func (i *Issuer) Claims(audience string, change map[string]any) map[string]any {
	now := time.Now()
	c := map[string]any{"iss": i.URL, "sub": "job-7", "aud": audience, "iat": now.Unix(), "exp": now.Add(10 * time.Minute).Unix()}
	for name, value := range change {
		c[name] = value
		if value == nil {
			delete(c, name)
		}
	}
	return c
}

// Sign signs claims with the issuer's key.
func (i *Issuer) Sign(t testing.TB, claims map[string]any) string {
	t.Helper()
	return SignJWT(t, jose.ES256, i.Key, i.KeyID, claims)
}
