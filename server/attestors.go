package server

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/awsiid"
	"github.com/hallmark-id/hallmark/attestors/azureimds"
	"github.com/hallmark-id/hallmark/attestors/azuremsi"
	"github.com/hallmark-id/hallmark/attestors/gcpiit"
	"github.com/hallmark-id/hallmark/attestors/httpchallenge"
	"github.com/hallmark-id/hallmark/attestors/jointoken"
	"github.com/hallmark-id/hallmark/attestors/k8spsat"
	"github.com/hallmark-id/hallmark/attestors/oidc"
	"github.com/hallmark-id/hallmark/attestors/plugin"
	"github.com/hallmark-id/hallmark/attestors/sshpop"
	"github.com/hallmark-id/hallmark/attestors/tpmdevid"
	"github.com/hallmark-id/hallmark/attestors/tpmek"
	"github.com/hallmark-id/hallmark/attestors/x509pop"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/registry"
)

// NodeAttestorsConfig says how nodes may attest: by each attestor that is set.
type NodeAttestorsConfig struct {
	JoinToken *JoinTokenConfig        `yaml:"join_token"` // by a token that an operator made
	X509PoP   *x509pop.ServerConfig   `yaml:"x509pop"`    // by a certificate and its private key
	SSHPoP    *sshpop.ServerConfig    `yaml:"sshpop"`     // by the SSH certificate of a host key
	TPMEK     *tpmek.ServerConfig     `yaml:"tpm_ek"`     // by a TPM and what its manufacturer says of it
	TPMDevID  *tpmdevid.ServerConfig  `yaml:"tpm_devid"`  // by a certificate of a key in a TPM
	K8sPSAT   *k8spsat.ServerConfig   `yaml:"k8s_psat"`   // by the service account token of a pod of Kubernetes
	AWSIID    *awsiid.ServerConfig    `yaml:"aws_iid"`    // by the identity document of an EC2 instance
	AzureIMDS *azureimds.ServerConfig `yaml:"azure_imds"` // by the attested document of a virtual machine of Azure
	AzureMSI  *azuremsi.ServerConfig  `yaml:"azure_msi"`  // by the token of a managed identity of Azure
	GCPIIT    *gcpiit.ServerConfig    `yaml:"gcp_iit"`    // by the identity token of an instance of Google Cloud
	OIDC      *oidc.ServerConfig      `yaml:"oidc"`       // by the token of an outside issuer

	HTTPChallenge *httpchallenge.ServerConfig `yaml:"http_challenge"` // by its name in the DNS

	// Plugins are external programs that were written for SPIRE, by name: its
	// node attestors. Each runs with the rights of the server. At most 16.
	// Default: none.
	Plugins map[string]plugin.Config `yaml:"plugins"`
}

// JoinTokenConfig enables join tokens; there is nothing to say of them.
type JoinTokenConfig struct{}

// nodeAttestors is the table of how nodes may attest. A constructor returns nil
// if its part of the configuration is not there. The registry and the log are
// for what it makes: they are nil when a configuration is only checked.
var nodeAttestors = []struct {
	attestors.Profile // its name is that in the configuration
	make              func(*settings, *registry.Registry, *slog.Logger) (attestors.Server, error)
}{
	{jointoken.Profile, func(s *settings, reg *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.JoinToken == nil {
			return nil, nil
		}
		return joinTokenAttestor(reg, log), nil
	}},
	{x509pop.Profile, func(s *settings, reg *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.X509PoP == nil {
			return nil, nil
		}
		return x509pop.New(*s.NodeAttestors.X509PoP, x509pop.Options{
			TrustDomain: s.td,
			Roots: func(td spiffeid.TrustDomain) *x509.CertPool {
				if b := reg.View().Bundle(td); b != nil {
					return b.Pool()
				}
				return nil
			},
			Log: log,
		})
	}},
	{sshpop.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.SSHPoP == nil {
			return nil, nil
		}
		return sshpop.New(*s.NodeAttestors.SSHPoP, sshpop.Options{Log: log})
	}},
	{tpmek.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.TPMEK == nil {
			return nil, nil
		}
		return tpmek.New(*s.NodeAttestors.TPMEK, tpmek.Options{Log: log})
	}},
	{tpmdevid.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.TPMDevID == nil {
			return nil, nil
		}
		return tpmdevid.New(*s.NodeAttestors.TPMDevID, tpmdevid.Options{Log: log})
	}},
	{k8spsat.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.K8sPSAT == nil {
			return nil, nil
		}
		return k8spsat.New(*s.NodeAttestors.K8sPSAT, k8spsat.Options{Log: log})
	}},
	{awsiid.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.AWSIID == nil {
			return nil, nil
		}
		return awsiid.New(*s.NodeAttestors.AWSIID, awsiid.Options{Log: log})
	}},
	{azureimds.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.AzureIMDS == nil {
			return nil, nil
		}
		return azureimds.New(*s.NodeAttestors.AzureIMDS, azureimds.Options{Log: log})
	}},
	{azuremsi.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.AzureMSI == nil {
			return nil, nil
		}
		return azuremsi.New(*s.NodeAttestors.AzureMSI, azuremsi.Options{Log: log})
	}},
	{gcpiit.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.GCPIIT == nil {
			return nil, nil
		}
		return gcpiit.New(*s.NodeAttestors.GCPIIT, gcpiit.Options{Log: log})
	}},
	{oidc.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.OIDC == nil {
			return nil, nil
		}
		return oidc.New(*s.NodeAttestors.OIDC, oidc.Options{Audience: s.td.IDString() + entry.ServerPath, Log: log})
	}},
	{httpchallenge.Profile, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.HTTPChallenge == nil {
			return nil, nil
		}
		return httpchallenge.New(*s.NodeAttestors.HTTPChallenge, httpchallenge.Options{Log: log})
	}},
}

func joinTokenAttestor(reg *registry.Registry, log *slog.Logger) *jointoken.Server {
	return jointoken.New(func(ctx context.Context, token string) error {
		_, err := reg.ConsumeJoinToken(ctx, token)
		var told *registry.Error
		if err == nil || errors.As(err, &told) || ctx.Err() != nil {
			return err
		}
		log.Error("a join token could not be checked", "error", err) // of no use to the node
		return attestors.ErrUnavailable
	})
}

// NodeAttestors returns what is known of the ways to attest nodes that a server
// has, but for external programs: the weakest first.
func NodeAttestors() []attestors.Profile {
	var out []attestors.Profile
	for _, kind := range nodeAttestors {
		out = append(out, kind.Profile)
	}
	slices.SortStableFunc(out, func(a, b attestors.Profile) int { return cmp.Compare(a.Strength, b.Strength) })
	return out
}

// attestorProfiles are those that this server has.
func (s *settings) attestorProfiles() []attestors.Profile {
	var out []attestors.Profile
	for _, name := range slices.Sorted(maps.Keys(s.NodeAttestors.Plugins)) {
		out = append(out, plugin.Profile(name))
	}
	return append(out, NodeAttestors()...)
}

// makeAttestors makes the attestors of nodes that are configured, by name.
func (s *settings) makeAttestors(reg *registry.Registry, log *slog.Logger) (map[string]attestors.Server, error) {
	out := make(map[string]attestors.Server)
	for _, kind := range nodeAttestors {
		a, err := kind.make(s, reg, log)
		if err != nil {
			return nil, fmt.Errorf("node attestor %s: %w", kind.Name, err)
		}
		if a != nil {
			out[kind.Name] = a
		}
	}
	for name, c := range s.NodeAttestors.Plugins {
		a, err := plugin.NewServer(name, c, plugin.Options{
			TrustDomain: s.td,
			Agents:      func(id spiffeid.ID) bool { return reg.View().Node(id) != nil },
			Log:         log,
		})
		if err != nil {
			return nil, fmt.Errorf("node attestor %s: %w", name, err)
		}
		out[name] = a
	}
	return out, nil
}

// runPlugins runs the attestors that are external programs until the context
// ends. What happens to one of them harms nothing else.
func runPlugins(ctx context.Context, all map[string]attestors.Server, log *slog.Logger) {
	var running sync.WaitGroup
	for _, a := range all {
		if p, ok := a.(*plugin.Server); ok {
			running.Go(func() { p.Run(ctx, log) })
		}
	}
	running.Wait()
}

// checkAttestors finds out whether the attestors of nodes can be made.
func (s *settings) checkAttestors(wrong func(path, format string, args ...any)) {
	for _, kind := range nodeAttestors {
		if _, err := kind.make(s, nil, nil); err != nil {
			wrong("node_attestors."+kind.Name, "%s: %v", kind.Name, err)
		}
	}
	if err := plugin.CheckAll(s.NodeAttestors.Plugins); err != nil {
		wrong("node_attestors.plugins", "plugins: %v", err)
	}
	for name, c := range s.NodeAttestors.Plugins {
		if err := c.Check(name); err != nil {
			wrong("node_attestors.plugins."+name, "plugin %s: %v", name, err)
		}
	}
}
