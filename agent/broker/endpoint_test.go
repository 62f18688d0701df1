package broker_test

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	brokerpb "github.com/spiffe/go-spiffe/v2/exp/proto/spiffe/broker"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/hallmark-id/hallmark/agent/broker"
	"github.com/hallmark-id/hallmark/agent/endpoint"
	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/held/heldtest"
	"github.com/hallmark-id/hallmark/agent/workloadapi"
	"github.com/hallmark-id/hallmark/pkg/entry"
)

func TestBrokerEndpoint_BE01_TheSocketIsForItsUserAndGroupOnly(t *testing.T) {
	a := start(t)
	info, err := os.Stat(a.path)
	must(t, err)
	if info.Mode().Perm() != 0o660 {
		t.Errorf("mode is %o", info.Mode().Perm())
	}
}

func TestBrokerEndpoint_BE02_BE03_BE06_BE19_BA01_ARealClientOverMutualTLSOnAUnixSocket(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.sync()
	for method, call := range calls(a.api, pidReference(t, pid)) {
		if err := call(a.call()); err != nil {
			t.Errorf("%s: %v", method, err)
		}
	}
	config := tlsconfig.MTLSClientConfig(a.own, a.roots(), tlsconfig.AuthorizeID(agentID))
	config.NextProtos = []string{"h2"}
	secured := tls.Client(a.plain(), config)
	must(t, secured.Handshake())
	if v := secured.ConnectionState().Version; v != tls.VersionTLS13 {
		t.Errorf("TLS version is %x", v)
	}
	config.MaxVersion = tls.VersionTLS12
	if err := tls.Client(a.plain(), config).Handshake(); err == nil {
		t.Error("TLS 1.2 was taken")
	}
}

func TestBrokerEndpoint_BE05_BE22_TheBrokersHeaderIsDemandedOfEveryCall(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.sync()
	all := calls(a.api, pidReference(t, pid))
	all["reflection"] = func(ctx context.Context) error { _, err := reflect(ctx, a.conn, listServices); return err }
	for method, call := range all {
		must(t, call(a.call()))
		wantCode(t, method+" without the header", call(a.bare()), codes.InvalidArgument)
		wantCode(t, method+" with the Workload API's", call(metadata.AppendToOutgoingContext(a.bare(), workloadapi.Header, "true")), codes.InvalidArgument)
		for _, values := range [][]string{{"TRUE"}, {"1"}, {""}, {"false"}, {"false", "true"}, {"true", "true"}, {"true,true"}} {
			ctx := a.bare()
			for _, v := range values {
				ctx = metadata.AppendToOutgoingContext(ctx, broker.Header, v)
			}
			if err := call(ctx); status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s, %q: error is %v", method, values, err)
			}
		}
	}
}

var (
	listServices = &reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}
	describeAPI  = &reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "spiffe.broker.API"},
	}
)

func reflect(ctx context.Context, conn *grpc.ClientConn, r *reflectionpb.ServerReflectionRequest) (*reflectionpb.ServerReflectionResponse, error) {
	s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	_ = s.Send(r) // it fails if the call was refused already; Recv says why
	return s.Recv()
}

func TestBrokerEndpoint_BE18_BE20_BA02_ReflectionTellsTheStandardServiceAlone(t *testing.T) {
	a := start(t)
	m, err := reflect(a.call(), a.conn, listServices)
	must(t, err)
	var names []string
	for _, s := range m.GetListServicesResponse().Service {
		names = append(names, s.Name)
	}
	if want := []string{"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection", "spiffe.broker.API"}; !slices.Equal(names, want) {
		t.Errorf("services are %v", names)
	}
	m, err = reflect(a.call(), a.conn, describeAPI)
	must(t, err)
	var file descriptorpb.FileDescriptorProto
	must(t, proto.Unmarshal(m.GetFileDescriptorResponse().FileDescriptorProto[0], &file))
	if len(file.Service) != 1 || len(file.Service[0].Method) != 4 || file.GetPackage() != "spiffe.broker" {
		t.Errorf("services are %v of package %s", file.Service, file.GetPackage())
	}
	err = a.conn.Invoke(a.call(), "/spiffe.broker.API/FetchWITSVID", &brokerpb.FetchJWTSVIDRequest{}, &brokerpb.FetchJWTSVIDResponse{})
	wantCode(t, "a method that the standard has not", err, codes.Unimplemented)
}

func TestBrokerEndpoint_BE11_BE17_BA20_NobodyButTheListedBrokersMayCall(t *testing.T) {
	other := func(o *broker.Options) {
		o.Policies = []broker.Policy{{Broker: spiffeid.RequireFromPath(heldtest.TrustDomain, "/broker/x")}}
	}
	for name, options := range map[string][]func(*broker.Options){
		"another is listed": {other},
		"none is listed":    {func(o *broker.Options) { o.Policies = nil }},
	} {
		t.Run(name, func(t *testing.T) {
			a := start(t, options...)
			pid, _ := process(t)
			a.Entry("web", nil, pidSelector(pid))
			a.sync()
			all := calls(a.api, pidReference(t, pid))
			all["reflection"] = func(ctx context.Context) error { _, err := reflect(ctx, a.conn, listServices); return err }
			for method, call := range all {
				if s := status.Convert(call(a.call())); s.Code() != codes.PermissionDenied || s.Message() != "no identity issued" {
					t.Errorf("%s: %v", method, s)
				}
			}
			if a.log.count("no broker has this SPIFFE ID") == 0 {
				t.Error("the reason is not in the log")
			}
		})
	}
}

func TestAStolenKeyMakesNoBroker(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.Update(a.entry, func(e *entry.Entry) { e.Selectors = heldtest.Selectors("unix:pid:1") }) // the key's rightful process
	a.Entry("thief", nil, pidSelector(int32(os.Getpid())))
	a.sync()
	conn := a.dial(a.own)
	for method, call := range calls(brokerpb.NewAPIClient(conn), pidReference(t, pid)) {
		wantCode(t, method, call(a.call()), codes.PermissionDenied)
	}
}

func TestBrokerEndpoint_BE15_WhoeverCannotBeIdentifiedDoesNotGetThroughTheHandshake(t *testing.T) {
	a := start(t)
	stranger := heldtest.New(t) // another authority of the same name
	elsewhere := held.New(held.Options{TrustDomain: heldtest.TrustDomain, Signer: stranger})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { defer close(ran); elsewhere.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ran })
	stranger.Entry("broker", nil, "unix:uid:1")
	elsewhere.Apply(stranger.Complete())
	forged := (&agent{held: elsewhere, t: t}).svid("unix:uid:1")
	authorized := tlsconfig.AuthorizeID(agentID)
	for name, creds := range map[string]credentials.TransportCredentials{
		"without TLS":                  insecure.NewCredentials(),
		"without a certificate":        credentials.NewTLS(tlsconfig.TLSClientConfig(a.roots(), authorized)),
		"with another authority's one": credentials.NewTLS(tlsconfig.MTLSClientConfig(forged, a.roots(), authorized)),
	} {
		err := first(brokerpb.NewAPIClient(a.dialWith(creds)).SubscribeToX509SVID(a.call(), &brokerpb.SubscribeToX509SVIDRequest{}))
		wantCode(t, name, err, codes.Unavailable)
	}
}

func TestBrokerEndpoint_BE23_TheAgentsCertificateIsRenewedUnderOpenStreams(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	web := a.Entry("web", nil, pidSelector(pid))
	a.sync()
	s := a.follow(pid)
	recv(t, s)
	before := a.identity.Certificates[0]
	a.Rotate()
	a.Entry("renewed", func(e *entry.Entry) { e.SPIFFEID = agentID }, "test:renewed")
	a.sync()
	renewed := a.svid("test:renewed")
	a.mu.Lock()
	a.identity = renewed
	a.mu.Unlock()

	a.Update(web, func(e *entry.Entry) { e.Hint = "changed" })
	a.sync()
	for m := recv(t, s); m.Svids[0].Hint != "changed"; m = recv(t, s) {
	}
	config := tlsconfig.MTLSClientConfig(a.own, a.roots(), tlsconfig.AuthorizeID(agentID))
	config.NextProtos = []string{"h2"}
	secured := tls.Client(a.plain(), config)
	must(t, secured.Handshake())
	if got := secured.ConnectionState().PeerCertificates[0]; got.Equal(before) || !got.Equal(renewed.Certificates[0]) {
		t.Error("a new connection does not get the renewed certificate")
	}
}

func TestAConnectionEndsWithTheCertificateThatOpenedIt(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.Entry("short", func(e *entry.Entry) { e.SPIFFEID, e.X509SVIDTTL = brokerID, 2*time.Second }, "test:short")
	a.sync()
	short := a.svid("test:short")
	conn := a.dial(short)
	s, err := brokerpb.NewAPIClient(conn).SubscribeToX509SVID(a.call(), &brokerpb.SubscribeToX509SVIDRequest{Reference: pidReference(t, pid)})
	must(t, err)
	recv(t, s)
	_, err = s.Recv()
	wantCode(t, "the stream", err, codes.Unavailable)
	if time.Now().Before(short.Certificates[0].NotAfter) {
		t.Error("it ended before its certificate")
	}
}

func TestABrokerWhoseEntryIsDeletedLosesItsStreamsAtOnce(t *testing.T) {
	a := start(t)
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.sync()
	svids := a.follow(pid)
	recv(t, svids)
	bundles, err := a.api.SubscribeToX509Bundles(a.call(), &brokerpb.SubscribeToX509BundlesRequest{Reference: pidReference(t, pid)})
	must(t, err)
	recv(t, bundles)
	a.Delete(a.entry)
	a.Entry("web2", nil, pidSelector(pid)) // in the same change: it must not be sent
	a.sync()
	_, err = svids.Recv()
	wantCode(t, "X509-SVIDs", err, codes.PermissionDenied)
	_, err = bundles.Recv()
	wantCode(t, "bundles", err, codes.PermissionDenied)
	for method, call := range calls(a.api, pidReference(t, pid)) {
		wantCode(t, method, call(a.call()), codes.PermissionDenied)
	}
}

func TestABrokersStreamsAndConnectionsAreBounded(t *testing.T) {
	a := start(t, func(o *broker.Options) { o.Limits = endpoint.Limits{StreamsOfUser: 2, ConnectionsOfPID: 2} })
	pid, _ := process(t)
	a.Entry("web", nil, pidSelector(pid))
	a.sync()
	recv(t, a.follow(pid))
	recv(t, a.follow(pid))
	_, err := a.follow(pid).Recv()
	wantCode(t, "the third stream", err, codes.Unavailable)
	second := brokerpb.NewAPIClient(a.dial(a.own))
	_, err = second.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{})
	wantCode(t, "the second connection", err, codes.InvalidArgument)
	third := brokerpb.NewAPIClient(a.dial(a.own))
	_, err = third.FetchJWTSVID(a.call(), &brokerpb.FetchJWTSVIDRequest{})
	wantCode(t, "the third connection", err, codes.Unavailable)
}

func TestBrokerAPI_BA04_ReferencesAreTakenOverUnixSocketsOnly(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	a := start(t, func(o *broker.Options) {
		o.Listener.Close()
		o.Listener = l
	})
	c, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer c.Close()
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	secured := tls.Client(c, tlsconfig.MTLSClientConfig(a.own, a.roots(), tlsconfig.AuthorizeID(agentID)))
	if err := secured.Handshake(); err == nil {
		_, err = io.ReadAll(secured)
		t.Errorf("a connection over TCP was taken: %v", err)
	}
	if a.log.count("not a connection of a Unix socket") == 0 {
		t.Error("the log does not say that it was refused for being no Unix socket")
	}
}
