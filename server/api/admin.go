package api

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/version"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/store"
)

// adminService is what an operator on this machine needs beyond SPIRE's APIs.
type adminService struct {
	hallmarkv1.UnsafeAdminServiceServer // every call is here: one that is missing does not compile
	*API
}

// GetServer says what this server is.
func (s *adminService) GetServer(context.Context, *hallmarkv1.GetServerRequest) (*hallmarkv1.GetServerResponse, error) {
	view := s.registry.View()
	digest := view.Digest()
	problem := ""
	if err := s.authorities.KeysAvailable(); err != nil {
		problem = err.Error()
	}
	return &hallmarkv1.GetServerResponse{
		KeysProblem: problem,
		TrustDomain: s.td.Name(),
		Version:     version.String(),
		Revision:    int64(view.Revision()),
		Digest:      digest[:],
		StartedAt:   s.started.Unix(),
		Address:     s.address,
	}, nil
}

// Backup streams a copy of the store.
func (s *adminService) Backup(_ *hallmarkv1.BackupRequest, stream hallmarkv1.AdminService_BackupServer) error {
	rev, err := store.Backup(stream.Context(), s.store, backupWriter{stream})
	if err != nil {
		return status(err)
	}
	return stream.Send(&hallmarkv1.BackupResponse{Revision: int64(rev), Done: true})
}

// backupWriter sends what is written to it, in messages of a bounded size.
type backupWriter struct {
	stream hallmarkv1.AdminService_BackupServer
}

const maxBackupMessage = 1 << 20 // bytes

func (w backupWriter) Write(b []byte) (n int, err error) {
	for len(b) > 0 {
		part := b[:min(len(b), maxBackupMessage)]
		if err := w.stream.Send(&hallmarkv1.BackupResponse{Data: part}); err != nil {
			return n, err
		}
		n, b = n+len(part), b[len(part):]
	}
	return n, nil
}

// ListAuthorities lists the authorities of every server, the oldest first, and
// what depends on each.
func (s *adminService) ListAuthorities(context.Context, *hallmarkv1.ListAuthoritiesRequest) (*hallmarkv1.ListAuthoritiesResponse, error) {
	resp := &hallmarkv1.ListAuthoritiesResponse{}
	view := s.registry.View()
	uses := s.authorityUses(view)
	for _, a := range view.Authorities() {
		rec, err := a.Record()
		if err != nil {
			return nil, status(err)
		}
		use := uses[a.ID]
		if use == nil {
			use = &hallmarkv1.AuthorityUse{}
		}
		signed, last := s.issuer.Signed(a.ID)
		use.Signed, use.LastExpiresAt = signed, timeToWire(last)
		resp.Authorities = append(resp.Authorities, rec)
		resp.Uses = append(resp.Uses, use)
	}
	if own := view.Bundle(s.td); own != nil {
		rec, err := own.Record()
		if err != nil {
			return nil, status(err)
		}
		resp.Roots = rec.X509Authorities
	}
	resp.Upstream = s.upstream()
	return resp, nil
}

// upstream says how the authority above is doing; nil: there is none.
func (s *adminService) upstream() *hallmarkv1.Upstream {
	kind, address, asked := s.authorities.UpstreamState()
	if kind == "" {
		return nil
	}
	up := &hallmarkv1.Upstream{Kind: kind, Address: address}
	for _, q := range asked {
		r := &hallmarkv1.UpstreamRequest{
			What: q.What, SucceededAt: timeToWire(q.SucceededAt), FailingSince: timeToWire(q.FailingSince), NextTry: timeToWire(q.NextTry),
		}
		if q.Failure != nil {
			r.Failure = q.Failure.Error()
		}
		up.Requests = append(up.Requests, r)
	}
	return up
}

// authorityUses counts the agents that depend on each X.509 authority. Its cost
// is that of looking at every node.
func (s *adminService) authorityUses(view *registry.View) map[string]*hallmarkv1.AuthorityUse {
	connected := make(map[spiffeid.ID]bool)
	for _, c := range s.feed.Connections() {
		connected[c.Node] = true
	}
	uses, now := make(map[string]*hallmarkv1.AuthorityUse), s.now()
	for n := range view.Nodes("") {
		renewed := n.NewSerialNumber != "" && n.NewAuthorityID != n.AuthorityID
		if n.AuthorityID == "" || n.Banned || renewed || now.After(n.ExpiresAt) && now.After(n.NewExpiresAt) {
			continue
		}
		use := uses[n.AuthorityID]
		if use == nil {
			use = &hallmarkv1.AuthorityUse{}
			uses[n.AuthorityID] = use
		}
		use.Agents++
		if connected[n.ID] {
			use.ConnectedAgents++
		}
		if !n.CanReattest {
			use.LostAgents++
		}
	}
	return uses
}

// How long RotateAuthority and AwaitAgents wait for agents.
const (
	defaultAgentsWait = 30 * time.Second
	maxAgentsWait     = time.Hour
	// rotateSettle is how long an authority that every agent knows does not sign
	// yet. Agents hand the bundle on to their workloads, which take it in some
	// milliseconds later, if they are not busy.
	rotateSettle = time.Second
	// nestedLevels is how many servers a new authority passes, from one to the
	// next, until all of a nested trust domain know it.
	nestedLevels = 3
)

// RotateAuthority replaces the authority that signs by a new one, once every
// connected agent knows the new one.
func (s *adminService) RotateAuthority(ctx context.Context, req *hallmarkv1.RotateAuthorityRequest) (*hallmarkv1.RotateAuthorityResponse, error) {
	kind := registry.AuthorityKind(req.Kind)
	switch {
	case slices.Contains(s.authorities.Kinds(), kind):
	case kind == registry.WIT:
		return nil, errNoWIT
	default:
		return nil, invalidArgument("unknown kind of authority %v", req.Kind)
	}
	wait, err := agentsWait(req.Wait)
	if err != nil {
		return nil, err
	}
	prepared, err := s.authorities.Prepare(ctx, kind)
	if err != nil {
		return nil, status(err)
	}
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	agents, err := s.feed.WaitAcked(waiting, s.registry.View().Revision())
	switch {
	case ctx.Err() != nil:
		return nil, status(ctx.Err())
	case err != nil:
		return nil, callErrorf(codes.DeadlineExceeded, "the new %s authority %s is prepared but does not sign: after %v, %v", kind, prepared.ID, wait, err)
	}
	settled := time.NewTimer(s.settle(s.registry.View()))
	defer settled.Stop()
	select {
	case <-settled.C:
	case <-ctx.Done():
		return nil, status(ctx.Err())
	}
	if err := s.publisher.Await(waiting, prepared); err != nil {
		return nil, callErrorf(codes.DeadlineExceeded, "the new %s authority %s is prepared but does not sign: after %v, %v; mend that, or run \"hallmark authority activate\" if those who read the target may refuse what it signs", kind, prepared.ID, wait, err)
	}
	active, err := s.authorities.Activate(ctx, kind, prepared.ID)
	if now, _, _ := s.authorities.State(kind); err != nil && now != nil && now.ID == prepared.ID {
		active, err = now, nil // its time had come anyway
	}
	if err != nil {
		return nil, status(err)
	}
	rec, err := active.Record()
	if err != nil {
		return nil, status(err)
	}
	return &hallmarkv1.RotateAuthorityResponse{Activated: rec, Agents: int32(agents)}, nil
}

// settle is how long an authority that every agent of this server knows does not
// sign yet. With servers above or below in the trust domain, it is until they
// have followed, some levels of them.
func (s *adminService) settle(view *registry.View) time.Duration {
	nested := s.authorities.Publishes()
	for e := range view.Entries("") {
		if nested = nested || e.Downstream; nested {
			return rotateSettle + nestedLevels*s.authorities.FollowWait()
		}
	}
	return rotateSettle
}

// ListNodeAttestors says what each way to attest nodes is worth.
func (s *adminService) ListNodeAttestors(context.Context, *hallmarkv1.ListNodeAttestorsRequest) (*hallmarkv1.ListNodeAttestorsResponse, error) {
	resp := &hallmarkv1.ListNodeAttestorsResponse{}
	for _, p := range s.profiles {
		a := &hallmarkv1.NodeAttestor{Name: p.Name, Configured: s.attestors[p.Name] != nil, Strength: p.Strength.String(), Needed: p.Needed, Page: p.Page}
		for _, f := range p.Selectors {
			a.Selectors = append(a.Selectors, &hallmarkv1.SelectorForm{Form: p.Name + ":" + f.Value, Meaning: f.Meaning})
		}
		resp.NodeAttestors = append(resp.NodeAttestors, a)
	}
	return resp, nil
}

// agentsWait is how long a call is to wait for agents.
func agentsWait(seconds int32) (time.Duration, error) {
	wait := time.Duration(seconds) * time.Second
	switch {
	case wait < 0 || wait > maxAgentsWait:
		return 0, invalidArgument("wait is %v; it is at least 0 and at most %v", wait, maxAgentsWait)
	case wait == 0:
		return defaultAgentsWait, nil
	}
	return wait, nil
}

// AwaitAgents waits until what the server knows has reached every agent that
// holds a push stream.
func (s *adminService) AwaitAgents(ctx context.Context, req *hallmarkv1.AwaitAgentsRequest) (*hallmarkv1.AwaitAgentsResponse, error) {
	wait, err := agentsWait(req.Wait)
	if err != nil {
		return nil, err
	}
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	revision := s.registry.View().Revision()
	agents, err := s.feed.WaitAcked(waiting, revision)
	switch {
	case ctx.Err() != nil:
		return nil, status(ctx.Err())
	case err != nil:
		return nil, callErrorf(codes.DeadlineExceeded, "after %v, %v", wait, err)
	}
	return &hallmarkv1.AwaitAgentsResponse{Revision: int64(revision), Agents: int32(agents)}, nil
}

// ListBundleFetches lists the relationships, with what has come of this server's
// fetches of their bundles.
func (s *adminService) ListBundleFetches(context.Context, *hallmarkv1.ListBundleFetchesRequest) (*hallmarkv1.ListBundleFetchesResponse, error) {
	resp := &hallmarkv1.ListBundleFetchesResponse{}
	for f := range s.registry.View().Federations("") {
		o := s.fetches.Of(f)
		made := &hallmarkv1.BundleFetch{TrustDomain: f.TrustDomain.Name(), Failures: int32(o.Failures), Error: o.Reason}
		if !o.Fetched.IsZero() {
			made.FetchedAt = o.Fetched.Unix()
		}
		if !o.Tried.IsZero() {
			made.TriedAt = o.Tried.Unix()
		}
		resp.Fetches = append(resp.Fetches, made)
	}
	return resp, nil
}

// ListPublishTargets says how each target of this server's is.
func (s *adminService) ListPublishTargets(context.Context, *hallmarkv1.ListPublishTargetsRequest) (*hallmarkv1.ListPublishTargetsResponse, error) {
	resp := &hallmarkv1.ListPublishTargetsResponse{}
	for _, t := range s.publisher.Targets() {
		resp.Targets = append(resp.Targets, &hallmarkv1.PublishTarget{
			Name: t.Name, Place: t.Place, Documents: t.Documents, State: string(t.State),
			SequenceNumber: t.Sequence, NewestSequenceNumber: t.Newest, PublishedAt: timeToWire(t.PublishedAt), TriedAt: timeToWire(t.TriedAt),
			NextTry: timeToWire(t.NextTry), Failures: int32(t.Failures), Error: t.Error,
		})
	}
	return resp, nil
}

// ListConnections lists the agents that hold a push stream.
func (s *adminService) ListConnections(context.Context, *hallmarkv1.ListConnectionsRequest) (*hallmarkv1.ListConnectionsResponse, error) {
	resp := &hallmarkv1.ListConnectionsResponse{}
	for _, c := range s.feed.Connections() {
		resp.Connections = append(resp.Connections, &hallmarkv1.Connection{
			AgentId:              c.Node.String(),
			AcknowledgedRevision: int64(c.Acknowledged),
			ConnectedAt:          c.ConnectedAt.Unix(),
			AgentVersion:         c.AgentVersion,
			Address:              c.Address,
			Behind:               c.Behind,
		})
	}
	return resp, nil
}

// GetJoinInfo returns what a join string needs besides the token.
func (s *adminService) GetJoinInfo(context.Context, *hallmarkv1.GetJoinInfoRequest) (*hallmarkv1.GetJoinInfoResponse, error) {
	address, err := s.dialable()
	if err != nil {
		return nil, err
	}
	own := s.registry.View().Bundle(s.td)
	if own == nil {
		return nil, callErrorf(codes.Unavailable, "the trust domain has no bundle yet; try again")
	}
	// A tainted authority signs nothing and is about to go: whoever joins by it
	// could not tell this server from one that has its key.
	pinned := own.Clone()
	pinned.X509Authorities = slices.DeleteFunc(pinned.X509Authorities, func(a bundle.X509Authority) bool { return a.Tainted })
	return &hallmarkv1.GetJoinInfoResponse{TrustDomain: s.td.Name(), Address: address, RootHashes: pinned.RootHashes()}, nil
}

// dialable returns the address that agents should dial.
func (s *adminService) dialable() (string, error) {
	if s.advertise != "" {
		return s.advertise, nil
	}
	host, _, err := net.SplitHostPort(s.address)
	if err != nil {
		return "", status(fmt.Errorf("address of the listener: %w", err))
	}
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
		return "", callErrorf(codes.FailedPrecondition, "the server listens on every address of its machine (%s); set advertise to the host:port that agents should dial", s.address)
	}
	return s.address, nil
}
