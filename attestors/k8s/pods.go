package k8s

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Bounds of what is taken from a kubelet. Its default is 110 pods; nobody runs
// ten times as many on a node.
const (
	maxPods       = 4096
	maxContainers = 64 // of a pod, of each kind
	maxLabels     = 500
	maxOwners     = 64
)

// pod is what matters of Kubernetes' description of a pod.
type pod struct {
	Metadata struct {
		Name            string            `json:"name"`
		Namespace       string            `json:"namespace"`
		UID             string            `json:"uid"`
		Labels          map[string]string `json:"labels"`
		OwnerReferences []struct {
			Kind string `json:"kind"`
			Name string `json:"name"`
			UID  string `json:"uid"`
		} `json:"ownerReferences"`
	} `json:"metadata"`
	Spec struct {
		NodeName           string `json:"nodeName"`
		ServiceAccountName string `json:"serviceAccountName"`
		// Images are here too, but as they should become: a change of a running
		// pod's would give it the selectors of an image that it does not run.
	} `json:"spec"`
	Status struct {
		ContainerStatuses          []containerStatus `json:"containerStatuses"`
		InitContainerStatuses      []containerStatus `json:"initContainerStatuses"`
		EphemeralContainerStatuses []containerStatus `json:"ephemeralContainerStatuses"`
	} `json:"status"`
}

type containerStatus struct {
	Name        string `json:"name"`
	Image       string `json:"image"`       // a name of it, any of those that it has
	ImageID     string `json:"imageID"`     // by digest
	ContainerID string `json:"containerID"` // runtime://ID; empty before it starts
	State       struct {
		Terminated *struct{} `json:"terminated"`
	} `json:"state"`
}

// container is what is known of one.
type container struct {
	podUID    string
	err       error // why it has no selectors
	selectors []selector.Selector
	image     string // by digest, as the registry calls it; empty: not known
}

// parser reads lists of pods.
type parser struct {
	node      string // whose pods they must be; empty: any
	ephemeral bool   // ephemeral containers have selectors
}

// parse reads a list of pods, one at a time, and returns their containers by
// ID. A list that breaks off is an error and not a shorter one.
func (p parser) parse(r io.Reader) (map[string]*container, error) {
	d := json.NewDecoder(r)
	if err := expect(d, json.Delim('{')); err != nil {
		return nil, err
	}
	containers := make(map[string]*container)
	kind := ""
	pods := 0
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		switch key {
		case "kind":
			if err := d.Decode(&kind); err != nil {
				return nil, err
			}
		case "items":
			if err := p.items(d, containers, &pods); err != nil {
				return nil, err
			}
		default:
			if err := d.Decode(new(json.RawMessage)); err != nil {
				return nil, err
			}
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("something follows the list of pods")
	}
	if kind != "PodList" {
		return nil, fmt.Errorf("it is of the kind %q, not PodList", attestors.Clip(kind))
	}
	return containers, nil
}

func (p parser) items(d *json.Decoder, into map[string]*container, pods *int) error {
	start, err := d.Token()
	if err != nil {
		return err
	}
	if start == nil { // null: none
		return nil
	}
	if start != json.Delim('[') {
		return fmt.Errorf("its items are %v, not a list", start)
	}
	for d.More() {
		var one pod
		if err := d.Decode(&one); err != nil {
			return err
		}
		if *pods++; *pods > maxPods {
			return fmt.Errorf("it has more than %d pods", maxPods)
		}
		if err := p.add(&one, into); err != nil {
			return err
		}
	}
	return expect(d, json.Delim(']'))
}

func expect(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("%v where %v was expected", got, want)
	}
	return nil
}

// add adds a pod's containers. One whose selectors cannot be told, or not
// without doubt, is added with the reason, which does not concern the others.
func (p parser) add(of *pod, into map[string]*container) error {
	name := of.Metadata.Namespace + "/" + of.Metadata.Name
	if of.Metadata.UID == "" || of.Metadata.Namespace == "" || of.Metadata.Name == "" {
		return fmt.Errorf("the pod %q (%q) lacks its namespace, name or UID", attestors.Clip(name), attestors.Clip(of.Metadata.UID))
	}
	if p.node != "" && of.Spec.NodeName != p.node {
		return fmt.Errorf("the pod %q is of the node %q, not of %q; is that the kubelet of this node?", attestors.Clip(name), attestors.Clip(of.Spec.NodeName), p.node)
	}
	status := &of.Status
	var wrong error
	switch {
	case max(len(status.ContainerStatuses), len(status.InitContainerStatuses), len(status.EphemeralContainerStatuses)) > maxContainers:
		return fmt.Errorf("the pod %q has more than %d containers of a kind", attestors.Clip(name), maxContainers)
	case len(of.Metadata.Labels) > maxLabels:
		wrong = fmt.Errorf("the pod %q has %d labels; the most is %d", attestors.Clip(name), len(of.Metadata.Labels), maxLabels)
	case len(of.Metadata.OwnerReferences) > maxOwners:
		wrong = fmt.Errorf("the pod %q has %d owners; the most is %d", attestors.Clip(name), len(of.Metadata.OwnerReferences), maxOwners)
	}
	var common []selector.Selector
	if wrong == nil {
		common = podSelectors(of)
	}
	for kind, statuses := range [][]containerStatus{status.ContainerStatuses, status.InitContainerStatuses, status.EphemeralContainerStatuses} {
		for i := range statuses {
			s := &statuses[i]
			_, id, ok := strings.Cut(s.ContainerID, "://")
			if !ok || id == "" {
				continue // not started yet
			}
			c := &container{podUID: of.Metadata.UID, err: wrong, image: strings.TrimPrefix(s.ImageID, "docker-pullable://")}
			switch ephemeral := kind == 2; {
			case into[id] != nil:
				c.err = fmt.Errorf("the kubelet lists the container %s twice, last in the pod %q", attestors.Clip(id), attestors.Clip(name))
			case wrong != nil:
			case s.State.Terminated != nil:
				c.err = fmt.Errorf("the container %q of the pod %q has ended, as the kubelet says", attestors.Clip(s.Name), attestors.Clip(name))
			case ephemeral && !p.ephemeral:
				c.err = fmt.Errorf("the container %q of the pod %q is ephemeral; set ephemeral_containers to give such the pod's selectors", attestors.Clip(s.Name), attestors.Clip(name))
			default:
				c.selectors = append(containerSelectors(s), common...)
			}
			into[id] = c
		}
	}
	return nil
}

// list of selectors, without those that could be mistaken for others.
type selectors []selector.Selector

// add adds one whose value is some parts with colons between them. Only the
// last part may hold a colon itself, or one selector would be that of another
// key too; Kubernetes allows it in none. An empty part has no selector.
func (s *selectors) add(parts ...string) {
	for i, part := range parts {
		if part == "" && i < len(parts)-1 || i < len(parts)-1 && strings.Contains(part, ":") {
			return
		}
	}
	value := strings.Join(parts, ":")
	if !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
		return
	}
	if one, err := selector.New(Name, value); err == nil { // it fails if longer than any registered one
		*s = append(*s, one)
	}
}

// addIf adds one if its value is not empty.
func (s *selectors) addIf(kind, value string) {
	if value != "" {
		s.add(kind, value)
	}
}

func podSelectors(of *pod) []selector.Selector {
	var out selectors
	out.addIf("ns", of.Metadata.Namespace)
	out.addIf("sa", of.Spec.ServiceAccountName)
	out.addIf("pod-name", of.Metadata.Name)
	out.addIf("pod-uid", of.Metadata.UID)
	out.addIf("node-name", of.Spec.NodeName)
	for key, value := range of.Metadata.Labels {
		out.add("pod-label", key, value) // the value may be empty
	}
	for _, owner := range of.Metadata.OwnerReferences {
		if owner.Name != "" {
			out.add("pod-owner", owner.Kind, owner.Name)
		}
		if owner.UID != "" {
			out.add("pod-owner-uid", owner.Kind, owner.UID)
		}
	}
	for _, images := range []struct {
		kind string
		of   []containerStatus
	}{{"pod-image", of.Status.ContainerStatuses}, {"pod-init-image", of.Status.InitContainerStatuses}} {
		out.add(images.kind+"-count", strconv.Itoa(len(images.of)))
		for i := range images.of {
			out.addIf(images.kind, images.of[i].Image)
			out.addIf(images.kind, images.of[i].ImageID)
		}
	}
	return out
}

func containerSelectors(s *containerStatus) []selector.Selector {
	var out selectors
	out.addIf("container-name", s.Name)
	out.addIf("container-image", s.Image)
	out.addIf("container-image", s.ImageID)
	if _, digest, ok := strings.Cut(s.ImageID, "@"); ok {
		out.addIf("container-image-digest", digest)
	}
	return out
}
