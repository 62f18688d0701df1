package conformance

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server"
)

// badIDs are URIs that are no SPIFFE IDs of workloads, by the line that says so.
var badIDs = map[string]string{
	"ID01 another scheme":             "http://example.org/operator",
	"ID01 no scheme":                  "example.org/operator",
	"ID02 no trust domain":            "spiffe:///operator",
	"ID03 query":                      "spiffe://example.org/operator?a=b",
	"ID03 empty query":                "spiffe://example.org/operator?",
	"ID04 fragment":                   "spiffe://example.org/operator#a",
	"ID04 empty fragment":             "spiffe://example.org/operator#",
	"ID05 user":                       "spiffe://u@example.org/operator",
	"ID05 empty user":                 "spiffe://@example.org/operator",
	"ID05 user and password":          "spiffe://u:p@example.org/operator",
	"ID06 port":                       "spiffe://example.org:80/operator",
	"ID06 empty port":                 "spiffe://example.org:/operator",
	"ID07 ID22 capital trust domain":  "spiffe://EXAMPLE.org/operator",
	"ID08 dollar in trust domain":     "spiffe://example$org/operator",
	"ID08 tilde in trust domain":      "spiffe://example~org/operator",
	"ID08 address in brackets":        "spiffe://[::1]/operator",
	"ID09 percent in trust domain":    "spiffe://example%2eorg/operator",
	"ID12 percent in path":            "spiffe://example.org/%6fperator",
	"ID13 empty segment":              "spiffe://example.org//operator",
	"ID14 dot segment":                "spiffe://example.org/./operator",
	"ID14 dot dot segment":            "spiffe://example.org/a/../operator",
	"ID14 dot dot at the end":         "spiffe://example.org/operator/..",
	"ID15 slash at the end":           "spiffe://example.org/operator/",
	"ID15 X06 nothing but a slash":    "spiffe://example.org/",
	"ID16 space in path":              "spiffe://example.org/oper ator",
	"ID16 colon in path":              "spiffe://example.org/oper:ator",
	"ID16 plus in path":               "spiffe://example.org/oper+ator",
	"X06 no path":                     "spiffe://example.org",
	"ID19 2049 bytes":                 "spiffe://example.org/" + strings.Repeat("a", 2049-len("spiffe://example.org/")),
	"ID20 trust domain of 256 bytes":  "spiffe://" + strings.Repeat("a", 256) + "/operator",
	"ID01 ID22 capitals in scheme":    "SPIFFE://example.org/operator",
	"ID08 letters of other alphabets": "spiffe://exämple.org/operator",
}

func TestSPIFFEID_ID01_ID02_ID03_ID04_ID05_ID06_ID07_ID08_ID09_ID12_ID13_ID14_ID15_ID16_ID19_ID20_ID22_X06_BadIDsAreRefusedEverywhere(t *testing.T) {
	w := theWorld(t)
	for name, id := range badIDs {
		t.Run(name, func(t *testing.T) {
			// At registration: the wire has the two parts.
			if rest, ok := strings.CutPrefix(id, "spiffe://"); ok {
				td, path, slash := strings.Cut(rest, "/")
				if slash {
					path = "/" + path
				}
				if r := w.create(t, newEntry(td, path, "uid:424242")); r.Status.Code != int32(codes.InvalidArgument) {
					t.Errorf("registration: %v", r.Status)
				}
				if r := w.create(t, entryUnder(td, path)); r.Status.Code != int32(codes.InvalidArgument) {
					t.Errorf("registration as a parent: %v", r.Status)
				}
			}
			// In a certificate request.
			if isASCII(id) {
				_, err := svidv1.NewSVIDClient(w.server).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: requestFor(t, id)})
				if status.Code(err) != codes.InvalidArgument {
					t.Errorf("minting: %v", err)
				}
			}
			// In a client's certificate, signed by our own authority. Go's parsed
			// URL has lost an empty fragment and the scheme's capitals.
			if !strings.HasSuffix(id, "#") && !strings.HasPrefix(id, "SPIFFE:") {
				wantRefusal(t, w.over(t, w.forge(t, named(id))))
			}
			// In a token, signed by our own authority. The standard wants a path
			// of workloads only.
			if strings.Contains(name, "X06 no path") {
				return
			}
			claims := goodClaims()
			claims["sub"] = id
			if _, err := w.validate(t, w.token(t, claims)); status.Code(err) != codes.InvalidArgument {
				t.Errorf("validating: %v", err)
			}
		})
	}
}

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r > 127 })
}

// requestFor makes a certificate request for a URI as it is.
func requestFor(t testing.TB, uris ...string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	var c x509.Certificate
	named(uris...)(&c)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{ExtraExtensions: []pkix.Extension(c.ExtraExtensions)}, key)
	must(t, err)
	return der
}

func TestSPIFFEID_ID10_ID14_ID16_ID17_ID21_GoodIDsAreTakenAsTheyAre(t *testing.T) {
	w := theWorld(t)
	ids := map[string]bool{}
	for _, path := range []string{
		"/..a", "/...", "/a/b/c/d", "/1b4e28ba-2fa1-11d2-883f-0016d3cca427", "/A-Z_a-z.0-9", "/Web", "/web", // the last two are two
	} {
		id := w.entry(t, path, "uid:424242")
		if ids[id] {
			t.Errorf("%s is the same entry as another", path)
		}
		ids[id] = true
		resp, err := svidv1.NewSVIDClient(w.server).MintX509SVID(t.Context(), &svidv1.MintX509SVIDRequest{Csr: requestFor(t, "spiffe://"+domain+path)})
		must(t, err)
		cert, err := x509.ParseCertificate(resp.Svid.CertChain[0])
		must(t, err)
		if got := cert.URIs[0].String(); got != "spiffe://"+domain+path {
			t.Errorf("%s became %s", path, got)
		}
	}
}

func TestSPIFFEID_ID02_ID05_ID06_ID07_ID08_ID09_ID10_ID20_TrustDomainNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"example.org": true, "1.2.3.4": true, "td_x": true, "a..b": true, "-a": true, "td": true, strings.Repeat("a", 255): true,
		"": false, "Example.org": false, "a$b": false, "a~b": false, "[::1]": false, "exämple.org": false, "a%2eb": false,
		"u@td": false, "td:80": false, "td:": false, "td/a": false, strings.Repeat("a", 256): false,
	} {
		err := server.Check(config.Source{Name: "server.yaml", Data: fmt.Appendf(nil, "trust_domain: %q\n", name)})
		if ok != (err == nil) {
			t.Errorf("trust domain %.40q: %v", name, err)
		}
	}
}

func TestSPIFFEID_ID18_ID19_TheLongestIDWorksEndToEnd(t *testing.T) {
	w := theWorld(t)
	path := "/" + strings.Repeat("a", 2048-len("spiffe://"+domain+"/"))
	w.entry(t, path, fmt.Sprint("uid:", os.Getuid()))
	cert, err := x509.ParseCertificate(w.fetch(t, path).X509Svid)
	must(t, err)
	if got := cert.URIs[0].String(); len(got) != 2048 {
		t.Errorf("the ID has %d bytes", len(got))
	}
	resp, err := w.api().FetchJWTSVID(called(t), &workload.JWTSVIDRequest{Audience: []string{"us"}, SpiffeId: "spiffe://" + domain + path})
	must(t, err)
	if _, err := w.validate(t, resp.Svids[0].Svid); err != nil {
		t.Error(err)
	}
}

func TestSPIFFEID_ID28_NoWorkloadsKeyIsOnDisk(t *testing.T) {
	w := theWorld(t)
	svid := w.fetch(t, "/self")
	parsed, err := x509.ParsePKCS8PrivateKey(svid.X509SvidKey)
	must(t, err)
	secret, err := parsed.(*ecdsa.PrivateKey).Bytes()
	must(t, err)
	files := 0
	must(t, filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // a file of the store may have gone meanwhile
		}
		files++
		if data, err := os.ReadFile(path); err == nil && (bytes.Contains(data, secret) || bytes.Contains(data, svid.X509SvidKey)) {
			t.Errorf("%s holds the workload's private key", path)
		}
		return nil
	}))
	if files < 5 {
		t.Errorf("only %d files were looked at", files)
	}
}

func TestSPIFFEID_ID29_OnlyX509AndJWTAreIssued(t *testing.T) {
	w := theWorld(t)
	_, err := svidv1.NewSVIDClient(w.server).MintWITSVID(t.Context(), &svidv1.MintWITSVIDRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("minting a WIT-SVID: %v", err)
	}
	for _, text := range []string{"", "spiffe://example.org/web", "{}", string(w.ca.Raw)} {
		if _, err := w.validate(t, text); status.Code(err) != codes.InvalidArgument && status.Code(err) != codes.Internal {
			t.Errorf("validating %.10q: %v", text, err)
		}
	}
}
