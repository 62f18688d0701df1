package test

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/pkg/revocation"
	"github.com/hallmark-id/hallmark/test/harness"
)

// guarded is a service that refuses revoked callers, as whoever runs the test.
type guarded struct {
	svids    *workloadapi.X509Source
	crls     *revocation.Source
	listener net.Listener
	serving  sync.WaitGroup
}

func startGuarded(t *testing.T, socket string) *guarded {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	address := "unix://" + socket
	g := &guarded{}
	var err error
	if g.svids, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(address))); err != nil {
		t.Fatal(err)
	}
	if g.crls, err = revocation.NewSource(ctx, revocation.Options{Address: address}); err != nil {
		t.Fatal(err)
	}
	if g.listener, err = g.crls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(g.svids, g.svids, tlsconfig.AuthorizeAny())); err != nil {
		t.Fatal(err)
	}
	g.serving.Go(func() { // an echo
		for {
			conn, err := g.listener.Accept()
			if err != nil {
				return
			}
			g.serving.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() {
		g.listener.Close()
		g.serving.Wait()
		g.crls.Close()
		g.svids.Close()
	})
	return g
}

// call connects with an X509-SVID and has one byte echoed. The connection is
// open if there is no error.
func (g *guarded) call(svid x509svid.Source) (net.Conn, error) {
	conn, err := tls.Dial("tcp", g.listener.Addr().String(), tlsconfig.MTLSClientConfig(svid, g.svids, tlsconfig.AuthorizeAny()))
	if err != nil {
		return nil, err
	}
	if err := echoes(conn); err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

func echoes(conn net.Conn) error {
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := conn.Write([]byte{1}); err != nil {
		return err
	}
	_, err := io.ReadFull(conn, make([]byte, 1))
	return err
}

// refused waits until a call is refused because of a revocation.
func (g *guarded) refused(t *testing.T, what string, svid x509svid.Source) {
	t.Helper()
	harness.Eventually(t, what+" is refused", func(context.Context) error {
		conn, err := g.call(svid)
		if err == nil {
			conn.Close()
			return errors.New("it is let in")
		}
		return nil
	})
}

func (g *guarded) accepted(t *testing.T, what string, svid x509svid.Source) {
	t.Helper()
	conn, err := g.call(svid)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	conn.Close()
}

// leaked is an X509-SVID that somebody else has, too.
type leaked struct{ *x509svid.SVID }

func (l leaked) GetX509SVID() (*x509svid.SVID, error) { return l.SVID, nil }

func leak(t *testing.T, source x509svid.Source) leaked {
	t.Helper()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	return leaked{svid}
}

func (l leaked) serial() string { return l.Certificates[0].SerialNumber.String() }

// revokedResult is what `hallmark svid revoke -o json` prints.
type revokedResult struct {
	Covered     bool
	Agents      int
	Authorities []struct {
		AuthorityID string `json:"authority_id"`
		Server      string
		Covered     bool
		Revoked     int
	}
}

func revoke(t *testing.T, admin func(args ...string) string, args ...string) (r revokedResult) {
	t.Helper()
	if err := json.Unmarshal([]byte(admin(append([]string{"svid", "revoke", "--yes", "-o", "json"}, args...)...)), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// TestRevocation_RF18_A19_ARevokedPeerIsRefused revokes by a certificate, an identity and an
// agent, while two workloads speak mTLS, and asks verifiers of other makers.
func TestRevocation_RF18_A19_ARevokedPeerIsRefused(t *testing.T) {
	t.Parallel()
	harness.NeedCommand(t, "openssl")
	endpoint := harness.FreeAddress(t)
	d := harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf("crl_endpoint: {listen: %s, url: http://%[1]s}\n", endpoint)})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/tester", os.Getuid())
	admin := func(args ...string) string { return d.Admin(t, args...) }
	g := startGuarded(t, d.Socket)
	saved := t.TempDir()
	if err := os.Chmod(saved, 0o755); err != nil { // the command runs as the server's user
		t.Fatal(err)
	}
	harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket, "--write", saved}}.Run(t)
	first := leak(t, g.svids)
	open, err := g.call(first)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()

	// The certificate in a file.
	pem := filepath.Join(t.TempDir(), "leaked.pem")
	copyCertificate(t, filepath.Join(saved, "svid.0.pem"), pem)
	r := revoke(t, admin, pem, "--reason", "keyCompromise")
	if !r.Covered || r.Agents != 1 || len(r.Authorities) != 1 || r.Authorities[0].Revoked != 1 {
		t.Fatalf("revoke says %+v", r)
	}
	g.refused(t, "a revoked certificate", first)
	harness.Eventually(t, "an open connection of a revoked peer is closed", func(context.Context) error {
		if echoes(open) == nil {
			return errors.New("it is open")
		}
		return nil
	})
	harness.Eventually(t, "the workload has another SVID", func(context.Context) error {
		if leak(t, g.svids).serial() == first.serial() {
			return errors.New("it has the same")
		}
		return nil
	})
	second := leak(t, g.svids)
	g.accepted(t, "the SVID that took its place", second)

	// The endpoint, and a verifier of another maker.
	id := hex.EncodeToString(first.Certificates[0].AuthorityKeyId)
	url := "http://" + endpoint + "/crl/" + id + ".crl"
	if got := first.Certificates[0].CRLDistributionPoints; len(got) != 1 || got[0] != url {
		t.Errorf("the SVID names the CRL's URLs %v, want %s", got, url)
	}
	openssl := func() (string, error) {
		crl := fetchCRL(t, url)
		out, err := exec.Command("openssl", "verify", "-x509_strict", "-crl_check", "-CAfile", filepath.Join(saved, "bundle.0.pem"), "-CRLfile", crl, filepath.Join(saved, "svid.0.pem")).CombinedOutput()
		return string(out), err
	}
	if out, err := openssl(); err == nil || !strings.Contains(out, "certificate revoked") {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
	harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket, "--write", saved}}.Run(t)
	if out, err := openssl(); err != nil {
		t.Errorf("openssl verify of the new one: %v\n%s", err, out)
	}

	// An identity, by its name.
	r = revoke(t, admin, "--spiffe-id", "/tester")
	if !r.Covered || r.Authorities[0].Revoked != 2 {
		t.Fatalf("revoke of an identity says %+v", r)
	}
	g.refused(t, "an SVID of the identity", second)
	harness.Eventually(t, "the identity is replaced", func(context.Context) error {
		if leak(t, g.svids).serial() == second.serial() {
			return errors.New("it is the same")
		}
		return nil
	})
	third := leak(t, g.svids)
	g.accepted(t, "one that was issued after", third)

	// It survives a restart of the server, which knows what it issued before.
	d.Server.Kill()
	d.StartServer(t)
	harness.Eventually(t, "the agent is back", func(context.Context) error {
		if strings.Contains(d.Admin(t, "node", "list"), "connected") {
			return nil
		}
		return errors.New("it is not")
	})
	g.refused(t, "after a restart the first", first)
	g.accepted(t, "after a restart the third", third)
	var shown struct{ State string }
	if err := json.Unmarshal([]byte(d.Admin(t, "svid", "show", third.serial(), "-o", "json")), &shown); err != nil || shown.State != "valid" {
		t.Errorf("the server says of the third: %+v, %v", shown, err)
	}

	// The node: what went through it is revoked, and its workloads hear of it,
	// although it may not come back.
	var nodes []struct{ ID string }
	if err := json.Unmarshal([]byte(d.Admin(t, "node", "list", "-o", "json")), &nodes); err != nil || len(nodes) != 1 {
		t.Fatal(err, nodes)
	}
	r = revoke(t, admin, "--node", nodes[0].ID)
	if !r.Covered {
		t.Fatalf("revoke of a node says %+v", r)
	}
	g.refused(t, "what went through the node", third)
	harness.Eventually(t, "the agent's SVID is refused", func(context.Context) error {
		if strings.Contains(d.Admin(t, "node", "list"), "connected") {
			return errors.New("it is connected")
		}
		return nil
	})
	if out := d.Admin(t, "svid", "revocations"); !strings.Contains(out, "certificate") || !strings.Contains(out, "identity") || !strings.Contains(out, "node") || strings.Contains(out, "lacks") {
		t.Errorf("the revocations are\n%s", out)
	}
}

// copyCertificate copies a certificate where everybody can read it.
func copyCertificate(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, text, 0o644); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(to); dir != "/" && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// fetchCRL fetches a CRL and returns a file of it, in PEM.
func fetchCRL(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	der, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/pkix-crl" {
		t.Fatalf("GET %s: %s, %v, %v", url, resp.Status, resp.Header, err)
	}
	name := filepath.Join(t.TempDir(), "crl")
	if err := os.WriteFile(name+".der", der, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("openssl", "crl", "-inform", "DER", "-in", name+".der", "-out", name+".pem").CombinedOutput()
	if err != nil {
		t.Fatalf("openssl crl: %v\n%s", err, out)
	}
	return name + ".pem"
}

// TestAnyServerRevokesWhatAnotherIssued revokes, at each of three servers, an
// identity that one of them has issued.
func TestAnyServerRevokesWhatAnotherIssued(t *testing.T) {
	t.Parallel()
	s := newServers(t)
	s.form(t, "s1", "s2", "s3")
	token := strings.TrimSpace(s.command("s1", "token", "generate", "--agent-id", "/node").Run(t))
	agent := harness.Command{Args: []string{"agent", "run", "--join", token, "--data-dir", s.path("agent"),
		"--socket", s.path("workload.sock"), "--admin-socket", s.path("agent.sock")}}.Start(t)
	agent.WaitReady(t, "agent", "health", "--admin-socket", s.path("agent.sock"))
	s.command("s1", "entry", "create", "--spiffe-id", "/tester", "--parent-id", "/node", "--selector", fmt.Sprintf("unix:uid:%d", os.Getuid())).Run(t)
	g := startGuarded(t, s.path("workload.sock"))
	for _, at := range []string{"s1", "s2", "s3"} {
		old := leak(t, g.svids)
		g.accepted(t, "before it is revoked", old)
		r := revoke(t, func(args ...string) string { return s.command(at, args...).Run(t) }, "--spiffe-id", "/tester")
		if !r.Covered || len(r.Authorities) != 3 {
			t.Fatalf("%s says %+v", at, r)
		}
		g.refused(t, "what was revoked at "+at, old)
		harness.Eventually(t, "the workload has another", func(context.Context) error {
			if leak(t, g.svids).serial() == old.serial() {
				return errors.New("it has the same")
			}
			return nil
		})
	}
	// By serial number: only the one that issued it knows its authority.
	old := leak(t, g.svids)
	refusals := 0
	for _, at := range []string{"s1", "s2", "s3"} {
		_, stderr, code := s.command(at, "svid", "show", old.serial()).Try(t)
		if code != 0 {
			refusals++
			if !strings.Contains(stderr, "has issued no SVID with serial number") {
				t.Error(stderr)
			}
		}
	}
	if refusals != 2 {
		t.Errorf("%d servers do not know the serial number, want 2", refusals)
	}
	r := revoke(t, func(args ...string) string { return s.command("s3", args...).Run(t) },
		"--serial", old.serial(), "--authority", hex.EncodeToString(old.Certificates[0].AuthorityKeyId))
	if !r.Covered {
		t.Errorf("s3 says %+v", r)
	}
	g.refused(t, "a serial number", old)
}
