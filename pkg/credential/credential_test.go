package credential

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"
)

const secret = "eyJhbGciOiJFUzI1NiJ9.e30.c2ln"

const session = `{"credentialSet":[{"credentials":{"accessKeyId":"A","secretAccessKey":"S","sessionToken":"T","expiration":"2026-03-01T12:00:00Z"}}]}`

const assumed = `<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>` +
	`<AccessKeyId>A</AccessKeyId><SecretAccessKey>S</SecretAccessKey><SessionToken>T</SessionToken><Expiration>2026-03-01T12:00:00Z</Expiration>` +
	`</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>`

// service answers every request alike, and counts them.
func service(t *testing.T, status int, body string) (url string, asked *int) {
	t.Helper()
	asked = new(int)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		*asked++
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
		_, _ = w.Write([]byte(body))
	}))
	t.Cleanup(s.Close)
	return s.URL, asked
}

func client(t testing.TB) *http.Client {
	t.Helper()
	c, err := Client("")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func role(t testing.TB, endpoint string) AWS {
	return AWS{Endpoint: endpoint, RoleARN: "arn:aws:iam::123456789012:role/a/web", SessionName: "web", Client: client(t)}
}

func vaultAt(t testing.TB, address string) Vault {
	return Vault{Address: address, Mount: "jwt", Role: "web", Client: client(t)}
}

func TestAServiceThatLiesGivesNothingAndLearnsNothing(t *testing.T) {
	long := strings.Repeat("x", maxAnswer+1)
	for name, c := range map[string]struct {
		status int
		body   string
	}{
		"nothing": {200, ""}, "no form": {200, "<a/>{"}, "another answer": {200, "<Other/>"}, "too much": {200, assumed + long}, "too much JSON": {200, `{"auth":{"client_token":"x"},"y":"` + long + `"}`},
		"a redirect": {307, ""}, "an error": {500, long[:100]}, "the token back": {403, `{"errors":["` + secret + "\u001b[31m" + `"]}`},
		"no secret": {200, strings.Replace(assumed, "<SecretAccessKey>S", "<SecretAccessKey>", 1)}, "no end": {200, strings.Replace(assumed, "2026-03-01T12:00:00Z", "soon", 1)},
		"an empty token": {200, `{"auth":{"client_token":""}}`}, "a lease of ages": {200, `{"auth":{"client_token":"x","lease_duration":9223372036854775807}}`},
		"a lease below zero": {200, `{"auth":{"client_token":"x","lease_duration":-1}}`}, "null": {200, "null"}, "credentials with an error": {400, assumed},
		"refused": {400, `<ErrorResponse><Error><Code>X</Code><Message>` + secret + "\n" + long[:5000] + `</Message></Error></ErrorResponse>`},
	} {
		t.Run(name, func(t *testing.T) {
			url, asked := service(t, c.status, c.body)
			given, awsErr := role(t, url).Assume(t.Context(), secret)
			token, vaultErr := vaultAt(t, url).Login(t.Context(), secret)
			if given != nil || token != nil || awsErr == nil || vaultErr == nil || *asked != 2 {
				t.Fatalf("got %v, %v, %v, %v after %d requests", given, token, awsErr, vaultErr, *asked)
			}
			for _, err := range []error{awsErr, vaultErr} {
				if text := err.Error(); strings.Contains(text, secret) || strings.ContainsAny(text, "\n\x1b") || len(text) > 600 {
					t.Errorf("the error is %.1000q", text)
				}
			}
		})
	}
}

func TestATokenIsSentOverHTTPSOrToThisMachineAlone(t *testing.T) {
	for _, to := range []string{"", "sts.amazonaws.com", "http://sts.amazonaws.com", "http://127.0.0.1.evil.example", "ftp://127.0.0.1", "https://u:p@x", "https://x/?y", "https://x#y", "https://", "http://[::1", "http://localhost.evil.example"} {
		if _, err := role(t, to).Assume(t.Context(), secret); err == nil {
			t.Errorf("AWS: %q was taken", to)
		}
		if _, err := vaultAt(t, to).Login(t.Context(), secret); err == nil {
			t.Errorf("Vault: %q was taken", to)
		}
	}
	tls := httptest.NewTLSServer(http.NotFoundHandler()) // of an authority that nobody trusts
	t.Cleanup(tls.Close)
	if _, err := role(t, tls.URL).Assume(t.Context(), secret); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("a certificate of nobody's: %v", err)
	}
}

func TestARequestThatCannotBeMeantIsNotSent(t *testing.T) {
	url, asked := service(t, 200, assumed)
	for name, change := range map[string]func(*AWS){
		"no role": func(a *AWS) { a.RoleARN = "" }, "a user": func(a *AWS) { a.RoleARN = "arn:aws:iam::123456789012:user/x" }, "a role with spaces": func(a *AWS) { a.RoleARN += " x" },
		"no session": func(a *AWS) { a.SessionName = "" }, "a session of a path": func(a *AWS) { a.SessionName = "a/b" }, "a long session": func(a *AWS) { a.SessionName = strings.Repeat("x", 65) },
		"a short time": func(a *AWS) { a.Duration = time.Minute }, "a long time": func(a *AWS) { a.Duration = 13 * time.Hour }, "a fraction": func(a *AWS) { a.Duration = time.Hour + time.Millisecond },
	} {
		a := role(t, url)
		change(&a)
		if _, err := a.Assume(t.Context(), secret); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	for _, mount := range []string{"", "/jwt", "jwt/", "../sys", "a/../b", "a//b", "a?b", "a#b", "a%2fb", "./a"} {
		v := vaultAt(t, url)
		v.Mount = mount
		if _, err := v.Login(t.Context(), secret); err == nil {
			t.Errorf("mount %q was taken", mount)
		}
	}
	v := vaultAt(t, url)
	v.Role = ""
	if _, err := v.Login(t.Context(), secret); err == nil || *asked != 0 {
		t.Errorf("no role: %v; %d requests", err, *asked)
	}
	if given, err := role(t, url).Assume(t.Context(), secret); err != nil || given.SessionToken != "T" || given.Expiration.Year() != 2026 {
		t.Errorf("a good one: %+v, %v", given, err)
	}
}

func TestSTSIsThatOfTheRegion(t *testing.T) {
	for region, want := range map[string]string{
		"": "https://sts.amazonaws.com", "eu-central-1": "https://sts.eu-central-1.amazonaws.com", "cn-north-1": "https://sts.cn-north-1.amazonaws.com.cn", "us-gov-west-1": "https://sts.us-gov-west-1.amazonaws.com",
	} {
		if got, err := STSEndpoint(region); err != nil || got != want {
			t.Errorf("%q: got %q, %v", region, got, err)
		}
	}
	for _, region := range []string{"x.evil.example/", "EU", "a@b", "a/b", strings.Repeat("x", 40)} {
		if got, err := STSEndpoint(region); err == nil {
			t.Errorf("%q: got %q", region, got)
		}
	}
}

func TestASessionIsNamedForTheSPIFFEID(t *testing.T) {
	for path, want := range map[string]string{"/web": "web", "/ns/shop/sa/web": "ns.shop.sa.web", "/x": "x--", "": "--", "/a_b-c.d": "a_b-c.d"} {
		if got := SessionName(path); got != want || !sessionForm.MatchString(got) {
			t.Errorf("%q: got %q, want %q", path, got, want)
		}
	}
	if got := SessionName("/" + strings.Repeat("x", 100) + "/end"); len(got) != 64 || !strings.HasSuffix(got, ".end") {
		t.Errorf("got %q", got)
	}
}

func TestGooglesEnvironmentIsHonoured(t *testing.T) {
	env := map[string]string{"GOOGLE_EXTERNAL_ACCOUNT_AUDIENCE": "//iam.googleapis.com/x", "GOOGLE_EXTERNAL_ACCOUNT_TOKEN_TYPE": typeIDToken, "GOOGLE_EXTERNAL_ACCOUNT_OUTPUT_FILE": "/x"}
	r, err := ReadGoogleRequest(func(name string) string { return env[name] })
	if err != nil || r.OutputFile != "/x" {
		t.Fatalf("got %+v, %v", r, err)
	}
	if audience, err := r.TokenAudience(); err != nil || audience != "https://iam.googleapis.com/x" {
		t.Errorf("got %q, %v", audience, err)
	}
	text, err := GoogleAnswer(Token{secret, time.Unix(1620433341, 0)}, r)
	if want := `{"version":1,"success":true,"token_type":"` + typeIDToken + `","id_token":"` + secret + `","expiration_time":1620433341}` + "\n"; err != nil || string(text) != want {
		t.Errorf("got %s, %v", text, err)
	}
	env["GOOGLE_EXTERNAL_ACCOUNT_TOKEN_TYPE"] = "urn:ietf:params:oauth:token-type:saml2"
	if _, err := ReadGoogleRequest(func(name string) string { return env[name] }); err == nil {
		t.Error("a SAML response was promised")
	}
	if _, err := (GoogleRequest{}).TokenAudience(); err == nil {
		t.Error("an audience came from nowhere")
	}
}

func TestAnExecCredentialIsOfTheVersionThatIsAskedFor(t *testing.T) {
	for info, want := range map[string]string{
		"": "client.authentication.k8s.io/v1", `{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1beta1","spec":{"cluster":{"server":"x"}}}`: "client.authentication.k8s.io/v1beta1",
	} {
		if got, err := ExecVersion(info); err != nil || got != want {
			t.Errorf("%s: got %q, %v", info, got, err)
		}
	}
	for _, info := range []string{"{", "[]", `{"kind":"Pod","apiVersion":"client.authentication.k8s.io/v1"}`, `{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1alpha1"}`, `{"kind":"ExecCredential"}`, `"` + strings.Repeat("x", maxExecInfo) + `"`} {
		if got, err := ExecVersion(info); err == nil {
			t.Errorf("%.100s: got %q", info, got)
		}
	}
	text, err := ExecCredential("client.authentication.k8s.io/v1", Token{secret, time.Unix(1620433341, 0)})
	if want := `{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"expirationTimestamp":"2021-05-08T00:22:21Z","token":"` + secret + `"}}` + "\n"; err != nil || string(text) != want {
		t.Errorf("got %s, %v", text, err)
	}
}

// What services answer and clients of Kubernetes ask is of whoever is there.
func FuzzAnswers(f *testing.F) {
	f.Add(200, []byte(assumed))
	f.Add(400, []byte(`<ErrorResponse><Error><Code>X</Code><Message>`+secret+`</Message></Error></ErrorResponse>`))
	f.Add(200, []byte(`{"auth":{"client_token":"x","lease_duration":3600}}`))
	f.Add(201, []byte(session))
	f.Add(403, []byte(`{"message":"Untrusted certificate\n"}`))
	f.Add(403, []byte(`{"errors":["`+secret+`"]}`))
	f.Add(200, []byte(`{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1"}`))
	f.Fuzz(func(t *testing.T, status int, answer []byte) {
		c, err := parseAssumed(status, answer, secret)
		if err == nil && (status != 200 || c.AccessKeyID == "" || c.SecretAccessKey == "" || c.SessionToken == "") {
			t.Errorf("got %+v", c)
		}
		v, vaultErr := parseLogin(status, answer, secret)
		if vaultErr == nil && (status != 200 || v.Token == "" || v.Lease < 0) {
			t.Errorf("got %+v", v)
		}
		for _, err := range []error{err, vaultErr} {
			if err != nil && (strings.Contains(err.Error(), secret) || strings.ContainsAny(err.Error(), "\n\x1b")) {
				t.Errorf("the error is %q", err)
			}
		}
		if c, err := parseSession(status, answer); err == nil && (status/100 != 2 || c.AccessKeyID == "" || c.SecretAccessKey == "" || c.SessionToken == "" || c.Expiration.IsZero()) {
			t.Errorf("got %+v", c)
		} else if err != nil && strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("the error is %q", err)
		}
		if version, err := ExecVersion(string(answer)); err == nil {
			if text, err := ExecCredential(version, Token{Text: secret}); err != nil || !json.Valid(text) {
				t.Errorf("got %s, %v", text, err)
			}
		}
	})
}

func TestASessionOfRolesAnywhereThatCannotBeMeantIsNotAskedFor(t *testing.T) {
	const anchor, profile = "arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/a-1", "arn:aws:rolesanywhere:eu-central-1:123456789012:profile/p-1"
	url, asked := service(t, 201, session)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	chain := []*x509.Certificate{{Raw: []byte{1}, SerialNumber: big.NewInt(7)}}
	good := RolesAnywhere{Endpoint: url, TrustAnchorARN: anchor, ProfileARN: profile, RoleARN: role(t, url).RoleARN, Client: client(t)}
	for name, change := range map[string]func(*RolesAnywhere){
		"no anchor": func(a *RolesAnywhere) { a.TrustAnchorARN = "" }, "a profile as anchor": func(a *RolesAnywhere) { a.TrustAnchorARN = profile },
		"no profile": func(a *RolesAnywhere) { a.ProfileARN = "" }, "another region": func(a *RolesAnywhere) { a.ProfileARN = strings.Replace(profile, "eu", "us", 1) },
		"a region of evil": func(a *RolesAnywhere) { a.TrustAnchorARN = strings.Replace(anchor, "eu-central-1", "evil.example/", 1) },
		"no role":          func(a *RolesAnywhere) { a.RoleARN = "" }, "plain HTTP": func(a *RolesAnywhere) { a.Endpoint = "http://aws.example" }, "a short time": func(a *RolesAnywhere) { a.Duration = time.Minute },
	} {
		a := good
		change(&a)
		if _, err := a.Assume(t.Context(), chain, key, time.Now()); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"no chain":     second(good.Assume(t.Context(), nil, key, time.Now())),
		"a long chain": second(good.Assume(t.Context(), slices.Repeat(chain, maxChain+1), key, time.Now())),
		"Ed25519":      second(good.Assume(t.Context(), chain, edKey, time.Now())),
	} {
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if *asked != 0 {
		t.Errorf("%d requests were sent", *asked)
	}
	if given, err := good.Assume(t.Context(), chain, key, time.Now()); err != nil || given.SessionToken != "T" {
		t.Errorf("a good one: %+v, %v", given, err)
	}
	for body, status := range map[string]int{
		"": 201, "null": 201, `{"credentialSet":[]}`: 201, session: 403, session + "x": 201, strings.Replace(session, `"S"`, `""`, 1): 201,
		strings.Replace(session, "2026-03-01T12:00:00Z", "soon", 1): 201, `{"message":"` + strings.Repeat("x", 5000) + `"}`: 403,
	} {
		at, _ := service(t, status, body)
		lying := good
		lying.Endpoint = at
		if given, err := lying.Assume(t.Context(), chain, key, time.Now()); err == nil || len(err.Error()) > 600 {
			t.Errorf("%d %.100q gave %+v, %v", status, body, given, err)
		}
	}
	for arn, want := range map[string]string{anchor: "https://rolesanywhere.eu-central-1.amazonaws.com", strings.Replace(anchor, "eu-central-1", "cn-north-1", 1): "https://rolesanywhere.cn-north-1.amazonaws.com.cn", profile: ""} {
		if got, _ := RolesAnywhereEndpoint(arn); got != want {
			t.Errorf("%s: got %q", arn, got)
		}
	}
}

func second[T any](_ T, err error) error { return err }
