package tpm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/hallmark-id/hallmark/attestors/tpm"
	"github.com/hallmark-id/hallmark/test/harness"
)

// store makes a key in a TPM, and returns it as it is read from a file.
func store(t testing.TB, device *harness.TPM, kind tpm.SigningKey) *tpm.Stored {
	t.Helper()
	d, err := tpm.Open(t.Context(), device.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	made, err := d.CreateSigning(kind, "")
	if err != nil {
		t.Fatal(err)
	}
	data, err := made.PEM()
	if err != nil {
		t.Fatal(err)
	}
	read, err := tpm.ParseStoredPEM(data)
	if err != nil {
		t.Fatal(err)
	}
	if !made.Public.(interface{ Equal(crypto.PublicKey) bool }).Equal(read.Public) {
		t.Error("what is read from the file is another key")
	}
	return read
}

func TestAKeyOfATPMSignsWhereverTheTPMIsAndNowhereElse(t *testing.T) {
	maker := harness.NewTPMMaker(t)
	device, other := maker.NewTPM(t), maker.NewTPM(t)
	for name, kind := range map[string]tpm.SigningKey{"P-256": {Curve: elliptic.P256()}, "P-384": {Curve: elliptic.P384()}, "RSA": {Bits: 2048}} {
		stored := store(t, device, kind)
		s := tpm.NewSigner(device.Socket, "", stored)
		sign := func() error {
			digest, hash := sha256.Sum256([]byte("x")), crypto.SHA256
			text := digest[:]
			if name == "P-384" {
				longer := sha512.Sum384([]byte("x"))
				text, hash = longer[:], crypto.SHA384
			}
			signature, err := s.Sign(nil, text, hash)
			if err != nil {
				return err
			}
			switch public := s.Public().(type) {
			case *ecdsa.PublicKey:
				if !ecdsa.VerifyASN1(public, text, signature) {
					return errors.New("the signature does not verify")
				}
			case *rsa.PublicKey:
				return rsa.VerifyPKCS1v15(public, hash, text, signature)
			}
			return nil
		}
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				if err := sign(); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			})
		}
		all.Wait()
		device.TakeAway(t)
		if err := sign(); err == nil || !strings.Contains(err.Error(), "open the TPM") {
			t.Errorf("%s: without its TPM it says %v", name, err)
		}
		device.BringBack(t)
		if err := sign(); err != nil { // what was loaded before is gone
			t.Errorf("%s: after its TPM was started anew: %v", name, err)
		}
		if err := tpm.NewSigner(other.Socket, "", stored).Check(t.Context()); !errors.Is(err, tpm.ErrOtherTPM) {
			t.Errorf("%s: another TPM says %v", name, err)
		}
	}
}

func TestAKeyThatATPMDoesNotMakeIsRefused(t *testing.T) {
	device := harness.NewTPMMaker(t).NewTPM(t)
	d, err := tpm.Open(t.Context(), device.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, kind := range []tpm.SigningKey{{}, {Curve: elliptic.P521()}, {Bits: 1024}, {Bits: 4096}, {Bits: 1 << 20}} {
		if _, err := d.CreateSigning(kind, ""); !errors.Is(err, tpm.ErrUnsupported) {
			t.Errorf("%v: %v", kind, err)
		}
	}
}

func TestTheOwnersPasswordIsNeededAndNotTold(t *testing.T) {
	device := harness.NewTPMMaker(t).NewTPM(t)
	d, err := tpm.Open(t.Context(), device.Socket)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("secret-of-the-owner")},
	}.Execute(d)
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	make := func(password string) error {
		d, err := tpm.Open(t.Context(), device.Socket)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		_, err = d.CreateSigning(tpm.SigningKey{Curve: elliptic.P256()}, password)
		return err
	}
	if err := make("secret-of-the-owner"); err != nil {
		t.Error(err)
	}
	if err := make("secret-of-another"); err == nil || !strings.Contains(err.Error(), "owner hierarchy refuses the password") || strings.Contains(err.Error(), "secret-of") {
		t.Errorf("with a wrong password it says %v", err)
	}
}

func TestASignerDoesNotWaitForATPMThatIsBusyForEver(t *testing.T) {
	device := harness.NewTPMMaker(t).NewTPM(t)
	s := tpm.NewSigner(device.Socket, "", store(t, device, tpm.SigningKey{Curve: elliptic.P256()}))
	d, err := tpm.Open(t.Context(), device.Socket) // it serves one at a time
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := s.SignDigest(ctx, make([]byte, 32))
		done <- err
	}()
	select {
	case err := <-done:
		if err == nil {
			t.Error("it has signed")
		}
	case <-time.After(time.Minute):
		t.Error("it still waits, a minute after it was to give up")
	}
}

func FuzzParseStoredPEM(f *testing.F) {
	f.Add([]byte("-----BEGIN TSS2 PRIVATE KEY-----\nMAA=\n-----END TSS2 PRIVATE KEY-----\n"))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := tpm.ParseStoredPEM(data)
		if err == nil && s.Public == nil {
			t.Error("a key without its public half")
		}
	})
}

// BenchmarkSign is what a handshake costs more where the key is in a TPM, here an
// emulated one.
func BenchmarkSign(b *testing.B) {
	digest := make([]byte, 32)
	b.Run("TPM", func(b *testing.B) {
		device := harness.NewTPMMaker(b).NewTPM(b)
		s := tpm.NewSigner(device.Socket, "", store(b, device, tpm.SigningKey{Curve: elliptic.P256()}))
		for b.Loop() {
			if _, err := s.Sign(nil, digest, crypto.SHA256); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("software", func(b *testing.B) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if _, err := key.Sign(rand.Reader, digest, crypto.SHA256); err != nil {
				b.Fatal(err)
			}
		}
	})
}
