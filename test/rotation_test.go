package test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestRotationIsNotNoticed rotates both authorities again and again while
// independent verifiers, each with the bundle it was last given, check every
// SVID: two go-spiffe services by mTLS, go-spiffe's JWT validation, OpenSSL
// and GnuTLS.
func TestRotationIsNotNoticed(t *testing.T) {
	t.Parallel()
	harness.NeedCommand(t, "openssl")
	harness.NeedCommand(t, "certtool")
	const rotations = 3
	d := harness.NewDomain(t, harness.Settings{
		Server: "x509: {svid_lifetime: 4s}\njwt: {svid_lifetime: 4s}\n",
	})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/echo", echoUID)
	d.Entry(t, "/caller", callerUID)
	d.Entry(t, "/tester", os.Getuid())
	p := startPair(t, d.Socket, echoUID, "spiffe://example.org/echo", callerUID, "spiffe://example.org/caller")
	p.waitFor(t, "first requests", func(n tally) bool { return n.Requests > 10 })

	ctx, stop := context.WithCancel(t.Context())
	var verifying sync.WaitGroup
	counts := make([]int, 2)
	verify := func(i int, once func(context.Context) error) {
		verifying.Go(func() { counts[i] = again(ctx, t, once) })
	}
	bundles, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+d.Socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer bundles.Close()
	verify(0, func(ctx context.Context) error { return verifyJWT(ctx, d.Socket, bundles) })
	files := t.TempDir()
	verify(1, func(ctx context.Context) error { return verifyFiles(t, d.Socket, files) })

	for i := range rotations {
		d.Admin(t, "authority", "rotate", "x509")
		d.Admin(t, "authority", "rotate", "jwt")
		p.waitFor(t, "an SVID of the new authority", func(n tally) bool { return n.Issuers >= i+2 })
	}
	stop()
	verifying.Wait()
	if code := p.caller.Stop(t); code != 0 {
		t.Errorf("the caller ended with %d", code)
	}
	n := p.seen()
	t.Logf("%d handshakes with SVIDs of %d authorities, %d failed; %d JWT-SVIDs and %d sets of files verified", n.Requests, n.Issuers, n.Failures, counts[0], counts[1])
	if n.Failures > 0 || counts[0] == 0 || counts[1] == 0 {
		t.Errorf("%+v", n)
	}
}

// again verifies once and once more, with as long a pause as it takes, and returns
// how often it has.
func again(ctx context.Context, t *testing.T, once func(context.Context) error) (n int) {
	for ctx.Err() == nil {
		began := time.Now()
		if err := once(ctx); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
		n++
		select {
		case <-time.After(time.Since(began)):
		case <-ctx.Done():
		}
	}
	return n
}

// verifyJWT fetches a new JWT-SVID (each call names another audience) and
// checks it with the bundle that another stream delivered.
func verifyJWT(ctx context.Context, socket string, bundles *workloadapi.JWTSource) error {
	audience := "audience-" + rand.Text()
	svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: audience}, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		return fmt.Errorf("fetch a JWT-SVID: %w", err)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), bundles, []string{audience}); err != nil {
		return fmt.Errorf("validate a JWT-SVID: %w", err)
	}
	return nil
}

// verifyFiles writes SVID, key and bundle and lets OpenSSL and GnuTLS check
// them.
func verifyFiles(t *testing.T, socket, dir string) error {
	if out, stderr, code := (harness.Command{Args: []string{"fetch", "x509", "--socket", socket, "--write", dir}}).Try(t); code != 0 {
		return errors.New(out + stderr)
	}
	svid, bundle := filepath.Join(dir, "svid.0.pem"), filepath.Join(dir, "bundle.0.pem")
	out, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", bundle, svid).CombinedOutput()
	if err != nil {
		return fmt.Errorf("openssl verify: %w\n%s", err, out)
	}
	out, err = exec.Command("certtool", "--verify", "--load-ca-certificate", bundle, "--infile", svid).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Verified") {
		return fmt.Errorf("certtool --verify: %w\n%s", err, out)
	}
	return nil
}
