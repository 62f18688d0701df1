package issuer_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/test/harness"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func configOf(i *harness.Issuer) issuer.Config {
	return issuer.Config{Issuer: i.URL, Audiences: []string{"us"}, CAPath: i.CA}
}

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func trust(t testing.TB, c issuer.Config, o issuer.Options) *issuer.Issuer {
	t.Helper()
	i, err := issuer.New(c, o)
	must(t, err)
	return i
}

func write(t testing.TB, data []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, data, 0o600))
	return path
}

func TestATokenSaysWhatItsIssuerSigned(t *testing.T) {
	p := harness.NewIssuer(t)
	pinned := issuer.Config{Issuer: p.URL, Audiences: []string{"us"}, JWKSPath: write(t, p.JWKS(t))}
	byURL := configOf(p)
	byURL.JWKSURL = p.URL + "/jwks"
	signed := p.Sign(t, p.Claims("us", map[string]any{"jti": "7", "repository_id": "42"}))
	if of, err := issuer.Of(signed); of != p.URL || err != nil {
		t.Errorf("it is of %q, %v", of, err)
	}
	for name, c := range map[string]issuer.Config{"by discovery": configOf(p), "by URL": byURL, "by file": pinned} {
		got, err := trust(t, c, issuer.Options{}).Validate(t.Context(), signed)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got.Issuer != p.URL || got.Subject != "job-7" || got.ID != "7" || got.Claims["repository_id"] != "42" || got.Audience[0] != "us" || got.ExpiresAt.IsZero() || got.IssuedAt.IsZero() {
			t.Errorf("%s: got %+v", name, got)
		}
	}
}

func TestAlgorithmsAreThoseOfTheListAndOfTheKey(t *testing.T) {
	p := harness.NewIssuer(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	p.Publish(jose.JSONWebKey{Key: key.Public(), KeyID: "rsa"}, jose.JSONWebKey{Key: p.Key.Public(), KeyID: "key-1"})
	sign := func(a jose.SignatureAlgorithm) string { return harness.SignJWT(t, a, key, "rsa", p.Claims("us", nil)) }
	all := trust(t, configOf(p), issuer.Options{})
	for _, a := range []jose.SignatureAlgorithm{jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512} {
		_, err := all.Validate(t.Context(), sign(a))
		must(t, err)
	}
	c := configOf(p)
	c.Algorithms = []string{"RS256"}
	some := trust(t, c, issuer.Options{})
	_, err = some.Validate(t.Context(), sign(jose.RS256))
	must(t, err)
	for _, token := range []string{sign(jose.PS256), p.Sign(t, p.Claims("us", nil))} {
		if _, err := some.Validate(t.Context(), token); err == nil || !strings.Contains(err.Error(), "not allowed") {
			t.Errorf("got %v", err)
		}
	}
}

func TestKeysFollowTheIssuerButAreNotAskedForAtAStrangersPace(t *testing.T) {
	p, c := harness.NewIssuer(t), &clock{now: time.Now()}
	i := trust(t, configOf(p), issuer.Options{Now: c.Now})
	good := func() string {
		claims := p.Claims("us", map[string]any{"iat": c.Now().Unix(), "exp": c.Now().Add(time.Minute).Unix()})
		return p.Sign(t, claims)
	}
	for range 3 {
		_, err := i.Validate(t.Context(), good())
		must(t, err)
	}
	if n := p.Asked.Load(); n != 2 {
		t.Errorf("the issuer was asked %d times for two documents", n)
	}
	// Unknown keys: once a pause, however many tokens.
	old := good()
	p.Rotate(t, "key-2")
	if _, err := i.Validate(t.Context(), good()); err == nil {
		t.Error("a key was known before it was fetched")
	}
	c.Add(16 * time.Second)
	_, err := i.Validate(t.Context(), good())
	must(t, err)
	for n := range 50 {
		if _, err := i.Validate(t.Context(), harness.SignJWT(t, jose.ES256, p.Key, fmt.Sprint("key-", n+3), p.Claims("us", nil))); err == nil {
			t.Error("a token by an unknown key was taken")
		}
	}
	if n := p.Asked.Load(); n != 4 {
		t.Errorf("the issuer was asked %d times", n)
	}
	// The withdrawn one is gone.
	if _, err := i.Validate(t.Context(), old); err == nil {
		t.Error("a token by a key that was withdrawn was taken")
	}
	// With the issuer away its keys stay, for six hours.
	p.Handle(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	c.Add(5 * time.Hour)
	for range 3 {
		_, err = i.Validate(t.Context(), good())
		must(t, err)
	}
	if n := p.Asked.Load(); n != 5 {
		t.Errorf("the issuer was asked %d times", n)
	}
	c.Add(time.Hour)
	if _, err := i.Validate(t.Context(), good()); !errors.Is(err, issuer.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	p.Handle(p.Answer)
	if _, err := i.Validate(t.Context(), good()); !errors.Is(err, issuer.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
	c.Add(16 * time.Second)
	_, err = i.Validate(t.Context(), good())
	must(t, err)
}

func TestACallerThatHasAKeyWaitsForNobody(t *testing.T) {
	p, c := harness.NewIssuer(t), &clock{now: time.Now()}
	i := trust(t, configOf(p), issuer.Options{Now: c.Now})
	good := p.Sign(t, p.Claims("us", map[string]any{"exp": c.Now().Add(time.Hour).Unix()}))
	_, err := i.Validate(t.Context(), good)
	must(t, err)
	c.Add(10 * time.Minute) // the keys are old
	asked, release := make(chan struct{}), make(chan struct{})
	p.Handle(func(w http.ResponseWriter, r *http.Request) {
		close(asked)
		<-release
		w.WriteHeader(http.StatusBadGateway)
	})
	var wait sync.WaitGroup
	wait.Go(func() {
		if _, err := i.Validate(t.Context(), good); err != nil {
			t.Error(err)
		}
	})
	<-asked
	_, err = i.Validate(t.Context(), good) // it would wait for ever
	must(t, err)
	close(release)
	wait.Wait()
}

func TestATokenIsGoodForItsTime(t *testing.T) {
	p, c := harness.NewIssuer(t), &clock{now: time.Now()}
	config := configOf(p)
	config.MaxAge = config2m
	i := trust(t, config, issuer.Options{Now: c.Now})
	good := p.Sign(t, p.Claims("us", map[string]any{"exp": c.Now().Add(time.Hour).Unix()}))
	_, err := i.Validate(t.Context(), good)
	must(t, err)
	c.Add(2*time.Minute + issuer.Leeway + time.Second)
	if _, err := i.Validate(t.Context(), good); err == nil || !strings.Contains(err.Error(), "it is taken for 2m0s") {
		t.Errorf("got %v", err)
	}
}

const config2m = config.Duration(2 * time.Minute)

func TestATokenIsUsedOnce(t *testing.T) {
	p := harness.NewIssuer(t)
	i := trust(t, configOf(p), issuer.Options{})
	uses, now := issuer.NewUses(100), time.Now()
	token := func(change map[string]any) *issuer.Token {
		got, err := i.Validate(t.Context(), p.Sign(t, p.Claims("us", change)))
		must(t, err)
		return got
	}
	named, other := token(map[string]any{"jti": "1"}), token(map[string]any{"jti": "2"})
	must(t, uses.Use(named, now))
	must(t, uses.Use(other, now))
	// The same jti in another token, and at any later time.
	again := token(map[string]any{"jti": "1", "exp": now.Add(time.Hour).Unix()})
	if err := uses.Use(again, now); !errors.Is(err, issuer.ErrUsed) {
		t.Errorf("got %v", err)
	}
	if err := uses.Use(named, now.Add(2*time.Hour)); !errors.Is(err, issuer.ErrUsed) {
		t.Errorf("got %v", err)
	}

	// One without: two signatures of the same claims are one token.
	uses = issuer.NewUses(100)
	claims := p.Claims("us", nil)
	one, err := i.Validate(t.Context(), p.Sign(t, claims))
	must(t, err)
	two, err := i.Validate(t.Context(), p.Sign(t, claims))
	must(t, err)
	must(t, uses.Use(one, now))
	if err := uses.Use(two, now); !errors.Is(err, issuer.ErrUsed) {
		t.Errorf("got %v", err)
	}
}

func TestOneIssuerLeavesTheOthersRoom(t *testing.T) {
	p, q := harness.NewIssuer(t), harness.NewIssuer(t)
	pi, qi := trust(t, configOf(p), issuer.Options{}), trust(t, configOf(q), issuer.Options{})
	uses, now := issuer.NewUses(10), time.Now()
	var err error
	taken := 0
	for n := 0; err == nil; n++ {
		token, invalid := pi.Validate(t.Context(), p.Sign(t, p.Claims("us", map[string]any{"jti": fmt.Sprint(n)})))
		must(t, invalid)
		if err = uses.Use(token, now); err == nil {
			taken++
		}
	}
	if !errors.Is(err, issuer.ErrBusy) || taken != 5 {
		t.Errorf("after %d: %v", taken, err)
	}
	token, err := qi.Validate(t.Context(), q.Sign(t, q.Claims("us", nil)))
	must(t, err)
	must(t, uses.Use(token, now))
	// What has ended makes room.
	token, err = pi.Validate(t.Context(), p.Sign(t, p.Claims("us", map[string]any{"jti": "late", "exp": now.Add(time.Hour).Unix()})))
	must(t, err)
	must(t, uses.Use(token, now.Add(30*time.Minute)))
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	for want, c := range map[string]issuer.Config{
		"issuer is missing":         {Audiences: []string{"us"}},
		"it is not https":           {Issuer: "http://issuer.example", Audiences: []string{"us"}, AllowLoopback: true},
		"it is not https ":          {Issuer: "http://127.0.0.1", Audiences: []string{"us"}},
		"it is not https  ":         {Issuer: "file:///etc/passwd", Audiences: []string{"us"}},
		"it names no host":          {Issuer: "https:///path", Audiences: []string{"us"}},
		"a user or a password":      {Issuer: "https://a@b", Audiences: []string{"us"}},
		"it has a query":            {Issuer: "https://a?b", Audiences: []string{"us"}},
		"it has a fragment":         {Issuer: "https://a#", Audiences: []string{"us"}},
		"audiences is missing":      {Issuer: "https://a"},
		"audiences has an empty":    {Issuer: "https://a", Audiences: []string{""}},
		`algorithm "HS256"`:         {Issuer: "https://a", Audiences: []string{"us"}, Algorithms: []string{"HS256"}},
		`algorithm "none"`:          {Issuer: "https://a", Audiences: []string{"us"}, Algorithms: []string{"none"}},
		"max_age":                   {Issuer: "https://a", Audiences: []string{"us"}, MaxAge: config.Duration(31 * 24 * time.Hour)},
		"jwks_url":                  {Issuer: "https://a", Audiences: []string{"us"}, JWKSURL: "http://a/jwks"},
		"nothing is discovered":     {Issuer: "https://a", Audiences: []string{"us"}, JWKSURL: "https://a/jwks", JWKSHosts: []string{"b"}},
		"nothing is fetched":        {Issuer: "https://a", Audiences: []string{"us"}, JWKSPath: "x", CAPath: "y"},
		"write a host":              {Issuer: "https://a", Audiences: []string{"us"}, JWKSHosts: []string{"https://b/"}},
		"ca_path":                   {Issuer: "https://a", Audiences: []string{"us"}, CAPath: "/nonexistent"},
		"jwks_path":                 {Issuer: "https://a", Audiences: []string{"us"}, JWKSPath: "/nonexistent"},
		"is no regular file":        {Issuer: "https://a", Audiences: []string{"us"}, JWKSPath: "/dev/zero"},
		"has no key that signs":     {Issuer: "https://a", Audiences: []string{"us"}, JWKSPath: write(t, []byte(`{"keys":[{"kty":"OKP"}]}`))},
		"key 1 is not a public one": {Issuer: "https://a", Audiences: []string{"us"}, JWKSPath: write(t, []byte(`{"keys":[{"kty":"oct","k":"AAAA"}]}`))},
	} {
		if _, err := issuer.New(c, issuer.Options{}); err == nil || !strings.Contains(err.Error(), strings.TrimSpace(want)) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

// TestALyingEndpointGetsNobodyAnywhere: discovery and keys come over a network.
func TestALyingEndpointGetsNobodyAnywhere(t *testing.T) {
	elsewhere := harness.NewIssuer(t)
	document := func(p *harness.Issuer, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if strings.HasPrefix(r.URL.Path, "/.well-known") {
				io.WriteString(w, strings.ReplaceAll(text, "URL", p.URL))
				return
			}
			p.Answer(w, r)
		}
	}
	keys := func(p *harness.Issuer, text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/jwks" {
				io.WriteString(w, text)
				return
			}
			p.Answer(w, r)
		}
	}
	for name, c := range map[string]struct {
		h    func(p *harness.Issuer) http.HandlerFunc
		want string
	}{
		"another issuer": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"https://other","jwks_uri":"URL/jwks"}`)
		}, `its issuer is "https://other"`},
		"an issuer with a slash more": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"URL/","jwks_uri":"URL/jwks"}`)
		}, "its issuer is"},
		"an issuer twice": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"https://other","issuer":"URL","jwks_uri":"URL/jwks"}`)
		}, "twice"},
		"keys of another host": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"URL","jwks_uri":"`+elsewhere.URL+`/jwks"}`)
		}, "not the issuer's host"},
		"keys of the cloud's metadata": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"URL","jwks_uri":"http://169.254.169.254/latest/meta-data"}`)
		}, "not https"},
		"keys over http": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"URL","jwks_uri":"`+strings.Replace(p.URL, "https", "http", 1)+`/jwks"}`)
		}, "not https"},
		"keys in a file": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"URL","jwks_uri":"file:///etc/passwd"}`)
		}, "not https"},
		"keys behind a user": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"URL","jwks_uri":"`+strings.Replace(p.URL, "://", "://evil@", 1)+`/jwks"}`)
		}, "a user or a password"},
		"no jwks_uri": {func(p *harness.Issuer) http.HandlerFunc { return document(p, `{"issuer":"URL"}`) }, "not https"},
		"a redirect": {func(*harness.Issuer) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusFound)
			}
		}, "302"},
		"a redirect of the keys": {func(p *harness.Issuer) http.HandlerFunc {
			return func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/jwks" {
					http.Redirect(w, r, elsewhere.URL+"/jwks", http.StatusTemporaryRedirect)
					return
				}
				p.Answer(w, r)
			}
		}, "307"},
		"a huge document": {func(p *harness.Issuer) http.HandlerFunc {
			return document(p, `{"issuer":"URL","jwks_uri":"URL/jwks","x":"`+strings.Repeat("x", 1<<20)+`"}`)
		}, "larger than"},
		"a huge JWK Set": {func(p *harness.Issuer) http.HandlerFunc {
			return keys(p, `{"keys":["`+strings.Repeat("x", 1<<20)+`"]}`)
		}, "larger than"},
		"too many keys": {func(p *harness.Issuer) http.HandlerFunc {
			return keys(p, `{"keys":[`+strings.Repeat("{},", 64)+`{}]}`)
		}, "the most is 64"},
		"deep JSON":     {func(p *harness.Issuer) http.HandlerFunc { return keys(p, strings.Repeat(`{"keys":[`, 1000)) }, "levels"},
		"a web page":    {func(p *harness.Issuer) http.HandlerFunc { return keys(p, "<html>") }, "web page"},
		"no keys":       {func(p *harness.Issuer) http.HandlerFunc { return keys(p, `{"keys":[]}`) }, "no key that signs"},
		"a list":        {func(p *harness.Issuer) http.HandlerFunc { return keys(p, `[]`) }, "not a JSON object"},
		"a secret key":  {func(p *harness.Issuer) http.HandlerFunc { return keys(p, `{"keys":[{"kty":"oct","k":"AAAA"}]}`) }, "not a public one"},
		"a private key": {func(p *harness.Issuer) http.HandlerFunc { return keys(p, `{"keys":[{"kty":"EC","d":"AAAA"}]}`) }, "not a public one"},
		"an error": {func(*harness.Issuer) http.HandlerFunc {
			return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }
		}, "500"},
	} {
		t.Run(name, func(t *testing.T) {
			p := harness.NewIssuer(t)
			p.Handle(c.h(p))
			var log bytes.Buffer
			i := trust(t, configOf(p), issuer.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
			got, err := i.Validate(t.Context(), p.Sign(t, p.Claims("us", nil)))
			if got != nil || !errors.Is(err, issuer.ErrUnavailable) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, %v", got, err)
			}
			if !strings.Contains(log.String(), "could not be fetched") {
				t.Errorf("the log is %s", log.String())
			}
		})
	}
	if n := elsewhere.Asked.Load(); n != 0 {
		t.Errorf("the other host was asked %d times", n)
	}
	t.Run("a certificate that nobody trusts", func(t *testing.T) {
		p := harness.NewIssuer(t)
		c := configOf(p)
		c.CAPath = elsewhere.CA
		_, err := trust(t, c, issuer.Options{}).Validate(t.Context(), p.Sign(t, p.Claims("us", nil)))
		if !errors.Is(err, issuer.ErrUnavailable) || p.Asked.Load() != 0 {
			t.Errorf("got %v", err)
		}
	})
}
