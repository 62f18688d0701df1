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
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

const (
	defaultEndpoint = "https://compute.googleapis.com"
	scope           = "https://www.googleapis.com/auth/compute.readonly"
	grantType       = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	credentialsEnv  = "GOOGLE_APPLICATION_CREDENTIALS"

	maxAnswer   = 2 << 20  // bytes; all metadata of an instance have at most 512 KiB
	maxKeyFile  = 64 << 10 // bytes
	maxValues   = 1000     // tags, and metadata, of an instance; Google has lower bounds
	assertTime  = 10 * time.Minute
	earlier     = 5 * time.Minute // that tokens are replaced before their end
	longestLife = 48 * 60 * 60    // seconds of a token
)

// compute asks the Compute Engine API about instances.
type compute struct {
	c        ServerConfig
	account  *account // nil: that of the instance that the server is on
	metadata metadata
	api      *cloud.Service
	now      func() time.Time

	mu      sync.Mutex
	token   string
	expires time.Time
}

func newCompute(c ServerConfig, now func() time.Time) (*compute, error) {
	out := &compute{c: c, api: cloud.API(), now: now}
	var err error
	if out.c.Endpoint, err = cloud.CheckEndpoint(cmp.Or(c.Endpoint, defaultEndpoint)); err != nil {
		return nil, fmt.Errorf("endpoint: %w", err)
	}
	if out.metadata, err = newMetadata(c.MetadataAddress); err != nil {
		return nil, err
	}
	if path := cmp.Or(c.ServiceAccountFile, os.Getenv(credentialsEnv)); path != "" {
		data, err := pemfile.Read(path, maxKeyFile)
		if err != nil {
			return nil, fmt.Errorf("service_account_file: %w", err)
		}
		if out.account, err = parseAccount(data); err != nil {
			return nil, fmt.Errorf("service_account_file: %s: %w", path, err)
		}
	}
	return out, nil
}

// described is what the API says of an instance.
type described struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Status string `json:"status"`
	Tags   struct {
		Items []string `json:"items"`
	} `json:"tags"`
	Labels   map[string]string `json:"labels"`
	Metadata struct {
		Items []struct {
			Key   string `json:"key"`
			Value string `json:"value"`
		} `json:"items"`
	} `json:"metadata"`
}

// describe returns selectors of a token's instance. The error is for the node if
// the instance is not what it should be, or else an [unavailable].
func (c *compute) describe(ctx context.Context, i *instance) ([]string, error) {
	token, err := c.bearer(ctx)
	if err != nil {
		return nil, unavailable{err}
	}
	answer, err := c.api.Do(ctx, cloud.Question{
		URL: c.c.Endpoint + "/compute/v1/projects/" + url.PathEscape(i.ProjectID) + "/zones/" + url.PathEscape(i.Zone) +
			"/instances/" + url.PathEscape(i.Name) + "?fields=id,name,status,tags,labels,metadata",
		Header: map[string]string{"Authorization": "Bearer " + token}, Most: maxAnswer,
	})
	var status *cloud.StatusError
	if errors.As(err, &status) && status.Code == http.StatusNotFound {
		return nil, errors.New("instance is gone")
	}
	if err != nil {
		return nil, unavailable{fmt.Errorf("describe the instance %s: %w", i.Name, err)}
	}
	var d described
	if err := json.Unmarshal(answer.Body, &d); err != nil || d.ID == "" {
		return nil, unavailable{fmt.Errorf("describe the instance %s: the API answered with something else", i.Name)}
	}
	switch {
	case d.ID != i.ID || d.Name != i.Name:
		return nil, errors.New("instance is gone; another one has its name")
	case !slices.Contains([]string{"PROVISIONING", "STAGING", "RUNNING"}, d.Status):
		return nil, errors.New("instance is not running")
	case len(d.Tags.Items) > maxValues || len(d.Metadata.Items) > maxValues:
		return nil, unavailable{fmt.Errorf("instance %s has more than %d tags or metadata", i.Name, maxValues)}
	}
	return c.selectors(&d)
}

func (c *compute) selectors(d *described) ([]string, error) {
	var out []string
	for _, tag := range d.Tags.Items {
		out = append(out, "tag:"+tag)
	}
	for key, value := range d.Labels {
		if slices.Contains(c.c.AllowedLabelKeys, key) {
			out = append(out, "label:"+key+":"+value)
		}
	}
	for _, item := range d.Metadata.Items {
		if !slices.Contains(c.c.AllowedMetadataKeys, item.Key) {
			continue
		}
		if len(item.Value) > c.c.MaxMetadataValueSize {
			return nil, fmt.Errorf("metadata %q of the instance has %d bytes; the server's max_metadata_value_size is %d", item.Key, len(item.Value), c.c.MaxMetadataValueSize)
		}
		out = append(out, "metadata:"+item.Key+":"+item.Value)
	}
	return out, nil
}

// bearer returns a token for the API. The lock is held while it is got, so that it
// is got once.
func (c *compute) bearer(ctx context.Context) (string, error) {
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
	} else if data, err = c.account.ask(ctx, c.api, c.now()); err != nil {
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
func (a *account) ask(ctx context.Context, api *cloud.Service, now time.Time) ([]byte, error) {
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
