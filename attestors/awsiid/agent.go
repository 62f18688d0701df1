package awsiid

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/cms"
)

// AgentConfig is the configuration of the half on the node.
type AgentConfig struct {
	// MetadataAddress is the URL of the instance's metadata service, without a
	// path. Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

// Agent is the half on the node.
type Agent struct{ imds imds }

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
	return &Agent{imds{service}}, nil
}

// Proof asks for the document and its signature.
func (a *Agent) Proof(ctx context.Context) ([]byte, error) {
	session, err := a.imds.session(ctx)
	if err != nil {
		return nil, err
	}
	const identity = "/latest/dynamic/instance-identity/"
	doc, err := a.imds.get(ctx, session, identity+"document", maxDocument)
	if err != nil {
		return nil, fmt.Errorf("get the instance identity document: %w", err)
	}
	if _, err := parseDocument([]byte(doc)); err != nil {
		return nil, fmt.Errorf("get the instance identity document: %w", err)
	}
	signature, err := a.imds.get(ctx, session, identity+"rsa2048", maxSignature)
	if err != nil {
		return nil, fmt.Errorf("get the document's signature: %w", err)
	}
	signature = strings.TrimSpace(signature)
	if _, err := cms.Parse(signature); err != nil {
		return nil, fmt.Errorf("get the document's signature: %w", err)
	}
	return json.Marshal(payload{Document: doc, RSA2048: signature})
}

// Respond fails: there is no challenge in this attestation.
func (a *Agent) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("server sent a challenge; aws_iid has none")
}
