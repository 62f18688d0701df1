package node

import (
	"crypto/x509"
	"errors"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Authorities returns the X.509 authorities by which the node knows its server:
// those of the trust domain's bundle, nil before there is one.
func (n *Node) Authorities() []*x509.Certificate {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.trust == nil {
		return nil
	}
	return n.trust.x509.X509Authorities()
}

// Chain returns the node's own X509-SVID, leaf first, up to the authority in
// the bundle that it verifies by: without that one if it does not verify now,
// nil before the node is attested.
func (n *Node) Chain() []*x509.Certificate {
	n.mu.Lock()
	svid, trust := n.svid, n.trust
	n.mu.Unlock()
	if svid == nil {
		return nil
	}
	if trust != nil {
		if _, chains, err := x509svid.Verify(svid.chain, trust.x509, x509svid.WithTime(n.o.Now())); err == nil {
			return chains[0]
		}
	}
	return svid.chain
}

// GetX509SVID returns the node's own X509-SVID, for TLS with processes of the
// node. It implements [x509svid.Source].
func (n *Node) GetX509SVID() (*x509svid.SVID, error) {
	s := n.identity()
	if s == nil {
		return nil, errors.New("the node has no identity yet")
	}
	return &x509svid.SVID{ID: s.id, Certificates: s.chain, PrivateKey: s.key}, nil
}
