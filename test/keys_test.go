package test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// authorityIDs returns the authorities that sign, as a command prints them.
func authorityIDs(t *testing.T, d *harness.Domain) (ids []string) {
	t.Helper()
	var items []struct{ ID, State string }
	if err := json.Unmarshal([]byte(d.Admin(t, "authority", "list", "-o", "json")), &items); err != nil {
		t.Fatal(err)
	}
	for _, x := range items {
		if x.State == "active" {
			ids = append(ids, x.ID)
		}
	}
	return ids
}

func TestKeysAreEncryptedAndDecryptedWithoutLosingAnAuthority(t *testing.T) {
	t.Parallel()
	d := harness.NewDomain(t, harness.Settings{})
	config := filepath.Join(d.Dir, "server.yaml")
	plain, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	secret := func(name, text string) (path string) {
		t.Helper()
		path = filepath.Join(d.Dir, name)
		write(path, text)
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, harness.ServerUID, harness.ServerUID); err != nil {
			t.Fatal(err)
		}
		return path
	}
	configure := func(encryption string) {
		write(config, string(plain)+encryption)
	}
	reencrypt := func(args ...string) harness.Command {
		return harness.Command{Args: append([]string{"server", "reencrypt-keys", "-c", config}, args...), UID: harness.ServerUID}
	}
	refuses := func(c harness.Command, texts ...string) {
		t.Helper()
		_, stderr, code := c.Try(t)
		for _, text := range texts {
			if code == 0 || !strings.Contains(stderr, text) {
				t.Errorf("exit status %d, want an error with %q:\n%s", code, text, stderr)
			}
		}
	}
	run := harness.Command{Args: []string{"server", "run", "-c", config}, UID: harness.ServerUID}
	first, second := secret("first", "correct horse battery staple\n"), secret("second", "another horse, another staple\n")
	d.StartServer(t)
	want := authorityIDs(t, d)
	same := func(what string) {
		t.Helper()
		d.StartServer(t)
		if got := authorityIDs(t, d); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("%s: %v sign, want %v", what, got, want)
		}
		d.Server.Kill()
	}

	configure("keys: {disk: {encryption: {secret_file: " + first + "}}}\n")
	refuses(reencrypt(), "in use by another server")
	d.Server.Kill()
	refuses(run, "is not encrypted", `run "hallmark server reencrypt-keys"`)
	if out := reencrypt().Run(t); out != "wrote 2 key files anew; 0 had the right form already\n" {
		t.Errorf("it printed %q", out)
	}
	same("encrypted")

	configure("keys: {disk: {encryption: {secret_file: " + second + "}}}\n")
	refuses(run, "another secret", `run "hallmark server reencrypt-keys"`)
	refuses(reencrypt(), "--old-secret-file")
	reencrypt("--old-secret-file", first).Run(t)
	same("with another secret")

	configure("keys: {disk: {encryption: {secret_env: KEYS_SECRET}}}\n")
	refuses(run, "the environment variable KEYS_SECRET is not set")
	configure("keys: {disk: {encryption: {secret_file: " + second + ".gone}}}\n")
	refuses(run, "secret_file", "second.gone", "no such file")

	configure("")
	refuses(run, "is encrypted, but keys.disk.encryption is not configured")
	reencrypt("--old-secret-file", second).Run(t)
	same("not encrypted any more")
}
