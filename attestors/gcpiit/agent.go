package gcpiit

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cloud"
)

// AgentConfig is the configuration of the half on the node.
type AgentConfig struct {
	// ServiceAccount is the instance's service account that the token is of.
	// Default: default.
	ServiceAccount string `yaml:"service_account" env:"expand"`
	// Audience is what the token is for, as the server has it. Default:
	// spire-gcp-node-attestor.
	Audience string `yaml:"audience" env:"expand"`
	// MetadataAddress is the URL of the instance's metadata server, without a path.
	// Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

// Agent is the half on the node.
type Agent struct {
	metadata metadata
	url      string // path and query of the token
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It asks nothing yet.
func NewAgent(c AgentConfig) (*Agent, error) {
	if c.ServiceAccount == "" {
		c.ServiceAccount = "default"
	}
	if strings.ContainsAny(c.ServiceAccount, "/?#%") {
		return nil, fmt.Errorf("service_account is %q; write its e-mail address", c.ServiceAccount)
	}
	if c.Audience == "" {
		c.Audience = DefaultAudience
	}
	m, err := newMetadata(c.MetadataAddress)
	if err != nil {
		return nil, err
	}
	return &Agent{m, accounts + url.PathEscape(c.ServiceAccount) + "/identity?" + url.Values{"audience": {c.Audience}, "format": {"full"}}.Encode()}, nil
}

// Proof asks for a token.
func (a *Agent) Proof(ctx context.Context) ([]byte, error) {
	answer, err := a.metadata.get(ctx, a.url, maxToken)
	if err != nil {
		return nil, fmt.Errorf("get the instance's identity token: %w; is this an instance of Google Cloud that has a service account?", err)
	}
	token, err := cloud.Token(answer)
	if err != nil {
		return nil, fmt.Errorf("get the instance's identity token: %w", err)
	}
	return []byte(token), nil
}

// Respond fails: there is no challenge in this attestation.
func (a *Agent) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("server sent a challenge; gcp_iit has none")
}

// accounts is where an instance's metadata server has its service accounts.
const accounts = "/computeMetadata/v1/instance/service-accounts/"

// metadata is an instance's metadata server.
type metadata struct{ service *cloud.Service }

func newMetadata(address string) (metadata, error) {
	if address == "" {
		address = cloud.MetadataAddress
	}
	service, err := cloud.Metadata(address)
	if err != nil {
		return metadata{}, fmt.Errorf("metadata_address: %w", err)
	}
	return metadata{service}, nil
}

// get asks it. The header goes both ways: it tells a program that was made to fetch
// a URL from one that means to, and the metadata server from what else may answer.
func (m metadata) get(ctx context.Context, path string, most int64) ([]byte, error) {
	const header, flavor = "Metadata-Flavor", "Google"
	answer, err := m.service.Do(ctx, cloud.Question{URL: path, Header: map[string]string{header: flavor}, Most: most})
	if err != nil {
		return nil, err
	}
	if answer.Header.Get(header) != flavor {
		return nil, errors.New("what answered is not Google's metadata server")
	}
	return answer.Body, nil
}
