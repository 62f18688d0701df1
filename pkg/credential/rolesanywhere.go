package credential

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// RolesAnywhere is a role of AWS that an X509-SVID assumes by IAM Roles Anywhere,
// which trusts the X.509 authority as one of its trust anchors. All but
// SessionName and Duration are required.
type RolesAnywhere struct {
	Endpoint       string        // of IAM Roles Anywhere; [RolesAnywhereEndpoint]
	TrustAnchorARN string        // for example arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/ID
	ProfileARN     string        // for example arn:aws:rolesanywhere:eu-central-1:123456789012:profile/ID
	RoleARN        string        // of the role, for example arn:aws:iam::123456789012:role/web
	SessionName    string        // as [AWS] has it; only profiles that accept one take it
	Duration       time.Duration // 15m to 12h; 0: as the profile says
	Client         *http.Client
}

// anywhereForm is the ARN of a trust anchor or a profile.
var anywhereForm = regexp.MustCompile(`^arn:[a-z0-9-]+:rolesanywhere:([a-z0-9-]{1,32}):\d{12}:(trust-anchor|profile)/[A-Za-z0-9-]{1,64}$`)

// maxChain is how many certificates a request may have, that of the caller among
// them: enough for the authorities of a chain, and for what a header takes.
const maxChain = 6

// regionOf returns the region of a trust anchor or a profile.
func regionOf(arn, kind string) (string, error) {
	parts := anywhereForm.FindStringSubmatch(arn)
	if parts == nil || parts[2] != kind {
		return "", fmt.Errorf("%.100q is no ARN of a %s, such as arn:aws:rolesanywhere:eu-central-1:123456789012:%s/ID", arn, kind, kind)
	}
	return parts[1], nil
}

// RolesAnywhereEndpoint returns where IAM Roles Anywhere is that has a trust anchor.
func RolesAnywhereEndpoint(trustAnchorARN string) (string, error) {
	region, err := regionOf(trustAnchorARN, "trust-anchor")
	switch {
	case err != nil:
		return "", err
	case strings.HasPrefix(region, "cn-"):
		return "https://rolesanywhere." + region + ".amazonaws.com.cn", nil
	}
	return "https://rolesanywhere." + region + ".amazonaws.com", nil
}

// Check says what is wrong with the request, before there is an SVID for it.
func (a RolesAnywhere) Check() error {
	region, err := regionOf(a.TrustAnchorARN, "trust-anchor")
	if err != nil {
		return err
	}
	other, err := regionOf(a.ProfileARN, "profile")
	switch {
	case err != nil:
		return err
	case region != other:
		return fmt.Errorf("the trust anchor is in %s and the profile in %s; they are of one region", region, other)
	}
	return AWS{Endpoint: a.Endpoint, RoleARN: a.RoleARN, SessionName: a.SessionName, Duration: a.Duration}.Check()
}

// Assume asks IAM Roles Anywhere for credentials of the role (CreateSession). The
// chain begins with the certificate of the key; the authorities after it, without
// the root, go with it. Now is the time of the request, which AWS compares with
// its own.
func (a RolesAnywhere) Assume(ctx context.Context, chain []*x509.Certificate, key crypto.Signer, now time.Time) (*AWSCredentials, error) {
	if err := a.Check(); err != nil {
		return nil, err
	}
	if n := len(chain); n == 0 || n > maxChain {
		return nil, fmt.Errorf("the chain has %d certificates; it has 1 to %d", n, maxChain)
	}
	endpoint, err := parseEndpoint(a.Endpoint)
	if err != nil {
		return nil, err
	}
	body, err := json.Marshal(struct {
		Duration    int    `json:"durationSeconds,omitempty"`
		Profile     string `json:"profileArn"`
		Role        string `json:"roleArn"`
		SessionName string `json:"roleSessionName,omitempty"`
		TrustAnchor string `json:"trustAnchorArn"`
	}{int(a.Duration / time.Second), a.ProfileARN, a.RoleARN, a.SessionName, a.TrustAnchorARN})
	if err != nil {
		return nil, err
	}
	to := endpoint.JoinPath("/sessions")
	header, err := a.sign(to, body, chain, key, now)
	if err != nil {
		return nil, fmt.Errorf("sign for IAM Roles Anywhere: %w", err)
	}
	status, answer, err := post(ctx, a.Client, to.String(), anywhereType, body, header)
	if err != nil {
		return nil, fmt.Errorf("ask IAM Roles Anywhere for credentials: %w", err)
	}
	c, err := parseSession(status, answer)
	if err != nil {
		return nil, fmt.Errorf("IAM Roles Anywhere at %s gives no credentials of %s: %w", endpoint.Host, a.RoleARN, err)
	}
	return c, nil
}

const anywhereType = "application/json"

// sign makes the headers that prove a request: Signature Version 4 with the key
// of a certificate, "The IAM Roles Anywhere authentication signing process" of its
// User Guide.
func (a RolesAnywhere) sign(to *url.URL, body []byte, chain []*x509.Certificate, key crypto.Signer, now time.Time) (map[string]string, error) {
	var algorithm string
	switch key.Public().(type) {
	case *ecdsa.PublicKey:
		algorithm = "AWS4-X509-ECDSA-SHA256"
	case *rsa.PublicKey:
		algorithm = "AWS4-X509-RSA-SHA256"
	default:
		return nil, fmt.Errorf("AWS takes ECDSA and RSA; the key is a %T", key.Public())
	}
	region, err := regionOf(a.TrustAnchorARN, "trust-anchor")
	if err != nil {
		return nil, err
	}
	date := now.UTC().Format("20060102T150405Z")
	scope := date[:8] + "/" + region + "/rolesanywhere/aws4_request"
	signed := [][2]string{ // sorted by name
		{"content-type", anywhereType}, {"host", to.Host}, {"x-amz-date", date},
		{"x-amz-x509", base64.StdEncoding.EncodeToString(chain[0].Raw)},
	}
	if len(chain) > 1 {
		var above []string
		for _, c := range chain[1:] {
			above = append(above, base64.StdEncoding.EncodeToString(c.Raw))
		}
		signed = append(signed, [2]string{"x-amz-x509-chain", strings.Join(above, ",")})
	}
	var names []string
	var lines strings.Builder
	header := make(map[string]string)
	for _, h := range signed {
		names = append(names, h[0])
		lines.WriteString(h[0] + ":" + h[1] + "\n")
		if h[0] != "host" { // which the client writes itself
			header[h[0]] = h[1]
		}
	}
	canonical := strings.Join([]string{
		http.MethodPost, "/" + strings.TrimPrefix(to.EscapedPath(), "/"), "", lines.String(), strings.Join(names, ";"), hexSHA256(body),
	}, "\n")
	digest := sha256.Sum256([]byte(strings.Join([]string{algorithm, date, scope, hexSHA256([]byte(canonical))}, "\n")))
	signature, err := key.Sign(rand.Reader, digest[:], crypto.SHA256) // of RSA: PKCS #1 v1.5
	if err != nil {
		return nil, err
	}
	header["Authorization"] = fmt.Sprintf("%s Credential=%s/%s, SignedHeaders=%s, Signature=%s",
		algorithm, chain[0].SerialNumber, scope, strings.Join(names, ";"), hex.EncodeToString(signature))
	return header, nil
}

func hexSHA256(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// parseSession reads an answer of IAM Roles Anywhere: CreateSession.
func parseSession(status int, answer []byte) (*AWSCredentials, error) {
	if status != http.StatusCreated && status != http.StatusOK {
		var refused struct {
			Message string `json:"message"`
		}
		if err := json.Unmarshal(answer, &refused); err != nil || refused.Message == "" {
			return nil, fmt.Errorf("status %d: %w", status, errAnswer)
		}
		return nil, fmt.Errorf("status %d: %s", status, told(refused.Message, ""))
	}
	var given struct {
		Set []struct {
			Credentials struct {
				AccessKeyID     string    `json:"accessKeyId"`
				SecretAccessKey string    `json:"secretAccessKey"`
				SessionToken    string    `json:"sessionToken"`
				Expiration      time.Time `json:"expiration"`
			} `json:"credentials"`
		} `json:"credentialSet"`
	}
	if err := json.Unmarshal(answer, &given); err != nil {
		return nil, errAnswer
	}
	if len(given.Set) != 1 {
		return nil, fmt.Errorf("the answer has %d credentials instead of one", len(given.Set))
	}
	c := given.Set[0].Credentials
	if c.AccessKeyID == "" || c.SecretAccessKey == "" || c.SessionToken == "" || c.Expiration.IsZero() {
		return nil, errors.New("the answer lacks a key, a token or an end")
	}
	return &AWSCredentials{1, c.AccessKeyID, c.SecretAccessKey, c.SessionToken, c.Expiration.UTC()}, nil
}
