package api_test

import (
	"crypto"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

func pkixOf(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	must(t, err)
	return der
}

// verifyWIT checks a WIT-SVID of an answer against the bundle that anyone gets.
func (w *world) verifyWIT(s *types.WITSVID, key crypto.Signer) *witsvid.SVID {
	w.t.Helper()
	b, err := bundlev1.NewBundleClient(w.connect(nil)).GetBundle(w.t.Context(), &bundlev1.GetBundleRequest{})
	must(w.t, err)
	bundle := witbundle.New(td)
	for _, a := range b.WitAuthorities {
		public, err := x509.ParsePKIXPublicKey(a.PublicKey)
		must(w.t, err)
		must(w.t, bundle.AddWITAuthority(a.KeyId, public))
	}
	parsed, err := witsvid.ParseAndValidate(s.GetToken(), bundle)
	must(w.t, err)
	if parsed.ID.Path() != s.Id.Path || parsed.Expiry.Unix() != s.ExpiresAt || !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(parsed.PublicKey) {
		w.t.Errorf("the token is of %s until %s; the answer is %v", parsed.ID, parsed.Expiry, s)
	}
	return parsed
}

func TestAnAgentGetsWITSVIDsOfItsOwnEntriesOnly(t *testing.T) {
	w := newWITWorld(t)
	mine, other := w.newAgent(), w.newAgent()
	a := w.create(mine, "/a", func(e *types.Entry) { e.Hint = "hint" })
	b := w.create(other, "/b")
	c := w.create(mine, "/c")
	key := newKey(t)
	public := pkixOf(t, key)
	res, err := svidv1.NewSVIDClient(w.connect(mine)).BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: []*svidv1.NewWITSVIDParams{
		{EntryId: a.Id, PublicKey: public, SigningAlgorithm: "ES256"},
		{EntryId: b.Id, PublicKey: public, SigningAlgorithm: "ES256"},
		{EntryId: "none", PublicKey: public, SigningAlgorithm: "ES256"},
		{PublicKey: public, SigningAlgorithm: "ES256"},
		{EntryId: c.Id, SigningAlgorithm: "ES256"},
		{EntryId: c.Id, PublicKey: public},
		{EntryId: c.Id, PublicKey: public, SigningAlgorithm: "RS256"},
		{EntryId: c.Id, PublicKey: []byte("no key"), SigningAlgorithm: "ES256"},
		{EntryId: c.Id, PublicKey: public, SigningAlgorithm: "ES256"},
		nil,
	}})
	must(t, err)
	for i, want := range []struct {
		code codes.Code
		text string
	}{
		{codes.OK, "OK"},
		{codes.NotFound, "entry not found or not authorized"},
		{codes.NotFound, "entry not found or not authorized"},
		{codes.InvalidArgument, "missing entry ID"},
		{codes.InvalidArgument, "missing public key"},
		{codes.InvalidArgument, "missing signing algorithm"},
		{codes.InvalidArgument, `the signing algorithm "RS256" does not fit`},
		{codes.InvalidArgument, "malformed public key"},
		{codes.OK, "OK"},
		{codes.InvalidArgument, "missing entry ID"},
	} {
		got := res.Results[i].Status
		if got.Code != int32(want.code) || !strings.HasPrefix(got.Message, want.text) {
			t.Errorf("result %d is %v, want %v %q", i, got, want.code, want.text)
		}
		if (res.Results[i].Svid != nil) != (want.code == codes.OK) {
			t.Errorf("result %d has SVID %v", i, res.Results[i].Svid)
		}
	}
	w.verifyWIT(res.Results[0].Svid, key)
	if s := res.Results[0].Svid; s.Hint != "hint" || s.ExpiresAt-s.IssuedAt != 3600 {
		t.Errorf("the SVID is %v", s)
	}
	if w.verifyWIT(res.Results[8].Svid, key).ID.Path() != "/c" {
		t.Error("the results are in another order")
	}
	if lines := w.log.lines("audit", "BatchNewWITSVID", "caller=agent", "caller_id="+mine.id.String(), "items=10", "failed=8"); len(lines) != 1 {
		t.Errorf("the call was recorded %d times", len(lines))
	}
	svids := svidv1.NewSVIDClient(w.connect(mine))
	_, err = svids.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{})
	expectCode(t, err, codes.InvalidArgument, "missing parameters")
	_, err = svids.BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: make([]*svidv1.NewWITSVIDParams, 501)})
	expectCode(t, err, codes.InvalidArgument, "the most is 500")
}

func TestOperatorsMintWITSVIDs(t *testing.T) {
	w := newWITWorld(t)
	svids := svidv1.NewSVIDClient(w.admin())
	key := newKey(t)
	req := func(change func(*svidv1.MintWITSVIDRequest)) *svidv1.MintWITSVIDRequest {
		r := &svidv1.MintWITSVIDRequest{Id: wireID(id("/minted")), PublicKey: pkixOf(t, key), SigningAlgorithm: "ES256", Ttl: 60}
		change(r)
		return r
	}
	res, err := svids.MintWITSVID(t.Context(), req(func(*svidv1.MintWITSVIDRequest) {}))
	must(t, err)
	w.verifyWIT(res.Svid, key)
	if res.Svid.ExpiresAt-res.Svid.IssuedAt != 60 {
		t.Errorf("the SVID is %v", res.Svid)
	}
	for text, change := range map[string]func(*svidv1.MintWITSVIDRequest){
		"SPIFFE ID":             func(r *svidv1.MintWITSVIDRequest) { r.Id = nil },
		"reserved":              func(r *svidv1.MintWITSVIDRequest) { r.Id = wireID(id("/spire/server")) },
		"missing public key":    func(r *svidv1.MintWITSVIDRequest) { r.PublicKey = nil },
		"does not fit":          func(r *svidv1.MintWITSVIDRequest) { r.SigningAlgorithm = "EdDSA" },
		"a lifetime of -1s is ": func(r *svidv1.MintWITSVIDRequest) { r.Ttl = -1 },
	} {
		_, err := svids.MintWITSVID(t.Context(), req(change))
		expectCode(t, err, codes.InvalidArgument, text)
	}
	if lines := w.log.lines("audit", "MintWITSVID", "caller=local", "id=spiffe://example.org/minted", "outcome=OK"); len(lines) != 1 {
		t.Errorf("the call was recorded %d times", len(lines))
	}
}

func TestWITSVID_W32_W33_AWITAuthorityGoesThroughItsStates(t *testing.T) {
	w := newWITWorld(t)
	c, ctx := localauthorityv1.NewLocalAuthorityClient(w.admin()), t.Context()
	svids := svidv1.NewSVIDClient(w.admin())
	key := newKey(t)
	mint := func() *types.WITSVID {
		t.Helper()
		res, err := svids.MintWITSVID(ctx, &svidv1.MintWITSVIDRequest{Id: wireID(id("/minted")), PublicKey: pkixOf(t, key), SigningAlgorithm: "ES256"})
		must(t, err)
		return res.Svid
	}
	published := func() (ids []string, tainted int) {
		for _, a := range w.registry.View().Bundle(td).WITAuthorities {
			if ids = append(ids, a.KeyID); a.Tainted {
				tainted++
			}
		}
		return ids, tainted
	}
	before, err := c.GetWITAuthorityState(ctx, &localauthorityv1.GetWITAuthorityStateRequest{})
	must(t, err)
	if before.Active == nil || before.Prepared != nil || before.Old != nil {
		t.Fatalf("the state is %v", before)
	}
	leaked := mint()
	prepared, err := c.PrepareWITAuthority(ctx, &localauthorityv1.PrepareWITAuthorityRequest{})
	must(t, err)
	next := prepared.PreparedAuthority.AuthorityId
	if ids, _ := published(); len(ids) != 2 {
		t.Errorf("the bundle has %q; the prepared one is in it before it signs", ids)
	}
	if w.verifyWIT(mint(), key).KeyID != before.Active.AuthorityId {
		t.Error("the prepared one signs")
	}
	_, err = c.ActivateWITAuthority(ctx, &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: "other"})
	expectCode(t, err, codes.InvalidArgument, "unexpected authority ID")
	_, err = c.TaintWITAuthority(ctx, &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: before.Active.AuthorityId})
	expectCode(t, err, codes.FailedPrecondition, "it is the one that signs")
	activated, err := c.ActivateWITAuthority(ctx, &localauthorityv1.ActivateWITAuthorityRequest{AuthorityId: next})
	must(t, err)
	if activated.ActivatedAuthority.AuthorityId != next || w.verifyWIT(mint(), key).KeyID != next {
		t.Errorf("%v was activated", activated)
	}
	w.verifyWIT(leaked, key)
	_, err = c.RevokeWITAuthority(ctx, &localauthorityv1.RevokeWITAuthorityRequest{AuthorityId: before.Active.AuthorityId})
	expectCode(t, err, codes.FailedPrecondition, "it is not tainted")
	_, err = c.TaintWITAuthority(ctx, &localauthorityv1.TaintWITAuthorityRequest{AuthorityId: before.Active.AuthorityId})
	must(t, err)
	if _, tainted := published(); tainted != 1 {
		t.Errorf("%d are marked in the bundle", tainted)
	}
	w.verifyWIT(leaked, key)
	_, err = c.RevokeWITAuthority(ctx, &localauthorityv1.RevokeWITAuthorityRequest{AuthorityId: before.Active.AuthorityId})
	must(t, err)
	if ids, _ := published(); len(ids) != 1 || ids[0] != next {
		t.Errorf("the bundle has %q, want the one that signs", ids)
	}
	after, err := c.GetWITAuthorityState(ctx, &localauthorityv1.GetWITAuthorityStateRequest{})
	must(t, err)
	if after.Active.GetAuthorityId() != next || after.Prepared != nil || after.Old != nil {
		t.Errorf("the state is %v", after)
	}

	rotated, err := hallmarkv1.NewAdminServiceClient(w.admin()).RotateAuthority(ctx, &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_WIT})
	must(t, err)
	if got := w.verifyWIT(mint(), key).KeyID; got != rotated.Activated.Id || got == next {
		t.Errorf("%s signs, %v was rotated to", got, rotated.Activated)
	}
}

func TestWithoutTheFlagNothingOfWITIsOffered(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	_, err := svidv1.NewSVIDClient(w.connect(agent)).BatchNewWITSVID(t.Context(), &svidv1.BatchNewWITSVIDRequest{Params: []*svidv1.NewWITSVIDParams{{EntryId: "a"}}})
	expectCode(t, err, codes.Unimplemented, "experimental")
	_, err = bundlev1.NewBundleClient(w.connect(w.workload(agent, "/down", func(e *types.Entry) { e.Downstream = true }))).PublishWITAuthority(t.Context(), &bundlev1.PublishWITAuthorityRequest{})
	expectCode(t, err, codes.Unimplemented, "experimental")
	admin := hallmarkv1.NewAdminServiceClient(w.admin())
	_, err = admin.RotateAuthority(t.Context(), &hallmarkv1.RotateAuthorityRequest{Kind: hallmarkv1.Authority_KIND_WIT})
	expectCode(t, err, codes.Unimplemented, "experimental")
	all, err := admin.ListAuthorities(t.Context(), &hallmarkv1.ListAuthoritiesRequest{})
	must(t, err)
	for _, a := range all.Authorities {
		if a.Kind == hallmarkv1.Authority_KIND_WIT {
			t.Errorf("there is %v", a)
		}
	}
	if b := w.registry.View().Bundle(td); len(b.WITAuthorities) != 0 {
		t.Errorf("the bundle is %s", b)
	}
}
