// Package httpchallenge attests a node by its name in the DNS: it answers a
// request over HTTP to that name, with what the server has just told it.
//
// [NewAgent] makes the half on the node, [New] the half on the server. They speak
// what SPIRE's attestor of that name speaks, so that either half works with
// SPIRE's other one:
//
//	node    {"hostname": "p1.example.org", "agentname": "default", "port": 80}
//	server  {"nonce"}
//	node    anything but nothing
//	server  GET http://p1.example.org:80/.well-known/spiffe/nodeattestor/http_challenge/default/challenge
//	node    the nonce
//
// A node's SPIFFE ID ends in http_challenge/NAME. There is one selector,
// http_challenge:hostname:NAME.
//
// It proves that somebody answers at an address that the name has, for a moment:
// whoever may listen at the port there, or turns the name or its traffic to
// another place, can be the node. So it admits once: a name that has an agent is
// refused until that one is evicted.
//
// The server makes a request where a node tells it to. It does so for names that
// its configuration allows alone, at addresses that this allows, at once and
// without following where it is sent on, and tells the node nothing of the answer.
package httpchallenge

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
const Name = "http_challenge"

// Profile says what it is worth.
var Profile = attestors.Profile{
	Name:      Name,
	Strength:  attestors.Network,
	Needed:    "to listen at the node's port before its agent does, or to turn its name or its traffic elsewhere",
	Selectors: []attestors.Form{{Value: "hostname:NAME", Meaning: "its name in the DNS"}},
	Page:      "docs/attestors/http_challenge.md",
}

const (
	maxPayload   = 4 << 10 // bytes of what a node begins with
	maxChallenge = 4 << 10 // bytes
	maxHost      = 253     // bytes of a name; RFC 1035 §2.3.4
	rootPorts    = 1024    // below it only root, or who was given that right, may listen
	maxPort      = 65535
	defaultAgent = "default"
)

// payload is what a node begins with.
type payload struct {
	HostName  string `json:"hostname"`
	AgentName string `json:"agentname"`
	Port      int    `json:"port"`
}

// challenge is what the server answers.
type challenge struct {
	Nonce string `json:"nonce"`
}

var (
	// hostForm is a name in one form, of several that the DNS takes for the same:
	// in lower case, without a dot at its end. One whose last part is a number would
	// be an address.
	hostForm  = regexp.MustCompile(`^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)
	agentForm = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9-]{0,31}$`)
	nonceForm = regexp.MustCompile(`^[A-Za-z0-9_=-]{16,64}$`)
)

// checkHost finds out whether a text is a host's name that can be attested.
func checkHost(name string) error {
	switch {
	case len(name) > maxHost || !hostForm.MatchString(name):
		return fmt.Errorf("hostname is %q; it is a name in the DNS, in lower case and without a dot at its end, not an address", attestors.Clip(name))
	case name == "localhost" || strings.HasSuffix(name, ".localhost"):
		return fmt.Errorf("hostname is %q, which every host has", name)
	}
	return nil
}

func checkAgent(name string) error {
	if !agentForm.MatchString(name) {
		return fmt.Errorf("agentname is %q; it is at most 32 letters, digits and -, the first a letter", attestors.Clip(name))
	}
	return nil
}

func parsePayload(data []byte) (*payload, error) {
	if len(data) > maxPayload {
		return nil, fmt.Errorf("http_challenge payload is %d bytes long; the most is %d", len(data), maxPayload)
	}
	p := &payload{}
	if err := json.Unmarshal(data, p); err != nil {
		return nil, errors.New("http_challenge payload is not JSON with hostname, agentname and port")
	}
	if err := checkHost(p.HostName); err != nil {
		return nil, err
	}
	if err := checkAgent(p.AgentName); err != nil {
		return nil, err
	}
	if p.Port < 1 || p.Port > maxPort {
		return nil, fmt.Errorf("port is %d; it is between 1 and %d", p.Port, maxPort)
	}
	return p, nil
}

func path(agentName string) string {
	return "/.well-known/spiffe/nodeattestor/http_challenge/" + agentName + "/challenge"
}
