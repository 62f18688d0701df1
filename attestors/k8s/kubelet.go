package k8s

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"time"

	"github.com/hallmark-id/hallmark/attestors/kube"
)

// Bounds of a question to the kubelet.
const (
	askTime = 4 * time.Second // less than an attestation may take
	// maxAnswer is in bytes. It is read pod by pod, so that this much never is
	// in memory. A pod may have 1.5 MiB; a common one has 10 KiB.
	maxAnswer = 64 << 20
)

// kubelet is the one question that is asked of it.
type kubelet struct {
	client *kube.Client
	config kube.Config
}

// pods returns the containers of all pods, by ID.
func (k *kubelet) pods(ctx context.Context, p parser) (containers map[string]*container, err error) {
	err = k.client.Do(ctx, http.MethodGet, "/pods", nil, maxAnswer, func(r io.Reader) error {
		containers, err = p.parse(r)
		return err
	})
	return containers, k.explain(err)
}

// explain adds to an error what to do about it.
func (k *kubelet) explain(err error) error {
	var refused *kube.StatusError
	var hostname x509.HostnameError
	var authority x509.UnknownAuthorityError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refused) && refused.Code == http.StatusUnauthorized && k.config.Certificate.Empty():
		return fmt.Errorf("%w; it does not accept the token in %s: set its authentication.webhook.enabled, or give the agent a certificate", err, k.config.Token)
	case errors.As(err, &refused) && refused.Code == http.StatusUnauthorized:
		return fmt.Errorf("%w; it does not accept the certificate in %s: is it of an authority in its authentication.x509.clientCAFile?", err, k.config.Certificate)
	case errors.As(err, &refused) && refused.Code == http.StatusForbidden:
		return fmt.Errorf("%w; give the agent's service account the verb get of nodes/pods, or of nodes/proxy before Kubernetes 1.33", err)
	case errors.As(err, &hostname):
		return fmt.Errorf("%w; set node_name to the node's name, or kubelet to a host that the certificate is for", err)
	case errors.As(err, &authority):
		return fmt.Errorf("%w; name its authority by kubelet_ca_path (a kubelet that made its certificate itself has it in /var/lib/kubelet/pki/kubelet.crt)", err)
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w; outside of a pod set kubelet_ca_path and token_path or certificate_path", err)
	}
	return err
}
