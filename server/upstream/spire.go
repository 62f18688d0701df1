package upstream

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffegrpc/grpccredentials"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/registry"
)

// SPIREConfig is a server above this one in the same trust domain, Hallmark's or
// SPIRE's. This server is a workload there, whose entry has downstream set: it
// gets its X509-SVID from an agent of that server on this machine.
type SPIREConfig struct {
	// Server is the host:port of the server above. It is required.
	Server string `yaml:"server" env:"expand"`
	// WorkloadSocket is the path of the Workload API of that server's agent on
	// this machine. It is required.
	WorkloadSocket string `yaml:"workload_socket" env:"expand"`
	// SPIFFEID is the one that this server has there, if the agent gives it
	// several. Default: the first that the agent gives.
	SPIFFEID string `yaml:"spiffe_id" env:"expand"`
}

func (c *SPIREConfig) check() error {
	if _, _, err := net.SplitHostPort(c.Server); err != nil {
		return fmt.Errorf("spire.server is %q; write the host:port of the server above", c.Server)
	}
	if !strings.HasPrefix(c.WorkloadSocket, "/") {
		return fmt.Errorf("spire.workload_socket is %q; write the path of the Workload API of that server's agent", c.WorkloadSocket)
	}
	if c.SPIFFEID != "" {
		if _, err := spiffeid.FromString(c.SPIFFEID); err != nil {
			return fmt.Errorf("spire.spiffe_id: %w", err)
		}
	}
	return nil
}

const (
	sourceTime = 10 * time.Second // for the agent's first answer
	maxMessage = 4 << 20          // bytes of one of the server's
)

// spire is a server above this one.
type spire struct {
	SPIREConfig
	td spiffeid.TrustDomain

	mu     sync.Mutex
	source *workloadapi.X509Source
	conn   *grpc.ClientConn
	as     *x509svid.SVID // that conn was made with
}

func newSPIRE(c SPIREConfig, td spiffeid.TrustDomain) *spire { return &spire{SPIREConfig: c, td: td} }

// Name implements [authority.Upstream].
func (s *spire) Name() (kind, address string) { return "spire", s.Server }

// Close implements [Upstream].
func (s *spire) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.conn != nil {
		errs = append(errs, s.conn.Close())
	}
	if s.source != nil {
		errs = append(errs, s.source.Close())
	}
	return errors.Join(errs...)
}

// pick chooses this server's SVID among those that the agent gives.
func (s *spire) pick(svids []*x509svid.SVID) *x509svid.SVID {
	for _, svid := range svids {
		if s.SPIFFEID == "" || svid.ID.String() == s.SPIFFEID {
			return svid
		}
	}
	return svids[0] // is told by connect, with its ID
}

// connect returns a connection to the server above. It is another one when this
// server's SVID is: a server looks at the one that a connection was made with.
func (s *spire) connect(ctx context.Context) (*grpc.ClientConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.source == nil {
		bounded, cancel := context.WithTimeout(ctx, sourceTime)
		defer cancel()
		source, err := workloadapi.NewX509Source(bounded,
			workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+s.WorkloadSocket)), workloadapi.WithDefaultX509SVIDPicker(s.pick))
		if err != nil {
			return nil, fmt.Errorf("get this server's SVID from the agent at %s: %w; does that run, and is there an entry with downstream for this server?", s.WorkloadSocket, err)
		}
		s.source = source
	}
	svid, err := s.source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	switch {
	case svid.ID.TrustDomain() != s.td:
		return nil, fmt.Errorf("the agent at %s gives %s, which is not of trust domain %q: the server above must have the same one", s.WorkloadSocket, svid.ID, s.td.Name())
	case s.SPIFFEID != "" && svid.ID.String() != s.SPIFFEID:
		return nil, fmt.Errorf("the agent at %s gives %s, not %s", s.WorkloadSocket, svid.ID, s.SPIFFEID)
	case s.conn != nil && s.as == svid:
		return s.conn, nil
	}
	id, err := spiffeid.FromPath(s.td, entry.ServerPath)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+s.Server,
		grpc.WithTransportCredentials(grpccredentials.MTLSClientCredentials(s.source, s.source, tlsconfig.AuthorizeID(id))),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", s.Server, err)
	}
	if s.conn != nil {
		s.conn.Close() // what still runs on it is tried again
	}
	s.conn, s.as = conn, svid
	return conn, nil
}

// refused says what to do about a refusal.
func (s *spire) refused(what string, err error) error {
	if err == nil {
		return nil
	}
	if status.Code(err) == codes.PermissionDenied {
		id := ""
		s.mu.Lock()
		if s.as != nil {
			id = s.as.ID.String()
		}
		s.mu.Unlock()
		return fmt.Errorf("%s at %s: %s; the entry of %s there needs downstream", what, s.Server, status.Convert(err).Message(), id)
	}
	return fmt.Errorf("%s at %s: %s", what, s.Server, status.Convert(err).Message())
}

// Sign implements [authority.Upstream].
func (s *spire) Sign(ctx context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	conn, err := s.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	resp, err := svidv1.NewSVIDClient(conn).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{
		Csr: csr.Raw, PreferredTtl: int32(min(int64(lifetime/time.Second), math.MaxInt32)),
	})
	if err != nil {
		return nil, nil, s.refused("get a CA certificate", err)
	}
	if len(resp.CaCertChain)+len(resp.X509Authorities) > maxCerts {
		return nil, nil, fmt.Errorf("it answered with more than %d certificates", maxCerts)
	}
	if chain, err = parseDER(resp.CaCertChain); err != nil {
		return nil, nil, err
	}
	roots, err = parseDER(resp.X509Authorities)
	return chain, roots, err
}

func parseDER(ders [][]byte) ([]*x509.Certificate, error) {
	certs := make([]*x509.Certificate, len(ders))
	for i, der := range ders {
		var err error
		if certs[i], err = x509.ParseCertificate(der); err != nil {
			return nil, fmt.Errorf("it answered with something else than certificates: %w", err)
		}
	}
	return certs, nil
}

// Bundle implements [authority.Follower].
func (s *spire) Bundle(ctx context.Context) (*bundle.Bundle, bool, error) {
	conn, err := s.connect(ctx)
	if err != nil {
		return nil, false, err
	}
	w, err := bundlev1.NewBundleClient(conn).GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, false, s.refused("get the bundle", err)
	}
	b, err := fromWire(w)
	if err != nil {
		return nil, false, fmt.Errorf("the bundle of %s: %w", s.Server, err)
	}
	if b.TrustDomain != s.td {
		return nil, false, fmt.Errorf("the bundle of %s is of trust domain %q", s.Server, b.TrustDomain.Name())
	}
	return b, true, nil
}

// fromWire reads a bundle as SPIRE's API has it.
func fromWire(w *types.Bundle) (*bundle.Bundle, error) {
	if n := max(len(w.X509Authorities), len(w.JwtAuthorities), len(w.WitAuthorities)); n > maxBundleKeys {
		return nil, fmt.Errorf("it has %d authorities of one kind; the most is %d", n, maxBundleKeys)
	}
	r := &hallmarkv1.Bundle{TrustDomain: w.TrustDomain}
	for _, a := range w.X509Authorities {
		r.X509Authorities = append(r.X509Authorities, &hallmarkv1.X509Authority{Asn1: a.GetAsn1(), Tainted: a.GetTainted()})
	}
	for _, k := range w.JwtAuthorities {
		r.JwtAuthorities = append(r.JwtAuthorities, &hallmarkv1.JWTAuthority{KeyId: k.GetKeyId(), PublicKey: k.GetPublicKey(), ExpiresAt: k.GetExpiresAt(), Tainted: k.GetTainted()})
	}
	for _, k := range w.WitAuthorities {
		r.WitAuthorities = append(r.WitAuthorities, &hallmarkv1.JWTAuthority{KeyId: k.GetKeyId(), PublicKey: k.GetPublicKey(), ExpiresAt: k.GetExpiresAt(), Tainted: k.GetTainted()})
	}
	return bundle.FromRecord(r)
}

// maxBundleKeys is the most authorities of a kind in a bundle; a server of
// Hallmark's has no more.
const maxBundleKeys = 1000

// Publish implements [authority.Publisher].
func (s *spire) Publish(ctx context.Context, kind registry.AuthorityKind, key bundle.JWTAuthority) error {
	conn, err := s.connect(ctx)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.PublicKey)
	if err != nil {
		return err
	}
	expires := int64(0)
	if !key.ExpiresAt.IsZero() {
		expires = key.ExpiresAt.Unix()
	}
	client := bundlev1.NewBundleClient(conn)
	if kind == registry.WIT {
		_, err = client.PublishWITAuthority(ctx, &bundlev1.PublishWITAuthorityRequest{WitAuthority: &types.WITKey{KeyId: key.KeyID, PublicKey: spki, ExpiresAt: expires}})
		return s.refused("publish a WIT authority", err)
	}
	_, err = client.PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: &types.JWTKey{KeyId: key.KeyID, PublicKey: spki, ExpiresAt: expires}})
	return s.refused("publish a JWT authority", err)
}
