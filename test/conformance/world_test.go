// Package conformance tests, through what everybody can reach (sockets, TLS,
// files, the command line), that Hallmark keeps to the SPIFFE standards and to
// RFC 5280. Each test names the lines of docs/conformance.md that it is about.
package conformance

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/hallmark-id/hallmark/agent"
	"github.com/hallmark-id/hallmark/pkg/config"
	"github.com/hallmark-id/hallmark/server"
	"github.com/hallmark-id/hallmark/test/harness"
)

const (
	domain  = "example.org"
	adminID = "spiffe://example.org/operator" // configured as an administrator
)

// world is a trust domain that all tests of the package share: a server and an
// agent in this process, and what a test needs to speak to them, and to pass
// for them.
type world struct {
	dir, address, admin, socket string

	server   *grpc.ClientConn // to the admin socket
	agent    *grpc.ClientConn // to the Workload API
	ca       *x509.Certificate
	caKey    crypto.Signer
	jwtKey   *ecdsa.PrivateKey
	jwtKeyID string
}

var shared struct {
	sync.Mutex
	*world
	stop func()
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.stop != nil {
		shared.stop()
	}
	harness.Cleanup()
	os.Exit(code)
}

// theWorld starts it at its first use.
func theWorld(t testing.TB) *world {
	t.Helper()
	shared.Lock()
	defer shared.Unlock()
	if shared.world != nil {
		return shared.world
	}
	dir, err := os.MkdirTemp("", "hallmark-conformance-") // sockets need a short path
	must(t, err)
	must(t, os.Chmod(dir, 0o755))
	w := &world{
		dir: dir, address: harness.FreeAddress(t),
		admin: filepath.Join(dir, "admin.sock"), socket: filepath.Join(dir, "workload.sock"),
	}
	ctx, cancel := context.WithCancel(context.Background())
	var programs sync.WaitGroup
	shared.stop = func() { cancel(); programs.Wait(); os.RemoveAll(dir) }
	run := func(name, text string, program func(context.Context, config.Source, func()) error) {
		ready, ended := make(chan struct{}), make(chan error, 1)
		programs.Go(func() {
			ended <- program(ctx, config.Source{Name: name, Data: []byte(text)}, func() { close(ready) })
		})
		select {
		case <-ready:
		case err := <-ended:
			t.Fatalf("%s ended: %v", name, err)
		}
	}
	run("server.yaml", fmt.Sprintf("trust_domain: %s\nlisten: %s\ndata_dir: %s/server\nadmin_socket: %s\nadmin_ids: [%s]\nlog: {level: error}\n",
		domain, w.address, dir, w.admin, adminID), server.Run)
	join := strings.TrimSpace(harness.Command{Args: []string{"token", "generate", "--agent-id", "/node", "--admin-socket", w.admin}}.Run(t))
	run("agent.yaml", fmt.Sprintf("data_dir: %s/agent\nsocket: %s\nadmin_socket: %s/agent.sock\njoin: %s\nlog: {level: error}\n",
		dir, w.socket, dir, join), agent.Run)

	w.server, w.agent = dial(t, w.admin), dial(t, w.socket)
	w.readKeys(t)
	w.entry(t, "/self", fmt.Sprint("uid:", os.Getuid()))
	shared.world = w
	return w
}

func dial(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	return conn // for the life of the process
}

// readKeys finds the authorities' private keys, to sign with them what the
// server never would.
func (w *world) readKeys(t testing.TB) {
	t.Helper()
	b, err := bundlev1.NewBundleClient(w.server).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
	must(t, err)
	w.ca, err = x509.ParseCertificate(b.X509Authorities[0].Asn1)
	must(t, err)
	w.jwtKeyID = b.JwtAuthorities[0].KeyId
	public, err := x509.ParsePKIXPublicKey(b.JwtAuthorities[0].PublicKey)
	must(t, err)
	files, err := filepath.Glob(filepath.Join(w.dir, "server", "keys", "*.pem"))
	must(t, err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		must(t, err)
		block, _ := pem.Decode(text)
		parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		must(t, err)
		key := parsed.(*ecdsa.PrivateKey)
		if key.PublicKey.Equal(w.ca.PublicKey) {
			w.caKey = key
		}
		if key.PublicKey.Equal(public) {
			w.jwtKey = key
		}
	}
	if w.caKey == nil || w.jwtKey == nil {
		t.Fatal("the authorities' keys were not found")
	}
}

// create asks for an entry and returns what came of it.
func (w *world) create(t testing.TB, e *types.Entry) *entryv1.BatchCreateEntryResponse_Result {
	t.Helper()
	resp, err := entryv1.NewEntryClient(w.server).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
	must(t, err)
	return resp.Results[0]
}

// entry creates an entry for processes with a unix selector and removes it at
// the test's end, unless that of the whole package is meant.
func (w *world) entry(t testing.TB, path, value string, change ...func(*types.Entry)) string {
	t.Helper()
	e := newEntry(domain, path, value)
	for _, c := range change {
		c(e)
	}
	r := w.create(t, e)
	if r.Status.Code != int32(codes.OK) {
		t.Fatalf("create an entry for %s: %s", path, r.Status.Message)
	}
	if path != "/self" {
		t.Cleanup(func() { w.remove(t, r.Entry.Id) })
	}
	return r.Entry.Id
}

func (w *world) remove(t testing.TB, ids ...string) {
	t.Helper()
	_, err := entryv1.NewEntryClient(w.server).BatchDeleteEntry(context.Background(), &entryv1.BatchDeleteEntryRequest{Ids: ids})
	must(t, err)
}

func newEntry(td, path, value string) *types.Entry {
	return &types.Entry{
		SpiffeId:  &types.SPIFFEID{TrustDomain: td, Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: domain, Path: "/node"},
		Selectors: []*types.Selector{{Type: "unix", Value: value}},
	}
}

// api is a client of the Workload API.
func (w *world) api() workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(w.agent)
}

func called(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// fetch waits until the Workload API answers with an identity.
func (w *world) fetch(t testing.TB, path string) *workload.X509SVID {
	t.Helper()
	stream, err := w.api().FetchX509SVID(called(t), &workload.X509SVIDRequest{})
	must(t, err)
	for {
		m, err := stream.Recv()
		must(t, err)
		for _, s := range m.Svids {
			if s.SpiffeId == "spiffe://"+domain+path {
				return s
			}
		}
	}
}

// forge makes a certificate with the trust domain's own authority. Without a
// change it is a good X509-SVID of the operator.
func (w *world) forge(t testing.TB, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	return forgeBy(t, w.ca, w.caKey, change)
}

func forgeBy(t testing.TB, ca *x509.Certificate, caKey crypto.Signer, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	named(adminID)(template)
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), caKey)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// over connects to the server's TCP listener with a client certificate and
// makes a call that only an administrator may make.
func (w *world) over(t testing.TB, cert tls.Certificate) error {
	t.Helper()
	conn, err := grpc.NewClient(w.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, // it is the server that is tested
	})))
	must(t, err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = entryv1.NewEntryClient(conn).CountEntries(ctx, &entryv1.CountEntriesRequest{})
	return err
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entryUnder is an entry with a parent of any ID.
func entryUnder(td, path string) *types.Entry {
	e := newEntry(domain, "/child", "uid:424242")
	e.ParentId = &types.SPIFFEID{TrustDomain: td, Path: path}
	return e
}
