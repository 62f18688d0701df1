package authority_test

import (
	"crypto"
	"crypto/ecdsa"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/pemutil"

	"github.com/hallmark-id/hallmark/server/authority"
)

func diskKeys(tb testing.TB, dir string) apiv1.KeyManager {
	tb.Helper()
	return encryptedKeys(tb, dir, "")
}

func encryptedKeys(tb testing.TB, dir, secret string) apiv1.KeyManager {
	tb.Helper()
	keys, err := authority.NewDiskKeys(dir, secret)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { keys.Close() })
	return keys
}

// closed ends the use of a key manager, as the end of a server would.
func closed(tb testing.TB, keys apiv1.KeyManager) {
	tb.Helper()
	if err := keys.Close(); err != nil {
		tb.Fatal(err)
	}
}

func createKey(tb testing.TB, keys apiv1.KeyManager, name string) crypto.PublicKey {
	tb.Helper()
	made, err := keys.CreateKey(&apiv1.CreateKeyRequest{Name: name})
	if err != nil {
		tb.Fatal(err)
	}
	return made.PublicKey
}

func TestDiskKeysAreTheOwnersAloneAndSurviveARestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data", "keys")
	keys := diskKeys(t, dir)
	public := createKey(t, keys, "x509-1")
	closed(t, keys)
	for path, want := range map[string]os.FileMode{dir: 0o700, filepath.Join(dir, "x509-1.pem"): 0o600} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s has mode %04o, want %04o", path, got, want)
		}
	}
	again, err := diskKeys(t, dir).CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "x509-1"})
	if err != nil {
		t.Fatal(err)
	}
	if !public.(*ecdsa.PublicKey).Equal(again.Public()) {
		t.Error("the key is another one after a restart")
	}
	if _, err := pemutil.Read(filepath.Join(dir, "x509-1.pem")); err != nil {
		t.Errorf("others cannot read the file's format: %v", err)
	}
}

func TestDiskKeysThatOthersCanReadAreRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := diskKeys(t, dir)
	createKey(t, keys, "a")
	file := filepath.Join(dir, "a.pem")
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o602, 0o666} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		_, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
		if err == nil || !strings.Contains(err.Error(), "chmod 600 "+file) {
			t.Errorf("mode %04o: got error %v, want one that says how to mend it", mode, err)
		}
		if errors.Is(err, apiv1.NotFoundError{}) {
			t.Errorf("mode %04o: the key counts as lost", mode)
		}
	}
	closed(t, keys)
	if err := os.Chmod(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if _, err := authority.NewDiskKeys(dir, ""); err == nil || !strings.Contains(err.Error(), "chmod 700 "+dir) {
		t.Errorf("directory with mode 0750: got error %v, want one that says how to mend it", err)
	}
}

func TestDamagedKeyFilesAreNeitherKeysNorLost(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := diskKeys(t, dir)
	createKey(t, keys, "good")
	good, err := os.ReadFile(filepath.Join(dir, "good.pem"))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		"empty":     "",
		"truncated": string(good[:len(good)/2]),
		"twice":     string(good) + string(good),
		"no-key":    "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
		"other":     strings.ReplaceAll(string(good), "PRIVATE KEY", "EC PRIVATE KEY"),
		"huge":      string(good) + strings.Repeat("\n", 100_000),
	} {
		if err := os.WriteFile(filepath.Join(dir, name+".pem"), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: name})
		if err == nil || errors.Is(err, apiv1.NotFoundError{}) {
			t.Errorf("%s: got error %v, want one that says the file is damaged", name, err)
		}
	}
	if err := os.Symlink("good.pem", filepath.Join(dir, "link.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "link"}); err == nil {
		t.Error("followed a symbolic link")
	}
	if err := os.Mkdir(filepath.Join(dir, "dir.pem"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "dir"}); err == nil {
		t.Error("opened a directory as a key")
	}
}

func TestDiskKeysRemoveWhatACrashLeftHalfWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys[1]*")
	before := diskKeys(t, dir)
	createKey(t, before, "a")
	closed(t, before)
	half := filepath.Join(dir, ".new-0123")
	if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	keys := diskKeys(t, dir)
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Error("the half written key is still there")
	}
	if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"}); err != nil {
		t.Errorf("a whole key went too: %v", err)
	}
}

func TestKeyTypesHaveTheirNames(t *testing.T) {
	for name, want := range map[string]authority.KeyType{
		"ec-p256": authority.ECP256, "ec-p384": authority.ECP384, "rsa-2048": authority.RSA2048, "rsa-4096": authority.RSA4096,
	} {
		got, err := authority.ParseKeyType(name)
		if err != nil || got != want || got.String() != name {
			t.Errorf("ParseKeyType(%q) = %v, %v", name, got, err)
		}
		var read authority.KeyType
		if text, err := got.MarshalText(); err != nil || read.UnmarshalText(text) != nil || read != got {
			t.Errorf("%v becomes %v as text", got, read)
		}
	}
	for _, name := range []string{"", "EC-P256", "p256", "rsa-1024", "ed25519"} {
		if _, err := authority.ParseKeyType(name); err == nil || !strings.Contains(err.Error(), "ec-p256, ec-p384, rsa-2048, rsa-4096") {
			t.Errorf("ParseKeyType(%q): got error %v, want one that names the key types", name, err)
		}
	}
}
