package authority

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"

	"filippo.io/age"
	"filippo.io/age/armor"
)

// Key files are encrypted in age's format, with a passphrase, and armored:
// "age --decrypt" reads them. Other than an encrypted PKCS #8, that is
// authenticated (a wrong secret and a changed file are noticed), and what a
// file demands of the one who opens it is bounded.
//
// workFactor is the binary logarithm of scrypt's cost: 32 MiB and a twentieth
// of a second. It is for secrets that somebody thought up; one from a random
// generator needs none. A file that asks for more is refused. (A variable, so
// that the tests of this package, which open very many files, ask for less.)
var workFactor = 15

var errWrongSecret = errors.New("it was encrypted with another secret than the configured one")

// isEncrypted reports whether a key file is encrypted.
func isEncrypted(data []byte) bool { return bytes.HasPrefix(data, []byte(armor.Header)) }

// encodeKey returns the key file of a key, encrypted unless the secret is
// empty.
func encodeKey(signer crypto.Signer, secret string) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		return nil, err
	}
	plain := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	if secret == "" {
		return plain, nil
	}
	recipient, err := age.NewScryptRecipient(secret)
	if err != nil {
		return nil, err
	}
	recipient.SetWorkFactor(workFactor)
	var out bytes.Buffer
	armored := armor.NewWriter(&out)
	w, err := age.Encrypt(armored, recipient)
	if err != nil {
		return nil, err
	}
	_, err = w.Write(plain)
	if err = errors.Join(err, w.Close(), armored.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// decodeKey reads a key file: one private key in PEM, PKCS #8. The secret is
// used if the file is encrypted.
func decodeKey(data []byte, secret string) (crypto.Signer, error) {
	if isEncrypted(data) {
		var err error
		if data, err = decrypt(data, secret); err != nil {
			return nil, err
		}
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "PRIVATE KEY" {
		return nil, errors.New(`there is no PEM block "PRIVATE KEY"`)
	}
	if len(bytes.TrimSpace(rest)) != 0 {
		return nil, errors.New("something follows the private key")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T does not sign", key)
	}
	return signer, nil
}

func decrypt(data []byte, secret string) ([]byte, error) {
	identity, err := age.NewScryptIdentity(secret)
	if err != nil {
		return nil, err
	}
	identity.SetMaxWorkFactor(workFactor)
	r, err := age.Decrypt(armor.NewReader(bytes.NewReader(data)), identity)
	if errors.Is(err, age.ErrIncorrectIdentity) {
		return nil, errWrongSecret
	}
	if err != nil {
		return nil, fmt.Errorf("decrypt: %w", err)
	}
	plain, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("decrypt: %w", err)
	}
	return plain, nil
}

// remedyReencrypt is how files come into the form that is configured.
const remedyReencrypt = `run "hallmark server reencrypt-keys" while the server is stopped`

// checkEncrypted checks that a key's file is encrypted, or not, as it should
// be.
func (k *diskKeys) checkEncrypted(name string, data []byte) error {
	switch encrypted := isEncrypted(data); {
	case encrypted && k.secret == "":
		return fmt.Errorf("key file %s is encrypted, but keys.disk.encryption is not configured; configure its secret, or %s", k.path(name), remedyReencrypt)
	case !encrypted && k.secret != "":
		return fmt.Errorf("key file %s is not encrypted, but keys.disk.encryption is configured; %s", k.path(name), remedyReencrypt)
	}
	return nil
}

// checkForm is [diskKeys.checkEncrypted] for all files: also of keys that sign
// no more, which nobody opens.
func (k *diskKeys) checkForm() error {
	names, err := k.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		data, err := k.read(name)
		if err == nil {
			err = k.checkEncrypted(name, data)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ReencryptDiskKeys writes the key files in a directory anew that are not
// encrypted with the secret, or, if that is empty, those that are encrypted. It
// reads them with the old secret, if they are encrypted. It says how many it
// wrote and how many were right already.
//
// Each file is replaced at once by its new form: whenever it ends, every key is
// there, and the next run does the rest. No server may use the directory.
func ReencryptDiskKeys(dir, secret, oldSecret string) (written, right int, err error) {
	k, err := openDiskKeys(dir, secret)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, k.Close()) }()
	names, err := k.names()
	if err != nil {
		return 0, 0, err
	}
	for _, name := range names {
		changed, err := k.reencrypt(name, oldSecret)
		if err != nil {
			return written, right, err
		}
		if changed {
			written++
		} else {
			right++
		}
	}
	return written, right, nil
}

func (k *diskKeys) reencrypt(name, oldSecret string) (changed bool, err error) {
	data, err := k.read(name)
	if err != nil {
		return false, err
	}
	signer, right, err := k.decodeAny(data, oldSecret)
	if err == nil && !right {
		if data, err = encodeKey(signer, k.secret); err == nil {
			err = k.write(name, data)
		}
	}
	if err != nil {
		return false, fmt.Errorf("re-encrypt key %q: %s: %w", name, k.path(name), err)
	}
	return !right, nil
}

// decodeAny reads a key file in the form that it should have, which is right,
// or in that which it had.
func (k *diskKeys) decodeAny(data []byte, oldSecret string) (signer crypto.Signer, right bool, err error) {
	if !isEncrypted(data) {
		signer, err = decodeKey(data, "")
		return signer, k.secret == "", err
	}
	if k.secret != "" {
		if signer, err = decodeKey(data, k.secret); !errors.Is(err, errWrongSecret) {
			return signer, true, err
		}
	}
	if oldSecret == "" {
		return nil, false, errors.New("it is encrypted, but not with the configured secret; name the file of its secret with --old-secret-file")
	}
	if signer, err = decodeKey(data, oldSecret); errors.Is(err, errWrongSecret) {
		err = errors.New("neither the configured secret nor the one in --old-secret-file decrypts it")
	}
	return signer, false, err
}
