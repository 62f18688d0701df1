package tpmek

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/attestors/tpm"
)

// AgentConfig is the configuration of the half on the node.
type AgentConfig struct {
	// Device is the TPM: a device, or the Unix socket of an emulator. Default
	// /dev/tpmrm0.
	Device string `yaml:"tpm_device_path" env:"expand"`
	// EndorsementKey is the kind of endorsement key to attest by: rsa-2048 or
	// p-256. Default rsa-2048.
	EndorsementKey string `yaml:"endorsement_key" oneof:"rsa-2048,p-256"`
	// CertificatePath is a PEM file of the key's certificate, for a TPM whose
	// manufacturer publishes it elsewhere. Default: the one in the TPM, if there
	// is one.
	CertificatePath string `yaml:"certificate_path" env:"expand"`
	// EndorsementHierarchyPassword is that of the TPM's endorsement hierarchy.
	// Default: none.
	EndorsementHierarchyPassword string `yaml:"endorsement_hierarchy_password" env:"expand"`
}

const maxCertificateFile = 64 << 10 // bytes

// Agent is the half on the node.
type Agent struct {
	config AgentConfig
	kind   tpm.Kind

	mu    sync.Mutex
	asked bool // for a challenge, by the last proof
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It does not open the TPM.
func NewAgent(c AgentConfig) (*Agent, error) {
	if c.Device == "" {
		c.Device = tpm.DefaultDevice
	}
	a := &Agent{config: c, kind: tpm.Kind(c.EndorsementKey)}
	switch a.kind {
	case "":
		a.kind = tpm.RSA2048
	case tpm.RSA2048, tpm.P256:
	default:
		return nil, fmt.Errorf("endorsement_key is %q; it is %s or %s", c.EndorsementKey, tpm.RSA2048, tpm.P256)
	}
	return a, nil
}

// Proof reads the endorsement key and its certificate from the TPM.
func (a *Agent) Proof(ctx context.Context) ([]byte, error) {
	a.expect(true)
	d, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var p payload
	if p.EndorsementCertificate, err = a.certificate(d); err != nil {
		return nil, err
	}
	if p.EndorsementKey, err = a.endorsementKey(d, p.EndorsementCertificate); err != nil {
		return nil, err
	}
	ak, err := a.attestationKey(d)
	if err != nil {
		return nil, err
	}
	defer d.Flush(ak)
	public, err := tpm.PublicKey(ak.Public)
	if err != nil {
		return nil, err
	}
	if p.AttestationKey, err = x509.MarshalPKIXPublicKey(public); err != nil {
		return nil, err
	}
	return json.Marshal(p)
}

func (a *Agent) open(ctx context.Context) (*tpm.Device, error) {
	d, err := tpm.Open(ctx, a.config.Device)
	if err != nil {
		return nil, fmt.Errorf("open the TPM: %w", err)
	}
	return d, nil
}

// expect says whether a challenge may follow, and returns whether one could.
func (a *Agent) expect(challenge bool) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.asked
	a.asked = challenge
	return before
}

func (a *Agent) certificate(d *tpm.Device) ([]byte, error) {
	if a.config.CertificatePath == "" {
		return d.EndorsementCertificate(a.kind)
	}
	certs, err := pemfile.Certificates(a.config.CertificatePath, maxCertificateFile)
	if err != nil {
		return nil, err
	}
	return certs[0].Raw, nil
}

// endorsementKey returns the public key that a certificate names. Without one,
// the TPM must say what it is.
func (a *Agent) endorsementKey(d *tpm.Device, certificate []byte) ([]byte, error) {
	if certificate != nil {
		cert, err := x509.ParseCertificate(certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate of the endorsement key: %w", err)
		}
		return cert.RawSubjectPublicKeyInfo, nil
	}
	ek, err := d.LoadEndorsementKey(a.kind, a.config.EndorsementHierarchyPassword)
	if err != nil {
		return nil, err
	}
	defer d.Flush(ek)
	public, err := tpm.PublicKey(ek.Public)
	if err != nil {
		return nil, err
	}
	return x509.MarshalPKIXPublicKey(public)
}

// attestationKey makes the attestation key: the same one until the machine is
// started anew. It needs no password of its owner.
func (a *Agent) attestationKey(d *tpm.Device) (*tpm.Key, error) {
	ak, err := d.CreatePrimary(tpm2.TPMRHNull, "", tpm.AKTemplate)
	if err != nil {
		return nil, fmt.Errorf("make an attestation key: %w", err)
	}
	return ak, nil
}

// Respond answers the challenge to the last proof, once.
func (a *Agent) Respond(ctx context.Context, data []byte) ([]byte, error) {
	if !a.expect(false) {
		return nil, errors.New("server sent a challenge that follows no proof; tpm_ek has one for each")
	}
	c, err := parseChallenge(data)
	if err != nil {
		return nil, err
	}
	d, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	ek, err := d.LoadEndorsementKey(a.kind, a.config.EndorsementHierarchyPassword)
	if err != nil {
		return nil, err
	}
	defer d.Flush(ek)
	ak, err := a.attestationKey(d)
	if err != nil {
		return nil, err
	}
	defer d.Flush(ak)
	secret, err := d.Activate(ek, ak, a.config.EndorsementHierarchyPassword, tpm.Credential{IDObject: c.Credential, Secret: c.Secret})
	if err != nil {
		return nil, fmt.Errorf("%w (is the certificate that of this TPM?)", err)
	}
	var r response
	if r.PCRs, err = d.ReadPCRs(c.PCRs); err != nil {
		return nil, err
	}
	quote, signature, err := d.Quote(ak, secret, c.PCRs)
	if err != nil {
		return nil, err
	}
	r.Quote = quote
	if r.Signature, err = tpm.ASN1(signature); err != nil {
		return nil, err
	}
	return json.Marshal(r)
}

// String keeps the password out of logs.
func (a *Agent) String() string { return Name }

// GoString keeps the password out of logs.
func (a *Agent) GoString() string { return Name }

// LogValue keeps the password out of logs.
func (a *Agent) LogValue() slog.Value { return slog.StringValue(Name) }
