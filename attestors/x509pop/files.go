package x509pop

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// Bounds of files, in bytes. PEM files may hold a description of each
// certificate besides it.
const (
	maxKeyFile    = 64 << 10
	maxChainFile  = 512 << 10
	maxBundleFile = 4 << 20 // those of operating systems are a quarter of a megabyte
)

// readFile reads a file of a bounded size. Its errors name the file.
func readFile(path string, limit int64) ([]byte, error) {
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

// readCertificates reads a PEM file of at least one certificate.
func readCertificates(path string, limit int64) ([]*x509.Certificate, error) {
	data, err := readFile(path, limit)
	if err != nil {
		return nil, err
	}
	certs, err := parseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

// parseCertificates reads the certificates of a PEM file, which may hold other
// things as well. A file that breaks off, because it is just being written say,
// is an error and not a shorter list.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
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

// readKey reads a PEM file with an ECDSA or RSA private key.
func readKey(path string) (crypto.Signer, error) {
	data, err := readFile(path, maxKeyFile)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// parseKey reads the first private key of a PEM file. Its errors hold nothing
// of the key.
func parseKey(data []byte) (crypto.Signer, error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return nil, errors.New("no private key in it; PEM is expected")
		}
		if !strings.HasSuffix(block.Type, "PRIVATE KEY") {
			continue // a certificate, or parameters of the key
		}
		var key any
		var err error
		switch {
		case block.Type == "ENCRYPTED PRIVATE KEY", block.Headers["DEK-Info"] != "":
			return nil, errors.New("the private key is encrypted; decrypt it, for example with \"openssl pkey\"")
		case block.Type == "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case block.Type == "RSA PRIVATE KEY":
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case block.Type == "EC PRIVATE KEY":
			key, err = x509.ParseECPrivateKey(block.Bytes)
		default:
			return nil, fmt.Errorf("the private key is a PEM block %s; %s", block.Type, supportedKeys)
		}
		if err != nil {
			return nil, fmt.Errorf("the private key is malformed: %w", err)
		}
		switch key := key.(type) {
		case *rsa.PrivateKey:
			return key, nil
		case *ecdsa.PrivateKey:
			return key, nil
		}
		return nil, fmt.Errorf("the private key (%T) is not supported; %s", key, supportedKeys)
	}
}
