package test

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

// authority is one as `hallmark authority list -o json` shows it.
type authority struct {
	ID, Kind, State string
	Tainted         bool
	Use             struct{ Agents int }
}

// authorities returns those of a kind in a state.
func authorities(t testing.TB, d *harness.Domain, kind, state string) (out []authority) {
	t.Helper()
	var all []authority
	if err := json.Unmarshal([]byte(d.Admin(t, "authority", "list", "-o", "json")), &all); err != nil {
		t.Fatal(err)
	}
	for _, a := range all {
		if a.Kind == kind && a.State == state {
			out = append(out, a)
		}
	}
	return out
}

func only(t testing.TB, all []authority) authority {
	t.Helper()
	if len(all) != 1 {
		t.Fatalf("%d authorities, want 1: %+v", len(all), all)
	}
	return all[0]
}

// presented returns the key ID of the authority that signed what a service
// presents to whoever connects.
func presented(t testing.TB, address string) (id string) {
	t.Helper()
	conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
	if conn == nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return hex.EncodeToString(conn.ConnectionState().PeerCertificates[0].AuthorityKeyId)
}

// bundleWatcher notes when a workload is first told of a bundle that lacks an
// authority.
type bundleWatcher struct {
	workloadapi.X509ContextWatcher
	lacks func(keyID string) bool
	mu    sync.Mutex
	at    time.Time
}

func (w *bundleWatcher) OnX509ContextWatchError(error) {}
func (w *bundleWatcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, b := range c.Bundles.Bundles() {
		for _, cert := range b.X509Authorities() {
			if !w.lacks(hex.EncodeToString(cert.SubjectKeyId)) {
				return
			}
		}
	}
	if w.at.IsZero() {
		w.at = time.Now()
	}
}

func (w *bundleWatcher) told() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.at
}

// TestTaintAndRevocationAreNotNoticedButByWhatWasLeaked_T25 replaces both
// authorities, taints and revokes the old ones, while two services call each
// other and independent verifiers check what they are given. Nothing fails; but
// what was saved before verifies no more.
func TestTaintAndRevocationAreNotNoticedButByWhatWasLeaked_T25(t *testing.T) {
	t.Parallel()
	harness.NeedCommand(t, "openssl")
	harness.NeedCommand(t, "certtool")
	d := harness.NewDomain(t, harness.Settings{}) // SVIDs of an hour: none is renewed by itself
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/echo", echoUID)
	d.Entry(t, "/caller", callerUID)
	d.Entry(t, "/tester", os.Getuid())
	p := startPair(t, d.Socket, echoUID, "spiffe://example.org/echo", callerUID, "spiffe://example.org/caller")
	p.waitFor(t, "first requests", func(n tally) bool { return n.Requests > 10 })

	oldX509, oldJWT := only(t, authorities(t, d, "x509", "active")).ID, only(t, authorities(t, d, "jwt", "active")).ID
	saved, bundle := t.TempDir(), t.TempDir()
	fetch := func(dir string) {
		t.Helper()
		harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket, "--write", dir}}.Run(t)
	}
	fetch(saved)
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+d.Socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	token, err := client.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "saved"})
	if err != nil {
		t.Fatal(err)
	}
	verifies := func() error {
		fetch(bundle)
		out, err := exec.Command("openssl", "verify", "-CAfile", filepath.Join(bundle, "bundle.0.pem"), filepath.Join(saved, "svid.0.pem")).CombinedOutput()
		if err != nil {
			return fmt.Errorf("openssl verify: %w\n%s", err, out)
		}
		return nil
	}
	if err := verifies(); err != nil {
		t.Fatal(err)
	}

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var verifying sync.WaitGroup
	counts := make([]int, 3)
	verify := func(i int, once func(context.Context) error) {
		verifying.Go(func() { counts[i] = again(ctx, t, once) })
	}
	keys, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+d.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer keys.Close()
	verify(0, func(ctx context.Context) error { return verifyJWT(ctx, d.Socket, keys) })
	verify(1, func(ctx context.Context) error { // one that the agent has cached
		svid, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "cached"})
		if err == nil {
			_, err = client.ValidateJWTSVID(ctx, svid.Marshal(), "cached")
		}
		return err
	})
	files := t.TempDir()
	verify(2, func(context.Context) error { return verifyFiles(t, d.Socket, files) })
	watcher := &bundleWatcher{lacks: func(id string) bool { return id != oldX509 }}
	verifying.Go(func() { _ = client.WatchX509Context(ctx, watcher) })

	d.Admin(t, "authority", "rotate", "x509")
	d.Admin(t, "authority", "rotate", "jwt")
	if n := p.seen(); n.Issuers != 1 || presented(t, p.address(t)) != oldX509 {
		t.Fatalf("the rotation alone has replaced SVIDs: %+v", n)
	}
	tainted := time.Now()
	d.Admin(t, "authority", "taint", "x509", oldX509, "--yes")
	d.Admin(t, "authority", "taint", "jwt", oldJWT, "--yes")
	p.waitFor(t, "an SVID of the new authority at the caller", func(n tally) bool { return n.Issuers == 2 })
	harness.Eventually(t, "an SVID of the new authority at the echo service", func(context.Context) error {
		if presented(t, p.address(t)) == oldX509 {
			return errors.New("it is still of the old one")
		}
		return nil
	})
	harness.Eventually(t, "an SVID of the new authority at the agent", func(context.Context) error {
		if a := only(t, authorities(t, d, "x509", "old")); a.Use.Agents != 0 {
			return fmt.Errorf("%d agents use one of the old", a.Use.Agents)
		}
		return nil
	})
	t.Logf("all SVIDs were replaced %v after the taint, with the commands that ask for it", time.Since(tainted))
	if err := verifies(); err != nil {
		t.Errorf("what a tainted authority signed does not verify: %v", err)
	}
	if _, err := client.ValidateJWTSVID(t.Context(), token.Marshal(), "saved"); err != nil {
		t.Errorf("what a tainted authority signed does not verify: %v", err)
	}
	if at := watcher.told(); !at.IsZero() {
		t.Error("a tainted authority has left the bundle")
	}

	revoked := time.Now()
	d.Admin(t, "authority", "revoke", "x509", oldX509, "--yes")
	d.Admin(t, "authority", "revoke", "jwt", oldJWT, "--yes")
	harness.Eventually(t, "a bundle without it at a workload", func(context.Context) error {
		if watcher.told().IsZero() {
			return errors.New("it is still there")
		}
		return nil
	})
	t.Logf("a workload had the bundle %v after the start of the command that revokes", watcher.told().Sub(revoked))
	if err := verifies(); err == nil {
		t.Error("an SVID that was saved before the taint verifies after the revocation")
	}
	if _, err := client.ValidateJWTSVID(t.Context(), token.Marshal(), "saved"); err == nil {
		t.Error("a token that was saved before the taint verifies after the revocation")
	}
	before := p.seen().Requests
	p.waitFor(t, "requests after the revocation", func(n tally) bool { return n.Requests > before+50 })
	stop()
	verifying.Wait()
	if code := p.caller.Stop(t); code != 0 {
		t.Errorf("the caller ended with %d", code)
	}
	n := p.seen()
	t.Logf("%d handshakes with SVIDs of %d authorities, %d failed; verified: %d new tokens, %d cached ones, %d sets of files", n.Requests, n.Issuers, n.Failures, counts[0], counts[1], counts[2])
	if n.Failures > 0 || counts[0] == 0 || counts[1] == 0 || counts[2] == 0 {
		t.Errorf("%+v", n)
	}

	// Nothing of them is left, also after a restart.
	d.Server.Stop(t)
	d.StartServer(t)
	if all := append(authorities(t, d, "x509", "old"), authorities(t, d, "jwt", "old")...); len(all) != 0 {
		t.Errorf("after a restart there are %+v", all)
	}
	left, err := filepath.Glob(filepath.Join(d.Dir, "server", "data", "keys", "*.pem"))
	if err != nil || len(left) != 2 {
		t.Errorf("%d key files are left, want the 2 of what signs: %v", len(left), left)
	}
}

// TestAnAgentThatWasAwayWhenItsAuthorityWasRevokedSaysWhatToDo revokes the
// authority of an agent that is not running.
func TestAnAgentThatWasAwayWhenItsAuthorityWasRevokedSaysWhatToDo(t *testing.T) {
	t.Parallel()
	d := harness.NewDomain(t, harness.Settings{})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	old := only(t, authorities(t, d, "x509", "active")).ID
	d.Admin(t, "authority", "rotate", "x509") // the agent knows the new one
	d.Agent.Stop(t)
	_, said, code := harness.Command{Args: []string{"authority", "taint", "x509", old, "--admin-socket", d.AdminSocket}, UID: harness.ServerUID}.Try(t)
	if code != 2 {
		t.Errorf("without --yes it ended with %d: %s", code, said)
	}
	d.Admin(t, "authority", "taint", "x509", old, "--yes")
	if a := only(t, authorities(t, d, "x509", "old")); !a.Tainted || a.Use.Agents != 1 {
		t.Errorf("the list says %+v", a)
	}
	d.Admin(t, "authority", "revoke", "x509", old, "--yes")

	d.Agent = harness.Command{Args: []string{"agent", "run", "-c", filepath.Join(d.Dir, "agent.yaml")}, UID: harness.AgentUID}.Start(t)
	d.Agent.WaitOutput(t, "AGENT_NOT_ATTESTED")
	d.Agent.WaitOutput(t, "hallmark token generate")
	if code := d.Agent.Wait(t); code == 0 {
		t.Error("the agent ended with 0")
	}
	d.StartAgent(t, d.Join(t))
}
