package server

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/awsiid"
	"github.com/hallmark-id/hallmark/attestors/azureimds"
	"github.com/hallmark-id/hallmark/attestors/azuremsi"
	"github.com/hallmark-id/hallmark/attestors/gcpiit"
	"github.com/hallmark-id/hallmark/attestors/jointoken"
	"github.com/hallmark-id/hallmark/attestors/k8spsat"
	"github.com/hallmark-id/hallmark/attestors/oidc"
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
}

// JoinTokenConfig enables join tokens; there is nothing to say of them.
type JoinTokenConfig struct{}

// nodeAttestors is the table of how nodes may attest. A constructor returns nil
// if its part of the configuration is not there. The registry and the log are
// for what it makes: they are nil when a configuration is only checked.
var nodeAttestors = []struct {
	name string // of the attestor, and in the configuration
	make func(*settings, *registry.Registry, *slog.Logger) (attestors.Server, error)
}{
	{jointoken.Name, func(s *settings, reg *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.JoinToken == nil {
			return nil, nil
		}
		return joinTokenAttestor(reg, log), nil
	}},
	{x509pop.Name, func(s *settings, reg *registry.Registry, log *slog.Logger) (attestors.Server, error) {
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
	{sshpop.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.SSHPoP == nil {
			return nil, nil
		}
		return sshpop.New(*s.NodeAttestors.SSHPoP, sshpop.Options{Log: log})
	}},
	{tpmek.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.TPMEK == nil {
			return nil, nil
		}
		return tpmek.New(*s.NodeAttestors.TPMEK, tpmek.Options{Log: log})
	}},
	{tpmdevid.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.TPMDevID == nil {
			return nil, nil
		}
		return tpmdevid.New(*s.NodeAttestors.TPMDevID, tpmdevid.Options{Log: log})
	}},
	{k8spsat.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.K8sPSAT == nil {
			return nil, nil
		}
		return k8spsat.New(*s.NodeAttestors.K8sPSAT, k8spsat.Options{Log: log})
	}},
	{awsiid.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.AWSIID == nil {
			return nil, nil
		}
		return awsiid.New(*s.NodeAttestors.AWSIID, awsiid.Options{Log: log})
	}},
	{azureimds.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.AzureIMDS == nil {
			return nil, nil
		}
		return azureimds.New(*s.NodeAttestors.AzureIMDS, azureimds.Options{Log: log})
	}},
	{azuremsi.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.AzureMSI == nil {
			return nil, nil
		}
		return azuremsi.New(*s.NodeAttestors.AzureMSI, azuremsi.Options{Log: log})
	}},
	{gcpiit.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.GCPIIT == nil {
			return nil, nil
		}
		return gcpiit.New(*s.NodeAttestors.GCPIIT, gcpiit.Options{Log: log})
	}},
	{oidc.Name, func(s *settings, _ *registry.Registry, log *slog.Logger) (attestors.Server, error) {
		if s.NodeAttestors.OIDC == nil {
			return nil, nil
		}
		return oidc.New(*s.NodeAttestors.OIDC, oidc.Options{Audience: s.td.IDString() + entry.ServerPath, Log: log})
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

// makeAttestors makes the attestors of nodes that are configured, by name.
func (s *settings) makeAttestors(reg *registry.Registry, log *slog.Logger) (map[string]attestors.Server, error) {
	out := make(map[string]attestors.Server)
	for _, kind := range nodeAttestors {
		a, err := kind.make(s, reg, log)
		if err != nil {
			return nil, fmt.Errorf("node attestor %s: %w", kind.name, err)
		}
		if a != nil {
			out[kind.name] = a
		}
	}
	return out, nil
}

// checkAttestors finds out whether the attestors of nodes can be made.
func (s *settings) checkAttestors(wrong func(path, format string, args ...any)) {
	for _, kind := range nodeAttestors {
		if _, err := kind.make(s, nil, nil); err != nil {
			wrong("node_attestors."+kind.name, "%s: %v", kind.name, err)
		}
	}
}
