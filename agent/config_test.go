package agent_test

import (
	"encoding/pem"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
	"github.com/hallmark-id/hallmark/attestors/plugin"
	"github.com/hallmark-id/hallmark/pkg/config"
)

// joinString is one that parses.
func joinString(t *testing.T) string {
	t.Helper()
	text, err := nodetest.New(t).Join("the-token").Encode()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// bundleFile is a trust bundle that parses.
func bundleFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "bundle.pem")
	root := nodetest.NewAuthority(t).Certificate.Raw
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func check(text string, set ...config.Setting) error {
	return agent.Check(config.Source{Name: "agent.yaml", Data: []byte(text), Set: set})
}

func TestAJoinStringIsAllThatAnAgentNeeds(t *testing.T) {
	if err := check("", config.Setting{Path: "join", Value: joinString(t), From: "--join"}); err != nil {
		t.Error(err)
	}
}

func TestConfigurationsThatAreComplete(t *testing.T) {
	for name, text := range map[string]string{
		"an identity from an earlier run": "trust_domain: example.org\nserver: localhost:8081",
		"a trust bundle":                  "trust_domain: example.org\nserver: '[::1]:8081'\ntrust_bundle: " + bundleFile(t) + "\nnode_attestor: {join_token: {token: abc}}",
		"what is experimental":            "trust_domain: example.org\nserver: localhost:8081\nexperimental: {wit: true}",
		"nothing but trust":               "trust_domain: example.org\nserver: localhost:8081\ninsecure_bootstrap: true\nnode_attestor: {join_token: {token: abc}}",
		"a certificate": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {x509pop: {private_key_path: key.pem, certificate_path: cert.pem, intermediates_path: ca.pem}}",
		"a host key": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {sshpop: {host_key_path: key, host_cert_path: key-cert.pub}}",
		"an EC2 instance": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {aws_iid: {metadata_address: 'http://[fd00:ec2::254]'}}",
		"a machine of Azure": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {azure_imds: {tenant_domain: example.com}}",
		"an instance of Google Cloud": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {gcp_iit: {service_account: 'a@p.iam.gserviceaccount.com', audience: x}}",
		"a name in the DNS": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {http_challenge: {hostname: p1.example.org, agentname: blue, port: 8080, advertised_port: 80, address: 127.0.0.1}}",
		"a TPM": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {tpm_ek: {tpm_device_path: /dev/tpmrm0, endorsement_key: p-256, certificate_path: ek.pem, endorsement_hierarchy_password: x}}",
		"a DevID": "trust_domain: example.org\nserver: localhost:8081\ntrust_bundle: " + bundleFile(t) +
			"\nnode_attestor: {tpm_devid: {devid_cert_path: c, devid_priv_path: a, devid_pub_path: b, devid_password: x, owner_hierarchy_password: y}}",
		"a join string and the same names": "trust_domain: example.org\nserver: elsewhere.example.org:443\njoin: " + joinString(t) +
			"\nworkload_attestors: {unix: {path: true, sha256: true, max_size: 1000}, docker: {env: [TIER]}, podman: {rootless_uids: [1000]}, k8s: {node_name: node-7}}",
	} {
		if err := check(text); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckSaysWhatIsWrongAndWhere(t *testing.T) {
	join, trust := joinString(t), bundleFile(t)
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const base = "trust_domain: example.org\nserver: localhost:8081\n"
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"nothing":              {"", []string{"agent.yaml", "trust_domain is missing", "server is missing", "hallmark token generate"}},
		"a trust domain's URL": {"trust_domain: spiffe://example.org\nserver: a:1", []string{"agent.yaml:1", "write example.org"}},
		"a bad trust domain":   {"trust_domain: Example\nserver: a:1", []string{"agent.yaml:1", "write a name like example.org"}},
		"no port":              {"trust_domain: example.org\nserver: localhost", []string{"agent.yaml:2", "not host:port"}},
		"port zero":            {"trust_domain: example.org\nserver: localhost:0", []string{"between 1 and 65535"}},
		"no host":              {"trust_domain: example.org\nserver: 0.0.0.0:8081", []string{"names no host"}},
		"a damaged join":       {"join: hallmark-join-v1.AAAA", []string{"agent.yaml:1", "damaged"}},
		"half a join":          {"join: " + join[:60], []string{"agent.yaml:1", "incomplete"}},
		"another join": {"trust_domain: other.org\njoin: " + join,
			[]string{"agent.yaml:1", "trust_domain is other.org, but join is for example.org"}},
		"two reasons to trust": {"join: " + join + "\ntrust_bundle: " + trust, []string{"agent.yaml:2", "trust_bundle and join exclude each other"}},
		"join and none":        {"join: " + join + "\ninsecure_bootstrap: true", []string{"agent.yaml:2", "insecure_bootstrap and join exclude each other"}},
		"bundle and none":      {base + "insecure_bootstrap: true\ntrust_bundle: " + trust, []string{"agent.yaml:3", "insecure_bootstrap and trust_bundle exclude each other"}},
		"two tokens":           {"join: " + join + "\nnode_attestor: {join_token: {token: x}}", []string{"agent.yaml:2", "node_attestor and join exclude each other"}},
		"no such bundle":       {base + "trust_bundle: /nowhere.pem", []string{"agent.yaml:3", "/nowhere.pem: no such file"}},
		"an empty bundle":      {base + "trust_bundle: " + empty, []string{"agent.yaml:3", "0 X.509 authorities"}},
		"no attestor":          {base + "node_attestor: {}", []string{"agent.yaml:3", "choose join_token"}},
		"no token":             {base + "node_attestor: {join_token: {}}", []string{"agent.yaml:3", "join token is empty"}},
		"a bad token":          {base + "node_attestor: {join_token: {token: a/b}}", []string{"agent.yaml:3", "malformed"}},
		"no cluster":           {base + "node_attestor: {k8s_psat: {}}", []string{"agent.yaml:3", "cluster has no name"}},
		"no metadata":          {base + "node_attestor: {aws_iid: {metadata_address: 169.254.169.254}}", []string{"agent.yaml:3", "metadata_address"}},
		"no key":               {base + "node_attestor: {x509pop: {certificate_path: cert.pem}}", []string{"agent.yaml:3", "private_key_path is missing"}},
		"no certificate":       {base + "node_attestor: {x509pop: {private_key_path: key.pem}}", []string{"agent.yaml:3", "certificate_path is missing"}},
		"two attestors": {base + "node_attestor: {join_token: {token: x}, x509pop: {private_key_path: key.pem, certificate_path: cert.pem}}",
			[]string{"agent.yaml:3", "node_attestor names 2 attestors"}},
		"two attestors, one bad": {base + "node_attestor: {join_token: {token: x}, x509pop: {}}", []string{"agent.yaml:3", "private_key_path is missing", "names 2 attestors"}},
		"no workload attestor":   {base + "workload_attestors: {}", []string{"agent.yaml:3", "choose unix"}},
		"a negative size":        {base + "workload_attestors: {unix: {max_size: -1}}", []string{"agent.yaml:3", "max_size"}},
		"one socket":             {base + "socket: /x\nadmin_socket: /x", []string{"agent.yaml:4", "admin_socket and socket are the same"}},
		"a long socket":          {base + "socket: /" + strings.Repeat("x", 107), []string{"agent.yaml:3", "108 bytes long"}},
		"no socket":              {base + "socket: ''\nadmin_socket: ''\ndata_dir: ''", []string{"socket is empty", "admin_socket is empty", "data_dir is empty"}},
		"no SVIDs":               {base + "held_svids: 0", []string{"agent.yaml:3", "held_svids is 0"}},
		"ID20 a long name":       {"server: a:1\ntrust_domain: " + strings.Repeat("a", 256), []string{"agent.yaml:2", "256 bytes long; the most is 255"}},
		"a limit below 0":        {base + "limits: {calls_per_second: -1}", []string{"agent.yaml:3", "calls_per_second is -1"}},
		"an unknown key":         {base + "insecure_bootstap: true", []string{"agent.yaml:3", "insecure_bootstrap"}},
		"a kubelet without port": {base + "workload_attestors: {k8s: {kubelet: node-7}}", []string{"agent.yaml:3", "write host:port"}},
		"a relative socket":      {base + "workload_attestors: {docker: {socket: docker.sock}}", []string{"agent.yaml:3", "absolute path"}},
		"root as rootless":       {base + "workload_attestors: {podman: {rootless_uids: [0]}}", []string{"agent.yaml:3", "which is root"}},
		"an unknown attestor":    {base + "workload_attestors: {unx: {}}", []string{"agent.yaml:3", "unix"}},
		"an unknown level":       {base + "log: {level: loud}", []string{"agent.yaml:3", "loud"}},
	} {
		err := check(c.text)
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error does not contain %q: %v", name, want, err)
			}
		}
		if strings.Contains(err.Error(), "the-token") {
			t.Errorf("%s: the error holds the token: %v", name, err)
		}
	}
}

func TestAFlagIsNamedWhereItIsWrong(t *testing.T) {
	err := check("server: localhost:8081", config.Setting{Path: "trust_domain", Value: "UPPER", From: "--trust-domain"})
	if err == nil || !strings.HasPrefix(err.Error(), "--trust-domain: ") {
		t.Errorf("error is %v", err)
	}
}

func TestTheExampleConfigurationIsGood(t *testing.T) {
	src, err := config.ReadFile("../conf/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Check(src); err != nil {
		t.Error(err)
	}
}

func TestTheLayoutIsWhatTheAgentUses(t *testing.T) {
	dir := t.TempDir()
	saved, err := os.ReadFile(bundleFile(t))
	if err != nil {
		t.Fatal(err)
	}
	// What an earlier run left, in either form of a bundle.
	if err := os.WriteFile(filepath.Join(dir, "bundle.json"), saved, 0o600); err != nil {
		t.Fatal(err)
	}
	text := "trust_domain: example.org\nserver: ca.example.org:8081\ndata_dir: " + dir + "\ntrust_bundle: " + bundleFile(t) + "\nsocket: /w\nadmin_socket: /a\n"
	l, err := agent.Layout(config.Source{Name: "agent.yaml", Data: []byte(text)})
	if err != nil || len(l.Authorities) != 2 {
		t.Fatalf("there are %d authorities, one saved and one configured: %v", len(l.Authorities), err)
	}
	l.Authorities = nil
	if want := (config.Layout{TrustDomain: "example.org", AdminSocket: "/a", DataDirs: []string{dir}, Connections: 4096, Descriptors: 2,
		Socket: "/w", Server: "ca.example.org:8081"}); !reflect.DeepEqual(l, want) {
		t.Errorf("got %+v, want %+v", l, want)
	}
}

func TestNoPluginTakesTheNameOfABuiltInAttestor(t *testing.T) {
	good := plugin.Config{Command: "/x", InsecureNoChecksum: true}
	for _, section := range []any{agent.NodeAttestorConfig{}, agent.WorkloadAttestorsConfig{}} {
		for _, f := range reflect.VisibleFields(reflect.TypeOf(section)) {
			if name := f.Tag.Get("yaml"); name != "plugins" && good.Check(name) == nil {
				t.Errorf("a plugin may be called %s", name)
			}
		}
	}
}
