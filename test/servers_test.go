package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

// identity is one that "hallmark fetch x509 --watch" keeps in files.
type identity struct {
	dir string
	uid int
}

func (i identity) path(name string) string { return filepath.Join(i.dir, name) }

// newIdentity registers a user's processes, and keeps their SVID in files. The
// command runs whenever they were written.
func newIdentity(t *testing.T, d *harness.Domain, name string, uid int, onChange string) identity {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-"+name+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, uid); err != nil {
		t.Fatal(err)
	}
	// Ten seconds are as short as SVIDs are: each is renewed at half of it.
	d.Entry(t, "/"+name, uid, "--dns", name, "--x509-ttl", "10s")
	i := identity{dir: dir, uid: uid}
	harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket, "--write", dir, "--watch", "--on-change", strings.ReplaceAll(onChange, "DIR", dir)}, UID: uid}.Start(t)
	harness.Eventually(t, "the files of "+name, func(context.Context) error {
		_, err := os.Stat(i.path("svid.0.pem"))
		return err
	})
	return i
}

// authorities returns the key IDs in the file of the bundle.
func (i identity) authorities() map[string]bool {
	rest, err := os.ReadFile(i.path("bundle.0.pem"))
	ids := make(map[string]bool)
	for err == nil {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		var cert *x509.Certificate
		if cert, err = x509.ParseCertificate(block.Bytes); err == nil {
			ids[fmt.Sprintf("%x", cert.SubjectKeyId)] = true
		}
	}
	return ids
}

// underLoad calls again and again, while the authority of the domain is replaced
// and revoked twice, and fails the test if a call fails. each is a call; it
// returns what tells one SVID of the server from the next.
func underLoad(t *testing.T, d *harness.Domain, served identity, each func(ctx context.Context) (string, error)) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var calls, changes atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		pace := time.NewTicker(50 * time.Millisecond)
		defer pace.Stop()
		for last := ""; ctx.Err() == nil; <-pace.C {
			now, err := each(ctx)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				t.Errorf("call %d, after %d changes: %v", calls.Load()+1, changes.Load(), err)
				return
			}
			if calls.Add(1); now != last {
				changes.Add(1)
				last = now
			}
		}
	}()
	wait := func(what string, done func() bool) {
		t.Helper()
		harness.Eventually(t, what, func(context.Context) error {
			if !done() && !t.Failed() {
				return fmt.Errorf("after %d calls and %d SVIDs", calls.Load(), changes.Load())
			}
			return nil
		})
	}
	wait("the first calls", func() bool { return calls.Load() > 5 })
	for range 2 {
		old := only(t, authorities(t, d, "x509", "active")).ID
		d.Admin(t, "authority", "prepare", "x509")
		prepared := only(t, authorities(t, d, "x509", "prepared")).ID
		wait("the next authority in the server's file", func() bool { return served.authorities()[prepared] })
		// It reads the file when it is told to, which its SVID shows when it changes.
		at := changes.Load()
		wait("another SVID of the server", func() bool { return changes.Load() > at })
		d.Admin(t, "authority", "activate", "x509")
		d.Admin(t, "authority", "taint", "x509", old, "--yes")
		at = changes.Load()
		wait("an SVID of the new authority", func() bool { return changes.Load() > at })
		d.Admin(t, "authority", "revoke", "x509", old, "--yes")
		wait("the old authority gone from the server's file", func() bool { return !served.authorities()[old] })
	}
	at := changes.Load()
	wait("two more SVIDs", func() bool { return changes.Load() >= at+2 })
	stop()
	<-ended
	t.Logf("%d calls, %d SVIDs of the server", calls.Load(), changes.Load())
}

// webServer is a proxy that demands an SVID of clients.
type webServer struct {
	name, program string
	config        func(dir, address string) string
	args          []string // DIR is its directory
	reload        string
	says          string // to whom it has verified
}

var webServers = []webServer{{
	name: "nginx", program: "nginx",
	config: func(dir, address string) string {
		return fmt.Sprintf(`
daemon off;
pid DIR/pid;
error_log stderr;
events {}
http {
  access_log off;
  client_body_temp_path DIR/t1; proxy_temp_path DIR/t2; fastcgi_temp_path DIR/t3; uwsgi_temp_path DIR/t4; scgi_temp_path DIR/t5;
  server {
    listen %s ssl;
    ssl_certificate DIR/svid.0.pem;
    ssl_certificate_key DIR/svid.0.key;
    ssl_client_certificate DIR/bundle.0.pem;
    ssl_verify_client on;
    location / { return 200 "$ssl_client_verify $ssl_client_s_dn"; }
  }
}
`, address)
	},
	args: []string{"-p", "DIR", "-c", "DIR/config", "-e", "stderr"}, reload: "kill -HUP $(cat DIR/pid)", says: "SUCCESS CN=caller",
}, {
	name: "haproxy", program: "haproxy",
	config: func(dir, address string) string {
		return fmt.Sprintf(`
global
  stats socket DIR/stats mode 600 expose-fd listeners level admin
defaults
  mode http
  timeout client 10s
  timeout http-request 10s
frontend web
  bind %s ssl crt DIR/svid.0.pem ca-file DIR/bundle.0.pem verify required
  http-request return status 200 content-type text/plain lf-string "%%[ssl_c_verify] %%[ssl_c_s_dn(CN)]"
`, address)
	},
	args: []string{"-W", "-p", "DIR/pid", "-f", "DIR/config"}, reload: "ln -sf svid.0.key DIR/svid.0.pem.key; kill -USR2 $(cat DIR/pid)", says: "0 caller",
}}

// Servers that know nothing of SPIFFE serve with SVIDs from files and demand
// them of their clients; each SVID that follows, and each authority, is taken up
// while they serve.
func TestServersThatReadFilesServeWithSVIDsAndFollowTheirRotation(t *testing.T) {
	t.Parallel()
	for i, s := range webServers {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			if s.name != "nginx" {
				harness.Long(t)
			}
			harness.NeedCommand(t, s.program)
			d := harness.NewDomain(t, harness.Settings{})
			d.StartServer(t)
			d.StartAgent(t, d.Join(t))
			d.Entry(t, "/caller", os.Getuid(), "--dns", "caller", "--x509-ttl", "10s")
			served := newIdentity(t, d, "web", 61110+i, s.reload)
			address := harness.FreeAddress(t)
			config := strings.ReplaceAll(s.config(served.dir, address), "DIR", served.dir)
			if err := os.WriteFile(served.path("config"), []byte(config), 0o644); err != nil {
				t.Fatal(err)
			}
			args := strings.Split(strings.ReplaceAll(strings.Join(s.args, " "), "DIR", served.dir), " ")
			master := harness.Command{Path: s.program, Args: args, UID: served.uid}.Start(t)
			defer master.Stop(t) // killed, it would leave its workers

			source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+d.Socket)))
			if err != nil {
				t.Fatal(err)
			}
			defer source.Close()
			web := spiffeid.RequireFromString("spiffe://example.org/web")
			ask := func(ctx context.Context, config *tls.Config) (status int, said, presented string, err error) {
				client := http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}, Timeout: 10 * time.Second}
				req, err := http.NewRequestWithContext(ctx, "GET", "https://"+address+"/", nil)
				if err != nil {
					return 0, "", "", err
				}
				res, err := client.Do(req)
				if err != nil {
					return 0, "", "", err
				}
				defer res.Body.Close()
				body, err := io.ReadAll(res.Body)
				return res.StatusCode, string(body), res.TLS.PeerCertificates[0].SerialNumber.String(), err
			}
			call := func(ctx context.Context) (string, error) {
				status, said, serial, err := ask(ctx, tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(web)))
				if err == nil && (status != 200 || said != s.says) {
					err = fmt.Errorf("%d %q", status, said)
				}
				return serial, err
			}
			harness.Eventually(t, s.name+" serves", func(ctx context.Context) error { _, err := call(ctx); return err })
			stolen, err := source.GetX509SVID()
			if err != nil {
				t.Fatal(err)
			}
			refused := func(when string, config *tls.Config) {
				t.Helper()
				harness.Eventually(t, s.name+" refuses "+when, func(ctx context.Context) error {
					if status, said, _, err := ask(ctx, config); err == nil && status == 200 {
						return fmt.Errorf("%d %q", status, said)
					}
					return nil
				})
			}
			if _, said, _, err := ask(t.Context(), tlsconfig.MTLSClientConfig(stolen, source, tlsconfig.AuthorizeID(web))); err != nil || said != s.says {
				t.Fatalf("the SVID that is to be stolen: %q, %v", said, err)
			}
			refused("a client without an SVID", tlsconfig.TLSClientConfig(source, tlsconfig.AuthorizeID(web)))
			underLoad(t, d, served, call)
			refused("an SVID of an authority that was revoked", tlsconfig.MTLSClientConfig(longLived{stolen}, source, tlsconfig.AuthorizeID(web)))
		})
	}
}

// longLived is an SVID that is presented whatever its end.
type longLived struct{ svid *x509svid.SVID }

func (l longLived) GetX509SVID() (*x509svid.SVID, error) { return l.svid, nil }

// PostgreSQL serves with an SVID and knows its users by theirs; the name of a
// user is the first DNS name.
func TestPostgreSQLServesWithSVIDsAndFollowsTheirRotation(t *testing.T) {
	t.Parallel()
	harness.Long(t)
	harness.NeedCommand(t, "psql")
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bins) == 0 {
		harness.Skip(t, "postgresql is not installed; test/install installs it")
	}
	bin := bins[len(bins)-1]
	account, err := user.Lookup("postgres") // initdb wants a user with a name
	if err != nil {
		harness.Skip(t, "there is no user postgres; test/install installs postgresql")
	}
	uid, err := strconv.Atoi(account.Uid)
	if err != nil {
		t.Fatal(err)
	}
	d := harness.NewDomain(t, harness.Settings{})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	served := newIdentity(t, d, "db.example", uid, "kill -HUP $(head -1 DIR/data/postmaster.pid)")
	caller := newIdentity(t, d, "shop", 61120, "true")
	stranger := newIdentity(t, d, "stranger", 61121, "true")

	address := harness.FreeAddress(t)
	port := address[strings.LastIndexByte(address, ':')+1:]
	data := served.path("data")
	harness.Command{Path: bin + "/initdb", Args: []string{"-D", data, "-A", "trust", "--no-sync", "-U", "shop"}, UID: uid}.Run(t)
	for name, text := range map[string]string{
		"pg_hba.conf": "hostssl all all 127.0.0.1/32 cert\n",
		"postgresql.auto.conf": strings.NewReplacer("PORT", port, "DIR", served.dir).Replace(
			"port = PORT\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = ''\nfsync = off\nssl = on\n" +
				"ssl_cert_file = 'DIR/svid.0.pem'\nssl_key_file = 'DIR/svid.0.key'\nssl_ca_file = 'DIR/bundle.0.pem'\n"),
	} {
		if err := os.WriteFile(filepath.Join(data, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	db := harness.Command{Path: bin + "/postgres", Args: []string{"-D", data}, UID: uid}.Start(t)
	db.WaitOutput(t, "database system is ready to accept connections")

	ask := func(as identity, query string) (string, error) {
		connection := fmt.Sprintf("host=db.example hostaddr=127.0.0.1 port=%s user=shop dbname=postgres sslmode=verify-full sslcert=%s sslkey=%s sslrootcert=%s",
			port, as.path("svid.0.pem"), as.path("svid.0.key"), as.path("bundle.0.pem"))
		for {
			before, err := os.ReadFile(as.path("svid.0.pem"))
			if err != nil {
				return "", err
			}
			out, said, code := harness.Command{Path: "psql", Args: []string{"-XAtw", "-c", query, connection}, UID: as.uid}.Try(t)
			if code == 0 {
				return strings.TrimSpace(out), nil
			}
			// psql reads certificate and key one after the other: they may be of two SVIDs.
			if after, err := os.ReadFile(as.path("svid.0.pem")); err == nil && bytes.Equal(before, after) {
				return "", fmt.Errorf("exit status %d: %s", code, said)
			}
		}
	}
	if who, err := ask(caller, "select current_user || ' ' || client_dn from pg_stat_ssl where pid = pg_backend_pid()"); err != nil || who != "shop /CN=shop" {
		t.Fatalf("it knows its user as %q, %v", who, err)
	}
	if _, err := ask(stranger, "select 1"); err == nil || !strings.Contains(err.Error(), "certificate authentication failed") {
		t.Errorf("somebody else's SVID: %v", err)
	}
	// A session outlives all SVIDs with which it began.
	session := harness.Command{Path: "psql", UID: caller.uid, Args: []string{"-XAtw", "-c", "select pg_sleep(1000)", fmt.Sprintf(
		"host=db.example hostaddr=127.0.0.1 port=%s user=shop dbname=postgres sslmode=verify-full sslcert=%s sslkey=%s sslrootcert=%s",
		port, caller.path("svid.0.pem"), caller.path("svid.0.key"), caller.path("bundle.0.pem"))}}.Start(t)

	underLoad(t, d, served, func(ctx context.Context) (string, error) {
		if _, err := ask(caller, "select 1"); err != nil {
			return "", err
		}
		return presentedBy(ctx, address)
	})
	select {
	case <-session.Done():
		t.Errorf("the session has ended: %s", session.Stderr())
	default:
	}
}

// presentedBy returns the serial number of what PostgreSQL presents to whoever
// asks for TLS.
func presentedBy(ctx context.Context, address string) (string, error) {
	raw, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer raw.Close()
	if _, err := raw.Write([]byte{0, 0, 0, 8, 4, 0xd2, 0x16, 0x2f}); err != nil { // SSLRequest
		return "", err
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(raw, answer); err != nil || answer[0] != 'S' {
		return "", fmt.Errorf("it answers %q to the request for TLS, %v", answer, err)
	}
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true})
	if err := conn.HandshakeContext(ctx); err != nil {
		return "", err
	}
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.String(), nil
}
