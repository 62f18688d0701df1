package test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/k8spsat"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestARealClustersNodeAndPodsHaveIdentities runs a server outside of a real
// cluster and an agent on its node. The agent attests by the token that the
// kubelet gave to a pod, with no more rights than the documentation says; the
// cluster's pods get their identities from it.
func TestARealClustersNodeAndPodsHaveIdentities(t *testing.T) {
	c := harness.StartCluster(t)
	c.StartNode(t)
	serverAccount(t, c)
	c.Account(t, "hallmark", "agent", rule("", "nodes/pods", "get"))
	c.Account(t, "shop", "web")
	c.Account(t, "shop", "stranger")
	c.Import(t, "example.com/wait:1", waitProgram(t))
	c.Import(t, "example.com/hallmark:1", harness.Binary(t))

	agent := c.RunPod(t, "hallmark", "agent", "Running", map[string]any{
		"serviceAccountName": "agent",
		"containers": []any{map[string]any{"name": "agent", "image": "example.com/wait:1", "imagePullPolicy": "Never",
			"volumeMounts": []any{map[string]any{"name": "token", "mountPath": "/var/run/secrets/tokens"}}}},
		"volumes": []any{map[string]any{"name": "token", "projected": map[string]any{"sources": []any{
			map[string]any{"serviceAccountToken": map[string]any{"path": "hallmark", "audience": "hallmark-server", "expirationSeconds": 600}}}}}},
	})
	token := c.Volume(t, agent, "token", "hallmark")

	dir, err := os.MkdirTemp("", "hallmark-kubernetes-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for name, data := range map[string][]byte{"token": token, "kubelet": []byte(c.Token(t, "hallmark", "agent", nil))} {
		if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(filepath.Join(dir, name), data, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	d := harness.NewDomain(t, harness.Settings{
		Server: fmt.Sprintf("node_attestors: {k8s_psat: {clusters: [{name: production, service_account_allow_list: ['hallmark:agent'], "+
			"kubeconfig_path: %s, allowed_node_label_keys: [kubernetes.io/hostname], allowed_pod_label_keys: [app]}]}}\n",
			c.KubeconfigFor(t, "server", c.Token(t, "hallmark", "server", nil))),
		Agent: fmt.Sprintf("trust_bundle: %s/bundle.pem\nnode_attestor: {k8s_psat: {cluster: production, token_path: %s/token}}\n"+
			"workload_attestors: {k8s: {node_name: %s, kubelet: '%s', kubelet_ca_path: %s, token_path: %s/kubelet}}\n", dir, dir, c.Node, c.Kubelet, c.Path, dir),
	})
	d.StartServer(t)
	if err := os.WriteFile(filepath.Join(dir, "bundle.pem"), []byte(d.Admin(t, "bundle", "show", "-o", "pem")), 0o644); err != nil {
		t.Fatal(err)
	}
	d.StartAgent(t, "")
	shown := d.Admin(t, "node", "list", "-o", "json")
	for _, want := range []string{
		"/spire/agent/k8s_psat/production/", `"k8s_psat:agent_node_label:kubernetes.io/hostname:` + c.Node + `"`,
		`"k8s_psat:agent_pod_label:app:agent"`, `"k8s_psat:agent_pod_uid:` + agent + `"`, `"k8s_psat:agent_sa:agent"`, `"k8s_psat:agent_node_ip:`,
	} {
		if !strings.Contains(shown, want) {
			t.Errorf("no %s in\n%s", want, shown)
		}
	}

	d.Admin(t, "entry", "create", "--spiffe-id", "/node", "--parent-id", "/spire/server", "--selector", "k8s_psat:cluster:production")
	d.Admin(t, "entry", "create", "--spiffe-id", "/web", "--parent-id", "/node", "--selector", "k8s:ns:shop", "--selector", "k8s:sa:web",
		"--selector", "k8s:pod-label:app:web", "--selector", "k8s:container-name:main", "--selector", "k8s:node-name:"+c.Node)
	d.Admin(t, "entry", "create", "--spiffe-id", "/setup", "--parent-id", "/node", "--selector", "k8s:sa:web", "--selector", "k8s:container-name:setup")
	container := func(name string) any {
		return map[string]any{"name": name, "image": "example.com/hallmark:1", "imagePullPolicy": "Never",
			"args":         []string{"fetch", "x509", "--socket", "/run/hallmark/workload.sock"},
			"volumeMounts": []any{map[string]any{"name": "socket", "mountPath": "/run/hallmark"}}}
	}
	run := func(account, phase string, init ...any) (uid string) {
		return c.RunPod(t, "shop", account, phase, map[string]any{
			"serviceAccountName": account, "automountServiceAccountToken": false,
			"initContainers": init, "containers": []any{container("main")},
			"volumes": []any{map[string]any{"name": "socket", "hostPath": map[string]any{"path": filepath.Dir(d.Socket)}}},
		})
	}
	web := run("web", "Succeeded", container("setup"))
	for container, id := range map[string]string{"setup": "spiffe://example.org/setup", "main": "spiffe://example.org/web"} {
		log := c.Log(t, "shop", "web", web, container)
		if !strings.Contains(log, id+"\n") || strings.Count(log, "spiffe://") != 1 {
			t.Errorf("the container %s printed\n%s", container, log)
		}
	}
	if log := c.Log(t, "shop", "stranger", run("stranger", "Failed"), "main"); !strings.Contains(log, "no identity") {
		t.Errorf("a pod that no entry is for printed\n%s", log)
	}
}

// TestARealAPIServerVouchesForItsNodes has a real API server review tokens that
// it made itself, with no more rights than the documentation says, and verifies
// them by its keys. Nothing runs in the cluster: its pod is only written down.
func TestARealAPIServerVouchesForItsNodes(t *testing.T) {
	c := harness.StartCluster(t)
	serverAccount(t, c)
	c.Account(t, "hallmark", "agent")
	c.Account(t, "shop", "web")
	const pods = "/api/v1/namespaces/hallmark/pods"
	meta := func(kind, name string, spec map[string]any) map[string]any {
		return map[string]any{"apiVersion": "v1", "kind": kind, "metadata": map[string]any{"name": name}, "spec": spec}
	}
	var created struct{ Metadata struct{ UID string } }
	uidOf := func(answer []byte) string {
		if err := json.Unmarshal(answer, &created); err != nil {
			t.Fatal(err)
		}
		return created.Metadata.UID
	}
	node := uidOf(c.Do(t, http.MethodPost, "/api/v1/nodes", meta("Node", c.Node, nil)))
	pod := uidOf(c.Do(t, http.MethodPost, pods, meta("Pod", "agent", map[string]any{"serviceAccountName": "agent", "nodeName": c.Node,
		"terminationGracePeriodSeconds": 0, "containers": []any{map[string]any{"name": "agent", "image": "example.com/hallmark:1"}}})))

	jwks := filepath.Join(t.TempDir(), "jwks.json")
	if err := os.WriteFile(jwks, c.Do(t, http.MethodGet, "/openid/v1/jwks", nil), 0o600); err != nil {
		t.Fatal(err)
	}
	verify := make(map[string]func(token string) (*attestors.Evidence, error))
	for way, config := range map[string]k8spsat.ClusterConfig{
		"by review": {KubeconfigPath: c.KubeconfigFor(t, "server", c.Token(t, "hallmark", "server", nil))},
		"by keys":   {JWKSPath: jwks, Issuer: harness.ClusterIssuer},
	} {
		config.Name, config.ServiceAccountAllowList = "production", []string{"hallmark:agent"}
		s, err := k8spsat.New(k8spsat.ServerConfig{Clusters: []k8spsat.ClusterConfig{config}}, k8spsat.Options{})
		if err != nil {
			t.Fatal(err)
		}
		verify[way] = func(token string) (*attestors.Evidence, error) {
			b, err := json.Marshal(map[string]string{"cluster": "production", "token": token})
			if err != nil {
				t.Fatal(err)
			}
			return s.Verify(t.Context(), b, nil)
		}
	}
	bound := map[string]any{"apiVersion": "v1", "kind": "Pod", "name": "agent", "uid": pod}
	token := func(account, audience string, bound any) string {
		namespace := map[string]string{"agent": "hallmark", "web": "shop"}[account]
		return c.Token(t, namespace, account, map[string]any{"audiences": []string{audience}, "expirationSeconds": 600, "boundObjectRef": bound})
	}
	good := token("agent", "hallmark-server", bound)
	for way, verify := range verify {
		e, err := verify(good)
		if err != nil || e.Path != "k8s_psat/production/"+node || !slices.Contains(selector.NewSet(e.Selectors...).Strings(), "k8s_psat:agent_pod_uid:"+pod) {
			t.Errorf("%s: got %+v, %v", way, e, err)
		}
		for name, token := range map[string]string{
			"for the API server":  token("agent", harness.ClusterIssuer, bound),
			"bound to no pod":     token("agent", "hallmark-server", nil),
			"of another account":  token("web", "hallmark-server", nil),
			"of an administrator": "admin-token",
			"with another end":    good[:len(good)-4] + "AAAA",
		} {
			if e, err := verify(token); err == nil || errors.Is(err, attestors.ErrUnavailable) {
				t.Errorf("%s: a token %s: got %+v, %v", way, name, e, err)
			}
		}
	}
	c.Do(t, http.MethodDelete, pods+"/agent", nil)
	if e, err := verify["by review"](good); err == nil || errors.Is(err, attestors.ErrUnavailable) {
		t.Errorf("a token whose pod is gone: got %+v, %v", e, err)
	}
	if _, err := verify["by keys"](good); err != nil { // as the documentation says
		t.Errorf("the same by keys: %v", err)
	}
}

func rule(group, resource, verb string) map[string]any {
	return map[string]any{"apiGroups": []string{group}, "resources": []string{resource}, "verbs": []string{verb}}
}

// serverAccount makes the service account of a server that has tokens reviewed.
func serverAccount(t *testing.T, c *harness.Cluster) {
	t.Helper()
	c.Account(t, "hallmark", "server", rule("authentication.k8s.io", "tokenreviews", "create"), rule("", "pods", "get"), rule("", "nodes", "get"))
}

// waitProgram builds a program that waits, and needs nothing else in its
// container.
func waitProgram(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wait")
	cmd := exec.Command("go", "build", "-o", path, "../attestors/docker/testdata/wait/main.go")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}
