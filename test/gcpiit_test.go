package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAnInstanceOfGoogleCloudNeedsNoSecret attests an agent at the real address of
// the metadata server, in a network of its own, by a token that is signed as Google
// signs them, gives a process an identity by a label that the Compute Engine API
// knows, and lets nobody be the instance a second time until its agent is evicted.
func TestAnInstanceOfGoogleCloudNeedsNoSecret(t *testing.T) {
	t.Parallel()
	network := harness.NewNetwork(t)
	google := harness.NewGCP(t, harness.GCPInstance{
		Project: "big-kahuna-123456", Zone: "us-west1-b", Name: "blog-server", ID: "152986662232938449",
		Tags: []string{"web"}, Labels: map[string]string{"team": "shop"},
	})
	network.Serve(t, harness.MetadataAddress+":80", google.Metadata(t))
	network.Serve(t, "127.0.0.1:8443", google.API())
	dir := publicDir(t)
	d := harness.NewDomain(t, harness.Settings{
		Network: network,
		// The server asks by its own instance's service account.
		Server: fmt.Sprintf("node_attestors: {gcp_iit: {projectid_allow_list: [big-kahuna-123456], jwks_path: %s, "+
			"use_instance_metadata: true, allowed_label_keys: [team], endpoint: 'http://127.0.0.1:8443'}}\n", google.Keys),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {gcp_iit: {}}\n", dir),
	})
	d.StartServer(t)
	must(t, os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644))
	d.StartAgent(t, "")

	const agent = "spiffe://example.org/spire/agent/gcp_iit/big-kahuna-123456/152986662232938449"
	shown := d.Admin(t, "node", "show", agent, "-o", "json")
	for _, want := range []string{`"gcp_iit:label:team:shop"`, `"gcp_iit:tag:web"`, `"gcp_iit:zone:us-west1-b"`} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %s in\n%s", want, shown)
		}
	}
	identifies(t, d, "gcp_iit:label:team:shop")
	admitsOnce(t, d, agent)
}
