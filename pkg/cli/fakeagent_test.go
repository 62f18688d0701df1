package cli_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	workloadv1 "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// fakeAgent answers the calls of an agent's two sockets.
type fakeAgent struct {
	workloadv1.UnimplementedSpiffeWorkloadAPIServer
	hallmarkv1.UnimplementedAgentAdminServiceServer
	ca     *authority
	refuse bool // nothing matches
	wit    bool // WIT-SVIDs are switched on
	id     string
	renew  chan struct{} // for each, streams get new SVIDs of the first identity alone; nil: never
}

func (f *fakeAgent) serve(ctx context.Context, workloadSocket, adminSocket string, ready func()) error {
	var both sync.WaitGroup
	both.Add(2)
	errs := make(chan error, 2)
	go func() {
		errs <- serve(ctx, workloadSocket, both.Done, func(g *grpc.Server) { workloadv1.RegisterSpiffeWorkloadAPIServer(g, f) })
	}()
	go func() {
		errs <- serve(ctx, adminSocket, both.Done, func(g *grpc.Server) { hallmarkv1.RegisterAgentAdminServiceServer(g, f) })
	}()
	both.Wait()
	ready()
	return errors.Join(<-errs, <-errs)
}

var denied = status.Error(codes.PermissionDenied, "no identity issued")

func (f *fakeAgent) ids() []spiffeid.ID {
	return []spiffeid.ID{spiffeid.RequireFromString(cmpString(f.id, "spiffe://example.org/web")), spiffeid.RequireFromString("spiffe://example.org/db")}
}

func cmpString(a, b string) string {
	if a == "" {
		return b
	}
	return a
}

func (f *fakeAgent) FetchX509SVID(_ *workloadv1.X509SVIDRequest, stream grpc.ServerStreamingServer[workloadv1.X509SVIDResponse]) error {
	if f.refuse {
		return denied
	}
	for ids := f.ids(); ; ids = ids[:1] {
		if err := stream.Send(f.x509(ids)); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-f.renew:
		}
	}
}

func (f *fakeAgent) x509(ids []spiffeid.ID) *workloadv1.X509SVIDResponse {
	resp := &workloadv1.X509SVIDResponse{}
	for i, id := range ids {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		der, err := x509.MarshalPKCS8PrivateKey(key)
		must(err)
		svid := &workloadv1.X509SVID{SpiffeId: id.String(), X509SvidKey: der, Bundle: f.ca.cert.Raw,
			X509Svid: f.ca.sign(id, nil, key.Public(), time.Hour+10*time.Second)}
		if i == 1 {
			svid.Hint = "database"
		}
		resp.Svids = append(resp.Svids, svid)
	}
	return resp
}

func (f *fakeAgent) FetchX509Bundles(_ *workloadv1.X509BundlesRequest, stream grpc.ServerStreamingServer[workloadv1.X509BundlesResponse]) error {
	if f.refuse {
		return denied
	}
	must(stream.Send(&workloadv1.X509BundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": f.ca.cert.Raw}}))
	<-stream.Context().Done()
	return nil
}

func (f *fakeAgent) FetchJWTBundles(_ *workloadv1.JWTBundlesRequest, stream grpc.ServerStreamingServer[workloadv1.JWTBundlesResponse]) error {
	if f.refuse {
		return denied
	}
	doc, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: f.ca.key.Public(), KeyID: kid}}})
	must(err)
	must(stream.Send(&workloadv1.JWTBundlesResponse{Bundles: map[string][]byte{"spiffe://example.org": doc}}))
	<-stream.Context().Done()
	return nil
}

func (f *fakeAgent) FetchJWTSVID(_ context.Context, r *workloadv1.JWTSVIDRequest) (*workloadv1.JWTSVIDResponse, error) {
	if f.refuse {
		return nil, denied
	}
	id := f.ids()[0]
	return &workloadv1.JWTSVIDResponse{Svids: []*workloadv1.JWTSVID{{SpiffeId: id.String(), Svid: f.ca.token(id, r.Audience, 5*time.Minute+500*time.Millisecond)}}}, nil
}

func (f *fakeAgent) FetchWITSVID(r *workloadv1.WITSVIDRequest, stream grpc.ServerStreamingServer[workloadv1.WITSVIDResponse]) error {
	if !f.wit {
		return status.Error(codes.Unimplemented, "not switched on")
	}
	for ids := f.ids(); ; ids = ids[:1] {
		resp := &workloadv1.WITSVIDResponse{}
		for i, id := range ids {
			if r.SpiffeId != "" && r.SpiffeId != id.String() {
				continue
			}
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			must(err)
			private, err := json.Marshal(jose.JSONWebKey{Key: key, Algorithm: "ES256"})
			must(err)
			svid := &workloadv1.WITSVID{SpiffeId: id.String(), WitSvid: f.ca.wit(id, key.Public(), time.Hour+10*time.Second), WitSvidKey: string(private)}
			if i == 1 {
				svid.Hint = "database"
			}
			resp.Svids = append(resp.Svids, svid)
		}
		if len(resp.Svids) == 0 {
			return denied
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-f.renew:
		}
	}
}

func (f *fakeAgent) FetchWITBundles(_ *workloadv1.WITBundlesRequest, stream grpc.ServerStreamingServer[workloadv1.WITBundlesResponse]) error {
	if !f.wit {
		return status.Error(codes.Unimplemented, "not switched on")
	}
	doc, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: f.ca.key.Public(), KeyID: witKid}}})
	must(err)
	must(stream.Send(&workloadv1.WITBundlesResponse{Bundles: map[string]string{"spiffe://example.org": string(doc)}}))
	<-stream.Context().Done()
	return nil
}

func (f *fakeAgent) ValidateJWTSVID(_ context.Context, r *workloadv1.ValidateJWTSVIDRequest) (*workloadv1.ValidateJWTSVIDResponse, error) {
	s, err := jwtsvid.ParseInsecure(r.Svid, []string{r.Audience})
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, "audience does not match")
	}
	return &workloadv1.ValidateJWTSVIDResponse{SpiffeId: s.ID.String()}, nil
}

const agentID = "spiffe://example.org/spire/agent/join_token/one"

func (f *fakeAgent) GetStatus(context.Context, *hallmarkv1.GetStatusRequest) (*hallmarkv1.GetStatusResponse, error) {
	out := &hallmarkv1.GetStatusResponse{
		AgentId: agentID, TrustDomain: "example.org", Version: "1.2.3", Server: "ca.example.org:8081", Connected: !f.refuse,
		Revision: 42, SvidExpiresAt: time.Now().Add(time.Hour + 500*time.Millisecond).Unix(), Entries: 3, Svids: 1,
		StartedAt: time.Now().Add(-2*time.Hour - 500*time.Millisecond).Unix(),
	}
	if f.refuse {
		out.LastError = "connection refused"
	}
	return out, nil
}

func record(selectors ...string) []*hallmarkv1.Selector {
	out := make([]*hallmarkv1.Selector, len(selectors))
	for i, s := range selectors {
		typ, value, _ := strings.Cut(s, ":")
		out[i] = &hallmarkv1.Selector{Type: typ, Value: value}
	}
	return out
}

func (f *fakeAgent) Explain(_ context.Context, r *hallmarkv1.ExplainRequest) (*hallmarkv1.ExplainResponse, error) {
	if r.Pid == 999999 {
		return nil, status.Error(codes.NotFound, "no process 999999")
	}
	out := &hallmarkv1.ExplainResponse{
		Pid: r.Pid, AgentId: agentID, Total: 4,
		Selectors: record("unix:gid:1000", "unix:path:/usr/bin/zsh", "unix:uid:1000", "unix:user:ann"),
		Attestors: []*hallmarkv1.ExplainResponse_AttestorResult{
			{Name: "unix", Selectors: 4, Microseconds: 312}, {Name: "docker", Error: "the daemon does not answer", Microseconds: 1500},
		},
	}
	add := func(id, path string, matched bool, reason string, selectors, missing []*hallmarkv1.Selector) {
		out.Matches = append(out.Matches, &hallmarkv1.ExplainResponse_Match{
			Entry:   &hallmarkv1.Entry{Id: id, SpiffeId: "spiffe://example.org" + path, Selectors: selectors},
			Matched: matched, Missing: missing, Reason: reason,
		})
	}
	if !f.refuse {
		add("entry-1", "/user/ann", true, "", record("unix:uid:1000"), nil)
		add("entry-2", "/stored", true, "its SVIDs go to a store", record("unix:uid:1000"), nil)
	}
	add("entry-3", "/web", false, "", record("unix:path:/usr/sbin/nginx", "unix:uid:1000"), record("unix:path:/usr/sbin/nginx"))
	return out, nil
}
