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

// maxSignatures bounds those that one call asks for. It is SPIRE's figure.
const maxSignatures = 500

var errNoEntry = callErrorf(codes.NotFound, "entry not found or not authorized")

// errNoWIT answers every call about WIT if the configuration does not switch it
// on.
var errNoWIT = callErrorf(codes.Unimplemented, "WIT-SVIDs are not switched on at this server: set wit in experimental")

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

// MintWITSVID issues a WIT-SVID with an ID and a public key that an operator
// names.
func (s *svidService) MintWITSVID(ctx context.Context, req *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	id, err := idFromWire(req.Id)
	if err != nil {
		return nil, invalidArgument("invalid SPIFFE ID: %v", err)
	}
	svid, err := s.issuer.MintWIT(ctx, id, issue.WITKey{PKIX: req.PublicKey, Algorithm: req.SigningAlgorithm}, time.Duration(req.Ttl)*time.Second)
	if err != nil {
		return nil, status(err)
	}
	return &svidv1.MintWITSVIDResponse{Svid: witSVIDToWire(svid)}, nil
}

// BatchNewX509SVID issues the X509-SVIDs of entries that the calling agent is
// authorized for.
func (s *svidService) BatchNewX509SVID(ctx context.Context, req *svidv1.BatchNewX509SVIDRequest) (*svidv1.BatchNewX509SVIDResponse, error) {
	results := make([]*svidv1.BatchNewX509SVIDResponse_Result, len(req.Params))
	ctx = through(ctx)
	err := s.signBatch(ctx, len(results), func(i int, of authorized) {
		svid, err := s.newX509SVID(ctx, of, req.Params[i])
		results[i] = &svidv1.BatchNewX509SVIDResponse_Result{Status: itemStatus(s.log, err), Svid: svid}
	})
	if err != nil {
		return nil, err
	}
	return &svidv1.BatchNewX509SVIDResponse{Results: results}, nil
}

func (s *svidService) newX509SVID(ctx context.Context, of authorized, p *svidv1.NewX509SVIDParams) (*types.X509SVID, error) {
	e, err := of.entry(p.GetEntryId())
	if err != nil {
		return nil, err
	}
	svid, err := s.issuer.WorkloadX509(ctx, e, p.Csr)
	if err != nil {
		return nil, err
	}
	return x509SVIDToWire(svid), nil
}

// BatchNewWITSVID issues the WIT-SVIDs of entries that the calling agent is
// authorized for.
func (s *svidService) BatchNewWITSVID(ctx context.Context, req *svidv1.BatchNewWITSVIDRequest) (*svidv1.BatchNewWITSVIDResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	results := make([]*svidv1.BatchNewWITSVIDResponse_Result, len(req.Params))
	err := s.signBatch(ctx, len(results), func(i int, of authorized) {
		svid, err := s.newWITSVID(ctx, of, req.Params[i])
		results[i] = &svidv1.BatchNewWITSVIDResponse_Result{Status: itemStatus(s.log, err), Svid: svid}
	})
	if err != nil {
		return nil, err
	}
	return &svidv1.BatchNewWITSVIDResponse{Results: results}, nil
}

func (s *svidService) newWITSVID(ctx context.Context, of authorized, p *svidv1.NewWITSVIDParams) (*types.WITSVID, error) {
	e, err := of.entry(p.GetEntryId())
	if err != nil {
		return nil, err
	}
	svid, err := s.issuer.WorkloadWIT(ctx, e, issue.WITKey{PKIX: p.PublicKey, Algorithm: p.SigningAlgorithm})
	if err != nil {
		return nil, err
	}
	return witSVIDToWire(svid), nil
}

// through is the context of what is issued through the calling agent.
func through(ctx context.Context) context.Context {
	return issue.Through(ctx, callerFrom(ctx).Node.ID)
}

// signBatch calls sign for each of n signatures that the calling agent asks
// for, on all cores.
func (s *svidService) signBatch(ctx context.Context, n int, sign func(i int, of authorized)) error {
	switch {
	case n == 0:
		return invalidArgument("missing parameters")
	case n > maxSignatures:
		return invalidArgument("%d SVIDs in one call; the most is %d: send several", n, maxSignatures)
	}
	if err := s.limitSigning(ctx, n); err != nil {
		return err
	}
	of := authorized{s.registry.View(), callerFrom(ctx).Node, s.now()}
	if workers := min(n, runtime.GOMAXPROCS(0)); workers == 1 {
		for i := range n {
			sign(i, of)
		}
	} else {
		var next atomic.Int64
		var wait sync.WaitGroup
		for range workers {
			wait.Go(func() {
				for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
					sign(i, of)
				}
			})
		}
		wait.Wait()
	}
	// An agent that was banned meanwhile gets none of them, nor one whose SVID was
	// revoked: what is signed for it from here on need not be known to its CRL.
	v := s.registry.View()
	if v == of.view {
		return nil
	}
	if err := s.stillAdmitted(ctx, v, of.node.ID); err != nil {
		return err
	}
	if n := v.Node(of.node.ID); n != nil && (n.SerialNumber == "" || !n.AttestedAt.Equal(of.node.AttestedAt)) {
		return errNotActive
	}
	return nil
}

// authorized is what a node is authorized for at one moment.
type authorized struct {
	view *registry.View
	node *registry.Node
	now  time.Time
}

// entry returns an entry that the node asks for by its ID. One that does not
// exist and one of another node are the same to it.
func (of authorized) entry(id string) (*entry.Entry, error) {
	if id == "" {
		return nil, invalidArgument("missing entry ID")
	}
	e := of.view.Entry(id)
	if e == nil || !of.view.IsAuthorized(of.node.ID, e, of.now) {
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
	e, err := authorized{s.registry.View(), callerFrom(ctx).Node, s.now()}.entry(req.EntryId)
	if err != nil {
		return nil, err
	}
	svid, err := s.issuer.WorkloadJWT(through(ctx), e, req.Audience)
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

func x509SVIDToWire(svid *issue.X509SVID) *types.X509SVID {
	return &types.X509SVID{CertChain: svid.Chain, Id: idToWire(svid.ID), ExpiresAt: svid.ExpiresAt.Unix(), Hint: svid.Hint}
}

func jwtSVIDToWire(svid *issue.JWTSVID) *types.JWTSVID {
	return &types.JWTSVID{
		Token: svid.Token, Id: idToWire(svid.ID), Hint: svid.Hint,
		IssuedAt: svid.IssuedAt.Unix(), ExpiresAt: svid.ExpiresAt.Unix(),
	}
}

func witSVIDToWire(svid *issue.JWTSVID) *types.WITSVID {
	return &types.WITSVID{
		Token: svid.Token, Id: idToWire(svid.ID), Hint: svid.Hint,
		IssuedAt: svid.IssuedAt.Unix(), ExpiresAt: svid.ExpiresAt.Unix(),
	}
}
