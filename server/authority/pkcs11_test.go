//go:build pkcs11 && cgo

package authority_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"log/slog"
	"os/exec"
	"strings"
	"testing"
	"time"

	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/registry"
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
	return authority.NewKMSKeys(authority.KMSOptions{URI: k.URI, PIN: pin, TrustDomain: td, Log: slog.New(k.log)})
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

func TestPKCS11_KeysThatWereMadeSign(t *testing.T) { testKeysSign(t, newToken(t).open()) }

func TestPKCS11_AKeyIsMadeOnceAndDeletedOnce(t *testing.T) { testKeyOnce(t, newToken(t).open()) }

func TestPKCS11_UnsupportedKeysAreRefused(t *testing.T) { testUnsupported(t, newToken(t).open()) }

func TestPKCS11_KeysSurviveARestartAndRotationMakesAndDeletesThem(t *testing.T) {
	k := newToken(t)
	w := newWorld(t)
	w.keys = k.open()
	a := w.open()
	first := make(map[registry.AuthorityKind]*registry.Authority)
	for _, kind := range everyKind {
		first[kind], _, _ = a.State(kind)
	}
	x, err := a.X509()
	if err != nil {
		t.Fatal(err)
	}
	if !x.Remote {
		t.Error("what a token signs is not verified")
	}

	closed(t, w.keys)
	w.keys = k.open()
	a = w.open()
	for _, kind := range everyKind {
		if got := w.signing(a, kind); got != first[kind].ID {
			t.Errorf("%s: %s signs after a restart, %s before", kind, got, first[kind].ID)
		}
	}
	w.add(13 * time.Hour)
	w.rotate(a)
	w.add(8 * time.Hour)
	w.rotate(a) // the next ones sign
	for _, kind := range everyKind {
		if w.signing(a, kind) == first[kind].ID {
			t.Errorf("%s: the first authority still signs", kind)
		}
	}
	w.add(4 * time.Hour)
	w.rotate(a) // the first ones have ended
	for _, kind := range everyKind {
		if w.hasKey(first[kind]) {
			t.Errorf("%s: the key of an authority that has ended is still in the token", kind)
		}
	}
}

func TestPKCS11_LabelsNameTrustDomainAndKind(t *testing.T) {
	harness.NeedCommand(t, "pkcs11-tool")
	k := newToken(t)
	w := newWorld(t)
	w.keys = k.open()
	a := w.open()
	var want []string
	for _, kind := range everyKind {
		active, _, _ := a.State(kind)
		want = append(want, "hallmark/example.org/"+active.KeyName)
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

func TestPKCS11_ATokenThatGoesAwayAndComesBackSignsAgain(t *testing.T) {
	k := newToken(t)
	keys := k.open()
	createKey(t, keys, "a")
	signer, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
	if err != nil {
		t.Fatal(err)
	}
	available := keys.(interface{ Available() error }).Available
	must := func(want bool, what string) {
		t.Helper()
		if err := sign(signer); (err == nil) != want {
			t.Fatalf("%s: signing gives %v", what, err)
		} else if err != nil && !errors.Is(err, authority.ErrKeysUnavailable) {
			t.Errorf("%s: signing gives %v, which is not ErrKeysUnavailable", what, err)
		}
		if err := available(); (err == nil) != want {
			t.Errorf("%s: available says %v", what, err)
		}
	}
	must(true, "at first")
	k.TakeAway(t)
	must(false, "while it is away")
	if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"}); err == nil || errors.Is(err, apiv1.NotFoundError{}) {
		t.Errorf("while it is away the key counts as lost: %v", err)
	}
	k.log.await(t, 1, "the PKCS #11 token cannot be used; nothing is signed until it is back")
	k.BringBack(t)
	// That alone brings it back: nobody asks a server to sign that is not ready.
	harness.Eventually(t, "use the token again", func(context.Context) error { return available() })
	k.log.await(t, 1, "the PKCS #11 token can be used again")
	must(true, "when it is back")
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
	if err := sign(signer); !errors.Is(err, authority.ErrKeysUnavailable) || !strings.Contains(err.Error(), "PIN") {
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

// sign signs something with a key on P-256, and checks the signature.
func sign(signer crypto.Signer) error {
	digest := sha256.Sum256([]byte("something"))
	signature, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err == nil && !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], signature) {
		err = errors.New("the signature does not verify")
	}
	return err
}
