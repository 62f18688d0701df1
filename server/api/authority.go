package api

import (
	"context"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/server/registry"
)

// authorityService is SPIRE's LocalAuthority API over this server's
// authorities. Tainting and revoking are not served yet.
type authorityService struct {
	localauthorityv1.UnimplementedLocalAuthorityServer
	*API
}

// authorityState is an authority as the API has it.
type authorityState = localauthorityv1.AuthorityState

// GetX509AuthorityState returns this server's X.509 authorities.
func (s *authorityService) GetX509AuthorityState(context.Context, *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	active, prepared, old, err := s.states(registry.X509)
	return &localauthorityv1.GetX509AuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, err
}

// PrepareX509Authority makes the next X.509 authority and publishes it.
func (s *authorityService) PrepareX509Authority(ctx context.Context, _ *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	prepared, err := s.authorities.Prepare(ctx, registry.X509)
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: stateToWire(prepared)}, status(err)
}

// ActivateX509Authority makes the prepared X.509 authority sign.
func (s *authorityService) ActivateX509Authority(ctx context.Context, req *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	active, err := s.authorities.Activate(ctx, registry.X509, req.AuthorityId)
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: stateToWire(active)}, status(err)
}

// GetJWTAuthorityState returns this server's JWT authorities.
func (s *authorityService) GetJWTAuthorityState(context.Context, *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	active, prepared, old, err := s.states(registry.JWT)
	return &localauthorityv1.GetJWTAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, err
}

// PrepareJWTAuthority makes the next JWT authority and publishes it.
func (s *authorityService) PrepareJWTAuthority(ctx context.Context, _ *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	prepared, err := s.authorities.Prepare(ctx, registry.JWT)
	return &localauthorityv1.PrepareJWTAuthorityResponse{PreparedAuthority: stateToWire(prepared)}, status(err)
}

// ActivateJWTAuthority makes the prepared JWT authority sign.
func (s *authorityService) ActivateJWTAuthority(ctx context.Context, req *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	active, err := s.authorities.Activate(ctx, registry.JWT, req.AuthorityId)
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: stateToWire(active)}, status(err)
}

// states returns the active, the prepared and the newest old authority.
func (s *authorityService) states(kind registry.AuthorityKind) (active, prepared, old *authorityState, err error) {
	a, p, o := s.authorities.State(kind)
	if a == nil {
		return nil, nil, nil, callErrorf(codes.Unavailable, "no %s authority is active yet; try again", kind)
	}
	active, prepared = stateToWire(a), stateToWire(p)
	if len(o) > 0 {
		old = stateToWire(o[0])
	}
	return active, prepared, old, nil
}

func stateToWire(a *registry.Authority) *authorityState {
	if a == nil {
		return nil
	}
	return &authorityState{AuthorityId: a.ID, ExpiresAt: a.ExpiresAt.Unix()}
}
