// Package oidc attests by the token of an outside issuer that is trusted: an ID
// token of OpenID Connect, or any signed JSON Web Token whose issuer publishes
// its keys.
//
// [NewAgent] makes the half on a node, [New] the half on the server; there is no
// challenge. The payload is JSON:
//
//	{"token": "eyJ…"}
//
// An [Issuer] is the part that needs no node: a token to selectors. What the
// claims are worth is the issuer's word: a token is as good as the care with
// which the issuer hands it out. Each is taken once.
//
// A node's SPIFFE ID ends in oidc/NAME-OF-THE-ISSUER/… and what a template makes
// of the claims that the configuration calls fixed. The selectors, all of type
// "oidc":
//
//	issuer:plant                       as the configuration calls it
//	iss:https://issuer.example
//	sub:line-7
//	claim:region:eu                    claims that the configuration lists
package oidc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/issuer"
)

// Name is the attestor's name, on the wire and in configuration, and the type
// of its selectors.
const Name = "oidc"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Bearer,
	Needed:   "a token that was not shown yet: wherever the issuer hands one out, or it lies",
	Selectors: []attestors.Form{
		{Value: "issuer:NAME", Meaning: "the issuer, as it is configured"},
		{Value: "iss:URL", Meaning: "the issuer, as the token names it"},
		{Value: "sub:SUBJECT", Meaning: "the subject"},
		{Value: "claim:NAME:VALUE", Meaning: "claims that are configured"},
	},
	Page: "docs/attestors/oidc.md",
}

const maxPayload = 64 << 10 // bytes, as every attestation's

// payload is what a node sends.
type payload struct {
	Token string `json:"token"`
}

func parsePayload(data []byte) (*payload, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("oidc payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil || p.Token == "" {
		return nil, errors.New("malformed oidc payload: it is not a JSON object with a token")
	}
	return &p, nil
}

// AgentConfig is the configuration of the half on the node: one of its fields is
// set.
type AgentConfig struct {
	// TokenPath is a file of the token, read for each attempt. Default: none.
	TokenPath string `yaml:"token_path" env:"expand"`
	// TokenEnv is the name of the environment variable that has the token. Default:
	// none.
	TokenEnv string `yaml:"token_env"`
}

// Agent is the half on the node.
type Agent struct{ config AgentConfig }

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It fails if the configuration makes no sense;
// it reads no token.
func NewAgent(c AgentConfig) (*Agent, error) {
	switch {
	case (c.TokenPath == "") == (c.TokenEnv == ""):
		return nil, errors.New("set either token_path or token_env")
	case c.TokenPath != "" && !filepath.IsAbs(c.TokenPath):
		return nil, fmt.Errorf("token_path is %q; give an absolute path", c.TokenPath)
	}
	return &Agent{c}, nil
}

// Proof returns the token as it is now.
func (a *Agent) Proof(context.Context) ([]byte, error) {
	where, text := "environment variable "+a.config.TokenEnv, os.Getenv(a.config.TokenEnv)
	if a.config.TokenPath != "" {
		data, err := pemfile.Read(a.config.TokenPath, issuer.MaxToken+2) // a line break may follow
		if err != nil {
			return nil, fmt.Errorf("%w; have the issuer's token written there, for the server's audience", err)
		}
		where, text = a.config.TokenPath, string(bytes.TrimSpace(data))
	}
	if _, err := issuer.Of(text); err != nil {
		return nil, fmt.Errorf("%s has no token: %w", where, err)
	}
	return json.Marshal(payload{Token: text})
}

// Respond fails: there is no challenge.
func (a *Agent) Respond(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("server sent a challenge; oidc has none")
}
