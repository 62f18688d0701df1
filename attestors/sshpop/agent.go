package sshpop

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"golang.org/x/crypto/ssh"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
)

// AgentConfig is the configuration of the half on the node. The files are read
// at each attempt, so that a certificate that was renewed is picked up.
type AgentConfig struct {
	// HostKeyPath is the file of the host's private key, as sshd has it, not
	// encrypted: ed25519, ECDSA, or RSA of 2048 to 8192 bits. Default
	// /etc/ssh/ssh_host_rsa_key.
	HostKeyPath string `yaml:"host_key_path" env:"expand"`
	// HostCertPath is the file of the certificate that an authority made of the
	// key ("ssh-keygen -h -s CA -n HOST"). Default: host_key_path with -cert.pub
	// at its end.
	HostCertPath string `yaml:"host_cert_path" env:"expand"`
}

const (
	defaultHostKey = "/etc/ssh/ssh_host_rsa_key"
	certSuffix     = "-cert.pub"
	maxFile        = 64 << 10 // bytes, of a key or a certificate
)

// Agent is the half on the node.
type Agent struct {
	config AgentConfig

	mu  sync.Mutex
	key ssh.AlgorithmSigner // of the certificate that the last proof showed; nil once it has signed
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It reads no file.
func NewAgent(c AgentConfig) *Agent {
	if c.HostKeyPath == "" {
		c.HostKeyPath = defaultHostKey
	}
	if c.HostCertPath == "" {
		c.HostCertPath = c.HostKeyPath + certSuffix
	}
	return &Agent{config: c}
}

// Proof reads the files and returns the certificate. The error names the file
// that is wrong.
func (a *Agent) Proof(context.Context) ([]byte, error) {
	cert, err := readCertificate(a.config.HostCertPath)
	if err != nil {
		return nil, err
	}
	key, err := readKey(a.config.HostKeyPath)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(cert.Key.Marshal(), key.PublicKey().Marshal()) {
		return nil, fmt.Errorf("the certificate in %s is not of the key in %s", a.config.HostCertPath, a.config.HostKeyPath)
	}
	data, err := json.Marshal(payload{Certificate: cert.Marshal()})
	if err != nil {
		return nil, err
	}
	if len(data) > maxPayload {
		return nil, fmt.Errorf("%s makes a proof of %d bytes; the most is %d", a.config.HostCertPath, len(data), maxPayload)
	}
	a.mu.Lock()
	a.key = key
	a.mu.Unlock()
	return data, nil
}

func readCertificate(path string) (*ssh.Certificate, error) {
	data, err := pemfile.Read(path, maxFile)
	if err != nil {
		return nil, err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s is no SSH certificate: %w", path, err)
	}
	cert, ok := key.(*ssh.Certificate)
	if !ok {
		return nil, fmt.Errorf("%s holds a bare key, not a certificate of one; make one with \"ssh-keygen -h -s CA -I NAME -n HOST\"", path)
	}
	if err := checkCertificate(cert); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}

// readKey reads a private key. Its errors hold nothing of it.
func readKey(path string) (ssh.AlgorithmSigner, error) {
	data, err := pemfile.Read(path, maxFile)
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(data)
	var encrypted *ssh.PassphraseMissingError
	switch {
	case errors.As(err, &encrypted):
		return nil, fmt.Errorf("%s is encrypted; a host's key is not: remove its passphrase with \"ssh-keygen -p\"", path)
	case err != nil:
		return nil, fmt.Errorf("%s is no SSH private key: %w", path, err)
	}
	signer, ok := key.(ssh.AlgorithmSigner)
	if !ok {
		return nil, fmt.Errorf("%s: a key of type %s is not supported; %s", path, key.PublicKey().Type(), supportedKeys)
	}
	return signer, nil
}

// Respond answers the challenge to the last proof, once, with the key of the
// certificate that the proof showed, even if the files have changed since.
func (a *Agent) Respond(_ context.Context, data []byte) ([]byte, error) {
	a.mu.Lock()
	key := a.key
	a.key = nil
	a.mu.Unlock()
	if key == nil {
		return nil, errors.New("server sent a challenge that follows no proof; sshpop has one for each")
	}
	c, err := parseChallenge(data)
	if err != nil {
		return nil, err
	}
	own := make([]byte, nonceSize)
	rand.Read(own) // never fails
	algorithm := key.PublicKey().Type()
	if algorithm == ssh.KeyAlgoRSA {
		algorithm = ssh.KeyAlgoRSASHA256 // the name of the key's type is that of a signature with SHA-1
	}
	signature, err := key.SignWithAlgorithm(rand.Reader, digest(c.Nonce, own), algorithm)
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", a.config.HostKeyPath, err)
	}
	return json.Marshal(response{Nonce: own, Signature: signature})
}

// String keeps the key out of logs.
func (a *Agent) String() string { return Name }

// GoString keeps the key out of logs.
func (a *Agent) GoString() string { return Name }

// LogValue keeps the key out of logs.
func (a *Agent) LogValue() slog.Value { return slog.StringValue(Name) }
