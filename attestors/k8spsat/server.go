package k8spsat

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/kube"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// ServerConfig is the configuration of the half on the server.
type ServerConfig struct {
	// Clusters are those whose nodes may attest. Required.
	Clusters []ClusterConfig `yaml:"clusters"`
}

// ClusterConfig is a cluster whose nodes may attest.
type ClusterConfig struct {
	// Name is what agents call the cluster. It is a part of their SPIFFE IDs.
	// Required.
	Name string `yaml:"name" env:"expand"`
	// ServiceAccountAllowList are the service accounts that agents run as, as
	// NAMESPACE:NAME. Whoever may create pods or tokens of one of these can be
	// any node of the cluster. Required.
	ServiceAccountAllowList []string `yaml:"service_account_allow_list"`
	// Audience are the audiences of which a token must have one. Default:
	// hallmark-server.
	Audience []string `yaml:"audience"`

	// KubeconfigPath is a file as kubectl has it, by whose current context the
	// cluster's API server is reached: it may create tokenreviews and get pods
	// and nodes. Read at the start; the files that it names are read anew.
	// Default: the server runs in a pod of the cluster.
	KubeconfigPath string `yaml:"kubeconfig_path" env:"expand"`

	// JWKSPath is a file of the cluster's public keys, as "kubectl get --raw
	// /openid/v1/jwks" prints them, at most 1 MiB. With it, tokens are verified
	// by them, and no API server is asked: a token is good until it ends, though
	// its pod be gone. The cluster must write nodes into its tokens, as
	// Kubernetes does from 1.32 on. Read for each attestation. Default: none.
	JWKSPath string `yaml:"jwks_path" env:"expand"`
	// Issuer is the issuer of the cluster's tokens, as "kubectl get --raw
	// /.well-known/openid-configuration" prints it. Required with jwks_path.
	Issuer string `yaml:"issuer" env:"expand"`

	// AllowedNodeLabelKeys are the labels of nodes that become selectors. A
	// node's kubelet can change all of its labels but those whose keys begin with
	// node-restriction.kubernetes.io/. Default: none.
	AllowedNodeLabelKeys []string `yaml:"allowed_node_label_keys"`
	// AllowedPodLabelKeys are the labels of agents' pods that become selectors.
	// Default: none.
	AllowedPodLabelKeys []string `yaml:"allowed_pod_label_keys"`
}

const (
	maxClusters = 1000 // more is a mistake in writing
	maxListed   = 100  // of service accounts, audiences and labels

	// verifyTime is how long the verification of a token may take.
	verifyTime = 10 * time.Second
	// maxRunning is how many verifications of one cluster run at once: an API
	// server that is slow is not asked ever more.
	maxRunning = 32
	// logged is how many failures are logged before it is one a second.
	logged = 10
)

// Options of [New].
type Options struct {
	Now func() time.Time // nil is time.Now
	Log *slog.Logger     // nil is silent
}

// Server is the half on the server.
type Server struct {
	log      *slog.Logger
	clusters map[string]*cluster
}

var _ attestors.Server = (*Server)(nil)

type cluster struct {
	name       string
	accounts   []string
	nodeLabels []string
	podLabels  []string
	verifier   verifier
	running    *semaphore.Weighted
	loud       rate.Sometimes // that verification is not possible: any stranger can make it be tried
}

// verifier verifies a token. Its error is told to the node, unless it is an
// [unavailable].
type verifier interface {
	verify(ctx context.Context, token string) (*agent, error)
}

// agent is what a verified token says of an agent's pod and its node.
type agent struct {
	namespace, account string
	podName, podUID    string
	nodeName, nodeUID  string

	nodeIP                string // empty: not known
	podLabels, nodeLabels map[string]string
}

// unavailable is why a token cannot be verified, which is not the node's fault
// and none of its business.
type unavailable struct{ error }

// New makes the server's half. It fails if the configuration contradicts itself
// or if a file of it cannot be read.
func New(c ServerConfig, o Options) (*Server, error) {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch n := len(c.Clusters); {
	case n == 0:
		return nil, errors.New("clusters is missing; name the clusters whose nodes may attest")
	case n > maxClusters:
		return nil, fmt.Errorf("clusters has %d; the most is %d", n, maxClusters)
	}
	s := &Server{log: o.Log, clusters: make(map[string]*cluster)}
	for _, one := range c.Clusters {
		if err := checkCluster(one.Name); err != nil {
			return nil, err
		}
		if s.clusters[one.Name] != nil {
			return nil, fmt.Errorf("cluster %q is there twice", one.Name)
		}
		made, err := newCluster(one, o)
		if err != nil {
			return nil, fmt.Errorf("cluster %q: %w", one.Name, err)
		}
		s.clusters[one.Name] = made
	}
	return s, nil
}

func newCluster(c ClusterConfig, o Options) (*cluster, error) {
	for name, list := range map[string][]string{
		"service_account_allow_list": c.ServiceAccountAllowList, "audience": c.Audience,
		"allowed_node_label_keys": c.AllowedNodeLabelKeys, "allowed_pod_label_keys": c.AllowedPodLabelKeys,
	} {
		if len(list) > maxListed {
			return nil, fmt.Errorf("%s has %d items; the most is %d", name, len(list), maxListed)
		}
		if slices.Contains(list, "") {
			return nil, fmt.Errorf("%s has an empty item", name)
		}
	}
	if len(c.ServiceAccountAllowList) == 0 {
		return nil, errors.New("service_account_allow_list is missing; name the service accounts that agents run as, such as hallmark:agent")
	}
	for _, account := range c.ServiceAccountAllowList {
		if namespace, name, ok := strings.Cut(account, ":"); !ok || namespace == "" || name == "" || strings.Contains(name, ":") {
			return nil, fmt.Errorf("service_account_allow_list has %q; write NAMESPACE:NAME", account)
		}
	}
	audience := c.Audience
	if len(audience) == 0 {
		audience = []string{defaultAudience}
	}
	out := &cluster{
		name: c.Name, accounts: c.ServiceAccountAllowList, nodeLabels: c.AllowedNodeLabelKeys, podLabels: c.AllowedPodLabelKeys,
		running: semaphore.NewWeighted(maxRunning), loud: rate.Sometimes{First: logged, Interval: time.Second},
	}
	switch {
	case c.JWKSPath == "" && c.Issuer != "":
		return nil, errors.New("issuer is for verification by keys; name their file by jwks_path, or remove it")
	case c.JWKSPath == "":
		var reach kube.Config
		var err error
		if c.KubeconfigPath == "" {
			reach, err = kube.InCluster()
		} else {
			reach, err = kube.Kubeconfig(c.KubeconfigPath)
		}
		if err != nil {
			return nil, fmt.Errorf("kubeconfig_path: %w", err)
		}
		out.verifier = &reviewer{client: kube.New(reach), audience: audience}
		return out, nil
	case c.KubeconfigPath != "":
		return nil, errors.New("kubeconfig_path and jwks_path exclude each other; remove one of them")
	case c.Issuer == "":
		return nil, errors.New("issuer is missing; with jwks_path it must be known who issues the tokens")
	case len(c.AllowedNodeLabelKeys) > 0 || len(c.AllowedPodLabelKeys) > 0:
		return nil, errors.New("labels are known to the API server alone; with jwks_path remove allowed_node_label_keys and allowed_pod_label_keys")
	}
	keys := &keys{path: c.JWKSPath, issuer: c.Issuer, audience: audience, now: o.Now}
	if _, err := keys.load(); err != nil {
		return nil, fmt.Errorf("jwks_path: %w", err)
	}
	out.verifier = keys
	return out, nil
}

// Verify checks that the payload's token is of a pod of an agent, and names the
// node that the pod is on.
func (s *Server) Verify(ctx context.Context, payload []byte, _ func(context.Context, []byte) ([]byte, error)) (*attestors.Evidence, error) {
	p, err := parsePayload(payload)
	if err != nil {
		return nil, err
	}
	c := s.clusters[p.Cluster]
	if c == nil {
		return nil, fmt.Errorf("the nodes of cluster %q may not attest here", attestors.Clip(p.Cluster))
	}
	a, err := c.verify(ctx, p.Token)
	if cause := (unavailable{}); errors.As(err, &cause) {
		if ctx.Err() == nil { // the node still waits
			c.loud.Do(func() { s.log.Error("k8s_psat cannot attest nodes now", "cluster", c.name, "error", cause.error) })
		}
		return nil, attestors.ErrUnavailable
	}
	if err != nil {
		return nil, err
	}
	return &attestors.Evidence{
		Path:        Name + "/" + c.name + "/" + a.nodeUID,
		Selectors:   c.selectors(a),
		CanReattest: true,
	}, nil
}

func (c *cluster) verify(ctx context.Context, token string) (*agent, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyTime)
	defer cancel()
	if err := c.running.Acquire(ctx, 1); err != nil {
		return nil, unavailable{fmt.Errorf("%d earlier attestations are not finished", maxRunning)}
	}
	defer c.running.Release(1)
	a, err := c.verifier.verify(ctx, token)
	if err != nil {
		return nil, err
	}
	if account := a.namespace + ":" + a.account; !slices.Contains(c.accounts, account) {
		return nil, fmt.Errorf("token is of the service account %q, which is none that an agent may run as", attestors.Clip(account))
	}
	for what, name := range map[string]string{"pod's name": a.podName, "pod's UID": a.podUID, "node's name": a.nodeName} {
		if name == "" {
			return nil, fmt.Errorf("the %s is not known", what)
		}
	}
	if err := spiffeid.ValidatePathSegment(a.nodeUID); err != nil {
		return nil, fmt.Errorf("the node's UID is %q, which can be no part of a SPIFFE ID", attestors.Clip(a.nodeUID))
	}
	return a, nil
}

func (c *cluster) selectors(a *agent) []selector.Selector {
	values := []string{
		"cluster:" + c.name,
		"agent_ns:" + a.namespace,
		"agent_sa:" + a.account,
		"agent_pod_name:" + a.podName,
		"agent_pod_uid:" + a.podUID,
		"agent_node_name:" + a.nodeName,
		"agent_node_uid:" + a.nodeUID,
	}
	if a.nodeIP != "" {
		values = append(values, "agent_node_ip:"+a.nodeIP)
	}
	for kind, labels := range map[string]struct {
		allowed []string
		all     map[string]string
	}{"agent_pod_label:": {c.podLabels, a.podLabels}, "agent_node_label:": {c.nodeLabels, a.nodeLabels}} {
		for _, key := range labels.allowed {
			if value, ok := labels.all[key]; ok {
				values = append(values, kind+key+":"+value)
			}
		}
	}
	return attestors.SelectorsOf(Name, values)
}

// accountOf reads the name of a service account as a user of Kubernetes.
func accountOf(user string) (namespace, name string, ok bool) {
	rest, ok := strings.CutPrefix(user, "system:serviceaccount:")
	namespace, name, ok2 := strings.Cut(rest, ":")
	return namespace, name, ok && ok2 && namespace != "" && name != "" && !strings.Contains(name, ":")
}
