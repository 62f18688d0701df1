// Package azuremsi attests a node by a token of the managed identity that Azure
// gave its virtual machine.
//
// [NewAgent] makes the half on the node, which asks the machine's metadata service
// (IMDS); [New] the half on the server, which verifies Microsoft Entra's signature
// by the published keys. They speak what SPIRE's attestor of that name speaks: the
// payload is {"token": "…"}.
//
// A node's SPIFFE ID ends in azure_msi/TENANT/PRINCIPAL, the identity's object ID;
// a template can name it otherwise. The selectors, of type "azure_msi", are those of
// SPIRE that are in the token: subscription-id and vm-name.
//
// Only an identity that is the machine's own (system-assigned) makes a node: one
// that several machines have says nothing of which it is. The token is a bearer's:
// it holds nothing that the server chose but the audience, lasts a day, and every
// process on the machine can have one. So it admits once: a machine that has an
// agent is refused until that one is evicted.
package azuremsi

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type of
// its selectors.
const Name = "azure_msi"

// DefaultResource is what tokens are for; SPIRE's agents ask for it by default.
const DefaultResource = "https://management.azure.com/"

// Bounds of what one side takes from the other.
const (
	maxPayload = 16 << 10 // bytes; Entra's tokens have 1 to 2 KiB
	maxAnswer  = 32 << 10 // bytes of IMDS's answer
)

// payload is what a node shows.
type payload struct {
	Token string `json:"token"`
}

func parsePayload(data []byte) (*payload, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("azure_msi payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil || p.Token == "" {
		return nil, errors.New("malformed azure_msi payload: it holds no token")
	}
	return &p, nil
}

// machine is what of a token's claims says which machine it is of.
type machine struct {
	Tenant, Principal           string
	Subscription, Group, VMName string
}

var (
	guidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	// resourceForm is the claim xms_mirid of a machine's own identity. Azure writes
	// its words in this case or that.
	resourceForm = regexp.MustCompile(`(?i)^/subscriptions/([0-9a-f-]{36})/resourcegroups/([-\w._()]{1,90})/providers/Microsoft\.Compute/virtualMachines/([-\w._]{1,80})$`)
)

// parseMachine reads the claims of a token that was verified.
func parseMachine(claims map[string]any) (*machine, error) {
	text := func(name string) string {
		value, _ := claims[name].(string)
		return value
	}
	resource := text("xms_mirid")
	part := resourceForm.FindStringSubmatch(resource)
	if part == nil {
		return nil, fmt.Errorf("token is of the identity %q, not of a virtual machine's own; give the machine a system-assigned identity, or attest it by azure_imds",
			attestors.Clip(resource))
	}
	m := &machine{
		Tenant: strings.ToLower(text("tid")), Principal: strings.ToLower(text("oid")),
		Subscription: strings.ToLower(part[1]), Group: part[2], VMName: part[3],
	}
	switch {
	case !guidForm.MatchString(m.Tenant):
		return nil, fmt.Errorf("token is of the tenant %q, which is no tenant's ID", attestors.Clip(m.Tenant))
	case !guidForm.MatchString(m.Principal):
		return nil, fmt.Errorf("token is of the principal %q, which is no object's ID", attestors.Clip(m.Principal))
	case !guidForm.MatchString(m.Subscription):
		return nil, fmt.Errorf("token is of the subscription %q, which is no subscription's ID", attestors.Clip(m.Subscription))
	}
	return m, nil
}
