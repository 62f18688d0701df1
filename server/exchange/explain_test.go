package exchange_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server/exchange"
	"github.com/hallmark-id/hallmark/test/harness"
)

// failed returns the names of the checks that failed.
func failed(e *exchange.Explanation) (names []string) {
	for _, c := range e.Checks {
		if c.Err != nil {
			names = append(names, c.Name)
		}
	}
	return names
}

func TestEachCheckOfATokenIsToldAndWhichEntriesItMatches(t *testing.T) {
	w := newWorld(t, func(c *exchange.IssuerConfig) { c.Preset, c.Condition = "github", `claims.repository_owner_id == "7"` })
	mine := w.entry("ci", "/job", "github:repository_id:42", "github:ref:refs/heads/main")
	other := w.entry("ci", "/release", "github:repository_id:42", "github:ref:refs/tags/v1", "github:environment:prod")
	w.entry("elsewhere", "/x", "github:repository_id:42")
	claims := map[string]any{"repository_id": "42", "repository_owner_id": "7", "ref": "refs/heads/main", "jti": "1"}
	got := w.endpoint.Explain(t.Context(), w.token(claims))
	if names := failed(got); len(names) != 0 || got.Issuer != "ci" || got.Parent.String() != "spiffe://example.org/hallmark/issuer/ci" || len(got.Checks) < 10 {
		t.Fatalf("failed are %q of %+v", names, got)
	}
	if len(got.Entries) != 2 || got.Entries[0].Entry.ID != mine.ID || !got.Entries[0].Matches() || got.Entries[1].Entry.ID != other.ID || got.Entries[1].Matches() || len(got.Entries[1].Missing) != 2 {
		t.Errorf("entries are %+v", got.Entries)
	}
	// It was not used up.
	w.validated(w.exchanged(w.token(claims)), "https://api.example.org")
	if names := failed(w.endpoint.Explain(t.Context(), w.token(claims))); !slices.Equal(names, []string{"first use"}) {
		t.Errorf("after it was used, failed are %q", names)
	}
}

func TestChecksGoOnAfterOneThatFails(t *testing.T) {
	w := newWorld(t, func(c *exchange.IssuerConfig) {
		c.Condition, c.Algorithms = `claims.owner == "7"`, []string{"ES256"}
	})
	w.entry("ci", "/job", "oidc:sub:job-7")
	other := harness.NewIssuer(t)
	long := time.Now().Add(-3 * time.Hour).Unix()
	for name, c := range map[string]struct {
		token string
		want  []string
	}{
		"of another audience, old and of nobody's key": {harness.SignJWT(t, "ES256", other.Key, "key-1", w.ci.Claims("https://other", map[string]any{"sub": "job-7", "iat": long, "exp": long + 60, "may_act": "x"})),
			[]string{"audience", "time", "age", "signature", "condition", "actor"}},
		"of a stranger":         {other.Sign(t, other.Claims(us, map[string]any{"sub": "job-7"})), []string{"trust"}},
		"no token":              {"x", []string{"form"}},
		"of a kind not allowed": {harness.SignJWT(t, "ES256", w.ci.Key, "key-2", w.ci.Claims(us, map[string]any{"sub": "", "owner": "7"})), []string{"subject", "signature"}},
	} {
		got := w.endpoint.Explain(t.Context(), c.token)
		if names := failed(got); !slices.Equal(names, c.want) {
			t.Errorf("%s: failed are %q, want %q", name, names, c.want)
		}
		if a := w.exchanged(c.token); a.status == http.StatusOK {
			t.Errorf("%s: it is exchanged", name)
		}
	}
	if got := w.endpoint.Explain(t.Context(), other.Sign(t, other.Claims(us, nil))); !strings.Contains(got.Checks[0].Err.Error(), w.ci.URL) || other.Asked.Load() != 0 {
		t.Errorf("a stranger's: %v; asked %d times", got.Checks[0].Err, other.Asked.Load())
	}
}

func TestTheLinterFindsWhatLetsInMoreThanIsMeant(t *testing.T) {
	w := newWorld(t, func(c *exchange.IssuerConfig) {
		c.Preset, c.Audiences, c.MaxAge, c.Reusable, c.OutliveToken = "github", []string{us, "https://other"}, config.Duration(48*time.Hour), true, true
		c.Condition = `claims.repository == "acme/shop" || claims.sub.startsWith("repo:acme") || claims.ref.matches('refs/heads/.*') || claims.ref.contains("main") || claims.x.endsWith("acme")`
	})
	entries := map[string][]string{
		"/all": {"oidc:issuer:ci"}, "/name": {"github:repository:acme/shop", "github:ref:refs/heads/main"}, "/branches": {"github:repository_id:42"}, "/subject": {"oidc:sub:repo:acme/shop:ref:refs/heads/main"},
	}
	for path, selectors := range entries {
		w.entry("ci", path, selectors...)
	}
	w.entry("typo", "/nobody", "github:repository_id:42")
	found := w.endpoint.Lint()
	for _, want := range []string{
		`audience "https://other"`, "taken for 2d", "as often as it is shown", "SVIDs outlive", "condition is on claims.repository,", `startsWith("repo:acme")`, `matches("refs/heads/.*")`, `contains("main")`, `endsWith("acme")`,
		"the issuer's alone", "github:repository is a name", "every branch and pipeline", "oidc:sub has names", "no issuer has this name",
	} {
		n := 0
		for _, f := range found {
			if strings.Contains(f.Says, want) && f.Remedy != "" {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%q is found %d times in %+v", want, n, found)
		}
	}
	if len(found) != 14 {
		t.Errorf("%d are found: %+v", len(found), found)
	}
}

func TestTheLinterFindsNothingInWhatIsNarrow(t *testing.T) {
	w := newWorld(t, func(c *exchange.IssuerConfig) {
		c.Preset = "github"
		c.Condition = `claims.repository_owner_id == "7" && claims.repository == "acme/shop" && claims.repository_id == "42" && claims.sub.startsWith("repo:acme/") && claims.ref.matches("^refs/heads/release-[0-9]+$")`
	})
	w.entry("ci", "/job", "github:repository:acme/shop", "github:repository_id:42", "github:ref:refs/heads/main")
	w.entry("ci", "/sub", "github:repository_id:42", "oidc:sub:repo:acme/shop:environment:prod")
	if found := w.endpoint.Lint(); len(found) != 0 {
		t.Errorf("found are %+v", found)
	}
}

func TestTheLinterFindsAPublicIssuerWithoutACondition(t *testing.T) {
	w := newWorld(t, func(o *exchange.Options) {
		o.Issuers[0].Issuer, o.Issuers[0].CAPath, o.Issuers[0].Preset = "", "", "gitlab"
	})
	if found := w.endpoint.Lint(); len(found) != 1 || !strings.Contains(found[0].Says, "https://gitlab.com gives tokens to everybody") {
		t.Errorf("found are %+v", found)
	}
}
