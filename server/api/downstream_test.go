package api_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
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

	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/test/harness"
)

// below is a server below another one: its authorities.
type below struct {
	x509     *authority.X509
	jwt, wit *authority.JWT
}

func (b *below) X509() (*authority.X509, error) { return b.x509, nil }
func (b *below) JWT() (*authority.JWT, error)   { return b.jwt, nil }
func (b *below) WIT() (*authority.JWT, error)   { return b.wit, nil }

// JWTRS256 is for profiles, of which there are none.
func (b *below) JWTRS256() (*authority.JWT, error) { return nil, authority.ErrUnavailable }

func parseAll(t testing.TB, ders [][]byte) (certs []*x509.Certificate) {
	t.Helper()
	for _, der := range ders {
		cert, err := x509.ParseCertificate(der)
		must(t, err)
		certs = append(certs, cert)
	}
	return certs
}

func writePEM(t testing.TB, name string, certs ...*x509.Certificate) (path string) {
	t.Helper()
	var text []byte
	for _, c := range certs {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	path = filepath.Join(t.TempDir(), name)
	must(t, os.WriteFile(path, text, 0o600))
	return path
}

func TestAServerBelowIssuesWhatVerifiesAgainstTheBundleAbove(t *testing.T) {
	harness.NeedCommand(t, "openssl")
	w := newWITWorld(t)
	conn := w.connect(w.workload(w.newAgent(), "/below", func(e *types.Entry) { e.Downstream = true }))
	caKey, jwtKey, witKey := newKey(t), newKey(t), newKey(t)
	ca, err := svidv1.NewSVIDClient(conn).NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: newCSR(t, caKey), PreferredTtl: 7200})
	must(t, err)
	chain, roots := parseAll(t, ca.CaCertChain), parseAll(t, ca.X509Authorities)
	spki, err := x509.MarshalPKIXPublicKey(jwtKey.Public())
	must(t, err)
	published, err := bundlev1.NewBundleClient(conn).PublishJWTAuthority(t.Context(), &bundlev1.PublishJWTAuthorityRequest{
		JwtAuthority: &types.JWTKey{KeyId: "below", PublicKey: spki, ExpiresAt: time.Now().Add(time.Hour).Unix()},
	})
	must(t, err)
	if n := len(published.JwtAuthorities); n != 2 {
		t.Errorf("the answer has %d JWT authorities, want that of the server above, too", n)
	}

	witPublished, err := bundlev1.NewBundleClient(conn).PublishWITAuthority(t.Context(), &bundlev1.PublishWITAuthorityRequest{
		WitAuthority: &types.WITKey{KeyId: "below, WIT", PublicKey: pkixOf(t, witKey), ExpiresAt: time.Now().Add(time.Hour).Unix()},
	})
	must(t, err)
	if n := len(witPublished.WitAuthorities); n != 2 {
		t.Errorf("the answer has %d WIT authorities, want that of the server above, too", n)
	}

	// What the server below issues.
	issuer := issue.New(issue.Options{TrustDomain: td, Authorities: &below{
		x509: &authority.X509{ID: "below", Certificate: chain[0], Chain: chain, Signer: caKey},
		jwt:  &authority.JWT{ID: "below", Signer: jwtKey, Algorithm: "ES256", ExpiresAt: time.Now().Add(time.Hour)},
		wit:  &authority.JWT{ID: "below, WIT", Signer: witKey, Algorithm: "ES256", ExpiresAt: time.Now().Add(time.Hour)},
	}})
	e := &entry.Entry{ID: "e", SPIFFEID: id("/web")}
	leaf, err := issuer.WorkloadX509(t.Context(), e, newCSR(t, newKey(t)))
	must(t, err)
	token, err := issuer.WorkloadJWT(t.Context(), e, []string{"audience"})
	must(t, err)

	workloadKey := newKey(t)
	wit, err := issuer.WorkloadWIT(t.Context(), e, issue.WITKey{PKIX: pkixOf(t, workloadKey), Algorithm: "ES256"})
	must(t, err)

	// Whoever has the bundle above verifies it.
	w.verifyWIT(&types.WITSVID{Token: wit.Token, Id: wireID(wit.ID), ExpiresAt: wit.ExpiresAt.Unix()}, workloadKey)
	own := w.registry.View().Bundle(td)
	x509s := x509bundle.New(td)
	for _, a := range own.X509Authorities {
		x509s.AddX509Authority(a.Certificate)
	}
	if got, _, err := x509svid.ParseAndVerify(leaf.Chain, x509s); err != nil || got != e.SPIFFEID {
		t.Errorf("the X509-SVID is that of %s, %v", got, err)
	}
	jwts := jwtbundle.New(td)
	for _, a := range own.JWTAuthorities {
		must(t, jwts.AddJWTAuthority(a.KeyID, a.PublicKey))
	}
	if got, err := jwtsvid.ParseAndValidate(token.Token, jwts, []string{"audience"}); err != nil || got.ID != e.SPIFFEID {
		t.Errorf("the JWT-SVID: %v, %v", got, err)
	}
	certs := parseAll(t, leaf.Chain)
	out, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", writePEM(t, "roots.pem", roots...),
		"-untrusted", writePEM(t, "chain.pem", certs[1:]...), writePEM(t, "leaf.pem", certs[0])).CombinedOutput()
	if err != nil {
		t.Errorf("openssl: %v\n%s", err, out)
	}
}

func TestADownstreamCALivesAsLongAsAskedButNotLongerThanTheAuthorityAbove(t *testing.T) {
	w := newWorld(t)
	client := svidv1.NewSVIDClient(w.connect(w.workload(w.newAgent(), "/below", func(e *types.Entry) { e.Downstream = true })))
	request := func(ttl int32) *svidv1.NewDownstreamX509CARequest {
		return &svidv1.NewDownstreamX509CARequest{Csr: newCSR(t, newKey(t)), PreferredTtl: ttl}
	}
	active, _, _ := w.own.State(registry.X509)
	for ttl, want := range map[int32]time.Time{
		3600:        time.Now().Add(time.Hour),
		0:           active.ExpiresAt,
		365 * 86400: active.ExpiresAt,
	} {
		res, err := client.NewDownstreamX509CA(t.Context(), request(ttl))
		must(t, err)
		if got := parseAll(t, res.CaCertChain)[0].NotAfter; got.Sub(want).Abs() > 30*time.Second || got.After(active.ExpiresAt) {
			t.Errorf("preferred lifetime %d s: ends at %v, want %v", ttl, got, want)
		}
	}
	_, err := client.NewDownstreamX509CA(t.Context(), request(-1))
	expectCode(t, err, codes.InvalidArgument, "negative")
	_, err = client.NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: []byte("x")})
	expectCode(t, err, codes.InvalidArgument, "CSR")
}

func TestAServerBelowLearnsAllRootsAbove(t *testing.T) {
	w := newWorld(t)
	client := svidv1.NewSVIDClient(w.connect(w.workload(w.newAgent(), "/below", func(e *types.Entry) { e.Downstream = true })))
	next, err := w.own.Prepare(context.Background(), registry.X509)
	must(t, err)
	res, err := client.NewDownstreamX509CA(t.Context(), &svidv1.NewDownstreamX509CARequest{Csr: newCSR(t, newKey(t))})
	must(t, err)
	roots := parseAll(t, res.X509Authorities)
	if len(roots) != 2 || !roots[1].Equal(next.Chain[0]) {
		t.Errorf("it got %d roots, want the active one and the one that will sign next", len(roots))
	}
	if ca := parseAll(t, res.CaCertChain); len(ca) != 1 {
		t.Errorf("the chain has %d certificates; the root does not belong to it", len(ca))
	}
}
