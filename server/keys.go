package server

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/kms"
)

func (s *settings) checkKeys(wrong func(path, format string, args ...any)) {
	managers := 0
	for _, set := range []bool{s.Keys.Disk != nil, s.Keys.KMS != nil, s.Keys.Memory != nil} {
		if set {
			managers++
		}
	}
	if managers > 1 {
		wrong("keys", "keys names more than one key manager; choose disk, kms or memory")
	}
	if d := s.Keys.Disk; d != nil && d.Encryption != nil {
		switch e := d.Encryption; {
		case e.SecretFile == "" && e.SecretEnv == "":
			wrong("keys.disk.encryption", "encryption names no secret; set secret_file to the path of a file with one")
		case e.SecretFile != "" && e.SecretEnv != "":
			wrong("keys.disk.encryption", "encryption names two secrets; choose secret_file or secret_env")
		}
	}
	if k := s.Keys.KMS; k != nil {
		if err := kms.Check(k.URI); err != nil {
			path := "keys.kms.uri"
			if k.URI == "" {
				path = "keys.kms"
			}
			wrong(path, "%v", err)
		}
	}
}

// openKeys opens the key manager, for a server of a name.
func (s *settings) openKeys(name string, log *slog.Logger) (apiv1.KeyManager, error) {
	switch {
	case s.Keys.Memory != nil:
		return authority.NewMemoryKeys(), nil
	case s.Keys.KMS != nil:
		o := kms.Options{URI: s.Keys.KMS.URI, Dir: filepath.Join(s.DataDir, "keys"), TrustDomain: s.td, Server: name, Log: log}
		if file := s.Keys.KMS.PINFile; file != "" {
			var err error
			if o.PIN, err = authority.ReadSecret(file); err != nil {
				return nil, fmt.Errorf("keys.kms.pin_file: %w", err)
			}
		}
		return kms.Open(o)
	}
	secret, err := s.Keys.Disk.Encryption.secret()
	if err != nil {
		return nil, err
	}
	return authority.NewDiskKeys(s.Keys.Disk.Dir, secret)
}

// secret returns what encrypts key files; empty if nothing does.
func (e *EncryptionConfig) secret() (string, error) {
	switch {
	case e == nil:
		return "", nil
	case e.SecretFile != "":
		secret, err := authority.ReadSecret(e.SecretFile)
		if err != nil {
			return "", fmt.Errorf("keys.disk.encryption.secret_file: %w", err)
		}
		return secret, nil
	}
	secret := os.Getenv(e.SecretEnv)
	if secret == "" {
		return "", fmt.Errorf("keys.disk.encryption.secret_env: the environment variable %s is not set; set it to the secret of the keys", e.SecretEnv)
	}
	return secret, nil
}

// ReencryptKeys writes the key files that a configuration names anew in the
// form that it demands, and returns how many it wrote and how many had that
// already. Those that another secret encrypts it reads with that in a file; the
// name may be empty. The server must not run.
func ReencryptKeys(src config.Source, oldSecretFile string) (written, right int, err error) {
	s, err := load(src)
	if err != nil {
		return 0, 0, err
	}
	if s.Keys.Disk == nil {
		return 0, 0, src.Errorf("keys", "only keys on disk are in files")
	}
	if _, err := os.Stat(s.Keys.Disk.Dir); err != nil { // which opening would make
		return 0, 0, fmt.Errorf("open the key directory: %w", err)
	}
	secret, err := s.Keys.Disk.Encryption.secret()
	if err != nil {
		return 0, 0, err
	}
	oldSecret := ""
	if oldSecretFile != "" {
		if oldSecret, err = authority.ReadSecret(oldSecretFile); err != nil {
			return 0, 0, fmt.Errorf("--old-secret-file: %w", err)
		}
	}
	return authority.ReencryptDiskKeys(s.Keys.Disk.Dir, secret, oldSecret)
}
