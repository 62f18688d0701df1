package k8spsat

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/kube"
)

// maxAnswer bounds what the API server says of one thing, in bytes: it stores
// nothing larger than 1.5 MiB.
const maxAnswer = 4 << 20

// reviewer has the API server verify tokens, and asks it about pod and node.
type reviewer struct {
	client   *kube.Client
	audience []string
}

// tokenReview is authentication.k8s.io/v1, as far as it matters.
type tokenReview struct {
	APIVersion string       `json:"apiVersion"`
	Kind       string       `json:"kind"`
	Spec       reviewSpec   `json:"spec"`
	Status     reviewStatus `json:"status,omitzero"`
}

type reviewSpec struct {
	Token     string   `json:"token"`
	Audiences []string `json:"audiences"`
}

type reviewStatus struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"`
	User          struct {
		Username string              `json:"username"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

const extraPrefix = "authentication.kubernetes.io/"

// extra returns what the API server adds about a user: exactly one value, or
// nothing.
func (s *reviewStatus) extra(name string) string {
	if values := s.User.Extra[extraPrefix+name]; len(values) == 1 {
		return values[0]
	}
	return ""
}

// object is what matters of a pod's or a node's description.
type object struct {
	Metadata struct {
		Name      string            `json:"name"`
		Namespace string            `json:"namespace"`
		UID       string            `json:"uid"`
		Labels    map[string]string `json:"labels"`
	} `json:"metadata"`
	Spec struct {
		NodeName           string `json:"nodeName"`
		ServiceAccountName string `json:"serviceAccountName"`
	} `json:"spec"`
	Status struct {
		Phase  string `json:"phase"`
		HostIP string `json:"hostIP"`
	} `json:"status"`
}

func (r *reviewer) verify(ctx context.Context, token string) (*agent, error) {
	status, err := r.review(ctx, token)
	if err != nil {
		return nil, err
	}
	// An API server that knows nothing of audiences names none.
	if !slices.ContainsFunc(status.Audiences, func(a string) bool { return slices.Contains(r.audience, a) }) {
		return nil, errors.New("token has not the audience that this server expects")
	}
	namespace, account, ok := accountOf(status.User.Username)
	if !ok {
		return nil, fmt.Errorf("token is of %q, which is no service account", attestors.Clip(status.User.Username))
	}
	a := &agent{
		namespace: namespace, account: account,
		podName: status.extra("pod-name"), podUID: status.extra("pod-uid"),
	}
	if a.podName == "" || a.podUID == "" {
		return nil, errors.New("token is not bound to a pod; use a projected service account token")
	}
	pod, err := r.get(ctx, "/api/v1/namespaces/"+url.PathEscape(namespace)+"/pods/"+url.PathEscape(a.podName))
	if err != nil {
		return nil, fmt.Errorf("pod of the token: %w", err)
	}
	bound, boundUID := status.extra("node-name"), status.extra("node-uid")
	switch a.nodeName = pod.Spec.NodeName; {
	case pod.Metadata.UID != a.podUID || pod.Metadata.Name != a.podName || pod.Metadata.Namespace != namespace:
		return nil, errors.New("pod of the token is gone; another one has its name")
	case pod.Spec.ServiceAccountName != account:
		return nil, errors.New("pod of the token runs as another service account")
	case pod.Status.Phase == "Succeeded" || pod.Status.Phase == "Failed":
		return nil, errors.New("pod of the token has ended")
	case a.nodeName == "":
		return nil, errors.New("pod of the token is on no node yet")
	case bound != "" && bound != a.nodeName:
		return nil, errors.New("token is bound to another node than its pod is on")
	}
	node, err := r.get(ctx, "/api/v1/nodes/"+url.PathEscape(a.nodeName))
	if err != nil {
		return nil, fmt.Errorf("node of the token's pod: %w", err)
	}
	switch a.nodeUID = node.Metadata.UID; {
	case node.Metadata.Name != a.nodeName || a.nodeUID == "":
		return nil, unavailable{fmt.Errorf("the API server described the node %q as another one, or without its UID", a.nodeName)}
	case boundUID != "" && boundUID != a.nodeUID:
		return nil, errors.New("node that the token is bound to is gone; another one has its name")
	}
	a.nodeIP, a.podLabels, a.nodeLabels = pod.Status.HostIP, pod.Metadata.Labels, node.Metadata.Labels
	return a, nil
}

// review has a token verified.
func (r *reviewer) review(ctx context.Context, token string) (*reviewStatus, error) {
	body, err := json.Marshal(tokenReview{
		APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview",
		Spec: reviewSpec{Token: token, Audiences: r.audience},
	})
	if err != nil {
		return nil, err
	}
	var reviewed tokenReview
	if err := r.client.Do(ctx, http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", body, maxAnswer, into(&reviewed)); err != nil {
		return nil, unavailable{fmt.Errorf("have the API server review a token: %w", err)}
	}
	if reviewed.Kind != "TokenReview" {
		return nil, unavailable{fmt.Errorf("the API server answered with %q, not with a TokenReview", attestors.Clip(reviewed.Kind))}
	}
	if !reviewed.Status.Authenticated {
		// Its own reason would tell a stranger about the cluster.
		return nil, errors.New("token is not one of the cluster's for this server, or has ended, or its pod is gone")
	}
	return &reviewed.Status, nil
}

// get describes a pod or a node.
func (r *reviewer) get(ctx context.Context, path string) (*object, error) {
	var o object
	err := r.client.Do(ctx, http.MethodGet, path, nil, maxAnswer, into(&o))
	var refused *kube.StatusError
	if errors.As(err, &refused) && refused.Code == http.StatusNotFound {
		return nil, errors.New("it is gone")
	}
	if err != nil {
		return nil, unavailable{fmt.Errorf("get %s of the API server: %w", path, err)}
	}
	return &o, nil
}

// into reads one JSON value.
func into(value any) func(io.Reader) error {
	return func(r io.Reader) error {
		data, err := io.ReadAll(r)
		if err != nil {
			return err
		}
		return json.Unmarshal(data, value)
	}
}
