package imagesig_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	protobundle "github.com/sigstore/protobuf-specs/gen/pb-go/bundle/v1"

	"github.com/hallmark-id/hallmark/attestors/imagesig"
	"github.com/hallmark-id/hallmark/test/harness"
)

func itoa(n int) string { return strconv.Itoa(n) }

// TestASignatureThatProvesNothingDoesNotCount puts beside an image what somebody
// can who may write to its repository.
func TestASignatureThatProvesNothingDoesNotCount(t *testing.T) {
	t.Parallel()
	mallory := newKey(t)
	layer := func(change func(w *world, l *harness.SigstoreLayer)) func(*testing.T, *world) {
		return func(t *testing.T, w *world) {
			l := w.Layer(t, harness.SigstorePayload(w.digest()), issuer, release)
			change(w, &l)
			w.PutLayers(t, w.image, l)
		}
	}
	bundle := func(change func(w *world, b *protobundle.Bundle)) func(*testing.T, *world) {
		return func(t *testing.T, w *world) {
			b := w.Bundle(t, harness.SigstoreStatement(w.image, harness.CosignPredicate), issuer, release)
			change(w, b)
			w.PutBundle(t, w.image, b)
		}
	}
	for name, c := range map[string]struct {
		put  func(*testing.T, *world)
		want string // of the error
	}{
		"by somebody else": {func(t *testing.T, w *world) {
			w.PutLayers(t, w.image, w.Layer(t, harness.SigstorePayload(w.digest()), issuer, "https://github.com/mallory/web"))
		}, "certificate identity"},
		"by a subject that begins otherwise": {func(t *testing.T, w *world) {
			w.PutLayers(t, w.image, w.Layer(t, harness.SigstorePayload(w.digest()), issuer, "https://evil.example/https://github.com/acme/x"))
		}, "certificate identity"},
		"of another issuer": {func(t *testing.T, w *world) {
			w.PutLayers(t, w.image, w.Layer(t, harness.SigstorePayload(w.digest()), "https://accounts.example", release))
		}, "certificate identity"},
		"of another image": {func(t *testing.T, w *world) {
			w.PutLayers(t, w.image, w.Layer(t, harness.SigstorePayload("sha256:"+strings.Repeat("ab", 32)), issuer, release))
		}, "another image"},
		"of something else": {func(t *testing.T, w *world) {
			text := strings.Replace(string(harness.SigstorePayload(w.digest())), "cosign container image signature", "a blob", 1)
			w.PutLayers(t, w.image, w.Layer(t, []byte(text), issuer, release))
		}, `is a "a blob"`},
		"of another authority": {func(t *testing.T, w *world) {
			other := harness.NewSigstore(t)
			w.PutLayers(t, w.image, other.Layer(t, harness.SigstorePayload(w.digest()), issuer, release))
		}, "log inclusion"},
		"over another text": {layer(func(w *world, l *harness.SigstoreLayer) { l.Content = append(l.Content, ' ') }), "no signature counts"},
		"no signature":      {layer(func(_ *world, l *harness.SigstoreLayer) { delete(l.Annotations, payload) }), "there is no signature"},
		"a signature that is none": {layer(func(_ *world, l *harness.SigstoreLayer) {
			l.Annotations[payload] = base64.StdEncoding.EncodeToString([]byte("x"))
		}), "no signature counts"},
		"without the log":       {layer(func(_ *world, l *harness.SigstoreLayer) { delete(l.Annotations, "dev.sigstore.cosign/bundle") }), "log"},
		"without a certificate": {layer(func(_ *world, l *harness.SigstoreLayer) { delete(l.Annotations, "dev.sigstore.cosign/certificate") }), "no keys are configured"},
		"a certificate that is none": {layer(func(_ *world, l *harness.SigstoreLayer) {
			l.Annotations["dev.sigstore.cosign/certificate"] = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
		}), "certificate cannot be read"},
		"a log's entry of another signature": {func(t *testing.T, w *world) {
			l := w.Layer(t, harness.SigstorePayload(w.digest()), issuer, release)
			other := w.Layer(t, harness.SigstorePayload(w.digest()), issuer, release)
			l.Annotations["dev.sigstore.cosign/bundle"] = other.Annotations["dev.sigstore.cosign/bundle"]
			w.PutLayers(t, w.image, l)
		}, "no signature counts"},
		"a log's entry that is none": {layer(func(_ *world, l *harness.SigstoreLayer) {
			l.Annotations["dev.sigstore.cosign/bundle"] = `{"Payload":{"body":"e30=","logID":"zz"}}`
		}), "log's ID"},
		"a log's time that was changed": {layer(func(_ *world, l *harness.SigstoreLayer) {
			l.Annotations["dev.sigstore.cosign/bundle"] = strings.Replace(l.Annotations["dev.sigstore.cosign/bundle"], `"integratedTime":1`, `"integratedTime":2`, 1)
		}), "log"},
		"by a stranger's key": {func(t *testing.T, w *world) {
			w.PutLayers(t, w.image, mallory.layer(t, harness.SigstorePayload(w.digest())))
		}, "no keys are configured"},
		"what is no text": {func(t *testing.T, w *world) {
			w.PutLayers(t, w.image, mallory.layer(t, []byte("\x00\x01")))
		}, "read what is signed"},
		"a bundle about another image": {func(t *testing.T, w *world) {
			w.PutBundle(t, w.image, w.Bundle(t, harness.SigstoreStatement(w.Image(t, "acme/other"), harness.CosignPredicate), issuer, release))
		}, "no signature counts"},
		"a bundle of somebody else": {func(t *testing.T, w *world) {
			w.PutBundle(t, w.image, w.Bundle(t, harness.SigstoreStatement(w.image, harness.CosignPredicate), issuer, "mallory@example.com"))
		}, "certificate identity"},
		"a bundle with another statement": {bundle(func(w *world, b *protobundle.Bundle) {
			b.GetDsseEnvelope().Payload = harness.SigstoreStatement(w.image, "https://slsa.dev/provenance/v1")
		}), "no signature counts"},
		"a bundle without the log": {bundle(func(_ *world, b *protobundle.Bundle) { b.VerificationMaterial.TlogEntries = nil }), "log"},
		"a bundle that is none":    {func(t *testing.T, w *world) { w.PutBundleText(t, w.image, []byte("{}")) }, "read the bundle"},
		"a huge bundle": {func(t *testing.T, w *world) {
			w.PutBundleText(t, w.image, []byte(`{"mediaType":"`+strings.Repeat("x", 2<<20)+`"}`))
		}, "too long"},
		"an authority without a log of its certificates, where there is one": {func(t *testing.T, w *world) {
			w.config.TrustedRootPath = w.CTLogsPath
			w.PutLayers(t, w.image, w.Layer(t, harness.SigstorePayload(w.digest()), issuer, release))
		}, "signed certificate timestamp"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			c.put(t, w)
			got, err := w.ask(t)
			if len(got) > 0 || err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %q, %v; the error is to say %q", got, err, c.want)
			}
		})
	}
}

// TestNothingIsAskedOfARegistryThatIsNotConfigured: whoever starts a container
// chooses its image.
func TestNothingIsAskedOfARegistryThatIsNotConfigured(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	defer server.Close()
	w := newWorld(t)
	elsewhere := strings.TrimPrefix(server.URL, "http://")
	_, digest, _ := strings.Cut(w.image, "@")
	got, err := w.ask(t, elsewhere+"/acme/web@"+digest, w.Registry+"/mallory/web@"+digest, "web@"+digest, w.Registry+"/acme/web", "", "@")
	if len(got) > 0 || err != nil || asked.Load() > 0 {
		t.Errorf("got %q, %v, and %d questions were asked", got, err, asked.Load())
	}
}

func TestARegistryThatFailsIsNamedAndAskedAgain(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]http.HandlerFunc{
		"an error":       func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) },
		"an endless one": func(w http.ResponseWriter, r *http.Request) { endless(r.Context(), w) },
		"no JSON":        func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(answer)
			defer server.Close()
			w := newWorld(t)
			registry := strings.TrimPrefix(server.URL, "http://")
			w.config.Images = []string{registry + "/acme/*"}
			image := registry + "/acme/web@" + w.digest()
			if got, err := w.ask(t, image); len(got) > 0 || err == nil || !strings.Contains(err.Error(), image) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func endless(ctx context.Context, w http.ResponseWriter) {
	for ctx.Err() == nil {
		if _, err := w.Write(make([]byte, 1<<16)); err != nil {
			return
		}
	}
}

func TestWhatIsKnownOfAnImageIsNotAskedAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.PutLayers(t, w.image, w.Layer(t, harness.SigstorePayload(w.digest()), issuer, release))
	v, err := imagesig.New(w.config)
	must(t, err)
	first, err := v.Values(t.Context(), []string{w.image})
	must(t, err)
	must(t, os.Remove(w.config.TrustedRootPath)) // it would fail
	again, err := v.Values(t.Context(), []string{w.image})
	must(t, err)
	if len(first) == 0 || strings.Join(first, " ") != strings.Join(again, " ") {
		t.Errorf("first %q, then %q", first, again)
	}
}

func TestAPasswordIsForItsRegistry(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var sent atomic.Value
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if user, password, ok := r.BasicAuth(); ok {
			sent.Store(user + ":" + password)
			rw.WriteHeader(http.StatusNotFound)
			return
		}
		rw.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		rw.WriteHeader(http.StatusUnauthorized)
	}))
	defer server.Close()
	registry := strings.TrimPrefix(server.URL, "http://")
	path := filepath.Join(t.TempDir(), "config.json")
	w.config.RegistryAuthPath = path
	w.config.Images = []string{registry + "/acme/*"}
	for text, want := range map[string]string{
		`{"auths":{"` + registry + `":{"auth":"` + base64.StdEncoding.EncodeToString([]byte("robot:secret")) + `"}}}`: "robot:secret",
		`{"auths":{"` + registry + `":{"username":"robot","password":"other"}}}`:                                      "robot:other",
		`{"auths":{"ghcr.io":{"username":"robot","password":"other"}}}`:                                               "",
	} {
		sent.Store("")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		_, err := w.ask(t, registry+"/acme/web@"+w.digest())
		if got := sent.Load(); got != want || (err == nil) != (want != "") {
			t.Errorf("with %s the registry got %q, %v", text, got, err)
		}
	}
	for _, bad := range []string{`{`, `{"auths":{"` + registry + `":{"auth":"!"}}}`} {
		must(t, os.WriteFile(path, []byte(bad), 0o600))
		if _, err := w.ask(t, registry+"/acme/web@"+w.digest()); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("with %s: %v", bad, err)
		}
	}
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	file := func(text string) string {
		path := filepath.Join(t.TempDir(), "file")
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	for want, change := range map[string]func(*imagesig.Config){
		"names no image":              func(c *imagesig.Config) { c.Images = nil },
		"neither identities nor keys": func(c *imagesig.Config) { c.Identities = nil },
		"trusted_root_path is missing": func(c *imagesig.Config) {
			c.TrustedRootPath = ""
		},
		`"nginx"; write`:          func(c *imagesig.Config) { c.Images = []string{"nginx"} },
		`"*/acme"; write`:         func(c *imagesig.Config) { c.Images = []string{"*/acme"} },
		`"*.example/acme"; write`: func(c *imagesig.Config) { c.Images = []string{"*.example/acme"} },
		`"a.b/c@sha256"; write`:   func(c *imagesig.Config) { c.Images = []string{"a.b/c@sha256"} },
		`subject ""`:              func(c *imagesig.Config) { c.Identities = []imagesig.Identity{{Issuer: issuer}} },
		`issuer "*"`:              func(c *imagesig.Config) { c.Identities = []imagesig.Identity{{Issuer: "*", Subject: "x"}} },
		"more than 100":           func(c *imagesig.Config) { c.Images = make([]string, 101) },
		"each name once": func(c *imagesig.Config) {
			c.Keys = []imagesig.Key{{Name: "a", Path: newKey(t).path}, {Name: "a", Path: newKey(t).path}}
		},
		"no such file":    func(c *imagesig.Config) { c.TrustedRootPath += ".not" },
		"no trusted root": func(c *imagesig.Config) { c.TrustedRootPath = file("{}") },
		"is empty":        func(c *imagesig.Config) { c.TrustedRootPath = file("") },
		"too long":        func(c *imagesig.Config) { c.TrustedRootPath = file(strings.Repeat(" ", 5<<20)) },
		"no public key":   func(c *imagesig.Config) { c.Keys = []imagesig.Key{{Name: "a", Path: file("x")}} },
	} {
		c := w.config
		change(&c)
		if _, err := imagesig.New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}
