package gcpiit_test

import (
	"context"
	"net/http/httptest"
	"slices"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/gcpiit"
	"github.com/hallmark-id/hallmark/test/harness"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func blog() harness.GCPInstance {
	return harness.GCPInstance{Project: "big-kahuna-123456", Zone: "us-west1-b", Name: "blog-server", ID: "152986662232938449"}
}

// trusting is a configuration that admits the instance of a Google of the test's own.
func trusting(g *harness.GCP) gcpiit.ServerConfig {
	return gcpiit.ServerConfig{ProjectIDAllowList: []string{"big-kahuna-123456"}, JWKSPath: g.Keys}
}

// describing asks the API of a Google, with a service account's key.
func describing(t testing.TB, g *harness.GCP) gcpiit.ServerConfig {
	t.Helper()
	api := httptest.NewServer(g.API())
	t.Cleanup(api.Close)
	c := trusting(g)
	c.UseInstanceMetadata, c.Endpoint, c.ServiceAccountFile = true, api.URL, g.AccountFile(t, api.URL+"/token")
	c.AllowedLabelKeys, c.AllowedMetadataKeys = []string{"team", "empty"}, []string{"tier"}
	return c
}

func newServer(t testing.TB, c gcpiit.ServerConfig) *gcpiit.Server {
	t.Helper()
	s, err := gcpiit.New(c, gcpiit.Options{})
	must(t, err)
	return s
}

func newAgent(t testing.TB, g *harness.GCP, c gcpiit.AgentConfig) *gcpiit.Agent {
	t.Helper()
	service := httptest.NewServer(g.Metadata(t))
	t.Cleanup(service.Close)
	c.MetadataAddress = service.URL
	agent, err := gcpiit.NewAgent(c)
	must(t, err)
	return agent
}

// unasked fails the test if a node is challenged.
func unasked(t testing.TB) func(context.Context, []byte) ([]byte, error) {
	return func(context.Context, []byte) ([]byte, error) {
		t.Error("the node is challenged")
		return nil, context.Canceled
	}
}

func attest(t testing.TB, s attestors.Server, a attestors.Agent) (*attestors.Evidence, error) {
	t.Helper()
	proof, err := a.Proof(t.Context())
	must(t, err)
	return s.Verify(t.Context(), proof, unasked(t))
}

func values(e *attestors.Evidence) []string {
	var out []string
	for _, s := range e.Selectors {
		out = append(out, s.String())
	}
	slices.Sort(out)
	return out
}
