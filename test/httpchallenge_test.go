package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestANodeAttestsByItsNameInTheDNS attests an agent that answers at its name, once,
// and has the server say what that is worth.
func TestANodeAttestsByItsNameInTheDNS(t *testing.T) {
	harness.NeedRoot(t)
	network := harness.NewNetwork(t)
	dns := harness.NewDNS(t, network)
	dns.Set("p1.example.org", "127.0.0.2")
	dir := publicDir(t)
	d := harness.NewDomain(t, harness.Settings{
		Network: network,
		Server: fmt.Sprintf("node_attestors: {http_challenge: {allowed_dns_patterns: ['p[0-9]\\.example\\.org'], allow_non_root_ports: true, networks: [127.0.0.0/8], resolver: '%s'}}\n",
			dns.Address),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {http_challenge: {hostname: p1.example.org, address: 127.0.0.2}}\n", dir),
	})
	d.StartServer(t)
	must(t, os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644))
	d.StartAgent(t, "")

	const agent = "spiffe://example.org/spire/agent/http_challenge/p1.example.org"
	if shown := d.Admin(t, "node", "show", agent, "-o", "json"); !strings.Contains(shown, `"http_challenge:hostname:p1.example.org"`) {
		t.Errorf("the node is\n%s", shown)
	}
	identifies(t, d, "http_challenge:hostname:p1.example.org")
	admitsOnce(t, d, agent)

	var all []struct {
		Name, Strength string
		Configured     bool
	}
	must(t, json.Unmarshal([]byte(d.Admin(t, "node", "attestors", "-o", "json")), &all))
	strengths := map[string]string{}
	for _, a := range all {
		strengths[fmt.Sprint(a.Name, " ", a.Configured)] = a.Strength
	}
	for attestor, want := range map[string]string{"http_challenge true": "network", "join_token false": "bearer", "x509pop false": "key", "tpm_ek false": "hardware"} {
		if strengths[attestor] != want {
			t.Errorf("%s is %q, want %q; all are %v", attestor, strengths[attestor], want, all)
		}
	}
}
