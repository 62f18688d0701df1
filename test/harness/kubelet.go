package harness

import (
	"cmp"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// Kubelet is what a kubelet is to those who ask it for its pods: TLS with a
// certificate for its node, and a list for who shows its token or a certificate
// of its authority.
type Kubelet struct {
	*Authority
	Address   string
	TokenPath string // of the file with the token that it takes
	Calls     atomic.Int64

	mu    sync.Mutex
	token string
	pods  http.HandlerFunc
}

// NewKubelet starts one, of a node, which lists no pods.
func NewKubelet(t testing.TB, node string) *Kubelet {
	t.Helper()
	k := &Kubelet{Authority: NewAuthority(t)}
	k.TokenPath = filepath.Join(k.dir, "token")
	k.SetToken(t, "token-1")
	k.SetPods(PodList())
	server := httptest.NewUnstartedServer(http.HandlerFunc(k.serve))
	server.TLS = &tls.Config{
		Certificates: []tls.Certificate{k.Server(t, node)},
		ClientAuth:   tls.VerifyClientCertIfGiven,
		ClientCAs:    k.Pool(),
	}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	k.Address = server.Listener.Addr().String()
	return k
}

// SetToken changes the token that it takes, and the file.
func (k *Kubelet) SetToken(t testing.TB, token string) {
	t.Helper()
	must(t, os.WriteFile(k.TokenPath, []byte(token+"\n"), 0o644))
	k.mu.Lock()
	k.token = token
	k.mu.Unlock()
}

// SetPods changes what it lists.
func (k *Kubelet) SetPods(list string) {
	k.Handle(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, list) })
}

// Handle changes how it answers who is let in.
func (k *Kubelet) Handle(h http.HandlerFunc) {
	k.mu.Lock()
	k.pods = h
	k.mu.Unlock()
}

func (k *Kubelet) serve(w http.ResponseWriter, r *http.Request) {
	k.Calls.Add(1)
	k.mu.Lock()
	token, pods := k.token, k.pods
	k.mu.Unlock()
	switch {
	case r.Header.Get("Authorization") != "Bearer "+token && len(r.TLS.VerifiedChains) == 0:
		http.Error(w, "Unauthorized", http.StatusUnauthorized)
	case r.URL.Path != "/pods":
		http.NotFound(w, r)
	default:
		pods(w, r)
	}
}

// PodList is the list of some pods, as a kubelet writes it.
func PodList(pods ...string) string {
	return `{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[` + strings.Join(pods, ",") + `]}`
}

// Pod describes a pod to [Pod.JSON].
type Pod struct {
	Namespace, Name, UID, Node  string
	Account                     string // "": sa-NAME
	Phase                       string // "": Running
	Labels                      map[string]string
	Containers, Init, Ephemeral []PodContainer
}

// PodContainer is one that runs, or has ended.
type PodContainer struct {
	Name, ID string
	Image    string // by digest; "": one of example.com
	Ended    bool
}

// JSON is the pod as Kubernetes writes it: with more than anybody asks for.
func (p Pod) JSON() string {
	status := func(of []PodContainer) []any {
		var out []any
		for _, c := range of {
			state := map[string]any{"running": map[string]any{"startedAt": "2026-11-25T10:00:00Z"}}
			if c.Ended {
				state = map[string]any{"terminated": map[string]any{"exitCode": 0}}
			}
			out = append(out, map[string]any{
				"name": c.Name, "containerID": "containerd://" + c.ID, "state": state, "ready": !c.Ended, "restartCount": 0, "lastState": map[string]any{},
				"image": "example.com/" + c.Name + ":1.4", "imageID": cmp.Or(c.Image, "example.com/"+c.Name+"@sha256:"+strings.Repeat("9c", 32)),
			})
		}
		return out
	}
	b, err := json.Marshal(map[string]any{
		"metadata": map[string]any{
			"name": p.Name, "namespace": p.Namespace, "uid": p.UID, "labels": p.Labels, "resourceVersion": "1395",
			"annotations":     map[string]any{"kubernetes.io/config.source": "api"},
			"ownerReferences": []any{map[string]any{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": p.Name + "-rs", "uid": "owner-of-" + p.UID, "controller": true}},
		},
		"spec": map[string]any{
			"nodeName": p.Node, "serviceAccountName": cmp.Or(p.Account, "sa-"+p.Name),
			"containers": []any{map[string]any{"name": "main", "image": "example.com/asked-for:1", "env": []any{map[string]any{"name": "PASSWORD", "value": "hunter2"}}}},
		},
		"status": map[string]any{
			"phase": cmp.Or(p.Phase, "Running"), "hostIP": "10.0.0.7", "podIP": "10.1.0.9",
			"containerStatuses": status(p.Containers), "initContainerStatuses": status(p.Init), "ephemeralContainerStatuses": status(p.Ephemeral),
		},
	})
	if err != nil {
		panic(fmt.Sprint("describe a pod: ", err))
	}
	return string(b)
}
