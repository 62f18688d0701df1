package test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestATokenOfAnotherMakersProviderIsExchangedForAnSVID has a server that takes
// tokens of an OpenID Connect provider, and a caller without an agent.
func TestATokenOfAnotherMakersProviderIsExchangedForAnSVID(t *testing.T) {
	t.Parallel()
	provider, sign := oidcProvider(t)
	authority := harness.NewAuthority(t)
	address := harness.FreeAddress(t)
	issuer := "https://" + address
	d := harness.NewDomain(t, harness.Settings{})
	// The server's user must be able to read the key.
	certPath, keyPath := authority.ServerFiles(t, "127.0.0.1")
	server := fmt.Sprintf("token_exchange: {listen: '%s', issuer: '%s', https_web: {certificate: %s, key: %s}, "+
		"issuers: [{name: github, preset: github, issuer: '%s', allow_loopback: true}]}\n", address, issuer, certPath, keyPath, provider)
	file := filepath.Join(d.Dir, "server.yaml")
	config, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(config, server...), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartServer(t)
	d.Admin(t, "entry", "create", "--spiffe-id", "/deploy", "--parent-id", "/hallmark/issuer/github",
		"--selector", "github:repository_id:42", "--selector", "github:ref:refs/heads/main")

	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: authority.Pool()}}}
	t.Cleanup(client.CloseIdleConnections)
	exchange := func(token string) map[string]any {
		t.Helper()
		resp, err := client.PostForm(issuer+"/token", url.Values{
			"grant_type": {"urn:ietf:params:oauth:grant-type:token-exchange"}, "subject_token": {token},
			"subject_token_type": {"urn:ietf:params:oauth:token-type:id_token"}, "audience": {"https://api.example.org"},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		var out map[string]any
		if err := json.Unmarshal(body, &out); err != nil {
			t.Fatalf("%v: %s", err, body)
		}
		return out
	}
	job := sign(map[string]any{"sub": "repo:acme/shop:ref:refs/heads/main", "aud": issuer, "repository_id": "42", "ref": "refs/heads/main", "jti": "1"})
	got := exchange(job)
	if got["spiffe_id"] != "spiffe://example.org/deploy" || !strings.HasPrefix(fmt.Sprint(got["access_token"]), "eyJ") {
		t.Errorf("got %v", got)
	}
	if again := exchange(job); again["error"] != "invalid_request" || !strings.Contains(fmt.Sprint(again["error_description"]), "used before") {
		t.Errorf("got %v", again)
	}
	fork := sign(map[string]any{"sub": "repo:acme/shop:ref:refs/heads/main", "aud": issuer, "repository_id": "43", "ref": "refs/heads/main"})
	if refused := exchange(fork); refused["error"] != "invalid_request" {
		t.Errorf("got %v", refused)
	}
	if log := d.Server.Stderr(); !strings.Contains(log, "token endpoint") || strings.Contains(log, job) {
		t.Errorf("the log is\n%s", log)
	}

	// An administrator sees why.
	dir := t.TempDir()
	examine := func(token string) (string, string, int) {
		t.Helper()
		file := filepath.Join(d.Dir, "examined")
		if err := os.WriteFile(file, []byte(token), 0o644); err != nil {
			t.Fatal(err)
		}
		return harness.Command{Args: []string{"issuer", "test", "--token", file, "--admin-socket", d.AdminSocket}, UID: harness.ServerUID}.Try(t)
	}
	if stdout, stderr, code := examine(fork); code != 1 || !strings.Contains(stdout, "0 of 1 entry") || !strings.Contains(stdout, "✗ github:repository_id:42") || !strings.Contains(stdout, "✓ signature") {
		t.Errorf("exit status %d\n%s%s", code, stdout, stderr)
	}
	if stdout, stderr, code := examine(job); code != 1 || !strings.Contains(stdout, "✗ first use") || !strings.Contains(stdout, "✓ spiffe://example.org/deploy") {
		t.Errorf("exit status %d\n%s%s", code, stdout, stderr)
	}
	fresh := sign(map[string]any{"sub": "repo:acme/shop:ref:refs/heads/main", "aud": issuer, "repository_id": "42", "ref": "refs/heads/main", "jti": "fresh"})
	if stdout, stderr, code := examine(fresh); code != 0 || strings.Contains(stdout, "eyJ") {
		t.Errorf("exit status %d\n%s%s", code, stdout, stderr)
	}
	if stdout, _, code := (harness.Command{Args: []string{"issuer", "lint", "-o", "json", "--admin-socket", d.AdminSocket}, UID: harness.ServerUID}).Try(t); code != 1 || !strings.Contains(stdout, "allow_loopback") {
		t.Errorf("exit status %d\n%s", code, stdout)
	}

	// The same by the command of a job.
	fetch := func(jti string, args ...string) (string, string, int) {
		t.Helper()
		file := filepath.Join(dir, "token")
		claims := map[string]any{"sub": "repo:acme/shop:ref:refs/heads/main", "aud": issuer, "repository_id": "42", "ref": "refs/heads/main", "jti": jti}
		if err := os.WriteFile(file, []byte(sign(claims)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return harness.Command{Args: append(args, "--from-token", file, "--token-endpoint", issuer)}.Try(t)
	}
	if out, errOut, code := fetch("2", "fetch", "x509", "--ca-file", authority.Path, "--write", dir); code != 0 || !strings.Contains(out, "spiffe://example.org/deploy") {
		t.Errorf("exit status %d: %s%s", code, out, errOut)
	}
	if _, err := os.Stat(filepath.Join(dir, "svid.0.key")); err != nil {
		t.Error(err)
	}
	if out, errOut, code := fetch("3", "fetch", "jwt", "--audience", "a", "--ca-file", authority.Path); code != 0 || !strings.HasPrefix(out, "eyJ") {
		t.Errorf("exit status %d: %s%s", code, out, errOut)
	}
	if out, errOut, code := fetch("3", "fetch", "jwt", "--audience", "a", "--ca-file", authority.Path); code == 0 || !strings.Contains(errOut, "used before") {
		t.Errorf("exit status %d: %s%s", code, out, errOut)
	}
	if out, errOut, code := fetch("4", "fetch", "jwt", "--audience", "a"); code == 0 || !strings.Contains(errOut, "certificate") {
		t.Errorf("exit status %d: %s%s", code, out, errOut)
	}

	// To one who does not trust its certificate, no token is sent.
	stranger := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: x509.NewCertPool()}}}
	if _, err := stranger.Get(issuer + "/.well-known/oauth-authorization-server"); err == nil {
		t.Error("the certificate is trusted by one who trusts none")
	}
	resp, err := client.Get(issuer + "/.well-known/oauth-authorization-server")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var metadata map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&metadata); err != nil || metadata["token_endpoint"] != issuer+"/token" {
		t.Errorf("got %v, %v", metadata, err)
	}
}
