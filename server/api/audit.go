package api

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// maxSubjects bounds how many items of a batch a record names.
const maxSubjects = 20

// audit records a call that changes or issues something: who called what,
// about what, and what came of it. No record holds a secret.
func (a *API) audit(ctx context.Context, c *Caller, name string, err error, began time.Time, subject []slog.Attr) {
	if !a.log.Enabled(ctx, slog.LevelInfo) {
		return
	}
	attrs := make([]slog.Attr, 0, 8+len(subject))
	attrs = append(attrs, slog.String("method", strings.TrimPrefix(name, "/")), slog.String("caller", c.Kind.String()))
	if !c.ID.IsZero() {
		attrs = append(attrs, slog.String("caller_id", c.ID.String()))
	}
	for _, f := range from(ctx) {
		if f.Key != "presented" || c.ID.IsZero() { // else it is the caller's ID
			attrs = append(attrs, f)
		}
	}
	attrs = append(attrs, subject...)
	attrs = append(attrs, slog.String("outcome", grpcstatus.Code(err).String()), slog.Duration("took", time.Since(began)))
	if err != nil {
		attrs = append(attrs, slog.String("error", grpcstatus.Convert(err).Message()))
	}
	a.log.LogAttrs(ctx, slog.LevelInfo, "audit", attrs...)
}

// auditRecord is the record of a stream: its service says what the call is about,
// and may have it written before the call ends.
type auditRecord struct {
	write func(err error)
	once  sync.Once

	mu   sync.Mutex
	said []slog.Attr
}

type auditKey struct{}

// note adds to the record of a stream.
func note(ctx context.Context, attrs ...slog.Attr) {
	if r, _ := ctx.Value(auditKey{}).(*auditRecord); r != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.said = append(r.said, attrs...)
	}
}

// settle writes the record of a stream that has come to good, before what it
// issued goes out: nothing does that is not on record.
func settle(ctx context.Context) {
	if r, _ := ctx.Value(auditKey{}).(*auditRecord); r != nil {
		r.settle(nil)
	}
}

func (r *auditRecord) settle(err error) { r.once.Do(func() { r.write(err) }) }

func (r *auditRecord) attrs() []slog.Attr {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.said
}

// subject says what a call was about.
func subject(req, resp any) []slog.Attr {
	switch r := req.(type) {
	case *entryv1.BatchCreateEntryRequest:
		return items("entry", r.Entries, func(e *types.Entry) string { return idText(e.GetSpiffeId()) }, statuses(resp))
	case *entryv1.BatchUpdateEntryRequest:
		return items("entry", r.Entries, (*types.Entry).GetId, statuses(resp))
	case *entryv1.BatchDeleteEntryRequest:
		return items("entry", r.Ids, itself, statuses(resp))
	case *bundlev1.AppendBundleRequest:
		return []slog.Attr{slog.Int("x509_authorities", len(r.X509Authorities)), slog.Int("jwt_authorities", len(r.JwtAuthorities)), slog.Int("wit_authorities", len(r.WitAuthorities))}
	case *bundlev1.PublishJWTAuthorityRequest:
		return []slog.Attr{slog.String("authority", clip(r.GetJwtAuthority().GetKeyId()))}
	case *bundlev1.PublishWITAuthorityRequest:
		return []slog.Attr{slog.String("authority", clip(r.GetWitAuthority().GetKeyId()))}
	case *bundlev1.BatchCreateFederatedBundleRequest:
		return items("bundle", r.Bundle, (*types.Bundle).GetTrustDomain, statuses(resp))
	case *bundlev1.BatchUpdateFederatedBundleRequest:
		return items("bundle", r.Bundle, (*types.Bundle).GetTrustDomain, statuses(resp))
	case *bundlev1.BatchSetFederatedBundleRequest:
		return items("bundle", r.Bundle, (*types.Bundle).GetTrustDomain, statuses(resp))
	case *bundlev1.BatchDeleteFederatedBundleRequest:
		return append(items("bundle", r.TrustDomains, itself, statuses(resp)), slog.String("mode", r.Mode.String()))
	case *trustdomainv1.BatchCreateFederationRelationshipRequest:
		return items("federation", r.FederationRelationships, (*types.FederationRelationship).GetTrustDomain, statuses(resp))
	case *trustdomainv1.BatchUpdateFederationRelationshipRequest:
		return items("federation", r.FederationRelationships, (*types.FederationRelationship).GetTrustDomain, statuses(resp))
	case *trustdomainv1.BatchDeleteFederationRelationshipRequest:
		return items("federation", r.TrustDomains, itself, statuses(resp))
	case *trustdomainv1.RefreshBundleRequest:
		return []slog.Attr{slog.String("federation", clip(r.TrustDomain))}
	case *agentv1.DeleteAgentRequest:
		return []slog.Attr{slog.String("agent", idText(r.Id))}
	case *agentv1.BanAgentRequest:
		return []slog.Attr{slog.String("agent", idText(r.Id))}
	case *agentv1.CreateJoinTokenRequest: // the token is a secret
		attrs := []slog.Attr{slog.Duration("ttl", time.Duration(r.Ttl)*time.Second)}
		if r.AgentId != nil {
			attrs = append(attrs, slog.String("agent", idText(r.AgentId)))
		}
		return attrs
	case *agentv1.RenewAgentRequest: // the caller is the agent
		renewed, _ := resp.(*agentv1.RenewAgentResponse)
		return []slog.Attr{slog.Int64("expires", renewed.GetSvid().GetExpiresAt())}
	case *svidv1.MintX509SVIDRequest:
		minted, _ := resp.(*svidv1.MintX509SVIDResponse)
		return []slog.Attr{slog.String("id", idText(minted.GetSvid().GetId()))}
	case *svidv1.MintJWTSVIDRequest:
		return []slog.Attr{slog.String("id", idText(r.Id)), slog.Any("audience", shorten(r.Audience))}
	case *svidv1.MintWITSVIDRequest:
		return []slog.Attr{slog.String("id", idText(r.Id))}
	case *svidv1.BatchNewWITSVIDRequest:
		return items("entry", r.Params, (*svidv1.NewWITSVIDParams).GetEntryId, statuses(resp))
	case *svidv1.BatchNewX509SVIDRequest:
		return items("entry", r.Params, (*svidv1.NewX509SVIDParams).GetEntryId, statuses(resp))
	case *svidv1.NewJWTSVIDRequest:
		return []slog.Attr{slog.String("entry", clip(r.EntryId)), slog.Any("audience", shorten(r.Audience))}
	case *localauthorityv1.TaintX509UpstreamAuthorityRequest:
		return []slog.Attr{slog.String("authority", clip(r.SubjectKeyId))}
	case *localauthorityv1.RevokeX509UpstreamAuthorityRequest:
		return []slog.Attr{slog.String("authority", clip(r.SubjectKeyId))}
	case interface{ GetAuthorityId() string }: // every other call of LocalAuthority that names one
		return []slog.Attr{slog.String("authority", clip(r.GetAuthorityId()))}
	case *loggerv1.SetLogLevelRequest:
		return []slog.Attr{slog.String("new_level", r.NewLevel.String())}
	case *hallmarkv1.RotateAuthorityRequest:
		return []slog.Attr{slog.String("kind", r.Kind.String())}
	case *hallmarkv1.RevokeSVIDsRequest:
		return items("revocation", r.Revocations, revocationText, nil)
	case *hallmarkv1.InviteRequest:
		return []slog.Attr{slog.Duration("ttl", time.Duration(r.Ttl)*time.Second)}
	case *hallmarkv1.JoinRequest: // the secret is one
		return []slog.Attr{slog.String("server", clip(r.Name)), slog.String("peer_address", clip(r.PeerAddress))}
	case *hallmarkv1.RemoveServerRequest:
		return []slog.Attr{slog.String("server", clip(r.Name))}
	}
	return nil
}

// statuses returns the codes of a batch's results, or nil if it failed as a
// whole.
func statuses(resp any) []codes.Code {
	switch r := resp.(type) {
	case *entryv1.BatchCreateEntryResponse:
		return codesOf(r.GetResults())
	case *entryv1.BatchUpdateEntryResponse:
		return codesOf(r.GetResults())
	case *entryv1.BatchDeleteEntryResponse:
		return codesOf(r.GetResults())
	case *bundlev1.BatchCreateFederatedBundleResponse:
		return codesOf(r.GetResults())
	case *bundlev1.BatchUpdateFederatedBundleResponse:
		return codesOf(r.GetResults())
	case *bundlev1.BatchSetFederatedBundleResponse:
		return codesOf(r.GetResults())
	case *bundlev1.BatchDeleteFederatedBundleResponse:
		return codesOf(r.GetResults())
	case *trustdomainv1.BatchCreateFederationRelationshipResponse:
		return codesOf(r.GetResults())
	case *trustdomainv1.BatchUpdateFederationRelationshipResponse:
		return codesOf(r.GetResults())
	case *trustdomainv1.BatchDeleteFederationRelationshipResponse:
		return codesOf(r.GetResults())
	case *svidv1.BatchNewX509SVIDResponse:
		return codesOf(r.GetResults())
	case *svidv1.BatchNewWITSVIDResponse:
		return codesOf(r.GetResults())
	}
	return nil
}

func codesOf[R interface{ GetStatus() *types.Status }](results []R) []codes.Code {
	out := make([]codes.Code, len(results))
	for i, r := range results {
		out[i] = codes.Code(r.GetStatus().GetCode())
	}
	return out
}

// items names the items of a batch, how many there are and how many failed.
func items[T any](what string, all []T, name func(T) string, results []codes.Code) []slog.Attr {
	var names []string
	for i, item := range all {
		if i == maxSubjects {
			names = append(names, "…")
			break
		}
		n := clip(name(item))
		if i < len(results) && results[i] != codes.OK {
			n += " (" + results[i].String() + ")"
		}
		names = append(names, n)
	}
	failed := 0
	for _, c := range results {
		if c != codes.OK {
			failed++
		}
	}
	return []slog.Attr{slog.Any(what, names), slog.Int("items", len(all)), slog.Int("failed", failed)}
}

func itself(s string) string { return s }

// clip bounds what a caller wrote.
func clip(s string) string {
	const most = 256 // bytes
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

func shorten(all []string) []string {
	out := make([]string, 0, min(len(all), maxSubjects))
	for _, s := range all[:min(len(all), maxSubjects)] {
		out = append(out, clip(s))
	}
	return out
}

// idText writes an ID of a request as it is, valid or not.
func idText(id *types.SPIFFEID) string {
	if id == nil {
		return ""
	}
	return clip("spiffe://" + id.TrustDomain + "/" + strings.TrimPrefix(id.Path, "/"))
}
