package cli_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/pkg/join"
	"github.com/hallmark-id/hallmark/pkg/sizing"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// authority signs what the fakes issue.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority() *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	id := sha(key.Public())
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{Organization: []string{"Hallmark"}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24*time.Hour + 10*time.Second),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: id,
		URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org"}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	return &authority{key, cert}
}

func sha(key crypto.PublicKey) []byte {
	der, err := x509.MarshalPKIXPublicKey(key)
	must(err)
	h := crypto.SHA1.New()
	h.Write(der)
	return h.Sum(nil)
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

var serials sync.Mutex
var serial int64 = 4096

func (a *authority) sign(id spiffeid.ID, dns []string, public crypto.PublicKey, ttl time.Duration) []byte {
	serials.Lock()
	serial++
	n := serial
	serials.Unlock()
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(n), URIs: []*url.URL{id.URL()}, DNSNames: dns,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.cert, public, a.key)
	must(err)
	return der
}

const kid = "jwt-key-1"

func (a *authority) token(id spiffeid.ID, audience []string, ttl time.Duration) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.key, KeyID: kid}}, nil)
	must(err)
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Subject: id.String(), Audience: audience, Issuer: "https://example.org",
		IssuedAt: jwt.NewNumericDate(time.Now()), Expiry: jwt.NewNumericDate(time.Now().Add(ttl)),
	}).Serialize()
	must(err)
	return token
}

const witKid = "wit-key-1"

// wit is a WIT-SVID for a public key.
func (a *authority) wit(id spiffeid.ID, public crypto.PublicKey, ttl time.Duration) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: a.key, KeyID: witKid}},
		(&jose.SignerOptions{}).WithType("wit+jwt"))
	must(err)
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"sub": id.String(), "exp": time.Now().Add(ttl).Unix(),
		"cnf": map[string]any{"jwk": jose.JSONWebKey{Key: public, Algorithm: "ES256"}},
	}).Serialize()
	must(err)
	return token
}

// fakeServer answers the calls of the server's admin socket from memory.
type fakeServer struct {
	entryv1.UnimplementedEntryServer
	agentv1.UnimplementedAgentServer
	bundlev1.UnimplementedBundleServer
	svidv1.UnimplementedSVIDServer
	hallmarkv1.UnimplementedAdminServiceServer

	ca        *authority
	advertise string
	wit       bool // WIT-SVIDs are switched on

	mu      sync.Mutex
	entries []*types.Entry
	agents  []*types.Agent
	tokens  []string
	next    int
	keys    []fakeKey
}

func newFakeServer() *fakeServer {
	return &fakeServer{ca: newAuthority(), advertise: "ca.example.org:8081", keys: newFakeKeys()}
}

func (s *fakeServer) serve(ctx context.Context, socket string, ready func()) error {
	return serve(ctx, socket, ready, func(g *grpc.Server) {
		entryv1.RegisterEntryServer(g, s)
		agentv1.RegisterAgentServer(g, s)
		bundlev1.RegisterBundleServer(g, s)
		svidv1.RegisterSVIDServer(g, s)
		hallmarkv1.RegisterAdminServiceServer(g, s)
		localauthorityv1.RegisterLocalAuthorityServer(g, fakeAuthorities{fakeServer: s})
		grpc_health_v1.RegisterHealthServer(g, health.NewServer())
	})
}

func serve(ctx context.Context, socket string, ready func(), register func(*grpc.Server)) error {
	must(os.MkdirAll(filepath.Dir(socket), 0o700))
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	g := grpc.NewServer()
	register(g)
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	ready()
	if err := g.Serve(l); ctx.Err() == nil {
		return err
	}
	return ctx.Err()
}

func (s *fakeServer) find(id string) *types.Entry {
	for _, e := range s.entries {
		if e.Id == id {
			return e
		}
	}
	return nil
}

func (s *fakeServer) BatchCreateEntry(_ context.Context, r *entryv1.BatchCreateEntryRequest) (*entryv1.BatchCreateEntryResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &entryv1.BatchCreateEntryResponse{}
	for _, e := range r.Entries {
		similar := slices.IndexFunc(s.entries, func(x *types.Entry) bool {
			return x.SpiffeId.Path == e.SpiffeId.Path && x.ParentId.Path == e.ParentId.Path && fmt.Sprint(x.Selectors) == fmt.Sprint(e.Selectors)
		})
		switch {
		case similar >= 0:
			out.Results = append(out.Results, &entryv1.BatchCreateEntryResponse_Result{
				Status: &types.Status{Code: int32(codes.AlreadyExists), Message: "similar entry already exists"}, Entry: s.entries[similar]})
			continue
		case e.SpiffeId.TrustDomain != "example.org":
			out.Results = append(out.Results, &entryv1.BatchCreateEntryResponse_Result{
				Status: &types.Status{Code: int32(codes.InvalidArgument), Message: fmt.Sprintf("SPIFFE ID is not in trust domain %q", "example.org")}})
			continue
		}
		if e.Id == "" {
			s.next++
			e.Id = fmt.Sprintf("entry-%d", s.next)
		}
		e.CreatedAt = time.Now().Unix()
		s.entries = append(s.entries, e)
		out.Results = append(out.Results, &entryv1.BatchCreateEntryResponse_Result{Status: &types.Status{}, Entry: e})
	}
	return out, nil
}

func (s *fakeServer) BatchUpdateEntry(_ context.Context, r *entryv1.BatchUpdateEntryRequest) (*entryv1.BatchUpdateEntryResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &entryv1.BatchUpdateEntryResponse{}
	for _, e := range r.Entries {
		have := s.find(e.Id)
		if have == nil {
			out.Results = append(out.Results, &entryv1.BatchUpdateEntryResponse_Result{Status: &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}})
			continue
		}
		m := r.InputMask
		if m.X509SvidTtl {
			have.X509SvidTtl = e.X509SvidTtl
		}
		if m.Selectors {
			have.Selectors = e.Selectors
		}
		if m.ParentId {
			have.ParentId = e.ParentId
		}
		if m.DnsNames {
			have.DnsNames = e.DnsNames
		}
		if m.Hint {
			have.Hint = e.Hint
		}
		if m.Admin {
			have.Admin = e.Admin
		}
		if m.AdditionalAttributes {
			have.AdditionalAttributes = e.AdditionalAttributes
		}
		if m.ExpiresAt {
			have.ExpiresAt = e.ExpiresAt
		}
		have.RevisionNumber++
		out.Results = append(out.Results, &entryv1.BatchUpdateEntryResponse_Result{Status: &types.Status{}, Entry: have})
	}
	return out, nil
}

func (s *fakeServer) BatchDeleteEntry(_ context.Context, r *entryv1.BatchDeleteEntryRequest) (*entryv1.BatchDeleteEntryResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &entryv1.BatchDeleteEntryResponse{}
	for _, id := range r.Ids {
		st := &types.Status{}
		if s.find(id) == nil {
			st = &types.Status{Code: int32(codes.NotFound), Message: "entry not found"}
		}
		s.entries = slices.DeleteFunc(s.entries, func(e *types.Entry) bool { return e.Id == id })
		out.Results = append(out.Results, &entryv1.BatchDeleteEntryResponse_Result{Status: st, Id: id})
	}
	return out, nil
}

func (s *fakeServer) GetEntry(_ context.Context, r *entryv1.GetEntryRequest) (*types.Entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.find(r.Id); e != nil {
		return e, nil
	}
	return nil, status.Error(codes.NotFound, "entry not found")
}

func (s *fakeServer) filtered(f *entryv1.ListEntriesRequest_Filter) []*types.Entry {
	var out []*types.Entry
	for _, e := range s.entries {
		if f.GetBySpiffeId() != nil && f.BySpiffeId.Path != e.SpiffeId.Path ||
			f.GetByParentId() != nil && f.ByParentId.Path != e.ParentId.Path ||
			f.GetByHint() != nil && f.ByHint.Value != e.Hint {
			continue
		}
		if f.GetBySelectors() != nil && f.BySelectors.Match == types.SelectorMatch_MATCH_SUPERSET &&
			!strings.Contains(fmt.Sprint(e.Selectors), fmt.Sprint(f.BySelectors.Selectors[0])) {
			continue
		}
		out = append(out, e)
	}
	return out
}

// ListEntries gives at most two at once, so that clients must turn pages.
func (s *fakeServer) ListEntries(_ context.Context, r *entryv1.ListEntriesRequest) (*entryv1.ListEntriesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.filtered(r.Filter)
	from := 0
	if r.PageToken != "" {
		fmt.Sscan(r.PageToken, &from)
	}
	to := min(from+2, len(all))
	if r.PageSize > 0 {
		to = min(to, from+int(r.PageSize))
	}
	out := &entryv1.ListEntriesResponse{Entries: all[from:to]}
	if to < len(all) {
		out.NextPageToken = fmt.Sprint(to)
	}
	return out, nil
}

func (s *fakeServer) CountEntries(_ context.Context, r *entryv1.CountEntriesRequest) (*entryv1.CountEntriesResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := r.Filter
	return &entryv1.CountEntriesResponse{Count: int32(len(s.filtered(&entryv1.ListEntriesRequest_Filter{
		BySpiffeId: f.BySpiffeId, ByParentId: f.ByParentId, BySelectors: f.BySelectors, ByHint: f.ByHint})))}, nil
}

func (s *fakeServer) ListAgents(_ context.Context, r *agentv1.ListAgentsRequest) (*agentv1.ListAgentsResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := &agentv1.ListAgentsResponse{}
	for _, n := range s.agents {
		if b := r.GetFilter().GetByBanned(); b == nil || b.Value == n.Banned {
			out.Agents = append(out.Agents, n)
		}
	}
	return out, nil
}

func (s *fakeServer) agent(id *types.SPIFFEID) (*types.Agent, error) {
	for _, n := range s.agents {
		if n.Id.Path == id.Path {
			return n, nil
		}
	}
	return nil, status.Error(codes.NotFound, "agent not found")
}

func (s *fakeServer) GetAgent(_ context.Context, r *agentv1.GetAgentRequest) (*types.Agent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.agent(r.Id)
}

func (s *fakeServer) BanAgent(_ context.Context, r *agentv1.BanAgentRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := s.agent(r.Id)
	if err != nil {
		return nil, err
	}
	n.Banned = true
	return &emptypb.Empty{}, nil
}

func (s *fakeServer) DeleteAgent(_ context.Context, r *agentv1.DeleteAgentRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.agent(r.Id); err != nil {
		return nil, err
	}
	s.agents = slices.DeleteFunc(s.agents, func(n *types.Agent) bool { return n.Id.Path == r.Id.Path })
	return &emptypb.Empty{}, nil
}

func (s *fakeServer) CreateJoinToken(_ context.Context, r *agentv1.CreateJoinTokenRequest) (*types.JoinToken, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	token := fmt.Sprintf("token-%d", len(s.tokens)+1)
	s.tokens = append(s.tokens, token)
	return &types.JoinToken{Value: token, ExpiresAt: time.Now().Add(time.Duration(r.Ttl)*time.Second + 500*time.Millisecond).Unix()}, nil
}

func (s *fakeServer) bundle() *types.Bundle {
	der, err := x509.MarshalPKIXPublicKey(s.ca.key.Public())
	must(err)
	b := &types.Bundle{
		TrustDomain: "example.org", SequenceNumber: 7, RefreshHint: 300,
		X509Authorities: []*types.X509Certificate{{Asn1: s.ca.cert.Raw}},
		JwtAuthorities:  []*types.JWTKey{{KeyId: kid, PublicKey: der, ExpiresAt: time.Now().Add(24*time.Hour + 10*time.Second).Unix()}},
	}
	if s.wit {
		b.WitAuthorities = []*types.WITKey{{KeyId: witKid, PublicKey: der, Tainted: true, ExpiresAt: time.Now().Add(24*time.Hour + 10*time.Second).Unix()}}
	}
	return b
}

func (s *fakeServer) GetBundle(context.Context, *bundlev1.GetBundleRequest) (*types.Bundle, error) {
	return s.bundle(), nil
}

func (s *fakeServer) MintX509SVID(_ context.Context, r *svidv1.MintX509SVIDRequest) (*svidv1.MintX509SVIDResponse, error) {
	csr, err := x509.ParseCertificateRequest(r.Csr)
	if err != nil || csr.CheckSignature() != nil || len(csr.URIs) != 1 {
		return nil, status.Error(codes.InvalidArgument, "malformed CSR")
	}
	id := spiffeid.RequireFromURI(csr.URIs[0])
	ttl := cmpOr(time.Duration(r.Ttl)*time.Second, time.Hour) + 10*time.Second
	return &svidv1.MintX509SVIDResponse{Svid: &types.X509SVID{
		CertChain: [][]byte{s.ca.sign(id, csr.DNSNames, csr.PublicKey, ttl)},
		Id:        &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()},
	}}, nil
}

func cmpOr(a, b time.Duration) time.Duration {
	if a == 0 {
		return b
	}
	return a
}

func (s *fakeServer) MintJWTSVID(_ context.Context, r *svidv1.MintJWTSVIDRequest) (*svidv1.MintJWTSVIDResponse, error) {
	id := spiffeid.RequireFromSegments(spiffeid.RequireTrustDomainFromString(r.Id.TrustDomain), strings.Split(strings.Trim(r.Id.Path, "/"), "/")...)
	return &svidv1.MintJWTSVIDResponse{Svid: &types.JWTSVID{Token: s.ca.token(id, r.Audience, 5*time.Minute+500*time.Millisecond)}}, nil
}

func (s *fakeServer) MintWITSVID(_ context.Context, r *svidv1.MintWITSVIDRequest) (*svidv1.MintWITSVIDResponse, error) {
	if !s.wit {
		return nil, status.Error(codes.Unimplemented, "WIT-SVIDs are not switched on at this server: set wit in experimental")
	}
	id := spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString(r.Id.TrustDomain), r.Id.Path)
	key, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil || r.SigningAlgorithm != "ES256" {
		return nil, status.Error(codes.InvalidArgument, "malformed public key")
	}
	ttl := cmpOr(time.Duration(r.Ttl)*time.Second, time.Hour) + 10*time.Second
	return &svidv1.MintWITSVIDResponse{Svid: &types.WITSVID{Token: s.ca.wit(id, key, ttl)}}, nil
}

func (s *fakeServer) GetServer(context.Context, *hallmarkv1.GetServerRequest) (*hallmarkv1.GetServerResponse, error) {
	return &hallmarkv1.GetServerResponse{
		TrustDomain: "example.org", Version: "1.2.3", Revision: 42, Digest: []byte{1, 2}, Address: "127.0.0.1:8081",
		StartedAt: time.Now().Add(-2*time.Hour - 500*time.Millisecond).Unix(),
	}, nil
}

func (s *fakeServer) GetJoinInfo(context.Context, *hallmarkv1.GetJoinInfoRequest) (*hallmarkv1.GetJoinInfoResponse, error) {
	return &hallmarkv1.GetJoinInfoResponse{TrustDomain: "example.org", Address: s.advertise, RootHashes: [][]byte{make([]byte, 32)}}, nil
}

func (s *fakeServer) ListConnections(context.Context, *hallmarkv1.ListConnectionsRequest) (*hallmarkv1.ListConnectionsResponse, error) {
	return &hallmarkv1.ListConnectionsResponse{Connections: []*hallmarkv1.Connection{{
		AgentId: "spiffe://example.org/spire/agent/join_token/one", AcknowledgedRevision: 42, AgentVersion: "1.2.3", Address: "10.0.0.7:51000",
		ConnectedAt: time.Now().Add(-time.Hour - 500*time.Millisecond).Unix(),
	}}}, nil
}

func (s *fakeServer) AwaitAgents(_ context.Context, r *hallmarkv1.AwaitAgentsRequest) (*hallmarkv1.AwaitAgentsResponse, error) {
	if r.Wait < 30 {
		return nil, status.Errorf(codes.DeadlineExceeded, "after %ds, 1 of 2 connected agents have not acknowledged revision 42", r.Wait)
	}
	return &hallmarkv1.AwaitAgentsResponse{Revision: 42, Agents: 1}, nil
}

func (s *fakeServer) Backup(_ *hallmarkv1.BackupRequest, stream grpc.ServerStreamingServer[hallmarkv1.BackupResponse]) error {
	for _, part := range []*hallmarkv1.BackupResponse{{Data: []byte("first ")}, {Data: []byte("second\n"), Revision: 42, Done: true}} {
		if err := stream.Send(part); err != nil {
			return err
		}
	}
	return nil
}

// The programs, as the command line starts them: enough to see that it starts
// them rightly.

type serverConfig struct {
	TrustDomain   spiffeid.TrustDomain `yaml:"trust_domain"`
	Listen        string               `yaml:"listen"`
	Advertise     string               `yaml:"advertise"`
	DataDir       string               `yaml:"data_dir"`
	AdminSocket   string               `yaml:"admin_socket"`
	NodeAttestors struct {
		JoinToken *struct{} `yaml:"join_token"`
	} `yaml:"node_attestors"`
	X509 struct {
		SVIDLifetime config.Duration `yaml:"svid_lifetime"`
	} `yaml:"x509"`
	Log config.Log `yaml:"log"`
}

type agentConfig struct {
	TrustDomain spiffeid.TrustDomain `yaml:"trust_domain"`
	Server      string               `yaml:"server"`
	DataDir     string               `yaml:"data_dir"`
	Socket      string               `yaml:"socket"`
	AdminSocket string               `yaml:"admin_socket"`
	Join        string               `yaml:"join"`
	TrustBundle string               `yaml:"trust_bundle"`
	Workload    struct {
		Unix struct {
			Path bool `yaml:"path"`
		} `yaml:"unix"`
	} `yaml:"workload_attestors"`
	Log config.Log `yaml:"log"`
}

func checkServer(src config.Source) error {
	var c serverConfig
	if err := config.Decode(src, &c); err != nil {
		return err
	}
	if c.TrustDomain.IsZero() {
		return src.Errorf("trust_domain", "`trust_domain` is missing")
	}
	return nil
}

func checkAgent(src config.Source) error {
	var c agentConfig
	return config.Decode(src, &c)
}

func serverLayout(src config.Source) (config.Layout, error) {
	var c serverConfig
	err := errors.Join(config.Decode(src, &c), checkServer(src))
	return config.Layout{TrustDomain: c.TrustDomain.Name(), AdminSocket: c.AdminSocket}, err
}

func agentLayout(src config.Source) (config.Layout, error) {
	var c agentConfig
	err := config.Decode(src, &c)
	return config.Layout{TrustDomain: c.TrustDomain.Name(), AdminSocket: c.AdminSocket, Socket: c.Socket, Server: c.Server}, err
}

func runServer(ctx context.Context, src config.Source, ready func()) error {
	var c serverConfig
	if err := config.Decode(src, &c); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "level=INFO msg=serving trust_domain=%s\nlevel=ERROR msg=\"an error that people must see\"\n", c.TrustDomain)
	must(os.MkdirAll(c.DataDir, 0o700))
	s := newFakeServer()
	s.advertise = "127.0.0.1:8081"
	return s.serve(ctx, c.AdminSocket, ready)
}

func runAgent(ctx context.Context, src config.Source, ready func()) error {
	var c agentConfig
	if err := config.Decode(src, &c); err != nil {
		return err
	}
	if _, err := join.Parse(c.Join); err != nil {
		return err
	}
	must(os.MkdirAll(c.DataDir, 0o700))
	// SIGWINCH takes the agent's identity away, the first time.
	ctx, lose := context.WithCancelCause(ctx)
	defer lose(nil)
	if !lost {
		signals := make(chan os.Signal, 1)
		signal.Notify(signals, syscall.SIGWINCH)
		go func() {
			<-signals
			lost = true
			lose(errLost)
		}()
	} else {
		must(os.WriteFile(filepath.Join(c.DataDir, "twice"), nil, 0o600))
	}
	f := &fakeAgent{ca: newAuthority(), id: os.Getenv("FAKE_ID")}
	err := f.serve(ctx, c.Socket, c.AdminSocket, ready)
	if context.Cause(ctx) == errLost {
		return errLost
	}
	return err
}

var (
	lost    bool // written before the agent ends, read when it starts again
	errLost = errors.New("identity has ended")
)

func restoreServer(_ context.Context, _ config.Source, r io.Reader) (int, error) {
	data, err := io.ReadAll(r)
	return len(strings.Fields(string(data))), err
}

func reencryptKeys(_ config.Source, oldSecretFile string) (written, right int, err error) {
	if oldSecretFile == "" {
		return 0, 0, errors.New("it is encrypted, but not with the configured secret; name the file of its secret with --old-secret-file")
	}
	return 2, 1, nil
}

// runBench makes a measurement that finds what it was asked for.
func runBench(subject string) func(context.Context, sizing.Plan) (*sizing.Report, error) {
	return func(_ context.Context, plan sizing.Plan) (*sizing.Report, error) {
		if plan.Binary == "" || plan.Dir == "" {
			return nil, fmt.Errorf("incomplete plan: %+v", plan)
		}
		plan.Note("measuring")
		r := &sizing.Report{Subject: subject, Machine: "a machine", Version: "1.0", Sizes: plan.Sizes}
		for _, n := range plan.Sizes {
			r.Add("twice", "ms", "p50", 2*float64(n))
			r.Add("twice", "ms", "samples", float64(plan.Samples))
			r.Add("rest", "s", "CPU", plan.Idle.Seconds())
		}
		return r, nil
	}
}
