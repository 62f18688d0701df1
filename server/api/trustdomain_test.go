package api_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	trustdomainv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/trustdomain/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/api"
	"github.com/hallmark-id/hallmark/server/federation"
)

// domain is a foreign trust domain with a bundle endpoint.
type domain struct {
	td       spiffeid.TrustDomain
	root     *x509.Certificate
	key      *ecdsa.PrivateKey
	endpoint *httptest.Server
	bundle   *spiffebundle.Bundle // what the endpoint serves
}

func newDomain(t *testing.T, name string, spiffe bool) *domain {
	t.Helper()
	d := &domain{td: spiffeid.RequireTrustDomainFromString(name), key: newKey(t)}
	d.root = sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: name}},
	}, nil, d.key, d.key)
	d.bundle = spiffebundle.FromX509Authorities(d.td, []*x509.Certificate{d.root})
	d.bundle.SetSequenceNumber(7)
	d.bundle.SetRefreshHint(time.Minute)
	d.endpoint = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/", http.StatusFound)
		case "/downgraded":
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/huge":
			fmt.Fprint(w, strings.Repeat(" ", 1<<20+1))
		case "/elsewhere":
			http.Redirect(w, r, "https://localhost:1/", http.StatusFound)
		case "/slow":
			<-r.Context().Done()
		case "/gone":
			http.NotFound(w, r)
		default:
			doc, err := d.bundle.Marshal()
			if err != nil {
				t.Error(err)
			}
			if hint, ok := strings.CutPrefix(r.URL.Path, "/hint/"); ok {
				doc = []byte(strings.Replace(string(doc), `"spiffe_refresh_hint":60`, `"spiffe_refresh_hint":`+hint, 1))
			}
			if r.URL.Path == "/newer" { // with a key of a kind that is not known yet
				doc = []byte(strings.Replace(string(doc), `"keys":[`, `"keys":[{"kty":"XYZ","use":"xyz-svid"},`, 1))
			}
			_, _ = w.Write(doc)
		}
	}))
	if spiffe {
		leafKey := newKey(t)
		leaf := sign(t, &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{{Scheme: "spiffe", Host: name, Path: "/endpoint"}},
		}, d.root, leafKey, d.key)
		d.endpoint.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leaf.Raw}, PrivateKey: leafKey}}}
	}
	d.endpoint.StartTLS()
	t.Cleanup(d.endpoint.Close)
	return d
}

func sign(t *testing.T, tmpl, parent *x509.Certificate, key, by *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), by)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert
}

func (d *domain) relationship(path string) *types.FederationRelationship {
	w := &types.FederationRelationship{
		TrustDomain: d.td.Name(), BundleEndpointUrl: d.endpoint.URL + path,
		BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}},
	}
	if len(d.endpoint.TLS.Certificates[0].Certificate) == 1 && d.spiffe() {
		w.BundleEndpointProfile = &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: d.td.IDString() + "/endpoint"}}
	}
	return w
}

func (d *domain) spiffe() bool {
	leaf, err := x509.ParseCertificate(d.endpoint.TLS.Certificates[0].Certificate[0])
	return err == nil && len(leaf.URIs) == 1
}

func (d *domain) wire() *types.Bundle {
	return &types.Bundle{TrustDomain: d.td.Name(), X509Authorities: []*types.X509Certificate{{Asn1: d.root.Raw}}, SequenceNumber: 1}
}

func web(name, url string) *types.FederationRelationship {
	return &types.FederationRelationship{TrustDomain: name, BundleEndpointUrl: url, BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{HttpsWeb: &types.HTTPSWebProfile{}}}
}

func createFederation(t *testing.T, c trustdomainv1.TrustDomainClient, all ...*types.FederationRelationship) []*trustdomainv1.BatchCreateFederationRelationshipResponse_Result {
	t.Helper()
	resp, err := c.BatchCreateFederationRelationship(t.Context(), &trustdomainv1.BatchCreateFederationRelationshipRequest{FederationRelationships: all})
	must(t, err)
	if len(resp.Results) != len(all) {
		t.Fatalf("%d results for %d relationships", len(resp.Results), len(all))
	}
	return resp.Results
}

func expectStatus(t *testing.T, st *types.Status, code codes.Code, text string) {
	t.Helper()
	if codes.Code(st.GetCode()) != code || !strings.Contains(st.GetMessage(), text) {
		t.Errorf("got %v %q, want %v with %q", codes.Code(st.GetCode()), st.GetMessage(), code, text)
	}
}

func TestFederationRelationshipsAreCreatedChangedListedAndDeleted(t *testing.T) {
	w := newWorld(t)
	c := trustdomainv1.NewTrustDomainClient(w.admin())
	d := newDomain(t, "b.org", true)
	with := d.relationship("/")
	with.TrustDomainBundle = d.wire()
	for _, r := range createFederation(t, c, web("c.org", "https://c.org/bundle"), with, web("a.org", "https://a.org:8443/x")) {
		expectStatus(t, r.Status, codes.OK, "")
	}
	// By name, in pages; the bundle came with its relationship.
	var names []string
	token := ""
	for {
		resp, err := c.ListFederationRelationships(t.Context(), &trustdomainv1.ListFederationRelationshipsRequest{PageSize: 2, PageToken: token})
		must(t, err)
		for _, f := range resp.FederationRelationships {
			names = append(names, fmt.Sprintf("%s %d", f.TrustDomain, len(f.TrustDomainBundle.GetX509Authorities())))
		}
		if token = resp.NextPageToken; token == "" {
			break
		}
	}
	if got := strings.Join(names, ", "); got != "a.org 0, b.org 1, c.org 0" {
		t.Errorf("listed %s", got)
	}
	if _, err := bundlev1.NewBundleClient(w.admin()).GetFederatedBundle(t.Context(), &bundlev1.GetFederatedBundleRequest{TrustDomain: "b.org"}); err != nil {
		t.Error(err)
	}
	// Only what the mask names changes; only what the other names is returned.
	up, err := c.BatchUpdateFederationRelationship(t.Context(), &trustdomainv1.BatchUpdateFederationRelationshipRequest{
		FederationRelationships: []*types.FederationRelationship{{TrustDomain: "b.org", BundleEndpointUrl: "https://new.b.org/"}, web("none.org", "https://none.org/")},
		InputMask:               &types.FederationRelationshipMask{BundleEndpointUrl: true},
		OutputMask:              &types.FederationRelationshipMask{BundleEndpointUrl: true},
	})
	must(t, err)
	if want := (&types.FederationRelationship{TrustDomain: "b.org", BundleEndpointUrl: "https://new.b.org/"}); !proto.Equal(up.Results[0].FederationRelationship, want) {
		t.Errorf("got %v", up.Results[0])
	}
	expectStatus(t, up.Results[1].Status, codes.NotFound, "federation relationship not found")
	got, err := c.GetFederationRelationship(t.Context(), &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "b.org"})
	must(t, err)
	if got.GetHttpsSpiffe().GetEndpointSpiffeId() != "spiffe://b.org/endpoint" || got.BundleEndpointUrl != "https://new.b.org/" || len(got.TrustDomainBundle.GetX509Authorities()) != 1 {
		t.Errorf("got %v", got)
	}
	del, err := c.BatchDeleteFederationRelationship(t.Context(), &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"b.org", "b.org", "!"}})
	must(t, err)
	expectStatus(t, del.Results[0].Status, codes.OK, "")
	expectStatus(t, del.Results[1].Status, codes.NotFound, "not found")
	expectStatus(t, del.Results[2].Status, codes.InvalidArgument, "trust domain")
	_, err = c.GetFederationRelationship(t.Context(), &trustdomainv1.GetFederationRelationshipRequest{TrustDomain: "b.org"})
	expectCode(t, err, codes.NotFound, "federation relationship not found")
}

func TestFederation_F13_F15_F43_AWrongRelationshipIsRefusedAndStoresNothing(t *testing.T) {
	w := newWorld(t)
	c := trustdomainv1.NewTrustDomainClient(w.admin())
	other := newDomain(t, "other.org", false)
	for _, tc := range []struct {
		f    *types.FederationRelationship
		code codes.Code
		text string
	}{
		{web("example.org", "https://example.org/"), codes.InvalidArgument, "own trust domain"},
		{web("Not A Domain", "https://x.org/"), codes.InvalidArgument, "trust domain"},
		{web("", "https://x.org/"), codes.InvalidArgument, "trust domain"},
		{web("x.org", ""), codes.InvalidArgument, "missing"},
		{web("x.org", "http://x.org/"), codes.InvalidArgument, "must be https"},
		{web("x.org", "https://u:p@x.org/"), codes.InvalidArgument, "user info"},
		{web("x.org", "https:///path"), codes.InvalidArgument, "no host"},
		{web("x.org", "https://x.org/%zz"), codes.InvalidArgument, "cannot be parsed"},
		{web("x.org", "https://x.org/"+strings.Repeat("a", 2048)), codes.InvalidArgument, "the most is"},
		{&types.FederationRelationship{TrustDomain: "x.org", BundleEndpointUrl: "https://x.org/"}, codes.InvalidArgument, "profile is missing"},
		{&types.FederationRelationship{TrustDomain: "x.org", BundleEndpointUrl: "https://x.org/", BundleEndpointProfile: &types.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &types.HTTPSSPIFFEProfile{EndpointSpiffeId: "x"}}}, codes.InvalidArgument, "endpoint SPIFFE ID"},
		{&types.FederationRelationship{TrustDomain: "x.org", BundleEndpointUrl: "https://x.org/", BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{}, TrustDomainBundle: other.wire()}, codes.InvalidArgument, `bundle is of trust domain "other.org"`},
		{&types.FederationRelationship{TrustDomain: "x.org", BundleEndpointUrl: "https://x.org/", BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{}, TrustDomainBundle: &types.Bundle{TrustDomain: "x.org", X509Authorities: []*types.X509Certificate{{Asn1: []byte("no")}}}}, codes.InvalidArgument, "X.509 authority 0"},
		{&types.FederationRelationship{TrustDomain: "x.org", BundleEndpointUrl: "https://x.org/", BundleEndpointProfile: &types.FederationRelationship_HttpsWeb{}, TrustDomainBundle: &types.Bundle{TrustDomain: "x.org", X509Authorities: []*types.X509Certificate{{Asn1: w.registry.View().Bundle(td).X509Authorities[0].Certificate.Raw}}}}, codes.InvalidArgument, "a key may not serve two trust domains"},
	} {
		expectStatus(t, createFederation(t, c, tc.f)[0].Status, tc.code, tc.text)
	}
	if resp, err := c.ListFederationRelationships(t.Context(), &trustdomainv1.ListFederationRelationshipsRequest{}); err != nil || len(resp.FederationRelationships) > 0 {
		t.Errorf("got %v, %v", resp, err)
	}
	twice := createFederation(t, c, web("x.org", "https://x.org/"), web("x.org", "https://y.org/"))
	expectStatus(t, twice[0].Status, codes.OK, "")
	expectStatus(t, twice[1].Status, codes.AlreadyExists, "already exists")
}

func TestRefreshBundle_F06_F07_F10_F25_F26_F27_F28_F32_F34_F44_F47_F49_FetchesWithBothProfilesAndNoOther(t *testing.T) {
	byWeb, bySPIFFE := newDomain(t, "web.org", false), newDomain(t, "spiffe.org", true)
	pool := x509.NewCertPool()
	pool.AddCert(byWeb.endpoint.Certificate())
	w := newWorld(t, func(o *api.Options) { o.Federation = &federation.Client{Roots: pool} })
	c := trustdomainv1.NewTrustDomainClient(w.admin())
	refresh := func(name string) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := c.RefreshBundle(ctx, &trustdomainv1.RefreshBundleRequest{TrustDomain: name})
		return err
	}
	set := func(f *types.FederationRelationship) {
		t.Helper()
		_, _ = c.BatchDeleteFederationRelationship(t.Context(), &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{f.TrustDomain}})
		expectStatus(t, createFederation(t, c, f)[0].Status, codes.OK, "")
	}
	stored := func(d *domain) uint64 {
		b := w.registry.View().Bundle(d.td)
		if b == nil {
			return 0
		}
		return b.SequenceNumber
	}
	expectCode(t, refresh("web.org"), codes.NotFound, "federation relationship not found")

	set(byWeb.relationship("/moved")) // F-27
	must(t, refresh("web.org"))
	if n := stored(byWeb); n != 7 {
		t.Errorf("stored sequence %d", n)
	}
	for path, text := range map[string]string{"/downgraded": "must be https", "/loop": "redirected more than", "/elsewhere": "to another host, localhost", "/huge": "longer than", "/gone": "404"} {
		set(byWeb.relationship(path))
		expectCode(t, refresh("web.org"), codes.Unavailable, text)
	}
	// F-06: an older bundle does not replace a newer one; a newer one does.
	set(byWeb.relationship("/"))
	must(t, refresh("web.org"))
	byWeb.bundle.SetSequenceNumber(3)
	must(t, refresh("web.org")) // the same content
	must(t, byWeb.bundle.AddJWTAuthority("k", mustKey(t)))
	must(t, byWeb.bundle.AddWITAuthority("w", mustKey(t))) // T-26
	expectCode(t, refresh("web.org"), codes.FailedPrecondition, "it stays")
	byWeb.bundle.SetSequenceNumber(8)
	must(t, refresh("web.org"))
	if b := w.registry.View().Bundle(byWeb.td); b.SequenceNumber != 8 || len(b.JWTAuthorities) != 1 || b.WITKey("w") == nil {
		t.Errorf("stored %v", b)
	}
	// One that changes without its number is taken, and the log says so; one
	// that has no number is taken as it comes (F-07).
	must(t, byWeb.bundle.AddJWTAuthority("unnumbered", mustKey(t)))
	must(t, refresh("web.org"))
	if len(w.log.lines("changed without its sequence number", "web.org")) != 1 {
		t.Error("nobody is told")
	}
	byWeb.bundle.ClearSequenceNumber()
	byWeb.bundle.RemoveJWTAuthority("unnumbered")
	must(t, refresh("web.org"))
	if b := w.registry.View().Bundle(byWeb.td); len(b.JWTAuthorities) != 1 {
		t.Errorf("stored %v", b)
	}
	byWeb.bundle.SetSequenceNumber(20)
	set(byWeb.relationship("/newer")) // T-10, T-11: what is not understood is ignored, the rest is kept
	must(t, refresh("web.org"))
	if n := stored(byWeb); n != 20 {
		t.Errorf("stored sequence %d", n)
	}
	// F-28, F-34, F-44: no profile stands in for another, no ID for another.
	f := bySPIFFE.relationship("/")
	set(f)
	expectCode(t, refresh("spiffe.org"), codes.FailedPrecondition, "set it first") // F-32
	f.TrustDomainBundle = bySPIFFE.wire()
	f.GetHttpsSpiffe().EndpointSpiffeId = "spiffe://spiffe.org/another"
	set(f)
	expectCode(t, refresh("spiffe.org"), codes.Unavailable, "unexpected ID")
	f.GetHttpsSpiffe().EndpointSpiffeId = "spiffe://spiffe.org/endpoint"
	set(f)
	must(t, refresh("spiffe.org"))
	if n := stored(bySPIFFE); n != 7 {
		t.Errorf("stored sequence %d", n)
	}
	set(web("spiffe.org", bySPIFFE.endpoint.URL))
	expectCode(t, refresh("spiffe.org"), codes.Unavailable, "certificate")
	if len(w.log.lines("audit", "RefreshBundle", "web.org")) == 0 {
		t.Error("no audit record of a refresh")
	}
	if len(w.log.lines("bundle refreshed", bySPIFFE.endpoint.URL, "spiffe://spiffe.org/endpoint", "sequence_number=7")) == 0 { // F-47
		t.Error("no record of what was fetched from where")
	}
}

// What cannot be right is refused, for a reason that is named, and what is stored
// stays. Older and oversized bundles are among the tests of the profiles.
func TestRefreshBundle_F05_F25_F49_WhatCannotBeRightIsNamedAndChangesNothing(t *testing.T) {
	good, other, expired := newDomain(t, "web.org", false), newDomain(t, "other.org", false), newDomain(t, "web.org", false)
	key := newKey(t)
	was := sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(3), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, nil, key, key)
	expired.endpoint.TLS.Certificates = []tls.Certificate{{Certificate: [][]byte{was.Raw}, PrivateKey: key}}
	pool := x509.NewCertPool()
	for _, c := range []*x509.Certificate{good.endpoint.Certificate(), was} {
		pool.AddCert(c)
	}
	client := &federation.Client{Roots: pool}
	w := newWorld(t, func(o *api.Options) { o.Federation = client })
	c := trustdomainv1.NewTrustDomainClient(w.admin())
	expectStatus(t, createFederation(t, c, good.relationship("/"))[0].Status, codes.OK, "")
	_, err := c.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "web.org"})
	must(t, err)
	for _, tc := range []struct {
		name, url, says string
		timeout         time.Duration
	}{
		{"another trust domain's", other.endpoint.URL, `is that of "other.org"`, 0},
		{"of an endpoint whose certificate has expired", expired.endpoint.URL, "certificate has expired", 0},
		{"slow", good.endpoint.URL + "/slow", "took longer than 50ms", 50 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client.Timeout = tc.timeout
			_, err := c.BatchUpdateFederationRelationship(t.Context(), &trustdomainv1.BatchUpdateFederationRelationshipRequest{
				FederationRelationships: []*types.FederationRelationship{web("web.org", tc.url)}, InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true}})
			must(t, err)
			_, err = c.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "web.org"})
			expectCode(t, err, codes.Unavailable, tc.says)
			if b := w.registry.View().Bundle(good.td); b == nil || !b.X509Authorities[0].Certificate.Equal(good.root) {
				t.Errorf("stored %v", b)
			}
		})
	}
}

func TestRefreshBundle_F46_RedirectsCanBeSwitchedOff(t *testing.T) {
	d := newDomain(t, "web.org", false)
	pool := x509.NewCertPool()
	pool.AddCert(d.endpoint.Certificate())
	w := newWorld(t, func(o *api.Options) { o.Federation = &federation.Client{Roots: pool, RefuseRedirects: true} })
	c := trustdomainv1.NewTrustDomainClient(w.admin())
	expectStatus(t, createFederation(t, c, d.relationship("/moved"))[0].Status, codes.OK, "")
	_, err := c.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "web.org"})
	expectCode(t, err, codes.Unavailable, "refuse_redirects")
	if b := w.registry.View().Bundle(d.td); b != nil {
		t.Errorf("stored %v", b)
	}
}

// F-41: the age of a bundle, and why it is no younger, is there to be asked for.
func TestListBundleFetches_F41_SaysWhenABundleWasFetchedAndWhyNotSince(t *testing.T) {
	d := newDomain(t, "web.org", false)
	pool := x509.NewCertPool()
	pool.AddCert(d.endpoint.Certificate())
	w := newWorld(t, func(o *api.Options) { o.Federation = &federation.Client{Roots: pool} })
	c := trustdomainv1.NewTrustDomainClient(w.admin())
	refresh := func() error {
		_, err := c.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "web.org"})
		return err
	}
	fetch := func() *hallmarkv1.BundleFetch {
		t.Helper()
		resp, err := hallmarkv1.NewAdminServiceClient(w.admin()).ListBundleFetches(t.Context(), &hallmarkv1.ListBundleFetchesRequest{})
		must(t, err)
		if len(resp.Fetches) != 1 || resp.Fetches[0].TrustDomain != "web.org" {
			t.Fatalf("got %v", resp)
		}
		return resp.Fetches[0]
	}
	expectStatus(t, createFederation(t, c, d.relationship("/"))[0].Status, codes.OK, "")
	if f := fetch(); f.TriedAt != 0 || f.FetchedAt != 0 || f.Failures != 0 {
		t.Errorf("before the first fetch: %v", f)
	}
	must(t, refresh())
	good := fetch()
	if good.FetchedAt == 0 || good.TriedAt != good.FetchedAt || good.Failures != 0 || good.Error != "" {
		t.Errorf("after one: %v", good)
	}
	d.endpoint.Close()
	for range 2 {
		if err := refresh(); err == nil {
			t.Fatal("fetched from nowhere")
		}
	}
	if f := fetch(); f.FetchedAt != good.FetchedAt || f.TriedAt < good.TriedAt || f.Failures != 2 || !strings.Contains(f.Error, "connection refused") {
		t.Errorf("after two that failed: %v", f)
	}
	_, err := c.BatchUpdateFederationRelationship(t.Context(), &trustdomainv1.BatchUpdateFederationRelationshipRequest{
		FederationRelationships: []*types.FederationRelationship{d.relationship("/other")}, InputMask: &types.FederationRelationshipMask{BundleEndpointUrl: true}})
	must(t, err)
	if f := fetch(); f.TriedAt != 0 || f.Failures != 0 {
		t.Errorf("of another URL: %v", f)
	}
}

func TestRefreshBundle_T24_TheRefreshHintIsTakenWithinBounds(t *testing.T) {
	d := newDomain(t, "web.org", false)
	pool := x509.NewCertPool()
	pool.AddCert(d.endpoint.Certificate())
	w := newWorld(t, func(o *api.Options) { o.Federation = &federation.Client{Roots: pool} })
	c := trustdomainv1.NewTrustDomainClient(w.admin())
	sequence := uint64(100)
	for hint, want := range map[string]time.Duration{
		"1": time.Minute, "0": time.Minute, "-1": time.Minute, "300": 5 * time.Minute, "86401": 24 * time.Hour,
		"9223372037": 24 * time.Hour, "9223372036854775807": 24 * time.Hour,
	} {
		_, err := c.BatchDeleteFederationRelationship(t.Context(), &trustdomainv1.BatchDeleteFederationRelationshipRequest{TrustDomains: []string{"web.org"}})
		must(t, err)
		sequence += 10
		d.bundle.SetSequenceNumber(sequence)
		expectStatus(t, createFederation(t, c, d.relationship("/hint/"+hint))[0].Status, codes.OK, "")
		if _, err := c.RefreshBundle(t.Context(), &trustdomainv1.RefreshBundleRequest{TrustDomain: "web.org"}); err != nil {
			t.Errorf("%s: %v", hint, err)
		}
		if got := w.registry.View().Bundle(d.td).RefreshHint; got != want {
			t.Errorf("a hint of %s seconds is taken as %v, want %v", hint, got, want)
		}
	}
}

func mustKey(t *testing.T) *ecdsa.PublicKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return &key.PublicKey
}
