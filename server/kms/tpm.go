package kms

import (
	"context"
	"crypto/elliptic"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/attestors/pemfile"
	"github.com/hallmark-id/hallmark/attestors/tpm"
)

const (
	maxTPMFile = 16 << 10 // bytes; one has about one KiB
	tpmSuffix  = ".tpm.pem"
)

var tpmKinds = map[keyType]tpm.SigningKey{
	p256: {Curve: elliptic.P256()}, p384: {Curve: elliptic.P384()},
	rsa2048: {Bits: 2048}, rsa3072: {Bits: 3072}, rsa4096: {Bits: 4096},
}

// tpmKMS keeps keys in files that a TPM has encrypted and that alone can use.
type tpmKMS struct {
	owner    owner
	device   string
	password string // of the owner hierarchy
	dir      string
	now      func() time.Time
}

func openTPM(_ context.Context, o Options, u attributes) (service, error) {
	t := &tpmKMS{owner: o.owner(), device: u["device"], password: o.PIN, dir: u["storage-directory"], now: o.Now}
	if t.device == "" {
		t.device = tpm.DefaultDevice
	}
	if t.dir == "" {
		t.dir = o.Dir
	}
	if t.dir == "" {
		return nil, errors.New("there is no directory for the files of keys; write tpmkms:storage-directory=PATH")
	}
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the key directory: %w", err)
	}
	info, err := os.Stat(t.dir)
	if err != nil {
		return nil, fmt.Errorf("open the key directory: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 { // with the file, whoever may use the TPM signs
		return nil, fmt.Errorf("key directory %s is open to other users (mode %04o); run: chmod 700 %s", t.dir, info.Mode().Perm(), t.dir)
	}
	return t, nil
}

func (t *tpmKMS) file(name string) string {
	return filepath.Join(t.dir, t.owner.prefix()+name+tpmSuffix)
}

func (t *tpmKMS) create(ctx context.Context, name string, kind keyType) error {
	d, err := tpm.Open(ctx, t.device)
	if err != nil {
		return fmt.Errorf("open the TPM: %w", err)
	}
	defer d.Close()
	stored, err := d.CreateSigning(tpmKinds[kind], t.password)
	if errors.Is(err, tpm.ErrUnsupported) {
		return refusal{fmt.Errorf("a key of type %s: %w; choose another key_type", kind, err)}
	}
	if err != nil {
		return err
	}
	data, err := stored.PEM()
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(t.dir, ".new-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails once it has its name
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Chtimes(f.Name(), time.Time{}, t.now()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), t.file(name)); errors.Is(err, fs.ErrExist) {
		return apiv1.AlreadyExistsError{Message: t.file(name) + " exists"}
	} else if err != nil {
		return err
	}
	return t.sync()
}

// sync makes what happened to the directory durable.
func (t *tpmKMS) sync() error {
	f, err := os.Open(t.dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (t *tpmKMS) find(ctx context.Context, name string) (*found, error) {
	data, err := pemfile.Read(t.file(name), maxTPMFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, apiv1.NotFoundError{Message: t.file(name) + " does not exist"}
	}
	if err != nil {
		return nil, err
	}
	stored, err := tpm.ParseStoredPEM(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.file(name), err)
	}
	s := tpm.NewSigner(t.device, t.password, stored)
	if err := s.Check(ctx); err != nil {
		return nil, t.explain(name, err)
	}
	return &found{public: stored.Public, sign: func(ctx context.Context, digest []byte) ([]byte, error) {
		signature, err := s.SignDigest(ctx, digest)
		return signature, t.explain(name, err)
	}}, nil
}

func (t *tpmKMS) explain(name string, err error) error {
	if errors.Is(err, tpm.ErrOtherTPM) {
		return fmt.Errorf("%s: %w; where that TPM is gone for good, remove the file to have another authority take its place", t.file(name), err)
	}
	return err
}

func (t *tpmKMS) remove(_ context.Context, name string) error {
	err := os.Remove(t.file(name))
	if errors.Is(err, fs.ErrNotExist) {
		return apiv1.NotFoundError{Message: t.file(name) + " does not exist"}
	}
	if err != nil {
		return err
	}
	return t.sync()
}

func (t *tpmKMS) list(context.Context) (keys []Key, err error) {
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name, ours := strings.CutPrefix(e.Name(), t.owner.prefix())
		name, whole := strings.CutSuffix(name, tpmSuffix)
		if !ours || !whole || checkRemoteName(name) != nil || len(keys) == maxKeys {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		keys = append(keys, Key{name, info.ModTime()})
	}
	return keys, nil
}
