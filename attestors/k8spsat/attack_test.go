package k8spsat_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/k8spsat"
	"github.com/hallmark-id/hallmark/test/harness"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

// TestATokenThatProvesNothingIsRefused goes through tokens and pods by which
// nobody must become a node, in both ways of verification.
func TestATokenThatProvesNothingIsRefused(t *testing.T) {
	changed := func(change func(*harness.ServiceToken)) func(testing.TB, *harness.APIServer) string {
		return func(t testing.TB, s *harness.APIServer) string {
			of := token()
			change(&of)
			return s.Mint(t, of)
		}
	}
	claimed := func(change func(map[string]any)) func(testing.TB, *harness.APIServer) string {
		return func(t testing.TB, s *harness.APIServer) string {
			c := token().Claims(s.Issuer)
			change(c)
			return s.Sign(t, c)
		}
	}
	good := changed(func(*harness.ServiceToken) {})
	object := func(change func(*harness.APIServer)) func(testing.TB, *harness.APIServer) string {
		return func(t testing.TB, s *harness.APIServer) string {
			change(s)
			return good(t, s)
		}
	}
	const review, keys, both = "review", "keys", "both"
	for name, c := range map[string]struct {
		by    string // the way of verification that it is for
		token func(testing.TB, *harness.APIServer) string
	}{
		"another key": {both, func(t testing.TB, s *harness.APIServer) string {
			return harness.SignJWT(t, jose.ES256, newKey(t), "key-1", token().Claims(s.Issuer))
		}},
		"a key that nobody knows": {both, func(t testing.TB, s *harness.APIServer) string {
			return harness.SignJWT(t, jose.ES256, newKey(t), "key-2", token().Claims(s.Issuer))
		}},
		"the public key as a secret": {both, func(t testing.TB, s *harness.APIServer) string {
			public, err := os.ReadFile(s.JWKS)
			must(t, err)
			return harness.SignJWT(t, jose.HS256, public, "key-1", token().Claims(s.Issuer))
		}},
		"no signature": {both, func(t testing.TB, s *harness.APIServer) string {
			signed := good(t, s)
			return signed[:strings.LastIndexByte(signed, '.')+1]
		}},
		"the algorithm none": {both, func(t testing.TB, s *harness.APIServer) string {
			signed := good(t, s)
			return "eyJhbGciOiJub25lIiwia2lkIjoia2V5LTEifQ" + signed[strings.IndexByte(signed, '.'):strings.LastIndexByte(signed, '.')+1]
		}},
		"claims of another token": {both, func(t testing.TB, s *harness.APIServer) string {
			a, b := strings.Split(good(t, s), "."), strings.Split(changed(func(of *harness.ServiceToken) { of.NodeUID = "other" })(t, s), ".")
			return a[0] + "." + b[1] + "." + a[2]
		}},
		"no JWT":                                {both, func(testing.TB, *harness.APIServer) string { return "token" }},
		"another audience":                      {both, changed(func(of *harness.ServiceToken) { of.Audience = []string{"https://kubernetes.default.svc"} })},
		"no audience":                           {both, changed(func(of *harness.ServiceToken) { of.Audience = nil })},
		"an end in the past":                    {both, changed(func(of *harness.ServiceToken) { of.Expires = time.Now().Add(-time.Hour) })},
		"no end":                                {keys, claimed(func(c map[string]any) { delete(c, "exp") })},
		"a beginning in the future":             {both, claimed(func(c map[string]any) { c["nbf"] = time.Now().Add(time.Hour).Unix() })},
		"another issuer":                        {both, claimed(func(c map[string]any) { c["iss"] = "https://other" })},
		"a user":                                {both, claimed(func(c map[string]any) { c["sub"] = "system:admin" })},
		"a node":                                {both, claimed(func(c map[string]any) { c["sub"] = "system:node:node-7" })},
		"a subject with a part too many":        {both, claimed(func(c map[string]any) { c["sub"] = "system:serviceaccount:hallmark:agent:x" })},
		"another account than its subject":      {keys, claimed(func(c map[string]any) { c["sub"] = "system:serviceaccount:hallmark:other" })},
		"a service account that is not allowed": {both, changed(func(of *harness.ServiceToken) { of.Account = "web" })},
		"the same account of another namespace": {both, changed(func(of *harness.ServiceToken) { of.Namespace = "shop" })},
		"no pod":                                {both, changed(func(of *harness.ServiceToken) { of.Pod = "" })},
		"a node that cannot be in a SPIFFE ID":  {keys, changed(func(of *harness.ServiceToken) { of.NodeUID = "a/../b" })},
		"another node than its pod's":           {review, changed(func(of *harness.ServiceToken) { of.Node = "node-8" })},
		"a node that was replaced":              {review, changed(func(of *harness.ServiceToken) { of.NodeUID = "node-before" })},
		"a pod that was replaced":               {review, changed(func(of *harness.ServiceToken) { of.PodUID = "pod-before" })},
		"a pod's name that leads elsewhere":     {review, changed(func(of *harness.ServiceToken) { of.Pod = "../../../nodes/node-7" })},
		"a pod that is gone":                    {review, object(func(s *harness.APIServer) { s.Set("/api/v1/namespaces/hallmark/pods/agent-v5wgr", "") })},
		"a node that is gone":                   {review, object(func(s *harness.APIServer) { s.Set("/api/v1/nodes/node-7", "") })},
		"a pod of another service account":      {review, object(func(s *harness.APIServer) { p := pod(); p.Account = "web"; s.SetPod(p) })},
		"a pod that is on no node":              {review, object(func(s *harness.APIServer) { p := pod(); p.Node = ""; s.SetPod(p) })},
		"a pod that has ended":                  {review, object(func(s *harness.APIServer) { p := pod(); p.Phase = "Failed"; s.SetPod(p) })},
	} {
		for way, config := range map[string]func(*harness.APIServer) k8spsat.ClusterConfig{review: reviewing, keys: offline} {
			if c.by != both && c.by != way {
				continue
			}
			t.Run(name+", by "+way, func(t *testing.T) {
				t.Parallel()
				s := cluster(t)
				e, err := verify(t, server(t, config(s)), payload(t, "production", c.token(t, s)))
				if e != nil || err == nil {
					t.Fatalf("attested as %+v", e)
				}
				if errors.Is(err, attestors.ErrUnavailable) {
					t.Errorf("it is told to try again: %v", err)
				}
			})
		}
	}
}

func TestAMalformedPayloadIsRefused(t *testing.T) {
	s := cluster(t)
	verifier := server(t, reviewing(s))
	for name, data := range map[string]string{
		"nothing":             "",
		"null":                "null",
		"an array":            "[]",
		"no cluster":          `{"token": "x"}`,
		"no token":            `{"cluster": "production"}`,
		"a cluster of a type": `{"cluster": {}, "token": "x"}`,
		"trailing":            `{"cluster": "production", "token": "x"}{}`,
		"another cluster":     `{"cluster": "` + strings.Repeat("x", 1000) + `", "token": "x"}`,
		"a path":              `{"cluster": "../production", "token": "x"}`,
		"far too much":        `{"cluster": "production", "token": "` + strings.Repeat("x", 1<<20) + `"}`,
	} {
		if e, err := verify(t, verifier, []byte(data)); e != nil || err == nil || len(err.Error()) > 300 {
			t.Errorf("%s: got %v, %v", name, e, err)
		}
	}
	if n := s.Calls.Load(); n != 0 {
		t.Errorf("the API server was asked %d times", n)
	}
}

// TestAnAPIServerThatIsWrongIsNotTheNodesFault: the node is told to try again,
// and the reason is in the server's log, without the token.
func TestAnAPIServerThatIsWrongIsNotTheNodesFault(t *testing.T) {
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, s) }
	}
	for name, c := range map[string]struct {
		h    http.HandlerFunc
		want string // in the log
	}{
		"no right to review": {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "forbidden", http.StatusForbidden) }, "403 Forbidden"},
		"an error":           {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "etcd is away", 500) }, "etcd is away"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/", http.StatusTemporaryRedirect)
		}, "307 Temporary"},
		"no JSON":        {text("<html>"), "invalid character"},
		"half an answer": {text(`{"kind":"TokenReview","status":{"authent`), "unexpected end"},
		"something else": {text(`{"kind":"Status"}`), "not with a TokenReview"},
		"an answer without end": {func(w http.ResponseWriter, r *http.Request) {
			chunk := []byte(strings.Repeat(" ", 1<<20))
			for range 64 {
				if _, err := w.Write(chunk); err != nil {
					return
				}
			}
		}, "longer than"},
		"a closed connection": {func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			s := cluster(t)
			s.Handle(c.h)
			var log bytes.Buffer
			verifier, err := k8spsat.New(k8spsat.ServerConfig{Clusters: []k8spsat.ClusterConfig{reviewing(s)}},
				k8spsat.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
			must(t, err)
			signed := s.Mint(t, token())
			if e, err := verify(t, verifier, payload(t, "production", signed)); e != nil || err != attestors.ErrUnavailable {
				t.Errorf("got %v, %v", e, err)
			}
			if !strings.Contains(log.String(), c.want) || strings.Contains(log.String(), signed) || strings.Contains(log.String(), "reviewer") {
				t.Errorf("the log is %s", log.String())
			}
		})
	}
}

func TestASlowAPIServerIsNotAskedEverMore(t *testing.T) {
	s := cluster(t)
	var running, most atomic.Int64
	release := make(chan struct{})
	s.Handle(func(w http.ResponseWriter, r *http.Request) {
		n := running.Add(1)
		defer running.Add(-1)
		for seen := most.Load(); n > seen && !most.CompareAndSwap(seen, n); seen = most.Load() {
		}
		<-release
		s.Answer(w, r)
	})
	verifier, data := server(t, reviewing(s)), payload(t, "production", s.Mint(t, token()))
	var wait sync.WaitGroup
	for range 40 {
		wait.Go(func() {
			// On a busy machine some wait too long.
			if _, err := verifier.Verify(t.Context(), data, nil); err != nil && err != attestors.ErrUnavailable {
				t.Error(err)
			}
		})
	}
	harness.Eventually(t, "the first questions", func(context.Context) error {
		if n := running.Load(); n < 32 {
			return fmt.Errorf("%d are asked", n)
		}
		return nil
	})
	close(release)
	wait.Wait()
	if most.Load() != 32 {
		t.Errorf("%d were asked at once", most.Load())
	}
}

// TestAReviewThatSaysTooLittleIsNoProof: what the API server does not vouch for
// is not made up.
func TestAReviewThatSaysTooLittleIsNoProof(t *testing.T) {
	const user = `"user":{"username":"system:serviceaccount:hallmark:agent","extra":{"authentication.kubernetes.io/pod-name":["agent-v5wgr"],"authentication.kubernetes.io/pod-uid":["pod-uid"]}}`
	for name, status := range map[string]string{
		"no status":               ``,
		"not authenticated":       `"audiences":["hallmark-server"],` + user,
		"no audience":             `"authenticated":true,` + user,
		"another audience":        `"authenticated":true,"audiences":["api"],` + user,
		"no user":                 `"authenticated":true,"audiences":["hallmark-server"]`,
		"no pod":                  `"authenticated":true,"audiences":["hallmark-server"],"user":{"username":"system:serviceaccount:hallmark:agent"}`,
		"two pods":                `"authenticated":true,"audiences":["hallmark-server"],` + strings.Replace(user, `["pod-uid"]`, `["pod-uid","other"]`, 1),
		"an account with a colon": `"authenticated":true,"audiences":["hallmark-server"],` + strings.Replace(user, ":agent\"", ":agent:x\"", 1),
	} {
		t.Run(name, func(t *testing.T) {
			s := cluster(t)
			s.Handle(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodPost {
					fmt.Fprintf(w, `{"kind":"TokenReview","status":{%s}}`, status)
					return
				}
				s.Answer(w, r)
			})
			if e, err := verify(t, server(t, reviewing(s)), payload(t, "production", s.Mint(t, token()))); e != nil || err == nil || errors.Is(err, attestors.ErrUnavailable) {
				t.Errorf("got %v, %v", e, err)
			}
		})
	}
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	s := cluster(t)
	write := func(text string) string {
		path := filepath.Join(t.TempDir(), "file")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	secret, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: newKey(t), KeyID: "key-1"}}})
	must(t, err)
	kubeconfig, err := os.ReadFile(s.Kubeconfig)
	must(t, err)
	with := func(old, new string) func(*k8spsat.ClusterConfig) {
		return func(c *k8spsat.ClusterConfig) {
			c.KubeconfigPath = write(strings.Replace(string(kubeconfig), old, new, 1))
		}
	}
	keys := func(change func(*k8spsat.ClusterConfig)) func(*k8spsat.ClusterConfig) {
		return func(c *k8spsat.ClusterConfig) { *c = offline(s); change(c) }
	}
	for want, change := range map[string]func(*k8spsat.ClusterConfig){
		"has no name":                           func(c *k8spsat.ClusterConfig) { c.Name = "" },
		"called \"a/b\"":                        func(c *k8spsat.ClusterConfig) { c.Name = "a/b" },
		"service_account_allow_list is missing": func(c *k8spsat.ClusterConfig) { c.ServiceAccountAllowList = nil },
		"write NAMESPACE:NAME":                  func(c *k8spsat.ClusterConfig) { c.ServiceAccountAllowList = []string{"agent"} },
		"audience has an empty item":            func(c *k8spsat.ClusterConfig) { c.Audience = []string{""} },
		"this is no pod":                        func(c *k8spsat.ClusterConfig) { c.KubeconfigPath = "" },
		"no such file":                          func(c *k8spsat.ClusterConfig) { c.KubeconfigPath = "/nonexistent" },
		"issuer is for verification":            func(c *k8spsat.ClusterConfig) { c.Issuer = "x" },
		"exclude each other":                    keys(func(c *k8spsat.ClusterConfig) { c.KubeconfigPath = s.Kubeconfig }),
		"issuer is missing":                     keys(func(c *k8spsat.ClusterConfig) { c.Issuer = "" }),
		"known to the API server alone":         keys(func(c *k8spsat.ClusterConfig) { c.AllowedPodLabelKeys = []string{"x"} }),
		"is no JWKS":                            keys(func(c *k8spsat.ClusterConfig) { c.JWKSPath = write("{") }),
		"holds no key":                          keys(func(c *k8spsat.ClusterConfig) { c.JWKSPath = write("{}") }),
		"none that verifies":                    keys(func(c *k8spsat.ClusterConfig) { c.JWKSPath = write(string(secret)) }),
		"malformed YAML":                        with("contexts", "\tcontexts"),
		"names no cluster and user":             with("current-context: test", "current-context: prod"),
		"like https://":                         with("https://", "http://"),
		"has no certificate-authority":          with(", certificate-authority: ca.pem", ""),
		"insecure-skip-tls-verify":              with("certificate-authority: ca.pem", "insecure-skip-tls-verify: true"),
		"proxy-url":                             with("certificate-authority: ca.pem", "certificate-authority: ca.pem, proxy-url: 'http://x'"),
		"exec, auth-provider or password":       with("tokenFile: token", "exec: {command: x}"),
		"neither a token":                       with("tokenFile: token", ""),
		"but not both":                          with("tokenFile: token", "client-key: x"),
	} {
		t.Run(want, func(t *testing.T) {
			c := reviewing(s)
			change(&c)
			_, err := k8spsat.New(k8spsat.ServerConfig{Clusters: []k8spsat.ClusterConfig{c}}, k8spsat.Options{})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v", err)
			}
		})
	}
	for want, clusters := range map[string][]k8spsat.ClusterConfig{"clusters is missing": nil, "there twice": {reviewing(s), reviewing(s)}} {
		if _, err := k8spsat.New(k8spsat.ServerConfig{Clusters: clusters}, k8spsat.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
	for _, c := range []k8spsat.AgentConfig{{}, {Cluster: "a/b"}, {Cluster: "a", TokenPath: "token"}} {
		if _, err := k8spsat.NewAgent(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

func FuzzVerify(f *testing.F) {
	s := cluster(f)
	verifier := server(f, offline(s))
	signed := s.Mint(f, token())
	f.Add(payload(f, "production", signed))
	f.Add(payload(f, "production", strings.Repeat("a.", 3)))
	f.Add([]byte(`{"cluster":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := verifier.Verify(t.Context(), data, nil)
		if (e == nil) == (err == nil) {
			t.Errorf("got %v, %v", e, err)
		}
		if e != nil && !bytes.Contains(data, []byte(signed[:20])) {
			t.Errorf("attested by %q", data)
		}
	})
}
