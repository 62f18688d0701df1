package k8s_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/imagesig"
	"github.com/hallmark-id/hallmark/attestors/k8s"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

// What the tests' own kubelet lists, of whose groups only the tests know.
const (
	node  = "node-7"
	uid   = "2c48913c-b29f-11e7-9350-020968147796"
	other = "9ff1a7e2-5d2c-4c0f-8f0b-6f1b6f6f2b11"
	id    = "5f8dee3eb0440d25619edfcc5d10679627ec854a7373add3fc994681024093cd"
	id2   = "0b1c1b0ac95e0cb4a3b8f5e4d3c2b1a09f8e7d6c5b4a39281706f5e4d3c2b1a0"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// web is a pod with one container.
func web() harness.Pod {
	return harness.Pod{
		Namespace: "shop", Name: "web", UID: uid, Node: node,
		Labels:     map[string]string{"app": "web", "example.com/tier": "", "version": "1.4"},
		Containers: []harness.PodContainer{{Name: "web", ID: id}},
	}
}

// root is where the kubelet of a test makes groups: tests run side by side.
func root(t testing.TB) string {
	test, _, _ := strings.Cut(t.Name(), "/")
	return "/hallmark-" + test
}

// process starts a process in the group of a pod's container.
func process(t testing.TB, uid, id string) attestors.Process {
	t.Helper()
	return in(t, root(t)+"/kubepods/burstable/pod"+uid+"/"+id)
}

func in(t testing.TB, path string) attestors.Process {
	t.Helper()
	return attestors.Process{PID: int32(harness.InGroup(t, path).Process.Pid)}
}

// asking makes an attestor that asks a kubelet, with settings changed as a test
// wants them.
func asking(t testing.TB, k *harness.Kubelet, change func(*k8s.Config)) *k8s.Attestor {
	t.Helper()
	c := k8s.Config{NodeName: node, Kubelet: k.Address, KubeletCAPath: k.Path, TokenPath: k.TokenPath, CgroupRoot: root(t)}
	if change != nil {
		change(&c)
	}
	a, err := k8s.New(c)
	must(t, err)
	return a
}

// attest returns the selectors of a process, as text without their type.
func attest(t testing.TB, a *k8s.Attestor, p attestors.Process) []string {
	t.Helper()
	got, err := a.Attest(t.Context(), p)
	must(t, err)
	var out []string
	for _, s := range selector.NewSet(got...) {
		if s.Type != k8s.Name {
			t.Errorf("%v is not of the attestor's type", s)
		}
		out = append(out, s.Value)
	}
	return out
}

func TestAProcessIsWhatItsPodAndContainerAre(t *testing.T) {
	k := harness.NewKubelet(t, node)
	pod := web()
	pod.Init = []harness.PodContainer{{Name: "setup", ID: id2, Ended: true}}
	k.SetPods(harness.PodList(harness.Pod{Namespace: "a", Name: "b", UID: other, Node: node}.JSON(), pod.JSON()))
	got := attest(t, asking(t, k, nil), process(t, uid, id))

	const digest = "sha256:9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c9c"
	want := []string{
		"container-image-digest:" + digest,
		"container-image:example.com/web:1.4",
		"container-image:example.com/web@" + digest,
		"container-name:web",
		"node-name:node-7",
		"ns:shop",
		"pod-image-count:1",
		"pod-image:example.com/web:1.4",
		"pod-image:example.com/web@" + digest,
		"pod-init-image-count:1",
		"pod-init-image:example.com/setup:1.4",
		"pod-init-image:example.com/setup@" + digest,
		"pod-label:app:web",
		"pod-label:example.com/tier:",
		"pod-label:version:1.4",
		"pod-name:web",
		"pod-owner-uid:ReplicaSet:owner-of-" + uid,
		"pod-owner:ReplicaSet:web-rs",
		"pod-uid:" + uid,
		"sa:sa-web",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestAProcessIsFoundInTheGroupsOfEveryRuntimeAndDriver(t *testing.T) {
	under := strings.ReplaceAll(uid, "-", "_")
	k := harness.NewKubelet(t, node)
	k.SetPods(harness.PodList(web().JSON()))
	a := asking(t, k, nil)
	for name, path := range map[string]string{
		"cgroupfs, guaranteed":              "/kubepods/pod" + uid + "/" + id,
		"cgroupfs, burstable":               "/kubepods/burstable/pod" + uid + "/" + id,
		"cgroupfs, best effort":             "/kubepods/besteffort/pod" + uid + "/" + id,
		"cgroupfs, a group of its own":      "/kubepods/besteffort/pod" + uid + "/" + id + "/own",
		"cgroupfs, CRI-O":                   "/kubepods/besteffort/pod" + uid + "/crio-" + id,
		"systemd, guaranteed, containerd":   "/kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope",
		"systemd, burstable, CRI-O":         "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/crio-" + id + ".scope/container",
		"systemd, best effort, docker":      "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + under + ".slice/docker-" + id + ".scope",
		"systemd, in a node of kind":        "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + under + ".slice/cri-containerd-" + id + ".scope",
		"cgroupfs, in a node of kind":       "/kubelet/kubepods/besteffort/pod" + uid + "/" + id,
		"drivers that differ":               "/kubepods-besteffort-pod" + under + ".slice:cri-containerd:" + id,
		"drivers that differ, as a service": "/system.slice/containerd.service/kubepods-besteffort-pod" + under + ".slice:cri-containerd:" + id,
	} {
		t.Run(name, func(t *testing.T) {
			if got := attest(t, a, in(t, path)); !slices.Contains(got, "pod-label:app:web") {
				t.Errorf("got %q", got)
			}
		})
	}
}

func TestAProcessInNoPodHasNoSelectorsAndCostsNoQuestion(t *testing.T) {
	k := harness.NewKubelet(t, node)
	a := asking(t, k, nil)
	for _, path := range []string{root(t) + "/docker/" + id, root(t) + "/kubepods/burstable/pod" + uid, root(t) + "/process_api/9b2ce684501260855fe926399b0a4be9"} {
		if got := attest(t, a, in(t, path)); len(got) != 0 {
			t.Errorf("%s: got %q", path, got)
		}
	}
	if n := k.Calls.Load(); n != 0 {
		t.Errorf("the kubelet was asked %d times", n)
	}
}

func TestInitContainersAreAttestedAndEphemeralOnesIfConfigured(t *testing.T) {
	pod := web()
	pod.Init, pod.Ephemeral = []harness.PodContainer{{Name: "setup", ID: id2}}, []harness.PodContainer{{Name: "debugger", ID: id}}
	pod.Containers = nil
	k := harness.NewKubelet(t, node)
	k.SetPods(harness.PodList(pod.JSON()))
	setup, debugger := process(t, uid, id2), process(t, uid, id)
	a := asking(t, k, nil)
	if got := attest(t, a, setup); !slices.Contains(got, "container-name:setup") || !slices.Contains(got, "ns:shop") {
		t.Errorf("the init container has %q", got)
	}
	if got, err := a.Attest(t.Context(), debugger); len(got) != 0 || err == nil || !strings.Contains(err.Error(), "ephemeral_containers") {
		t.Errorf("the ephemeral container has %v, %v", got, err)
	}
	a = asking(t, k, func(c *k8s.Config) { c.EphemeralContainers = true })
	if got := attest(t, a, debugger); !slices.Contains(got, "container-name:debugger") || !slices.Contains(got, "ns:shop") {
		t.Errorf("the ephemeral container has %q", got)
	}
}

func TestWhoSignedTheImageOfAContainerIsASelector(t *testing.T) {
	const issuer, release = "https://token.actions.githubusercontent.com", "https://github.com/acme/shop"
	s := harness.NewSigstore(t)
	signed, unsigned := s.Image(t, "acme/web"), s.Image(t, "acme/other")
	_, digest, _ := strings.Cut(signed, "@")
	s.PutLayers(t, signed, s.Layer(t, harness.SigstorePayload(digest), issuer, release))
	pod := web()
	pod.Containers = []harness.PodContainer{{Name: "web", ID: id, Image: "docker-pullable://" + signed}, {Name: "other", ID: id2, Image: unsigned}}
	k := harness.NewKubelet(t, node)
	k.SetPods(harness.PodList(pod.JSON()))
	a := asking(t, k, func(c *k8s.Config) {
		c.ImageSignatures = &imagesig.Config{
			Images: []string{s.Registry + "/acme/*"}, TrustedRootPath: s.TrustedRootPath,
			Identities: []imagesig.Identity{{Issuer: issuer, Subject: release}},
		}
	})
	if got := attest(t, a, process(t, uid, id)); !slices.Contains(got, "image-signature-subject:"+release) {
		t.Errorf("the container of a signed image has %q", got)
	}
	if got := attest(t, a, process(t, uid, id2)); !slices.Contains(got, "container-name:other") || slices.ContainsFunc(got, func(v string) bool { return strings.HasPrefix(v, "image-signature") }) {
		t.Errorf("the container of an unsigned image has %q", got)
	}
}

func TestTheAgentProvesItselfByATokenThatIsReadAnewOrByACertificate(t *testing.T) {
	k := harness.NewKubelet(t, node)
	k.SetPods(harness.PodList(web().JSON()))
	p := process(t, uid, id)
	t.Run("a token that is renewed", func(t *testing.T) {
		a := asking(t, k, nil)
		attest(t, a, p)
		k.SetToken(t, "token-2")
		second := web()
		second.Containers[0].ID = id2
		k.SetPods(harness.PodList(second.JSON()))
		attest(t, a, process(t, uid, id2)) // is asked for anew
	})
	k.SetPods(harness.PodList(web().JSON()))
	t.Run("a certificate", func(t *testing.T) {
		cert, key := k.Client(t, "agent")
		attest(t, asking(t, k, func(c *k8s.Config) { c.TokenPath, c.CertificatePath, c.PrivateKeyPath = "", cert, key }), p)
	})
	t.Run("a kubelet that is not verified", func(t *testing.T) {
		attest(t, asking(t, k, func(c *k8s.Config) { c.KubeletCAPath, c.InsecureSkipVerify = "", true }), p)
	})
}

func TestAContainerThatIsJustStartingIsWaitedFor(t *testing.T) {
	t.Parallel()
	k := harness.NewKubelet(t, node)
	var asked atomic.Int32
	k.Handle(func(w http.ResponseWriter, r *http.Request) {
		pods := harness.PodList()
		if asked.Add(1) > 2 {
			pods = harness.PodList(web().JSON())
		}
		io.WriteString(w, pods)
	})
	if got := attest(t, asking(t, k, nil), process(t, uid, id)); !slices.Contains(got, "ns:shop") {
		t.Errorf("got %q", got)
	}
}

func TestABurstOfProcessesAsksTheKubeletOnce(t *testing.T) {
	k := harness.NewKubelet(t, node)
	var pods []string
	var processes []attestors.Process
	for i := range 100 {
		pod := web()
		pod.Name, pod.UID = fmt.Sprint("web-", i), fmt.Sprintf("2c48913c-b29f-11e7-9350-%012d", i)
		pod.Containers[0].ID = fmt.Sprintf("%064d", i)
		pods = append(pods, pod.JSON())
		if i < 10 {
			processes = append(processes, process(t, pod.UID, pod.Containers[0].ID))
		}
	}
	k.SetPods(harness.PodList(pods...))
	a := asking(t, k, nil)
	var wait sync.WaitGroup
	for i := range 100 {
		wait.Go(func() {
			p := i % len(processes)
			got, err := a.Attest(t.Context(), processes[p])
			if set := selector.NewSet(got...); err != nil || !slices.Contains(set.Strings(), fmt.Sprint("k8s:pod-name:web-", p)) {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	wait.Wait()
	if n := k.Calls.Load(); n > 2 { // one more if the burst took long
		t.Errorf("100 attestations made %d calls", n)
	}
}

func TestWhatIsKnownOfAPodIsForgottenAfterSeconds(t *testing.T) {
	t.Parallel()
	k := harness.NewKubelet(t, node)
	k.SetPods(harness.PodList(web().JSON()))
	p := process(t, uid, id)
	a := asking(t, k, nil)
	attest(t, a, p)
	relabelled := web()
	relabelled.Labels["app"] = "admin"
	k.SetPods(harness.PodList(relabelled.JSON()))
	began := time.Now()
	harness.Eventually(t, "the new label", func(context.Context) error {
		if got := attest(t, a, p); slices.Contains(got, "pod-label:app:web") {
			return fmt.Errorf("got %q after %v", got, time.Since(began))
		}
		return nil
	})
	// Nor is a pod that is gone known for longer, be its group there or not.
	k.SetPods(harness.PodList())
	harness.Eventually(t, "the pod's end", func(ctx context.Context) error {
		if got, err := a.Attest(ctx, p); err == nil {
			return fmt.Errorf("got %v", got)
		}
		return nil
	})
}

func TestImpossibleSettingsAreRefused(t *testing.T) {
	for want, c := range map[string]k8s.Config{
		"write host:port":           {Kubelet: "node-7"},
		"is for loopback only":      {Kubelet: "10.0.0.7:10250", InsecureSkipVerify: true},
		"kubelet_ca_path":           {InsecureSkipVerify: true, KubeletCAPath: "/ca.pem"},
		"give both or none":         {CertificatePath: "/cert.pem"},
		"token_path and certificat": {CertificatePath: "/cert.pem", PrivateKeyPath: "/key.pem", TokenPath: "/token"},
		"such as /k8s":              {CgroupRoot: "k8s/"},
	} {
		if _, err := k8s.New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

// BenchmarkAttest attests a process among the 110 pods that a node has at most
// by default, from the list and, each time, with a new one.
func BenchmarkAttest(b *testing.B) {
	k := harness.NewKubelet(b, node)
	pods := []string{web().JSON()}
	for i := range 109 {
		pod := web()
		pod.Name, pod.UID, pod.Containers[0].ID = fmt.Sprint("web-", i), fmt.Sprintf("2c48913c-b29f-11e7-9350-%012d", i), fmt.Sprintf("%064d", i)
		pods = append(pods, pod.JSON())
	}
	k.SetPods(harness.PodList(pods...))
	p := process(b, uid, id)
	a := asking(b, k, nil)
	var took []time.Duration
	k.Calls.Store(0)
	for b.Loop() {
		began := time.Now()
		if _, err := a.Attest(b.Context(), p); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(len(took))/b.Elapsed().Seconds(), "attestations/s")
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-µs")
	b.ReportMetric(float64(k.Calls.Load())/float64(len(took)), "calls/op")
}
