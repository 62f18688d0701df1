package node

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/join"
)

// Bounds of the own trust domain's bundle. What GetBundle answers comes from a
// server that may not be authenticated yet.
const (
	maxBundle      = 1 << 20 // bytes
	maxAuthorities = 100     // of each kind
	callTimeout    = 30 * time.Second
)

// ParseTrustBundle reads the bundle of a trust domain from a file's content:
// PEM certificates, or a bundle in SPIFFE's JSON format. At most 1 MiB.
func ParseTrustBundle(td spiffeid.TrustDomain, data []byte) (*bundle.Bundle, error) {
	if len(data) > maxBundle {
		return nil, fmt.Errorf("trust bundle is larger than %d bytes", maxBundle)
	}
	var b *bundle.Bundle
	var err error
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		b, err = parseBundleJSON(td, data)
	} else {
		b, err = parseBundlePEM(td, data)
	}
	if err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	if err := checkBundle(b); err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	return b, nil
}

func parseBundlePEM(td spiffeid.TrustDomain, data []byte) (*bundle.Bundle, error) {
	b := &bundle.Bundle{TrustDomain: td}
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("contains a PEM block of type %q; only CERTIFICATE is allowed", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(b.X509Authorities)+1, err)
		}
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: cert})
	}
	if len(bytes.TrimSpace(data)) != 0 {
		return nil, errors.New("neither PEM certificates nor a SPIFFE bundle in JSON")
	}
	return b, nil
}

func parseBundleJSON(td spiffeid.TrustDomain, data []byte) (*bundle.Bundle, error) {
	s, err := spiffebundle.Parse(td, bundle.Usable(data))
	if err != nil {
		return nil, err
	}
	b := &bundle.Bundle{TrustDomain: td}
	for _, cert := range s.X509Authorities() {
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: cert})
	}
	for id, key := range s.JWTAuthorities() {
		b.JWTAuthorities = append(b.JWTAuthorities, bundle.JWTAuthority{KeyID: id, PublicKey: key})
	}
	b.SequenceNumber, _ = s.SequenceNumber()
	b.RefreshHint, _ = s.RefreshHint()
	return b, nil
}

func marshalBundle(b *bundle.Bundle) ([]byte, error) {
	s := spiffebundle.New(b.TrustDomain)
	for _, a := range b.X509Authorities {
		s.AddX509Authority(a.Certificate)
	}
	for _, a := range b.JWTAuthorities {
		if err := s.AddJWTAuthority(a.KeyID, a.PublicKey); err != nil {
			return nil, err
		}
	}
	s.SetSequenceNumber(b.SequenceNumber)
	s.SetRefreshHint(b.RefreshHint)
	return s.Marshal()
}

// bundleFromAPI reads a bundle as SPIRE's API carries it.
func bundleFromAPI(td spiffeid.TrustDomain, in *types.Bundle) (*bundle.Bundle, error) {
	if in.TrustDomain != td.Name() && in.TrustDomain != td.IDString() {
		return nil, fmt.Errorf("server's bundle is of trust domain %q, not %q", in.TrustDomain, td.Name())
	}
	if len(in.X509Authorities) > maxAuthorities || len(in.JwtAuthorities) > maxAuthorities {
		return nil, fmt.Errorf("server's bundle has more than %d authorities", maxAuthorities)
	}
	b := &bundle.Bundle{
		TrustDomain:    td,
		SequenceNumber: in.SequenceNumber,
		RefreshHint:    time.Duration(in.RefreshHint) * time.Second,
	}
	for i, a := range in.X509Authorities {
		cert, err := x509.ParseCertificate(a.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("server's bundle: X.509 authority %d: %w", i+1, err)
		}
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: cert, Tainted: a.Tainted})
	}
	for i, a := range in.JwtAuthorities {
		key, err := x509.ParsePKIXPublicKey(a.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("server's bundle: JWT authority %d: %w", i+1, err)
		}
		j := bundle.JWTAuthority{KeyID: a.KeyId, PublicKey: key, Tainted: a.Tainted}
		if a.ExpiresAt != 0 {
			j.ExpiresAt = time.Unix(a.ExpiresAt, 0)
		}
		b.JWTAuthorities = append(b.JWTAuthorities, j)
	}
	if err := checkBundle(b); err != nil {
		return nil, fmt.Errorf("server's bundle: %w", err)
	}
	return b, nil
}

func checkBundle(b *bundle.Bundle) error {
	if n := len(b.X509Authorities); n < 1 || n > maxAuthorities {
		return fmt.Errorf("it has %d X.509 authorities; 1 to %d are allowed", n, maxAuthorities)
	}
	for _, a := range b.X509Authorities {
		if !a.Certificate.IsCA {
			return fmt.Errorf("certificate %q is not that of an authority (no CA flag)", a.Certificate.Subject)
		}
	}
	return nil
}

// errStranger says that a server's certificate leads to no root of a bundle.
var errStranger = errors.New("server's certificate is not trusted")

// verifyServer checks that a chain is that of this trust domain's server: it
// leads to a root of t, and the leaf's SPIFFE ID is the server's.
func (n *Node) verifyServer(chain []*x509.Certificate, t *trust) error {
	return n.verifyServerAt(chain, t, n.o.Now())
}

func (n *Node) verifyServerAt(chain []*x509.Certificate, t *trust, at time.Time) error {
	id, _, err := x509svid.Verify(chain, t.x509, x509svid.WithTime(at))
	if err != nil {
		return fmt.Errorf("%w: %w", errStranger, err)
	}
	if id.TrustDomain() != n.o.TrustDomain || id.Path() != entry.ServerPath {
		return fmt.Errorf("server's certificate is that of %q, not of spiffe://%s%s", id, n.o.TrustDomain.Name(), entry.ServerPath)
	}
	return nil
}

// vouched fails if nobody in the bundle vouches any more for the server at the
// other end of a link: the authority that did so when the link was made was
// revoked, and whoever is there must prove itself anew.
func (n *Node) vouched(l *Link) error {
	return n.verifyServerAt(l.server, n.trusted(), l.began)
}

// bootstrap connects to the server without an identity, and returns once the
// server is known to be the right one: everything after may be sent on this
// link, which is one TLS connection and stays it. It also returns the server's
// bundle, which that server vouched for on this same connection.
func (n *Node) bootstrap(ctx context.Context) (*Link, *trust, error) {
	// Nothing is verified during the handshake: the roots that a join string
	// pins come with the bundle.
	l, err := n.reach(ctx, func(ctx context.Context, to target) (*Link, error) {
		return n.dial(ctx, to, n.tlsConfig(to), nil)
	})
	if err != nil {
		return nil, nil, err
	}
	t, err := n.authenticate(ctx, l, l.server)
	if err != nil {
		n.leave(l)
		l.finish(err)
		return nil, nil, err
	}
	return l, t, nil
}

// authenticate decides whether the peer of a link is the trust domain's server,
// by the first of these that there is: the bundle of an earlier connection, the
// configured bundle, the roots pinned in the join string; or not at all, if
// that was asked for and no bundle contradicts it.
func (n *Node) authenticate(ctx context.Context, l *Link, chain []*x509.Certificate) (*trust, error) {
	var doubt error
	trusted := false
	for _, t := range n.anchors() {
		if doubt = n.verifyServer(chain, t); doubt == nil {
			trusted = true
			break
		}
	}
	insecure := n.o.Insecure && n.trusted() == nil
	if !trusted && n.o.Join == nil && !insecure {
		return nil, n.distrust(l, doubt)
	}
	b, err := n.getBundle(ctx, l)
	if err != nil {
		return nil, err
	}
	switch {
	case trusted:
	case n.o.Join != nil:
		pinned, err := pinnedPart(n.trusted().withoutDisowned(b), n.o.Join)
		if err != nil {
			return nil, n.distrust(l, err)
		}
		if err := n.verifyServer(chain, newTrust(pinned)); err != nil {
			return nil, n.distrust(l, err)
		}
	default:
		n.o.Log.Warn("INSECURE: the server is not authenticated on this first contact, as insecure_bootstrap says; whoever answers at its address is trusted from now on", "server", l.to.String())
	}
	// Whoever vouched for the server, its own bundle must too: the next
	// connection is verified by that alone.
	t := newTrust(b)
	if err := n.verifyServer(chain, t); err != nil {
		return nil, n.distrust(l, fmt.Errorf("by its own bundle: %w", err))
	}
	return t, nil
}

// anchors returns the bundles that may vouch for a server, best first.
func (n *Node) anchors() []*trust {
	var out []*trust
	if t := n.trusted(); t != nil {
		out = append(out, t)
	}
	if n.o.TrustBundle != nil {
		out = append(out, newTrust(n.trusted().withoutDisowned(n.o.TrustBundle)))
	}
	return out
}

// distrust says what to do about a server that is not the expected one. On a
// node that has had no identity yet its operator must act; one that serves
// workloads waits for the right server to come back.
func (n *Node) distrust(l *Link, err error) error {
	err = fmt.Errorf("server %s is not to be trusted, nothing secret was sent to it: %w", l.to, err)
	if n.lastID().IsZero() {
		return &fatalError{err}
	}
	return err
}

func (n *Node) getBundle(ctx context.Context, l *Link) (*bundle.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	in, err := bundlev1.NewBundleClient(l.conn).GetBundle(ctx, &bundlev1.GetBundleRequest{}, grpc.MaxCallRecvMsgSize(maxBundle))
	if err != nil {
		return nil, fmt.Errorf("get the server's bundle: %w", err)
	}
	return bundleFromAPI(n.o.TrustDomain, in)
}

// pinnedPart returns the authorities of a bundle that a join string pins.
func pinnedPart(b *bundle.Bundle, j *join.String) (*bundle.Bundle, error) {
	out := &bundle.Bundle{TrustDomain: b.TrustDomain}
	for _, a := range b.X509Authorities {
		if j.Pins(a.Certificate) {
			out.X509Authorities = append(out.X509Authorities, a)
		}
	}
	if len(out.X509Authorities) == 0 {
		return nil, errors.New(`none of its roots is pinned in the join string; either another server answers at this address, or its authorities were replaced since: make a new join string with "hallmark token generate"`)
	}
	return out, nil
}
