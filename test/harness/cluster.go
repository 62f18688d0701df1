package harness

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/attestors/kube"
)

// Cluster is a real Kubernetes: an API server, and one node with a kubelet and
// containerd if that is started. It has no controllers and no scheduler, so pods
// name their node, and no network but the host's. It needs the binaries that
// "make kubernetes" builds.
type Cluster struct {
	*Authority
	Address string // of the API server
	Node    string // its name
	Kubelet string // its address

	bin, dir string
	admin    *kube.Client
	runtime  *Process // containerd, in the mount namespace of all of the node
}

const adminToken = "admin-token"

// ClusterIssuer is the issuer of its tokens.
const ClusterIssuer = "https://kubernetes.default.svc"

// StartCluster starts an API server, with more flags if there are any. It skips
// the test if HALLMARK_KUBERNETES does not name the directory of its binaries.
func StartCluster(t testing.TB, flags ...string) *Cluster {
	t.Helper()
	c := &Cluster{bin: os.Getenv("HALLMARK_KUBERNETES"), Node: "node-7"}
	if c.bin == "" {
		t.Skip("needs a real Kubernetes; run: make kubernetes")
	}
	NeedCommand(t, "etcd")
	c.dir, c.Authority = shortDir(t), NewAuthority(t)
	must(t, os.Chmod(c.dir, 0o755))
	c.Address, c.Kubelet = FreeAddress(t), FreeAddress(t)
	c.startAPIServer(t, flags)
	return c
}

// file writes a file of the cluster's.
func (c *Cluster) file(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(c.dir, name)
	must(t, os.WriteFile(path, []byte(text), 0o644))
	return path
}

// KubeconfigFor writes a kubeconfig with a token, and returns its path.
func (c *Cluster) KubeconfigFor(t testing.TB, user, token string) string {
	t.Helper()
	return c.KubeconfigOf(t, user, "{token: "+token+"}")
}

// KubeconfigOf writes a kubeconfig whose user is as the YAML says.
func (c *Cluster) KubeconfigOf(t testing.TB, name, user string) string {
	t.Helper()
	return c.file(t, name+".kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: test
contexts: [{name: test, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: 'https://%s', certificate-authority: %s}}]
users: [{name: u, user: %s}]
`, c.Address, c.Path, user))
}

func (c *Cluster) startAPIServer(t testing.TB, flags []string) {
	t.Helper()
	etcd, peer := FreeAddress(t), FreeAddress(t)
	store := Command{Path: "/usr/bin/etcd", Args: []string{"--data-dir", filepath.Join(c.dir, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", "http://" + etcd, "--advertise-client-urls", "http://" + etcd, "--listen-peer-urls", "http://" + peer}}.Start(t)
	t.Cleanup(func() { store.Stop(t) })

	cert, key := c.ServerFiles(t, "127.0.0.1")
	public, signing := c.ServerFiles(t, "signer")
	tokens := c.file(t, "tokens.csv", fmt.Sprintf("%s,admin,admin,system:masters\nkubelet-token,system:node:%s,node,system:nodes\n", adminToken, c.Node))
	_, port, err := net.SplitHostPort(c.Address)
	must(t, err)
	server := Command{Path: filepath.Join(c.bin, "kube-apiserver"), Args: append([]string{
		"--etcd-servers=http://" + etcd, "--bind-address=127.0.0.1", "--secure-port=" + port, "--endpoint-reconciler-type=none",
		"--tls-cert-file=" + cert, "--tls-private-key-file=" + key, "--token-auth-file=" + tokens, "--authorization-mode=Node,RBAC",
		"--service-account-issuer=" + ClusterIssuer, "--service-account-key-file=" + public, "--service-account-signing-key-file=" + signing,
		"--service-cluster-ip-range=10.0.0.0/24", "--cert-dir=" + c.dir,
	}, flags...)}.Start(t)
	t.Cleanup(func() { server.Stop(t) })
	kubeconfig, err := kube.Kubeconfig(c.KubeconfigFor(t, "admin", adminToken))
	must(t, err)
	c.admin = kube.New(kubeconfig)
	c.eventually(t, "the API server", server, func(ctx context.Context) error {
		_, err := c.ask(ctx, http.MethodGet, "/readyz", nil)
		return err
	})
}

func (c *Cluster) eventually(t testing.TB, what string, p *Process, try func(context.Context) error) {
	t.Helper()
	Eventually(t, what, func(ctx context.Context) error {
		select {
		case <-p.Done():
			t.Fatalf("%s ended:\n%s", what, tail(p.Stderr()))
		default:
		}
		return try(ctx)
	})
}

// kernelSettings are those that a kubelet sets.
var kernelSettings = []string{"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"}

// StartNode starts a node.
func (c *Cluster) StartNode(t testing.TB) {
	t.Helper()
	NeedRoot(t)
	for _, name := range []string{"containerd", "ctr", "runc", "unshare", "nsenter"} {
		NeedCommand(t, name)
	}
	for _, name := range kernelSettings {
		path := "/proc/sys/" + name
		before, err := os.ReadFile(path)
		must(t, err)
		t.Cleanup(func() { os.WriteFile(path, before, 0) })
	}
	socket := filepath.Join(c.dir, "containerd.sock")
	config := c.file(t, "containerd.toml", fmt.Sprintf(`version = 2
root = %q
state = %q
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "example.com/wait:1"
  restrict_oom_score_adj = true
`, filepath.Join(c.dir, "containerd"), filepath.Join(c.dir, "run"), socket))
	// What the node mounts goes away with it.
	c.runtime = Command{Path: "/usr/bin/unshare", Args: []string{"--mount", "--propagation", "slave", "containerd", "--config", config}}.Start(t)
	t.Cleanup(func() { c.runtime.Stop(t) })
	c.eventually(t, "containerd", c.runtime, func(context.Context) error {
		_, err := c.ctr("version")
		return err
	})

	cert, key := c.ServerFiles(t, c.Node)
	host, port, err := net.SplitHostPort(c.Kubelet)
	must(t, err)
	config = c.file(t, "kubelet.yaml", fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %s
port: %s
healthzPort: 0
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %s}}
authorization: {mode: Webhook}
tlsCertFile: %s
tlsPrivateKeyFile: %s
containerRuntimeEndpoint: unix://%s
podLogsDir: %s/logs
cgroupDriver: cgroupfs
failCgroupV1: false
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
localStorageCapacityIsolation: false
failSwapOn: false
registerNode: true
evictionHard: {memory.available: "1Mi"}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
resolvConf: ""
`, host, port, c.Path, cert, key, socket, c.dir))
	kubelet := Command{Path: "/usr/bin/nsenter", Args: []string{fmt.Sprintf("--mount=/proc/%d/ns/mnt", c.runtime.PID()), filepath.Join(c.bin, "kubelet"),
		"--config=" + config, "--kubeconfig=" + c.KubeconfigFor(t, "kubelet", "kubelet-token"), "--hostname-override=" + c.Node,
		"--root-dir=" + filepath.Join(c.dir, "kubelet"), "--cert-dir=" + c.dir}}.Start(t)
	t.Cleanup(func() {
		c.removeContainers(t)
		kubelet.Stop(t)
		c.removeContainers(t)
		removeGroups("kubepods")
	})
	c.eventually(t, "the kubelet", kubelet, func(ctx context.Context) error {
		_, err := c.ask(ctx, http.MethodGet, "/api/v1/nodes/"+c.Node, nil)
		return err
	})
}

// ctr runs a command of containerd's client.
func (c *Cluster) ctr(args ...string) (string, error) {
	out, err := exec.Command("ctr", append([]string{"--address", filepath.Join(c.dir, "containerd.sock"), "--namespace", "k8s.io"}, args...)...).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("ctr %s: %w\n%s", strings.Join(args, " "), err, exit.Stderr)
	}
	return string(out), err
}

// removeContainers kills what still runs of the pods, which outlives containerd.
func (c *Cluster) removeContainers(t testing.TB) {
	out, err := c.ctr("tasks", "ls", "-q")
	if err != nil {
		t.Logf("list tasks: %v", err)
	}
	for _, id := range strings.Fields(out) {
		if _, err := c.ctr("tasks", "rm", "--force", id); err != nil {
			t.Logf("remove a task: %v", err)
		}
	}
}

// removeGroups removes control groups of a name, in each hierarchy, where they
// are empty.
func removeGroups(name string) {
	tops, _ := filepath.Glob("/sys/fs/cgroup/*/" + name)
	for _, top := range append(tops, "/sys/fs/cgroup/"+name) {
		var dirs []string
		filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		for i := len(dirs) - 1; i >= 0; i-- {
			os.Remove(dirs[i])
		}
	}
}

// Import makes an image of one static program, which its containers run.
func (c *Cluster) Import(t testing.TB, image, program string) {
	t.Helper()
	b, err := os.ReadFile(program)
	must(t, err)
	layer := tarOf(t, map[string][]byte{"app": b})
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux", "config": map[string]any{"Entrypoint": []string{"/app"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	})
	must(t, err)
	manifest, err := json.Marshal([]any{map[string]any{"Config": "config.json", "RepoTags": []string{image}, "Layers": []string{"layer.tar"}}})
	must(t, err)
	file := c.file(t, "image.tar", string(tarOf(t, map[string][]byte{"config.json": config, "layer.tar": layer, "manifest.json": manifest})))
	_, err = c.ctr("images", "import", file)
	must(t, err)
}

func tarOf(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for name, data := range files {
		must(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data))}))
		_, err := w.Write(data)
		must(t, err)
	}
	must(t, w.Close())
	return out.Bytes()
}

func (c *Cluster) ask(ctx context.Context, method, path string, body any) (answer []byte, err error) {
	var data []byte
	if body != nil {
		if data, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	err = c.admin.Do(ctx, method, path, data, 64<<20, func(r io.Reader) error {
		answer, err = io.ReadAll(r)
		return err
	})
	return answer, err
}

// Kubectl is kubectl with a kubeconfig.
func (c *Cluster) Kubectl(kubeconfig string, args ...string) Command {
	return Command{Path: filepath.Join(c.bin, "kubectl"), Args: append([]string{"--kubeconfig", kubeconfig}, args...)}
}

// Do asks the API server, as an administrator.
func (c *Cluster) Do(t testing.TB, method, path string, body any) []byte {
	t.Helper()
	answer, err := c.ask(t.Context(), method, path, body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer
}

// Account makes a service account, and its namespace, and gives it rights: the
// rules of a role.
func (c *Cluster) Account(t testing.TB, namespace, name string, rules ...map[string]any) {
	t.Helper()
	object := func(kind, name string) map[string]any {
		return map[string]any{"kind": kind, "metadata": map[string]any{"name": name}}
	}
	if _, err := c.ask(t.Context(), http.MethodGet, "/api/v1/namespaces/"+namespace, nil); err != nil {
		c.Do(t, http.MethodPost, "/api/v1/namespaces", object("Namespace", namespace))
		// A controller would: every pod mounts it.
		authorities := object("ConfigMap", "kube-root-ca.crt")
		ca, err := os.ReadFile(c.Path)
		must(t, err)
		authorities["data"] = map[string]any{"ca.crt": string(ca)}
		c.Do(t, http.MethodPost, "/api/v1/namespaces/"+namespace+"/configmaps", authorities)
	}
	c.Do(t, http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts", object("ServiceAccount", name))
	if len(rules) == 0 {
		return
	}
	const rbac = "/apis/rbac.authorization.k8s.io/v1/"
	role := object("ClusterRole", name)
	role["apiVersion"], role["rules"] = "rbac.authorization.k8s.io/v1", rules
	c.Do(t, http.MethodPost, rbac+"clusterroles", role)
	binding := object("ClusterRoleBinding", name)
	binding["apiVersion"] = "rbac.authorization.k8s.io/v1"
	binding["roleRef"] = map[string]any{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name}
	binding["subjects"] = []any{map[string]any{"kind": "ServiceAccount", "namespace": namespace, "name": name}}
	c.Do(t, http.MethodPost, rbac+"clusterrolebindings", binding)
}

// Token has the API server make a token of a service account, for its own use if
// the specification of the request is nil.
func (c *Cluster) Token(t testing.TB, namespace, name string, spec map[string]any) string {
	t.Helper()
	if spec == nil {
		spec = map[string]any{"expirationSeconds": 3600}
	}
	var request struct{ Status struct{ Token string } }
	must(t, json.Unmarshal(c.Do(t, http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+name+"/token",
		map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}), &request))
	return request.Status.Token
}

// RunPod makes a pod on the node and waits until it is in a phase. It returns
// its UID.
func (c *Cluster) RunPod(t testing.TB, namespace, name, phase string, spec map[string]any) (uid string) {
	t.Helper()
	spec["nodeName"], spec["hostNetwork"], spec["restartPolicy"] = c.Node, true, "Never"
	spec["terminationGracePeriodSeconds"] = 0
	spec["tolerations"] = []any{map[string]any{"operator": "Exists"}}
	path := "/api/v1/namespaces/" + namespace + "/pods"
	c.Do(t, http.MethodPost, path, map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "labels": map[string]any{"app": name}}, "spec": spec})
	Eventually(t, "the pod "+name, func(ctx context.Context) error {
		answer, err := c.ask(ctx, http.MethodGet, path+"/"+name, nil)
		if err != nil {
			return err
		}
		var pod struct {
			Metadata struct{ UID string }
			Status   struct{ Phase string }
		}
		if err := json.Unmarshal(answer, &pod); err != nil {
			return err
		}
		if uid = pod.Metadata.UID; pod.Status.Phase != phase {
			return fmt.Errorf("it is %s", answer)
		}
		return nil
	})
	return uid
}

// Log returns what a container of a pod printed.
func (c *Cluster) Log(t testing.TB, namespace, pod, uid, container string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(c.dir, "logs", namespace+"_"+pod+"_"+uid, container, "0.log"))
	must(t, err)
	return string(b)
}

// Volume returns a file of a pod's projected volume, as the pod sees it.
func (c *Cluster) Volume(t testing.TB, uid, volume, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(fmt.Sprintf("/proc/%d/root", c.runtime.PID()), c.dir, "kubelet/pods", uid, "volumes/kubernetes.io~projected", volume, file))
	must(t, err)
	return b
}
