package relyingparty

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/credentials/processcreds"

	"github.com/hallmark-id/hallmark/pkg/credential"
)

const (
	anchorARN  = "arn:aws:rolesanywhere:eu-central-1:123456789012:trust-anchor/0a1b2c3d-0000-4000-8000-000000000000"
	profileARN = "arn:aws:rolesanywhere:eu-central-1:123456789012:profile/0a1b2c3d-0000-4000-8000-000000000001"
)

// rolesAnywhere stands for IAM Roles Anywhere: CreateSession, with a trust anchor.
type rolesAnywhere struct{ anchor *x509.CertPool }

func (a rolesAnywhere) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<16))
	var asked struct {
		DurationSeconds                                      int
		ProfileArn, RoleArn, TrustAnchorArn, RoleSessionName string
	}
	var caller *x509.Certificate
	if err == nil {
		caller, err = a.verify(r, body)
	}
	switch {
	case err != nil:
		answer(rw, http.StatusForbidden, map[string]string{"message": err.Error()})
		return
	case r.Method != http.MethodPost || r.URL.Path != "/sessions" || json.Unmarshal(body, &asked) != nil || asked.TrustAnchorArn != anchorARN || asked.ProfileArn != profileARN:
		answer(rw, http.StatusNotFound, map[string]string{"message": "no such trust anchor or profile"})
		return
	case asked.RoleArn != role:
		answer(rw, http.StatusForbidden, map[string]string{"message": "Unable to assume role for " + asked.RoleArn})
		return
	}
	answer(rw, http.StatusCreated, map[string]any{"subjectArn": "arn:aws:rolesanywhere:eu-central-1:123456789012:subject/x", "credentialSet": []any{map[string]any{
		"roleArn": role, "packedPolicySize": 1,
		"credentials": map[string]string{
			"accessKeyId": "ASIA", "secretAccessKey": "secret", "sessionToken": fmt.Sprintf("%s %s %d", caller.URIs[0], asked.RoleSessionName, asked.DurationSeconds),
			"expiration": soon().Format(time.RFC3339),
		},
	}}})
}

// verify returns whose request it is. It follows the User Guide's "Signing
// process" from the headers that the request says are signed.
func (a rolesAnywhere) verify(r *http.Request, body []byte) (*x509.Certificate, error) {
	algorithm, rest, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	given := map[string]string{}
	for part := range strings.SplitSeq(rest, ", ") {
		name, value, _ := strings.Cut(part, "=")
		given[name] = value
	}
	certificate := func(text string) (*x509.Certificate, error) {
		der, err := base64.StdEncoding.DecodeString(text)
		if err != nil {
			return nil, err
		}
		return x509.ParseCertificate(der)
	}
	caller, err := certificate(r.Header.Get("X-Amz-X509"))
	if err != nil {
		return nil, err
	}
	between := x509.NewCertPool()
	if chain := r.Header.Get("X-Amz-X509-Chain"); chain != "" {
		for text := range strings.SplitSeq(chain, ",") {
			c, err := certificate(text)
			if err != nil {
				return nil, err
			}
			between.AddCert(c)
		}
	}
	// "Authentication", constraints of the signing certificate.
	if caller.Version != 3 || caller.IsCA || !caller.BasicConstraintsValid || caller.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return nil, errors.New("Insufficient certificate")
	}
	if _, err := caller.Verify(x509.VerifyOptions{Roots: a.anchor, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return nil, fmt.Errorf("Untrusted certificate. %w", err)
	}
	date := r.Header.Get("X-Amz-Date")
	at, err := time.Parse("20060102T150405Z", date)
	if err != nil || time.Since(at).Abs() > 5*time.Minute {
		return nil, errors.New("Signature expired")
	}
	serial, scope, _ := strings.Cut(given["Credential"], "/")
	if serial != caller.SerialNumber.String() || scope != date[:8]+"/eu-central-1/rolesanywhere/aws4_request" {
		return nil, errors.New("Credential should be scoped correctly")
	}
	names := strings.Split(given["SignedHeaders"], ";")
	for _, needed := range []string{"host", "x-amz-date", "x-amz-x509"} {
		if !slices.Contains(names, needed) {
			return nil, fmt.Errorf("%s is not signed", needed)
		}
	}
	if !slices.IsSorted(names) || slices.Contains(names, "x-amz-x509-chain") != (r.Header.Get("X-Amz-X509-Chain") != "") {
		return nil, errors.New("the signed headers are not in order, or lack the chain")
	}
	hash := func(data []byte) string { return fmt.Sprintf("%x", sha256.Sum256(data)) }
	canonical := r.Method + "\n" + r.URL.EscapedPath() + "\n" + r.URL.RawQuery + "\n"
	for _, name := range names {
		value := r.Header.Get(name)
		if name == "host" {
			value = r.Host
		}
		canonical += name + ":" + strings.Join(strings.Fields(value), " ") + "\n"
	}
	canonical += "\n" + given["SignedHeaders"] + "\n" + hash(body)
	digest := sha256.Sum256([]byte(algorithm + "\n" + date + "\n" + scope + "\n" + hash([]byte(canonical))))
	signature, err := hex.DecodeString(given["Signature"])
	if err != nil {
		return nil, err
	}
	valid := false
	switch key := caller.PublicKey.(type) {
	case *ecdsa.PublicKey:
		valid = algorithm == "AWS4-X509-ECDSA-SHA256" && ecdsa.VerifyASN1(key, digest[:], signature)
	case *rsa.PublicKey:
		valid = algorithm == "AWS4-X509-RSA-SHA256" && rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], signature) == nil
	}
	if !valid {
		return nil, errors.New("The request signature we calculated does not match the signature you provided")
	}
	return caller, nil
}

func (w *world) rolesAnywhere(t *testing.T) {
	dir := t.TempDir()
	w.hallmark("fetch", "x509", "--write", dir).Run(t)
	bundle, err := os.ReadFile(filepath.Join(dir, "bundle.0.pem"))
	must(t, err)
	anchor := x509.NewCertPool()
	anchor.AppendCertsFromPEM(bundle)
	at := w.cloud(t, rolesAnywhere{anchor}.ServeHTTP)
	line := "credential aws --role-arn " + role + " --trust-anchor-arn " + anchorARN + " --profile-arn " + profileARN + " --ca-file " + w.authority.Path
	const variable = "AWS_ENDPOINT_URL_ROLESANYWHERE"
	t.Setenv(variable, at)
	given, err := processcreds.NewProvider(w.line(t, line+" --session-name it --duration 20m")).Retrieve(t.Context())
	must(t, err)
	if given.AccessKeyID != "ASIA" || given.SecretAccessKey != "secret" || given.SessionToken != workload+" it 1200" || time.Until(given.Expires) < 50*time.Minute {
		t.Errorf("the SDK has %+v", given)
	}
	given, err = processcreds.NewProvider(w.line(t, line+" --spiffe-id "+workload)).Retrieve(t.Context())
	must(t, err)
	if given.SessionToken != workload+"  0" { // a profile may refuse a name of a session
		t.Errorf("the SDK has %+v", given)
	}
	refused := func(want string, code int, args ...string) {
		t.Helper()
		c := w.hallmark(append(strings.Fields(line), args...)...)
		c.Env = append(c.Env, variable+"="+at)
		stdout, stderr, got := c.Try(t)
		if got != code || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("%q: exit status %d\n%s%s", args, got, stdout, stderr)
		}
	}
	refused("Unable to assume role", 1, "--role-arn", role+"x")
	refused("no X509-SVID of spiffe://example.org/other", 1, "--spiffe-id", "spiffe://example.org/other")
	refused("of one region", 2, "--profile-arn", strings.Replace(profileARN, "eu-central", "us-east", 1))
	refused("--token-file is of no use", 2, "--token-file", "x")
	at = w.cloud(t, rolesAnywhere{w.authority.Pool()}.ServeHTTP)
	refused("Untrusted certificate", 1)
}

// pki is an authority of a test's own: a root, one below it, and keys of both.
type pki struct {
	root, below *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newPKI(t *testing.T) pki {
	t.Helper()
	make := func(name string, parent *x509.Certificate, by *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		must(t, err)
		c := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		if parent == nil {
			parent, by = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
		must(t, err)
		c, err = x509.ParseCertificate(der)
		must(t, err)
		return c, key
	}
	root, key := make("root", nil, nil)
	below, key := make("below", root, key)
	return pki{root, below, key}
}

func (p pki) anchor() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.root)
	return pool
}

// svid makes a certificate of a workload, with its chain.
func (p pki) svid(t *testing.T, key crypto.Signer, until time.Time) []*x509.Certificate {
	t.Helper()
	id, err := url.Parse(workload)
	must(t, err)
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 159))
	must(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, URIs: []*url.URL{id}, NotBefore: time.Now().Add(-time.Hour), NotAfter: until,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
	}, p.below, key.Public(), p.key)
	must(t, err)
	c, err := x509.ParseCertificate(der)
	must(t, err)
	return []*x509.Certificate{c, p.below}
}

// altered changes requests on their way.
type altered struct {
	to     http.RoundTripper
	change func(r *http.Request, body []byte) []byte
}

func (a altered) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	body = a.change(r, body)
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	return a.to.RoundTrip(r)
}

func TestIAMRolesAnywhereTakesWhatIsSignedWithAnSVIDBelowItsTrustAnchorAlone(t *testing.T) {
	ours, others := newPKI(t), newPKI(t)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	later := time.Now().Add(time.Hour)
	server := httptest.NewServer(rolesAnywhere{ours.anchor()})
	t.Cleanup(server.Close)
	same := func(_ *http.Request, body []byte) []byte { return body }
	for name, c := range map[string]struct {
		chain  []*x509.Certificate
		key    crypto.Signer
		at     time.Time
		change func(*http.Request, []byte) []byte
		want   string // "": it is taken
	}{
		"an EC key":              {ours.svid(t, ec, later), ec, time.Now(), same, ""},
		"an RSA key":             {ours.svid(t, rsaKey, later), rsaKey, time.Now(), same, ""},
		"another authority":      {others.svid(t, ec, later), ec, time.Now(), same, "Untrusted certificate"},
		"a chain with a gap":     {ours.svid(t, ec, later)[:1], ec, time.Now(), same, "Untrusted certificate"},
		"an expired certificate": {ours.svid(t, ec, time.Now().Add(-time.Minute)), ec, time.Now(), same, "Untrusted certificate"},
		"a stolen certificate":   {ours.svid(t, rsaKey, later), ec, time.Now(), same, "does not match"},
		"an old request":         {ours.svid(t, ec, later), ec, time.Now().Add(-10 * time.Minute), same, "Signature expired"},
		"an altered body": {ours.svid(t, ec, later), ec, time.Now(), func(_ *http.Request, body []byte) []byte {
			return bytes.Replace(body, []byte(`"durationSeconds":900`), []byte(`"durationSeconds":43200`), 1)
		}, "does not match"},
		"an altered date": {ours.svid(t, ec, later), ec, time.Now().Add(-10 * time.Minute), func(r *http.Request, body []byte) []byte {
			r.Header.Set("X-Amz-Date", time.Now().UTC().Format("20060102T150405Z"))
			return body
		}, "does not match"},
		"another chain": {ours.svid(t, ec, later), ec, time.Now(), func(r *http.Request, body []byte) []byte {
			r.Header.Set("X-Amz-X509-Chain", r.Header.Get("X-Amz-X509-Chain")+","+base64.StdEncoding.EncodeToString(others.root.Raw))
			return body
		}, "does not match"},
	} {
		t.Run(name, func(t *testing.T) {
			of := credential.RolesAnywhere{
				Endpoint: server.URL, TrustAnchorARN: anchorARN, ProfileARN: profileARN, RoleARN: role, Duration: 15 * time.Minute,
				Client: &http.Client{Transport: altered{http.DefaultTransport, c.change}},
			}
			given, err := of.Assume(t.Context(), c.chain, c.key, c.at)
			switch {
			case c.want == "" && (err != nil || given.SessionToken != workload+"  900" || given.Version != 1):
				t.Errorf("got %+v, %v", given, err)
			case c.want != "" && (given != nil || err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("got %+v, %v; want %q", given, err, c.want)
			}
		})
	}
}
