package node

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/hallmark-id/hallmark/attestors/tpm"
)

// TPM is where the node's keys are made and stay: what is on disk is of no use
// without it.
type TPM struct {
	Device        string // a device, or the Unix socket of an emulator; empty: [tpm.DefaultDevice]
	OwnerPassword string // of the owner hierarchy
}

// String keeps the password out of logs.
func (t *TPM) String() string { return "TPM " + t.device() }

func (t *TPM) device() string {
	if t.Device == "" {
		return tpm.DefaultDevice
	}
	return t.Device
}

// tpmTime bounds what a TPM is asked at once: some take seconds for a key.
const tpmTime = 20 * time.Second

// newKey makes a key and a CSR for it. The server takes only the public key
// from the CSR.
func (n *Node) newKey(ctx context.Context) (crypto.Signer, []byte, error) {
	key, err := n.makeKey(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("make the node's key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make the node's certificate request: %w", err)
	}
	return key, csr, nil
}

func (n *Node) makeKey(ctx context.Context) (crypto.Signer, error) {
	t := n.o.TPM
	if t == nil {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	ctx, cancel := context.WithTimeout(ctx, tpmTime)
	defer cancel()
	d, err := tpm.Open(ctx, t.device())
	if err != nil {
		return nil, fmt.Errorf("open the TPM: %w", err)
	}
	defer d.Close()
	stored, err := d.CreateSigning(tpm.SigningKey{Curve: elliptic.P256()}, t.OwnerPassword)
	if err != nil {
		return nil, err
	}
	return tpm.NewSigner(t.device(), t.OwnerPassword, stored), nil
}

// encodeKey returns a key as a file has it: PKCS #8, or what its TPM has encrypted.
func encodeKey(key crypto.Signer) ([]byte, error) {
	if s, ok := key.(*tpm.Signer); ok {
		return s.Stored().PEM()
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// parseKey reads the key in a PEM block. One of a TPM's is not loaded yet.
func parseKey(block *pem.Block, t *TPM) (crypto.Signer, error) {
	if block.Type == tpm.PEMType {
		stored, err := tpm.ParseStored(block.Bytes)
		if err != nil {
			return nil, err
		}
		if t == nil { // only to say more of it
			t = &TPM{}
		}
		return tpm.NewSigner(t.device(), t.OwnerPassword, stored), nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("its private key cannot sign")
	}
	return signer, nil
}

// checkKey says why the key of an identity on disk cannot be used. It reports
// whether the key is where it should be: one in software is to move into the TPM,
// if there is to be one.
func (n *Node) checkKey(s *svid, path string) (settled bool, err error) {
	key, inTPM := s.key.(*tpm.Signer)
	switch {
	case !inTPM:
		return n.o.TPM == nil, nil
	case n.o.TPM == nil:
		return false, fmt.Errorf("the key of the identity in %s is in a TPM; configure node_key.tpm, or remove the file to attest anew", path)
	}
	ctx, cancel := context.WithTimeout(context.Background(), tpmTime)
	defer cancel()
	err = key.Check(ctx)
	if errors.Is(err, tpm.ErrOtherTPM) {
		return false, fmt.Errorf("the identity in %s cannot be used on this machine: %w; it stays as it is; remove the file to attest this machine anew", path, err)
	}
	if err != nil {
		return false, fmt.Errorf("the key of the identity in %s is in the TPM, which cannot be used: %w; the identity stays as it is; start the agent again when the TPM is back", path, err)
	}
	return true, nil
}
