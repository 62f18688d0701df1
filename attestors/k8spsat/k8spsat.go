// Package k8spsat attests a node of a Kubernetes cluster by the projected
// service account token (PSAT) of the agent's pod: a JWT that the cluster signs
// for one pod, one audience and a short time.
//
// [NewAgent] makes the half on the node, [New] the half on the server. They
// speak what SPIRE's attestor k8s_psat speaks, so that either half works with
// SPIRE's other one. The payload is JSON; there is no challenge:
//
//	{"cluster": "production", "token": "eyJ…"}
//
// The server verifies the token in one of two ways. By default the cluster's
// API server reviews it, which also tells of a token whose pod is gone, and
// describes the pod and its node. Where the server cannot reach the API server,
// it verifies the token by the cluster's public keys alone, and believes what is
// written in it.
//
// A node's SPIFFE ID ends in k8s_psat/CLUSTER/UID-OF-THE-NODE. The selectors,
// all of type "k8s_psat", are named as SPIRE's are:
//
//	cluster:production
//	agent_ns:hallmark                  of the agent's pod
//	agent_sa:agent
//	agent_pod_name:agent-v5wgr
//	agent_pod_uid:79261129-6b60-11e9-9054-0800277ac80f
//	agent_pod_label:tier:system        those that the configuration lists
//	agent_node_name:node-7
//	agent_node_uid:5dbb7b21-65fe-11e9-b1b0-0800277ac80f
//	agent_node_ip:172.16.10.1
//	agent_node_label:topology.kubernetes.io/zone:eu-1a   those that the configuration lists
//
// Without an API server there are no labels and no IP address.
package k8spsat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/kube"
)

// Name is the attestor's name, on the wire and in configuration, and the type
// of its selectors.
const Name = "k8s_psat"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Bearer,
	Needed:   "a token of the agent's pod: root on the node, or to create pods or tokens of its service account",
	Selectors: []attestors.Form{
		{Value: "cluster:NAME", Meaning: "the cluster, as it is configured"},
		{Value: "agent_ns:NAMESPACE", Meaning: "the namespace of the agent's pod"},
		{Value: "agent_sa:NAME", Meaning: "its service account"},
		{Value: "agent_pod_name:NAME", Meaning: "the name of the pod"},
		{Value: "agent_pod_uid:UID", Meaning: "the UID of the pod"},
		{Value: "agent_node_name:NAME", Meaning: "the name of the node"},
		{Value: "agent_node_uid:UID", Meaning: "the UID of the node"},
		{Value: "agent_node_ip:IP", Meaning: "the address of the node"},
		{Value: "agent_node_label:KEY:VALUE", Meaning: "labels of the node that are configured"},
		{Value: "agent_pod_label:KEY:VALUE", Meaning: "labels of the pod that are configured"},
	},
	Page: "docs/attestors/k8s_psat.md",
}

const (
	defaultTokenPath = "/var/run/secrets/tokens/hallmark"
	defaultAudience  = "hallmark-server"

	maxPayload = 64 << 10 // bytes, as every attestation's
	maxCluster = 100      // bytes of a cluster's name
)

// payload is what a node sends.
type payload struct {
	Cluster string `json:"cluster"`
	Token   string `json:"token"`
}

func parsePayload(data []byte) (*payload, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("k8s_psat payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, errors.New("malformed k8s_psat payload: it is not a JSON object with cluster and token")
	}
	switch {
	case p.Cluster == "":
		return nil, errors.New("k8s_psat payload names no cluster")
	case p.Token == "":
		return nil, errors.New("k8s_psat payload holds no token")
	}
	return &p, nil
}

// checkCluster checks a cluster's name, which becomes a part of SPIFFE IDs.
func checkCluster(name string) error {
	if name == "" {
		return errors.New("a cluster has no name; give it the one that agents call it by")
	}
	if len(name) > maxCluster || spiffeid.ValidatePathSegment(name) != nil {
		return fmt.Errorf("cluster is called %q; at most %d letters, digits, '-', '_' and '.' are allowed", name, maxCluster)
	}
	return nil
}

// AgentConfig is the configuration of the half on the node.
type AgentConfig struct {
	// Cluster is what the server's configuration calls the node's cluster.
	// Required.
	Cluster string `yaml:"cluster" env:"expand"`
	// TokenPath is the file of the pod's projected service account token, whose
	// audience is the server's. Read for each attempt. Default
	// /var/run/secrets/tokens/hallmark.
	TokenPath string `yaml:"token_path" env:"expand"`
}

// Agent is the half on the node.
type Agent struct{ config AgentConfig }

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It fails if the configuration makes no sense;
// it reads no file.
func NewAgent(c AgentConfig) (*Agent, error) {
	if err := checkCluster(c.Cluster); err != nil {
		return nil, err
	}
	if c.TokenPath == "" {
		c.TokenPath = defaultTokenPath
	}
	if !filepath.IsAbs(c.TokenPath) {
		return nil, fmt.Errorf("token_path is %q; give an absolute path, such as %s", c.TokenPath, defaultTokenPath)
	}
	return &Agent{config: c}, nil
}

// Proof returns the token as the file has it now.
func (a *Agent) Proof(context.Context) ([]byte, error) {
	token, err := kube.ReadToken(a.config.TokenPath)
	if err != nil {
		return nil, fmt.Errorf("%w; mount a projected service account token there, with the server's audience", err)
	}
	return json.Marshal(payload{Cluster: a.config.Cluster, Token: token})
}

// Respond fails: there is no challenge.
func (a *Agent) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("server sent a challenge; k8s_psat has none")
}
