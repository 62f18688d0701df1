package gcpiit_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/gcpiit"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/test/harness"
)

func TestAnInstanceIsWhatItsTokenSays(t *testing.T) {
	google := harness.NewGCP(t, blog())
	e, err := attest(t, newServer(t, trusting(google)), newAgent(t, google, gcpiit.AgentConfig{}))
	must(t, err)
	if want := "gcp_iit/big-kahuna-123456/152986662232938449"; e.Path != want {
		t.Errorf("path is %s, want %s", e.Path, want)
	}
	if e.CanReattest || !e.Once {
		t.Error("the token admits more than once")
	}
	want := []string{
		"gcp_iit:instance-name:blog-server", "gcp_iit:project-id:big-kahuna-123456",
		"gcp_iit:sa:123456789-compute@developer.gserviceaccount.com", "gcp_iit:zone:us-west1-b",
	}
	if got := values(e); !slices.Equal(got, want) {
		t.Errorf("selectors are %q", got)
	}
}

func TestATemplateNamesTheAgent(t *testing.T) {
	google := harness.NewGCP(t, blog())
	c := trusting(google)
	c.AllowReattestation = true
	c.AgentPathTemplate = "{{ .PluginName }}/{{ .Zone }}/{{ .ProjectNumber }}/{{ .InstanceName }}/{{ .InstanceCreationTimestamp }}/{{ .ServiceAccount }}"
	e, err := attest(t, newServer(t, c), newAgent(t, google, gcpiit.AgentConfig{}))
	must(t, err)
	if want := "gcp_iit/us-west1-b/739419398126/blog-server/1496953245/123456789-compute_developer.gserviceaccount.com"; e.Path != want {
		t.Errorf("path is %s, want %s", e.Path, want)
	}
	if !e.CanReattest || e.Once {
		t.Errorf("the evidence is %+v", e)
	}
}

func TestATrustDomainMayHaveAnAudienceOfItsOwn(t *testing.T) {
	google := harness.NewGCP(t, blog())
	c := trusting(google)
	c.Audience = "spiffe://example.org"
	s := newServer(t, c)
	_, err := attest(t, s, newAgent(t, google, gcpiit.AgentConfig{Audience: "spiffe://example.org"}))
	must(t, err)
	if _, err := attest(t, s, newAgent(t, google, gcpiit.AgentConfig{})); err == nil || !strings.Contains(err.Error(), "audience") {
		t.Errorf("error is %v", err)
	}
}

// TestGooglesKeysAreFetched goes over TLS, as with Google's own address.
func TestGooglesKeysAreFetched(t *testing.T) {
	google := harness.NewGCP(t, blog())
	keys := harness.NewIssuer(t)
	keys.Publish(jose.JSONWebKey{Key: google.Key.Public(), KeyID: harness.GCPKeyID, Algorithm: "RS256", Use: "sig"})
	c := trusting(google)
	c.JWKSPath, c.JWKSURL, c.CAPath = "", keys.URL+"/jwks", keys.CA
	s, agent := newServer(t, c), newAgent(t, google, gcpiit.AgentConfig{})
	for range 3 {
		_, err := attest(t, s, agent)
		must(t, err)
	}
	if n := keys.Asked.Load(); n != 1 {
		t.Errorf("they were fetched %d times", n)
	}
	for name, h := range map[string]http.HandlerFunc{
		"an error": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"a page":   func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") },
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
	} {
		keys.Handle(h)
		if _, err := attest(t, newServer(t, c), agent); !errors.Is(err, attestors.ErrUnavailable) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func TestTheComputeEngineAPISaysMore(t *testing.T) {
	i := blog()
	i.Tags = []string{"web", "blog-server"}
	i.Labels = map[string]string{"team": "shop", "empty": "", "other": "x"}
	i.Metadata = map[string]string{"tier": "front", "ssh-keys": "secret"}
	want := []string{
		"gcp_iit:instance-name:blog-server", "gcp_iit:label:empty:", "gcp_iit:label:team:shop", "gcp_iit:metadata:tier:front",
		"gcp_iit:project-id:big-kahuna-123456", "gcp_iit:sa:123456789-compute@developer.gserviceaccount.com",
		"gcp_iit:tag:blog-server", "gcp_iit:tag:web", "gcp_iit:zone:us-west1-b",
	}
	for name, by := range map[string]string{"a service account's key": "server@p.iam.gserviceaccount.com", "the server's instance": "instance", "the environment's key": "server@p.iam.gserviceaccount.com"} {
		google := harness.NewGCP(t, i)
		c := describing(t, google)
		switch name {
		case "the server's instance":
			own := httptest.NewServer(google.Metadata(t))
			t.Cleanup(own.Close)
			c.ServiceAccountFile, c.MetadataAddress = "", own.URL
			t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
		case "the environment's key":
			t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", c.ServiceAccountFile)
			c.ServiceAccountFile = ""
		}
		s, agent := newServer(t, c), newAgent(t, google, gcpiit.AgentConfig{})
		for range 2 {
			e, err := attest(t, s, agent)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got := values(e); !slices.Equal(got, want) {
				t.Errorf("%s: selectors are %q", name, got)
			}
		}
		if got := google.Asked(); !slices.Equal(got, []string{by}) {
			t.Errorf("%s: tokens were asked for by %q", name, got)
		}
	}
}

// TestWhatTheAPISaysAgainstAnInstance goes through instances that the token alone
// would admit.
func TestWhatTheAPISaysAgainstAnInstance(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*harness.GCPInstance)
		want   string
	}{
		"gone":             {func(i *harness.GCPInstance) { i.Name = "other" }, "instance is gone"},
		"made anew":        {func(i *harness.GCPInstance) { i.ID = "1" }, "another one has its name"},
		"terminated":       {func(i *harness.GCPInstance) { i.Status = "TERMINATED" }, "not running"},
		"suspended":        {func(i *harness.GCPInstance) { i.Status = "SUSPENDED" }, "not running"},
		"of much metadata": {func(i *harness.GCPInstance) { i.Metadata = map[string]string{"tier": strings.Repeat("x", 129)} }, "max_metadata_value_size"},
	} {
		google := harness.NewGCP(t, blog())
		config := describing(t, google)
		proof := []byte(google.Sign(t, blog().Claims(gcpiit.DefaultAudience)))
		i := blog()
		c.change(&i)
		google.Set(i)
		e, err := newServer(t, config).Verify(t.Context(), proof, unasked(t))
		if err == nil || e != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

func TestAPIsThatFailAdmitNobody(t *testing.T) {
	text := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			io.WriteString(w, body)
		}
	}
	for name, h := range map[string]http.HandlerFunc{
		"an error":        text(500, ""),
		"a denial":        text(403, `{"error":{"code":403}}`),
		"a page":          text(200, "<html><body>Sign in</body></html>"),
		"nothing":         text(200, ""),
		"an empty answer": text(200, "{}"),
		"half an answer":  text(200, `{"id": "1`),
		"far too much":    text(200, strings.Repeat(" ", 4<<20)),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
		"a cut connection": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		google := harness.NewGCP(t, blog())
		c := describing(t, google)
		s, agent := newServer(t, c), newAgent(t, google, gcpiit.AgentConfig{})
		google.Break(h)
		if _, err := attest(t, s, agent); !errors.Is(err, attestors.ErrUnavailable) {
			t.Errorf("%s, without a token: error is %v", name, err)
		}
		google.Break(nil)
		_, err := attest(t, s, agent)
		must(t, err)
		google.Break(h)
		if _, err := attest(t, s, agent); !errors.Is(err, attestors.ErrUnavailable) {
			t.Errorf("%s, with a token: error is %v", name, err)
		}
	}
}

// TestAgentsTakeNothingForAToken goes through what may answer at the address of the
// metadata server.
func TestAgentsTakeNothingForAToken(t *testing.T) {
	google := harness.NewGCP(t, blog())
	agent := newAgent(t, google, gcpiit.AgentConfig{})
	flavored := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			io.WriteString(w, body)
		}
	}
	for name, h := range map[string]http.HandlerFunc{
		"an error":       func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"no account":     func(w http.ResponseWriter, r *http.Request) { http.NotFound(w, r) },
		"another server": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "a.b.c") },
		"a page":         flavored("<html><body>Sign in</body></html>"),
		"nothing":        flavored(""),
		"JSON":           flavored(`{"error": "x"}` + "\n"),
		"far too much":   flavored(strings.Repeat("x", 1<<20)),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusTemporaryRedirect)
		},
		"a cut answer": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "half")
			panic(http.ErrAbortHandler)
		},
	} {
		google.Fail(h)
		if proof, err := agent.Proof(t.Context()); err == nil {
			t.Errorf("%s: the proof is %q", name, proof)
		}
	}
	google.Fail(nil)
	_, err := agent.Proof(t.Context())
	must(t, err)
	if _, err := agent.Respond(t.Context(), []byte("x")); err == nil {
		t.Error("a challenge is answered")
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	google := harness.NewGCP(t, blog())
	good := describing(t, google)
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "account.json")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	data, err := os.ReadFile(good.ServiceAccountFile)
	must(t, err)
	with := func(change func(*gcpiit.ServerConfig)) gcpiit.ServerConfig {
		c := good
		change(&c)
		return c
	}
	for name, c := range map[string]struct {
		config gcpiit.ServerConfig
		want   string
	}{
		"nobody":           {gcpiit.ServerConfig{JWKSPath: google.Keys}, "projectid_allow_list is missing"},
		"a wildcard":       {with(func(c *gcpiit.ServerConfig) { c.ProjectIDAllowList = []string{"*"} }), "a project's ID"},
		"a negative age":   {with(func(c *gcpiit.ServerConfig) { c.MaxAge = config.Duration(-time.Second) }), "max_age"},
		"a long age":       {with(func(c *gcpiit.ServerConfig) { c.MaxAge = config.Duration(2 * time.Hour) }), "max_age"},
		"two sources":      {with(func(c *gcpiit.ServerConfig) { c.JWKSURL = "https://example.org" }), "jwks_url"},
		"keys in plain":    {with(func(c *gcpiit.ServerConfig) { c.JWKSPath, c.JWKSURL = "", "http://example.org/x" }), "not https"},
		"no file of keys":  {with(func(c *gcpiit.ServerConfig) { c.JWKSPath = "/no" }), "/no"},
		"labels unasked":   {with(func(c *gcpiit.ServerConfig) { c.UseInstanceMetadata = false }), "use_instance_metadata"},
		"an API in plain":  {with(func(c *gcpiit.ServerConfig) { c.Endpoint = "http://10.0.0.1" }), "not HTTPS"},
		"no account":       {with(func(c *gcpiit.ServerConfig) { c.ServiceAccountFile = "/no" }), "/no"},
		"a user's account": {with(func(c *gcpiit.ServerConfig) { c.ServiceAccountFile = file(`{"type": "authorized_user"}`) }), "not the key of a service account"},
		"no key": {with(func(c *gcpiit.ServerConfig) {
			c.ServiceAccountFile = file(`{"type": "service_account", "client_email": "x"}`)
		}), "no private key"},
		"tokens in plain": {with(func(c *gcpiit.ServerConfig) {
			c.ServiceAccountFile = file(strings.Replace(string(data), "127.0.0.1", "10.0.0.1", 1))
		}), "not HTTPS"},
		"a negative size":    {with(func(c *gcpiit.ServerConfig) { c.MaxMetadataValueSize = -1 }), "max_metadata_value_size"},
		"another's path":     {with(func(c *gcpiit.ServerConfig) { c.AgentPathTemplate = "x/{{ .InstanceID }}" }), "does not begin with gcp_iit/"},
		"metadata elsewhere": {with(func(c *gcpiit.ServerConfig) { c.MetadataAddress = "http://x/y" }), "metadata_address"},
	} {
		if _, err := gcpiit.New(c.config, gcpiit.Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	for _, c := range []gcpiit.AgentConfig{{MetadataAddress: "metadata.google.internal"}, {ServiceAccount: "a/../b"}} {
		if _, err := gcpiit.NewAgent(c); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
}
