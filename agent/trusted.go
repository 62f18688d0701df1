package agent

import (
	"strconv"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/broker"
	"github.com/hallmark-id/hallmark/pkg/peercred"
)

const defaultBrokerSocket = "/run/hallmark/broker.sock"

// BrokerConfig is about the SPIFFE Broker API: brokers, which are workloads of
// this node, fetch the SVIDs of others by their PIDs.
type BrokerConfig struct {
	// Socket is the path of the Unix socket, which the agent's user and the
	// socket's group can reach (mode 0660): to let brokers in that are not root,
	// put it into a directory of their group with the setgid bit. Default
	// /run/hallmark/broker.sock.
	Socket string `yaml:"socket" env:"expand"`

	// Brokers may use it: nobody else.
	Brokers []BrokerPolicyConfig `yaml:"brokers"`
}

// BrokerPolicyConfig says what one broker may ask for.
type BrokerPolicyConfig struct {
	// ID is the broker's SPIFFE ID, of this trust domain. It proves it by its
	// X509-SVID, and an entry of this node must give it to the broker's process.
	ID string `yaml:"id"`
	// SPIFFEIDs are those of the workloads that it may fetch SVIDs for; /* at the
	// end is for all below a path. Default: all workloads of the node.
	SPIFFEIDs []string `yaml:"spiffe_ids"`
	// Audiences are those that it may fetch JWT-SVIDs for. Default: any.
	Audiences []string `yaml:"audiences"`
}

// checkTrusted finds out who may fetch identities on behalf of others.
func (s *settings) checkTrusted(wrong wrongFunc) {
	seen := make(map[spiffeid.ID]bool)
	for i, text := range s.AuthorizedDelegates {
		path := "authorized_delegates." + strconv.Itoa(i)
		if id, ok := s.workloadID(path, text, seen, wrong); ok {
			s.delegates = append(s.delegates, id)
		}
	}
	b := s.Broker
	switch {
	case b == nil && s.Experimental.Broker:
		wrong("experimental.broker", "experimental.broker is true, but broker names no brokers; list them, or remove it")
	case b == nil:
	case !s.Experimental.Broker:
		wrong("broker", "broker is about an API whose standard may still change; set experimental.broker to true, or remove broker")
	default:
		s.checkBroker(b, wrong)
	}
}

func (s *settings) checkBroker(b *BrokerConfig, wrong wrongFunc) {
	if b.Socket == "" {
		b.Socket = defaultBrokerSocket
	}
	switch {
	case len(b.Socket) > peercred.MaxPath:
		wrong("broker.socket", "broker.socket is %d bytes long and the kernel takes %d for a socket; choose a shorter path", len(b.Socket), peercred.MaxPath)
	case b.Socket == s.Socket || b.Socket == s.AdminSocket:
		wrong("broker.socket", "broker.socket is that of another API; brokers need one of their own")
	}
	if len(b.Brokers) == 0 {
		wrong("broker.brokers", "broker.brokers is empty, so nobody could use the Broker API; list a broker, or remove broker")
	}
	seen := make(map[spiffeid.ID]bool)
	for i, c := range b.Brokers {
		path := "broker.brokers." + strconv.Itoa(i)
		id, ok := s.workloadID(path+".id", c.ID, seen, wrong)
		if !ok {
			continue
		}
		policy := broker.Policy{Broker: id, Audiences: c.Audiences}
		for j, text := range c.SPIFFEIDs {
			path := path + ".spiffe_ids." + strconv.Itoa(j)
			switch p, err := broker.ParsePattern(text); {
			case err != nil:
				wrong(path, "SPIFFE ID %q: %v", text, err)
			case !s.td.IsZero() && p.TrustDomain() != s.td:
				wrong(path, "SPIFFE ID %q is not of trust domain %s", text, s.td.Name())
			default:
				policy.SPIFFEIDs = append(policy.SPIFFEIDs, p)
			}
		}
		s.brokers = append(s.brokers, policy)
	}
}

// workloadID reads the SPIFFE ID of somebody who is trusted, once.
func (s *settings) workloadID(path, text string, seen map[spiffeid.ID]bool, wrong wrongFunc) (spiffeid.ID, bool) {
	id, err := spiffeid.FromString(text)
	switch {
	case err != nil:
		wrong(path, "SPIFFE ID %q: %v", text, err)
	case !s.td.IsZero() && !id.MemberOf(s.td), id.Path() == "":
		wrong(path, "SPIFFE ID %q is not that of a workload in trust domain %s", text, s.td.Name())
	case seen[id]:
		wrong(path, "SPIFFE ID %q is there twice", text)
	default:
		seen[id] = true
		return id, true
	}
	return spiffeid.ID{}, false
}
