package revocation_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/revocation"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/badger"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// house is a server's issuer, journal and publisher over a store.
type house struct {
	t           testing.TB
	registry    *registry.Registry
	authorities *authority.Authorities
	journal     *journal.Journal
	issuer      *issue.Issuer
	log         chan string // errors of the publisher
}

func memoryStore(t testing.TB) store.Store {
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	return db
}

// open starts a server of a name over a store; everything ends with end.
func open(t testing.TB, db store.Store, keys apiv1.KeyManager, issued *journal.Journal, name string, always bool) (h *house, end func()) {
	t.Helper()
	reg, err := registry.Open(t.Context(), registry.Options{Store: db, TrustDomain: td})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{}, 2)
	go func() { _ = reg.Run(ctx); done <- struct{}{} }()
	authorities, err := authority.Open(t.Context(), authority.Options{Registry: reg, Keys: keys, TrustDomain: td, Server: name})
	must(t, err)
	h = &house{
		t: t, registry: reg, authorities: authorities, journal: issued,
		issuer: issue.New(issue.Options{TrustDomain: td, Authorities: authorities, Journal: issued}),
	}
	h.log = make(chan string, 100)
	p := revocation.New(revocation.Options{
		Registry: reg, Authorities: authorities, Journal: issued, Always: always,
		Log: slog.New(slog.NewTextHandler(lines(h.log), &slog.HandlerOptions{Level: slog.LevelError})),
	})
	go func() { _ = p.Run(ctx); done <- struct{}{} }()
	return h, func() { cancel(); <-done; <-done }
}

func (h *house) issue(path, through string) *x509.Certificate {
	h.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(h.t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(h.t, err)
	ctx := h.t.Context()
	if through != "" {
		ctx = issue.Through(ctx, spiffeid.RequireFromPath(td, through))
	}
	e := &entry.Entry{ID: path, SPIFFEID: spiffeid.RequireFromPath(td, path), ParentID: spiffeid.RequireFromPath(td, "/spire/agent/a"), Selectors: selector.Set{{Type: "unix", Value: "uid:1"}}}
	svid, err := h.issuer.WorkloadX509(ctx, e, csr)
	must(h.t, err)
	cert, err := x509.ParseCertificate(svid.Chain[0])
	must(h.t, err)
	return cert
}

func (h *house) active() *registry.Authority {
	a, _, _ := h.authorities.State(registry.X509)
	return a
}

func (h *house) crl() *registry.CRL { return h.registry.View().CRL(h.active().ID) }

// revoke revokes something and waits until the own CRL has it.
func (h *house) revoke(r *registry.Revocation) *registry.CRL {
	h.t.Helper()
	r.RevokedAt = time.Now()
	r.EndsAt = revocation.EndOf(h.registry.View(), h.journal, r, time.Now())
	view, err := h.registry.Revoke(h.t.Context(), []*registry.Revocation{r})
	must(h.t, err)
	revision := view.Revocation(r).Revision()
	for {
		changed, view := h.registry.Changed(), h.registry.View()
		if revocation.Covered(view, h.active(), r, revision) {
			return h.crl()
		}
		select {
		case <-changed:
		case <-h.t.Context().Done():
			h.t.Fatal("the CRL does not come")
		}
	}
}

func has(c *registry.CRL, cert *x509.Certificate) bool { return c.Has(cert.SerialNumber.Bytes()) }

func newKeys() apiv1.KeyManager { return authority.NewMemoryKeys() }

func newJournal(t testing.TB, dir string) *journal.Journal {
	t.Helper()
	j, err := journal.Open(dir, nil, nil)
	must(t, err)
	return j
}

// TestCRL_RF18_ItsFormAndSignature checks the form of a CRL.
func TestCRL_RF18_ItsFormAndSignature(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		h, end := open(t, db, newKeys(), newJournal(t, ""), "main", false)
		defer db.Close()
		defer end()
		one := h.issue("/one", "")
		if c := h.crl(); c != nil && c.DER != nil {
			t.Error("there is a CRL before anything was revoked")
		}
		c := h.revoke(&registry.Revocation{SerialNumber: one.SerialNumber.Bytes(), AuthorityID: h.active().ID, Reason: 1})
		list, err := x509.ParseRevocationList(c.DER)
		must(t, err)
		ca := h.active().Chain[0]
		must(t, list.CheckSignatureFrom(ca))
		if !bytes.Equal(list.AuthorityKeyId, ca.SubjectKeyId) || !bytes.Equal(list.RawIssuer, ca.RawSubject) || ca.KeyUsage&x509.KeyUsageCRLSign == 0 {
			t.Error("the CRL does not name the key and name of its authority, which may sign it")
		}
		if list.Number == nil || list.ThisUpdate.After(time.Now()) || !list.NextUpdate.After(time.Now()) {
			t.Errorf("number %v, %v to %v", list.Number, list.ThisUpdate, list.NextUpdate)
		}
		if e := list.RevokedCertificateEntries; len(e) != 1 || e[0].SerialNumber.Cmp(one.SerialNumber) != 0 || e[0].ReasonCode != 1 {
			t.Errorf("it revokes %v", e)
		}
	})
}

// TestCRL_RF18_ItIsRenewedAndEntriesStayUntilTheirEnd lets time pass.
func TestCRL_RF18_ItIsRenewedAndEntriesStayUntilTheirEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db := memoryStore(t)
		h, end := open(t, db, newKeys(), newJournal(t, ""), "main", true)
		defer db.Close()
		defer end()
		synctest.Wait()
		empty := h.crl()
		if empty == nil || empty.DER == nil || len(empty.Revoked) != 0 {
			t.Fatalf("for those who fetch it there is %v", empty)
		}
		one := h.issue("/one", "")
		first := h.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/one")})
		if !has(first, one) || first.Number <= empty.Number {
			t.Fatal("it does not have what was revoked, or its number does not rise")
		}
		time.Sleep(59 * time.Minute)
		synctest.Wait()
		if c := h.crl(); !has(c, one) {
			t.Error("an entry went before its certificate ended")
		}
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		if c := h.crl(); has(c, one) || c.Number <= first.Number {
			t.Error("an entry stays after its certificate has ended")
		}
		before := h.crl()
		time.Sleep(revocation.Lifetime/2 + time.Minute)
		synctest.Wait()
		if c := h.crl(); c.Number <= before.Number || time.Until(c.NextUpdate) < revocation.Lifetime/2 {
			t.Errorf("it is not signed anew: it ends in %v", time.Until(c.NextUpdate))
		}
	})
}

func TestAnIdentityOrAnAgentIsRevokedWithAllThatItGot(t *testing.T) {
	db := memoryStore(t)
	h, end := open(t, db, newKeys(), newJournal(t, ""), "main", false)
	defer db.Close()
	defer end()
	a1, a2, b := h.issue("/a", "/spire/agent/one"), h.issue("/a", "/spire/agent/two"), h.issue("/b", "/spire/agent/two")
	c := h.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/a")})
	if !has(c, a1) || !has(c, a2) || has(c, b) {
		t.Error("revoking an identity takes another's, or leaves some")
	}
	a3 := h.issue("/a", "/spire/agent/one")
	c = h.revoke(&registry.Revocation{Node: spiffeid.RequireFromPath(td, "/spire/agent/two")})
	if has(c, a3) || !has(c, b) || !has(c, a1) {
		t.Error("revoking an agent takes what another got, or leaves some")
	}
	// Once more takes what came since.
	if c = h.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/a")}); !has(c, a3) {
		t.Error("what was issued since the first revocation is not taken by the second")
	}
}

func TestRevocationsSurviveARestart(t *testing.T) {
	db, keys, dir := memoryStore(t), newKeys(), t.TempDir()
	defer db.Close()
	issued := newJournal(t, dir)
	h, end := open(t, db, keys, issued, "main", false)
	one, two := h.issue("/one", ""), h.issue("/two", "")
	before := h.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/one")})
	end()
	must(t, issued.Close())

	h, end = open(t, db, keys, newJournal(t, dir), "main", false)
	defer end()
	if c := h.crl(); !has(c, one) || c.Number != before.Number {
		t.Error("after a restart the CRL is another")
	}
	c := h.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/two")})
	if !has(c, one) || !has(c, two) || c.Number <= before.Number {
		t.Error("after a restart what was issued before cannot be revoked, or the number does not rise")
	}
}

// TestARevocationThatComesWhileAServerIsAwayIsMadeUpFor lets another server
// revoke.
func TestARevocationThatComesWhileAServerIsAwayIsMadeUpFor(t *testing.T) {
	db, keys, dir := memoryStore(t), newKeys(), t.TempDir()
	defer db.Close()
	issued := newJournal(t, dir)
	h, end := open(t, db, keys, issued, "one", false)
	cert, away := h.issue("/w", ""), h.active()
	end()
	must(t, issued.Close())

	other, endOther := open(t, db, newKeys(), newJournal(t, ""), "two", false)
	r := &registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/w")}
	other.revoke(r)
	if revocation.Covered(other.registry.View(), away, r, other.registry.View().Revocation(r).Revision()) {
		t.Error("it is said that the server that is away has it in its CRL")
	}
	endOther()

	h, end = open(t, db, keys, newJournal(t, dir), "one", false)
	defer end()
	for !has(h.crl(), cert) {
		<-h.registry.Changed()
	}
}

func TestServersAndWhatIsNoTargetAreNotRevoked(t *testing.T) {
	if err := revocation.CheckTarget(spiffeid.RequireFromPath(td, entry.ServerPath)); err == nil {
		t.Error("a server may be revoked")
	}
	db := memoryStore(t)
	h, end := open(t, db, newKeys(), newJournal(t, ""), "main", false)
	defer db.Close()
	defer end()
	for name, r := range map[string]*registry.Revocation{
		"nothing":             {},
		"two things":          {SPIFFEID: spiffeid.RequireFromPath(td, "/a"), Node: spiffeid.RequireFromPath(td, "/spire/agent/a")},
		"no authority":        {SerialNumber: []byte{1}},
		"a long number":       {SerialNumber: make([]byte, 21), AuthorityID: "a"},
		"another domain":      {SPIFFEID: spiffeid.RequireFromString("spiffe://other.org/a")},
		"a hold":              {SPIFFEID: spiffeid.RequireFromPath(td, "/a"), Reason: 6},
		"a reason that is no": {SPIFFEID: spiffeid.RequireFromPath(td, "/a"), Reason: 99},
	} {
		var e *registry.Error
		if _, err := h.registry.Revoke(t.Context(), []*registry.Revocation{r}); !errors.As(err, &e) || e.Kind != registry.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRevocationsInOneCallAreBounded(t *testing.T) {
	db := memoryStore(t)
	h, end := open(t, db, newKeys(), newJournal(t, ""), "main", false)
	defer db.Close()
	defer end()
	many := make([]*registry.Revocation, 51)
	for i := range many {
		many[i] = &registry.Revocation{SerialNumber: []byte{1, byte(i)}, AuthorityID: h.active().ID, EndsAt: time.Now().Add(time.Hour)}
	}
	var e *registry.Error
	if _, err := h.registry.Revoke(t.Context(), many); !errors.As(err, &e) || e.Kind != registry.Invalid {
		t.Errorf("51 in one call: %v", err)
	}
	if _, err := h.registry.Revoke(t.Context(), many[:50]); err != nil {
		t.Errorf("50 in one call: %v", err)
	}
}

func TestTheCRLOfAnAuthorityIsBounded(t *testing.T) {
	db := memoryStore(t)
	h, end := open(t, db, newKeys(), newJournal(t, ""), "main", false)
	defer db.Close()
	defer end()
	one := h.issue("/one", "")
	before := h.revoke(&registry.Revocation{SerialNumber: one.SerialNumber.Bytes(), AuthorityID: h.active().ID})
	now := time.Now()
	many := spiffeid.RequireFromPath(td, "/many")
	for i := range revocation.MaxRevoked { // with the one, too many
		v := journal.SVID{ID: many.String(), Authority: h.active().ID, IssuedAt: now.Unix(), ExpiresAt: now.Add(time.Hour).Unix()}
		binary.BigEndian.PutUint32(v.Serial[16:], uint32(i+1))
		h.journal.Add(v)
	}
	if _, err := h.registry.Revoke(t.Context(), []*registry.Revocation{{SPIFFEID: many, RevokedAt: now, EndsAt: now.Add(time.Hour)}}); err != nil {
		t.Fatal(err)
	}
	select {
	case line := <-h.log:
		if !strings.Contains(line, "10001 of its certificates") || !strings.Contains(line, "replace the authority") {
			t.Errorf("it is logged: %s", line)
		}
	case <-t.Context().Done():
		t.Fatal("nothing is logged")
	}
	if c := h.crl(); !bytes.Equal(c.DER, before.DER) || !has(c, one) {
		t.Error("the CRL of before is not as it was")
	}
}

// lines are those of a log.
type lines chan string

func (l lines) Write(b []byte) (int, error) {
	select {
	case l <- string(b):
	default:
	}
	return len(b), nil
}

func TestTheEndpointServesCRLs(t *testing.T) {
	db := memoryStore(t)
	h, end := open(t, db, newKeys(), newJournal(t, ""), "main", true)
	defer db.Close()
	defer end()
	h.issue("/one", "")
	c := h.revoke(&registry.Revocation{SPIFFEID: spiffeid.RequireFromPath(td, "/one")})
	handler := revocation.Handler(h.registry.View)
	get := func(method, path, tag string) *httptest.ResponseRecorder {
		req := httptest.NewRequest(method, path, nil)
		req.Header.Set("If-None-Match", tag)
		rec := httptest.NewRecorder()
		handler.ServeHTTP(rec, req)
		return rec
	}
	path := revocation.Path + c.AuthorityID + ".crl"
	rec := get(http.MethodGet, path, "")
	if rec.Code != http.StatusOK || rec.Header().Get("Content-Type") != "application/pkix-crl" || !bytes.Equal(rec.Body.Bytes(), c.DER) || rec.Header().Get("Cache-Control") == "" {
		t.Errorf("GET: %d, %v", rec.Code, rec.Header())
	}
	if again := get(http.MethodGet, path, rec.Header().Get("ETag")); again.Code != http.StatusNotModified {
		t.Errorf("the same again: %d", again.Code)
	}
	for path, want := range map[string]int{revocation.Path: 404, revocation.Path + "00.crl": 404, "/": 404, revocation.Path + c.AuthorityID: 404} {
		if rec := get(http.MethodGet, path, ""); rec.Code != want {
			t.Errorf("GET %s: %d, want %d", path, rec.Code, want)
		}
	}
	if rec := get(http.MethodPost, path, ""); rec.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", rec.Code)
	}
}
