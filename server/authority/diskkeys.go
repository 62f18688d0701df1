package authority

import (
	"crypto"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/kms"
)

// maxKeyFile bounds a key file, in bytes; one with an RSA key of 8192 bits has
// 6 KiB.
const maxKeyFile = 64 << 10

const (
	keySuffix = ".pem"
	newPrefix = ".new-" // of a file that is being written
)

// diskKeys keeps keys in files, one a key, readable by their owner alone: PEM,
// PKCS #8, as it is or encrypted with a secret.
type diskKeys struct {
	dir    string
	lock   *os.File   // the directory, open and locked
	secret string     // empty: not encrypted
	mu     sync.Mutex // between the check that a name is free and its use
}

// NewDiskKeys returns a key manager that keeps its keys in a directory, which
// it makes if it is missing. The directory belongs to one server; it is locked
// until Close. The manager also implements [apiv1.KeyDeleter] and
// [apiv1.NameValidator].
//
// With a secret, of at least 16 characters, the files are encrypted with it.
// The empty one leaves them as they are.
//
// It refuses a directory or key file that others than its owner can read or
// write, and one that is neither this user's nor root's; and a directory with
// files that are not encrypted when they should be, or are when they should
// not. [ReencryptDiskKeys] mends that.
func NewDiskKeys(dir, secret string) (apiv1.KeyManager, error) {
	k, err := openDiskKeys(dir, secret)
	if err != nil {
		return nil, err
	}
	if err := k.checkForm(); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

func openDiskKeys(dir, secret string) (*diskKeys, error) {
	if err := checkKeySecret(secret); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the key directory: %w", err)
	}
	lock, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	k := &diskKeys{dir: dir, lock: lock, secret: secret}
	if err := k.takeOver(); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// takeOver locks the directory, and removes what a crash left half written.
func (k *diskKeys) takeOver() error {
	info, err := k.lock.Stat()
	if err != nil {
		return fmt.Errorf("open the key directory: %w", err)
	}
	if err := private("key directory", k.dir, info, 0o077, "700"); err != nil {
		return err
	}
	err = syscall.Flock(int(k.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return fmt.Errorf("the key directory %s is in use by another server; stop that first, or give each a directory of its own", k.dir)
	}
	if err != nil {
		return fmt.Errorf("lock the key directory %s: %w", k.dir, err)
	}
	entries, err := os.ReadDir(k.dir)
	if err != nil {
		return fmt.Errorf("read the key directory: %w", err)
	}
	for _, e := range entries { // what was never used
		if strings.HasPrefix(e.Name(), newPrefix) {
			if err := os.Remove(filepath.Join(k.dir, e.Name())); err != nil {
				return fmt.Errorf("remove a half written key: %w", err)
			}
		}
	}
	return nil
}

// names returns the names of all keys.
func (k *diskKeys) names() ([]string, error) {
	entries, err := os.ReadDir(k.dir)
	if err != nil {
		return nil, fmt.Errorf("read the key directory: %w", err)
	}
	var names []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), keySuffix); ok && kms.CheckName(name) == nil {
			names = append(names, name)
		}
	}
	return names, nil
}

func (k *diskKeys) path(name string) string { return filepath.Join(k.dir, name+keySuffix) }

// ValidateName reports whether a key may have that name.
func (k *diskKeys) ValidateName(name string) error { return kms.CheckName(name) }

// CreateKey makes a key and writes its file, durably. It fails with an
// [apiv1.AlreadyExistsError] if there is a key of that name.
func (k *diskKeys) CreateKey(req *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	if err := kms.CheckName(req.Name); err != nil {
		return nil, err
	}
	signer, err := generate(req)
	if err != nil {
		return nil, err
	}
	data, err := encodeKey(signer, k.secret)
	if err != nil {
		return nil, fmt.Errorf("encode key %q: %w", req.Name, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	switch _, err := os.Lstat(k.path(req.Name)); {
	case err == nil:
		return nil, apiv1.AlreadyExistsError{Message: fmt.Sprintf("key %q: %s exists", req.Name, k.path(req.Name))}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("write key %q: %w", req.Name, err)
	}
	if err := k.write(req.Name, data); err != nil {
		return nil, fmt.Errorf("write key %q: %w", req.Name, err)
	}
	return &apiv1.CreateKeyResponse{
		Name:                req.Name,
		PublicKey:           signer.Public(),
		CreateSignerRequest: apiv1.CreateSignerRequest{SigningKey: req.Name},
	}, nil
}

// write makes a key's file, or replaces it: the whole new file is there or what
// was before, whenever the machine stops; it is on disk when write returns.
func (k *diskKeys) write(name string, data []byte) error {
	var suffix [8]byte
	rand.Read(suffix[:])
	tmp := filepath.Join(k.dir, newPrefix+hex.EncodeToString(suffix[:]))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(tmp, k.path(name))
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return k.sync()
}

// sync makes what happened to the directory durable.
func (k *diskKeys) sync() error { return k.lock.Sync() }

// read returns the content of a key's file.
func (k *diskKeys) read(name string) ([]byte, error) {
	if err := kms.CheckName(name); err != nil {
		return nil, err
	}
	path := k.path(name)
	// NONBLOCK: a pipe in a key's place must not hang the server.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, apiv1.NotFoundError{Message: fmt.Sprintf("key %q not found: %s does not exist", name, path)}
	}
	if err != nil {
		return nil, fmt.Errorf("open key %q: %w", name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("open key %q: %w", name, err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open key %q: %s is not a file", name, path)
	}
	if err := private("key file", path, info, 0o077, "600"); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, fmt.Errorf("read key %q: %w", name, err)
	}
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("read key %q: %s is longer than %d bytes", name, path, maxKeyFile)
	}
	return data, nil
}

// open returns a key.
func (k *diskKeys) open(name string) (crypto.Signer, error) {
	data, err := k.read(name)
	if err != nil {
		return nil, err
	}
	if err := k.checkEncrypted(name, data); err != nil {
		return nil, err
	}
	signer, err := decodeKey(data, k.secret)
	if errors.Is(err, errWrongSecret) {
		err = fmt.Errorf("%w; configure that one, or %s", err, remedyReencrypt)
	}
	if err != nil {
		return nil, fmt.Errorf("read key %q: %s: %w", name, k.path(name), err)
	}
	return signer, nil
}

// GetPublicKey returns the public half of a key. It fails with an
// [apiv1.NotFoundError] if there is none of that name.
func (k *diskKeys) GetPublicKey(req *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	signer, err := k.open(req.Name)
	if err != nil {
		return nil, err
	}
	return signer.Public(), nil
}

// CreateSigner returns the key named by the request's SigningKey. It fails
// with an [apiv1.NotFoundError] if there is none of that name.
func (k *diskKeys) CreateSigner(req *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	return k.open(req.SigningKey)
}

// DeleteKey deletes a key, durably. It fails with an [apiv1.NotFoundError] if
// there is none of that name.
func (k *diskKeys) DeleteKey(req *apiv1.DeleteKeyRequest) error {
	if err := kms.CheckName(req.Name); err != nil {
		return err
	}
	err := os.Remove(k.path(req.Name))
	if errors.Is(err, fs.ErrNotExist) {
		return apiv1.NotFoundError{Message: fmt.Sprintf("key %q not found", req.Name)}
	}
	if err != nil {
		return fmt.Errorf("delete key %q: %w", req.Name, err)
	}
	return k.sync()
}

// Close unlocks the directory.
func (k *diskKeys) Close() error { return k.lock.Close() }
