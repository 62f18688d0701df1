package upstream

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/server/authority"
)

// StepCAConfig is a step-ca. The server signs a one-time token for each
// certificate, as a provisioner of type JWK or X5C: one of jwk and x5c is set.
// Of that provisioner a template of X.509 must make the certificate an
// authority's; docs/upstream.md has one.
type StepCAConfig struct {
	// Address is its URL, like https://ca.example.org:9000. It is required.
	Address string `yaml:"address" env:"expand"`
	// Root is a PEM file of its root, by which it is known. It is required.
	Root string `yaml:"root" env:"expand"`
	// Provisioner is the name of the provisioner. It is required.
	Provisioner string `yaml:"provisioner" env:"expand"`
	// JWK is the key of a provisioner of type JWK.
	JWK *StepCAJWK `yaml:"jwk"`
	// X5C is a certificate that a provisioner of type X5C trusts.
	X5C *StepCAX5C `yaml:"x5c"`
}

// StepCAJWK is the private key of a provisioner of type JWK.
type StepCAJWK struct {
	// KeyFile is a file with it: a JWK, or a JWE of one with a password, as
	// ca.json has it in encryptedKey. It is required.
	KeyFile string `yaml:"key_file" env:"expand"`
	// PasswordFile is a file with the password, readable by the server alone.
	// Default: the key is not encrypted.
	PasswordFile string `yaml:"password_file" env:"expand"`
}

// StepCAX5C is a certificate, for digital signatures, that a provisioner of type
// X5C trusts.
type StepCAX5C struct {
	// Certificate is a PEM file of it and the intermediate ones that follow it. It
	// is required.
	Certificate string `yaml:"certificate" env:"expand"`
	// Key is a PEM file of its private key. It is required.
	Key string `yaml:"key" env:"expand"`
}

func (c *StepCAConfig) check() error {
	if _, err := cloud.CheckEndpoint(c.Address); err != nil {
		return fmt.Errorf("step_ca.address: %w", err)
	}
	switch {
	case c.Root == "" || c.Provisioner == "":
		return errors.New("step_ca needs root and provisioner")
	case (c.JWK == nil) == (c.X5C == nil):
		return errors.New("step_ca needs one of jwk and x5c")
	case c.JWK != nil && c.JWK.KeyFile == "":
		return errors.New("step_ca.jwk needs key_file")
	case c.X5C != nil && (c.X5C.Certificate == "" || c.X5C.Key == ""):
		return errors.New("step_ca.x5c needs certificate and key")
	}
	return nil
}

// ottTime is how long a one-time token is good.
const ottTime = 5 * time.Minute

// stepCA is one.
type stepCA struct {
	StepCAConfig
	now func() time.Time
}

func newStepCA(c StepCAConfig, now func() time.Time) (*stepCA, error) {
	c.Address = strings.TrimRight(c.Address, "/")
	s := &stepCA{c, now}
	if _, err := s.client(); err != nil {
		return nil, err
	}
	_, _, err := s.signer()
	return s, err
}

// Name implements [authority.Upstream].
func (s *stepCA) Name() (kind, address string) { return "step_ca", s.Address }

// Close implements [Upstream].
func (s *stepCA) Close() error { return nil }

func (s *stepCA) client() (*cloud.Service, error) {
	roots, err := (&pemfile.Bundle{Paths: []string{s.Root}}).Load()
	if err != nil {
		return nil, fmt.Errorf("step_ca.root: %w", err)
	}
	return cloud.APIOver(&tls.Config{RootCAs: roots}), nil
}

// signer makes what signs tokens, and the fragment of their audience. The files
// are read each time.
func (s *stepCA) signer() (signer jose.Signer, fragment string, err error) {
	options := (&jose.SignerOptions{}).WithType("JWT")
	if s.X5C != nil {
		pair, err := tls.LoadX509KeyPair(s.X5C.Certificate, s.X5C.Key)
		if err != nil {
			return nil, "", fmt.Errorf("step_ca.x5c: %w", err)
		}
		algorithm, err := authority.JWTAlgorithm(pair.Leaf.PublicKey)
		if err != nil {
			return nil, "", fmt.Errorf("step_ca.x5c: %w", err)
		}
		signer, err = jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: pair.PrivateKey}, options.WithHeader("x5c", pair.Certificate))
		if err != nil {
			return nil, "", fmt.Errorf("step_ca.x5c: %w", err)
		}
		return signer, "#x5c/" + url.PathEscape(s.Provisioner), nil
	}
	key, err := s.JWK.load()
	if err != nil {
		return nil, "", fmt.Errorf("step_ca.jwk: %w", err)
	}
	algorithm, err := authority.JWTAlgorithm(key.Public().Key)
	if err != nil {
		return nil, "", fmt.Errorf("step_ca.jwk: %w", err)
	}
	signer, err = jose.NewSigner(jose.SigningKey{Algorithm: algorithm, Key: key}, options) // with its kid
	if err != nil {
		return nil, "", fmt.Errorf("step_ca.jwk: %w", err)
	}
	return signer, "", nil
}

// load reads the key. Its errors hold nothing of it.
func (c *StepCAJWK) load() (*jose.JSONWebKey, error) {
	if err := authority.CheckPrivate("key_file", c.KeyFile); err != nil {
		return nil, err
	}
	data, err := pemfile.Read(c.KeyFile, maxSecret)
	if err != nil {
		return nil, err
	}
	if c.PasswordFile != "" {
		password, err := authority.ReadSecret(c.PasswordFile)
		if err != nil {
			return nil, err
		}
		sealed, err := jose.ParseEncryptedCompact(strings.TrimSpace(string(data)),
			[]jose.KeyAlgorithm{jose.PBES2_HS256_A128KW, jose.PBES2_HS384_A192KW, jose.PBES2_HS512_A256KW},
			[]jose.ContentEncryption{jose.A128GCM, jose.A256GCM, jose.A128CBC_HS256, jose.A256CBC_HS512})
		if err != nil {
			return nil, fmt.Errorf("%s is no JWE with a password", c.KeyFile)
		}
		if data, err = sealed.Decrypt([]byte(password)); err != nil {
			return nil, fmt.Errorf("the password in %s does not open %s", c.PasswordFile, c.KeyFile)
		}
	}
	var key jose.JSONWebKey
	if err := json.Unmarshal(data, &key); err != nil || !key.Valid() || key.IsPublic() {
		return nil, fmt.Errorf("%s holds no private JWK; if it is encrypted, name a password_file", c.KeyFile)
	}
	return &key, nil
}

// Sign implements [authority.Upstream].
func (s *stepCA) Sign(ctx context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	api, err := s.client()
	if err != nil {
		return nil, nil, err
	}
	defer api.Close()
	signer, fragment, err := s.signer()
	if err != nil {
		return nil, nil, err
	}
	names := make([]string, 0, 1)
	for _, u := range csr.URIs {
		names = append(names, u.String())
	}
	now := s.now()
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": s.Provisioner, "sub": csr.Subject.CommonName, "aud": s.Address + "/1.0/sign" + fragment, "sans": names,
		"iat": now.Unix(), "nbf": now.Unix(), "exp": now.Add(ottTime).Unix(), "jti": rand.Text(),
	}).Serialize()
	if err != nil {
		return nil, nil, err
	}
	body, err := json.Marshal(map[string]string{
		"csr": requestPEM(csr), "ott": token, "notAfter": now.Add(lifetime).UTC().Format(time.RFC3339),
	})
	if err != nil {
		return nil, nil, err
	}
	answer, err := api.Do(ctx, cloud.Question{
		Method: http.MethodPost, URL: s.Address + "/1.0/sign", Body: string(body), Most: maxAnswer,
		Header: map[string]string{"Content-Type": "application/json"},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("have step-ca sign: %w", err)
	}
	var signed struct {
		Certificate string   `json:"crt"`
		CA          string   `json:"ca"`
		Chain       []string `json:"certChain"`
	}
	if err := json.Unmarshal(answer.Body, &signed); err != nil {
		return nil, nil, errors.New("step-ca answered with something else than JSON")
	}
	if len(signed.Chain) == 0 {
		signed.Chain = []string{signed.Certificate, signed.CA}
	}
	certs, err := parsePEM(signed.Chain...)
	if err != nil {
		return nil, nil, err
	}
	chain, roots = split(certs)
	answer, err = api.Do(ctx, cloud.Question{URL: s.Address + "/roots", Most: maxAnswer})
	if err != nil {
		return nil, nil, fmt.Errorf("ask step-ca for its roots: %w", err)
	}
	var all struct {
		Certificates []string `json:"crts"`
	}
	if err := json.Unmarshal(answer.Body, &all); err != nil {
		return nil, nil, errors.New("step-ca answered with something else than its roots")
	}
	more, err := parsePEM(all.Certificates...)
	return chain, append(roots, more...), err
}
