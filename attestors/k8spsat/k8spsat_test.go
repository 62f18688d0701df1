package k8spsat_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/k8spsat"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// token is one of an agent's pod, good for ten minutes.
func token() harness.ServiceToken {
	return harness.ServiceToken{
		Namespace: "hallmark", Account: "agent", Pod: "agent-v5wgr", PodUID: "pod-uid", Node: "node-7", NodeUID: "node-uid",
		Audience: []string{"hallmark-server"}, Expires: time.Now().Add(10 * time.Minute),
	}
}

// pod is that of the token.
func pod() harness.Pod {
	return harness.Pod{
		Namespace: "hallmark", Name: "agent-v5wgr", UID: "pod-uid", Node: "node-7", Account: "agent",
		Labels: map[string]string{"tier": "system", "secret": "x"},
	}
}

// cluster starts an API server with the token's pod and its node.
func cluster(t testing.TB) *harness.APIServer {
	t.Helper()
	s := harness.NewAPIServer(t)
	s.SetPod(pod())
	s.SetNode("node-7", "node-uid", map[string]string{"zone": "eu-1a", "other": "x"})
	return s
}

// reviewing is the configuration of a cluster whose API server reviews tokens.
func reviewing(s *harness.APIServer) k8spsat.ClusterConfig {
	return k8spsat.ClusterConfig{
		Name: "production", ServiceAccountAllowList: []string{"hallmark:agent"}, KubeconfigPath: s.Kubeconfig,
		AllowedNodeLabelKeys: []string{"zone"}, AllowedPodLabelKeys: []string{"tier"},
	}
}

// offline is that of a cluster whose keys verify tokens.
func offline(s *harness.APIServer) k8spsat.ClusterConfig {
	return k8spsat.ClusterConfig{
		Name: "production", ServiceAccountAllowList: []string{"hallmark:agent"}, JWKSPath: s.JWKS, Issuer: s.Issuer,
	}
}

func server(t testing.TB, clusters ...k8spsat.ClusterConfig) *k8spsat.Server {
	t.Helper()
	s, err := k8spsat.New(k8spsat.ServerConfig{Clusters: clusters}, k8spsat.Options{})
	must(t, err)
	return s
}

func payload(t testing.TB, cluster, token string) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]string{"cluster": cluster, "token": token})
	must(t, err)
	return b
}

// verify has a server verify a payload, without a challenge.
func verify(t testing.TB, s *k8spsat.Server, payload []byte) (*attestors.Evidence, error) {
	t.Helper()
	return s.Verify(t.Context(), payload, func(context.Context, []byte) ([]byte, error) {
		t.Error("the node is challenged")
		return nil, context.Canceled
	})
}

func TestANodeIsTheOneThatTheAgentsPodIsOn(t *testing.T) {
	s := cluster(t)
	path := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(path, []byte(s.Mint(t, token())+"\n"), 0o600))
	agent, err := k8spsat.NewAgent(k8spsat.AgentConfig{Cluster: "production", TokenPath: path})
	must(t, err)

	known := []string{
		"k8s_psat:agent_node_name:node-7", "k8s_psat:agent_node_uid:node-uid", "k8s_psat:agent_ns:hallmark",
		"k8s_psat:agent_pod_name:agent-v5wgr", "k8s_psat:agent_pod_uid:pod-uid", "k8s_psat:agent_sa:agent", "k8s_psat:cluster:production",
	}
	asked := []string{"k8s_psat:agent_node_ip:10.0.0.7", "k8s_psat:agent_node_label:zone:eu-1a", "k8s_psat:agent_pod_label:tier:system"}
	for name, c := range map[string]struct {
		config k8spsat.ClusterConfig
		want   []string
	}{
		"by the API server":     {reviewing(s), append(asked, known...)},
		"by the cluster's keys": {offline(s), known},
	} {
		t.Run(name, func(t *testing.T) {
			proof, err := agent.Proof(t.Context())
			must(t, err)
			e, err := verify(t, server(t, c.config), proof)
			must(t, err)
			if e.Path != "k8s_psat/production/node-uid" || !e.CanReattest {
				t.Errorf("got %+v", e)
			}
			slices.Sort(c.want)
			if got := selector.NewSet(e.Selectors...).Strings(); !slices.Equal(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

func TestEachClusterSpeaksForItsOwnNodes(t *testing.T) {
	one, two := cluster(t), cluster(t)
	second := reviewing(two)
	second.Name = "staging"
	third := offline(two)
	third.Name = "staging-offline"
	s := server(t, reviewing(one), second, third)
	for name, signed := range map[string]string{"production": one.Mint(t, token()), "staging": two.Mint(t, token()), "staging-offline": two.Mint(t, token())} {
		e, err := verify(t, s, payload(t, name, signed))
		must(t, err)
		if e.Path != "k8s_psat/"+name+"/node-uid" {
			t.Errorf("%s: got %s", name, e.Path)
		}
	}
	for name, signed := range map[string]string{"production": two.Mint(t, token()), "staging": one.Mint(t, token()), "staging-offline": one.Mint(t, token()), "nowhere": one.Mint(t, token())} {
		if e, err := verify(t, s, payload(t, name, signed)); err == nil {
			t.Errorf("%s: a token of another cluster makes %s", name, e.Path)
		}
	}
}

// As SPIRE's API servers do that are older than 1.30: the token names no node.
func TestATokenThatDoesNotNameItsNodeIsAQuestionForTheAPIServer(t *testing.T) {
	s := cluster(t)
	old := token()
	old.Node, old.NodeUID = "", ""
	e, err := verify(t, server(t, reviewing(s)), payload(t, "production", s.Mint(t, old)))
	must(t, err)
	if e.Path != "k8s_psat/production/node-uid" {
		t.Errorf("got %s", e.Path)
	}
	if _, err := verify(t, server(t, offline(s)), payload(t, "production", s.Mint(t, old))); err == nil || !strings.Contains(err.Error(), "does not name its pod's node") {
		t.Errorf("got %v", err)
	}
}

func TestTheAgentReadsTheTokenAnewAndSaysWhatIsMissing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	agent, err := k8spsat.NewAgent(k8spsat.AgentConfig{Cluster: "production", TokenPath: path})
	must(t, err)
	if _, err := agent.Proof(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "mount a projected service account token") {
		t.Errorf("got %v", err)
	}
	for _, text := range []string{"first", "second"} {
		must(t, os.WriteFile(path, []byte(text+"\n"), 0o600))
		proof, err := agent.Proof(t.Context())
		must(t, err)
		if string(proof) != `{"cluster":"production","token":"`+text+`"}` {
			t.Errorf("got %s", proof)
		}
	}
	if _, err := agent.Respond(t.Context(), []byte("{}")); err == nil {
		t.Error("a challenge is answered")
	}
}

func TestKeysAreThoseInTheFileNow(t *testing.T) {
	before, after := cluster(t), cluster(t)
	s := server(t, offline(before))
	if _, err := verify(t, s, payload(t, "production", after.Mint(t, token()))); err == nil {
		t.Fatal("attested by another cluster's key")
	}
	rotated, err := os.ReadFile(after.JWKS)
	must(t, err)
	must(t, os.WriteFile(before.JWKS, rotated, 0o600))
	_, err = verify(t, s, payload(t, "production", after.Mint(t, token())))
	must(t, err)
	if _, err := verify(t, s, payload(t, "production", before.Mint(t, token()))); err == nil {
		t.Error("attested by a key that is gone")
	}
	must(t, os.WriteFile(before.JWKS, rotated[:20], 0o600))
	if _, err := verify(t, s, payload(t, "production", after.Mint(t, token()))); !errors.Is(err, attestors.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
