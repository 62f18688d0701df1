package federation

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// Bounds of the endpoint. An answer is a few kilobytes, and is asked for every
// few minutes.
const (
	maxConnections = 512
	maxOfAddress   = 32 // many may come through one proxy
	maxHeader      = 8 << 10
	headerTime     = 10 * time.Second // handshake and request
	answerTime     = 30 * time.Second
	idleTime       = 30 * time.Second
	stopTime       = time.Second
)

// EndpointOptions are what an endpoint needs. All but Log are required.
type EndpointOptions struct {
	Listener    net.Listener
	Bundle      func() *bundle.Bundle
	Certificate func() (*tls.Certificate, error) // the newest
	Log         *slog.Logger                     // nil is silent
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
	server := &http.Server{
		Handler:           http.MaxBytesHandler(mux, 0), // no request has a body
		TLSConfig:         tlsConfig(e.o.Certificate),
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       headerTime,
		WriteTimeout:      answerTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(e.o.Log.Handler(), slog.LevelDebug),
	}
	stopped := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.Background(), stopTime)
		defer cancel()
		if server.Shutdown(end) != nil {
			server.Close()
		}
	})
	defer stopped()
	err := server.ServeTLS(&boundedListener{Listener: e.o.Listener, of: make(map[string]int)}, "", "")
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return ctx.Err()
	}
	return fmt.Errorf("publish the bundle: %w", err)
}

// tlsConfig is Mozilla's "intermediate", without the suites that have no ECDHE.
// SPIFFE Federation §5. No certificate is asked of clients (§5.2.1.3).
func tlsConfig(certificate func() (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		CipherSuites: []uint16{ // of TLS 1.2
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate() },
		SessionTicketsDisabled: true, // a client proves nothing, and comes again after minutes
	}
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

// boundedListener closes connections beyond the most that there may be, of all
// and of one address.
type boundedListener struct {
	net.Listener

	mu    sync.Mutex
	total int
	of    map[string]int
}

// Accept returns the next connection that there is room for.
func (l *boundedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		if l.enter(host) {
			return &boundedConn{Conn: c, leave: sync.OnceFunc(func() { l.leave(host) })}, nil
		}
		c.Close()
	}
}

func (l *boundedListener) enter(host string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxConnections || l.of[host] >= maxOfAddress {
		return false
	}
	l.total++
	l.of[host]++
	return true
}

func (l *boundedListener) leave(host string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.of[host]--; l.of[host] == 0 {
		delete(l.of, host)
	}
}

type boundedConn struct {
	net.Conn
	leave func()
}

// Close closes the connection and makes room for another.
func (c *boundedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
