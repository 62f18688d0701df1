package api

import (
	"context"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/revocation"
	"github.com/hallmark-id/hallmark/server/store"
)

const (
	revokeWait     = 10 * time.Second // for CRLs and agents, unless asked for another time
	maxRevokeWait  = 5 * time.Minute
	svidsListed    = 1000
	maxSVIDsListed = 10_000
)

// RevokeSVIDs takes back SVIDs before their end. The revocations hold once it
// has written them; then it waits until the CRLs have them and this server's
// agents have those.
func (s *adminService) RevokeSVIDs(ctx context.Context, req *hallmarkv1.RevokeSVIDsRequest) (*hallmarkv1.RevokeSVIDsResponse, error) {
	began := s.now()
	wait := time.Duration(req.Wait) * time.Second
	switch {
	case wait < 0 || wait > maxRevokeWait:
		return nil, invalidArgument("wait is %v; it is at most %v", wait, maxRevokeWait)
	case wait == 0:
		wait = revokeWait
	}
	var all []*registry.Revocation
	for _, r := range req.Revocations {
		x, err := s.revocation(r)
		if err != nil {
			return nil, err
		}
		all = append(all, x)
	}
	view, err := s.registry.Revoke(ctx, all)
	if err != nil {
		return nil, status(err)
	}
	resp := &hallmarkv1.RevokeSVIDsResponse{Revision: int64(view.Revision())}
	waiting, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	view, revision := s.awaitCRLs(waiting, all)
	for _, a := range view.IssuedBy(s.now()) {
		if slices.ContainsFunc(all, func(x *registry.Revocation) bool { return x.AuthorityID == "" || x.AuthorityID == a.ID }) {
			resp.Authorities = append(resp.Authorities, coverage(view, a, all, revision))
		}
	}
	agents, err := s.feed.WaitAcked(waiting, view.Revision())
	resp.Agents, resp.AgentsMissing = int32(agents), err != nil
	resp.ElapsedMicroseconds = s.now().Sub(began).Microseconds()
	return resp, nil
}

// revocation reads what a caller wants to revoke.
func (s *adminService) revocation(r *hallmarkv1.Revocation) (*registry.Revocation, error) {
	now, view := s.now(), s.registry.View()
	x := &registry.Revocation{
		SerialNumber: registry.SerialNumber(r.GetSerialNumber()), AuthorityID: r.GetAuthorityId(),
		RevokedAt: now, Reason: int(r.GetReason()),
	}
	for _, id := range []struct {
		text string
		to   *spiffeid.ID
	}{{r.GetSpiffeId(), &x.SPIFFEID}, {r.GetNodeId(), &x.Node}} {
		if id.text == "" {
			continue
		}
		var err error
		if *id.to, err = spiffeid.FromString(id.text); err != nil {
			return nil, invalidArgument("%v", err)
		}
		if err := revocation.CheckTarget(*id.to); err != nil {
			return nil, status(err)
		}
	}
	if !x.Node.IsZero() && !isAgent(x.Node) {
		return nil, invalidArgument("SPIFFE ID %q is not an agent's: revoke what it was issued by spiffe_id", x.Node)
	}
	if len(x.SerialNumber) == 0 {
		x.EndsAt = revocation.EndOf(view, s.journal, x, now)
		return x, nil
	}
	issued := s.journal.Find(func(v *journal.SVID) bool {
		return string(v.SerialNumber()) == string(x.SerialNumber) && (x.AuthorityID == "" || v.Authority == x.AuthorityID)
	})
	number := new(big.Int).SetBytes(x.SerialNumber)
	switch {
	case len(issued) == 1:
		x.AuthorityID = issued[0].Authority
		if id, err := spiffeid.FromString(issued[0].ID); err == nil {
			if err := revocation.CheckTarget(id); err != nil {
				return nil, status(err)
			}
		}
	case x.AuthorityID == "":
		return nil, callErrorf(codes.NotFound, "this server has issued no SVID with serial number %v that has not ended; if another server has, name the authority that signed it, or give the certificate", number)
	}
	known := slices.ContainsFunc(view.IssuedBy(now), func(a *registry.Authority) bool { return a.ID == x.AuthorityID })
	if !known {
		return nil, callErrorf(codes.NotFound, "no X.509 authority %s of this trust domain may have signed what has not ended; list them with \"hallmark authority list\"", clip(x.AuthorityID))
	}
	x.EndsAt = revocation.EndOf(view, s.journal, x, now)
	return x, nil
}

// awaitCRLs waits until the CRLs of all servers have revocations that were
// written, or the context ends, and returns a view that shows how far they are,
// and the revision that wrote the newest of the revocations.
func (s *adminService) awaitCRLs(ctx context.Context, all []*registry.Revocation) (*registry.View, store.Revision) {
	for {
		changed, view := s.registry.Changed(), s.registry.View()
		revision := written(view, all)
		done := true
		for _, a := range view.IssuedBy(s.now()) {
			for _, x := range all {
				done = done && revocation.Covered(view, a, x, revision)
			}
		}
		if done {
			return view, revision
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return view, revision
		}
	}
}

// written returns the revision that wrote the newest of some revocations.
func written(view *registry.View, all []*registry.Revocation) (newest store.Revision) {
	for _, x := range all {
		if r := view.Revocation(x); r != nil {
			newest = max(newest, r.Revision())
		}
	}
	return newest
}

func coverage(view *registry.View, a *registry.Authority, all []*registry.Revocation, revision store.Revision) *hallmarkv1.RevocationCoverage {
	c := &hallmarkv1.RevocationCoverage{AuthorityId: a.ID, Server: a.Server, Covered: true}
	for _, x := range all {
		c.Covered = c.Covered && revocation.Covered(view, a, x, revision)
	}
	if crl := view.CRL(a.ID); crl != nil {
		c.CrlNumber, c.Revoked = crl.Number, int32(len(crl.Revoked))
	}
	return c
}

// ListSVIDs lists what this server has issued that has not ended.
func (s *adminService) ListSVIDs(_ context.Context, req *hallmarkv1.ListSVIDsRequest) (*hallmarkv1.ListSVIDsResponse, error) {
	limit := int(req.Limit)
	switch {
	case limit < 0 || limit > maxSVIDsListed:
		return nil, invalidArgument("limit is %d; it is at most %d", limit, maxSVIDsListed)
	case limit == 0:
		limit = svidsListed
	}
	var serial *big.Int
	if req.SerialNumber != "" {
		var ok bool
		if serial, ok = new(big.Int).SetString(req.SerialNumber, 10); !ok || serial.Sign() <= 0 || serial.BitLen() > 160 {
			return nil, invalidArgument("%.60q is no serial number; write it as a decimal number", req.SerialNumber)
		}
	}
	found := s.journal.Find(func(v *journal.SVID) bool {
		return (req.SpiffeId == "" || v.ID == req.SpiffeId) && (req.NodeId == "" || v.Node == req.NodeId) &&
			(serial == nil || string(v.SerialNumber()) == string(serial.Bytes()))
	})
	resp := &hallmarkv1.ListSVIDsResponse{Total: int64(len(found))}
	view := s.registry.View()
	slices.Reverse(found)
	for i := range found[:min(len(found), limit)] {
		v := &found[i]
		resp.Svids = append(resp.Svids, &hallmarkv1.IssuedSVID{
			SpiffeId: v.ID, NodeId: v.Node, AuthorityId: v.Authority,
			SerialNumber: new(big.Int).SetBytes(v.Serial[:]).String(), IssuedAt: v.IssuedAt, ExpiresAt: v.ExpiresAt,
			Revoked: view.CRL(v.Authority).Has(v.SerialNumber()),
		})
	}
	return resp, nil
}

// ListRevocations lists the revocations and CRLs of all servers.
func (s *adminService) ListRevocations(context.Context, *hallmarkv1.ListRevocationsRequest) (*hallmarkv1.ListRevocationsResponse, error) {
	view := s.registry.View()
	var all []*registry.Revocation
	for r := range view.Revocations() {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b *registry.Revocation) int { return int(b.Revision() - a.Revision()) })
	resp := &hallmarkv1.ListRevocationsResponse{}
	for _, r := range all[:min(len(all), maxSVIDsListed)] {
		resp.Revocations = append(resp.Revocations, r.Record())
	}
	for _, a := range view.IssuedBy(s.now()) {
		c := coverage(view, a, nil, 0)
		for _, r := range all {
			c.Covered = c.Covered && revocation.Covered(view, a, r, r.Revision())
		}
		resp.Authorities = append(resp.Authorities, c)
	}
	return resp, nil
}

// revocationText says what is revoked, for the record.
func revocationText(r *hallmarkv1.Revocation) string {
	switch {
	case r.GetSpiffeId() != "":
		return "id " + r.GetSpiffeId()
	case r.GetNodeId() != "":
		return "node " + r.GetNodeId()
	}
	return "serial " + new(big.Int).SetBytes(r.GetSerialNumber()).String()
}
