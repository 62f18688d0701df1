package x509pop

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

// AgentConfig is the configuration of the half on the node. The files are read
// at each attempt, so that a certificate that was rotated is picked up.
type AgentConfig struct {
	// PrivateKeyPath is the file of the certificate's private key: PEM of
	// PKCS #8, PKCS #1 or SEC 1, not encrypted. ECDSA on P-256, P-384 or P-521,
	// or RSA of 2048 to 8192 bits. Required.
	PrivateKeyPath string `yaml:"private_key_path" env:"expand"`
	// CertificatePath is the file of the certificate: PEM, which may go on with
	// the intermediate certificates. Its key usage must include
	// digitalSignature. Required.
	CertificatePath string `yaml:"certificate_path" env:"expand"`
	// IntermediatesPath is a file of more intermediate certificates: PEM. With
	// them there are 10 certificates at most. Default: none.
	IntermediatesPath string `yaml:"intermediates_path" env:"expand"`
}

// Agent is the half on the node.
type Agent struct {
	config AgentConfig

	mu  sync.Mutex
	key crypto.Signer // of the certificate that the last proof showed; nil once it has signed
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It fails if a path is missing; it reads no
// file.
func NewAgent(c AgentConfig) (*Agent, error) {
	switch {
	case c.PrivateKeyPath == "":
		return nil, errors.New("private_key_path is missing; name the file of the certificate's private key")
	case c.CertificatePath == "":
		return nil, errors.New("certificate_path is missing; name the file of the node's certificate")
	}
	return &Agent{config: c}, nil
}

// Proof reads the files and returns the certificate with its intermediates. The
// error names the file that is wrong.
func (a *Agent) Proof(context.Context) ([]byte, error) {
	chain, err := pemfile.Certificates(a.config.CertificatePath, maxChainFile)
	if err != nil {
		return nil, err
	}
	key, err := readKey(a.config.PrivateKeyPath)
	if err != nil {
		return nil, err
	}
	leaf := chain[0]
	if err := checkLeaf(leaf); err != nil {
		return nil, fmt.Errorf("%s: %w", a.config.CertificatePath, err)
	}
	if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("the key in %s does not belong to the first certificate in %s", a.config.PrivateKeyPath, a.config.CertificatePath)
	}
	if a.config.IntermediatesPath != "" {
		more, err := pemfile.Certificates(a.config.IntermediatesPath, maxChainFile)
		if err != nil {
			return nil, err
		}
		chain = append(chain, more...)
	}
	if len(chain) > maxCertificates {
		return nil, fmt.Errorf("%s hold %d certificates; the most is %d", a.chainFiles(), len(chain), maxCertificates)
	}
	data, err := json.Marshal(payload{Certificates: raw(chain)})
	if err != nil {
		return nil, err
	}
	if len(data) > maxPayload {
		return nil, fmt.Errorf("%s make a proof of %d bytes; the most is %d", a.chainFiles(), len(data), maxPayload)
	}
	a.mu.Lock()
	a.key = key
	a.mu.Unlock()
	return data, nil
}

func (a *Agent) chainFiles() string {
	if a.config.IntermediatesPath == "" {
		return "the certificates in " + a.config.CertificatePath
	}
	return "the certificates in " + a.config.CertificatePath + " and " + a.config.IntermediatesPath
}

func raw(certs []*x509.Certificate) [][]byte {
	out := make([][]byte, len(certs))
	for i, cert := range certs {
		out[i] = cert.Raw
	}
	return out
}

// Respond answers the challenge to the last proof, once, with the key of the
// certificate that the proof showed, even if the files have changed since.
func (a *Agent) Respond(_ context.Context, data []byte) ([]byte, error) {
	a.mu.Lock()
	key := a.key
	a.key = nil
	a.mu.Unlock()
	if key == nil {
		return nil, errors.New("server sent a challenge that follows no proof; x509pop has one for each")
	}
	c, err := parseChallenge(data)
	if err != nil {
		return nil, err
	}
	own := make([]byte, nonceSize)
	rand.Read(own) // never fails
	var r response
	switch key := key.(type) {
	case *rsa.PrivateKey:
		if c.RSA == nil {
			return nil, errors.New("server sent a challenge for an ECDSA key, and the node's is RSA")
		}
		signature, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest(c.RSA.Nonce, own),
			&rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		if err != nil {
			return nil, fmt.Errorf("sign with %s: %w", a.config.PrivateKeyPath, err)
		}
		r.RSA = &rsaResponse{Nonce: own, Signature: signature}
	case *ecdsa.PrivateKey:
		if c.ECDSA == nil {
			return nil, errors.New("server sent a challenge for an RSA key, and the node's is ECDSA")
		}
		x, y, err := ecdsa.Sign(rand.Reader, key, digest(c.ECDSA.Nonce, own))
		if err != nil {
			return nil, fmt.Errorf("sign with %s: %w", a.config.PrivateKeyPath, err)
		}
		r.ECDSA = &ecdsaResponse{Nonce: own, R: x.Bytes(), S: y.Bytes()}
	}
	return json.Marshal(r)
}

// String keeps the key out of logs.
func (a *Agent) String() string { return Name }

// GoString keeps the key out of logs.
func (a *Agent) GoString() string { return Name }

// LogValue keeps the key out of logs.
func (a *Agent) LogValue() slog.Value { return slog.StringValue(Name) }
