package revocation

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/server/registry"
)

// Path is where CRLs are served, each under its authority's ID in hex and ".crl".
const Path = "/crl/"

// maxAge is how long caches may keep a CRL: whoever fetches it learns that late
// of a revocation, at most. Workloads are told by their agent at once.
const maxAge = time.Minute

// Handler serves the CRLs of all authorities of the trust domain, on whichever
// server they are: RFC 5280 §4.2.1.13, a single DER encoded CRL (RFC 2585).
func Handler(view func() *registry.View) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, Path)
		id, is := strings.CutSuffix(name, ".crl")
		var c *registry.CRL
		if ok && is && len(id) <= 128 {
			c = view().CRL(id)
		}
		switch {
		case r.Method != http.MethodGet && r.Method != http.MethodHead:
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "only GET and HEAD are served here", http.StatusMethodNotAllowed)
			return
		case c == nil || c.DER == nil:
			http.NotFound(w, r)
			return
		}
		h := w.Header()
		h.Set("Content-Type", "application/pkix-crl") // RFC 2585 §4.2
		h.Set("Cache-Control", fmt.Sprintf("public, max-age=%d", int(maxAge/time.Second)))
		h.Set("ETag", fmt.Sprintf(`"%d"`, c.Number))
		h.Set("X-Content-Type-Options", "nosniff")
		http.ServeContent(w, r, "", c.NextUpdate.Add(-Lifetime), bytes.NewReader(c.DER))
	})
}
