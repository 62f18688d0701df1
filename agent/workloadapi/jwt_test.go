package workloadapi_test

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

func (a *agent) jwt(audience ...string) *workload.JWTSVIDResponse {
	a.t.Helper()
	m, err := a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: audience})
	must(a.t, err)
	return m
}

func claimsOf(t *testing.T, token string) map[string]any {
	t.Helper()
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	must(t, err)
	var claims map[string]any
	must(t, parsed.UnsafeClaimsWithoutVerification(&claims))
	return claims
}

func TestWorkloadAPI_A28_A29_A30_EachIdentityHasAJWTSVIDForTheAudience(t *testing.T) {
	a := start(t)
	a.Entry("b", func(e *entry.Entry) { e.Hint = "x" }, "unix:uid:1")
	a.Entry("a", func(e *entry.Entry) { e.Hint = "x" }, "unix:uid:1")
	a.Entry("c", nil, "unix:uid:1")
	a.Entry("not-mine", nil, "unix:uid:2")
	a.sync()
	m := a.jwt("us", "them")
	var got []string
	for _, s := range m.Svids {
		got = append(got, s.SpiffeId, s.Hint)
		claims := claimsOf(t, s.Svid)
		if claims["sub"] != s.SpiffeId || !slices.Equal(claims["aud"].([]any), []any{"us", "them"}) {
			t.Errorf("claims of %s are %v", s.SpiffeId, claims)
		}
	}
	if want := []string{"spiffe://example.org/b", "x", "spiffe://example.org/c", ""}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	calls := len(a.JWTCalls())
	a.jwt("us", "them")
	if n := len(a.JWTCalls()); n != calls {
		t.Errorf("%d more were signed; they were cached", n-calls)
	}
}

func TestWorkloadAPI_A11_A31_RequestsAreChecked(t *testing.T) {
	a := start(t)
	a.Entry("mine", nil, "unix:uid:1")
	a.Entry("mine-too", nil, "unix:uid:1")
	a.Entry("not-mine", nil, "unix:uid:2")
	a.sync()
	x := []string{"x"}
	for _, c := range []struct {
		audience []string
		id       string
		code     codes.Code
	}{
		{x, "", codes.OK},
		{x, "spiffe://example.org/mine-too", codes.OK},
		{nil, "", codes.InvalidArgument},
		{[]string{""}, "", codes.InvalidArgument},
		{[]string{"x", ""}, "", codes.InvalidArgument},
		{slices.Repeat(x, 33), "", codes.InvalidArgument},
		{[]string{strings.Repeat("x", 9<<10)}, "", codes.InvalidArgument},
		{x, "mine", codes.InvalidArgument},
		{x, "spiffe://example.org/mine/", codes.InvalidArgument},
		{x, "spiffe://example.org/not-mine", codes.PermissionDenied},
		{x, "spiffe://example.org/unknown", codes.PermissionDenied},
		{x, "spiffe://other.org/mine", codes.PermissionDenied},
	} {
		m, err := a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: c.audience, SpiffeId: c.id})
		if status.Code(err) != c.code {
			t.Errorf("%q for %.20q: error is %v, want %v", c.id, c.audience, err, c.code)
		}
		if err == nil && c.id != "" && (len(m.Svids) != 1 || m.Svids[0].SpiffeId != c.id) {
			t.Errorf("got %v", m.Svids)
		}
	}
	for _, r := range []*workload.ValidateJWTSVIDRequest{{}, {Audience: "x"}, {Svid: "x"}} {
		_, err := a.client.ValidateJWTSVID(a.call(), r)
		wantCode(t, err, codes.InvalidArgument)
	}
}

func TestTheDefaultIdentityIsNeverAnotherBecauseSigningFailed(t *testing.T) {
	a := start(t)
	a.Entry("default", nil, "unix:uid:1")
	a.Entry("another", nil, "unix:uid:1")
	a.sync()
	a.Break("default", errors.New("secret reason"))
	_, err := a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}})
	if wantCode(t, err, codes.Unavailable); strings.Contains(err.Error(), "secret") {
		t.Errorf("the caller is told %v", err)
	}
	if a.log.count("secret reason") == 0 {
		t.Error("the reason is not in the log")
	}
	_, err = a.client.FetchJWTSVID(a.call(), &workload.JWTSVIDRequest{Audience: []string{"x"}, SpiffeId: "spiffe://example.org/another"})
	must(t, err)
}

func TestWorkloadAPI_A33_A34_JWTBundlesArePlainKeySets(t *testing.T) {
	a := start(t)
	other := spiffeid.RequireTrustDomainFromString("other.org")
	a.Entry("web", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other} }, "unix:uid:1")
	a.sync(a.ForeignBundle("other.org"), a.ForeignBundle("unrelated.org"))
	s, err := a.client.FetchJWTBundles(a.call(), &workload.JWTBundlesRequest{})
	must(t, err)
	m := recv(t, s)
	if len(m.Bundles) != 2 || m.Bundles["spiffe://other.org"] == nil {
		t.Errorf("bundles are %v", m.Bundles)
	}
	var set struct {
		Keys []map[string]any `json:"keys"`
	}
	must(t, json.Unmarshal(m.Bundles["spiffe://example.org"], &set))
	if len(set.Keys) != 1 || set.Keys[0]["kid"] == "" || set.Keys[0]["use"] != nil || set.Keys[0]["x5c"] != nil || set.Keys[0]["d"] != nil {
		t.Errorf("keys are %v", set.Keys)
	}
	a.Rotate()
	a.sync(a.ForeignBundle("other.org"))
	for len(set.Keys) != 2 {
		must(t, json.Unmarshal(recv(t, s).Bundles["spiffe://example.org"], &set))
	}
}

func TestWorkloadAPI_A35_A36_ValidateJWTSVIDReturnsTheClaims(t *testing.T) {
	a := start(t)
	a.Entry("web", nil, "unix:uid:1")
	a.sync()
	token := a.jwt("us", "them").Svids[0].Svid
	m, err := a.client.ValidateJWTSVID(a.call(), &workload.ValidateJWTSVIDRequest{Audience: "them", Svid: token})
	must(t, err)
	claims := m.Claims.AsMap()
	if m.SpiffeId != "spiffe://example.org/web" || claims["sub"] != m.SpiffeId || claims["exp"].(float64) == 0 || len(claims["aud"].([]any)) != 2 {
		t.Errorf("got %v", m)
	}
	for svid, audience := range map[string]string{token: "others", token + "A": "them", "x": "them"} {
		_, err := a.client.ValidateJWTSVID(a.call(), &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: svid})
		wantCode(t, err, codes.InvalidArgument)
	}
}

func TestWorkloadAPI_A36_LargeIntegersSurvive(t *testing.T) {
	a := start(t)
	a.Entry("web", nil, "unix:uid:1")
	a.sync()
	token := a.Token("web", map[string]any{
		"aud": "us", "small": 9007199254740991, "large": json.Number("9007199254740993"), "even": json.Number("9007199254740992"),
		"huge": json.Number("1e999"), "part": 0.5, "list": []any{json.Number("18446744073709551615"), nil, true},
		"map": map[string]any{"n": json.Number("-9007199254740993")},
	})
	m, err := a.client.ValidateJWTSVID(a.call(), &workload.ValidateJWTSVIDRequest{Audience: "us", Svid: token})
	must(t, err)
	got := m.Claims.AsMap()
	for name, want := range map[string]any{
		"small": 9007199254740991.0, "large": "9007199254740993", "even": 9007199254740992.0, "huge": "1e999", "part": 0.5,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	if list := got["list"].([]any); list[0] != "18446744073709551615" || list[1] != nil || list[2] != true {
		t.Errorf("list is %v", list)
	}
	if n := got["map"].(map[string]any)["n"]; n != "-9007199254740993" {
		t.Errorf("map holds %v", n)
	}
}

func TestWorkloadAPI_A37_OnlyBundlesThatTheWorkloadMaySeeValidate(t *testing.T) {
	a := start(t)
	otherServer := heldtest.New(t)
	foreign := otherServer.Bundle()
	foreign.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
	token := otherServer.Token("web", map[string]any{"aud": "us", "sub": "spiffe://other.org/web"})
	forged := otherServer.Token("web", map[string]any{"aud": "us", "sub": "spiffe://example.org/web"})
	e := a.Entry("web", nil, "unix:uid:1")
	a.sync(foreign)
	validate := func(svid string) error {
		_, err := a.client.ValidateJWTSVID(a.call(), &workload.ValidateJWTSVIDRequest{Audience: "us", Svid: svid})
		return err
	}
	wantCode(t, validate(token), codes.InvalidArgument)
	a.Update(e, func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{foreign.TrustDomain} })
	a.sync(foreign)
	must(t, validate(token))
	wantCode(t, validate(forged), codes.InvalidArgument)
}
