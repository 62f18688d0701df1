package witsvid_test

import (
	"context"
	"encoding/json"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	workloadv1 "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// agent is a Workload API that sends what a test gives it.
type agent struct {
	workloadv1.UnimplementedSpiffeWorkloadAPIServer
	svids   chan *workloadv1.WITSVIDResponse
	bundles chan *workloadv1.WITBundlesResponse
	calls   atomic.Int64
}

func (a *agent) FetchWITSVID(_ *workloadv1.WITSVIDRequest, stream grpc.ServerStreamingServer[workloadv1.WITSVIDResponse]) error {
	return send(&a.calls, a.svids, stream)
}

func (a *agent) FetchWITBundles(_ *workloadv1.WITBundlesRequest, stream grpc.ServerStreamingServer[workloadv1.WITBundlesResponse]) error {
	return send(&a.calls, a.bundles, stream)
}

func send[T any](calls *atomic.Int64, from chan *T, stream grpc.ServerStreamingServer[T]) error {
	calls.Add(1)
	if from == nil {
		return status.Error(codes.Unimplemented, "no WIT-SVIDs here")
	}
	for {
		select {
		case m := <-from:
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

// serve starts it and returns its address.
func (a *agent) serve(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "w.sock")
	l := must(net.Listen("unix", socket))
	g := grpc.NewServer()
	workloadv1.RegisterSpiffeWorkloadAPIServer(g, a)
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-served })
	return "unix://" + socket
}

// message is a WIT-SVID as an agent sends it: the key is a private JWK.
func message(id spiffeid.ID, hint string) *workloadv1.WITSVID {
	return &workloadv1.WITSVID{
		SpiffeId: id.String(), Hint: hint,
		WitSvid: good(func(m map[string]any) {
			m["sub"], m["exp"] = id.String(), time.Now().Add(time.Hour).Unix()
		}),
		WitSvidKey: string(must(json.Marshal(jose.JSONWebKey{Key: p256, Algorithm: "ES256"}))),
	}
}

func keySet() string {
	return string(must(json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: authority.Public(), KeyID: "Key"}}})))
}

func TestWITSVID_W44_W45_AClientUsesWhatTheLastMessageHasAndNothingElse(t *testing.T) {
	a := &agent{svids: make(chan *workloadv1.WITSVIDResponse, 1), bundles: make(chan *workloadv1.WITBundlesResponse, 1)}
	db := spiffeid.RequireFromPath(td, "/db")
	a.svids <- &workloadv1.WITSVIDResponse{Svids: []*workloadv1.WITSVID{message(web, "one"), message(db, "one")}}
	a.bundles <- &workloadv1.WITBundlesResponse{Bundles: map[string]string{"spiffe://example.org": keySet(), "spiffe://other.org": keySet()}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	source, err := workloadapi.NewWITSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(a.serve(t))))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if _, err := source.GetWITSVIDForID(db); err == nil {
		t.Error("of two with one hint, the second is used")
	}

	s := service(t, source)
	c := client(s, source)
	if status, body := get(t, c, s.URL); status != 200 {
		t.Errorf("status %d: %s", status, body)
	}
	a.bundles <- &workloadv1.WITBundlesResponse{Bundles: map[string]string{"spiffe://other.org": keySet()}}
	updated(ctx, t, source)
	if status, body := get(t, c, s.URL); status != 400 || !strings.Contains(body, `no bundle for trust domain "example.org"`) {
		t.Errorf("the bundle is gone: status %d: %s", status, body)
	}
	a.svids <- &workloadv1.WITSVIDResponse{Svids: []*workloadv1.WITSVID{message(db, "one")}}
	updated(ctx, t, source)
	if status, body := get(t, c, s.URL); status != 0 || !strings.Contains(body, "no WIT-SVID found") {
		t.Errorf("the SVID is gone: status %d: %s", status, body)
	}
}

func updated(ctx context.Context, t *testing.T, source *workloadapi.WITSource) {
	t.Helper()
	if err := source.WaitUntilUpdated(ctx); err != nil {
		t.Fatal(err)
	}
}

func TestWITSVID_W42_AClientOfAnAgentWithoutWITSVIDsDoesNotComeAgain(t *testing.T) {
	a := &agent{}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	began := time.Now()
	if _, err := workloadapi.NewWITSource(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(a.serve(t)))); status.Code(err) != codes.Unimplemented {
		t.Errorf("error is %v", err)
	}
	if n := a.calls.Load(); n > 2 || time.Since(began) > 30*time.Second {
		t.Errorf("%d calls in %v", n, time.Since(began))
	}
}
