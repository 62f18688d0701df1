// Package cloud asks the services of a cloud over HTTP: the metadata service that
// an instance has at a link-local address, and the cloud's APIs. It is not an
// attestor. Make a [Service] with [Metadata] or [API], and ask with [Service.Do].
//
// Every question has a deadline, every answer a bound. Redirects are not followed:
// they would carry a token or a secret elsewhere.
package cloud

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"
)

// MetadataAddress is where instances of all clouds find their metadata service.
const MetadataAddress = "http://169.254.169.254"

const (
	answerTime = 5 * time.Second // of one question, answer included
	idleTime   = 30 * time.Second
	maxIdle    = 16       // connections kept open
	maxHeader  = 16 << 10 // bytes
	maxError   = 300      // bytes of a server's error that are passed on
	userAgent  = "hallmark"
)

// Service is one server, or all those that are reached in the same way.
type Service struct {
	base string // of the URLs, without a slash at the end; empty: questions have whole ones
	http *http.Client
}

// Metadata makes the metadata service at an address, a URL without a path. The
// environment's proxies are not used: what answers must be of this instance.
func Metadata(address string) (*Service, error) {
	u, err := parseBase(address)
	if err != nil {
		return nil, err
	}
	return &Service{base: u.Scheme + "://" + u.Host, http: client(nil, &tls.Config{})}, nil
}

// API makes the APIs of a cloud, by the environment's proxies if there are any.
func API() *Service {
	return APIOver(&tls.Config{})
}

// APIOver is API with roots or a client certificate of its own.
func APIOver(config *tls.Config) *Service {
	return &Service{http: client(http.ProxyFromEnvironment, config)}
}

// Close closes connections that are kept open.
func (s *Service) Close() { s.http.CloseIdleConnections() }

func client(proxy func(*http.Request) (*url.URL, error), config *tls.Config) *http.Client {
	config.MinVersion = tls.VersionTLS12
	return &http.Client{
		Timeout: answerTime,
		Transport: &http.Transport{
			Proxy:                  proxy,
			TLSClientConfig:        config,
			DisableCompression:     true, // the bound is on what is read
			MaxIdleConnsPerHost:    maxIdle,
			IdleConnTimeout:        idleTime,
			MaxResponseHeaderBytes: maxHeader,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func parseBase(address string) (*url.URL, error) {
	u, err := url.Parse(address)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%q is no URL", address)
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("%q is no URL of HTTP; write one like %s", address, MetadataAddress)
	case u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("%q has more than scheme, host and port", address)
	}
	return u, nil
}

// CheckEndpoint checks the URL of an API that takes the place of the cloud's own:
// HTTPS, or HTTP on this machine. It returns it without a slash at its end.
func CheckEndpoint(endpoint string) (string, error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("%q is no URL of an API; write one like https://HOST", endpoint)
	}
	ip, err := netip.ParseAddr(u.Hostname())
	local := u.Hostname() == "localhost" || err == nil && ip.IsLoopback()
	if u.Scheme != "https" && !(u.Scheme == "http" && local) {
		return "", fmt.Errorf("%q is not HTTPS, by which alone its answers can be trusted", endpoint)
	}
	return strings.TrimRight(endpoint, "/"), nil
}

// Question is what a service is asked.
type Question struct {
	Method string // "": GET
	// URL is the path and query, or the whole URL if the service has no address.
	URL    string
	Header map[string]string
	Body   string
	// Most is how many bytes the answer may have.
	Most int64
	// Sign, if it is set, changes the request before it is sent.
	Sign func(*http.Request) error
}

// Answer is what it answers with success.
type Answer struct {
	Header http.Header
	Body   []byte
}

// StatusError is an answer other than success; a redirect is one, too.
type StatusError struct {
	Code   int    // of HTTP
	Status string // with words
	Body   []byte // its beginning: at most Most of the question
}

func (e *StatusError) Error() string {
	body := e.Body
	if len(body) > maxError {
		body = body[:maxError]
	}
	return fmt.Sprintf("it answered %s: %q", e.Status, body)
}

// Do asks. The error names the server, and is a [*StatusError] if that answered
// with one.
func (s *Service) Do(ctx context.Context, q Question) (*Answer, error) {
	method := q.Method
	if method == "" {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, method, s.base+q.URL, strings.NewReader(q.Body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", userAgent)
	for name, value := range q.Header {
		req.Header.Set(name, value)
	}
	if q.Sign != nil {
		if err := q.Sign(req); err != nil {
			return nil, err
		}
	}
	resp, err := s.http.Do(req)
	if err != nil {
		if inner := errors.Unwrap(err); inner != nil {
			err = inner // without the URL, whose query may hold a secret
		}
		return nil, fmt.Errorf("ask %s: %w", req.URL.Host, plain(err))
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, q.Most+1))
	if resp.StatusCode/100 != 2 {
		return nil, fmt.Errorf("ask %s: %w", req.URL.Host, &StatusError{resp.StatusCode, resp.Status, body[:min(int64(len(body)), q.Most)]})
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the answer of %s: %w", req.URL.Host, plain(err))
	case int64(len(body)) > q.Most:
		return nil, fmt.Errorf("the answer of %s is longer than %d bytes", req.URL.Host, q.Most)
	}
	return &Answer{resp.Header, body}, nil
}

// plain says that time ran out as people would.
func plain(err error) error {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return fmt.Errorf("no answer in time (%w)", context.DeadlineExceeded)
	}
	return err
}

// Token checks that an answer is one word of printable ASCII, white space around
// it apart: what tokens are, and pages of HTML are not.
func Token(body []byte) (string, error) {
	text := strings.TrimSpace(string(body))
	if text == "" {
		return "", errors.New("the answer is empty; a token is expected")
	}
	for i := range len(text) {
		if text[i] <= ' ' || text[i] > '~' || text[i] == '<' {
			return "", errors.New("the answer is something else than a token")
		}
	}
	return text, nil
}
