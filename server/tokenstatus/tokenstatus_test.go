package tokenstatus_test

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/pkg/statuslist"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/revocation"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/server/tokenstatus"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

const ttl = 30 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// house is a server's issuer, journal and status lists over a store.
type house struct {
	t           testing.TB
	registry    *registry.Registry
	authorities *authority.Authorities
	journal     *journal.Journal
	issuer      *issue.Issuer
	lists       *tokenstatus.Lists
	handler     http.Handler
}

func memoryStore(t testing.TB) store.Store {
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	return db
}

func newJournal(t testing.TB) *journal.Journal {
	t.Helper()
	j, err := journal.Open("", nil, nil)
	must(t, err)
	return j
}

// open starts a server of a name over a store; everything ends with end.
func open(t testing.TB, db store.Store, keys apiv1.KeyManager, issued *journal.Journal, name string, change ...func(*authority.Options)) (h *house, end func()) {
	t.Helper()
	reg, err := registry.Open(t.Context(), registry.Options{Store: db, TrustDomain: td})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{}, 2)
	go func() { _ = reg.Run(ctx); done <- struct{}{} }()
	o := authority.Options{Registry: reg, Keys: keys, TrustDomain: td, Server: name, WIT: true}
	for _, f := range change {
		f(&o)
	}
	authorities, err := authority.Open(t.Context(), o)
	must(t, err)
	lists := tokenstatus.New(tokenstatus.Options{Registry: reg, Server: name, Journal: issued, URL: "https://" + name + ".example.org" + tokenstatus.Path})
	issuer := issue.New(issue.Options{TrustDomain: td, Authorities: authorities, Journal: issued, Status: lists})
	go func() { _ = lists.Run(ctx); done <- struct{}{} }()
	return &house{
		t: t, registry: reg, authorities: authorities, journal: issued, issuer: issuer, lists: lists,
		handler: tokenstatus.Handler(tokenstatus.HandlerOptions{View: reg.View, Active: authorities.JWT, Sign: issuer.StatusList, TTL: ttl}),
	}, func() { cancel(); <-done; <-done }
}

// jwt issues a JWT-SVID, through an agent if one is named, and returns its
// reference.
func (h *house) jwt(path, through string) statuslist.Reference {
	h.t.Helper()
	ctx := h.t.Context()
	if through != "" {
		ctx = issue.Through(ctx, spiffeid.RequireFromPath(td, through))
	}
	e := &entry.Entry{ID: path, SPIFFEID: spiffeid.RequireFromPath(td, path), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/a"), Selectors: selector.Set{{Type: "unix", Value: "uid:1"}}}
	svid, err := h.issuer.WorkloadJWT(ctx, e, []string{"api"})
	must(h.t, err)
	return reference(h.t, svid.Token)
}

func reference(t testing.TB, token string) statuslist.Reference {
	t.Helper()
	ref, ok, err := statuslist.ReferenceOf(claimsOf(t, token))
	if err != nil || !ok {
		t.Fatalf("the token has no status: %v", err)
	}
	return ref
}

func claimsOf(t testing.TB, token string) (claims map[string]any) {
	t.Helper()
	body, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[1])
	must(t, err)
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	must(t, d.Decode(&claims))
	return claims
}

// revoke revokes something at a server, and waits until all lists have it.
func (h *house) revoke(r *registry.Revocation) {
	h.t.Helper()
	r.RevokedAt = time.Now()
	r.EndsAt = revocation.EndOf(h.registry.View(), h.journal, r, time.Now())
	view, err := h.registry.Revoke(h.t.Context(), []*registry.Revocation{r})
	must(h.t, err)
	h.covered(r, view.Revocation(r).Revision())
}

func (h *house) covered(r *registry.Revocation, revision store.Revision) {
	h.t.Helper()
	for {
		changed, all := h.registry.Changed(), true
		for l := range h.registry.View().StatusLists() {
			all = all && tokenstatus.Covered(l, r, revision)
		}
		if all {
			return
		}
		select {
		case <-changed:
		case <-h.t.Context().Done():
			h.t.Fatal("the status lists do not come")
		}
	}
}

func (h *house) get(uri string, header ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, uri, nil)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	rec := httptest.NewRecorder()
	h.handler.ServeHTTP(rec, req)
	return rec
}

// status returns the status of a token, as a relying party that has no code of
// hallmark's reads it off this server: by go-jose and the standard library.
func (h *house) status(ref statuslist.Reference) byte {
	h.t.Helper()
	rec := h.get(ref.URI)
	if rec.Code != http.StatusOK {
		h.t.Fatalf("GET %s: %d %s", ref.URI, rec.Code, rec.Body)
	}
	object, err := jose.ParseSignedCompact(rec.Body.String(), []jose.SignatureAlgorithm{jose.ES256})
	must(h.t, err)
	payload, err := object.Verify(h.registry.View().Bundle(td).JWTKey(object.Signatures[0].Header.KeyID))
	must(h.t, err)
	var claims struct {
		Sub           string
		Iat, Exp, TTL int64
		StatusList    struct {
			Bits int
			Lst  string
		} `json:"status_list"`
	}
	must(h.t, json.Unmarshal(payload, &claims))
	now := time.Now().Unix()
	if claims.Sub != ref.URI || claims.Iat > now || claims.Exp <= now || claims.TTL != int64(ttl/time.Second) || claims.StatusList.Bits != 1 || object.Signatures[0].Header.ExtraHeaders["typ"] != "statuslist+jwt" {
		h.t.Errorf("the list token is %s, %v", payload, object.Signatures[0].Header)
	}
	compressed, err := base64.RawURLEncoding.DecodeString(claims.StatusList.Lst)
	must(h.t, err)
	z, err := zlib.NewReader(bytes.NewReader(compressed))
	must(h.t, err)
	list, err := io.ReadAll(z)
	must(h.t, err)
	return list[ref.Index/8] >> (ref.Index % 8) & 1
}

func (h *house) expect(what string, ref statuslist.Reference, want byte) {
	h.t.Helper()
	if got := h.status(ref); got != want {
		h.t.Errorf("%s: its status is %d, want %d", what, got, want)
	}
}

func serialOf(t testing.TB, ref statuslist.Reference) []byte {
	t.Helper()
	serial, ok := ref.Serial()
	if !ok {
		t.Fatalf("%v has no serial number", ref)
	}
	return serial[:]
}

func TestStatusList_SL01_SL02_SL03_SL12_TokensAreRevokedByNameIdentityAndAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		defer db.Close()
		h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one")
		defer end()
		first, second, through, other := h.jwt("/a", ""), h.jwt("/a", ""), h.jwt("/b", "/spire/agent/x"), h.jwt("/c", "/spire/agent/y")
		for _, ref := range []statuslist.Reference{first, second, through, other} {
			h.expect("before anything is revoked", ref, 0)
			if ref.URI != first.URI {
				t.Errorf("tokens of one server are in lists %s and %s", first.URI, ref.URI)
			}
		}
		h.revoke(&registry.Revocation{SerialNumber: serialOf(t, first)})
		h.expect("the token that was named", first, 1)
		h.expect("another of the same identity", second, 0)
		h.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/a")})
		h.expect("another of an identity that was revoked", second, 1)
		h.expect("one of the identity that was issued later", h.jwt("/a", ""), 0)
		h.revoke(&registry.Revocation{Node: spiffeid.RequireFromPath(td, "/spire/agent/x")})
		h.expect("one through an agent that was revoked", through, 1)
		h.expect("one through another agent", other, 0)
	})
}

func TestStatusList_SL01_AWITSVIDHasAStatusAndItsJTINamesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		defer db.Close()
		h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one")
		defer end()
		signer, err := h.authorities.JWT() // any public key will do
		must(t, err)
		svid, err := h.issuer.MintWIT(t.Context(), spiffeid.RequireFromPath(td, "/wit"), issue.WITKey{PKIX: pkix(t, signer.Signer.Public()), Algorithm: "ES256"}, 0)
		must(t, err)
		ref := reference(t, svid.Token)
		jti, err := base64.RawURLEncoding.DecodeString(claimsOf(t, svid.Token)["jti"].(string))
		if err != nil || !bytes.Equal(jti, serialOf(t, ref)) {
			t.Errorf("jti %x, serial number %x", jti, serialOf(t, ref))
		}
		h.expect("before", ref, 0)
		h.revoke(&registry.Revocation{SerialNumber: jti})
		h.expect("after", ref, 1)
	})
}

// TestStatusList_SL08_NoPlaceIsGivenOutTwice restarts a server, and sets its store
// back to what it was.
func TestStatusList_SL08_NoPlaceIsGivenOutTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, keys, issued := memoryStore(t), authority.NewMemoryKeys(), newJournal(t)
		defer db.Close()
		seen := make(map[statuslist.Reference]bool)
		ascending := 0
		for range 3 {
			h, end := open(t, db, keys, issued, "one")
			last := statuslist.Reference{}
			for range 300 {
				ref := h.jwt("/a", "")
				if seen[ref] {
					t.Fatalf("%v is given out twice", ref)
				}
				seen[ref] = true
				if ref.Index == last.Index+1 {
					ascending++
				}
				last = ref
			}
			end()
		}
		if ascending > 3 {
			t.Errorf("of 900 indexes %d follow the one before", ascending)
		}
	})
}

// TestStatusList_SL08_AListIsFollowedByAnother draws more indexes than one has.
func TestStatusList_SL08_AListIsFollowedByAnother(t *testing.T) {
	db := memoryStore(t)
	defer db.Close()
	h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one")
	defer end()
	seen := make(map[[20]byte]bool)
	expires := time.Now().Add(time.Minute)
	for range registry.StatusListSize/4*3 + 1 { // so many are not of one list
		p, err := h.lists.Take(t.Context(), expires)
		if err != nil || seen[p.Serial] {
			t.Fatalf("%x is given out twice, or %v", p.Serial, err)
		}
		seen[p.Serial] = true
	}
	n := 0
	for l := range h.registry.View().StatusLists() {
		n++
		if l.Server != "one" || l.URI != "https://one.example.org/status/"+l.ID {
			t.Errorf("%+v", l)
		}
	}
	if n != 2 {
		t.Errorf("there are %d lists", n)
	}
}

func TestATokenEndsNoLaterThanItsList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		defer db.Close()
		h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one")
		defer end()
		p, err := h.lists.Take(t.Context(), time.Now().Add(1000*time.Hour))
		must(t, err)
		id, _, _ := statuslist.Place(p.Serial[:])
		if l := h.registry.View().StatusList(id); l == nil || p.ExpiresAt.After(l.EndsAt.Add(time.Second)) {
			t.Errorf("it ends at %v, its list is %+v", p.ExpiresAt, l)
		}
	})
}

func TestNoTokenGoesOutWithoutAList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		defer db.Close()
		h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one")
		end() // nobody makes lists
		_, err := h.issuer.MintJWT(t.Context(), spiffeid.RequireFromPath(td, "/a"), []string{"api"}, 0)
		if !errors.Is(err, authority.ErrUnavailable) {
			t.Errorf("it went out: %v", err)
		}
	})
}

// TestServersServeAndRevokeEachOthersTokens has two over one store, and takes one
// away.
func TestServersServeAndRevokeEachOthersTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, keys, issued := memoryStore(t), authority.NewMemoryKeys(), newJournal(t)
		defer db.Close()
		one, endOne := open(t, db, keys, issued, "one")
		two, endTwo := open(t, db, authority.NewMemoryKeys(), newJournal(t), "two")
		defer endTwo()
		a, b, c := one.jwt("/a", ""), one.jwt("/b", ""), one.jwt("/c", "")
		mine := two.jwt("/c", "")
		if a.URI == mine.URI {
			t.Fatal("two servers give out indexes of one list")
		}
		two.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/c")})
		synctest.Wait() // the first sees what the second saw, too
		for _, h := range []*house{one, two} {
			h.expect("one server's token of an identity", c, 1)
			h.expect("the other's", mine, 1)
			h.expect("another identity's", a, 0)
		}
		endOne()
		two.revoke(&registry.Revocation{SerialNumber: serialOf(t, a)})
		two.expect("a token of a server that is away", a, 1)
		// What was issued of an identity only its server knows: it makes up for it.
		r := &registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/b"), RevokedAt: time.Now(), EndsAt: time.Now().Add(time.Hour)}
		view, err := two.registry.Revoke(t.Context(), []*registry.Revocation{r})
		must(t, err)
		synctest.Wait()
		two.expect("an identity's, while its server is away", b, 0)
		_, endOne = open(t, db, keys, issued, "one")
		defer endOne()
		two.covered(r, view.Revocation(r).Revision())
		two.expect("an identity's, once its server is back", b, 1)
	})
}

func TestAListGoesWhenItsTokensHaveEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		defer db.Close()
		h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one", func(o *authority.Options) { o.JWTLifetime, o.WITLifetime = 40*time.Minute, 40*time.Minute })
		defer end()
		rotating, stop := context.WithCancel(context.Background())
		rotated := make(chan struct{})
		go func() { _ = h.authorities.Run(rotating); close(rotated) }()
		defer func() { stop(); <-rotated }()
		ref := h.jwt("/a", "")
		time.Sleep(21 * time.Minute) // the next authority is prepared, and with it another list
		if next := h.jwt("/a", ""); next.URI == ref.URI {
			t.Error("a list outlives the authority whose tokens it is of")
		}
		synctest.Wait()
		id, _, _ := statuslist.Place(serialOf(t, ref))
		if l := h.registry.View().StatusList(id); l != nil && l.EndsAt.After(time.Now()) {
			t.Errorf("long after its last token has ended a list is to end at %v, now is %v", l.EndsAt, time.Now())
		}
	})
}

func TestStatusList_SL04_SL10_TheEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		defer db.Close()
		h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one")
		defer end()
		ref := h.jwt("/a", "")
		rec := h.get(ref.URI, "Accept", "application/statuslist+jwt")
		head := rec.Header()
		if rec.Code != 200 || head.Get("Content-Type") != "application/statuslist+jwt" || head.Get("Access-Control-Allow-Origin") != "*" ||
			head.Get("Cache-Control") != "public, max-age=15" || head.Get("ETag") == "" || head.Get("Content-Encoding") != "" {
			t.Errorf("GET: %d, %v", rec.Code, head)
		}
		if again := h.get(ref.URI, "If-None-Match", head.Get("ETag")); again.Code != http.StatusNotModified {
			t.Errorf("the same again: %d", again.Code)
		}
		zipped := h.get(ref.URI, "Accept-Encoding", "br, gzip;q=0.8")
		z, err := gzip.NewReader(zipped.Body)
		must(t, err)
		text, err := io.ReadAll(z)
		must(t, err)
		if !bytes.Equal(text, rec.Body.Bytes()) || zipped.Header().Get("Content-Encoding") != "gzip" || zipped.Header().Get("ETag") == head.Get("ETag") {
			t.Errorf("gzip: %v", zipped.Header())
		}
		if plain := h.get(ref.URI, "Accept-Encoding", "gzip;q=0"); plain.Header().Get("Content-Encoding") != "" {
			t.Error("gzip is sent to who refuses it")
		}
		h.revoke(&registry.Revocation{SerialNumber: serialOf(t, ref)})
		if changed := h.get(ref.URI, "If-None-Match", head.Get("ETag")); changed.Code != http.StatusOK {
			t.Errorf("after a revocation: %d", changed.Code)
		}
		for uri, want := range map[string]int{
			ref.URI + "?time=1686925000": 501, ref.URI + "0": 404, "/status/": 404, "/": 404,
			"/status/" + statuslist.NewID([16]byte{}): 404,
		} {
			if rec := h.get(uri); rec.Code != want {
				t.Errorf("GET %s: %d, want %d", uri, rec.Code, want)
			}
		}
		if rec := h.get(ref.URI, "Accept", "application/statuslist+cwt"); rec.Code != http.StatusNotAcceptable {
			t.Errorf("CWT: %d", rec.Code)
		}
		post := httptest.NewRecorder()
		h.handler.ServeHTTP(post, httptest.NewRequest(http.MethodPost, ref.URI, nil))
		if post.Code != http.StatusMethodNotAllowed {
			t.Errorf("POST: %d", post.Code)
		}
	})
}

// TestAListIsSignedOnceForAllWhoAsk counts signatures.
func TestAListIsSignedOnceForAllWhoAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		defer db.Close()
		h, end := open(t, db, authority.NewMemoryKeys(), newJournal(t), "one")
		defer end()
		signed := 0
		h.handler = tokenstatus.Handler(tokenstatus.HandlerOptions{
			View: h.registry.View, Active: h.authorities.JWT, TTL: ttl,
			Sign: func(ctx context.Context, uri string, bits []byte, ttl time.Duration) (string, error) {
				signed++
				return h.issuer.StatusList(ctx, uri, bits, ttl)
			},
		})
		ref := h.jwt("/a", "")
		for range 100 {
			h.expect("a valid token", ref, 0)
		}
		if signed != 1 {
			t.Errorf("signed %d times for 100 requests", signed)
		}
		time.Sleep(ttl/2 + time.Second)
		h.expect("a valid token", ref, 0)
		if signed != 2 {
			t.Errorf("signed %d times after half of its time to live", signed)
		}
	})
}

func pkix(t testing.TB, public any) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(public)
	must(t, err)
	return der
}

// BenchmarkTake is what a status adds to signing a token, besides the journal.
func BenchmarkTake(b *testing.B) {
	db := memoryStore(b)
	defer db.Close()
	h, end := open(b, db, authority.NewMemoryKeys(), newJournal(b), "one")
	defer end()
	expires := time.Now().Add(time.Minute)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.lists.Take(context.Background(), expires); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkAMillionTokens is what a million tokens that have not ended cost: the
// heap, the journal's share of it included, and the lists in the store.
func BenchmarkAMillionTokens(b *testing.B) {
	const tokens = 1_000_000
	heap := func() float64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	for b.Loop() {
		db, issued := memoryStore(b), newJournal(b)
		h, end := open(b, db, authority.NewMemoryKeys(), issued, "one")
		expires := time.Now().Add(5 * time.Minute)
		before := heap()
		for range tokens {
			p, err := h.lists.Take(context.Background(), expires)
			if err != nil {
				b.Fatal(err)
			}
			issued.Add(journal.SVID{Serial: p.Serial, ID: "spiffe://example.org/web", Authority: "a", IssuedAt: expires.Unix() - 300, ExpiresAt: expires.Unix()})
		}
		b.ReportMetric((heap()-before)/tokens, "heap-B/token")
		lists := 0
		for range h.registry.View().StatusLists() {
			lists++
		}
		b.ReportMetric(float64(lists), "lists")
		end()
		must(b, db.Close())
	}
}

// BenchmarkWorkloadJWT is what a status costs, with a journal on the disk.
func BenchmarkWorkloadJWT(b *testing.B) {
	e := &entry.Entry{ID: "a", SPIFFEID: spiffeid.RequireFromPath(td, "/web"), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/a"), Selectors: selector.Set{{Type: "unix", Value: "uid:1"}}}
	for _, status := range []bool{false, true} {
		b.Run(fmt.Sprintf("status=%v", status), func(b *testing.B) {
			db := memoryStore(b)
			defer db.Close()
			issued, err := journal.Open(b.TempDir(), nil, nil)
			must(b, err)
			h, end := open(b, db, authority.NewMemoryKeys(), issued, "one")
			defer end()
			issuer := h.issuer
			if !status {
				issuer = issue.New(issue.Options{TrustDomain: td, Authorities: h.authorities, Journal: issued})
			}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := issuer.WorkloadJWT(context.Background(), e, []string{"api"}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
