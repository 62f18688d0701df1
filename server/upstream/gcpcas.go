package upstream

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"time"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/gcpiit"
)

// GCPCASConfig is a pool of Google Cloud's Certificate Authority Service. The
// credentials are those of a service account: of the file, or of the instance
// that the server is on. It needs privateca.certificates.create on the pool.
type GCPCASConfig struct {
	// Pool is its name:
	// projects/PROJECT/locations/LOCATION/caPools/POOL. It is required.
	Pool string `yaml:"pool" env:"expand"`
	// CertificateAuthority is the ID of the CA in the pool that signs. Default: the
	// service chooses one.
	CertificateAuthority string `yaml:"certificate_authority" env:"expand"`
	// MaxPathLength is how many servers may stand below this one, one below the
	// other. Default 0.
	MaxPathLength int `yaml:"max_path_length"`
	// ServiceAccountFile is the key of a service account. Default: that which the
	// environment variable GOOGLE_APPLICATION_CREDENTIALS names; else the service
	// account of the instance.
	ServiceAccountFile string `yaml:"service_account_file" env:"expand"`
	// Endpoint is the URL of what takes the place of Google's: HTTPS, or HTTP on
	// this machine. Default https://privateca.googleapis.com.
	Endpoint string `yaml:"endpoint" env:"expand"`
	// MetadataAddress is the URL of the instance's metadata server, without a path.
	// Default http://169.254.169.254.
	MetadataAddress string `yaml:"metadata_address" env:"expand"`
}

var (
	poolForm  = regexp.MustCompile(`^projects/[a-z0-9:.-]+/locations/[a-z0-9-]+/caPools/[a-zA-Z0-9-]{1,63}$`)
	gcpIDForm = regexp.MustCompile(`^[a-zA-Z0-9-]{0,63}$`)
)

func (c *GCPCASConfig) check() error {
	switch {
	case !poolForm.MatchString(c.Pool):
		return fmt.Errorf("gcp_cas.pool is %q; write it like projects/PROJECT/locations/LOCATION/caPools/POOL", c.Pool)
	case !gcpIDForm.MatchString(c.CertificateAuthority):
		return fmt.Errorf("gcp_cas.certificate_authority is %q; write the ID of a CA in the pool", c.CertificateAuthority)
	case c.MaxPathLength < 0 || c.MaxPathLength > 10:
		return fmt.Errorf("gcp_cas.max_path_length is %d; it is between 0 and 10", c.MaxPathLength)
	}
	if c.Endpoint != "" {
		if _, err := cloud.CheckEndpoint(c.Endpoint); err != nil {
			return fmt.Errorf("gcp_cas.endpoint: %w", err)
		}
	}
	return nil
}

const (
	gcpEndpoint = "https://privateca.googleapis.com"
	gcpScope    = "https://www.googleapis.com/auth/cloud-platform"
)

// gcpCAS is a pool of Google's.
type gcpCAS struct {
	GCPCASConfig
	tokens *gcpiit.Tokens
	api    *cloud.Service
}

func newGCPCAS(c GCPCASConfig, now func() time.Time) (*gcpCAS, error) {
	var err error
	if c.Endpoint, err = cloud.CheckEndpoint(cmp.Or(c.Endpoint, gcpEndpoint)); err != nil {
		return nil, fmt.Errorf("gcp_cas.endpoint: %w", err)
	}
	tokens, err := gcpiit.NewTokens(gcpScope, c.ServiceAccountFile, c.MetadataAddress, now)
	if err != nil {
		return nil, fmt.Errorf("gcp_cas: %w", err)
	}
	return &gcpCAS{c, tokens, cloud.API()}, nil
}

// Name implements [authority.Upstream].
func (g *gcpCAS) Name() (kind, address string) { return "gcp_cas", g.Pool }

// Close implements [Upstream].
func (g *gcpCAS) Close() error { return nil }

// Sign implements [authority.Upstream].
func (g *gcpCAS) Sign(ctx context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	token, err := g.tokens.Bearer(ctx)
	if err != nil {
		return nil, nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	uris := make([]string, 0, 1)
	for _, u := range csr.URIs {
		uris = append(uris, u.String())
	}
	// Not the request itself: whether the pool copies from that is its policy's.
	body, err := json.Marshal(map[string]any{
		"lifetime": strconv.FormatInt(int64(lifetime/time.Second), 10) + "s",
		"config": map[string]any{
			"publicKey": map[string]any{"format": "PEM", "key": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})},
			"subjectConfig": map[string]any{
				"subject":        map[string]any{"commonName": csr.Subject.CommonName, "organization": first(csr.Subject.Organization)},
				"subjectAltName": map[string]any{"uris": uris},
			},
			"x509Config": map[string]any{
				"keyUsage":  map[string]any{"baseKeyUsage": map[string]any{"certSign": true, "crlSign": true}},
				"caOptions": map[string]any{"isCa": true, "maxIssuerPathLength": g.MaxPathLength},
			},
		},
	})
	if err != nil {
		return nil, nil, err
	}
	sum := sha256.Sum256(csr.Raw)
	query := url.Values{"certificateId": {"hallmark-" + hex.EncodeToString(sum[:])[:32]}}
	if g.CertificateAuthority != "" {
		query.Set("issuingCertificateAuthorityId", g.CertificateAuthority)
	}
	answer, err := g.api.Do(ctx, cloud.Question{
		Method: http.MethodPost, URL: g.Endpoint + "/v1/" + g.Pool + "/certificates?" + query.Encode(), Body: string(body), Most: maxAnswer,
		Header: map[string]string{"Authorization": "Bearer " + token, "Content-Type": "application/json"},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("create a certificate: %w", err)
	}
	var made struct {
		Certificate string   `json:"pemCertificate"`
		Chain       []string `json:"pemCertificateChain"`
	}
	if err := json.Unmarshal(answer.Body, &made); err != nil {
		return nil, nil, errors.New("google answered with something else than a certificate")
	}
	certs, err := parsePEM(append([]string{made.Certificate}, made.Chain...)...)
	if err != nil {
		return nil, nil, err
	}
	chain, roots = split(certs)
	return chain, roots, nil
}

func first(texts []string) string {
	if len(texts) == 0 {
		return ""
	}
	return texts[0]
}
