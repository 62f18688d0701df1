// Package web serves what a server offers over HTTPS to whoever comes: with
// [Serve], within bounds, and with the certificate that [Files] reads, that [ACME]
// obtains, or the server's own X509-SVID. Behind a proxy that ends TLS it serves HTTP.
package web

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/crypto/acme"
)

// Bounds of an endpoint. An answer is a few kilobytes, and is asked for every few
// minutes.
const (
	maxConnections = 512
	maxOfAddress   = 32 // many may come through one proxy
	maxHeader      = 8 << 10
	headerTime     = 10 * time.Second // handshake and request
	answerTime     = 30 * time.Second
	idleTime       = 30 * time.Second
	stopTime       = time.Second
)

// Options of [Serve]. All but Certificate are required.
type Options struct {
	Listener    net.Listener
	Handler     http.Handler
	MaxBody     int64 // bytes of a request
	Certificate Certificate
	Log         *slog.Logger
}

// Certificate is where the certificates of an endpoint come from. The zero value
// is none: plain HTTP.
type Certificate struct {
	Get    func(*tls.ClientHelloInfo) (*tls.Certificate, error) // the newest
	Obtain func(context.Context)                                // goes on beside the serving; nil: nothing is to be done
}

// Own is the certificate of a server that makes its own.
func Own(newest func() (*tls.Certificate, error)) Certificate {
	return Certificate{Get: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return newest() }}
}

// Serve serves until the context ends, and returns its error. It closes the
// listener.
func Serve(ctx context.Context, o Options) error {
	server := &http.Server{
		Handler:           http.MaxBytesHandler(o.Handler, o.MaxBody),
		ReadHeaderTimeout: headerTime,
		ReadTimeout:       headerTime,
		WriteTimeout:      answerTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
	stopped := context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.Background(), stopTime)
		defer cancel()
		if server.Shutdown(end) != nil {
			server.Close()
		}
	})
	defer stopped()
	bounded := &boundedListener{Listener: o.Listener, ofAddress: maxOfAddress, of: make(map[string]int)}
	var err error
	if o.Certificate.Get == nil {
		bounded.ofAddress = maxConnections // the proxy is the one address
		err = server.Serve(bounded)
	} else {
		server.TLSConfig = tlsConfig(o.Certificate.Get)
		if o.Certificate.Obtain != nil {
			server.TLSConfig.NextProtos = []string{"h2", "http/1.1", acme.ALPNProto}
			obtaining, end := context.WithCancel(ctx)
			var obtained sync.WaitGroup
			defer obtained.Wait()
			defer end()
			obtained.Go(func() { o.Certificate.Obtain(obtaining) })
		}
		err = server.ServeTLS(bounded, "", "")
	}
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return ctx.Err()
	}
	return err
}

// tlsConfig is Mozilla's "intermediate", without the suites that have no ECDHE.
// SPIFFE Federation §5. No certificate is asked of clients (§5.2.1.3).
func tlsConfig(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		CipherSuites: []uint16{ // of TLS 1.2
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		},
		GetCertificate:         certificate,
		SessionTicketsDisabled: true, // a client proves nothing, and comes again after minutes
	}
}

// boundedListener closes connections beyond the most that there may be, of all
// and of one address.
type boundedListener struct {
	net.Listener
	ofAddress int // how many one address may have

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
	if l.total >= maxConnections || l.of[host] >= l.ofAddress {
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
