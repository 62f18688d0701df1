package api

import (
	"context"
	"crypto/x509"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/registry"
)

// bundleService is SPIRE's Bundle API over the registry.
type bundleService struct {
	bundlev1.UnsafeBundleServer // every call is here: one that is missing does not compile
	*API
}

var (
	errNoBundle       = callErrorf(codes.NotFound, "bundle not found")
	errBundleExists   = callErrorf(codes.AlreadyExists, "bundle already exists")
	errOwnTrustDomain = invalidArgument("this is the bundle of the server's own trust domain; only foreign ones can be handled here")
)

// CountBundles counts the bundles, the server's own included.
func (s *bundleService) CountBundles(ctx context.Context, req *bundlev1.CountBundlesRequest) (*bundlev1.CountBundlesResponse, error) {
	n := int32(0)
	for range s.registry.View().Bundles("") {
		n++
	}
	return &bundlev1.CountBundlesResponse{Count: n}, nil
}

// GetBundle returns the bundle of the server's trust domain, to anyone.
func (s *bundleService) GetBundle(ctx context.Context, req *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	return s.answer(s.registry.View().Bundle(s.td), req.OutputMask)
}

// AppendBundle adds authorities to the bundle of the server's trust domain.
// Those that it has are passed over.
func (s *bundleService) AppendBundle(ctx context.Context, req *bundlev1.AppendBundleRequest) (*types.Bundle, error) {
	if len(req.WitAuthorities) > 0 && !s.wit {
		return nil, errNoWIT
	}
	more, err := authoritiesFromWire(&types.Bundle{
		X509Authorities: req.X509Authorities, JwtAuthorities: req.JwtAuthorities, WitAuthorities: req.WitAuthorities,
	}, wholeBundle)
	if err != nil {
		return nil, invalidArgument("%s", err)
	}
	b, err := s.extend(ctx, more)
	if err != nil {
		return nil, status(err)
	}
	return s.answer(b, req.OutputMask)
}

// PublishJWTAuthority adds a downstream server's JWT authority to the bundle of
// the trust domain.
func (s *bundleService) PublishJWTAuthority(ctx context.Context, req *bundlev1.PublishJWTAuthorityRequest) (*bundlev1.PublishJWTAuthorityResponse, error) {
	a, err := jwtAuthorityFromWire("JWT", req.JwtAuthority)
	if err != nil {
		return nil, invalidArgument("%s", err)
	}
	var b *bundle.Bundle
	err = s.authorities.Forward(ctx, registry.JWT, a, func(a bundle.JWTAuthority) (err error) {
		b, err = s.extend(ctx, &bundle.Bundle{JWTAuthorities: []bundle.JWTAuthority{a}})
		return err
	})
	if err != nil {
		return nil, status(err)
	}
	keys, err := jwtAuthoritiesToWire(b.JWTAuthorities)
	if err != nil {
		return nil, status(err)
	}
	return &bundlev1.PublishJWTAuthorityResponse{JwtAuthorities: keys}, nil
}

// PublishWITAuthority adds a downstream server's WIT authority to the bundle of
// the trust domain.
func (s *bundleService) PublishWITAuthority(ctx context.Context, req *bundlev1.PublishWITAuthorityRequest) (*bundlev1.PublishWITAuthorityResponse, error) {
	if !s.wit {
		return nil, errNoWIT
	}
	a, err := jwtAuthorityFromWire("WIT", req.WitAuthority)
	if err != nil {
		return nil, invalidArgument("%s", err)
	}
	var b *bundle.Bundle
	err = s.authorities.Forward(ctx, registry.WIT, a, func(a bundle.JWTAuthority) (err error) {
		b, err = s.extend(ctx, &bundle.Bundle{WITAuthorities: []bundle.JWTAuthority{a}})
		return err
	})
	if err != nil {
		return nil, status(err)
	}
	keys, err := witAuthoritiesToWire(b.WITAuthorities)
	if err != nil {
		return nil, status(err)
	}
	return &bundlev1.PublishWITAuthorityResponse{WitAuthorities: keys}, nil
}

// extend adds authorities to the bundle of the server's trust domain. Those
// that have expired are refused; JWT and WIT authorities in the bundle that
// have expired make room, as downstream servers add new ones for ever.
func (s *bundleService) extend(ctx context.Context, more *bundle.Bundle) (*bundle.Bundle, error) {
	now := s.now()
	for i, a := range more.X509Authorities {
		if now.After(a.Certificate.NotAfter) {
			return nil, invalidArgument("X.509 authority %d expired at %s", i, a.Certificate.NotAfter.Format(time.RFC3339))
		}
	}
	expired := func(a bundle.JWTAuthority) bool { return !a.ExpiresAt.IsZero() && !now.Before(a.ExpiresAt) }
	for kind, as := range map[string][]bundle.JWTAuthority{"JWT": more.JWTAuthorities, "WIT": more.WITAuthorities} {
		for _, a := range as {
			if expired(a) {
				return nil, invalidArgument("%s authority %q expired at %s", kind, a.KeyID, a.ExpiresAt.UTC().Format(time.RFC3339))
			}
		}
	}
	view := s.registry.View()
	if view.Bundle(s.td) == nil {
		return nil, errNoBundle
	}
	for foreign := range s.federated(view, "") {
		if err := disjoint(foreign, more); err != nil {
			return nil, err
		}
	}
	return s.registry.ChangeBundle(ctx, s.td, func(b *bundle.Bundle) error {
		for _, a := range more.X509Authorities {
			if !b.HasX509(a.Certificate) {
				b.X509Authorities = append(b.X509Authorities, a)
			}
		}
		var err error
		if b.JWTAuthorities, err = withJWTAuthorities(b.JWTAuthorities, more.JWTAuthorities, b.WITAuthorities, expired); err != nil {
			return invalidArgument("%s", err)
		}
		if b.WITAuthorities, err = withJWTAuthorities(b.WITAuthorities, more.WITAuthorities, b.JWTAuthorities, expired); err != nil {
			return invalidArgument("%s", err)
		}
		return checkBundleSize(b)
	})
}

// ListFederatedBundles lists the bundles of other trust domains, by name.
func (s *bundleService) ListFederatedBundles(ctx context.Context, req *bundlev1.ListFederatedBundlesRequest) (*bundlev1.ListFederatedBundlesResponse, error) {
	p, err := newPage(req.PageSize, req.PageToken)
	if err != nil {
		return nil, err
	}
	bundles, next := collectPage(p, s.federated(s.registry.View(), p.after), func(b *bundle.Bundle) string { return b.TrustDomain.Name() })
	resp := &bundlev1.ListFederatedBundlesResponse{NextPageToken: next}
	for _, b := range bundles {
		w, err := bundleToWire(b, req.OutputMask)
		if err != nil {
			return nil, status(err)
		}
		resp.Bundles = append(resp.Bundles, w)
	}
	return resp, nil
}

func (s *bundleService) federated(v *registry.View, after string) iter.Seq[*bundle.Bundle] {
	return func(yield func(*bundle.Bundle) bool) {
		for b := range v.Bundles(after) {
			if b.TrustDomain != s.td && !yield(b) {
				return
			}
		}
	}
}

// GetFederatedBundle returns the bundle of another trust domain.
func (s *bundleService) GetFederatedBundle(ctx context.Context, req *bundlev1.GetFederatedBundleRequest) (*types.Bundle, error) {
	td, err := s.foreign(req.TrustDomain)
	if err != nil {
		return nil, err
	}
	return s.answer(s.registry.View().Bundle(td), req.OutputMask)
}

// BatchCreateFederatedBundle stores the bundles of other trust domains, each
// on its own, where there is none yet.
func (s *bundleService) BatchCreateFederatedBundle(ctx context.Context, req *bundlev1.BatchCreateFederatedBundleRequest) (*bundlev1.BatchCreateFederatedBundleResponse, error) {
	if err := checkBatch(len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := &bundlev1.BatchCreateFederatedBundleResponse{}
	for _, w := range req.Bundle {
		b, err := s.put(ctx, w, nil, req.OutputMask, func(exists bool) error {
			if exists {
				return errBundleExists
			}
			return nil
		})
		resp.Results = append(resp.Results, &bundlev1.BatchCreateFederatedBundleResponse_Result{Status: itemStatus(s.log, err), Bundle: b})
	}
	return resp, nil
}

// BatchUpdateFederatedBundle changes the fields that the input mask names of
// the bundles of other trust domains, each on its own.
func (s *bundleService) BatchUpdateFederatedBundle(ctx context.Context, req *bundlev1.BatchUpdateFederatedBundleRequest) (*bundlev1.BatchUpdateFederatedBundleResponse, error) {
	if err := checkBatch(len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := &bundlev1.BatchUpdateFederatedBundleResponse{}
	for _, w := range req.Bundle {
		b, err := s.put(ctx, w, req.InputMask, req.OutputMask, func(exists bool) error {
			if !exists {
				return errNoBundle
			}
			return nil
		})
		resp.Results = append(resp.Results, &bundlev1.BatchUpdateFederatedBundleResponse_Result{Status: itemStatus(s.log, err), Bundle: b})
	}
	return resp, nil
}

// BatchSetFederatedBundle stores the bundles of other trust domains, each on
// its own, whether there is one or not.
func (s *bundleService) BatchSetFederatedBundle(ctx context.Context, req *bundlev1.BatchSetFederatedBundleRequest) (*bundlev1.BatchSetFederatedBundleResponse, error) {
	if err := checkBatch(len(req.Bundle)); err != nil {
		return nil, err
	}
	resp := &bundlev1.BatchSetFederatedBundleResponse{}
	for _, w := range req.Bundle {
		b, err := s.put(ctx, w, nil, req.OutputMask, func(bool) error { return nil })
		resp.Results = append(resp.Results, &bundlev1.BatchSetFederatedBundleResponse_Result{Status: itemStatus(s.log, err), Bundle: b})
	}
	return resp, nil
}

// BatchDeleteFederatedBundle deletes the bundles of other trust domains, each
// on its own. The mode says what becomes of entries that name them.
func (s *bundleService) BatchDeleteFederatedBundle(ctx context.Context, req *bundlev1.BatchDeleteFederatedBundleRequest) (*bundlev1.BatchDeleteFederatedBundleResponse, error) {
	if err := checkBatch(len(req.TrustDomains)); err != nil {
		return nil, err
	}
	var mode registry.DeleteMode
	switch req.Mode {
	case bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT:
		mode = registry.Restrict
	case bundlev1.BatchDeleteFederatedBundleRequest_DELETE:
		mode = registry.Delete
	case bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE:
		mode = registry.Dissociate
	default:
		return nil, invalidArgument("unknown mode of deletion %d", req.Mode)
	}
	resp := &bundlev1.BatchDeleteFederatedBundleResponse{}
	for _, name := range req.TrustDomains {
		td, err := s.foreign(name)
		if err == nil {
			err = s.registry.DeleteBundle(ctx, td, mode)
		}
		resp.Results = append(resp.Results, &bundlev1.BatchDeleteFederatedBundleResponse_Result{Status: itemStatus(s.log, err), TrustDomain: name})
	}
	return resp, nil
}

// put stores the fields of a foreign bundle that a mask names, if the function
// given allows it for a bundle that does, or does not, exist.
func (s *bundleService) put(ctx context.Context, w *types.Bundle, in, out *types.BundleMask, allow func(exists bool) error) (*types.Bundle, error) {
	td, set, err := bundleFromWire(w, in)
	if err != nil {
		return nil, invalidArgument("%s", err)
	}
	if td == s.td {
		return nil, errOwnTrustDomain
	}
	b, err := s.registry.ChangeBundle(ctx, td, func(b *bundle.Bundle) error {
		view := s.registry.View()
		if err := allow(view.Bundle(td) != nil); err != nil {
			return err
		}
		set(b)
		if own := view.Bundle(s.td); own != nil {
			if err := disjoint(own, b); err != nil {
				return err
			}
		}
		return checkBundleSize(b)
	})
	if err != nil {
		return nil, err
	}
	return bundleToWire(b, out)
}

// foreign reads the name of a trust domain that must not be the server's own.
func (s *bundleService) foreign(name string) (spiffeid.TrustDomain, error) {
	td, err := trustDomainFromWire(name)
	if err != nil {
		return td, invalidArgument("%s", err)
	}
	if td == s.td {
		return td, errOwnTrustDomain
	}
	return td, nil
}

func (s *bundleService) answer(b *bundle.Bundle, mask *types.BundleMask) (*types.Bundle, error) {
	if b == nil {
		return nil, errNoBundle
	}
	w, err := bundleToWire(b, mask)
	return w, status(err)
}

// disjoint fails if a key of a bundle is also among the authorities of another
// trust domain: whoever holds a key could sign for both. SPIFFE Trust Domain
// and Bundle §2, §6.2.
func disjoint(b, other *bundle.Bundle) error {
	keys := make(map[string]bool, len(b.X509Authorities)+len(b.JWTAuthorities)+len(b.WITAuthorities))
	for _, a := range b.X509Authorities {
		keys[string(a.Certificate.RawSubjectPublicKeyInfo)] = true
	}
	for _, a := range slices.Concat(b.JWTAuthorities, b.WITAuthorities) {
		der, err := x509.MarshalPKIXPublicKey(a.PublicKey)
		if err != nil {
			return fmt.Errorf("encode authority %q of %s: %w", a.KeyID, b.TrustDomain.Name(), err)
		}
		keys[string(der)] = true
	}
	shared := func(what string) error {
		return invalidArgument("%s has a key of trust domain %q; a key may not serve two trust domains", what, b.TrustDomain.Name())
	}
	for i, a := range other.X509Authorities {
		if keys[string(a.Certificate.RawSubjectPublicKeyInfo)] {
			return shared(fmt.Sprintf("X.509 authority %d", i))
		}
	}
	for kind, as := range map[string][]bundle.JWTAuthority{"JWT": other.JWTAuthorities, "WIT": other.WITAuthorities} {
		for _, a := range as {
			if der, err := x509.MarshalPKIXPublicKey(a.PublicKey); err == nil && keys[string(der)] {
				return shared(fmt.Sprintf("%s authority %q", kind, a.KeyID))
			}
		}
	}
	return nil
}

// checkBundleSize checks what a bundle has become against its bounds.
func checkBundleSize(b *bundle.Bundle) error {
	size := 0
	for _, a := range b.X509Authorities {
		size += len(a.Certificate.Raw)
	}
	for _, a := range slices.Concat(b.JWTAuthorities, b.WITAuthorities) {
		der, err := x509.MarshalPKIXPublicKey(a.PublicKey)
		if err != nil {
			return fmt.Errorf("encode authority %q of %s: %w", a.KeyID, b.TrustDomain.Name(), err)
		}
		size += len(der) + len(a.KeyID)
	}
	for _, n := range []int{len(b.X509Authorities), len(b.JWTAuthorities), len(b.WITAuthorities)} {
		if n > maxAuthorities {
			return callErrorf(codes.ResourceExhausted, "bundle would have %d authorities of one kind; the most is %d", n, maxAuthorities)
		}
	}
	if size > maxBundleBytes {
		return callErrorf(codes.ResourceExhausted, "certificates and keys of the bundle would be %d bytes; the most is %d", size, maxBundleBytes)
	}
	return nil
}
