// Package kube asks the servers of a Kubernetes cluster, its API server and the
// kubelets, for the attestors that need to: HTTP over TLS and JSON. Make a
// [Client] with [New]; it is not an attestor.
//
// What it trusts and what it proves itself by are files that Kubernetes renews:
// the token is read for each question, the certificates for each connection.
package kube

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

const (
	maxFile   = 1 << 20  // bytes of a file with certificates or a key
	maxToken  = 48 << 10 // bytes; a payload of 64 KiB has room for it
	maxError  = 300      // bytes of a server's error that are passed on
	maxIdle   = 32       // connections kept open
	idleTime  = 30 * time.Second
	userAgent = "hallmark"
)

// Source is a file, or what would be in it. The zero value is nothing.
type Source struct {
	Path string
	Data []byte
}

// Empty reports whether there is neither.
func (s Source) Empty() bool { return s.Path == "" && len(s.Data) == 0 }

func (s Source) read(most int64) ([]byte, error) {
	if s.Path == "" {
		return s.Data, nil
	}
	return pemfile.Read(s.Path, most)
}

func (s Source) String() string {
	if s.Path == "" {
		return "the configuration"
	}
	return s.Path
}

// ReadToken reads a file that holds a token and maybe white space around it.
func ReadToken(path string) (string, error) {
	return Source{Path: path}.token()
}

func (s Source) token() (string, error) {
	data, err := s.read(maxToken)
	if err != nil {
		return "", err
	}
	token := bytes.TrimSpace(data)
	if len(token) == 0 {
		return "", fmt.Errorf("%s is empty; a token is expected", s)
	}
	for _, c := range token {
		if c <= ' ' || c > '~' {
			return "", fmt.Errorf("%s holds something else than a token", s)
		}
	}
	return string(token), nil
}

// Config is how to reach a server.
type Config struct {
	Address string // host:port
	Path    string // before that of each question; empty, or with a slash before it
	// ServerName is what the server's certificate must be for. Empty: the host.
	ServerName string
	CA         Source // PEM, that the certificate must lead to
	// Insecure trusts whoever answers.
	Insecure bool

	Token            Source // bearer token
	Certificate, Key Source // of the client, PEM
}

// Client asks one server.
type Client struct {
	config Config
	http   *http.Client
}

// New makes a Client. It reads no file.
func New(c Config) *Client {
	client := &Client{config: c}
	client.http = &http.Client{
		Transport: &http.Transport{
			DialTLSContext:      client.dial,
			DisableCompression:  true,
			MaxIdleConnsPerHost: maxIdle,
			IdleConnTimeout:     idleTime,
		},
		// A redirect would carry the token elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return client
}

// dial connects to the server and verifies it, by the files as they are now.
func (c *Client) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	config, err := c.tls()
	if err != nil {
		return nil, err
	}
	dialer := tls.Dialer{Config: config}
	return dialer.DialContext(ctx, network, c.config.Address)
}

func (c *Client) tls() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.config.ServerName, InsecureSkipVerify: c.config.Insecure}
	if !c.config.Insecure {
		ca, err := c.config.CA.read(maxFile)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(ca) {
			return nil, fmt.Errorf("%s holds no certificate; PEM is expected", c.config.CA)
		}
	}
	if !c.config.Certificate.Empty() {
		certificate, err := c.config.Certificate.read(maxFile)
		if err != nil {
			return nil, err
		}
		key, err := c.config.Key.read(maxFile)
		if err != nil {
			return nil, err
		}
		pair, err := tls.X509KeyPair(certificate, key)
		if err != nil {
			return nil, fmt.Errorf("client certificate in %s and key in %s: %w", c.config.Certificate, c.config.Key, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// StatusError is an answer other than success.
type StatusError struct {
	Code    int    // of HTTP
	Status  string // with words
	Message string // the beginning of what the server said
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("it answered %s: %q", e.Status, e.Message)
}

// Do asks the server, with a body of JSON unless that is nil, and has its
// answer of at most so many bytes read by a function.
func (c *Client) Do(ctx context.Context, method, path string, body []byte, most int64, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+c.config.Address+c.config.Path+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json, */*;q=0.5") // keys have a type of their own
	req.Header.Set("User-Agent", userAgent)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if !c.config.Token.Empty() {
		token, err := c.config.Token.token()
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if inner := errors.Unwrap(err); inner != nil {
			err = inner // without the URL, which says no more than the address
		}
		return fmt.Errorf("reach it at %s: %w", c.config.Address, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		message, _ := io.ReadAll(io.LimitReader(resp.Body, maxError))
		return &StatusError{Code: resp.StatusCode, Status: resp.Status, Message: string(message)}
	}
	if err := read(&bounded{r: resp.Body, left: most, most: most}); err != nil {
		// The time's end closes the connection, which is all that the reader sees.
		return fmt.Errorf("read its answer: %w", cmp.Or(ctx.Err(), err))
	}
	return nil
}

// bounded fails once more is read than it may be.
type bounded struct {
	r          io.Reader
	left, most int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return 0, fmt.Errorf("it is longer than %d bytes", b.most)
	}
	return n, err
}
