package k8s_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/k8s"
	"github.com/hallmark-id/hallmark/pkg/peercred"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAKubeletThatLiesOrIsNoneGivesNoIdentity goes through what may answer in a
// kubelet's place, or be wrong with it.
func TestAKubeletThatLiesOrIsNoneGivesNoIdentity(t *testing.T) {
	p := process(t, uid, id)
	text := func(s string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, s) }
	}
	elsewhere := web()
	elsewhere.Node = "node-8"
	ended := web()
	ended.Containers[0].Ended = true
	claimed := web()
	claimed.Name, claimed.UID = "thief", other
	twice := web()
	twice.Init = twice.Containers
	moved := web()
	moved.UID = other
	labels := web()
	for i := range 501 {
		labels.Labels[fmt.Sprint("l", i)] = ""
	}
	good := harness.PodList(web().JSON())
	cases := map[string]struct {
		h      http.HandlerFunc
		change func(*k8s.Config)
		want   string // of the error: one of these
	}{
		"an authority that is not trusted":      {text(good), func(c *k8s.Config) { c.KubeletCAPath = harness.NewAuthority(t).Path }, "name its authority by kubelet_ca_path"},
		"a certificate of another node":         {text(good), func(c *k8s.Config) { c.NodeName = "node-8" }, "set node_name"},
		"a certificate of no node, by loopback": {text(good), func(c *k8s.Config) { c.NodeName = "" }, "set node_name"},
		"a token that it does not take":         {text(good), func(c *k8s.Config) { c.TokenPath = write(t, "token-0") }, "does not accept the token"},
		"a certificate that it does not take":   {text(good), foreignClient(t), "tls: "},
		"an empty token":                        {text(good), func(c *k8s.Config) { c.TokenPath = write(t, "\n") }, "is empty"},
		"a token that would add a header":       {text(good), func(c *k8s.Config) { c.TokenPath = write(t, "a\r\nHost: b") }, "something else than a token"},
		"no token":                              {text(good), func(c *k8s.Config) { c.TokenPath = "/nonexistent" }, "outside of a pod set"},
		"a token that is a device":              {text(good), func(c *k8s.Config) { c.TokenPath = "/dev/zero" }, "no regular file"},
		"no CA":                                 {text(good), func(c *k8s.Config) { c.KubeletCAPath = write(t, "CA") }, "holds no certificate"},
		"no permission":                         {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "no", http.StatusForbidden) }, nil, "give the agent's service account"},
		"an error":                              {func(w http.ResponseWriter, r *http.Request) { http.Error(w, "out of memory", 500) }, nil, "500 Internal Server Error"},
		"a closed connection":                   {func(w http.ResponseWriter, r *http.Request) { panic(http.ErrAbortHandler) }, nil, "EOF"},
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://127.0.0.1:1/x", http.StatusFound)
		}, nil, "302 Found"},
		"a list without end": {endless, nil, "longer than|deadline exceeded"},
		"a pod without end": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, `{"kind":"PodList","items":[{"metadata":{"name":"`)
			zeros(w, r)
		}, nil, "longer than|deadline exceeded"},
		"half a list":                               {text(good[:len(good)/2]), nil, "unexpected EOF"},
		"a list without its end":                    {text(good[:len(good)-1]), nil, "unexpected EOF"},
		"two lists":                                 {text(good + good), nil, "something follows"},
		"no JSON":                                   {text("<html>"), nil, "invalid character"},
		"nothing":                                   {text(""), nil, "unexpected EOF"},
		"a list of something else":                  {text(strings.Replace(good, "PodList", "NodeList", 1)), nil, "not PodList"},
		"an array nested without end":               {text(`{"kind":"PodList","x":` + strings.Repeat("[", 1<<20)), nil, "exceeded max depth"},
		"items that are no list":                    {text(`{"kind":"PodList","items":{}}`), nil, "not a list"},
		"a pod without a UID":                       {text(strings.ReplaceAll(good, uid, "")), nil, "lacks its namespace, name or UID"},
		"a pod of another node":                     {text(harness.PodList(elsewhere.JSON())), nil, "is of the node"},
		"a container that two pods claim":           {text(harness.PodList(web().JSON(), claimed.JSON())), nil, "twice"},
		"a container that one pod has twice":        {text(harness.PodList(twice.JSON())), nil, "twice"},
		"a container of another pod than its group": {text(harness.PodList(moved.JSON())), nil, "names the pod " + uid},
		"a container that has ended":                {text(harness.PodList(ended.JSON())), nil, "has ended"},
		"too many labels":                           {text(harness.PodList(labels.JSON())), nil, "the most is 500"},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := harness.NewKubelet(t, node)
			k.Handle(c.h)
			got, err := asking(t, k, c.change).Attest(t.Context(), p)
			if len(got) != 0 || err == nil || !slices.ContainsFunc(strings.Split(c.want, "|"), func(want string) bool { return strings.Contains(err.Error(), want) }) {
				t.Errorf("got %v, %v", got, err)
			}
			if err != nil && strings.Contains(err.Error(), "token-") {
				t.Errorf("the error tells a token: %v", err)
			}
		})
	}
}

func write(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func foreignClient(t testing.TB) func(*k8s.Config) {
	cert, key := harness.NewAuthority(t).Client(t, "agent")
	return func(c *k8s.Config) { c.TokenPath, c.CertificatePath, c.PrivateKeyPath = "", cert, key }
}

func zeros(w http.ResponseWriter, r *http.Request) {
	chunk := []byte(strings.Repeat("0", 1<<20))
	for r.Context().Err() == nil {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

func endless(w http.ResponseWriter, r *http.Request) {
	list := harness.PodList()
	io.WriteString(w, list[:len(list)-2])
	chunk := []byte(strings.Repeat(" ", 1<<20))
	for r.Context().Err() == nil {
		if _, err := w.Write(chunk); err != nil {
			return
		}
	}
}

func TestAKubeletThatHangsIsGivenUp(t *testing.T) {
	t.Parallel()
	k := harness.NewKubelet(t, node)
	asked := make(chan struct{}, 10)
	k.Handle(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, harness.PodList()[:20])
		w.(http.Flusher).Flush()
		asked <- struct{}{}
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	p := process(t, uid, id)
	a := asking(t, k, nil)
	if _, err := a.Attest(ctx, p); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	// The question itself ends too, for whoever still waits.
	if _, err := a.Attest(t.Context(), p); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
}

// TestNobodyMakesTheKubeletBusy: a container that is not there is asked for
// until it would have started, at a bounded rate, however many ask.
func TestNobodyMakesTheKubeletBusy(t *testing.T) {
	t.Parallel()
	k := harness.NewKubelet(t, node)
	a := asking(t, k, nil)
	p := process(t, uid, id)
	began := time.Now()
	var failed atomic.Int32
	done := make(chan struct{})
	for range 50 {
		go func() {
			defer func() { done <- struct{}{} }()
			if _, err := a.Attest(t.Context(), p); err != nil && strings.Contains(err.Error(), "lists no container") {
				failed.Add(1)
			}
		}()
	}
	for range 50 {
		<-done
	}
	if failed.Load() != 50 {
		t.Errorf("%d of 50 were told that there is no such container", failed.Load())
	}
	if most := int64(time.Since(began)/(200*time.Millisecond)) + 1; k.Calls.Load() > most {
		t.Errorf("%d calls in %v", k.Calls.Load(), time.Since(began))
	}
}

// TestAGroupThatOnlyBearsThePodsNameIsNotIts: users make such groups where they
// were given a part of the tree.
func TestAGroupThatOnlyBearsThePodsNameIsNotIts(t *testing.T) {
	under := strings.ReplaceAll(uid, "-", "_")
	k := harness.NewKubelet(t, node)
	k.SetPods(harness.PodList(web().JSON()))
	a := asking(t, k, nil)
	for _, path := range []string{
		"/user.slice/user-61234.slice/user@61234.service/kubepods/burstable/pod" + uid + "/" + id,
		"/user.slice/user-61234.slice/user@61234.service/kubepods.slice/kubepods-pod" + under + ".slice/cri-containerd-" + id + ".scope",
		"/user.slice/user-61234.slice/user@61234.service/kubepods-pod" + under + ".slice:cri-containerd:" + id,
		"/system.slice/hallmark-test.service/kubepods/burstable/pod" + uid + "/" + id,
		"/system.slice/hallmark-test.service/kubepods-pod" + under + ".slice:cri-containerd:" + id,
		root(t) + "/pod" + uid + "/" + id,
		root(t) + "/kubepods/pod" + uid + "/own/" + id,
		root(t) + "/kubepods/burstable/more/pod" + uid + "/" + id,
		root(t) + "2/kubepods/pod" + uid + "/" + id,
	} {
		t.Run(path, func(t *testing.T) {
			got, err := a.Attest(t.Context(), in(t, path))
			if len(got) != 0 || err == nil || !strings.Contains(err.Error(), "is not where the kubelet makes") {
				t.Errorf("got %v, %v", got, err)
			}
		})
	}
	if n := k.Calls.Load(); n != 0 {
		t.Errorf("the kubelet was asked %d times", n)
	}
	t.Run("below another container", func(t *testing.T) {
		pod := web()
		pod.Containers = append(pod.Containers, harness.PodContainer{Name: "builder", ID: id2})
		k.SetPods(harness.PodList(pod.JSON()))
		nested := in(t, root(t)+"/kubepods/burstable/pod"+uid+"/"+id2+"/kubepods/pod"+other+"/"+id)
		if got := attest(t, a, nested); !slices.Contains(got, "container-name:builder") || slices.Contains(got, "container-name:web") {
			t.Errorf("got %q", got)
		}
	})
}

// TestAProcessThatEndsWhileTheKubeletIsAskedIsNoLongerThere: who asks the
// attestor pins the process, so whoever gets its PID gets nothing of it.
func TestAProcessThatEndsWhileTheKubeletIsAskedIsNoLongerThere(t *testing.T) {
	t.Parallel()
	k := harness.NewKubelet(t, node)
	cmd := harness.InGroup(t, root(t)+"/kubepods/burstable/pod"+uid+"/"+id)
	pinned, err := peercred.Pin(int32(cmd.Process.Pid))
	must(t, err)
	defer pinned.Close()
	k.Handle(func(w http.ResponseWriter, r *http.Request) {
		cmd.Process.Kill()
		cmd.Wait()
		io.WriteString(w, harness.PodList(web().JSON()))
	})
	a := asking(t, k, nil)
	if _, err := a.Attest(t.Context(), attestors.Process{PID: pinned.PID}); err != nil {
		t.Fatal(err)
	}
	if pinned.Alive() == nil {
		t.Error("it is taken for alive")
	}
	// And asked once more, there is nothing that the PID could be.
	if got, err := a.Attest(t.Context(), attestors.Process{PID: pinned.PID}); err == nil {
		t.Errorf("got %v", got)
	}
}

// TestHostileNamesMakeNoSelectorOfAnotherKey: Kubernetes allows no such labels;
// a list that has them must not gain anything by it.
func TestHostileNamesMakeNoSelectorOfAnotherKey(t *testing.T) {
	t.Parallel()
	pod := web()
	pod.Labels = map[string]string{
		"app:web": "x", "app": "web:x", "": "empty", "line\nfeed": "x", "value": "a\x00b", "broken": "\xff",
		"long": strings.Repeat("x", 5000), "fine": "héllo wörld",
	}
	k := harness.NewKubelet(t, node)
	k.SetPods(harness.PodList(pod.JSON()))
	var labels []string
	for _, s := range attest(t, asking(t, k, nil), process(t, uid, id)) {
		if strings.HasPrefix(s, "pod-label:") {
			labels = append(labels, s)
		}
	}
	// The broken one was made whole by JSON, which knows no other text.
	if want := []string{"pod-label:app:web:x", "pod-label:broken:\ufffd", "pod-label:fine:héllo wörld"}; !slices.Equal(labels, want) {
		t.Errorf("got %q", labels)
	}
}

// TestATokenIsNotSentOn: neither to where a redirect leads, nor to a server
// that is not the kubelet.
func TestATokenIsNotSentOn(t *testing.T) {
	t.Parallel()
	var seen atomic.Int32
	foreign := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { seen.Add(1) }))
	defer foreign.Close()
	k := harness.NewKubelet(t, node)
	k.Handle(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, foreign.URL+"/pods", http.StatusTemporaryRedirect)
	})
	p := process(t, uid, id)
	for _, change := range []func(*k8s.Config){
		nil,
		func(c *k8s.Config) { c.KubeletCAPath, c.InsecureSkipVerify = "", true },
		func(c *k8s.Config) { c.Kubelet = foreign.Listener.Addr().String() },
	} {
		if _, err := asking(t, k, change).Attest(t.Context(), p); err == nil {
			t.Error("attested")
		}
	}
	if seen.Load() != 0 {
		t.Errorf("the other server was asked %d times", seen.Load())
	}
}
