package tpmdevid

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/attestors/tpm"
)

// ServerConfig is the configuration of the half on the server. A changed file
// counts from the next attestation on; as long as it cannot be read, no node is
// attested.
type ServerConfig struct {
	// DevIDCAPath is a PEM file of the authorities that DevID certificates must
	// lead to, at most 4 MiB. Required.
	DevIDCAPath string `yaml:"devid_ca_path" env:"expand"`
	// EndorsementCAPath is a PEM file of the TPMs' manufacturers' authorities,
	// at most 4 MiB; as nodes send no intermediate certificates of theirs, those
	// belong into it too. Required.
	EndorsementCAPath string `yaml:"endorsement_ca_path" env:"expand"`
}

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	o           Options
	devID       pemfile.Bundle
	endorsement pemfile.Bundle
}

var _ attestors.Server = (*Server)(nil)

// New makes the server's half. It fails if a file cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.DevIDCAPath == "":
		return nil, errors.New("devid_ca_path is missing; name the PEM file of the authorities that DevID certificates lead to")
	case c.EndorsementCAPath == "":
		return nil, errors.New("endorsement_ca_path is missing; name the PEM file of the TPMs' manufacturers' authorities")
	}
	s := &Server{o: o}
	s.devID.Paths, s.endorsement.Paths = []string{c.DevIDCAPath}, []string{c.EndorsementCAPath}
	if _, err := s.devID.Load(); err != nil {
		return nil, fmt.Errorf("devid_ca_path: %w", err)
	}
	if _, err := s.endorsement.Load(); err != nil {
		return nil, fmt.Errorf("endorsement_ca_path: %w", err)
	}
	return s, nil
}

// Verify checks that the payload's certificate is valid now, leads to a trusted
// authority, and is of a key that an attestation key has seen in its TPM; and
// then, by a challenge, that the node has that key, and that the attestation key is
// in a TPM that its manufacturer vouches for.
func (s *Server) Verify(ctx context.Context, payload []byte, ask func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	p, certs, err := parsePayload(payload)
	if err != nil {
		return nil, err
	}
	leaf := certs[0]
	if err := checkLeaf(leaf); err != nil {
		return nil, err
	}
	roots, err := s.load(&s.devID)
	if err != nil {
		return nil, err
	}
	chains, err := attestors.VerifyChain(certs, roots, s.o.Now())
	if err != nil {
		return nil, fmt.Errorf("DevID: %w", err)
	}
	ek, err := s.verifyEndorsement(p)
	if err != nil {
		return nil, err
	}
	ak, err := verifyResidence(p, leaf.PublicKey)
	if err != nil {
		return nil, err
	}
	if err := prove(ctx, leaf.PublicKey, ek, ak, ask); err != nil {
		return nil, err
	}
	return &attestors.Evidence{
		Path:        Name + "/" + fingerprint(leaf),
		Selectors:   attestors.SelectorsOf(Name, selectors(leaf, chains)),
		CanReattest: true,
	}, nil
}

// load returns the authorities in files, or says to nobody but the operator why
// there are none.
func (s *Server) load(files *pemfile.Bundle) (*x509.CertPool, error) {
	pool, err := files.Load()
	if err != nil {
		s.o.Log.Error("tpm_devid cannot attest nodes: authorities cannot be read", "error", err)
		return nil, attestors.ErrUnavailable
	}
	return pool, nil
}

// verifyEndorsement returns the endorsement key, which the manufacturer certifies.
func (s *Server) verifyEndorsement(p *payload) (crypto.PublicKey, error) {
	roots, err := s.load(&s.endorsement)
	if err != nil {
		return nil, err
	}
	e, err := tpm.VerifyEndorsement(p.EKCert, roots, s.o.Now())
	if err != nil {
		return nil, err
	}
	ek := e.Certificate.PublicKey
	area, err := tpm.EndorsementArea(ek)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(area, p.EKPub) {
		return nil, errors.New("what the node says of its endorsement key is not what its certificate and the TCG say")
	}
	return ek, nil
}

// verifyResidence checks that the attestation key has seen the certificate's key
// in its TPM. It returns the attestation key's name.
func verifyResidence(p *payload, public crypto.PublicKey) ([]byte, error) {
	devID, err := tpm.ParseArea(p.DevIDPub)
	if err != nil {
		return nil, fmt.Errorf("DevID key: %w", err)
	}
	if of, ok := public.(interface{ Equal(crypto.PublicKey) bool }); !ok || !of.Equal(devID.Public) {
		return nil, errors.New("the DevID certificate is not of the key that the TPM holds")
	}
	if err := devID.Resident(); err != nil {
		return nil, fmt.Errorf("DevID key: %w", err)
	}
	ak, name, err := tpm.ParseRSAAK(p.AKPub)
	if err != nil {
		return nil, err
	}
	signature, err := tpm.ParseSignature(p.CertificationSignature)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256(p.CertifiedDevID)
	if rsa.VerifyPKCS1v15(ak, crypto.SHA256, digest[:], signature) != nil {
		return nil, errors.New("what should certify the DevID key is not signed with the attestation key")
	}
	said, err := tpm.ParseAttested(p.CertifiedDevID)
	switch {
	case err != nil:
		return nil, err
	case said.Certified == nil:
		return nil, errors.New("the attestation key certifies no key")
	case !bytes.Equal(said.Certified.Name, devID.Name):
		return nil, errors.New("the attestation key certifies another key than that of the DevID certificate")
	}
	return name, nil
}

// prove challenges the node to sign with the certificate's key, and to have its
// TPM give out a secret.
func prove(ctx context.Context, public, ek crypto.PublicKey, ak []byte, ask func(context.Context, []byte) ([]byte, error)) error {
	credential, secret, err := tpm.NewCredential(ek, ak)
	if err != nil {
		return err
	}
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails
	message, err := json.Marshal(challenge{DevID: nonce, CredActivation: &activation{credential.IDObject, credential.Secret}})
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
	digest := sha256.Sum256(nonce)
	signed := false
	switch key := public.(type) {
	case *rsa.PublicKey:
		signed = rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], r.DevID) == nil
	case *ecdsa.PublicKey:
		signed = ecdsa.VerifyASN1(key, digest[:], r.DevID)
	}
	if !signed {
		return errors.New("the node does not have the private key of its DevID certificate: its signature is wrong")
	}
	if subtle.ConstantTimeCompare(r.CredActivation, secret) != 1 {
		return errors.New("the node's TPM has not activated the credential: the attestation key is not in the TPM that the manufacturer vouches for")
	}
	return nil
}

// selectors returns what a verified certificate says of a node.
func selectors(leaf *x509.Certificate, chains [][]*x509.Certificate) []string {
	var values []string
	if cn := leaf.Subject.CommonName; cn != "" {
		values = append(values, "subject:cn:"+cn)
	}
	if cn := leaf.Issuer.CommonName; cn != "" {
		values = append(values, "issuer:cn:"+cn)
	}
	for _, chain := range chains {
		for _, ca := range chain[1:] {
			values = append(values, "ca:fingerprint:"+fingerprint(ca))
		}
	}
	return values
}
