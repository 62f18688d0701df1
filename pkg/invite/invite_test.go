package invite_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/invite"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func root(t testing.TB) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	c, err := x509.ParseCertificate(der)
	must(t, err)
	return c
}

func example(t testing.TB) invite.Invitation {
	return invite.Invitation{
		TrustDomain: td, EndpointURL: "https://example.org:8443/",
		EndpointID: spiffeid.RequireFromPath(td, "/spire/server"), Roots: []*x509.Certificate{root(t), root(t)},
	}
}

func encode(t testing.TB, i invite.Invitation) string {
	t.Helper()
	text, err := i.Encode()
	must(t, err)
	return text
}

func TestWhatIsEncodedIsParsed(t *testing.T) {
	web := invite.Invitation{TrustDomain: td, EndpointURL: "https://example.org/bundle.json"}
	for _, i := range []invite.Invitation{example(t), web} {
		got, err := invite.Parse("\n" + encode(t, i) + " \n")
		must(t, err)
		if got.TrustDomain != i.TrustDomain || got.EndpointURL != i.EndpointURL || got.EndpointID != i.EndpointID || len(got.Roots) != len(i.Roots) {
			t.Errorf("got %+v", got)
		}
		if got.Fingerprint() != i.Fingerprint() || len(i.Fingerprint()) != 24 {
			t.Errorf("fingerprints %q and %q", got.Fingerprint(), i.Fingerprint())
		}
	}
}

func TestEachPartIsInTheFingerprint(t *testing.T) {
	i := example(t)
	seen := map[string]bool{i.Fingerprint(): true}
	for name, change := range map[string]func(*invite.Invitation){
		"domain": func(i *invite.Invitation) {
			i.TrustDomain = spiffeid.RequireTrustDomainFromString("other.org")
			i.EndpointID = spiffeid.RequireFromString("spiffe://other.org/spire/server")
		},
		"url":   func(i *invite.Invitation) { i.EndpointURL = "https://example.org:8444/" },
		"id":    func(i *invite.Invitation) { i.EndpointID = spiffeid.RequireFromPath(td, "/other") },
		"roots": func(i *invite.Invitation) { i.Roots = i.Roots[:1] },
		"web":   func(i *invite.Invitation) { i.EndpointID = spiffeid.ID{} },
	} {
		other := i
		change(&other)
		if f := other.Fingerprint(); f == "" || seen[f] {
			t.Errorf("%s: another has the fingerprint %q", name, f)
		} else {
			seen[f] = true
		}
	}
}

func TestWhatCannotBeMeantIsNotMade(t *testing.T) {
	for want, change := range map[string]func(*invite.Invitation){
		"missing trust domain":          func(i *invite.Invitation) { i.TrustDomain = spiffeid.TrustDomain{} },
		"write https://HOST:PORT/":      func(i *invite.Invitation) { i.EndpointURL = "http://example.org/" },
		`is "https://u:p@example.org/"`: func(i *invite.Invitation) { i.EndpointURL = "https://u:p@example.org/" },
		"the most is 2048":              func(i *invite.Invitation) { i.EndpointURL = "https://example.org/" + strings.Repeat("a", 2048) },
		"is not of trust domain":        func(i *invite.Invitation) { i.EndpointID = spiffeid.RequireFromString("spiffe://other.org/x") },
		"no authorities":                func(i *invite.Invitation) { i.Roots = nil },
		"it has 9 authorities; the most is 8": func(i *invite.Invitation) {
			for len(i.Roots) < 9 {
				i.Roots = append(i.Roots, i.Roots[0])
			}
		},
	} {
		i := example(t)
		change(&i)
		if _, err := i.Encode(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v; want %q", err, want)
		}
	}
}

// wrap makes an invitation of any body, with the right checksum.
func wrap(body string) string {
	sum := sha256.Sum256([]byte(invite.Prefix + body))
	return invite.Prefix + base64.RawURLEncoding.EncodeToString(append(sum[:8], body...))
}

func TestWhatWasNotCopiedWholeOrMadeByOthersIsExplained(t *testing.T) {
	text := encode(t, example(t))
	changed := []byte(text)
	changed[len(changed)/2] ^= 1
	for name, c := range map[string]struct{ text, want string }{
		"empty":              {"  ", "is empty"},
		"a join string":      {"hallmark-join-v1.AGoLZXhhbXBsZS5vcmc", "not an invitation"},
		"cut":                {text[:len(text)-3], "its end is missing"},
		"the prefix alone":   {invite.Prefix, "damaged"},
		"changed":            {string(changed), "damaged"},
		"too long":           {invite.Prefix + strings.Repeat("A", 16<<10), "the most is"},
		"no JSON":            {wrap("x"), "invalid character"},
		"nothing":            {wrap("{}"), "trust domain"},
		"another form":       {wrap(`{"url":"https://example.org/","td":"example.org"}`), "not in the form"},
		"more members":       {wrap(`{"td":"example.org","url":"https://example.org/","x":1}`), "not in the form"},
		"no certificate":     {wrap(`{"td":"example.org","url":"https://example.org/","roots":["AAAA"]}`), "authority 1"},
		"too many":           {wrap(`{"td":"example.org","url":"https://example.org/","roots":[` + strings.Repeat(`"AAAA",`, 8) + `"AAAA"]}`), "the most is 8"},
		"an ID that is none": {wrap(`{"td":"example.org","url":"https://example.org/","id":"x"}`), "endpoint SPIFFE ID"},
	} {
		if got, err := invite.Parse(c.text); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(`{"td":"example.org","url":"https://example.org/"}`)
	text := encode(f, example(f))
	body, err := base64.RawURLEncoding.DecodeString(text[len(invite.Prefix):])
	must(f, err)
	f.Add(string(body[8:]))
	f.Fuzz(func(t *testing.T, body string) {
		in := wrap(body)
		i, err := invite.Parse(in)
		if err != nil {
			return
		}
		if again, err := i.Encode(); err != nil || again != in {
			t.Fatalf("two forms of one value:\n%s\n%s (%v)", in, again, err)
		}
		if i.Fingerprint() == "" {
			t.Fatal("no fingerprint of " + fmt.Sprint(i))
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
