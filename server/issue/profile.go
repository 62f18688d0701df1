package issue

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/config"
)

// ProfileConfig says what JWT-SVIDs for some audiences are like. What it does not
// say is as for all others.
type ProfileConfig struct {
	// Audience is the audience, or a pattern of several in which * stands for any
	// characters: sts.amazonaws.com, https://*.example.org. The first profile whose
	// pattern fits counts. Required.
	Audience string `yaml:"audience"`
	// Algorithm that tokens are signed with: RS256, for relying parties that take
	// nothing else, or that of jwt.key_type. Default: that of jwt.key_type.
	Algorithm string `yaml:"algorithm" oneof:"ES256,ES384,RS256"`
	// Issuer is the claim iss. Default: that of jwt.issuer.
	Issuer string `yaml:"issuer" env:"expand"`
	// MaxLifetime is how long tokens last at most. Default: as their entries say.
	MaxLifetime config.Duration `yaml:"max_lifetime"`
	// Claims are claims besides those that every token has, as text. In it
	// {spiffe_id}, {trust_domain} and {path} stand for what the SPIFFE ID has, and
	// {segment.1} for the first segment of its path; {{ is a brace. Where the path
	// has no such segment, no token is issued. Default: none.
	Claims map[string]string `yaml:"claims"`
	// ListClaims are claims whose values are lists of text. Default: none.
	ListClaims map[string][]string `yaml:"list_claims"`
}

// Bounds of profiles. A token goes into the header of a request.
const (
	MaxProfiles    = 100
	maxClaims      = 32
	maxClaimName   = 256  // bytes
	maxClaimValues = 32   // of a list
	maxClaimBytes  = 2048 // of one text, in the configuration
	maxIssuerBytes = 2048
	maxSegment     = 32
)

// reservedClaims say whose a token is, for whom and for how long, who holds it
// (RFC 7519 §4.1, RFC 7800 §3.1), who may act for whom (RFC 8693 §4), and where
// its status is.
var reservedClaims = []string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "cnf", "act", "may_act", "status"}

// Profile is what JWT-SVIDs for some audiences are like. [NewProfile] makes it.
type Profile struct {
	pattern string
	rs256   bool // by the authority that is there for it
	issuer  string
	most    time.Duration // 0: no bound
	claims  []claim       // by name
}

// claim is a claim besides those that every token has.
type claim struct {
	name   string
	list   bool
	values []template
}

// NewProfile makes a profile of a configuration. The algorithm is that of the
// JWT authority.
func NewProfile(c ProfileConfig, algorithm jose.SignatureAlgorithm) (*Profile, error) {
	p := &Profile{pattern: c.Audience, issuer: c.Issuer, most: time.Duration(c.MaxLifetime)}
	switch {
	case c.Audience == "":
		return nil, errors.New("audience is missing; name whom tokens of the profile are for")
	case len(c.Audience) > MaxAudience || !utf8.ValidString(c.Audience):
		return nil, fmt.Errorf("audience is not UTF-8 text of at most %d bytes", MaxAudience)
	case len(c.Issuer) > maxIssuerBytes || !utf8.ValidString(c.Issuer):
		return nil, fmt.Errorf("issuer is not UTF-8 text of at most %d bytes", maxIssuerBytes)
	case p.most != 0 && (p.most < time.Second || p.most%time.Second != 0):
		return nil, fmt.Errorf("max_lifetime %s is not a whole number of seconds, at least one", c.MaxLifetime)
	case len(c.Claims)+len(c.ListClaims) > maxClaims:
		return nil, fmt.Errorf("it has %d claims; the most is %d", len(c.Claims)+len(c.ListClaims), maxClaims)
	}
	switch c.Algorithm {
	case "", string(algorithm):
	case string(jose.RS256):
		p.rs256 = true
	default:
		return nil, fmt.Errorf("algorithm %s is not that of jwt.key_type, which is %s, nor RS256", c.Algorithm, algorithm)
	}
	add := func(name string, list bool, values []string) error {
		if err := checkClaimName(name); err != nil {
			return err
		}
		if len(values) > maxClaimValues {
			return fmt.Errorf("claim %q has %d values; the most is %d", name, len(values), maxClaimValues)
		}
		made := claim{name: name, list: list}
		for _, text := range values {
			t, err := parseTemplate(text)
			if err != nil {
				return fmt.Errorf("claim %q: %w", name, err)
			}
			made.values = append(made.values, t)
		}
		p.claims = append(p.claims, made)
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(c.Claims)) {
		if err := add(name, false, []string{c.Claims[name]}); err != nil {
			return nil, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.ListClaims)) {
		if _, twice := c.Claims[name]; twice {
			return nil, fmt.Errorf("claim %q is in claims and in list_claims", name)
		}
		if err := add(name, true, c.ListClaims[name]); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// RS256 reports whether the profile needs an authority besides that of all other
// tokens.
func (p *Profile) RS256() bool { return p.rs256 }

// checkClaimName refuses the names of claims that decide whose a token is,
// however they are written: some readers of JSON do not tell cases apart.
func checkClaimName(name string) error {
	switch {
	case name == "" || len(name) > maxClaimName || !utf8.ValidString(name):
		return fmt.Errorf("a claim's name is not UTF-8 text of 1 to %d bytes", maxClaimName)
	case slices.ContainsFunc(reservedClaims, func(r string) bool { return strings.EqualFold(r, name) }):
		return fmt.Errorf("claim %q is reserved: it says whose the token is, for whom, or for how long", name)
	}
	return nil
}

// fits reports whether the profile is for an audience.
func (p *Profile) fits(audience string) bool {
	parts := strings.Split(p.pattern, "*")
	if len(parts) == 1 {
		return audience == p.pattern
	}
	first, last := parts[0], parts[len(parts)-1]
	if len(audience) < len(first)+len(last) || !strings.HasPrefix(audience, first) || !strings.HasSuffix(audience, last) {
		return false
	}
	rest := audience[len(first) : len(audience)-len(last)]
	for _, part := range parts[1 : len(parts)-1] {
		at := strings.Index(rest, part)
		if at < 0 {
			return false
		}
		rest = rest[at+len(part):]
	}
	return true
}

// profileOf returns the profile of an audience; nil is none. One token is of one
// profile: what one relying party is promised holds of all that can use it.
func (i *Issuer) profileOf(audience []string) (*Profile, error) {
	if len(i.profiles) == 0 {
		return nil, nil
	}
	find := func(audience string) *Profile {
		for _, p := range i.profiles {
			if p.fits(audience) {
				return p
			}
		}
		return nil
	}
	p := find(audience[0])
	for _, a := range audience[1:] {
		if find(a) != p {
			return nil, invalid("tokens for the audiences %.200q and %.200q are of different profiles; ask for one each", audience[0], a)
		}
	}
	return p, nil
}

// appendClaims appends the profile's claims of an ID, each after a comma.
func (p *Profile) appendClaims(b []byte, id spiffeid.ID) ([]byte, error) {
	for _, c := range p.claims {
		b = append(b, ',')
		b = appendString(b, c.name)
		b = append(b, ':')
		if c.list {
			b = append(b, '[')
		}
		for n, t := range c.values {
			if n > 0 {
				b = append(b, ',')
			}
			text, err := t.of(id)
			if err != nil {
				return nil, invalid("no token for this audience: claim %q: %v", c.name, err)
			}
			b = appendString(b, text)
		}
		if c.list {
			b = append(b, ']')
		}
	}
	return b, nil
}

// template is text in which parts stand for those of a SPIFFE ID.
type template []part

type part struct {
	text    string // if there is no source
	source  string
	segment int // of the path, from 1; with source segment
}

const (
	sourceID      = "spiffe_id"
	sourceDomain  = "trust_domain"
	sourcePath    = "path"
	sourceSegment = "segment"
)

func parseTemplate(text string) (template, error) {
	if len(text) > maxClaimBytes || !utf8.ValidString(text) {
		return nil, fmt.Errorf("its text is not UTF-8 of at most %d bytes", maxClaimBytes)
	}
	var out template
	for text != "" {
		at := strings.IndexByte(text, '{')
		switch {
		case at < 0:
			return append(out, part{text: text}), nil
		case strings.HasPrefix(text[at:], "{{"):
			out = append(out, part{text: text[:at+1]})
			text = text[at+2:]
			continue
		}
		if at > 0 {
			out = append(out, part{text: text[:at]})
		}
		name, rest, closed := strings.Cut(text[at+1:], "}")
		if !closed {
			return nil, fmt.Errorf("%q has no closing brace; write {{ for a brace", text[at:])
		}
		p := part{source: name}
		if number, ok := strings.CutPrefix(name, sourceSegment+"."); ok {
			n, err := strconv.ParseUint(number, 10, 8)
			if err != nil || n < 1 || n > maxSegment || strconv.FormatUint(n, 10) != number {
				return nil, fmt.Errorf("{%s} names no segment; write {segment.1} to {segment.%d}", name, maxSegment)
			}
			p.source, p.segment = sourceSegment, int(n)
		} else if !slices.Contains([]string{sourceID, sourceDomain, sourcePath}, name) {
			return nil, fmt.Errorf("{%s} is nothing that there is; write {spiffe_id}, {trust_domain}, {path}, {segment.1}, or {{ for a brace", name)
		}
		out, text = append(out, p), rest
	}
	return out, nil
}

func (t template) of(id spiffeid.ID) (string, error) {
	var b strings.Builder
	for _, p := range t {
		switch p.source {
		case "":
			b.WriteString(p.text)
		case sourceID:
			b.WriteString(id.String())
		case sourceDomain:
			b.WriteString(id.TrustDomain().Name())
		case sourcePath:
			b.WriteString(id.Path())
		case sourceSegment:
			segments := strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
			if len(segments) < p.segment {
				return "", fmt.Errorf("the path of %s has no segment %d", id, p.segment)
			}
			b.WriteString(segments[p.segment-1])
		}
	}
	return b.String(), nil
}
