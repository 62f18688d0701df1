package test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestARelyingPartyVerifiesByWhatAServerPublishedToADirectory has a file server that
// knows nothing of the trust domain serve a directory, and a relying party that
// reaches nothing else take JWT-SVIDs, of the former key and of the next.
func TestARelyingPartyVerifiesByWhatAServerPublishedToADirectory(t *testing.T) {
	t.Parallel()
	www, err := os.MkdirTemp("", "hallmark-publish-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(www) })
	if err := os.Chown(www, harness.ServerUID, harness.ServerUID); err != nil {
		t.Fatal(err)
	}
	authority := harness.NewAuthority(t)
	files := httptest.NewUnstartedServer(http.FileServer(http.Dir(www)))
	files.TLS = &tls.Config{Certificates: []tls.Certificate{authority.Server(t, "127.0.0.1")}}
	files.StartTLS()
	t.Cleanup(files.Close)
	issuer := files.URL + "/id"
	d := harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf(`
jwt: {issuer: '%s'}
publish:
  - {name: web, bundle: bundle.json, issuers: [{url: '%s', prefix: id}], directory: {path: %s}}
`, issuer, issuer, www)})
	d.StartServer(t)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: authority.Pool()}}}
	t.Cleanup(client.CloseIdleConnections)
	published := func(ctx context.Context) error {
		if out := d.Admin(t, "publish", "list", "-o", "json"); !strings.Contains(out, `"state": "current"`) {
			return fmt.Errorf("publish list printed:\n%s", out)
		}
		return nil
	}
	harness.Eventually(t, "the documents are published", published)

	mint := func() string {
		return strings.TrimSpace(d.Admin(t, "svid", "mint", "jwt", "--spiffe-id", "/web", "--audience", "shop"))
	}
	// Each time one that knows nothing yet.
	verify := func(token string) error {
		provider, err := oidc.NewProvider(oidc.ClientContext(t.Context(), client), issuer)
		if err != nil {
			return err
		}
		got, err := provider.Verifier(&oidc.Config{ClientID: "shop", SupportedSigningAlgs: []string{"ES256"}}).Verify(t.Context(), token)
		if err == nil && got.Subject != "spiffe://example.org/web" {
			return fmt.Errorf("it is of %q", got.Subject)
		}
		return err
	}
	before := mint()
	if err := verify(before); err != nil {
		t.Fatal(err)
	}
	d.Admin(t, "authority", "rotate", "jwt")
	after := mint()
	for name, token := range map[string]string{"former": before, "next": after} {
		if err := verify(token); err != nil {
			t.Errorf("after a rotation, by the %s key: %v", name, err)
		}
	}
	if err := verify(after[:len(after)-4] + "AAAA"); err == nil {
		t.Error("a token with another signature is taken")
	}

	// The bundle is the one that the server has.
	text, err := os.ReadFile(filepath.Join(www, "bundle.json"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("example.org"), text)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(got.JWTAuthorities()); n != 2 || len(got.X509Authorities()) != 1 {
		t.Errorf("the bundle is %s", text)
	}

	// An authority that is taken back is gone from what is published.
	old := only(t, authorities(t, d, "jwt", "active")).ID
	d.Admin(t, "authority", "rotate", "jwt")
	d.Admin(t, "authority", "taint", "jwt", old, "--yes")
	d.Admin(t, "authority", "revoke", "jwt", old, "--yes")
	harness.Eventually(t, "nobody takes what the revoked authority signed", func(context.Context) error {
		if verify(after) == nil {
			return fmt.Errorf("a token that it signed verifies")
		}
		return nil
	})
	if err := verify(mint()); err != nil {
		t.Error(err)
	}
}
