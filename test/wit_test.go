package test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	"github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/test/harness"
)

// uses returns the key IDs of a bundle document, by use.
func uses(t testing.TB, document string) map[string][]string {
	t.Helper()
	var doc struct{ Keys []struct{ Use, Kid string } }
	if err := json.Unmarshal([]byte(document), &doc); err != nil {
		t.Fatal(err)
	}
	out := map[string][]string{}
	for _, k := range doc.Keys {
		out[k.Use] = append(out[k.Use], k.Kid)
	}
	return out
}

// TestWITSVIDsFromTheAuthorityToTheWorkload_W32_W33_W35_W41 is the life of
// WIT-SVIDs, as go-spiffe's client and an operator see it: they are issued and
// verify, an authority of theirs is replaced, tainted and revoked, and all is
// gone once they are switched off.
func TestWITSVIDsFromTheAuthorityToTheWorkload_W32_W33_W35_W41(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	dev := startDev(t, dir, "--wit")
	admin, socket := filepath.Join(dir, "admin.sock"), filepath.Join(dir, "workload.sock")
	hallmark := func(args ...string) string {
		t.Helper()
		return harness.Command{Args: append(args, "--admin-socket", admin)}.Run(t)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	source, err := workloadapi.NewWITSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+socket)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	ids, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	current := func() *witsvid.SVID {
		t.Helper()
		svid, err := source.GetWITSVIDForID(ids.ID)
		if err != nil {
			t.Fatal(err)
		}
		return svid
	}
	leaked := current()
	verifies := func(by witbundle.Source) error {
		_, err := witsvid.ParseAndValidate(leaked.Marshal(), by)
		return err
	}
	if err := verifies(source); err != nil {
		t.Fatal(err)
	}

	// The document that other trust domains read.
	td := spiffeid.RequireTrustDomainFromString("example.org")
	document := hallmark("bundle", "show", "-o", "spiffe")
	published, err := spiffebundle.Parse(td, []byte(document))
	if err != nil {
		t.Fatal(err)
	}
	if err := verifies(published); err != nil {
		t.Error(err)
	}
	kids := uses(t, document)
	if !slices.Equal(kids["wit-svid"], []string{leaked.KeyID}) || len(kids["jwt-svid"]) != 1 || kids["jwt-svid"][0] == leaked.KeyID {
		t.Errorf("the keys of the document are %v", kids)
	}

	// Neither kind of token is taken for the other.
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.ValidateJWTSVID(ctx, leaked.Marshal(), "a"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("the agent takes a WIT-SVID for a JWT-SVID: %v", err)
	}
	jwt, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := witsvid.ParseAndValidate(jwt.Marshal(), source); err == nil {
		t.Error("go-spiffe takes a JWT-SVID for a WIT-SVID")
	}
	jwtBundles, err := client.FetchJWTBundles(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if own, _ := jwtBundles.Get(td); own.HasJWTAuthority(leaked.KeyID) || len(own.JWTAuthorities()) != 1 {
		t.Errorf("the JWT bundle has the keys %v", own.JWTAuthorities())
	}

	// A leaked key: rotate, taint, revoke.
	hallmark("authority", "rotate", "wit")
	hallmark("authority", "taint", "wit", leaked.KeyID, "--yes")
	harness.Eventually(t, "the workload has another WIT-SVID", func(context.Context) error {
		if got := current(); got.KeyID == leaked.KeyID {
			return errors.New("the old one is served")
		} else if _, err := witsvid.ParseAndValidate(got.Marshal(), source); err != nil {
			return err
		}
		return nil
	})
	if err := verifies(source); err != nil {
		t.Errorf("a tainted authority's WIT-SVID verifies until that is revoked: %v", err)
	}
	hallmark("authority", "revoke", "wit", leaked.KeyID, "--yes")
	harness.Eventually(t, "what the old one signed verifies no more", func(context.Context) error {
		if verifies(source) == nil {
			return errors.New("it does")
		}
		return nil
	})
	if kids := uses(t, hallmark("bundle", "show", "-o", "spiffe")); !slices.Equal(kids["wit-svid"], []string{current().KeyID}) {
		t.Errorf("the keys of the document are %v", kids)
	}

	// As files.
	files := filepath.Join(dir, "files")
	harness.Command{Args: []string{"fetch", "wit", "--socket", socket, "--write", files}}.Run(t)
	token, err := os.ReadFile(filepath.Join(files, "svid.0.wit"))
	if err != nil || string(token) != current().Marshal() {
		t.Errorf("the file has %q, %v", token, err)
	}
	if info, err := os.Stat(filepath.Join(files, "svid.0.jwk")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v", info, err)
	}

	// Without the flag, nothing of all that is left.
	if code := dev.Stop(t); code != 0 {
		t.Fatalf("ended with %d", code)
	}
	dev = startDev(t, dir)
	for what, text := range map[string]string{
		"the authorities": hallmark("authority", "list", "-o", "json"),
		"the bundle":      hallmark("bundle", "show", "-o", "json"),
		"the document":    hallmark("bundle", "show", "-o", "spiffe"),
	} {
		if strings.Contains(strings.ToLower(text), "wit") {
			t.Errorf("%s: %s", what, text)
		}
	}
	keys, err := filepath.Glob(filepath.Join(dir, "server", "keys", "wit-*"))
	if err != nil || len(keys) != 0 {
		t.Errorf("keys are left: %v, %v", keys, err)
	}
	again, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	_, svids := again.FetchWITSVIDs(ctx, "")
	_, bundles := again.FetchWITBundles(ctx)
	for _, err := range []error{svids, bundles} {
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("got %v, want Unimplemented", err)
		}
	}
	if _, stderr, code := (harness.Command{Args: []string{"authority", "rotate", "wit", "--admin-socket", admin}}).Try(t); code == 0 || !strings.Contains(stderr, "experimental") {
		t.Errorf("exit status %d: %s", code, stderr)
	}
	dev.Stop(t)
}
