package publish

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/server/cloudauth"
)

// S3Config is a bucket of Amazon S3, or of what speaks its API and knows conditional
// writes. Credentials are found where AWS's tools find them: the environment, files,
// the instance or pod. They need s3:GetObject and s3:PutObject on the objects, and
// s3:ListBucket on the bucket. Who may read the objects is the bucket's policy's.
type S3Config struct {
	// Bucket is its name. It is required.
	Bucket string `yaml:"bucket" env:"expand"`
	// Region is the bucket's, like eu-central-1. It is required.
	Region string `yaml:"region" env:"expand"`
	// Prefix is the path in the bucket below which the documents are. Default: the
	// bucket itself.
	Prefix string `yaml:"prefix" env:"expand"`
	// Profile is that of AWS's files of configuration. Default: the usual one.
	Profile string `yaml:"profile" env:"expand"`
	// Endpoint is the URL of what takes the place of AWS's: HTTPS, or HTTP on this
	// machine. Buckets are the first part of its paths. Default: AWS's own, by the
	// region.
	Endpoint string `yaml:"endpoint" env:"expand"`
}

var (
	s3Bucket = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	s3Region = regexp.MustCompile(`^[a-z0-9-]{1,40}$`)
)

func (c *S3Config) check() error {
	switch {
	case !s3Bucket.MatchString(c.Bucket) || strings.Contains(c.Bucket, ".."):
		return fmt.Errorf("s3.bucket is %.100q; write the name of a bucket", c.Bucket)
	case !s3Region.MatchString(c.Region):
		return fmt.Errorf("s3.region is %.100q; write one like eu-central-1", c.Region)
	}
	return checkRemote("s3", c.Prefix, c.Endpoint)
}

// checkRemote checks what the configurations of clouds have in common.
func checkRemote(name, prefix, endpoint string) error {
	if prefix != "" {
		if err := checkPath(prefix); err != nil {
			return fmt.Errorf("%s.prefix %w; write a path like example.org/id", name, err)
		}
	}
	if endpoint != "" {
		if _, err := cloud.CheckEndpoint(endpoint); err != nil {
			return fmt.Errorf("%s.endpoint %w", name, err)
		}
	}
	return nil
}

func (c *S3Config) store(string) store {
	s := &s3{S3Config: *c, api: cloud.API()}
	switch endpoint, _ := cloud.CheckEndpoint(c.Endpoint); {
	case c.Endpoint != "":
		s.base = endpoint + "/" + c.Bucket
	default:
		domain := "s3." + c.Region + ".amazonaws.com"
		if strings.HasPrefix(c.Region, "cn-") {
			domain += ".cn"
		}
		s.base = "https://" + c.Bucket + "." + domain
		if strings.Contains(c.Bucket, ".") { // no certificate has it
			s.base = "https://" + domain + "/" + c.Bucket
		}
	}
	s.base += "/"
	if c.Prefix != "" {
		s.base += c.Prefix + "/"
	}
	return s
}

// s3 is a store in a bucket of S3.
type s3 struct {
	S3Config
	base string // URL of what names are below
	api  *cloud.Service

	mu          sync.Mutex
	credentials aws.CredentialsProvider // nil: not found yet
}

func (s *s3) String() string { return strings.TrimSuffix("s3://"+s.Bucket+"/"+s.Prefix, "/") }

func (s *s3) found(ctx context.Context) (aws.Credentials, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.credentials == nil {
		found, err := cloudauth.AWS(ctx, s.Region, s.Profile)
		if err != nil {
			return aws.Credentials{}, err
		}
		s.credentials = found
	}
	creds, err := s.credentials.Retrieve(ctx)
	if err != nil {
		return creds, fmt.Errorf("credentials of AWS: %w", err)
	}
	return creds, nil
}

func (s *s3) ask(ctx context.Context, method, name string, header map[string]string, body []byte) (*cloud.Answer, error) {
	creds, err := s.found(ctx)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(body)
	header["X-Amz-Content-Sha256"] = hex.EncodeToString(sum[:])
	answer, err := s.api.Do(ctx, cloud.Question{
		Method: method, URL: s.base + name, Header: header, Body: string(body), Most: maxAnswer,
		Sign: func(r *http.Request) error {
			signer := v4.NewSigner(func(o *v4.SignerOptions) { o.DisableURIPathEscaping = true }) // S3's way
			return signer.SignHTTP(ctx, creds, r, header["X-Amz-Content-Sha256"], "s3", s.Region, time.Now())
		},
	})
	return answer, refused(err)
}

func (s *s3) explain(err error) error {
	return remedy(err, "bucket "+s.Bucket+" in "+s.Region, "s3:GetObject, s3:PutObject, s3:ListBucket")
}

func (s *s3) read(ctx context.Context, name string) (*object, error) {
	answer, err := s.ask(ctx, http.MethodGet, name, map[string]string{}, nil)
	var r *refusal
	switch {
	case errors.As(err, &r) && r.status == http.StatusNotFound && r.code == "NoSuchKey":
		return nil, nil
	case err != nil:
		return nil, s.explain(err)
	}
	return versioned(answer, "ETag")
}

// versioned is an object as HTTP has it; a header has its version.
func versioned(answer *cloud.Answer, header string) (*object, error) {
	o := &object{text: answer.Body, kind: answer.Header.Get("Content-Type"), cache: answer.Header.Get("Cache-Control"), version: answer.Header.Get(header)}
	if o.version == "" {
		return nil, errors.New("it answered without the version of the object, so that nothing can be written in its place")
	}
	return o, nil
}

func (s *s3) write(ctx context.Context, name string, was, next *object) error {
	sum := sha256.Sum256(next.text)
	header := map[string]string{
		"Content-Type": next.kind, "Cache-Control": next.cache, "X-Amz-Checksum-Sha256": base64.StdEncoding.EncodeToString(sum[:]),
	}
	if was == nil {
		header["If-None-Match"] = "*"
	} else {
		header["If-Match"] = was.version
	}
	_, err := s.ask(ctx, http.MethodPut, name, header, next.text)
	var r *refusal
	switch {
	case is(err, http.StatusPreconditionFailed, http.StatusConflict):
		return errChanged
	case errors.As(err, &r) && r.status == http.StatusNotFound && r.code == "NoSuchKey": // it is gone
		return errChanged
	}
	return s.explain(err)
}
