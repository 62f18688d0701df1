package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	gojwtsvid "github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/jwtsvid"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
	"github.com/hallmark-id/hallmark/test/harness"
)

// statusParty is a workload that fetches tokens, and a relying party of its trust
// domain that asks for their status at one host.
type statusParty struct {
	t      *testing.T
	client *workloadapi.Client
	host   string
}

func (p *statusParty) fetch() string {
	p.t.Helper()
	svid, err := p.client.FetchJWTSVID(p.t.Context(), gojwtsvid.Params{Audience: "api"})
	if err != nil {
		p.t.Fatal(err)
	}
	return svid.Marshal()
}

// replaced waits until the workload gets another token than one that was revoked.
func (p *statusParty) replaced(old string) (token string) {
	p.t.Helper()
	harness.Eventually(p.t, "the workload gets another token", func(context.Context) error {
		if token = p.fetch(); token == old {
			return errors.New("it gets the same")
		}
		return nil
	})
	return token
}

// bundle is what the Workload API says of the own trust domain.
func (p *statusParty) bundle(ctx context.Context, of spiffeid.TrustDomain) (*bundle.Bundle, error) {
	set, err := p.client.FetchJWTBundles(ctx)
	if err != nil {
		return nil, err
	}
	keys, err := set.GetJWTBundleForTrustDomain(of)
	if err != nil {
		return nil, err
	}
	b := &bundle.Bundle{TrustDomain: of}
	for id, key := range keys.JWTAuthorities() {
		b.JWTAuthorities = append(b.JWTAuthorities, bundle.JWTAuthority{KeyID: id, PublicKey: key})
	}
	return b, nil
}

// verify is a relying party that has held no list before.
func (p *statusParty) verify(ctx context.Context, token string) error {
	b, err := p.bundle(ctx, spiffeid.RequireTrustDomainFromString("example.org"))
	if err != nil {
		return err
	}
	bundles := func(td spiffeid.TrustDomain) *bundle.Bundle {
		if td == b.TrustDomain {
			return b
		}
		return nil
	}
	checker, err := statuslist.NewChecker(statuslist.Options{Hosts: []string{p.host}, Bundles: bundles, AllowLoopback: true})
	if err != nil {
		return err
	}
	svid, err := jwtsvid.Validate(token, []string{"api"}, bundles, time.Now())
	if err != nil {
		return err
	}
	return checker.Check(ctx, svid.ID.TrustDomain(), svid.Claims)
}

func (p *statusParty) accepts(what, token string) {
	p.t.Helper()
	if err := p.verify(p.t.Context(), token); err != nil {
		p.t.Errorf("%s: %v", what, err)
	}
}

func (p *statusParty) refuses(what, token string) {
	p.t.Helper()
	if err := p.verify(p.t.Context(), token); !errors.Is(err, statuslist.ErrNotValid) {
		p.t.Errorf("%s: got %v, want that it is revoked", what, err)
	}
}

// TestStatusList_SL01_SL03_SL04_SL06_SL12_ARevokedTokenIsRefusedAndReplaced
// revokes a JWT-SVID that a workload has fetched, by the token, and the next, after
// the server was killed, by the identity.
func TestStatusList_SL01_SL03_SL04_SL06_SL12_ARevokedTokenIsRefusedAndReplaced(t *testing.T) {
	t.Parallel()
	host := harness.FreeAddress(t)
	d := harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf("status_list_endpoint: {listen: %s, url: http://%[1]s}\n", host)})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/tester", os.Getuid())
	client, err := workloadapi.New(t.Context(), workloadapi.WithAddr("unix://"+d.Socket))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	p := &statusParty{t, client, host}
	revoke := func(args ...string) {
		t.Helper()
		var r struct {
			Covered     bool
			Agents      int
			StatusLists []struct{ Server string } `json:"status_lists"`
		}
		out := d.Admin(t, append([]string{"svid", "revoke", "--yes", "-o", "json"}, args...)...)
		if err := json.Unmarshal([]byte(out), &r); err != nil || !r.Covered || r.Agents != 1 || len(r.StatusLists) != 1 {
			t.Fatalf("revoke says %+v, %v", r, err)
		}
	}

	first := p.fetch()
	p.accepts("a token", first)
	if p.fetch() != first {
		t.Fatal("the agent does not hold the token: that another one follows says nothing")
	}
	leaked := filepath.Join(d.Dir, "leaked.jwt")
	if err := os.WriteFile(leaked, []byte(first), 0o644); err != nil {
		t.Fatal(err)
	}
	revoke("--token", leaked)
	p.refuses("a revoked token", first)
	second := p.replaced(first)
	p.accepts("the token that took its place", second)

	d.Server.Kill()
	if err := p.verify(t.Context(), second); !errors.Is(err, statuslist.ErrUnavailable) {
		t.Errorf("with nobody to ask: %v", err)
	}
	d.StartServer(t)
	p.refuses("after a restart the first", first)
	p.accepts("after a restart the second", second)
	harness.Eventually(t, "the agent is back", func(context.Context) error {
		if strings.Contains(d.Admin(t, "node", "list"), "connected") {
			return nil
		}
		return errors.New("it is not")
	})
	revoke("--spiffe-id", "/tester")
	p.refuses("what the killed server issued of an identity", second)
	third := p.replaced(second)
	p.accepts("one that was issued after", third)
	p.refuses("still the first", first)
}
