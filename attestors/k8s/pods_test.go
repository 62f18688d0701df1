package k8s

import (
	"slices"
	"strings"
	"testing"
)

// Not by a kubelet: that has seconds to send its list, which a busy machine may
// take to read it.
func TestTooManyPodsAreRefused(t *testing.T) {
	list := func(n int) string {
		pods := slices.Repeat([]string{`{"metadata":{"name":"a","namespace":"b","uid":"c"},"spec":{"nodeName":"n"}}`}, n)
		return `{"kind":"PodList","items":[` + strings.Join(pods, ",") + `]}`
	}
	p := parser{node: "n"}
	if _, err := p.parse(strings.NewReader(list(maxPods))); err != nil {
		t.Errorf("as many as may be: %v", err)
	}
	if _, err := p.parse(strings.NewReader(list(maxPods + 1))); err == nil || !strings.Contains(err.Error(), "more than 4096 pods") {
		t.Errorf("one more: %v", err)
	}
}

func FuzzParsePods(f *testing.F) {
	f.Add([]byte(`{"kind":"PodList","items":null}`))
	f.Add([]byte(`{"kind":"PodList","apiVersion":"v1","items":[{"metadata":{"name":"web","namespace":"shop","uid":"u","labels":{"a":"b"},` +
		`"ownerReferences":[{"kind":"ReplicaSet","name":"r","uid":"o"}]},"spec":{"nodeName":"n","serviceAccountName":"s"},"status":{` +
		`"containerStatuses":[{"name":"web","image":"i","imageID":"i@sha256:9c","containerID":"containerd://c","state":{"running":{}}}],` +
		`"initContainerStatuses":[{"containerID":"cri-o://d","state":{"terminated":{}}}],"ephemeralContainerStatuses":[{"containerID":"docker://c"}]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		containers, err := parser{node: "n", ephemeral: true}.parse(strings.NewReader(string(data)))
		if err != nil && containers != nil {
			t.Errorf("a list that is wrong (%v) has containers", err)
		}
		for id, c := range containers {
			if id == "" || c.podUID == "" {
				t.Errorf("container %q of the pod %q", id, c.podUID)
			}
			if (c.err == nil) != (len(c.selectors) > 0) {
				t.Errorf("container %q has %d selectors and the error %v", id, len(c.selectors), c.err)
			}
		}
	})
}
