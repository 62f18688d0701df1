package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors/tpm"
)

var now = time.Date(2027, 3, 1, 12, 0, 0, 0, time.UTC)

// maker is a manufacturer's authority.
type maker struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newMaker(t testing.TB) *maker {
	t.Helper()
	m := &maker{key: newKey(t, elliptic.P256())}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "TPMs"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: now.Add(-24 * time.Hour), NotAfter: now.Add(24 * time.Hour),
	}
	m.cert = create(t, c, c, m.key.Public(), m.key)
	return m
}

func create(t testing.TB, c, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, c, parent, public, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// san is a critical subjectAltName that names a TPM, and nothing else.
func san(t testing.TB) pkix.Extension {
	t.Helper()
	tcg := asn1.ObjectIdentifier{2, 23, 133, 2}
	attribute := func(last int, text string) pkix.RelativeDistinguishedNameSET {
		return pkix.RelativeDistinguishedNameSET{{Type: append(tcg[:4:4], last), Value: text}}
	}
	name, err := asn1.Marshal(pkix.RDNSequence{attribute(1, "id:53544d20"), attribute(2, "ST33"), attribute(3, "id:0001")})
	if err != nil {
		t.Fatal(err)
	}
	value, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 4, IsCompound: true, Bytes: name}})
	if err != nil {
		t.Fatal(err)
	}
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: value}
}

// endorse certifies a key as manufacturers do, changed as a test wants it.
func (m *maker) endorse(t testing.TB, public crypto.PublicKey, change func(*x509.Certificate)) []byte {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		KeyUsage:           x509.KeyUsageKeyEncipherment,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
		ExtraExtensions:    []pkix.Extension{san(t)},
	}
	if change != nil {
		change(c)
	}
	return create(t, c, m.cert, public, m.key).Raw
}

func (m *maker) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(m.cert)
	return pool
}

// withRSA is a key of which nobody has the other half.
func withRSA(bits uint, exponent int) *rsa.PublicKey {
	n := new(big.Int).Lsh(big.NewInt(1), bits-1)
	return &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: exponent}
}

func TestAnEndorsementKeysCertificateIsReadWithItsCriticalNames(t *testing.T) {
	m := newMaker(t)
	for name, change := range map[string]func(*x509.Certificate){
		"as the TCG wants it":                        nil,
		"without a use, of a key that only decrypts": func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil },
		"valid for ever":                             func(c *x509.Certificate) { c.NotAfter = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC) },
	} {
		e, err := tpm.VerifyEndorsement(m.endorse(t, withRSA(2048, 65537), change), m.pool(), now)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if e.Manufacturer != "id:53544d20" || e.Model != "ST33" || e.Version != "id:0001" || len(e.Above) != 1 || !e.Above[0].Equal(m.cert) {
			t.Errorf("%s: it says %+v", name, e)
		}
	}
}

func TestACertificateThatIsOfNoTrustedTPMIsRefused(t *testing.T) {
	m, ek := newMaker(t), withRSA(2048, 65537)
	good := m.endorse(t, ek, nil)
	replaced := func(old, new string) []byte { return bytes.Replace(good, []byte(old), []byte(new), 1) }
	for name, c := range map[string]struct {
		der  []byte
		want string
	}{
		"of an unknown maker": {newMaker(t).endorse(t, ek, nil), "does not lead to an authority"},
		"expired":             {m.endorse(t, ek, func(c *x509.Certificate) { c.NotAfter = now.Add(-1) }), "expired"},
		"not yet valid":       {m.endorse(t, ek, func(c *x509.Certificate) { c.NotBefore = now.Add(time.Hour) }), "not yet valid"},
		"of an authority":     {m.endorse(t, ek, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), "that of an authority"},
		"for TLS": {m.endorse(t, ek, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), "for another use"},
		"for anything": {m.endorse(t, ek, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.ExtKeyUsage = nil, []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
		}), "for another use"},
		"of a platform":         {m.endorse(t, ek, func(c *x509.Certificate) { c.UnknownExtKeyUsage[0] = asn1.ObjectIdentifier{2, 23, 133, 8, 2} }), "for another use"},
		"of an attestation key": {m.endorse(t, ek, func(c *x509.Certificate) { c.UnknownExtKeyUsage[0] = asn1.ObjectIdentifier{2, 23, 133, 8, 3} }), "for another use"},
		"of a key that signs": {m.endorse(t, ek, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage, c.KeyUsage = nil, c.KeyUsage|x509.KeyUsageDigitalSignature
		}), "more than encryption"},
		"of no use at all":  {m.endorse(t, ek, func(c *x509.Certificate) { c.UnknownExtKeyUsage, c.KeyUsage = nil, 0 }), "more than encryption"},
		"RSA of 1024 bits":  {m.endorse(t, withRSA(1024, 65537), nil), "1024 bits"},
		"RSA of 3072 bits":  {m.endorse(t, withRSA(3072, 65537), nil), "3072 bits"},
		"RSA of 16384 bits": {m.endorse(t, withRSA(16384, 65537), nil), "16384 bits"},
		"exponent 3":        {m.endorse(t, withRSA(2048, 3), nil), "exponent 3;"},
		"P-384":             {m.endorse(t, newKey(t, elliptic.P384()).Public(), nil), "P-384"},
		"another critical extension": {m.endorse(t, ek, func(c *x509.Certificate) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
		}), "unhandled critical extension"},
		"a name that breaks off": {m.endorse(t, ek, func(c *x509.Certificate) {
			c.ExtraExtensions[0].Value = []byte{0x30, 4, 0xa4, 2, 0x30, 9}
		}), "malformed directoryName"},
		"changed":       {replaced("ST33", "ST34"), "does not"},
		"half":          {good[:len(good)/2], "malformed"},
		"one byte more": {append(bytes.Clone(good), 0), "malformed"},
		"nothing":       {nil, "malformed"},
	} {
		_, err := tpm.VerifyEndorsement(c.der, m.pool(), now)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

func FuzzEndorsement(f *testing.F) {
	m := newMaker(f)
	ek := withRSA(2048, 65537)
	f.Add(m.endorse(f, ek, nil))
	f.Add(san(f).Value)
	other := newMaker(f)
	f.Add(other.endorse(f, newKey(f, elliptic.P256()).Public(), nil))
	f.Fuzz(func(t *testing.T, der []byte) {
		e, err := tpm.VerifyEndorsement(der, other.pool(), now.Add(48*time.Hour)) // when none is valid any more
		if err == nil {
			t.Errorf("%x is accepted: %+v", der, e)
		}
		// The names are parsed before the signature is verified.
		c := &x509.Certificate{
			SerialNumber: big.NewInt(2), NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour), KeyUsage: x509.KeyUsageKeyEncipherment,
			ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Critical: true, Value: der}},
		}
		if named, err := x509.CreateCertificate(rand.Reader, c, m.cert, ek, m.key); err == nil {
			_, _ = tpm.VerifyEndorsement(named, m.pool(), now)
		}
	})
}
