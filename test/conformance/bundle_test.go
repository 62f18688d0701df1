package conformance

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/test/harness"
)

func TestBundle_T04_T07_T08_T09_T14_T15_T16_TheDocumentHasWhatTheStandardsNameAndNothingElse(t *testing.T) {
	w := theWorld(t)
	out := harness.Command{Args: []string{"bundle", "show", "-o", "spiffe", "--admin-socket", w.admin}}.Run(t)
	var doc map[string]any
	d := json.NewDecoder(strings.NewReader(out))
	d.UseNumber()
	must(t, d.Decode(&doc))
	for _, name := range []string{"spiffe_sequence", "spiffe_refresh_hint"} {
		n, ok := doc[name].(json.Number)
		if whole, err := strconv.ParseUint(n.String(), 10, 64); !ok || err != nil || whole == 0 {
			t.Errorf("%s is %v", name, doc[name])
		}
	}
	keys, ok := doc["keys"].([]any)
	if !ok || len(keys) == 0 || len(doc) != 3 {
		t.Fatalf("the document has %v", slices.Sorted(maps.Keys(doc)))
	}
	for _, k := range keys {
		members := slices.Sorted(maps.Keys(k.(map[string]any)))
		want := []string{"crv", "kid", "kty", "use", "x", "y"}
		if k.(map[string]any)["use"] == "x509-svid" {
			want = []string{"crv", "kty", "use", "x", "x5c", "y"}
		}
		if !slices.Equal(members, want) {
			t.Errorf("a key has %v, want %v", members, want)
		}
	}
}

func TestBundle_T12_ATrustDomainWithoutKeysIsTrustedNoMoreAtOnce(t *testing.T) {
	w := theWorld(t)
	foreign := spiffeid.RequireTrustDomainFromString("emptied.org")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{foreign.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	bundles := bundlev1.NewBundleClient(w.server)
	set := func(b *types.Bundle) {
		t.Helper()
		b.TrustDomain = foreign.Name()
		r, err := bundles.BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{b}})
		must(t, err)
		if s := r.Results[0].Status; s.Code != 0 {
			t.Fatal(s.Message)
		}
	}
	set(&types.Bundle{
		SequenceNumber: 1, X509Authorities: []*types.X509Certificate{{Asn1: der}},
		JwtAuthorities: []*types.JWTKey{{KeyId: "k", PublicKey: public}},
	})
	w.entry(t, "/federated", fmt.Sprint("uid:", os.Getuid()), func(e *types.Entry) { e.FederatesWith = []string{foreign.Name()} })
	source, err := workloadapi.NewBundleSource(called(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+w.socket)))
	must(t, err)
	defer source.Close()
	token := (&world{jwtKeyID: "k", jwtKey: key}).token(t, map[string]any{"sub": foreign.IDString() + "/a", "aud": "us", "exp": time.Now().Add(time.Minute).Unix()})
	trusted := func(want bool) {
		t.Helper()
		harness.Eventually(t, "trust", func(context.Context) error {
			roots := 0
			if b, err := source.GetX509BundleForTrustDomain(foreign); err == nil {
				roots = len(b.X509Authorities())
			}
			_, err := w.validate(t, token)
			if (roots > 0) != want || (err == nil) != want {
				return fmt.Errorf("%d roots; the token: %v; want trust: %v", roots, err, want)
			}
			return nil
		})
	}
	trusted(true)
	set(&types.Bundle{SequenceNumber: 2})
	trusted(false)
	_, err = bundles.BatchDeleteFederatedBundle(t.Context(), &bundlev1.BatchDeleteFederatedBundleRequest{TrustDomains: []string{foreign.Name()}, Mode: bundlev1.BatchDeleteFederatedBundleRequest_DISSOCIATE})
	must(t, err)
}
