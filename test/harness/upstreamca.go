package harness

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1" // what services derive key identifiers with
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// UpstreamCA is a CA of an organisation's, a root and an issuing authority below
// it, which signs authorities of servers. It stands behind what speaks the APIs
// of Vault, step-ca, AWS Private CA and Google's Certificate Authority Service,
// and in files.
type UpstreamCA struct {
	cloudFaults

	Now func() time.Time

	mu       sync.Mutex
	root     *x509.Certificate
	issuing  *x509.Certificate
	key      *ecdsa.PrivateKey // of issuing
	most     time.Duration     // that a certificate lives; 0: as long as asked for
	change   func(*x509.Certificate)
	issued   map[string][]*x509.Certificate // at AWS, by ARN
	polled   map[string]int
	sessions map[string]bool // tokens of Vault's logins
	used     map[string]bool // one-time tokens
}

// NewUpstreamCA makes one, by a clock.
func NewUpstreamCA(t testing.TB, now func() time.Time) *UpstreamCA {
	t.Helper()
	c := &UpstreamCA{Now: now, issued: map[string][]*x509.Certificate{}, polled: map[string]int{}, sessions: map[string]bool{}, used: map[string]bool{}}
	c.Rotate(t)
	return c
}

// Rotate has another root, and an issuing authority below it, take the place of
// those that sign.
func (c *UpstreamCA) Rotate(t testing.TB) {
	t.Helper()
	root, rootKey := c.make(t, "Root", nil, nil, 90*24*time.Hour)
	issuing, key := c.make(t, "Issuing", root, rootKey, 60*24*time.Hour)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.root, c.issuing, c.key = root, issuing, key
}

func (c *UpstreamCA) make(t testing.TB, cn string, parent *x509.Certificate, signer crypto.Signer, life time.Duration) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{Organization: []string{"Example"}, CommonName: cn, SerialNumber: rand.Text()[:8]},
		NotBefore: c.Now().Add(-time.Hour), NotAfter: c.Now().Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if parent == nil {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert, key
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	must(t, err)
	return n.Add(n, big.NewInt(1))
}

// Root is the one that there is now.
func (c *UpstreamCA) Root() *x509.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.root
}

// Most bounds how long certificates live.
func (c *UpstreamCA) Most(life time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.most = life
}

// Change has certificates changed before they are signed; nil: they are not.
func (c *UpstreamCA) Change(change func(*x509.Certificate)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.change = change
}

// Files writes the issuing authority, the root and the key, where the test's
// user alone can read that.
func (c *UpstreamCA) Files(t testing.TB, dir string) (certificate, key, bundle string) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	der, err := x509.MarshalPKCS8PrivateKey(c.key)
	must(t, err)
	certificate, key, bundle = filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key"), filepath.Join(dir, "roots.pem")
	must(t, os.WriteFile(certificate, pemOf(c.issuing), 0o644))
	must(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	must(t, os.WriteFile(bundle, pemOf(c.root), 0o644))
	return certificate, key, bundle
}

func pemOf(certs ...*x509.Certificate) (out []byte) {
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

// sign makes a certificate of an authority, and returns it with what is above it,
// the root last. The lock is held.
func (c *UpstreamCA) sign(public crypto.PublicKey, subject pkix.Name, uris []*url.URL, until time.Time, pathLen int) ([]*x509.Certificate, error) {
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	id := sha1.Sum(spki)
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		return nil, err
	}
	now := c.Now()
	if c.most > 0 && until.After(now.Add(c.most)) {
		until = now.Add(c.most)
	}
	tmpl := &x509.Certificate{
		SerialNumber: n.Add(n, big.NewInt(1)), Subject: subject, URIs: uris, NotBefore: now.Add(-30 * time.Second), NotAfter: until, SubjectKeyId: id[:],
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, MaxPathLen: pathLen, MaxPathLenZero: pathLen == 0,
	}
	if c.change != nil {
		c.change(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.issuing, public, c.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return []*x509.Certificate{cert, c.issuing, c.root}, err
}

func readCSR(text string) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, fmt.Errorf("no CSR")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	return csr, csr.CheckSignature()
}

func (c *UpstreamCA) texts(certs []*x509.Certificate) (out []string) {
	for _, cert := range certs {
		out = append(out, strings.TrimSpace(string(pemOf(cert))))
	}
	return out
}

// serve makes an API that has the lock and may be broken.
func (c *UpstreamCA) serve(mux http.Handler) http.Handler {
	return c.api(func(w http.ResponseWriter, r *http.Request) {
		c.mu.Lock()
		defer c.mu.Unlock()
		mux.ServeHTTP(w, r)
	})
}

// What its Vault lets in.
const (
	VaultToken  = "hvs.token"
	VaultRole   = "4b2a6f0e-role"
	VaultSecret = "e3c9d1f4-secret"
)

// Vault is its PKI engine at /v1/pki, with auth methods. The JWT of Kubernetes'
// is taken if check says so; a client certificate if TLS has verified it.
func (c *UpstreamCA) Vault(checkJWT func(role, token string) bool) http.Handler {
	mux := http.NewServeMux()
	fail := func(w http.ResponseWriter, code int, text string) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"errors": []string{text}})
	}
	login := func(method string, check func(*http.Request, map[string]string) bool) {
		mux.HandleFunc("POST /v1/auth/"+method+"/login", func(w http.ResponseWriter, r *http.Request) {
			var body map[string]string
			if json.NewDecoder(r.Body).Decode(&body) != nil || !check(r, body) {
				fail(w, http.StatusBadRequest, "invalid credentials")
				return
			}
			token := "hvs." + rand.Text()
			c.sessions[token] = true
			_ = json.NewEncoder(w).Encode(map[string]any{"auth": map[string]any{"client_token": token, "lease_duration": 3600}})
		})
	}
	login("approle", func(_ *http.Request, b map[string]string) bool {
		return b["role_id"] == VaultRole && b["secret_id"] == VaultSecret
	})
	login("kubernetes", func(_ *http.Request, b map[string]string) bool {
		return checkJWT != nil && checkJWT(b["role"], b["jwt"])
	})
	login("cert", func(r *http.Request, _ map[string]string) bool { return r.TLS != nil && len(r.TLS.VerifiedChains) > 0 })
	mux.HandleFunc("POST /v1/auth/token/revoke-self", func(w http.ResponseWriter, r *http.Request) {
		delete(c.sessions, r.Header.Get("X-Vault-Token"))
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /v1/pki/root/sign-intermediate", func(w http.ResponseWriter, r *http.Request) {
		token := r.Header.Get("X-Vault-Token")
		if r.Header.Get("X-Vault-Request") != "true" || token != VaultToken && !c.sessions[token] {
			fail(w, http.StatusForbidden, "permission denied")
			return
		}
		var body struct {
			CSR          string `json:"csr"`
			CommonName   string `json:"common_name"`
			URISANs      string `json:"uri_sans"`
			TTL          string `json:"ttl"`
			UseCSRValues bool   `json:"use_csr_values"`
		}
		err := json.NewDecoder(r.Body).Decode(&body)
		if err != nil {
			fail(w, http.StatusBadRequest, err.Error())
			return
		}
		csr, err := readCSR(body.CSR)
		ttl, ttlErr := time.ParseDuration(body.TTL)
		if err != nil || ttlErr != nil || !body.UseCSRValues {
			fail(w, http.StatusBadRequest, "bad request")
			return
		}
		chain, err := c.sign(csr.PublicKey, csr.Subject, csr.URIs, c.Now().Add(ttl), -1)
		if err != nil {
			fail(w, http.StatusInternalServerError, err.Error())
			return
		}
		texts := c.texts(chain)
		_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]any{
			"certificate": texts[0], "issuing_ca": texts[1], "ca_chain": texts[1:], "serial_number": "01", "expiration": chain[0].NotAfter.Unix(),
		}})
	})
	return c.serve(mux)
}

// Sessions is how many logins its Vault has open.
func (c *UpstreamCA) Sessions() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.sessions)
}

// StepCA is its step-ca, with a provisioner of type JWK, and one of type X5C that
// trusts some certificates.
func (c *UpstreamCA) StepCA(provisioner string, key *jose.JSONWebKey, x5c *x509.CertPool) http.Handler {
	mux := http.NewServeMux()
	fail := func(w http.ResponseWriter, code int) {
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"status": code, "message": "The request lacked necessary authorization to be completed."})
	}
	mux.HandleFunc("POST /1.0/sign", func(w http.ResponseWriter, r *http.Request) {
		var body struct {
			CSR      string    `json:"csr"`
			OTT      string    `json:"ott"`
			NotAfter time.Time `json:"notAfter"`
		}
		if json.NewDecoder(r.Body).Decode(&body) != nil {
			fail(w, http.StatusBadRequest)
			return
		}
		csr, err := readCSR(body.CSR)
		if err != nil {
			fail(w, http.StatusBadRequest)
			return
		}
		audience := "http://" + r.Host + "/1.0/sign"
		token, err := jwt.ParseSigned(body.OTT, []jose.SignatureAlgorithm{jose.ES256})
		if err != nil || len(token.Headers) != 1 {
			fail(w, http.StatusUnauthorized)
			return
		}
		var public any = key.Public().Key
		if chains, err := token.Headers[0].Certificates(x509.VerifyOptions{Roots: x5c, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
			public = chains[0][0].PublicKey
			audience += "#x5c/" + provisioner
		} else if token.Headers[0].KeyID != key.KeyID {
			fail(w, http.StatusUnauthorized)
			return
		}
		var claims jwt.Claims
		var more struct {
			SANs []string `json:"sans"`
		}
		var names []string
		for _, u := range csr.URIs {
			names = append(names, u.String())
		}
		if token.Claims(public, &claims, &more) != nil || c.used[claims.ID] || claims.ID == "" || claims.Subject != csr.Subject.CommonName ||
			claims.Validate(jwt.Expected{Issuer: provisioner, AnyAudience: jwt.Audience{audience}, Time: c.Now()}) != nil || !slices.Equal(more.SANs, names) {
			fail(w, http.StatusUnauthorized)
			return
		}
		c.used[claims.ID] = true
		// A template has the common name, as a rule.
		chain, err := c.sign(csr.PublicKey, pkix.Name{CommonName: claims.Subject}, csr.URIs, body.NotAfter, 0)
		if err != nil {
			fail(w, http.StatusInternalServerError)
			return
		}
		texts := c.texts(chain[:2])
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"crt": texts[0], "ca": texts[1], "certChain": texts})
	})
	mux.HandleFunc("GET /roots", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"crts": c.texts([]*x509.Certificate{c.root})})
	})
	return c.serve(mux)
}

// UpstreamARN is its ARN at AWS.
const UpstreamARN = "arn:aws:acm-pca:eu-central-1:123456789012:certificate-authority/11112222-3333-4444-5555-666677778888"

// AWSPCA is its AWS Private CA. Requests are signed with the key and secret. A
// certificate is there when it is asked for the second time.
func (c *UpstreamCA) AWSPCA(keyID, secret string) http.Handler {
	a := &AWS{keys: map[string]aws.Credentials{keyID: {AccessKeyID: keyID, SecretAccessKey: secret}}}
	return c.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refuse := func(code string) {
			w.WriteHeader(http.StatusBadRequest)
			_ = json.NewEncoder(w).Encode(map[string]string{"__type": "com.amazonaws.acmpca#" + code, "message": "no"})
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil || a.signedBy(r, body) != keyID || !strings.Contains(r.Header.Get("Authorization"), "/eu-central-1/acm-pca/aws4_request") {
			refuse("AccessDeniedException")
			return
		}
		var in struct {
			CertificateAuthorityArn, CertificateArn, SigningAlgorithm, TemplateArn string
			Csr                                                                    []byte
			Validity                                                               struct {
				Type  string
				Value int64
			}
		}
		if json.NewDecoder(bytes.NewReader(body)).Decode(&in) != nil || in.CertificateAuthorityArn != UpstreamARN {
			refuse("ResourceNotFoundException")
			return
		}
		switch r.Header.Get("X-Amz-Target") {
		case "ACMPrivateCA.DescribeCertificateAuthority":
			_ = json.NewEncoder(w).Encode(map[string]any{"CertificateAuthority": map[string]any{
				"Arn": UpstreamARN, "Status": "ACTIVE", "CertificateAuthorityConfiguration": map[string]any{"SigningAlgorithm": "SHA256WITHECDSA"},
			}})
		case "ACMPrivateCA.IssueCertificate":
			csr, err := readCSR(string(in.Csr))
			if err != nil || in.SigningAlgorithm != "SHA256WITHECDSA" || in.Validity.Type != "ABSOLUTE" ||
				in.TemplateArn != "arn:aws:acm-pca:::template/SubordinateCACertificate_PathLen0/V1" {
				refuse("InvalidArgsException")
				return
			}
			chain, err := c.sign(csr.PublicKey, csr.Subject, csr.URIs, time.Unix(in.Validity.Value, 0), 0)
			if err != nil {
				refuse("MalformedCSRException")
				return
			}
			arn := UpstreamARN + "/certificate/" + strconv.Itoa(len(c.issued))
			c.issued[arn] = chain
			_ = json.NewEncoder(w).Encode(map[string]string{"CertificateArn": arn})
		case "ACMPrivateCA.GetCertificate":
			chain, ok := c.issued[in.CertificateArn]
			if c.polled[in.CertificateArn]++; c.polled[in.CertificateArn] == 1 {
				refuse("RequestInProgressException")
				return
			}
			if !ok {
				refuse("ResourceNotFoundException")
				return
			}
			_ = json.NewEncoder(w).Encode(map[string]string{"Certificate": string(pemOf(chain[0])), "CertificateChain": string(pemOf(chain[1:]...))})
		default:
			refuse("InvalidAction")
		}
	}))
}

// UpstreamPool is its name at Google Cloud.
const UpstreamPool = "projects/p/locations/europe-west1/caPools/pool"

// GCPCAS is its Certificate Authority Service. It takes tokens of [GCP].
func (c *UpstreamCA) GCPCAS() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/"+UpstreamPool+"/certificates", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer ya29.token" {
			http.Error(w, `{"error":{"code":401,"status":"UNAUTHENTICATED"}}`, http.StatusUnauthorized)
			return
		}
		var in struct {
			Lifetime string
			Config   struct {
				PublicKey struct {
					Format string
					Key    []byte
				}
				SubjectConfig struct {
					Subject        struct{ CommonName, Organization string }
					SubjectAltName struct{ URIs []string }
				}
				X509Config struct {
					KeyUsage struct {
						BaseKeyUsage struct{ CertSign, CRLSign bool }
					}
					CAOptions struct {
						IsCA                bool
						MaxIssuerPathLength int
					}
				}
			}
		}
		bad := func() { http.Error(w, `{"error":{"code":400,"status":"INVALID_ARGUMENT"}}`, http.StatusBadRequest) }
		if json.NewDecoder(r.Body).Decode(&in) != nil || r.FormValue("certificateId") == "" || in.Config.PublicKey.Format != "PEM" ||
			!in.Config.X509Config.CAOptions.IsCA || !in.Config.X509Config.KeyUsage.BaseKeyUsage.CertSign {
			bad()
			return
		}
		block, _ := pem.Decode(in.Config.PublicKey.Key)
		life, err := time.ParseDuration(in.Lifetime)
		if block == nil || err != nil {
			bad()
			return
		}
		public, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			bad()
			return
		}
		var uris []*url.URL
		for _, text := range in.Config.SubjectConfig.SubjectAltName.URIs {
			if u, err := url.Parse(text); err == nil {
				uris = append(uris, u)
			}
		}
		s := in.Config.SubjectConfig.Subject
		chain, err := c.sign(public, pkix.Name{CommonName: s.CommonName, Organization: []string{s.Organization}}, uris, c.Now().Add(life), in.Config.X509Config.CAOptions.MaxIssuerPathLength)
		if err != nil {
			bad()
			return
		}
		texts := c.texts(chain)
		_ = json.NewEncoder(w).Encode(map[string]any{"name": UpstreamPool + "/certificates/" + r.FormValue("certificateId"), "pemCertificate": texts[0], "pemCertificateChain": texts[1:]})
	})
	return c.serve(mux)
}
