package harness

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// GCP stands in for what of Google Cloud an instance and a server see: the metadata
// server, Google's keys, the token endpoint and the Compute Engine API. Tokens have
// Google's form and real signatures.
type GCP struct {
	Keys string // JWKS file of the public key, for the configuration
	Key  *rsa.PrivateKey

	cloudFaults

	mu       sync.Mutex
	instance GCPInstance
	account  *rsa.PrivateKey // of a service account
	asked    []string        // for tokens, by whom
}

// GCPInstance is one.
type GCPInstance struct {
	Project, Zone, Name, ID string
	Status                  string // "": RUNNING
	Tags                    []string
	Labels, Metadata        map[string]string
}

// GCPKeyID is that of Google's key.
const GCPKeyID = "89ce3598c473af1bda4bff95e6c8736450206fba"

// NewGCP makes it, with an instance.
func NewGCP(t testing.TB, i GCPInstance) *GCP {
	t.Helper()
	g := &GCP{instance: i}
	var err error
	g.Key, err = rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	dir := shortDir(t)
	must(t, os.Chmod(dir, 0o755))
	g.Keys = filepath.Join(dir, "certs")
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: g.Key.Public(), KeyID: GCPKeyID, Algorithm: "RS256", Use: "sig"}}})
	must(t, err)
	must(t, os.WriteFile(g.Keys, data, 0o644))
	return g
}

// Set changes the instance.
func (g *GCP) Set(i GCPInstance) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.instance = i
}

// Asked returns who asked for tokens of the API.
func (g *GCP) Asked() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return append([]string(nil), g.asked...)
}

// Claims are those of an instance's token.
func (i GCPInstance) Claims(audience string) map[string]any {
	return map[string]any{
		"iss": "https://accounts.google.com", "aud": audience, "sub": "112179062720391305885", "azp": "112179062720391305885",
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
		"email": "123456789-compute@developer.gserviceaccount.com", "email_verified": true,
		"google": map[string]any{"compute_engine": map[string]any{
			"project_id": i.Project, "project_number": 739419398126, "zone": i.Zone,
			"instance_id": i.ID, "instance_name": i.Name, "instance_creation_timestamp": 1496953245,
		}},
	}
}

// Sign signs claims as Google does.
func (g *GCP) Sign(t testing.TB, claims map[string]any) string {
	t.Helper()
	return SignJWT(t, jose.RS256, g.Key, GCPKeyID, claims)
}

// AccountFile makes the file of a service account's key, whose tokens are at a URL.
func (g *GCP) AccountFile(t testing.TB, tokenURL string) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	data, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "p", "private_key_id": "key-1", "client_email": "server@p.iam.gserviceaccount.com",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), "token_uri": tokenURL,
	})
	must(t, err)
	path := filepath.Join(t.TempDir(), "account.json")
	must(t, os.WriteFile(path, data, 0o600))
	g.mu.Lock()
	defer g.mu.Unlock()
	g.account = key
	return path
}

// Metadata is the instance's metadata server.
func (g *GCP) Metadata(t testing.TB) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /computeMetadata/v1/instance/service-accounts/default/identity", func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		i := g.instance
		g.mu.Unlock()
		claims := i.Claims(r.FormValue("audience"))
		if r.FormValue("format") != "full" {
			delete(claims, "google")
		}
		io.WriteString(w, g.Sign(t, claims))
	})
	mux.HandleFunc("GET /computeMetadata/v1/instance/service-accounts/default/token", func(w http.ResponseWriter, _ *http.Request) {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.asked = append(g.asked, "instance")
		io.WriteString(w, `{"access_token":"ya29.token","expires_in":3599,"token_type":"Bearer"}`)
	})
	return g.metadata(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata-Flavor") != "Google" || r.Header.Get("X-Forwarded-For") != "" {
			http.Error(w, "Missing Metadata-Flavor:Google header.", http.StatusForbidden)
			return
		}
		w.Header().Set("Metadata-Flavor", "Google")
		mux.ServeHTTP(w, r)
	})
}

// API is the token endpoint, at /token, and the Compute Engine API.
func (g *GCP) API() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		token, err := jwt.ParseSigned(r.FormValue("assertion"), []jose.SignatureAlgorithm{jose.RS256})
		var claims jwt.Claims
		var more struct {
			Scope string `json:"scope"`
		}
		if err != nil || g.account == nil || token.Claims(g.account.Public(), &claims, &more) != nil ||
			claims.Validate(jwt.Expected{AnyAudience: []string{"http://" + r.Host + "/token"}, Time: time.Now()}) != nil ||
			more.Scope == "" || r.FormValue("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
			http.Error(w, `{"error":"invalid_grant"}`, http.StatusBadRequest)
			return
		}
		g.asked = append(g.asked, claims.Issuer)
		io.WriteString(w, `{"access_token":"ya29.token","expires_in":3599,"token_type":"Bearer"}`)
	})
	mux.HandleFunc("GET /compute/v1/projects/{project}/zones/{zone}/instances/{name}", func(w http.ResponseWriter, r *http.Request) {
		i := g.instance
		switch {
		case r.Header.Get("Authorization") != "Bearer ya29.token":
			http.Error(w, `{"error":{"code":401}}`, http.StatusUnauthorized)
			return
		case r.PathValue("project") != i.Project || r.PathValue("zone") != i.Zone || r.PathValue("name") != i.Name:
			http.Error(w, `{"error":{"code":404}}`, http.StatusNotFound)
			return
		}
		items := []any{}
		for key, value := range i.Metadata {
			items = append(items, map[string]string{"key": key, "value": value})
		}
		status := i.Status
		if status == "" {
			status = "RUNNING"
		}
		_ = json.NewEncoder(w).Encode(map[string]any{
			"kind": "compute#instance", "id": i.ID, "name": i.Name, "status": status, "labels": i.Labels,
			"tags": map[string]any{"items": i.Tags}, "metadata": map[string]any{"kind": "compute#metadata", "items": items},
		})
	})
	return g.api(func(w http.ResponseWriter, r *http.Request) {
		g.mu.Lock()
		defer g.mu.Unlock()
		mux.ServeHTTP(w, r)
	})
}
