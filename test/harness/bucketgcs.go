package harness

import (
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"strings"
)

// GCS is Google Cloud Storage, with a bucket of the name ids: its JSON API. Requests
// must have a token of [GCP.API]'s.
func (b *Bucket) GCS() http.Handler {
	return b.handler(func(w http.ResponseWriter, r *http.Request) {
		refuse := func(status int, reason string) {
			w.Header().Set("Content-Type", "application/json; charset=UTF-8")
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"error":{"code":%d,"message":"no","errors":[{"message":"no","domain":"global","reason":%q}]}}`, status, reason)
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, maxObject))
		if err != nil {
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		if r.Header.Get("Authorization") != "Bearer ya29.token" {
			refuse(http.StatusUnauthorized, "authError")
			return
		}
		if b.removed {
			refuse(http.StatusNotFound, "notFound")
			return
		}
		if r.Method == http.MethodPost && r.URL.Path == "/upload/storage/v1/b/ids/o" && r.FormValue("uploadType") == "multipart" {
			var metadata struct{ Name, ContentType, CacheControl string }
			kind, params, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
			parts := multipart.NewReader(strings.NewReader(string(body)), params["boundary"])
			first, err1 := parts.NextRawPart()
			if err != nil || kind != "multipart/related" || err1 != nil || json.NewDecoder(first).Decode(&metadata) != nil || metadata.Name == "" {
				refuse(http.StatusBadRequest, "badRequest")
				return
			}
			second, err := parts.NextRawPart()
			if err != nil {
				refuse(http.StatusBadRequest, "badRequest")
				return
			}
			text, err := io.ReadAll(second)
			if _, more := parts.NextRawPart(); err != nil || more != io.EOF {
				refuse(http.StatusBadRequest, "badRequest")
				return
			}
			if match := r.FormValue("ifGenerationMatch"); match != "" && match != fmt.Sprint(b.objects[metadata.Name].version) {
				refuse(http.StatusPreconditionFailed, "conditionNotMet")
				return
			}
			b.put(metadata.Name, BucketObject{Text: string(text), Type: metadata.ContentType, Cache: metadata.CacheControl})
			b.writes++
			_ = json.NewEncoder(w).Encode(map[string]string{"kind": "storage#object", "name": metadata.Name, "generation": fmt.Sprint(b.version)})
			return
		}
		escaped, ok := strings.CutPrefix(r.URL.EscapedPath(), "/storage/v1/b/ids/o/")
		name, err := url.PathUnescape(escaped)
		o, there := b.objects[name]
		generation := r.FormValue("generation")
		switch {
		case r.Method != http.MethodGet || !ok || err != nil || strings.Contains(escaped, "/"):
			refuse(http.StatusBadRequest, "badRequest")
		case !there, generation != "" && generation != fmt.Sprint(o.version):
			refuse(http.StatusNotFound, "notFound")
		case r.FormValue("alt") == "media":
			w.Header().Set("Content-Type", o.Type)
			io.WriteString(w, o.Text)
		default:
			_ = json.NewEncoder(w).Encode(map[string]string{"generation": fmt.Sprint(o.version), "contentType": o.Type, "cacheControl": o.Cache})
		}
	})
}
