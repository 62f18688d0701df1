// Package nodetest is a trust domain's server in memory, for tests of the
// agent's side: real TLS with a test authority, SPIRE's calls for agents as a
// server answers them, and whatever the test makes go wrong.
//
// [New] makes a [Server]; its Dial is what node.Options.Dial wants. It uses no
// sockets and no clock but time.Now, so it runs inside testing/synctest.
package nodetest

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/join"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
)

// Address is where every Server is dialled.
const Address = "hallmark.test:8081"

// TrustDomain is that of every Server.
var TrustDomain = spiffeid.RequireTrustDomainFromString("example.org")

// Authority is an X.509 authority with its key.
type Authority struct {
	Certificate *x509.Certificate
	Key         crypto.Signer
	Tainted     bool
}

// Node is what the server knows of an attested agent.
type Node struct {
	Serial    string // of the SVID in use
	NewSerial string // issued, not yet presented
	Banned    bool
}

// Server is a trust domain's server. Set what is exported before a node
// connects, or between [Server.Lock] and [Server.Unlock].
type Server struct {
	tb testing.TB

	sync.Mutex
	Authorities   []*Authority          // the bundle; the last one signs
	Sequence      uint64                // the bundle's
	AgentTTL      time.Duration         // default one hour
	ServerID      spiffeid.ID           // of the server's own certificate
	ServerSigner  *Authority            // signs it; default the last authority
	Bundle        *types.Bundle         // what GetBundle answers instead of the own
	Tokens        map[string]bool       // join tokens; true while unused
	Nodes         map[spiffeid.ID]*Node // attested agents
	Reattestable  bool                  // attestation type "test" admits an agent again and again
	Challenges    int                   // how many challenges type "test" sends
	Entries       map[string]spiffeid.ID
	AttestAs      spiffeid.ID                          // the ID that a join token gives, if set
	RenewAs       spiffeid.ID                          // whose SVID RenewAgent sends, if set
	Denial        types.PermissionDeniedDetails_Reason // what RenewAgent answers, if set
	Alter         func(*types.X509SVID)                // changes every SVID before it is sent
	Follow        func(agent spiffeid.ID, stream grpc.BidiStreamingServer[hallmarkv1.FollowRequest, hallmarkv1.FollowResponse]) error
	Before        func(ctx context.Context, method string) error // runs before each call
	Seen          []string                                       // tokens that any client sent
	Calls         map[string]int                                 // how often each method was called, by its last part
	Handshakes    int                                            // how many TLS handshakes were begun
	DialErr       error                                          // what Dial fails with, if set
	RequireClient bool                                           // TLS refuses clients without a certificate of the bundle

	listener *bufconn.Listener
	grpc     *grpc.Server
	serving  sync.WaitGroup
	serial   int64
}

// New makes a server with one authority and starts it. It stops with the test.
func New(tb testing.TB) *Server {
	s := &Server{
		tb: tb, AgentTTL: time.Hour, Sequence: 1,
		ServerID:    spiffeid.RequireFromPath(TrustDomain, "/spire/server"),
		Authorities: []*Authority{NewAuthority(tb)},
		Tokens:      map[string]bool{},
		Nodes:       map[spiffeid.ID]*Node{},
		Entries:     map[string]spiffeid.ID{},
		Calls:       map[string]int{},
	}
	s.Start()
	tb.Cleanup(s.Stop)
	return s
}

// NewAuthority makes a self-signed authority, valid for a day.
func NewAuthority(tb testing.TB) *Authority {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	id := sha256.Sum256(elliptic.MarshalCompressed(key.Curve, key.X, key.Y))
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: fmt.Sprintf("authority %x", id[:4])},
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SubjectKeyId: id[:20],
		URIs:         []*url.URL{TrustDomain.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return &Authority{Certificate: cert, Key: key}
}

// Start listens. [New] does it; it is for a server that was stopped.
func (s *Server) Start() {
	listener := bufconn.Listen(1 << 20)
	server := grpc.NewServer(
		grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, GetConfigForClient: s.tlsConfig})),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second}), // as our own server's
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if err := s.before(ctx, info.FullMethod); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			if err := s.before(stream.Context(), info.FullMethod); err != nil {
				return err
			}
			return handler(srv, stream)
		}),
	)
	agentv1.RegisterAgentServer(server, agentAPI{s: s})
	bundlev1.RegisterBundleServer(server, bundleAPI{s: s})
	svidv1.RegisterSVIDServer(server, svidAPI{s: s})
	hallmarkv1.RegisterFeedServiceServer(server, feedAPI{s: s})

	s.Lock()
	defer s.Unlock()
	s.listener, s.grpc = listener, server
	s.serving.Go(func() { _ = server.Serve(listener) })
}

// Stop closes the listener and every connection, as a crash would. What the
// server knows stays.
func (s *Server) Stop() {
	s.Lock()
	server := s.grpc
	s.grpc, s.listener = nil, nil
	s.Unlock()
	if server != nil {
		server.Stop()
		s.serving.Wait()
	}
}

// GracefulStop asks clients to go (GOAWAY) and waits for their calls.
func (s *Server) GracefulStop() {
	s.Lock()
	server := s.grpc
	s.grpc, s.listener = nil, nil
	s.Unlock()
	server.GracefulStop()
	s.serving.Wait()
}

// Dial connects to the server. It fails while the server is stopped.
func (s *Server) Dial(ctx context.Context, address string) (net.Conn, error) {
	s.Lock()
	listener, err := s.listener, s.DialErr
	s.Unlock()
	switch {
	case err != nil:
		return nil, err
	case listener == nil:
		return nil, errors.New("connection refused")
	case address != Address:
		return nil, fmt.Errorf("no such host: %s", address)
	}
	return listener.DialContext(ctx)
}

// Rotate adds an authority that signs from now on.
func (s *Server) Rotate() *Authority {
	a := NewAuthority(s.tb)
	s.Lock()
	defer s.Unlock()
	s.Authorities = append(s.Authorities, a)
	s.Sequence++
	return a
}

// CurrentBundle returns the server's bundle.
func (s *Server) CurrentBundle() *bundle.Bundle {
	s.Lock()
	defer s.Unlock()
	b := &bundle.Bundle{TrustDomain: TrustDomain, SequenceNumber: s.Sequence}
	for _, a := range s.Authorities {
		b.X509Authorities = append(b.X509Authorities, bundle.X509Authority{Certificate: a.Certificate, Tainted: a.Tainted})
	}
	return b
}

// Join makes a join token and the join string with it.
func (s *Server) Join(token string) *join.String {
	s.Lock()
	defer s.Unlock()
	s.Tokens[token] = true
	j := &join.String{TrustDomain: TrustDomain, Server: Address, Token: token}
	for _, a := range s.Authorities {
		j.Roots = append(j.Roots, sha256.Sum256(a.Certificate.Raw))
	}
	return j
}

// Revoke takes the first authority away.
func (s *Server) Revoke() {
	s.Lock()
	defer s.Unlock()
	s.Authorities = s.Authorities[1:]
	s.Sequence++
}

// CallCount returns how often a method was called.
func (s *Server) CallCount(method string) int {
	s.Lock()
	defer s.Unlock()
	return s.Calls[method]
}

// Deny is the status of a denied agent, as SPIRE sends it.
func Deny(reason types.PermissionDeniedDetails_Reason) error {
	st, err := status.New(codes.PermissionDenied, "agent is denied").WithDetails(&types.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		panic(err)
	}
	return st.Err()
}

func (s *Server) before(ctx context.Context, method string) error {
	s.Lock()
	for i := len(method) - 1; i >= 0; i-- {
		if method[i] == '/' {
			s.Calls[method[i+1:]]++
			break
		}
	}
	before := s.Before
	s.Unlock()
	if before != nil {
		return before(ctx, method)
	}
	return nil
}

func (s *Server) tlsConfig(*tls.ClientHelloInfo) (*tls.Config, error) {
	s.Lock()
	defer s.Unlock()
	s.Handshakes++
	signer := s.ServerSigner
	if signer == nil {
		signer = s.signer()
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, _, err := s.sign(signer, s.ServerID, key.Public(), time.Hour)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		ClientAuth:   tls.RequestClientCert,
	}
	if s.RequireClient {
		config.ClientAuth = tls.RequireAndVerifyClientCert
		config.ClientCAs = s.pool()
	}
	return config, nil
}

func (s *Server) signer() *Authority { return s.Authorities[len(s.Authorities)-1] }

func (s *Server) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, a := range s.Authorities {
		pool.AddCert(a.Certificate)
	}
	return pool
}

// sign makes an X509-SVID. The server is locked.
func (s *Server) sign(by *Authority, id spiffeid.ID, key crypto.PublicKey, ttl time.Duration) ([]byte, *x509.Certificate, error) {
	s.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(s.serial),
		NotBefore:    time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{id.URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by.Certificate, key, by.Key)
	if err != nil {
		return nil, nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return der, cert, err
}

// issue makes the SVID for a CSR. The server is locked.
func (s *Server) issue(id spiffeid.ID, csr []byte) (*types.X509SVID, *x509.Certificate, error) {
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil || request.CheckSignature() != nil {
		return nil, nil, status.Error(codes.InvalidArgument, "malformed CSR")
	}
	der, cert, err := s.sign(s.signer(), id, request.PublicKey, s.AgentTTL)
	if err != nil {
		return nil, nil, err
	}
	svid := &types.X509SVID{
		CertChain: [][]byte{der},
		Id:        &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()},
		ExpiresAt: cert.NotAfter.Unix(),
	}
	if s.Alter != nil {
		s.Alter(svid)
	}
	return svid, cert, nil
}

// Chain makes an SVID's chain with a path, by an authority (nil: the server's
// own), for a key that nobody has. The server is locked by the caller.
func (s *Server) Chain(by *Authority, path string) [][]byte {
	if by == nil {
		by = s.signer()
	}
	return s.chain(by, spiffeid.RequireFromPath(TrustDomain, path))
}

// ChainOf makes an SVID's chain with any ID, as Chain does.
func (s *Server) ChainOf(id spiffeid.ID) [][]byte { return s.chain(s.signer(), id) }

func (s *Server) chain(by *Authority, id spiffeid.ID) [][]byte {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, _, err := s.sign(by, id, key.Public(), s.AgentTTL)
	if err != nil {
		panic(err)
	}
	return [][]byte{der}
}

// caller authorizes an agent as SPIRE's server does.
func (s *Server) caller(ctx context.Context) (spiffeid.ID, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return spiffeid.ID{}, status.Error(codes.Internal, "no peer")
	}
	certs := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates
	if len(certs) == 0 {
		return spiffeid.ID{}, status.Error(codes.PermissionDenied, "authorization denied for method")
	}
	leaf := certs[0]
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return id, status.Error(codes.PermissionDenied, "authorization denied for method")
	}
	s.Lock()
	defer s.Unlock()
	if time.Now().After(leaf.NotAfter) {
		return id, Deny(types.PermissionDeniedDetails_AGENT_EXPIRED)
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: s.pool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return id, Deny(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	}
	node, serial := s.Nodes[id], leaf.SerialNumber.String()
	switch {
	case node == nil:
		return id, Deny(types.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	case node.Banned:
		return id, Deny(types.PermissionDeniedDetails_AGENT_BANNED)
	case serial == node.Serial:
	case serial == node.NewSerial:
		node.Serial, node.NewSerial = serial, ""
	default:
		return id, Deny(types.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	}
	return id, nil
}
