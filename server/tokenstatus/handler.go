package tokenstatus

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"mime"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/statuslist"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
)

// HandlerOptions are what a [Handler] is made of. All are required.
type HandlerOptions struct {
	View func() *registry.View
	// Active returns the authority that signs now.
	Active func() (*authority.JWT, error)
	// Sign signs the token of a list, zlib as it is sent.
	Sign func(ctx context.Context, uri string, bits []byte, ttl time.Duration) (string, error)
	// TTL is how long a relying party may hold a list: it learns that late of a
	// revocation, and half of it later where HTTP caches are between.
	TTL time.Duration
	Now func() time.Time // nil: time.Now
	Log *slog.Logger     // nil: none
}

// Handler serves the status lists of all servers of the trust domain, signed by
// this one's JWT authority: TSL §8. Historical ones are not served.
func Handler(o HandlerOptions) http.Handler {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	empty, err := statuslist.New(1, registry.StatusListSize)
	if err != nil {
		panic(err) // its size is a constant
	}
	return &handler{o: o, empty: empty.Compress(), pages: make(map[string]*page)}
}

type handler struct {
	o     HandlerOptions
	empty []byte // bits of a list that revokes nothing

	mu    sync.Mutex
	pages map[string]*page // by list ID
}

// page is a list as it was signed last.
type page struct {
	mu     sync.Mutex
	of     *registry.StatusList
	by     *authority.JWT
	signed time.Time
	body   []byte
	zipped []byte
	tag    string // of body, without quotes
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, ok := strings.CutPrefix(r.URL.Path, Path)
	var list *registry.StatusList
	view := h.o.View()
	if ok && len(id) == 32 {
		list = view.StatusList(id)
	}
	head := w.Header()
	head.Set("Access-Control-Allow-Origin", "*") // public, the same for everybody; TSL §8.1
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		head.Set("Allow", "GET, HEAD")
		http.Error(w, "only GET and HEAD are served here", http.StatusMethodNotAllowed)
		return
	case list == nil:
		http.NotFound(w, r)
		return
	case r.URL.Query().Has("time"): // TSL §8.4
		http.Error(w, "only the status of now is served here", http.StatusNotImplemented)
		return
	case !accepts(r.Header.Values("Accept")):
		http.Error(w, "status lists are served as "+statuslist.MediaType+" alone", http.StatusNotAcceptable)
		return
	}
	p, err := h.page(r.Context(), view, list)
	if err != nil {
		if r.Context().Err() == nil {
			h.o.Log.Error("a status list cannot be signed", "list", list.ID, "error", err)
		}
		head.Set("Retry-After", "5")
		http.Error(w, "the status list cannot be signed now", http.StatusServiceUnavailable)
		return
	}
	body, tag := p.body, p.tag
	if takesGzip(r.Header.Values("Accept-Encoding")) {
		body, tag = p.zipped, p.tag+"-gzip"
		head.Set("Content-Encoding", "gzip")
	}
	head.Set("Content-Type", statuslist.MediaType)
	head.Set("Cache-Control", fmt.Sprintf("public, max-age=%d", int(h.o.TTL/2/time.Second)))
	head.Set("ETag", `"`+tag+`"`)
	head.Set("Vary", "Accept, Accept-Encoding")
	head.Set("X-Content-Type-Options", "nosniff")
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(body))
}

// page returns a list as it is to be sent: signed again if it has changed, if
// another authority signs, or at half of its time to live.
func (h *handler) page(ctx context.Context, view *registry.View, list *registry.StatusList) (page, error) {
	active, err := h.o.Active()
	if err != nil {
		return page{}, err
	}
	h.mu.Lock()
	p := h.pages[list.ID]
	if p == nil {
		for id := range h.pages { // at most one for each list that there was at the last look
			if view.StatusList(id) == nil {
				delete(h.pages, id)
			}
		}
		p = &page{}
		h.pages[list.ID] = p
	}
	h.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	now := h.o.Now()
	stale := p.of == nil || p.of.Revision() < list.Revision() // a request may come with an older view
	if age := now.Sub(p.signed); stale || p.by != active || age < 0 || age > h.o.TTL/2 {
		of := list
		if !stale {
			of = p.of
		}
		bits := of.Bits
		if bits == nil {
			bits = h.empty
		}
		token, err := h.o.Sign(context.WithoutCancel(ctx), of.URI, bits, h.o.TTL) // others wait for it, too
		if err != nil {
			return page{}, err
		}
		sum := sha256.Sum256([]byte(token))
		p.of, p.by, p.signed = of, active, now
		p.body, p.zipped, p.tag = []byte(token), zipped(token), hex.EncodeToString(sum[:16])
	}
	return page{body: p.body, zipped: p.zipped, tag: p.tag}, nil
}

func zipped(text string) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := z.Write([]byte(text)); err != nil {
		panic(err) // writing to memory does not fail
	}
	if err := z.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// accepts reports whether a client takes a status list token as a JWT. One that
// does not say takes anything.
func accepts(headers []string) bool {
	if len(headers) == 0 {
		return true
	}
	return named(headers, statuslist.MediaType, "application/*", "*/*")
}

func takesGzip(headers []string) bool { return named(headers, "gzip") }

// named reports whether a header names any of some values, and does not give it
// the weight 0.
func named(headers []string, values ...string) bool {
	for _, part := range strings.Split(strings.Join(headers, ","), ",") {
		value, parameters, err := mime.ParseMediaType(part)
		if err != nil || strings.Trim(parameters["q"], "0.") == "" && parameters["q"] != "" {
			continue
		}
		for _, v := range values {
			if value == v {
				return true
			}
		}
	}
	return false
}
