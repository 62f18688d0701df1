// Package jwtsvid validates JWT-SVIDs as the standard demands: a closed header,
// an algorithm that is allowed before any key is looked up, a signature by a
// JWT key of the subject's own trust domain, an audience that is meant, and
// time. [Validate] is all of it; it does no I/O and knows no clock.
package jwtsvid

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

const (
	// MaxToken is how long a token may be, in bytes.
	MaxToken = jwt.MaxToken
	// Leeway is how far the clocks of issuer and validator may differ.
	Leeway = jwt.Leeway

	// maxTried is how many keys a token without a key ID is tried with.
	maxTried = 16
)

// SVID is a JWT-SVID that was valid when it was looked at.
type SVID struct {
	ID        spiffeid.ID
	Audience  []string
	ExpiresAt time.Time
	// Claims are all claims, as encoding/json decodes them, with numbers as
	// json.Number.
	Claims map[string]any
}

// Validate checks a token for a validator that goes by any of the names in
// audience, at now. The function bundles returns the bundle of a trust domain,
// or nil if it is not trusted. The error says what is wrong with the token; it
// holds nothing of the token but names of headers, claims and IDs.
func Validate(token string, audience []string, bundles func(spiffeid.TrustDomain) *bundle.Bundle, now time.Time) (*SVID, error) {
	if len(audience) == 0 || slices.Contains(audience, "") {
		return nil, errors.New("no audience to validate for")
	}
	t, err := jwt.Parse(token)
	if err != nil {
		return nil, err
	}
	if err := checkHeader(t); err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	id, err := t.Subject()
	if err != nil {
		return nil, err
	}
	b := bundles(id.TrustDomain())
	if b == nil {
		return nil, fmt.Errorf("no bundle for trust domain %q", id.TrustDomain().Name())
	}
	if err := verify(t, b); err != nil {
		return nil, err
	}
	s := &SVID{ID: id, Claims: t.Claims}
	if s.Audience, err = t.Audience(); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(audience, func(a string) bool { return slices.Contains(s.Audience, a) }) {
		return nil, fmt.Errorf("the token is for audience %q, not for %q", s.Audience, audience)
	}
	if s.ExpiresAt, _, err = t.ValidAt(now); err != nil {
		return nil, err
	}
	return s, nil
}

// checkHeader checks the JOSE header. JWT-SVID §2: it has no other members.
func checkHeader(t *jwt.Token) error {
	for name := range t.Header {
		if name != "alg" && name != "kid" && name != "typ" {
			return fmt.Errorf("a JWT-SVID has no member %q", name)
		}
	}
	if typ, ok := t.HeaderText("typ"); ok && typ != "JWT" && typ != "JOSE" { // JWT-SVID §2.3
		return fmt.Errorf("type %q is not that of a JWT-SVID", typ)
	}
	return nil
}

// verify checks the signature with the key that the header names, or, since a
// key ID is optional, with each JWT key of the bundle that fits the algorithm.
func verify(t *jwt.Token, b *bundle.Bundle) error {
	if len(b.JWTAuthorities) == 0 {
		return fmt.Errorf("trust domain %q has no keys for JWT-SVIDs", b.TrustDomain.Name())
	}
	if kid, ok := t.HeaderText("kid"); ok {
		key := b.JWTKey(kid)
		if key == nil {
			return fmt.Errorf("trust domain %q has no JWT key with this key ID", b.TrustDomain.Name())
		}
		return t.Verify(key)
	}
	tried := 0
	for _, a := range b.JWTAuthorities {
		if t.Algorithm.Fits(a.PublicKey) != nil {
			continue
		}
		if tried++; tried > maxTried {
			break
		}
		if t.Verify(a.PublicKey) == nil {
			return nil
		}
	}
	return jwt.ErrSignature
}
