package witsvid_test

import (
	"crypto"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/exp/bundle/witbundle"
	spiffewit "github.com/spiffe/go-spiffe/v2/exp/svid/witsvid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/witsvid"
)

// held is an SVID as the Workload API gives it, valid for an hour from now.
func held(alg jose.SignatureAlgorithm, key crypto.Signer) *spiffewit.SVID {
	s := must(spiffewit.ParseInsecure(good(func(m map[string]any) {
		m["cnf"] = cnf(jwkOf(key.Public(), alg))
		m["exp"] = time.Now().Add(time.Hour).Unix()
	})))
	s.PrivateKey = key
	return s
}

type svids func(spiffeid.ID) (*spiffewit.SVID, error)

func (f svids) GetWITSVIDForID(id spiffeid.ID) (*spiffewit.SVID, error) { return f(id) }

func always(s *spiffewit.SVID) svids {
	return func(spiffeid.ID) (*spiffewit.SVID, error) { return s, nil }
}

// service is an HTTPS server behind a verifier; it answers with the caller.
func service(t *testing.T, bundles witbundle.Source, tokens ...string) *httptest.Server {
	t.Helper()
	var h http.Handler
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(w, r) }))
	t.Cleanup(s.Close)
	v, err := witsvid.NewVerifier(witsvid.Config{Origins: []string{s.URL}, Bundles: bundles, Tokens: tokens})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/here", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/there", http.StatusTemporaryRedirect)
	})
	mux.HandleFunc("/to", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, r.URL.Query().Get("url"), http.StatusTemporaryRedirect)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(w, io.MultiReader(strings.NewReader(witsvid.FromContext(r.Context()).ID.String()), r.Body))
	})
	h = v.Handler(mux)
	return s
}

func client(s *httptest.Server, source spiffewit.Source, tokens ...string) *http.Client {
	return &http.Client{Transport: &witsvid.Transport{ID: web, SVIDs: source, Base: s.Client().Transport, Tokens: tokens}}
}

func do(t *testing.T, c *http.Client, r *http.Request) (status int, body string) {
	t.Helper()
	resp, err := c.Do(r)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	return resp.StatusCode, string(must(io.ReadAll(resp.Body)))
}

func get(t *testing.T, c *http.Client, url string) (int, string) {
	t.Helper()
	return do(t, c, must(http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)))
}

func TestWITSVID_W28_W31_W36_WM04_AClientProvesItselfForEachRequest(t *testing.T) {
	s := service(t, bundles)
	for alg, key := range map[jose.SignatureAlgorithm]crypto.Signer{
		jose.ES256: p256, jose.ES384: p384, jose.ES512: p521, jose.RS256: rsa2k, jose.PS384: rsa2k,
	} {
		c := client(s, always(held(alg, key)))
		for _, path := range []string{"", "/", "/a%2Fb/c;d?x=1", "/ü"} {
			if status, body := get(t, c, s.URL+path); status != 200 || body != web.String() {
				t.Errorf("%s %s: status %d: %s", alg, path, status, body)
			}
		}
	}
	c := client(s, always(held(jose.ES256, p256)))
	if status, body := get(t, c, s.URL+"/here"); status != 200 { // a redirect within the service
		t.Errorf("status %d: %s", status, body)
	}
	post := must(http.NewRequestWithContext(t.Context(), http.MethodPost, s.URL+"/here", strings.NewReader(" and a body")))
	if status, body := do(t, c, post); status != 200 || body != web.String()+" and a body" {
		t.Errorf("status %d: %s", status, body)
	}
	if len(post.Header) != 0 {
		t.Errorf("the transport has changed its caller's request: %v", post.Header)
	}
}

func TestWITSVID_W29_W30_AClientSendsNoTokenAsABearer(t *testing.T) {
	s, svid := service(t, bundles), held(jose.ES256, p256)
	r := must(http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL, http.NoBody))
	r.Header.Set("Authorization", "Bearer "+svid.Marshal())
	if status, body := do(t, client(s, always(svid)), r); status != 0 || !strings.Contains(body, "no bearer token") {
		t.Errorf("status %d: %s", status, body)
	}
}

// sent keeps the last request that would have been sent.
type sent struct{ r *http.Request }

func (s *sent) RoundTrip(r *http.Request) (*http.Response, error) {
	s.r = r
	return nil, errors.New("not sent")
}

func claimsOf(t *testing.T, token string) (header, claims map[string]any) {
	t.Helper()
	parts := strings.Split(token, ".")
	for i, to := range []*map[string]any{&header, &claims} {
		if err := json.Unmarshal(must(base64.RawURLEncoding.DecodeString(parts[i])), to); err != nil {
			t.Fatal(err)
		}
	}
	return header, claims
}

func TestWITSVID_W37_W38_WM06_WM07_WhatAProofSays(t *testing.T) {
	svid := held(jose.PS256, rsa2k)
	var last sent
	c := &http.Client{Transport: &witsvid.Transport{ID: web, SVIDs: always(svid), Base: &last, Tokens: []string{"X-User", "X-Other"}}}
	once := func(bearer string) (header, claims map[string]any) {
		r := must(http.NewRequestWithContext(t.Context(), http.MethodGet, "https://API.example.org:443/a/b?c#d", http.NoBody))
		if bearer != "" {
			r.Header.Set("Authorization", "Bearer "+bearer)
			r.Header.Set("Txn-Token", "txn")
			r.Header.Set("X-User", "ann")
			r.Header.Set("X-Odd", "unbound")
		}
		do(t, c, r)
		if got := last.r.Header.Values(witsvid.TokenHeader); len(got) != 1 || got[0] != svid.Marshal() {
			t.Errorf("the token is %q", got)
		}
		return claimsOf(t, last.r.Header.Get(witsvid.ProofHeader))
	}
	header, claims := once("")
	if len(header) != 2 || header["alg"] != "PS256" || header["typ"] != "wpt+jwt" {
		t.Errorf("header %v", header)
	}
	if len(claims) != 4 || claims["aud"] != origin+"/a/b" || claims["wth"] != hash(svid.Marshal()) {
		t.Errorf("claims %v", claims)
	}
	if left := time.Until(time.Unix(int64(claims["exp"].(float64)), 0)); left <= 0 || left > time.Minute {
		t.Errorf("it is valid for %v", left)
	}
	_, again := once("access")
	if id := claims["jti"].(string); len(id) < 22 || id == again["jti"] { // 128 bits in base64url
		t.Errorf("jti %q, then %q", id, again["jti"])
	}
	oth, _ := again["oth"].(map[string]any)
	if again["ath"] != hash("access") || again["tth"] != hash("txn") || len(oth) != 1 || oth["x-user"] != hash("ann") {
		t.Errorf("claims %v", again)
	}
}

func TestWITSVID_WM07_FurtherTokensAreBoundEndToEnd(t *testing.T) {
	s := service(t, bundles, "x-user")
	c := client(s, always(held(jose.ES256, p256)), "X-User")
	r := must(http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL, http.NoBody))
	r.Header.Set("Authorization", "Bearer access")
	r.Header.Set("Txn-Token", "txn")
	r.Header.Set("X-User", "ann")
	if status, body := do(t, c, r); status != 200 {
		t.Errorf("status %d: %s", status, body)
	}
	r.Header.Add("X-User", "eve")
	if status, body := do(t, c, r); status != 0 || !strings.Contains(body, "2 fields") {
		t.Errorf("status %d: %s", status, body)
	}
}

func TestWITSVID_W40_WM04_AClientProvesItselfToAuthenticatedServersAlone(t *testing.T) {
	s, source := service(t, bundles), always(held(jose.ES256, p256))
	plain := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a request came over plain HTTP") }))
	t.Cleanup(plain.Close)
	elsewhere := service(t, bundles)
	for says, c := range map[string]struct {
		base http.RoundTripper
		url  string
	}{
		"over https alone":       {nil, plain.URL},
		`redirected from "127`:   {s.Client().Transport, s.URL + "/to?url=" + url.QueryEscape(plain.URL)},
		"redirected from":        {s.Client().Transport, s.URL + "/to?url=" + url.QueryEscape(elsewhere.URL)},
		"certificate":            {nil, s.URL},
		"verifies no server":     {&http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, s.URL},
		"the URL has user info":  {s.Client().Transport, strings.Replace(s.URL, "https://", "https://u:p@", 1)},
		"cannot verify this one": {&http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(tls.ConnectionState) error { return errors.New("cannot verify this one") }}}, s.URL},
	} {
		c, url := &http.Client{Transport: &witsvid.Transport{ID: web, SVIDs: source, Base: c.base}}, c.url
		if status, body := get(t, c, url); status != 0 || !strings.Contains(body, says) {
			t.Errorf("status %d: %s; want %q", status, body, says)
		}
	}
}

func TestWITSVID_AClientWithoutAUsableSVIDSendsNothing(t *testing.T) {
	expired := held(jose.ES256, p256)
	expired.Expiry = time.Now().Add(-time.Second)
	keyless, mismatched, foreign := held(jose.ES256, p256), held(jose.ES256, p256), held(jose.ES256, p256)
	keyless.PrivateKey, mismatched.PrivateKey = nil, second
	foreign.ID = spiffeid.RequireFromPath(td, "/admin")
	for says, source := range map[string]spiffewit.Source{
		"no source":             nil,
		"expired at":            always(expired),
		"without its private":   always(keyless),
		"is not that of its":    always(mismatched),
		"gave that of":          always(foreign),
		"it was taken from you": svids(func(spiffeid.ID) (*spiffewit.SVID, error) { return nil, errors.New("it was taken from you") }),
	} {
		var last sent
		c := &http.Client{Transport: &witsvid.Transport{ID: web, SVIDs: source, Base: &last}}
		if status, body := get(t, c, origin); status != 0 || !strings.Contains(body, says) || last.r != nil {
			t.Errorf("status %d: %s; want %q", status, body, says)
		}
	}
}
