// Package credential makes of a JWT-SVID what the clients of others ask a helper
// for: credentials of AWS ([AWS.Assume]; of an X509-SVID,
// [RolesAnywhere.Assume]), the answer that Google's libraries read
// ([GoogleAnswer]), an ExecCredential of Kubernetes ([ExecCredential]), a token of
// Vault ([Vault.Login]). It needs no library of theirs.
//
// No error has a token or secret in it: whoever runs a helper may log what it
// says.
package credential

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
	"unicode"
)

// Token is a JWT-SVID.
type Token struct {
	Text      string
	ExpiresAt time.Time
}

const (
	maxAnswer = 64 << 10 // bytes; credentials are some kilobytes
	maxURL    = 2048     // bytes
	maxTold   = 300      // bytes of an answer that an error has
	callTime  = 30 * time.Second
)

// Client returns an HTTP client that verifies servers by the authorities of a PEM
// file, or by those of the system if it has no name. It follows no redirect,
// which would carry a token elsewhere.
func Client(caFile string) (*http.Client, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		data, err := os.ReadFile(caFile)
		if err != nil {
			return nil, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(data) {
			return nil, fmt.Errorf("%s holds no certificate; PEM is expected", caFile)
		}
	}
	return &http.Client{
		Transport:     &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: config, DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       callTime,
	}, nil
}

// parseEndpoint reads a URL that a token may be sent to: https, or http on this
// machine.
func parseEndpoint(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || len(text) > maxURL {
		return nil, fmt.Errorf("%.100q is no URL of a service, such as https://vault.example.org:8200", text)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme != "https" && !(u.Scheme == "http" && (u.Hostname() == "localhost" || ip != nil && ip.IsLoopback())) {
		return nil, fmt.Errorf("%.100q is not https: a token is shown over verified TLS alone", text)
	}
	return u, nil
}

// post sends a body and returns the answer.
func post(ctx context.Context, client *http.Client, to, kind string, body []byte, header map[string]string) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", kind)
	req.Header.Set("User-Agent", "hallmark")
	for name, value := range header {
		req.Header.Set(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	answer, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(answer) > maxAnswer {
		err = fmt.Errorf("it answers more than %d bytes", maxAnswer)
	}
	return resp.StatusCode, answer, err
}

var errAnswer = errors.New("it answers what cannot be read; is this the right address?")

// told is what a service says of itself, for an error: short, on one line,
// without the token in case it repeats that.
func told(text, token string) string {
	if token != "" {
		text = strings.ReplaceAll(text, token, "(the token)")
	}
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "?"))
	if len(text) > maxTold {
		text = strings.ToValidUTF8(text[:maxTold], "") + "…"
	}
	return text
}
