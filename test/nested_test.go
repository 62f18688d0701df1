package test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

// nestedLifetimes let every authority be replaced several times in a test.
const nestedLifetimes = `x509: {authority_lifetime: 50s, svid_lifetime: 10s, agent_lifetime: 20s}
jwt: {authority_lifetime: 50s, svid_lifetime: 10s}
`

// level is a server of a nested trust domain with an agent of its own, and a
// workload on that.
type level struct {
	*harness.Domain
	name string
	x509 *workloadapi.X509Source
	jwt  *workloadapi.JWTSource
}

// layLevel lays out a level below another (nil: it is the root).
func layLevel(t *testing.T, name string, above *level) *level {
	t.Helper()
	conf := nestedLifetimes
	if above != nil {
		above.Entry(t, "/server/"+name, harness.ServerUID, "--downstream")
		conf += fmt.Sprintf("upstream:\n  spire:\n    server: %s\n    workload_socket: %s\n", above.Address, above.Socket)
	}
	return &level{Domain: harness.NewDomain(t, harness.Settings{Server: conf}), name: name}
}

// start starts its server, its agent and its workload.
func (l *level) start(t *testing.T) {
	t.Helper()
	l.StartServer(t)
	l.StartAgent(t, l.Join(t))
	l.Entry(t, "/workload/"+l.name, os.Getuid())
	at := workloadapi.WithClientOptions(workloadapi.WithAddr("unix://" + l.Socket))
	var err error
	if l.x509, err = workloadapi.NewX509Source(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.x509.Close() })
	if l.jwt, err = workloadapi.NewJWTSource(t.Context(), at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.jwt.Close() })
}

// calls connects to another level's workload, with mTLS both ways.
func (l *level) calls(other *level) error {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(other.x509, other.x509, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, "/workload/"+l.name))))
	if err != nil {
		return err
	}
	defer listener.Close()
	served := make(chan error, 1)
	go func() {
		c, err := listener.Accept()
		if err == nil {
			err = c.(*tls.Conn).Handshake()
			c.Close()
		}
		served <- err
	}()
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 20 * time.Second}, "tcp", listener.Addr().String(),
		tlsconfig.MTLSClientConfig(l.x509, l.x509, tlsconfig.AuthorizeID(spiffeid.RequireFromPath(td, "/workload/"+other.name))))
	if err != nil {
		return fmt.Errorf("%s calls %s: %w", l.name, other.name, err)
	}
	defer c.Close()
	if err := <-served; err != nil {
		return fmt.Errorf("%s serves %s: %w", other.name, l.name, err)
	}
	return nil
}

// tells sends another level's workload a JWT-SVID.
func (l *level) tells(ctx context.Context, other *level, n int) error {
	audience := fmt.Sprintf("%s-%d", other.name, n)
	svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience}, workloadapi.WithAddr("unix://"+l.Socket))
	if err != nil {
		return fmt.Errorf("fetch a JWT-SVID at %s: %w", l.name, err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), other.jwt, []string{audience}); err != nil {
		return fmt.Errorf("%s validates a JWT-SVID of %s: %w", other.name, l.name, err)
	}
	return nil
}

// authorityShow is what "hallmark authority show -o json" prints.
type authorityShow struct {
	Upstream *struct {
		Kind     string
		Requests []struct{ What, Failure string }
	}
	Authorities []struct {
		ID    string
		Chain []struct {
			KeyID   string `json:"key_id"`
			Root    bool
			Tainted bool
		}
	}
}

func (l *level) show(t *testing.T) (shown authorityShow) {
	t.Helper()
	if err := json.Unmarshal([]byte(l.Admin(t, "authority", "show", "-o", "json")), &shown); err != nil {
		t.Fatal(err)
	}
	return shown
}

// rootKey is the key ID of the root that the authority which signs leads to.
func (l *level) rootKey(t *testing.T) string {
	t.Helper()
	shown := l.show(t)
	if len(shown.Authorities) != 1 {
		return ""
	}
	chain := shown.Authorities[0].Chain
	if last := chain[len(chain)-1]; last.Root {
		return last.KeyID
	}
	return ""
}

// Three servers of one trust domain, each below the other and with an agent of
// its own. Workloads of all levels know each other while the authorities of all
// are replaced, by schedule, by command, and because the root is tainted and
// revoked.
func TestNested_X12_ThreeLevelsOfServersAreOneTrustDomain(t *testing.T) {
	t.Parallel()
	harness.Long(t)
	root := layLevel(t, "root", nil)
	root.start(t)
	region := layLevel(t, "region", root)
	region.start(t)
	cluster := layLevel(t, "cluster", region)
	cluster.start(t)
	levels := []*level{root, region, cluster}
	for i, l := range levels {
		if chain := l.show(t).Authorities[0].Chain; len(chain) != i+1 || !chain[i].Root {
			t.Errorf("the chain of %s is %+v", l.name, chain)
		}
	}
	if shown := cluster.Admin(t, "authority", "show"); !strings.Contains(shown, "Upstream  spire, "+region.Address) || !strings.Contains(shown, "root") {
		t.Errorf("it shows\n%s", shown)
	}
	// All know each other's JWT authorities some moments after they have started.
	harness.Eventually(t, "JWT-SVIDs of each level verify at each", func(ctx context.Context) error {
		for _, from := range levels {
			for _, to := range levels {
				if err := from.tells(ctx, to, -1); err != nil {
					return err
				}
			}
		}
		return nil
	})

	ctx, stop := context.WithCancel(t.Context())
	var working sync.WaitGroup
	var handshakes, tokens atomic.Int64
	for _, from := range levels {
		working.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				for _, to := range levels {
					if err := from.calls(to); err != nil && ctx.Err() == nil {
						t.Error(err)
					}
					handshakes.Add(1)
					if err := from.tells(ctx, to, n); err != nil && ctx.Err() == nil {
						t.Error(err)
					}
					tokens.Add(1)
				}
				select {
				case <-time.After(200 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	first := root.rootKey(t)
	for _, l := range levels {
		for _, kind := range []string{"x509", "jwt"} {
			l.Admin(t, "authority", "rotate", kind)
		}
	}
	began := make(map[string]string)
	for _, l := range levels {
		began[l.name] = l.show(t).Authorities[0].ID
	}
	// The root may have leaked: what leads to it is replaced at all levels, before
	// it is trusted no more at any.
	harness.Eventually(t, "all lead to the new root", func(context.Context) error {
		for _, l := range levels[1:] {
			if key := l.rootKey(t); key == first || key == "" {
				l.Admin(t, "authority", "rotate", "x509")
				return fmt.Errorf("%s leads to %q", l.name, key)
			}
		}
		return nil
	})
	root.Admin(t, "authority", "taint", "x509", first, "--yes")
	harness.Eventually(t, "the root is marked at all levels", func(context.Context) error {
		for _, l := range levels {
			if !strings.Contains(strings.ReplaceAll(l.Admin(t, "bundle", "show", "-o", "json"), " ", ""), `"tainted":true`) {
				return fmt.Errorf("not at %s", l.name)
			}
		}
		return nil
	})
	// By schedule, too: all that signed at first is gone by then.
	harness.Eventually(t, "every authority is replaced by schedule", func(context.Context) error {
		for _, l := range levels {
			for _, a := range authorities(t, l.Domain, "x509", "active") {
				if a.ID == began[l.name] {
					return errors.New(l.name)
				}
			}
		}
		return nil
	})
	root.Admin(t, "authority", "revoke", "x509", first, "--yes")
	harness.Eventually(t, "no level trusts the root that was revoked", func(context.Context) error {
		for _, l := range levels {
			if strings.Contains(l.x509KeyIDs(t), first) {
				return fmt.Errorf("%s still does", l.name)
			}
		}
		return nil
	})
	n := handshakes.Load()
	harness.Eventually(t, "they go on", func(context.Context) error {
		if handshakes.Load() < n+30 {
			return errors.New("too few handshakes")
		}
		return nil
	})
	stop()
	working.Wait()
	t.Logf("%d handshakes and %d JWT-SVIDs among three levels", handshakes.Load(), tokens.Load())
}

// x509KeyIDs are those of the bundle that a level's workload has.
func (l *level) x509KeyIDs(t *testing.T) string {
	t.Helper()
	b, err := l.x509.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("example.org"))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, c := range b.X509Authorities() {
		ids = append(ids, fmt.Sprintf("%x", c.SubjectKeyId))
	}
	return strings.Join(ids, " ")
}

// The server above may be away when this one starts, and later: it says so,
// waits, and comes back by itself.
func TestNested_AServerWaitsForTheOneAbove(t *testing.T) {
	t.Parallel()
	harness.Long(t)
	root := layLevel(t, "root", nil)
	root.start(t)
	below := layLevel(t, "below", root)
	root.Server.Kill()
	server := harness.Command{Args: []string{"server", "run", "-c", below.Dir + "/server.yaml"}, UID: harness.ServerUID}.Start(t)
	harness.Eventually(t, "it says what it waits for", func(context.Context) error {
		out, complaint, code := (harness.Command{Args: []string{"authority", "show", "--admin-socket", below.AdminSocket}, UID: harness.ServerUID}).Try(t)
		if code != 0 || !strings.Contains(out, "No X.509 authority is active") || !strings.Contains(out, "last error") || !strings.Contains(out, "next try") {
			return errors.New(out + complaint)
		}
		return nil
	})
	root.StartServer(t)
	server.WaitReady(t, "server", "health", "--admin-socket", below.AdminSocket)
	below.Server = server
	shown := below.show(t)
	if len(shown.Authorities) != 1 || len(shown.Authorities[0].Chain) != 2 || shown.Upstream.Kind != "spire" {
		t.Fatalf("after the wait: %+v", shown)
	}
	// It is told that it may no more.
	root.Admin(t, "entry", "delete", "--yes", entryID(t, root.Domain, "/server/below"))
	harness.Eventually(t, "it says why it is refused", func(context.Context) error {
		for _, q := range below.show(t).Upstream.Requests {
			if q.Failure != "" {
				return nil
			}
		}
		return errors.New("nothing has failed")
	})
	if _, complaint, code := (harness.Command{Args: []string{"authority", "prepare", "x509", "--admin-socket", below.AdminSocket}, UID: harness.ServerUID}).Try(t); code == 0 {
		t.Errorf("it prepares an authority all the same: %s", complaint)
	}
}

// entryID is that of the entry with a path.
func entryID(t *testing.T, d *harness.Domain, path string) string {
	t.Helper()
	var list []struct{ ID string }
	if err := json.Unmarshal([]byte(d.Admin(t, "entry", "list", "--spiffe-id", path, "-o", "json")), &list); err != nil || len(list) != 1 {
		t.Fatalf("%v, %d entries", err, len(list))
	}
	return list[0].ID
}
