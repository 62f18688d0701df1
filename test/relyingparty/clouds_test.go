package relyingparty

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	azcloud "github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/processcreds"
	"github.com/aws/aws-sdk-go-v2/credentials/stscreds"
	"github.com/aws/aws-sdk-go-v2/service/sts"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/google/externalaccount"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestTheClientsOfCloudsGetCredentialsByOurHelpers has the libraries of clouds
// call our helpers, and clouds that know the issuer's URL alone take the tokens.
func TestTheClientsOfCloudsGetCredentialsByOurHelpers(t *testing.T) {
	w := newWorld(t)
	t.Run("AWS", w.aws)
	t.Run("IAM Roles Anywhere", w.rolesAnywhere)
	t.Run("Google Cloud", w.google)
	t.Run("Azure", w.azure)
	t.Run("Kubernetes", w.kubernetes)
	t.Run("Vault", w.vault)
	t.Run("a key that is revoked", w.revoked)
}

const role = "arn:aws:iam::123456789012:role/web"

// sts stands for AWS STS: AssumeRoleWithWebIdentity.
func (w *world) sts(rw http.ResponseWriter, r *http.Request) {
	fail := func(code, message string) {
		rw.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(rw, `<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>%s</Code><Message>%s</Message></Error></ErrorResponse>`, code, message)
	}
	switch err := r.ParseForm(); {
	case err != nil || r.Form.Get("Action") != "AssumeRoleWithWebIdentity" || r.Form.Get("Version") != "2011-06-15":
		fail("InvalidAction", "no such action")
		return
	case r.Form.Get("RoleArn") != role:
		fail("AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity")
		return
	case r.Header.Get("Authorization") != "":
		fail("AccessDenied", "the call is not signed")
		return
	}
	if err := w.verify(r.Context(), r.Form.Get("WebIdentityToken"), "sts.amazonaws.com", "RS256"); err != nil {
		fail("InvalidIdentityToken", "the token does not verify")
		return
	}
	fmt.Fprintf(rw, `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult>
<Credentials><AccessKeyId>ASIA</AccessKeyId><SecretAccessKey>secret</SecretAccessKey><SessionToken>session of %s</SessionToken><Expiration>%s</Expiration></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`, r.Form.Get("RoleSessionName"), soon().Format(time.RFC3339))
}

func (w *world) aws(t *testing.T) {
	at := w.cloud(t, w.sts)
	given, err := processcreds.NewProvider(w.line(t, "credential aws --role-arn "+role+" --sts-endpoint "+at+" --ca-file "+w.authority.Path)).Retrieve(t.Context())
	must(t, err)
	if given.AccessKeyID != "ASIA" || given.SecretAccessKey != "secret" || given.SessionToken != "session of ns.shop.sa.web" || !given.CanExpire || time.Until(given.Expires) < 50*time.Minute {
		t.Errorf("the SDK has %+v", given)
	}
	// What is refused is explained, and no token is told.
	stdout, stderr, code := w.hallmark("credential", "aws", "--role-arn", role+"x", "--sts-endpoint", at, "--ca-file", w.authority.Path).Try(t)
	if code != 1 || stdout != "" || !strings.Contains(stderr, "AccessDenied: Not authorized") || strings.Contains(stderr, "eyJ") {
		t.Errorf("exit status %d\n%s%s", code, stdout, stderr)
	}

	file := filepath.Join(t.TempDir(), "dir", "token")
	w.hallmark("credential", "aws", "--token-file", file).Run(t)
	client := sts.New(sts.Options{Region: "eu-central-1", BaseEndpoint: aws.String(at), HTTPClient: w.client})
	given, err = stscreds.NewWebIdentityRoleProvider(client, role, stscreds.IdentityTokenFile(file), func(o *stscreds.WebIdentityRoleOptions) { o.RoleSessionName = "sdk" }).Retrieve(t.Context())
	must(t, err)
	if given.SessionToken != "session of sdk" {
		t.Errorf("the SDK has %+v", given)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the token's file: %v, %v", info.Mode(), err)
	}
}

func (w *world) google(t *testing.T) {
	const provider = "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/hallmark"
	asked := 0
	at := w.cloud(t, func(rw http.ResponseWriter, r *http.Request) {
		asked++
		if err := r.ParseForm(); err != nil || r.Form.Get("audience") != provider || r.Form.Get("subject_token_type") != tokenType {
			answer(rw, http.StatusBadRequest, map[string]string{"error": "invalid_request"})
			return
		}
		if err := w.verify(r.Context(), r.Form.Get("subject_token"), "https:"+provider, "RS256"); err != nil {
			answer(rw, http.StatusBadRequest, map[string]string{"error": "invalid_grant", "error_description": err.Error()})
			return
		}
		answer(rw, http.StatusOK, map[string]any{"access_token": "google", "issued_token_type": "urn:ietf:params:oauth:token-type:access_token", "token_type": "Bearer", "expires_in": 3600})
	})
	t.Setenv("GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES", "1")
	file := filepath.Join(t.TempDir(), "cached")
	patience := 60_000
	source := func(command, file string) (*oauth2.Token, error) {
		ts, err := externalaccount.NewTokenSource(context.WithValue(t.Context(), oauth2.HTTPClient, w.client), externalaccount.Config{
			Audience: provider, SubjectTokenType: tokenType, TokenURL: at + "/v1/token", Scopes: []string{"https://www.googleapis.com/auth/cloud-platform"},
			CredentialSource: &externalaccount.CredentialSource{Executable: &externalaccount.ExecutableConfig{Command: command, TimeoutMillis: &patience, OutputFile: file}},
		})
		must(t, err)
		return ts.Token()
	}
	for _, name := range []string{"", file} {
		token, err := source(w.line(t, "credential gcp"), name)
		must(t, err)
		if token.AccessToken != "google" {
			t.Errorf("the library has %+v", token)
		}
	}
	// What is in the output file is taken without another run.
	if token, err := source("/nowhere/hallmark", file); err != nil || token.AccessToken != "google" || asked != 3 {
		t.Errorf("by the output file: %v, %v, asked %d times", token, err, asked)
	}
	// A refusal is in the form that the library reads, and has no token.
	command := w.hallmark("credential", "gcp")
	command.Env = append(command.Env, "GOOGLE_EXTERNAL_ACCOUNT_AUDIENCE="+provider, "GOOGLE_EXTERNAL_ACCOUNT_TOKEN_TYPE=urn:ietf:params:oauth:token-type:saml2")
	stdout, _, code := command.Try(t)
	var said struct {
		Version       int
		Success       bool
		Code, Message string
	}
	must(t, json.Unmarshal([]byte(stdout), &said))
	if code != 1 || said.Version != 1 || said.Success || said.Code == "" || !strings.Contains(said.Message, "saml2") {
		t.Errorf("exit status %d, %+v", code, said)
	}
}

func (w *world) azure(t *testing.T) {
	const tenant, client = "11111111-2222-3333-4444-555555555555", "66666666-7777-8888-9999-000000000000"
	var at string
	at = w.cloud(t, func(rw http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/.well-known/openid-configuration") {
			answer(rw, http.StatusOK, map[string]string{
				"issuer": at + "/" + tenant + "/v2.0", "token_endpoint": at + "/" + tenant + "/oauth2/v2.0/token", "authorization_endpoint": at + "/" + tenant + "/oauth2/v2.0/authorize",
			})
			return
		}
		if err := r.ParseForm(); err != nil || r.URL.Path != "/"+tenant+"/oauth2/v2.0/token" || r.Form.Get("client_id") != client ||
			r.Form.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
			answer(rw, http.StatusBadRequest, map[string]string{"error": "invalid_request"})
			return
		}
		if err := w.verify(r.Context(), r.Form.Get("client_assertion"), "api://AzureADTokenExchange", "RS256"); err != nil {
			answer(rw, http.StatusUnauthorized, map[string]string{"error": "invalid_client", "error_description": err.Error()})
			return
		}
		answer(rw, http.StatusOK, map[string]any{"access_token": "azure", "token_type": "Bearer", "expires_in": 3600})
	})
	file := filepath.Join(t.TempDir(), "azure.jwt")
	command := w.hallmark("credential", "azure", "--watch")
	command.Env = append(command.Env, "AZURE_FEDERATED_TOKEN_FILE="+file)
	watching := command.Start(t)
	watching.WaitOutput(t, file+" is the token of "+workload)
	made, err := azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
		ClientID: client, TenantID: tenant, TokenFilePath: file, DisableInstanceDiscovery: true,
		ClientOptions: azcore.ClientOptions{Cloud: azcloud.Configuration{ActiveDirectoryAuthorityHost: at}, Transport: w.client},
	})
	must(t, err)
	token, err := made.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{"https://vault.azure.net/.default"}})
	must(t, err)
	if token.Token != "azure" {
		t.Errorf("the SDK has %+v", token)
	}
	// A token that may not be had any more does not stay.
	list := w.Admin(t, "entry", "list", "-o", "json")
	var entries []struct {
		ID       string `json:"id"`
		SPIFFEID string `json:"spiffe_id"`
	}
	must(t, json.Unmarshal([]byte(list), &entries))
	if watching.Stop(t) != 0 {
		t.Error("it does not end well")
	}
	for _, e := range entries {
		if e.SPIFFEID == workload {
			w.Admin(t, "entry", "delete", e.ID)
		}
	}
	harness.Eventually(t, "the token's file to be removed", func(context.Context) error {
		_, stderr, code := w.hallmark("credential", "azure", "--token-file", file).Try(t)
		if _, err := os.Stat(file); code == 0 || err == nil {
			return fmt.Errorf("exit status %d %s, %v", code, stderr, err)
		}
		return nil
	})
	w.Entry(t, strings.TrimPrefix(workload, "spiffe://example.org"), os.Getuid())
	harness.Eventually(t, "the entry to be back", func(context.Context) error {
		if _, stderr, code := w.hallmark("fetch", "jwt", "--audience", "x").Try(t); code != 0 {
			return fmt.Errorf("%s", stderr)
		}
		return nil
	})
}

func (w *world) kubernetes(t *testing.T) {
	const audience = "https://kubernetes.example.org"
	for info, version := range map[string]string{
		"": "client.authentication.k8s.io/v1",
		`{"apiVersion":"client.authentication.k8s.io/v1beta1","kind":"ExecCredential","spec":{"interactive":false}}`: "client.authentication.k8s.io/v1beta1",
	} {
		command := w.hallmark("credential", "kubernetes", "--audience", audience)
		command.Env = append(command.Env, "KUBERNETES_EXEC_INFO="+info)
		var got struct {
			APIVersion, Kind string
			Status           struct {
				Token               string
				ExpirationTimestamp time.Time
			}
		}
		must(t, json.Unmarshal([]byte(command.Run(t)), &got))
		if got.APIVersion != version || got.Kind != "ExecCredential" || time.Until(got.Status.ExpirationTimestamp) < time.Minute {
			t.Errorf("got %+v", got)
		}
		must(t, w.verify(t.Context(), got.Status.Token, audience, "ES256"))
	}
	kubectl, err := exec.LookPath("kubectl")
	if err != nil {
		return // a client more; the form was checked
	}
	at := w.cloud(t, func(rw http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if err := w.verify(r.Context(), token, audience, "ES256"); err != nil {
			answer(rw, http.StatusUnauthorized, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 401})
			return
		}
		answer(rw, http.StatusOK, map[string]any{"kind": "PodList", "apiVersion": "v1", "metadata": map[string]string{}, "items": []any{}})
	})
	config := filepath.Join(t.TempDir(), "kubeconfig")
	must(t, os.WriteFile(config, fmt.Appendf(nil, `
apiVersion: v1
kind: Config
current-context: c
contexts: [{name: c, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: '%s', certificate-authority: %s}}]
users: [{name: u, user: {exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: %s, args: [credential, kubernetes, --audience, '%s', --socket, %s]}}}]
`, at, w.authority.Path, harness.Binary(t), audience, w.Socket), 0o600))
	out := harness.Command{Path: kubectl, Args: []string{"--kubeconfig", config, "get", "--raw", "/api/v1/pods"}}.Run(t)
	if !strings.Contains(out, "PodList") {
		t.Errorf("kubectl says %s", out)
	}
}

func (w *world) vault(t *testing.T) {
	const audience = "https://vault.example.org"
	at := w.cloud(t, func(rw http.ResponseWriter, r *http.Request) {
		var asked struct{ Role, JWT string }
		switch err := json.NewDecoder(r.Body).Decode(&asked); {
		case err != nil || r.Method != http.MethodPost || r.URL.Path != "/v1/auth/workloads/jwt/login" || r.Header.Get("X-Vault-Namespace") != "team":
			answer(rw, http.StatusNotFound, map[string]any{"errors": []string{}})
		case asked.Role != "web":
			answer(rw, http.StatusBadRequest, map[string]any{"errors": []string{"role " + asked.JWT + " could not be found"}})
		case w.verify(r.Context(), asked.JWT, audience, "ES256") != nil:
			answer(rw, http.StatusBadRequest, map[string]any{"errors": []string{"error validating token"}})
		default:
			answer(rw, http.StatusOK, map[string]any{"auth": map[string]any{"client_token": "hvs.x", "accessor": "a", "policies": []string{"default"}, "lease_duration": 3600, "renewable": true}})
		}
	})
	login := func(role string, more ...string) harness.Command {
		c := w.hallmark(append([]string{"credential", "vault", "--role", role, "--audience", audience, "--mount", "workloads/jwt"}, more...)...)
		c.Env = append(c.Env, "VAULT_ADDR="+at, "VAULT_NAMESPACE=team", "VAULT_CACERT="+w.authority.Path)
		return c
	}
	if out := login("web").Run(t); out != "hvs.x\n" {
		t.Errorf("got %q", out)
	}
	if out := login("web", "-o", "json").Run(t); !strings.Contains(out, `"token": "hvs.x"`) || !strings.Contains(out, `"expires_at": "20`) {
		t.Errorf("got %s", out)
	}
	stdout, stderr, code := login("other").Try(t)
	if code != 1 || stdout != "" || !strings.Contains(stderr, "could not be found") || strings.Contains(stderr, "eyJ") {
		t.Errorf("exit status %d\n%s%s", code, stdout, stderr)
	}
	if bytes.Contains([]byte(w.Server.Stderr()), []byte("eyJ")) {
		t.Error("a token is in the server's log")
	}
}

// revoked replaces the keys and distrusts the RSA key that signed, which the
// command line calls a JWT authority like any other.
func (w *world) revoked(t *testing.T) {
	const audience, algorithm = "sts.amazonaws.com", "RS256"
	fetch := func() string { return strings.TrimSpace(w.hallmark("fetch", "jwt", "--audience", audience).Run(t)) }
	before := fetch()
	must(t, w.verify(t.Context(), before, audience, algorithm))
	w.Admin(t, "authority", "rotate", "jwt")
	must(t, w.verify(t.Context(), before, audience, algorithm))
	var authorities []struct{ ID, Kind, Algorithm, State string }
	must(t, json.Unmarshal([]byte(w.Admin(t, "authority", "list", "-o", "json")), &authorities))
	states := map[string]int{}
	for _, a := range authorities {
		if a.Algorithm != algorithm {
			continue
		}
		states[a.Kind+" "+a.State]++
		if a.State == "old" {
			w.Admin(t, "authority", "taint", "--yes", "jwt", a.ID)
			w.Admin(t, "authority", "revoke", "--yes", "jwt", a.ID)
		}
	}
	if states["jwt old"] != 1 || states["jwt active"] != 1 {
		t.Fatalf("authorities for RS256 are %v", states)
	}
	if err := w.verify(t.Context(), before, audience, algorithm); err == nil {
		t.Error("a token of a revoked key is taken")
	}
	harness.Eventually(t, "a token of the new key", func(context.Context) error {
		return w.verify(t.Context(), fetch(), audience, algorithm) // the agent drops what a tainted key signed
	})
}
