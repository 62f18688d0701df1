package federation_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	hallmark "github.com/hallmark-id/hallmark/server/federation"
	"github.com/hallmark-id/hallmark/server/web"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// authority is one that signs the certificates of endpoints.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	a := &authority{key: key}
	a.certificate = a.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{td.ID().URL()},
	}, key)
	return a
}

func (a *authority) sign(t testing.TB, template *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	by := a.certificate
	if by == nil {
		by = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by, key.Public(), a.key)
	must(t, err)
	c, err := x509.ParseCertificate(der)
	must(t, err)
	return c
}

// issue issues a certificate: an X509-SVID if it has a SPIFFE ID, one for
// 127.0.0.1 else.
func (a *authority) issue(t testing.TB, id string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), KeyUsage: x509.KeyUsageDigitalSignature}
	if id != "" {
		template.URIs = []*url.URL{spiffeid.RequireFromString(id).URL()}
	} else {
		template.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	leaf := a.sign(t, template, key)
	return &tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
}

// endpoint is one that runs.
type endpoint struct {
	url     string
	address string
	now     atomic.Pointer[bundle.Bundle]
}

func newEndpoint(t testing.TB, a *authority, certificate *tls.Certificate) *endpoint {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	e := &endpoint{url: "https://" + l.Addr().String() + "/", address: l.Addr().String()}
	e.now.Store(&bundle.Bundle{
		TrustDomain: td, X509Authorities: []bundle.X509Authority{{Certificate: a.certificate}},
		JWTAuthorities: []bundle.JWTAuthority{{KeyID: "k", PublicKey: a.key.Public()}},
		SequenceNumber: 7, RefreshHint: 5 * time.Minute,
	})
	published := hallmark.NewEndpoint(hallmark.EndpointOptions{
		Listener: l, Bundle: e.now.Load, Certificate: web.Own(func() (*tls.Certificate, error) { return certificate, nil }),
	})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- published.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("it ended with %v", err)
		}
	})
	return e
}

// client is one that verifies as browsers do.
func (a *authority) client() *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(a.certificate)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true, DisableKeepAlives: true}}
}

func request(t testing.TB, c *http.Client, method, url string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
	must(t, err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp, string(body)
}

// go-spiffe's client is one of those that are out there.
func TestFederation_F11_F18_F19_F33_ABundleIsPublishedWithEitherProfile(t *testing.T) {
	a := newAuthority(t)
	t.Run("https_spiffe", func(t *testing.T) {
		e := newEndpoint(t, a, a.issue(t, "spiffe://example.org/spire/server"))
		roots := x509bundle.FromX509Authorities(td, []*x509.Certificate{a.certificate})
		b, err := federation.FetchBundle(t.Context(), td, e.url, federation.WithSPIFFEAuth(roots, spiffeid.RequireFromString("spiffe://example.org/spire/server")))
		wantBundle(t, b, err)
		_, err = federation.FetchBundle(t.Context(), td, e.url, federation.WithSPIFFEAuth(roots, spiffeid.RequireFromString("spiffe://example.org/other")))
		if err == nil {
			t.Error("another ID than the endpoint's was accepted")
		}
	})
	t.Run("https_web", func(t *testing.T) {
		e := newEndpoint(t, a, a.issue(t, ""))
		pool := x509.NewCertPool()
		pool.AddCert(a.certificate)
		b, err := federation.FetchBundle(t.Context(), td, e.url, federation.WithWebPKIRoots(pool))
		wantBundle(t, b, err)
	})
}

func wantBundle(t testing.TB, b *spiffebundle.Bundle, err error) {
	t.Helper()
	must(t, err)
	sequence, _ := b.SequenceNumber()
	hint, _ := b.RefreshHint()
	if len(b.X509Authorities()) != 1 || len(b.JWTAuthorities()) != 1 || sequence != 7 || hint != 5*time.Minute {
		t.Errorf("got %d, %d authorities, sequence %d, hint %v", len(b.X509Authorities()), len(b.JWTAuthorities()), sequence, hint)
	}
}

func TestFederation_F20_F21_F22_GETReturnsTheNewestBundleAsJSON(t *testing.T) {
	a := newAuthority(t)
	e, c := newEndpoint(t, a, a.issue(t, "")), a.client()
	resp, body := request(t, c, http.MethodGet, e.url)
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/json" || !utf8.ValidString(body) {
		t.Errorf("got %s %q", resp.Status, resp.Header)
	}
	newer := e.now.Load().Clone()
	newer.SequenceNumber = 8
	e.now.Store(newer)
	if _, body := request(t, c, http.MethodGet, e.url); !strings.Contains(body, `"spiffe_sequence":8`) {
		t.Errorf("got %s", body)
	}
}

func TestFederation_F50_AnAnswerMayBeKeptForLessThanTheHintAndHasATag(t *testing.T) {
	a := newAuthority(t)
	e, c := newEndpoint(t, a, a.issue(t, "")), a.client()
	resp, _ := request(t, c, http.MethodGet, e.url)
	tag := resp.Header.Get("ETag")
	if got := resp.Header.Get("Cache-Control"); got != "public, max-age=150" || tag == "" {
		t.Errorf("got %q, tag %q", got, tag)
	}
	if resp, body := request(t, c, http.MethodGet, e.url, "If-None-Match", tag); resp.StatusCode != http.StatusNotModified || body != "" {
		t.Errorf("got %s %s", resp.Status, body)
	}
	newer := e.now.Load().Clone()
	newer.SequenceNumber = 8
	e.now.Store(newer)
	if resp, body := request(t, c, http.MethodGet, e.url, "If-None-Match", tag); resp.StatusCode != http.StatusOK || body == "" {
		t.Errorf("after a change: %s %s", resp.Status, body)
	}
}

func TestNothingElseIsServed(t *testing.T) {
	a := newAuthority(t)
	e, c := newEndpoint(t, a, a.issue(t, "")), a.client()
	for method, want := range map[string]int{
		http.MethodPost: http.StatusMethodNotAllowed, http.MethodDelete: http.StatusMethodNotAllowed, http.MethodHead: http.StatusOK,
	} {
		if resp, _ := request(t, c, method, e.url); resp.StatusCode != want {
			t.Errorf("%s: %s", method, resp.Status)
		}
	}
	if resp, _ := request(t, c, http.MethodGet, e.url+"etc/passwd"); resp.StatusCode != http.StatusNotFound {
		t.Errorf("another path: %s", resp.Status)
	}
	e.now.Store(nil)
	if resp, _ := request(t, c, http.MethodGet, e.url); resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("without a bundle: %s", resp.Status)
	}
}

func TestFederation_F12_OldTLSIsRefused(t *testing.T) {
	a := newAuthority(t)
	e := newEndpoint(t, a, a.issue(t, ""))
	roots := x509.NewCertPool()
	roots.AddCert(a.certificate)
	for name, c := range map[string]struct {
		config *tls.Config
		ok     bool
	}{
		"TLS 1.1": {&tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, false},
		"CBC":     {&tls.Config{MaxVersion: tls.VersionTLS12, CipherSuites: []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}}, false},
		"TLS 1.2": {&tls.Config{MaxVersion: tls.VersionTLS12}, true},
		"TLS 1.3": {&tls.Config{MinVersion: tls.VersionTLS13}, true},
	} {
		c.config.RootCAs = roots
		conn, err := tls.Dial("tcp", e.address, c.config)
		if err == nil {
			conn.Close()
		}
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConnectionsOfOneAddressAreBounded(t *testing.T) {
	a := newAuthority(t)
	e := newEndpoint(t, a, a.issue(t, ""))
	for range 32 {
		c, err := net.Dial("tcp", e.address)
		must(t, err)
		defer c.Close()
	}
	over, err := net.Dial("tcp", e.address)
	must(t, err)
	defer over.Close()
	if _, err := over.Read(make([]byte, 1)); err == nil {
		t.Error("one more was served")
	}
}

func TestFederation_F17_ACertificateInFilesIsReadAgainWhenItChanges(t *testing.T) {
	a, dir := newAuthority(t), t.TempDir()
	certificate, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write := func(c *tls.Certificate) {
		der, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
		must(t, err)
		must(t, os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), 0o644))
		must(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
		now := time.Now() // the bubble's
		must(t, os.Chtimes(certificate, now, now))
		must(t, os.Chtimes(key, now, now))
	}
	synctest.Test(t, func(t *testing.T) {
		first, second := a.issue(t, ""), a.issue(t, "")
		write(first)
		files, err := web.OpenFiles(certificate, key, slog.New(slog.DiscardHandler))
		must(t, err)
		is := func(want *tls.Certificate, when string) {
			t.Helper()
			if got, err := files.Certificate(nil); err != nil || !got.Leaf.Equal(want.Leaf) {
				t.Errorf("%s it is another: %v", when, err)
			}
		}
		is(first, "at first")
		time.Sleep(time.Minute)
		write(second)
		is(second, "after a change")
		time.Sleep(time.Minute)
		must(t, os.WriteFile(key, []byte("half of"), 0o600))
		is(second, "while a file is being written")
		time.Sleep(time.Minute)
		must(t, os.Remove(certificate))
		is(second, "without a file")
		time.Sleep(time.Minute)
		write(first)
		is(first, "after all that")
	})
}

func TestFilesThatAreNoCertificateAreNamed(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	must(t, os.WriteFile(empty, nil, 0o600))
	for path, want := range map[string]string{filepath.Join(dir, "none"): "no such file", dir: "no regular file", empty: empty} {
		if _, err := web.OpenFiles(path, path, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
