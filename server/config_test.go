package server_test

import (
	"reflect"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server"
)

func source(yaml string) config.Source { return config.Source{Name: "server.yaml", Data: []byte(yaml)} }

func TestTheShortestConfigurationIsATrustDomain(t *testing.T) {
	if err := server.Check(source("trust_domain: example.org\n")); err != nil {
		t.Error(err)
	}
}

func TestEveryKeyIsUnderstood(t *testing.T) {
	err := server.Check(source(`
trust_domain: example.org
listen: "[::1]:0"
advertise: server.example.org:8081
data_dir: /var/lib/hallmark/server
admin_socket: /run/hallmark/server.sock
store:
  badger:
    dir: /var/lib/hallmark/store
    memtable: 16777216
keys:
  disk:
    dir: /var/lib/hallmark/keys
    encryption:
      secret_file: /run/secrets/hallmark
x509:
  key_type: ec-p384
  authority_lifetime: 30d
  svid_lifetime: 4s
  agent_lifetime: 2h
jwt:
  key_type: rsa-2048
  authority_lifetime: 48h
  svid_lifetime: 1m30s
  issuer: https://issuer.example.org
wit:
  key_type: ec-p384
  authority_lifetime: 48h
  svid_lifetime: 2h
experimental:
  wit: true
node_attestors:
  join_token: {}
admin_ids:
  - spiffe://example.org/ops
limits:
  connections: 100
  attest_per_second: 10
  sign_per_second: 20
log:
  level: debug
  format: json
`))
	if err != nil {
		t.Error(err)
	}
	for _, store := range []string{
		"etcd: {}",
		"etcd: {embedded: {listen: '10.0.0.1:8082', advertise: 'ca-1:8082', dir: /var/lib/etcd, quota: 17179869184}}",
		"etcd: {endpoints: ['https://a:2379', 'https://b:2379'], ca: /ca, cert: /cert, key: /key}",
	} {
		if err := server.Check(source("trust_domain: example.org\nname: ca-1.example\nstore: {" + store + "}\n")); err != nil {
			t.Errorf("%s: %v", store, err)
		}
	}
	if err := server.Check(source("trust_domain: example.org\nstore: {memory: {}}\nkeys: {memory: {}}\nnode_attestors: {}\n")); err != nil {
		t.Error(err)
	}
}

func TestWhatCannotBeMeantIsRefusedWithItsPlaceAndARemedy(t *testing.T) {
	for _, c := range []struct{ yaml, want string }{
		{"", "server.yaml: trust_domain is missing; set it to a name like example.org"},
		{"trust_domain: Example Org", "server.yaml:1:15: trust_domain: "},
		{"trust_domain: spiffe://example.org", `trust_domain "spiffe://example.org" is no bare name; write example.org`},
		{"listen: nowhere", "listen: address nowhere: missing port in address; write host:port"},
		{"listen: localhost:http", `the port "http" is no number`},
		{"listen: localhost:65536", "between 0 and 65535"},
		{"advertise: 0.0.0.0:8081", "is no address that an agent can dial"},
		{"advertise: example.org:0", "is no address that an agent can dial"},
		{"advertise: :8081", "is no address that an agent can dial"},
		{"admin_socket: /" + strings.Repeat("x", 120), "admin_socket is 121 bytes long and the kernel takes 107"},
		{"store: {badger: {}, memory: {}}", "store names 2 engines; choose one of badger, etcd and memory"},
		{"store: {etcd: {embedded: {}, endpoints: ['https://a:1']}}", "choose one"},
		{"store: {etcd: {endpoints: ['etcd:2379']}}", `endpoint "etcd:2379" is none of etcd; write https://host:port`},
		{"store: {etcd: {endpoints: ['http://etcd:2379']}}", "is not protected"},
		{"store: {etcd: {endpoints: ['https://etcd:2379'], cert: /a}}", "needs both or none"},
		{"store: {etcd: {embedded: {listen: nowhere}}}", "listen: address nowhere: missing port"},
		{"store: {etcd: {embedded: {listen: '0.0.0.0:8082'}}}", "is no address that another server can dial"},
		{"store: {etcd: {embedded: {quota: 1}}}", "quota is 1 bytes"},
		{"store: {etcd: {embedded: {join: hallmark}}}", "join string is incomplete"},
		{"name: One", `name: "One" is no name of a server`},
		{"name: a/b", "is no name of a server"},
		{"store: {badger: {memtable: 1}}", "memtable is 1 bytes"},
		{"keys: {disk: {}, memory: {}}", "choose disk, kms or memory"},
		{"keys: {disk: {encryption: {}}}", "server.yaml:2:27: encryption names no secret; set secret_file"},
		{"keys: {disk: {encryption: {secret_file: /a, secret_env: B}}}", "choose secret_file or secret_env"},
		{"keys: {kms: {}}", "there is no uri; write pkcs11:"},
		{"keys: {kms: {uri: 'pkcs11:token=a?pin-value=1234'}}", "server.yaml:2:19: uri has pin-value; write the PIN to a file and set pin_file"},
		{"x509: {key_type: dsa}", `unknown key type "dsa"; it is one of ec-p256`},
		{"x509: {svid_lifetime: 13h}", "server.yaml:2:23: x509.svid_lifetime is 13h, but x509.authority_lifetime only 24h; an authority must live at least twice as long"},
		{"x509: {agent_lifetime: 13h}", "x509.agent_lifetime is 13h"},
		{"x509: {svid_lifetime: 1500ms}", "not a whole number of seconds"},
		{"x509: {svid_lifetime: 0s}", "at least 1s"},
		{"x509: {authority_lifetime: 9s, svid_lifetime: 1s, agent_lifetime: 1s}", "x509.authority_lifetime is 9s; it is between 10s"},
		{"jwt: {svid_lifetime: 13h}", "jwt.svid_lifetime is 13h"},
		{"wit: {svid_lifetime: 1h}", "server.yaml:2:6: wit says how WIT-SVIDs are issued, but they are not; set wit in experimental"},
		{"experimental: {wit: true}\nwit: {svid_lifetime: 13h}", "wit.svid_lifetime is 13h, but wit.authority_lifetime only 24h"},
		{"experimental: {wit: true}\nwit: {authority_lifetime: 9s, svid_lifetime: 1s}", "wit.authority_lifetime is 9s; it is between 10s"},
		{"experimental: {wit: true}\nwit: {key_type: ec-p521}", `unknown key type "ec-p521"`},
		{"experimental: {wti: true}", "wit"},
		{"admin_ids: [spiffe://other.org/x]", `admin ID "spiffe://other.org/x" is not the ID of a workload in trust domain "example.org"`},
		{"admin_ids: [example]", `admin ID "example"`},
		{"limits: {connections: -1}", "connections is -1"},
		{"log: {level: loud}", "loud"},
		{"node_attestors: {magic: {}}", "magic"},
		{"tust_domain: x", "trust_domain"},
	} {
		yaml := c.yaml
		if !strings.Contains(yaml, "trust_domain") && yaml != "" {
			yaml = "trust_domain: example.org\n" + yaml
		}
		err := server.Check(source(yaml))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s:\n%v\nwant %q", c.yaml, err, c.want)
		}
	}
}

func TestTheLayoutIsWhatTheServerUses(t *testing.T) {
	for text, want := range map[string]config.Layout{
		"": {AdminSocket: "/run/hallmark/server.sock", DataDirs: []string{"/var/lib/hallmark/server/store", "/var/lib/hallmark/server/keys"}, Connections: 15000},
		"data_dir: /d\nadmin_socket: /s\nkeys: {disk: {dir: /k}}\nlimits: {connections: 7}\n": {AdminSocket: "/s", DataDirs: []string{"/d/store", "/k"}, Connections: 7},
		"store: {memory: {}}\nkeys: {memory: {}}\n":                                           {AdminSocket: "/run/hallmark/server.sock", Connections: 15000},
	} {
		want.TrustDomain, want.Descriptors = "example.org", 1
		if got, err := server.Layout(source("trust_domain: example.org\n" + text)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %+v, %v; want %+v", text, got, err, want)
		}
	}
	if _, err := server.Layout(source("trust_domain: Example\n")); err == nil {
		t.Error("a configuration that is wrong has a layout")
	}
}
