package api

import (
	"context"
	"crypto/x509"
	"math"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	"google.golang.org/grpc/codes"
)

// debugService is SPIRE's Debug API.
type debugService struct {
	debugv1.UnsafeDebugServer // every call is here: one that is missing does not compile
	*API
}

// GetInfo says what the server has. The chain goes up to the authority in the
// bundle that it verifies by.
func (s *debugService) GetInfo(context.Context, *debugv1.GetInfoRequest) (*debugv1.GetInfoResponse, error) {
	view, now := s.registry.View(), s.now()
	chain, err := s.ownChain(now)
	if err != nil {
		return nil, err
	}
	info := &debugv1.GetInfoResponse{
		Uptime:       atMost32(int(now.Sub(s.started) / time.Second)),
		AgentsCount:  atMost32(view.NodeCount()),
		EntriesCount: atMost32(view.EntryCount()),
	}
	for b := range view.Bundles("") {
		if b.TrustDomain != s.td {
			info.FederatedBundlesCount++
		}
	}
	for _, c := range chain {
		cert := &debugv1.GetInfoResponse_Cert{ExpiresAt: c.NotAfter.Unix(), Subject: c.Subject.String()}
		if len(c.URIs) > 0 {
			if id, err := spiffeid.FromURI(c.URIs[0]); err == nil {
				cert.Id = idToWire(id)
			}
		}
		info.SvidChain = append(info.SvidChain, cert)
	}
	return info, nil
}

// ownChain returns the server's own X509-SVID with all that vouches for it.
func (s *debugService) ownChain(now time.Time) ([]*x509.Certificate, error) {
	own, err := s.issuer.ServerTLS()
	if err != nil {
		return nil, status(err)
	}
	var chain []*x509.Certificate
	for _, der := range own.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, status(err)
		}
		chain = append(chain, c)
	}
	b := s.registry.View().Bundle(s.td)
	if b == nil {
		return nil, status(errNoOwnBundle)
	}
	roots := x509bundle.New(s.td)
	for _, a := range b.X509Authorities {
		roots.AddX509Authority(a.Certificate)
	}
	_, verified, err := x509svid.Verify(chain, roots, x509svid.WithTime(now))
	if err != nil {
		return nil, callErrorf(codes.Internal, "the server's own X509-SVID does not verify: %v", err)
	}
	return verified[0], nil
}

func atMost32(n int) int32 { return int32(min(n, math.MaxInt32)) }
