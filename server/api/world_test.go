package api_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/jointoken"
	"github.com/hallmark-id/hallmark/attestors/tpmek"
	"github.com/hallmark-id/hallmark/pkg/bundle"
	"github.com/hallmark-id/hallmark/pkg/entry"
	"github.com/hallmark-id/hallmark/server/api"
	"github.com/hallmark-id/hallmark/server/authority"
	"github.com/hallmark-id/hallmark/server/feed"
	"github.com/hallmark-id/hallmark/server/issue"
	"github.com/hallmark-id/hallmark/server/journal"
	"github.com/hallmark-id/hallmark/server/registry"
	"github.com/hallmark-id/hallmark/server/revocation"
	"github.com/hallmark-id/hallmark/server/store/badger"
	"github.com/hallmark-id/hallmark/server/tokenstatus"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

func id(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }

func wireID(id spiffeid.ID) *types.SPIFFEID {
	return &types.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

// world is a whole server, reached through its listeners.
type world struct {
	t        testing.TB
	api      *api.API
	registry *registry.Registry
	feed     *feed.Feed
	own      *authority.Authorities
	address  string
	socket   string
	offset   atomic.Int64 // of the server's clock to the real one
	log      *logBuffer
	stop     func() error // stops serving and returns what Run returned
}

// newWorld starts a server. The functions may change what its API is made of.
func newWorld(t testing.TB, change ...func(*api.Options)) *world {
	t.Helper()
	return startWorld(t, features{}, change...)
}

// newWITWorld starts a server that issues WIT-SVIDs.
func newWITWorld(t testing.TB) *world {
	t.Helper()
	return startWorld(t, features{wit: true})
}

// features are what a server does beyond the usual.
type features struct {
	wit      bool // it issues WIT-SVIDs
	statuses bool // its tokens have a status
}

func startWorld(t testing.TB, with features, change ...func(*api.Options)) *world {
	t.Helper()
	w := &world{t: t, log: &logBuffer{}}
	log := slog.New(slog.NewTextHandler(w.log, nil))
	now := w.now
	db, err := badger.Open(badger.Options{InMemory: true})
	must(t, err)
	w.registry, err = registry.Open(t.Context(), registry.Options{Store: db, TrustDomain: td, Now: now})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { _ = w.registry.Run(ctx) })
	keys := authority.NewMemoryKeys()
	authorities, err := authority.Open(t.Context(), authority.Options{Registry: w.registry, Keys: keys, TrustDomain: td, Server: "test", WIT: with.wit, Now: now})
	must(t, err)
	w.own = authorities
	w.feed = feed.New(feed.Options{Registry: w.registry, X509TTL: time.Hour, JWTTTL: 5 * time.Minute, Now: now})
	issued, err := journal.Open("", now, nil)
	must(t, err)
	publisher := revocation.New(revocation.Options{Registry: w.registry, Authorities: authorities, Journal: issued, Now: now})
	running.Go(func() { _ = publisher.Run(ctx) })
	issuing := issue.Options{TrustDomain: td, Authorities: authorities, Now: now, Journal: issued}
	if with.statuses {
		issuing.Status = tokenstatus.New(tokenstatus.Options{
			Registry: w.registry, Server: "test", Journal: issued, URL: "https://status.example.org" + tokenstatus.Path, Now: now,
		})
		running.Go(func() { _ = issuing.Status.Run(ctx) })
	}
	o := api.Options{
		Store:       db,
		Registry:    w.registry,
		Authorities: authorities,
		Issuer:      issue.New(issuing),
		Journal:     issued,
		Feed:        w.feed,
		NodeAttestors: map[string]attestors.Server{
			jointoken.Name: jointoken.New(func(ctx context.Context, token string) error {
				_, err := w.registry.ConsumeJoinToken(ctx, token)
				return err
			}),
		},
		Profiles: []attestors.Profile{jointoken.Profile, tpmek.Profile},
		Now:      now,
		Log:      log,
	}
	for _, c := range change {
		c(&o)
	}
	w.api = api.New(o)
	tcp, err := api.ListenTCP("127.0.0.1:0")
	must(t, err)
	w.address = tcp.Addr().String()
	dir, err := os.MkdirTemp("", "hallmark-api-") // sockets need a short path
	must(t, err)
	w.socket = filepath.Join(dir, "admin.sock")
	admin, err := api.ListenAdmin(w.socket)
	must(t, err)
	serving, end := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.api.Run(serving, tcp, admin) }()
	w.stop = sync.OnceValue(func() error { end(); return <-ended })
	t.Cleanup(func() {
		_ = w.stop()
		cancel()
		running.Wait()
		must(t, keys.Close())
		must(t, db.Close())
		must(t, os.RemoveAll(dir))
	})
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// expectCode fails the test unless an error has a gRPC code and holds a text.
func expectCode(t testing.TB, err error, code codes.Code, text string) {
	t.Helper()
	if st := grpcstatus.Convert(err); st.Code() != code || !strings.Contains(st.Message(), text) {
		t.Errorf("got %v %q, want %v with %q", st.Code(), st.Message(), code, text)
	}
}

// reason returns what a denial tells an agent to do.
func reason(err error) types.PermissionDeniedDetails_Reason {
	for _, d := range grpcstatus.Convert(err).Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			return d.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

func expectReason(t testing.TB, err error, want types.PermissionDeniedDetails_Reason) {
	t.Helper()
	if got := reason(err); grpcstatus.Code(err) != codes.PermissionDenied || got != want {
		t.Errorf("got %v with reason %v, want PermissionDenied with %v", err, got, want)
	}
}

func (w *world) now() time.Time { return time.Now().Add(time.Duration(w.offset.Load())) }

// sleep moves the server's clock.
func (w *world) sleep(d time.Duration) { w.offset.Add(int64(d)) }

// svid is an X509-SVID with its key.
type svid struct {
	id  spiffeid.ID
	tls tls.Certificate
}

func (s *svid) leaf() *x509.Certificate { return s.tls.Leaf }

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

func newCSR(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	return csr
}

func newSVID(t testing.TB, w *types.X509SVID, key crypto.Signer) *svid {
	t.Helper()
	leaf, err := x509.ParseCertificate(w.CertChain[0])
	must(t, err)
	return &svid{
		id:  spiffeid.RequireFromPath(td, w.Id.Path),
		tls: tls.Certificate{Certificate: w.CertChain, PrivateKey: key, Leaf: leaf},
	}
}

// admin connects to the admin socket.
func (w *world) admin() *grpc.ClientConn {
	w.t.Helper()
	return w.dial("unix:"+w.socket, insecure.NewCredentials())
}

// connect connects over TCP; with nil, without a certificate.
func (w *world) connect(s *svid) *grpc.ClientConn {
	w.t.Helper()
	return w.dial(w.address, credentials.NewTLS(w.tlsConfig(s)))
}

// tlsConfig demands the server's SVID, verified against the current bundle.
func (w *world) tlsConfig(s *svid) *tls.Config {
	roots := x509bundle.New(td)
	for _, a := range w.registry.View().Bundle(td).X509Authorities {
		roots.AddX509Authority(a.Certificate)
	}
	c := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		InsecureSkipVerify: true, // verified by the rules of SPIFFE instead
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			got, _, err := x509svid.ParseAndVerify(raw, roots, x509svid.WithTime(w.now()))
			if err == nil && got != id(entry.ServerPath) {
				err = fmt.Errorf("the server presents %s", got)
			}
			return err
		},
	}
	if s != nil {
		c.Certificates = []tls.Certificate{s.tls}
	}
	return c
}

func (w *world) dial(target string, creds credentials.TransportCredentials) *grpc.ClientConn {
	w.t.Helper()
	c, err := grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	must(w.t, err)
	w.t.Cleanup(func() { c.Close() })
	return c
}

func (w *world) token() string {
	w.t.Helper()
	token, err := agentv1.NewAgentClient(w.admin()).CreateJoinToken(w.t.Context(), &agentv1.CreateJoinTokenRequest{Ttl: 600})
	must(w.t, err)
	return token.Value
}

// attest runs an attestation that has no challenge.
func attest(ctx context.Context, conn *grpc.ClientConn, typ, payload string, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: typ, Payload: []byte(payload)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}})
	resp, recvErr := stream.Recv()
	if recvErr != nil {
		return nil, recvErr
	}
	return resp.GetResult(), err
}

// newAgent attests an agent with a new join token.
func (w *world) newAgent() *svid {
	w.t.Helper()
	key := newKey(w.t)
	res, err := attest(w.t.Context(), w.connect(nil), jointoken.Name, w.token(), newCSR(w.t, key))
	must(w.t, err)
	return newSVID(w.t, res.Svid, key)
}

// renew asks for the next SVID of an agent.
func (w *world) renew(s *svid) *svid {
	w.t.Helper()
	key := newKey(w.t)
	res, err := agentv1.NewAgentClient(w.connect(s)).RenewAgent(w.t.Context(), &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: newCSR(w.t, key)}})
	must(w.t, err)
	return newSVID(w.t, res.Svid, key)
}

// create creates an entry under an agent.
func (w *world) create(parent *svid, path string, change ...func(*types.Entry)) *types.Entry {
	w.t.Helper()
	e := &types.Entry{
		SpiffeId:  wireID(id(path)),
		ParentId:  wireID(parent.id),
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1000"}},
	}
	for _, c := range change {
		c(e)
	}
	res, err := entryv1.NewEntryClient(w.admin()).BatchCreateEntry(w.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	must(w.t, err)
	if res.Results[0].Status.Code != 0 {
		w.t.Fatal(res.Results[0].Status)
	}
	return res.Results[0].Entry
}

// workload creates an entry under an agent and obtains its SVID.
func (w *world) workload(parent *svid, path string, change ...func(*types.Entry)) *svid {
	w.t.Helper()
	e, key := w.create(parent, path, change...), newKey(w.t)
	res, err := svidv1.NewSVIDClient(w.connect(parent)).BatchNewX509SVID(w.t.Context(), &svidv1.BatchNewX509SVIDRequest{
		Params: []*svidv1.NewX509SVIDParams{{EntryId: e.Id, Csr: newCSR(w.t, key)}},
	})
	must(w.t, err)
	if res.Results[0].Status.Code != 0 {
		w.t.Fatal(res.Results[0].Status)
	}
	return newSVID(w.t, res.Results[0].Svid, key)
}

// selfSigned is a certificate that no authority of the trust domain signed.
func selfSigned(t testing.TB, uris ...string) *svid {
	t.Helper()
	return certify(t, nil, uris...)
}

// forge is a certificate that a workload signed with the key of its SVID.
func forge(t testing.TB, by *svid, uris ...string) *svid {
	t.Helper()
	return certify(t, by, uris...)
}

func certify(t testing.TB, by *svid, uris ...string) *svid {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(42), KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute),
	}
	for _, text := range uris {
		u, err := url.Parse(text)
		must(t, err)
		tmpl.URIs = append(tmpl.URIs, u)
	}
	parent, signer, chain := tmpl, crypto.PrivateKey(key), [][]byte(nil)
	if by != nil {
		parent, signer, chain = by.leaf(), by.tls.PrivateKey, by.tls.Certificate
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	must(t, err)
	leaf, err := x509.ParseCertificate(der)
	must(t, err)
	return &svid{tls: tls.Certificate{Certificate: append([][]byte{der}, chain...), PrivateKey: key, Leaf: leaf}}
}

// dropAuthorities replaces every X.509 authority of the bundle by another that
// signed nothing.
func (w *world) dropAuthorities() {
	w.t.Helper()
	other := selfSigned(w.t)
	_, err := w.registry.ChangeBundle(w.t.Context(), td, func(b *bundle.Bundle) error {
		b.X509Authorities = []bundle.X509Authority{{Certificate: other.leaf()}}
		return nil
	})
	must(w.t, err)
}

// logBuffer is what the server logged.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

// lines returns the lines that hold every one of some texts.
func (l *logBuffer) lines(texts ...string) (out []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
next:
	for _, line := range strings.Split(l.b.String(), "\n") {
		for _, text := range texts {
			if !strings.Contains(line, text) {
				continue next
			}
		}
		out = append(out, line)
	}
	return out
}
