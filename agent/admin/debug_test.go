package admin_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"net/url"
	"testing"
	"time"

	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/agent/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/admin"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
)

func TestDebugInfoSaysWhatTheAgentHolds(t *testing.T) {
	a := start(t)
	client := debugv1.NewDebugClient(a.conn)
	info, err := client.GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	must(t, err)
	if len(info.SvidChain) != 0 || info.LastSyncSuccess != 0 || info.CachedX509SvidsCount != 0 || info.CachedJwtSvidsCount != 0 {
		t.Errorf("before it is attested: %v", info)
	}
	a.Entry("web", nil, "unix:uid:1")
	a.settle(t, "unix:uid:1")
	_, err = a.held.JWT(t.Context(), a.held.Match(heldtest.Selectors("unix:uid:1"))[0], []string{"db"})
	must(t, err)
	synced := time.Now().Add(-time.Minute)
	end := time.Now().Add(time.Hour)
	a.connection = admin.Connection{SyncedAt: synced, Chain: []*x509.Certificate{{
		URIs: []*url.URL{heldtest.Node.URL()}, NotAfter: end, Subject: pkix.Name{CommonName: "node"},
	}}}
	info, err = client.GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	must(t, err)
	if info.LastSyncSuccess != synced.Unix() || info.CachedX509SvidsCount != 1 || info.CachedJwtSvidsCount != 1 ||
		info.CachedSvidstoreX509SvidsCount != 0 || info.Uptime < 0 || info.Uptime > 60 {
		t.Errorf("got %v", info)
	}
	if len(info.SvidChain) != 1 || info.SvidChain[0].Id.Path != heldtest.Node.Path() ||
		info.SvidChain[0].ExpiresAt != end.Unix() || info.SvidChain[0].Subject != "CN=node" {
		t.Errorf("the chain is %v", info.SvidChain)
	}
}

func TestTheLogLevelIsSetAndReset(t *testing.T) {
	a := start(t)
	client := loggerv1.NewLoggerClient(a.conn)
	got, err := client.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_TRACE})
	must(t, err)
	if got.CurrentLevel != types.LogLevel_TRACE || got.LaunchLevel != types.LogLevel_INFO {
		t.Errorf("after it was set: %v", got)
	}
	for _, wrong := range []types.LogLevel{types.LogLevel_UNSPECIFIED, 8} {
		if _, err := client.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: wrong}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("level %d: %v", wrong, err)
		}
	}
	if got, err = client.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{}); err != nil || got.CurrentLevel != types.LogLevel_TRACE {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err = client.ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{}); err != nil || got.CurrentLevel != types.LogLevel_INFO {
		t.Errorf("after the reset: %v, %v", got, err)
	}
}
