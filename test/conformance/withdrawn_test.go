package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/test/harness"
)

// script is a Workload API that sends a test's messages, one after the other.
// Nil ends a stream: the process may have nothing any more.
type script struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	socket string
	x509   chan *workload.X509SVIDResponse
	roots  chan *workload.X509BundlesResponse
	keys   chan *workload.JWTBundlesResponse
	tokens atomic.Pointer[workload.JWTSVIDResponse]
}

func newScript(t testing.TB) *script {
	t.Helper()
	s := &script{
		x509: make(chan *workload.X509SVIDResponse), roots: make(chan *workload.X509BundlesResponse), keys: make(chan *workload.JWTBundlesResponse),
	}
	s.socket = serveWorkload(t, s)
	return s
}

var errWithdrawn = status.Error(codes.PermissionDenied, "no identity issued")

func relay[T any](from chan *T, stream grpc.ServerStreamingServer[T]) error {
	for {
		select {
		case m := <-from:
			if m == nil {
				return errWithdrawn
			}
			if err := stream.Send(m); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (s *script) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return relay(s.x509, stream)
}

func (s *script) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return relay(s.roots, stream)
}

func (s *script) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return relay(s.keys, stream)
}

func (s *script) FetchJWTSVID(context.Context, *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if m := s.tokens.Load(); m != nil {
		return m, nil
	}
	return nil, errWithdrawn
}

func (s *script) fetch(args ...string) harness.Command {
	return harness.Command{Args: append(append([]string{"fetch"}, args...), "-o", "json"), Env: []string{"SPIFFE_ENDPOINT_SOCKET=unix://" + s.socket}}
}

// holds waits until a directory has these files and no others.
func holds(t testing.TB, dir string, want ...string) {
	t.Helper()
	slices.Sort(want)
	harness.Eventually(t, "the files in "+dir, func(context.Context) error {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		got := []string{}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") {
				got = append(got, e.Name())
			}
		}
		if !slices.Equal(got, want) {
			return fmt.Errorf("they are %q, want %q", got, want)
		}
		return nil
	})
}

// lastLine decodes the last line that a watch printed.
func lastLine(t testing.TB, p *harness.Process) []map[string]any {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(p.Stdout()), "\n")
	var items []map[string]any
	must(t, json.Unmarshal([]byte(lines[len(lines)-1]), &items))
	return items
}

// printed waits until a watch has printed so many lines.
func printed(t testing.TB, p *harness.Process, lines int) []map[string]any {
	t.Helper()
	harness.Eventually(t, "lines of a watch", func(context.Context) error {
		if n := strings.Count(p.Stdout(), "\n"); n != lines {
			return fmt.Errorf("%d so far, want %d", n, lines)
		}
		return nil
	})
	return lastLine(t, p)
}

func (w *world) two(t testing.TB, hint string) []*workload.X509SVID {
	t.Helper()
	w.entry(t, "/second", fmt.Sprint("uid:", os.Getuid()))
	self, second := w.fetch(t, "/self"), w.fetch(t, "/second")
	self.Hint, second.Hint = hint, hint
	return []*workload.X509SVID{self, second}
}

func TestWorkloadAPI_A09_A22_A24_WhatIsMissingFromAMessageIsGoneForTheClient(t *testing.T) {
	svids, dir := theWorld(t).two(t, ""), t.TempDir()
	s := newScript(t)
	p := s.fetch("x509", "--watch", "--write", dir).Start(t)
	one := []string{"svid.0.pem", "svid.0.key", "bundle.0.pem"}
	both := append([]string{"svid.1.pem", "svid.1.key", "bundle.1.pem"}, one...)

	svids[0].Hint = "first"
	s.x509 <- &workload.X509SVIDResponse{Svids: svids}
	if items := printed(t, p, 1); len(items) != 2 || items[0]["hint"] != "first" {
		t.Errorf("got %v", items)
	}
	holds(t, dir, both...)

	svids[0].Hint = "" // as if it were not set
	s.x509 <- &workload.X509SVIDResponse{Svids: svids}
	if items := printed(t, p, 2); len(items) != 2 || items[0]["hint"] != nil {
		t.Errorf("got %v", items)
	}

	svids[0].Hint, svids[1].Hint = "same", "same" // of two alike the first counts
	s.x509 <- &workload.X509SVIDResponse{Svids: svids}
	if items := printed(t, p, 3); len(items) != 1 || items[0]["spiffe_id"] != svids[0].SpiffeId {
		t.Errorf("got %v", items)
	}
	holds(t, dir, one...)

	s.x509 <- nil // the last one was taken away
	holds(t, dir)
	s.x509 <- &workload.X509SVIDResponse{Svids: svids[1:]}
	if items := printed(t, p, 4); len(items) != 1 || items[0]["spiffe_id"] != svids[1].SpiffeId {
		t.Errorf("got %v", items)
	}
	holds(t, dir, one...)
	p.Stop(t)
	go func() { s.x509 <- nil }()
	if _, _, code := s.fetch("x509", "--write", dir).Try(t); code != 4 {
		t.Errorf("exit status %d", code)
	}
	holds(t, dir)
}

func TestWorkloadAPI_A10_A27_BundlesThatAreGoneAreForgotten(t *testing.T) {
	own, other := "spiffe://"+domain, "spiffe://other.org"
	svid, dir := theWorld(t).fetch(t, "/self"), t.TempDir()
	roots := func(ids ...string) *workload.X509BundlesResponse {
		m := &workload.X509BundlesResponse{Bundles: map[string][]byte{}}
		for _, id := range ids {
			m.Bundles[id] = svid.Bundle
		}
		return m
	}
	keys := func(ids ...string) *workload.JWTBundlesResponse {
		m := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
		for _, id := range ids {
			m.Bundles[id] = []byte(`{"keys":[]}`)
		}
		return m
	}
	files := func(domains ...string) (out []string) {
		for _, d := range domains {
			out = append(out, d+".pem", d+".jwks.json")
		}
		return append(out, "mine.org.pem")
	}
	must(t, os.WriteFile(dir+"/mine.org.pem", nil, 0o600)) // nobody else's file is touched
	s := newScript(t)
	p := s.fetch("bundle", "--watch", "--write", dir).Start(t)
	s.roots <- roots(own, other)
	s.keys <- keys(own, other)
	if items := printed(t, p, 1); len(items) != 2 {
		t.Errorf("got %v", items)
	}
	holds(t, dir, files(domain, "other.org")...)

	s.roots <- roots(own)
	printed(t, p, 2)
	s.keys <- keys(own)
	if items := printed(t, p, 3); len(items) != 1 || items[0]["trust_domain"] != domain {
		t.Errorf("got %v", items)
	}
	holds(t, dir, files(domain)...)

	s.keys <- nil
	holds(t, dir, files()...)
	s.keys <- keys(own)
	printed(t, p, 4)
	holds(t, dir, files(domain)...)
	p.Stop(t)

	// Nor does a later command leave what an earlier one wrote.
	go func() { s.roots <- roots(other); s.keys <- keys(other) }()
	s.fetch("bundle", "--write", dir).Run(t)
	holds(t, dir, files("other.org")...)
	go func() { s.roots <- nil }()
	if _, _, code := s.fetch("bundle", "--write", dir).Try(t); code != 4 {
		t.Errorf("exit status %d", code)
	}
	holds(t, dir, files()...)
}

func TestWorkloadAPI_A22_A24_TokensToo(t *testing.T) {
	w, dir := theWorld(t), t.TempDir()
	w.two(t, "")
	m, err := w.api().FetchJWTSVID(called(t), &workload.JWTSVIDRequest{Audience: []string{"us"}})
	must(t, err)
	if len(m.Svids) != 2 {
		t.Fatalf("the agent gave %d tokens", len(m.Svids))
	}
	s := newScript(t)
	s.tokens.Store(m)
	fetch := s.fetch("jwt", "--audience", "us", "--write", dir)
	fetch.Run(t)
	holds(t, dir, "svid.0.jwt", "svid.1.jwt")
	m = proto.Clone(m).(*workload.JWTSVIDResponse) // the first may still be on its way
	m.Svids[0].Hint, m.Svids[1].Hint = "same", "same"
	s.tokens.Store(m)
	if out := fetch.Run(t); strings.Count(out, `"spiffe_id"`) != 1 || !strings.Contains(out, m.Svids[0].SpiffeId) {
		t.Errorf("got %s", out)
	}
	holds(t, dir, "svid.0.jwt")
	s.tokens.Store(nil)
	if _, _, code := fetch.Try(t); code != 4 {
		t.Errorf("exit status %d", code)
	}
	holds(t, dir)
}
