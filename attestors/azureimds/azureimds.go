// Package azureimds attests a node by the document that Azure signs for its
// virtual machine, over a nonce of the server.
//
// [NewAgent] makes the half on the node, which asks the machine's metadata service
// (IMDS); [New] the half on the server, which verifies Azure's signature by the
// public authorities that Azure uses. They speak what SPIRE's attestor of that name
// speaks, so that either half works with SPIRE's other one:
//
//	node    anything, to begin
//	server  a nonce of 32 letters and digits
//	node    {"document": {"encoding": "pkcs7", "signature"}, "metadata": {"agentDomain", "vmssName"}}
//
// Nothing in metadata is signed. It is for SPIRE's servers, and not looked at here:
// the subscription, which is signed, says of which tenant a machine is, as the
// server's configuration has it.
//
// A node's SPIFFE ID ends in azure_imds/TENANT/SUBSCRIPTION/VM; a template can name
// it otherwise. The selectors, of type "azure_imds", are SPIRE's: subscription-id
// from the document; vm-name, vmss-name, resource-group, vm-location, vm-tag,
// network-security-group, virtual-network and virtual-network-subnet from the
// Azure Resource Graph, if it is asked.
//
// The nonce makes the document fresh: a copy of one is worth nothing. But every
// process on the machine can have one made, and pass it on. So it admits once: a
// machine that has an agent is refused until that one is evicted.
package azureimds

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type of
// its selectors.
const Name = "azure_imds"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Bearer,
	Needed:   "a document over the server's nonce, before the agent has one: any process on the machine can have it made",
	Selectors: []attestors.Form{
		{Value: "subscription-id:ID", Meaning: "the subscription"},
		{Value: "vm-name:NAME", Meaning: "the machine, with describe"},
		{Value: "vm-location:REGION", Meaning: "its region, with describe"},
		{Value: "resource-group:GROUP", Meaning: "its resource group, with describe"},
		{Value: "vmss-name:NAME", Meaning: "its scale set, with describe"},
		{Value: "vm-tag:KEY:VALUE", Meaning: "its tags that are configured, with describe"},
		{Value: "network-security-group:GROUP:NAME", Meaning: "security groups of its interfaces, with describe"},
		{Value: "virtual-network:NET", Meaning: "its networks, with describe"},
		{Value: "virtual-network-subnet:NET:SUBNET", Meaning: "their subnets, with describe"},
	},
	Page: "docs/attestors/azure_imds.md",
}

// Bounds of what one side takes from the other.
const (
	maxResponse  = 64 << 10 // bytes, as every attestation's
	maxSignature = 32 << 10 // bytes in base64; Azure's have 3 KiB
	maxMetadata  = 64 << 10 // bytes of what IMDS says of the machine
	nonceSize    = 32       // letters and digits, exactly
)

// encoding is how IMDS says that the signature is.
const encoding = "pkcs7"

// response is what a node answers the nonce with.
type response struct {
	Document signedDocument `json:"document"`
	Metadata metadata       `json:"metadata"`
}

type signedDocument struct {
	Encoding  string `json:"encoding"`
	Signature string `json:"signature"`
}

type metadata struct {
	AgentDomain string  `json:"agentDomain"`
	VMSSName    *string `json:"vmssName"`
}

// document is what of an attested document matters here.
type document struct {
	SubscriptionID string `json:"subscriptionId"`
	VMID           string `json:"vmId"`
	Nonce          string `json:"nonce"`
	TimeStamp      struct {
		CreatedOn stamp `json:"createdOn"`
		ExpiresOn stamp `json:"expiresOn"`
	} `json:"timeStamp"`
}

// stamp is a time as IMDS writes it.
type stamp struct{ time.Time }

func (s *stamp) UnmarshalJSON(data []byte) error {
	var text string
	if err := json.Unmarshal(data, &text); err != nil {
		return err
	}
	const form = "01/02/06 15:04:05 -0700"
	var err error
	s.Time, err = time.Parse(form, text)
	return err
}

var (
	guidForm  = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	nonceForm = regexp.MustCompile(`^[A-Za-z0-9]{1,64}$`)
)

func parseResponse(data []byte) (*response, error) {
	if len(data) > maxResponse {
		return nil, fmt.Errorf("azure_imds response is %d bytes long; the most is %d", len(data), maxResponse)
	}
	var r response
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("malformed azure_imds response: %w", err)
	}
	switch {
	case r.Document.Signature == "":
		return nil, errors.New("azure_imds response holds no document")
	case r.Document.Encoding != encoding:
		return nil, fmt.Errorf("document is encoded as %q, not as %s", attestors.Clip(r.Document.Encoding), encoding)
	}
	return &r, nil
}

func parseDocument(data []byte) (*document, error) {
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, errors.New("malformed attested document")
	}
	d.SubscriptionID, d.VMID = strings.ToLower(d.SubscriptionID), strings.ToLower(d.VMID)
	switch {
	case !guidForm.MatchString(d.SubscriptionID):
		return nil, fmt.Errorf("document is of the subscription %q, which is no subscription ID", attestors.Clip(d.SubscriptionID))
	case !guidForm.MatchString(d.VMID):
		return nil, fmt.Errorf("document is of the machine %q, which is no machine's ID", attestors.Clip(d.VMID))
	case d.TimeStamp.CreatedOn.IsZero() || d.TimeStamp.ExpiresOn.IsZero():
		return nil, errors.New("document does not say from when to when it is good")
	}
	return &d, nil
}
