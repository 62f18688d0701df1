package harness

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Bucket stands in for a bucket of objects in a cloud, and what of the cloud's API is
// about objects: [Bucket.S3]. Names are those in the bucket.
type Bucket struct {
	cloudFaults

	mu      sync.Mutex
	objects map[string]BucketObject
	serve   http.HandlerFunc // without faults
	version int
	removed bool
	writes  int
}

// BucketObject is an object.
type BucketObject struct {
	Text, Type, Cache string
	version           int
}

// NewBucket makes an empty one.
func NewBucket() *Bucket { return &Bucket{objects: make(map[string]BucketObject)} }

// Object returns an object; zero: there is none.
func (b *Bucket) Object(name string) BucketObject {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.objects[name]
}

// Put has somebody else write an object; empty text: delete it.
func (b *Bucket) Put(name string, o BucketObject) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.put(name, o)
}

func (b *Bucket) put(name string, o BucketObject) {
	if o.Text == "" {
		delete(b.objects, name)
		return
	}
	b.version++
	o.version = b.version
	b.objects[name] = o
}

// Remove removes the bucket, or makes it again.
func (b *Bucket) Remove(removed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.removed = removed
}

// Writes returns how often objects were written by the API.
func (b *Bucket) Writes() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.writes
}

func (o BucketObject) tag() string { return fmt.Sprintf(`"0x8DC%013d"`, o.version) }

// Pass has a fault answer as the API does.
func (b *Bucket) Pass(w http.ResponseWriter, r *http.Request) { b.serve(w, r) }

// handler is that of an API.
func (b *Bucket) handler(serve http.HandlerFunc) http.Handler {
	b.serve = serve
	return b.api(serve)
}

// maxObject is as much as is taken.
const maxObject = 5 << 20

// S3 is Amazon S3, with a bucket of the name ids in eu-central-1, by paths. Requests
// must be signed with the credentials.
func (b *Bucket) S3(id, secret string) http.Handler {
	return b.handler(func(w http.ResponseWriter, r *http.Request) {
		refuse := func(status int, code string) {
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(status)
			fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?>`+"\n"+`<Error><Code>%s</Code><Message>no</Message><RequestId>1</RequestId></Error>`, code)
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, maxObject))
		if err != nil {
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if !s3Signed(r, body, id, secret, "eu-central-1") {
			refuse(http.StatusForbidden, "SignatureDoesNotMatch")
			return
		}
		name, ok := strings.CutPrefix(r.URL.Path, "/ids/")
		switch {
		case !ok || b.removed:
			refuse(http.StatusNotFound, "NoSuchBucket")
			return
		}
		o, there := b.objects[name]
		switch r.Method {
		case http.MethodGet:
			if !there {
				refuse(http.StatusNotFound, "NoSuchKey")
				return
			}
			w.Header().Set("Content-Type", o.Type)
			w.Header().Set("Cache-Control", o.Cache)
			w.Header().Set("ETag", o.tag())
			io.WriteString(w, o.Text)
		case http.MethodPut:
			sum := sha256.Sum256(body)
			match, none := r.Header.Get("If-Match"), r.Header.Get("If-None-Match")
			switch {
			case r.Header.Get("X-Amz-Checksum-Sha256") != base64.StdEncoding.EncodeToString(sum[:]):
				refuse(http.StatusBadRequest, "BadDigest")
			case none != "" && none != "*":
				refuse(http.StatusNotImplemented, "NotImplemented")
			case none != "" && there:
				refuse(http.StatusPreconditionFailed, "PreconditionFailed")
			case match != "" && !there:
				refuse(http.StatusNotFound, "NoSuchKey")
			case match != "" && match != o.tag():
				refuse(http.StatusPreconditionFailed, "PreconditionFailed")
			default:
				b.put(name, BucketObject{Text: string(body), Type: r.Header.Get("Content-Type"), Cache: r.Header.Get("Cache-Control")})
				b.writes++
				w.Header().Set("ETag", b.objects[name].tag())
			}
		default:
			refuse(http.StatusMethodNotAllowed, "MethodNotAllowed")
		}
	})
}

// s3Signed computes the signature of a request anew: AWS Signature Version 4, with
// the paths of S3, which are escaped once.
func s3Signed(r *http.Request, body []byte, id, secret, region string) bool {
	rest, ok := strings.CutPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential=")
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	parts := strings.Split(rest, ", ")
	if !ok || len(parts) != 3 || err != nil || time.Since(at).Abs() > 15*time.Minute {
		return false
	}
	scope := at.Format("20060102") + "/" + region + "/s3/aws4_request"
	signed, ok := strings.CutPrefix(parts[1], "SignedHeaders=")
	sum := sha256.Sum256(body)
	if !ok || parts[0] != id+"/"+scope || r.Header.Get("X-Amz-Content-Sha256") != hex.EncodeToString(sum[:]) {
		return false
	}
	names := strings.Split(signed, ";")
	// What decides must be signed.
	for name := range r.Header {
		if lower := strings.ToLower(name); (strings.HasPrefix(lower, "x-amz-") || strings.HasPrefix(lower, "if-")) && !slices.Contains(names, lower) {
			return false
		}
	}
	if !slices.IsSorted(names) || !slices.Contains(names, "host") {
		return false
	}
	canonical := r.Method + "\n" + r.URL.EscapedPath() + "\n" + r.URL.Query().Encode() + "\n"
	for _, name := range names {
		value := r.Header.Get(name)
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = fmt.Sprint(r.ContentLength)
		}
		canonical += name + ":" + strings.TrimSpace(value) + "\n"
	}
	canonical += "\n" + signed + "\n" + r.Header.Get("X-Amz-Content-Sha256")
	hashed := sha256.Sum256([]byte(canonical))
	mac := func(key []byte, text string) []byte {
		h := hmac.New(sha256.New, key)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	key := []byte("AWS4" + secret)
	for _, part := range strings.Split(scope, "/") {
		key = mac(key, part)
	}
	want := hex.EncodeToString(mac(key, "AWS4-HMAC-SHA256\n"+r.Header.Get("X-Amz-Date")+"\n"+scope+"\n"+hex.EncodeToString(hashed[:])))
	return parts[2] == "Signature="+want
}
