package kms

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

const maxTransitToken = 16 << 10 // bytes

var (
	transitMount     = regexp.MustCompile(`^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$`)
	transitNamespace = regexp.MustCompile(`^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*/?$`)
)

// transitKMS keeps keys in the transit engine of a HashiCorp Vault or an OpenBao.
// They are found by the beginning of their names.
type transitKMS struct {
	owner     owner
	engine    string // URL
	namespace string
	tokenFile string // "": VAULT_TOKEN, or the file that "vault login" writes
	api       *cloud.Service
}

func checkTransit(u attributes) error {
	if m := u["mount"]; m != "" && !transitMount.MatchString(m) {
		return fmt.Errorf("uri has the mount %q; write the path of the engine without slashes around it, as in mount=transit", m)
	}
	if n := u["namespace"]; n != "" && !transitNamespace.MatchString(n) {
		return fmt.Errorf("uri has the namespace %q; write one like team/a", n)
	}
	if a := u["address"]; a != "" {
		if _, err := cloud.CheckEndpoint(a); err != nil {
			return fmt.Errorf("uri has the address %w", err)
		}
	}
	return nil
}

// fromEnv returns the first variable that is set, of Vault's and OpenBao's.
func fromEnv(name string) string {
	if v := os.Getenv("VAULT_" + name); v != "" {
		return v
	}
	return os.Getenv("BAO_" + name)
}

func openTransit(_ context.Context, o Options, u attributes) (service, error) {
	t := &transitKMS{owner: o.owner(), namespace: u["namespace"], tokenFile: u["token-file"]}
	if t.namespace == "" {
		t.namespace = fromEnv("NAMESPACE")
	}
	address := u["address"]
	if address == "" {
		address = fromEnv("ADDR")
	}
	if address == "" {
		return nil, errors.New("there is no address of the transit engine; write transit:address=https://HOST:8200, or set VAULT_ADDR")
	}
	address, err := cloud.CheckEndpoint(address)
	if err != nil {
		return nil, fmt.Errorf("address of the transit engine: %w", err)
	}
	mount := u["mount"]
	if mount == "" {
		mount = "transit"
	}
	t.engine = address + "/v1/" + mount
	ca := u["ca-file"]
	if ca == "" {
		ca = fromEnv("CACERT")
	}
	var trusted *x509.CertPool
	if ca != "" {
		certs, err := pemfile.Certificates(ca, maxCloudAnswer)
		if err != nil {
			return nil, fmt.Errorf("authorities of the transit engine: %w", err)
		}
		trusted = x509.NewCertPool()
		for _, c := range certs {
			trusted.AddCert(c)
		}
	}
	t.api = cloud.APIOver(&tls.Config{RootCAs: trusted})
	if _, err := t.token(); err != nil {
		return nil, err
	}
	return t, nil
}

// token reads the token anew for each question: agents of Vault's replace the file
// before it ends.
func (t *transitKMS) token() (string, error) {
	file := t.tokenFile
	if file == "" {
		if token := fromEnv("TOKEN"); token != "" {
			return cloud.Token([]byte(token))
		}
		home, err := os.UserHomeDir()
		if err != nil {
			return "", errors.New("there is no token for the transit engine; set VAULT_TOKEN, or token-file in the uri")
		}
		file = filepath.Join(home, ".vault-token")
	}
	data, err := pemfile.Read(file, maxTransitToken)
	if err != nil {
		return "", fmt.Errorf("there is no token for the transit engine; set VAULT_TOKEN, or token-file in the uri: %w", err)
	}
	token, err := cloud.Token(data)
	if err != nil {
		return "", fmt.Errorf("token for the transit engine in %s: %w", file, err)
	}
	return token, nil
}

func (t *transitKMS) key(name string) string { return t.owner.prefix() + name }

func (t *transitKMS) ask(ctx context.Context, method, path string, in, out any) error {
	token, err := t.token()
	if err != nil {
		return err
	}
	q := cloud.Question{
		Method: method, URL: t.engine + "/" + path, Most: maxCloudAnswer,
		Header: map[string]string{"X-Vault-Token": token, "X-Vault-Request": "true"},
	}
	if t.namespace != "" {
		q.Header["X-Vault-Namespace"] = t.namespace
	}
	if in != nil {
		body, err := json.Marshal(in)
		if err != nil {
			return err
		}
		q.Body, q.Header["Content-Type"] = string(body), "application/json"
	}
	answer, err := t.api.Do(ctx, q)
	var status *cloud.StatusError
	switch {
	case errors.As(err, &status) && status.Code == http.StatusNotFound && strings.Contains(string(status.Body), "no handler for route"):
		return fmt.Errorf("there is no engine at %s: %w", t.engine, err)
	case errors.As(err, &status) && status.Code == http.StatusNotFound:
		return apiv1.NotFoundError{Message: "no such key"}
	case err != nil:
		return err
	case out == nil:
		return nil
	}
	whole := struct {
		Data any `json:"data"`
	}{out}
	if json.Unmarshal(answer.Body, &whole) != nil {
		return errNoAnswer
	}
	return nil
}

func (t *transitKMS) create(ctx context.Context, name string, kind keyType) error {
	transitType := map[keyType]string{p256: "ecdsa-p256", p384: "ecdsa-p384"}[kind]
	if transitType == "" {
		transitType = string(kind)
	}
	return t.ask(ctx, http.MethodPost, "keys/"+t.key(name), map[string]any{
		"type": transitType, "exportable": false, "allow_plaintext_backup": false,
	}, nil)
}

// transitKey is what the engine says of a key: its versions, by number.
type transitKey struct {
	Keys map[string]struct {
		PublicKey    string    `json:"public_key"`
		CreationTime time.Time `json:"creation_time"`
	} `json:"keys"`
}

func (t *transitKMS) read(ctx context.Context, name string) (*transitKey, error) {
	k := &transitKey{}
	return k, t.ask(ctx, http.MethodGet, "keys/"+t.key(name), nil, k)
}

func (t *transitKMS) find(ctx context.Context, name string) (*found, error) {
	key, err := t.read(ctx, name)
	if err != nil {
		return nil, err
	}
	// The first version, which no rotation of the key changes.
	f := &found{}
	if f.public, err = parsePublic(key.Keys["1"].PublicKey); err != nil {
		return nil, err
	}
	kind, err := typeOfPublic(f.public)
	hash := "sha2-256"
	if kind == p384 {
		hash = "sha2-384"
	}
	f.sign = func(ctx context.Context, digest []byte) ([]byte, error) {
		var signed struct {
			Signature string `json:"signature"`
		}
		err := t.ask(ctx, http.MethodPost, "sign/"+t.key(name)+"/"+hash, map[string]any{
			"input": base64.StdEncoding.EncodeToString(digest), "prehashed": true, "key_version": 1,
			"signature_algorithm": "pkcs1v15", "marshaling_algorithm": "asn1",
		}, &signed)
		if err != nil {
			return nil, gone(err)
		}
		text, ok := strings.CutPrefix(signed.Signature, "vault:v1:")
		signature, err := base64.StdEncoding.DecodeString(text)
		if !ok || err != nil {
			return nil, errors.New("it answered without a signature of the key's first version")
		}
		return signature, nil
	}
	return f, err
}

// remove says that the key may be deleted, which the engine wants to hear first.
func (t *transitKMS) remove(ctx context.Context, name string) error {
	if _, err := t.read(ctx, name); err != nil {
		return err
	}
	if err := t.ask(ctx, http.MethodPost, "keys/"+t.key(name)+"/config", map[string]any{"deletion_allowed": true}, nil); err != nil {
		return err
	}
	return t.ask(ctx, http.MethodDelete, "keys/"+t.key(name), nil, nil)
}

func (t *transitKMS) list(ctx context.Context) (keys []Key, err error) {
	var all struct {
		Keys []string `json:"keys"`
	}
	err = t.ask(ctx, http.MethodGet, "keys?"+url.Values{"list": {"true"}}.Encode(), nil, &all)
	if errors.Is(err, apiv1.NotFoundError{}) { // none of anybody's
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, one := range all.Keys {
		name, ours := strings.CutPrefix(one, t.owner.prefix())
		if !ours || checkRemoteName(name) != nil || len(keys) == maxKeys {
			continue
		}
		key, err := t.read(ctx, name)
		if errors.Is(err, apiv1.NotFoundError{}) {
			continue
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, Key{name, key.Keys["1"].CreationTime})
	}
	return keys, nil
}
