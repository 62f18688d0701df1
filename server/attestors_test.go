package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors/plugin"
	"github.com/hallmark-id/hallmark/server"
)

const sshKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJpPvkHjFdTXb9cnkn9Zx7dBrfJxAbUgg2rMOMxTTqfo"

// caBundle writes the certificate of an authority that nodes' certificates may
// lead to.
func caBundle(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "nodes"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestNodesMayAttestInSeveralWays(t *testing.T) {
	ca := caBundle(t)
	for _, yaml := range []string{
		"join_token: {}\n  x509pop: {ca_bundle_path: " + ca + "}",
		"x509pop: {ca_bundle_path: " + ca + ", ca_bundle_paths: [" + ca + "], agent_path_template: 'x509pop/{{ .Subject.CommonName }}'}",
		"x509pop: {mode: spiffe}",
		"tpm_ek: {endorsement_ca_path: " + ca + ", ek_hashes: [" + strings.Repeat("ab", 32) + "], pcrs: [7, 0]}",
		"tpm_devid: {devid_ca_path: " + ca + ", endorsement_ca_path: " + ca + "}",
		"aws_iid: {account_allow_list: ['123456789012'], region_allow_list: [us-west-2], max_age: 15m, certificates: [{region: xx-west-1, path: " + ca + "}], describe: {assume_role: hallmark, endpoint: 'https://ec2.internal'}, agent_path_template: 'aws_iid/{{ .InstanceID }}/{{ .Tags.Name }}'}",
		"azure_imds: {tenants: [{tenant_id: 11111111-2222-3333-4444-555555555555, subscription_allow_list: [d5b40d61-272e-48da-beb9-05f295c42bd6], describe: {allowed_vm_tags: [team]}}], ca_bundle_path: " + ca + ", metadata_domains: [metadata.azure.us]}",
		"gcp_iit: {projectid_allow_list: [big-kahuna-123456], audience: 'spiffe://example.org', max_age: 10m, use_instance_metadata: true, allowed_label_keys: [team]}",
		"http_challenge: {allowed_dns_patterns: ['p[0-9]+\\.example\\.org'], required_port: 80, allow_reattestation: true, networks: [10.1.0.0/16], resolver: '10.0.0.53:53'}",
		"sshpop: {cert_authorities: [" + sshKey + "], canonical_domain: example.org, agent_path_template: 'sshpop/{{ .Hostname }}'}",
		"x509pop: {mode: spiffe, trust_domain: other.org, svid_prefix: /nodes}",
	} {
		if err := server.Check(source("trust_domain: example.org\nnode_attestors:\n  " + yaml + "\n")); err != nil {
			t.Errorf("%s: %v", yaml, err)
		}
	}
}

func TestAnAttestorThatCannotBeMadeIsRefusedWithItsPlace(t *testing.T) {
	ca := caBundle(t)
	for yaml, want := range map[string]string{
		"{}":                    "ca_bundle_path is missing",
		"{ca_bundle_path: /no}": "/no: no such file",
		"{mode: pki}":           `cannot be "pki"`,
		"{ca_bundle: /no}":      "ca_bundle_path",
		"{ca_bundle_path: " + ca + ", agent_path_template: '/spire/{{ .Fingerprint }}'}": "does not begin with x509pop/",
	} {
		err := server.Check(source("trust_domain: example.org\nnode_attestors:\n  join_token: {}\n  x509pop: " + yaml + "\n"))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "server.yaml:4") {
			t.Errorf("%s: error is %v, want one on line 4 with %q", yaml, err, want)
		}
	}
	for yaml, want := range map[string]string{
		"k8s_psat: {clusters: [{name: production}]}": "service_account_allow_list is missing",
		"azure_imds: {}":     "tenants is missing",
		"gcp_iit: {}":        "projectid_allow_list is missing",
		"aws_iid: {}":        "account_allow_list is missing",
		"http_challenge: {}": "allowed_dns_patterns is missing",
		"aws_iid: {account_allow_list: [\"123\"]}": "has 12 digits",
	} {
		err := server.Check(source("trust_domain: example.org\nnode_attestors:\n  " + yaml + "\n"))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "server.yaml:3") {
			t.Errorf("%s: error is %v, want one on line 3 with %q", yaml, err, want)
		}
	}
}

func TestNoPluginTakesTheNameOfABuiltInAttestor(t *testing.T) {
	good := plugin.Config{Command: "/x", InsecureNoChecksum: true}
	for _, section := range []any{server.NodeAttestorsConfig{}} {
		for _, f := range reflect.VisibleFields(reflect.TypeOf(section)) {
			if name := f.Tag.Get("yaml"); name != "plugins" && good.Check(name) == nil {
				t.Errorf("a plugin may be called %s", name)
			}
		}
	}
}
