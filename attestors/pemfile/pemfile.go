// Package pemfile reads the PEM files that attestors are configured with, and
// keeps up with those of trusted authorities. It is no attestor.
package pemfile

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
)

const maxBundle = 4 << 20 // bytes; those of operating systems are a quarter of a megabyte

// Read reads a file of a bounded size. Its errors name the file.
func Read(path string, limit int64) ([]byte, error) {
	// A pipe or a device could keep the reader waiting for ever.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	switch {
	case err != nil:
		return nil, err
	case int64(len(data)) > limit:
		return nil, fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return data, nil
}

// Certificates reads a PEM file of at least one certificate.
func Certificates(path string, limit int64) ([]*x509.Certificate, error) {
	data, err := Read(path, limit)
	if err != nil {
		return nil, err
	}
	certs, err := ParseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

// ParseCertificates reads the certificates of a PEM file, which may hold other
// things as well. A file that breaks off, because it is just being written say,
// is an error and not a shorter list.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	blocks, rest := 0, data
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		blocks++
		if !strings.Contains(block.Type, "CERTIFICATE") {
			continue // the private key, or parameters of it
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("PEM block %d is a %s, not a CERTIFICATE", blocks, block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("PEM block %d: %w", blocks, err)
		}
		certs = append(certs, cert)
	}
	if begun := bytes.Count(data, []byte("-----BEGIN ")); begun != blocks {
		return nil, fmt.Errorf("of %d PEM blocks %d are malformed", begun, begun-blocks)
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate in it; PEM is expected")
	}
	return certs, nil
}

// Bundle is the files of trusted authorities. They are read each time, which is
// cheap beside verifying a signature and misses no change, and parsed when they
// differ.
type Bundle struct {
	Paths []string

	mu   sync.Mutex
	data [][]byte // that pool was made of
	pool *x509.CertPool
}

// Load returns the authorities in the files as they are now.
func (b *Bundle) Load() (*x509.CertPool, error) {
	data := make([][]byte, len(b.Paths))
	for i, path := range b.Paths {
		var err error
		if data[i], err = Read(path, maxBundle); err != nil {
			return nil, err
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pool != nil && equal(b.data, data) {
		return b.pool, nil
	}
	pool := x509.NewCertPool()
	for i, path := range b.Paths {
		certs, err := ParseCertificates(data[i])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for j, cert := range certs {
			// What Go takes as a root; version 1 has no extension to say it.
			if cert.Version >= 3 && !cert.BasicConstraintsValid || cert.BasicConstraintsValid && !cert.IsCA {
				return nil, fmt.Errorf("%s: certificate %d, of %q, is not that of a certificate authority", path, j+1, cert.Subject.String())
			}
			pool.AddCert(cert)
		}
	}
	b.data, b.pool = data, pool
	return pool, nil
}

func equal(a, b [][]byte) bool {
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}
