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
	"math/big"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/agentpath"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// Mode says which certificates nodes attest with: external_pki, those of the
	// authorities in ca_bundle_path, or spiffe, X509-SVIDs. Default external_pki.
	Mode string `yaml:"mode" oneof:"external_pki,spiffe"`

	// CABundlePath is a PEM file of the authorities that certificates must lead
	// to, at most 4 MiB. A changed file counts from the next attestation on; as
	// long as it cannot be read, no node is attested. Required in mode
	// external_pki, unless ca_bundle_paths is given.
	CABundlePath string `yaml:"ca_bundle_path" env:"expand"`
	// CABundlePaths are such files when there are several, at most 64.
	CABundlePaths []string `yaml:"ca_bundle_paths" env:"expand"`

	// TrustDomain is that of the X509-SVIDs in mode spiffe: the server's own, or
	// one whose bundle the server has. Default: the server's own.
	TrustDomain string `yaml:"trust_domain" env:"expand"`
	// SVIDPrefix is what the path of an X509-SVID must begin with in mode spiffe.
	// What follows it names the agent: with /spire-exchange the SVID of
	// spiffe://example.org/spire-exchange/host-1 makes the agent
	// spiffe://example.org/spire/agent/x509pop/host-1. With "/" every workload
	// of the trust domain can become an agent. Default /spire-exchange.
	SVIDPrefix string `yaml:"svid_prefix"`

	// AgentPathTemplate makes the path of an agent's SPIFFE ID after
	// /spire/agent/: a Go text/template that must begin with x509pop/. It has
	// the fields of Go's x509.Certificate, such as .Subject.CommonName, and
	// .PluginName, .Fingerprint, .TrustDomain, .SerialNumberHex,
	// .SVIDPathTrimmed and .URISanSelectors.KEY; besides Go's own functions
	// lower, replace, trimPrefix, trimSuffix and sha256sum. A certificate whose
	// value is empty, or has a character that SPIFFE IDs have not, or a slash,
	// is refused. Default: {{ .PluginName }}/{{ .Fingerprint }}, and in mode
	// spiffe {{ .PluginName }}/{{ .SVIDPathTrimmed }}.
	AgentPathTemplate string `yaml:"agent_path_template"`
}

// Modes of [ServerConfig].
const (
	modePKI    = "external_pki"
	modeSPIFFE = "spiffe"
)

const (
	defaultSVIDPrefix = "/spire-exchange"
	reservedPrefix    = "/spire/" // of servers and agents: no workload has an ID below it
	maxBundleFiles    = 64
	maxSANs           = 100 // URIs of a certificate that become selectors
)

// Options of [New].
type Options struct {
	TrustDomain spiffeid.TrustDomain // the server's
	// Roots returns the X.509 authorities of a trust domain, or nil if the server
	// does not have them. Needed to verify in mode spiffe.
	Roots func(spiffeid.TrustDomain) *x509.CertPool
	Now   func() time.Time // nil is time.Now
	Log   *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	o        Options
	mode     string
	bundle   pemfile.Bundle       // mode external_pki
	td       spiffeid.TrustDomain // of SVIDs, mode spiffe
	prefix   string               // of SVIDs' paths, with a slash at its end
	template *agentpath.Template
}

var _ attestors.Server = (*Server)(nil)

// New makes the server's half. It fails if the configuration contradicts
// itself, or if a CA bundle cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, mode: c.Mode}
	text := c.AgentPathTemplate
	var err error
	switch c.Mode {
	case "", modePKI:
		s.mode = modePKI
		if text == "" {
			text = defaultTemplate
		}
		err = s.configurePKI(c)
	case modeSPIFFE:
		if text == "" {
			text = defaultSVIDTemplate
		}
		err = s.configureSPIFFE(c)
	default:
		err = fmt.Errorf("mode is %q; it is %s or %s", c.Mode, modePKI, modeSPIFFE)
	}
	if err != nil {
		return nil, err
	}
	if s.template, err = agentpath.Parse(Name, text, sample()); err != nil {
		return nil, fmt.Errorf("agent_path_template: %w", err)
	}
	return s, nil
}

func (s *Server) configurePKI(c ServerConfig) error {
	paths := c.CABundlePaths
	if c.CABundlePath != "" {
		paths = append([]string{c.CABundlePath}, paths...)
	}
	switch {
	case c.TrustDomain != "":
		return errors.New("trust_domain is for mode spiffe; remove it, or set mode to spiffe")
	case c.SVIDPrefix != "":
		return errors.New("svid_prefix is for mode spiffe; remove it, or set mode to spiffe")
	case len(paths) == 0:
		return errors.New("ca_bundle_path is missing; name the PEM file of the authorities that nodes' certificates lead to")
	case len(paths) > maxBundleFiles:
		return fmt.Errorf("ca_bundle_paths names %d files; the most is %d", len(paths), maxBundleFiles)
	}
	s.bundle.Paths = paths
	if _, err := s.bundle.Load(); err != nil {
		return fmt.Errorf("CA bundle: %w", err)
	}
	return nil
}

func (s *Server) configureSPIFFE(c ServerConfig) error {
	if c.CABundlePath != "" || len(c.CABundlePaths) > 0 {
		return errors.New("ca_bundle_path is for mode external_pki; in mode spiffe the trust domain's bundle says what is trusted; remove it")
	}
	s.td = s.o.TrustDomain
	if c.TrustDomain != "" {
		td, err := spiffeid.TrustDomainFromString(c.TrustDomain)
		if err != nil {
			return fmt.Errorf("trust_domain: %w; write a name like example.org", err)
		}
		s.td = td
	}
	prefix := c.SVIDPrefix
	if prefix == "" {
		prefix = defaultSVIDPrefix
	}
	prefix = strings.TrimSuffix(prefix, "/")
	if prefix != "" {
		if err := spiffeid.ValidatePath(prefix); err != nil {
			return fmt.Errorf("svid_prefix %q: %w", c.SVIDPrefix, err)
		}
	}
	s.prefix = prefix + "/"
	if strings.HasPrefix(s.prefix, reservedPrefix) {
		return fmt.Errorf("svid_prefix %q is of servers' and agents' own IDs, which are not exchanged", c.SVIDPrefix)
	}
	return nil
}

// Verify checks that the payload's certificate is valid now, leads to a trusted
// authority and names an agent, and then, by a challenge, that the node has its
// key.
func (s *Server) Verify(ctx context.Context, payload []byte, ask func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	certs, err := parsePayload(payload)
	if err != nil {
		return nil, err
	}
	leaf := certs[0]
	if err := checkLeaf(leaf); err != nil {
		return nil, err
	}
	roots, err := s.roots()
	if err != nil {
		return nil, err
	}
	chains, err := attestors.VerifyChain(certs, roots, s.o.Now())
	if err != nil {
		return nil, err
	}
	sans, err := s.sans(leaf)
	if err != nil {
		return nil, err
	}
	path, err := s.path(leaf, sans)
	if err != nil {
		return nil, err
	}
	if err := prove(ctx, leaf.PublicKey, ask); err != nil {
		return nil, err
	}
	return &attestors.Evidence{Path: path, Selectors: selectors(leaf, chains, sans), CanReattest: true}, nil
}

// roots returns what is trusted now.
func (s *Server) roots() (*x509.CertPool, error) {
	if s.mode == modeSPIFFE {
		if pool := s.o.Roots(s.td); pool != nil {
			return pool, nil
		}
		s.o.Log.Error("x509pop cannot attest nodes: the server has no bundle of the trust domain of their SVIDs", "trust_domain", s.td.Name())
		return nil, attestors.ErrUnavailable
	}
	pool, err := s.bundle.Load()
	if err != nil {
		s.o.Log.Error("x509pop cannot attest nodes: the CA bundle cannot be read", "error", err)
		return nil, attestors.ErrUnavailable
	}
	return pool, nil
}

// path makes the agent's path.
func (s *Server) path(leaf *x509.Certificate, sans []san) (string, error) {
	data := pathData{
		Certificate:     leaf,
		PluginName:      Name,
		TrustDomain:     s.o.TrustDomain.Name(),
		Fingerprint:     fingerprint(leaf),
		SerialNumberHex: serialHex(leaf.SerialNumber),
		URISanSelectors: make(map[string]string, len(sans)),
	}
	for _, san := range sans {
		data.URISanSelectors[san.key] = san.value
	}
	if s.mode == modeSPIFFE {
		id, err := x509svid.IDFromCert(leaf) // exactly one URI: X509-SVID §2
		if err != nil {
			return "", fmt.Errorf("certificate is no X509-SVID: %w", err)
		}
		trimmed, ok := strings.CutPrefix(id.Path(), s.prefix)
		switch {
		case !id.MemberOf(s.td):
			return "", fmt.Errorf("X509-SVID of %q is not of the trust domain %q", id, s.td.Name())
		case !ok, strings.HasPrefix(id.Path(), reservedPrefix):
			return "", fmt.Errorf("X509-SVID of %q is none that a node may attest with; its path must begin with %s", id, s.prefix)
		case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0: // X509-SVID §4.3
			return "", fmt.Errorf("X509-SVID of %q has a key usage that only authorities have", id)
		}
		data.SVIDPathTrimmed = agentpath.Valid(trimmed)
	}
	path, err := s.template.Path(data)
	if err != nil {
		return "", fmt.Errorf("certificate does not fit the agent_path_template: %w", err)
	}
	return path, nil
}

// prove challenges the node to sign with the private key of its certificate.
func prove(ctx context.Context, public crypto.PublicKey, ask func(context.Context, []byte) ([]byte, error)) error {
	own := nonce{make([]byte, nonceSize)}
	rand.Read(own.Nonce) // never fails
	var c challenge
	if _, ok := public.(*rsa.PublicKey); ok {
		c.RSA = &own
	} else {
		c.ECDSA = &own
	}
	message, err := json.Marshal(c)
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
	return r.verify(public, own.Nonce)
}

var errWrongKey = errors.New("the node does not have the private key of its certificate: its signature is wrong")

// verify checks the signature over both nonces.
func (r *response) verify(public crypto.PublicKey, server []byte) error {
	switch key := public.(type) {
	case *rsa.PublicKey:
		if r.RSA == nil {
			return errors.New("x509pop response is for an ECDSA key, and the certificate's is RSA")
		}
		// SPIRE's agents use the longest salt that fits.
		options := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto}
		if rsa.VerifyPSS(key, crypto.SHA256, digest(server, r.RSA.Nonce), r.RSA.Signature, options) != nil {
			return errWrongKey
		}
	case *ecdsa.PublicKey:
		if r.ECDSA == nil {
			return errors.New("x509pop response is for an RSA key, and the certificate's is ECDSA")
		}
		size := (key.Curve.Params().BitSize + 7) / 8
		if len(r.ECDSA.R) > size || len(r.ECDSA.S) > size {
			return errWrongKey
		}
		x, y := new(big.Int).SetBytes(r.ECDSA.R), new(big.Int).SetBytes(r.ECDSA.S)
		if !ecdsa.Verify(key, digest(server, r.ECDSA.Nonce), x, y) {
			return errWrongKey
		}
	default:
		return fmt.Errorf("the certificate's key (%T) is not supported; %s", public, supportedKeys)
	}
	return nil
}

// san is what one URI of a certificate says in the attestor's own scheme.
type san struct{ key, value string }

// sans reads the URIs x509pop://TRUST-DOMAIN/KEY/VALUE of a certificate; the
// value may have slashes. Others with that scheme are ignored, as is a key with
// a colon, whose selector would be that of another key too.
func (s *Server) sans(leaf *x509.Certificate) ([]san, error) {
	var out []san
	for _, uri := range leaf.URIs {
		if uri.Scheme != Name || uri.Host != s.o.TrustDomain.Name() || uri.User != nil {
			continue
		}
		key, value, ok := strings.Cut(strings.Trim(uri.Path, "/"), "/")
		if !ok || key == "" || value == "" || strings.Contains(key, ":") {
			continue
		}
		out = append(out, san{key, value})
	}
	if len(out) > maxSANs {
		return nil, fmt.Errorf("certificate has %d URIs for selectors; the most is %d", len(out), maxSANs)
	}
	return out, nil
}

// selectors returns what a verified certificate says of a node.
func selectors(leaf *x509.Certificate, chains [][]*x509.Certificate, sans []san) []selector.Selector {
	values := []string{"serialnumber:" + serialHex(leaf.SerialNumber)}
	if cn := leaf.Subject.CommonName; cn != "" {
		values = append(values, "subject:cn:"+cn)
	}
	for _, chain := range chains {
		for _, ca := range chain[1:] {
			values = append(values, "ca:fingerprint:"+fingerprint(ca))
		}
	}
	for _, san := range sans {
		values = append(values, "san:"+san.key+":"+san.value)
	}
	return attestors.SelectorsOf(Name, values)
}
