package azureimds_test

import (
	"context"
	"crypto/sha1"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/azureimds"
	"github.com/hallmark-id/hallmark/test/harness"
)

func TestAMachineIsWhatItsDocumentSays(t *testing.T) {
	azure, c := world(t, machine())
	s, agent := newServer(t, c), newAgent(t, azure, azureimds.AgentConfig{})
	for range 2 {
		e, err := attest(t, s, agent)
		must(t, err)
		if want := "azure_imds/" + tenant + "/" + subscription + "/" + vm; e.Path != want {
			t.Errorf("path is %s, want %s", e.Path, want)
		}
		if e.CanReattest || !e.Once {
			t.Error("the document admits more than once")
		}
		if got := values(e); !slices.Equal(got, []string{"azure_imds:subscription-id:" + subscription}) {
			t.Errorf("selectors are %q", got)
		}
	}
	if n := azure.Fetched(); n != 1 {
		t.Errorf("the certificate between was fetched %d times", n)
	}
}

func TestAnOperatorMayAdmitMachinesAgain(t *testing.T) {
	azure, c := world(t, machine())
	c.AllowReattestation = true
	c.AgentPathTemplate = "azure_imds/{{ .VMID }}"
	e, err := attest(t, newServer(t, c), newAgent(t, azure, azureimds.AgentConfig{}))
	must(t, err)
	if !e.CanReattest || e.Once || e.Path != "azure_imds/"+vm {
		t.Errorf("the evidence is %+v", e)
	}
}

func TestTheResourceGraphSaysMore(t *testing.T) {
	m := machine()
	m.ScaleSet = "myvmss"
	assertion := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(assertion, []byte("app.assertion.token\n"), 0o600))
	want := []string{
		"azure_imds:network-security-group:frontend:webservers", "azure_imds:resource-group:frontend",
		"azure_imds:subscription-id:" + subscription, "azure_imds:virtual-network-subnet:vnet:default",
		"azure_imds:virtual-network:vnet", "azure_imds:vm-location:eastus", "azure_imds:vm-name:blog",
		"azure_imds:vm-tag:team:shop", "azure_imds:vmss-name:myvmss",
	}
	for name, change := range map[string]func(*azureimds.DescribeConfig, *harness.Azure){
		"as application": func(*azureimds.DescribeConfig, *harness.Azure) {},
		"by another's token": func(d *azureimds.DescribeConfig, _ *harness.Azure) {
			d.AppSecret, d.TokenPath = "", assertion
		},
		"as machine": func(d *azureimds.DescribeConfig, a *harness.Azure) {
			own := httptest.NewServer(a.Metadata(t))
			t.Cleanup(own.Close)
			d.AppID, d.AppSecret, d.MetadataAddress = "", "", own.URL
		},
	} {
		azure, c := world(t, m)
		change(describing(&c), azure)
		s, agent := newServer(t, c), newAgent(t, azure, azureimds.AgentConfig{TenantDomain: "example.com"})
		for range 2 {
			e, err := attest(t, s, agent)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if got := values(e); !slices.Equal(got, want) {
				t.Errorf("%s: selectors are %q", name, got)
			}
		}
		if n := len(azure.Asked()); n != 1 {
			t.Errorf("%s: a token was asked for %d times", name, n)
		}
	}
}

// TestWhatTheGraphSaysAgainstAMachine goes through machines that the document
// alone would admit.
func TestWhatTheGraphSaysAgainstAMachine(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*harness.AzureMachine)
		want   string
	}{
		"gone":                   {func(m *harness.AzureMachine) { m.Gone = true }, "gone"},
		"another tenant's":       {func(m *harness.AzureMachine) { m.Tenant = app }, attestors.ErrUnavailable.Error()},
		"with a name of a query": {func(m *harness.AzureMachine) { m.Name = "x' or true or '" }, attestors.ErrUnavailable.Error()},
	} {
		azure, config := world(t, machine())
		agent := newAgent(t, azure, azureimds.AgentConfig{})
		m := machine()
		c.change(&m)
		azure.Set(m)
		describing(&config)
		e, err := attest(t, newServer(t, config), agent)
		if err == nil || e != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

// TestAPIsThatFailAdmitNobody has them fail while a certificate is fetched, and
// while the graph is asked.
func TestAPIsThatFailAdmitNobody(t *testing.T) {
	text := func(code int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(code)
			io.WriteString(w, body)
		}
	}
	for name, h := range map[string]http.HandlerFunc{
		"an error":       text(500, ""),
		"a denial":       text(403, `{"error":{"code":"Forbidden"}}`),
		"a page":         text(200, "<html><body>Sign in</body></html>"),
		"nothing":        text(200, ""),
		"half an answer": text(200, `{"data": [`),
		"far too much":   text(200, strings.Repeat(" ", 2<<20)),
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
		"a cut connection": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	} {
		azure, c := world(t, machine())
		describing(&c)
		agent := newAgent(t, azure, azureimds.AgentConfig{})
		s := newServer(t, c)
		azure.Break(h)
		if _, err := attest(t, s, agent); !errors.Is(err, attestors.ErrUnavailable) {
			t.Errorf("%s, no certificate kept: error is %v", name, err)
		}
		azure.Break(nil)
		_, err := attest(t, s, agent)
		must(t, err)
		fresh := newServer(t, c) // no token kept
		azure.Break(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, ".crt") {
				_, _ = w.Write(azure.Intermediate.Raw)
				return
			}
			h(w, r)
		})
		if _, err := attest(t, fresh, agent); !errors.Is(err, attestors.ErrUnavailable) {
			t.Errorf("%s, of the graph: error is %v", name, err)
		}
	}
}

// TestAgentsTakeNothingForADocument goes through what may answer at the address of
// the metadata service.
func TestAgentsTakeNothingForADocument(t *testing.T) {
	azure, _ := world(t, machine())
	agent := newAgent(t, azure, azureimds.AgentConfig{})
	for name, h := range map[string]http.HandlerFunc{
		"an error": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		"a page":   func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html><body>Sign in</body></html>") },
		"nothing":  func(http.ResponseWriter, *http.Request) {},
		"JSON":     func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "{}") },
		"no PKCS #7": func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `{"encoding":"pkcs7","signature":"AAAA"}`)
		},
		"far too much": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, strings.Repeat("x", 1<<20)) },
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusTemporaryRedirect)
		},
		"a cut answer": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "half")
			panic(http.ErrAbortHandler)
		},
	} {
		azure.Fail(h)
		if _, err := agent.Respond(t.Context(), []byte("0123456789")); err == nil {
			t.Errorf("%s: there is a response", name)
		}
	}
	azure.Fail(nil)
	_, err := agent.Respond(t.Context(), []byte("0123456789"))
	must(t, err)
	for _, nonce := range []string{"", "a&api-version=1", "a b", "../x", strings.Repeat("a", 65)} {
		if _, err := agent.Respond(t.Context(), []byte(nonce)); err == nil {
			t.Errorf("the nonce %q is taken", nonce)
		}
	}
}

func TestEveryNonceIsAnother(t *testing.T) {
	_, c := world(t, machine())
	s := newServer(t, c)
	seen := make(map[string]bool)
	for range 100 {
		_, _ = s.Verify(t.Context(), []byte("x"), func(_ context.Context, nonce []byte) ([]byte, error) {
			if len(nonce) != 32 || seen[string(nonce)] || strings.Trim(string(nonce), "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789") != "" {
				t.Errorf("the nonce is %q", nonce)
			}
			seen[string(nonce)] = true
			return nil, nil
		})
	}
	if len(seen) != 100 {
		t.Errorf("there were %d nonces", len(seen))
	}
}

// TestTheAuthoritiesAreThoseOfAzure compares them with the thumbprints that
// https://learn.microsoft.com/azure/security/fundamentals/azure-ca-details lists.
func TestTheAuthoritiesAreThoseOfAzure(t *testing.T) {
	data, err := os.ReadFile("roots.pem")
	must(t, err)
	var got []string
	for rest := data; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		must(t, err)
		got = append(got, fmt.Sprintf("%s %X", cert.Subject.CommonName, sha1.Sum(block.Bytes)))
	}
	want := []string{
		"DigiCert Global Root G2 DF3C24F9BFD666761B268073FE06D1CC8D4F82A4",
		"DigiCert Global Root CA A8985D3A65E5E5C4B2D7D66D40C6DD2FB19C5436",
		"Microsoft TLS RSA Root G2 21734D95A2473BE25CBFD12A84C6FBC5BC8E2414",
	}
	if !slices.Equal(got, want) {
		t.Errorf("they are %q", got)
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	_, good := world(t, machine())
	with := func(change func(*azureimds.ServerConfig)) azureimds.ServerConfig {
		c := good
		c.Tenants = slices.Clone(good.Tenants)
		change(&c)
		return c
	}
	describe := func(d azureimds.DescribeConfig) azureimds.ServerConfig {
		return with(func(c *azureimds.ServerConfig) { c.Tenants[0].Describe = &d })
	}
	for name, c := range map[string]struct {
		config azureimds.ServerConfig
		want   string
	}{
		"nobody":             {azureimds.ServerConfig{}, "tenants is missing"},
		"a tenant's domain":  {with(func(c *azureimds.ServerConfig) { c.Tenants[0].TenantID = "example.com" }), "a GUID"},
		"no subscription":    {with(func(c *azureimds.ServerConfig) { c.Tenants[0].SubscriptionAllowList = nil }), "subscription_allow_list is missing"},
		"a wildcard":         {with(func(c *azureimds.ServerConfig) { c.Tenants[0].SubscriptionAllowList = []string{"*"} }), "a GUID"},
		"two tenants of one": {with(func(c *azureimds.ServerConfig) { c.Tenants = append(c.Tenants, c.Tenants[0]) }), "twice"},
		"every domain":       {with(func(c *azureimds.ServerConfig) { c.MetadataDomains = []string{"com"} }), "metadata_domains"},
		"a dot":              {with(func(c *azureimds.ServerConfig) { c.MetadataDomains = []string{".azure.com"} }), "metadata_domains"},
		"no file":            {with(func(c *azureimds.ServerConfig) { c.CABundlePath = "/no" }), "/no"},
		"another's path":     {with(func(c *azureimds.ServerConfig) { c.AgentPathTemplate = "x/{{ .VMID }}" }), "does not begin with azure_imds/"},
		"a secret of nobody": {describe(azureimds.DescribeConfig{AppSecret: "x"}), "app_id is missing"},
		"nothing to show":    {describe(azureimds.DescribeConfig{AppID: app}), "needs one of"},
		"two to show":        {describe(azureimds.DescribeConfig{AppID: app, AppSecret: "x", TokenPath: "y"}), "needs one of"},
		"an API in plain":    {describe(azureimds.DescribeConfig{Endpoint: "http://10.0.0.1"}), "not HTTPS"},
		"a login in plain":   {describe(azureimds.DescribeConfig{LoginEndpoint: "http://login.example.org"}), "not HTTPS"},
	} {
		if _, err := azureimds.New(c.config, azureimds.Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}
