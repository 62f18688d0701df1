package x509pop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

// Bounds of files, in bytes. PEM files may hold a description of each
// certificate besides it.
const (
	maxKeyFile   = 64 << 10
	maxChainFile = 512 << 10
)

// readKey reads a PEM file with an ECDSA or RSA private key.
func readKey(path string) (crypto.Signer, error) {
	data, err := pemfile.Read(path, maxKeyFile)
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
