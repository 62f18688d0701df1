package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	caLife   = 20 * 365 * 24 * time.Hour // as long as a cluster may live; it is known to its members only
	certLife = 90 * 24 * time.Hour
	renewAt  = certLife / 3 // before the end
	backdate = 5 * time.Minute
)

// ca is the authority for the connections between members. Every member has its
// key: whoever has one member's disk has the whole store anyway.
type ca struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// Files in the directory of a member.
func (o Options) caFile() string      { return filepath.Join(o.Dir, "authority.pem") } // with its key
func (o Options) rootFile() string    { return filepath.Join(o.Dir, "root.pem") }      // its certificate alone, for etcd
func (o Options) certFile() string    { return filepath.Join(o.Dir, "member.pem") }    // with its key
func (o Options) membersFile() string { return filepath.Join(o.Dir, "joining") }
func (o Options) dataDir() string     { return filepath.Join(o.Dir, "data") }

// newCA makes the authority of a new cluster.
func newCA(now time.Time) (*ca, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"Hallmark"}, CommonName: "cluster"},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return parseCA(der, key)
}

func parseCA(der []byte, key any) (*ca, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(*ecdsa.PrivateKey)
	if !ok || !cert.IsCA || !signer.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("certificate and key are not those of one authority")
	}
	return &ca{cert: cert, key: signer}, nil
}

// serial is that of a certificate: positive, 16 octets (RFC 5280 §4.1.2.2).
func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:])
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b[:])
}

// certify makes a certificate for this member, with which it serves the others
// and is known to them.
func (c *ca) certify(name, address string, now time.Time) ([]byte, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{Organization: []string{"Hallmark"}, CommonName: name},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(certLife), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, c.cert, key.Public(), c.key)
	if err != nil {
		return nil, err
	}
	return encode(der, key)
}

// encode is a certificate and its key in one file, so that a reader has both or
// none.
func encode(der []byte, key crypto.PrivateKey) ([]byte, error) {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})...), nil
}

func decode(data []byte) (der []byte, key any, err error) {
	cert, rest := pem.Decode(data)
	private, _ := pem.Decode(rest)
	if cert == nil || private == nil {
		return nil, nil, errors.New("it has no certificate and key")
	}
	key, err = x509.ParsePKCS8PrivateKey(private.Bytes)
	return cert.Bytes, key, err
}

// loadCA reads the authority, or makes that of a new cluster.
func (o Options) loadCA() (*ca, error) {
	data, err := os.ReadFile(o.caFile())
	if errors.Is(err, fs.ErrNotExist) {
		c, err := newCA(time.Now())
		if err != nil {
			return nil, err
		}
		return c, o.saveCA(c)
	}
	if err != nil {
		return nil, err
	}
	der, key, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.caFile(), err)
	}
	return parseCA(der, key)
}

func (o Options) saveCA(c *ca) error {
	data, err := encode(c.cert.Raw, c.key)
	if err != nil {
		return err
	}
	return writeFile(o.caFile(), data)
}

// renew makes this member a new certificate, if it has none, or one that ends
// soon. Etcd reads it for each connection. Always has it made in any case.
func (o Options) renew(c *ca, always bool, now time.Time) error {
	if data, err := os.ReadFile(o.certFile()); err == nil && !always {
		if der, _, err := decode(data); err == nil {
			if cert, err := x509.ParseCertificate(der); err == nil && now.Before(cert.NotAfter.Add(-renewAt)) {
				return nil
			}
		}
	}
	data, err := c.certify(o.Name, o.Advertise, now)
	if err != nil {
		return err
	}
	return writeFile(o.certFile(), data)
}

// writeFile writes a file that only this user can read, so that a crash leaves
// all of it or what was there before.
func writeFile(path string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it was renamed
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
