package node_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/held"
	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
)

func csr(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestX509SVIDsAreSignedInTheOrderOfTheRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
		w.Entries["b"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/b")
		r := w.run(t)
		r.connected(t)

		results, err := r.SignX509(t.Context(), []held.X509Request{
			{EntryID: "b", CSR: csr(t)}, {EntryID: "gone", CSR: csr(t)}, {EntryID: "a", CSR: csr(t)}, {EntryID: "a", CSR: []byte("x")},
		})
		if err != nil || len(results) != 4 {
			t.Fatalf("%d results, %v", len(results), err)
		}
		for i, want := range map[int]string{0: "spiffe://example.org/b", 2: "spiffe://example.org/a"} {
			cert, err := x509.ParseCertificate(results[i].Chain[0])
			if err != nil {
				t.Fatal(err)
			}
			if id, _ := x509svid.IDFromCert(cert); id.String() != want || !results[i].ExpiresAt.Equal(cert.NotAfter) || results[i].Err != nil {
				t.Errorf("result %d is of %s until %v, want %s", i, id, results[i].ExpiresAt, want)
			}
		}
		if status.Code(results[1].Err) != codes.NotFound {
			t.Errorf("unknown entry: %v", results[1].Err)
		}
		if status.Code(results[3].Err) != codes.InvalidArgument {
			t.Errorf("malformed CSR: %v", results[3].Err)
		}
	})
}

func TestAnX509SVIDThatIsNotWhatWasAskedForIsNotUsed(t *testing.T) {
	other := nodetest.NewAuthority(t)
	for want, alter := range map[string]func(w *world, s *types.X509SVID){
		"chain of 0":             func(_ *world, s *types.X509SVID) { s.CertChain = nil },
		"bundle does not verify": func(w *world, s *types.X509SVID) { s.CertChain = w.Chain(other, "/a") },
		"no X.509 bundle found": func(w *world, s *types.X509SVID) {
			s.CertChain = w.ChainOf(spiffeid.RequireFromString("spiffe://other.org/a"))
		},
	} {
		t.Run(want, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := joining(t)
				w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
				r := w.run(t)
				r.connected(t)
				w.Alter = func(s *types.X509SVID) { alter(w, s) }
				results, err := r.SignX509(t.Context(), []held.X509Request{{EntryID: "a", CSR: csr(t)}})
				if err != nil {
					t.Fatal(err)
				}
				wantError(t, results[0].Err, want)
				if results[0].Chain != nil {
					t.Error("there is a chain")
				}
			})
		})
	}
}

func TestWITSVIDsAreSignedInTheOrderOfTheRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
		w.Entries["b"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/b")
		r := w.run(t)
		r.connected(t)

		results, err := r.SignWIT(t.Context(), []held.WITRequest{
			{EntryID: "b", PublicKey: []byte("key 1"), Algorithm: "ES256"}, {EntryID: "gone"}, {EntryID: "a", PublicKey: []byte("key 2"), Algorithm: "PS512"},
			{EntryID: "b", PublicKey: bytes.Repeat([]byte("x"), 64<<10)},
		})
		if err != nil || len(results) != 4 {
			t.Fatalf("%d results, %v", len(results), err)
		}
		for i, want := range map[int]string{0: "token of spiffe://example.org/b for key 1, ES256", 2: "token of spiffe://example.org/a for key 2, PS512"} {
			if results[i].Token != want || results[i].Err != nil {
				t.Errorf("result %d is %v, want %q", i, results[i], want)
			}
		}
		if status.Code(results[1].Err) != codes.NotFound || results[1].Token != "" {
			t.Errorf("unknown entry: %v", results[1])
		}
		wantError(t, results[3].Err, "the most is 65536")
		if none, err := r.SignWIT(t.Context(), nil); none != nil || err != nil {
			t.Errorf("for nothing came %v, %v", none, err)
		}
	})
}

func TestABatchThatIsTooLargeIsNotSent(t *testing.T) {
	w := joining(t)
	n, err := node.Open(w.options)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	_, err = n.SignX509(t.Context(), make([]held.X509Request, held.MaxBatch+1))
	wantError(t, err, "the most is 500")
	_, err = n.SignWIT(t.Context(), make([]held.WITRequest, held.MaxBatch+1))
	wantError(t, err, "the most is 500")
}

func TestAJWTSVIDIsSigned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
		r := w.run(t)
		r.connected(t)
		got, err := r.SignJWT(t.Context(), "a", []string{"x", "y"})
		if err != nil {
			t.Fatal(err)
		}
		if got.Token != "token of spiffe://example.org/a for [x y]" || got.ExpiresAt.Sub(got.IssuedAt) != 5*time.Minute {
			t.Errorf("got %+v", got)
		}
		_, err = r.SignJWT(t.Context(), "gone", []string{"x"})
		if status.Code(errors.Unwrap(err)) != codes.NotFound {
			t.Errorf("unknown entry: %v", err)
		}
	})
}

func TestACallWaitsForTheNextConnectionButNotForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
		r := w.run(t)
		l := r.connected(t)
		w.Stop()
		w.Start()
		<-l.Done()
		if _, err := r.SignJWT(t.Context(), "a", []string{"x"}); err != nil {
			t.Errorf("right after a restart of the server: %v", err)
		}

		l = r.connected(t)
		w.Stop()
		<-l.Done()
		start := time.Now()
		_, err := r.SignJWT(t.Context(), "a", []string{"x"})
		if !errors.Is(err, node.ErrUnavailable) || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("without a server: %v", err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("failed after %v", took)
		}
		start = time.Now()
		if _, err = r.SignJWT(t.Context(), "a", []string{"x"}); !errors.Is(err, node.ErrUnavailable) || time.Since(start) > 0 {
			t.Errorf("later: %v after %v", err, time.Since(start))
		}
	})
}

func TestAServerThatDoesNotAnswerIsNotWaitedForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		w.Lock()
		w.Before = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		w.Unlock()
		start := time.Now()
		if _, err := r.SignJWT(t.Context(), "a", []string{"x"}); err == nil || time.Since(start) != 10*time.Second {
			t.Errorf("JWT: %v after %v", err, time.Since(start))
		}
		start = time.Now()
		if _, err := r.SignX509(t.Context(), []held.X509Request{{EntryID: "a", CSR: csr(t)}}); err == nil || time.Since(start) != 30*time.Second {
			t.Errorf("X.509: %v after %v", err, time.Since(start))
		}
	})
}

// The server lets go of the former SVID as soon as it sees the next one: calls
// that were under way then are made again, not lost.
func TestNoCallIsLostWhenTheNodeRenews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.AgentTTL = 10 * time.Second
		w.Entries["a"] = spiffeid.RequireFromPath(nodetest.TrustDomain, "/a")
		var count atomic.Int64
		w.Before = func(ctx context.Context, method string) error {
			if strings.HasSuffix(method, "NewJWTSVID") { // some are always under way, and overtaken
				time.Sleep(time.Duration(1+count.Add(1)%2*89) * time.Millisecond)
			}
			return nil
		}
		r := w.run(t)
		r.connected(t)
		ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
		defer cancel()
		calls := make(chan error)
		for i := range 4 {
			go func() {
				time.Sleep(time.Duration(i) * 17 * time.Millisecond)
				for ctx.Err() == nil {
					_, err := r.SignJWT(context.WithoutCancel(ctx), "a", []string{"x"})
					calls <- err
				}
				calls <- context.Canceled
			}()
		}
		n := 0
		for ends := 0; ends < 4; n++ {
			switch err := <-calls; {
			case errors.Is(err, context.Canceled):
				ends++
			case err != nil:
				t.Fatalf("call %d: %v", n, err)
			}
		}
		if renewals := w.CallCount("RenewAgent"); renewals < 5 || n < 400 {
			t.Errorf("%d renewals under %d calls", renewals, n)
		}
	})
}
