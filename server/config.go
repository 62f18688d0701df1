package server

import (
	"cmp"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/join"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/exchange"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/publish"
	"github.com/hallmark-id/hallmark/server/upstream"
)

// Config is a server's configuration, as server.yaml has it. Only trust_domain
// is required.
type Config struct {
	// TrustDomain is the name of the trust domain that the server rules, for
	// example example.org. It is part of every identity and cannot be changed
	// later: another name needs another data directory.
	TrustDomain string `yaml:"trust_domain" env:"expand"`

	// Name is this server's: small letters, digits, dots and hyphens. Of servers
	// that share a store each has another, and keeps it. Default: main, or, with a
	// store that is shared, one that the first start chooses and keeps in data_dir.
	Name string `yaml:"name" env:"expand"`

	// Listen is the host:port on which agents and remote clients are served, with
	// TLS. The default is reachable from this machine only. Port 0 takes a free
	// one. An empty host, or 0.0.0.0, is every address of the machine; set
	// advertise then. Default 127.0.0.1:8081.
	Listen string `yaml:"listen" env:"expand"`

	// Advertise is the host:port that agents should dial, as join strings carry
	// it. Default: that of listen.
	Advertise string `yaml:"advertise" env:"expand"`

	// DataDir is the directory of what the server keeps. Default
	// /var/lib/hallmark/server.
	DataDir string `yaml:"data_dir" env:"expand"`

	// AdminSocket is the path of the Unix socket for operators on this machine:
	// root, and the user that the server runs as. Default
	// /run/hallmark/server.sock.
	AdminSocket string `yaml:"admin_socket" env:"expand"`

	// Store says where the registry is kept. Default: badger.
	Store StoreConfig `yaml:"store"`

	// Keys says where the private keys of the authorities are kept. Default:
	// disk.
	Keys KeysConfig `yaml:"keys"`

	// Upstream is the authority above this server's: it signs its X.509 authorities.
	// Default: none, each is its own root.
	Upstream *upstream.Config `yaml:"upstream"`

	X509 X509Config `yaml:"x509"` // authorities and SVIDs of X.509
	JWT  JWTConfig  `yaml:"jwt"`  // authorities and SVIDs of JWT

	// WIT is about authorities and SVIDs of WIT, which experimental.wit switches
	// on.
	WIT *WITConfig `yaml:"wit"`

	// NodeAttestors says how nodes may attest. Default: join_token alone.
	NodeAttestors *NodeAttestorsConfig `yaml:"node_attestors"`

	// AdminIDs are SPIFFE IDs of the trust domain whose X509-SVIDs may administer
	// the server over TCP, besides those of entries with admin set.
	AdminIDs []string `yaml:"admin_ids"`

	// BundleEndpoint publishes the trust domain's bundle, for servers of other
	// trust domains. Default: it is not published.
	BundleEndpoint *BundleEndpointConfig `yaml:"bundle_endpoint"`

	// Federation is about fetching the bundles of foreign trust domains.
	Federation FederationConfig `yaml:"federation"`

	// TokenExchange gives SVIDs for tokens of outside issuers, over OAuth 2.0.
	// Default: it does not.
	TokenExchange *TokenExchangeConfig `yaml:"token_exchange"`

	// OIDCIssuer publishes the JWT authorities for relying parties that speak
	// OpenID Connect. Default: they are in the bundle alone.
	OIDCIssuer *OIDCIssuerConfig `yaml:"oidc_issuer"`

	// Publish has the bundle, and what verifies JWT-SVIDs, written to where others
	// fetch it: for servers that relying parties cannot reach. Default: nothing is.
	Publish []publish.Config `yaml:"publish"`

	// CRLEndpoint serves the certificate revocation lists of the X.509 authorities.
	// Default: agents and workloads have them alone.
	CRLEndpoint *CRLEndpointConfig `yaml:"crl_endpoint"`

	// StatusListEndpoint has JWT-SVIDs and WIT-SVIDs say where it is told whether
	// they were revoked, and serves that. Default: they end by themselves.
	StatusListEndpoint *StatusListEndpointConfig `yaml:"status_list_endpoint"`

	// Limits bound what callers can make the server do. SIGHUP reloads them.
	Limits LimitsConfig `yaml:"limits"`

	// Telemetry says where metrics and health are served. Default: nowhere.
	Telemetry telemetry.Config `yaml:"telemetry"`

	// Log is about the log, on the standard error. SIGHUP reloads its level.
	Log config.Log `yaml:"log"`

	// Experimental switches on what follows standards that may still change.
	Experimental ExperimentalConfig `yaml:"experimental"`
}

// ExperimentalConfig switches on what follows standards that may still change,
// and may change with them from one version to the next.
type ExperimentalConfig struct {
	// WIT makes the server have WIT authorities and issue WIT-SVIDs. Switching it
	// off takes them out of the bundle: what they signed verifies no more.
	WIT bool `yaml:"wit"`
}

// BundleEndpointConfig publishes the bundle over HTTPS: GET / has it, for
// whoever asks. The profile is https_spiffe, with the server's own X509-SVID,
// /spire/server, unless https_web is set.
type BundleEndpointConfig struct {
	// Listen is the host:port, for example 0.0.0.0:8443. It is required.
	Listen string `yaml:"listen" env:"expand"`
	// HTTPSWeb makes the profile https_web: clients verify the endpoint as
	// browsers do. Default: https_spiffe.
	HTTPSWeb *CertificateConfig `yaml:"https_web"`
}

// FederationConfig is about fetching the bundles of foreign trust domains.
type FederationConfig struct {
	// RefuseRedirects has a fetch fail whose endpoint answers with a redirect.
	// Default: it is followed, on the same host.
	RefuseRedirects bool `yaml:"refuse_redirects"`
}

// TokenExchangeConfig is the token endpoint: POST ISSUER/token gives SVIDs for
// tokens of outside issuers. Its certificate is the server's own X509-SVID,
// /spire/server, unless https_web is set.
type TokenExchangeConfig struct {
	// Listen is the host:port, for example 0.0.0.0:8444. It is required.
	Listen string `yaml:"listen" env:"expand"`
	// Issuer is the https URL by which callers reach the endpoint, without a slash
	// at its end, for example https://tokens.example.org:8444. It is the audience
	// of tokens, unless an issuer's configuration names others. It is required.
	Issuer string `yaml:"issuer" env:"expand"`
	// Issuers are those whose tokens are taken. At least one is required.
	Issuers []exchange.IssuerConfig `yaml:"issuers"`
	// HTTPSWeb has a certificate that clients verify as browsers do. Default: the
	// server's own X509-SVID.
	HTTPSWeb *CertificateConfig `yaml:"https_web"`
}

// CertificateConfig is a certificate of the Web PKI in files. They are read
// again when they change.
type CertificateConfig struct {
	// Certificate is a PEM file of the certificate and the intermediate ones that
	// follow it. It is required, unless acme is set.
	Certificate string `yaml:"certificate" env:"expand"`
	// Key is a PEM file of its private key. It is required, unless acme is set.
	Key string `yaml:"key" env:"expand"`
	// ACME has an authority issue the certificate, such as Let's Encrypt, and
	// renews it. Default: it is in files.
	ACME *ACMEConfig `yaml:"acme"`
}

// ACMEConfig is a certificate that an authority issues by ACME (RFC 8555). The
// authority connects to port 443 of each domain (tls-alpn-01), which has to lead
// to where the server listens.
type ACMEConfig struct {
	// Domains are the DNS names of the endpoint. At least one is required.
	Domains []string `yaml:"domains" env:"expand"`
	// AcceptTerms says that you accept the terms of service of the authority. It
	// is required.
	AcceptTerms bool `yaml:"accept_terms"`
	// Email is where the authority writes to, for example before a certificate
	// ends. Default: nowhere.
	Email string `yaml:"email" env:"expand"`
	// Directory is the URL of the authority. Default: Let's Encrypt's.
	Directory string `yaml:"directory" env:"expand"`
	// CAPath is a PEM file of the authorities that verify the directory. Default:
	// the system's.
	CAPath string `yaml:"ca_path" env:"expand"`
	// ExternalAccount is the account with the authority that the server's is bound
	// to (RFC 8555 §7.3.4), where the authority wants one. Default: none.
	ExternalAccount *ExternalAccountConfig `yaml:"external_account"`
}

// ExternalAccountConfig is an account with an authority, by what the authority
// gives its customers to prove it with.
type ExternalAccountConfig struct {
	// KeyID names the key. It is required.
	KeyID string `yaml:"key_id" env:"expand"`
	// KeyFile is the path of a file with the key (HMAC), in base64url as
	// authorities show it, which only the server's user may read. It is required.
	KeyFile string `yaml:"key_file" env:"expand"`
}

// StoreConfig says where the registry is kept: one of its fields is set.
type StoreConfig struct {
	Badger *BadgerConfig `yaml:"badger"` // files on a local disk
	Etcd   *EtcdConfig   `yaml:"etcd"`   // an etcd cluster, for several servers
	Memory *MemoryConfig `yaml:"memory"` // lost when the server ends: for trials
}

// BadgerConfig is a store in files.
type BadgerConfig struct {
	// Dir is the directory of the files; nothing else may be in it. Default:
	// store in data_dir.
	Dir string `yaml:"dir" env:"expand"`
	// MemTable is the size in bytes of the table that collects writes in memory,
	// 8388608 to 268435456. A larger one makes loading very many entries faster.
	// Default 8388608.
	MemTable int64 `yaml:"memtable"`
}

// EtcdConfig is a store that several servers share: embedded, unless endpoints
// are given.
type EtcdConfig struct {
	// Embedded has each server run a member of the cluster itself.
	Embedded *EmbeddedConfig `yaml:"embedded"`

	// Endpoints of a cluster that is run apart, like https://etcd1:2379. It may
	// be used for nothing else.
	Endpoints []string `yaml:"endpoints" env:"expand"`
	// CA is the file of the certificates by which the endpoints are known.
	CA string `yaml:"ca" env:"expand"`
	// Cert is the file of this server's certificate for them. It may be replaced
	// while the server runs.
	Cert string `yaml:"cert" env:"expand"`
	// Key is the file of the certificate's private key.
	Key string `yaml:"key" env:"expand"`
}

// EmbeddedConfig is this server's member of a cluster that servers form.
type EmbeddedConfig struct {
	// Listen is the host:port on which the other servers reach this one's
	// member, with TLS. Default: the host of listen, port 8082.
	Listen string `yaml:"listen" env:"expand"`
	// Advertise is the host:port that they dial; it does not change. Default:
	// that of embedded.listen.
	Advertise string `yaml:"advertise" env:"expand"`
	// Dir is the directory of the member's files; nothing else may be in it.
	// Default: etcd in data_dir.
	Dir string `yaml:"dir" env:"expand"`
	// Quota is how large the store may get, in bytes. Default 8589934592.
	Quota int64 `yaml:"quota"`
	// Join is the string that "hallmark cluster invite" printed on a server that
	// is there. It is used once, at the first start; without it, that begins a
	// new cluster.
	Join string `yaml:"join" env:"expand"`
}

// KeysConfig says where private keys are kept: one of its fields is set.
type KeysConfig struct {
	Disk   *DiskConfig   `yaml:"disk"`   // files that only the server's user can read
	KMS    *KMSConfig    `yaml:"kms"`    // a device or service that does not let keys out
	Memory *MemoryConfig `yaml:"memory"` // lost when the server ends; the next start makes new authorities
}

// DiskConfig is a key manager that keeps keys in files.
type DiskConfig struct {
	// Dir is the directory of the files. Default: keys in data_dir.
	Dir string `yaml:"dir" env:"expand"`
	// Encryption encrypts the files. Default: they are not encrypted. Where there
	// are keys already, run "hallmark server reencrypt-keys" after a change of it.
	Encryption *EncryptionConfig `yaml:"encryption"`
}

// EncryptionConfig names the secret that encrypts key files: one of its fields
// is set. A secret has at least 16 characters; make one with
// "openssl rand -base64 32".
type EncryptionConfig struct {
	// SecretFile is the path of a file with the secret: one line, readable by
	// the server alone, on another volume than the keys. For a credential of
	// systemd's: ${CREDENTIALS_DIRECTORY}/NAME.
	SecretFile string `yaml:"secret_file" env:"expand"`
	// SecretEnv is the name of an environment variable with the secret.
	SecretEnv string `yaml:"secret_env"`
}

// KMSConfig is a key manager that makes keys, signs with them and does not let
// them out.
type KMSConfig struct {
	// URI names it, and has no secret in it. A TPM 2.0 is
	// tpmkms:device=/dev/tpmrm0;storage-directory=PATH (the directory is keys in
	// data_dir if it is left out). A token behind a PKCS #11 library is
	// pkcs11:module-path=LIBRARY;token=LABEL (RFC 7512; serial or slot-id instead of
	// token, too), and needs a hallmark that was built with "-tags pkcs11". AWS KMS
	// is awskms:region=REGION. Google Cloud KMS is
	// cloudkms:project=PROJECT;location=LOCATION;key-ring=RING. Azure Key Vault is
	// azurekms:vault=NAME. The transit engine of a HashiCorp Vault or OpenBao is
	// transit:address=https://HOST:8200;mount=transit. docs/authorities.md has all
	// attributes, and where credentials are taken from.
	URI string `yaml:"uri" env:"expand"`
	// PINFile is the path of a file with the PIN of a PKCS #11 token, or the
	// password of a TPM's owner hierarchy, readable by the server alone. Default:
	// there is none.
	PINFile string `yaml:"pin_file" env:"expand"`
}

// MemoryConfig is what is kept in memory; there is nothing to say of it.
type MemoryConfig struct{}

// X509Config is about X.509 authorities and X509-SVIDs.
type X509Config struct {
	// KeyType is that of new authorities: ec-p256, ec-p384, rsa-2048 or rsa-4096.
	// Default ec-p256.
	KeyType authority.KeyType `yaml:"key_type"`
	// AuthorityLifetime is that of new authorities; at least twice the longest
	// lifetime of an SVID. Default 24h.
	AuthorityLifetime config.Duration `yaml:"authority_lifetime"`
	// SVIDLifetime is that of workloads' X509-SVIDs whose entry names none.
	// Default 1h.
	SVIDLifetime config.Duration `yaml:"svid_lifetime"`
	// AgentLifetime is that of agents' own X509-SVIDs: an agent that was away
	// for longer has to attest again, for which a join token is good only once.
	// Default 1h.
	AgentLifetime config.Duration `yaml:"agent_lifetime"`
}

// JWTConfig is about JWT authorities and JWT-SVIDs.
type JWTConfig struct {
	// KeyType is that of new authorities: ec-p256, ec-p384, or for relying parties
	// that take nothing but RS256, rsa-2048 or rsa-4096. Default ec-p256.
	KeyType authority.KeyType `yaml:"key_type"`
	// AuthorityLifetime is that of new authorities; at least twice
	// svid_lifetime. Default 24h.
	AuthorityLifetime config.Duration `yaml:"authority_lifetime"`
	// SVIDLifetime is that of JWT-SVIDs whose entry names none. Whoever gets hold
	// of one can use it until then. Default 5m.
	SVIDLifetime config.Duration `yaml:"svid_lifetime"`
	// Issuer is the claim iss of JWT-SVIDs. Default: none.
	Issuer string `yaml:"issuer" env:"expand"`
	// Profiles say what JWT-SVIDs for some audiences are like, such as clouds that
	// take RS256 alone. If one says so, there are RSA authorities besides, which
	// rotate with the others. Default: none.
	Profiles []issue.ProfileConfig `yaml:"profiles"`
}

// WITConfig is about WIT authorities and WIT-SVIDs.
type WITConfig struct {
	// KeyType is that of new authorities: ec-p256 (the default), ec-p384,
	// rsa-2048 or rsa-4096.
	KeyType authority.KeyType `yaml:"key_type"`
	// AuthorityLifetime is that of new authorities; at least twice
	// svid_lifetime. Default 24h.
	AuthorityLifetime config.Duration `yaml:"authority_lifetime"`
	// SVIDLifetime is that of WIT-SVIDs. Default 1h.
	SVIDLifetime config.Duration `yaml:"svid_lifetime"`
}

// LimitsConfig bounds what callers can make the server do. 0 is the default.
type LimitsConfig struct {
	// Connections over TCP at once; each takes a file descriptor. Default 15000.
	Connections int `yaml:"connections"`
	// CallsPerSecond is how many calls a second one caller over TCP may make: an
	// agent, an admin, or an IP address without an X509-SVID. Default 4000.
	CallsPerSecond int `yaml:"calls_per_second"`
	// AttestPerSecond is how many attestations a second one IP address may make.
	// Default 500.
	AttestPerSecond int `yaml:"attest_per_second"`
	// SignPerSecond is how many signatures a second one agent may ask for.
	// Default 2000.
	SignPerSecond int `yaml:"sign_per_second"`
}

const (
	defaultListen      = "127.0.0.1:8081"
	defaultDataDir     = "/var/lib/hallmark/server"
	defaultAdminSocket = "/run/hallmark/server.sock"

	// maxLimit bounds the limits: more is a mistake in writing.
	maxLimit = 1_000_000

	maxTrustDomain = 255 // bytes; SPIFFE-ID §2.3
)

// settings is a configuration that was checked, in the form that Run uses.
type settings struct {
	Config
	td       spiffeid.TrustDomain
	adminIDs []spiffeid.ID
	join     *join.String // nil: none
	profiles []*issue.Profile
}

// Defaults is the configuration of which nothing was set.
func Defaults() Config {
	return Config{
		Listen:      defaultListen,
		DataDir:     defaultDataDir,
		AdminSocket: defaultAdminSocket,
		X509: X509Config{
			AuthorityLifetime: config.Duration(authority.DefaultLifetime),
			SVIDLifetime:      config.Duration(time.Hour),
			AgentLifetime:     config.Duration(time.Hour),
		},
		JWT: JWTConfig{
			AuthorityLifetime: config.Duration(authority.DefaultLifetime),
			SVIDLifetime:      config.Duration(5 * time.Minute),
		},
	}
}

// load reads and checks a configuration, and the files of what is trusted that
// it names.
func load(src config.Source) (*settings, error) {
	s := &settings{Config: Defaults()}
	if err := config.Decode(src, &s.Config); err != nil {
		return nil, err
	}
	if s.NodeAttestors == nil {
		s.NodeAttestors = &NodeAttestorsConfig{JoinToken: &JoinTokenConfig{}}
	}
	if s.Store == (StoreConfig{}) {
		s.Store.Badger = &BadgerConfig{}
	}
	if s.Store.Badger != nil && s.Store.Badger.Dir == "" {
		s.Store.Badger.Dir = filepath.Join(s.DataDir, "store")
	}
	s.fillEtcd()
	if s.Keys == (KeysConfig{}) {
		s.Keys.Disk = &DiskConfig{}
	}
	if s.Keys.Disk != nil && s.Keys.Disk.Dir == "" {
		s.Keys.Disk.Dir = filepath.Join(s.DataDir, "keys")
	}
	if s.WIT == nil {
		s.WIT = &WITConfig{}
	} else if !s.Experimental.WIT {
		return s, src.Errorf("wit", "wit says how WIT-SVIDs are issued, but they are not; set wit in experimental, or remove this")
	}
	s.WIT.AuthorityLifetime = cmp.Or(s.WIT.AuthorityLifetime, config.Duration(authority.DefaultLifetime))
	s.WIT.SVIDLifetime = cmp.Or(s.WIT.SVIDLifetime, config.Duration(issue.DefaultWITTTL))
	return s, s.check(src)
}

// check finds what cannot be meant, and fills what is derived.
func (s *settings) check(src config.Source) error {
	var errs []error
	wrong := func(path, format string, args ...any) { errs = append(errs, src.Errorf(path, format, args...)) }

	var err error
	switch s.td, err = spiffeid.TrustDomainFromString(s.TrustDomain); {
	case s.TrustDomain == "":
		wrong("trust_domain", "trust_domain is missing; set it to a name like example.org")
	case err != nil:
		wrong("trust_domain", "trust_domain: %v; write a name like example.org", err)
	case s.td.Name() != s.TrustDomain:
		wrong("trust_domain", "trust_domain %q is no bare name; write %s", s.TrustDomain, s.td.Name())
	case len(s.TrustDomain) > maxTrustDomain:
		wrong("trust_domain", "trust_domain is %d bytes long; the most is %d, choose a shorter name", len(s.TrustDomain), maxTrustDomain)
	}
	if _, err := hostPort(s.Listen); err != nil {
		wrong("listen", "listen: %v; write host:port, for example %s", err, defaultListen)
	}
	if s.Advertise != "" {
		host, err := hostPort(s.Advertise)
		ip, _ := netip.ParseAddr(host)
		switch {
		case err != nil:
			wrong("advertise", "advertise: %v; write the host:port that agents dial", err)
		case host == "" || ip.IsUnspecified() || strings.HasSuffix(s.Advertise, ":0"):
			wrong("advertise", "advertise %q is no address that an agent can dial; write its host and port", s.Advertise)
		}
	}
	if s.DataDir == "" {
		wrong("data_dir", "data_dir is empty; the default is %s", defaultDataDir)
	}
	switch {
	case s.AdminSocket == "":
		wrong("admin_socket", "admin_socket is empty; the default is %s", defaultAdminSocket)
	case len(s.AdminSocket) > peercred.MaxPath:
		wrong("admin_socket", "admin_socket is %d bytes long and the kernel takes %d for a socket; choose a shorter path", len(s.AdminSocket), peercred.MaxPath)
	}
	if s.Name != "" {
		if err := checkName(s.Name); err != nil {
			wrong("name", "name: %v", err)
		}
	}
	engines := 0
	for _, named := range []bool{s.Store.Badger != nil, s.Store.Etcd != nil, s.Store.Memory != nil} {
		if named {
			engines++
		}
	}
	if engines > 1 {
		wrong("store", "store names %d engines; choose one of badger, etcd and memory", engines)
	}
	s.checkEtcd(wrong)
	if b := s.Store.Badger; b != nil && b.MemTable != 0 && (b.MemTable < 8<<20 || b.MemTable > 256<<20) {
		wrong("store.badger.memtable", "memtable is %d bytes; it is between %d and %d", b.MemTable, 8<<20, 256<<20)
	}
	s.checkKeys(wrong)
	if s.Upstream != nil {
		if path, err := s.Upstream.Check(); err != nil {
			wrong(strings.TrimSuffix("upstream."+path, "."), "%v", err)
		}
	}
	s.checkBundleEndpoint(wrong)
	s.checkTokenExchange(wrong)
	s.checkOIDC(wrong)
	s.checkPublish(wrong)
	s.checkCRLEndpoint(wrong)
	s.checkStatusListEndpoint(wrong)
	s.Telemetry.Check(func(key, format string, args ...any) { wrong("telemetry."+key, format, args...) })
	s.checkLifetimes(wrong)
	s.checkAttestors(wrong)
	for i, text := range s.AdminIDs {
		path := "admin_ids." + strconv.Itoa(i)
		switch id, err := spiffeid.FromString(text); {
		case err != nil:
			wrong(path, "admin ID %q: %v", text, err)
		case !s.td.IsZero() && !id.MemberOf(s.td), id.Path() == "":
			wrong(path, "admin ID %q is not the ID of a workload in trust domain %q", text, s.TrustDomain)
		default:
			s.adminIDs = append(s.adminIDs, id)
		}
	}
	for _, l := range []struct {
		name  string
		value int
	}{
		{"connections", s.Limits.Connections},
		{"calls_per_second", s.Limits.CallsPerSecond},
		{"attest_per_second", s.Limits.AttestPerSecond},
		{"sign_per_second", s.Limits.SignPerSecond},
	} {
		if l.value < 0 || l.value > maxLimit {
			wrong("limits."+l.name, "%s is %d; it is between 1 and %d, or 0 for the default", l.name, l.value, maxLimit)
		}
	}
	return errors.Join(errs...)
}

func (s *settings) checkBundleEndpoint(wrong func(path, format string, args ...any)) {
	if e := s.BundleEndpoint; e != nil {
		s.checkEndpoint("bundle_endpoint", e.Listen, "8443", e.HTTPSWeb, wrong)
	}
}

func (s *settings) checkTokenExchange(wrong func(path, format string, args ...any)) {
	e := s.TokenExchange
	if e == nil {
		return
	}
	s.checkEndpoint("token_exchange", e.Listen, "8444", e.HTTPSWeb, wrong)
	if b := s.BundleEndpoint; b != nil && b.Listen == e.Listen {
		wrong("token_exchange.listen", "token_exchange.listen is %s, where the bundle is published; choose another port, such as 8444", e.Listen)
	}
	if _, err := exchange.New(exchange.Options{TrustDomain: s.td, Issuer: e.Issuer, Issuers: e.Issuers}); err != nil {
		wrong("token_exchange", "token_exchange: %v", err)
	}
}

// checkEndpoint checks what endpoints over HTTPS have in common. Its errors
// propose a port.
func (s *settings) checkEndpoint(name, listen, port string, web *CertificateConfig, wrong func(path, format string, args ...any)) {
	switch _, err := hostPort(listen); {
	case listen == "":
		wrong(name, "%s has no listen; set it to an address like 0.0.0.0:%s", name, port)
	case err != nil:
		wrong(name+".listen", "%s.listen: %v; write host:port, for example 0.0.0.0:%s", name, err, port)
	case listen == s.Listen:
		wrong(name+".listen", "%s.listen is %s, where agents are served; choose another port, such as %s", name, listen, port)
	}
	switch {
	case web == nil:
	case web.ACME != nil:
		web.check(name+".https_web", wrong)
	case web.Certificate == "" || web.Key == "":
		wrong(name+".https_web", "https_web needs the files certificate and key, or acme")
	}
}

// checkLifetimes demands that an authority lives twice as long as what it
// signs: the next one is prepared at half of its life, and SVIDs are to have
// their whole lifetime until that takes over.
func (s *settings) checkLifetimes(wrong func(path, format string, args ...any)) {
	for _, l := range []struct {
		path      string
		lifetime  config.Duration
		authority string // the path of the lifetime of its authority
		within    config.Duration
	}{
		{"x509.svid_lifetime", s.X509.SVIDLifetime, "x509.authority_lifetime", s.X509.AuthorityLifetime},
		{"x509.agent_lifetime", s.X509.AgentLifetime, "x509.authority_lifetime", s.X509.AuthorityLifetime},
		{"jwt.svid_lifetime", s.JWT.SVIDLifetime, "jwt.authority_lifetime", s.JWT.AuthorityLifetime},
		{"wit.svid_lifetime", s.WIT.SVIDLifetime, "wit.authority_lifetime", s.WIT.AuthorityLifetime},
	} {
		switch d := time.Duration(l.lifetime); {
		case d < time.Second:
			wrong(l.path, "%s is %v; it is at least 1s", l.path, l.lifetime)
		case d%time.Second != 0:
			wrong(l.path, "%s %v is not a whole number of seconds", l.path, l.lifetime)
		case l.within < 2*l.lifetime:
			wrong(l.path, "%s is %v, but %s only %v; an authority must live at least twice as long as what it signs", l.path, l.lifetime, l.authority, l.within)
		}
	}
	for _, l := range []struct {
		path     string
		lifetime config.Duration
	}{
		{"x509.authority_lifetime", s.X509.AuthorityLifetime},
		{"jwt.authority_lifetime", s.JWT.AuthorityLifetime},
		{"wit.authority_lifetime", s.WIT.AuthorityLifetime},
	} {
		if d := time.Duration(l.lifetime); d < authority.MinLifetime || d > authority.MaxLifetime {
			wrong(l.path, "%s is %v; it is between %v and %v", l.path, l.lifetime, config.Duration(authority.MinLifetime), config.Duration(authority.MaxLifetime))
		}
	}
}

// hostPort checks host:port and returns the host.
func hostPort(address string) (host string, err error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "", err
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return "", errors.New("the port " + strconv.Quote(port) + " is no number between 0 and 65535")
	}
	return host, nil
}
