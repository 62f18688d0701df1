package authority

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"

	"go.step.sm/crypto/kms/apiv1"
)

// keyName is what a key of this package's managers may be called: it becomes
// the name of a file.
var keyName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$`)

func validateKeyName(name string) error {
	if !keyName.MatchString(name) {
		return fmt.Errorf("invalid key name %q: it is 1 to 100 letters, digits, '.', '_' and '-', beginning with a letter, digit or '_'", name)
	}
	return nil
}

// maxKeyFile bounds a key file, in bytes; one with an RSA key of 8192 bits has
// 6 KiB.
const maxKeyFile = 64 << 10

const (
	keySuffix = ".pem"
	newPrefix = ".new-" // of a file that is being written
)

// diskKeys keeps keys in files, one a key: PEM, PKCS #8, readable by their
// owner alone.
type diskKeys struct {
	dir string
	mu  sync.Mutex // between the check that a name is free and its use
}

// NewDiskKeys returns a key manager that keeps its keys in a directory, which
// it makes if it is missing. The directory belongs to one server. The manager
// also implements [apiv1.KeyDeleter] and [apiv1.NameValidator].
//
// It refuses a directory or key file that others than its owner can read or
// write, and one that is neither this user's nor root's.
func NewDiskKeys(dir string) (apiv1.KeyManager, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the key directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("open the key directory: %s is not a directory", dir)
	}
	if err := private("key directory", dir, info, "700"); err != nil {
		return nil, err
	}
	// What a crash left half written was never used.
	left, err := filepath.Glob(filepath.Join(escapeGlob(dir), newPrefix+"*"))
	if err != nil {
		return nil, fmt.Errorf("read the key directory: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("remove a half written key: %w", err)
		}
	}
	return &diskKeys{dir: dir}, nil
}

func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

// private checks that only its owner can use a file or directory, and that the
// owner is this user or root.
func private(what, path string, info fs.FileInfo, mode string) error {
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s %s is open to other users (mode %04o); run: chmod %s %s", what, path, info.Mode().Perm(), mode, path)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s %s belongs to user %d, but user %d runs this server; run: chown %d %s", what, path, st.Uid, os.Geteuid(), os.Geteuid(), path)
	}
	return nil
}

func (k *diskKeys) path(name string) string { return filepath.Join(k.dir, name+keySuffix) }

// ValidateName reports whether a key may have that name.
func (k *diskKeys) ValidateName(name string) error { return validateKeyName(name) }

// CreateKey makes a key and writes its file, durably. It fails with an
// [apiv1.AlreadyExistsError] if there is a key of that name.
func (k *diskKeys) CreateKey(req *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	if err := validateKeyName(req.Name); err != nil {
		return nil, err
	}
	signer, err := generate(req)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(signer)
	if err != nil {
		return nil, fmt.Errorf("encode key %q: %w", req.Name, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.write(req.Name, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})); err != nil {
		return nil, fmt.Errorf("write key %q: %w", req.Name, err)
	}
	return &apiv1.CreateKeyResponse{
		Name:                req.Name,
		PublicKey:           signer.Public(),
		CreateSignerRequest: apiv1.CreateSignerRequest{SigningKey: req.Name},
	}, nil
}

// write makes a key's file: all of it or nothing, on disk when it returns.
func (k *diskKeys) write(name string, data []byte) error {
	path := k.path(name)
	switch _, err := os.Lstat(path); {
	case err == nil:
		return apiv1.AlreadyExistsError{Message: fmt.Sprintf("%s exists", path)}
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
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
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return k.sync()
}

// sync makes what happened to the directory durable.
func (k *diskKeys) sync() error {
	d, err := os.Open(k.dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (k *diskKeys) read(name string) (crypto.Signer, error) {
	if err := validateKeyName(name); err != nil {
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
	if err := private("key file", path, info, "600"); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return nil, fmt.Errorf("read key %q: %w", name, err)
	}
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("read key %q: %s is longer than %d bytes", name, path, maxKeyFile)
	}
	signer, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("read key %q: %s: %w", name, path, err)
	}
	return signer, nil
}

// parseKey reads one private key in PEM, PKCS #8.
func parseKey(data []byte) (crypto.Signer, error) {
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

// GetPublicKey returns the public half of a key. It fails with an
// [apiv1.NotFoundError] if there is none of that name.
func (k *diskKeys) GetPublicKey(req *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	signer, err := k.read(req.Name)
	if err != nil {
		return nil, err
	}
	return signer.Public(), nil
}

// CreateSigner returns the key named by the request's SigningKey. It fails
// with an [apiv1.NotFoundError] if there is none of that name.
func (k *diskKeys) CreateSigner(req *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	return k.read(req.SigningKey)
}

// DeleteKey deletes a key, durably. It fails with an [apiv1.NotFoundError] if
// there is none of that name.
func (k *diskKeys) DeleteKey(req *apiv1.DeleteKeyRequest) error {
	if err := validateKeyName(req.Name); err != nil {
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

// Close does nothing: no file stays open.
func (k *diskKeys) Close() error { return nil }

// memoryKeys keeps keys in memory: they end with the process.
type memoryKeys struct {
	mu   sync.Mutex
	keys map[string]crypto.Signer
}

// NewMemoryKeys returns a key manager that keeps its keys in memory: a server
// that restarts makes new authorities. It also implements [apiv1.KeyDeleter]
// and [apiv1.NameValidator].
func NewMemoryKeys() apiv1.KeyManager {
	return &memoryKeys{keys: make(map[string]crypto.Signer)}
}

// ValidateName reports whether a key may have that name.
func (k *memoryKeys) ValidateName(name string) error { return validateKeyName(name) }

// CreateKey makes a key. It fails with an [apiv1.AlreadyExistsError] if there
// is one of that name.
func (k *memoryKeys) CreateKey(req *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	if err := validateKeyName(req.Name); err != nil {
		return nil, err
	}
	signer, err := generate(req)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.keys[req.Name] != nil {
		return nil, apiv1.AlreadyExistsError{Message: fmt.Sprintf("key %q exists", req.Name)}
	}
	k.keys[req.Name] = signer
	return &apiv1.CreateKeyResponse{
		Name:                req.Name,
		PublicKey:           signer.Public(),
		CreateSignerRequest: apiv1.CreateSignerRequest{SigningKey: req.Name},
	}, nil
}

// GetPublicKey returns the public half of a key. It fails with an
// [apiv1.NotFoundError] if there is none of that name.
func (k *memoryKeys) GetPublicKey(req *apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	signer, err := k.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: req.Name})
	if err != nil {
		return nil, err
	}
	return signer.Public(), nil
}

// CreateSigner returns the key named by the request's SigningKey. It fails
// with an [apiv1.NotFoundError] if there is none of that name.
func (k *memoryKeys) CreateSigner(req *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if signer := k.keys[req.SigningKey]; signer != nil {
		return signer, nil
	}
	return nil, apiv1.NotFoundError{Message: fmt.Sprintf("key %q not found", req.SigningKey)}
}

// DeleteKey deletes a key. It fails with an [apiv1.NotFoundError] if there is
// none of that name.
func (k *memoryKeys) DeleteKey(req *apiv1.DeleteKeyRequest) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.keys[req.Name] == nil {
		return apiv1.NotFoundError{Message: fmt.Sprintf("key %q not found", req.Name)}
	}
	delete(k.keys, req.Name)
	return nil
}

// Close forgets the keys.
func (k *memoryKeys) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.keys)
	return nil
}
