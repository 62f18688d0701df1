package api

import (
	"cmp"
	"context"
	"math/big"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/revocation"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/tokenstatus"
)

const (
	revokeWait     = 10 * time.Second // for CRLs and agents, unless asked for another time
	maxRevokeWait  = 5 * time.Minute
	svidsListed    = 1000
	maxSVIDsListed = 10_000
)

// RevokeSVIDs takes back SVIDs before their end. The revocations hold once it
// has written them; then it waits until the CRLs and status lists have them and
// this server's agents have those.
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
	view, revision := s.awaitRevoked(waiting, all)
	for _, a := range view.IssuedBy(s.now()) {
		if slices.ContainsFunc(all, func(x *registry.Revocation) bool { return len(x.SerialNumber) == 0 || x.AuthorityID == a.ID }) {
			resp.Authorities = append(resp.Authorities, coverage(view, a, all, revision))
		}
	}
	if slices.ContainsFunc(all, func(x *registry.Revocation) bool { return x.AuthorityID == "" }) { // else all are certificates
		resp.StatusLists = statusCoverage(view, s.now(), all, func(*registry.Revocation) store.Revision { return revision })
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
	if statuslist.IsSerial(x.SerialNumber) {
		id, index, _ := statuslist.Place(x.SerialNumber)
		if index >= registry.StatusListSize || view.StatusList(id) == nil {
			return nil, callErrorf(codes.NotFound, "the token is of status list %s, which this trust domain does not have: it has ended, or is another trust domain's", id)
		}
		x.AuthorityID = "" // its list is what names it
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

// awaitRevoked waits until the CRLs and status lists of all servers have
// revocations that were written, or the context ends, and returns a view that
// shows how far they are, and the revision that wrote the newest of the
// revocations.
func (s *adminService) awaitRevoked(ctx context.Context, all []*registry.Revocation) (*registry.View, store.Revision) {
	for {
		changed, view := s.registry.Changed(), s.registry.View()
		revision := written(view, all)
		done := true
		for _, a := range view.IssuedBy(s.now()) {
			for _, x := range all {
				done = done && revocation.Covered(view, a, x, revision)
			}
		}
		for _, l := range view.LiveStatusLists(s.now()) {
			for _, x := range all {
				done = done && tokenstatus.Covered(l, x, revision)
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

// statusCoverage says of each server how far its status lists are with some
// revocations, each written by the revision that a function returns.
func statusCoverage(view *registry.View, now time.Time, all []*registry.Revocation, written func(*registry.Revocation) store.Revision) (out []*hallmarkv1.StatusCoverage) {
	of := make(map[string]*hallmarkv1.StatusCoverage)
	for _, l := range view.LiveStatusLists(now) {
		c := of[l.Server]
		if c == nil {
			c = &hallmarkv1.StatusCoverage{Server: l.Server, Covered: true}
			of[l.Server] = c
			out = append(out, c)
		}
		c.Lists++
		c.Revoked += int32(l.Revoked)
		for _, x := range all {
			c.Covered = c.Covered && tokenstatus.Covered(l, x, written(x))
		}
	}
	slices.SortFunc(out, func(a, b *hallmarkv1.StatusCoverage) int { return cmp.Compare(a.Server, b.Server) })
	return out
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
	kinds := make(map[string]registry.AuthorityKind)
	for _, a := range view.Authorities() {
		kinds[a.ID] = a.Kind
	}
	slices.Reverse(found)
	for i := range found[:min(len(found), limit)] {
		v := &found[i]
		resp.Svids = append(resp.Svids, &hallmarkv1.IssuedSVID{
			SpiffeId: v.ID, NodeId: v.Node, AuthorityId: v.Authority,
			SerialNumber: new(big.Int).SetBytes(v.Serial[:]).String(), IssuedAt: v.IssuedAt, ExpiresAt: v.ExpiresAt,
			Revoked: isRevoked(view, v), Kind: kindOf(v, kinds[v.Authority]),
		})
	}
	return resp, nil
}

// isRevoked reports whether an SVID is in its authority's CRL or in its status
// list.
func isRevoked(view *registry.View, v *journal.SVID) bool {
	if list, index, ok := statuslist.Place(v.Serial[:]); ok {
		return view.StatusList(list).Has(index)
	}
	return view.CRL(v.Authority).Has(v.SerialNumber())
}

// kindOf returns what an SVID is: x509, jwt or wit, by what its authority signs.
// Of a token whose authority is gone from the registry nobody knows: it is taken
// for a JWT-SVID.
func kindOf(v *journal.SVID, authority registry.AuthorityKind) string {
	switch {
	case !statuslist.IsSerial(v.Serial[:]):
		return registry.X509.String()
	case authority == registry.WIT:
		return registry.WIT.String()
	}
	return registry.JWT.String()
}

// ListRevocations lists the revocations, CRLs and status lists of all servers.
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
	resp.StatusLists = statusCoverage(view, s.now(), all, (*registry.Revocation).Revision)
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
