package azureimds

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/cms"
)

// AgentConfig is the configuration of the half on the node.
type AgentConfig struct {
	// TenantDomain is the domain of the machine's tenant, for a SPIRE server, which
	// asks for it. Default: none; this program's server knows it by itself.
	TenantDomain string `yaml:"tenant_domain" env:"expand"`
	// MetadataAddress is the URL of the machine's metadata service, without a path.
	// Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

// apiVersion is that of IMDS.
const apiVersion = "2025-04-07"

// begin is the payload: it says nothing, and only has the server send its nonce.
const begin = "azure_imds"

// Agent is the half on the node.
type Agent struct {
	service *cloud.Service
	tenant  string
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It asks nothing yet.
func NewAgent(c AgentConfig) (*Agent, error) {
	if c.MetadataAddress == "" {
		c.MetadataAddress = cloud.MetadataAddress
	}
	service, err := cloud.Metadata(c.MetadataAddress)
	if err != nil {
		return nil, fmt.Errorf("metadata_address: %w", err)
	}
	return &Agent{service, c.TenantDomain}, nil
}

// Proof returns what begins an attestation.
func (a *Agent) Proof(context.Context) ([]byte, error) { return []byte(begin), nil }

// Respond has Azure sign a document over the server's nonce.
func (a *Agent) Respond(ctx context.Context, challenge []byte) ([]byte, error) {
	if !nonceForm.Match(challenge) {
		return nil, errors.New("server sent a nonce that is not of letters and digits")
	}
	nonce := string(challenge)
	data, err := a.get(ctx, "/metadata/attested/document", url.Values{"nonce": {nonce}}, maxSignature+1024)
	if err != nil {
		return nil, fmt.Errorf("get the attested document: %w", err)
	}
	r := response{Metadata: metadata{AgentDomain: a.tenant}}
	if err := json.Unmarshal(data, &r.Document); err != nil || r.Document.Signature == "" {
		return nil, errors.New("the metadata service answered with something else than an attested document")
	}
	if _, err := cms.Parse(r.Document.Signature); err != nil {
		return nil, fmt.Errorf("get the attested document: %w", err)
	}
	if a.tenant != "" { // SPIRE's servers look a machine of a scale set up by that
		if r.Metadata.VMSSName, err = a.scaleSet(ctx); err != nil {
			return nil, err
		}
	}
	return json.Marshal(r)
}

// scaleSet returns the name of the machine's scale set, or nil.
func (a *Agent) scaleSet(ctx context.Context) (*string, error) {
	data, err := a.get(ctx, "/metadata/instance/compute", url.Values{"format": {"json"}}, maxMetadata)
	if err != nil {
		return nil, fmt.Errorf("get the machine's scale set: %w", err)
	}
	var compute struct {
		VMScaleSetName string `json:"vmScaleSetName"`
	}
	if err := json.Unmarshal(data, &compute); err != nil {
		return nil, errors.New("the metadata service answered with something else than the machine's description")
	}
	if compute.VMScaleSetName == "" {
		return nil, nil
	}
	return &compute.VMScaleSetName, nil
}

func (a *Agent) get(ctx context.Context, path string, query url.Values, most int64) ([]byte, error) {
	query.Set("api-version", apiVersion)
	answer, err := a.service.Do(ctx, cloud.Question{URL: path + "?" + query.Encode(), Header: map[string]string{"Metadata": "true"}, Most: most})
	if err != nil {
		return nil, err
	}
	return answer.Body, nil
}
