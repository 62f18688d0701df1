package bundle_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/bundle"
)

func TestUsable_T26_W33_KeepsWITKeysThatCanBeOne(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	source := spiffebundle.New(td)
	if err := source.AddWITAuthority("w", key.Public()); err != nil {
		t.Fatal(err)
	}
	if err := source.AddJWTAuthority("j", key.Public()); err != nil {
		t.Fatal(err)
	}
	document, err := source.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var doc struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(document, &doc); err != nil || len(doc.Keys) != 2 {
		t.Fatalf("%s, %v", document, err)
	}
	for name, bad := range map[string]string{
		"no kid":    `{"kty":"EC","use":"wit-svid","crv":"P-256","x":"AA","y":"AA"}`,
		"empty kid": `{"kty":"EC","use":"wit-svid","kid":"","crv":"P-256","x":"AA","y":"AA"}`,
		"EdDSA":     `{"kty":"OKP","use":"wit-svid","kid":"ed","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`,
	} {
		got, err := spiffebundle.Parse(td, bundle.Usable(fmt.Appendf(nil, `{"keys":[%s,%s,%s]}`, doc.Keys[0], bad, doc.Keys[1])))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if wit := got.WITAuthorities(); len(wit) != 1 || !key.PublicKey.Equal(wit["w"]) || len(got.JWTAuthorities()) != 1 {
			t.Errorf("%s: WIT authorities are %v", name, wit)
		}
	}
}

// What is left of a document is itself a document that nothing is taken from.
func FuzzUsable(f *testing.F) {
	for _, s := range []string{
		"", "[]", `{"keys":null}`, `{"keys":[]}`, `{"keys":[{"kty":"EC","use":"wit-svid","kid":"w"}],"spiffe_sequence":1}`,
		`{"keys":[{"kty":"OKP","use":"jwt-svid"},{"kty":"RSA","use":"x509-svid","x5c":["AA==","AA=="]},{"use":5}]}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, document []byte) {
		once := bundle.Usable(document)
		if twice := bundle.Usable(once); !bytes.Equal(once, twice) {
			t.Errorf("%q became %q, and that %q", document, once, twice)
		}
	})
}

func TestUsable_X39_X40_T03_T06_T10_T11_T26_IgnoresWhatTheStandardsSay(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("example.org")
	var certs []string
	for i := range int64(2) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(i + 1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, base64.StdEncoding.EncodeToString(der))
	}
	first := certs[0]
	parsed, err := base64.StdEncoding.DecodeString(first)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(parsed)
	if err != nil {
		t.Fatal(err)
	}
	one, err := spiffebundle.FromX509Authorities(td, []*x509.Certificate{cert}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	var doc struct{ Keys []map[string]any }
	if err := json.Unmarshal(one, &doc); err != nil {
		t.Fatal(err)
	}
	good := func(change func(map[string]any)) string {
		key := map[string]any{}
		for k, v := range doc.Keys[0] {
			key[k] = v
		}
		change(key)
		text, err := json.Marshal(key)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	same := func(map[string]any) {}
	for name, bad := range map[string]string{
		"X39 no x5c":       good(func(k map[string]any) { delete(k, "x5c") }),
		"X39 empty x5c":    good(func(k map[string]any) { k["x5c"] = []string{} }),
		"T10 unknown kty":  good(func(k map[string]any) { k["kty"] = "QUANTUM" }),
		"T11 unknown use":  good(func(k map[string]any) { k["use"] = "other-svid" }),
		"T11 no use":       good(func(k map[string]any) { delete(k, "use") }),
		"X40 a second x5c": good(func(k map[string]any) { k["x5c"] = certs }),
	} {
		document := fmt.Sprintf(`{"keys":[%s,%s],"spiffe_sequence":9223372036854775807,"unknown":{}}`, bad, good(same))
		b, err := spiffebundle.Parse(td, bundle.Usable([]byte(document)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if as := b.X509Authorities(); len(as) != 1 || !as[0].Equal(cert) {
			t.Errorf("%s: there are %d authorities", name, len(as))
		}
		if n, _ := b.SequenceNumber(); n != 1<<63-1 {
			t.Errorf("%s: the sequence number became %d", name, n)
		}
	}
	// Keys for WIT-SVIDs are known, and for nothing else.
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	jwk, err := json.Marshal(jose.JSONWebKey{Key: key.Public(), KeyID: "w", Use: "wit-svid"})
	if err != nil {
		t.Fatal(err)
	}
	b, err := spiffebundle.Parse(td, bundle.Usable([]byte(fmt.Sprintf(`{"keys":[%s,%s]}`, jwk, good(same)))))
	if err != nil || len(b.WITAuthorities()) != 1 || len(b.JWTAuthorities()) != 0 || len(b.X509Authorities()) != 1 {
		t.Errorf("T26: %v, %v", b, err)
	}
	for _, none := range []string{"", "{", "[]", `{"keys":5}`, `{}`} {
		if got := string(bundle.Usable([]byte(none))); got != none {
			t.Errorf("%q became %q", none, got)
		}
	}
}
