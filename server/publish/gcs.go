package publish

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"net/url"
	"regexp"
	"strings"
	"sync"

	"github.com/hallmark-id/hallmark/attestors/cloud"
	"github.com/hallmark-id/hallmark/server/cloudauth"
)

// GCSConfig is a bucket of Google Cloud Storage. Credentials are found where Google's
// tools find them: the environment, files, the instance or pod. They need
// storage.objects.get, create and delete (to overwrite) on the bucket, as
// roles/storage.objectUser has them. Who may read the objects is the bucket's policy's.
type GCSConfig struct {
	// Bucket is its name. It is required.
	Bucket string `yaml:"bucket" env:"expand"`
	// Prefix is the path in the bucket below which the documents are. Default: the
	// bucket itself.
	Prefix string `yaml:"prefix" env:"expand"`
	// Endpoint is the URL of what takes the place of Google's: HTTPS, or HTTP on this
	// machine. Default https://storage.googleapis.com.
	Endpoint string `yaml:"endpoint" env:"expand"`
}

const (
	gcsEndpoint = "https://storage.googleapis.com"
	gcsScope    = "https://www.googleapis.com/auth/devstorage.read_write"
)

var (
	gcsBucket     = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]$`)
	gcsGeneration = regexp.MustCompile(`^[0-9]{1,20}$`)
)

func (c *GCSConfig) check() error {
	if !gcsBucket.MatchString(c.Bucket) || strings.Contains(c.Bucket, "..") {
		return fmt.Errorf("gcs.bucket is %.100q; write the name of a bucket", c.Bucket)
	}
	return checkRemote("gcs", c.Prefix, c.Endpoint)
}

func (c *GCSConfig) store(string) store {
	g := &gcs{GCSConfig: *c, base: gcsEndpoint, api: cloud.API(), tokens: tokens{find: func() (cloudauth.Tokens, error) { return cloudauth.Google(gcsScope) }}}
	if c.Endpoint != "" {
		g.base, _ = cloud.CheckEndpoint(c.Endpoint)
	}
	return g
}

// tokens are those of a cloud, which are found when they are first needed.
type tokens struct {
	find func() (cloudauth.Tokens, error)

	mu    sync.Mutex
	found cloudauth.Tokens
}

func (t *tokens) bearer(ctx context.Context) (string, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.found == nil {
		found, err := t.find()
		if err != nil {
			return "", err
		}
		t.found = found
	}
	token, err := t.found.Token(ctx)
	return "Bearer " + token, err
}

// gcs is a store in a bucket of Google's, by its JSON API.
type gcs struct {
	GCSConfig
	base   string // URL
	api    *cloud.Service
	tokens tokens
}

func (g *gcs) String() string { return strings.TrimSuffix("gs://"+g.Bucket+"/"+g.Prefix, "/") }

// object is the name of an object in the bucket.
func (g *gcs) object(name string) string { return strings.TrimPrefix(g.Prefix+"/"+name, "/") }

func (g *gcs) ask(ctx context.Context, method, where string, header map[string]string, body []byte) (*cloud.Answer, error) {
	bearer, err := g.tokens.bearer(ctx)
	if err != nil {
		return nil, err
	}
	header["Authorization"] = bearer
	answer, err := g.api.Do(ctx, cloud.Question{Method: method, URL: g.base + where, Header: header, Body: string(body), Most: maxAnswer})
	return answer, refused(err)
}

func (g *gcs) explain(err error) error {
	return remedy(err, "bucket "+g.Bucket, "storage.objects.get, create and delete")
}

// read asks for the metadata first: what a public object is, Google may say from a
// cache, but not of which generation it is now.
func (g *gcs) read(ctx context.Context, name string) (*object, error) {
	where := "/storage/v1/b/" + g.Bucket + "/o/" + url.PathEscape(g.object(name))
	answer, err := g.ask(ctx, http.MethodGet, where+"?fields=generation,contentType,cacheControl", map[string]string{}, nil)
	switch {
	case is(err, http.StatusNotFound): // the object, or the bucket, which writing finds out
		return nil, nil
	case err != nil:
		return nil, g.explain(err)
	}
	var o struct {
		Generation   string `json:"generation"`
		ContentType  string `json:"contentType"`
		CacheControl string `json:"cacheControl"`
	}
	if json.Unmarshal(answer.Body, &o) != nil || !gcsGeneration.MatchString(o.Generation) {
		return nil, errors.New("it answered with something else than the metadata of an object")
	}
	answer, err = g.ask(ctx, http.MethodGet, where+"?alt=media&generation="+o.Generation, map[string]string{}, nil)
	switch {
	case is(err, http.StatusNotFound): // another server was faster
		return nil, errChanged
	case err != nil:
		return nil, g.explain(err)
	}
	return &object{text: answer.Body, kind: o.ContentType, cache: o.CacheControl, version: o.Generation}, nil
}

func (g *gcs) write(ctx context.Context, name string, was, next *object) error {
	generation := "0" // there is none
	if was != nil {
		generation = was.version
	}
	metadata, err := json.Marshal(map[string]string{"name": g.object(name), "contentType": next.kind, "cacheControl": next.cache})
	if err != nil {
		return err
	}
	var body bytes.Buffer
	parts := multipart.NewWriter(&body)
	for _, part := range []struct {
		kind string
		text []byte
	}{{"application/json; charset=UTF-8", metadata}, {next.kind, next.text}} {
		w, err := parts.CreatePart(textproto.MIMEHeader{"Content-Type": {part.kind}})
		if err != nil {
			return err
		}
		if _, err := w.Write(part.text); err != nil {
			return err
		}
	}
	if err := parts.Close(); err != nil {
		return err
	}
	_, err = g.ask(ctx, http.MethodPost, "/upload/storage/v1/b/"+g.Bucket+"/o?uploadType=multipart&ifGenerationMatch="+generation,
		map[string]string{"Content-Type": "multipart/related; boundary=" + parts.Boundary()}, body.Bytes())
	if is(err, http.StatusPreconditionFailed) {
		return errChanged
	}
	return g.explain(err)
}
