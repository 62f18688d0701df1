package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAMachineOfAzureNeedsNoSecret attests an agent at the real address of the
// metadata service, in a network of its own, by a document over the server's nonce
// that is signed as Azure signs them, gives a process an identity by a tag that the
// Azure Resource Graph knows, and lets nobody be the machine a second time until
// its agent is evicted.
func TestAMachineOfAzureNeedsNoSecret(t *testing.T) {
	const (
		tenant       = "11111111-2222-3333-4444-555555555555"
		subscription = "d5b40d61-272e-48da-beb9-05f295c42bd6"
		vm           = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
		api          = "127.0.0.1:8443"
	)
	network := harness.NewNetwork(t)
	azure := harness.NewAzure(t, harness.AzureMachine{Tenant: tenant, Subscription: subscription, ID: vm, Name: "blog", Tags: map[string]string{"team": "shop"}}, api)
	network.Serve(t, harness.MetadataAddress+":80", azure.Metadata(t))
	network.Serve(t, api, azure.API())
	dir := publicDir(t)
	d := harness.NewDomain(t, harness.Settings{
		Network: network,
		// The server asks by its own machine's managed identity.
		Server: fmt.Sprintf("node_attestors: {azure_imds: {ca_bundle_path: %s, ca_issuer_hosts: ['%s'], tenants: [{tenant_id: %s, subscription_allow_list: [%s], "+
			"describe: {allowed_vm_tags: [team], endpoint: 'http://%s'}}]}}\n", azure.CA, api, tenant, subscription, api),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {azure_imds: {}}\n", dir),
	})
	d.StartServer(t)
	must(t, os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644))
	d.StartAgent(t, "")

	const agent = "spiffe://example.org/spire/agent/azure_imds/" + tenant + "/" + subscription + "/" + vm
	shown := d.Admin(t, "node", "show", agent, "-o", "json")
	for _, want := range []string{`"azure_imds:vm-tag:team:shop"`, `"azure_imds:vm-name:blog"`, `"azure_imds:virtual-network-subnet:vnet:default"`, `"azure_imds:subscription-id:` + subscription + `"`} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %s in\n%s", want, shown)
		}
	}
	identifies(t, d, "azure_imds:vm-tag:team:shop")
	admitsOnce(t, d, agent)
}

// TestAMachineOfAzureAttestsByItsManagedIdentity does the same by a token.
func TestAMachineOfAzureAttestsByItsManagedIdentity(t *testing.T) {
	const (
		tenant       = "11111111-2222-3333-4444-555555555555"
		subscription = "d5b40d61-272e-48da-beb9-05f295c42bd6"
		principal    = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
	)
	network := harness.NewNetwork(t)
	azure := harness.NewAzure(t, harness.AzureMachine{Tenant: tenant, Subscription: subscription, Name: "blog", Principal: principal}, "127.0.0.1:1")
	network.Serve(t, harness.MetadataAddress+":80", azure.Metadata(t))
	dir := publicDir(t)
	d := harness.NewDomain(t, harness.Settings{
		Network: network,
		Server: fmt.Sprintf("node_attestors: {azure_msi: {tenants: [{tenant_id: %s, subscription_allow_list: [%s], resource_id: 'api://hallmark', jwks_path: %s}]}}\n",
			tenant, subscription, azure.Keys),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {azure_msi: {resource_id: 'api://hallmark'}}\n", dir),
	})
	d.StartServer(t)
	must(t, os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644))
	d.StartAgent(t, "")
	identifies(t, d, "azure_msi:vm-name:frontend:blog")
	admitsOnce(t, d, "spiffe://example.org/spire/agent/azure_msi/"+tenant+"/"+principal)
}
