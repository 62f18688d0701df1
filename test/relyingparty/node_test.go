package relyingparty

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestLibrariesOfNodeTakeOurTokensByDiscoveryAlone has two libraries that know
// nothing of ours (jose, openid-client) verify tokens. "make relying-parties"
// fetches them and runs it.
func TestLibrariesOfNodeTakeOurTokensByDiscoveryAlone(t *testing.T) {
	dir := os.Getenv("HALLMARK_RELYING_PARTIES")
	if dir == "" {
		t.Skip("\"make relying-parties\" runs it")
	}
	w := newWorld(t)
	node, err := exec.LookPath("node")
	must(t, err)
	verify := func(token, audience, algorithm string) (string, string, int) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "token")
		must(t, os.WriteFile(file, []byte(token), 0o600))
		return harness.Command{
			Path: "/bin/sh", Args: []string{"-c", `exec "$0" "$@" < "$TOKEN"`, node, filepath.Join(dir, "verify.js"), w.issuer, audience, algorithm},
			Env: []string{"NODE_EXTRA_CA_CERTS=" + w.authority.Path, "TOKEN=" + file},
		}.Try(t)
	}
	for audience, algorithm := range map[string]string{"https://api.example.org": "ES256", "sts.amazonaws.com": "RS256"} {
		token := w.hallmark("fetch", "jwt", "--audience", audience).Run(t)
		if stdout, stderr, code := verify(token, audience, algorithm); code != 0 || strings.TrimSpace(stdout) != workload {
			t.Errorf("%s: exit status %d, %s%s", audience, code, stdout, stderr)
		}
		if _, _, code := verify(token, "other", algorithm); code == 0 {
			t.Errorf("%s: another audience takes it", audience)
		}
		head, _, _ := strings.Cut(token, ".")
		if _, _, code := verify(fmt.Sprintf("%s.e30.%s", head, strings.Repeat("A", 86)), audience, algorithm); code == 0 {
			t.Errorf("%s: a token that nobody signed is taken", audience)
		}
	}
}
