package statuslist_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("example.org")
	start = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
)

const (
	uri     = "https://status.example.org/status/1"
	revoked = 3 // an index
	valid   = 4
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// signed is a JWT, made by go-jose.
func signed(t testing.TB, key any, alg jose.SignatureAlgorithm, header map[string]any, claims any) string {
	t.Helper()
	o := &jose.SignerOptions{}
	for name, value := range header {
		o.WithHeader(jose.HeaderKey(name), value)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: key}, o)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	object, err := signer.Sign(payload)
	if err != nil {
		t.Fatal(err)
	}
	text, err := object.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// house is an issuer of status lists, a network that ends at it, and a checker.
type house struct {
	t       *testing.T
	key     *ecdsa.PrivateKey
	bundle  *bundle.Bundle
	checker *statuslist.Checker

	mu     sync.Mutex
	now    time.Time
	asked  []string
	answer func(*http.Request) (*http.Response, error)
}

func newHouse(t *testing.T, change ...func(*statuslist.Options)) *house {
	t.Helper()
	h := &house{t: t, key: newKey(t), now: start}
	h.bundle = &bundle.Bundle{TrustDomain: td, JWTAuthorities: []bundle.JWTAuthority{{KeyID: "a", PublicKey: h.key.Public()}}}
	o := statuslist.Options{
		Hosts: []string{"status.example.org"},
		Bundles: func(of spiffeid.TrustDomain) *bundle.Bundle {
			if of == td {
				return h.bundle
			}
			return nil
		},
		Transport: h, Now: h.time,
	}
	for _, f := range change {
		f(&o)
	}
	var err error
	if h.checker, err = statuslist.NewChecker(o); err != nil {
		t.Fatal(err)
	}
	h.serves(h.token(nil, nil))
	return h
}

func (h *house) time() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

func (h *house) add(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
}

// RoundTrip is the network.
func (h *house) RoundTrip(r *http.Request) (*http.Response, error) {
	h.mu.Lock()
	h.asked = append(h.asked, r.URL.String())
	answer := h.answer
	h.mu.Unlock()
	return answer(r)
}

func (h *house) fetches() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.asked)
}

func (h *house) answers(f func(*http.Request) (*http.Response, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answer = f
}

func (h *house) serves(token string) { h.answers(response(200, statuslist.MediaType, token)) }

func response(code int, media, body string) func(*http.Request) (*http.Response, error) {
	return func(r *http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: code, Status: http.StatusText(code), Header: http.Header{"Content-Type": {media}, "Location": {"https://status.example.org/status/2"}}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
	}
}

// token is a status list token of 16 tokens, with some members changed; nil takes
// one out.
func (h *house) token(header, claims map[string]any) string {
	list, err := statuslist.New(2, 16)
	if err != nil {
		h.t.Fatal(err)
	}
	list.Set(revoked, statuslist.Invalid)
	list.Set(5, statuslist.Suspended)
	list.Set(6, 3)
	head := merged(map[string]any{"typ": "statuslist+jwt", "kid": "a"}, header)
	body := merged(map[string]any{
		"sub": uri, "iat": h.time().Unix(), "exp": h.time().Add(10 * time.Minute).Unix(), "ttl": 60,
		"status_list": map[string]any{"bits": 2, "lst": base64.RawURLEncoding.EncodeToString(list.Compress())},
	}, claims)
	return signed(h.t, h.key, jose.ES256, head, body)
}

func merged(of, with map[string]any) map[string]any {
	for name, value := range with {
		if of[name] = value; value == nil {
			delete(of, name)
		}
	}
	return of
}

func claims(uri string, index int) map[string]any {
	return map[string]any{"status": map[string]any{"status_list": map[string]any{"uri": uri, "idx": json.Number(jsonInt(index))}}}
}

func jsonInt(i int) string {
	b, _ := json.Marshal(i) // an int always encodes
	return string(b)
}

func (h *house) check(index int) error {
	return h.checker.Check(context.Background(), td, claims(uri, index))
}

func TestStatusList_SL06_SL07_ATokenIsRefusedUnlessItsStatusIsValid(t *testing.T) {
	h := newHouse(t)
	if err := h.check(valid); err != nil {
		t.Errorf("a valid one: %v", err)
	}
	for index, what := range map[int]string{revoked: "revoked", 5: "suspended", 6: "unknown"} {
		if err := h.check(index); !errors.Is(err, statuslist.ErrNotValid) || !strings.Contains(err.Error(), what) {
			t.Errorf("one that is %s: %v", what, err)
		}
	}
	if err := h.check(16); err == nil || errors.Is(err, statuslist.ErrNotValid) {
		t.Errorf("an index beyond the end: %v", err)
	}
	if n := h.fetches(); n != 1 {
		t.Errorf("the list was fetched %d times", n)
	}
}

func TestStatusList_SL06_ListsThatProveNothingAreRefused(t *testing.T) {
	for name, token := range map[string]func(*house) string{
		"no typ":           func(h *house) string { return h.token(map[string]any{"typ": nil}, nil) },
		"a JWT-SVID's typ": func(h *house) string { return h.token(map[string]any{"typ": "JWT"}, nil) },
		"critical members": func(h *house) string { return h.token(map[string]any{"crit": []string{"exp"}}, nil) },
		"no kid":           func(h *house) string { return h.token(map[string]any{"kid": nil}, nil) },
		"an unknown kid":   func(h *house) string { return h.token(map[string]any{"kid": "b"}, nil) },
		"another list":     func(h *house) string { return h.token(nil, map[string]any{"sub": uri + "0"}) },
		"no sub":           func(h *house) string { return h.token(nil, map[string]any{"sub": nil}) },
		"no iat":           func(h *house) string { return h.token(nil, map[string]any{"iat": nil}) },
		"iat to come":      func(h *house) string { return h.token(nil, map[string]any{"iat": start.Add(time.Hour).Unix()}) },
		"expired":          func(h *house) string { return h.token(nil, map[string]any{"exp": start.Add(-time.Minute).Unix()}) },
		"exp no number":    func(h *house) string { return h.token(nil, map[string]any{"exp": "tomorrow"}) },
		"ttl 0":            func(h *house) string { return h.token(nil, map[string]any{"ttl": 0}) },
		"ttl negative":     func(h *house) string { return h.token(nil, map[string]any{"ttl": -5}) },
		"ttl text":         func(h *house) string { return h.token(nil, map[string]any{"ttl": "60"}) },
		"no list":          func(h *house) string { return h.token(nil, map[string]any{"status_list": nil}) },
		"bits 3":           func(h *house) string { return h.token(nil, list(3, deflated([]byte{0, 0, 0, 0}))) },
		"a bomb of 64 MiB": func(h *house) string { return h.token(nil, list(1, bomb(64<<20))) },
		"lst with padding": func(h *house) string {
			return h.token(nil, map[string]any{"status_list": map[string]any{"bits": 1, "lst": base64.URLEncoding.EncodeToString(deflated([]byte{0, 0}))}})
		},
		"signed by another key": func(h *house) string {
			return signed(h.t, newKey(h.t), jose.ES256, map[string]any{"typ": "statuslist+jwt", "kid": "a"}, map[string]any{"sub": uri, "iat": start.Unix(), "status_list": list(1, deflated(make([]byte, 4)))["status_list"]})
		},
		"signed by a secret": func(h *house) string {
			return signed(h.t, bytes.Repeat([]byte{1}, 32), jose.HS256, map[string]any{"typ": "statuslist+jwt", "kid": "a"}, map[string]any{"sub": uri, "iat": start.Unix(), "status_list": list(1, deflated(make([]byte, 4)))["status_list"]})
		},
		"not signed": func(h *house) string {
			parts := strings.Split(h.token(nil, nil), ".")
			return base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"statuslist+jwt","kid":"a"}`)) + "." + parts[1] + "."
		},
		"changed": func(h *house) string {
			parts := strings.Split(h.token(nil, nil), ".")
			body, _ := base64.RawURLEncoding.DecodeString(parts[1])
			return parts[0] + "." + base64.RawURLEncoding.EncodeToString(bytes.Replace(body, []byte(`"bits":2`), []byte(`"bits":1`), 1)) + "." + parts[2]
		},
		"oversized": func(*house) string { return strings.Repeat("a", statuslist.MaxToken+1) },
		"empty":     func(*house) string { return "" },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			h.serves(token(h))
			if err := h.check(valid); !errors.Is(err, statuslist.ErrUnavailable) {
				t.Errorf("it was taken: %v", err)
			}
		})
	}
}

func list(bits int, compressed []byte) map[string]any {
	return map[string]any{"status_list": map[string]any{"bits": bits, "lst": base64.RawURLEncoding.EncodeToString(compressed)}}
}

func TestStatusList_SL04_SL09_AnswersThatAreNoListAreRefused(t *testing.T) {
	for name, answer := range map[string]func(h *house) func(*http.Request) (*http.Response, error){
		"not found": func(h *house) func(*http.Request) (*http.Response, error) {
			return response(404, statuslist.MediaType, h.token(nil, nil))
		},
		"a web page": func(h *house) func(*http.Request) (*http.Response, error) {
			return response(200, "text/html", h.token(nil, nil))
		},
		"a CWT": func(h *house) func(*http.Request) (*http.Response, error) {
			return response(200, "application/statuslist+cwt", h.token(nil, nil))
		},
		"nobody": func(*house) func(*http.Request) (*http.Response, error) {
			return func(*http.Request) (*http.Response, error) { return nil, errors.New("connection refused") }
		},
		"an endless body": func(*house) func(*http.Request) (*http.Response, error) {
			return func(r *http.Request) (*http.Response, error) {
				return &http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {statuslist.MediaType}}, Body: io.NopCloser(endless{}), Request: r}, nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			h.answers(answer(h))
			if err := h.check(valid); !errors.Is(err, statuslist.ErrUnavailable) {
				t.Errorf("it was taken: %v", err)
			}
			if n := h.fetches(); n != 1 {
				t.Errorf("%d requests were made: %q", n, h.asked)
			}
			if err := h.check(valid); !errors.Is(err, statuslist.ErrUnavailable) || h.fetches() != 1 {
				t.Errorf("the next asks again at once: %v, %d requests", err, h.fetches())
			}
			h.serves(h.token(nil, nil))
			h.add(3 * time.Second)
			if err := h.check(valid); err != nil {
				t.Errorf("it does not recover: %v", err)
			}
		})
	}
}

func TestStatusList_SL09_RedirectsAreFollowedALittleAndToAllowedHosts(t *testing.T) {
	for name, c := range map[string]struct {
		to      []string // by request; then the list
		refused string
		fetches int
	}{
		"another path":  {[]string{"/a"}, "", 2},
		"another host":  {[]string{"https://mirror.example.org/a", "https://status.example.org/b", "/c"}, "", 4},
		"a strange one": {[]string{"https://169.254.169.254/a"}, "none of those allowed", 1},
		"without TLS":   {[]string{"http://status.example.org/a"}, "not at an https URL", 1},
		"too many":      {[]string{"/a", "/b", "/c", "/d"}, "more than 3 times", 4},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t, func(o *statuslist.Options) { o.Hosts = append(o.Hosts, "mirror.example.org") })
			h.answers(func(r *http.Request) (*http.Response, error) {
				n := h.fetches() - 1
				if n >= len(c.to) {
					return response(200, statuslist.MediaType, h.token(nil, nil))(r)
				}
				return &http.Response{StatusCode: 302, Header: http.Header{"Location": {c.to[n]}}, Body: http.NoBody, Request: r}, nil
			})
			err := h.check(valid)
			if c.refused == "" && err != nil || c.refused != "" && (!errors.Is(err, statuslist.ErrUnavailable) || !strings.Contains(err.Error(), c.refused)) {
				t.Errorf("got %v, want %q", err, c.refused)
			}
			if n := h.fetches(); n != c.fetches {
				t.Errorf("%d requests were made, want %d: %q", n, c.fetches, h.asked)
			}
		})
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestStatusList_SL06_ATokensURIIsNoLever(t *testing.T) {
	h := newHouse(t)
	for _, uri := range []string{
		"http://status.example.org/status/1", "https://169.254.169.254/latest", "https://status.example.org:444/1",
		"https://status.example.org@evil.example/1", "https://user@status.example.org/1", "https://evil.example/status.example.org",
		"file:///etc/passwd", "//status.example.org/1", "status.example.org", "https:status.example.org", "https://STATUS.example.org/1",
		"https://status.example.org/1#2", "https://status.example.org.evil.example/1", "gopher://status.example.org/1", "http://127.0.0.1/1",
	} {
		if err := h.checker.Check(context.Background(), td, claims(uri, valid)); err == nil {
			t.Errorf("%s: it was taken", uri)
		}
	}
	if n := h.fetches(); n != 0 {
		t.Errorf("%d requests were made: %q", n, h.asked)
	}
	if err := h.checker.Check(context.Background(), spiffeid.RequireTrustDomainFromString("other.org"), claims(uri, valid)); err == nil || h.fetches() != 0 {
		t.Errorf("a trust domain without a bundle: %v", err)
	}
}

func TestStatusList_SL05_SL06_AListIsHeldForItsTTLAndNotBeyondItsEnd(t *testing.T) {
	h := newHouse(t)
	step := func(d time.Duration, want int) {
		t.Helper()
		h.add(d)
		if err := h.check(valid); err != nil {
			t.Fatal(err)
		}
		if n := h.fetches(); n != want {
			t.Errorf("%v in: fetched %d times, want %d", h.time().Sub(start), n, want)
		}
	}
	step(0, 1)
	step(59*time.Second, 1)
	h.serves(h.token(nil, map[string]any{"ttl": 3600, "exp": h.time().Add(30 * time.Second).Unix()}))
	step(time.Second, 2) // its ttl is over
	h.serves(h.token(nil, map[string]any{"ttl": nil, "exp": nil}))
	step(30*time.Second, 3) // its end
	step(59*time.Second, 3)
	h.serves(h.token(nil, nil))
	step(time.Second, 4) // without a ttl it is held for a minute
	// Another key signs, and the old one is in the bundle no more.
	next := newKey(t)
	h.key = next
	h.bundle = &bundle.Bundle{TrustDomain: td, JWTAuthorities: []bundle.JWTAuthority{{KeyID: "a", PublicKey: next.Public()}}}
	h.serves(h.token(nil, nil))
	step(0, 5)
}

func TestStatusList_SL09_WhatIsDoneWithoutAListIsChosen(t *testing.T) {
	away := func(*http.Request) (*http.Response, error) { return nil, errors.New("no route to host") }
	closed, open := newHouse(t), newHouse(t, func(o *statuslist.Options) { o.FailOpen = true })
	for _, h := range []*house{closed, open} {
		if err := h.check(revoked); !errors.Is(err, statuslist.ErrNotValid) {
			t.Fatal(err)
		}
		h.answers(away)
		h.add(2 * time.Minute) // beyond its ttl
	}
	if err := closed.check(valid); !errors.Is(err, statuslist.ErrUnavailable) {
		t.Errorf("closed, a valid token: %v", err)
	}
	if err := open.check(valid); err != nil {
		t.Errorf("open, a valid token: %v", err)
	}
	if err := open.check(revoked); !errors.Is(err, statuslist.ErrNotValid) {
		t.Errorf("open, a token that the last list revokes: %v", err)
	}
	if err := open.checker.Check(context.Background(), td, claims("https://status.example.org/2", 1)); err != nil {
		t.Errorf("open, a list that was never there: %v", err)
	}
	if err := open.checker.Check(context.Background(), td, claims("https://evil.example/2", 1)); err == nil {
		t.Error("open, a host that is not allowed: it was taken")
	}
	none := map[string]any{"sub": "spiffe://example.org/web"}
	if err := closed.checker.Check(context.Background(), td, none); !errors.Is(err, statuslist.ErrNoStatus) {
		t.Errorf("a token without status: %v", err)
	}
	if err := newHouse(t, func(o *statuslist.Options) { o.AllowNone = true }).checker.Check(context.Background(), td, none); err != nil {
		t.Errorf("a token without status, which is allowed: %v", err)
	}
}

func TestCallersShareOneFetchAndAFewListsAreHeld(t *testing.T) {
	h := newHouse(t)
	begun, goOn := make(chan struct{}), make(chan struct{})
	token := h.token(nil, nil)
	var once sync.Once
	h.answers(func(r *http.Request) (*http.Response, error) {
		once.Do(func() { close(begun) })
		<-goOn
		return response(200, statuslist.MediaType, token)(r)
	})
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if err := h.check(valid); err != nil {
				t.Error(err)
			}
		})
	}
	<-begun
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := h.checker.Check(ctx, td, claims(uri, valid)); !errors.Is(err, context.Canceled) {
		t.Errorf("one that does not wait: %v", err)
	}
	close(goOn)
	all.Wait()
	if n := h.fetches(); n != 1 {
		t.Errorf("50 callers made %d requests", n)
	}
	for i := range 64 { // others push it out
		_ = h.checker.Check(context.Background(), td, claims("https://status.example.org/other/"+jsonInt(i), 1)) // refused
	}
	before := h.fetches()
	if err := h.check(valid); err != nil || h.fetches() != before+1 {
		t.Errorf("after 64 others it is still held: %v", err)
	}
}

func TestACheckerNeedsHostsAndBundles(t *testing.T) {
	bundles := func(spiffeid.TrustDomain) *bundle.Bundle { return nil }
	for name, o := range map[string]statuslist.Options{
		"no hosts": {Bundles: bundles}, "an empty host": {Hosts: []string{""}, Bundles: bundles}, "no bundles": {Hosts: []string{"a"}},
	} {
		if _, err := statuslist.NewChecker(o); err == nil {
			t.Errorf("%s: it was made", name)
		}
	}
}

func FuzzVerify(f *testing.F) {
	key := newKey(f)
	b := &bundle.Bundle{TrustDomain: td, JWTAuthorities: []bundle.JWTAuthority{{KeyID: "a", PublicKey: key.Public()}}}
	f.Add([]byte(`{"sub":"` + uri + `","iat":1772366400,"exp":1772366500,"ttl":60,"status_list":{"bits":1,"lst":"eNrbuRgAAhcBXQ"}}`))
	f.Add([]byte(`{"sub":"` + uri + `","iat":0,"status_list":{"bits":2,"lst":"eNo76fITAAPfAgc","aggregation_uri":"x"}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		o := (&jose.SignerOptions{}).WithHeader("typ", "statuslist+jwt").WithHeader("kid", "a")
		signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, o)
		if err != nil {
			t.Fatal(err)
		}
		object, err := signer.Sign(payload)
		if err != nil {
			t.Fatal(err)
		}
		text, err := object.CompactSerialize()
		if err != nil {
			t.Fatal(err)
		}
		got, err := statuslist.Verify(text, uri, b, start)
		if err != nil {
			return
		}
		if got.List == nil || got.TTL < 0 || got.IssuedAt.After(start.Add(time.Minute)) || !got.ExpiresAt.IsZero() && got.ExpiresAt.Add(time.Minute).Before(start) {
			t.Fatalf("it was taken: %+v", got)
		}
	})
}
