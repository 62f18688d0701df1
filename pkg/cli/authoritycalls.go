package cli

import (
	"context"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// authorityState is an authority as the contract has it.
type authorityState = localauthorityv1.AuthorityState

// authorityCalls are the calls of SPIRE's LocalAuthority contract for one kind.
type authorityCalls struct {
	prepared                func(context.Context) (*authorityState, error) // nil: none is
	prepare                 func(context.Context) (*authorityState, error)
	activate, taint, revoke func(ctx context.Context, id string) (*authorityState, error)
}

// The contract has a method, and messages, for each kind and each thing to do.
func (c *admin) authorities(kind hallmarkv1.Authority_Kind) authorityCalls {
	s := localauthorityv1.NewLocalAuthorityClient(c)
	switch kind {
	case hallmarkv1.Authority_KIND_JWT:
		return authorityCalls{
			prepared: call(s.GetJWTAuthorityState, (*localauthorityv1.GetJWTAuthorityStateResponse).GetPrepared),
			prepare:  call(s.PrepareJWTAuthority, (*localauthorityv1.PrepareJWTAuthorityResponse).GetPreparedAuthority),
			activate: callWith(s.ActivateJWTAuthority, (*localauthorityv1.ActivateJWTAuthorityResponse).GetActivatedAuthority,
				func(id string) *localauthorityv1.ActivateJWTAuthorityRequest {
					return &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: id}
				}),
			taint: callWith(s.TaintJWTAuthority, (*localauthorityv1.TaintJWTAuthorityResponse).GetTaintedAuthority,
				func(id string) *localauthorityv1.TaintJWTAuthorityRequest {
					return &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id}
				}),
			revoke: callWith(s.RevokeJWTAuthority, (*localauthorityv1.RevokeJWTAuthorityResponse).GetRevokedAuthority,
				func(id string) *localauthorityv1.RevokeJWTAuthorityRequest {
					return &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: id}
				}),
		}
	case hallmarkv1.Authority_KIND_WIT:
		return authorityCalls{
			prepared: call(s.GetWITAuthorityState, (*localauthorityv1.GetWITAuthorityStateResponse).GetPrepared),
			prepare:  call(s.PrepareWITAuthority, (*localauthorityv1.PrepareWITAuthorityResponse).GetPreparedAuthority),
			activate: callWith(s.ActivateWITAuthority, (*localauthorityv1.ActivateWITAuthorityResponse).GetActivatedAuthority,
				func(id string) *localauthorityv1.ActivateWITAuthorityRequest {
					return &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: id}
				}),
			taint: callWith(s.TaintWITAuthority, (*localauthorityv1.TaintWITAuthorityResponse).GetTaintedAuthority,
				func(id string) *localauthorityv1.TaintWITAuthorityRequest {
					return &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: id}
				}),
			revoke: callWith(s.RevokeWITAuthority, (*localauthorityv1.RevokeWITAuthorityResponse).GetRevokedAuthority,
				func(id string) *localauthorityv1.RevokeWITAuthorityRequest {
					return &localauthorityv1.RevokeWITAuthorityRequest{AuthorityId: id}
				}),
		}
	}
	return authorityCalls{
		prepared: call(s.GetX509AuthorityState, (*localauthorityv1.GetX509AuthorityStateResponse).GetPrepared),
		prepare:  call(s.PrepareX509Authority, (*localauthorityv1.PrepareX509AuthorityResponse).GetPreparedAuthority),
		activate: callWith(s.ActivateX509Authority, (*localauthorityv1.ActivateX509AuthorityResponse).GetActivatedAuthority,
			func(id string) *localauthorityv1.ActivateX509AuthorityRequest {
				return &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id}
			}),
		taint: callWith(s.TaintX509Authority, (*localauthorityv1.TaintX509AuthorityResponse).GetTaintedAuthority,
			func(id string) *localauthorityv1.TaintX509AuthorityRequest {
				return &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id}
			}),
		revoke: callWith(s.RevokeX509Authority, (*localauthorityv1.RevokeX509AuthorityResponse).GetRevokedAuthority,
			func(id string) *localauthorityv1.RevokeX509AuthorityRequest {
				return &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id}
			}),
	}
}

// call makes of a method whose request is empty a call that returns what get
// finds in the answer.
func call[Q, R any](method func(context.Context, *Q, ...grpc.CallOption) (R, error), get func(R) *authorityState) func(context.Context) (*authorityState, error) {
	return func(ctx context.Context) (*authorityState, error) {
		resp, err := method(ctx, new(Q))
		return get(resp), err
	}
}

// callWith is call for a method whose request names an authority.
func callWith[Q, R any](method func(context.Context, Q, ...grpc.CallOption) (R, error), get func(R) *authorityState, request func(id string) Q) func(context.Context, string) (*authorityState, error) {
	return func(ctx context.Context, id string) (*authorityState, error) {
		resp, err := method(ctx, request(id))
		return get(resp), err
	}
}
