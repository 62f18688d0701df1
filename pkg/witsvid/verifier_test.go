package witsvid_test

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/hallmark-id/hallmark/pkg/witsvid"
)

const (
	origin      = "https://api.example.org"
	proofHeader = `{"alg":"ES256","typ":"wpt+jwt"}`
)

func verifier(t testing.TB, change func(*witsvid.Config)) *witsvid.Verifier {
	t.Helper()
	c := witsvid.Config{Origins: []string{origin}, Bundles: bundles, Now: func() time.Time { return now }}
	if change != nil {
		change(&c)
	}
	v, err := witsvid.NewVerifier(c)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

var serial int

// proofClaims are those of a right proof for POST /orders with a WIT-SVID.
func proofClaims(wit string, change func(map[string]any)) string {
	serial++
	m := map[string]any{"aud": origin + "/orders", "exp": now.Add(time.Minute).Unix(), "jti": fmt.Sprint("proof ", serial), "wth": hash(wit)}
	if change != nil {
		change(m)
	}
	return string(must(json.Marshal(m)))
}

func proof(key *ecdsa.PrivateKey, header, payload string) string {
	return signed(jose.ES256, key, header, payload)
}

// request is one over TLS as a server sees it.
func request(wit, proof string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/orders?sort=asc", http.NoBody)
	r.TLS = &tls.ConnectionState{}
	if wit != "" {
		r.Header.Set(witsvid.TokenHeader, wit)
	}
	if proof != "" {
		r.Header.Set(witsvid.ProofHeader, proof)
	}
	return r
}

// proven is a request with a WIT-SVID and a proof whose claims are changed.
func proven(change func(map[string]any)) *http.Request {
	wit := good(nil)
	return request(wit, proof(p256, proofHeader, proofClaims(wit, change)))
}

func letIn(t *testing.T, v *witsvid.Verifier, r *http.Request) {
	t.Helper()
	if s, err := v.Verify(r); err != nil {
		t.Errorf("refused: %v", err)
	} else if s.ID != web {
		t.Errorf("let in as %v", s.ID)
	}
}

func keptOut(t *testing.T, v *witsvid.Verifier, r *http.Request, says string) {
	t.Helper()
	if s, err := v.Verify(r); err == nil {
		t.Errorf("let in: %+v", s)
	} else if !strings.Contains(err.Error(), says) {
		t.Errorf("error is %q, want one that says %q", err, says)
	}
}

func TestWITSVID_W27_W28_W29_W30_WM04_ATokenWithoutItsProofIsNothing(t *testing.T) {
	v, wit := verifier(t, nil), good(nil)
	keptOut(t, v, request(wit, ""), "no field Workload-Proof-Token")
	keptOut(t, v, request("", proof(p256, proofHeader, proofClaims(wit, nil))), "no field Workload-Identity-Token")
	for _, value := range []string{"Bearer " + wit, "bearer  " + wit, "DPoP " + wit, wit, "Token " + wit, "Bearer " + token(second, goodHeader, `{}`), "Bearer " + token(authority, `{"typ":"application/WIT+JWT"}`, `{}`)} {
		for _, r := range []*http.Request{request("", ""), proven(nil)} { // alone, and beside what is right
			r.Header.Set("Authorization", value)
			keptOut(t, v, r, "no bearer token")
		}
	}
	keptOut(t, v, request(wit, wit), "type")
	letIn(t, v, proven(nil))
}

func TestWITSVID_W15_W16_ATokenIsUsedAgainWithANewProof(t *testing.T) {
	v, wit := verifier(t, nil), good(set("jti", "always the same"))
	for range 3 {
		letIn(t, v, request(wit, proof(p256, proofHeader, proofClaims(wit, nil))))
	}
}

func TestWITSVID_W20_TheLifetimeMayBeBounded(t *testing.T) {
	v := verifier(t, func(c *witsvid.Config) { c.MaxLifetime = time.Hour })
	with := func(change func(map[string]any)) *http.Request {
		wit := good(change)
		return request(wit, proof(p256, proofHeader, proofClaims(wit, nil)))
	}
	letIn(t, v, with(nil))
	letIn(t, v, with(set("nbf", now.Unix())))
	keptOut(t, v, with(set("nbf", now.Unix()-1)), "valid for 1h0m1s")
	keptOut(t, v, with(set("exp", now.Add(time.Hour+time.Second).Unix())), "valid for 1h0m1s")
}

func TestWITSVID_W36_WM08_WM11_TheProofIsForThisServiceAndPath(t *testing.T) {
	v := verifier(t, func(c *witsvid.Config) { c.Origins = []string{origin, "https://10.0.0.7:8443"} })
	for _, aud := range []any{
		origin + "/orders", "HTTPS://API.example.org:443/orders", origin + "/orders?x=1#y", []string{origin + "/orders"}, "https://10.0.0.7:8443/orders",
	} {
		letIn(t, v, proven(set("aud", aud)))
	}
	for _, aud := range []any{
		nil, "", 7, []string{}, []string{origin + "/orders", "https://evil.example/orders"},
		origin, origin + "/", origin + "/order", origin + "/orders/", origin + "//orders", origin + "/%6frders", origin + "/x/../orders", "/orders",
		"http://api.example.org/orders", "https://evil.example/orders", "https://api.example.org:8443/orders", "https://api.example.org.evil.example/orders",
		"https://evil.example@api.example.org/orders", "spiffe://example.org/api", "https:orders", "https://10.0.0.7/orders", "%",
	} {
		keptOut(t, v, proven(set("aud", aud)), "aud")
	}
	// What the request says of its own host counts for nothing.
	evil := proven(set("aud", "https://evil.example/orders"))
	evil.Host, evil.RequestURI = "evil.example", "https://evil.example/orders"
	keptOut(t, v, evil, "another service")
	right := proven(nil)
	right.Host, right.RequestURI = "evil.example", "https://evil.example/orders"
	letIn(t, v, right)
	// Nor does what a handler before this one made of the path.
	stripped := proven(set("aud", origin+"/v1/orders"))
	stripped.RequestURI = "/v1/orders"
	letIn(t, v, stripped)
	moved := proven(nil)
	moved.RequestURI = "/v1/orders"
	keptOut(t, v, moved, "another path")
	star := proven(set("aud", origin))
	star.RequestURI = "*"
	keptOut(t, v, star, "another path")
}

func TestWITSVID_WM08_ThereIsOneOfEachFieldAndTheProofIsSound(t *testing.T) {
	v, wit := verifier(t, nil), good(nil)
	for _, name := range []string{witsvid.TokenHeader, witsvid.ProofHeader} {
		r := proven(nil)
		r.Header.Add(name, r.Header.Get(name))
		keptOut(t, v, r, "2 fields "+name)
		r = proven(nil)
		r.Header.Set(name, r.Header.Get(name)+", "+r.Header.Get(name))
		keptOut(t, v, r, name)
	}
	for _, c := range []struct{ proof, says string }{
		{"x", "three"},
		{proof(second, proofHeader, proofClaims(wit, nil)), "signature"},
		{proof(authority, proofHeader, proofClaims(wit, nil)), "signature"},
		{proof(p256, `{"alg":"ES256","typ":"JWT"}`, proofClaims(wit, nil)), "type"},
		{proof(p256, `{"alg":"ES256"}`, proofClaims(wit, nil)), "type"},
		{proof(p256, `{"alg":"none","typ":"wpt+jwt"}`, proofClaims(wit, nil)), "not allowed"},
		{proof(p256, `{"alg":"ES384","typ":"wpt+jwt"}`, proofClaims(wit, nil)), "algorithm is ES384, and ES256"},
		{proof(p256, `{"alg":"ES256","typ":"wpt+jwt","crit":["x"],"x":1}`, proofClaims(wit, nil)), "critical"},
		{proof(p256, proofHeader, proofClaims(wit, nil)+"x"), "JSON"},
		{strings.Repeat("a", witsvid.MaxToken+1), "bytes long"},
	} {
		keptOut(t, v, request(wit, c.proof), c.says)
	}
	pss := good(set("cnf", cnf(jwkOf(rsa2k.Public(), jose.PS256))))
	letIn(t, v, request(pss, signed(jose.PS256, rsa2k, `{"alg":"PS256","typ":"wpt+jwt"}`, proofClaims(pss, nil))))
	keptOut(t, v, request(pss, signed(jose.RS256, rsa2k, `{"alg":"RS256","typ":"wpt+jwt"}`, proofClaims(pss, nil))), "algorithm is RS256, and PS256")
	expired := good(set("exp", now.Add(-time.Hour).Unix()))
	keptOut(t, v, request(expired, proof(p256, proofHeader, proofClaims(expired, nil))), "Workload-Identity-Token: the token expired")
}

func TestWITSVID_WM09_TheProofIsOfThisTokenAndOfTheOthersInTheRequest(t *testing.T) {
	v := verifier(t, func(c *witsvid.Config) { c.Tokens = []string{"X-User"} })
	swapped := proven(nil)
	swapped.Header.Set(witsvid.TokenHeader, good(set("sub", "spiffe://example.org/admin"))) // of the same key
	keptOut(t, v, swapped, "wth")
	for _, wth := range []any{nil, "", 7, hash("x")} {
		keptOut(t, v, proven(set("wth", wth)), "wth")
	}
	with := func(field, value string, change func(map[string]any)) *http.Request {
		r := proven(change)
		r.Header.Set(field, value)
		return r
	}
	letIn(t, v, with("Authorization", "Bearer abc", set("ath", hash("abc"))))
	keptOut(t, v, with("Authorization", "Bearer abc", nil), "ath")
	keptOut(t, v, with("Authorization", "dpop abd", set("ath", hash("abc"))), "ath")
	keptOut(t, v, proven(set("ath", hash("abc"))), "ath")
	keptOut(t, v, proven(set("ath", "")), "ath")
	letIn(t, v, with("Txn-Token", "abc", set("tth", hash("abc"))))
	keptOut(t, v, with("Txn-Token", "abc", nil), "tth")
	keptOut(t, v, proven(set("tth", hash("abc"))), "tth")

	oth := func(m map[string]any) func(map[string]any) { return set("oth", m) }
	letIn(t, v, with("X-User", "ann", oth(map[string]any{"x-user": hash("ann")})))
	letIn(t, v, proven(oth(map[string]any{})))
	keptOut(t, v, with("X-User", "ann", nil), "oth")
	keptOut(t, v, with("X-User", "eve", oth(map[string]any{"x-user": hash("ann")})), "oth")
	keptOut(t, v, with("X-User", "ann", oth(map[string]any{"x-user": hash("ann"), "x-odd": hash("1")})), "not known")
	keptOut(t, v, proven(oth(map[string]any{"x-user": hash("ann")})), "not in the request")
	keptOut(t, v, proven(set("oth", "x")), "oth")
	for field, value := range map[string]string{"X-User": "ann", "Txn-Token": "abc", "Authorization": "Bearer abc"} {
		twice := with(field, value, nil)
		twice.Header.Add(field, value)
		keptOut(t, v, twice, "2 fields")
	}
}

func TestWITSVID_W37_WM10_AProofIsShortLived(t *testing.T) {
	v := verifier(t, nil)
	for _, c := range []struct {
		exp  any
		says string
	}{
		{nil, "exp"}, {"soon", "exp"},
		{now.Add(-time.Minute).Unix(), "expired"}, {now.Add(-witsvid.Leeway).Unix(), "expired"},
		{now.Add(time.Hour).Unix(), "valid for"},
		{now.Add(witsvid.MaxProofLifetime + witsvid.Leeway + time.Second).Unix(), "valid for"},
	} {
		keptOut(t, v, proven(set("exp", c.exp)), c.says)
	}
	letIn(t, v, proven(set("exp", now.Add(time.Second).Unix())))
	letIn(t, v, proven(set("exp", now.Add(witsvid.MaxProofLifetime).Unix())))
	keptOut(t, v, proven(set("nbf", now.Add(time.Minute).Unix())), "not valid before")
}

func TestWITSVID_W39_WM10_AProofWorksOnceUntilItIsForgottenAsExpired(t *testing.T) {
	at := now
	v := verifier(t, func(c *witsvid.Config) { c.Now = func() time.Time { return at } })
	r := proven(nil)
	letIn(t, v, r)
	for _, later := range []time.Duration{0, time.Second, time.Minute, time.Minute + witsvid.Leeway - time.Second} {
		at = now.Add(later)
		keptOut(t, v, r, "used before")
	}
	at = now.Add(time.Minute + witsvid.Leeway)
	keptOut(t, v, r, "expired")
	letIn(t, v, proven(set("exp", at.Add(time.Minute).Unix()))) // sweeps
	at = now
	keptOut(t, v, r, "used before") // though the clock was set back
	for _, jti := range []any{nil, "", 7, strings.Repeat("j", 257)} {
		keptOut(t, v, proven(set("jti", jti)), "jti")
	}
	// Another's proof may have the same ID.
	at = now.Add(2 * time.Minute)
	for _, wit := range []string{good(set("sub", "spiffe://example.org/a")), good(set("sub", "spiffe://example.org/b"))} {
		if _, err := v.Verify(request(wit, proof(p256, proofHeader, proofClaims(wit, func(m map[string]any) {
			m["jti"], m["exp"] = "same", at.Add(time.Minute).Unix()
		})))); err != nil {
			t.Error(err)
		}
	}
}

func TestWITSVID_W39_OfManyAtOnceOneGetsIn(t *testing.T) {
	v, r := verifier(t, nil), proven(nil)
	var in sync.Map
	var all sync.WaitGroup
	for i := range 16 {
		all.Go(func() {
			if _, err := v.Verify(r); err == nil {
				in.Store(i, true)
			}
		})
	}
	all.Wait()
	n := 0
	in.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d got in", n)
	}
}

func TestWITSVID_W39_TheMemoryOfProofsIsBoundedAndNobodysAlone(t *testing.T) {
	at := now
	v := verifier(t, func(c *witsvid.Config) {
		c.MaxProofs = 4
		c.Now = func() time.Time { return at }
	})
	letIn(t, v, proven(nil))
	letIn(t, v, proven(nil))
	if _, err := v.Verify(proven(nil)); !errors.Is(err, witsvid.ErrBusy) {
		t.Errorf("error is %v", err)
	}
	w := httptest.NewRecorder()
	v.Handler(http.NotFoundHandler()).ServeHTTP(w, proven(nil))
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("status %d, Retry-After %q", w.Code, w.Header().Get("Retry-After"))
	}
	keptOut(t, v, request(good(nil), proof(second, proofHeader, proofClaims(good(nil), nil))), "signature") // wrong ones take no room
	other := good(set("sub", "spiffe://example.org/other"))
	if _, err := v.Verify(request(other, proof(p256, proofHeader, proofClaims(other, nil)))); err != nil {
		t.Errorf("another caller is shut out: %v", err)
	}
	at = now.Add(2 * time.Minute)
	letIn(t, v, proven(set("exp", at.Add(time.Minute).Unix())))
}

func TestWITSVID_W40_TokensCountOverTLSAlone(t *testing.T) {
	r := proven(nil)
	r.TLS = nil
	keptOut(t, verifier(t, nil), r, "TLS")
	letIn(t, verifier(t, func(c *witsvid.Config) { c.BehindTLSProxy = true }), r)
}

func TestWITSVID_WM12_ABadRequestIsAnsweredWith400AndTheReason(t *testing.T) {
	reached := 0
	h := verifier(t, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached++
		fmt.Fprint(w, witsvid.FromContext(r.Context()).ID)
	}))
	for _, c := range []struct {
		r      *http.Request
		status int
		says   string
	}{
		{proven(nil), 200, web.String()},
		{request("", ""), 400, "no field Workload-Identity-Token"},
		{proven(set("wth", "x")), 400, "Workload-Proof-Token: claim wth"},
	} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, c.r)
		if w.Code != c.status || !strings.Contains(w.Body.String(), c.says) || w.Header().Get("WWW-Authenticate") != "" {
			t.Errorf("status %d, %q; want %d, %q", w.Code, w.Body, c.status, c.says)
		}
	}
	if reached != 1 {
		t.Errorf("the handler was reached %d times", reached)
	}
	if s := witsvid.FromContext(t.Context()); s != nil {
		t.Errorf("nobody is %v", s)
	}
}

func TestAVerifierThatCannotWorkIsNotMade(t *testing.T) {
	for says, change := range map[string]func(*witsvid.Config){
		"bundles":   func(c *witsvid.Config) { c.Bundles = nil },
		"origins":   func(c *witsvid.Config) { c.Origins = nil },
		`"http"`:    func(c *witsvid.Config) { c.Origins = []string{"http://api.example.org"} },
		"no host":   func(c *witsvid.Config) { c.Origins = []string{"https://:443"} },
		"user":      func(c *witsvid.Config) { c.Origins = []string{"https://u@api.example.org"} },
		"more than": func(c *witsvid.Config) { c.Origins = []string{origin, origin + "/"} },
		"than":      func(c *witsvid.Config) { c.Origins = []string{origin + "?"} },
		"negative":  func(c *witsvid.Config) { c.MaxProofs = -1 },
		"another":   func(c *witsvid.Config) { c.Tokens = []string{"authorization"} },
	} {
		c := witsvid.Config{Origins: []string{origin}, Bundles: bundles}
		change(&c)
		if _, err := witsvid.NewVerifier(c); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("error is %v, want one that says %q", err, says)
		}
	}
}

// FuzzProof mutates header and claims of a proof under a valid signature.
func FuzzProof(f *testing.F) {
	wit := good(nil)
	f.Add(proofHeader, proofClaims(wit, nil))
	f.Add(proofHeader, proofClaims(wit, set("oth", map[string]any{"x-user": hash("ann")})))
	f.Add(`{"alg":"ES256","typ":"wpt+jwt","x":1}`, proofClaims(wit, set("aud", []string{origin + "/orders?x"})))
	f.Fuzz(func(t *testing.T, header, payload string) {
		r := request(wit, proof(p256, header, payload))
		r.Header.Set("X-User", "ann")
		v := verifier(t, func(c *witsvid.Config) { c.Tokens = []string{"X-User"} })
		if _, err := v.Verify(r); err != nil {
			return
		}
		var m struct {
			WTH string            `json:"wth"`
			Oth map[string]string `json:"oth"`
		}
		if err := json.Unmarshal([]byte(payload), &m); err != nil || m.WTH != hash(wit) || m.Oth["x-user"] != hash("ann") {
			t.Errorf("let in with %q", payload)
		}
		if _, err := v.Verify(r); err == nil {
			t.Errorf("let in twice with %q", payload)
		}
	})
}

// FuzzRequest mutates what of a request is a caller's to choose.
func FuzzRequest(f *testing.F) {
	f.Add("/orders", "Bearer abc", "x", "y")
	f.Add("*", good(nil), good(nil), "a.b.c")
	f.Fuzz(func(t *testing.T, uri, authorization, wit, proof string) {
		r := request(wit, proof)
		r.RequestURI = uri
		r.Header.Set("Authorization", authorization)
		if s, err := verifier(t, nil).Verify(r); err == nil {
			t.Errorf("let in as %v", s.ID)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	requests := make([]*http.Request, 4096)
	for i := range requests {
		requests[i] = proven(nil)
	}
	var v *witsvid.Verifier
	for i := 0; b.Loop(); i++ {
		if i%len(requests) == 0 {
			v = verifier(b, nil) // which has seen none of them
		}
		if _, err := v.Verify(requests[i%len(requests)]); err != nil {
			b.Fatal(err)
		}
	}
}
