package harness

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Azure stands in for what of Azure a machine and a server see: the metadata
// service, the authorities of the certificate that it signs by, Microsoft Entra and
// the Azure Resource Graph. Documents have Azure's form and real signatures.
type Azure struct {
	CA   string // PEM file of the root, for the configuration
	Keys string // JWKS file of Entra's key, which is the root's

	Root, Intermediate, Leaf *x509.Certificate
	RootKey, Key             *rsa.PrivateKey // of the root, and of the leaf

	cloudFaults

	mu      sync.Mutex
	machine AzureMachine
	fetched int      // how often the intermediate certificate was
	asked   []string // for tokens, by whom
	issued  string   // the machine's token, the last one
}

// AzureMachine is one.
type AzureMachine struct {
	Tenant, Subscription, ID string
	Name, ScaleSet           string
	Tags                     map[string]string
	Gone                     bool
	Principal                string // of its own identity
}

// AzureKeyID is that of Entra's key.
const AzureKeyID = "nOo3ZDrODXEK1jKWhXslHR_KXEg"

// Claims are those of the token of a machine's own identity, for a resource.
func (m AzureMachine) Claims(resource string) map[string]any {
	return map[string]any{
		"aud": resource, "iss": "https://sts.windows.net/" + m.Tenant + "/", "tid": m.Tenant, "oid": m.Principal, "sub": m.Principal,
		"iat": time.Now().Unix(), "nbf": time.Now().Unix(), "exp": time.Now().Add(24 * time.Hour).Unix(),
		"appid": "99999999-8888-7777-6666-555555555555", "appidacr": "2", "idtyp": "app", "ver": "1.0",
		"xms_mirid": "/subscriptions/" + m.Subscription + "/resourcegroups/frontend/providers/Microsoft.Compute/virtualMachines/" + m.Name,
	}
}

// AzureIssuerPath is where the intermediate certificate is, on the host that
// certificates name.
const AzureIssuerPath = "/pkiops/certs/intermediate.crt"

// NewAzure makes it, with a machine. The certificate that signs says that its
// issuer's is on a host, host:port.
func NewAzure(t testing.TB, m AzureMachine, host string) *Azure {
	t.Helper()
	a := &Azure{machine: m}
	a.Root, a.RootKey = IssueRSA(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "Test Global Root"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil)
	var key *rsa.PrivateKey
	a.Intermediate, key = IssueRSA(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "Test Azure TLS Issuing CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, a.Root, a.RootKey)
	a.Leaf, a.Key = IssueRSA(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "metadata.azure.com"}, DNSNames: []string{"metadata.azure.com", "eastus.metadata.azure.com"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IssuingCertificateURL: []string{"http://" + host + AzureIssuerPath},
	}, a.Intermediate, key)
	dir := shortDir(t)
	must(t, os.Chmod(dir, 0o755))
	a.CA = filepath.Join(dir, "root.pem")
	must(t, os.WriteFile(a.CA, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Root.Raw}), 0o644))
	a.Keys = filepath.Join(dir, "keys")
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: a.RootKey.Public(), KeyID: AzureKeyID, Use: "sig"}}})
	must(t, err)
	must(t, os.WriteFile(a.Keys, data, 0o644))
	return a
}

// SignToken signs claims as Entra does.
func (a *Azure) SignToken(t testing.TB, claims map[string]any) string {
	t.Helper()
	return SignJWT(t, jose.RS256, a.RootKey, AzureKeyID, claims)
}

// IssueRSA makes a certificate of a new RSA key, good for a day around now unless
// it says otherwise; without an issuer it is self-signed.
func IssueRSA(t testing.TB, c *x509.Certificate, issuer *x509.Certificate, issuerKey *rsa.PrivateKey) (*x509.Certificate, *rsa.PrivateKey) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	c.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	if c.NotBefore.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-12*time.Hour), time.Now().Add(12*time.Hour)
	}
	if issuer == nil {
		issuer, issuerKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, key.Public(), issuerKey)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert, key
}

// Set changes the machine.
func (a *Azure) Set(m AzureMachine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.machine = m
}

// Fetched returns how often the intermediate certificate was fetched.
func (a *Azure) Fetched() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.fetched
}

// Asked returns who asked for tokens.
func (a *Azure) Asked() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.asked...)
}

// AzureDocument is an attested document as IMDS makes it.
func AzureDocument(m AzureMachine, nonce string, created, expires time.Time) string {
	const form = "01/02/06 15:04:05 -0700"
	return fmt.Sprintf(`{"licenseType":"","nonce":%q,"plan":{"name":"","product":"","publisher":""},"sku":"22_04-lts-gen2","subscriptionId":%q,"timeStamp":{"createdOn":%q,"expiresOn":%q},"vmId":%q}`,
		nonce, m.Subscription, created.UTC().Format(form), expires.UTC().Format(form), m.ID)
}

// Sign signs a document as Azure does: the certificate goes with it, and no other.
func (a *Azure) Sign(t testing.TB, doc string) string {
	t.Helper()
	return strings.ReplaceAll(SignCMS(t, []byte(doc), a.Leaf, a.Key), "\n", "")
}

// Metadata is the machine's metadata service.
func (a *Azure) Metadata(t testing.TB) http.Handler {
	mux := http.NewServeMux()
	reply := func(w http.ResponseWriter, value any) { _ = json.NewEncoder(w).Encode(value) }
	mux.HandleFunc("GET /metadata/attested/document", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		m := a.machine
		a.mu.Unlock()
		doc := AzureDocument(m, r.FormValue("nonce"), time.Now(), time.Now().Add(6*time.Hour))
		reply(w, map[string]string{"encoding": "pkcs7", "signature": a.Sign(t, doc)})
	})
	mux.HandleFunc("GET /metadata/instance/compute", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		reply(w, map[string]string{"name": a.machine.Name, "vmScaleSetName": a.machine.ScaleSet})
	})
	mux.HandleFunc("GET /metadata/identity/oauth2/token", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.asked = append(a.asked, "managed identity")
		a.issued = a.SignToken(t, a.machine.Claims(r.FormValue("resource")))
		reply(w, map[string]string{"access_token": a.issued, "expires_in": "86399", "resource": r.FormValue("resource"), "token_type": "Bearer"})
	})
	return a.metadata(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Metadata") != "true" || r.FormValue("api-version") == "" || r.Header.Get("X-Forwarded-For") != "":
			http.Error(w, `{"error":"Bad request. Required metadata header not specified"}`, http.StatusBadRequest)
		default:
			mux.ServeHTTP(w, r)
		}
	})
}

// API is Entra, the Resource Graph, and the host of the intermediate certificate.
func (a *Azure) API() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+AzureIssuerPath, func(w http.ResponseWriter, _ *http.Request) {
		a.fetched++
		w.Header().Set("Content-Type", "application/octet-stream")
		_, _ = w.Write(a.Intermediate.Raw)
	})
	mux.HandleFunc("POST /{tenant}/oauth2/v2.0/token", func(w http.ResponseWriter, r *http.Request) {
		by := r.FormValue("client_id")
		good := r.FormValue("client_secret") == "app secret" || r.FormValue("client_assertion") == "app.assertion.token"
		if r.PathValue("tenant") != a.machine.Tenant || r.FormValue("grant_type") != "client_credentials" || !good {
			http.Error(w, `{"error":"invalid_client"}`, http.StatusUnauthorized)
			return
		}
		a.asked = append(a.asked, by)
		io.WriteString(w, `{"token_type":"Bearer","expires_in":3599,"access_token":"token-of-azure"}`)
	})
	mux.HandleFunc("POST /providers/Microsoft.ResourceGraph/resources", func(w http.ResponseWriter, r *http.Request) {
		if by := r.Header.Get("Authorization"); by != "Bearer token-of-azure" && by != "Bearer "+a.issued {
			http.Error(w, `{"error":{"code":"AuthenticationFailed"}}`, http.StatusUnauthorized)
			return
		}
		var q struct {
			Subscriptions []string `json:"subscriptions"`
			Query         string   `json:"query"`
		}
		if err := json.NewDecoder(io.LimitReader(r.Body, 1<<20)).Decode(&q); err != nil {
			http.Error(w, "", http.StatusBadRequest)
			return
		}
		m := a.machine
		group := "/subscriptions/" + m.Subscription + "/resourceGroups/frontend/providers/"
		id, data := group+"Microsoft.Compute/virtualMachines/"+m.Name, []any{}
		scaleSet := ""
		if m.ScaleSet != "" {
			scaleSet = group + "Microsoft.Compute/virtualMachineScaleSets/" + m.ScaleSet
		}
		known := len(q.Subscriptions) == 1 && q.Subscriptions[0] == m.Subscription && !m.Gone
		switch {
		case known && strings.Contains(q.Query, "virtualmachines") && strings.Contains(q.Query, "'"+m.ID+"'"):
			data = append(data, map[string]any{
				"id": id, "name": m.Name, "location": "eastus", "resourceGroup": "frontend", "tags": m.Tags, "vmId": m.ID,
				"subscriptionId": m.Subscription, "tenantId": m.Tenant, "scaleSet": scaleSet,
			})
		case known && strings.Contains(q.Query, "networkinterfaces") && strings.Contains(q.Query, "'"+id+"'"):
			data = append(data, map[string]any{
				"securityGroup": group + "Microsoft.Network/networkSecurityGroups/webservers",
				"addresses": []any{map[string]any{"properties": map[string]any{"subnet": map[string]any{
					"id": group + "Microsoft.Network/virtualNetworks/vnet/subnets/default",
				}}}},
			})
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"totalRecords": len(data), "count": len(data), "data": data, "resultTruncated": "false"})
	})
	return a.api(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		mux.ServeHTTP(w, r)
	})
}
