package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// letUse lets any user use an engine's socket, as a group would be.
func letUse(t *testing.T, engine *harness.Containers) {
	t.Helper()
	for path, mode := range map[string]os.FileMode{filepath.Dir(engine.Socket): 0o755, engine.Socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
}

// A container has no identity of its own making: the agent outside asks the
// engine what runs in it.
func TestContainersGetTheirIdentities(t *testing.T) {
	for name, start := range map[string]func(testing.TB) *harness.Containers{"docker": harness.Docker, "podman": harness.Podman} {
		t.Run(name, func(t *testing.T) {
			engine := start(t)
			letUse(t, engine)
			d := harness.NewDomain(t, harness.Settings{
				Agent: fmt.Sprintf("workload_attestors:\n  unix: {}\n  %s:\n    socket: %s\n", name, engine.Socket),
			})
			d.StartServer(t)
			d.StartAgent(t, d.Join(t))
			for _, app := range []string{"web", "db"} {
				d.Admin(t, "entry", "create", "--spiffe-id", "/"+app, "--parent-id", "/node", "--selector", name+":label:app:"+app)
			}

			engine.Import(t, "example.com/hallmark:1", harness.Binary(t))
			fetch := func(app string) (string, error) {
				return engine.Client("run", "--rm", "--network", "none", "--label", "app="+app, "-v", filepath.Dir(d.Socket)+":/run/hallmark",
					"example.com/hallmark:1", "fetch", "x509", "--socket", "/run/hallmark/workload.sock")
			}
			for _, app := range []string{"web", "db"} {
				if out, err := fetch(app); err != nil || !strings.HasPrefix(out, "spiffe://example.org/"+app+"\n") || strings.Count(out, "spiffe://") != 1 {
					t.Errorf("%s got %v\n%s", app, err, out)
				}
			}
			if out, err := fetch("stranger"); err == nil || !strings.Contains(err.Error(), "no identity") {
				t.Errorf("a container that no entry is for got %v\n%s", err, out)
			}
		})
	}
}

// What is signed is the image in its registry, whatever the container is called
// here.
func TestASignedImageIsAnIdentity(t *testing.T) {
	const (
		issuer  = "https://token.actions.githubusercontent.com"
		release = "https://github.com/acme/shop/.github/workflows/release.yaml@refs/heads/main"
	)
	engine, sigstore := harness.Podman(t), harness.NewSigstore(t)
	letUse(t, engine)
	d := harness.NewDomain(t, harness.Settings{Agent: fmt.Sprintf(`workload_attestors:
  podman:
    socket: %s
    image_signatures:
      images: [%s/acme/*]
      identities: [{issuer: %q, subject: "https://github.com/acme/*"}]
      trusted_root_path: %s
`, engine.Socket, sigstore.Registry, issuer, sigstore.TrustedRootPath)})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Admin(t, "entry", "create", "--spiffe-id", "/released", "--parent-id", "/node", "--selector", "podman:image-signature-subject:"+release)

	fetch := func(image string) (string, error) {
		if _, err := engine.Client("pull", "--tls-verify=false", image); err != nil {
			t.Fatal(err)
		}
		return engine.Client("run", "--rm", "--network", "none", "-v", filepath.Dir(d.Socket)+":/run/hallmark", image, "fetch", "x509", "--socket", "/run/hallmark/workload.sock")
	}
	image := sigstore.Program(t, "acme/web", harness.Binary(t))
	_, digest, _ := strings.Cut(image, "@")
	sigstore.PutLayers(t, image, sigstore.Layer(t, harness.SigstorePayload(digest), issuer, release))
	if out, err := fetch(image); err != nil || !strings.HasPrefix(out, "spiffe://example.org/released\n") {
		t.Errorf("a signed image got %v\n%s", err, out)
	}
	if out, err := fetch(sigstore.Program(t, "mallory/web", harness.Binary(t))); err == nil || !strings.Contains(err.Error(), "no identity") {
		t.Errorf("an image that nobody signed got %v\n%s", err, out)
	}
}
