package test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/telemetry/tracetest"
	"github.com/hallmark-id/hallmark/test/harness"
)

// TestOneTraceSpansAgentAndServer: a workload's call, its attestation, the call
// of the server and the signature there are one trace, for X.509 and for JWT.
// No span of any call, the node's joining among them, has a secret in it.
func TestOneTraceSpansAgentAndServer(t *testing.T) {
	t.Parallel()
	collector := tracetest.NewCollector(t)
	traces := fmt.Sprintf("telemetry: {traces: {endpoint: %q, ratio: 1}}\n", collector.Endpoint)
	d := harness.NewDomain(t, harness.Settings{Server: traces, Agent: traces})
	d.StartServer(t)
	join := d.Join(t)
	d.StartAgent(t, join)
	d.Entry(t, "/late", callerUID, "--no-prefetch") // so that its first SVID is signed when it asks
	fetch := func(args ...string) string {
		return harness.Command{Args: append([]string{"fetch"}, append(args, "--socket", d.Socket)...), UID: callerUID}.Run(t)
	}
	if out := fetch("x509"); !strings.Contains(out, "spiffe://example.org/late") {
		t.Fatalf("fetch x509 printed:\n%s", out)
	}
	token := strings.TrimSpace(fetch("jwt", "--audience", "test"))

	for name, chain := range map[string][]string{
		"X.509": {
			"hallmark-agent: FetchX509SVID until its first answer", "hallmark-agent: attest a process",
			"hallmark-agent: sign X509-SVIDs", "hallmark-agent: spire.api.server.svid.v1.SVID/BatchNewX509SVID",
			"hallmark-server: spire.api.server.svid.v1.SVID/BatchNewX509SVID", "hallmark-server: sign X.509",
		},
		"JWT": {
			"hallmark-agent: SpiffeWorkloadAPI/FetchJWTSVID", "hallmark-agent: attest a process",
			"hallmark-agent: sign a JWT-SVID", "hallmark-agent: spire.api.server.svid.v1.SVID/NewJWTSVID",
			"hallmark-server: spire.api.server.svid.v1.SVID/NewJWTSVID", "hallmark-server: sign JWT",
		},
	} {
		t.Run(name, func(t *testing.T) {
			collector.Wait(t, func(spans []tracetest.Span) bool {
				traces := map[string]map[string]bool{}
				for _, s := range spans {
					if traces[s.Trace()] == nil {
						traces[s.Trace()] = map[string]bool{}
					}
					traces[s.Trace()][s.Service+": "+s.Name] = true
				}
			next:
				for _, has := range traces {
					for _, name := range chain {
						if !has[name] {
							continue next
						}
					}
					return true
				}
				return false
			})
		})
	}

	spans := collector.Wait(t, func(spans []tracetest.Span) bool {
		return has(spans, "spire.api.server.agent.v1.Agent/AttestAgent") && has(spans, "spire.api.server.agent.v1.Agent/CreateJoinToken") &&
			has(spans, "store commit") && has(spans, "attest join_token")
	})
	secrets := map[string]string{"the join string": join, "the JWT-SVID": token, "a request for a certificate": "CERTIFICATE"}
	for _, s := range spans {
		for what, secret := range secrets {
			if strings.Contains(s.String(), secret) {
				t.Errorf("span %q has %s in it: %v", s.Name, what, s)
			}
		}
	}
}

func has(spans []tracetest.Span, name string) bool {
	for _, s := range spans {
		if s.Name == name {
			return true
		}
	}
	return false
}
