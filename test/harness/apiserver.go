package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// APIServer is what the API server of a Kubernetes cluster is to those who have
// it review tokens: it signs them, tells whether they are good, and describes
// pods and nodes, to who shows the credentials of its kubeconfig.
type APIServer struct {
	*Authority
	Issuer     string
	Kubeconfig string // path of the file
	JWKS       string // path of the file
	Calls      atomic.Int64

	key *ecdsa.PrivateKey

	mu      sync.Mutex
	objects map[string]string // by path
	handler http.HandlerFunc
}

// NewAPIServer starts one, of a cluster without pods and nodes.
func NewAPIServer(t testing.TB) *APIServer {
	t.Helper()
	s := &APIServer{Authority: NewAuthority(t), Issuer: "https://kubernetes.default.svc.cluster.local", objects: make(map[string]string)}
	s.handler = s.Answer
	var err error
	s.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	server := httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{s.Server(t, "127.0.0.1")}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)

	s.Kubeconfig, s.JWKS = filepath.Join(s.dir, "kubeconfig"), filepath.Join(s.dir, "jwks.json")
	must(t, os.WriteFile(filepath.Join(s.dir, "token"), []byte("reviewer\n"), 0o644))
	must(t, os.WriteFile(s.Kubeconfig, fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: 'https://%s', certificate-authority: ca.pem}}]
users: [{name: u, user: {tokenFile: token}}]
`, server.Listener.Addr()), 0o644))
	jwks, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: s.key.Public(), KeyID: "key-1", Algorithm: string(jose.ES256), Use: "sig"}}})
	must(t, err)
	must(t, os.WriteFile(s.JWKS, jwks, 0o644))
	return s
}

// ServiceToken is a service account token: its claims, and what the API server
// says of its user.
type ServiceToken struct {
	Namespace, Account string
	Pod, PodUID        string
	Node, NodeUID      string
	Audience           []string
	Expires            time.Time
}

// Claims are the token's.
func (s ServiceToken) Claims(issuer string) map[string]any {
	named := func(name, uid string) map[string]any { return map[string]any{"name": name, "uid": uid} }
	bound := map[string]any{"namespace": s.Namespace, "serviceaccount": named(s.Account, "account-uid")}
	if s.Pod != "" {
		bound["pod"] = named(s.Pod, s.PodUID)
	}
	if s.Node != "" {
		bound["node"] = named(s.Node, s.NodeUID)
	}
	return map[string]any{
		"iss": issuer, "aud": s.Audience, "sub": "system:serviceaccount:" + s.Namespace + ":" + s.Account,
		"exp": s.Expires.Unix(), "iat": time.Now().Unix(), "nbf": time.Now().Unix(), "kubernetes.io": bound,
	}
}

// Sign signs a token's claims.
func (s *APIServer) Sign(t testing.TB, claims map[string]any) string {
	t.Helper()
	return SignJWT(t, jose.ES256, s.key, "key-1", claims)
}

// SignJWT signs claims with any key.
func SignJWT(t testing.TB, algorithm jose.SignatureAlgorithm, key any, id string, claims map[string]any) string {
	t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, (&jose.SignerOptions{}).WithHeader("kid", id))
	must(t, err)
	token, err := jwt.Signed(signer).Claims(claims).Serialize()
	must(t, err)
	return token
}

// Mint signs a token.
func (s *APIServer) Mint(t testing.TB, token ServiceToken) string {
	t.Helper()
	return s.Sign(t, token.Claims(s.Issuer))
}

// Set makes an object be there, by the path that the API has for it, or gone if
// it is empty.
func (s *APIServer) Set(path, object string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[path] = object
}

// SetNode makes a node.
func (s *APIServer) SetNode(name, uid string, labels map[string]string) {
	text, _ := json.Marshal(map[string]any{"kind": "Node", "metadata": map[string]any{"name": name, "uid": uid, "labels": labels}})
	s.Set("/api/v1/nodes/"+name, string(text))
}

// SetPod makes a pod.
func (s *APIServer) SetPod(p Pod) { s.Set("/api/v1/namespaces/"+p.Namespace+"/pods/"+p.Name, p.JSON()) }

// Handle changes how it answers who is let in; nil is as it should.
func (s *APIServer) Handle(h http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.handler = h; h == nil {
		s.handler = s.Answer
	}
}

func (s *APIServer) serve(w http.ResponseWriter, r *http.Request) {
	s.Calls.Add(1)
	s.mu.Lock()
	handler := s.handler
	s.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer reviewer" {
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
		return
	}
	handler(w, r)
}

// Answer answers as an API server should.
func (s *APIServer) Answer(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost && r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews" {
		var review struct {
			Spec struct {
				Token     string
				Audiences []string
			}
		}
		if err := json.NewDecoder(r.Body).Decode(&review); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(map[string]any{
			"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": s.review(review.Spec.Token, review.Spec.Audiences),
		})
		return
	}
	s.mu.Lock()
	object := s.objects[r.URL.Path]
	s.mu.Unlock()
	if r.Method != http.MethodGet || object == "" {
		http.NotFound(w, r)
		return
	}
	io.WriteString(w, object)
}

func (s *APIServer) review(token string, audiences []string) map[string]any {
	refused := func(why string) map[string]any { return map[string]any{"user": map[string]any{}, "error": why} }
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return refused(err.Error())
	}
	var standard jwt.Claims
	type named struct {
		Name string `json:"name"`
		UID  string `json:"uid"`
	}
	var more struct {
		Bound struct {
			Pod  *named `json:"pod"`
			Node *named `json:"node"`
		} `json:"kubernetes.io"`
	}
	if err := parsed.Claims(s.key.Public(), &standard, &more); err != nil {
		return refused(err.Error())
	}
	if err := standard.Validate(jwt.Expected{Issuer: s.Issuer, Time: time.Now()}); err != nil {
		return refused(err.Error())
	}
	both := slices.DeleteFunc(slices.Clone(audiences), func(a string) bool { return !slices.Contains(standard.Audience, a) })
	if len(both) == 0 {
		return refused("token audiences are invalid for the target audiences")
	}
	extra := make(map[string][]string)
	for name, of := range map[string]*named{"pod": more.Bound.Pod, "node": more.Bound.Node} {
		if of != nil {
			maps.Copy(extra, map[string][]string{
				"authentication.kubernetes.io/" + name + "-name": {of.Name}, "authentication.kubernetes.io/" + name + "-uid": {of.UID},
			})
		}
	}
	return map[string]any{
		"authenticated": true, "audiences": both,
		"user": map[string]any{"username": standard.Subject, "uid": "account-uid", "groups": []string{"system:serviceaccounts"}, "extra": extra},
	}
}
