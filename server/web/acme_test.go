package web_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"
	"golang.org/x/crypto/acme"

	"github.com/hallmark-id/hallmark/server/web"
	"github.com/hallmark-id/hallmark/test/harness"
)

const domain = "spiffe.example.org"

// directory is Pebble, the ACME server that Let's Encrypt tests clients with. It
// finds each domain at this machine, at the port of a listener.
type directory struct {
	url   string
	roots *x509.CertPool // that verify the directory
	root  *x509.CertPool // of what it issues
	names sync.Map       // to addresses, with a dot at their end
	asked atomic.Int64   // requests
}

// newDirectory starts one. With an account, it takes those alone that are bound to
// it.
func newDirectory(t *testing.T, l net.Listener, account *acme.ExternalAccountBinding) *directory {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	d := &directory{roots: x509.NewCertPool(), root: x509.NewCertPool()}
	_, port, err := net.SplitHostPort(l.Addr().String())
	must(t, err)
	tlsPort, err := strconv.Atoi(port)
	must(t, err)
	quiet, memory := log.New(io.Discard, "", 0), db.NewMemoryStore()
	if account != nil {
		must(t, memory.AddExternalAccountKeyByID(account.KID, base64.RawURLEncoding.EncodeToString(account.Key)))
	}
	issuer := ca.New(quiet, memory, "", "ecdsa", 0, 1, map[string]ca.Profile{"default": {Description: "default"}})
	front := wfe.New(quiet, memory, va.New(quiet, 1, tlsPort, true, d.serveDNS(t), memory), issuer, []string{"pebble.example"}, true, account != nil, 0, 0)
	handler := front.Handler()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.asked.Add(1)
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	d.url = server.URL + wfe.DirectoryPath
	d.roots.AddCert(server.Certificate())
	d.root.AppendCertsFromPEM(issuer.GetRootCert(0).PEM())
	return d
}

// serveDNS serves the names to Pebble, which asks over TCP.
func (d *directory) serveDNS(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	server := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		answer := new(dns.Msg).SetReply(r)
		if address, ok := d.names.Load(r.Question[0].Name); !ok {
			answer.Rcode = dns.RcodeNameError
		} else if r.Question[0].Qtype == dns.TypeA {
			answer.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(address.(string))}}
		}
		_ = w.WriteMsg(answer)
	})}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = server.ActivateAndServe() }()
	t.Cleanup(func() { l.Close(); <-ended })
	return l.Addr().String()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// lines is a log that can be read while it is written.
type lines struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// endpoint serves "hello" with a certificate by ACME.
func endpoint(t *testing.T, l net.Listener, d *directory, dir string, account *acme.ExternalAccountBinding) (said *lines, stop func()) {
	t.Helper()
	said = &lines{}
	logger := slog.New(slog.NewTextHandler(said, nil))
	obtained := web.NewACME(web.ACMEOptions{Domains: []string{domain}, Directory: d.url, Roots: d.roots, Email: "ops@example.org", Account: account, Dir: dir, Log: logger})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = web.Serve(ctx, web.Options{
			Listener: l, Log: logger, Certificate: web.Certificate{Get: obtained.Certificate, Obtain: obtained.Obtain},
			Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }),
		})
	}()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return said, stop
}

// get fetches from the endpoint as a browser does that knows a root.
func get(t *testing.T, l net.Listener, roots *x509.CertPool, name string) (body string, presented *x509.Certificate, err error) {
	t.Helper()
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: name},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		},
	}}
	resp, err := client.Get("https://" + name + "/")
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return string(data), resp.TLS.PeerCertificates[0], err
}

func TestFederation_F17_F18_ACertificateOfTheWebPKIIsHadByACME(t *testing.T) {
	listen := func(address string) net.Listener {
		l, err := net.Listen("tcp", address)
		must(t, err)
		return l
	}
	l := listen("127.0.0.1:0")
	d := newDirectory(t, l, nil)
	d.names.Store(domain+".", "127.0.0.1")
	dir := t.TempDir()
	said, stop := endpoint(t, l, d, dir, nil)
	harness.Eventually(t, "a certificate, before anybody has come", func(context.Context) error {
		if log := said.String(); !strings.Contains(log, "an endpoint has a certificate by ACME") {
			return fmt.Errorf("the log is\n%s", log)
		}
		return nil
	})
	body, first, err := get(t, l, d.root, domain)
	must(t, err)
	if body != "hello" || len(first.DNSNames) != 1 || first.DNSNames[0] != domain {
		t.Errorf("%q with a certificate for %v", body, first.DNSNames)
	}

	t.Run("other names are asked of no authority", func(t *testing.T) {
		before := d.asked.Load()
		if _, _, err := get(t, l, d.root, "evil.example.org"); err == nil {
			t.Error("it has a certificate of another name")
		}
		if n := d.asked.Load(); n != before {
			t.Errorf("%d requests for another's name", n-before)
		}
	})
	t.Run("a restart asks for none anew", func(t *testing.T) {
		stop()
		before := d.asked.Load()
		again := listen(l.Addr().String())
		endpoint(t, again, d, dir, nil)
		_, second, err := get(t, again, d.root, domain)
		must(t, err)
		if !second.Equal(first) || d.asked.Load() != before {
			t.Errorf("%d more requests", d.asked.Load()-before)
		}
	})
}

func TestFederation_F17_AnAccountByACMEIsBoundToOneOfTheAuthoritys(t *testing.T) {
	account := &acme.ExternalAccountBinding{KID: "customer-7", Key: []byte("a key of thirty-two bytes or more")}
	const had = "an endpoint has a certificate by ACME"
	for name, test := range map[string]struct {
		shown *acme.ExternalAccountBinding
		want  string
	}{
		"its own":       {account, had},
		"none":          {nil, "externalAccountRequired"},
		"a wrong key":   {&acme.ExternalAccountBinding{KID: account.KID, Key: []byte("another key of as many bytes, or so")}, "no certificate can be had by ACME"},
		"an unknown ID": {&acme.ExternalAccountBinding{KID: "customer-8", Key: account.Key}, "no certificate can be had by ACME"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			must(t, err)
			d := newDirectory(t, l, account)
			d.names.Store(domain+".", "127.0.0.1")
			said, stop := endpoint(t, l, d, t.TempDir(), test.shown)
			defer stop()
			harness.Eventually(t, "what comes of it", func(context.Context) error {
				if log := said.String(); !strings.Contains(log, test.want) {
					return fmt.Errorf("the log is\n%s", log)
				}
				return nil
			})
			if log := said.String(); test.want != had && strings.Contains(log, had) {
				t.Errorf("it has a certificate all the same:\n%s", log)
			}
		})
	}
}

func TestThatNoCertificateCanBeHadIsSaidAndEndsNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	d := newDirectory(t, l, nil) // the name is not in the DNS
	said, stop := endpoint(t, l, d, t.TempDir(), nil)
	harness.Eventually(t, "a complaint", func(context.Context) error {
		if log := said.String(); !strings.Contains(log, "no certificate can be had by ACME; will try again") || !strings.Contains(log, domain) {
			return fmt.Errorf("the log is\n%s", log)
		}
		return nil
	})
	if _, _, err := get(t, l, d.root, domain); err == nil {
		t.Error("served with a certificate that nobody issued")
	}
	stop() // while it waits for its next try
}
