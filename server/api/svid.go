package api

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
)

// svidService is SPIRE's SVID API over the issuer.
type svidService struct {
	svidv1.UnsafeSVIDServer // every call is here: one that is missing does not compile
	*API
}

// maxCSRs bounds the signatures that one call asks for. It is SPIRE's figure.
const maxCSRs = 500

var (
	errNoEntry = callErrorf(codes.NotFound, "entry not found or not authorized")
	errNoWITs  = callErrorf(codes.Unimplemented, "this server issues no WIT-SVIDs")
)

// MintX509SVID issues an X509-SVID for what an operator's CSR says.
func (s *svidService) MintX509SVID(ctx context.Context, req *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	svid, err := s.issuer.MintX509(ctx, req.Csr, time.Duration(req.Ttl)*time.Second)
	if err != nil {
		return nil, status(err)
	}
	return &svidv1.MintX509SVIDResponse{Svid: x509SVIDToWire(svid)}, nil
}

// MintJWTSVID issues a JWT-SVID with an ID that an operator names.
func (s *svidService) MintJWTSVID(ctx context.Context, req *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	id, err := idFromWire(req.Id)
	if err != nil {
		return nil, invalidArgument("invalid SPIFFE ID: %v", err)
	}
	svid, err := s.issuer.MintJWT(ctx, id, req.Audience, time.Duration(req.Ttl)*time.Second)
	if err != nil {
		return nil, status(err)
	}
	return &svidv1.MintJWTSVIDResponse{Svid: jwtSVIDToWire(svid)}, nil
}

// BatchNewX509SVID issues the X509-SVIDs of entries that the calling agent is
// authorized for, on all cores.
func (s *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	n := len(req.Params)
	switch {
	case n == 0:
		return nil, invalidArgument("missing parameters")
	case n > maxCSRs:
		return nil, invalidArgument("%d CSRs in one call; the most is %d: send several", n, maxCSRs)
	}
	if err := s.limitSigning(ctx, n); err != nil {
		return nil, err
	}
	view, now, node := s.registry.View(), s.now(), callerFrom(ctx).Node
	results := make([]*svidv1.BatchNewX509SVIDResponse_Result, n)
	sign := func(i int) {
		svid, err := s.signEntry(ctx, view, node, now, req.Params[i])
		results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: itemStatus(s.log, err), Svid: svid}
	}
	if workers := min(n, runtime.GOMAXPROCS(0)); workers == 1 {
		for i := range n {
			sign(i)
		}
	} else {
		var next atomic.Int64
		var wait sync.WaitGroup
		for range workers {
			wait.Go(func() {
				for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
					sign(i)
				}
			})
		}
		wait.Wait()
	}
	// An agent that was banned meanwhile gets none of them.
	if v := s.registry.View(); v != view {
		if err := admitted(v, node.ID); err != nil {
			return nil, err
		}
	}
	return &svidv1.BatchNewX509SVIDResponse{Results: results}, nil
}

func (s *svidService) signEntry(ctx context.Context, view *registry.View, node *registry.Node, now time.Time, p *svidv1.NewX509SVIDParams) (*types.X509SVID, error) {
	e, err := authorizedEntry(view, node, p.GetEntryId(), now)
	if err != nil {
		return nil, err
	}
	svid, err := s.issuer.WorkloadX509(ctx, e, p.Csr)
	if err != nil {
		return nil, err
	}
	return x509SVIDToWire(svid), nil
}

// authorizedEntry returns an entry that a node asks for by its ID. One that
// does not exist and one of another node are the same to it.
func authorizedEntry(view *registry.View, node *registry.Node, id string, now time.Time) (*entry.Entry, error) {
	if id == "" {
		return nil, invalidArgument("missing entry ID")
	}
	e := view.Entry(id)
	if e == nil || !view.IsAuthorized(node.ID, e, now) {
		return nil, errNoEntry
	}
	return e, nil
}

// NewJWTSVID issues a JWT-SVID of an entry that the calling agent is
// authorized for.
func (s *svidService) NewJWTSVID(ctx context.Context, req *svidv1.NewJWTSVIDRequest) (*svidv1.NewJWTSVIDResponse, error) {
	if err := s.limitSigning(ctx, 1); err != nil {
		return nil, err
	}
	e, err := authorizedEntry(s.registry.View(), callerFrom(ctx).Node, req.EntryId, s.now())
	if err != nil {
		return nil, err
	}
	svid, err := s.issuer.WorkloadJWT(ctx, e, req.Audience)
	if err != nil {
		return nil, status(err)
	}
	return &svidv1.NewJWTSVIDResponse{Svid: jwtSVIDToWire(svid)}, nil
}

// NewDownstreamX509CA issues the CA certificate of a server below this one.
func (s *svidService) NewDownstreamX509CA(ctx context.Context, req *svidv1.NewDownstreamX509CARequest) (*svidv1.NewDownstreamX509CAResponse, error) {
	if err := s.limitSigning(ctx, 1); err != nil {
		return nil, err
	}
	ca, err := s.issuer.DownstreamCA(ctx, req.Csr, time.Duration(req.PreferredTtl)*time.Second)
	if err != nil {
		return nil, status(err)
	}
	own := s.registry.View().Bundle(s.td)
	if own == nil {
		return nil, errNoBundle
	}
	resp := &svidv1.NewDownstreamX509CAResponse{CaCertChain: ca.Chain}
	for _, a := range own.X509Authorities {
		resp.X509Authorities = append(resp.X509Authorities, a.Certificate.Raw)
	}
	return resp, nil
}

// MintWITSVID is for a kind of SVID that this server does not issue.
func (s *svidService) MintWITSVID(context.Context, *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
	return nil, errNoWITs
}

// BatchNewWITSVID is for a kind of SVID that this server does not issue.
func (s *svidService) BatchNewWITSVID(context.Context, *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	return nil, errNoWITs
}

func x509SVIDToWire(svid *issue.X509SVID) *types.X509SVID {
	return &types.X509SVID{CertChain: svid.Chain, Id: idToWire(svid.ID), ExpiresAt: svid.ExpiresAt.Unix(), Hint: svid.Hint}
}

func jwtSVIDToWire(svid *issue.JWTSVID) *types.JWTSVID {
	return &types.JWTSVID{
		Token: svid.Token, Id: idToWire(svid.ID), Hint: svid.Hint,
		IssuedAt: svid.IssuedAt.Unix(), ExpiresAt: svid.ExpiresAt.Unix(),
	}
}
