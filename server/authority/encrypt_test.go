package authority_test

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
	"filippo.io/age/armor"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/authority"
)

const (
	secret      = "correct horse battery staple"
	otherSecret = "another horse, another staple"
)

func readFile(tb testing.TB, path string) []byte {
	tb.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func writeFile(tb testing.TB, path string, data []byte) {
	tb.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		tb.Fatal(err)
	}
}

// expectKey checks that a key is there and the same as when it was made.
func expectKey(tb testing.TB, keys apiv1.KeyManager, name string, want crypto.PublicKey) {
	tb.Helper()
	got, err := keys.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: name})
	if err != nil {
		tb.Fatal(err)
	}
	if !want.(interface{ Equal(crypto.PublicKey) bool }).Equal(got) {
		tb.Errorf("key %s is another one now", name)
	}
}

func expectError(tb testing.TB, err error, texts ...string) {
	tb.Helper()
	if err == nil {
		tb.Fatalf("no error; want one with %q", texts)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			tb.Errorf("got error %q, want one with %q", err, text)
		}
	}
	if errors.Is(err, apiv1.NotFoundError{}) {
		tb.Errorf("%q says that the key is lost", err)
	}
}

func TestEncryptedKeysSurviveARestartAndAgeReadsThem(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := encryptedKeys(t, dir, secret)
	public := createKey(t, keys, "a")
	closed(t, keys)
	expectKey(t, encryptedKeys(t, dir, secret), "a", public)

	data := readFile(t, filepath.Join(dir, "a.pem"))
	if bytes.Contains(data, []byte("PRIVATE KEY")) {
		t.Errorf("the file is not encrypted:\n%s", data)
	}
	identity, err := age.NewScryptIdentity(secret)
	if err != nil {
		t.Fatal(err)
	}
	r, err := age.Decrypt(armor.NewReader(bytes.NewReader(data)), identity)
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := io.ReadAll(r); err != nil || !bytes.HasPrefix(plain, []byte("-----BEGIN PRIVATE KEY-----")) {
		t.Errorf("decrypted, it is %q, %v", plain, err)
	}
}

func TestEncryptedKeysWithAnotherSecretAreNeitherKeysNorLost(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := encryptedKeys(t, dir, secret)
	createKey(t, keys, "a")
	closed(t, keys)
	file := filepath.Join(dir, "a.pem")

	keys = encryptedKeys(t, dir, otherSecret)
	_, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
	expectError(t, err, file, "another secret", "hallmark server reencrypt-keys")
	closed(t, keys)

	_, err = authority.NewDiskKeys(dir, "")
	expectError(t, err, file, "is encrypted", "keys.disk.encryption is not configured", "hallmark server reencrypt-keys")
}

func TestPlainKeysAreRefusedWhereTheyShouldBeEncrypted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := diskKeys(t, dir)
	createKey(t, keys, "a")
	closed(t, keys)
	_, err := authority.NewDiskKeys(dir, secret)
	expectError(t, err, filepath.Join(dir, "a.pem"), "is not encrypted", "hallmark server reencrypt-keys")
}

func TestAChangedEncryptedKeyIsNoticed(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := encryptedKeys(t, dir, secret)
	createKey(t, keys, "a")
	file := filepath.Join(dir, "a.pem")
	lines := strings.Split(string(readFile(t, file)), "\n")
	for _, i := range []int{1, 2, len(lines) - 3} { // of age's header, and of what it encrypts
		changed := append([]string(nil), lines...)
		b := []byte(changed[i])
		b[len(b)/2] ^= 1
		changed[i] = string(b)
		writeFile(t, file, []byte(strings.Join(changed, "\n")))
		if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"}); err == nil || errors.Is(err, apiv1.NotFoundError{}) {
			t.Errorf("line %d changed: got error %v", i, err)
		}
	}
}

func TestAKeyFileCannotDemandMuchOfTheOneWhoOpensIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := encryptedKeys(t, dir, secret)
	recipient, err := age.NewScryptRecipient(secret)
	if err != nil {
		t.Fatal(err)
	}
	recipient.SetWorkFactor(11) // one more than that of files, here
	var b bytes.Buffer
	armored := armor.NewWriter(&b)
	w, err := age.Encrypt(armored, recipient)
	if err == nil {
		err = errors.Join(w.Close(), armored.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "a.pem"), b.Bytes())
	_, err = keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
	expectError(t, err, "work factor too large")
}

func TestADirectoryOfKeysBelongsToOneServer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := diskKeys(t, dir)
	_, err := authority.NewDiskKeys(dir, "")
	expectError(t, err, dir, "in use by another server")
	_, _, err = authority.ReencryptDiskKeys(dir, secret, "")
	expectError(t, err, "in use by another server")
	closed(t, keys)
	diskKeys(t, dir)
}

func TestKeysAreReencrypted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := diskKeys(t, dir)
	a, b := createKey(t, keys, "a"), createKey(t, keys, "b")
	closed(t, keys)
	for _, step := range []struct {
		what, from, to string
	}{
		{"turned on", "", secret},
		{"with another secret", secret, otherSecret},
		{"turned off", otherSecret, ""},
	} {
		for again, want := range []string{"2 0", "0 2"} {
			written, right, err := authority.ReencryptDiskKeys(dir, step.to, step.from)
			if got := fmt.Sprint(written, right); err != nil || got != want {
				t.Fatalf("%s, time %d: wrote %s, want %s, error %v", step.what, again, got, want, err)
			}
		}
		keys := encryptedKeys(t, dir, step.to)
		expectKey(t, keys, "a", a)
		expectKey(t, keys, "b", b)
		closed(t, keys)
	}
}

func TestReencryptionThatEndedEarlyIsDoneByTheNext(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := encryptedKeys(t, dir, secret)
	a, b := createKey(t, keys, "a"), createKey(t, keys, "b")
	closed(t, keys)
	// A kill after the first file, while the second was written.
	old := readFile(t, filepath.Join(dir, "b.pem"))
	if _, _, err := authority.ReencryptDiskKeys(dir, otherSecret, secret); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, "b.pem"), old)
	writeFile(t, filepath.Join(dir, ".new-0123456789abcdef"), old[:100])

	if written, right, err := authority.ReencryptDiskKeys(dir, otherSecret, secret); err != nil || written != 1 || right != 1 {
		t.Fatalf("wrote %d, %d were right: %v", written, right, err)
	}
	keys = encryptedKeys(t, dir, otherSecret)
	expectKey(t, keys, "a", a)
	expectKey(t, keys, "b", b)
	if files, err := os.ReadDir(dir); err != nil || len(files) != 2 {
		t.Errorf("the directory holds %v, %v", files, err)
	}
}

func TestReencryptionSaysWhichSecretIsMissing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	keys := encryptedKeys(t, dir, secret)
	createKey(t, keys, "a")
	closed(t, keys)
	file := filepath.Join(dir, "a.pem")
	before := readFile(t, file)
	for _, to := range []string{"", otherSecret} {
		_, _, err := authority.ReencryptDiskKeys(dir, to, "")
		expectError(t, err, file, "--old-secret-file")
		_, _, err = authority.ReencryptDiskKeys(dir, to, "not this one either")
		expectError(t, err, file, "neither")
	}
	if !bytes.Equal(before, readFile(t, file)) {
		t.Error("the file has changed")
	}
}

func TestSecretsThatCouldBeTriedAreRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	_, err := authority.NewDiskKeys(dir, "hunter2")
	expectError(t, err, "7 characters", "openssl rand")
	_, _, err = authority.ReencryptDiskKeys(dir, "hunter2", "")
	expectError(t, err, "7 characters", "openssl rand")
}

func TestASecretIsReadFromItsFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	for _, content := range []string{secret, secret + "\n", secret + "\r\n"} {
		writeFile(t, file, []byte(content))
		if got, err := authority.ReadSecret(file); err != nil || got != secret {
			t.Errorf("%q: read %q, %v", content, got, err)
		}
	}
	for _, mode := range []os.FileMode{0o400, 0o440, 0o600, 0o640} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := authority.ReadSecret(file); err != nil {
			t.Errorf("mode %04o: %v", mode, err)
		}
	}
	for _, mode := range []os.FileMode{0o604, 0o644, 0o660, 0o602} {
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		_, err := authority.ReadSecret(file)
		expectError(t, err, "chmod 600 "+file)
	}
	for content, want := range map[string]string{
		"": "is empty", "\n": "is empty", "two\nlines": "not one line", "a\x00b": "not one line", strings.Repeat("x", 2000): "longer than",
	} {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
		writeFile(t, file, []byte(content))
		_, err := authority.ReadSecret(file)
		expectError(t, err, file, want)
	}
	_, err := authority.ReadSecret(filepath.Join(t.TempDir(), "none"))
	expectError(t, err, "no such file")
	_, err = authority.ReadSecret(t.TempDir())
	expectError(t, err, "is not a file")
}

// FuzzDecryptKey: whatever an encrypted key's file holds, reading it ends in an
// error or a key, soon.
func FuzzDecryptKey(f *testing.F) {
	dir := f.TempDir()
	keys := encryptedKeys(f, filepath.Join(dir, "keys"), secret)
	createKey(f, keys, "a")
	file := filepath.Join(dir, "keys", "a.pem")
	f.Add(readFile(f, file))
	f.Add([]byte(armor.Header + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		writeFile(t, file, data)
		_, _ = keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
	})
}
