package imagesig_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"
	protocommon "github.com/sigstore/protobuf-specs/gen/pb-go/common/v1"
	protodsse "github.com/sigstore/protobuf-specs/gen/pb-go/dsse"

	"github.com/hallmark-id/hallmark/attestors/imagesig"
	"github.com/hallmark-id/hallmark/test/harness"
)

const (
	issuer  = "https://token.actions.githubusercontent.com"
	release = "https://github.com/acme/shop/.github/workflows/release.yaml@refs/heads/main"
	payload = "dev.cosignproject.cosign/signature"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// world is a registry with an image of acme, and who may have signed it.
type world struct {
	*harness.Sigstore
	config imagesig.Config
	image  string
}

func newWorld(t testing.TB) *world {
	t.Helper()
	s := harness.NewSigstore(t)
	return &world{s, imagesig.Config{
		Images:          []string{s.Registry + "/acme/*"},
		Identities:      []imagesig.Identity{{Issuer: issuer, Subject: "https://github.com/acme/*"}},
		TrustedRootPath: s.TrustedRootPath,
	}, s.Image(t, "acme/web")}
}

func (w *world) digest() string {
	_, digest, _ := strings.Cut(w.image, "@")
	return digest
}

// ask asks a new verifier, which has heard of nothing yet.
func (w *world) ask(t testing.TB, images ...string) ([]string, error) {
	t.Helper()
	v, err := imagesig.New(w.config)
	must(t, err)
	if images == nil {
		images = []string{w.image}
	}
	for { // a busy machine may not have an answer within the time of an attestation
		values, err := v.Values(t.Context(), images)
		if err == nil || !strings.Contains(err.Error(), "it goes on") {
			return values, err
		}
	}
}

func (w *world) expect(t testing.TB, want ...string) {
	t.Helper()
	got, err := w.ask(t)
	must(t, err)
	var without []string // that differ each time
	for _, value := range got {
		switch kind, _, _ := strings.Cut(value, ":"); kind {
		case "image-signature-value", "image-signature-log-id", "image-signature-log-index", "image-signature-integrated-time", "image-signature-signed-entry-timestamp":
		default:
			without = append(without, value)
		}
	}
	if !slices.Equal(without, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestWhoSignedAnImageIsASelector(t *testing.T) {
	t.Parallel()
	signed := []string{"image-signature-issuer:" + issuer, "image-signature-subject:" + release, "image-signature:verified"}
	t.Run("as cosign has long done", func(t *testing.T) {
		w := newWorld(t)
		w.expect(t)
		w.PutLayers(t, w.image, w.Layer(t, harness.SigstorePayload(w.digest()), issuer, release))
		w.expect(t, signed...)
		got, err := w.ask(t)
		must(t, err)
		for _, kind := range []string{"value", "log-id", "log-index", "integrated-time", "signed-entry-timestamp"} {
			if !slices.ContainsFunc(got, func(v string) bool { return strings.HasPrefix(v, "image-signature-"+kind+":") }) {
				t.Errorf("%s is missing of %q", kind, got)
			}
		}
	})
	t.Run("as cosign does by now", func(t *testing.T) {
		w := newWorld(t)
		w.PutBundle(t, w.image, w.Bundle(t, harness.SigstoreStatement(w.image, harness.CosignPredicate), issuer, release))
		w.expect(t, signed...)
	})
	t.Run("of two, that of one whom it may be", func(t *testing.T) {
		w := newWorld(t)
		stranger := w.Layer(t, harness.SigstorePayload(w.digest()), issuer, "https://github.com/mallory/shop")
		w.PutLayers(t, w.image, stranger, w.Layer(t, harness.SigstorePayload(w.digest()), issuer, release))
		w.expect(t, signed...)
	})
	t.Run("what somebody attests of it", func(t *testing.T) {
		w := newWorld(t)
		w.PutBundle(t, w.image, w.Bundle(t, harness.SigstoreStatement(w.image, "https://slsa.dev/provenance/v1"), issuer, release))
		w.expect(t, "image-attestation-type:https://slsa.dev/provenance/v1", "image-attestations:verified")
	})
}

// key is a key that signs images without an authority.
type key struct {
	*ecdsa.PrivateKey
	path string // of the public one
}

func newKey(t testing.TB) key {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.MarshalPKIXPublicKey(k.Public())
	must(t, err)
	path := filepath.Join(t.TempDir(), "cosign.pub")
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600))
	return key{k, path}
}

func (k key) sign(t testing.TB, message []byte) []byte {
	t.Helper()
	sum := sha256.Sum256(message)
	signature, err := ecdsa.SignASN1(rand.Reader, k.PrivateKey, sum[:])
	must(t, err)
	return signature
}

func (k key) layer(t testing.TB, content []byte) harness.SigstoreLayer {
	t.Helper()
	return harness.SigstoreLayer{Content: content, Annotations: map[string]string{payload: base64.StdEncoding.EncodeToString(k.sign(t, content))}}
}

func (k key) bundle(t testing.TB, statement []byte) *protobundle.Bundle {
	t.Helper()
	const kind = "application/vnd.in-toto+json"
	// DSSE: the lengths and both texts, in one line.
	pae := "DSSEv1 28 " + kind + " " + itoa(len(statement)) + " " + string(statement)
	return &protobundle.Bundle{
		MediaType: harness.SigstoreBundle,
		Content: &protobundle.Bundle_DsseEnvelope{DsseEnvelope: &protodsse.Envelope{
			Payload: statement, PayloadType: kind, Signatures: []*protodsse.Signature{{Sig: k.sign(t, []byte(pae))}},
		}},
		VerificationMaterial: &protobundle.VerificationMaterial{
			Content: &protobundle.VerificationMaterial_PublicKey{PublicKey: &protocommon.PublicKeyIdentifier{Hint: "any"}},
		},
	}
}

func TestAKeySignsWithoutAnAuthority(t *testing.T) {
	t.Parallel()
	release, old := newKey(t), newKey(t)
	configure := func(w *world) {
		w.config.Identities, w.config.TrustedRootPath = nil, ""
		w.config.Keys = []imagesig.Key{{Name: "old", Path: old.path}, {Name: "release", Path: release.path}}
	}
	t.Run("as cosign has long done", func(t *testing.T) {
		w := newWorld(t)
		configure(w)
		w.PutLayers(t, w.image, release.layer(t, harness.SigstorePayload(w.digest())))
		w.expect(t, "image-signature-key:release", "image-signature:verified")
	})
	t.Run("as cosign does by now", func(t *testing.T) {
		w := newWorld(t)
		configure(w)
		w.PutBundle(t, w.image, release.bundle(t, harness.SigstoreStatement(w.image, harness.CosignPredicate)))
		w.expect(t, "image-signature-key:release", "image-signature:verified")
	})
	t.Run("until the file has another", func(t *testing.T) {
		w := newWorld(t)
		configure(w)
		w.PutLayers(t, w.image, release.layer(t, harness.SigstorePayload(w.digest())))
		v, err := imagesig.New(w.config)
		must(t, err)
		other, err := os.ReadFile(old.path)
		must(t, err)
		must(t, os.WriteFile(release.path, other, 0o600))
		if got, err := v.Values(t.Context(), []string{w.image}); err == nil || len(got) > 0 {
			t.Errorf("got %q, %v", got, err)
		}
	})
}
