package gcpiit

import (
	"cmp"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

const (
	grantType      = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	credentialsEnv = "GOOGLE_APPLICATION_CREDENTIALS"

	maxKeyFile  = 64 << 10 // bytes
	assertTime  = 10 * time.Minute
	earlier     = 5 * time.Minute // that tokens are replaced before their end
	longestLife = 48 * 60 * 60    // seconds of a token
)

// Tokens has access tokens for Google Cloud's APIs: of a service account by its
// key, or of that of the instance that the server is on.
type Tokens struct {
	scope    string
	account  *account // nil: that of the instance
	metadata metadata
	api      *cloud.Service
	now      func() time.Time

	mu      sync.Mutex
	token   string
	expires time.Time
}

// NewTokens makes it for a scope of OAuth 2.0, which holds for the tokens of a
// key: those of an instance have the scopes of that. An empty file is that which
// GOOGLE_APPLICATION_CREDENTIALS names; without it the tokens are the instance's.
// An empty address of the metadata service is Google's.
func NewTokens(scope, accountFile, metadataAddress string, now func() time.Time) (*Tokens, error) {
	c := &Tokens{scope: scope, api: cloud.API(), now: now}
	var err error
	if c.metadata, err = newMetadata(metadataAddress); err != nil {
		return nil, err
	}
	if path := cmp.Or(accountFile, os.Getenv(credentialsEnv)); path != "" {
		data, err := pemfile.Read(path, maxKeyFile)
		if err != nil {
			return nil, fmt.Errorf("service_account_file: %w", err)
		}
		if c.account, err = parseAccount(data); err != nil {
			return nil, fmt.Errorf("service_account_file: %s: %w", path, err)
		}
	}
	return c, nil
}

// Bearer returns a token. The lock is held while it is got, so that it is got
// once.
func (c *Tokens) Bearer(ctx context.Context) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.token != "" && c.now().Before(c.expires) {
		return c.token, nil
	}
	var data []byte
	var err error
	if c.account == nil {
		if data, err = c.metadata.get(ctx, accounts+"default/token", maxToken); err != nil {
			return "", fmt.Errorf("token of the server's instance: %w", err)
		}
	} else if data, err = c.account.ask(ctx, c.api, c.scope, c.now()); err != nil {
		return "", fmt.Errorf("token of the service account %s: %w", c.account.email, err)
	}
	token, life, err := parseToken(data)
	if err != nil {
		return "", err
	}
	c.token, c.expires = token, c.now().Add(life-earlier)
	return token, nil
}

func parseToken(data []byte) (string, time.Duration, error) {
	var answer struct {
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return "", 0, errors.New("answered with something else than a token")
	}
	token, err := cloud.Token([]byte(answer.AccessToken))
	if err != nil {
		return "", 0, err
	}
	if answer.ExpiresIn <= 0 || answer.ExpiresIn > longestLife {
		return "", 0, errors.New("answered with a token of which it does not say how long it is good")
	}
	return token, time.Duration(answer.ExpiresIn) * time.Second, nil
}

// account is a service account by its key.
type account struct {
	email, keyID, tokenURL string
	key                    *rsa.PrivateKey
}

// String keeps the key out of errors.
func (a *account) String() string { return a.email }

// parseAccount reads the file of a service account's key. Its errors hold nothing of
// that.
func parseAccount(data []byte) (*account, error) {
	var file struct {
		Type         string `json:"type"`
		ClientEmail  string `json:"client_email"`
		PrivateKeyID string `json:"private_key_id"`
		PrivateKey   string `json:"private_key"`
		TokenURI     string `json:"token_uri"`
	}
	if err := json.Unmarshal(data, &file); err != nil {
		return nil, errors.New("it is no JSON")
	}
	if file.Type != "service_account" || file.ClientEmail == "" {
		return nil, errors.New("it is not the key of a service account")
	}
	block, _ := pem.Decode([]byte(file.PrivateKey))
	if block == nil {
		return nil, errors.New("it has no private key")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("its private key is malformed")
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, errors.New("its private key is not of RSA")
	}
	a := &account{email: file.ClientEmail, keyID: file.PrivateKeyID, key: key}
	if a.tokenURL, err = cloud.CheckEndpoint(file.TokenURI); err != nil {
		return nil, fmt.Errorf("token_uri: %w", err)
	}
	return a, nil
}

// ask exchanges a signed assertion for a token (RFC 7523 §2.1).
func (a *account) ask(ctx context.Context, api *cloud.Service, scope string, now time.Time) ([]byte, error) {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: a.key}, (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", a.keyID))
	if err != nil {
		return nil, err
	}
	assertion, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": a.email, "scope": scope, "aud": a.tokenURL, "iat": now.Unix(), "exp": now.Add(assertTime).Unix(),
	}).Serialize()
	if err != nil {
		return nil, err
	}
	answer, err := api.Do(ctx, cloud.Question{
		Method: http.MethodPost, URL: a.tokenURL, Most: maxToken,
		Header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"},
		Body:   url.Values{"grant_type": {grantType}, "assertion": {assertion}}.Encode(),
	})
	if err != nil {
		return nil, err
	}
	return answer.Body, nil
}
