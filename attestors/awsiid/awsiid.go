// Package awsiid attests a node by the instance identity document that AWS signs
// for each EC2 instance.
//
// [NewAgent] makes the half on the node, which asks the instance's metadata
// service; [New] the half on the server, which verifies AWS's signature by the
// certificate that AWS publishes for the region. The payload is SPIRE's, JSON:
//
//	{"document", "signature", "rsa2048"}
//
// document is the text of the identity document, rsa2048 the PKCS #7 message of
// it by a key of 2048 bits. signature, which older servers of SPIRE want, is by a
// key of 1024 bits: it is neither sent nor believed.
//
// A node's SPIFFE ID ends in aws_iid/ACCOUNT/REGION/INSTANCE; a template can name
// it otherwise. The selectors, of type "aws_iid", are SPIRE's: account_id, region,
// az, image:id and instance:id from the document; tag, sg:id, sg:name and iamrole
// from the EC2 API, if it is asked.
//
// The document is a bearer's: it holds nothing that the server chose, does not
// end, and every process on the instance can read it. So it admits once: an
// instance that has an agent is refused until that one is evicted.
package awsiid

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
)

// Name is the attestor's name, on the wire and in configuration, and the type of
// its selectors.
const Name = "aws_iid"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:     Name,
	Strength: attestors.Bearer,
	Needed:   "the instance's document, before its agent shows it: any process on the instance can have it",
	Selectors: []attestors.Form{
		{Value: "account_id:ID", Meaning: "the account"},
		{Value: "region:NAME", Meaning: "the region"},
		{Value: "az:NAME", Meaning: "the availability zone"},
		{Value: "instance:id:ID", Meaning: "the instance"},
		{Value: "image:id:ID", Meaning: "the image that it was started from"},
		{Value: "tag:KEY:VALUE", Meaning: "its tags, with describe"},
		{Value: "sg:id:ID", Meaning: "its security groups, with describe"},
		{Value: "sg:name:NAME", Meaning: "their names, with describe"},
		{Value: "iamrole:ARN", Meaning: "its roles, with describe"},
	},
	Page: "docs/attestors/aws_iid.md",
}

// Bounds of what a node sends and its metadata service answers.
const (
	maxPayload   = 64 << 10 // bytes, as every attestation's
	maxDocument  = 16 << 10 // bytes; AWS's have half a KiB
	maxSignature = 32 << 10 // bytes in base64; AWS's have 2 KiB
)

// payload is what a node sends.
type payload struct {
	Document string `json:"document"`
	RSA2048  string `json:"rsa2048"`
}

// document is what of an instance identity document matters here.
type document struct {
	AccountID        string `json:"accountId"`
	Region           string `json:"region"`
	AvailabilityZone string `json:"availabilityZone"`
	InstanceID       string `json:"instanceId"`
	ImageID          string `json:"imageId"`
	InstanceType     string `json:"instanceType"`
	// PendingTime is when the instance was last started.
	PendingTime time.Time `json:"pendingTime"`
}

var (
	accountForm  = regexp.MustCompile(`^[0-9]{12}$`)
	regionForm   = regexp.MustCompile(`^[a-z]{2,8}(-[a-z]{2,12}){1,3}-[0-9]{1,2}$`)
	instanceForm = regexp.MustCompile(`^i-[0-9a-f]{8,32}$`)
)

func parsePayload(data []byte) (*payload, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("aws_iid payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	var p payload
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("malformed aws_iid payload: %w", err)
	}
	switch {
	case p.Document == "":
		return nil, errors.New("aws_iid payload holds no document")
	case len(p.Document) > maxDocument:
		return nil, fmt.Errorf("document is %d bytes long; the most is %d", len(p.Document), maxDocument)
	case p.RSA2048 == "":
		return nil, errors.New("aws_iid payload holds no signature by a key of 2048 bits (rsa2048)")
	}
	return &p, nil
}

func parseDocument(data []byte) (*document, error) {
	var d document
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, errors.New("malformed instance identity document")
	}
	switch {
	case !accountForm.MatchString(d.AccountID):
		return nil, fmt.Errorf("document is of the account %q, which is no account ID", attestors.Clip(d.AccountID))
	case !regionForm.MatchString(d.Region):
		return nil, fmt.Errorf("document is of the region %q, which is no region", attestors.Clip(d.Region))
	case !instanceForm.MatchString(d.InstanceID):
		return nil, fmt.Errorf("document is of the instance %q, which is no instance ID", attestors.Clip(d.InstanceID))
	case d.PendingTime.IsZero():
		return nil, errors.New("document does not say when its instance was started")
	}
	return &d, nil
}
