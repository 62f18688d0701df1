package awsiid_test

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/awsiid"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/test/harness"
)

// signedWith makes a message as a test wants it.
func signedWith(t testing.TB, doc string, cert *x509.Certificate, key *rsa.PrivateKey, change func(*pkcs7.SignedData)) string {
	t.Helper()
	s, err := pkcs7.NewSignedData([]byte(doc))
	must(t, err)
	s.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	if change != nil {
		change(s)
	}
	if len(s.GetSignedData().SignerInfos) == 0 && cert != nil {
		must(t, s.AddSigner(cert, key, pkcs7.SignerInfoConfig{}))
	}
	der, err := s.Finish()
	must(t, err)
	return base64.StdEncoding.EncodeToString(der)
}

// TestADocumentThatProvesNothingIsRefused goes through documents and signatures
// by which nobody must become a node.
func TestADocumentThatProvesNothingIsRefused(t *testing.T) {
	aws := harness.NewAWS(t, started())
	doc := started().Document()
	good := aws.Sign(t, doc)
	foreign, foreignKey := harness.SignerCertificate(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), 2048)
	other := func(change func(*harness.EC2Instance)) string {
		i := started()
		change(&i)
		return i.Document()
	}
	signed := func(doc string) []byte { return payload(t, doc, aws.Sign(t, doc)) }
	// An impostor's certificate that has the issuer and the serial of the true one.
	lookalike := *foreign
	data, err := os.ReadFile(aws.Certificate)
	must(t, err)
	block, _ := pem.Decode(data)
	trueCert, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	lookalike.SerialNumber, lookalike.RawIssuer = trueCert.SerialNumber, trueCert.RawSubject
	s := newServer(t, trusting(aws), awsiid.Options{})
	raw, err := base64.StdEncoding.DecodeString(good)
	must(t, err)

	for name, c := range map[string]struct {
		payload []byte
		want    string
	}{
		"a stranger's signature":       {payload(t, doc, harness.SignCMS(t, []byte(doc), foreign, foreignKey)), "signature is wrong"},
		"one that looks like AWS's":    {payload(t, doc, signedWith(t, doc, &lookalike, foreignKey, nil)), "signature is wrong"},
		"another instance's document":  {payload(t, other(func(i *harness.EC2Instance) { i.ID = "i-0fedcba0987654321" }), good), "of another document"},
		"another account's document":   {payload(t, strings.Replace(doc, account, "999999999999", 1), good), "of another document"},
		"a space more":                 {payload(t, doc+" ", good), "of another document"},
		"a foreign account":            {signed(other(func(i *harness.EC2Instance) { i.Account = "999999999999" })), "account 999999999999 may not attest"},
		"another region's document":    {signed(other(func(i *harness.EC2Instance) { i.Region = "eu-central-1" })), "signature is wrong"},
		"an unknown region's document": {signed(other(func(i *harness.EC2Instance) { i.Region = "xx-west-9" })), "does not know"},
		"a region that is a path":      {signed(other(func(i *harness.EC2Instance) { i.Region = "../../etc" })), "is no region"},
		"an instance that is a path":   {signed(other(func(i *harness.EC2Instance) { i.ID = "i-1/../../server" })), "is no instance ID"},
		"an account that is none":      {signed(other(func(i *harness.EC2Instance) { i.Account = "1234" })), "is no account ID"},
		"an instance of tomorrow":      {signed(other(func(i *harness.EC2Instance) { i.Started = time.Now().Add(24 * time.Hour) })), "yet to be started"},
		"no start":                     {signed(strings.Replace(doc, "pendingTime", "pendingTim", 1)), "when its instance was started"},
		"no signature":                 {payload(t, doc, ""), "holds no signature"},
		"the weak signature alone":     {[]byte(`{"document": "{}", "signature": "AAAA"}`), "holds no signature by a key of 2048"},
		"no document":                  {payload(t, "", good), "holds no document"},
		"two signatures": {payload(t, doc, signedWith(t, doc, foreign, foreignKey, func(s *pkcs7.SignedData) {
			must(t, s.AddSigner(foreign, foreignKey, pkcs7.SignerInfoConfig{}))
			must(t, s.AddSigner(foreign, foreignKey, pkcs7.SignerInfoConfig{}))
		})), "2 signatures"},
		"nobody's signature": {payload(t, doc, signedWith(t, doc, nil, nil, nil)), "0 signatures"},
		"a signature with SHA-1": {payload(t, doc, signedWith(t, doc, foreign, foreignKey, func(s *pkcs7.SignedData) {
			s.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA1)
		})), "SHA-256 or longer"},
		"a signature without document": {payload(t, doc, signedWith(t, doc, foreign, foreignKey, func(s *pkcs7.SignedData) {
			must(t, s.AddSigner(foreign, foreignKey, pkcs7.SignerInfoConfig{}))
			s.Detach()
		})), "holds no document"},
		"half a signature":     {payload(t, doc, base64.StdEncoding.EncodeToString(raw[:len(raw)/2])), "no PKCS #7"},
		"a bit turned":         {payload(t, doc, base64.StdEncoding.EncodeToString(append(bytes.Clone(raw[:len(raw)-1]), raw[len(raw)-1]^1))), "signature is wrong"},
		"no base64":            {payload(t, doc, "<html>"), "not base64"},
		"no PKCS #7":           {payload(t, doc, "AAAA"), "no PKCS #7"},
		"a huge signature":     {payload(t, doc, strings.Repeat("A", 40<<10)), "the most is"},
		"a huge document":      {payload(t, strings.Repeat(" ", 20<<10)+doc, good), "the most is"},
		"a huge payload":       {bytes.Repeat([]byte(" "), 70<<10), "the most is"},
		"an empty payload":     {nil, "malformed"},
		"half a payload":       {payload(t, doc, good)[:500], "malformed"},
		"JSON of another form": {[]byte(`{"document": {"accountId": "123456789012"}}`), "malformed"},
		"null":                 {[]byte("null"), "no document"},
	} {
		e, err := s.Verify(t.Context(), c.payload, unasked(t))
		if err == nil || e != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), aws.Certificate) {
			t.Errorf("%s: the node is told %v", name, err)
		}
	}
}

func TestACertificateThatHasEndedVerifiesNothing(t *testing.T) {
	aws := harness.NewAWS(t, started())
	for name, now := range map[string]time.Time{"ended": time.Now().Add(48 * time.Hour), "not yet valid": time.Now().Add(-2 * time.Hour)} {
		s := newServer(t, trusting(aws), awsiid.Options{Now: func() time.Time { return now }})
		if _, err := s.Verify(t.Context(), payload(t, started().Document(), aws.Sign(t, started().Document())), unasked(t)); err == nil || !strings.Contains(err.Error(), "has expired, or is not valid yet") {
			t.Errorf("%s: error is %v", name, err)
		}
	}
}

func TestAWeakKeyVerifiesNothing(t *testing.T) {
	t.Setenv("GODEBUG", "rsa1024min=0")
	aws := harness.NewAWS(t, started())
	cert, key := harness.SignerCertificate(t, time.Now().Add(-time.Hour), time.Now().Add(time.Hour), 1024)
	must(t, os.WriteFile(aws.Certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o600))
	doc := started().Document()
	if _, err := newServer(t, trusting(aws), awsiid.Options{}).Verify(t.Context(), payload(t, doc, harness.SignCMS(t, []byte(doc), cert, key)), unasked(t)); err == nil || !strings.Contains(err.Error(), "1024 bits") {
		t.Errorf("error is %v", err)
	}
}

func TestAnOldDocumentIsRefused(t *testing.T) {
	i := started()
	aws := harness.NewAWS(t, i)
	proof := payload(t, i.Document(), aws.Sign(t, i.Document()))
	for after, want := range map[time.Duration]bool{0: true, 10 * time.Minute: true, 12 * time.Minute: false, 20 * time.Hour: false} {
		c := trusting(aws)
		c.MaxAge = config.Duration(10 * time.Minute)
		s := newServer(t, c, awsiid.Options{Now: func() time.Time { return i.Started.Add(after) }})
		if _, err := s.Verify(t.Context(), proof, unasked(t)); (err == nil) != want {
			t.Errorf("after %v: %v", after, err)
		}
	}
}

func TestAForeignRegionIsRefused(t *testing.T) {
	aws := harness.NewAWS(t, started())
	c := trusting(aws)
	c.RegionAllowList = []string{"eu-central-1"}
	if _, err := newServer(t, c, awsiid.Options{}).Verify(t.Context(), payload(t, started().Document(), aws.Sign(t, started().Document())), unasked(t)); err == nil || !strings.Contains(err.Error(), "region us-west-2 may not attest") {
		t.Errorf("error is %v", err)
	}
}

func TestAFileOfCertificatesThatCannotBeReadAdmitsNobody(t *testing.T) {
	aws := harness.NewAWS(t, started())
	s := newServer(t, trusting(aws), awsiid.Options{})
	must(t, os.Remove(aws.Certificate))
	_, err := s.Verify(t.Context(), payload(t, started().Document(), aws.Sign(t, started().Document())), unasked(t))
	if !errors.Is(err, attestors.ErrUnavailable) || strings.Contains(err.Error(), aws.Certificate) {
		t.Errorf("error is %v", err)
	}
}

func FuzzVerify(f *testing.F) {
	aws := harness.NewAWS(f, started())
	doc := started().Document()
	good := aws.Sign(f, doc)
	s := newServer(f, trusting(aws), awsiid.Options{})
	f.Add(payload(f, doc, good))
	f.Add(payload(f, doc, good[:200]))
	f.Add(payload(f, "{}", "AAAA"))
	f.Add([]byte(`{"document": 1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := s.Verify(t.Context(), data, unasked(t))
		if err == nil && e.Path != "aws_iid/"+account+"/"+region+"/"+id {
			t.Errorf("admitted as %s", e.Path)
		}
	})
}
