package test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// A container has no identity of its own making: the agent outside asks the
// engine what runs in it.
func TestContainersGetTheirIdentities(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(testing.TB) *harness.Containers{"docker": harness.Docker, "podman": harness.Podman} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			engine := start(t)
			for path, mode := range map[string]os.FileMode{filepath.Dir(engine.Socket): 0o755, engine.Socket: 0o666} {
				if err := os.Chmod(path, mode); err != nil { // as a group would be given it
					t.Fatal(err)
				}
			}
			d := harness.NewDomain(t, harness.Settings{
				Agent: fmt.Sprintf("workload_attestors:\n  unix: {}\n  %s:\n    socket: %s\n", name, engine.Socket),
			})
			d.StartServer(t)
			d.StartAgent(t, d.Join(t))
			for _, app := range []string{"web", "db"} {
				d.Register(t, "--spiffe-id", "/"+app, "--parent-id", "/node", "--selector", name+":label:app:"+app)
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
