package api_test

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"net/url"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/server/api"
)

// verify verifies an X509-SVID against the bundle that the server hands out.
func (w *world) verify(s *types.X509SVID) *x509.Certificate {
	w.t.Helper()
	b, err := bundlev1.NewBundleClient(w.connect(nil)).GetBundle(w.t.Context(), &bundlev1.GetBundleRequest{})
	must(w.t, err)
	roots := x509bundle.New(td)
	for _, a := range b.X509Authorities {
		cert, err := x509.ParseCertificate(a.Asn1)
		must(w.t, err)
		roots.AddX509Authority(cert)
	}
	got, chains, err := x509svid.ParseAndVerify(s.CertChain, roots)
	must(w.t, err)
	if got.Path() != s.Id.Path {
		w.t.Errorf("the SVID is of %s, the answer says %s", got, s.Id.Path)
	}
	return chains[0][0]
}

func TestAnAgentGetsX509SVIDsOfItsOwnEntriesOnly(t *testing.T) {
	w := newWorld(t)
	mine, other := w.newAgent(), w.newAgent()
	a := w.create(mine, "/a", func(e *types.Entry) { e.DnsNames = []string{"a.example.org", "b.example.org"}; e.Hint = "hint" })
	b := w.create(other, "/b")
	c := w.create(mine, "/c")
	csr := newCSR(t, newKey(t))
	broken := append([]byte(nil), csr...)
	broken[len(broken)-1] ^= 1
	res, err := svidv1.NewSVIDClient(w.connect(mine)).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{
		{EntryId: a.Id, Csr: csr},
		{EntryId: b.Id, Csr: csr},
		{EntryId: "none", Csr: csr},
		{EntryId: "", Csr: csr},
		{EntryId: c.Id},
		{EntryId: c.Id, Csr: []byte("no csr")},
		{EntryId: c.Id, Csr: broken},
		{EntryId: c.Id, Csr: csr},
		nil,
	}})
	must(t, err)
	for i, want := range []struct {
		code codes.Code
		text string
	}{
		{codes.OK, "OK"},
		{codes.NotFound, "entry not found or not authorized"},
		{codes.NotFound, "entry not found or not authorized"},
		{codes.InvalidArgument, "missing entry ID"},
		{codes.InvalidArgument, "missing CSR"},
		{codes.InvalidArgument, "malformed CSR"},
		{codes.InvalidArgument, "invalid CSR signature"},
		{codes.OK, "OK"},
		{codes.InvalidArgument, "missing entry ID"},
	} {
		got := res.Results[i].Status
		if got.Code != int32(want.code) || len(got.Message) < len(want.text) || got.Message[:len(want.text)] != want.text {
			t.Errorf("result %d is %v, want %v %q", i, got, want.code, want.text)
		}
		if (res.Results[i].Svid != nil) != (want.code == codes.OK) {
			t.Errorf("result %d has SVID %v", i, res.Results[i].Svid)
		}
	}
	leaf := w.verify(res.Results[0].Svid)
	if leaf.Subject.CommonName != "a.example.org" || fmt.Sprint(leaf.DNSNames) != "[a.example.org b.example.org]" || res.Results[0].Svid.Hint != "hint" {
		t.Errorf("the certificate has subject %v and DNS names %v", leaf.Subject, leaf.DNSNames)
	}
	if w.verify(res.Results[7].Svid).URIs[0].Path != "/c" {
		t.Error("the results are in another order")
	}
	if lines := w.log.lines("audit", "BatchNewX509SVID", "caller=agent", "caller_id="+mine.id.String(), "items=9", "failed=7"); len(lines) != 1 {
		t.Errorf("the call was recorded %d times", len(lines))
	}
}

func TestOfACSROnlyThePublicKeyReachesTheCertificate(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	e := w.create(agent, "/a")
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject:         pkix.Name{CommonName: "evil", Organization: []string{"evil"}},
		DNSNames:        []string{"evil.example.org"},
		EmailAddresses:  []string{"evil@example.org"},
		IPAddresses:     []net.IP{net.IPv4(192, 0, 2, 66)},
		URIs:            []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/evil"}},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}},
	}, key)
	must(t, err)
	res, err := svidv1.NewSVIDClient(w.connect(agent)).BatchNewX509SVID(t.Context(), &svidv1.BatchNewX509SVIDRequest{
		Params: []*svidv1.NewX509SVIDParams{{EntryId: e.Id, Csr: csr}},
	})
	must(t, err)
	leaf := w.verify(res.Results[0].Svid)
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("the certificate has another key")
	}
	if leaf.URIs[0].Path != "/a" || len(leaf.URIs) != 1 || len(leaf.DNSNames)+len(leaf.EmailAddresses)+len(leaf.IPAddresses) > 0 || leaf.IsCA || leaf.Subject.CommonName == "evil" || len(leaf.Subject.Organization) > 0 && leaf.Subject.Organization[0] == "evil" {
		t.Errorf("the certificate has subject %v, URIs %v, names %v %v %v, CA %v", leaf.Subject, leaf.URIs, leaf.DNSNames, leaf.EmailAddresses, leaf.IPAddresses, leaf.IsCA)
	}
}

func TestABatchHasBounds(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	e, csr := w.create(agent, "/a"), newCSR(t, newKey(t))
	svids := svidv1.NewSVIDClient(w.connect(agent))
	for n, code := range map[int]codes.Code{0: codes.InvalidArgument, 500: codes.OK, 501: codes.InvalidArgument} {
		req := &svidv1.BatchNewX509SVIDRequest{}
		for range n {
			req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: e.Id, Csr: csr})
		}
		res, err := svids.BatchNewX509SVID(t.Context(), req)
		expectCode(t, err, code, "")
		for i, r := range res.GetResults() {
			if r.Status.Code != 0 {
				t.Fatalf("result %d of %d is %v", i, n, r.Status)
			}
		}
	}
}

func TestSignaturesForOneAgentAreLimited(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.SignPerSecond = 1 })
	agent, other := w.newAgent(), w.newAgent()
	req := &svidv1.BatchNewX509SVIDRequest{}
	for range 500 {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: "none"})
	}
	_, err := svidv1.NewSVIDClient(w.connect(agent)).BatchNewX509SVID(t.Context(), req)
	must(t, err)
	_, err = svidv1.NewSVIDClient(w.connect(agent)).BatchNewX509SVID(t.Context(), req)
	expectCode(t, err, codes.ResourceExhausted, "more than 1 a second")
	_, err = svidv1.NewSVIDClient(w.connect(other)).BatchNewX509SVID(t.Context(), req)
	must(t, err)
}

func TestAnAgentGetsJWTSVIDsOfItsOwnEntriesOnly(t *testing.T) {
	w := newWorld(t)
	mine, other := w.newAgent(), w.newAgent()
	a, b := w.create(mine, "/a", func(e *types.Entry) { e.Hint = "hint" }), w.create(other, "/b")
	svids := svidv1.NewSVIDClient(w.connect(mine))
	res, err := svids.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: a.Id, Audience: []string{"aud"}})
	must(t, err)
	keys := jwtbundle.New(td)
	for _, k := range w.registry.View().Bundle(td).JWTAuthorities {
		must(t, keys.AddJWTAuthority(k.KeyID, k.PublicKey))
	}
	token, err := jwtsvid.ParseAndValidate(res.Svid.Token, keys, []string{"aud"})
	must(t, err)
	if token.ID != id("/a") || res.Svid.ExpiresAt != token.Expiry.Unix() || res.Svid.ExpiresAt-res.Svid.IssuedAt != 300 || res.Svid.Hint != "hint" {
		t.Errorf("the token is %+v, the answer %v", token, res.Svid)
	}
	_, err = svids.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: b.Id, Audience: []string{"aud"}})
	expectCode(t, err, codes.NotFound, "entry not found or not authorized")
	_, err = svids.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{Audience: []string{"aud"}})
	expectCode(t, err, codes.InvalidArgument, "missing entry ID")
	_, err = svids.NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: a.Id})
	expectCode(t, err, codes.InvalidArgument, "audience")
}

func TestAnExpiredEntryYieldsNothing(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	e := w.create(agent, "/a", func(e *types.Entry) { e.ExpiresAt = time.Now().Add(10 * time.Minute).Unix() })
	w.sleep(11 * time.Minute) // before it is pruned
	_, err := svidv1.NewSVIDClient(w.connect(agent)).NewJWTSVID(t.Context(), &svidv1.NewJWTSVIDRequest{EntryId: e.Id, Audience: []string{"aud"}})
	expectCode(t, err, codes.NotFound, "entry not found or not authorized")
}

func TestOperatorsMintSVIDs(t *testing.T) {
	w := newWorld(t)
	svids := svidv1.NewSVIDClient(w.admin())
	key := newKey(t)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/minted"}}, DNSNames: []string{"minted.example.org"}}, key)
	must(t, err)
	res, err := svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: 60})
	must(t, err)
	if leaf := w.verify(res.Svid); leaf.DNSNames[0] != "minted.example.org" || time.Until(leaf.NotAfter) > time.Minute {
		t.Errorf("the certificate has %v and ends at %v", leaf.DNSNames, leaf.NotAfter)
	}
	_, err = svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{})
	expectCode(t, err, codes.InvalidArgument, "missing CSR")
	_, err = svids.MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr, Ttl: -1})
	expectCode(t, err, codes.InvalidArgument, "negative")
	jwt, err := svids.MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Id: wireID(id("/minted")), Audience: []string{"aud"}, Ttl: 60})
	must(t, err)
	if jwt.Svid.ExpiresAt-jwt.Svid.IssuedAt != 60 {
		t.Errorf("the token is %v", jwt.Svid)
	}
	_, err = svids.MintJWTSVID(t.Context(), &svidv1.MintJWTSVIDRequest{Audience: []string{"aud"}})
	expectCode(t, err, codes.InvalidArgument, "SPIFFE ID")
	_, err = svids.MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{})
	expectCode(t, err, codes.Unimplemented, "WIT")
	if lines := w.log.lines("audit", "MintX509SVID", "caller=local", "uid=", "id=spiffe://example.org/minted", "outcome=OK"); len(lines) != 1 {
		t.Errorf("the call was recorded %d times", len(lines))
	}
}
