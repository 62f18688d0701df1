package upstream

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

// VaultConfig is the PKI secrets engine of a Vault or an OpenBao. The server
// logs in for each certificate, by one of token_file, app_role, kubernetes and
// client_certificate, and needs to update MOUNT/root/sign-intermediate.
type VaultConfig struct {
	// Address is its URL, like https://vault.example.org:8200. It is required.
	Address string `yaml:"address" env:"expand"`
	// Mount is the path at which the engine is mounted. Default pki.
	Mount string `yaml:"mount" env:"expand"`
	// Issuer is the reference of the issuer in the engine that signs. Default: the
	// engine's default issuer.
	Issuer string `yaml:"issuer" env:"expand"`
	// Namespace of Vault Enterprise. Default: none.
	Namespace string `yaml:"namespace" env:"expand"`
	// CA is a PEM file of the authorities by which Vault's certificate is known.
	// Default: those of the operating system.
	CA string `yaml:"ca" env:"expand"`

	// TokenFile is a file with a token. It is read each time.
	TokenFile string `yaml:"token_file" env:"expand"`
	// AppRole logs in with a role's ID and a secret.
	AppRole *VaultAppRole `yaml:"app_role"`
	// Kubernetes logs in with a token of a service account.
	Kubernetes *VaultKubernetes `yaml:"kubernetes"`
	// ClientCertificate logs in with a certificate.
	ClientCertificate *VaultCertificate `yaml:"client_certificate"`
}

// VaultAppRole logs in by AppRole.
type VaultAppRole struct {
	// Mount is the path of the auth method. Default approle.
	Mount string `yaml:"mount" env:"expand"`
	// RoleID of the role. It is required.
	RoleID string `yaml:"role_id" env:"expand"`
	// SecretIDFile is a file with the secret ID. It is required.
	SecretIDFile string `yaml:"secret_id_file" env:"expand"`
}

// VaultKubernetes logs in by a token of Kubernetes'.
type VaultKubernetes struct {
	// Mount is the path of the auth method. Default kubernetes.
	Mount string `yaml:"mount" env:"expand"`
	// Role in Vault. It is required.
	Role string `yaml:"role" env:"expand"`
	// TokenFile is a file with the token. Default
	// /var/run/secrets/kubernetes.io/serviceaccount/token.
	TokenFile string `yaml:"token_file" env:"expand"`
}

// VaultCertificate logs in by a client certificate.
type VaultCertificate struct {
	// Mount is the path of the auth method. Default cert.
	Mount string `yaml:"mount" env:"expand"`
	// Role in Vault. Default: any that the certificate fits.
	Role string `yaml:"role" env:"expand"`
	// Certificate is a PEM file of the certificate. It is required.
	Certificate string `yaml:"certificate" env:"expand"`
	// Key is a PEM file of its private key. It is required.
	Key string `yaml:"key" env:"expand"`
}

const serviceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"

func (c *VaultConfig) check() error {
	ways := 0
	for _, set := range []bool{c.TokenFile != "", c.AppRole != nil, c.Kubernetes != nil, c.ClientCertificate != nil} {
		if set {
			ways++
		}
	}
	if _, err := cloud.CheckEndpoint(c.Address); err != nil {
		return fmt.Errorf("vault.address: %w", err)
	}
	for name, text := range map[string]string{"mount": c.Mount, "issuer": c.Issuer} {
		if strings.ContainsAny(text, "?#%\r\n") || strings.Contains(text, "..") {
			return fmt.Errorf("vault.%s is %q, which is no path", name, text)
		}
	}
	switch {
	case ways != 1:
		return errors.New("vault needs one way to log in: token_file, app_role, kubernetes or client_certificate")
	case c.AppRole != nil && (c.AppRole.RoleID == "" || c.AppRole.SecretIDFile == ""):
		return errors.New("vault.app_role needs role_id and secret_id_file")
	case c.Kubernetes != nil && c.Kubernetes.Role == "":
		return errors.New("vault.kubernetes needs role")
	case c.ClientCertificate != nil && (c.ClientCertificate.Certificate == "" || c.ClientCertificate.Key == ""):
		return errors.New("vault.client_certificate needs certificate and key")
	}
	return nil
}

// vault is the PKI engine of one.
type vault struct{ VaultConfig }

func newVault(c VaultConfig) (*vault, error) {
	c.Address = strings.TrimRight(c.Address, "/")
	c.Mount = strings.Trim(cmp.Or(c.Mount, "pki"), "/")
	v := &vault{c}
	_, err := v.client()
	return v, err
}

// Name implements [authority.Upstream].
func (v *vault) Name() (kind, address string) { return "vault", v.Address + "/v1/" + v.Mount }

// Close implements [Upstream].
func (v *vault) Close() error { return nil }

// client makes what asks. It is made anew each time, as the files may have
// changed.
func (v *vault) client() (*cloud.Service, error) {
	conf := &tls.Config{}
	if v.CA != "" {
		roots, err := (&pemfile.Bundle{Paths: []string{v.CA}}).Load()
		if err != nil {
			return nil, fmt.Errorf("vault.ca: %w", err)
		}
		conf.RootCAs = roots
	}
	if c := v.ClientCertificate; c != nil {
		pair, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
		if err != nil {
			return nil, fmt.Errorf("vault.client_certificate: %w", err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return cloud.APIOver(conf), nil
}

// Sign implements [authority.Upstream].
func (v *vault) Sign(ctx context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	api, err := v.client()
	if err != nil {
		return nil, nil, err
	}
	defer api.Close()
	token, ours, err := v.login(ctx, api)
	if err != nil {
		return nil, nil, fmt.Errorf("log in to Vault: %w", err)
	}
	if ours { // it is good for one certificate; if this fails, it ends by itself
		defer func() { _ = v.ask(context.WithoutCancel(ctx), api, token, "auth/token/revoke-self", nil, nil) }()
	}
	path := v.Mount + "/root/sign-intermediate"
	if v.Issuer != "" {
		path = v.Mount + "/issuer/" + url.PathEscape(v.Issuer) + "/sign-intermediate"
	}
	uris := make([]string, 0, 1)
	for _, u := range csr.URIs {
		uris = append(uris, u.String())
	}
	var answer struct {
		Data struct {
			Certificate string   `json:"certificate"`
			IssuingCA   string   `json:"issuing_ca"`
			CAChain     []string `json:"ca_chain"`
		} `json:"data"`
	}
	err = v.ask(ctx, api, token, path, map[string]any{
		"csr": requestPEM(csr), "common_name": csr.Subject.CommonName, "uri_sans": strings.Join(uris, ","), "exclude_cn_from_sans": true,
		"use_csr_values": true, "format": "pem", "ttl": strconv.FormatInt(int64(lifetime/time.Second), 10) + "s",
	}, &answer)
	if err != nil {
		return nil, nil, fmt.Errorf("have Vault sign: %w", err)
	}
	texts := append([]string{answer.Data.Certificate}, answer.Data.CAChain...)
	if len(answer.Data.CAChain) == 0 {
		texts = append(texts, answer.Data.IssuingCA)
	}
	certs, err := parsePEM(texts...)
	if err != nil {
		return nil, nil, err
	}
	chain, roots = split(certs)
	return chain, roots, nil
}

// login returns a token, and whether it is of this login alone.
func (v *vault) login(ctx context.Context, api *cloud.Service) (token string, ours bool, err error) {
	secret := func(path string) (string, error) {
		data, err := pemfile.Read(path, maxSecret)
		if err != nil {
			return "", err
		}
		text, err := cloud.Token(data)
		if err != nil {
			return "", fmt.Errorf("%s holds no token", path)
		}
		return text, nil
	}
	var mount string
	body := map[string]any{}
	switch {
	case v.TokenFile != "":
		token, err = secret(v.TokenFile)
		return token, false, err
	case v.AppRole != nil:
		mount = cmp.Or(v.AppRole.Mount, "approle")
		body["role_id"] = v.AppRole.RoleID
		body["secret_id"], err = secret(v.AppRole.SecretIDFile)
	case v.Kubernetes != nil:
		mount = cmp.Or(v.Kubernetes.Mount, "kubernetes")
		body["role"] = v.Kubernetes.Role
		body["jwt"], err = secret(cmp.Or(v.Kubernetes.TokenFile, serviceAccountToken))
	case v.ClientCertificate != nil:
		mount = cmp.Or(v.ClientCertificate.Mount, "cert")
		if v.ClientCertificate.Role != "" {
			body["name"] = v.ClientCertificate.Role
		}
	}
	if err != nil {
		return "", false, err
	}
	var answer struct {
		Auth struct {
			ClientToken string `json:"client_token"`
		} `json:"auth"`
	}
	if err := v.ask(ctx, api, "", "auth/"+strings.Trim(mount, "/")+"/login", body, &answer); err != nil {
		return "", false, err
	}
	token, err = cloud.Token([]byte(answer.Auth.ClientToken))
	return token, true, err
}

// ask asks Vault's API.
func (v *vault) ask(ctx context.Context, api *cloud.Service, token, path string, body map[string]any, into any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	header := map[string]string{"Content-Type": "application/json", "X-Vault-Request": "true"}
	if token != "" {
		header["X-Vault-Token"] = token
	}
	if v.Namespace != "" {
		header["X-Vault-Namespace"] = v.Namespace
	}
	answer, err := api.Do(ctx, cloud.Question{Method: http.MethodPost, URL: v.Address + "/v1/" + path, Header: header, Body: string(data), Most: maxAnswer})
	if err != nil || into == nil {
		return err
	}
	if err := json.Unmarshal(answer.Body, into); err != nil {
		return errors.New("it answered with something else than JSON")
	}
	return nil
}
