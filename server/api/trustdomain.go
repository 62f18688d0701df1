package api

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/federation"
	"github.com/hallmark-id/hallmark/server/registry"
)

// trustDomainService is SPIRE's TrustDomain API: federation relationships over
// the registry.
type trustDomainService struct {
	trustdomainv1.UnsafeTrustDomainServer // every call is here: one that is missing does not compile
	*API
}

var errNoFederation = callErrorf(codes.NotFound, "federation relationship not found")

// wholeFederation is what a missing mask of a relationship means.
var wholeFederation = &types.FederationRelationshipMask{BundleEndpointUrl: true, BundleEndpointProfile: true, TrustDomainBundle: true}

// ListFederationRelationships lists the relationships, by trust domain.
func (s *trustDomainService) ListFederationRelationships(ctx context.Context, req *trustdomainv1.ListFederationRelationshipsRequest) (*trustdomainv1.ListFederationRelationshipsResponse, error) {
	p, err := newPage(req.PageSize, req.PageToken)
	if err != nil {
		return nil, err
	}
	view := s.registry.View()
	all, next := collectPage(p, view.Federations(p.after), func(f *registry.Federation) string { return f.TrustDomain.Name() })
	resp := &trustdomainv1.ListFederationRelationshipsResponse{NextPageToken: next}
	for _, f := range all {
		w, err := federationToWire(view, f, req.OutputMask)
		if err != nil {
			return nil, status(err)
		}
		resp.FederationRelationships = append(resp.FederationRelationships, w)
	}
	return resp, nil
}

// GetFederationRelationship returns the relationship with a trust domain.
func (s *trustDomainService) GetFederationRelationship(ctx context.Context, req *trustdomainv1.GetFederationRelationshipRequest) (*types.FederationRelationship, error) {
	td, err := s.otherDomain(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	view := s.registry.View()
	f := view.Federation(td)
	if f == nil {
		return nil, errNoFederation
	}
	w, err := federationToWire(view, f, req.OutputMask)
	return w, status(err)
}

// BatchCreateFederationRelationship creates relationships, each on its own. A
// bundle that one carries is stored with it or not at all.
func (s *trustDomainService) BatchCreateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchCreateFederationRelationshipRequest) (*trustdomainv1.BatchCreateFederationRelationshipResponse, error) {
	if err := checkBatch(len(req.FederationRelationships)); err != nil {
		return nil, err
	}
	resp := &trustdomainv1.BatchCreateFederationRelationshipResponse{}
	for _, w := range req.FederationRelationships {
		f, err := s.putFederation(ctx, w, nil, req.OutputMask, s.registry.CreateFederation)
		resp.Results = append(resp.Results, &trustdomainv1.BatchCreateFederationRelationshipResponse_Result{Status: itemStatus(s.log, err), FederationRelationship: f})
	}
	return resp, nil
}

// BatchUpdateFederationRelationship changes the fields that the input mask
// names, of each relationship on its own. A relationship that comes without a
// bundle leaves the stored one as it is.
func (s *trustDomainService) BatchUpdateFederationRelationship(ctx context.Context, req *trustdomainv1.BatchUpdateFederationRelationshipRequest) (*trustdomainv1.BatchUpdateFederationRelationshipResponse, error) {
	if err := checkBatch(len(req.FederationRelationships)); err != nil {
		return nil, err
	}
	mask := req.InputMask
	if mask == nil {
		mask = wholeFederation
	}
	resp := &trustdomainv1.BatchUpdateFederationRelationshipResponse{}
	for _, w := range req.FederationRelationships {
		f, err := s.putFederation(ctx, w, mask, req.OutputMask, func(ctx context.Context, from registry.Federation, edit func(*registry.View, *bundle.Bundle) error) (*registry.Federation, error) {
			return s.registry.UpdateFederation(ctx, from.TrustDomain, func(f *registry.Federation) {
				if mask.BundleEndpointUrl {
					f.EndpointURL = from.EndpointURL
				}
				if mask.BundleEndpointProfile {
					f.EndpointID = from.EndpointID
				}
			}, edit)
		})
		resp.Results = append(resp.Results, &trustdomainv1.BatchUpdateFederationRelationshipResponse_Result{Status: itemStatus(s.log, err), FederationRelationship: f})
	}
	return resp, nil
}

// BatchDeleteFederationRelationship deletes relationships, each on its own.
// The bundles stay.
func (s *trustDomainService) BatchDeleteFederationRelationship(ctx context.Context, req *trustdomainv1.BatchDeleteFederationRelationshipRequest) (*trustdomainv1.BatchDeleteFederationRelationshipResponse, error) {
	if err := checkBatch(len(req.TrustDomains)); err != nil {
		return nil, err
	}
	resp := &trustdomainv1.BatchDeleteFederationRelationshipResponse{}
	for _, name := range req.TrustDomains {
		td, err := s.otherDomain(name)
		if err == nil {
			err = s.registry.DeleteFederation(ctx, td)
		}
		resp.Results = append(resp.Results, &trustdomainv1.BatchDeleteFederationRelationshipResponse_Result{Status: itemStatus(s.log, err), TrustDomain: name})
	}
	return resp, nil
}

// RefreshBundle fetches the bundle of a relationship's trust domain now. It
// returns when it is stored.
func (s *trustDomainService) RefreshBundle(ctx context.Context, req *trustdomainv1.RefreshBundleRequest) (*emptypb.Empty, error) {
	td, err := s.otherDomain(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	if err := s.RefreshFederated(ctx, td); err != nil {
		return nil, err
	}
	return &emptypb.Empty{}, nil
}

// RefreshFederated fetches the bundle of a relationship's trust domain from its
// endpoint and stores it. An older bundle than the one that is stored does not
// replace it. SPIFFE Federation §4.2. The error is one of a call.
func (a *API) RefreshFederated(ctx context.Context, td spiffeid.TrustDomain) error {
	view := a.registry.View()
	f := view.Federation(td)
	if f == nil {
		return errNoFederation
	}
	err := a.refresh(ctx, td, view, f)
	if err == nil || ctx.Err() == nil {
		a.fetches.Note(f, a.now(), grpcstatus.Convert(err).Message())
	}
	return err
}

func (a *API) refresh(ctx context.Context, td spiffeid.TrustDomain, view *registry.View, f *registry.Federation) error {
	fetched, err := a.federation.Fetch(ctx, f, x509Bundles{view})
	switch {
	case errors.Is(err, federation.ErrNoRoots):
		return callErrorf(codes.FailedPrecondition, "%s", err)
	case ctx.Err() != nil:
		return status(ctx.Err())
	case err != nil:
		return callErrorf(codes.Unavailable, "%s", err)
	}
	w, err := fetchedToWire(fetched)
	if err != nil {
		return status(err)
	}
	b, err := a.registry.ChangeBundle(ctx, td, func(b *bundle.Bundle) error {
		now := a.registry.View().Federation(td)
		if now == nil || now.EndpointURL != f.EndpointURL || now.EndpointID != f.EndpointID {
			return callErrorf(codes.Aborted, "the relationship with %q was changed while its bundle was fetched", td.Name())
		}
		n, ok := fetched.SequenceNumber()
		if ok && n <= b.SequenceNumber && sameContent(b, w) {
			return nil
		}
		switch {
		case ok && n < b.SequenceNumber:
			return callErrorf(codes.FailedPrecondition, "the endpoint offers bundle %d of %q, and %d is stored already: it stays", n, td.Name(), b.SequenceNumber)
		case ok && n == b.SequenceNumber: // Federation §4.2: its publisher does not count, or somebody else answered
			a.log.Warn("a bundle has changed without its sequence number", "trust_domain", td.Name(), "url", f.EndpointURL, "sequence_number", n)
		}
		was := b.SequenceNumber
		if err := a.takeBundle(w)(a.registry.View(), b); err != nil {
			return err
		}
		if !ok {
			b.SequenceNumber = was // rises if the bundle has changed
		}
		return nil
	})
	if err != nil {
		return status(err)
	}
	a.log.Info("bundle refreshed", "trust_domain", td.Name(), "url", f.EndpointURL, "endpoint_id", f.EndpointID.String(), "sequence_number", b.SequenceNumber)
	return nil
}

// authoritiesOnly is a mask of all that a bundle holds.
var authoritiesOnly = &types.BundleMask{X509Authorities: true, JwtAuthorities: true, WitAuthorities: true}

// sameContent reports whether a bundle has the authorities that one of the
// wire has.
func sameContent(b *bundle.Bundle, w *types.Bundle) bool {
	was, err := bundleToWire(b, authoritiesOnly)
	if err != nil {
		return false
	}
	return proto.Equal(was, &types.Bundle{
		TrustDomain: w.TrustDomain, X509Authorities: w.X509Authorities, JwtAuthorities: w.JwtAuthorities, WitAuthorities: w.WitAuthorities,
	})
}

// fetchedToWire turns a fetched bundle into the wire's form, so that it is held
// to what every bundle that comes from outside is held to.
func fetchedToWire(b *spiffebundle.Bundle) (*types.Bundle, error) {
	w := &types.Bundle{TrustDomain: b.TrustDomain().Name()}
	for _, cert := range b.X509Authorities() {
		w.X509Authorities = append(w.X509Authorities, &types.X509Certificate{Asn1: cert.Raw})
	}
	var err error
	if w.JwtAuthorities, err = jwtAuthoritiesToWire(byKeyID(b.JWTAuthorities())); err != nil {
		return nil, invalidArgument("the fetched bundle: %s", err)
	}
	if w.WitAuthorities, err = witAuthoritiesToWire(byKeyID(b.WITAuthorities())); err != nil {
		return nil, invalidArgument("the fetched bundle: %s", err)
	}
	if n, ok := b.SequenceNumber(); ok {
		w.SequenceNumber = n
	}
	if hint, ok := b.RefreshHint(); ok {
		w.RefreshHint = int64(hint.Seconds())
	}
	return w, nil
}

func byKeyID(keys map[string]crypto.PublicKey) []bundle.JWTAuthority {
	as := make([]bundle.JWTAuthority, 0, len(keys))
	for _, kid := range slices.Sorted(maps.Keys(keys)) {
		as = append(as, bundle.JWTAuthority{KeyID: kid, PublicKey: keys[kid]})
	}
	return as
}

// x509Bundles are the bundles of a view, for verification of X509-SVIDs.
type x509Bundles struct{ view *registry.View }

func (s x509Bundles) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b := s.view.Bundle(td)
	if b == nil || len(b.X509Authorities) == 0 {
		return nil, fmt.Errorf("no bundle of trust domain %q", td.Name())
	}
	out := x509bundle.New(td)
	for _, a := range b.X509Authorities {
		out.AddX509Authority(a.Certificate)
	}
	return out, nil
}

// putFederation reads the fields of a relationship that a mask names (all, if
// there is none) and gives them to a write of the registry.
func (s *trustDomainService) putFederation(ctx context.Context, w *types.FederationRelationship, in, out *types.FederationRelationshipMask,
	write func(context.Context, registry.Federation, func(*registry.View, *bundle.Bundle) error) (*registry.Federation, error),
) (*types.FederationRelationship, error) {
	if w == nil {
		return nil, invalidArgument("federation relationship is missing")
	}
	if in == nil {
		in = wholeFederation
	}
	td, err := s.otherDomain(w.TrustDomain)
	if err != nil {
		return nil, err
	}
	f := registry.Federation{TrustDomain: td}
	if in.BundleEndpointUrl {
		if err := registry.ValidateEndpointURL(w.BundleEndpointUrl); err != nil {
			return nil, invalidArgument("%s", err)
		}
		f.EndpointURL = w.BundleEndpointUrl
	}
	if in.BundleEndpointProfile {
		switch p := w.BundleEndpointProfile.(type) {
		case *types.FederationRelationship_HttpsWeb:
		case *types.FederationRelationship_HttpsSpiffe:
			if f.EndpointID, err = spiffeid.FromString(p.HttpsSpiffe.GetEndpointSpiffeId()); err != nil {
				return nil, invalidArgument("endpoint SPIFFE ID: %s", err)
			}
		default: // never guessed: SPIFFE Federation §7.2
			return nil, invalidArgument("bundle endpoint profile is missing; it is https_web or https_spiffe")
		}
	}
	var edit func(*registry.View, *bundle.Bundle) error
	if in.TrustDomainBundle && w.TrustDomainBundle != nil {
		of, _, err := bundleFromWire(w.TrustDomainBundle, nil)
		switch {
		case err != nil:
			return nil, invalidArgument("%s", err)
		case of != td:
			return nil, invalidArgument("bundle is of trust domain %q, and the relationship with %q", of.Name(), td.Name())
		}
		edit = s.takeBundle(w.TrustDomainBundle)
	}
	stored, err := write(ctx, f, edit)
	if err != nil {
		return nil, err
	}
	return federationToWire(s.registry.View(), stored, out)
}

// takeBundle returns a function that puts a bundle of the wire into a stored
// one.
func (a *API) takeBundle(w *types.Bundle) func(*registry.View, *bundle.Bundle) error {
	return func(view *registry.View, b *bundle.Bundle) error {
		_, set, err := bundleFromWire(w, nil)
		if err != nil {
			return invalidArgument("%s", err)
		}
		set(b)
		if own := view.Bundle(a.td); own != nil {
			if err := disjoint(own, b); err != nil {
				return err
			}
		}
		return checkBundleSize(b)
	}
}

// otherDomain reads the name of a trust domain that the server may federate
// with.
func (s *trustDomainService) otherDomain(name string) (spiffeid.TrustDomain, error) {
	td, err := trustDomainFromWire(name)
	switch {
	case err != nil:
		return td, invalidArgument("%s", err)
	case td == s.td:
		return td, invalidArgument("%q is the server's own trust domain; federate with another", name)
	}
	return td, nil
}

// federationToWire turns a relationship into the wire's form: its trust domain
// and the fields that the mask names; all, if there is none. The bundle is the
// one that the view has.
func federationToWire(v *registry.View, f *registry.Federation, mask *types.FederationRelationshipMask) (*types.FederationRelationship, error) {
	if mask == nil {
		mask = wholeFederation
	}
	w := &types.FederationRelationship{TrustDomain: f.TrustDomain.Name()}
	if mask.BundleEndpointUrl {
		w.BundleEndpointUrl = f.EndpointURL
	}
	if mask.BundleEndpointProfile {
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}
		if !f.EndpointID.IsZero() {
			w.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: f.EndpointID.String()}}
		}
	}
	if mask.TrustDomainBundle {
		if b := v.Bundle(f.TrustDomain); b != nil {
			var err error
			if w.TrustDomainBundle, err = bundleToWire(b, nil); err != nil {
				return nil, err
			}
		}
	}
	return w, nil
}
