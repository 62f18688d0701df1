package k8s

import (
	"strings"
	"testing"
)

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
