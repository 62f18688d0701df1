package api

import (
	"context"
	"encoding/hex"
	"strings"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

// authorityService is SPIRE's LocalAuthority API over this server's
// authorities. Old ones of other servers can be tainted and revoked here too.
//
// A caller that names an authority which is not in the state for what it asks
// gets FailedPrecondition, as the contract says; SPIRE's server answers
// InvalidArgument to some of these.
type authorityService struct {
	localauthorityv1.UnsafeLocalAuthorityServer // every call is here: one that is missing does not compile
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

// TaintX509Authority marks an old X.509 authority: agents replace what it signed.
func (s *authorityService) TaintX509Authority(ctx context.Context, req *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	tainted, err := s.authorities.Taint(ctx, registry.X509, req.AuthorityId)
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: stateToWire(tainted)}, status(err)
}

// RevokeX509Authority takes a tainted X.509 authority out of the bundle.
func (s *authorityService) RevokeX509Authority(ctx context.Context, req *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	revoked, err := s.authorities.Revoke(ctx, registry.X509, req.AuthorityId)
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: stateToWire(revoked)}, status(err)
}

// TaintX509UpstreamAuthority marks a root of the authority above this server's:
// agents replace what leads to it.
func (s *authorityService) TaintX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	if err := s.authorities.TaintUpstream(ctx, req.SubjectKeyId); err != nil {
		return nil, status(err)
	}
	return &localauthorityv1.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: strings.ToLower(req.SubjectKeyId)}, nil
}

// RevokeX509UpstreamAuthority takes a tainted root of the authority above this
// server's out of the bundle.
func (s *authorityService) RevokeX509UpstreamAuthority(ctx context.Context, req *localauthorityv1.RevokeX509UpstreamAuthorityRequest) (*localauthorityv1.RevokeX509UpstreamAuthorityResponse, error) {
	if err := s.authorities.RevokeUpstream(ctx, req.SubjectKeyId); err != nil {
		return nil, status(err)
	}
	return &localauthorityv1.RevokeX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: strings.ToLower(req.SubjectKeyId)}, nil
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

// TaintJWTAuthority marks an old JWT authority: agents replace what it signed.
func (s *authorityService) TaintJWTAuthority(ctx context.Context, req *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	tainted, err := s.authorities.Taint(ctx, s.jwtKind(req.AuthorityId), req.AuthorityId)
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: stateToWire(tainted)}, status(err)
}

// RevokeJWTAuthority takes a tainted JWT authority out of the bundle.
func (s *authorityService) RevokeJWTAuthority(ctx context.Context, req *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	revoked, err := s.authorities.Revoke(ctx, s.jwtKind(req.AuthorityId), req.AuthorityId)
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: stateToWire(revoked)}, status(err)
}

// GetWITAuthorityState returns this server's WIT authorities.
func (s *authorityService) GetWITAuthorityState(context.Context, *localauthorityv1.GetWITAuthorityStateRequest) (*localauthorityv1.GetWITAuthorityStateResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	active, prepared, old, err := s.states(registry.WIT)
	return &localauthorityv1.GetWITAuthorityStateResponse{Active: active, Prepared: prepared, Old: old}, err
}

// PrepareWITAuthority makes the next WIT authority and publishes it.
func (s *authorityService) PrepareWITAuthority(ctx context.Context, _ *localauthorityv1.PrepareWITAuthorityRequest) (*localauthorityv1.PrepareWITAuthorityResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	prepared, err := s.authorities.Prepare(ctx, registry.WIT)
	return &localauthorityv1.PrepareWITAuthorityResponse{PreparedAuthority: stateToWire(prepared)}, status(err)
}

// ActivateWITAuthority makes the prepared WIT authority sign.
func (s *authorityService) ActivateWITAuthority(ctx context.Context, req *localauthorityv1.ActivateWITAuthorityRequest) (*localauthorityv1.ActivateWITAuthorityResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	active, err := s.authorities.Activate(ctx, registry.WIT, req.AuthorityId)
	return &localauthorityv1.ActivateWITAuthorityResponse{ActivatedAuthority: stateToWire(active)}, status(err)
}

// TaintWITAuthority marks an old WIT authority: agents replace what it signed.
func (s *authorityService) TaintWITAuthority(ctx context.Context, req *localauthorityv1.TaintWITAuthorityRequest) (*localauthorityv1.TaintWITAuthorityResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	tainted, err := s.authorities.Taint(ctx, registry.WIT, req.AuthorityId)
	return &localauthorityv1.TaintWITAuthorityResponse{TaintedAuthority: stateToWire(tainted)}, status(err)
}

// RevokeWITAuthority takes a tainted WIT authority out of the bundle.
func (s *authorityService) RevokeWITAuthority(ctx context.Context, req *localauthorityv1.RevokeWITAuthorityRequest) (*localauthorityv1.RevokeWITAuthorityResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	revoked, err := s.authorities.Revoke(ctx, registry.WIT, req.AuthorityId)
	return &localauthorityv1.RevokeWITAuthorityResponse{RevokedAuthority: stateToWire(revoked)}, status(err)
}

// jwtKind returns the kind of a JWT authority. To the contract both kinds are one.
func (s *authorityService) jwtKind(id string) registry.AuthorityKind {
	for _, a := range s.registry.View().Authorities() {
		if a.Kind == registry.JWTRS256 && a.ID == id {
			return registry.JWTRS256
		}
	}
	return registry.JWT
}

// states returns the active, the prepared and the newest old authority.
func (s *authorityService) states(kind registry.AuthorityKind) (active, prepared, old *authorityState, err error) {
	a, p, o := s.authorities.State(kind)
	if a == nil {
		return nil, nil, nil, callErrorf(codes.Unavailable, "no %s authority is active yet; try again", kind)
	}
	active, prepared = s.withRoot(a), s.withRoot(p)
	if len(o) > 0 {
		old = s.withRoot(o[0])
	}
	return active, prepared, old, nil
}

// withRoot is an authority with the subject key ID of the upstream's root that
// it leads to, if it is not its own root.
func (s *authorityService) withRoot(a *registry.Authority) *authorityState {
	state := stateToWire(a)
	own := s.registry.View().Bundle(s.td)
	if state == nil || a.Kind != registry.X509 || own == nil {
		return state
	}
	if root := authority.RootOf(a, own); root != nil && !root.Equal(a.Chain[0]) {
		state.UpstreamAuthoritySubjectKeyId = hex.EncodeToString(root.SubjectKeyId)
	}
	return state
}

func stateToWire(a *registry.Authority) *authorityState {
	if a == nil {
		return nil
	}
	return &authorityState{AuthorityId: a.ID, ExpiresAt: a.ExpiresAt.Unix()}
}
