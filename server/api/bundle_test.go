package api

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// wireRoot makes a self-signed certificate, after a change of its template.
func wireRoot(t testing.TB, key crypto.Signer, change func(*x509.Certificate)) *types.X509Certificate {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: time.Unix(1_700_000_000, 0), NotAfter: time.Unix(1_900_000_000, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &types.X509Certificate{Asn1: der}
}

func newRoot(t testing.TB) *types.X509Certificate { return wireRoot(t, ecKey(t, elliptic.P256()), nil) }

func wireKey(t testing.TB, kid string, key crypto.PublicKey) *types.JWTKey {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return &types.JWTKey{KeyId: kid, PublicKey: der}
}

func newKey(t testing.TB, kid string) *types.JWTKey {
	return wireKey(t, kid, ecKey(t, elliptic.P256()).Public())
}

// newBundleRecords is records with a bundle of the own trust domain.
func newBundleRecords(t *testing.T) (*records, *types.Bundle) {
	t.Helper()
	w := newRecords(t)
	root, err := x509.ParseCertificate(newRoot(t).Asn1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.registry.ChangeBundle(t.Context(), recordsTD, func(b *bundle.Bundle) error {
		b.X509Authorities = []bundle.X509Authority{{Certificate: root, Tainted: true}}
		b.JWTAuthorities = []bundle.JWTAuthority{{KeyID: "own", PublicKey: ecKey(t, elliptic.P256()).Public(), ExpiresAt: w.now.Add(time.Hour)}}
		b.RefreshHint = 5 * time.Minute
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	b, err := w.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return w, b
}

func TestTheOwnBundle(t *testing.T) {
	w, b := newBundleRecords(t)
	if b.TrustDomain != "example.org" || b.SequenceNumber != 1 || b.RefreshHint != 300 ||
		len(b.X509Authorities) != 1 || !b.X509Authorities[0].Tainted ||
		len(b.JwtAuthorities) != 1 || b.JwtAuthorities[0].KeyId != "own" || b.JwtAuthorities[0].ExpiresAt != w.now.Add(time.Hour).Unix() {
		t.Errorf("got %v", b)
	}
	for name, c := range map[string]struct {
		mask *types.BundleMask
		want *types.Bundle
	}{
		"nothing":         {&types.BundleMask{}, &types.Bundle{}},
		"X.509":           {&types.BundleMask{X509Authorities: true}, &types.Bundle{X509Authorities: b.X509Authorities}},
		"JWT":             {&types.BundleMask{JwtAuthorities: true}, &types.Bundle{JwtAuthorities: b.JwtAuthorities}},
		"refresh hint":    {&types.BundleMask{RefreshHint: true}, &types.Bundle{RefreshHint: b.RefreshHint}},
		"sequence number": {&types.BundleMask{SequenceNumber: true}, &types.Bundle{SequenceNumber: b.SequenceNumber}},
		"WIT":             {&types.BundleMask{WitAuthorities: true}, &types.Bundle{}},
	} {
		c.want.TrustDomain = "example.org"
		if got, err := w.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: c.mask}); err != nil || !proto.Equal(got, c.want) {
			t.Errorf("%s: got %v, %v", name, got, err)
		}
	}
}

func TestBeforeThereIsABundleItIsNotFound(t *testing.T) {
	w := newRecords(t)
	_, err := w.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	wantCode(t, "get", err, codes.NotFound, "bundle not found")
	_, err = w.bundles.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{newRoot(t)}})
	wantCode(t, "append", err, codes.NotFound, "bundle not found")
	_, err = w.bundles.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: newKey(t, "k")})
	wantCode(t, "publish", err, codes.NotFound, "bundle not found")
}

func TestAppendingKeepsWhatIsThere(t *testing.T) {
	w, own := newBundleRecords(t)
	root, key := newRoot(t), newKey(t, "new")
	root.Tainted, key.Tainted, key.ExpiresAt = true, true, w.now.Add(time.Minute).Unix()
	again := proto.Clone(own.X509Authorities[0]).(*types.X509Certificate)
	again.Tainted = false
	req := &bundlev1.AppendBundleRequest{
		X509Authorities: []*types.X509Certificate{again, root, root},
		JwtAuthorities:  []*types.JWTKey{own.JwtAuthorities[0], key, key},
	}
	want := proto.Clone(own).(*types.Bundle)
	want.X509Authorities, want.JwtAuthorities, want.SequenceNumber = append(want.X509Authorities, root), append(want.JwtAuthorities, key), 2
	for range 2 { // a second time changes nothing
		if got, err := w.bundles.AppendBundle(t.Context(), req); err != nil || !proto.Equal(got, want) {
			t.Errorf("got  %v, %v\nwant %v", got, err, want)
		}
	}
	got, err := w.bundles.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{OutputMask: &types.BundleMask{SequenceNumber: true}})
	if err != nil || !proto.Equal(got, &types.Bundle{TrustDomain: "example.org", SequenceNumber: 2}) {
		t.Errorf("appending nothing: got %v, %v", got, err)
	}
}

func TestAuthoritiesThatAreNoneAreRefusedByTheirIndex(t *testing.T) {
	w, own := newBundleRecords(t)
	good := newRoot(t)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 1023), E: 65537}
	huge := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 16383), E: 65537}
	foreign := newRoot(t)
	if _, err := w.bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{{TrustDomain: "other.org", X509Authorities: []*types.X509Certificate{foreign}}}}); err != nil {
		t.Fatal(err)
	}
	manyKeys := make([]*types.JWTKey, maxAuthorities+1)
	for i := range manyKeys {
		manyKeys[i] = &types.JWTKey{}
	}
	expired := newKey(t, "expired")
	expired.ExpiresAt = w.now.Unix()
	timeless := newKey(t, "timeless")
	timeless.ExpiresAt = -1
	x509s := func(certs ...*types.X509Certificate) *bundlev1.AppendBundleRequest {
		return &bundlev1.AppendBundleRequest{X509Authorities: certs}
	}
	jwts := func(keys ...*types.JWTKey) *bundlev1.AppendBundleRequest {
		return &bundlev1.AppendBundleRequest{JwtAuthorities: keys}
	}
	for text, req := range map[string]*bundlev1.AppendBundleRequest{
		"X.509 authority 1: x509: malformed certificate":                                  x509s(good, &types.X509Certificate{Asn1: []byte("x")}),
		"X.509 authority 0: x509: malformed":                                              x509s(&types.X509Certificate{}),
		"X.509 authority 0: x509: trailing data":                                          x509s(&types.X509Certificate{Asn1: append(slices.Clone(good.Asn1), 0)}),
		"X.509 authority 1: not a CA certificate":                                         x509s(good, wireRoot(t, ecKey(t, elliptic.P256()), func(c *x509.Certificate) { c.IsCA = false })),
		"X.509 authority 1 expired at 2023-11-14":                                         x509s(good, wireRoot(t, ecKey(t, elliptic.P256()), func(c *x509.Certificate) { c.NotAfter = time.Unix(1_700_000_001, 0) })),
		"X.509 authority 0 has a key of trust domain \"other.org\"":                       x509s(foreign),
		"bundle has 501 X.509 authorities":                                                x509s(make501(good)...),
		"X.509 authorities are over":                                                      x509s(&types.X509Certificate{Asn1: make([]byte, maxBundleBytes+1)}),
		"bundle has 501 JWT authorities":                                                  jwts(manyKeys...),
		"JWT authorities are over":                                                        jwts(&types.JWTKey{PublicKey: make([]byte, maxBundleBytes+1)}),
		"JWT authority 1: missing key ID":                                                 jwts(newKey(t, "a"), newKey(t, "")),
		"JWT authority 0: key ID is 256 bytes long":                                       jwts(newKey(t, strings.Repeat("k", 256))),
		"JWT authority 0: key \"a\" is no PKIX public key":                                jwts(&types.JWTKey{KeyId: "a", PublicKey: []byte("x")}),
		"JWT authority 1: key ID \"a\" names another key already":                         jwts(newKey(t, "a"), newKey(t, "a")),
		"key ID \"own\" names another key already":                                        jwts(newKey(t, "own")),
		"JWT authority 0: key \"a\" is of type ed25519.PublicKey":                         jwts(wireKey(t, "a", edKey.Public())),
		"JWT authority 0: key \"a\" is on curve P-224":                                    jwts(wireKey(t, "a", ecKey(t, elliptic.P224()).Public())),
		"JWT authority 0: key \"a\" is an RSA key of 1024 bits; it must have 2048 to 819": jwts(wireKey(t, "a", weak)),
		"JWT authority 0: key \"a\" is an RSA key of 16384 bits":                          jwts(wireKey(t, "a", huge)),
		"JWT authority \"expired\" expired at 2027-01-15T08:00:00Z":                       jwts(expired),
		"JWT authority 0: key \"timeless\": expires_at lies before 1970":                  jwts(timeless),
	} {
		_, err := w.bundles.AppendBundle(t.Context(), req)
		wantCode(t, text, err, codes.InvalidArgument, text)
	}
	_, err = w.bundles.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{WitAuthorities: []*types.WITKey{{KeyId: "w"}}})
	wantCode(t, "WIT", err, codes.Unimplemented, "WIT")
	if got, err := w.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil || !proto.Equal(got, own) {
		t.Errorf("the bundle became %v, %v", got, err)
	}
}

func make501(c *types.X509Certificate) []*types.X509Certificate {
	return slices.Repeat([]*types.X509Certificate{c}, maxAuthorities+1)
}

func TestDownstreamServersPublishTheirJWTAuthorities(t *testing.T) {
	w, own := newBundleRecords(t)
	publish := func(k *types.JWTKey) (kids []string) {
		t.Helper()
		resp, err := w.bundles.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: k})
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range resp.JwtAuthorities {
			kids = append(kids, k.KeyId)
		}
		return kids
	}
	a := newKey(t, "a")
	a.ExpiresAt = w.now.Add(2 * time.Hour).Unix()
	for range 2 {
		if got := publish(a); !slices.Equal(got, []string{"own", "a"}) {
			t.Errorf("got %v", got)
		}
	}
	if got, err := w.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil || got.SequenceNumber != 2 || len(got.X509Authorities) != len(own.X509Authorities) {
		t.Errorf("the bundle became %v, %v", got, err)
	}
	w.now = w.now.Add(90 * time.Minute) // "own" has expired meanwhile and makes room
	if got := publish(newKey(t, "b")); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("got %v", got)
	}
	for text, k := range map[string]*types.JWTKey{"missing JWT authority": nil, "missing key ID": {}, "key ID \"b\" names another key already": newKey(t, "b")} {
		_, err := w.bundles.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: k})
		wantCode(t, text, err, codes.InvalidArgument, text)
	}
	_, err := w.bundles.PublishWITAuthority(t.Context(), &bundlev1.PublishWITAuthorityRequest{})
	wantCode(t, "WIT", err, codes.Unimplemented, "WIT")
}

func wireWITKey(k *types.JWTKey) *types.WITKey {
	return &types.WITKey{PublicKey: k.PublicKey, KeyId: k.KeyId, ExpiresAt: k.ExpiresAt, Tainted: k.Tainted}
}

func TestWITSVID_W33_DownstreamServersPublishTheirWITAuthorities(t *testing.T) {
	w, _ := newBundleRecords(t)
	w.service.wit = true
	publish := func(k *types.JWTKey) ([]*types.WITKey, error) {
		resp, err := w.bundles.PublishWITAuthority(t.Context(), &bundlev1.PublishWITAuthorityRequest{WitAuthority: wireWITKey(k)})
		return resp.GetWitAuthorities(), err
	}
	a := newKey(t, "a")
	a.ExpiresAt = w.now.Add(2 * time.Hour).Unix()
	for range 2 {
		if got, err := publish(a); err != nil || len(got) != 1 || !proto.Equal(got[0], wireWITKey(a)) {
			t.Errorf("got %v, %v", got, err)
		}
	}
	got, err := w.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{OutputMask: &types.BundleMask{WitAuthorities: true}})
	if err != nil || !proto.Equal(got, &types.Bundle{TrustDomain: "example.org", WitAuthorities: []*types.WITKey{wireWITKey(a)}}) {
		t.Errorf("the bundle is %v, %v", got, err)
	}
	appended, err := w.bundles.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{WitAuthorities: []*types.WITKey{wireWITKey(newKey(t, "b"))}})
	if err != nil || len(appended.WitAuthorities) != 2 || len(appended.JwtAuthorities) != 1 {
		t.Errorf("the bundle became %v, %v", appended, err)
	}
	// A key ID names one key, of whichever kind.
	_, err = publish(newKey(t, "own"))
	wantCode(t, "the ID of a JWT authority", err, codes.InvalidArgument, `key ID "own" names a key that signs other SVIDs already`)
	_, err = w.bundles.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: newKey(t, "a")})
	wantCode(t, "the ID of a WIT authority", err, codes.InvalidArgument, `key ID "a" names a key that signs other SVIDs already`)
	both := newKey(t, "both")
	_, err = w.bundles.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{JwtAuthorities: []*types.JWTKey{both}, WitAuthorities: []*types.WITKey{wireWITKey(both)}})
	wantCode(t, "one ID for two", err, codes.InvalidArgument, `key ID "both" names a key that signs other SVIDs already`)
	_, err = publish(newKey(t, "a"))
	wantCode(t, "the ID of another WIT authority", err, codes.InvalidArgument, `key ID "a" names another key already`)
	_, err = w.bundles.PublishWITAuthority(t.Context(), &bundlev1.PublishWITAuthorityRequest{})
	wantCode(t, "none", err, codes.InvalidArgument, "missing WIT authority")
	past := newKey(t, "past")
	past.ExpiresAt = w.now.Add(-time.Second).Unix()
	_, err = publish(past)
	wantCode(t, "an expired one", err, codes.InvalidArgument, `WIT authority "past" expired at`)

	w.now = w.now.Add(3 * time.Hour) // "a" has expired meanwhile and makes room
	if got, err := publish(newKey(t, "c")); err != nil || len(got) != 2 || got[0].KeyId != "b" || got[1].KeyId != "c" {
		t.Errorf("got %v, %v", got, err)
	}
}

// A foreign trust domain's WIT authorities are kept, whether this server has
// any or not.
func TestBundle_T01_T26_AForeignBundleHasWITAuthorities(t *testing.T) {
	w, own := newBundleRecords(t)
	key := newKey(t, "w")
	key.ExpiresAt = w.now.Add(time.Hour).Unix()
	foreign := &types.Bundle{TrustDomain: "other.org", WitAuthorities: []*types.WITKey{wireWITKey(key)}, SequenceNumber: 7}
	set := func(b *types.Bundle) *types.Status {
		t.Helper()
		resp, err := w.bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0].Status
	}
	wantStatus(t, "set", set(foreign), codes.OK, "")
	got, err := w.bundles.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.org"})
	if err != nil || !proto.Equal(got, foreign) {
		t.Errorf("got %v, %v; want %v", got, err, foreign)
	}
	wantStatus(t, "a key of ours", set(&types.Bundle{TrustDomain: "other.org", WitAuthorities: []*types.WITKey{wireWITKey(own.JwtAuthorities[0])}}),
		codes.InvalidArgument, `WIT authority "own" has a key of trust domain "example.org"`)
	w.service.wit = true
	_, err = w.bundles.PublishWITAuthority(t.Context(), &bundlev1.PublishWITAuthorityRequest{WitAuthority: wireWITKey(key)})
	wantCode(t, "a key of theirs", err, codes.InvalidArgument, `WIT authority "w" has a key of trust domain "other.org"`)
	update, err := w.bundles.BatchUpdateFederatedBundle(t.Context(), &bundlev1.BatchUpdateFederatedBundleRequest{
		Bundle: []*types.Bundle{{TrustDomain: "other.org"}}, InputMask: &types.BundleMask{WitAuthorities: true},
	})
	if err != nil || len(update.Results[0].Bundle.WitAuthorities) != 0 {
		t.Errorf("emptied, it is %v, %v", update, err)
	}
}

func TestABundleDoesNotGrowWithoutBound(t *testing.T) {
	w, _ := newBundleRecords(t)
	key := ecKey(t, elliptic.P256())
	var keys []*types.JWTKey
	for i := range maxAuthorities {
		keys = append(keys, wireKey(t, fmt.Sprint(i), key.Public()))
	}
	if _, err := w.bundles.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{JwtAuthorities: keys[1:]}); err != nil { // "own" is there
		t.Fatal(err)
	}
	_, err := w.bundles.PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: keys[0]})
	wantCode(t, "one more", err, codes.ResourceExhausted, "the most is 500")

	large := func(c *x509.Certificate) {
		c.SerialNumber = big.NewInt(2)
		c.Subject = pkix.Name{CommonName: strings.Repeat("x", maxBundleBytes/6)}
	}
	for i := range 3 {
		_, err = w.bundles.AppendBundle(t.Context(), &bundlev1.AppendBundleRequest{X509Authorities: []*types.X509Certificate{wireRoot(t, ecKey(t, elliptic.P256()), large)}})
		if i < 2 && err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, "bytes", err, codes.ResourceExhausted, "certificates and keys of the bundle")

	// Keys of any kind count.
	big := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), maxRSABits-1, 1), E: 65537}
	kid := func(i int) string { return fmt.Sprintf("%0*d", maxKeyID, i) }
	foreign := &types.Bundle{TrustDomain: "other.org"}
	for i := range 250 {
		foreign.JwtAuthorities = append(foreign.JwtAuthorities, wireKey(t, kid(i), big))
		foreign.WitAuthorities = append(foreign.WitAuthorities, wireWITKey(wireKey(t, kid(500+i), big)))
	}
	set, err := w.bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{foreign}})
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, "keys", set.Results[0].Status, codes.ResourceExhausted, "certificates and keys of the bundle")
}

func TestFederatedBundles(t *testing.T) {
	w, _ := newBundleRecords(t)
	given := &types.Bundle{
		TrustDomain: "other.org", SequenceNumber: 42, RefreshHint: 60,
		X509Authorities: []*types.X509Certificate{newRoot(t)}, JwtAuthorities: []*types.JWTKey{newKey(t, "k")},
	}
	given.X509Authorities[0].Tainted = true
	create := func(b *types.Bundle) *bundlev1.BatchCreateFederatedBundleResponse_Result {
		t.Helper()
		resp, err := w.bundles.BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0]
	}
	update := func(b *types.Bundle, in, out *types.BundleMask) *bundlev1.BatchUpdateFederatedBundleResponse_Result {
		t.Helper()
		resp, err := w.bundles.BatchUpdateFederatedBundle(t.Context(), &bundlev1.BatchUpdateFederatedBundleRequest{Bundle: []*types.Bundle{b}, InputMask: in, OutputMask: out})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0]
	}
	set := func(b *types.Bundle) *bundlev1.BatchSetFederatedBundleResponse_Result {
		t.Helper()
		resp, err := w.bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		if err != nil {
			t.Fatal(err)
		}
		return resp.Results[0]
	}
	get := func() *types.Bundle {
		t.Helper()
		b, err := w.bundles.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.org"})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}

	wantStatus(t, "update none", update(given, nil, nil).Status, codes.NotFound, "bundle not found")
	r := create(given)
	wantStatus(t, "create", r.Status, codes.OK, "OK")
	if !proto.Equal(r.Bundle, given) || !proto.Equal(get(), given) {
		t.Errorf("created %v\nwant    %v", r.Bundle, given)
	}
	if r := create(given); r.Bundle != nil {
		t.Errorf("a failed creation shows %v", r.Bundle)
	} else {
		wantStatus(t, "create again", r.Status, codes.AlreadyExists, "bundle already exists")
	}

	for name, mask := range map[string]*types.BundleMask{
		"X.509": {X509Authorities: true}, "JWT": {JwtAuthorities: true}, "refresh hint": {RefreshHint: true}, "sequence number": {SequenceNumber: true},
	} {
		before := get()
		change := &types.Bundle{TrustDomain: "other.org", SequenceNumber: before.SequenceNumber + 10, RefreshHint: before.RefreshHint + 1,
			X509Authorities: []*types.X509Certificate{newRoot(t)}, JwtAuthorities: []*types.JWTKey{newKey(t, "l")}}
		want := proto.Clone(before).(*types.Bundle)
		switch name {
		case "X.509":
			want.X509Authorities = change.X509Authorities
		case "JWT":
			want.JwtAuthorities = change.JwtAuthorities
		case "refresh hint":
			want.RefreshHint = change.RefreshHint
		case "sequence number":
			want.SequenceNumber = change.SequenceNumber
		}
		if name != "sequence number" {
			want.SequenceNumber++ // what changed is numbered
		}
		r := update(change, mask, &types.BundleMask{RefreshHint: true})
		wantStatus(t, name, r.Status, codes.OK, "OK")
		if got := get(); !proto.Equal(got, want) {
			t.Errorf("%s: updated to %v\nwant %v", name, got, want)
		}
		if !proto.Equal(r.Bundle, &types.Bundle{TrustDomain: "other.org", RefreshHint: want.RefreshHint}) {
			t.Errorf("%s: answered with %v", name, r.Bundle)
		}
	}

	other := &types.Bundle{TrustDomain: "other.org", SequenceNumber: 7, X509Authorities: []*types.X509Certificate{newRoot(t)}}
	if r := set(other); codes.Code(r.Status.Code) != codes.OK || !proto.Equal(r.Bundle, other) || !proto.Equal(get(), other) {
		t.Errorf("set to %v", r)
	}
	third := &types.Bundle{TrustDomain: "spiffe://third.org", SequenceNumber: 1}
	if r := set(third); codes.Code(r.Status.Code) != codes.OK || r.Bundle.TrustDomain != "third.org" {
		t.Errorf("set a new one: %v", r)
	}
	if n, err := w.bundles.CountBundles(t.Context(), &bundlev1.CountBundlesRequest{}); err != nil || n.Count != 3 {
		t.Errorf("counted %v, %v", n, err)
	}
}

func TestFederatedBundles_T01_T02_MalformedOnesAndThoseWithKeysOfOursAreRefused(t *testing.T) {
	w, own := newBundleRecords(t)
	for text, b := range map[string]*types.Bundle{
		"trust domain \"\" is not valid":                    {},
		"trust domain \"No\" is not valid":                  {TrustDomain: "No"},
		"own trust domain":                                  {TrustDomain: "example.org"},
		"X.509 authority 0: x509":                           {TrustDomain: "other.org", X509Authorities: []*types.X509Certificate{{}}},
		"JWT authority 0: missing key ID":                   {TrustDomain: "other.org", JwtAuthorities: []*types.JWTKey{{}}},
		"refresh hint is -1 seconds":                        {TrustDomain: "other.org", RefreshHint: -1},
		"refresh hint is 9223372036854775807":               {TrustDomain: "other.org", RefreshHint: 1<<63 - 1},
		"X.509 authority 0 has a key of trust domain":       {TrustDomain: "other.org", X509Authorities: own.X509Authorities}, // T-01
		"JWT authority \"own\" has a key of trust domain":   {TrustDomain: "other.org", JwtAuthorities: own.JwtAuthorities},
		"JWT authority \"other\" has a key of trust domain": {TrustDomain: "other.org", JwtAuthorities: []*types.JWTKey{{KeyId: "other", PublicKey: own.JwtAuthorities[0].PublicKey}}},
	} {
		bundles := []*types.Bundle{b}
		set, err := w.bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: bundles})
		if err != nil {
			t.Fatal(err)
		}
		wantStatus(t, "set", set.Results[0].Status, codes.InvalidArgument, text)
		created, err := w.bundles.BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: bundles})
		if err != nil {
			t.Fatal(err)
		}
		wantStatus(t, "create", created.Results[0].Status, codes.InvalidArgument, text)
	}
	set, err := w.bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{{TrustDomain: "other.org", WitAuthorities: []*types.WITKey{{}}}}})
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, "WIT", set.Results[0].Status, codes.InvalidArgument, "WIT authority 0: missing key ID")
	for _, name := range []string{"example.org", "spiffe://example.org", "", "No"} {
		_, err := w.bundles.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: name})
		wantCode(t, "get "+name, err, codes.InvalidArgument, "trust domain")
		deleted, err := w.bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{name}})
		if err != nil {
			t.Fatal(err)
		}
		wantStatus(t, "delete "+name, deleted.Results[0].Status, codes.InvalidArgument, "trust domain")
	}
	_, err = w.bundles.GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "other.org"})
	wantCode(t, "get", err, codes.NotFound, "bundle not found")
	if got, err := w.bundles.GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil || !proto.Equal(got, own) {
		t.Errorf("the own bundle became %v, %v", got, err)
	}
}

func TestFederatedBundlesAreListedInPagesWithoutTheOwn(t *testing.T) {
	w, _ := newBundleRecords(t)
	var bundles []*types.Bundle
	for _, name := range []string{"z.org", "a.org", "f.org", "b.org", "y.org"} { // on both sides of example.org
		bundles = append(bundles, &types.Bundle{TrustDomain: name, SequenceNumber: 1, RefreshHint: 5})
	}
	if _, err := w.bundles.BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: bundles}); err != nil {
		t.Fatal(err)
	}
	for size := range int32(7) {
		var got []string
		for token := ""; ; {
			resp, err := w.bundles.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: size, PageToken: token, OutputMask: &types.BundleMask{RefreshHint: true}})
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range resp.Bundles {
				got = append(got, b.TrustDomain)
				if b.SequenceNumber != 0 || b.RefreshHint != 5 {
					t.Errorf("got %v, want it masked", b)
				}
			}
			if token = resp.NextPageToken; token == "" {
				break
			}
			if len(resp.Bundles) != int(size) {
				t.Errorf("a page of %d has %d", size, len(resp.Bundles))
			}
		}
		if !slices.Equal(got, []string{"a.org", "b.org", "f.org", "y.org", "z.org"}) {
			t.Errorf("pages of %d: got %v", size, got)
		}
	}
	_, err := w.bundles.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageSize: -1})
	wantCode(t, "negative", err, codes.InvalidArgument, "page size")
	_, err = w.bundles.ListFederatedBundles(t.Context(), &bundlev1.ListFederatedBundlesRequest{PageToken: "x"})
	wantCode(t, "token", err, codes.InvalidArgument, "page token")
}

func TestTheModesOfDeletingAFederatedBundle(t *testing.T) {
	for _, c := range []struct {
		mode    bundlev1.BatchDeleteFederatedBundleRequest_Mode
		code    codes.Code
		entries int32
	}{
		{bundlev1.BatchDeleteFederatedBundleRequest_RESTRICT, codes.FailedPrecondition, 1},
		{bundlev1.BatchDeleteFederatedBundleRequest_DELETE, codes.OK, 0},
		{bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE, codes.OK, 1},
	} {
		t.Run(c.mode.String(), func(t *testing.T) {
			w, _ := newBundleRecords(t)
			if _, err := w.bundles.BatchCreateFederatedBundle(t.Context(), &bundlev1.BatchCreateFederatedBundleRequest{Bundle: []*types.Bundle{{TrustDomain: "other.org"}}}); err != nil {
				t.Fatal(err)
			}
			e := wireEntry("/w", wireID("/p"))
			e.FederatesWith = []string{"other.org"}
			w.create(t, e)
			resp, err := w.bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"other.org", "none.org"}, Mode: c.mode})
			if err != nil {
				t.Fatal(err)
			}
			wantStatus(t, "other.org", resp.Results[0].Status, c.code, "")
			wantStatus(t, "none.org", resp.Results[1].Status, codes.NotFound, "bundle not found")
			if resp.Results[0].TrustDomain != "other.org" {
				t.Errorf("got %v", resp.Results[0])
			}
			n, err := w.entries.CountEntries(t.Context(), &entryv1.CountEntriesRequest{})
			if err != nil || n.Count != c.entries {
				t.Errorf("%v entries are left, %v", n, err)
			}
			if td := spiffeid.RequireTrustDomainFromString("other.org"); (w.registry.View().Bundle(td) == nil) != (c.code == codes.OK) {
				t.Errorf("bundle: %v", w.registry.View().Bundle(td))
			}
		})
	}
	w, _ := newBundleRecords(t)
	_, err := w.bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{Mode: 9})
	wantCode(t, "mode", err, codes.InvalidArgument, "unknown mode")
	_, err = w.bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: make([]string, maxBatch+1)})
	wantCode(t, "batch", err, codes.InvalidArgument, "send several")
}

// FuzzBundleFromWire feeds bundles as an operator, or a foreign trust domain
// through one, may send them.
func FuzzBundleFromWire(f *testing.F) {
	f.Add([]byte{})
	whole, err := proto.Marshal(&types.Bundle{TrustDomain: "other.org", X509Authorities: []*types.X509Certificate{newRoot(f)}, JwtAuthorities: []*types.JWTKey{newKey(f, "k")}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Fuzz(func(t *testing.T, data []byte) {
		var w types.Bundle
		if proto.Unmarshal(data, &w) != nil {
			return
		}
		td, set, err := bundleFromWire(&w, nil)
		if err != nil {
			return
		}
		b := &bundle.Bundle{TrustDomain: td}
		set(b)
		if _, err := b.Record(); err != nil {
			t.Errorf("accepted what cannot be stored: %v", err)
		}
		if _, err := bundleToWire(b, nil); err != nil {
			t.Errorf("accepted what cannot be sent: %v", err)
		}
		b.JWKS()
		b.Pool()
	})
}

func FuzzEntryFromWire(f *testing.F) {
	f.Add([]byte{})
	data, err := proto.Marshal(whole())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		var w types.Entry
		if proto.Unmarshal(data, &w) != nil {
			return
		}
		set, err := entryFromWire(&w, nil)
		if err != nil {
			return
		}
		e := newEntryOf(set)
		if e.Validate(recordsTD) != nil {
			return
		}
		again, err := entryFromWire(entryToWire(e, nil), nil)
		if err != nil {
			t.Fatalf("an entry that was read cannot be read again: %v", err)
		}
		if f := newEntryOf(again); f.Key() != e.Key() || f.Hint != e.Hint || !f.ExpiresAt.Equal(e.ExpiresAt) {
			t.Errorf("got %+v, want %+v", f, e)
		}
	})
}
