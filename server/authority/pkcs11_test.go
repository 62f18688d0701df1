//go:build pkcs11 && cgo

package authority_test

import (
	"errors"
	"log/slog"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/kms"
	"github.com/hallmark-id/hallmark/test/harness"
)

// token is a PKCS #11 token and what is logged about it.
type token struct {
	*harness.SoftHSM
	t   *testing.T
	log *events
}

func newToken(t *testing.T) *token { return &token{harness.NewSoftHSM(t), t, newEvents()} }

func (k *token) tryOpen(pin string) (apiv1.KeyManager, error) {
	return kms.Open(kms.Options{URI: k.URI, PIN: pin, TrustDomain: td, Server: "server-1", Log: slog.New(k.log)})
}

func (k *token) open() apiv1.KeyManager {
	k.t.Helper()
	keys, err := k.tryOpen(k.PIN)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { keys.Close() })
	return keys
}

func init() {
	keyPlaces["pkcs11"] = func(t *testing.T, w *world) *keyPlace {
		k := harness.NewSoftHSM(t)
		return &keyPlace{
			remote: true,
			open: func(td spiffeid.TrustDomain, server string) (apiv1.KeyManager, error) {
				return kms.Open(kms.Options{URI: k.URI, PIN: k.PIN, TrustDomain: td, Server: server, Log: slog.New(w.log)})
			},
			away: k.TakeAway, back: k.BringBack,
		}
	}
}

func TestPKCS11_LabelsNameTrustDomainServerAndKind(t *testing.T) {
	harness.NeedCommand(t, "pkcs11-tool")
	k := newToken(t)
	w := newWorld(t)
	w.keys = k.open()
	a := w.open()
	var want []string
	for _, kind := range everyKind {
		active, _, _ := a.State(kind)
		want = append(want, "hallmark/example.org/server-1/"+active.KeyName)
	}
	out, err := exec.Command("pkcs11-tool", "--module", k.Module, "--token-label", "hallmark", "--login", "--pin", k.PIN, "--list-objects").CombinedOutput()
	if err != nil {
		t.Fatalf("pkcs11-tool: %v\n%s", err, out)
	}
	objects := string(out)
	for _, label := range want {
		if !strings.Contains(objects, label) {
			t.Errorf("no object is labelled %q:\n%s", label, objects)
		}
	}
	if strings.Count(objects, "never extractable") != len(want) {
		t.Errorf("the private keys can leave the token:\n%s", objects)
	}
}

func TestPKCS11_ErrorsSayWhatIsWrong(t *testing.T) {
	k := newToken(t)
	_, err := k.tryOpen("0000")
	expectError(t, err, "open the PKCS #11 token", "PIN")
	k.TakeAway(t)
	_, err = k.tryOpen(k.PIN)
	expectError(t, err, "open the PKCS #11 token")
	k.BringBack(t)
	k.open()
}

func TestPKCS11_ARefusedPINIsNotTriedAgain(t *testing.T) {
	k := newToken(t)
	keys := k.open()
	createKey(t, keys, "a")
	signer, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
	if err != nil {
		t.Fatal(err)
	}
	k.Replace(t, "999999")
	if err := sign(signer); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "PIN") {
		t.Errorf("with another PIN: %v", err)
	}
	k.log.await(t, 1, "the PKCS #11 token refuses the PIN; it is not tried again until the server is restarted")
	k.BringBack(t)
	// Longer than the wait between two tries.
	for end := time.Now().Add(1200 * time.Millisecond); time.Now().Before(end); {
		if keys.(interface{ Available() error }).Available() == nil {
			t.Fatal("the PIN was tried again")
		}
	}
	closed(t, keys)
	expectKey(t, k.open(), "a", signer.Public())
}
