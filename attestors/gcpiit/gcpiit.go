// Package gcpiit attests a node by the identity token that Google signs for its
// Compute Engine instance.
//
// [NewAgent] makes the half on the node, which asks the instance's metadata server;
// [New] the half on the server, which verifies Google's signature by its published
// keys. They speak what SPIRE's attestor of that name speaks: the payload is the
// token, a JWT with the claim google.compute_engine (format=full).
//
// A node's SPIFFE ID ends in gcp_iit/PROJECT/INSTANCE; a template can name it
// otherwise. The selectors, of type "gcp_iit", are SPIRE's: project-id, zone,
// instance-name and sa from the token; tag, label and metadata from the Compute
// Engine API, if it is asked.
//
// The token is a bearer's: it holds nothing that the server chose but the audience,
// lasts an hour, and every process on the instance can have one. So it admits once:
// an instance that has an agent is refused until that one is evicted.
package gcpiit

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type of
// its selectors.
const Name = "gcp_iit"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Bearer,
	Needed:   "the instance's token, before its agent shows one: any process on the instance can have it",
	Selectors: []attestors.Form{
		{Value: "project-id:ID", Meaning: "the project"},
		{Value: "zone:NAME", Meaning: "the zone"},
		{Value: "instance-name:NAME", Meaning: "the instance"},
		{Value: "sa:EMAIL", Meaning: "the service account that the token is of"},
		{Value: "tag:TAG", Meaning: "its network tags, with use_instance_metadata"},
		{Value: "label:KEY:VALUE", Meaning: "its labels that are configured, with use_instance_metadata"},
		{Value: "metadata:KEY:VALUE", Meaning: "its metadata that are configured, with use_instance_metadata"},
	},
	Page: "docs/attestors/gcp_iit.md",
}

// DefaultAudience is what tokens are for; SPIRE's agents have no other.
const DefaultAudience = "spire-gcp-node-attestor"

const maxToken = 16 << 10 // bytes; Google's have 1 to 2 KiB

// instance is what of a token's claims says which instance it is of.
type instance struct {
	ProjectID     string      `json:"project_id"`
	ProjectNumber json.Number `json:"project_number"`
	Zone          string      `json:"zone"`
	ID            string      `json:"instance_id"`
	Name          string      `json:"instance_name"`
	Created       json.Number `json:"instance_creation_timestamp"` // Unix time

	email string // of its service account
}

var (
	projectForm = regexp.MustCompile(`^([a-z0-9.-]{1,255}:)?[a-z][a-z0-9-]{4,61}[a-z0-9]$`)
	zoneForm    = regexp.MustCompile(`^[a-z][a-z0-9-]{1,62}$`)
	nameForm    = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)
	idForm      = regexp.MustCompile(`^[0-9]{1,20}$`)
)

// parseInstance reads the claims of a token that was verified.
func parseInstance(claims map[string]any) (*instance, error) {
	google, _ := claims["google"].(map[string]any)
	engine, ok := google["compute_engine"].(map[string]any)
	if !ok {
		return nil, errors.New("token is of no Compute Engine instance, or does not say of which: it must be asked for with format=full")
	}
	data, err := json.Marshal(engine)
	if err != nil {
		return nil, err
	}
	var i instance
	if err := json.Unmarshal(data, &i); err != nil {
		return nil, errors.New("token has a malformed claim google.compute_engine")
	}
	switch {
	case !projectForm.MatchString(i.ProjectID):
		return nil, fmt.Errorf("token is of the project %q, which is no project's ID", attestors.Clip(i.ProjectID))
	case !idForm.MatchString(i.ID):
		return nil, fmt.Errorf("token is of the instance %q, which is no instance's ID", attestors.Clip(i.ID))
	case !zoneForm.MatchString(i.Zone):
		return nil, fmt.Errorf("token is of the zone %q, which is none", attestors.Clip(i.Zone))
	case !nameForm.MatchString(i.Name):
		return nil, fmt.Errorf("token is of the instance %q, which is no instance's name", attestors.Clip(i.Name))
	}
	i.email, _ = claims["email"].(string)
	return &i, nil
}
