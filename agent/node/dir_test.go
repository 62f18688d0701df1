package node_test

import (
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
)

// joined is a world whose node has joined and stopped.
func joined(t *testing.T) *world {
	t.Helper()
	w := joining(t)
	r := w.run(t)
	r.connected(t)
	r.stop()
	return w
}

func TestTheDataDirectoryIsPrivate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.options.Dir = filepath.Join(w.options.Dir, "deeper", "down")
		w.run(t).connected(t)
		info, err := os.Stat(w.options.Dir)
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("directory: %v, %v", info.Mode(), err)
		}
		files, err := os.ReadDir(w.options.Dir)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range files {
			names = append(names, f.Name())
			if info, err := f.Info(); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: %v, %v", f.Name(), info.Mode(), err)
			}
		}
		if got := strings.Join(names, " "); got != "agent.lock agent.pem bundle.json" {
			t.Errorf("directory holds %s", got)
		}
	})
}

func TestADirectoryThatOthersCanWriteIsRefused(t *testing.T) {
	w := joining(t)
	if err := os.Chmod(w.options.Dir, 0o777); err != nil {
		t.Fatal(err)
	}
	_, err := node.Open(w.options)
	wantError(t, err, "can be written by other users", "0700")
}

func TestTwoAgentsCannotShareADirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		_, err := node.Open(w.options)
		wantError(t, err, "in use by another agent")
		r.stop()
		n, err := node.Open(w.options)
		if err != nil {
			t.Fatal(err)
		}
		n.Close()
	})
}

func TestARenewedIdentityIsTheOneOnDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		time.Sleep(50 * time.Minute) // renewed
		ends := r.Status().ExpiresAt
		r.stop()
		again := w.run(t)
		again.connected(t)
		if got := again.Status().ExpiresAt; !got.Equal(ends) {
			t.Errorf("identity on disk ends at %v, the last one at %v", got, ends)
		}
	})
}

func TestADamagedDirectoryIsReported(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joined(t)
		identity := filepath.Join(w.options.Dir, "agent.pem")
		whole, err := os.ReadFile(identity)
		if err != nil {
			t.Fatal(err)
		}
		key, rest := pem.Decode(whole)
		cert, _ := pem.Decode(rest)
		other := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.Chain(nil, "/spire/agent/test/x")[0]})
		for want, data := range map[string][]byte{
			"private key or certificate is missing": pem.EncodeToMemory(key),
			"certificate is missing":                nil,
			"is missing":                            pem.EncodeToMemory(cert),
			"do not belong together":                append(pem.EncodeToMemory(key), other...),
			"remove the file to attest anew":        pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}),
			"larger than":                           make([]byte, 5<<20),
		} {
			if err := os.WriteFile(identity, data, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := node.Open(w.options)
			wantError(t, err, want)
		}
		if err := os.WriteFile(identity, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(w.options.Dir, "bundle.json"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err = node.Open(w.options)
		wantError(t, err, "bundle.json is damaged")
	})
}

func TestADirectoryOfAnotherTrustDomainIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joined(t)
		other := spiffeid.RequireTrustDomainFromString("other.org")
		w.options.TrustDomain, w.options.Join = other, nil
		w.options.TrustBundle = &bundle.Bundle{TrustDomain: other, X509Authorities: w.CurrentBundle().X509Authorities}
		_, err := node.Open(w.options)
		wantError(t, err, `not one of an agent in trust domain "other.org"`)
	})
}

func TestAnIdentityWithoutABundleIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		r := w.run(t)
		r.connected(t)
		r.stop()
		if err := os.Remove(filepath.Join(w.options.Dir, "bundle.json")); err != nil {
			t.Fatal(err)
		}
		w.run(t).connected(t)
		if n := w.CallCount("AttestAgent"); n != 2 {
			t.Errorf("attested %d times, want twice", n)
		}
	})
}

func TestADirectoryThatCannotBeWrittenDoesNotStopTheAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		// A directory in the file's place makes the rename fail, for root too.
		identity := filepath.Join(w.options.Dir, "agent.pem")
		if err := os.Remove(identity); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(filepath.Join(identity, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		if s := r.Status(); !s.Connected || !s.ExpiresAt.After(time.Now()) {
			t.Errorf("status is %+v", s)
		}
		if log := w.log.String(); !strings.Contains(log, "level=ERROR") || !strings.Contains(log, "could not save") {
			t.Error("no error is logged")
		}
		files, err := os.ReadDir(w.options.Dir)
		if err != nil || len(files) != 3 {
			t.Errorf("temporary files are left: %v", files)
		}
	})
}

func TestThePrivateKeyIsTheOneOfTheSVID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joined(t)
		data, err := os.ReadFile(filepath.Join(w.options.Dir, "agent.pem"))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(data)
		if _, err := x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
			t.Errorf("key is not PKCS#8: %v", err)
		}
	})
}

func FuzzIdentityFile(f *testing.F) {
	s := nodetest.New(f)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Chain(nil, "/spire/agent/x")[0]}))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"))
	b := s.CurrentBundle()
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(filepath.Join(dir, "agent.pem"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		n, err := node.Open(node.Options{TrustDomain: nodetest.TrustDomain, Server: nodetest.Address, Dir: dir, TrustBundle: b})
		if err == nil {
			n.Close()
			t.Error("opened without an attestor and a bundle on disk")
		}
	})
}
