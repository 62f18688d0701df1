package api

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	reflectionv1alpha "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/registry"
)

// CallerKind says as what a caller was let in.
type CallerKind uint8

// The kinds of caller. They are bits, so that a method can name several.
const (
	local      CallerKind = 1 << iota // on the admin socket
	admin                             // X509-SVID of an admin entry, or a configured admin ID
	agent                             // active X509-SVID of an attested node
	downstream                        // X509-SVID of a downstream entry
	anyone                            // everyone, also without an X509-SVID
)

func (k CallerKind) String() string {
	switch k {
	case local:
		return "local"
	case admin:
		return "admin"
	case agent:
		return "agent"
	case downstream:
		return "downstream"
	case anyone:
		return "anyone"
	}
	return fmt.Sprintf("CallerKind(%d)", uint8(k))
}

// method is what is to be known of a method before it is called.
type method struct {
	callers CallerKind // who may call it
	audit   bool       // it changes or issues something: each call is recorded
	watches bool       // a stream that ends by itself when its context does
}

const operator = local | admin

// methods is who may call what. A method that is not here is denied to
// everyone.
var methods = map[string]method{
	svidv1.SVID_MintX509SVID_FullMethodName:        {callers: operator, audit: true},
	svidv1.SVID_MintJWTSVID_FullMethodName:         {callers: operator, audit: true},
	svidv1.SVID_MintWITSVID_FullMethodName:         {callers: operator, audit: true},
	svidv1.SVID_BatchNewX509SVID_FullMethodName:    {callers: agent, audit: true},
	svidv1.SVID_NewJWTSVID_FullMethodName:          {callers: agent, audit: true},
	svidv1.SVID_BatchNewWITSVID_FullMethodName:     {callers: agent, audit: true},
	svidv1.SVID_NewDownstreamX509CA_FullMethodName: {callers: downstream, audit: true},

	bundlev1.Bundle_GetBundle_FullMethodName:                  {callers: anyone},
	bundlev1.Bundle_GetFederatedBundle_FullMethodName:         {callers: operator | agent},
	bundlev1.Bundle_CountBundles_FullMethodName:               {callers: operator},
	bundlev1.Bundle_ListFederatedBundles_FullMethodName:       {callers: operator},
	bundlev1.Bundle_AppendBundle_FullMethodName:               {callers: operator, audit: true},
	bundlev1.Bundle_BatchCreateFederatedBundle_FullMethodName: {callers: operator, audit: true},
	bundlev1.Bundle_BatchUpdateFederatedBundle_FullMethodName: {callers: operator, audit: true},
	bundlev1.Bundle_BatchSetFederatedBundle_FullMethodName:    {callers: operator, audit: true},
	bundlev1.Bundle_BatchDeleteFederatedBundle_FullMethodName: {callers: operator, audit: true},
	bundlev1.Bundle_PublishJWTAuthority_FullMethodName:        {callers: downstream, audit: true},
	bundlev1.Bundle_PublishWITAuthority_FullMethodName:        {callers: downstream, audit: true},

	entryv1.Entry_CountEntries_FullMethodName:          {callers: operator},
	entryv1.Entry_ListEntries_FullMethodName:           {callers: operator},
	entryv1.Entry_GetEntry_FullMethodName:              {callers: operator},
	entryv1.Entry_BatchCreateEntry_FullMethodName:      {callers: operator, audit: true},
	entryv1.Entry_BatchUpdateEntry_FullMethodName:      {callers: operator, audit: true},
	entryv1.Entry_BatchDeleteEntry_FullMethodName:      {callers: operator, audit: true},
	entryv1.Entry_GetAuthorizedEntries_FullMethodName:  {callers: agent},
	entryv1.Entry_SyncAuthorizedEntries_FullMethodName: {callers: agent},

	agentv1.Agent_CountAgents_FullMethodName:     {callers: operator},
	agentv1.Agent_ListAgents_FullMethodName:      {callers: operator},
	agentv1.Agent_GetAgent_FullMethodName:        {callers: operator},
	agentv1.Agent_DeleteAgent_FullMethodName:     {callers: operator, audit: true},
	agentv1.Agent_BanAgent_FullMethodName:        {callers: operator, audit: true},
	agentv1.Agent_CreateJoinToken_FullMethodName: {callers: operator, audit: true},
	agentv1.Agent_RenewAgent_FullMethodName:      {callers: agent, audit: true},
	agentv1.Agent_PostStatus_FullMethodName:      {callers: agent},
	agentv1.Agent_AttestAgent_FullMethodName:     {callers: anyone, audit: true, watches: true},

	localauthorityv1.LocalAuthority_GetX509AuthorityState_FullMethodName:       {callers: operator},
	localauthorityv1.LocalAuthority_PrepareX509Authority_FullMethodName:        {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_ActivateX509Authority_FullMethodName:       {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_TaintX509Authority_FullMethodName:          {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_RevokeX509Authority_FullMethodName:         {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_TaintX509UpstreamAuthority_FullMethodName:  {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_RevokeX509UpstreamAuthority_FullMethodName: {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_GetJWTAuthorityState_FullMethodName:        {callers: operator},
	localauthorityv1.LocalAuthority_PrepareJWTAuthority_FullMethodName:         {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_ActivateJWTAuthority_FullMethodName:        {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_TaintJWTAuthority_FullMethodName:           {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_RevokeJWTAuthority_FullMethodName:          {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_GetWITAuthorityState_FullMethodName:        {callers: operator},
	localauthorityv1.LocalAuthority_PrepareWITAuthority_FullMethodName:         {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_ActivateWITAuthority_FullMethodName:        {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_TaintWITAuthority_FullMethodName:           {callers: operator, audit: true},
	localauthorityv1.LocalAuthority_RevokeWITAuthority_FullMethodName:          {callers: operator, audit: true},

	trustdomainv1.TrustDomain_ListFederationRelationships_FullMethodName:       {callers: operator},
	trustdomainv1.TrustDomain_GetFederationRelationship_FullMethodName:         {callers: operator},
	trustdomainv1.TrustDomain_BatchCreateFederationRelationship_FullMethodName: {callers: operator, audit: true},
	trustdomainv1.TrustDomain_BatchUpdateFederationRelationship_FullMethodName: {callers: operator, audit: true},
	trustdomainv1.TrustDomain_BatchDeleteFederationRelationship_FullMethodName: {callers: operator, audit: true},
	trustdomainv1.TrustDomain_RefreshBundle_FullMethodName:                     {callers: operator, audit: true},

	// Not served yet: whom they are for learns that, others nothing.
	debugv1.Debug_GetInfo_FullMethodName:         {callers: local},
	loggerv1.Logger_GetLogger_FullMethodName:     {callers: local},
	loggerv1.Logger_SetLogLevel_FullMethodName:   {callers: local, audit: true},
	loggerv1.Logger_ResetLogLevel_FullMethodName: {callers: local, audit: true},

	hallmarkv1.FeedService_Follow_FullMethodName: {callers: agent, watches: true},

	hallmarkv1.AdminService_GetServer_FullMethodName:          {callers: local},
	hallmarkv1.AdminService_Backup_FullMethodName:             {callers: local, audit: true},
	hallmarkv1.AdminService_ListAuthorities_FullMethodName:    {callers: local},
	hallmarkv1.AdminService_RotateAuthority_FullMethodName:    {callers: local, audit: true},
	hallmarkv1.AdminService_ListConnections_FullMethodName:    {callers: local},
	hallmarkv1.AdminService_ListNodeAttestors_FullMethodName:  {callers: local},
	hallmarkv1.AdminService_GetJoinInfo_FullMethodName:        {callers: local},
	hallmarkv1.AdminService_AwaitAgents_FullMethodName:        {callers: local},
	hallmarkv1.AdminService_ExplainToken_FullMethodName:       {callers: local},
	hallmarkv1.AdminService_LintIssuers_FullMethodName:        {callers: local},
	hallmarkv1.AdminService_RevokeSVIDs_FullMethodName:        {callers: local, audit: true},
	hallmarkv1.AdminService_ListSVIDs_FullMethodName:          {callers: local},
	hallmarkv1.AdminService_ListRevocations_FullMethodName:    {callers: local},
	hallmarkv1.AdminService_ListBundleFetches_FullMethodName:  {callers: local},
	hallmarkv1.AdminService_ListPublishTargets_FullMethodName: {callers: local},

	hallmarkv1.ClusterService_ListServers_FullMethodName:  {callers: local},
	hallmarkv1.ClusterService_Invite_FullMethodName:       {callers: local, audit: true},
	hallmarkv1.ClusterService_Join_FullMethodName:         {callers: anyone, audit: true},
	hallmarkv1.ClusterService_RemoveServer_FullMethodName: {callers: local, audit: true},

	grpc_health_v1.Health_Check_FullMethodName:                             {callers: local},
	grpc_health_v1.Health_List_FullMethodName:                              {callers: local},
	grpc_health_v1.Health_Watch_FullMethodName:                             {callers: local, watches: true},
	reflectionv1.ServerReflection_ServerReflectionInfo_FullMethodName:      {callers: local},
	reflectionv1alpha.ServerReflection_ServerReflectionInfo_FullMethodName: {callers: local},
}

// Caller is who makes a call, found once for each call before its service is
// reached. Do not change it.
type Caller struct {
	Kind  CallerKind
	ID    spiffeid.ID    // zero for local and anyone
	Node  *registry.Node // of an agent, as of the start of the call
	Entry *entry.Entry   // of an admin or downstream caller; nil for a configured admin ID

	expires time.Time // when what it was let in with ends; zero: never
	limited string    // who it is to the limits: an ID or an address
}

type callerKey struct{}

// callerFrom returns who makes the call of a service's method.
func callerFrom(ctx context.Context) *Caller {
	c, _ := ctx.Value(callerKey{}).(*Caller)
	if c == nil {
		return &Caller{Kind: anyone}
	}
	return c
}

var localCaller = &Caller{Kind: local}

func denied(name string) error {
	return callErrorf(codes.PermissionDenied, "authorization denied for method %s", name)
}

// authorize finds out who makes a call and whether that may be. It is done for
// every call, as an agent may be banned and an entry deleted at any time.
//
// Nothing is said of what exists to one who has not proven to be concerned.
func (a *API) authorize(ctx context.Context, name string, m method) (*Caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, denied(name)
	}
	switch info := p.AuthInfo.(type) {
	case *peercred.Peer:
		if m.callers&(local|anyone) != 0 {
			return localCaller, nil
		}
	case *tlsPeer:
		if m.callers&anyone != 0 {
			// With whatever certificate: without one it may be called too, and an
			// agent whose SVID is bad must be able to help itself.
			return &Caller{Kind: anyone, limited: info.address}, nil
		}
		return a.authorizeSVID(ctx, info, name, m)
	}
	return nil, denied(name)
}

const agentPath = "/spire/agent/"

func isAgent(id spiffeid.ID) bool { return strings.HasPrefix(id.Path(), agentPath) }

// authorizeSVID lets in whoever has presented an X509-SVID.
func (a *API) authorizeSVID(ctx context.Context, p *tlsPeer, name string, m method) (*Caller, error) {
	now := a.now()
	switch {
	case p.leaf == nil:
		return nil, denied(name)
	case p.malformed != nil:
		return nil, callErrorf(codes.PermissionDenied, "the client certificate is no X509-SVID: %v", p.malformed)
	case !p.id.MemberOf(a.td):
		return nil, denied(name)
	case now.After(p.leaf.NotAfter):
		ago := now.Sub(p.leaf.NotAfter).Round(time.Second)
		if !isAgent(p.id) {
			return nil, callErrorf(codes.PermissionDenied, "the X509-SVID expired %v ago", ago)
		}
		return nil, permissionDenied(types.PermissionDeniedDetails_AGENT_EXPIRED, fmt.Sprintf("agent SVID expired %v ago", ago))
	}
	view := a.registry.View()
	if err := p.verify(view, now); err != nil {
		if !isAgent(p.id) {
			return nil, callErrorf(codes.PermissionDenied, "the X509-SVID does not verify: %v", err)
		}
		return nil, unverified(err)
	}
	c := &Caller{ID: p.id, expires: p.leaf.NotAfter, limited: p.id.String()}
	if isAgent(p.id) {
		node, err := a.standing(ctx, view, p)
		if err != nil {
			return nil, err
		}
		if m.callers&agent != 0 {
			c.Kind, c.Node = agent, node
			return c, nil
		}
	}
	for e := range view.EntriesBySPIFFEID(p.id) {
		switch {
		case e.Expired(now):
		case e.Admin && m.callers&admin != 0:
			c.Kind, c.Entry = admin, e
			return c, nil
		case e.Downstream && m.callers&downstream != 0:
			c.Kind, c.Entry = downstream, e
			return c, nil
		}
	}
	if m.callers&admin != 0 && a.adminIDs[p.id] {
		c.Kind = admin
		return c, nil
	}
	return nil, denied(name)
}

// standing returns the node of an agent whose SVID has verified, if it is in
// good standing. The first call with a renewed SVID makes that the current one.
func (a *API) standing(ctx context.Context, view *registry.View, p *tlsPeer) (*registry.Node, error) {
	if err := admitted(view, p.id); err != nil {
		return nil, err
	}
	n := view.Node(p.id)
	switch {
	case p.serial == n.SerialNumber:
		return n, nil
	case n.NewSerialNumber == "" || p.serial != n.NewSerialNumber:
		return nil, errNotActive
	}
	n, err := a.registry.UpdateNode(ctx, p.id, func(n *registry.Node) error {
		if n.SerialNumber == p.serial {
			return errActivated
		}
		if n.NewSerialNumber != p.serial {
			return errNotActive
		}
		n.SerialNumber, n.ExpiresAt, n.AuthorityID = n.NewSerialNumber, n.NewExpiresAt, n.NewAuthorityID
		n.NewSerialNumber, n.NewExpiresAt, n.NewAuthorityID = "", time.Time{}, ""
		return nil
	})
	switch {
	case err == errActivated: // by another call at the same time
		return a.standing(ctx, a.registry.View(), p)
	case err != nil:
		return nil, status(err)
	}
	return n, admitted(a.registry.View(), p.id)
}

var (
	errActivated   = errors.New("the SVID is active already")
	errNotAttested = permissionDenied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, "agent is not attested")
	errAgentBanned = permissionDenied(types.PermissionDeniedDetails_AGENT_BANNED, "agent is banned")
	errNotActive   = permissionDenied(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, "agent SVID is not active")
)

// unverified is the error of an agent whose SVID does not verify: it may have
// been signed by an authority that was revoked, and has to attest again.
func unverified(cause error) error {
	return permissionDenied(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED, fmt.Sprintf("agent SVID does not verify: %v", cause))
}

// stillAdmitted is asked while an agent's stream goes on: it fails once the
// agent is not known, or banned, or the authority of its SVID was revoked.
func (a *API) stillAdmitted(ctx context.Context, v *registry.View, id spiffeid.ID) error {
	if err := admitted(v, id); err != nil {
		return err
	}
	if p, ok := peer.FromContext(ctx); ok {
		if client, ok := p.AuthInfo.(*tlsPeer); ok {
			if err := client.verify(v, a.now()); err != nil {
				return unverified(err)
			}
		}
	}
	return nil
}

// admitted fails if an agent is not known, or banned.
func admitted(v *registry.View, id spiffeid.ID) error {
	switch n := v.Node(id); {
	case n == nil:
		return errNotAttested
	case n.Banned:
		return errAgentBanned
	}
	return nil
}
