package test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestARealAPIServerTakesOurTokens_DI09 has workloads be users of a real cluster:
// kubectl runs "hallmark credential kubernetes", the API server verifies what that
// fetched by discovery alone, and RBAC decides by the SPIFFE ID.
func TestARealAPIServerTakesOurTokens_DI09(t *testing.T) {
	const audience = "https://kubernetes.example.org"
	web, address := harness.NewCertificate(t, "127.0.0.1"), harness.FreeAddress(t)
	issuer := "https://" + address
	ca, err := os.ReadFile(web.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	trust, err := json.Marshal(map[string]any{ // JSON is YAML
		"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration",
		"jwt": []any{map[string]any{
			"issuer":        map[string]any{"url": issuer, "audiences": []string{audience}, "certificateAuthority": string(ca)},
			"claimMappings": map[string]any{"username": map[string]any{"claim": "sub", "prefix": ""}},
			"claimValidationRules": []any{map[string]any{
				"expression": "claims.sub.startsWith('spiffe://example.org/')", "message": "not of the trust domain example.org",
			}},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "authentication.json")
	if err := os.WriteFile(config, trust, 0o644); err != nil {
		t.Fatal(err)
	}
	d := harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf(
		"jwt: {issuer: %q, authority_lifetime: 10m}\noidc_issuer: {listen: %q, urls: [%q], https_web: {certificate: %s, key: %s}}\n", issuer, address, issuer, web.Certificate, web.Key)})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	c := harness.StartCluster(t, "--authentication-config="+config)
	d.Entry(t, "/web", os.Getuid())
	d.Entry(t, "/stranger", os.Getuid())
	d.Entry(t, "/brief", os.Getuid(), "--jwt-ttl", "5s")

	c.Account(t, "shop", "web") // the namespace
	const rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/shop/"
	named := func(kind string, more map[string]any) map[string]any {
		object := map[string]any{"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": map[string]any{"name": "reader"}}
		maps.Copy(object, more)
		return object
	}
	c.Do(t, http.MethodPost, rbac+"roles", named("Role", map[string]any{"rules": []any{rule("", "configmaps", "list")}}))
	c.Do(t, http.MethodPost, rbac+"rolebindings", named("RoleBinding", map[string]any{
		"roleRef":  map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"},
		"subjects": []any{map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "spiffe://example.org/web"}},
	}))

	kubectl := func(path, audience string) (stdout, stderr string, code int) {
		kubeconfig := c.KubeconfigOf(t, strings.Trim(path, "/"), fmt.Sprintf(
			"{exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: %s, args: [credential, kubernetes, "+
				"--socket, %s, --spiffe-id, 'spiffe://example.org%s', --audience, '%s']}}", harness.Binary(t), d.Socket, path, audience))
		return c.Kubectl(kubeconfig, "--namespace", "shop", "get", "configmaps", "-o", "name").Try(t)
	}
	list := func(when string) {
		t.Helper()
		harness.Eventually(t, "kubectl of the workload that may list, "+when, func(context.Context) error {
			if out, complaint, code := kubectl("/web", audience); code != 0 || out != "configmap/kube-root-ca.crt\n" {
				return fmt.Errorf("exit status %d\n%s%s", code, out, complaint)
			}
			return nil
		})
	}
	list("once the API server has asked the issuer")
	if out, complaint, code := kubectl("/stranger", audience); code == 0 ||
		!strings.Contains(complaint, `User "spiffe://example.org/stranger" cannot list resource "configmaps"`) {
		t.Errorf("kubectl of a workload that may not: exit status %d\n%s%s", code, out, complaint)
	}
	if out, complaint, code := kubectl("/web", "https://elsewhere.example.org"); code == 0 || !strings.Contains(complaint, "the server has asked for the client to provide credentials") {
		t.Errorf("kubectl with a token for another audience: exit status %d\n%s%s", code, out, complaint)
	}

	// Whatever else is shown, the API server does not know whose it is.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: c.Pool()}}}
	t.Cleanup(client.CloseIdleConnections)
	answer := func(ctx context.Context, token string) (status int, err error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+c.Address+"/api/v1/namespaces/shop/configmaps", nil)
		if err != nil {
			return 0, err
		}
		r.Header.Set("Authorization", "Bearer "+token)
		resp, err := client.Do(r)
		if err != nil {
			return 0, err
		}
		return resp.StatusCode, resp.Body.Close()
	}
	fetch := func(path string) string {
		return strings.TrimSpace(harness.Command{Args: []string{"fetch", "jwt", "--socket", d.Socket, "--spiffe-id", "spiffe://example.org" + path, "--audience", audience}}.Run(t))
	}
	good := fetch("/web")
	if status, err := answer(t.Context(), good); status != http.StatusOK {
		t.Fatalf("its own token: %d, %v", status, err)
	}
	parsed, err := jwt.ParseSigned(good, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	claims := map[string]any{"iss": issuer, "sub": "spiffe://example.org/web", "aud": audience, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Minute).Unix()}
	forged := func(change map[string]any) string {
		all := maps.Clone(claims)
		maps.Copy(all, change)
		return harness.SignJWT(t, jose.ES256, key, parsed.Headers[0].KeyID, all)
	}
	part := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	_, rest, _ := strings.Cut(good, ".")
	for name, token := range map[string]string{
		"signed by a key of its maker's":      forged(nil),
		"of another issuer":                   forged(map[string]any{"iss": "https://elsewhere.example.org"}),
		"that is not signed":                  part(`{"alg":"none"}`) + "." + strings.Split(rest, ".")[0] + ".",
		"with another subject":                strings.Split(good, ".")[0] + "." + strings.Split(forged(map[string]any{"sub": "spiffe://example.org/admin"}), ".")[1] + "." + strings.Split(good, ".")[2],
		"whose header has another key's name": part(`{"alg":"ES256","kid":"another"}`) + "." + rest,
	} {
		if status, err := answer(t.Context(), token); status != http.StatusUnauthorized {
			t.Errorf("a token %s: %d, %v", name, status, err)
		}
	}
	brief := fetch("/brief")
	if status, err := answer(t.Context(), brief); status != http.StatusForbidden {
		t.Errorf("a token that ends soon: %d, %v", status, err)
	}
	harness.Eventually(t, "a token that has ended is refused", func(ctx context.Context) error {
		if status, err := answer(ctx, brief); status != http.StatusUnauthorized {
			return errors.Join(fmt.Errorf("the answer is %d", status), err)
		}
		return nil
	})

	old := only(t, authorities(t, d, "jwt", "active")).ID
	d.Admin(t, "authority", "rotate", "jwt")
	d.Admin(t, "authority", "taint", "jwt", old, "--yes")
	harness.Eventually(t, "a token of the new authority", func(context.Context) error {
		if fetch("/web") == good {
			return errors.New("it is still of the old one")
		}
		return nil
	})
	list("once the API server has let go of the keys from before a rotation")
	d.Server.Kill()
	list("while the issuer is away")
}
