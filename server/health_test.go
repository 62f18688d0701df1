package server_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server"
	"github.com/hallmark-id/hallmark/test/harness"
)

func get(t testing.TB, url string) (code int, body string) {
	t.Helper()
	resp, err := http.Get(url)
	must(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(t, err)
	return resp.StatusCode, string(b)
}

func TestAServerCountsWhatItDoesAndSaysThatItIsReady(t *testing.T) {
	address := harness.FreeAddress(t)
	dir := newDir(t)
	src := configure(dir)
	src.Data = append(src.Data, "telemetry: {listen: '"+address+"'}\n"...)
	r := startWith(t, dir, src)
	if code, body := get(t, "http://"+address+"/ready"); code != 200 {
		t.Errorf("/ready: %d %s", code, body)
	}
	r.mint()
	r.create("/counted")
	if _, err := hallmarkv1.NewAdminServiceClient(r.conn).GetServer(t.Context(), &hallmarkv1.GetServerRequest{}); err != nil {
		t.Error(err)
	}
	if err := r.conn.Invoke(t.Context(), "/no.such/Method", &hallmarkv1.GetServerRequest{}, &hallmarkv1.GetServerResponse{}); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
	_, body := get(t, "http://"+address+"/metrics")
	for _, line := range []string{
		`hallmark_server_issued_total{kind="x509",reason="mint"} 1`,
		`hallmark_server_issued_total{kind="jwt",reason="workload"} 0`,
		`hallmark_server_grpc_calls_total{code="OK",method="/spire.api.server.svid.v1.SVID/MintX509SVID"} 1`,
		`hallmark_server_grpc_call_duration_seconds_count{method="/spire.api.server.entry.v1.Entry/BatchCreateEntry"} 1`,
		`hallmark_server_refusals_total{code="PermissionDenied",method="unknown"} 1`,
		`hallmark_server_entries 1`,
		`hallmark_server_nodes 0`,
		`hallmark_server_agents_connected 0`,
		`hallmark_server_agents_behind 0`,
	} {
		if !strings.Contains(body, line+"\n") {
			t.Errorf("missing: %s", line)
		}
	}
	for _, name := range []string{"hallmark_server_revision", "hallmark_server_store_transactions_total",
		"hallmark_server_store_commit_duration_seconds_count", `hallmark_server_authority_expiry_timestamp_seconds{kind="x509"}`,
		`hallmark_server_authority_expiry_timestamp_seconds{kind="jwt"}`} {
		if !strings.Contains(body, "\n"+name+" ") || strings.Contains(body, "\n"+name+" 0\n") {
			t.Errorf("missing or 0: %s", name)
		}
	}
	if strings.Contains(body, "/no.such/Method") {
		t.Error("a caller can make up labels")
	}
	must(t, r.stop())
	if _, err := http.Get("http://" + address + "/live"); err == nil {
		t.Error("metrics are served by a server that has stopped")
	}
}

func TestProfilesAreForThisMachineOnly(t *testing.T) {
	src := configure(newDir(t))
	src.Data = append(src.Data, "telemetry:\n  listen: 0.0.0.0:9988\n  pprof: true\n"...)
	err := server.Check(src)
	if err == nil || !strings.Contains(err.Error(), "loopback") || !strings.Contains(err.Error(), ":8:") {
		t.Error(err)
	}
}
