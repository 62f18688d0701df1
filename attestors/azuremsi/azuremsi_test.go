package azuremsi_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/azuremsi"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/test/harness"
)

const (
	tenant       = "11111111-2222-3333-4444-555555555555"
	subscription = "d5b40d61-272e-48da-beb9-05f295c42bd6"
	principal    = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func blog() harness.AzureMachine {
	return harness.AzureMachine{Tenant: tenant, Subscription: subscription, ID: "cccccccc-bbbb-cccc-dddd-eeeeeeeeeeee", Name: "blog", Principal: principal}
}

func newAzure(t testing.TB) *harness.Azure { return harness.NewAzure(t, blog(), "127.0.0.1:1") }

// trusting is a configuration that admits the machine of an Azure of the test's own.
func trusting(a *harness.Azure) azuremsi.ServerConfig {
	return azuremsi.ServerConfig{Tenants: []azuremsi.TenantConfig{{TenantID: strings.ToUpper(tenant), SubscriptionAllowList: []string{subscription}, JWKSPath: a.Keys}}}
}

func newServer(t testing.TB, c azuremsi.ServerConfig) *azuremsi.Server {
	t.Helper()
	s, err := azuremsi.New(c, azuremsi.Options{})
	must(t, err)
	return s
}

func newAgent(t testing.TB, a *harness.Azure, c azuremsi.AgentConfig) *azuremsi.Agent {
	t.Helper()
	service := httptest.NewServer(a.Metadata(t))
	t.Cleanup(service.Close)
	c.MetadataAddress = service.URL
	agent, err := azuremsi.NewAgent(c)
	must(t, err)
	return agent
}

func verify(t testing.TB, s *azuremsi.Server, payload []byte) (*attestors.Evidence, error) {
	t.Helper()
	return s.Verify(t.Context(), payload, func(context.Context, []byte) ([]byte, error) {
		t.Error("the node is challenged")
		return nil, context.Canceled
	})
}

func attest(t testing.TB, s *azuremsi.Server, a *azuremsi.Agent) (*attestors.Evidence, error) {
	t.Helper()
	proof, err := a.Proof(t.Context())
	must(t, err)
	return verify(t, s, proof)
}

func TestAMachineIsWhatItsTokenSays(t *testing.T) {
	azure := newAzure(t)
	e, err := attest(t, newServer(t, trusting(azure)), newAgent(t, azure, azuremsi.AgentConfig{}))
	must(t, err)
	if want := "azure_msi/" + tenant + "/" + principal; e.Path != want {
		t.Errorf("path is %s, want %s", e.Path, want)
	}
	if e.CanReattest || !e.Once {
		t.Error("the token admits more than once")
	}
	var got []string
	for _, s := range e.Selectors {
		got = append(got, s.String())
	}
	if !slices.Equal(got, []string{"azure_msi:subscription-id:" + subscription, "azure_msi:vm-name:frontend:blog"}) {
		t.Errorf("selectors are %q", got)
	}
}

func TestATemplateNamesTheAgentAndAResourceIsTheServersOwn(t *testing.T) {
	azure := newAzure(t)
	c := trusting(azure)
	c.AllowReattestation, c.AgentPathTemplate = true, "{{ .PluginName }}/{{ .SubscriptionID }}/{{ .ResourceGroup }}/{{ .VMName }}"
	c.Tenants[0].ResourceID = "api://hallmark"
	s := newServer(t, c)
	e, err := attest(t, s, newAgent(t, azure, azuremsi.AgentConfig{ResourceID: "api://hallmark"}))
	must(t, err)
	if want := "azure_msi/" + subscription + "/frontend/blog"; e.Path != want || !e.CanReattest || e.Once {
		t.Errorf("the evidence is %+v", e)
	}
	if _, err := attest(t, s, newAgent(t, azure, azuremsi.AgentConfig{})); err == nil || !strings.Contains(err.Error(), "audience") {
		t.Errorf("with a token for Azure: %v", err)
	}
}

func TestEntraHasTwoNames(t *testing.T) {
	azure := newAzure(t)
	claims := blog().Claims(azuremsi.DefaultResource)
	claims["iss"] = "https://login.microsoftonline.com/" + tenant + "/v2.0"
	_, err := verify(t, newServer(t, trusting(azure)), payload(t, azure.SignToken(t, claims)))
	must(t, err)
}

func payload(t testing.TB, token string) []byte {
	t.Helper()
	data, err := json.Marshal(map[string]string{"token": token})
	must(t, err)
	return data
}

// TestATokenThatProvesNothingIsRefused goes through tokens by which nobody must
// become a node.
func TestATokenThatProvesNothingIsRefused(t *testing.T) {
	azure := newAzure(t)
	s := newServer(t, trusting(azure))
	stranger, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	public, err := x509.MarshalPKIXPublicKey(azure.RootKey.Public())
	must(t, err)
	claims := func(change func(map[string]any)) map[string]any {
		c := blog().Claims(azuremsi.DefaultResource)
		change(c)
		return c
	}
	with := func(name string, value any) string {
		return azure.SignToken(t, claims(func(c map[string]any) { c[name] = value }))
	}
	without := func(name string) string {
		return azure.SignToken(t, claims(func(c map[string]any) { delete(c, name) }))
	}
	same := claims(func(map[string]any) {})
	good := azure.SignToken(t, same)
	parts := strings.Split(good, ".")
	raw := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	const group = "/subscriptions/" + subscription + "/resourcegroups/frontend/providers/"
	for name, c := range map[string]struct{ token, want string }{
		"a stranger's key":             {harness.SignJWT(t, jose.RS256, stranger, harness.AzureKeyID, same), "signature"},
		"no algorithm":                 {raw(`{"alg":"none"}`) + "." + parts[1] + ".", ""},
		"the public key as secret":     {harness.SignJWT(t, jose.HS256, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), harness.AzureKeyID, same), ""},
		"another algorithm of the key": {harness.SignJWT(t, jose.PS256, azure.RootKey, harness.AzureKeyID, same), "not allowed"},
		"an elliptic key":              {harness.SignJWT(t, jose.ES256, ec, harness.AzureKeyID, same), "not allowed"},
		"another's claims":             {parts[0] + "." + raw(`{"iss":"https://sts.windows.net/`+tenant+`/"}`) + "." + parts[2], ""},
		"another resource":             {with("aud", "https://vault.azure.net"), "audience"},
		"a resource like it":           {with("aud", "https://management.azure.com"), "audience"},
		"no resource":                  {without("aud"), "aud"},
		"another tenant":               {with("iss", "https://sts.windows.net/99999999-2222-3333-4444-555555555555/"), "may not attest"},
		"an issuer of no tenant":       {with("iss", "https://sts.windows.net/"), "may not attest"},
		"the tenant of another":        {with("tid", "99999999-2222-3333-4444-555555555555"), "but its issuer is"},
		"no tenant":                    {without("tid"), "no tenant's ID"},
		"expired": {azure.SignToken(t, claims(func(c map[string]any) {
			c["iat"], c["exp"] = time.Now().Add(-2*time.Hour).Unix(), time.Now().Add(-time.Hour).Unix()
		})), "expired"},
		"of the day before yesterday":  {azure.SignToken(t, claims(func(c map[string]any) { c["iat"] = time.Now().Add(-48 * time.Hour).Unix() })), "it is taken for"},
		"of tomorrow":                  {with("nbf", time.Now().Add(24*time.Hour).Unix()), ""},
		"without end":                  {without("exp"), "exp"},
		"a foreign subscription":       {with("xms_mirid", strings.Replace(group, "d5b4", "aaaa", 1)+"Microsoft.Compute/virtualMachines/blog"), "may not attest"},
		"an identity of many machines": {with("xms_mirid", group+"Microsoft.ManagedIdentity/userAssignedIdentities/shared"), "system-assigned"},
		"a scale set's":                {with("xms_mirid", group+"Microsoft.Compute/virtualMachineScaleSets/web"), "system-assigned"},
		"a function's":                 {with("xms_mirid", group+"Microsoft.Web/sites/fn"), "system-assigned"},
		"a person's":                   {without("xms_mirid"), "system-assigned"},
		"a name that goes on":          {with("xms_mirid", group+"Microsoft.Compute/virtualMachines/blog/extensions/x"), "system-assigned"},
		"a name that is a path":        {with("xms_mirid", group+"Microsoft.Compute/virtualMachines/../x"), "system-assigned"},
		"a principal that is a path":   {with("oid", "../../server"), "no object's ID"},
		"no principal":                 {without("oid"), "no object's ID"},
		"half":                         {good[:len(good)/2], ""},
		"nothing":                      {"", "holds no token"},
		"a page":                       {"<html>", ""},
		"far too much":                 {good + strings.Repeat("A", 20<<10), "the most is"},
	} {
		e, err := verify(t, s, payload(t, c.token))
		if err == nil || e != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
	for _, data := range []string{"", "{}", "[]", good, `{"token":7}`} {
		if _, err := verify(t, s, []byte(data)); err == nil {
			t.Errorf("the payload %.20q is taken", data)
		}
	}
}

// TestEntraThatIsAwayIsNotTheNodesFault asks for keys over TLS.
func TestEntraThatIsAwayIsNotTheNodesFault(t *testing.T) {
	azure := newAzure(t)
	down := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }))
	defer down.Close()
	c := trusting(azure)
	c.Tenants[0].JWKSPath, c.Tenants[0].JWKSURL = "", down.URL
	_, err := attest(t, newServer(t, c), newAgent(t, azure, azuremsi.AgentConfig{}))
	if !errors.Is(err, attestors.ErrUnavailable) {
		t.Errorf("error is %v", err)
	}
}

func TestAnAgentSaysWhatIsWrong(t *testing.T) {
	azure := newAzure(t)
	agent := newAgent(t, azure, azuremsi.AgentConfig{})
	for want, h := range map[string]http.HandlerFunc{
		"system-assigned identity": func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, `{"error":"invalid_request","error_description":"Identity not found"}`, http.StatusBadRequest)
		},
		"something else": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) },
		"302": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
		"longer than":     func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, 64<<10)) },
		"than a token":    func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"access_token":"a b"}`)) },
		"answered with":   func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{}`)) },
		"500 Internal Se": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
	} {
		azure.Fail(h)
		if _, err := agent.Proof(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
	azure.Fail(nil)
	if _, err := agent.Proof(t.Context()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	if _, err := agent.Respond(t.Context(), nil); err == nil {
		t.Error("a challenge is answered")
	}
	if _, err := azuremsi.NewAgent(azuremsi.AgentConfig{MetadataAddress: "x"}); err == nil {
		t.Error("an address that is none is taken")
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	azure := newAzure(t)
	for want, change := range map[string]func(*azuremsi.ServerConfig){
		"tenants is missing":                 func(c *azuremsi.ServerConfig) { c.Tenants = nil },
		"tenant_id is no GUID":               func(c *azuremsi.ServerConfig) { c.Tenants[0].TenantID = "example.com" },
		"subscription_allow_list is missing": func(c *azuremsi.ServerConfig) { c.Tenants[0].SubscriptionAllowList = nil },
		`has "*", which is no GUID`:          func(c *azuremsi.ServerConfig) { c.Tenants[0].SubscriptionAllowList = []string{"*"} },
		"it is there twice":                  func(c *azuremsi.ServerConfig) { c.Tenants = append(c.Tenants, c.Tenants[0]) },
		"max_age":                            func(c *azuremsi.ServerConfig) { c.Tenants[0].MaxAge = config.Duration(-time.Second) },
		"/no":                                func(c *azuremsi.ServerConfig) { c.Tenants[0].JWKSPath = "/no" },
		"nothing is fetched":                 func(c *azuremsi.ServerConfig) { c.Tenants[0].JWKSURL = "https://example.org" },
		"does not begin with azure_msi/":     func(c *azuremsi.ServerConfig) { c.AgentPathTemplate = "x/{{ .PrincipalID }}" },
	} {
		c := trusting(azure)
		change(&c)
		if _, err := azuremsi.New(c, azuremsi.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
}

func FuzzVerify(f *testing.F) {
	azure := newAzure(f)
	s := newServer(f, trusting(azure))
	good := azure.SignToken(f, blog().Claims(azuremsi.DefaultResource))
	f.Add(payload(f, good))
	f.Add([]byte(`{"token":"a.b.c"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := verify(t, s, data)
		if err == nil && e.Path != "azure_msi/"+tenant+"/"+principal {
			t.Errorf("admitted as %s", e.Path)
		}
	})
}
