package awsiid

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"

	"github.com/hallmark-id/hallmark/attestors"
)

const (
	stsVersion = "2011-06-15"
	roleTime   = "900" // seconds that an assumed role lasts, the least
	sessionOf  = "hallmark"
	// earlier is how long before their end credentials are replaced.
	earlier        = 5 * time.Minute
	maxCredentials = 16 << 10 // bytes
)

// keys are credentials of AWS.
type keys struct {
	id, secret, token string
	expires           time.Time // zero: never
}

func (k *keys) aws() aws.Credentials {
	return aws.Credentials{AccessKeyID: k.id, SecretAccessKey: k.secret, SessionToken: k.token}
}

// LogValue keeps them out of logs.
func (k *keys) LogValue() slog.Value { return slog.StringValue("credentials of AWS") }

// String keeps them out of errors.
func (k *keys) String() string { return "credentials of AWS" }

// credentials has those that the APIs are asked with.
type credentials struct {
	imds   imds
	now    func() time.Time
	assume func(ctx context.Context, own *keys, role, account, region string) (*keys, error)

	mu    sync.Mutex
	own   *keys
	roles map[string]*keys // by account
}

// of returns the credentials for a document's account: those of a role there, or
// the server's own. The lock is held while they are got, so that they are got
// once.
func (c *credentials) of(ctx context.Context, role string, d *document) (*keys, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if role == "" {
		return c.mine(ctx)
	}
	if k := c.roles[d.AccountID]; c.good(k) {
		return k, nil
	}
	own, err := c.mine(ctx)
	if err != nil {
		return nil, err
	}
	k, err := c.assume(ctx, own, role, d.AccountID, d.Region)
	if err != nil {
		return nil, fmt.Errorf("assume the role %s of the account %s: %w", role, d.AccountID, err)
	}
	if c.roles == nil {
		c.roles = make(map[string]*keys)
	}
	c.roles[d.AccountID] = k // as many as accounts are allowed
	return k, nil
}

func (c *credentials) good(k *keys) bool {
	return k != nil && (k.expires.IsZero() || c.now().Before(k.expires.Add(-earlier)))
}

// mine returns the server's own: those of the environment, or of its instance's
// role.
func (c *credentials) mine(ctx context.Context) (*keys, error) {
	if id, secret := os.Getenv("AWS_ACCESS_KEY_ID"), os.Getenv("AWS_SECRET_ACCESS_KEY"); id != "" && secret != "" {
		return &keys{id: id, secret: secret, token: os.Getenv("AWS_SESSION_TOKEN")}, nil
	}
	if c.good(c.own) {
		return c.own, nil
	}
	k, err := c.ofInstance(ctx)
	if err != nil {
		return nil, fmt.Errorf("no credentials of AWS: the environment has none (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), and of the instance's role: %w", err)
	}
	c.own = k
	return k, nil
}

func (c *credentials) ofInstance(ctx context.Context) (*keys, error) {
	session, err := c.imds.session(ctx)
	if err != nil {
		return nil, err
	}
	const path = "/latest/meta-data/iam/security-credentials/"
	name, err := c.imds.get(ctx, session, path, maxCredentials)
	if err != nil {
		return nil, err
	}
	if name = strings.TrimSpace(name); !isRole(name) || strings.Contains(name, "/") {
		return nil, errors.New("the metadata service named no role")
	}
	data, err := c.imds.get(ctx, session, path+url.PathEscape(name), maxCredentials)
	if err != nil {
		return nil, err
	}
	return parseCredentials([]byte(data))
}

func parseCredentials(data []byte) (*keys, error) {
	var answer struct {
		Code            string
		AccessKeyID     string `json:"AccessKeyId"`
		SecretAccessKey string
		Token           string
		Expiration      time.Time
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return nil, errors.New("the metadata service answered with something else than credentials")
	}
	if answer.Code != "Success" || answer.AccessKeyID == "" || answer.SecretAccessKey == "" || answer.Expiration.IsZero() {
		return nil, fmt.Errorf("the metadata service answered %q", attestors.Clip(answer.Code))
	}
	return &keys{answer.AccessKeyID, answer.SecretAccessKey, answer.Token, answer.Expiration}, nil
}

// assume takes on a role of another account.
func (e *ec2) assume(ctx context.Context, own *keys, role, account, region string) (*keys, error) {
	var answer struct {
		XMLName xml.Name  `xml:"AssumeRoleResponse"`
		ID      string    `xml:"AssumeRoleResult>Credentials>AccessKeyId"`
		Secret  string    `xml:"AssumeRoleResult>Credentials>SecretAccessKey"`
		Token   string    `xml:"AssumeRoleResult>Credentials>SessionToken"`
		Expires time.Time `xml:"AssumeRoleResult>Credentials>Expiration"`
	}
	err := e.askWith(ctx, own, region, "sts", url.Values{
		"Action": {"AssumeRole"}, "Version": {stsVersion}, "DurationSeconds": {roleTime}, "RoleSessionName": {sessionOf},
		"RoleArn": {"arn:" + partitionOf(region) + ":iam::" + account + ":role/" + role},
	}, &answer)
	switch {
	case err != nil:
		return nil, err
	case answer.ID == "" || answer.Secret == "" || answer.Expires.IsZero():
		return nil, errors.New("sts answered without credentials")
	}
	return &keys{answer.ID, answer.Secret, answer.Token, answer.Expires}, nil
}
