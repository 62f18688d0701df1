package issue_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"net/url"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hallmark-id/hallmark/pkg/entry"
)

// The floor: what no implementation can do without. Compare the benchmarks
// below with BenchmarkFloorX509 and BenchmarkFloorJWT of the same run.

func BenchmarkFloorX509(b *testing.B) {
	key, csr, digest := newKey(b, elliptic.P256()), newCSR(b, nil), sha256.Sum256(nil)
	b.ReportAllocs()
	for b.Loop() {
		request, err := x509.ParseCertificateRequest(csr)
		if err != nil {
			b.Fatal(err)
		}
		if err := request.CheckSignature(); err != nil {
			b.Fatal(err)
		}
		if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkFloorJWT(b *testing.B) {
	key, digest := newKey(b, elliptic.P256()), sha256.Sum256(nil)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ecdsa.SignASN1(rand.Reader, key, digest[:]); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWorkloadX509(b *testing.B) {
	h, csr := newHouse(b), newCSR(b, nil)
	e := workload(b, func(e *entry.Entry) { e.DNSNames = []string{"web.example.org"} })
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.WorkloadX509(context.Background(), e, csr); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkNodeX509(b *testing.B) {
	h, csr := newHouse(b), newCSR(b, nil)
	id := spiffeid.RequireFromPath(td, "/spire/agent/join_token/1")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.NodeX509(context.Background(), id, csr); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMintX509(b *testing.B) {
	h := newHouse(b)
	csr := newCSR(b, &x509.CertificateRequest{URIs: []*url.URL{uri(b, "spiffe://example.org/web")}})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.MintX509(context.Background(), csr, 0); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWorkloadJWT(b *testing.B) {
	h, e := newHouse(b), workload(b)
	audience := []string{"spiffe://example.org/db"}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.WorkloadJWT(context.Background(), e, audience); err != nil {
			b.Fatal(err)
		}
	}
}
