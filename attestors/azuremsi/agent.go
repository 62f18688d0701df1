package azuremsi

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cloud"
)

// AgentConfig is the configuration of the half on the node.
type AgentConfig struct {
	// ResourceID is what the token is for, as the server has it. Default:
	// https://management.azure.com/.
	ResourceID string `yaml:"resource_id" env:"expand"`
	// MetadataAddress is the URL of the machine's metadata service, without a path.
	// Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

const apiVersion = "2018-02-01" // of IMDS, for tokens

// Agent is the half on the node.
type Agent struct {
	service *cloud.Service
	url     string // path and query of the token
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It asks nothing yet.
func NewAgent(c AgentConfig) (*Agent, error) {
	service, err := cloud.Metadata(cmp.Or(c.MetadataAddress, cloud.MetadataAddress))
	if err != nil {
		return nil, fmt.Errorf("metadata_address: %w", err)
	}
	query := url.Values{"api-version": {apiVersion}, "resource": {cmp.Or(c.ResourceID, DefaultResource)}}
	return &Agent{service, "/metadata/identity/oauth2/token?" + query.Encode()}, nil
}

// Proof asks for a token of the machine's own identity.
func (a *Agent) Proof(ctx context.Context) ([]byte, error) {
	answer, err := a.service.Do(ctx, cloud.Question{URL: a.url, Header: map[string]string{"Metadata": "true"}, Most: maxAnswer})
	if err != nil {
		return nil, fmt.Errorf("get the machine's token: %w; is this a virtual machine of Azure that has a system-assigned identity?", err)
	}
	var got struct {
		AccessToken string `json:"access_token"`
	}
	if err := json.Unmarshal(answer.Body, &got); err != nil || got.AccessToken == "" {
		return nil, errors.New("get the machine's token: the metadata service answered with something else")
	}
	token, err := cloud.Token([]byte(got.AccessToken))
	if err != nil {
		return nil, fmt.Errorf("get the machine's token: %w", err)
	}
	return json.Marshal(payload{token})
}

// Respond fails: there is no challenge in this attestation.
func (a *Agent) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("server sent a challenge; azure_msi has none")
}
