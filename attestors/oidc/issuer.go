package oidc

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// IssuerConfig is an issuer whose tokens are evidence.
type IssuerConfig struct {
	// Name is what the issuer is called here: at most 63 letters, digits, '-', '_'
	// and '.'. It is a part of SPIFFE IDs. Required.
	Name string `yaml:"name"`

	issuer.Config `yaml:",inline"`

	// Claims become selectors oidc:claim:NAME:VALUE. Each NAME has a claim, or the
	// JSON Pointer of one within another, such as
	// /kubernetes.io/serviceaccount/name. Of a list, /groups/* is each item. Text,
	// whole numbers and truth values have selectors, others none. Default: none.
	Claims map[string]string `yaml:"claims"`
	// Condition is an expression of the Common Expression Language that must be
	// true of a token, as claims.ref == "refs/heads/main". Default: none.
	Condition string `yaml:"condition"`
}

const (
	maxName   = 63
	maxClaims = 100 // that become selectors
	maxValues = 100 // of one list
)

var claimName = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,64}$`)

// Trusted is an issuer whose tokens can be validated: an [issuer.Issuer] or an
// [issuer.TrustDomain].
type Trusted interface {
	URL() string
	Validate(ctx context.Context, token string) (*issuer.Token, error)
	Explain(ctx context.Context, token string) ([]issuer.Check, *issuer.Token)
}

// Issuer makes selectors of an issuer's tokens.
type Issuer struct {
	name      string
	trusted   Trusted
	condition *issuer.Condition // nil: none
	claims    map[string]Claim
}

// NewIssuer makes an Issuer. The audience is for an issuer whose configuration
// names none.
func NewIssuer(c IssuerConfig, audience string, o issuer.Options) (*Issuer, error) {
	if len(c.Audiences) == 0 {
		c.Audiences = []string{audience}
	}
	trusted, err := issuer.New(c.Config, o)
	if err != nil {
		return nil, err
	}
	return NewIssuerOf(c, trusted)
}

// NewIssuerOf makes an Issuer of one that is trusted already: of the
// configuration, name, claims and condition are used.
func NewIssuerOf(c IssuerConfig, trusted Trusted) (*Issuer, error) {
	if err := checkName(c.Name); err != nil {
		return nil, err
	}
	out := &Issuer{name: c.Name, trusted: trusted, claims: make(map[string]Claim)}
	var err error
	if c.Condition != "" {
		if out.condition, err = issuer.ParseCondition(c.Condition); err != nil {
			return nil, fmt.Errorf("condition: %w", err)
		}
	}
	if len(c.Claims) > maxClaims {
		return nil, fmt.Errorf("claims has %d; the most is %d", len(c.Claims), maxClaims)
	}
	for name, path := range c.Claims {
		if !claimName.MatchString(name) {
			return nil, fmt.Errorf("claims has %q; at most 64 letters, digits, '-', '_' and '.' are allowed as a name", attestors.Clip(name))
		}
		if out.claims[name], err = ParseClaim(path); err != nil {
			return nil, fmt.Errorf("claims: %s: %w", name, err)
		}
	}
	return out, nil
}

// checkName checks what an issuer is called.
func checkName(name string) error {
	if name == "" {
		return errors.New("an issuer has no name; give it one")
	}
	if len(name) > maxName || spiffeid.ValidatePathSegment(name) != nil {
		return fmt.Errorf("an issuer is called %q; at most %d letters, digits, '-', '_' and '.' are allowed", attestors.Clip(name), maxName)
	}
	return nil
}

// Name returns what the issuer is called here.
func (i *Issuer) Name() string { return i.name }

// URL returns what the issuer's tokens have as iss.
func (i *Issuer) URL() string { return i.trusted.URL() }

// Verify validates a token and returns what it proves. Its errors are those of
// [issuer.Issuer.Validate], and [issuer.ErrCondition].
func (i *Issuer) Verify(ctx context.Context, token string) (*issuer.Token, []selector.Selector, error) {
	t, err := i.trusted.Validate(ctx, token)
	if err != nil {
		return nil, nil, err
	}
	if err := i.checkCondition(t); err != nil {
		return nil, nil, err
	}
	selectors, err := i.selectors(t)
	if err != nil {
		return nil, nil, err
	}
	return t, selectors, nil
}

// Explain checks a token as [Issuer.Verify] does, but goes on after a check that
// fails. What it says of the token is true only if all checks passed; the token
// is nil if there is nothing that can be read.
func (i *Issuer) Explain(ctx context.Context, token string) ([]issuer.Check, *issuer.Token, []selector.Selector) {
	checks, t := i.trusted.Explain(ctx, token)
	if t == nil {
		return checks, nil, nil
	}
	if i.condition != nil {
		checks = append(checks, issuer.Check{Name: "condition", Err: i.checkCondition(t)})
	}
	selectors, err := i.selectors(t)
	if err != nil {
		checks = append(checks, issuer.Check{Name: "claims", Err: err})
	}
	return checks, t, selectors
}

func (i *Issuer) checkCondition(t *issuer.Token) error {
	if i.condition == nil {
		return nil
	}
	return i.condition.Check(t.Claims)
}

// selectors returns those of a token's claims.
func (i *Issuer) selectors(t *issuer.Token) ([]selector.Selector, error) {
	values := []string{"issuer:" + i.name, "iss:" + t.Issuer, "sub:" + t.Subject}
	for _, name := range slices.Sorted(maps.Keys(i.claims)) {
		found, err := i.claims[name].Values(t.Claims)
		if err != nil {
			return nil, err
		}
		for _, v := range found {
			values = append(values, "claim:"+name+":"+v)
		}
	}
	return attestors.SelectorsOf(Name, values), nil
}

// Claim says where a claim is. The zero value is nowhere.
type Claim struct {
	path []string
	each bool // of a list
}

// ParseClaim reads the name of a claim or the JSON Pointer (RFC 6901) of one
// within another. A pointer that ends in /* is each item of a list.
func ParseClaim(text string) (Claim, error) {
	if text == "" {
		return Claim{}, errors.New("the claim's name is missing")
	}
	if !strings.HasPrefix(text, "/") {
		return Claim{path: []string{text}}, nil
	}
	var c Claim
	rest, each := strings.CutSuffix(text, "/*")
	c.each = each
	for part := range strings.SplitSeq(strings.TrimPrefix(rest, "/"), "/") {
		if strings.Contains(strings.NewReplacer("~0", "", "~1", "").Replace(part), "~") || part == "" {
			return Claim{}, fmt.Errorf("%q is no JSON Pointer to a claim", attestors.Clip(text))
		}
		c.path = append(c.path, strings.NewReplacer("~1", "/", "~0", "~").Replace(part))
	}
	return c, nil
}

// Values returns the values of a claim as text: one, or none if the claim is not
// there or of another type than expected, or those of a list.
func (c Claim) Values(claims map[string]any) ([]string, error) {
	var at any = claims
	for _, name := range c.path {
		object, _ := at.(map[string]any)
		at = object[name]
	}
	if !c.each {
		if text, ok := textOf(at); ok {
			return []string{text}, nil
		}
		return nil, nil
	}
	list, _ := at.([]any)
	if len(list) > maxValues {
		return nil, fmt.Errorf("claim %s has %d values; the most is %d", cmp.Or(strings.Join(c.path, "/"), "?"), len(list), maxValues)
	}
	var out []string
	for _, item := range list {
		if text, ok := textOf(item); ok {
			out = append(out, text)
		}
	}
	return out, nil
}

// textOf returns what is text, a whole number or a truth value, as text.
func textOf(value any) (string, bool) {
	switch v := value.(type) {
	case string:
		return v, v != ""
	case bool:
		return strconv.FormatBool(v), true
	case json.Number:
		n, err := strconv.ParseInt(v.String(), 10, 64)
		return strconv.FormatInt(n, 10), err == nil
	}
	return "", false
}
