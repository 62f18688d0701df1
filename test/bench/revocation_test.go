package bench

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"

	"github.com/hallmark-id/hallmark/pkg/revocation"
	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/test/harness"
)

// crlWatch is a workload that notes when its open stream of X509-SVIDs has a CRL
// with a serial number.
type crlWatch struct {
	mu   sync.Mutex
	want string            // serial number
	got  chan<- time.Time  // told when it is there
	leaf *x509.Certificate // what the workload has now
}

func (w *crlWatch) note(msg *workload.X509SVIDResponse) {
	at := time.Now()
	for _, s := range msg.Svids {
		if chain, err := x509.ParseCertificates(s.X509Svid); err == nil {
			w.mu.Lock()
			w.leaf = chain[0]
			w.mu.Unlock()
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.got == nil {
		return
	}
	for _, der := range msg.Crl {
		list, err := x509.ParseRevocationList(der)
		if err != nil {
			continue
		}
		for i := len(list.RevokedCertificateEntries) - 1; i >= 0; i-- {
			if string(list.RevokedCertificateEntries[i].SerialNumber.Bytes()) == w.want {
				w.got <- at
				w.got = nil
				return
			}
		}
	}
}

// revocable is a fleet whose workloads watch for CRLs, each with a verifier of
// pkg/revocation beside it.
type revocable struct {
	*fleet
	watches   []*crlWatch
	verifiers []*revocation.Source
}

func startRevocable(b *testing.B, agents int) *revocable {
	b.Helper()
	r := &revocable{fleet: startFleet(b, agents, 0)}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	b.Cleanup(func() { stop(); running.Wait() })
	for _, dir := range r.dirs {
		socket := filepath.Join(dir, "w.sock")
		w := &crlWatch{}
		r.watches = append(r.watches, w)
		client, conn := dialWorkload(b, &harness.Domain{Socket: socket})
		running.Go(func() {
			defer conn.Close()
			for ctx.Err() == nil {
				stream, err := client.FetchX509SVID(secured(ctx), &workload.X509SVIDRequest{}, grpc.WaitForReady(true))
				for err == nil {
					var msg *workload.X509SVIDResponse
					if msg, err = stream.Recv(); err == nil {
						w.note(msg)
					}
				}
				time.Sleep(10 * time.Millisecond)
			}
		})
		v, err := revocation.NewSource(b.Context(), revocation.Options{Address: "unix://" + socket})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { v.Close() })
		r.verifiers = append(r.verifiers, v)
	}
	harness.Eventually(b, "all workloads have an SVID", func(context.Context) error {
		for _, w := range r.watches {
			if w.victim() == nil {
				return errors.New("one has none")
			}
		}
		return nil
	})
	return r
}

func (w *crlWatch) victim() *x509.Certificate {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.leaf
}

// revoke revokes what a workload has now, and returns how long it took from the
// call until each stream had the CRL, and until each verifier refused it.
func (r *revocable) revokeOne(b *testing.B, victim *x509.Certificate) (streams, verifiers latencies) {
	b.Helper()
	told, refused := make(chan time.Time, len(r.watches)), make(chan time.Time, len(r.verifiers))
	for _, w := range r.watches {
		w.mu.Lock()
		w.want, w.got = string(victim.SerialNumber.Bytes()), told
		w.mu.Unlock()
	}
	state := tls.ConnectionState{PeerCertificates: []*x509.Certificate{victim}}
	ctx, cancel := context.WithTimeout(b.Context(), time.Minute)
	defer cancel()
	for _, v := range r.verifiers {
		if err := v.Verify(state); err != nil {
			b.Fatal(err)
		}
		go func() {
			for {
				updated := v.Updated()
				if errors.Is(v.Verify(state), revocation.ErrRevoked) {
					refused <- time.Now()
					return
				}
				select {
				case <-updated:
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	start := time.Now()
	resp, err := r.admin.RevokeSVIDs(ctx, &hallmarkv1.RevokeSVIDsRequest{Revocations: []*hallmarkv1.Revocation{{
		SerialNumber: victim.SerialNumber.Bytes(), AuthorityId: hex.EncodeToString(victim.AuthorityKeyId),
	}}})
	if err != nil || resp.AgentsMissing || !resp.Authorities[0].Covered {
		b.Fatal(resp, err)
	}
	for range r.watches {
		select {
		case at := <-told:
			streams = append(streams, at.Sub(start))
		case <-ctx.Done():
			b.Fatal("a stream has no CRL")
		}
		select {
		case at := <-refused:
			verifiers = append(verifiers, at.Sub(start))
		case <-ctx.Done():
			b.Fatal("a verifier does not refuse")
		}
	}
	return streams, verifiers
}

func (r *revocable) measure(b *testing.B) {
	var streams, verifiers latencies
	var server, all time.Duration
	i := 0
	for b.Loop() {
		serverBefore, allBefore := cpu(b, r.server), cpu(b, os.Getpid())
		s, v := r.revokeOne(b, r.watches[i%len(r.watches)].victim())
		streams, verifiers = append(streams, s...), append(verifiers, v...)
		server, all = server+cpu(b, r.server)-serverBefore, all+cpu(b, os.Getpid())-allBefore
		i++
		time.Sleep(50 * time.Millisecond) // the victim's agent has another signed
	}
	b.ReportMetric(server.Seconds()*1e3/float64(i), "server-cpu-ms/op")
	b.ReportMetric(all.Seconds()*1e3/float64(i), "agents-cpu-ms/op") // and workloads and verifiers
	streams.reportAs(b, "stream-")
	verifiers.reportAs(b, "verifier-")
}

// BenchmarkRevokeSVID is the time from the call that revokes an X509-SVID until the
// open streams of workloads on so many agents have the CRL (stream-*), and until
// a verifier on each refuses it (verifier-*).
func BenchmarkRevokeSVID(b *testing.B) {
	for _, agents := range []int{10, 200} {
		b.Run(fmt.Sprintf("agents=%d", agents), func(b *testing.B) { startRevocable(b, agents).measure(b) })
	}
}

// BenchmarkRevokeSVIDBeside10000 is BenchmarkRevokeSVID with 20 agents, while 10,000
// certificates of the authority are revoked, which is nearly the most.
func BenchmarkRevokeSVIDBeside10000(b *testing.B) {
	r := startRevocable(b, 20)
	authority := hex.EncodeToString(r.watches[0].victim().AuthorityKeyId)
	began := time.Now()
	for range 9900 / 50 {
		req := &hallmarkv1.RevokeSVIDsRequest{}
		for range 50 {
			serial := make([]byte, 20)
			rand.Read(serial)
			serial[0] = 0x41
			req.Revocations = append(req.Revocations, &hallmarkv1.Revocation{SerialNumber: serial, AuthorityId: authority})
		}
		if _, err := r.admin.RevokeSVIDs(b.Context(), req); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(time.Since(began).Seconds(), "s-to-revoke-9900")
	r.measure(b)
}
