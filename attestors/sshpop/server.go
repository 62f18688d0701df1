package sshpop

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/agentpath"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// CertAuthorities are the public keys of the authorities that sign hosts'
	// certificates, each as a line of an authorized_keys file: "ssh-ed25519
	// AAAA…". Required, unless cert_authorities_path is given; with both, both
	// count.
	CertAuthorities []string `yaml:"cert_authorities"`
	// CertAuthoritiesPath is a file of such lines, at most 1 MiB. A changed file
	// counts from the next attestation on; as long as it cannot be read, no node
	// is attested.
	CertAuthoritiesPath string `yaml:"cert_authorities_path" env:"expand"`

	// CanonicalDomain is the domain that the first host name in a certificate
	// must lie in. Default: any.
	CanonicalDomain string `yaml:"canonical_domain"`

	// AgentPathTemplate makes the path of an agent's SPIFFE ID after
	// /spire/agent/: a Go text/template that must begin with sshpop/. It has
	// .PluginName, .Fingerprint, .Hostname (the first host name, without
	// canonical_domain), .ValidPrincipals, .KeyId and .Serial; besides Go's own
	// functions lower, replace, trimPrefix, trimSuffix and sha256sum. A
	// certificate whose value is empty, or has a character that SPIFFE IDs have
	// not, or a slash, is refused. Default: {{ .PluginName }}/{{ .Fingerprint }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
}

const (
	defaultTemplate = "{{ .PluginName }}/{{ .Fingerprint }}"
	maxAuthorities  = 1 << 20 // bytes of the file
	maxPrincipals   = 100     // of a certificate; each becomes a selector
)

// pathData is what a template is executed with.
type pathData struct {
	PluginName      string // sshpop
	Fingerprint     string // SHA-256 of the certificate
	Hostname        string // the first principal, without the canonical domain
	ValidPrincipals []string
	KeyId           string // named as in SPIRE
	Serial          uint64
}

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	o        Options
	inline   []ssh.PublicKey
	path     string // of the file of more authorities; empty: none
	domain   string // with a dot before it; empty: any
	template *agentpath.Template
}

var _ attestors.Server = (*Server)(nil)

// New makes the server's half. It fails if the configuration contradicts
// itself, or if an authority cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, path: c.CertAuthoritiesPath}
	if len(c.CertAuthorities) == 0 && s.path == "" {
		return nil, errors.New("cert_authorities is missing; list the public keys of the authorities that sign hosts' certificates")
	}
	for i, line := range c.CertAuthorities {
		keys, err := parseAuthorities([]byte(line))
		if err != nil {
			return nil, fmt.Errorf("cert_authorities: number %d: %w", i+1, err)
		}
		s.inline = append(s.inline, keys...)
	}
	if _, err := s.authorities(); err != nil {
		return nil, fmt.Errorf("cert_authorities_path: %w", err)
	}
	if d := strings.Trim(c.CanonicalDomain, "."); d != "" {
		s.domain = "." + d
	} else if c.CanonicalDomain != "" {
		return nil, fmt.Errorf("canonical_domain is %q; write a name like example.org", c.CanonicalDomain)
	}
	text := c.AgentPathTemplate
	if text == "" {
		text = defaultTemplate
	}
	const word = "sample"
	var err error
	s.template, err = agentpath.Parse(Name, text, pathData{
		PluginName: Name, Fingerprint: word, Hostname: word, ValidPrincipals: []string{word}, KeyId: word, Serial: 1,
	})
	if err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return s, nil
}

// parseAuthorities reads lines of an authorized_keys file, of which there must
// be one. Empty lines and comments are skipped.
func parseAuthorities(data []byte) ([]ssh.PublicKey, error) {
	var keys []ssh.PublicKey
	for i, line := range bytes.Split(data, []byte("\n")) {
		if line = bytes.TrimSpace(line); len(line) == 0 || line[0] == '#' {
			continue
		}
		key, _, options, _, err := ssh.ParseAuthorizedKey(line)
		switch {
		case err != nil:
			return nil, fmt.Errorf("line %d is no public key; write one like \"ssh-ed25519 AAAA…\": %w", i+1, err)
		case len(options) > 0:
			return nil, fmt.Errorf("line %d has options (%s) before its key, which would not be heeded; remove them", i+1, strings.Join(options, ","))
		}
		if err := checkKey(key); err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
		keys = append(keys, key)
	}
	if len(keys) == 0 {
		return nil, errors.New("no public key in it")
	}
	return keys, nil
}

// authorities returns those that are trusted now.
func (s *Server) authorities() ([]ssh.PublicKey, error) {
	if s.path == "" {
		return s.inline, nil
	}
	data, err := pemfile.Read(s.path, maxAuthorities)
	if err != nil {
		return nil, err
	}
	keys, err := parseAuthorities(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.path, err)
	}
	return append(keys, s.inline...), nil
}

// Verify checks that the payload's certificate is a host's, valid now, of a
// trusted authority and names an agent, and then, by a challenge, that the node
// has its key.
func (s *Server) Verify(ctx context.Context, payload []byte, ask func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	cert, err := parsePayload(payload)
	if err != nil {
		return nil, err
	}
	if err := s.checkCertificate(cert); err != nil {
		return nil, err
	}
	path, err := s.agentPath(cert)
	if err != nil {
		return nil, err
	}
	if err := prove(ctx, cert.Key, ask); err != nil {
		return nil, err
	}
	return &attestors.Evidence{Path: path, Selectors: selectors(cert), CanReattest: true}, nil
}

func (s *Server) checkCertificate(cert *ssh.Certificate) error {
	if err := checkCertificate(cert); err != nil {
		return err
	}
	if n := len(cert.ValidPrincipals); n > maxPrincipals {
		return fmt.Errorf("the certificate names %d hosts; the most is %d", n, maxPrincipals)
	}
	trusted, err := s.authorities()
	if err != nil {
		s.o.Log.Error("sshpop cannot attest nodes: the authorities cannot be read", "error", err)
		return attestors.ErrUnavailable
	}
	// Before the signature, whose cost is bounded for their keys only.
	if !contains(trusted, cert.SignatureKey) {
		return fmt.Errorf("the certificate is signed with the key %s, which is not that of an authority that this server trusts for %s",
			ssh.FingerprintSHA256(cert.SignatureKey), Name)
	}
	if cert.Signature.Format == ssh.KeyAlgoRSA {
		return errors.New("the certificate is signed with SHA-1, which can be forged; sign it with \"ssh-keygen -t rsa-sha2-256\"")
	}
	if len(cert.Signature.Rest) > 0 {
		return errors.New("the certificate's signature goes on after its end")
	}
	// No critical option of hosts is defined: one that is there restricts the
	// certificate in a way that nobody here heeds.
	checker := ssh.CertChecker{Clock: s.o.Now}
	if err := checker.CheckCert(cert.ValidPrincipals[0], cert); err != nil {
		return fmt.Errorf("the certificate of %q does not verify: %w", attestors.Clip(cert.ValidPrincipals[0]), err)
	}
	return nil
}

func contains(keys []ssh.PublicKey, key ssh.PublicKey) bool {
	raw := key.Marshal()
	for _, k := range keys {
		if bytes.Equal(k.Marshal(), raw) {
			return true
		}
	}
	return false
}

// agentPath makes the agent's path.
func (s *Server) agentPath(cert *ssh.Certificate) (string, error) {
	host := cert.ValidPrincipals[0]
	if s.domain != "" {
		var ok bool
		if host, ok = strings.CutSuffix(host, s.domain); !ok || host == "" {
			return "", fmt.Errorf("the certificate is of the host %q, which is not in the domain %s", attestors.Clip(cert.ValidPrincipals[0]), s.domain[1:])
		}
	}
	path, err := s.template.Path(pathData{
		PluginName:      Name,
		Fingerprint:     fingerprint(cert),
		Hostname:        host,
		ValidPrincipals: cert.ValidPrincipals,
		KeyId:           cert.KeyId,
		Serial:          cert.Serial,
	})
	if err != nil {
		return "", fmt.Errorf("certificate does not fit the agent_path_template: %w", err)
	}
	return path, nil
}

// prove challenges the node to sign with the private key of its certificate.
func prove(ctx context.Context, key ssh.PublicKey, ask func(context.Context, []byte) ([]byte, error)) error {
	own := make([]byte, nonceSize)
	rand.Read(own) // never fails
	message, err := json.Marshal(challenge{Nonce: own})
	if err != nil {
		return err
	}
	answer, err := ask(ctx, message)
	if err != nil {
		return err
	}
	r, err := parseResponse(answer)
	if err != nil {
		return err
	}
	// SPIRE's agents sign with SHA-1 if the key is RSA. That may be: what is
	// hashed is fixed by the server's nonce, so that collisions are of no use.
	if key.Verify(digest(own, r.Nonce), r.Signature) != nil {
		return errors.New("the node does not have the private key of its certificate: its signature is wrong")
	}
	return nil
}

// selectors returns what a verified certificate says of a node.
func selectors(cert *ssh.Certificate) []selector.Selector {
	values := []string{"ca:fingerprint:" + fingerprint(cert.SignatureKey)}
	for _, name := range cert.ValidPrincipals {
		if name != "" {
			values = append(values, "principal:"+name)
		}
	}
	return attestors.SelectorsOf(Name, values)
}
