package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/go-tpm/tpm2"
	"go.step.sm/crypto/tpm/tss2"
)

// ErrOtherTPM says that a key was made by another TPM than the one that is asked
// to use it, or by this one before it was cleared.
var ErrOtherTPM = errors.New("the key is of another TPM, or of this one before it was cleared")

// ErrUnsupported says that a TPM does not make keys of a kind.
var ErrUnsupported = errors.New("the TPM does not make such a key")

// SigningKey is a kind of key that signs digests.
type SigningKey struct {
	Curve elliptic.Curve // P-256 or P-384; nil: RSA
	Bits  int            // of RSA
}

// template is that of a key that was made in its TPM, never leaves it, and signs
// digests in one way.
func (k SigningKey) template() (tpm2.TPMTPublic, error) {
	t := tpm2.TPMTPublic{
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true,
		},
	}
	ecc := func(curve tpm2.TPMECCCurve, hash tpm2.TPMIAlgHash) {
		t.Type = tpm2.TPMAlgECC
		t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: hash}),
			},
			CurveID: curve,
		})
		t.Unique = point(nil, nil)
	}
	switch {
	case k.Curve == elliptic.P256():
		ecc(tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256)
	case k.Curve == elliptic.P384():
		ecc(tpm2.TPMECCNistP384, tpm2.TPMAlgSHA384)
	case k.Curve == nil && k.Bits >= 2048 && k.Bits <= 4096:
		t.Type = tpm2.TPMAlgRSA
		t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			Scheme: tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgRSASSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			KeyBits: tpm2.TPMKeyBits(k.Bits),
		})
		t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	default:
		return t, ErrUnsupported
	}
	return t, nil
}

// Stored is a key of a TPM's in the form in which it is kept outside of it: its
// private half is encrypted by the TPM, and of no use without that.
type Stored struct {
	Public crypto.PublicKey

	public  []byte // TPMT_PUBLIC
	private []byte // the buffer of a TPM2B_PRIVATE
}

// PEMType is that of the block that [Stored.PEM] writes. OpenSSL's provider for
// TPMs reads it, too (draft-bottomley-tpm2-keys §3).
const PEMType = "TSS2 PRIVATE KEY"

// PEM returns the key as a file has it.
func (s *Stored) PEM() ([]byte, error) { return tss2.EncodeToMemory(s.public, s.private) }

// ParseStored reads what is in a PEM block of the type [PEMType]. The key must be
// one that was made in a TPM, cannot leave it, and signs.
func ParseStored(der []byte) (*Stored, error) {
	if len(der) > maxResponse {
		return nil, errors.New("it is longer than any key of a TPM")
	}
	key, err := tss2.ParsePrivateKey(der)
	if err != nil {
		return nil, err
	}
	s := &Stored{}
	var ok bool
	if s.public, ok = sized(key.PublicKey); !ok {
		return nil, errArea
	}
	if s.private, ok = sized(key.PrivateKey); !ok {
		return nil, errors.New("its private half is cut off")
	}
	if key.Parent != int(tpm2.TPMRHOwner) || len(key.Policy) > 0 || len(key.AuthPolicy) > 0 || !key.EmptyAuth {
		return nil, errors.New("it is not a key as this program makes them: below the owner's storage key, without a password or policy")
	}
	area, err := ParseArea(s.public)
	if err != nil {
		return nil, err
	}
	if err := area.Resident(); err != nil {
		return nil, err
	}
	s.Public = area.Public
	return s, nil
}

// ParseStoredPEM reads a file that [Stored.PEM] has made.
func ParseStoredPEM(data []byte) (*Stored, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != PEMType {
		return nil, fmt.Errorf("it has no PEM block of the type %s", PEMType)
	}
	return ParseStored(block.Bytes)
}

// sized takes the length off that is before a structure.
func sized(data []byte) ([]byte, bool) {
	const prefix = 2
	if len(data) < prefix || int(data[0])<<8|int(data[1]) != len(data)-prefix {
		return nil, false
	}
	return data[prefix:], true
}

// storageKey makes the key below which those of [Device.CreateSigning] are.
func (d *Device) storageKey(password string) (*Key, error) {
	k, err := d.CreatePrimary(tpm2.TPMRHOwner, password, StorageTemplate(tpm2.TPMAlgECC))
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return nil, fmt.Errorf("the TPM's owner hierarchy refuses the password: %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("make the TPM's storage key: %w", err)
	}
	return k, nil
}

// CreateSigning makes a key, with the password of the owner hierarchy. It fails
// with [ErrUnsupported] if this TPM does not make such keys.
func (d *Device) CreateSigning(kind SigningKey, password string) (*Stored, error) {
	template, err := kind.template()
	if err != nil {
		return nil, err
	}
	if _, err := (tpm2.TestParms{Parameters: tpm2.TPMTPublicParms{Type: template.Type, Parameters: template.Parameters}}).Execute(d); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	parent, err := d.storageKey(password)
	if err != nil {
		return nil, err
	}
	defer d.Flush(parent)
	made, err := tpm2.Create{ParentHandle: parent.password(), InPublic: tpm2.New2B(template)}.Execute(d)
	if err != nil {
		return nil, fmt.Errorf("make a key in the TPM: %w", err)
	}
	s := &Stored{public: made.OutPublic.Bytes(), private: made.OutPrivate.Buffer}
	area, err := ParseArea(s.public)
	if err != nil {
		return nil, err
	}
	s.Public = area.Public
	return s, nil
}

// signTime bounds one signature of a Signer's that has no context of its own.
const signTime = 10 * time.Second

// Signer signs with a stored key. It opens the TPM for each signature, so that
// other programs can use it in between, and the TPM may go and come back.
type Signer struct {
	device, password string
	stored           *Stored

	turn  chan struct{} // one at a time: an emulator serves no more
	saved *Saved        // the key as it was loaded: faster to load again; nil: not yet
}

// NewSigner makes a signer for a key of the TPM at a path, as [Open] takes it,
// with the password of the owner hierarchy.
func NewSigner(device, password string, stored *Stored) *Signer {
	return &Signer{device: device, password: password, stored: stored, turn: make(chan struct{}, 1)}
}

// Public returns the public half.
func (s *Signer) Public() crypto.PublicKey { return s.stored.Public }

// Stored returns the key as it is kept.
func (s *Signer) Stored() *Stored { return s.stored }

// Sign signs a digest, of the hash that the key is made for: SHA-384 with a key on
// P-384, else SHA-256. It takes at most ten seconds.
func (s *Signer) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if _, pss := opts.(*rsa.PSSOptions); pss {
		return nil, errors.New("the key in the TPM does not sign with PSS")
	}
	ctx, cancel := context.WithTimeout(context.Background(), signTime)
	defer cancel()
	return s.SignDigest(ctx, digest)
}

// SignDigest is Sign within a context.
func (s *Signer) SignDigest(ctx context.Context, digest []byte) (signature []byte, err error) {
	err = s.use(ctx, func(d *Device, k *Key) error {
		signed, err := d.Sign(k, digest)
		if err != nil {
			return fmt.Errorf("sign with the TPM: %w", err)
		}
		signature, err = SignatureBytes(signed)
		return err
	})
	return signature, err
}

// Check loads the key. It fails with [ErrOtherTPM] if the TPM has not made it.
func (s *Signer) Check(ctx context.Context) error {
	return s.use(ctx, func(*Device, *Key) error { return nil })
}

func (s *Signer) use(ctx context.Context, do func(*Device, *Key) error) error {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return errors.New("the TPM does not answer in time")
	}
	d, err := Open(ctx, s.device)
	if err != nil {
		return fmt.Errorf("open the TPM: %w", err)
	}
	defer d.Close()
	k, err := s.load(d)
	if err != nil {
		return err
	}
	defer d.Flush(k)
	return do(d, k)
}

// load loads the key from its saved context or, where there is none or the TPM was
// started anew, from what is stored.
func (s *Signer) load(d *Device) (*Key, error) {
	if s.saved != nil {
		if k, err := d.Restore(s.saved); err == nil {
			return k, nil
		}
		s.saved = nil
	}
	parent, err := d.storageKey(s.password)
	if err != nil {
		return nil, err
	}
	defer d.Flush(parent)
	k, err := d.Load(parent, s.stored.public, s.stored.private, "")
	if errors.Is(err, tpm2.TPMRCIntegrity) {
		return nil, fmt.Errorf("%w (%w)", ErrOtherTPM, err)
	}
	if err != nil {
		return nil, fmt.Errorf("load the key into the TPM: %w", err)
	}
	s.saved, _ = d.Save(k) // without it the next time takes longer
	return k, nil
}

// SignatureBytes returns a signature as others write it: ECDSA in DER, or RSASSA.
func SignatureBytes(s *tpm2.TPMTSignature) ([]byte, error) {
	switch s.SigAlg {
	case tpm2.TPMAlgECDSA:
		return ASN1(s)
	case tpm2.TPMAlgRSASSA:
		rsassa, err := s.Signature.RSASSA()
		if err != nil {
			return nil, err
		}
		return bytes.Clone(rsassa.Sig.Buffer), nil
	}
	return nil, fmt.Errorf("the TPM signs with %#04x; RSASSA or ECDSA is wanted", s.SigAlg)
}
