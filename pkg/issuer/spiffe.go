package issuer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
)

// TrustDomain is a trust domain of SPIFFE whose JWT-SVIDs are tokens. Their
// issuer is the ID of the trust domain, whatever their claim iss says.
type TrustDomain struct {
	td     spiffeid.TrustDomain
	base   Issuer // of which the keys are not used
	bundle func() *bundle.Bundle
}

// NewTrustDomain trusts a trust domain whose bundle the function returns, or nil
// while there is none. Of the configuration, Audiences and MaxAge are used.
func NewTrustDomain(td spiffeid.TrustDomain, c Config, bundle func() *bundle.Bundle, o Options) (*TrustDomain, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if len(c.Audiences) == 0 || slices.Contains(c.Audiences, "") {
		return nil, errors.New("audiences is missing, or has an empty item")
	}
	base := Issuer{issuer: td.IDString(), audiences: c.Audiences, maxAge: cmp.Or(time.Duration(c.MaxAge), DefaultMaxAge), now: o.Now}
	if base.maxAge < time.Second || base.maxAge > longestAge {
		return nil, fmt.Errorf("max_age %s is not between 1s and 30d", base.maxAge)
	}
	return &TrustDomain{td, base, bundle}, nil
}

// URL returns the ID of the trust domain.
func (d *TrustDomain) URL() string { return d.base.issuer }

// Validate checks a JWT-SVID as [jwtsvid.Validate] does, and besides that it is
// for the audience alone and says when it was issued.
func (d *TrustDomain) Validate(_ context.Context, token string) (*Token, error) {
	if _, err := d.svid(token); err != nil {
		return nil, err
	}
	t, err := jwt.Parse(token)
	if err != nil {
		return nil, err
	}
	return d.base.claims(t)
}

// svid validates a JWT-SVID of the trust domain.
func (d *TrustDomain) svid(token string) (*jwtsvid.SVID, error) {
	known := d.bundle()
	if known == nil {
		return nil, fmt.Errorf("%w: there is no bundle of %q", ErrUnavailable, d.td.Name())
	}
	return jwtsvid.Validate(token, d.base.audiences, func(td spiffeid.TrustDomain) *bundle.Bundle {
		if td != d.td {
			return nil
		}
		return known
	}, d.base.now())
}
