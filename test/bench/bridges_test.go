package bench

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/hallmark-id/hallmark/test/harness"
)

// BenchmarkTokenExchange is a token of an outside issuer for a JWT-SVID, over
// HTTPS: each caller's next exchange begins when its last has ended. Each token is
// used once, so each exchange is a write, which is on the disk before the answer.
func BenchmarkTokenExchange(b *testing.B) {
	for _, callers := range []int{1, 16} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) { exchange(b, callers) })
	}
}

func exchange(b *testing.B, callers int) {
	provider := harness.NewIssuer(b)
	authority := harness.NewAuthority(b)
	certificate, key := authority.ServerFiles(b, "127.0.0.1")
	address := harness.FreeAddress(b)
	endpoint := "https://" + address
	d := harness.NewDomain(b, harness.Settings{Server: fmt.Sprintf(
		"log: {level: error}\nlimits: {attest_per_second: 100000, sign_per_second: 100000}\n"+
			"token_exchange: {listen: '%s', issuer: '%s', https_web: {certificate: %s, key: %s}, "+
			"issuers: [{name: ci, issuer: '%s', ca_path: %s, allow_loopback: true}]}\n", address, endpoint, certificate, key, provider.URL, provider.CA)})
	d.StartServer(b)
	d.Admin(b, "entry", "create", "--spiffe-id", "/deploy", "--parent-id", "/hallmark/issuer/ci", "--selector", "oidc:sub:job-7")
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: authority.Pool()}, MaxIdleConnsPerHost: callers,
	}}
	b.Cleanup(client.CloseIdleConnections)
	var tokens atomic.Int64
	once := func() (time.Duration, error) {
		token := provider.Sign(b, provider.Claims(endpoint, map[string]any{"jti": fmt.Sprint(tokens.Add(1))}))
		start := time.Now()
		resp, err := client.PostForm(endpoint+"/token", url.Values{
			"grant_type": {"urn:ietf:params:oauth:grant-type:token-exchange"}, "subject_token": {token},
			"subject_token_type": {"urn:ietf:params:oauth:token-type:jwt"}, "audience": {"https://api.example.org"},
		})
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("%s: %s, %v", resp.Status, body, err)
		}
		return time.Since(start), nil
	}
	if _, err := once(); err != nil {
		b.Fatal(err)
	}
	var mu sync.Mutex
	var all latencies
	var left atomic.Int64
	before := cpu(b, d.Server.PID())
	b.ResetTimer()
	left.Store(int64(b.N))
	var calling sync.WaitGroup
	for range callers {
		calling.Go(func() {
			for left.Add(-1) >= 0 {
				took, err := once()
				if err != nil {
					b.Error(err)
					return
				}
				mu.Lock()
				all = append(all, took)
				mu.Unlock()
			}
		})
	}
	calling.Wait()
	b.StopTimer()
	if b.Failed() {
		return
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "exchanges/s")
	perOp(b, before, cpu(b, d.Server.PID()), b.N)
	all.report(b)
}

// BenchmarkBundleFanOut is the time from the call that changes the bundle of a
// foreign trust domain until each of 1,000 open streams of an agent has it.
func BenchmarkBundleFanOut(b *testing.B) {
	const connections, streams = 20, 50 // of each
	d, admin := startServer(b)
	d.StartAgent(b, d.Join(b))
	bundles := []*types.Bundle{foreignBundle(b, 1), foreignBundle(b, 2)}
	set := func(bundle *types.Bundle) {
		resp, err := bundlev1.NewBundleClient(admin).BatchSetFederatedBundle(b.Context(), &bundlev1.BatchSetFederatedBundleRequest{Bundle: []*types.Bundle{bundle}})
		if err != nil || resp.Results[0].Status.Code != 0 {
			b.Fatal(resp, err)
		}
	}
	set(bundles[0])
	d.Entry(b, "/bench", os.Getuid(), "--federates-with", "other.org")

	ctx, stop := context.WithCancel(b.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	type arrival struct {
		bundle []byte
		at     time.Time
	}
	arrivals := make(chan arrival, connections*streams)
	for range connections {
		client, conn := dialWorkload(b, d)
		defer conn.Close()
		for range streams {
			stream, err := client.FetchX509Bundles(secured(ctx), &workload.X509BundlesRequest{})
			if err != nil {
				b.Fatal(err)
			}
			running.Go(func() {
				for {
					msg, err := stream.Recv()
					if err != nil {
						return
					}
					arrivals <- arrival{msg.Bundles["spiffe://other.org"], time.Now()}
				}
			})
		}
	}
	await := func(bundle *types.Bundle, start time.Time) (l latencies) {
		late := time.After(30 * time.Second)
		for len(l) < connections*streams {
			select {
			case a := <-arrivals:
				if bytes.Equal(a.bundle, bundle.X509Authorities[0].Asn1) {
					l = append(l, a.at.Sub(start))
				}
			case <-late:
				b.Fatalf("%d streams have the bundle after 30 s", len(l))
			}
		}
		return l
	}
	await(bundles[0], time.Now())
	var all, last latencies
	server, agent := cpu(b, d.Server.PID()), cpu(b, d.Agent.PID())
	b.ResetTimer()
	for i := range b.N {
		bundle := bundles[(i+1)%2]
		start := time.Now()
		set(bundle)
		l := await(bundle, start)
		all = append(all, l...)
		slowest := l[0]
		for _, took := range l {
			slowest = max(slowest, took)
		}
		last = append(last, slowest)
	}
	b.StopTimer()
	b.ReportMetric(float64(cpu(b, d.Server.PID())-server)/1e6/float64(b.N), "server-cpu-ms/op")
	b.ReportMetric(float64(cpu(b, d.Agent.PID())-agent)/1e6/float64(b.N), "agent-cpu-ms/op")
	all.report(b)
	last.reportAs(b, "last-")
}

// foreignBundle is one with an authority of its own.
func foreignBundle(b *testing.B, sequence uint64) *types.Bundle {
	b.Helper()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(int64(sequence)), Subject: pkix.Name{CommonName: fmt.Sprint("other.org ", sequence)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, URIs: []*url.URL{{Scheme: "spiffe", Host: "other.org"}},
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		b.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		b.Fatal(err)
	}
	return &types.Bundle{TrustDomain: "other.org", X509Authorities: []*types.X509Certificate{{Asn1: der}}, SequenceNumber: sequence}
}
