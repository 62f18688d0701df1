package workloadapi_test

import (
	"context"
	"crypto"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	spiffe "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/agent/workloadapi"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

func withWIT(o *workloadapi.Options) { o.WIT = true }

// wit opens a stream of WIT-SVIDs.
func (a *agent) wit(id string) grpc.ServerStreamingClient[workload.WITSVIDResponse] {
	a.t.Helper()
	s, err := a.client.FetchWITSVID(a.call(), &workload.WITSVIDRequest{SpiffeId: id})
	must(a.t, err)
	return s
}

// verifyWIT checks each WIT-SVID of a message against the bundle that the agent
// gives, and returns their paths and hints.
func (a *agent) verifyWIT(m *workload.WITSVIDResponse) (got []string) {
	a.t.Helper()
	s, err := a.client.FetchWITBundles(a.call(), &workload.WITBundlesRequest{})
	must(a.t, err)
	document := recv(a.t, s).Bundles["spiffe://example.org"]
	td := spiffeid.RequireTrustDomainFromString("example.org")
	bundle, err := witbundle.Parse(td, []byte(document))
	must(a.t, err)
	for _, s := range m.Svids {
		svid, err := witsvid.ParseAndValidate(s.WitSvid, bundle)
		must(a.t, err)
		if svid.ID.String() != s.SpiffeId {
			a.t.Errorf("the token of %s is of %s", s.SpiffeId, svid.ID)
		}
		var key jose.JSONWebKey
		must(a.t, json.Unmarshal([]byte(s.WitSvidKey), &key))
		if public := key.Public(); key.IsPublic() || !public.Key.(interface{ Equal(crypto.PublicKey) bool }).Equal(svid.PublicKey) {
			a.t.Errorf("the key of %s is not that of its token, or not private", s.SpiffeId)
		}
		got = append(got, svid.ID.Path(), s.Hint)
	}
	return got
}

func TestWorkloadAPI_W16_W43_W45_EachIdentityHasAWITSVIDWithItsKey(t *testing.T) {
	a := start(t, withWIT)
	a.Entry("b", func(e *entry.Entry) { e.Hint = "x" }, "unix:uid:1")
	a.Entry("a", func(e *entry.Entry) { e.Hint = "x" }, "unix:uid:1")
	a.Entry("c", nil, "unix:uid:1")
	a.Entry("not-mine", nil, "unix:uid:2")
	a.sync()
	m := recv(t, a.wit(""))
	if got := a.verifyWIT(m); !slices.Equal(got, []string{"/b", "x", "/c", ""}) { // the oldest is the default one
		t.Errorf("got %v", got)
	}
	again := recv(t, a.wit(""))
	if again.Svids[0].WitSvid != m.Svids[0].WitSvid || again.Svids[0].WitSvidKey != m.Svids[0].WitSvidKey {
		t.Error("another process of the workload got another WIT-SVID")
	}
	one := recv(t, a.wit("spiffe://example.org/c"))
	if got := a.verifyWIT(one); !slices.Equal(got, []string{"/c", ""}) {
		t.Errorf("asked for one, got %v", got)
	}
	// What has the hint of an older one is left out only beside it.
	hidden := recv(t, a.wit("spiffe://example.org/a"))
	if got := a.verifyWIT(hidden); !slices.Equal(got, []string{"/a", "x"}) {
		t.Errorf("asked for the one that is left out, got %v", got)
	}
}

func TestWorkloadAPI_W43_W45_RequestsAreChecked(t *testing.T) {
	a := start(t, withWIT)
	a.Entry("mine", nil, "unix:uid:1")
	a.Entry("not-mine", nil, "unix:uid:2")
	a.sync()
	for id, code := range map[string]codes.Code{
		"mine":                          codes.InvalidArgument,
		"spiffe://example.org/mine/":    codes.InvalidArgument,
		"spiffe://example.org/not-mine": codes.PermissionDenied,
		"spiffe://example.org/unknown":  codes.PermissionDenied,
		"spiffe://other.org/mine":       codes.PermissionDenied,
	} {
		_, err := a.wit(id).Recv()
		if wantCode(t, err, code); strings.Contains(status.Convert(err).Message(), "example.org/") && code == codes.PermissionDenied {
			t.Errorf("the caller is told %v", err)
		}
	}
	a.isNow("unix:uid:3")
	conn := workload.NewSpiffeWorkloadAPIClient(a.dial())
	wantCode(t, second(conn.FetchWITSVID(a.call(), &workload.WITSVIDRequest{})), codes.PermissionDenied)
	wantCode(t, second(conn.FetchWITBundles(a.call(), &workload.WITBundlesRequest{})), codes.PermissionDenied)
	wantCode(t, second(conn.FetchWITSVID(a.bare(), &workload.WITSVIDRequest{})), codes.InvalidArgument)
}

func TestWorkloadAPI_W43_W45_EachChangeIsSentAtOnce(t *testing.T) {
	a := start(t, withWIT)
	first := a.Entry("first", nil, "unix:uid:1")
	a.sync()
	all, one := a.wit(""), a.wit("spiffe://example.org/first")
	before := recv(t, all)
	if got := recv(t, one); got.Svids[0].WitSvid != before.Svids[0].WitSvid {
		t.Error("two streams have two WIT-SVIDs")
	}
	second := a.Entry("second", nil, "unix:uid:1")
	a.sync()
	m := recv(t, all)
	if got := a.verifyWIT(m); !slices.Equal(got, []string{"/first", "", "/second", ""}) {
		t.Errorf("got %v", got)
	}
	a.Rotate()
	a.Taint()
	a.sync()
	for m = recv(t, all); m.Svids[0].WitSvid == before.Svids[0].WitSvid || m.Svids[1].WitSvidKey == before.Svids[0].WitSvidKey; m = recv(t, all) {
	}
	if got := recv(t, one); len(got.Svids) != 1 || got.Svids[0].WitSvid == before.Svids[0].WitSvid || got.Svids[0].WitSvidKey == before.Svids[0].WitSvidKey {
		t.Error("of a tainted authority's WIT-SVID another is not sent")
	}
	a.Revoke()
	a.sync()
	a.verifyWIT(m)
	a.Delete(first)
	a.sync()
	for m = recv(t, all); len(m.Svids) != 1; m = recv(t, all) {
	}
	if got := a.verifyWIT(m); !slices.Equal(got, []string{"/second", ""}) {
		t.Errorf("got %v", got)
	}
	_, err := one.Recv()
	wantCode(t, err, codes.PermissionDenied) // an identity that is taken away
	a.Delete(second)
	a.sync()
	_, err = all.Recv()
	wantCode(t, err, codes.PermissionDenied)
}

func TestWorkloadAPI_W44_WITBundlesAreKeySetsOfTheirOwn(t *testing.T) {
	a := start(t, withWIT)
	other, none := spiffeid.RequireTrustDomainFromString("other.org"), spiffeid.RequireTrustDomainFromString("none.org")
	a.Entry("mine", func(e *entry.Entry) { e.FederatesWith = []spiffeid.TrustDomain{other, none} }, "unix:uid:1")
	foreign, bare := a.ForeignBundle("other.org"), a.ForeignBundle("none.org")
	bare.WITAuthorities = nil
	a.sync(foreign, bare, a.ForeignBundle("unrelated.org"))
	s, err := a.client.FetchWITBundles(a.call(), &workload.WITBundlesRequest{})
	must(t, err)
	m := recv(t, s)
	if len(m.Bundles) != 3 || m.Bundles["spiffe://none.org"] != `{"keys":[]}` {
		t.Errorf("bundles are %v", m.Bundles)
	}
	for td, wits := range map[string]string{"spiffe://example.org": a.Server.Bundle().WITAuthorities[0].KeyID, "spiffe://other.org": foreign.WITAuthorities[0].KeyID} {
		var set jose.JSONWebKeySet
		must(t, json.Unmarshal([]byte(m.Bundles[td]), &set))
		if len(set.Keys) != 1 || set.Keys[0].KeyID != wits || !set.Keys[0].IsPublic() {
			t.Errorf("the keys of %s are %s", td, m.Bundles[td])
		}
	}
	// And the other way round: a JWT bundle has none of them.
	j, err := a.client.FetchJWTBundles(a.call(), &workload.JWTBundlesRequest{})
	must(t, err)
	if got := string(recv(t, j).Bundles["spiffe://example.org"]); strings.Contains(got, "wit-") {
		t.Errorf("the JWT bundle is %s", got)
	}
	a.Rotate()
	a.sync(foreign, bare)
	if got := recv(t, s).Bundles["spiffe://example.org"]; strings.Count(got, `"kid"`) != 2 {
		t.Errorf("the new bundle is %s", got)
	}
	a.Revoke()
	a.sync(foreign, bare)
	if got := recv(t, s).Bundles["spiffe://example.org"]; strings.Count(got, `"kid"`) != 1 {
		t.Errorf("after a revocation the bundle is %s", got)
	}
}

func TestWorkloadAPI_W41_AServerWithoutWITMakesTheProfileUnimplemented(t *testing.T) {
	a := start(t, withWIT)
	a.Entry("mine", nil, "unix:uid:1")
	a.RefuseWIT(status.Error(codes.Unimplemented, "not switched on"))
	a.sync()
	_, err := a.wit("").Recv()
	wantCode(t, err, codes.Unimplemented)
	a.RefuseWIT(nil) // it was switched on
	sub := a.held.SubscribeWIT(t.Context(), heldtest.Selectors("unix:uid:1"))
	defer sub.Close()
	for u := sub.Update(); u.WITs[u.Entries[0]].SVID == nil; u = sub.Update() {
		<-sub.C
	}
	a.verifyWIT(recv(t, a.wit("")))
}

func TestARealClientGetsWITSVIDs(t *testing.T) {
	a := start(t, withWIT)
	a.Entry("mine", nil, "unix:uid:1")
	a.sync()
	ctx, cancel := context.WithCancel(a.bare())
	defer cancel()
	source, err := spiffe.NewWITSource(ctx, spiffe.WithClientOptions(spiffe.WithAddr("unix://"+a.path)))
	must(t, err)
	defer source.Close()
	id := spiffeid.RequireFromString("spiffe://example.org/mine")
	svid, err := source.GetWITSVIDForID(id)
	must(t, err)
	if _, err := witsvid.ParseAndValidate(svid.Marshal(), source); err != nil {
		t.Error(err)
	}
	if signer, ok := svid.PrivateKey.(crypto.Signer); !ok || !signer.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(svid.PublicKey) {
		t.Error("the key is not that of the token")
	}
	a.Rotate()
	a.Taint()
	a.sync()
	for {
		must(t, source.WaitUntilUpdated(ctx))
		next, err := source.GetWITSVIDForID(id)
		must(t, err)
		if next.KeyID != svid.KeyID {
			break
		}
	}
}
