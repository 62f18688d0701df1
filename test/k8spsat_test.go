package test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestANodeOfAClusterNeedsNoSecret attests an agent by the token of its pod,
// which an API server of the test's own signs and reviews, gives its processes
// an identity by what that says of the node, and has it attest again by the
// token that has taken the first one's place.
func TestANodeOfAClusterNeedsNoSecret(t *testing.T) {
	t.Parallel()
	s := harness.NewAPIServer(t)
	dir, err := os.MkdirTemp("", "hallmark-k8s-psat-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// As the kubelet does, this replaces the file as a whole.
	mount := func(pod, zone string) {
		t.Helper()
		s.SetPod(harness.Pod{Namespace: "hallmark", Name: pod, UID: pod + "-uid", Node: "node-7", Account: "agent"})
		s.SetNode("node-7", "node-uid", map[string]string{"zone": zone})
		signed := s.Mint(t, harness.ServiceToken{
			Namespace: "hallmark", Account: "agent", Pod: pod, PodUID: pod + "-uid", Node: "node-7", NodeUID: "node-uid",
			Audience: []string{"hallmark-server"}, Expires: time.Now().Add(10 * time.Minute),
		})
		file := filepath.Join(dir, "token")
		if err := errors.Join(os.WriteFile(file+".new", []byte(signed), 0o644), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	mount("agent-1", "eu-1a")

	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("x509: {agent_lifetime: 4s}\nnode_attestors: {k8s_psat: {clusters: [{name: production, service_account_allow_list: ['hallmark:agent'], "+
			"kubeconfig_path: %s, allowed_node_label_keys: [zone]}]}}\n", s.Kubeconfig),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {k8s_psat: {cluster: production, token_path: %s/token}}\n", dir, dir),
	})
	d.StartServer(t)
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")

	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server", "--selector", "k8s_psat:agent_node_label:zone:eu-1a")
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
		t.Errorf("fetch x509 printed:\n%s", out)
	}

	mount("agent-2", "eu-1b")
	const agent = "spiffe://example.org/spire/agent/k8s_psat/production/node-uid"
	harness.Eventually(t, "the second pod's selectors", func(context.Context) error {
		shown := d.Admin(t, "node", "show", agent, "-o", "json")
		for _, want := range []string{`"k8s_psat:agent_pod_uid:agent-2-uid"`, `"k8s_psat:agent_node_label:zone:eu-1b"`} {
			if !strings.Contains(shown, want) {
				return fmt.Errorf("no %s in\n%s", want, shown)
			}
		}
		return nil
	})
	// The node is no longer in the zone.
	harness.Eventually(t, "the loss of the identity", func(context.Context) error {
		if out, _, code := fetch.Try(t); code == 0 {
			return fmt.Errorf("fetch x509 printed:\n%s", out)
		}
		return nil
	})
}
