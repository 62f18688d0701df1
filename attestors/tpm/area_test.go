package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/elliptic"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors/tpm"
)

// areas are what the library of another hand writes of signing keys.
func areas(t testing.TB) map[string]tpm2.TPMTPublic {
	t.Helper()
	rsa := tpm.RSAAKTemplate
	rsa.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: withRSA(2048, 65537).N.Bytes()})
	raw, err := newKey(t, elliptic.P256()).PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	ecc := tpm.AKTemplate
	ecc.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: raw[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[33:]}})
	return map[string]tpm2.TPMTPublic{"RSA": rsa, "ECC": ecc}
}

func TestWhatATPMSaysOfAKeyIsRead(t *testing.T) {
	for kind, area := range areas(t) {
		data := tpm2.Marshal(area)
		got, err := tpm.ParseArea(data)
		if err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
		name, err := tpm2.ObjectName(&area)
		if err != nil {
			t.Fatal(err)
		}
		public, err := tpm.PublicKey(&area)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Name, name.Buffer) || !public.(interface{ Equal(crypto.PublicKey) bool }).Equal(got.Public) {
			t.Errorf("%s: read %+v", kind, got)
		}
		if got.Resident() == nil {
			t.Errorf("%s: a restricted key is taken for one that signs what it is given", kind)
		}
		for n := range data {
			if _, err := tpm.ParseArea(data[:n]); err == nil {
				t.Errorf("%s: the first %d of %d bytes are read", kind, n, len(data))
			}
		}
		if _, err := tpm.ParseArea(append(data, 0)); err == nil {
			t.Errorf("%s: a byte after the end is accepted", kind)
		}
	}
}

func FuzzArea(f *testing.F) {
	for _, area := range areas(f) {
		f.Add(tpm2.Marshal(area))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if a, err := tpm.ParseArea(data); err == nil && (a.Public == nil || len(a.Name) < 34) {
			t.Errorf("%x is read as %+v", data, a)
		}
		if key, name, err := tpm.ParseRSAAK(data); err == nil && (key == nil || len(name) != 34) {
			t.Errorf("%x is an attestation key %v", data, key)
		}
		_, _ = tpm.ParseSignature(data)
	})
}
