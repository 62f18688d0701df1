// Package jwtsvid validates JWT-SVIDs as the standard demands: a closed header,
// an algorithm that is allowed before any key is looked up, a signature by a
// JWT key of the subject's own trust domain, an audience that is meant, and
// time. [Validate] is all of it; it does no I/O and knows no clock.
package jwtsvid

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

const (
	// MaxToken is how long a token may be, in bytes: room for the longest
	// SPIFFE ID, many audiences and some claims.
	MaxToken = 32 << 10
	// Leeway is how far the clocks of issuer and validator may differ.
	Leeway = 30 * time.Second

	maxSPIFFEID    = 2048 // bytes; SPIFFE-ID §2.3
	maxTrustDomain = 255  // bytes; SPIFFE-ID §2.3
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
	h, payload, signed, signature, err := split(token)
	if err != nil {
		return nil, err
	}
	claims, err := decodeObject(payload)
	if err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	id, err := subject(claims)
	if err != nil {
		return nil, err
	}
	b := bundles(id.TrustDomain())
	if b == nil {
		return nil, fmt.Errorf("no bundle for trust domain %q", id.TrustDomain().Name())
	}
	if err := h.verify(b, signed, signature); err != nil {
		return nil, err
	}
	s := &SVID{ID: id, Claims: claims}
	if s.Audience, err = audienceOf(claims); err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(audience, func(a string) bool { return slices.Contains(s.Audience, a) }) {
		return nil, fmt.Errorf("the token is for audience %q, not for %q", s.Audience, audience)
	}
	if s.ExpiresAt, err = checkTimes(claims, now); err != nil {
		return nil, err
	}
	return s, nil
}

// header is the JOSE header. JWT-SVID §2: it has no other members.
type header struct {
	alg    algorithm
	kid    string
	hasKID bool
}

// split takes a token of the compact form apart: JSON forms, encrypted and
// detached ones are none.
func split(token string) (h header, payload, signed, signature []byte, err error) {
	if len(token) > MaxToken {
		return header{}, nil, nil, nil, fmt.Errorf("the token is %d bytes long; the most is %d", len(token), MaxToken)
	}
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return header{}, nil, nil, nil, fmt.Errorf("the token has %d parts instead of three: it is no JWT in compact form", len(parts))
	}
	raw, err := decodePart(parts[0])
	if err != nil {
		return header{}, nil, nil, nil, fmt.Errorf("header: %w", err)
	}
	if h, err = parseHeader(raw); err != nil {
		return header{}, nil, nil, nil, fmt.Errorf("header: %w", err)
	}
	if payload, err = decodePart(parts[1]); err != nil {
		return header{}, nil, nil, nil, fmt.Errorf("claims: %w", err)
	}
	if signature, err = decodePart(parts[2]); err != nil {
		return header{}, nil, nil, nil, fmt.Errorf("signature: %w", err)
	}
	return h, payload, []byte(parts[0] + "." + parts[1]), signature, nil
}

var encoding = base64.RawURLEncoding.Strict()

func decodePart(s string) ([]byte, error) {
	if s == "" {
		return nil, errors.New("it is empty")
	}
	if strings.ContainsAny(s, "\r\n") { // which the decoder would skip
		return nil, errors.New("it is not base64url: it has line breaks")
	}
	b, err := encoding.DecodeString(s)
	if err != nil {
		return nil, errors.New("it is not base64url without padding")
	}
	return b, nil
}

func parseHeader(raw []byte) (header, error) {
	members, err := decodeObject(raw)
	if err != nil {
		return header{}, err
	}
	var h header
	for name, value := range members {
		text, ok := value.(string)
		if !ok && (name == "alg" || name == "kid" || name == "typ") {
			return header{}, fmt.Errorf("%q is not a string", name)
		}
		switch name {
		case "alg":
			if h.alg, ok = algorithms[text]; !ok {
				return header{}, fmt.Errorf("algorithm %q is not allowed", text)
			}
		case "kid":
			h.kid, h.hasKID = text, true
		case "typ":
			if text != "JWT" && text != "JOSE" { // JWT-SVID §2.3
				return header{}, fmt.Errorf("type %q is not that of a JWT-SVID", text)
			}
		default:
			return header{}, fmt.Errorf("a JWT-SVID has no member %q", name)
		}
	}
	if h.alg == (algorithm{}) {
		return header{}, errors.New("it names no algorithm")
	}
	return h, nil
}

func subject(claims map[string]any) (spiffeid.ID, error) {
	sub, ok := claims["sub"].(string)
	if !ok {
		return spiffeid.ID{}, errors.New("claim sub is missing or not a string")
	}
	if len(sub) > maxSPIFFEID {
		return spiffeid.ID{}, fmt.Errorf("claim sub is %d bytes long; a SPIFFE ID has at most %d", len(sub), maxSPIFFEID)
	}
	id, err := spiffeid.FromString(sub)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("claim sub: %w", err)
	}
	if n := len(id.TrustDomain().Name()); n > maxTrustDomain {
		return spiffeid.ID{}, fmt.Errorf("claim sub: the trust domain is %d bytes long; the most is %d", n, maxTrustDomain)
	}
	return id, nil
}

func audienceOf(claims map[string]any) ([]string, error) {
	switch aud := claims["aud"].(type) {
	case string:
		return []string{aud}, nil
	case []any:
		out := make([]string, 0, len(aud))
		for _, a := range aud {
			text, ok := a.(string)
			if !ok {
				return nil, errors.New("claim aud has a value that is not a string")
			}
			out = append(out, text)
		}
		if len(out) > 0 {
			return out, nil
		}
	}
	return nil, errors.New("claim aud is missing, empty or of a wrong type")
}

// checkTimes returns the token's end. A token is not valid before nbf; iat says
// nothing of that (RFC 7519 §4.1.6).
func checkTimes(claims map[string]any, now time.Time) (time.Time, error) {
	exp, err := numericDate(claims, "exp")
	if err != nil {
		return time.Time{}, err
	}
	if !now.Before(exp.Add(Leeway)) {
		return time.Time{}, fmt.Errorf("the token expired at %s", exp.UTC().Format(time.RFC3339))
	}
	if _, ok := claims["nbf"]; ok {
		nbf, err := numericDate(claims, "nbf")
		if err != nil {
			return time.Time{}, err
		}
		if now.Add(Leeway).Before(nbf) {
			return time.Time{}, fmt.Errorf("the token is not valid before %s", nbf.UTC().Format(time.RFC3339))
		}
	}
	return exp, nil
}

// lastSecond is the end of the year 9999, the last that dates are written in.
const lastSecond = 253402300799

func numericDate(claims map[string]any, name string) (time.Time, error) {
	n, ok := claims[name].(json.Number)
	if !ok {
		return time.Time{}, fmt.Errorf("claim %s is missing or not a number", name)
	}
	if seconds, err := strconv.ParseInt(n.String(), 10, 64); err == nil && seconds >= 0 && seconds <= lastSecond {
		return time.Unix(seconds, 0), nil
	}
	f, err := n.Float64()
	if err != nil || f < 0 || f > lastSecond {
		return time.Time{}, fmt.Errorf("claim %s is not a date", name)
	}
	whole, fraction := math.Modf(f)
	return time.Unix(int64(whole), int64(fraction*1e9)), nil
}
