package agent_test

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/test/harness"
)

// watch lets an agent serve its telemetry, and returns the URL of that.
func watch(t *testing.T, src config.Source) (config.Source, string) {
	t.Helper()
	address := harness.FreeAddress(t)
	src.Data = append(src.Data, "telemetry: {listen: '"+address+"'}\n"...)
	return src, "http://" + address
}

func get(t *testing.T, url string) (code int, body string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestAnAgentCountsWhatItDoesAndSaysThatItIsReady(t *testing.T) {
	w := newWorld(t)
	src, url := watch(t, w.source(t))
	run(t, src)
	if _, err := workloadapi.FetchX509SVIDs(t.Context(), workloadapi.WithAddr("unix://"+w.socket())); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute) // the SVID may be there an instant before
	for code, body := get(t, url+"/ready"); code != 200; code, body = get(t, url+"/ready") {
		if time.Now().After(deadline) {
			t.Fatalf("/ready: %d %s", code, body)
		}
	}
	_, body := get(t, url+"/metrics")
	for _, line := range []string{
		`hallmark_agent_in_step 1`,
		`hallmark_agent_revision 5`,
		`hallmark_agent_entries 1`,
		`hallmark_agent_svids 1`,
		`hallmark_agent_drifts_total 0`,
		`hallmark_agent_signed_total{kind="x509"} 1`,
		`hallmark_agent_signed_total{kind="jwt"} 0`,
		`hallmark_agent_attestation_duration_seconds_count{attestor="unix"} 1`,
		`hallmark_agent_attestation_failures_total{attestor="unix"} 0`,
	} {
		if !strings.Contains(body, line+"\n") {
			t.Errorf("missing: %s", line)
		}
	}
	for _, name := range []string{"hallmark_agent_next_expiry_timestamp_seconds", "hallmark_agent_node_expiry_timestamp_seconds",
		"hallmark_agent_workload_streams", "hallmark_agent_signing_failures_total"} {
		if !strings.Contains(body, "\n"+name) {
			t.Errorf("missing: %s", name)
		}
	}
}

func TestAnAgentWithoutItsServerSaysWhyItIsNotReady(t *testing.T) {
	w := newWorld(t)
	src := w.source(t)
	src, url := watch(t, src)
	src.Set = append(src.Set, config.Setting{Path: "server", Value: "127.0.0.1:1", From: "a test"})
	run(t, src)
	code, body := get(t, url+"/ready")
	if code != http.StatusServiceUnavailable || !strings.Contains(body, `"ready":false`) || !strings.Contains(body, "not in step with the server") {
		t.Errorf("/ready: %d %s", code, body)
	}
	if code, body := get(t, url+"/live"); code != 200 {
		t.Errorf("/live: %d %s", code, body)
	}
	if _, body := get(t, url+"/metrics"); !strings.Contains(body, "hallmark_agent_in_step 0\n") {
		t.Error("the metrics do not say that the agent is not in step")
	}
}

func TestAnAgentServesProfilesOnLoopbackOnly(t *testing.T) {
	w := newWorld(t)
	src := w.source(t)
	src.Data = append(src.Data, "telemetry: {listen: ':9988', pprof: true}\n"...)
	if err := agent.Check(src); err == nil || !strings.Contains(err.Error(), "loopback") {
		t.Error(err)
	}
}
