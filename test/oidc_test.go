package test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc/oidctest"

	"github.com/hallmark-id/hallmark/test/harness"
)

// oidcProvider starts an OpenID Connect provider of another maker on loopback
// and returns its URL and what signs its tokens: claims besides iss, iat and
// exp.
func oidcProvider(t *testing.T) (url string, sign func(claims map[string]any) string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	provider := &oidctest.Server{PublicKeys: []oidctest.PublicKey{{PublicKey: key.Public(), KeyID: "key-1", Algorithm: "RS256"}}}
	server := httptest.NewServer(provider)
	t.Cleanup(server.Close)
	provider.SetIssuer(server.URL)
	return server.URL, func(claims map[string]any) string {
		all := map[string]any{"iss": server.URL, "iat": time.Now().Unix(), "exp": time.Now().Add(10 * time.Minute).Unix()}
		for name, value := range claims {
			all[name] = value
		}
		text, err := json.Marshal(all)
		if err != nil {
			t.Fatal(err)
		}
		return oidctest.SignIDToken(key, "key-1", "RS256", string(text))
	}
}

// TestANodeJoinsByTheTokenOfAnotherMakersProvider attests an agent by the token
// of an OpenID Connect provider, gives its processes an identity by a claim, and
// shows that the token makes no second node.
func TestANodeJoinsByTheTokenOfAnotherMakersProvider(t *testing.T) {
	t.Parallel()
	url, sign := oidcProvider(t)
	dir, err := os.MkdirTemp("", "hallmark-oidc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(dir, "token")
	signed := sign(map[string]any{"sub": "machine-7", "aud": "spiffe://example.org/spire/server", "region": "eu", "jti": "1"})
	if err := os.WriteFile(token, []byte(signed+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("node_attestors: {oidc: {issuers: [{name: plant, issuer: '%s', allow_loopback: true, claims: {region: region}, "+
			"agent_path_template: 'oidc/plant/{{ .Claims.sub }}'}]}}\n", url),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {oidc: {token_path: %s}}\n", dir, token),
	})
	d.StartServer(t)
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")
	const agent = "spiffe://example.org/spire/agent/oidc/plant/machine-7"
	if shown := d.Admin(t, "node", "show", agent, "-o", "json"); !strings.Contains(shown, `"oidc:claim:region:eu"`) || !strings.Contains(shown, `"oidc:sub:machine-7"`) {
		t.Errorf("node show printed:\n%s", shown)
	}
	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server", "--selector", "oidc:claim:region:eu")
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}

	// Who steals the token from the node comes too late.
	thief := filepath.Join(dir, "thief.yaml")
	if err := os.WriteFile(thief, fmt.Appendf(nil, "trust_domain: example.org\nserver: %s\ndata_dir: %s/thief\nsocket: %s/t.sock\nadmin_socket: %s/ta.sock\n"+
		"trust_bundle: %s/bundle.pem\nnode_attestor: {oidc: {token_path: %s}}\n", d.Address, dir, dir, dir, dir, token), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, errOut, code := (harness.Command{Args: []string{"agent", "run", "-c", thief}}).Try(t); code == 0 || !strings.Contains(errOut, "was used before") {
		t.Errorf("exit status %d:\n%s", code, errOut)
	}
}
