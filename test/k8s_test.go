package test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// A pod has an identity by what the node's kubelet says of it: here one of the
// test's own, and processes in the groups that a kubelet would make.
func TestPodsGetTheirIdentities(t *testing.T) {
	t.Parallel()
	const node, root = "node-7", "/hallmark-test-pods"
	k := harness.NewKubelet(t, node)
	d := harness.NewDomain(t, harness.Settings{Agent: fmt.Sprintf(
		"workload_attestors: {k8s: {node_name: %s, kubelet: '%s', kubelet_ca_path: %s, token_path: %s, cgroup_root: %s}}\n",
		node, k.Address, k.Path, k.TokenPath, root)})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Register(t, "--spiffe-id", "/web", "--parent-id", "/node", "--selector", "k8s:ns:shop", "--selector", "k8s:sa:sa-web")
	d.Register(t, "--spiffe-id", "/db", "--parent-id", "/node", "--selector", "k8s:ns:shop", "--selector", "k8s:pod-label:app:db")

	var pods []string
	groups := make(map[string]string)
	for i, app := range []string{"web", "db", "stranger"} {
		pod := harness.Pod{
			Namespace: "shop", Name: app, UID: fmt.Sprintf("2c48913c-b29f-11e7-9350-%012d", i), Node: node,
			Labels: map[string]string{"app": app}, Containers: []harness.PodContainer{{Name: "main", ID: fmt.Sprintf("%064x", i+1)}},
		}
		pods = append(pods, pod.JSON())
		groups[app] = harness.Group(t, root+"/kubepods/besteffort/pod"+pod.UID+"/"+pod.Containers[0].ID)
	}
	k.SetPods(harness.PodList(pods...))

	// A shell moves itself into the group and becomes the workload.
	fetch := func(app string) (string, string, int) {
		return harness.Command{Path: "/bin/sh", Args: []string{"-c", `echo $$ > "$1" && exec "$2" fetch x509 --socket "$3"`,
			"sh", filepath.Join(groups[app], "cgroup.procs"), harness.Binary(t), d.Socket}}.Try(t)
	}
	for _, app := range []string{"web", "db"} {
		if out, stderr, code := fetch(app); code != 0 || !strings.HasPrefix(out, "spiffe://example.org/"+app+"\n") || strings.Count(out, "spiffe://") != 1 {
			t.Errorf("%s got exit status %d\n%s%s", app, code, out, stderr)
		}
	}
	if out, stderr, code := fetch("stranger"); code == 0 || !strings.Contains(stderr, "no identity") {
		t.Errorf("a pod that no entry is for got exit status %d\n%s%s", code, out, stderr)
	}
}
