package tpmek

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/attestors/tpm"
)

// ServerConfig is the configuration of the half on the server. It needs one of
// endorsement_ca_path and ek_hashes or ek_hashes_path; what is given must hold.
type ServerConfig struct {
	// EndorsementCAPath is a PEM file of the manufacturers' authorities that the
	// certificates of endorsement keys must lead to, at most 4 MiB; as nodes send
	// no intermediate certificates, those belong into it too. A changed file
	// counts from the next attestation on; as long as it cannot be read, no node
	// is attested. Alone it admits every TPM of these manufacturers.
	EndorsementCAPath string `yaml:"endorsement_ca_path" env:"expand"`

	// EKHashes are the endorsement keys of the nodes that may attest: SHA-256 of
	// the public key as SubjectPublicKeyInfo, in hexadecimal.
	EKHashes []string `yaml:"ek_hashes"`
	// EKHashesPath is a file of more of them, one a line, which may go on with a
	// description; at most 16 MiB. A changed file counts at once, as that of
	// endorsement_ca_path.
	EKHashesPath string `yaml:"ek_hashes_path" env:"expand"`

	// PCRs are those of the SHA-256 bank that become selectors, 0 to 23, for
	// example [0, 2, 4, 7]. Default: none.
	PCRs []uint `yaml:"pcrs"`
}

const maxHashes = 16 << 20 // bytes of the file; 200,000 nodes

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	o      Options
	roots  *pemfile.Bundle // nil: certificates do not count
	listed bool            // only keys that are listed
	inline map[string]bool
	path   string // of the file of more hashes; empty: none
	pcrs   []uint
}

var _ attestors.Server = (*Server)(nil)

// New makes the server's half. It fails if the configuration contradicts itself,
// or if a file cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o, path: c.EKHashesPath, listed: len(c.EKHashes) > 0 || c.EKHashesPath != ""}
	if c.EndorsementCAPath == "" && !s.listed {
		return nil, errors.New("nothing says which TPMs are trusted; set endorsement_ca_path, or list them in ek_hashes")
	}
	if c.EndorsementCAPath != "" {
		s.roots = &pemfile.Bundle{Paths: []string{c.EndorsementCAPath}}
		if _, err := s.roots.Load(); err != nil {
			return nil, fmt.Errorf("endorsement_ca_path: %w", err)
		}
	}
	var err error
	if s.inline, err = parseHashes(strings.Join(c.EKHashes, "\n")); err != nil {
		return nil, fmt.Errorf("ek_hashes: %w", err)
	}
	if s.path != "" {
		if _, err := s.hashes(); err != nil {
			return nil, fmt.Errorf("ek_hashes_path: %w", err)
		}
	}
	s.pcrs = slices.Sorted(slices.Values(c.PCRs))
	if err := checkPCRs(s.pcrs); err != nil {
		return nil, fmt.Errorf("pcrs: %w", err)
	}
	return s, nil
}

// parseHashes reads one hash a line. Empty lines and comments are skipped.
func parseHashes(text string) (map[string]bool, error) {
	out := make(map[string]bool)
	number := 0
	for line := range strings.Lines(text) {
		number++
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0][0] == '#' {
			continue
		}
		hash, err := hex.DecodeString(fields[0])
		if err != nil || len(hash) != sha256.Size {
			return nil, fmt.Errorf("line %d: %q is no SHA-256 in hexadecimal", number, attestors.Clip(fields[0]))
		}
		out[hex.EncodeToString(hash)] = true
	}
	return out, nil
}

// hashes returns the keys of the file as it is now.
func (s *Server) hashes() (map[string]bool, error) {
	data, err := pemfile.Read(s.path, maxHashes)
	if err != nil {
		return nil, err
	}
	out, err := parseHashes(string(data))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.path, err)
	}
	return out, nil
}

// Verify checks that the payload's endorsement key is that of a trusted TPM, and
// then, by a challenge, that the node has that TPM and what its PCRs are.
func (s *Server) Verify(ctx context.Context, payload []byte, ask func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	c, err := parsePayload(payload)
	if err != nil {
		return nil, err
	}
	if _, err := tpm.KindOf(c.ek); err != nil {
		return nil, err
	}
	hash, err := tpm.Fingerprint(c.ek)
	if err != nil {
		return nil, err
	}
	if err := s.checkListed(hash); err != nil {
		return nil, err
	}
	values := []string{"ek:sha256:" + hash}
	if s.roots != nil {
		said, err := s.verifyCertificate(c)
		if err != nil {
			return nil, err
		}
		values = append(values, said...)
	}
	pcrs, err := s.prove(ctx, c, ask)
	if err != nil {
		return nil, err
	}
	for i, n := range s.pcrs {
		values = append(values, fmt.Sprintf("pcr:sha256:%d:%x", n, pcrs[i]))
	}
	return &attestors.Evidence{Path: Name + "/" + hash, Selectors: attestors.SelectorsOf(Name, values), CanReattest: true}, nil
}

func (s *Server) checkListed(hash string) error {
	if !s.listed || s.inline[hash] {
		return nil
	}
	if s.path != "" {
		listed, err := s.hashes()
		if err != nil {
			s.o.Log.Error("tpm_ek cannot attest nodes: the list of endorsement keys cannot be read", "error", err)
			return attestors.ErrUnavailable
		}
		if listed[hash] {
			return nil
		}
	}
	return fmt.Errorf("the endorsement key %s is not one of those that this server lists for %s", hash, Name)
}

// verifyCertificate returns what selectors say of the certificate.
func (s *Server) verifyCertificate(c *claim) ([]string, error) {
	if c.certificate == nil {
		return nil, errors.New("the node has no certificate of its endorsement key, and this server wants one; name its file in certificate_path of the agent")
	}
	roots, err := s.roots.Load()
	if err != nil {
		s.o.Log.Error("tpm_ek cannot attest nodes: the manufacturers' authorities cannot be read", "error", err)
		return nil, attestors.ErrUnavailable
	}
	e, err := tpm.VerifyEndorsement(c.certificate, roots, s.o.Now())
	if err != nil {
		return nil, err
	}
	if public, ok := e.Certificate.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(c.ek) {
		return nil, errors.New("the certificate is not of the endorsement key that the node attests with")
	}
	var values []string
	for _, ca := range e.Above {
		values = append(values, fmt.Sprintf("ca:sha256:%x", sha256.Sum256(ca.Raw)))
	}
	for kind, value := range map[string]string{"manufacturer": e.Manufacturer, "model": e.Model, "version": e.Version} {
		if value != "" {
			values = append(values, kind+":"+value)
		}
	}
	return values, nil
}

// prove challenges the node to quote with a key that its TPM holds, and returns
// the PCRs' values.
func (s *Server) prove(ctx context.Context, c *claim, ask func(context.Context, []byte) ([]byte, error)) ([][]byte, error) {
	name, err := tpm.AKName(c.ak)
	if err != nil {
		return nil, err
	}
	credential, secret, err := tpm.NewCredential(c.ek, name)
	if err != nil {
		return nil, err
	}
	message, err := json.Marshal(challenge{Credential: credential.IDObject, Secret: credential.Secret, PCRs: s.pcrs})
	if err != nil {
		return nil, err
	}
	answer, err := ask(ctx, message)
	if err != nil {
		return nil, err
	}
	r, err := parseResponse(answer, s.pcrs)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(r.Quote)
	if !ecdsa.VerifyASN1(c.ak, digest[:], r.Signature) {
		return nil, errors.New("the quote is not signed with the attestation key")
	}
	said, err := tpm.ParseAttested(r.Quote)
	switch {
	case err != nil:
		return nil, err
	case said.Quoted == nil:
		return nil, errors.New("the TPM signed something else than a quote")
	case subtle.ConstantTimeCompare(said.ExtraData, secret) != 1:
		return nil, errors.New("the quote does not hold the secret of this challenge: the TPM has not activated it")
	case !slices.Equal(said.Quoted.PCRs, s.pcrs):
		return nil, fmt.Errorf("the quote is of the PCRs %v; %v were asked for", said.Quoted.PCRs, s.pcrs)
	case !said.Quoted.Matches(r.PCRs):
		return nil, errors.New("the PCRs that the node sent are not those that its TPM quoted; if they have just changed, try again")
	}
	return r.PCRs, nil
}
