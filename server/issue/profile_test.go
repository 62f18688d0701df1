package issue_test

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
)

func profile(tb testing.TB, c issue.ProfileConfig) *issue.Profile {
	tb.Helper()
	p, err := issue.NewProfile(c, jose.ES256)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

func withProfiles(profiles ...*issue.Profile) func(*issue.Options) {
	return func(o *issue.Options) { o.Profiles, o.JWTIssuer = profiles, "https://id.example.org" }
}

func TestAProfileDecidesAlgorithmIssuerLifetimeAndClaimsOfTokensForItsAudience(t *testing.T) {
	h := newHouse(t, withProfiles(profile(t, issue.ProfileConfig{
		Audience: "sts.amazonaws.com", Algorithm: "RS256", Issuer: "https://aws.id.example.org", MaxLifetime: config.Duration(time.Minute),
		Claims:     map[string]string{"https://aws.amazon.com/tags/principal_tags/ns": "{segment.2}", "where": "{{{trust_domain}}{path}"},
		ListClaims: map[string][]string{"groups": {"all", "ns-{segment.2}"}, "none": {}},
	})))
	h.keys.rsa = &authority.JWT{ID: "kid-rsa", Signer: newRSA(t, 2048), Algorithm: jose.RS256, ExpiresAt: start.Add(time.Hour)}
	e := workload(t)
	e.SPIFFEID = spiffeid.RequireFromPath(td, "/ns/shop/sa/web")
	svid, err := h.WorkloadJWT(t.Context(), e, []string{"sts.amazonaws.com"})
	if err != nil {
		t.Fatal(err)
	}
	header, claims := decode(t, svid.Token)
	if header["alg"] != "RS256" || header["kid"] != "kid-rsa" {
		t.Errorf("header is %v", header)
	}
	for name, want := range map[string]any{
		"iss": "https://aws.id.example.org", "sub": e.SPIFFEID.String(), "aud": []any{"sts.amazonaws.com"},
		"https://aws.amazon.com/tags/principal_tags/ns": "shop", "where": "{example.org}" + e.SPIFFEID.Path(),
		"groups": []any{"all", "ns-shop"}, "none": []any{},
	} {
		if !reflect.DeepEqual(claims[name], want) {
			t.Errorf("%s is %v, want %v", name, claims[name], want)
		}
	}
	if got := svid.ExpiresAt.Sub(svid.IssuedAt); got != time.Minute {
		t.Errorf("it lasts %v", got)
	}
	// Everybody else's are as ever.
	if svid, err = h.WorkloadJWT(t.Context(), e, []string{"api"}); err != nil {
		t.Fatal(err)
	}
	header, claims = decode(t, svid.Token)
	if header["alg"] != "ES256" || claims["iss"] != "https://id.example.org" || claims["groups"] != nil || svid.ExpiresAt.Sub(svid.IssuedAt) <= time.Minute {
		t.Errorf("got %v %v", header, claims)
	}
}

func TestTheFirstProfileThatFitsAnAudienceCounts(t *testing.T) {
	var profiles []*issue.Profile
	for _, pattern := range []string{"exact", "https://*.example.org", "a*b*c", "*"} {
		profiles = append(profiles, profile(t, issue.ProfileConfig{Audience: pattern, Issuer: "of " + pattern}))
	}
	h := newHouse(t, withProfiles(profiles...))
	for audience, want := range map[string]string{
		"exact": "exact", "exact2": "*", "https://x.example.org": "https://*.example.org", "https://.example.org": "https://*.example.org",
		"https://example.org": "*", "https://x.example.org.evil": "*", "abc": "a*b*c", "a1b2c": "a*b*c", "ab": "*", "ac": "*", "aXbXbc": "a*b*c",
		"https://x.example.or": "*",
	} {
		svid, err := h.WorkloadJWT(t.Context(), workload(t), []string{audience})
		if err != nil {
			t.Fatal(err)
		}
		if _, claims := decode(t, svid.Token); claims["iss"] != "of "+want {
			t.Errorf("%s is %v, want of %s", audience, claims["iss"], want)
		}
	}
}

func TestATokenIsOfOneProfileAlone(t *testing.T) {
	h := newHouse(t, withProfiles(profile(t, issue.ProfileConfig{Audience: "cloud-*", MaxLifetime: config.Duration(time.Second)})))
	for _, audience := range [][]string{{"cloud-a", "api"}, {"api", "cloud-a"}} {
		_, err := h.WorkloadJWT(t.Context(), workload(t), audience)
		if told := (*issue.InvalidError)(nil); !errors.As(err, &told) || !strings.Contains(err.Error(), "ask for one each") {
			t.Errorf("%q: got %v", audience, err)
		}
	}
	if _, err := h.WorkloadJWT(t.Context(), workload(t), []string{"cloud-a", "cloud-b"}); err != nil {
		t.Error(err)
	}
}

func TestNoTokenIsIssuedWhoseClaimCannotBeMade(t *testing.T) {
	h := newHouse(t, withProfiles(profile(t, issue.ProfileConfig{Audience: "a", Claims: map[string]string{"ns": "{segment.9}"}})))
	_, err := h.WorkloadJWT(t.Context(), workload(t), []string{"a"})
	if told := (*issue.InvalidError)(nil); !errors.As(err, &told) || !strings.Contains(err.Error(), "no segment 9") {
		t.Errorf("got %v", err)
	}
}

func TestWithoutAnAuthorityForRS256NothingElseSignsInItsPlace(t *testing.T) {
	h := newHouse(t, withProfiles(profile(t, issue.ProfileConfig{Audience: "a", Algorithm: "RS256"})))
	if svid, err := h.WorkloadJWT(t.Context(), workload(t), []string{"a"}); !errors.Is(err, authority.ErrUnavailable) {
		t.Errorf("got %+v, %v", svid, err)
	}
}

func TestAProfileCannotTouchWhatSaysWhoseATokenIs(t *testing.T) {
	claims := func(name, text string) issue.ProfileConfig {
		return issue.ProfileConfig{Audience: "a", Claims: map[string]string{name: text}}
	}
	var bad []issue.ProfileConfig
	for _, name := range []string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "cnf", "act", "may_act", "status", "Sub", "\u017fub", "AUD", "", "\xff", strings.Repeat("x", 300)} {
		bad = append(bad, claims(name, "x"), issue.ProfileConfig{Audience: "a", ListClaims: map[string][]string{name: {"x"}}})
	}
	for _, text := range []string{"{", "{x}", "{segment}", "{segment.0}", "{segment.01}", "{segment.-1}", "{segment.33}", "{segment.999}", "{path", "\xff", strings.Repeat("x", 3000)} {
		bad = append(bad, claims("x", text))
	}
	many := map[string]string{}
	for _, c := range strings.Split("abcdefghijklmnopqrstuvwxyzABCDEFGH", "") {
		many[c] = c
	}
	bad = append(bad, issue.ProfileConfig{}, issue.ProfileConfig{Audience: strings.Repeat("x", 3000)}, issue.ProfileConfig{Audience: "\xff"},
		issue.ProfileConfig{Audience: "a", Algorithm: "ES384"}, issue.ProfileConfig{Audience: "a", Issuer: "\xff"},
		issue.ProfileConfig{Audience: "a", MaxLifetime: config.Duration(time.Millisecond)}, issue.ProfileConfig{Audience: "a", MaxLifetime: -config.Duration(time.Second)},
		issue.ProfileConfig{Audience: "a", Claims: many}, issue.ProfileConfig{Audience: "a", ListClaims: map[string][]string{"x": slices.Repeat([]string{"x"}, 33)}},
		issue.ProfileConfig{Audience: "a", Claims: map[string]string{"x": "x"}, ListClaims: map[string][]string{"x": {"x"}}})
	for _, c := range bad {
		if _, err := issue.NewProfile(c, jose.ES256); err == nil {
			t.Errorf("%.200v was taken", c)
		}
	}
}
