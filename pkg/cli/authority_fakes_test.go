package cli_test

import (
	"context"
	"slices"
	"time"

	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// fakeKey is an authority of the fake server and who depends on it.
type fakeKey struct {
	record *hallmarkv1.Authority
	use    *hallmarkv1.AuthorityUse
}

const (
	fakeX509 = hallmarkv1.Authority_KIND_X509
	fakeJWT  = hallmarkv1.Authority_KIND_JWT
	fakeWIT  = hallmarkv1.Authority_KIND_WIT
)

func newFakeKeys() []fakeKey {
	end := time.Now().Add(24*time.Hour + 10*time.Second).Unix()
	key := func(id string, kind hallmarkv1.Authority_Kind, state hallmarkv1.Authority_State, use *hallmarkv1.AuthorityUse) fakeKey {
		return fakeKey{&hallmarkv1.Authority{Id: id, Kind: kind, State: state, Server: "server-1", CreatedAt: time.Now().Unix(), ExpiresAt: end}, use}
	}
	soon := time.Now().Add(time.Hour + 10*time.Second).Unix()
	return []fakeKey{
		key("aa11", fakeX509, hallmarkv1.Authority_STATE_ACTIVE, &hallmarkv1.AuthorityUse{Agents: 40, ConnectedAgents: 39, LostAgents: 4, Signed: 900, LastExpiresAt: soon}),
		key("bb22", fakeX509, hallmarkv1.Authority_STATE_PREPARED, &hallmarkv1.AuthorityUse{}),
		key("cc33", fakeX509, hallmarkv1.Authority_STATE_OLD, &hallmarkv1.AuthorityUse{Agents: 1203, ConnectedAgents: 1200, LostAgents: 2, Signed: 45210, LastExpiresAt: soon}),
		key("dd44", fakeX509, hallmarkv1.Authority_STATE_OLD, &hallmarkv1.AuthorityUse{Signed: 7, LastExpiresAt: time.Now().Add(-time.Minute).Unix()}),
		key(kid, fakeJWT, hallmarkv1.Authority_STATE_ACTIVE, &hallmarkv1.AuthorityUse{Signed: 3, LastExpiresAt: soon}),
		key("jwt-key-0", fakeJWT, hallmarkv1.Authority_STATE_OLD, &hallmarkv1.AuthorityUse{Signed: 1, LastExpiresAt: soon}),
		key("wit-key-0", fakeWIT, hallmarkv1.Authority_STATE_OLD, &hallmarkv1.AuthorityUse{Signed: 2, LastExpiresAt: soon}),
		key("wit-key-2", fakeWIT, hallmarkv1.Authority_STATE_PREPARED, &hallmarkv1.AuthorityUse{}),
	}
}

func (s *fakeServer) ListAuthorities(context.Context, *hallmarkv1.ListAuthoritiesRequest) (*hallmarkv1.ListAuthoritiesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	resp := &hallmarkv1.ListAuthoritiesResponse{Upstream: &hallmarkv1.Upstream{Kind: "vault", Address: "https://vault.example", Requests: []*hallmarkv1.UpstreamRequest{
		{What: "sign", Failure: "it answered 503", FailingSince: time.Now().Add(-time.Minute).Unix(), NextTry: time.Now().Add(30 * time.Second).Unix()},
		{What: "bundle", SucceededAt: time.Now().Unix()},
	}}}
	for _, k := range s.keys {
		resp.Authorities = append(resp.Authorities, k.record)
		resp.Uses = append(resp.Uses, k.use)
	}
	return resp, nil
}

func (s *fakeServer) RotateAuthority(_ context.Context, r *hallmarkv1.RotateAuthorityRequest) (*hallmarkv1.RotateAuthorityResponse, error) {
	if r.Kind == fakeJWT {
		return nil, status.Error(codes.DeadlineExceeded, "1 of 2 agents did not acknowledge")
	}
	return &hallmarkv1.RotateAuthorityResponse{Activated: newFakeKeys()[1].record, Agents: 1}, nil
}

// fakeAuthorities answers SPIRE's calls about the fake server's authorities.
type fakeAuthorities struct {
	localauthorityv1.UnimplementedLocalAuthorityServer
	*fakeServer
}

// TaintX509UpstreamAuthority knows the root beef.
func (s fakeAuthorities) TaintX509UpstreamAuthority(_ context.Context, r *localauthorityv1.TaintX509UpstreamAuthorityRequest) (*localauthorityv1.TaintX509UpstreamAuthorityResponse, error) {
	if r.SubjectKeyId != "beef" {
		return nil, status.Error(codes.InvalidArgument, "unexpected authority ID")
	}
	return &localauthorityv1.TaintX509UpstreamAuthorityResponse{UpstreamAuthoritySubjectKeyId: r.SubjectKeyId}, nil
}

// change does something to an authority, if there is one.
func (s fakeAuthorities) change(kind hallmarkv1.Authority_Kind, id string, do func(*hallmarkv1.Authority)) (*localauthorityv1.AuthorityState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.keys, func(k fakeKey) bool { return k.record.Kind == kind && k.record.Id == id })
	if i < 0 {
		return nil, status.Error(codes.InvalidArgument, "unexpected authority ID")
	}
	do(s.keys[i].record)
	return &localauthorityv1.AuthorityState{AuthorityId: id, ExpiresAt: s.keys[i].record.ExpiresAt}, nil
}

func taint(a *hallmarkv1.Authority) { a.Tainted = true }

func (s fakeAuthorities) GetX509AuthorityState(context.Context, *localauthorityv1.GetX509AuthorityStateRequest) (*localauthorityv1.GetX509AuthorityStateResponse, error) {
	return &localauthorityv1.GetX509AuthorityStateResponse{Prepared: &localauthorityv1.AuthorityState{AuthorityId: "bb22"}}, nil
}

func (s fakeAuthorities) GetJWTAuthorityState(context.Context, *localauthorityv1.GetJWTAuthorityStateRequest) (*localauthorityv1.GetJWTAuthorityStateResponse, error) {
	return &localauthorityv1.GetJWTAuthorityStateResponse{}, nil
}

func (s fakeAuthorities) PrepareX509Authority(context.Context, *localauthorityv1.PrepareX509AuthorityRequest) (*localauthorityv1.PrepareX509AuthorityResponse, error) {
	return &localauthorityv1.PrepareX509AuthorityResponse{PreparedAuthority: &localauthorityv1.AuthorityState{AuthorityId: "ee55", ExpiresAt: 4e9}}, nil
}

func (s fakeAuthorities) PrepareJWTAuthority(context.Context, *localauthorityv1.PrepareJWTAuthorityRequest) (*localauthorityv1.PrepareJWTAuthorityResponse, error) {
	return nil, status.Error(codes.FailedPrecondition, "50 old jwt authorities are still in the bundle")
}

func (s fakeAuthorities) ActivateX509Authority(_ context.Context, r *localauthorityv1.ActivateX509AuthorityRequest) (*localauthorityv1.ActivateX509AuthorityResponse, error) {
	a, err := s.change(fakeX509, r.AuthorityId, func(a *hallmarkv1.Authority) { a.State = hallmarkv1.Authority_STATE_ACTIVE })
	return &localauthorityv1.ActivateX509AuthorityResponse{ActivatedAuthority: a}, err
}

func (s fakeAuthorities) ActivateJWTAuthority(_ context.Context, r *localauthorityv1.ActivateJWTAuthorityRequest) (*localauthorityv1.ActivateJWTAuthorityResponse, error) {
	a, err := s.change(fakeJWT, r.AuthorityId, func(a *hallmarkv1.Authority) { a.State = hallmarkv1.Authority_STATE_ACTIVE })
	return &localauthorityv1.ActivateJWTAuthorityResponse{ActivatedAuthority: a}, err
}

func (s fakeAuthorities) TaintX509Authority(_ context.Context, r *localauthorityv1.TaintX509AuthorityRequest) (*localauthorityv1.TaintX509AuthorityResponse, error) {
	a, err := s.change(fakeX509, r.AuthorityId, taint)
	return &localauthorityv1.TaintX509AuthorityResponse{TaintedAuthority: a}, err
}

func (s fakeAuthorities) TaintJWTAuthority(_ context.Context, r *localauthorityv1.TaintJWTAuthorityRequest) (*localauthorityv1.TaintJWTAuthorityResponse, error) {
	a, err := s.change(fakeJWT, r.AuthorityId, taint)
	return &localauthorityv1.TaintJWTAuthorityResponse{TaintedAuthority: a}, err
}

func (s fakeAuthorities) RevokeX509Authority(_ context.Context, r *localauthorityv1.RevokeX509AuthorityRequest) (*localauthorityv1.RevokeX509AuthorityResponse, error) {
	a, err := s.change(fakeX509, r.AuthorityId, func(a *hallmarkv1.Authority) { a.Id = "gone" })
	return &localauthorityv1.RevokeX509AuthorityResponse{RevokedAuthority: a}, err
}

func (s fakeAuthorities) RevokeJWTAuthority(_ context.Context, r *localauthorityv1.RevokeJWTAuthorityRequest) (*localauthorityv1.RevokeJWTAuthorityResponse, error) {
	a, err := s.change(fakeJWT, r.AuthorityId, func(a *hallmarkv1.Authority) { a.Id = "gone" })
	return &localauthorityv1.RevokeJWTAuthorityResponse{RevokedAuthority: a}, err
}

func (s fakeAuthorities) GetWITAuthorityState(context.Context, *localauthorityv1.GetWITAuthorityStateRequest) (*localauthorityv1.GetWITAuthorityStateResponse, error) {
	return &localauthorityv1.GetWITAuthorityStateResponse{Prepared: &localauthorityv1.AuthorityState{AuthorityId: "wit-key-2"}}, nil
}

func (s fakeAuthorities) PrepareWITAuthority(context.Context, *localauthorityv1.PrepareWITAuthorityRequest) (*localauthorityv1.PrepareWITAuthorityResponse, error) {
	return &localauthorityv1.PrepareWITAuthorityResponse{PreparedAuthority: &localauthorityv1.AuthorityState{AuthorityId: "wit-key-3", ExpiresAt: 4e9}}, nil
}

func (s fakeAuthorities) ActivateWITAuthority(_ context.Context, r *localauthorityv1.ActivateWITAuthorityRequest) (*localauthorityv1.ActivateWITAuthorityResponse, error) {
	a, err := s.change(fakeWIT, r.AuthorityId, func(a *hallmarkv1.Authority) { a.State = hallmarkv1.Authority_STATE_ACTIVE })
	return &localauthorityv1.ActivateWITAuthorityResponse{ActivatedAuthority: a}, err
}

func (s fakeAuthorities) TaintWITAuthority(_ context.Context, r *localauthorityv1.TaintWITAuthorityRequest) (*localauthorityv1.TaintWITAuthorityResponse, error) {
	a, err := s.change(fakeWIT, r.AuthorityId, taint)
	return &localauthorityv1.TaintWITAuthorityResponse{TaintedAuthority: a}, err
}

func (s fakeAuthorities) RevokeWITAuthority(_ context.Context, r *localauthorityv1.RevokeWITAuthorityRequest) (*localauthorityv1.RevokeWITAuthorityResponse, error) {
	a, err := s.change(fakeWIT, r.AuthorityId, func(a *hallmarkv1.Authority) { a.Id = "gone" })
	return &localauthorityv1.RevokeWITAuthorityResponse{RevokedAuthority: a}, err
}

func (s *fakeServer) ListPublishTargets(context.Context, *hallmarkv1.ListPublishTargetsRequest) (*hallmarkv1.ListPublishTargetsResponse, error) {
	now := time.Now()
	return &hallmarkv1.ListPublishTargetsResponse{Targets: []*hallmarkv1.PublishTarget{
		{
			Name: "web", Place: "/srv/www/id", Documents: []string{"keys", ".well-known/openid-configuration", "bundle.json"}, State: "current",
			SequenceNumber: 9, NewestSequenceNumber: 9, PublishedAt: now.Add(-3 * time.Minute).Unix(), TriedAt: now.Add(-3 * time.Minute).Unix(), NextTry: now.Add(2 * time.Minute).Unix(),
		},
		{
			Name: "cloud", Place: "s3://ids/id", Documents: []string{"bundle.json"}, State: "failing", SequenceNumber: 8, NewestSequenceNumber: 9,
			PublishedAt: now.Add(-2 * time.Hour).Unix(), TriedAt: now.Unix(), NextTry: now.Unix(), Failures: 3, Error: "bundle.json: access denied\x1b[2J",
		},
		{Name: "new", Place: "gs://ids", Documents: []string{"bundle.json"}, State: "pending"},
	}}, nil
}
