// Package issuer trusts outside issuers of signed JSON Web Tokens, such as
// OpenID Connect providers, and validates their tokens. An [Issuer], made by
// [New] from a [Config], has the issuer's keys and says of a token what it
// proves ([Issuer.Validate]); what that is good for is for the caller to say.
//
// A token that is refused has an error that says what is wrong with it and may
// be told to whoever showed it. That the keys cannot be had is [ErrUnavailable].
package issuer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/internal/jwt"
)

// Config says which issuer is trusted, where its keys are, and what its tokens
// must be like.
type Config struct {
	// Issuer is what the tokens' claim iss must be, byte for byte: an https URL
	// without query and fragment. Required.
	Issuer string `yaml:"issuer" env:"expand"`
	// Audiences are what tokens may be for: each value of a token's claim aud must
	// be one of these. A token that is for others too could be shown by them.
	// Required, where no default is named.
	Audiences []string `yaml:"audiences"`
	// Algorithms are those that tokens may be signed with: RS256, RS384, RS512,
	// PS256, PS384, PS512, ES256, ES384, ES512. Default: all of them.
	Algorithms []string `yaml:"algorithms"`
	// MaxAge is how long after its claim iat a token is taken, though it last
	// longer; at most 30d. Default 1h.
	MaxAge config.Duration `yaml:"max_age"`

	// JWKSURL is where the issuer's keys are. Default: where its discovery
	// document (/.well-known/openid-configuration) says, which is fetched.
	JWKSURL string `yaml:"jwks_url" env:"expand"`
	// JWKSPath is a file of the issuer's keys (a JWK Set), with which nothing is
	// fetched. It is read for each token. Default: none.
	JWKSPath string `yaml:"jwks_path" env:"expand"`
	// JWKSHosts are the host or host:port on which the discovery document may say
	// that the keys are, besides the issuer's own. Default: none.
	JWKSHosts []string `yaml:"jwks_hosts"`
	// CAPath is a PEM file of authorities that certificates of the issuer must
	// lead to. Read at the start. Default: those of the operating system.
	CAPath string `yaml:"ca_path" env:"expand"`
	// AllowLoopback allows http to 127.0.0.1, ::1 and localhost. For trials.
	AllowLoopback bool `yaml:"allow_loopback"`
}

const (
	// DefaultMaxAge is how long after it was issued a token is taken.
	DefaultMaxAge = time.Hour
	// Leeway is how far the clocks of issuer and validator may differ.
	Leeway = jwt.Leeway
	// MaxToken is how long a token may be, in bytes.
	MaxToken = jwt.MaxToken

	longestAge = 30 * 24 * time.Hour
	maxListed  = 100  // audiences, or hosts
	maxURL     = 2048 // bytes
	maxSubject = 2048 // bytes; as long as a SPIFFE ID
	maxID      = 1024 // bytes of the claim jti
)

// ErrUnavailable is what [Issuer.Validate] returns, wrapped, when the issuer's
// keys cannot be had: the token may be good. Its text is for the log.
var ErrUnavailable = errors.New("the issuer's keys cannot be had now")

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Issuer is an issuer that is trusted. It is safe for concurrent use.
type Issuer struct {
	issuer     string
	audiences  []string
	algorithms []string
	maxAge     time.Duration
	now        func() time.Time
	keys       source
}

// source is where the keys of an issuer are.
type source interface {
	// find returns the keys that may have signed a token whose header names a key
	// and an algorithm: none, if the issuer has none. The key's name may be empty.
	find(ctx context.Context, kid string, a jwt.Algorithm) ([]key, error)
}

// New makes an Issuer. It fails if the configuration contradicts itself, or if
// a file of it cannot be read; nothing is fetched yet.
func New(c Config, o Options) (*Issuer, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	i := &Issuer{issuer: c.Issuer, audiences: c.Audiences, algorithms: c.Algorithms, maxAge: time.Duration(c.MaxAge), now: o.Now}
	i.maxAge = cmp.Or(i.maxAge, DefaultMaxAge)
	if c.Issuer == "" {
		return nil, errors.New("issuer is missing; write the URL that its tokens have as iss")
	}
	at, err := parseURL(c.Issuer, c.AllowLoopback)
	if err == nil && (at.RawQuery != "" || at.ForceQuery) { // OpenID Connect Discovery §3
		err = errors.New("it has a query")
	}
	if err != nil {
		return nil, fmt.Errorf("issuer %q: %w", clip(c.Issuer), err)
	}
	switch {
	case len(c.Audiences) == 0:
		return nil, errors.New("audiences is missing; name what tokens for this server are for")
	case len(c.Audiences) > maxListed || len(c.JWKSHosts) > maxListed:
		return nil, fmt.Errorf("audiences and jwks_hosts have at most %d items each", maxListed)
	case slices.Contains(c.Audiences, ""):
		return nil, errors.New("audiences has an empty item")
	case i.maxAge < time.Second || i.maxAge > longestAge:
		return nil, fmt.Errorf("max_age %s is not between 1s and 30d", i.maxAge)
	case c.JWKSPath != "" && (c.JWKSURL != "" || len(c.JWKSHosts) > 0 || c.CAPath != ""):
		return nil, errors.New("with jwks_path nothing is fetched; remove jwks_url, jwks_hosts and ca_path, or jwks_path")
	case c.JWKSURL != "" && len(c.JWKSHosts) > 0:
		return nil, errors.New("with jwks_url nothing is discovered; remove jwks_hosts, or jwks_url")
	}
	for _, name := range c.Algorithms {
		if _, err := jwt.AlgorithmOf(name); err != nil {
			return nil, fmt.Errorf("algorithms: %w", err)
		}
	}
	if c.JWKSPath != "" {
		f := &file{path: c.JWKSPath}
		if _, err := f.load(); err != nil {
			return nil, fmt.Errorf("jwks_path: %w", err)
		}
		i.keys = f
		return i, nil
	}
	i.keys, err = newRemote(c, at, o)
	return i, err
}

// URL returns the issuer's identifier, which its tokens have as iss.
func (i *Issuer) URL() string { return i.issuer }

// Audiences returns what tokens may be for.
func (i *Issuer) Audiences() []string { return slices.Clone(i.audiences) }

// Token is a token that was valid when it was looked at.
type Token struct {
	Issuer, Subject string
	Audience        []string
	ID              string // claim jti; empty: it has none
	IssuedAt        time.Time
	ExpiresAt       time.Time
	// Claims are all claims, as encoding/json decodes them, with numbers as
	// json.Number.
	Claims map[string]any

	use   [32]byte  // what it is remembered by when it is used
	until time.Time // when it can be forgotten
}

// Of returns the issuer that a token says it is of, which is not verified: it
// says by whom to have it validated.
func Of(token string) (string, error) {
	iss, _, err := Claimed(token)
	if err == nil && iss == "" {
		err = errors.New("claim iss is missing or not a string")
	}
	return iss, err
}

// Claimed returns the claims iss and sub of a token, which are not verified: they
// say by whom to have it validated. One that is missing or no string is empty.
func Claimed(token string) (iss, sub string, err error) {
	t, err := jwt.Parse(token)
	if err != nil {
		return "", "", err
	}
	iss, _ = t.Claims["iss"].(string)
	sub, _ = t.Claims["sub"].(string)
	return iss, sub, nil
}

// Validate checks a token: its form, its algorithm, its signature by a key of
// the issuer, and that it is of the issuer, for the audience and of the time.
func (i *Issuer) Validate(ctx context.Context, token string) (*Token, error) {
	t, err := jwt.Parse(token)
	if err != nil {
		return nil, err
	}
	// Before any key is fetched: whatever is not of the issuer makes no work.
	for _, check := range []func(*jwt.Token) error{i.checkHeader, i.checkAlgorithm, i.checkIssuer} {
		if err := check(t); err != nil {
			return nil, err
		}
	}
	out, err := i.claims(t)
	if err != nil {
		return nil, err
	}
	if err := i.checkSignature(ctx, t); err != nil {
		return nil, err
	}
	return out, nil
}

func (i *Issuer) checkHeader(t *jwt.Token) error {
	if err := checkHeader(t); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	return nil
}

func (i *Issuer) checkAlgorithm(t *jwt.Token) error {
	if len(i.algorithms) > 0 && !slices.Contains(i.algorithms, t.Algorithm.Name) {
		return fmt.Errorf("header: algorithm %q is not allowed", t.Algorithm.Name)
	}
	return nil
}

func (i *Issuer) checkIssuer(t *jwt.Token) error {
	if iss, ok := t.Claims["iss"].(string); !ok {
		return errors.New("claim iss is missing or not a string")
	} else if iss != i.issuer {
		return fmt.Errorf("claim iss is %q, not %q", clip(iss), i.issuer)
	}
	return nil
}

func (i *Issuer) checkSignature(ctx context.Context, t *jwt.Token) error {
	kid, _ := t.HeaderText("kid")
	keys, err := i.keys.find(ctx, kid, t.Algorithm)
	if err != nil {
		return err
	}
	if len(keys) == 0 {
		return errors.New("the issuer has no key that the token's header names and that fits its algorithm")
	}
	for _, k := range keys {
		if t.Verify(k.public) == nil {
			return nil
		}
	}
	return jwt.ErrSignature
}

// checkHeader refuses what would bring a key along or change what is signed,
// and other kinds of token (RFC 8725 §3.11). What else a header has says
// nothing to us, such as the thumbprints of certificates that some issuers name.
func checkHeader(t *jwt.Token) error {
	for _, name := range []string{"jwk", "jku", "x5c", "x5u", "crit", "b64", "zip", "cty", "enc"} {
		if _, ok := t.Header[name]; ok {
			return fmt.Errorf("%q is not allowed", name)
		}
	}
	if typ, ok := t.HeaderText("typ"); ok && !strings.EqualFold(typ, "JWT") && typ != "JOSE" {
		return fmt.Errorf("type %q is not that of an ID token", clip(typ))
	}
	return nil
}

// claims checks the claims that every token has.
func (i *Issuer) claims(t *jwt.Token) (*Token, error) {
	out := i.tokenOf(t)
	for _, c := range claimChecks {
		if err := c.check(i, t, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// tokenOf begins with a token of which nothing was checked.
func (i *Issuer) tokenOf(t *jwt.Token) *Token { return &Token{Issuer: i.issuer, Claims: t.Claims} }

// claimChecks are the checks of claims, in their order. Each sets what it has
// checked.
var claimChecks = []struct {
	name  string
	check func(i *Issuer, t *jwt.Token, out *Token) error
}{
	{"subject", func(_ *Issuer, t *jwt.Token, out *Token) (err error) {
		out.Subject, err = text(t, "sub", maxSubject)
		return err
	}},
	{"audience", func(i *Issuer, t *jwt.Token, out *Token) (err error) {
		if out.Audience, err = t.Audience(); err != nil {
			return err
		}
		for _, a := range out.Audience {
			if !slices.Contains(i.audiences, a) {
				return fmt.Errorf("the token is for audience %q, not for %q alone", clip(a), i.audiences)
			}
		}
		return nil
	}},
	{"time", func(i *Issuer, t *jwt.Token, out *Token) (err error) {
		out.ExpiresAt, _, err = t.ValidAt(i.now())
		return err
	}},
	{"age", (*Issuer).checkAge},
	{"id", func(_ *Issuer, t *jwt.Token, out *Token) (err error) {
		if _, ok := t.Claims["jti"]; ok {
			out.ID, err = text(t, "jti", maxID)
		}
		out.use = useOf(out, t)
		return err
	}},
}

// checkAge checks when a token was issued, and says until when it is remembered.
func (i *Issuer) checkAge(t *jwt.Token, out *Token) (err error) {
	if out.IssuedAt, err = t.Date("iat"); err != nil {
		return err
	}
	now := i.now()
	switch {
	case now.Add(Leeway).Before(out.IssuedAt):
		return fmt.Errorf("the token says that it was issued in the future, at %s", out.IssuedAt.UTC().Format(time.RFC3339))
	case !out.ExpiresAt.IsZero() && out.ExpiresAt.Before(out.IssuedAt):
		return errors.New("the token expires before it is issued")
	case !now.Before(out.IssuedAt.Add(i.maxAge + Leeway)):
		return fmt.Errorf("the token was issued at %s; it is taken for %s", out.IssuedAt.UTC().Format(time.RFC3339), i.maxAge)
	}
	out.until = out.ExpiresAt
	if end := out.IssuedAt.Add(i.maxAge); end.Before(out.until) {
		out.until = end
	}
	out.until = out.until.Add(Leeway)
	return nil
}

// text returns a claim that is text people can tell apart: nothing invisible.
func text(t *jwt.Token, name string, most int) (string, error) {
	value, ok := t.Claims[name].(string)
	switch {
	case !ok || value == "":
		return "", fmt.Errorf("claim %s is missing, empty or not a string", name)
	case len(value) > most:
		return "", fmt.Errorf("claim %s is %d bytes long; the most is %d", name, len(value), most)
	case strings.ContainsFunc(value, func(r rune) bool { return unicode.IsControl(r) || unicode.Is(unicode.Cf, r) }):
		return "", fmt.Errorf("claim %s has characters that cannot be seen", name)
	}
	return value, nil
}

// parseURL reads a URL from which keys may come.
func parseURL(text string, loopback bool) (*url.URL, error) {
	if len(text) > maxURL {
		return nil, fmt.Errorf("it is %d bytes long; the most is %d", len(text), maxURL)
	}
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("it is no URL")
	}
	switch {
	case u.Scheme == "http" && loopback && isLoopback(u.Hostname()):
	case u.Scheme != "https":
		return nil, errors.New("it is not https")
	}
	switch {
	case u.Hostname() == "" || u.Opaque != "":
		return nil, errors.New("it names no host")
	case u.User != nil:
		return nil, errors.New("it has a user or a password")
	case u.Fragment != "" || strings.HasSuffix(text, "#"):
		return nil, errors.New("it has a fragment")
	}
	return u, nil
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// origin returns the host and port of a URL, in the one way to write them.
func origin(u *url.URL) string {
	port := cmp.Or(u.Port(), map[string]string{"https": "443", "http": "80"}[u.Scheme])
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// clip bounds a text that somebody else wrote, for an error.
func clip(text string) string {
	const longest = 100 // bytes
	if len(text) <= longest {
		return text
	}
	return strings.ToValidUTF8(text[:longest], "") + "…"
}
