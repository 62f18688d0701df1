package badinputs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"

	"github.com/hallmark-id/hallmark/test/harness"
)

// configs are configurations with a mistake each, and what the error names:
// the cause, then the remedy.
var configs = []struct {
	program, name, text string
	says                []string
}{
	{"server", "empty", "", []string{"trust_domain is missing", "example.org"}},
	{"server", "no YAML", "{", []string{"server.yaml:1"}},
	{"server", "a list", "- a\n", []string{"server.yaml:1"}},
	{"server", "two documents", "trust_domain: a\n---\ntrust_domain: b\n", []string{"server.yaml"}},
	{"server", "a key twice", "trust_domain: a\ntrust_domain: b\n", []string{"server.yaml:2"}},
	{"server", "unknown key", "trust_domain: a\ndatadir: /x\n", []string{"server.yaml:2", "unknown key `datadir`", "did you mean `data_dir`"}},
	{"server", "unknown key below", "trust_domain: a\nx509: {svid_lifetme: 1h}\n", []string{"unknown key `svid_lifetme`", "did you mean `svid_lifetime`"}},
	{"server", "a number for text", "trust_domain: 5\n", []string{"server.yaml:1", "must be text", "quote it"}},
	{"server", "capital trust domain", "trust_domain: Example.org\n", []string{"trust_domain", "write a name like example.org"}},
	{"server", "trust domain with scheme", "trust_domain: spiffe://example.org\n", []string{"no bare name", "write example.org"}},
	{"server", "trust domain too long", "trust_domain: " + strings.Repeat("a", 256) + "\n", []string{"256 bytes long", "choose a shorter name"}},
	{"server", "listen without port", "trust_domain: a\nlisten: localhost\n", []string{"missing port", "write host:port"}},
	{"server", "listen on a large port", "trust_domain: a\nlisten: localhost:70000\n", []string{"no number between 0 and 65535", "write host:port"}},
	{"server", "advertise everything", "trust_domain: a\nadvertise: 0.0.0.0:8081\n", []string{"no address that an agent can dial", "write its host and port"}},
	{"server", "empty data_dir", "trust_domain: a\ndata_dir: \"\"\n", []string{"data_dir is empty", "the default is"}},
	{"server", "socket path too long", "trust_domain: a\nadmin_socket: /" + strings.Repeat("a", 120) + "\n", []string{"121 bytes long", "choose a shorter path"}},
	{"server", "two stores", "trust_domain: a\nstore: {badger: {}, memory: {}}\n", []string{"names 2 engines", "choose one of badger, etcd and memory"}},
	{"server", "two key managers", "trust_domain: a\nkeys: {disk: {}, memory: {}}\n", []string{"names more than one key manager", "choose disk, kms or memory"}},
	{"server", "key manager of another name", "trust_domain: a\nkeys: {kms: {uri: 'awskm:region=us-east-1'}}\n", []string{"server.yaml:2", "not supported", "did you mean awskms:region="}},
	{"server", "key manager without a region", "trust_domain: a\nkeys: {kms: {uri: 'awskms:'}}\n", []string{"write one like eu-central-1"}},
	{"server", "key manager with a token in it", "trust_domain: a\nkeys: {kms: {uri: 'transit:token=x'}}\n", []string{"secrets are not in it"}},
	{"server", "key manager in plain HTTP", "trust_domain: a\nkeys: {kms: {uri: 'transit:address=http://vault:8200'}}\n", []string{"not HTTPS"}},
	{"server", "key manager with a wrong attribute", "trust_domain: a\nkeys: {kms: {uri: 'tpmkms:devise=/dev/tpmrm0'}}\n", []string{"did you mean device?"}},
	{"server", "tiny memtable", "trust_domain: a\nstore: {badger: {memtable: 1}}\n", []string{"memtable is 1 bytes", "between"}},
	{"server", "unknown key type", "trust_domain: a\nx509: {key_type: dsa}\n", []string{"dsa", "ec-p256"}},
	{"server", "lifetime without unit", "trust_domain: a\nx509: {svid_lifetime: 90}\n", []string{"has no unit", "write 90s"}},
	{"server", "lifetime of nothing", "trust_domain: a\nx509: {svid_lifetime: 0s}\n", []string{"at least 1s"}},
	{"server", "lifetime below zero", "trust_domain: a\njwt: {svid_lifetime: -5m}\n", []string{"svid_lifetime"}},
	{"server", "fraction of a second", "trust_domain: a\nx509: {svid_lifetime: 1500ms}\n", []string{"not a whole number of seconds"}},
	{"server", "SVID outlives authority", "trust_domain: a\nx509: {svid_lifetime: 20h}\n", []string{"an authority must live at least twice as long"}},
	{"server", "authority for a century", "trust_domain: a\nx509: {authority_lifetime: 90000d}\n", []string{"authority_lifetime", "between"}},
	{"server", "foreign admin", "trust_domain: a\nadmin_ids: ['spiffe://b/x']\n", []string{"not the ID of a workload in trust domain \"a\""}},
	{"server", "malformed admin", "trust_domain: a\nadmin_ids: [x]\n", []string{"admin ID \"x\""}},
	{"server", "limit below zero", "trust_domain: a\nlimits: {connections: -1}\n", []string{"connections is -1", "between 1 and"}},
	{"server", "unknown log level", "trust_domain: a\nlog: {level: loud}\n", []string{"loud", "debug, info, warn, error"}},
	{"server", "unknown variable", "trust_domain: ${HALLMARK_NOT_SET}\n", []string{"HALLMARK_NOT_SET"}},

	{"server", "target without a name", "trust_domain: a\npublish: [{bundle: b, directory: {path: /srv}}]\n", []string{"server.yaml:2", "has no name", "set name"}},
	{"server", "target with a bad name", "trust_domain: a\npublish: [{name: A b, bundle: b, directory: {path: /srv}}]\n", []string{"no name of a target", "like web"}},
	{"server", "two targets of one name", "trust_domain: a\npublish: [{name: x, bundle: b, directory: {path: /srv}}, {name: x, bundle: c, directory: {path: /srv}}]\n", []string{"two targets have the name x", "give each its own"}},
	{"server", "target nowhere", "trust_domain: a\npublish: [{name: x, bundle: b}]\n", []string{"names no place", "set directory"}},
	{"server", "target of nothing", "trust_domain: a\npublish: [{name: x, directory: {path: /srv}}]\n", []string{"has nothing to publish", "set bundle"}},
	{"server", "target in a relative directory", "trust_domain: a\npublish: [{name: x, bundle: b, directory: {path: www}}]\n", []string{"directory.path is \"www\"", "write the absolute path"}},
	{"server", "target that climbs out of its directory", "trust_domain: a\npublish: [{name: x, bundle: ../b, directory: {path: /srv}}]\n", []string{"bundle \"../b\"", "write a path like bundle.json"}},
	{"server", "target with an absolute document", "trust_domain: a\npublish: [{name: x, bundle: /b, directory: {path: /srv}}]\n", []string{"bundle \"/b\"", "write a path like bundle.json"}},
	{"server", "target with a prefix that climbs", "trust_domain: a\njwt: {issuer: 'https://b'}\npublish: [{name: x, issuers: [{url: 'https://b', prefix: a/../../b}], directory: {path: /srv}}]\n", []string{"prefix \"a/../../b\"", "write a path like"}},
	{"server", "target of an issuer without URL", "trust_domain: a\npublish: [{name: x, issuers: [{}], directory: {path: /srv}}]\n", []string{"has no url", "https://id.example.org"}},
	{"server", "target of an issuer over HTTP", "trust_domain: a\njwt: {issuer: 'http://b'}\npublish: [{name: x, issuers: [{url: 'http://b'}], directory: {path: /srv}}]\n", []string{"is not https"}},
	{"server", "target of an issuer that no token has", "trust_domain: a\npublish: [{name: x, issuers: [{url: 'https://b'}], directory: {path: /srv}}]\n", []string{"no token has \"https://b\"", "set jwt.issuer"}},
	{"server", "target with two issuers in one place", "trust_domain: a\njwt: {issuer: 'https://b'}\npublish: [{name: x, issuers: [{url: 'https://b'}, {url: 'https://b'}], directory: {path: /srv}}]\n", []string{"have the path keys", "a prefix of its own"}},
	{"server", "target with a document below another", "trust_domain: a\njwt: {issuer: 'https://b'}\npublish: [{name: x, bundle: keys/b, issuers: [{url: 'https://b'}], directory: {path: /srv}}]\n", []string{"below it", "choose other paths"}},
	{"server", "target in a bucket of no region", "trust_domain: a\npublish: [{name: x, bundle: b, s3: {bucket: ids}}]\n", []string{"s3.region is", "like eu-central-1"}},
	{"server", "target in a bucket with a path", "trust_domain: a\npublish: [{name: x, bundle: b, gcs: {bucket: ids/x}}]\n", []string{"gcs.bucket is \"ids/x\"", "the name of a bucket"}},
	{"server", "target in an account with a domain", "trust_domain: a\npublish: [{name: x, bundle: b, azure_blob: {account: a.b, container: ids}}]\n", []string{"azure_blob.account is \"a.b\"", "small letters and digits"}},
	{"server", "target in two places", "trust_domain: a\npublish: [{name: x, bundle: b, s3: {bucket: ids, region: r}, directory: {path: /srv}}]\n", []string{"names directory and s3", "choose one"}},
	{"server", "two targets in one place", "trust_domain: a\npublish: [{name: x, bundle: a/b, directory: {path: /srv}}, {name: y, bundle: b, directory: {path: /srv/a}}]\n", []string{"both publish b", "a place of its own"}},
	{"server", "bundle endpoint nowhere", "trust_domain: a\nbundle_endpoint: {}\n", []string{"bundle_endpoint has no listen", "0.0.0.0:8443"}},
	{"server", "bundle endpoint without port", "trust_domain: a\nbundle_endpoint: {listen: localhost}\n", []string{"missing port", "write host:port"}},
	{"server", "bundle endpoint where agents are served", "trust_domain: a\nlisten: 127.0.0.1:1\nbundle_endpoint: {listen: '127.0.0.1:1'}\n", []string{"where agents are served", "choose another port"}},
	{"server", "bundle endpoint without a key", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {certificate: /x}}\n", []string{"needs the files certificate and key"}},

	{"server", "token issuer over http", "trust_domain: a\nnode_attestors: {oidc: {issuers: [{name: x, issuer: 'http://id.example'}]}}\n", []string{"http://id.example", "it is not https"}},
	{"server", "condition that is none", "trust_domain: a\nnode_attestors: {oidc: {issuers: [{name: x, issuer: 'https://id.example', condition: claims.sub}]}}\n", []string{"condition", "compare claims with something"}},
	{"server", "token exchange nowhere", "trust_domain: a\ntoken_exchange: {issuer: 'https://t.example', issuers: [{name: x, issuer: 'https://id.example'}]}\n", []string{"token_exchange has no listen", "0.0.0.0:8444"}},
	{"server", "token exchange without issuers", "trust_domain: a\ntoken_exchange: {listen: ':8444', issuer: 'https://t.example'}\n", []string{"issuers is missing"}},
	{"server", "token exchange over http", "trust_domain: a\ntoken_exchange: {listen: ':8444', issuer: 'http://t.example', issuers: [{name: x, issuer: 'https://id.example'}]}\n", []string{"is not an https URL"}},
	{"server", "HTTP challenges of any name", "trust_domain: a\nnode_attestors: {http_challenge: {}}\n", []string{"allowed_dns_patterns is missing", "anybody can have one"}},
	{"server", "HTTP challenges again at any port", "trust_domain: a\nnode_attestors: {http_challenge: {allowed_dns_patterns: [a], allow_non_root_ports: true, allow_reattestation: true}}\n", []string{"exclude each other", "remove one of the two"}},
	{"agent", "HTTP challenge of an address", "trust_domain: a\nserver: b:1\nnode_attestor: {http_challenge: {hostname: 10.0.0.1}}\n", []string{"a name in the DNS"}},
	{"server", "plugin without checksum", "trust_domain: a\nnode_attestors: {plugins: {acme: {command: /x}}}\n", []string{"plugin acme", "checksum is missing", "sha256sum"}},
	{"server", "plugin with the name of a built-in attestor", "trust_domain: a\nnode_attestors: {plugins: {x509pop: {command: /x}}}\n", []string{"x509pop is the name of a built-in attestor", "give the plugin another one"}},
	{"agent", "plugin by a relative path", "trust_domain: a\nserver: b:1\nworkload_attestors: {plugins: {acme: {command: x}}}\n", []string{"plugin acme", "no absolute path"}},
	{"agent", "two plugins for one node", "trust_domain: a\nserver: b:1\nnode_attestor: {plugins: {p: {command: /x, insecure_no_checksum: true}, q: {command: /x, insecure_no_checksum: true}}}\n", []string{"names 2 attestors", "by one"}},

	{"server", "status lists nowhere", "trust_domain: a\nstatus_list_endpoint: {url: 'https://status.example'}\n", []string{"status_list_endpoint has no listen", "0.0.0.0:8446"}},
	{"server", "status lists without a URL", "trust_domain: a\nstatus_list_endpoint: {listen: ':8446'}\n", []string{"has no url", "https://status.example.org"}},
	{"server", "status lists over HTTP", "trust_domain: a\nstatus_list_endpoint: {listen: ':8446', url: 'http://status.example'}\n", []string{"is not https", "relying parties refuse it"}},
	{"server", "status lists by a URL with a path", "trust_domain: a\nstatus_list_endpoint: {listen: ':8446', url: 'https://status.example/x'}\n", []string{"none of a host alone"}},
	{"server", "status lists where CRLs are", "trust_domain: a\ncrl_endpoint: {listen: ':8080'}\nstatus_list_endpoint: {listen: ':8080', url: 'https://status.example'}\n", []string{"where crl_endpoint is", "choose another port"}},
	{"server", "status lists held for a day", "trust_domain: a\nstatus_list_endpoint: {listen: ':8446', url: 'https://status.example', ttl: 24h}\n", []string{"ttl is 24h0m0s", "between 1s and 1h"}},
	{"server", "CRLs nowhere", "trust_domain: a\ncrl_endpoint: {url: 'http://crl.example'}\n", []string{"crl_endpoint has no listen", "0.0.0.0:8080"}},
	{"server", "CRLs where agents are", "trust_domain: a\nlisten: ':8081'\ncrl_endpoint: {listen: ':8081'}\n", []string{"where agents are served", "choose another port"}},
	{"server", "CRLs where the bundle is", "trust_domain: a\nbundle_endpoint: {listen: ':8443'}\ncrl_endpoint: {listen: ':8443'}\n", []string{"where bundle_endpoint is", "choose another port"}},
	{"server", "CRLs by a URL with a path", "trust_domain: a\ncrl_endpoint: {listen: ':8080', url: 'http://crl.example/x'}\n", []string{"none of a host alone", "write one like http://crl.example.org"}},
	{"server", "OIDC issuer nowhere", "trust_domain: a\njwt: {issuer: 'https://id.example'}\noidc_issuer: {urls: ['https://id.example'], plain_http: true}\n", []string{"oidc_issuer has no listen", "0.0.0.0:8445"}},
	{"server", "ACME without domains", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {acme: {accept_terms: true}}}\n", []string{"acme names no domains"}},
	{"server", "ACME without its terms accepted", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {acme: {domains: [id.example]}}}\n", []string{"accept_terms: true"}},
	{"server", "ACME for a wildcard", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {acme: {domains: ['*.example'], accept_terms: true}}}\n", []string{"*.example", "not the name of a host"}},
	{"server", "ACME over HTTP", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {acme: {domains: [id.example], accept_terms: true, directory: 'http://ca.example/'}}}\n", []string{"not an https URL"}},
	{"server", "ACME for half an account", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {acme: {domains: [id.example], accept_terms: true, external_account: {key_id: x}}}}\n", []string{"external_account needs key_id and key_file"}},
	{"server", "ACME for an account whose key is nowhere", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {acme: {domains: [id.example], accept_terms: true, external_account: {key_id: x, key_file: /nowhere}}}}\n", []string{"external_account.key_file", "/nowhere"}},
	{"server", "ACME and files", "trust_domain: a\nbundle_endpoint: {listen: ':8443', https_web: {certificate: /x, key: /y, acme: {domains: [id.example], accept_terms: true}}}\n", []string{"acme and files", "choose one"}},
	{"server", "OIDC issuer without a certificate", "trust_domain: a\njwt: {issuer: 'https://id.example'}\noidc_issuer: {listen: ':8445', urls: ['https://id.example']}\n", []string{"no https_web", "set its certificate and key, or plain_http"}},
	{"server", "OIDC issuer with TLS and without", "trust_domain: a\njwt: {issuer: 'https://id.example'}\noidc_issuer: {listen: ':8445', urls: ['https://id.example'], plain_http: true, https_web: {certificate: /x, key: /y}}\n", []string{"https_web and plain_http", "choose one"}},
	{"server", "OIDC issuer without a URL", "trust_domain: a\noidc_issuer: {listen: ':8445', plain_http: true}\n", []string{"oidc_issuer.urls", "write one like https://id.example.org"}},
	{"server", "OIDC issuer over http", "trust_domain: a\njwt: {issuer: 'http://id.example'}\noidc_issuer: {listen: ':8445', urls: ['http://id.example'], plain_http: true}\n", []string{"is not https"}},
	{"server", "OIDC issuer that no token names", "trust_domain: a\noidc_issuer: {listen: ':8445', urls: ['https://id.example'], plain_http: true}\n", []string{"no token has one of its URLs", "set jwt.issuer to https://id.example"}},
	{"server", "OIDC issuer where the bundle is", "trust_domain: a\njwt: {issuer: 'https://id.example'}\nbundle_endpoint: {listen: ':8443'}\noidc_issuer: {listen: ':8443', urls: ['https://id.example'], plain_http: true}\n", []string{"where the bundle is published", "choose another port"}},
	{"server", "OIDC issuer beside an endpoint that browsers cannot verify", "trust_domain: a\njwt: {issuer: 'https://id.example'}\ntoken_exchange: {listen: ':8444', issuer: 'https://t.example', issuers: [{name: x, issuer: 'https://i.example'}]}\noidc_issuer: {listen: ':8444', urls: ['https://id.example']}\n", []string{"cannot verify", "set token_exchange.https_web"}},
	{"server", "profile for nobody", "trust_domain: a\njwt: {profiles: [{algorithm: RS256}]}\n", []string{"audience is missing"}},
	{"server", "profile of another algorithm", "trust_domain: a\njwt: {profiles: [{audience: x, algorithm: HS256}]}\n", []string{"HS256", "ES256"}},
	{"server", "profile that another key signs", "trust_domain: a\njwt: {profiles: [{audience: x, algorithm: ES384}]}\n", []string{"ES384", "nor RS256"}},
	{"server", "profile that changes the subject", "trust_domain: a\njwt: {profiles: [{audience: x, claims: {sub: y}}]}\n", []string{"claim \"sub\" is reserved"}},
	{"server", "profile with half a claim", "trust_domain: a\njwt: {profiles: [{audience: x, claims: {y: '{segment.x}'}}]}\n", []string{"names no segment", "write {segment.1}"}},

	{"agent", "empty", "", []string{"trust_domain is missing", "hallmark token generate"}},
	{"agent", "no server", "trust_domain: a\n", []string{"server is missing", "host:port"}},
	{"agent", "server without port", "trust_domain: a\nserver: localhost\n", []string{"not host:port", "for example"}},
	{"agent", "server of nowhere", "trust_domain: a\nserver: 0.0.0.0:1\n", []string{"names no host", "write the name or the IP address"}},
	{"agent", "join is no join string", "join: abc\n", []string{"join:", "hallmark token generate"}},
	{"agent", "join is cut", "join: hallmark-join-v1.AGoLZXhhbXBsZS5vcmc\n", []string{"join:"}},
	{"agent", "no trust bundle", "trust_domain: a\nserver: b:1\ntrust_bundle: /none.pem\n", []string{"/none.pem", "no such file"}},
	{"agent", "trust bundle is a directory", "trust_domain: a\nserver: b:1\ntrust_bundle: /\n", []string{"directory"}},
	{"agent", "same sockets", "trust_domain: a\nserver: b:1\nsocket: /run/x\nadmin_socket: /run/x\n", []string{"are the same"}},
	{"agent", "socket path too long", "trust_domain: a\nserver: b:1\nsocket: /" + strings.Repeat("a", 120) + "\n", []string{"121 bytes long", "choose a shorter path"}},
	{"agent", "no node attestor", "trust_domain: a\nserver: b:1\nnode_attestor: {}\n", []string{"names no attestor", "choose join_token"}},
	{"agent", "no workload attestor", "trust_domain: a\nserver: b:1\nworkload_attestors: {}\n", []string{"names no attestor", "choose unix"}},
	{"agent", "signatures of no image", "trust_domain: a\nserver: b:1\nworkload_attestors: {docker: {image_signatures: {}}}\n", []string{"image_signatures.images names no image", "ghcr.io/acme"}},
	{"agent", "signatures of nobody", "trust_domain: a\nserver: b:1\nworkload_attestors: {k8s: {image_signatures: {images: [ghcr.io/acme/*]}}}\n", []string{"neither identities nor keys"}},
	{"agent", "empty token", "trust_domain: a\nserver: b:1\nnode_attestor: {join_token: {token: ''}}\n", []string{"token"}},
	{"agent", "too many SVIDs", "trust_domain: a\nserver: b:1\nheld_svids: 0\n", []string{"held_svids is 0", "between 1 and"}},
	{"agent", "token from nowhere", "trust_domain: a\nserver: b:1\nnode_attestor: {oidc: {}}\n", []string{"set either token_path or token_env"}},
	{"agent", "text for a boolean", "trust_domain: a\nserver: b:1\ninsecure_bootstrap: maybe\n", []string{"insecure_bootstrap", "true or false"}},
	{"agent", "limit too high", "trust_domain: a\nserver: b:1\nlimits: {calls_per_second: 2000000}\n", []string{"calls_per_second is 2000000", "between 1 and"}},
}

func TestBadConfigurationIsExplainedAndChangesNothing(t *testing.T) {
	for _, c := range configs {
		t.Run(c.program+" "+c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			file := filepath.Join(dir, c.program+".yaml")
			must(t, os.WriteFile(file, []byte(c.text), 0o600))
			before := listing(t, dir)
			for _, verb := range []string{"validate", "run"} {
				_, stderr, code := harness.Command{Args: []string{c.program, verb, "-c", file}}.Try(t)
				if code != 1 {
					t.Errorf("%s: exit status %d", verb, code)
				}
				says(t, stderr, c.says...)
			}
			if after := listing(t, dir); after != before {
				t.Errorf("the directory was\n%s\nand is\n%s", before, after)
			}
		})
	}
}

// seenByValidateOnly are those configurations whose mistake no JSON Schema can
// see: it is in what a value means, in several keys together, or in a file that
// is named; or what is missing may come from a flag.
var seenByValidateOnly = map[string]bool{
	"server ACME without domains": true, "server ACME without its terms accepted": true, "server ACME for a wildcard": true,
	"server ACME over HTTP": true, "server ACME and files": true, "server ACME for half an account": true,
	"server ACME for an account whose key is nowhere": true,
	"server empty": true, "agent empty": true, "agent no server": true, // flags may give it
	"server capital trust domain": true, "server trust domain with scheme": true, "server trust domain too long": true,
	"server listen without port": true, "server listen on a large port": true, "server advertise everything": true,
	"server empty data_dir": true, "server socket path too long": true, "server tiny memtable": true,
	"server lifetime of nothing": true, "server fraction of a second": true, "server SVID outlives authority": true,
	"server authority for a century": true, "server foreign admin": true, "server malformed admin": true,
	"server limit below zero": true, "server unknown variable": true,
	"server key manager of another name": true, "server key manager without a region": true, "server key manager with a token in it": true,
	"server key manager in plain HTTP": true, "server key manager with a wrong attribute": true,
	"server HTTP challenges of any name": true, "server HTTP challenges again at any port": true, "agent HTTP challenge of an address": true,
	"server plugin without checksum": true, "server plugin with the name of a built-in attestor": true,
	"agent plugin by a relative path": true, "agent two plugins for one node": true,
	"server bundle endpoint nowhere": true, "server bundle endpoint without port": true,
	"server bundle endpoint where agents are served": true, "server bundle endpoint without a key": true,
	"server target without a name": true, "server target in an account with a domain": true, "server target in a bucket with a path": true, "server target in a bucket of no region": true, "server target in two places": true, "server target with a bad name": true, "server two targets of one name": true, "server target nowhere": true,
	"server target of nothing": true, "server target in a relative directory": true, "server target that climbs out of its directory": true,
	"server target with an absolute document": true, "server target with a prefix that climbs": true, "server target of an issuer without URL": true,
	"server target of an issuer over HTTP": true, "server target of an issuer that no token has": true, "server target with two issuers in one place": true,
	"server target with a document below another": true, "server two targets in one place": true,
	"server OIDC issuer nowhere": true, "server OIDC issuer without a certificate": true, "server OIDC issuer with TLS and without": true,
	"server OIDC issuer without a URL": true, "server OIDC issuer over http": true, "server OIDC issuer that no token names": true,
	"server CRLs nowhere": true, "server CRLs where agents are": true, "server CRLs where the bundle is": true, "server CRLs by a URL with a path": true,
	"server status lists nowhere": true, "server status lists without a URL": true, "server status lists over HTTP": true,
	"server status lists by a URL with a path": true, "server status lists where CRLs are": true, "server status lists held for a day": true,
	"server OIDC issuer where the bundle is": true, "server OIDC issuer beside an endpoint that browsers cannot verify": true, "server profile for nobody": true,
	"server profile that another key signs": true, "server profile that changes the subject": true, "server profile with half a claim": true,
	"server token exchange nowhere": true, "server token exchange without issuers": true, "server token exchange over http": true,
	"server token issuer over http": true, "server condition that is none": true,
	"agent signatures of no image": true, "agent signatures of nobody": true,
	"agent server without port": true, "agent server of nowhere": true, "agent join is no join string": true,
	"agent join is cut": true, "agent no trust bundle": true, "agent trust bundle is a directory": true,
	"agent same sockets": true, "agent socket path too long": true, "agent no workload attestor": true,
	"agent empty token": true, "agent too many SVIDs": true, "agent limit too high": true,
}

func TestTheSchemaRefusesWhateverIsOfTheWrongForm(t *testing.T) {
	seen := 0
	for _, c := range configs {
		name := c.program + " " + c.name
		var file any
		if err := yaml.Unmarshal([]byte(c.text), &file); err != nil || strings.Contains(c.text, "---") {
			continue // no YAML, or not one document: not for a schema
		}
		err := harness.Schema(t, c.program).Validate(file)
		if (err == nil) != seenByValidateOnly[name] {
			t.Errorf("%s: the schema says %v, of\n%s", name, err, c.text)
		}
		if err != nil {
			seen++
		}
	}
	if seen < 12 {
		t.Errorf("the schema has seen %d mistakes only", seen)
	}
}
