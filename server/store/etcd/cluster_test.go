package etcd_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/hallmark-id/hallmark/server/metrics"
	"github.com/hallmark-id/hallmark/server/store"
	"github.com/hallmark-id/hallmark/server/store/etcd"
	"github.com/hallmark-id/hallmark/test/harness"
)

// external is a cluster of etcd processes that demand a certificate of their
// clients.
type external struct {
	etcd.Cluster
	t        *testing.T
	commands []harness.Command
	members  []*harness.Process
}

// startExternal starts a cluster of n members.
func startExternal(t *testing.T, n int) *external {
	t.Helper()
	harness.NeedCommand(t, "etcd")
	dir := t.TempDir()
	x := &external{t: t, members: make([]*harness.Process, n)}
	x.CA, x.Cert, x.Key = certificates(t, dir)
	var all, peers []string
	for i := range n {
		x.Endpoints = append(x.Endpoints, "https://"+harness.FreeAddress(t))
		peers = append(peers, "https://"+harness.FreeAddress(t))
		all = append(all, fmt.Sprintf("m%d=%s", i, peers[i]))
	}
	for i := range n {
		name := fmt.Sprint("m", i)
		x.commands = append(x.commands, harness.Command{Path: "etcd", Args: []string{
			"--name", name, "--data-dir", filepath.Join(dir, name), "--logger", "zap", "--log-level", "error",
			"--listen-client-urls", x.Endpoints[i], "--advertise-client-urls", x.Endpoints[i],
			"--listen-peer-urls", peers[i], "--initial-advertise-peer-urls", peers[i],
			"--initial-cluster", strings.Join(all, ","),
			"--client-cert-auth", "--trusted-ca-file", x.CA, "--cert-file", x.Cert, "--key-file", x.Key,
			"--peer-client-cert-auth", "--peer-trusted-ca-file", x.CA, "--peer-cert-file", x.Cert, "--peer-key-file", x.Key,
		}})
		x.start(i)
	}
	return x
}

// start starts a member, for the first time or again.
func (x *external) start(i int) {
	x.t.Helper()
	x.members[i] = x.commands[i].Start(x.t)
}

func (x *external) kill(i int) { x.members[i].Kill() }

func (x *external) client() *clientv3.Client {
	x.t.Helper()
	c, err := etcd.Dial(x.Cluster)
	if err != nil {
		x.t.Fatal(err)
	}
	return c
}

// leader returns which member leads.
func (x *external) leader(c *clientv3.Client) int {
	x.t.Helper()
	for range 100 {
		for i, endpoint := range x.Endpoints {
			ctx, cancel := context.WithTimeout(x.t.Context(), time.Second)
			s, err := c.Status(ctx, endpoint)
			cancel()
			if err == nil && s.Leader == s.Header.MemberId {
				return i
			}
		}
	}
	x.t.Fatal("no member leads")
	return 0
}

// rejoined waits until a member that was started again follows the leader: until
// then the other two are no majority without each other.
func (x *external) rejoined(c *clientv3.Client, i int) {
	x.t.Helper()
	harness.Eventually(x.t, "a member comes back", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		var at uint64
		for n, endpoint := range x.Endpoints {
			s, err := c.Status(ctx, endpoint)
			switch {
			case err != nil:
				return err
			case n != i:
				at = max(at, s.RaftAppliedIndex)
			}
		}
		s, err := c.Status(ctx, x.Endpoints[i])
		switch {
		case err != nil:
			return err
		case s.Leader == 0 || s.RaftAppliedIndex < at:
			return fmt.Errorf("it is at %d of %d", s.RaftAppliedIndex, at)
		}
		return nil
	})
}

// certificates makes a CA, and one certificate for members and clients.
func certificates(t *testing.T, dir string) (ca, cert, key string) {
	t.Helper()
	caKey, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	leafKey, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "member"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: root.NotBefore, NotAfter: root.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	write := func(name, kind string, der []byte, err error) string {
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, caKey.Public(), caKey)
	ca = write("ca.pem", "CERTIFICATE", der, err)
	der, err = x509.CreateCertificate(rand.Reader, leaf, root, leafKey.Public(), caKey)
	cert = write("cert.pem", "CERTIFICATE", der, err)
	der, err = x509.MarshalECPrivateKey(leafKey)
	return ca, cert, write("key.pem", "EC PRIVATE KEY", der, err)
}

func TestTheContractHoldsInAnExternalCluster(t *testing.T) {
	t.Parallel()
	contract(t, startExternal(t, 1).client)
}

// TestALeaderThatDiesTakesNothingAcknowledgedAlong kills the leader while
// several write, and counts what is there afterwards.
func TestALeaderThatDiesTakesNothingAcknowledgedAlong(t *testing.T) {
	t.Parallel()
	const writers = 4
	x := startExternal(t, 3)
	db := open(t, etcd.Options{Client: x.client(), Prefix: "p/", Name: "one"})
	probe := x.client()
	defer probe.Close()
	start := db.Commit(t.Context(), put("start", ""))[0].Revision

	var acknowledged [writers]atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, writers)
	for w := range writers {
		go func() {
			last := store.Revision(0)
			for i := 1; ctx.Err() == nil; i++ {
				r := db.Commit(t.Context(),
					put(fmt.Sprint("head", w), fmt.Sprint(i), store.Condition{Key: fmt.Sprint("head", w), Revision: last}),
					put(fmt.Sprintf("log%d/%06d", w, i), fmt.Sprint(i)))
				if r[0].Err != nil || r[1].Err != nil {
					ended <- fmt.Errorf("writer %d at %d: %v, %v", w, i, r[0].Err, r[1].Err)
					return
				}
				last = r[0].Revision
				acknowledged[w].Store(int64(i))
			}
			ended <- nil
		}()
	}
	// until waits until every writer has made some progress.
	until := func(n int64) time.Duration {
		began := time.Now()
		var from [writers]int64
		for w := range writers {
			from[w] = acknowledged[w].Load()
		}
		harness.Eventually(t, "writers make progress", func(context.Context) error {
			select {
			case err := <-ended:
				t.Fatalf("a writer has given up: %v", err)
			default:
			}
			for w := range writers {
				if now := acknowledged[w].Load(); now < from[w]+n {
					return fmt.Errorf("writer %d is at %d, was at %d", w, now, from[w])
				}
			}
			return nil
		})
		return time.Since(began)
	}
	for range 3 {
		until(20)
		leader := x.leader(probe)
		x.kill(leader)
		t.Logf("the leader was killed; all wrote again after %v", until(3).Round(time.Millisecond))
		x.start(leader)
		x.rejoined(probe, leader)
	}
	until(20)
	stop()
	for range writers {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	all := contents(t, db)
	folded := map[string]store.Record{}
	var last store.Revision
	db.Watch(t.Context(), start, func(changes []store.Change) error {
		for _, c := range changes {
			for _, r := range c.Writes {
				folded[r.Key] = r
				last = max(last, r.Revision)
			}
		}
		if len(folded) == len(all)-1 {
			return errors.New("all")
		}
		return nil
	})
	for w := range writers {
		n := acknowledged[w].Load()
		for i := int64(1); i <= n; i++ {
			key := fmt.Sprintf("log%d/%06d", w, i)
			if r, ok := all[key]; !ok || folded[key].Revision != r.Revision || !bytes.Equal(folded[key].Value, r.Value) {
				t.Errorf("%s was acknowledged; the store has %+v, the watch saw %+v", key, r, folded[key])
			}
		}
		if head := string(all[fmt.Sprint("head", w)].Value); head != fmt.Sprint(n) {
			t.Errorf("writer %d was acknowledged up to %d, its head is %s", w, n, head)
		}
	}
}

func TestWithoutAMajorityWritesFailInTimeAndGoOnAfterwards(t *testing.T) {
	t.Parallel()
	x := startExternal(t, 3)
	db := open(t, etcd.Options{Client: x.client(), Prefix: "p/", Name: "one"})
	start := db.Commit(t.Context(), put("a", "1"))[0].Revision
	seen := make(chan store.Change, 100)
	go db.Watch(t.Context(), start, func(changes []store.Change) error {
		for _, c := range changes {
			seen <- c
		}
		return nil
	})
	x.kill(0)
	x.kill(1)
	began := time.Now()
	results := make(chan store.Result, 3)
	for i := range 3 {
		go func() { results <- db.Commit(t.Context(), put(fmt.Sprint("b", i), "1"))[0] }()
	}
	for range 3 {
		if r := <-results; !errors.Is(r.Err, store.ErrNoQuorum) || !strings.Contains(r.Err.Error(), "not known") {
			t.Errorf("Commit: %v", r.Err)
		}
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("three writes at once failed after %v", took)
	}
	if _, err := db.Read(t.Context(), "", func(store.Record) error { return nil }); !errors.Is(err, store.ErrNoQuorum) {
		t.Errorf("Read: %v", err)
	}
	if err := db.Ready(t.Context()); err != nil {
		t.Errorf("Ready: %v", err)
	}
	x.start(0)
	var r store.Result
	for range 10 {
		if r = db.Commit(t.Context(), put("c", "1"))[0]; r.Err == nil {
			break
		}
	}
	if r.Err != nil {
		t.Fatalf("with a majority again: %v", r.Err)
	}
	for c := range seen { // the watch has gone on
		if c.Revision == r.Revision {
			break
		}
	}
}

// TestServersKnowWhoIsThereAndWhetherTheyAreAMajority is about what operators
// and agents are told.
func TestServersKnowWhoIsThereAndWhetherTheyAreAMajority(t *testing.T) {
	t.Parallel()
	x := startExternal(t, 3)
	counted := metrics.New(nil)
	majority := func() float64 {
		var m dto.Metric
		if err := counted.Majority.Write(&m); err != nil {
			t.Fatal(err)
		}
		return m.GetGauge().GetValue()
	}
	var mu sync.Mutex
	var there []string
	announce := func(name string, seen func([]etcd.Server)) (stop func()) {
		db := open(t, etcd.Options{Client: x.client(), Prefix: "p/", Name: name, Metrics: counted})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = db.Announce(ctx, etcd.Server{Name: name, Address: name + ".test:8081"}, func() store.Revision { return 1 }, seen)
		}()
		stop = sync.OnceFunc(func() { cancel(); <-done })
		t.Cleanup(stop)
		return stop
	}
	announce("a", func(list []etcd.Server) {
		mu.Lock()
		defer mu.Unlock()
		there = there[:0]
		for _, s := range list {
			there = append(there, s.Address)
		}
	})
	leave := announce("b", func([]etcd.Server) {})
	are := func(want ...string) func(context.Context) error {
		return func(context.Context) error {
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(there, want) {
				return fmt.Errorf("there are %v", there)
			}
			return nil
		}
	}
	is := func(want float64) func(context.Context) error {
		return func(context.Context) error {
			if got := majority(); got != want {
				return fmt.Errorf("the metric is %v", got)
			}
			return nil
		}
	}
	harness.Eventually(t, "both", are("a.test:8081", "b.test:8081"))
	leave()
	harness.Eventually(t, "the other has left", are("a.test:8081"))
	harness.Eventually(t, "a majority", is(1))
	x.kill(0)
	x.kill(1)
	harness.Eventually(t, "no majority", is(0))
	x.start(0)
	harness.Eventually(t, "a majority again", is(1))
}

func TestAClientWithoutACertificateIsRefused(t *testing.T) {
	t.Parallel()
	x := startExternal(t, 1)
	open(t, etcd.Options{Client: x.client(), Prefix: "p/", Name: "one"})
	bare := etcd.Cluster{Endpoints: x.Endpoints, CA: x.CA}
	c, err := etcd.Dial(bare)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := etcd.Open(ctx, etcd.Options{Client: c, Prefix: "p/", Name: "two"}); err == nil {
		t.Error("it was let in")
	}
}
