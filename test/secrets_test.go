package test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestNoLogHasASecretInIt: not at the level debug, and whatever the outcome.
func TestNoLogHasASecretInIt(t *testing.T) {
	t.Parallel()
	log := "log: {level: debug, format: json}\n"
	d := harness.NewDomain(t, harness.Settings{Server: log, Agent: log})
	d.StartServer(t)
	var unused struct{ Token, Join string }
	if err := json.Unmarshal([]byte(d.Admin(t, "token", "generate", "--agent-id", "/other", "-o", "json")), &unused); err != nil || unused.Token == "" || unused.Join == "" {
		t.Fatalf("%+v, %v", unused, err)
	}
	join := d.Join(t)
	d.StartAgent(t, join)
	d.Entry(t, "/caller", callerUID)
	fetch := func(uid int, args ...string) string {
		out, _, _ := harness.Command{Args: append([]string{"fetch"}, append(args, "--socket", d.Socket)...), UID: uid}.Try(t)
		return strings.TrimSpace(out)
	}
	fetch(callerUID, "x509")
	fetch(nobodyUID, "x509")
	token := fetch(callerUID, "jwt", "--audience", "shop")
	minted := strings.TrimSpace(d.Admin(t, "svid", "mint", "jwt", "--spiffe-id", "/minted", "--audience", "shop", "-o", "json"))
	d.Agent.Stop(t)
	d.Server.Stop(t)
	_, _, signature := cut3(token)
	var mintedJWT struct{ Token string }
	if err := json.Unmarshal([]byte(minted), &mintedJWT); err != nil {
		t.Fatalf("%v in %s", err, minted)
	}
	_, _, mintedSignature := cut3(mintedJWT.Token)
	for name, text := range map[string]string{"server": d.Server.Stderr(), "agent": d.Agent.Stderr()} {
		if n := strings.Count(text, "\n"); n < 5 || strings.Count(text, `{"time":`) != n {
			t.Errorf("the %s's log is not JSON, or short:\n%s", name, text)
		}
		for what, secret := range map[string]string{
			"an unused token": unused.Token, "an unused join string": unused.Join, "a used join string": join,
			"a JWT-SVID": signature, "a minted JWT-SVID": mintedSignature, "a private key": "PRIVATE KEY", "a request for a certificate": "CERTIFICATE REQUEST",
		} {
			if secret == "" {
				t.Fatalf("%s was not made", what)
			}
			if strings.Contains(text, secret) {
				t.Errorf("the %s's log has %s in it", name, what)
			}
		}
	}
}

// cut3 cuts a JWT into its parts.
func cut3(token string) (header, payload, signature string) {
	header, rest, _ := strings.Cut(token, ".")
	payload, signature, _ = strings.Cut(rest, ".")
	return header, payload, signature
}
