package upstream_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/server/upstream"
	"github.com/hallmark-id/hallmark/test/harness"
)

func TestUpstreamConfigurationsThatCannotBeMeant(t *testing.T) {
	disk := &upstream.DiskConfig{Certificate: "a", Key: "b"}
	vault := func(change func(*upstream.VaultConfig)) upstream.Config {
		c := &upstream.VaultConfig{Address: "https://vault.example:8200", TokenFile: "token"}
		change(c)
		return upstream.Config{Vault: c}
	}
	for name, test := range map[string]struct {
		conf upstream.Config
		says string
	}{
		"no kind":           {upstream.Config{}, "names no kind"},
		"two kinds":         {upstream.Config{Disk: disk, SPIRE: &upstream.SPIREConfig{}}, "disk and spire; choose one"},
		"disk without key":  {upstream.Config{Disk: &upstream.DiskConfig{Certificate: "a"}}, "certificate and key"},
		"spire, no port":    {upstream.Config{SPIRE: &upstream.SPIREConfig{Server: "root", WorkloadSocket: "/s"}}, "host:port"},
		"spire, no socket":  {upstream.Config{SPIRE: &upstream.SPIREConfig{Server: "root:1"}}, "workload_socket"},
		"spire, bad ID":     {upstream.Config{SPIRE: &upstream.SPIREConfig{Server: "root:1", WorkloadSocket: "/s", SPIFFEID: "x"}}, "spiffe_id"},
		"spire and bundle":  {upstream.Config{SPIRE: &upstream.SPIREConfig{Server: "root:1", WorkloadSocket: "/s"}, Bundle: "x"}, "not for spire"},
		"vault over HTTP":   {vault(func(c *upstream.VaultConfig) { c.Address = "http://vault.example" }), "not HTTPS"},
		"vault, no login":   {vault(func(c *upstream.VaultConfig) { c.TokenFile = "" }), "one way to log in"},
		"vault, two logins": {vault(func(c *upstream.VaultConfig) { c.AppRole = &upstream.VaultAppRole{} }), "one way to log in"},
		"vault, bad mount":  {vault(func(c *upstream.VaultConfig) { c.Mount = "../sys" }), "no path"},
		"step_ca, no root":  {upstream.Config{StepCA: &upstream.StepCAConfig{Address: "https://ca.example"}}, "root and provisioner"},
		"step_ca, no key":   {upstream.Config{StepCA: &upstream.StepCAConfig{Address: "https://ca.example", Root: "r", Provisioner: "p"}}, "one of jwk and x5c"},
		"aws_pca, no ARN":   {upstream.Config{AWSPCA: &upstream.AWSPCAConfig{CertificateAuthorityARN: "arn:aws:s3:::x"}}, "certificate_authority_arn"},
		"gcp_cas, no pool":  {upstream.Config{GCPCAS: &upstream.GCPCASConfig{Pool: "pool"}}, "gcp_cas.pool"},
		"gcp_cas, depth":    {upstream.Config{GCPCAS: &upstream.GCPCASConfig{Pool: harness.UpstreamPool, MaxPathLength: -1}}, "max_path_length"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := test.conf.Check(); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %q", err, test.says)
			}
		})
	}
}

func TestFilesOfACAThatDoNotFitAreNamed(t *testing.T) {
	write := func(path, kind string, der []byte) {
		must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	for name, test := range map[string]struct {
		spoil func(w *world, d *upstream.DiskConfig)
		says  string
	}{
		"another key": {func(w *world, d *upstream.DiskConfig) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			must(t, err)
			der, err := x509.MarshalPKCS8PrivateKey(key)
			must(t, err)
			write(d.Key, "PRIVATE KEY", der)
		}, "is not that of the first certificate"},
		"an Ed25519 key": {func(w *world, d *upstream.DiskConfig) {
			_, key, err := ed25519.GenerateKey(rand.Reader)
			must(t, err)
			der, err := x509.MarshalPKCS8PrivateKey(key)
			must(t, err)
			write(d.Key, "PRIVATE KEY", der)
		}, "does not sign for SPIFFE; RSA and ECDSA do"},
		"an encrypted key":    {func(w *world, d *upstream.DiskConfig) { write(d.Key, "ENCRYPTED PRIVATE KEY", []byte{1}) }, "encrypted"},
		"a malformed key":     {func(w *world, d *upstream.DiskConfig) { write(d.Key, "EC PRIVATE KEY", []byte{1}) }, "malformed"},
		"no key":              {func(w *world, d *upstream.DiskConfig) { must(t, os.WriteFile(d.Key, nil, 0o600)) }, "no private key"},
		"a key for all":       {func(w *world, d *upstream.DiskConfig) { must(t, os.Chmod(d.Key, 0o644)) }, "open to other users"},
		"no certificate":      {func(w *world, d *upstream.DiskConfig) { must(t, os.Remove(d.Certificate)) }, "no such file"},
		"roots are not named": {func(w *world, d *upstream.DiskConfig) { w.conf.Bundle = "" }, "not a root"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			kinds[0].setUp(w)
			test.spoil(w, w.conf.Disk)
			if _, err := upstream.New(w.conf, upstream.Options{TrustDomain: td}); err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %q", err, test.says)
			}
		})
	}
}

// trial opens authorities below an upstream.
func trial(t *testing.T, w *world, conf upstream.Config) error {
	t.Helper()
	w.conf = conf
	_, err := conf.Check()
	must(t, err)
	a := w.open()
	if err := a.UpstreamFailure(); err != nil {
		return err
	}
	issued(t, w, a)
	return nil
}

func TestEveryWayToLogInToVault(t *testing.T) {
	w := newWorld(t)
	jwt := func(role, token string) bool { return role == "hallmark" && token == "pod.token" }
	for name, test := range map[string]struct {
		login func(*upstream.VaultConfig)
		fails string
	}{
		"token_file":           {func(c *upstream.VaultConfig) { c.TokenFile = w.file("token", harness.VaultToken) }, ""},
		"a token that is none": {func(c *upstream.VaultConfig) { c.TokenFile = w.file("stale", "hvs.stale") }, "permission denied"},
		"an empty file":        {func(c *upstream.VaultConfig) { c.TokenFile = w.file("empty", "") }, "holds no token"},
		"app_role": {func(c *upstream.VaultConfig) {
			c.AppRole = &upstream.VaultAppRole{RoleID: harness.VaultRole, SecretIDFile: w.file("secret", harness.VaultSecret)}
		}, ""},
		"app_role, another secret": {func(c *upstream.VaultConfig) {
			c.AppRole = &upstream.VaultAppRole{RoleID: harness.VaultRole, SecretIDFile: w.file("wrong", "wrong-secret-id")}
		}, "invalid credentials"},
		"kubernetes": {func(c *upstream.VaultConfig) {
			c.Kubernetes = &upstream.VaultKubernetes{Role: "hallmark", TokenFile: w.file("pod", "pod.token")}
		}, ""},
		"kubernetes, another role": {func(c *upstream.VaultConfig) {
			c.Kubernetes = &upstream.VaultKubernetes{Role: "other", TokenFile: w.file("pod", "pod.token")}
		}, "invalid credentials"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			conf := &upstream.VaultConfig{Address: w.serve(w.ca.Vault(jwt))}
			test.login(conf)
			err := trial(t, w, upstream.Config{Vault: conf})
			if test.fails == "" && err != nil || test.fails != "" && (err == nil || !strings.Contains(err.Error(), test.fails)) {
				t.Errorf("got %v, want %q", err, test.fails)
			}
			if err != nil && strings.Contains(err.Error(), "wrong-secret-id") {
				t.Error("the error has the secret in it")
			}
			if n := w.ca.Sessions(); n != 0 {
				t.Errorf("%d tokens of logins are left", n)
			}
		})
	}
	t.Run("client_certificate", func(t *testing.T) {
		w, ca := newWorld(t), harness.NewAuthority(t)
		s := httptest.NewUnstartedServer(w.ca.Vault(nil))
		s.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Server(t, "127.0.0.1")}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: ca.Pool()}
		s.StartTLS()
		t.Cleanup(s.Close)
		cert, key := ca.Client(t, "hallmark")
		conf := upstream.VaultConfig{Address: s.URL, CA: ca.Path, ClientCertificate: &upstream.VaultCertificate{Certificate: cert, Key: key}}
		must(t, trial(t, w, upstream.Config{Vault: &conf}))
		// Of whoever is at that address, only one that the CA vouches for is asked.
		stranger := conf
		stranger.CA = harness.NewAuthority(t).Path
		if err := trial(t, newWorld(t), upstream.Config{Vault: &stranger}); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("got %v", err)
		}
	})
}

func TestStepCAByX5CAndByAnEncryptedKey(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	jwk := jose.JSONWebKey{Key: key, KeyID: "k", Algorithm: "ES256"}
	public := jwk.Public()
	plain, err := json.Marshal(jwk)
	must(t, err)
	sealer, err := jose.NewEncrypter(jose.A256GCM, jose.Recipient{Algorithm: jose.PBES2_HS256_A128KW, Key: []byte("password of it"), PBES2Count: 1000}, nil)
	must(t, err)
	sealed, err := sealer.Encrypt(plain)
	must(t, err)
	text, err := sealed.CompactSerialize()
	must(t, err)
	ca := harness.NewAuthority(t)
	cert, certKey := ca.Client(t, "server-1")
	stranger, strangerKey := harness.NewAuthority(t).Client(t, "server-1")
	for name, test := range map[string]struct {
		by    func(w *world, c *upstream.StepCAConfig)
		fails string
	}{
		"x5c": {func(w *world, c *upstream.StepCAConfig) { c.X5C = &upstream.StepCAX5C{Certificate: cert, Key: certKey} }, ""},
		"x5c of another": {func(w *world, c *upstream.StepCAConfig) {
			c.X5C = &upstream.StepCAX5C{Certificate: stranger, Key: strangerKey}
		}, "401"},
		"jwk with a password": {func(w *world, c *upstream.StepCAConfig) {
			c.JWK = &upstream.StepCAJWK{KeyFile: w.file("key", text), PasswordFile: w.file("password", "password of it\n")}
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			conf := &upstream.StepCAConfig{Address: w.serve(w.ca.StepCA("spiffe", &public, ca.Pool())), Root: ca.Path, Provisioner: "spiffe"}
			test.by(w, conf)
			err := trial(t, w, upstream.Config{StepCA: conf})
			if test.fails == "" && err != nil || test.fails != "" && (err == nil || !strings.Contains(err.Error(), test.fails)) {
				t.Errorf("got %v, want %q", err, test.fails)
			}
		})
	}
	w := newWorld(t)
	for says, j := range map[string]*upstream.StepCAJWK{
		"does not open":   {KeyFile: w.file("key", text), PasswordFile: w.file("password", "another")},
		"name a password": {KeyFile: w.file("key2", text)},
		"no JWE":          {KeyFile: w.file("key3", string(plain)), PasswordFile: filepath.Join(w.dir, "password")},
		"no such file":    {KeyFile: filepath.Join(w.dir, "none")},
	} {
		conf := upstream.Config{StepCA: &upstream.StepCAConfig{Address: "https://ca.example", Root: ca.Path, Provisioner: "p", JWK: j}}
		if _, err := upstream.New(conf, upstream.Options{TrustDomain: td}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want %q", err, says)
		}
	}
}

func TestAnUpstreamsAnswerIsBounded(t *testing.T) {
	for name, answer := range map[string]string{
		"too long":           `{"data":{"certificate":"` + strings.Repeat("A", 2<<20) + `"}}`,
		"no JSON":            "<html>",
		"no certificate":     `{"data":{}}`,
		"a broken one":       `{"data":{"certificate":"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"}}`,
		"another kind of it": `{"data":{"certificate":"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			url := w.serve(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.Write([]byte(answer)) }))
			if err := trial(t, w, upstream.Config{Vault: &upstream.VaultConfig{Address: url, TokenFile: w.file("token", "t")}}); err == nil {
				t.Error("it is taken")
			}
		})
	}
}
