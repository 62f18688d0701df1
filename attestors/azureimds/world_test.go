package azureimds_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/azureimds"
	"github.com/hallmark-id/hallmark/test/harness"
)

const (
	tenant       = "11111111-2222-3333-4444-555555555555"
	subscription = "d5b40d61-272e-48da-beb9-05f295c42bd6"
	vm           = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
	app          = "99999999-8888-7777-6666-555555555555"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func machine() harness.AzureMachine {
	return harness.AzureMachine{Tenant: tenant, Subscription: subscription, ID: vm, Name: "blog", Tags: map[string]string{"team": "shop", "secret": "x"}}
}

// world is Azure with a server on it, and the configuration by which its machine
// may attest.
func world(t testing.TB, m harness.AzureMachine) (*harness.Azure, azureimds.ServerConfig) {
	t.Helper()
	var azure *harness.Azure
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { azure.API().ServeHTTP(w, r) }))
	t.Cleanup(api.Close)
	host := strings.TrimPrefix(api.URL, "http://")
	azure = harness.NewAzure(t, m, host)
	return azure, azureimds.ServerConfig{
		Tenants:       []azureimds.TenantConfig{{TenantID: tenant, SubscriptionAllowList: []string{subscription}}},
		CABundlePath:  azure.CA,
		CAIssuerHosts: []string{host},
	}
}

// describing asks the API of a world, as an application.
func describing(c *azureimds.ServerConfig) *azureimds.DescribeConfig {
	url := "http://" + c.CAIssuerHosts[0]
	d := &azureimds.DescribeConfig{AppID: app, AppSecret: "app secret", AllowedVMTags: []string{"team"}, Endpoint: url, LoginEndpoint: url}
	c.Tenants[0].Describe = d
	return d
}

func newServer(t testing.TB, c azureimds.ServerConfig) *azureimds.Server {
	t.Helper()
	s, err := azureimds.New(c, azureimds.Options{})
	must(t, err)
	return s
}

func newAgent(t testing.TB, a *harness.Azure, c azureimds.AgentConfig) *azureimds.Agent {
	t.Helper()
	service := httptest.NewServer(a.Metadata(t))
	t.Cleanup(service.Close)
	c.MetadataAddress = service.URL
	agent, err := azureimds.NewAgent(c)
	must(t, err)
	return agent
}

// attest runs an attestation between the two halves.
func attest(t testing.TB, s attestors.Server, a attestors.Agent) (*attestors.Evidence, error) {
	t.Helper()
	proof, err := a.Proof(t.Context())
	must(t, err)
	return s.Verify(t.Context(), proof, a.Respond)
}

// response is what a node answers with.
func response(t testing.TB, encoding, signature string) []byte {
	t.Helper()
	data, err := json.Marshal(map[string]any{"document": map[string]string{"encoding": encoding, "signature": signature}, "metadata": map[string]any{"agentDomain": "", "vmssName": nil}})
	must(t, err)
	return data
}

// answering answers a nonce.
func answering(answer func(nonce string) []byte) func(context.Context, []byte) ([]byte, error) {
	return func(_ context.Context, nonce []byte) ([]byte, error) { return answer(string(nonce)), nil }
}

// fresh is a document over a nonce.
func fresh(m harness.AzureMachine, nonce string) string {
	return harness.AzureDocument(m, nonce, time.Now(), time.Now().Add(time.Hour))
}

func values(e *attestors.Evidence) []string {
	var out []string
	for _, s := range e.Selectors {
		out = append(out, s.String())
	}
	slices.Sort(out)
	return out
}
