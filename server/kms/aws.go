package kms

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/server/cloudauth"
)

const (
	awsPage     = 100 // aliases of one answer, the most
	awsMaxPages = 500
	awsPending  = 7 // days until a deleted key is gone, the least
)

var awsRegion = regexp.MustCompile(`^[a-z]{2,4}(-[a-z]+)+-[0-9]{1,2}$`)

var awsSpecs = map[keyType]string{
	p256: "ECC_NIST_P256", p384: "ECC_NIST_P384", rsa2048: "RSA_2048", rsa3072: "RSA_3072", rsa4096: "RSA_4096",
}

var awsAlgorithms = map[keyType]string{
	p256: "ECDSA_SHA_256", p384: "ECDSA_SHA_384",
	rsa2048: "RSASSA_PKCS1_V1_5_SHA_256", rsa3072: "RSASSA_PKCS1_V1_5_SHA_256", rsa4096: "RSASSA_PKCS1_V1_5_SHA_256",
}

// awsKMS keeps keys in AWS KMS. Each has an alias, by which it is found.
type awsKMS struct {
	owner       owner
	region      string
	endpoint    string // URL
	api         *cloud.Service
	credentials aws.CredentialsProvider
}

func checkAWS(u attributes) error {
	if !awsRegion.MatchString(u["region"]) {
		return fmt.Errorf("uri has the region %q; write one like eu-central-1", u["region"])
	}
	return checkEndpoint(u)
}

func openAWS(ctx context.Context, o Options, u attributes) (service, error) {
	a := &awsKMS{owner: o.owner(), region: u["region"], endpoint: u["endpoint"], api: cloud.API()}
	if a.endpoint == "" {
		host := "kms." + a.region + ".amazonaws.com"
		if strings.HasPrefix(a.region, "cn-") {
			host += ".cn"
		}
		a.endpoint = "https://" + host
	}
	var err error
	a.credentials, err = cloudauth.AWS(ctx, a.region, u["profile"])
	return a, err
}

func (a *awsKMS) alias(name string) string { return "alias/" + a.owner.prefix() + name }

func (a *awsKMS) ask(ctx context.Context, action string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	creds, err := a.credentials.Retrieve(ctx)
	if err != nil {
		return fmt.Errorf("credentials of AWS: %w", err)
	}
	sum := sha256.Sum256(body)
	answer, err := a.api.Do(ctx, cloud.Question{
		Method: http.MethodPost, URL: a.endpoint + "/", Body: string(body), Most: maxCloudAnswer,
		Header: map[string]string{"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "TrentService." + action},
		Sign: func(r *http.Request) error {
			return v4.NewSigner().SignHTTP(ctx, creds, r, hex.EncodeToString(sum[:]), "kms", a.region, time.Now())
		},
	})
	if err != nil {
		return awsError(action, err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer.Body, out); err != nil {
		return fmt.Errorf("%s: it answered with something else than was asked", action)
	}
	return nil
}

// awsError tells what an answer other than success means.
func awsError(action string, err error) error {
	var status *cloud.StatusError
	var answer struct {
		Type string `json:"__type"`
	}
	if errors.As(err, &status) && json.Unmarshal(status.Body, &answer) == nil {
		_, kind, found := strings.Cut(answer.Type, "#")
		if !found {
			kind = answer.Type
		}
		switch kind {
		case "NotFoundException":
			return apiv1.NotFoundError{Message: "no such key"}
		case "AlreadyExistsException":
			return apiv1.AlreadyExistsError{Message: "there is such a key"}
		case "ValidationException", "UnsupportedOperationException", "LimitExceededException":
			return refusal{fmt.Errorf("%s: %w", action, err)}
		case "KMSInvalidStateException":
			return errAWSState
		}
	}
	return fmt.Errorf("%s: %w", action, err)
}

var errAWSState = errors.New("the key is disabled, or in another state in which it does not sign")

func (a *awsKMS) create(ctx context.Context, name string, t keyType) error {
	tag := func(key, value string) map[string]string {
		return map[string]string{"TagKey": "hallmark-" + key, "TagValue": value}
	}
	var made struct{ KeyMetadata struct{ KeyID string } }
	err := a.ask(ctx, "CreateKey", map[string]any{
		"KeySpec": awsSpecs[t], "KeyUsage": "SIGN_VERIFY", "Description": clip(a.owner.label(name), 8192),
		"Tags": []any{
			tag("trust-domain", clip(a.owner.trustDomain, 256)), tag("server", clip(a.owner.server, 256)), tag("key", name),
		},
	}, &made)
	if err != nil {
		return err
	}
	if made.KeyMetadata.KeyID == "" {
		return errors.New("CreateKey: it answered without a key")
	}
	err = a.ask(ctx, "CreateAlias", map[string]any{"AliasName": a.alias(name), "TargetKeyId": made.KeyMetadata.KeyID}, nil)
	if err != nil { // nobody would find the key
		return errors.Join(err, a.schedule(ctx, made.KeyMetadata.KeyID))
	}
	return nil
}

// schedule has a key deleted in some days.
func (a *awsKMS) schedule(ctx context.Context, id string) error {
	err := a.ask(ctx, "ScheduleKeyDeletion", map[string]any{"KeyId": id, "PendingWindowInDays": awsPending}, nil)
	if errors.Is(err, errAWSState) { // it is to be deleted already
		return nil
	}
	return err
}

// id returns that of a key that is not about to be deleted.
func (a *awsKMS) id(ctx context.Context, name string) (id string, err error) {
	var d struct {
		KeyMetadata struct{ KeyID, KeyState string }
	}
	if err := a.ask(ctx, "DescribeKey", map[string]string{"KeyId": a.alias(name)}, &d); err != nil {
		return "", err
	}
	switch {
	case d.KeyMetadata.KeyID == "":
		return "", errors.New("DescribeKey: it answered without a key")
	case d.KeyMetadata.KeyState == "PendingDeletion":
		return d.KeyMetadata.KeyID, apiv1.NotFoundError{Message: "the key is to be deleted"}
	}
	return d.KeyMetadata.KeyID, nil
}

func (a *awsKMS) find(ctx context.Context, name string) (*found, error) {
	id, err := a.id(ctx, name)
	if err != nil {
		return nil, err
	}
	var key struct{ PublicKey []byte }
	if err := a.ask(ctx, "GetPublicKey", map[string]string{"KeyId": id}, &key); err != nil {
		return nil, err
	}
	f := &found{}
	if f.public, err = x509.ParsePKIXPublicKey(key.PublicKey); err != nil {
		return nil, errors.New("GetPublicKey: it answered without a public key")
	}
	t, err := typeOfPublic(f.public)
	f.sign = func(ctx context.Context, digest []byte) ([]byte, error) {
		var signed struct{ Signature []byte }
		err := a.ask(ctx, "Sign", map[string]any{
			"KeyId": id, "Message": digest, "MessageType": "DIGEST", "SigningAlgorithm": awsAlgorithms[t],
		}, &signed)
		return signed.Signature, gone(err)
	}
	return f, err
}

func (a *awsKMS) remove(ctx context.Context, name string) error {
	id, err := a.id(ctx, name)
	if id == "" {
		return err
	}
	return errors.Join(err, a.schedule(ctx, id), a.ask(ctx, "DeleteAlias", map[string]string{"AliasName": a.alias(name)}, nil))
}

// list looks through all aliases of the account in the region; AWS does not look
// for a prefix.
func (a *awsKMS) list(ctx context.Context) (keys []Key, err error) {
	marker := ""
	for range awsMaxPages {
		var page struct {
			Aliases []struct {
				AliasName    string
				TargetKeyID  string `json:"TargetKeyId"`
				CreationDate float64
			}
			Truncated  bool
			NextMarker string
		}
		in := map[string]any{"Limit": awsPage}
		if marker != "" {
			in["Marker"] = marker
		}
		if err := a.ask(ctx, "ListAliases", in, &page); err != nil {
			return nil, err
		}
		for _, one := range page.Aliases {
			name, ours := strings.CutPrefix(one.AliasName, a.alias(""))
			if ours && one.TargetKeyID != "" && checkRemoteName(name) == nil && len(keys) < maxKeys {
				keys = append(keys, Key{name, time.Unix(int64(one.CreationDate), 0)})
			}
		}
		if marker = page.NextMarker; !page.Truncated || marker == "" || len(keys) == maxKeys {
			return keys, nil
		}
	}
	return nil, fmt.Errorf("the account has more than %d aliases", awsMaxPages*awsPage)
}

// gone makes errors of a signature's those of a service that cannot be used: a key
// that was there is there no more, or does not sign.
func gone(err error) error {
	var refused refusal
	switch {
	case errors.Is(err, apiv1.NotFoundError{}):
		return errors.New("the key is gone from it")
	case errors.As(err, &refused):
		return fmt.Errorf("it refuses to sign: %w", refused.error)
	}
	return err
}

// clip shortens a text to a number of bytes. It has ASCII alone.
func clip(text string, most int) string { return text[:min(len(text), most)] }
