package server_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hallmark-id/hallmark/pkg/config"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/server"
)

// running is a server that runs in a directory of its own.
type running struct {
	t    testing.TB
	dir  string
	src  config.Source
	conn *grpc.ClientConn
	end  context.CancelFunc
	done chan error
}

func newDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-server-") // sockets need a short path
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func configure(dir string) config.Source {
	return source(fmt.Sprintf("trust_domain: example.org\nlisten: 127.0.0.1:0\ndata_dir: %s/data\nadmin_socket: %s/admin.sock\nlog: {level: error}\n", dir, dir))
}

// start runs a server and waits until it serves.
func start(t testing.TB, dir string) *running {
	t.Helper()
	return startWith(t, dir, configure(dir))
}

func startWith(t testing.TB, dir string, src config.Source) *running {
	t.Helper()
	r := &running{t: t, dir: dir, src: src, done: make(chan error, 1)}
	ctx, cancel := context.WithCancel(context.Background())
	r.end = cancel
	ready := make(chan struct{})
	go func() { r.done <- server.Run(ctx, r.src, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-r.done:
		t.Fatal(err)
	}
	var err error
	r.conn, err = grpc.NewClient("unix:"+filepath.Join(dir, "admin.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() { r.conn.Close(); cancel() })
	return r
}

func (r *running) stop() error {
	r.end()
	return <-r.done
}

func (r *running) create(path string) *types.Entry {
	r.t.Helper()
	res, err := entryv1.NewEntryClient(r.conn).BatchCreateEntry(r.t.Context(), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		SpiffeId:  &types.SPIFFEID{TrustDomain: "example.org", Path: path},
		ParentId:  &types.SPIFFEID{TrustDomain: "example.org", Path: "/node"},
		Selectors: []*types.Selector{{Type: "unix", Value: "uid:1"}},
	}}})
	must(r.t, err)
	return res.Results[0].Entry
}

func (r *running) mint() *x509.Certificate {
	r.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(r.t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{{Scheme: "spiffe", Host: "example.org", Path: "/x"}}}, key)
	must(r.t, err)
	res, err := svidv1.NewSVIDClient(r.conn).MintX509SVID(r.t.Context(), &svidv1.MintX509SVIDRequest{Csr: csr})
	must(r.t, err)
	leaf, err := x509.ParseCertificate(res.Svid.CertChain[0])
	must(r.t, err)
	return leaf
}

func TestAServerServesUntilItIsToldToStop(t *testing.T) {
	r := start(t, newDir(t))
	got, err := hallmarkv1.NewAdminServiceClient(r.conn).GetServer(t.Context(), &hallmarkv1.GetServerRequest{})
	must(t, err)
	if !strings.HasPrefix(got.Address, "127.0.0.1:") || strings.HasSuffix(got.Address, ":0") {
		t.Errorf("its address is %q", got.Address)
	}
	began := time.Now()
	must(t, r.stop())
	if took := time.Since(began); took >= 5*time.Second { // which calls that do not end have
		t.Errorf("it took %v to stop", took)
	}
	if _, err := os.Stat(filepath.Join(r.dir, "admin.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestARestartedServerGoesOnWithWhatItHad(t *testing.T) {
	dir := newDir(t)
	r := start(t, dir)
	e, before := r.create("/a"), r.mint()
	must(t, r.stop())
	r = start(t, dir)
	if got, err := entryv1.NewEntryClient(r.conn).GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: e.Id}); err != nil || got.SpiffeId.Path != "/a" {
		t.Errorf("the entry: %v %v", got, err)
	}
	if after := r.mint(); !bytes.Equal(after.AuthorityKeyId, before.AuthorityKeyId) {
		t.Error("another authority signs")
	}
	must(t, r.stop())
}

func TestBackup_T05_IsRestoredIntoAnEmptyServerWithAHigherSequenceNumber(t *testing.T) {
	r := start(t, newDir(t))
	e := r.create("/a")
	stream, err := hallmarkv1.NewAdminServiceClient(r.conn).Backup(t.Context(), &hallmarkv1.BackupRequest{})
	must(t, err)
	var copied bytes.Buffer
	for done := false; !done; {
		m, err := stream.Recv()
		must(t, err)
		copied.Write(m.Data)
		done = m.Done
	}
	if _, err := server.Restore(t.Context(), r.src, bytes.NewReader(copied.Bytes())); err == nil {
		t.Error("a backup was restored into a server that runs")
	}
	sequence := func() uint64 {
		b, err := bundlev1.NewBundleClient(r.conn).GetBundle(t.Context(), &bundlev1.GetBundleRequest{})
		must(t, err)
		return b.SequenceNumber
	}
	before := sequence()
	must(t, r.stop())
	dir := newDir(t)
	n, err := server.Restore(t.Context(), configure(dir), &copied)
	must(t, err)
	if n == 0 {
		t.Error("no records were restored")
	}
	r = start(t, dir)
	if _, err := entryv1.NewEntryClient(r.conn).GetEntry(t.Context(), &entryv1.GetEntryRequest{Id: e.Id}); err != nil {
		t.Error(err)
	}
	if n := sequence(); n < before+1000 { // whatever was published after the backup
		t.Errorf("the bundle's sequence number is %d, and was %d before", n, before)
	}
	r.mint() // with an authority of its own: a backup has no keys
	must(t, r.stop())
}

func TestAServerThatCannotStartSaysWhatIsToBlame(t *testing.T) {
	dir := newDir(t)
	r := start(t, dir)
	got, err := hallmarkv1.NewAdminServiceClient(r.conn).GetServer(t.Context(), &hallmarkv1.GetServerRequest{})
	must(t, err)
	other := newDir(t)
	for name, c := range map[string]struct{ set, want string }{
		"port":         {"listen=" + got.Address, "listen: " + got.Address + " is in use"},
		"socket":       {"admin_socket=" + dir + "/admin.sock", "admin_socket: "},
		"store":        {"data_dir=" + dir + "/data", dir + "/data/store"},
		"trust domain": {"data_dir=" + dir + "/stopped", `belongs to trust domain "example.org", not "other.org"`},
	} {
		t.Run(name, func(t *testing.T) {
			src := configure(other)
			if name == "trust domain" {
				stopped := start(t, other)
				must(t, stopped.stop())
				src.Set = append(src.Set, config.Setting{Path: "trust_domain", Value: "other.org", From: "--trust-domain"})
			} else {
				path, value, _ := strings.Cut(c.set, "=")
				src.Set = append(src.Set, config.Setting{Path: path, Value: value, From: "--" + path})
			}
			if err := server.Run(t.Context(), src, func() { t.Error("it is ready") }); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
	must(t, r.stop())
}

func TestAServerStopsWhileACallIsUnderWay(t *testing.T) {
	r := start(t, newDir(t))
	stream, err := hallmarkv1.NewAdminServiceClient(r.conn).Backup(t.Context(), &hallmarkv1.BackupRequest{})
	must(t, err) // left unread
	must(t, r.stop())
	for err == nil {
		_, err = stream.Recv()
	}
}

func TestAServerThatListensEverywhereWantsToKnowWhereAgentsFindIt(t *testing.T) {
	for advertise, want := range map[string]string{"": "set advertise to the host:port that agents should dial", "server.example.org:8081": ""} {
		dir := newDir(t)
		src := configure(dir)
		src.Data = append(bytes.Replace(src.Data, []byte("127.0.0.1:0"), []byte("0.0.0.0:0"), 1), fmt.Sprintf("advertise: %q\n", advertise)...)
		r := startWith(t, dir, src)
		info, err := hallmarkv1.NewAdminServiceClient(r.conn).GetJoinInfo(t.Context(), &hallmarkv1.GetJoinInfoRequest{})
		if want == "" && (err != nil || info.Address != advertise) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("with advertise %q: %v, %v", advertise, info, err)
		}
		must(t, r.stop())
	}
}
