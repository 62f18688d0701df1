package tpmdevid

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
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

// AgentConfig is the configuration of the half on the node. The files are read at
// each attempt, so that a certificate that was renewed is picked up.
type AgentConfig struct {
	// Device is the TPM: a device, or the Unix socket of an emulator. Default
	// /dev/tpmrm0.
	Device string `yaml:"tpm_device_path" env:"expand"`

	// DevIDCertPath is the file of the DevID certificate: PEM, which may go on
	// with the intermediate certificates. Required.
	DevIDCertPath string `yaml:"devid_cert_path" env:"expand"`
	// DevIDPrivPath is the file of the private key, encrypted by the TPM: a
	// TPM2B_PRIVATE, with its length before it or without. Its parent is the
	// storage key that the TCG's template H-1 makes (H-2 if the key is ECC).
	// Required.
	DevIDPrivPath string `yaml:"devid_priv_path" env:"expand"`
	// DevIDPubPath is the file of the public key: a TPM2B_PUBLIC, likewise.
	// RSASSA or ECDSA, with SHA-256. Required.
	DevIDPubPath string `yaml:"devid_pub_path" env:"expand"`

	// DevIDPassword is that of the DevID key. Default: none.
	DevIDPassword string `yaml:"devid_password" env:"expand"`
	// OwnerHierarchyPassword is that of the TPM's owner hierarchy. Default: none.
	OwnerHierarchyPassword string `yaml:"owner_hierarchy_password" env:"expand"`
	// EndorsementHierarchyPassword is that of the TPM's endorsement hierarchy.
	// Default: none.
	EndorsementHierarchyPassword string `yaml:"endorsement_hierarchy_password" env:"expand"`
}

// Bounds of files, in bytes.
const (
	maxKeyFile   = 4 << 10
	maxChainFile = 512 << 10
)

// Agent is the half on the node.
type Agent struct {
	config AgentConfig

	mu   sync.Mutex
	keys *keys // of the last proof; nil once they have answered
}

// keys are out of the TPM's memory while the server is waited for.
type keys struct {
	devID, ak *tpm.Saved
}

var _ attestors.Agent = (*Agent)(nil)

// NewAgent makes the node's half. It fails if a path is missing; it reads no file
// and does not open the TPM.
func NewAgent(c AgentConfig) (*Agent, error) {
	switch {
	case c.DevIDCertPath == "":
		return nil, errors.New("devid_cert_path is missing; name the file of the DevID certificate")
	case c.DevIDPrivPath == "":
		return nil, errors.New("devid_priv_path is missing; name the file of the private key that the TPM encrypted")
	case c.DevIDPubPath == "":
		return nil, errors.New("devid_pub_path is missing; name the file of the public key")
	}
	if c.Device == "" {
		c.Device = tpm.DefaultDevice
	}
	return &Agent{config: c}, nil
}

// Proof reads the files, has the TPM certify the DevID key, and returns that with
// the certificates.
func (a *Agent) Proof(ctx context.Context) ([]byte, error) {
	a.keep(nil)
	certs, err := pemfile.Certificates(a.config.DevIDCertPath, maxChainFile)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(checkRSA(certs[0]), checkLeaf(certs[0])); err != nil {
		return nil, fmt.Errorf("%s: %w", a.config.DevIDCertPath, err)
	}
	if len(certs) > maxCertificates {
		return nil, fmt.Errorf("%s holds %d certificates; the most is %d", a.config.DevIDCertPath, len(certs), maxCertificates)
	}
	d, err := a.open(ctx)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	p, err := a.prove(d, certs[0])
	if err != nil {
		return nil, err
	}
	for _, cert := range certs {
		p.DevIDCert = append(p.DevIDCert, cert.Raw)
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

// keep keeps the keys of a proof, and returns those of the one before.
func (a *Agent) keep(k *keys) *keys {
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.keys
	a.keys = k
	return before
}

// prove makes a proof, but for the certificates.
func (a *Agent) prove(d *tpm.Device, leaf *x509.Certificate) (*payload, error) {
	p := &payload{}
	var err error
	if p.EKCert, err = d.EndorsementCertificate(tpm.RSA2048); err != nil {
		return nil, err
	}
	if p.EKCert == nil {
		return nil, errors.New("the TPM holds no certificate of an RSA endorsement key")
	}
	cert, err := x509.ParseCertificate(p.EKCert)
	if err != nil {
		return nil, fmt.Errorf("certificate of the endorsement key: %w", err)
	}
	if p.EKPub, err = tpm.EndorsementArea(cert.PublicKey); err != nil {
		return nil, err
	}
	devID, public, err := a.loadDevID(d, leaf.PublicKey)
	if err != nil {
		return nil, err
	}
	defer d.Flush(devID)
	// The same one until the machine is started anew; it needs no password.
	ak, err := d.CreatePrimary(tpm2.TPMRHNull, "", tpm.RSAAKTemplate)
	if err != nil {
		return nil, fmt.Errorf("make an attestation key: %w", err)
	}
	defer d.Flush(ak)
	certified, signature, err := d.Certify(ak, devID)
	if err != nil {
		return nil, err
	}
	p.DevIDPub, p.AKPub = public, tpm2.Marshal(*ak.Public)
	p.CertifiedDevID, p.CertificationSignature = certified, tpm2.Marshal(*signature)

	k := &keys{}
	if k.devID, err = d.Save(devID); err != nil {
		return nil, err
	}
	if k.ak, err = d.Save(ak); err != nil {
		return nil, err
	}
	a.keep(k)
	return p, nil
}

// loadDevID loads the DevID key, which must be that of the certificate, and
// returns its TPMT_PUBLIC.
func (a *Agent) loadDevID(d *tpm.Device, of crypto.PublicKey) (*tpm.Key, []byte, error) {
	public, err := readSized(a.config.DevIDPubPath)
	if err != nil {
		return nil, nil, err
	}
	private, err := readSized(a.config.DevIDPrivPath)
	if err != nil {
		return nil, nil, err
	}
	area, err := tpm.ParseArea(public)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", a.config.DevIDPubPath, err)
	}
	if key, ok := of.(interface{ Equal(crypto.PublicKey) bool }); !ok || !key.Equal(area.Public) {
		return nil, nil, fmt.Errorf("the first certificate in %s is not of the key in %s", a.config.DevIDCertPath, a.config.DevIDPubPath)
	}
	parent, err := d.CreatePrimary(tpm2.TPMRHOwner, a.config.OwnerHierarchyPassword, tpm.StorageTemplate(tpm2.TPMAlgID(binary.BigEndian.Uint16(public))))
	if err != nil {
		return nil, nil, fmt.Errorf("make the storage key: %w", err)
	}
	defer d.Flush(parent)
	k, err := d.Load(parent, public, private, a.config.DevIDPassword)
	if err != nil {
		return nil, nil, fmt.Errorf("load the DevID key of %s: %w (was it made in this TPM, below the storage key of the TCG's template?)", a.config.DevIDPrivPath, err)
	}
	return k, public, nil
}

// readSized reads what a TPM gave out, and takes its length off.
func readSized(path string) ([]byte, error) {
	data, err := pemfile.Read(path, maxKeyFile)
	if err != nil {
		return nil, err
	}
	const prefix = 2 // bytes; no structure begins with a number that is its length
	if len(data) > prefix && int(binary.BigEndian.Uint16(data)) == len(data)-prefix {
		data = data[prefix:]
	}
	return data, nil
}

// Respond answers the challenge to the last proof, once.
func (a *Agent) Respond(ctx context.Context, data []byte) ([]byte, error) {
	saved := a.keep(nil)
	if saved == nil {
		return nil, errors.New("server sent a challenge that follows no proof; tpm_devid has one for each")
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
	var r response
	if r.DevID, err = sign(d, saved.devID, c.DevID); err != nil {
		return nil, err
	}
	ak, err := d.Restore(saved.ak)
	if err != nil {
		return nil, err
	}
	defer d.Flush(ak)
	ek, err := d.LoadEndorsementKey(tpm.RSA2048, a.config.EndorsementHierarchyPassword)
	if err != nil {
		return nil, err
	}
	defer d.Flush(ek)
	r.CredActivation, err = d.Activate(ek, ak, a.config.EndorsementHierarchyPassword, tpm.Credential{IDObject: c.CredActivation.Credential, Secret: c.CredActivation.Secret})
	if err != nil {
		return nil, err
	}
	return json.Marshal(r)
}

// sign signs a nonce with the DevID key.
func sign(d *tpm.Device, saved *tpm.Saved, nonce []byte) ([]byte, error) {
	devID, err := d.Restore(saved)
	if err != nil {
		return nil, err
	}
	defer d.Flush(devID)
	digest := sha256.Sum256(nonce)
	signature, err := d.Sign(devID, digest[:])
	if err != nil {
		return nil, fmt.Errorf("sign with the DevID key: %w (%s)", err, supportedKeys)
	}
	out, err := tpm.SignatureBytes(signature)
	if err != nil {
		return nil, fmt.Errorf("sign with the DevID key: %w; %s", err, supportedKeys)
	}
	return out, nil
}

// String keeps the passwords out of logs.
func (a *Agent) String() string { return Name }

// GoString keeps the passwords out of logs.
func (a *Agent) GoString() string { return Name }

// LogValue keeps the passwords out of logs.
func (a *Agent) LogValue() slog.Value { return slog.StringValue(Name) }
