// Package relyingparty has relying parties of other makers take our tokens, by
// the issuer's discovery document alone, and has the clients of clouds call our
// helpers. What stands for a cloud is on loopback.
package relyingparty

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/hallmark-id/hallmark/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const (
	tokenType = "urn:ietf:params:oauth:token-type:jwt"
	workload  = "spiffe://example.org/ns/shop/sa/web"
)

// world is a trust domain with an OIDC issuer, of which the processes of the
// test's user have an identity.
type world struct {
	*harness.Domain
	authority *harness.Authority // of the Web PKI
	issuer    string             // URL
	client    *http.Client       // trusts the Web PKI
}

func newWorld(t *testing.T) *world {
	w := &world{authority: harness.NewAuthority(t)}
	address := harness.FreeAddress(t)
	w.issuer = "https://" + address
	certificate, key := w.authority.ServerFiles(t, "127.0.0.1")
	w.Domain = harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf(`
jwt:
  issuer: %s
  profiles:
    - {audience: sts.amazonaws.com, algorithm: RS256, max_lifetime: 2m, claims: {ns: '{segment.2}'}}
    - {audience: 'https://iam.googleapis.com/*', algorithm: RS256}
    - {audience: 'api://AzureADTokenExchange', algorithm: RS256}
oidc_issuer: {listen: '%s', urls: ['%s'], https_web: {certificate: %s, key: %s}}
`, w.issuer, address, w.issuer, certificate, key)})
	w.StartServer(t)
	w.StartAgent(t, w.Join(t))
	w.Entry(t, strings.TrimPrefix(workload, "spiffe://example.org"), os.Getuid())
	w.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: w.authority.Pool()}}}
	t.Cleanup(w.client.CloseIdleConnections)
	harness.Eventually(t, "the first token", func(context.Context) error {
		_, stderr, code := w.hallmark("fetch", "jwt", "--audience", "x").Try(t)
		if code != 0 {
			return fmt.Errorf("%s", stderr)
		}
		return nil
	})
	return w
}

// hallmark is a command of a workload.
func (w *world) hallmark(args ...string) harness.Command {
	return harness.Command{Args: args, Env: []string{"SPIFFE_ENDPOINT_SOCKET=unix://" + w.Socket}}
}

// line is a command line that another program runs.
func (w *world) line(t testing.TB, args string) string {
	return harness.Binary(t) + " " + args + " --socket " + w.Socket
}

// verify is what a relying party does that knows the issuer's URL alone.
func (w *world) verify(ctx context.Context, token, audience, algorithm string) error {
	provider, err := oidc.NewProvider(oidc.ClientContext(ctx, w.client), w.issuer)
	if err != nil {
		return err
	}
	got, err := provider.Verifier(&oidc.Config{ClientID: audience, SupportedSigningAlgs: []string{algorithm}}).Verify(ctx, token)
	if err == nil && got.Subject != workload {
		err = fmt.Errorf("it is of %q", got.Subject)
	}
	return err
}

// cloud starts what stands for a cloud, with a certificate that its clients
// verify, and returns its URL.
func (w *world) cloud(t *testing.T, serve http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewUnstartedServer(serve)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{w.authority.Server(t, "127.0.0.1")}}
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.URL
}

func answer(rw http.ResponseWriter, status int, v any) {
	rw.Header().Set("Content-Type", "application/json")
	rw.WriteHeader(status)
	_ = json.NewEncoder(rw).Encode(v)
}

// soon is when what a cloud gives ends.
func soon() time.Time { return time.Now().Add(time.Hour).UTC().Truncate(time.Second) }
