package upstream

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/server/authority"
)

// DiskConfig is a CA in files, which are read again each time: they may be
// replaced while the server runs.
type DiskConfig struct {
	// Certificate is a PEM file of the CA's certificate, followed by those between
	// it and the root. It is required.
	Certificate string `yaml:"certificate" env:"expand"`
	// Key is a PEM file of its private key, RSA or ECDSA, not encrypted, that
	// nobody but the server's user and group can read. It is required.
	Key string `yaml:"key" env:"expand"`
}

func (c *DiskConfig) check() error {
	if c.Certificate == "" || c.Key == "" {
		return errors.New("disk needs the files certificate and key")
	}
	return nil
}

// disk signs with a key that is in a file.
type disk struct {
	DiskConfig
	bundle string // file; "": the certificate is a root
	now    func() time.Time
}

func newDisk(c DiskConfig, bundle string, now func() time.Time) (*disk, error) {
	d := &disk{c, bundle, now}
	_, _, err := d.load() // what is wrong from the start is told at the start
	return d, err
}

// Name implements [authority.Upstream].
func (d *disk) Name() (kind, address string) { return "disk", d.Certificate }

// Close implements [Upstream].
func (d *disk) Close() error { return nil }

// load reads the CA. The errors name the file that is wrong.
func (d *disk) load() (chain []*x509.Certificate, key crypto.Signer, err error) {
	chain, err = pemfile.Certificates(d.Certificate, maxFile)
	if err != nil {
		return nil, nil, fmt.Errorf("disk.certificate: %w", err)
	}
	if err := authority.CheckPrivate("disk.key", d.Key); err != nil {
		return nil, nil, err
	}
	data, err := pemfile.Read(d.Key, maxSecret)
	if err != nil {
		return nil, nil, fmt.Errorf("disk.key: %w", err)
	}
	if key, err = parseKey(data); err != nil {
		return nil, nil, fmt.Errorf("disk.key: %s: %w", d.Key, err)
	}
	own := chain[0]
	public, ok := own.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case !ok || !public.Equal(key.Public()):
		return nil, nil, fmt.Errorf("disk: the key in %s is not that of the first certificate in %s, %q", d.Key, d.Certificate, own.Subject)
	case !own.BasicConstraintsValid || !own.IsCA || own.KeyUsage&x509.KeyUsageCertSign == 0:
		return nil, nil, fmt.Errorf("disk.certificate: %s: %q is not that of an authority (CA with keyCertSign)", d.Certificate, own.Subject)
	case own.MaxPathLenZero && own.MaxPathLen == 0:
		return nil, nil, fmt.Errorf("disk.certificate: %s: %q may sign no other authority: its path length is 0", d.Certificate, own.Subject)
	case own.CheckSignatureFrom(own) != nil && d.bundle == "":
		return nil, nil, fmt.Errorf("disk.certificate: %s: %q is not a root; name a file with the roots as bundle in upstream", d.Certificate, own.Subject)
	}
	return chain, key, nil
}

// parseKey reads a private key. Its errors hold nothing of it.
func parseKey(data []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return nil, errors.New("there is no private key in it; PEM is expected")
		}
		var key any
		var err error
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			err = errors.New("encrypted")
		default:
			continue // parameters, certificates
		}
		if err != nil {
			if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" {
				return nil, errors.New("the private key is encrypted; write it without a passphrase (openssl pkey)")
			}
			return nil, fmt.Errorf("the %s is malformed", block.Type)
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a key of type %T cannot sign; RSA and ECDSA can", key)
		}
		if err := authority.CheckSigner(signer.Public()); err != nil {
			return nil, err
		}
		return signer, nil
	}
}

// Bundle implements [authority.Follower]: the root that is in the file now.
func (d *disk) Bundle(context.Context) (*bundle.Bundle, bool, error) {
	chain, _, err := d.load()
	if err != nil {
		return nil, false, err
	}
	b := &bundle.Bundle{}
	for _, c := range chain {
		if c.CheckSignatureFrom(c) == nil {
			b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: c})
		}
	}
	return b, false, nil
}

// Sign implements [authority.Upstream].
func (d *disk) Sign(_ context.Context, csr *x509.CertificateRequest, lifetime time.Duration) (chain, roots []*x509.Certificate, err error) {
	above, key, err := d.load()
	if err != nil {
		return nil, nil, err
	}
	parent, now := above[0], d.now()
	spki, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil {
		return nil, nil, err
	}
	keyID, err := authority.KeyID(spki)
	if err != nil {
		return nil, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(authority.Serial()), Subject: csr.Subject, URIs: csr.URIs, SubjectKeyId: keyID,
		NotBefore: now.Add(-authority.Backdate), NotAfter: now.Add(lifetime),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if parent.MaxPathLen > 0 { // RFC 5280 §4.2.1.9
		tmpl.MaxPathLen = parent.MaxPathLen - 1
		tmpl.MaxPathLenZero = tmpl.MaxPathLen == 0
	}
	for _, c := range above {
		if tmpl.NotAfter.After(c.NotAfter) {
			tmpl.NotAfter = c.NotAfter
		}
		if tmpl.NotBefore.Before(c.NotBefore) {
			tmpl.NotBefore = c.NotBefore
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, csr.PublicKey, key)
	if err != nil {
		return nil, nil, fmt.Errorf("sign with the key in %s: %w", d.Key, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, nil, err
	}
	chain, roots = split(append([]*x509.Certificate{cert}, above...))
	return chain, roots, nil
}
