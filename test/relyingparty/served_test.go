package relyingparty

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

const metadataPath = "/.well-known/openid-configuration"

// TestTheIssuerIsServedBesideTheTokenEndpointIfTheyShareAnAddress has one
// listener, with one certificate, for both.
func TestTheIssuerIsServedBesideTheTokenEndpointIfTheyShareAnAddress(t *testing.T) {
	t.Parallel()
	authority := harness.NewAuthority(t)
	address := harness.FreeAddress(t)
	at := "https://" + address
	certificate, key := authority.ServerFiles(t, "127.0.0.1")
	d := harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf(`
jwt: {issuer: %s/id}
token_exchange: {listen: '%s', issuer: %s, https_web: {certificate: %s, key: %s}, issuers: [{name: x, issuer: 'https://id.example'}]}
oidc_issuer: {listen: '%s', urls: ['%s/id']}
`, at, address, at, certificate, key, address, at)})
	d.StartServer(t)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: authority.Pool()}}}
	t.Cleanup(client.CloseIdleConnections)
	for path, want := range map[string]int{"/id" + metadataPath: 200, "/id/keys": 200, "/.well-known/oauth-authorization-server": 200, "/keys": 404, metadataPath: 404} {
		resp, err := client.Get(at + path)
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: got %s", path, resp.Status)
		}
	}
	resp, err := client.PostForm(at+"/token", url.Values{"grant_type": {"password"}})
	must(t, err)
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(body), "unsupported_grant_type") {
		t.Errorf("the token endpoint answers %s %s", resp.Status, body)
	}
}

// TestBehindAProxyTheIssuerIsServedOverHTTP has the issuer where a proxy ends TLS
// and says in Host which issuer is meant.
func TestBehindAProxyTheIssuerIsServedOverHTTP(t *testing.T) {
	t.Parallel()
	address := harness.FreeAddress(t)
	d := harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf(`
jwt: {issuer: 'https://id.example.org'}
oidc_issuer: {listen: '%s', urls: ['https://id.example.org', 'https://id.example.org/b', 'https://other.example:8445'], plain_http: true}
`, address)})
	d.StartServer(t)
	for host, want := range map[string]int{"id.example.org": 200, "other.example:8445": 200, address: 404, "evil.example": 404} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+address+metadataPath, nil)
		must(t, err)
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		body, err := io.ReadAll(resp.Body)
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != want || want == 200 && (!strings.Contains(string(body), `"issuer":"https://`+host+`"`) || resp.Header.Get("Cache-Control") != "public, max-age=300") {
			t.Errorf("%s: got %s %v %s", host, resp.Status, resp.Header, body)
		}
	}
}
