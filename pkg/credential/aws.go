package credential

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// AWS is a role of AWS that a JWT-SVID assumes. All but Duration are required.
type AWS struct {
	Endpoint    string        // of STS; [STSEndpoint]
	RoleARN     string        // of the role, for example arn:aws:iam::123456789012:role/web
	SessionName string        // 2 to 64 letters, digits and +=,.@_- ; [SessionName]
	Duration    time.Duration // 15m to 12h; 0: as the role says
	Client      *http.Client
}

// AWSCredentials are those that AWS SDKs read of a credential_process: "Process
// credentials" of the AWS SDKs and Tools Reference Guide. They are a secret.
type AWSCredentials struct {
	Version         int       `json:"Version"`
	AccessKeyID     string    `json:"AccessKeyId"`
	SecretAccessKey string    `json:"SecretAccessKey"`
	SessionToken    string    `json:"SessionToken"`
	Expiration      time.Time `json:"Expiration"`
}

var (
	regionForm  = regexp.MustCompile(`^[a-z0-9-]{1,32}$`)
	sessionForm = regexp.MustCompile(`^[\w+=,.@-]{2,64}$`) // API of AWS STS, AssumeRoleWithWebIdentity
	roleForm    = regexp.MustCompile(`^arn:[a-z0-9-]+:iam::\d{12}:role/[\x21-\x7e]+$`)
)

// maxRoleARN is the length of a role's ARN, in bytes (API of AWS STS).
const maxRoleARN = 2048

// STSEndpoint returns where STS of a region is; of none, where the global one is.
func STSEndpoint(region string) (string, error) {
	switch {
	case region == "":
		return "https://sts.amazonaws.com", nil
	case !regionForm.MatchString(region):
		return "", fmt.Errorf("%.50q is no region of AWS, such as eu-central-1", region)
	case strings.HasPrefix(region, "cn-"):
		return "https://sts." + region + ".amazonaws.com.cn", nil
	}
	return "https://sts." + region + ".amazonaws.com", nil
}

// SessionName makes the name of a session of a SPIFFE ID's path: its end, as far
// as there is room.
func SessionName(path string) string {
	name := strings.Map(func(r rune) rune {
		if r < 0x80 && sessionForm.MatchString(string([]rune{r, r})) {
			return r
		}
		return '.'
	}, strings.TrimPrefix(path, "/"))
	name = name[max(0, len(name)-64):]
	if len(name) < 2 {
		name += "--"
	}
	return name
}

// Check says what is wrong with the request, before there is a token for it.
func (a AWS) Check() error {
	_, err := parseEndpoint(a.Endpoint)
	switch {
	case err != nil:
		return err
	case len(a.RoleARN) > maxRoleARN || !roleForm.MatchString(a.RoleARN):
		return fmt.Errorf("%.100q is no ARN of a role, such as arn:aws:iam::123456789012:role/web", a.RoleARN)
	case a.SessionName != "" && !sessionForm.MatchString(a.SessionName):
		return fmt.Errorf("%.100q is no name of a session: 2 to 64 letters, digits and +=,.@_-", a.SessionName)
	case a.Duration != 0 && (a.Duration < 15*time.Minute || a.Duration > 12*time.Hour || a.Duration%time.Second != 0):
		return fmt.Errorf("a session of %s is not one of 15m to 12h", a.Duration)
	}
	return nil
}

// Assume asks STS for credentials of the role (AssumeRoleWithWebIdentity, version
// 2011-06-15). The request needs no signature: the token is what proves.
func (a AWS) Assume(ctx context.Context, token string) (*AWSCredentials, error) {
	if err := a.Check(); err != nil {
		return nil, err
	}
	endpoint, err := parseEndpoint(a.Endpoint)
	if err != nil {
		return nil, err
	}
	if a.SessionName == "" {
		return nil, errors.New("no session is named")
	}
	form := url.Values{
		"Action": {"AssumeRoleWithWebIdentity"}, "Version": {"2011-06-15"},
		"RoleArn": {a.RoleARN}, "RoleSessionName": {a.SessionName}, "WebIdentityToken": {token},
	}
	if a.Duration != 0 {
		form.Set("DurationSeconds", strconv.Itoa(int(a.Duration/time.Second)))
	}
	status, answer, err := post(ctx, a.Client, endpoint.JoinPath("/").String(), "application/x-www-form-urlencoded", []byte(form.Encode()), nil)
	if err != nil {
		return nil, fmt.Errorf("ask STS for credentials: %w", err)
	}
	c, err := parseAssumed(status, answer, token)
	if err != nil {
		return nil, fmt.Errorf("STS at %s gives no credentials of %s: %w", endpoint.Host, a.RoleARN, err)
	}
	return c, nil
}

// parseAssumed reads an answer of STS.
func parseAssumed(status int, answer []byte, token string) (*AWSCredentials, error) {
	if status != http.StatusOK {
		var refused struct {
			XMLName xml.Name `xml:"ErrorResponse"`
			Code    string   `xml:"Error>Code"`
			Message string   `xml:"Error>Message"`
		}
		if err := xml.Unmarshal(answer, &refused); err != nil || refused.Code == "" {
			return nil, fmt.Errorf("status %d: %w", status, errAnswer)
		}
		return nil, fmt.Errorf("%s: %s", told(refused.Code, token), told(refused.Message, token))
	}
	var given struct {
		XMLName         xml.Name `xml:"AssumeRoleWithWebIdentityResponse"`
		AccessKeyID     string   `xml:"AssumeRoleWithWebIdentityResult>Credentials>AccessKeyId"`
		SecretAccessKey string   `xml:"AssumeRoleWithWebIdentityResult>Credentials>SecretAccessKey"`
		SessionToken    string   `xml:"AssumeRoleWithWebIdentityResult>Credentials>SessionToken"`
		Expiration      string   `xml:"AssumeRoleWithWebIdentityResult>Credentials>Expiration"`
	}
	if err := xml.Unmarshal(answer, &given); err != nil {
		return nil, errAnswer
	}
	expires, err := time.Parse(time.RFC3339, given.Expiration)
	if err != nil || given.AccessKeyID == "" || given.SecretAccessKey == "" || given.SessionToken == "" {
		return nil, errors.New("the answer lacks a key, a token or an end")
	}
	return &AWSCredentials{1, given.AccessKeyID, given.SecretAccessKey, given.SessionToken, expires.UTC()}, nil
}
