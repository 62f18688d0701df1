package authority_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.step.sm/crypto/kms/apiv1"

	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/kms"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/test/harness"
)

// keyPlace is where a key manager has its keys.
type keyPlace struct {
	open       func(td spiffeid.TrustDomain, server string) (apiv1.KeyManager, error)
	forgets    bool             // keys end with the manager
	alone      bool             // keys of one server are all that it takes
	remote     bool             // keys are not in this process
	away, back func(testing.TB) // nil: it is always there
	ring       *harness.KeyRing // of a service that is made to lie; nil: it is none
	unmade     map[string]bool  // kinds of key that it does not make
}

func (p *keyPlace) mustOpen(t testing.TB) apiv1.KeyManager {
	t.Helper()
	return p.openAs(t, td, "server-1")
}

func (p *keyPlace) openAs(t testing.TB, td spiffeid.TrustDomain, server string) apiv1.KeyManager {
	t.Helper()
	keys, err := p.open(td, server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keys.Close() })
	return keys
}

// keyPlaces makes one of each kind, which lives by the clock of a world.
var keyPlaces = map[string]func(*testing.T, *world) *keyPlace{
	"disk": func(t *testing.T, w *world) *keyPlace {
		dir := filepath.Join(t.TempDir(), "keys")
		return &keyPlace{alone: true, open: func(spiffeid.TrustDomain, string) (apiv1.KeyManager, error) {
			return authority.NewDiskKeys(dir, "")
		}}
	},
	"encrypted": func(t *testing.T, w *world) *keyPlace {
		dir := filepath.Join(t.TempDir(), "keys")
		return &keyPlace{alone: true, open: func(spiffeid.TrustDomain, string) (apiv1.KeyManager, error) {
			return authority.NewDiskKeys(dir, secret)
		}}
	},
	"memory": func(t *testing.T, w *world) *keyPlace {
		return &keyPlace{alone: true, forgets: true, open: func(spiffeid.TrustDomain, string) (apiv1.KeyManager, error) {
			return authority.NewMemoryKeys(), nil
		}}
	},
	"tpm": func(t *testing.T, w *world) *keyPlace {
		tpm := harness.NewTPMMaker(t).NewTPM(t)
		p := w.service(fmt.Sprintf("tpmkms:device=%s;storage-directory=%s", tpm.Socket, filepath.Join(t.TempDir(), "keys")))
		p.away, p.back = tpm.TakeAway, tpm.BringBack
		p.unmade = map[string]bool{"rsa-4096": true}
		return p
	},
	"aws": func(t *testing.T, w *world) *keyPlace {
		cloud, ring := harness.NewAWS(t, harness.EC2Instance{}), harness.NewKeyRing(w.time)
		cloud.Key("AKIDSERVER", "secret of the server")
		t.Setenv("AWS_ACCESS_KEY_ID", "AKIDSERVER")
		t.Setenv("AWS_SECRET_ACCESS_KEY", "secret of the server")
		t.Setenv("AWS_CONFIG_FILE", filepath.Join(t.TempDir(), "none"))
		return w.cloud(t, ring, cloud.KMS(ring), "awskms:region=us-east-1;endpoint=%s")
	},
	"gcp": func(t *testing.T, w *world) *keyPlace {
		cloud, ring := harness.NewGCP(t, harness.GCPInstance{}), harness.NewKeyRing(w.time)
		api := httptest.NewServer(cloud.API())
		t.Cleanup(api.Close)
		t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", cloud.AccountFile(t, api.URL+"/token"))
		return w.cloud(t, ring, cloud.KMS(ring), "cloudkms:project=p;location=l;key-ring=r;endpoint=%s")
	},
	"azure": func(t *testing.T, w *world) *keyPlace {
		ring := harness.NewKeyRing(w.time)
		azure.Do(func() { // tokens are kept for the life of the process
			azureCloud = harness.NewAzure(t, harness.AzureMachine{Tenant: "t", Principal: "p"}, "127.0.0.1:1")
			azureIdentity = httptest.NewServer(azureCloud.Identity(t))
		})
		cloud := azureCloud
		t.Setenv("IDENTITY_ENDPOINT", azureIdentity.URL+"/msi/token")
		t.Setenv("IDENTITY_HEADER", harness.AzureIdentityHeader)
		return w.cloud(t, ring, cloud.Vault(ring), "azurekms:endpoint=%s")
	},
	"transit": func(t *testing.T, w *world) *keyPlace {
		ring := harness.NewKeyRing(w.time)
		token := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(token, []byte(harness.TransitToken+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return w.cloud(t, ring, harness.Transit(ring), "transit:mount=pki/transit;namespace=team/;token-file="+token+";address=%s")
	},
}

var (
	azure         sync.Once
	azureCloud    *harness.Azure
	azureIdentity *httptest.Server
)

// service is where a URI says.
func (w *world) service(uri string) *keyPlace {
	return &keyPlace{remote: true, open: func(td spiffeid.TrustDomain, server string) (apiv1.KeyManager, error) {
		return kms.Open(kms.Options{URI: uri, TrustDomain: td, Server: server, Now: w.time, Log: slog.New(w.log)})
	}}
}

// cloud is a service over HTTP, at the URL that goes into a URI.
func (w *world) cloud(t *testing.T, ring *harness.KeyRing, api http.Handler, uri string) *keyPlace {
	server := httptest.NewServer(api)
	t.Cleanup(server.Close)
	p := w.service(fmt.Sprintf(uri, server.URL))
	p.ring = ring
	p.away, p.back = func(testing.TB) { ring.Down() }, func(testing.TB) { ring.Up() }
	return p
}

// everyKeyPlace runs a test with each kind of key manager.
func everyKeyPlace(t *testing.T, test func(*testing.T, *world, *keyPlace)) {
	for _, name := range slices.Sorted(maps.Keys(keyPlaces)) {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			test(t, w, keyPlaces[name](t, w))
		})
	}
}

// kinds are the keys that are made.
var kinds = map[string]apiv1.CreateKeyRequest{
	"default":  {},
	"ec-p256":  {SignatureAlgorithm: apiv1.ECDSAWithSHA256},
	"ec-p384":  {SignatureAlgorithm: apiv1.ECDSAWithSHA384},
	"rsa-2048": {SignatureAlgorithm: apiv1.SHA256WithRSA, Bits: 2048},
	"rsa-3072": {SignatureAlgorithm: apiv1.SHA256WithRSA, Bits: 3072},
}

func TestEveryKeyManager_KeysThatWereMadeSign(t *testing.T) {
	everyKeyPlace(t, func(t *testing.T, _ *world, p *keyPlace) {
		keys := p.mustOpen(t)
		for name, req := range kinds {
			if p.unmade[name] {
				continue
			}
			req.Name = name
			made, err := keys.CreateKey(&req)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			signer, err := keys.CreateSigner(&made.CreateSignerRequest)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			expectKey(t, keys, made.Name, made.PublicKey)
			if err := sign(signer); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			switch public := signer.Public().(type) {
			case *ecdsa.PublicKey:
				if want := map[bool]elliptic.Curve{true: elliptic.P384(), false: elliptic.P256()}[name == "ec-p384"]; public.Curve != want {
					t.Errorf("%s: key is on curve %s", name, public.Curve.Params().Name)
				}
			case *rsa.PublicKey:
				if want := req.Bits; public.N.BitLen() != want {
					t.Errorf("%s: key has %d bits", name, public.N.BitLen())
				}
			}
		}
	})
}

func TestEveryKeyManager_AKeyIsMadeOnceAndDeletedOnce(t *testing.T) {
	everyKeyPlace(t, func(t *testing.T, _ *world, p *keyPlace) {
		keys := p.mustOpen(t)
		createKey(t, keys, "a")
		if _, err := keys.CreateKey(&apiv1.CreateKeyRequest{Name: "a"}); !errors.Is(err, apiv1.AlreadyExistsError{}) {
			t.Errorf("made a key twice: %v", err)
		}
		remove := func() error { return keys.(apiv1.KeyDeleter).DeleteKey(&apiv1.DeleteKeyRequest{Name: "a"}) }
		if err := remove(); err != nil {
			t.Fatal(err)
		}
		if err := remove(); !errors.Is(err, apiv1.NotFoundError{}) {
			t.Errorf("deleted a key twice: %v", err)
		}
		if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"}); !errors.Is(err, apiv1.NotFoundError{}) {
			t.Errorf("opened a deleted key: %v", err)
		}
		if _, err := keys.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: "a"}); !errors.Is(err, apiv1.NotFoundError{}) {
			t.Errorf("read a deleted key: %v", err)
		}
	})
}

func TestEveryKeyManager_KeyNamesThatLeadElsewhereAreRefused(t *testing.T) {
	everyKeyPlace(t, func(t *testing.T, _ *world, p *keyPlace) {
		keys := p.mustOpen(t)
		for _, name := range []string{"", ".", "..", "../a", "a/b", "/etc/passwd", `a\b`, "a\x00b", "a b", "-a", ".hidden", "ключ", strings.Repeat("a", 101)} {
			if _, err := keys.CreateKey(&apiv1.CreateKeyRequest{Name: name}); err == nil {
				t.Errorf("made a key named %q", name)
			}
			if err := keys.(apiv1.NameValidator).ValidateName(name); err == nil {
				t.Errorf("took the name %q", name)
			}
			if err := keys.(apiv1.KeyDeleter).DeleteKey(&apiv1.DeleteKeyRequest{Name: name}); err == nil {
				t.Errorf("deleted a key named %q", name)
			}
			if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: name}); err == nil {
				t.Errorf("opened a key named %q", name)
			}
		}
	})
}

func TestEveryKeyManager_UnsupportedKeysAreRefused(t *testing.T) {
	everyKeyPlace(t, func(t *testing.T, _ *world, p *keyPlace) {
		keys := p.mustOpen(t)
		for _, req := range []*apiv1.CreateKeyRequest{
			{Name: "a", SignatureAlgorithm: apiv1.SHA256WithRSA},
			{Name: "a", SignatureAlgorithm: apiv1.SHA256WithRSA, Bits: 1024},
			{Name: "a", SignatureAlgorithm: apiv1.SHA256WithRSA, Bits: 1 << 20},
			{Name: "a", SignatureAlgorithm: apiv1.PureEd25519},
		} {
			if _, err := keys.CreateKey(req); err == nil {
				t.Errorf("made a key of %s with %d bits", req.SignatureAlgorithm, req.Bits)
			}
		}
	})
}

func TestEveryKeyManager_KeysSurviveARestartAndRotationMakesAndDeletesThem(t *testing.T) {
	everyKeyPlace(t, func(t *testing.T, w *world, p *keyPlace) {
		w.keys = p.mustOpen(t)
		a := w.open()
		first := make(map[registry.AuthorityKind]*registry.Authority)
		for _, kind := range everyKind {
			first[kind], _, _ = a.State(kind)
		}
		if x, err := a.X509(); err != nil {
			t.Fatal(err)
		} else if x.Remote != p.remote {
			t.Errorf("remote is %v, so that what it signs is verified or not", x.Remote)
		}
		if !p.forgets {
			closed(t, w.keys)
			w.keys = p.mustOpen(t)
			a = w.open()
		}
		for _, kind := range everyKind {
			if got := w.signing(a, kind); got != first[kind].ID {
				t.Errorf("%s: %s signs after a restart, %s before", kind, got, first[kind].ID)
			}
		}
		for round := range 2 {
			was := make(map[registry.AuthorityKind]*registry.Authority)
			for _, kind := range everyKind {
				was[kind], _, _ = a.State(kind)
			}
			w.add(13 * time.Hour)
			w.rotate(a) // the next ones are prepared
			w.add(8 * time.Hour)
			w.rotate(a) // and sign
			for _, kind := range everyKind {
				if w.signing(a, kind) == was[kind].ID {
					t.Errorf("%s, rotation %d: the authority before still signs", kind, round)
				}
			}
			w.add(4 * time.Hour)
			w.rotate(a) // those before have ended
			for _, kind := range everyKind {
				if w.hasKey(was[kind]) {
					t.Errorf("%s, rotation %d: the key of an authority that has ended is still there", kind, round)
				}
			}
		}
		if known := len(w.registry.View().Authorities()); p.ring != nil && p.ring.Keys() != known {
			t.Errorf("the service has %d keys after two rotations, of %d authorities", p.ring.Keys(), known)
		}
	})
}

func TestEveryKeyManager_KeysThatNoAuthorityHasAreCollectedAndOthersAreNot(t *testing.T) {
	everyKeyPlace(t, func(t *testing.T, w *world, p *keyPlace) {
		w.keys = p.mustOpen(t)
		if _, ok := w.keys.(interface{ Keys() ([]kms.Key, error) }); !ok {
			t.Skip("it does not say when its keys were made")
		}
		foreign := []apiv1.KeyManager{
			p.openAs(t, td, "server-2"), p.openAs(t, spiffeid.RequireTrustDomainFromString("example.com"), "server-1"),
		}
		for _, keys := range foreign {
			createKey(t, keys, "x509-0") // of the same name, and no authority's
		}
		createKey(t, w.keys, "x509-0")
		a := w.open()
		has := func(keys apiv1.KeyManager, name string) bool {
			t.Helper()
			_, err := keys.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: name})
			if err != nil && !errors.Is(err, apiv1.NotFoundError{}) {
				t.Fatal(err)
			}
			return err == nil
		}
		for hours := range 48 {
			if !has(w.keys, "x509-0") {
				t.Fatalf("a key that another server of the same name might sign with is gone after %dh", hours)
			}
			w.add(time.Hour)
			w.rotate(a)
		}
		if has(w.keys, "x509-0") {
			t.Error("a key that no authority has is still there after two days")
		}
		for i, keys := range foreign {
			if !has(keys, "x509-0") {
				t.Errorf("the key of another server (%d) is gone", i)
			}
		}
		for _, kind := range everyKind {
			w.signing(a, kind)
		}
	})
}

func TestEveryKeyManager_OneThatGoesAwayAndComesBackSignsAgain(t *testing.T) {
	everyKeyPlace(t, func(t *testing.T, w *world, p *keyPlace) {
		if p.away == nil {
			t.Skip("it is always there")
		}
		keys := p.mustOpen(t)
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
			} else if err != nil && !errors.Is(err, kms.ErrUnavailable) {
				t.Errorf("%s: signing gives %v, which is not ErrUnavailable", what, err)
			}
			if err := available(); (err == nil) != want {
				t.Errorf("%s: available says %v", what, err)
			}
		}
		must(true, "at first")
		p.away(t)
		must(false, "while it is away")
		if _, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"}); err == nil || errors.Is(err, apiv1.NotFoundError{}) {
			t.Errorf("while it is away the key counts as lost: %v", err)
		}
		if _, err := keys.CreateKey(&apiv1.CreateKeyRequest{Name: "b"}); !errors.Is(err, kms.ErrUnavailable) {
			t.Errorf("while it is away making a key gives %v", err)
		}
		p.back(t)
		// That alone brings it back: nobody asks a server to sign that is not ready.
		harness.Eventually(t, "use it again", func(context.Context) error { return available() })
		must(true, "when it is back")
	})
}

// lies are run with each of the services that can be made to lie.
func everyRing(t *testing.T, test func(*testing.T, *world, *keyPlace)) {
	everyKeyPlace(t, func(t *testing.T, w *world, p *keyPlace) {
		if p.ring == nil {
			t.Skip("it is the real one")
		}
		test(t, w, p)
	})
}

func TestEveryKeyManager_AKeyThatIsNotTheOneShownIsNotTaken(t *testing.T) {
	everyRing(t, func(t *testing.T, _ *world, p *keyPlace) {
		keys := p.mustOpen(t)
		p.ring.Lie(harness.ShowsOther)
		_, err := keys.CreateKey(&apiv1.CreateKeyRequest{Name: "a"})
		expectError(t, err, "not of the key that it was asked to sign with")
		if !errors.Is(err, kms.ErrUnavailable) {
			t.Errorf("it says %v", err)
		}
		if p.ring.Keys() != 0 {
			t.Error("the key is still there")
		}
	})
}

func TestEveryKeyManager_ASignatureOfAnotherKeyDoesNotLeaveTheHouse(t *testing.T) {
	everyRing(t, func(t *testing.T, w *world, p *keyPlace) {
		w.keys = p.mustOpen(t)
		a := w.open()
		for lie, want := range map[harness.Lie]string{harness.SignsOther: "not of the key", harness.SignsNothing: ""} {
			p.ring.Lie(lie)
			x, err := a.X509()
			if err != nil {
				t.Fatal(err)
			}
			signature, err := x.Signer.Sign(rand.Reader, make([]byte, 32), crypto.SHA256)
			expectError(t, err, want)
			if signature != nil || !errors.Is(err, kms.ErrUnavailable) {
				t.Errorf("it gave a signature, or said %v", err)
			}
			available := w.keys.(interface{ Available() error }).Available
			if available() == nil {
				t.Error("the service counts as sound")
			}
			p.ring.Lie(harness.Honest)
			harness.Eventually(t, "sign again", func(context.Context) error { return available() })
		}
	})
}

func TestEveryKeyManager_AKeyThatBecameAnotherIsReplaced(t *testing.T) {
	everyRing(t, func(t *testing.T, w *world, p *keyPlace) {
		w.keys = p.mustOpen(t)
		before, err := w.open().X509()
		if err != nil {
			t.Fatal(err)
		}
		p.ring.Lie(harness.ShowsOther)
		// What takes its place does not prove to be what it is shown as.
		_, err = w.tryOpen()
		expectError(t, err, "not of the key")
		p.ring.Lie(harness.Honest)
		harness.Eventually(t, "have another authority", func(context.Context) error {
			a, err := w.tryOpen()
			if err != nil {
				return err
			}
			if x, err := a.X509(); err != nil || x.ID == before.ID {
				t.Errorf("%v signs (%v)", x, err)
			}
			return nil
		})
	})
}

func TestEveryKeyManager_AnswersThatAreNoneAreErrors(t *testing.T) {
	everyRing(t, func(t *testing.T, _ *world, p *keyPlace) {
		createKey(t, p.mustOpen(t), "a")
		for name, answer := range map[string]http.HandlerFunc{
			"no JSON":  func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
			"nothing":  func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "{}") },
			"nulls":    func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "null") },
			"too much": func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"a":"`+strings.Repeat("x", 2<<20)) },
			"elsewhere": func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "http://127.0.0.1:1/steal", http.StatusTemporaryRedirect)
			},
			"bad request": func(w http.ResponseWriter, _ *http.Request) {
				http.Error(w, `{"error":"no","__type":"ValidationException"}`, http.StatusBadRequest)
			},
			"forbidden": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, `{"error":"no"}`, http.StatusForbidden) },
			"broken off": func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Length", "100")
				fmt.Fprint(w, "{")
			},
		} {
			keys := p.mustOpen(t)
			signer, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
			if err != nil {
				t.Fatal(err)
			}
			p.ring.Break(answer)
			if err := sign(signer); !errors.Is(err, kms.ErrUnavailable) {
				t.Errorf("%s: signing gives %v", name, err)
			}
			if _, err := keys.GetPublicKey(&apiv1.GetPublicKeyRequest{Name: "a"}); err == nil || errors.Is(err, apiv1.NotFoundError{}) {
				t.Errorf("%s: reading a key gives %v", name, err)
			}
			p.ring.Up()
		}
	})
}

func TestAServiceThatDoesNotAnswerIsWaitedForOnce(t *testing.T) {
	w := newWorld(t)
	p := keyPlaces["transit"](t, w)
	keys := p.mustOpen(t)
	createKey(t, keys, "a")
	signer, err := keys.CreateSigner(&apiv1.CreateSignerRequest{SigningKey: "a"})
	if err != nil {
		t.Fatal(err)
	}
	p.ring.Break(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // or the server does not see that the client goes
		<-r.Context().Done()
	})
	if err := sign(signer); !errors.Is(err, kms.ErrUnavailable) || !strings.Contains(err.Error(), "in time") {
		t.Errorf("it says %v", err)
	}
	// Now that this is known, nobody waits.
	done := make(chan error, 100)
	for range cap(done) {
		go func() { done <- sign(signer) }()
	}
	for range cap(done) - 1 { // one may look whether it is back
		if err := <-done; !errors.Is(err, kms.ErrUnavailable) {
			t.Errorf("it says %v", err)
		}
	}
	p.ring.Up()
	harness.Eventually(t, "sign again", func(context.Context) error { return keys.(interface{ Available() error }).Available() })
}

func TestCredentialsOfKeyServicesAreNotTold(t *testing.T) {
	everyRing(t, func(t *testing.T, w *world, p *keyPlace) {
		keys := p.mustOpen(t)
		p.ring.Break(func(w http.ResponseWriter, r *http.Request) { // a service that says what it was asked
			http.Error(w, "no", http.StatusForbidden)
		})
		_, err := keys.CreateKey(&apiv1.CreateKeyRequest{Name: "a"})
		for _, secret := range []string{"secret of the server", "ya29.token", harness.TransitToken, harness.AzureIdentityHeader, "eyJ"} {
			if err == nil || strings.Contains(err.Error(), secret) || strings.Contains(fmt.Sprintf("%+v", keys), secret) {
				t.Errorf("it tells %q: %v", secret, err)
			}
		}
	})
}

func TestAKeyThatIsDestroyedForGoodLeavesNothingInCloudKMS(t *testing.T) {
	w := newWorld(t)
	p := keyPlaces["gcp"](t, w)
	w.keys = p.mustOpen(t)
	createKey(t, w.keys, "a")
	if err := w.keys.(apiv1.KeyDeleter).DeleteKey(&apiv1.DeleteKeyRequest{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	w.open()
	if got := p.ring.Left(); got != 1+len(everyKind) {
		t.Errorf("there are %d keys while one waits for its end", got)
	}
	p.ring.Destroy()
	w.open()
	if got := p.ring.Left(); got != len(everyKind) {
		t.Errorf("there are %d keys; want those of the authorities", got)
	}
}

// sign signs something with a key, and checks the signature.
func sign(signer crypto.Signer) error {
	hash := crypto.SHA256
	if k, ok := signer.Public().(*ecdsa.PublicKey); ok && k.Curve == elliptic.P384() {
		hash = crypto.SHA384
	}
	h := hash.New()
	h.Write([]byte("something"))
	digest := h.Sum(nil)
	signature, err := signer.Sign(rand.Reader, digest, hash)
	if err != nil {
		return err
	}
	switch public := signer.Public().(type) {
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(public, digest, signature) {
			return errors.New("the signature does not verify")
		}
		return nil
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(public, hash, digest, signature)
	}
	return fmt.Errorf("a key of type %T", signer.Public())
}
