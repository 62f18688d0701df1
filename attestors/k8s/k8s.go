// Package k8s attests a process by the Kubernetes pod and the container it runs
// in, as the node's kubelet describes them. Make an [Attestor] with [New].
//
// The selectors, all of type "k8s", are named as SPIRE's are:
//
//	ns:shop                            the pod's namespace
//	sa:web                             its service account
//	pod-name:web-7d4b9c-x2x5q
//	pod-uid:2c48913c-b29f-11e7-9350-020968147796
//	pod-label:app:web                  each label
//	pod-owner:ReplicaSet:web-7d4b9c    each owner
//	pod-owner-uid:ReplicaSet:5a1e…     the same by UID
//	pod-image:example.com/web:1.4      each container's image: its name and its ID
//	pod-image-count:2                  the pod's containers
//	pod-init-image:…                   as above, of its init containers
//	pod-init-image-count:0
//	node-name:node-7
//	container-name:web                 the container that the process is in
//	container-image:example.com/web:1.4                    its image by name
//	container-image:example.com/web@sha256:9c1f…           and by ID
//
// and one that SPIRE does not have:
//
//	container-image-digest:sha256:9c1f…    the image, whichever registry it came from
//
// and, if so configured, who signed the container's image (see package imagesig).
//
// The process is tied to the container by its control groups. That these are
// really the container's, and were not made by somebody with a part of the tree
// to manage, is certain because they are where the kubelet has its groups made,
// which only root can.
package k8s

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cgroup"
	"github.com/hallmark-id/hallmark/attestors/imagesig"
	"github.com/hallmark-id/hallmark/attestors/kube"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Name is the attestor's name and the type of its selectors.
const Name = "k8s"

// Config is the configuration of the attestor. The zero value works in a pod
// with the host's network, if the kubelet's certificate is for 127.0.0.1.
type Config struct {
	// NodeName is the name of the node, which Kubernetes gives to a pod as
	// spec.nodeName: write ${NODE_NAME} and have that variable set from it. A
	// kubelet that is reached by loopback must have a certificate for this name,
	// and every pod that it lists must be of this node.
	NodeName string `yaml:"node_name" env:"expand"`
	// Kubelet is the host and port where the kubelet serves its API. Without
	// loopback its certificate must be for this host. Default 127.0.0.1:10250.
	Kubelet string `yaml:"kubelet" env:"expand"`
	// KubeletCAPath is a PEM file of the authorities that the kubelet's
	// certificate must lead to, or of that certificate itself, at most 1 MiB.
	// Read for each connection. Default
	// /var/run/secrets/kubernetes.io/serviceaccount/ca.crt.
	KubeletCAPath string `yaml:"kubelet_ca_path" env:"expand"`
	// InsecureSkipVerify trusts whatever answers where the kubelet should. A
	// process that gets hold of its port can then give any process any identity,
	// and learns the agent's token. Only for a kubelet on loopback.
	InsecureSkipVerify bool `yaml:"insecure_skip_verify"`

	// TokenPath is a file with the token that the agent shows to the kubelet if
	// it has no certificate. Read for each question. Default
	// /var/run/secrets/kubernetes.io/serviceaccount/token.
	TokenPath string `yaml:"token_path" env:"expand"`
	// CertificatePath is a PEM file of the certificate that the agent shows to
	// the kubelet instead of a token. Default: none.
	CertificatePath string `yaml:"certificate_path" env:"expand"`
	// PrivateKeyPath is the PEM file of the certificate's key. Default: none.
	PrivateKeyPath string `yaml:"private_key_path" env:"expand"`

	// EphemeralContainers gives the containers that "kubectl debug" adds to a pod
	// the selectors of the pod, as every other container has. Otherwise they
	// have none.
	EphemeralContainers bool `yaml:"ephemeral_containers"`
	// CgroupRoot is the kubelet's setting cgroupRoot, where it is neither / nor
	// /kubelet: the pods of such kubelets are found without. Default: none.
	CgroupRoot string `yaml:"cgroup_root" env:"expand"`

	// ImageSignatures has selectors made of who signed a container's image.
	// Default: they are not looked for.
	ImageSignatures *imagesig.Config `yaml:"image_signatures"`
}

const (
	serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount/"
	defaultKubelet = "127.0.0.1:10250"
	defaultCA      = serviceAccount + "ca.crt"
	defaultToken   = serviceAccount + "token"

	// knownFor is how long a list of pods is believed. All that it says of a
	// container but the pod's labels and owners is as it was at the start.
	knownFor = 5 * time.Second
	// askInterval is the least time between two questions to the kubelet, which
	// reads its pods anew for each.
	askInterval = 200 * time.Millisecond
	// startTime is how long a container may run before the kubelet lists it: it
	// looks every second, and has to write it down.
	startTime = 4 * time.Second
)

// Attestor is the workload half; there is no other.
type Attestor struct {
	kubelet kubelet
	groups  groups
	parser  parser
	signed  *imagesig.Verifier // nil: nobody asks

	flights singleflight.Group
	mu      sync.Mutex
	asked   time.Time // the kubelet, when last
	latest  *list     // nil: none yet
}

var _ attestors.Workload = (*Attestor)(nil)

// list is what the kubelet said.
type list struct {
	asked      time.Time
	containers map[string]*container // by ID
}

// New makes an attestor. It fails if a setting makes no sense; it reads no file
// but those of image signatures.
func New(c Config) (*Attestor, error) {
	if c.Kubelet == "" {
		c.Kubelet = defaultKubelet
	}
	host, port, err := net.SplitHostPort(c.Kubelet)
	if err != nil || host == "" || port == "" {
		return nil, fmt.Errorf("kubelet of the k8s attestor is %q; write host:port, such as %s", c.Kubelet, defaultKubelet)
	}
	ip := net.ParseIP(host)
	loopback := host == "localhost" || ip != nil && ip.IsLoopback()
	switch {
	case c.InsecureSkipVerify && !loopback:
		return nil, fmt.Errorf("insecure_skip_verify of the k8s attestor is set for the kubelet at %s; it is for loopback only", c.Kubelet)
	case c.InsecureSkipVerify && c.KubeletCAPath != "":
		return nil, errors.New("insecure_skip_verify and kubelet_ca_path of the k8s attestor exclude each other; remove one of them")
	case (c.CertificatePath == "") != (c.PrivateKeyPath == ""):
		return nil, errors.New("certificate_path and private_key_path of the k8s attestor go together; give both or none")
	case c.CertificatePath != "" && c.TokenPath != "":
		return nil, errors.New("token_path and certificate_path of the k8s attestor exclude each other; remove one of them")
	case c.CgroupRoot != "" && (!filepath.IsAbs(c.CgroupRoot) || filepath.Clean(c.CgroupRoot) != c.CgroupRoot || c.CgroupRoot == "/"):
		return nil, fmt.Errorf("cgroup_root of the k8s attestor is %q; write the kubelet's cgroupRoot, such as /k8s", c.CgroupRoot)
	}
	ask := kube.Config{
		Address:     c.Kubelet,
		CA:          kube.Source{Path: c.KubeletCAPath},
		Insecure:    c.InsecureSkipVerify,
		Token:       kube.Source{Path: c.TokenPath},
		Certificate: kube.Source{Path: c.CertificatePath},
		Key:         kube.Source{Path: c.PrivateKeyPath},
	}
	if loopback {
		ask.ServerName = c.NodeName
	}
	if c.KubeletCAPath == "" {
		ask.CA.Path = defaultCA
	}
	if c.TokenPath == "" && c.CertificatePath == "" {
		ask.Token.Path = defaultToken
	}
	a := &Attestor{
		kubelet: kubelet{client: kube.New(ask), config: ask},
		groups:  newGroups(c.CgroupRoot),
		parser:  parser{node: c.NodeName, ephemeral: c.EphemeralContainers},
	}
	if c.ImageSignatures != nil {
		if a.signed, err = imagesig.New(*c.ImageSignatures); err != nil {
			return nil, fmt.Errorf("the k8s attestor: %w", err)
		}
	}
	return a, nil
}

// Attest returns the selectors of the pod and the container that a process is
// in: none if it is in no pod.
func (a *Attestor) Attest(ctx context.Context, p attestors.Process) ([]selector.Selector, error) {
	of, err := cgroup.Of(p.PID)
	if err != nil {
		return nil, fmt.Errorf("find the pod of process %d: %w", p.PID, err)
	}
	in, ok, err := of.Container()
	if err != nil {
		return nil, fmt.Errorf("find the pod of process %d: %w", p.PID, err)
	}
	if !ok || in.PodUID == "" && !ofOwnPod(in) {
		return nil, nil
	}
	if !a.groups.made(in) {
		return nil, fmt.Errorf("process %d is in the control group %s, which bears the name of a pod but is not where the kubelet makes those of pods; "+
			"if it has another cgroupRoot, set cgroup_root", p.PID, in.Path)
	}
	c, err := a.find(ctx, in.ID)
	if err != nil {
		return nil, err
	}
	if c.err != nil {
		return nil, c.err
	}
	if in.PodUID != "" && in.PodUID != c.podUID {
		return nil, fmt.Errorf("container %s is of the pod %s, but the control group of process %d names the pod %s", in.ID, c.podUID, p.PID, in.PodUID)
	}
	selectors := slices.Clone(c.selectors) // others have the same
	if a.signed == nil {
		return selectors, nil
	}
	values, err := a.signed.Values(ctx, []string{c.image})
	return append(selectors, attestors.SelectorsOf(Name, values)...), err
}

// find returns what the kubelet says of a container. It waits for one that is
// just starting.
func (a *Attestor) find(ctx context.Context, id string) (*container, error) {
	began := time.Now()
	for {
		a.mu.Lock()
		known := a.latest
		a.mu.Unlock()
		if known != nil && time.Since(known.asked) < knownFor {
			if c := known.containers[id]; c != nil {
				return c, nil
			}
			if known.asked.Sub(began) > startTime {
				return nil, fmt.Errorf("the kubelet lists no container %s", id)
			}
		}
		if err := a.ask(ctx); err != nil {
			return nil, fmt.Errorf("ask the kubelet for its pods, for container %s: %w", id, err)
		}
	}
}

// ask has the kubelet list its pods. Concurrent callers share one question,
// which goes on for the others when the one who asked it first gives up.
func (a *Attestor) ask(ctx context.Context) error {
	answer := a.flights.DoChan("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), askTime)
		defer cancel()
		a.mu.Lock()
		wait := askInterval - time.Since(a.asked)
		a.mu.Unlock()
		time.Sleep(wait)
		now := time.Now()
		containers, err := a.kubelet.pods(ctx, a.parser)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.asked = now
		if err == nil {
			a.latest = &list{asked: now, containers: containers}
		}
		return nil, err
	})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case r := <-answer:
		return r.Err
	}
}
