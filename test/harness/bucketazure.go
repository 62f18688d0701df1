package harness

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// Azure is Azure Blob Storage, with a container of the name ids. Requests must have a
// token of the machine's identity that is for storage.
func (b *Bucket) Azure(a *Azure) http.Handler {
	return b.handler(func(w http.ResponseWriter, r *http.Request) {
		refuse := func(status int, code string) {
			w.Header().Set("Content-Type", "application/xml")
			w.Header().Set("x-ms-error-code", code)
			w.WriteHeader(status)
			fmt.Fprintf(w, "\xef\xbb\xbf"+`<?xml version="1.0" encoding="utf-8"?><Error><Code>%s</Code><Message>no`+"\n"+`RequestId:1</Message></Error>`, code)
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, maxObject))
		if err != nil {
			return
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		text, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		var claims jwt.Claims
		token, err := jwt.ParseSigned(text, []jose.SignatureAlgorithm{jose.RS256})
		if err != nil || token.Claims(a.RootKey.Public(), &claims) != nil ||
			claims.Validate(jwt.Expected{AnyAudience: []string{"https://storage.azure.com"}, Time: time.Now()}) != nil {
			refuse(http.StatusUnauthorized, "InvalidAuthenticationInfo")
			return
		}
		sent, err := http.ParseTime(r.Header.Get("X-Ms-Date"))
		if err != nil || time.Since(sent).Abs() > 15*time.Minute || r.Header.Get("X-Ms-Version") < "2017-11-09" { // the first with bearer tokens
			refuse(http.StatusBadRequest, "InvalidHeaderValue")
			return
		}
		name, ok := strings.CutPrefix(r.URL.Path, "/ids/")
		if !ok || b.removed {
			refuse(http.StatusNotFound, "ContainerNotFound")
			return
		}
		o, there := b.objects[name]
		switch r.Method {
		case http.MethodGet:
			if !there {
				refuse(http.StatusNotFound, "BlobNotFound")
				return
			}
			w.Header().Set("Content-Type", o.Type)
			w.Header().Set("Cache-Control", o.Cache)
			w.Header().Set("ETag", o.tag())
			w.Header().Set("X-Ms-Blob-Type", "BlockBlob")
			io.WriteString(w, o.Text)
		case http.MethodPut:
			match, none := r.Header.Get("If-Match"), r.Header.Get("If-None-Match")
			switch {
			case r.Header.Get("X-Ms-Blob-Type") != "BlockBlob":
				refuse(http.StatusBadRequest, "MissingRequiredHeader")
			case none == "*" && there:
				refuse(http.StatusConflict, "BlobAlreadyExists")
			case match != "" && (!there || match != o.tag()):
				refuse(http.StatusPreconditionFailed, "ConditionNotMet")
			default:
				b.put(name, BucketObject{Text: string(body), Type: r.Header.Get("X-Ms-Blob-Content-Type"), Cache: r.Header.Get("X-Ms-Blob-Cache-Control")})
				b.writes++
				w.Header().Set("ETag", b.objects[name].tag())
				w.WriteHeader(http.StatusCreated)
			}
		default:
			refuse(http.StatusMethodNotAllowed, "UnsupportedHttpVerb")
		}
	})
}
