package api_test

import (
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	debugv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/debug/v1"
	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/hallmark-id/hallmark/pkg/loglevel"
	"github.com/hallmark-id/hallmark/server/api"
)

func TestDebugInfoCountsWhatTheServerHas(t *testing.T) {
	w := newWorld(t)
	client := debugv1.NewDebugClient(w.admin())
	agent := w.newAgent()
	w.newAgent()
	before, err := client.GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	must(t, err)
	w.create(agent, "/web")
	own := w.registry.View().Bundle(td).X509Authorities[0].Certificate
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	foreign, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	set, err := bundlev1.NewBundleClient(w.admin()).BatchSetFederatedBundle(t.Context(), &bundlev1.BatchSetFederatedBundleRequest{
		Bundle: []*types.Bundle{{TrustDomain: "other.org", X509Authorities: []*types.X509Certificate{{Asn1: foreign}}}},
	})
	must(t, err)
	if set.Results[0].Status.Code != 0 {
		t.Fatal(set.Results[0].Status)
	}
	w.sleep(90 * time.Second)
	info, err := client.GetInfo(t.Context(), &debugv1.GetInfoRequest{})
	must(t, err)
	count, err := agentv1.NewAgentClient(w.admin()).CountAgents(t.Context(), &agentv1.CountAgentsRequest{})
	must(t, err)
	if info.AgentsCount != 2 || count.Count != 2 || info.EntriesCount != before.EntriesCount+1 ||
		before.FederatedBundlesCount != 0 || info.FederatedBundlesCount != 1 || info.Uptime < 90 || info.Uptime > 120 {
		t.Errorf("before %v\nafter %v", before, info)
	}
	if len(info.SvidChain) != 2 {
		t.Fatalf("the chain is %v", info.SvidChain)
	}
	leaf, ca := info.SvidChain[0], info.SvidChain[1]
	if leaf.Id.Path != "/spire/server" || leaf.Id.TrustDomain != td.Name() || leaf.ExpiresAt <= w.now().Unix() {
		t.Errorf("leaf is %v", leaf)
	}
	if ca.Id.GetTrustDomain() != td.Name() || ca.Id.GetPath() != "" || ca.ExpiresAt != own.NotAfter.Unix() || ca.Subject != own.Subject.String() {
		t.Errorf("authority is %v", ca)
	}
}

func TestTheLogLevelIsSetAndReset(t *testing.T) {
	level := loglevel.New(0)
	w := newWorld(t, func(o *api.Options) { o.LogLevel = level })
	client := loggerv1.NewLoggerClient(w.admin())
	expect := func(got *types.Logger, err error, current types.LogLevel) {
		t.Helper()
		must(t, err)
		if got.CurrentLevel != current || got.LaunchLevel != types.LogLevel_INFO {
			t.Errorf("got %v; the level was to be %v", got, current)
		}
	}
	got, err := client.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
	expect(got, err, types.LogLevel_INFO)
	got, err = client.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_DEBUG})
	expect(got, err, types.LogLevel_DEBUG)
	for _, wrong := range []types.LogLevel{types.LogLevel_UNSPECIFIED, 17} {
		_, err = client.SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: wrong})
		expectCode(t, err, codes.InvalidArgument, "level")
	}
	got, err = client.GetLogger(t.Context(), &loggerv1.GetLoggerRequest{})
	expect(got, err, types.LogLevel_DEBUG)
	got, err = client.ResetLogLevel(t.Context(), &loggerv1.ResetLogLevelRequest{})
	expect(got, err, types.LogLevel_INFO)
	if level.Level() != 0 {
		t.Errorf("the level is %v", level.Level())
	}
	if n := len(w.log.lines("SetLogLevel")); n != 3 {
		t.Errorf("%d audit records of SetLogLevel", n)
	}
}

func TestDebugAndLoggerAreLocalOnly(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	admin := w.workload(agent, "/admin", func(e *types.Entry) { e.Admin = true })
	for name, svid := range map[string]*svid{"agent": agent, "admin": admin, "nobody": nil} {
		conn := w.connect(svid)
		_, err := debugv1.NewDebugClient(conn).GetInfo(t.Context(), &debugv1.GetInfoRequest{})
		if err == nil {
			t.Errorf("%s may ask for debug information", name)
		}
		expectCode(t, err, codes.PermissionDenied, "")
		_, err = loggerv1.NewLoggerClient(conn).SetLogLevel(t.Context(), &loggerv1.SetLogLevelRequest{NewLevel: types.LogLevel_TRACE})
		expectCode(t, err, codes.PermissionDenied, "")
	}
}
