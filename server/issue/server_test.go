package issue_test

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
)

func (h *house) serverTLS(tb testing.TB) *tls.Certificate {
	tb.Helper()
	cert, err := h.ServerTLS()
	if err != nil {
		tb.Fatal(err)
	}
	return cert
}

func TestTheServersOwnSVIDIsHeldUntilHalfOfItsLife(t *testing.T) {
	h := newHouse(t)
	first := h.serverTLS(t)
	if id, err := x509svid.IDFromCert(first.Leaf); err != nil || id.String() != "spiffe://example.org/spire/server" {
		t.Fatalf("got ID %s, error %v", id, err)
	}
	if !bytes.Equal(first.Certificate[0], first.Leaf.Raw) {
		t.Error("the leaf is another certificate than the chain's")
	}
	h.clock.add(29 * time.Minute)
	if h.serverTLS(t) != first {
		t.Error("renewed before half of its life")
	}
	h.clock.add(2 * time.Minute)
	second := h.serverTLS(t)
	if second == first || !second.Leaf.NotAfter.After(first.Leaf.NotAfter) {
		t.Error("not renewed after half of its life")
	}
	if bytes.Equal(first.Leaf.RawSubjectPublicKeyInfo, second.Leaf.RawSubjectPublicKeyInfo) {
		t.Error("renewed with the same key")
	}
}

func TestTheServersOwnSVIDFollowsTheActiveAuthority(t *testing.T) {
	h := newHouse(t)
	first := h.serverTLS(t)
	next := newX509Authority(t, newKey(t, elliptic.P256()), nil)
	h.keys.set(next)
	second := h.serverTLS(t)
	if second == first || second.Leaf.CheckSignatureFrom(next.Certificate) != nil {
		t.Error("not signed by the authority that is active now")
	}
	if h.serverTLS(t) != second {
		t.Error("renewed although nothing has changed")
	}
}

func TestTheServersOwnSVIDIsServedWhileNoOtherCanBeHad(t *testing.T) {
	h := newHouse(t)
	first := h.serverTLS(t)
	h.keys.set(nil)
	h.clock.add(45 * time.Minute)
	if h.serverTLS(t) != first {
		t.Error("another certificate without an authority")
	}
	h.clock.add(15 * time.Minute)
	if cert, err := h.ServerTLS(); err == nil {
		t.Errorf("an expired certificate (%s) is served", cert.Leaf.NotAfter)
	}
}

func TestTheServersOwnSVIDIsIssuedOnceForConcurrentHandshakes(t *testing.T) {
	h := newHouse(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := make(map[*tls.Certificate]bool)
	for range 16 {
		wg.Go(func() {
			cert, err := h.ServerTLS()
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[cert] = true
		})
	}
	wg.Wait()
	if len(seen) != 1 {
		t.Errorf("%d certificates were issued, want 1", len(seen))
	}
}

func TestTheServersOwnSVIDWorksInAHandshake(t *testing.T) {
	h := newHouse(t, func(o *issue.Options) { o.Now = time.Now })
	h.keys.set(newX509Authority(t, newKey(t, elliptic.P256()), func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	}))
	bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{h.root()})
	client := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, entry.ServerPath)))
	server := &tls.Config{
		MinVersion:     tls.VersionTLS13,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return h.ServerTLS() },
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	served := make(chan error, 1)
	go func() {
		conn := tls.Server(a, server)
		_, err := io.WriteString(conn, "hello")
		served <- err
	}()
	conn := tls.Client(b, client)
	got := make([]byte, 5)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello" {
		t.Errorf("got %q, error %v", got, err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestEachCredentialIsRecordedOnce(t *testing.T) {
	var out bytes.Buffer
	h := newHouse(t, func(o *issue.Options) { o.Log = slog.New(slog.NewJSONHandler(&out, nil)) })
	e := workload(t, func(e *entry.Entry) { e.JWTIncludeJTI = true })
	ctx := context.Background()
	csr := newCSR(t, &x509.CertificateRequest{URIs: []*url.URL{uri(t, "spiffe://example.org/db")}})
	witKey := newWITKey(t, newKey(t, elliptic.P256()), "ES256")
	web, agent := spiffeid.RequireFromPath(td, "/web"), spiffeid.RequireFromPath(td, "/spire/agent/x/1")

	for name, c := range map[string]struct {
		issue func() (serial, token string, err error)
		want  map[string]string
	}{
		"workload X.509": {func() (string, string, error) {
			svid, err := h.WorkloadX509(ctx, e, csr)
			return svid.SerialNumber, "", err
		}, map[string]string{"kind": "x509", "for": "workload", "id": "spiffe://example.org/web", "entry": "entry-1", "authority": "test"}},
		"node": {func() (string, string, error) {
			svid, err := h.NodeX509(ctx, agent, csr)
			return svid.SerialNumber, "", err
		}, map[string]string{"kind": "x509", "for": "node", "id": "spiffe://example.org/spire/agent/x/1"}},
		"mint": {func() (string, string, error) {
			svid, err := h.MintX509(ctx, csr, 0)
			return svid.SerialNumber, "", err
		}, map[string]string{"kind": "x509", "for": "mint", "id": "spiffe://example.org/db"}},
		"downstream": {func() (string, string, error) {
			svid, err := h.DownstreamCA(ctx, csr, 0)
			return svid.SerialNumber, "", err
		}, map[string]string{"kind": "x509", "for": "downstream", "id": "spiffe://example.org"}},
		"workload JWT": {func() (string, string, error) {
			svid, err := h.WorkloadJWT(ctx, e, []string{"a"})
			return "", svid.Token, err
		}, map[string]string{"kind": "jwt", "for": "workload", "id": "spiffe://example.org/web", "entry": "entry-1", "kid": "kid-1"}},
		"mint JWT": {func() (string, string, error) {
			svid, err := h.MintJWT(ctx, web, []string{"a"}, 0)
			return "", svid.Token, err
		}, map[string]string{"kind": "jwt", "for": "mint", "id": "spiffe://example.org/web", "kid": "kid-1"}},
		"workload WIT": {func() (string, string, error) {
			svid, err := h.WorkloadWIT(ctx, e, witKey)
			return "", svid.Token, err
		}, map[string]string{"kind": "wit", "for": "workload", "id": "spiffe://example.org/web", "entry": "entry-1", "kid": "kid-1"}},
		"mint WIT": {func() (string, string, error) {
			svid, err := h.MintWIT(ctx, web, witKey, 0)
			return "", svid.Token, err
		}, map[string]string{"kind": "wit", "for": "mint", "id": "spiffe://example.org/web", "kid": "kid-1"}},
	} {
		out.Reset()
		serial, token, err := c.issue()
		if err != nil {
			t.Fatal(err)
		}
		if strings.Count(out.String(), "\n") != 1 {
			t.Errorf("%s: the record is %q, want one line", name, out.String())
			continue
		}
		if token != "" && strings.Contains(out.String(), token[strings.LastIndex(token, "."):]) {
			t.Errorf("%s: the record holds the token", name)
		}
		var line map[string]any
		if err := json.Unmarshal(out.Bytes(), &line); err != nil {
			t.Fatal(err)
		}
		if serial != "" {
			c.want["serial"] = serial
		}
		c.want["msg"], c.want["level"] = "issued", "INFO"
		for key, want := range c.want {
			if line[key] != want {
				t.Errorf("%s: %s is %v, want %v", name, key, line[key], want)
			}
		}
		if line["expires"] == nil {
			t.Errorf("%s: the record has no end", name)
		}
		if token != "" {
			if _, claims := decode(t, token); line["jti"] != claims["jti"] {
				t.Errorf("%s: jti is %v, want %v", name, line["jti"], claims["jti"])
			}
		}
	}
	out.Reset()
	if _, err := h.WorkloadX509(ctx, e, nil); err == nil || out.Len() != 0 {
		t.Errorf("a refused request left the record %q", out.String())
	}
}

func TestDefaultTTLs(t *testing.T) {
	if x, j := newHouse(t).DefaultTTLs(); x != time.Hour || j != 5*time.Minute {
		t.Errorf("defaults are %s and %s", x, j)
	}
	h := newHouse(t, func(o *issue.Options) { o.X509TTL, o.JWTTTL = time.Minute, time.Second })
	if x, j := h.DefaultTTLs(); x != time.Minute || j != time.Second {
		t.Errorf("configured ones are %s and %s", x, j)
	}
}

func TestConcurrentIssuanceAcrossAChangeOfAuthority(t *testing.T) {
	h := newHouse(t)
	roots := map[string]*x509.Certificate{}
	var next []*authority.X509
	for range 4 {
		a := newX509Authority(t, newKey(t, elliptic.P256()), nil)
		roots[string(a.Certificate.SubjectKeyId)] = a.Certificate
		next = append(next, a)
	}
	roots[string(h.root().SubjectKeyId)] = h.root()
	csr, e := newCSR(t, nil), workload(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				svid, err := h.WorkloadX509(context.Background(), e, csr)
				if err != nil {
					t.Error(err)
					return
				}
				cert, err := x509.ParseCertificate(svid.Chain[0])
				if err != nil {
					t.Error(err)
					return
				}
				if root := roots[string(cert.AuthorityKeyId)]; root == nil || cert.CheckSignatureFrom(root) != nil {
					t.Error("a certificate does not verify with the authority that it names")
				}
			}
		})
	}
	for _, a := range next {
		h.keys.set(a)
		h.serverTLS(t)
	}
	wg.Wait()
}
