package credential

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// execVersions are those of client.authentication.k8s.io whose ExecCredential has
// the same status.
var execVersions = []string{"client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"}

// maxExecInfo bounds KUBERNETES_EXEC_INFO, in bytes: it may have a cluster's
// authorities in it.
const maxExecInfo = 1 << 20

// ExecVersion returns the version of the ExecCredential that kubectl, or another
// client, asks for in KUBERNETES_EXEC_INFO. Empty is v1.
func ExecVersion(info string) (string, error) {
	if info == "" {
		return execVersions[0], nil
	}
	var asked struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	switch err := json.Unmarshal([]byte(info), &asked); {
	case len(info) > maxExecInfo:
		return "", fmt.Errorf("KUBERNETES_EXEC_INFO is %d bytes long; the most is %d", len(info), maxExecInfo)
	case err != nil || asked.Kind != "ExecCredential":
		return "", errors.New("KUBERNETES_EXEC_INFO is no ExecCredential; it is for clients of Kubernetes to set")
	case !slices.Contains(execVersions, asked.APIVersion):
		return "", fmt.Errorf("KUBERNETES_EXEC_INFO has version %.100q; set apiVersion of exec in the kubeconfig to %s", asked.APIVersion, execVersions[0])
	}
	return asked.APIVersion, nil
}

// ExecCredential returns what a client of Kubernetes reads of the plugin that it
// runs: "Client authentication (v1)" of the Kubernetes reference.
func ExecCredential(version string, t Token) ([]byte, error) {
	type status struct {
		ExpirationTimestamp string `json:"expirationTimestamp"`
		Token               string `json:"token"`
	}
	return jsonLine(struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Status     status `json:"status"`
	}{version, "ExecCredential", status{t.ExpiresAt.UTC().Format(time.RFC3339), t.Text}})
}
