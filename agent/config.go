package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/broker"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/awsiid"
	"github.com/hallmark-id/hallmark/attestors/azureimds"
	"github.com/hallmark-id/hallmark/attestors/azuremsi"
	"github.com/hallmark-id/hallmark/attestors/docker"
	"github.com/hallmark-id/hallmark/attestors/gcpiit"
	"github.com/hallmark-id/hallmark/attestors/httpchallenge"
	"github.com/hallmark-id/hallmark/attestors/k8s"
	"github.com/hallmark-id/hallmark/attestors/k8spsat"
	"github.com/hallmark-id/hallmark/attestors/oidc"
	"github.com/hallmark-id/hallmark/attestors/plugin"
	"github.com/hallmark-id/hallmark/attestors/sshpop"
	"github.com/hallmark-id/hallmark/attestors/systemd"
	"github.com/hallmark-id/hallmark/attestors/tpmdevid"
	"github.com/hallmark-id/hallmark/attestors/tpmek"
	"github.com/hallmark-id/hallmark/attestors/unix"
	"github.com/hallmark-id/hallmark/attestors/x509pop"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/join"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/pkg/telemetry"
)

// Config is an agent's configuration, as agent.yaml has it. With a join string
// nothing else is required.
type Config struct {
	// TrustDomain is the name of the trust domain that this node belongs to, for
	// example example.org. Default: that of the join string.
	TrustDomain string `yaml:"trust_domain" env:"expand"`

	// Server is the host:port of a server. A name may stand for several. Default:
	// that of the join string.
	Server string `yaml:"server" env:"expand"`

	// OtherServers are further servers of the trust domain, host:port each: where
	// to go when that one is away. A server tells the agent where the others are,
	// which is kept in data_dir, so that this is needed for the first start alone.
	// At most 64. Default: none.
	OtherServers []string `yaml:"other_servers" env:"expand"`

	// DataDir is the directory of the agent's own identity, which it makes with
	// mode 0700. It belongs to this agent alone. Default
	// /var/lib/hallmark/agent.
	DataDir string `yaml:"data_dir" env:"expand"`

	// Socket is the path of the Unix socket where processes find the Workload
	// API. Every user may connect; what a process gets depends on what it is.
	// Default /run/hallmark/workload.sock.
	Socket string `yaml:"socket" env:"expand"`

	// AdminSocket is the path of the Unix socket for operators on this node:
	// root, and the user that the agent runs as. Default
	// /run/hallmark/agent.sock.
	AdminSocket string `yaml:"admin_socket" env:"expand"`

	// AuthorizedDelegates are SPIFFE IDs of this trust domain. A process of this
	// node that an entry gives one of them may fetch the SVIDs of all other
	// workloads of the node, through SPIRE's Delegated Identity API on
	// admin_socket. That can then be reached by the socket's group too (mode
	// 0660), which may do nothing else there: to let delegates in that are not
	// root, put the socket into a directory of their group with the setgid bit.
	// Default: nobody.
	AuthorizedDelegates []string `yaml:"authorized_delegates"`

	// Broker is about the SPIFFE Broker API. It needs experimental.broker.
	Broker *BrokerConfig `yaml:"broker"`

	// Join is the string that "hallmark token generate" printed. It is used as
	// long as the node has no identity, and needs no trust_bundle and no
	// node_attestor beside it. It is a secret until then.
	Join string `yaml:"join" env:"expand"`

	// TrustBundle is a file with the server's bundle, which says whether the
	// server is the right one when the node has no identity yet: PEM
	// certificates, or SPIFFE's JSON format ("hallmark bundle show" prints
	// both). At most 1 MiB.
	TrustBundle string `yaml:"trust_bundle" env:"expand"`

	// InsecureBootstrap makes a node that has no identity yet trust whoever
	// answers at the server's address, and keep to that. Somebody between node
	// and server can then take over the node for good: for trials only.
	InsecureBootstrap bool `yaml:"insecure_bootstrap"`

	// NodeAttestor says how this node proves what it is. Default: by the token
	// of the join string, if there is one.
	NodeAttestor *NodeAttestorConfig `yaml:"node_attestor"`

	// NodeKey says where the private key of the node's own X509-SVID is. Default:
	// in a file in data_dir.
	NodeKey NodeKeyConfig `yaml:"node_key"`

	// WorkloadAttestors say how processes are attested. Default: unix alone.
	WorkloadAttestors *WorkloadAttestorsConfig `yaml:"workload_attestors"`

	// HeldSVIDs is how many X509-SVIDs are signed before a process asked for
	// them and kept ready, 1 to 1000000. Those of processes that are being
	// served are held in any case. Default 1000.
	HeldSVIDs int `yaml:"held_svids"`

	// Limits bound what processes can make the agent do. SIGHUP reloads them.
	Limits LimitsConfig `yaml:"limits"`

	// Telemetry says where metrics and health are served. Default: nowhere.
	Telemetry telemetry.Config `yaml:"telemetry"`

	// Log is about the log, on the standard error. SIGHUP reloads its level.
	Log config.Log `yaml:"log"`

	// Experimental switches on what follows a standard that may still change.
	Experimental ExperimentalConfig `yaml:"experimental"`
}

// ExperimentalConfig switches on what may change incompatibly. Default: nothing.
type ExperimentalConfig struct {
	Broker bool `yaml:"broker"` // the SPIFFE Broker API; docs/broker.md
	WIT    bool `yaml:"wit"`    // WIT-SVIDs, if the server issues them; docs/wit.md
}

// LimitsConfig bounds what processes can make the agent do through each of its
// sockets. 0 is the default.
type LimitsConfig struct {
	// Connections at once; each takes two file descriptors. Default 4096.
	Connections int `yaml:"connections"`
	// ConnectionsPerUser are those of all processes of one user. Default 2048.
	ConnectionsPerUser int `yaml:"connections_per_user"`
	// ConnectionsPerProcess are those of one process. Default 32.
	ConnectionsPerProcess int `yaml:"connections_per_process"`
	// StreamsPerUser are the open streams of all processes of one user. Default
	// 8192.
	StreamsPerUser int `yaml:"streams_per_user"`
	// CallsPerSecond is how many calls and connections a second all processes of
	// one user may make. Default 2000.
	CallsPerSecond int `yaml:"calls_per_second"`
}

func (l LimitsConfig) endpoint() endpoint.Limits {
	return endpoint.Limits{
		Connections:       l.Connections,
		ConnectionsOfUser: l.ConnectionsPerUser,
		ConnectionsOfPID:  l.ConnectionsPerProcess,
		StreamsOfUser:     l.StreamsPerUser,
		CallsOfUser:       float64(l.CallsPerSecond),
	}
}

// NodeKeyConfig says where the node's own key is.
type NodeKeyConfig struct {
	// TPM has the key made in a TPM 2.0, which it cannot leave: a copy of data_dir
	// is of no use on another machine. It goes with any node_attestor, and needs
	// none of a TPM's. A key in a file moves there by itself. Default: the key is
	// in a file.
	TPM *TPMKeyConfig `yaml:"tpm"`
}

// TPMKeyConfig is the TPM that has the node's key.
type TPMKeyConfig struct {
	// Device is the TPM: a device, or the Unix socket of an emulator. Default
	// /dev/tpmrm0.
	Device string `yaml:"tpm_device_path" env:"expand"`
	// OwnerHierarchyPassword is that of the TPM's owner hierarchy. Default: none.
	OwnerHierarchyPassword string `yaml:"owner_hierarchy_password" env:"expand"`
}

// tpm returns the TPM that has the node's key, or nil.
func (c NodeKeyConfig) tpm() *node.TPM {
	if c.TPM == nil {
		return nil
	}
	return &node.TPM{Device: c.TPM.Device, OwnerPassword: c.TPM.OwnerHierarchyPassword}
}

// NodeAttestorConfig says how the node proves what it is: one of its fields is
// set.
type NodeAttestorConfig struct {
	JoinToken *JoinTokenConfig       `yaml:"join_token"` // by a token that an operator made
	X509PoP   *x509pop.AgentConfig   `yaml:"x509pop"`    // by a certificate and its private key
	SSHPoP    *sshpop.AgentConfig    `yaml:"sshpop"`     // by the SSH certificate of its host key
	TPMEK     *tpmek.AgentConfig     `yaml:"tpm_ek"`     // by its TPM and what the manufacturer says of it
	TPMDevID  *tpmdevid.AgentConfig  `yaml:"tpm_devid"`  // by a certificate of a key in its TPM
	K8sPSAT   *k8spsat.AgentConfig   `yaml:"k8s_psat"`   // by the service account token of its pod of Kubernetes
	AWSIID    *awsiid.AgentConfig    `yaml:"aws_iid"`    // by the identity document of its EC2 instance
	AzureIMDS *azureimds.AgentConfig `yaml:"azure_imds"` // by the attested document of its virtual machine of Azure
	AzureMSI  *azuremsi.AgentConfig  `yaml:"azure_msi"`  // by the token of the managed identity of its virtual machine of Azure
	GCPIIT    *gcpiit.AgentConfig    `yaml:"gcp_iit"`    // by the identity token of its instance of Google Cloud
	OIDC      *oidc.AgentConfig      `yaml:"oidc"`       // by the token of an outside issuer

	HTTPChallenge *httpchallenge.AgentConfig `yaml:"http_challenge"` // by its name in the DNS

	// Plugins is an external program that was written for SPIRE, by its name: a
	// node attestor, of which the server needs the other half under the same name.
	// It runs with the rights of the agent. Default: none.
	Plugins map[string]plugin.Config `yaml:"plugins"`
}

// JoinTokenConfig is attestation by join token.
type JoinTokenConfig struct {
	// Token is what "hallmark token generate" printed as the token. It works
	// once. Join, which carries it, is the simpler way.
	Token string `yaml:"token" env:"expand"`
}

// WorkloadAttestorsConfig says how processes are attested: by each attestor
// that is set.
type WorkloadAttestorsConfig struct {
	Unix    *unix.Config         `yaml:"unix"`    // by user, groups and program
	Docker  *docker.Config       `yaml:"docker"`  // by the container of docker that it runs in
	Podman  *docker.PodmanConfig `yaml:"podman"`  // by the container of podman that it runs in
	Systemd *systemd.Config      `yaml:"systemd"` // by the unit of systemd that it runs in
	K8s     *k8s.Config          `yaml:"k8s"`     // by the pod and the container of Kubernetes that it runs in

	// Plugins are external programs that were written for SPIRE, by name: its
	// workload attestors. Each runs with the rights of the agent. At most 16.
	// Default: none.
	Plugins map[string]plugin.Config `yaml:"plugins"`
}

// nodeAttestors is the table of what a node can prove itself with. A
// constructor returns nil if its part of the configuration is not there.
var nodeAttestors = []struct {
	path string // in the configuration, for errors
	make func(*NodeAttestorConfig) (*node.Attestor, error)
}{
	{"node_attestor.join_token", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.JoinToken == nil {
			return nil, nil
		}
		return node.JoinToken(c.JoinToken.Token)
	}},
	{"node_attestor.x509pop", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.X509PoP == nil {
			return nil, nil
		}
		a, err := x509pop.NewAgent(*c.X509PoP)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: x509pop.Name, Agent: a}, nil
	}},
	{"node_attestor.sshpop", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.SSHPoP == nil {
			return nil, nil
		}
		return &node.Attestor{Name: sshpop.Name, Agent: sshpop.NewAgent(*c.SSHPoP)}, nil
	}},
	{"node_attestor.tpm_ek", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.TPMEK == nil {
			return nil, nil
		}
		a, err := tpmek.NewAgent(*c.TPMEK)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: tpmek.Name, Agent: a}, nil
	}},
	{"node_attestor.tpm_devid", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.TPMDevID == nil {
			return nil, nil
		}
		a, err := tpmdevid.NewAgent(*c.TPMDevID)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: tpmdevid.Name, Agent: a}, nil
	}},
	{"node_attestor.k8s_psat", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.K8sPSAT == nil {
			return nil, nil
		}
		a, err := k8spsat.NewAgent(*c.K8sPSAT)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: k8spsat.Name, Agent: a}, nil
	}},
	{"node_attestor.aws_iid", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.AWSIID == nil {
			return nil, nil
		}
		a, err := awsiid.NewAgent(*c.AWSIID)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: awsiid.Name, Agent: a}, nil
	}},
	{"node_attestor.azure_imds", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.AzureIMDS == nil {
			return nil, nil
		}
		a, err := azureimds.NewAgent(*c.AzureIMDS)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: azureimds.Name, Agent: a}, nil
	}},
	{"node_attestor.azure_msi", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.AzureMSI == nil {
			return nil, nil
		}
		a, err := azuremsi.NewAgent(*c.AzureMSI)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: azuremsi.Name, Agent: a}, nil
	}},
	{"node_attestor.gcp_iit", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.GCPIIT == nil {
			return nil, nil
		}
		a, err := gcpiit.NewAgent(*c.GCPIIT)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: gcpiit.Name, Agent: a}, nil
	}},
	{"node_attestor.oidc", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.OIDC == nil {
			return nil, nil
		}
		a, err := oidc.NewAgent(*c.OIDC)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: oidc.Name, Agent: a}, nil
	}},
	{"node_attestor.http_challenge", func(c *NodeAttestorConfig) (*node.Attestor, error) {
		if c.HTTPChallenge == nil {
			return nil, nil
		}
		a, err := httpchallenge.NewAgent(*c.HTTPChallenge)
		if err != nil {
			return nil, err
		}
		return &node.Attestor{Name: httpchallenge.Name, Agent: a}, nil
	}},
}

// workloadAttestors is the table of what processes can be attested by, as
// nodeAttestors is for nodes.
var workloadAttestors = []struct {
	name string // of the attestor, and in the configuration
	make func(*WorkloadAttestorsConfig) (attestors.Workload, error)
}{
	{unix.Name, func(c *WorkloadAttestorsConfig) (attestors.Workload, error) {
		if c.Unix == nil {
			return nil, nil
		}
		return unix.New(*c.Unix)
	}},
	{docker.Name, func(c *WorkloadAttestorsConfig) (attestors.Workload, error) {
		if c.Docker == nil {
			return nil, nil
		}
		return docker.New(*c.Docker)
	}},
	{docker.PodmanName, func(c *WorkloadAttestorsConfig) (attestors.Workload, error) {
		if c.Podman == nil {
			return nil, nil
		}
		return docker.NewPodman(*c.Podman)
	}},
	{systemd.Name, func(c *WorkloadAttestorsConfig) (attestors.Workload, error) {
		if c.Systemd == nil {
			return nil, nil
		}
		return systemd.New(*c.Systemd)
	}},
	{k8s.Name, func(c *WorkloadAttestorsConfig) (attestors.Workload, error) {
		if c.K8s == nil {
			return nil, nil
		}
		return k8s.New(*c.K8s)
	}},
}

const (
	defaultDataDir     = "/var/lib/hallmark/agent"
	defaultSocket      = "/run/hallmark/workload.sock"
	defaultAdminSocket = "/run/hallmark/agent.sock"

	maxHeldSVIDs   = 1_000_000 // more is a mistake in writing
	maxLimit       = 1_000_000
	maxTrustDomain = 255     // bytes; SPIFFE-ID §2.3
	maxTrustBundle = 1 << 20 // bytes
)

// settings is a configuration that was checked, in the form that Run uses.
type settings struct {
	Config
	td        spiffeid.TrustDomain
	join      *join.String   // nil: none
	trust     *bundle.Bundle // of trust_bundle; nil: none
	node      *node.Attestor // nil: none
	workloads map[string]attestors.Workload
	plugins   []runner // the attestors that are external programs
	delegates []spiffeid.ID
	brokers   []broker.Policy // none: there is no Broker API
}

// Defaults is the configuration of which nothing was set.
func Defaults() Config {
	return Config{
		DataDir:     defaultDataDir,
		Socket:      defaultSocket,
		AdminSocket: defaultAdminSocket,
		HeldSVIDs:   held.DefaultLimit,
	}
}

// load reads and checks a configuration. It reads the file that trust_bundle
// names.
func load(src config.Source) (*settings, error) {
	s := &settings{Config: Defaults()}
	if err := config.Decode(src, &s.Config); err != nil {
		return nil, err
	}
	if s.WorkloadAttestors == nil {
		s.WorkloadAttestors = &WorkloadAttestorsConfig{Unix: &unix.Config{}}
	}
	var errs []error
	wrong := func(path, format string, args ...any) { errs = append(errs, src.Errorf(path, format, args...)) }
	s.checkServer(wrong)
	s.checkTrust(wrong)
	s.checkPaths(wrong)
	s.checkTrusted(wrong)
	s.checkAttestors(wrong)
	s.Telemetry.Check(func(key, format string, args ...any) { wrong("telemetry."+key, format, args...) })
	if s.HeldSVIDs < 1 || s.HeldSVIDs > maxHeldSVIDs {
		wrong("held_svids", "held_svids is %d; it is between 1 and %d", s.HeldSVIDs, maxHeldSVIDs)
	}
	s.checkLimits(wrong)
	return s, errors.Join(errs...)
}

func (s *settings) checkLimits(wrong wrongFunc) {
	for _, l := range []struct {
		name  string
		value int
	}{
		{"connections", s.Limits.Connections},
		{"connections_per_user", s.Limits.ConnectionsPerUser},
		{"connections_per_process", s.Limits.ConnectionsPerProcess},
		{"streams_per_user", s.Limits.StreamsPerUser},
		{"calls_per_second", s.Limits.CallsPerSecond},
	} {
		if l.value < 0 || l.value > maxLimit {
			wrong("limits."+l.name, "%s is %d; it is between 1 and %d, or 0 for the default", l.name, l.value, maxLimit)
		}
	}
}

type wrongFunc func(path, format string, args ...any)

// checkServer finds out the trust domain and the server, which the join string
// may name.
func (s *settings) checkServer(wrong wrongFunc) {
	if s.Join != "" {
		j, err := join.Parse(s.Join)
		if err != nil {
			wrong("join", "join: %v", err)
			return // what follows from it is unknown
		}
		s.join = j
	}
	switch td, err := spiffeid.TrustDomainFromString(s.TrustDomain); {
	case s.TrustDomain == "" && s.join == nil:
		wrong("trust_domain", "trust_domain is missing; set it to the name of the server's, or join with a string from \"hallmark token generate\"")
	case s.TrustDomain == "":
		s.td = s.join.TrustDomain
	case err != nil:
		wrong("trust_domain", "trust_domain: %v; write a name like example.org", err)
	case len(s.TrustDomain) > maxTrustDomain:
		wrong("trust_domain", "trust_domain is %d bytes long; the most is %d", len(s.TrustDomain), maxTrustDomain)
	case td.Name() != s.TrustDomain:
		wrong("trust_domain", "trust_domain %q is no bare name; write %s", s.TrustDomain, td.Name())
	case s.join != nil && s.join.TrustDomain != td:
		wrong("trust_domain", "trust_domain is %s, but join is for %s; remove one of the two", td.Name(), s.join.TrustDomain.Name())
	default:
		s.td = td
	}
	switch {
	case s.Server == "" && s.join == nil:
		wrong("server", "server is missing; set it to the host:port of the server, or join with a string from \"hallmark token generate\"")
	case s.Server == "":
		s.Server = s.join.Server
	default:
		if err := node.CheckAddress(s.Server); err != nil {
			wrong("server", "server: %v", err)
		}
	}
	if len(s.OtherServers) > node.MaxServers {
		wrong("other_servers", "other_servers has %d; the most is %d", len(s.OtherServers), node.MaxServers)
	}
	for i, address := range s.OtherServers {
		if err := node.CheckAddress(address); err != nil {
			wrong(fmt.Sprint("other_servers.", i), "other_servers: %v", err)
		}
	}
}

// checkTrust finds out why a server is to be trusted: there is one reason at
// most. Without any the node needs an identity from an earlier run, which is
// found out when it starts.
func (s *settings) checkTrust(wrong wrongFunc) {
	if s.Join != "" && s.TrustBundle != "" {
		wrong("trust_bundle", "trust_bundle and join exclude each other: the join string says which server to trust; remove one of the two")
	}
	if s.Join != "" && s.InsecureBootstrap {
		wrong("insecure_bootstrap", "insecure_bootstrap and join exclude each other: the join string says which server to trust; remove one of the two")
	}
	if s.TrustBundle != "" && s.InsecureBootstrap {
		wrong("insecure_bootstrap", "insecure_bootstrap and trust_bundle exclude each other: the bundle says which server to trust; remove one of the two")
	}
	if s.TrustBundle == "" || s.td.IsZero() {
		return
	}
	data, err := readBounded(s.TrustBundle, maxTrustBundle)
	if err != nil {
		wrong("trust_bundle", "trust_bundle: %v", err)
		return
	}
	if s.trust, err = node.ParseTrustBundle(s.td, data); err != nil {
		wrong("trust_bundle", "trust_bundle: %s: %v", s.TrustBundle, err)
	}
}

func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, err
}

func (s *settings) checkPaths(wrong wrongFunc) {
	if s.DataDir == "" {
		wrong("data_dir", "data_dir is empty; the default is %s", defaultDataDir)
	}
	for _, p := range []struct{ name, path, standard string }{
		{"socket", s.Socket, defaultSocket}, {"admin_socket", s.AdminSocket, defaultAdminSocket},
	} {
		switch {
		case p.path == "":
			wrong(p.name, "%s is empty; the default is %s", p.name, p.standard)
		case len(p.path) > peercred.MaxPath:
			wrong(p.name, "%s is %d bytes long and the kernel takes %d for a socket; choose a shorter path", p.name, len(p.path), peercred.MaxPath)
		}
	}
	if s.Socket != "" && s.Socket == s.AdminSocket {
		wrong("admin_socket", "admin_socket and socket are the same; processes must not reach what is for operators")
	}
}

// runner is an attestor that runs beside the agent.
type runner interface {
	Run(context.Context, *slog.Logger)
}

// checkAttestors makes the attestors.
func (s *settings) checkAttestors(wrong wrongFunc) {
	if c := s.NodeAttestor; c != nil {
		if s.Join != "" {
			wrong("node_attestor", "node_attestor and join exclude each other: the join string carries a token to attest with; remove one of the two")
			return
		}
		named := 0
		for _, kind := range nodeAttestors {
			a, err := kind.make(c)
			if err != nil {
				wrong(kind.path, "%v", err)
			}
			if err != nil || a != nil {
				named++
			}
			s.node = cmp.Or(a, s.node)
		}
		for name, plugged := range c.Plugins {
			named++
			a, err := plugin.NewAgent(name, plugged, s.td)
			if err != nil {
				wrong("node_attestor.plugins."+name, "plugin %s: %v", name, err)
				continue
			}
			s.node, s.plugins = &node.Attestor{Name: name, Agent: a}, append(s.plugins, a)
		}
		switch {
		case named == 0:
			wrong("node_attestor", "node_attestor names no attestor; choose join_token, x509pop, sshpop, tpm_ek, tpm_devid, k8s_psat, aws_iid, azure_imds, azure_msi, gcp_iit, oidc, http_challenge or one of plugins, or remove it")
		case named > 1:
			wrong("node_attestor", "node_attestor names %d attestors; a node proves what it is by one", named)
		}
	}
	if s.join != nil {
		var err error
		if s.node, err = node.JoinToken(s.join.Token); err != nil {
			wrong("join", "join: %v", err)
		}
	}

	named := 0
	s.workloads = make(map[string]attestors.Workload)
	for _, kind := range workloadAttestors {
		a, err := kind.make(s.WorkloadAttestors)
		if err != nil || a != nil {
			named++
		}
		if err != nil {
			wrong("workload_attestors."+kind.name, "%v", err)
			continue
		}
		if a != nil {
			s.workloads[kind.name] = a
		}
	}
	plugged := s.WorkloadAttestors.Plugins
	if err := plugin.CheckAll(plugged); err != nil {
		wrong("workload_attestors.plugins", "plugins: %v", err)
	}
	for name, c := range plugged {
		a, err := plugin.NewWorkload(name, c, s.td)
		if err != nil {
			wrong("workload_attestors.plugins."+name, "plugin %s: %v", name, err)
			continue
		}
		s.workloads[name], s.plugins = a, append(s.plugins, a)
	}
	if named == 0 && len(plugged) == 0 {
		wrong("workload_attestors", "workload_attestors names no attestor, so no process would get an identity; choose unix, or remove it")
	}
}
