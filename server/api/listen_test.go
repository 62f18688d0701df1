package api_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	grpcstatus "google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server/api"
)

// serves fails the test unless both listeners answer.
func (w *world) serves() {
	w.t.Helper()
	_, err := bundlev1.NewBundleClient(w.connect(nil)).GetBundle(w.t.Context(), &bundlev1.GetBundleRequest{})
	must(w.t, err)
	_, err = entryv1.NewEntryClient(w.admin()).CountEntries(w.t.Context(), &entryv1.CountEntriesRequest{})
	must(w.t, err)
}

func TestTLSIsOfVersion13AndNothingElse(t *testing.T) {
	w := newWorld(t)
	for version, want := range map[uint16]bool{tls.VersionTLS11: false, tls.VersionTLS12: false, tls.VersionTLS13: true} {
		c := w.tlsConfig(nil)
		c.MinVersion, c.MaxVersion, c.NextProtos = version, version, []string{"h2"}
		conn, err := tls.Dial("tcp", w.address, c)
		if (err == nil) != want {
			t.Errorf("version %x: %v", version, err)
		}
		if err == nil {
			conn.Close()
		}
	}
}

func TestTheAdminSocketIsForItsOwnerAlone(t *testing.T) {
	w := newWorld(t)
	info, err := os.Stat(w.socket)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("its mode is %v", info.Mode())
	}
}

func TestAnOversizedRequestIsRefusedOnBothListeners(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	huge := &types.Entry{Hint: strings.Repeat("x", 5<<20)}
	for name, conn := range map[string]*grpc.ClientConn{
		"admin socket": w.admin(),
		"TCP":          w.connect(w.workload(agent, "/admin", func(e *types.Entry) { e.Admin = true })),
	} {
		_, err := entryv1.NewEntryClient(conn).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{huge}})
		if grpcstatus.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: %v", name, err)
		}
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x", strings.Repeat("x", 64<<10))
		if _, err := entryv1.NewEntryClient(conn).CountEntries(ctx, &entryv1.CountEntriesRequest{}); err == nil {
			t.Errorf("%s: 64 KiB of metadata were accepted", name)
		}
	}
	w.serves()
}

func TestAMalformedRequestIsRefusedOnBothListeners(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	for name, conn := range map[string]*grpc.ClientConn{
		"admin socket": w.admin(),
		"TCP":          w.connect(w.workload(agent, "/admin", func(e *types.Entry) { e.Admin = true })),
	} {
		err := conn.Invoke(t.Context(), entryv1.Entry_CountEntries_FullMethodName, []byte{0xff, 0xff, 0xff}, &entryv1.CountEntriesResponse{}, grpc.ForceCodec(rawCodec{}))
		if err == nil {
			t.Errorf("%s accepted it", name)
		}
	}
	for _, dial := range []func() (net.Conn, error){
		func() (net.Conn, error) { return net.Dial("unix", w.socket) },
		func() (net.Conn, error) { return net.Dial("tcp", w.address) },
		func() (net.Conn, error) {
			c := w.tlsConfig(nil)
			c.NextProtos = []string{"h2"}
			return tls.Dial("tcp", w.address, c)
		},
	} {
		for _, garbage := range []string{"GET / HTTP/1.1\r\n\r\n", "\x16\x03\x01\xff\xff", strings.Repeat("\x00", 1<<16), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x01\x02\x03\x04\x05\x06"} {
			conn, err := dial()
			must(t, err)
			_, _ = io.WriteString(conn, garbage+strings.Repeat("\x00", 64)) // more than any preface
			must(t, conn.SetDeadline(time.Now().Add(20*time.Second)))
			if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the connection stays open after %.20q", garbage)
			}
			conn.Close()
		}
	}
	w.serves()
}

// rawCodec sends bytes as they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)   { return v.([]byte), nil }
func (rawCodec) Unmarshal(_ []byte, _ any) error { return nil }
func (rawCodec) Name() string                    { return "proto" }

func TestOneWithoutAnSVIDMaySendLittle(t *testing.T) {
	w := newWorld(t)
	ask := func(conn *grpc.ClientConn, size int) error {
		return conn.Invoke(t.Context(), bundlev1.Bundle_GetBundle_FullMethodName, unknownField(size), &types.Bundle{}, grpc.ForceCodec(rawCodec{}))
	}
	agent := w.connect(w.newAgent())
	for name, conn := range map[string]*grpc.ClientConn{"nothing": w.connect(nil), "a self-signed certificate": w.connect(selfSigned(t, "spiffe://example.org/a"))} {
		must(t, ask(conn, 64<<10))
		if err := ask(conn, 2<<20); grpcstatus.Code(err) != codes.Unavailable {
			t.Errorf("one with %s sent 2 MiB: %v", name, err)
		}
	}
	must(t, ask(agent, 2<<20))
	w.serves()
}

// unknownField is a message of which a receiver knows nothing.
func unknownField(size int) []byte {
	b := []byte{0xfa, 0x3f} // field 1023, bytes
	for n := size; ; n >>= 7 {
		if n < 0x80 {
			b = append(b, byte(n))
			break
		}
		b = append(b, byte(n)|0x80)
	}
	return append(b, make([]byte, size)...)
}

func TestConnectionsBeyondTheLimitAreClosed(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.Connections = 3 })
	c := w.tlsConfig(nil)
	c.NextProtos = []string{"h2"}
	dial := func() (*tls.Conn, error) { return tls.Dial("tcp", w.address, c.Clone()) }
	var open []*tls.Conn
	for range 3 {
		conn, err := dial()
		must(t, err)
		open = append(open, conn)
	}
	if conn, err := dial(); err == nil {
		conn.Close()
		t.Error("a fourth connection was accepted")
	}
	must(t, open[0].Close())
	for deadline := time.Now().Add(10 * time.Second); ; { // until the server has seen it
		conn, err := dial()
		if err == nil {
			conn.Close()
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("there is no room again: %v", err)
		}
	}
	for _, conn := range open[1:] {
		conn.Close()
	}
	if lines := w.log.lines("connection refused: there are too many"); len(lines) == 0 {
		t.Error("the refusal was not logged")
	}
}

func TestAListenerThatCannotBeHadNamesItsSetting(t *testing.T) {
	w := newWorld(t)
	for address, text := range map[string]string{
		w.address:       "listen: " + w.address + " is in use by another process",
		"192.0.2.1:1":   "listen: 192.0.2.1:1 is not an address of this machine",
		"nowhere.test:": "listen: ",
	} {
		_, err := api.ListenTCP(address)
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, want %q", address, err, text)
		}
	}
	if _, err := api.ListenAdmin(w.socket); err == nil || !strings.Contains(err.Error(), "admin_socket: ") {
		t.Errorf("the socket could be had twice: %v", err)
	}
}

func TestWhenTheServerStopsStreamsEndAndRunReturns(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	follow, err := hallmarkv1.NewFeedServiceClient(w.connect(agent)).Follow(t.Context())
	must(t, err)
	must(t, follow.Send(&hallmarkv1.FollowRequest{}))
	_, err = follow.Recv()
	must(t, err)
	sync, err := entryv1.NewEntryClient(w.connect(agent)).SyncAuthorizedEntries(t.Context())
	must(t, err)
	must(t, sync.Send(&entryv1.SyncAuthorizedEntriesRequest{}))
	_, err = sync.Recv()
	must(t, err)
	began := time.Now()
	if err := w.stop(); !errors.Is(err, context.Canceled) {
		t.Errorf("Run returned %v", err)
	}
	if took := time.Since(began); took >= 5*time.Second { // which calls that do not end have
		t.Errorf("it took %v to stop", took)
	}
	_, err = follow.Recv()
	expectCode(t, err, codes.Unavailable, "stopping")
	_, err = sync.Recv()
	expectCode(t, err, codes.Unavailable, "stopping")
}

func TestOpenStreamsEndWhenTheSVIDDoes(t *testing.T) {
	w := newWorld(t)
	agent := w.newAgent()
	w.sleep(time.Until(agent.leaf().NotAfter) - 300*time.Millisecond)
	follow, err := hallmarkv1.NewFeedServiceClient(w.connect(agent)).Follow(t.Context())
	must(t, err)
	must(t, follow.Send(&hallmarkv1.FollowRequest{}))
	sync, err := entryv1.NewEntryClient(w.connect(agent)).SyncAuthorizedEntries(t.Context())
	must(t, err)
	must(t, sync.Send(&entryv1.SyncAuthorizedEntriesRequest{}))
	for err == nil {
		_, err = follow.Recv()
	}
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_EXPIRED)
	for err = nil; err == nil; {
		_, err = sync.Recv()
	}
	expectReason(t, err, types.PermissionDeniedDetails_AGENT_EXPIRED)
}

func TestConnectionsWithoutAnSVIDLeaveRoomForAgents(t *testing.T) {
	w := newWorld(t, func(o *api.Options) { o.Limits.Connections = 24 })
	agent := w.newAgent()
	c := w.tlsConfig(nil)
	c.NextProtos = []string{"h2"}
	for i := range 60 { // those that are gone leave their place, however they went
		conn, err := net.Dial("tcp", w.address)
		must(t, err)
		if secure := tls.Client(conn, c); i%3 != 0 {
			must(t, secure.Handshake())
			if i%3 == 1 {
				must(t, conn.(*net.TCPConn).SetLinger(0))
			}
		}
		must(t, conn.Close())
	}
	for deadline := time.Now().Add(10 * time.Second); ; { // until the server has seen it
		_, err := bundlev1.NewBundleClient(w.connect(nil)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	for range 12 { // the connections of before may be open still
		if _, err := bundlev1.NewBundleClient(w.connect(nil)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
			break
		}
	}
	_, err := bundlev1.NewBundleClient(w.connect(nil)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	expectCode(t, err, codes.Unavailable, "")
	_, err = bundlev1.NewBundleClient(w.connect(agent)).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	must(t, err)
}

func TestCallsOfOneCallerAreLimited(t *testing.T) {
	w := newWorld(t)
	agent, other := w.newAgent(), w.newAgent()
	w.api.SetLimits(api.Limits{CallsPerSecond: 1})
	refused := func(conn *grpc.ClientConn) (n int) {
		var calls sync.WaitGroup
		var refused atomic.Int64
		for range 20 { // two at once, some that wait for their turn, and the rest
			calls.Go(func() {
				if _, err := bundlev1.NewBundleClient(conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{}); err != nil {
					expectCode(t, err, codes.ResourceExhausted, "more than 1 a second")
					refused.Add(1)
				}
			})
		}
		calls.Wait()
		return int(refused.Load())
	}
	if n := refused(w.connect(nil)); n < 10 {
		t.Errorf("%d of 20 calls from one address were refused", n)
	}
	entries := entryv1.NewEntryClient(w.connect(agent))
	for range 2 {
		_, err := entries.GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
		must(t, err)
	}
	// What one agent does is not in the way of another, nor of operators.
	_, err := entryv1.NewEntryClient(w.connect(other)).GetAuthorizedEntries(t.Context(), &entryv1.GetAuthorizedEntriesRequest{})
	must(t, err)
	if n := refused(w.admin()); n != 0 {
		t.Errorf("%d of 20 calls on the admin socket were refused", n)
	}
}
