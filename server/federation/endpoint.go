package federation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/web"
)

// EndpointOptions are what an endpoint needs. All but Log are required.
type EndpointOptions struct {
	Listener    net.Listener
	Bundle      func() *bundle.Bundle
	Certificate web.Certificate
	Log         *slog.Logger // nil is silent
}

// Endpoint publishes a bundle over HTTPS: GET / answers with the SPIFFE bundle
// document, to whoever asks. Which profile that is depends on the certificate:
// an X509-SVID makes it https_spiffe, one of the Web PKI https_web.
type Endpoint struct {
	o EndpointOptions

	mu       sync.Mutex
	of       *bundle.Bundle
	document []byte
	tag      string
}

// NewEndpoint makes an endpoint. [Endpoint.Run] closes the listener.
func NewEndpoint(o EndpointOptions) *Endpoint {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Endpoint{o: o}
}

// Run serves until the context ends, and returns its error.
func (e *Endpoint) Run(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", e.serve)
	err := web.Serve(ctx, web.Options{
		Listener: e.o.Listener, Handler: mux, Certificate: e.o.Certificate, Log: e.o.Log, // no request has a body
	})
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return err
	}
	return fmt.Errorf("publish the bundle: %w", err)
}

// serve answers with the newest bundle. Whoever stores answers may keep one for
// half of the time after which clients ask again.
func (e *Endpoint) serve(w http.ResponseWriter, r *http.Request) {
	b := e.o.Bundle()
	document, tag, err := e.encoded(b)
	if err != nil {
		e.o.Log.Error("the bundle cannot be published", "error", err)
		http.Error(w, "the bundle cannot be published now", http.StatusServiceUnavailable)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", fmt.Sprintf("public, max-age=%d", int(b.RefreshHint/time.Second)/2))
	h.Set("ETag", tag)
	h.Set("X-Content-Type-Options", "nosniff")
	if r.Header.Get("If-None-Match") == tag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	_, _ = w.Write(document) // of HEAD net/http sends the headers alone
}

// encoded returns the document of a bundle and its tag.
func (e *Endpoint) encoded(b *bundle.Bundle) (document []byte, tag string, err error) {
	if b == nil {
		return nil, "", errors.New("there is none yet")
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.of != b {
		document, err := b.Document()
		if err != nil {
			return nil, "", err
		}
		sum := sha256.Sum256(document)
		e.of, e.document, e.tag = b, document, `"`+hex.EncodeToString(sum[:16])+`"`
	}
	return e.document, e.tag, nil
}
