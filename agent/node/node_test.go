package node_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hallmark-id/hallmark/agent/node"
	"github.com/hallmark-id/hallmark/agent/node/nodetest"
	"github.com/hallmark-id/hallmark/pkg/bundle"
)

const token = "join-token-1"

var (
	tokenAgent = spiffeid.RequireFromPath(nodetest.TrustDomain, "/spire/agent/join_token/"+token)
	testAgent  = spiffeid.RequireFromPath(nodetest.TrustDomain, "/spire/agent/test/node-1")
)

// world is a server and the options of a node for it.
type world struct {
	*nodetest.Server
	options node.Options
	log     *logBuffer
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s := nodetest.New(t)
	log := &logBuffer{}
	return &world{Server: s, log: log, options: node.Options{
		TrustDomain: nodetest.TrustDomain, Server: nodetest.Address, Dir: t.TempDir(),
		Dial: s.Dial, Log: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}}
}

// joining is a world whose node joins by join string.
func joining(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.options.Join = w.Join(token)
	w.options.Attestor = joinToken(t, token)
	return w
}

// reattesting is a world whose node may attest again and again.
func reattesting(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.Reattestable = true
	w.options.TrustBundle = w.CurrentBundle()
	w.options.Attestor = &node.Attestor{Name: "test", Agent: testAttestor("node-1")}
	return w
}

func joinToken(t *testing.T, token string) *node.Attestor {
	t.Helper()
	a, err := node.JoinToken(token)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// testAttestor proves the name of a node, and answers challenges.
type testAttestor string

func (a testAttestor) Proof(context.Context) ([]byte, error) { return []byte(a), nil }
func (a testAttestor) Respond(_ context.Context, challenge []byte) ([]byte, error) {
	return append([]byte("answer to "), challenge...), nil
}

// running is a node whose Run was called.
type running struct {
	*node.Node
	stop func()
	err  chan error // what Run returned
}

// run opens a node and runs it until the test ends or stop is called.
func (w *world) run(t *testing.T) *running {
	t.Helper()
	n, err := node.Open(w.options)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{Node: n, err: make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.err <- n.Run(ctx)
	}()
	r.stop = func() { cancel(); <-done }
	t.Cleanup(r.stop)
	return r
}

// connected waits for the node's link and gives it back.
func (r *running) connected(t *testing.T) *node.Link {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	l, err := r.Link(ctx)
	if err != nil {
		t.Fatalf("not connected: %v (%v)", err, r.Status().LastError)
	}
	l.Release()
	return l
}

// ended returns the error that Run ended with.
func (r *running) ended(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.err:
		return err
	case <-time.After(10 * time.Minute):
		t.Fatal("the node goes on")
		return nil
	}
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one with %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not contain %q", err, part)
		}
	}
}

func TestANodeJoinsAndSurvivesARestartWithoutAttestingAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		first := w.run(t)
		l := first.connected(t)
		if l.ID() != tokenAgent {
			t.Errorf("agent is %s, want %s", l.ID(), tokenAgent)
		}
		status := first.Status()
		if !status.Connected || status.ID != tokenAgent || status.LastError != nil || !status.ExpiresAt.After(time.Now()) {
			t.Errorf("status is %+v", status)
		}
		first.stop()

		w.options.Attestor, w.options.Join = nil, nil
		second := w.run(t)
		if l := second.connected(t); l.ID() != tokenAgent {
			t.Errorf("after a restart the agent is %s", l.ID())
		}
		if n := w.CallCount("AttestAgent"); n != 1 {
			t.Errorf("attested %d times, want once", n)
		}
	})
}

func TestANodeThatIsKeptInMemoryLeavesNothingOnDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		dir := w.options.Dir
		w.options.InMemory = true
		_, err := node.Open(w.options)
		wantError(t, err, "kept in memory", "data directory")
		w.options.Dir = ""
		n := w.run(t)
		first := n.connected(t)
		time.Sleep(40 * time.Minute)
		synctest.Wait()
		if l := n.connected(t); l == first || w.CallCount("RenewAgent") == 0 {
			t.Error("the SVID was not renewed")
		}
		n.stop()
		if files, _ := filepath.Glob(filepath.Join(dir, "*")); len(files) != 0 {
			t.Errorf("there are %v", files)
		}
	})
}

func TestANodeAnswersChallenges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		w.Challenges = 10
		if l := w.run(t).connected(t); l.ID() != testAgent {
			t.Errorf("agent is %s, want %s", l.ID(), testAgent)
		}
	})
}

func TestANodeDoesNotAnswerChallengesForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		w.Challenges = 1000
		r := w.run(t)
		time.Sleep(time.Second)
		r.stop()
		if log := w.log.String(); !strings.Contains(log, "more than 10 challenges") {
			t.Errorf("log says nothing of challenges: %s", log)
		}
	})
}

func TestAUsedJoinTokenEndsTheAgentWithARemedy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		w.Tokens[token] = false
		err := w.run(t).ended(t)
		wantError(t, err, "already been used", "hallmark token generate")
	})
}

func TestANodeWithoutAnyProofSaysHowToGetOne(t *testing.T) {
	w := newWorld(t)
	w.options.TrustBundle = w.CurrentBundle()
	_, err := node.Open(w.options)
	wantError(t, err, "no identity yet", "hallmark token generate")
}

func TestANodeRenewsAtHalfOfTheLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		first := r.connected(t)
		ends := r.Status().ExpiresAt

		time.Sleep(23 * time.Minute)
		if n := w.CallCount("RenewAgent"); n != 0 {
			t.Fatalf("renewed %d times before 40 %% of its life", n)
		}
		time.Sleep(14 * time.Minute)
		if n := w.CallCount("RenewAgent"); n != 1 {
			t.Fatalf("renewed %d times after 60 %% of its life, want once", n)
		}
		if after := r.Status().ExpiresAt; !after.After(ends) {
			t.Errorf("SVID ends at %v, before that at %v", after, ends)
		}
		select {
		case <-first.Done():
		default:
			t.Error("the former link is still in use")
		}
		second := r.connected(t)
		if second == first {
			t.Error("there is no new link")
		}
		// The server sees the new SVID, and from then on only that.
		if _, err := r.SignJWT(t.Context(), "unknown", []string{"a"}); status.Code(errors.Unwrap(err)) != codes.NotFound {
			t.Errorf("call on the new link: %v", err)
		}
		if node := w.Nodes[tokenAgent]; node.NewSerial != "" {
			t.Errorf("server waits for the new SVID: %+v", node)
		}
	})
}

func TestANodeKeepsRenewingForDays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		for range 24 {
			time.Sleep(time.Hour)
			if s := r.Status(); !s.Connected || !s.ExpiresAt.After(time.Now()) {
				t.Fatalf("status is %+v", s)
			}
		}
		if n := w.CallCount("AttestAgent"); n != 1 {
			t.Errorf("attested %d times, want once", n)
		}
		r.stop()
		again := w.run(t)
		again.connected(t)
		if n := w.CallCount("AttestAgent"); n != 1 {
			t.Errorf("attested %d times, want once", n)
		}
	})
}

func TestARenewalTheServerNeverHeardBackOfIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		failures := 3
		w.Before = func(_ context.Context, method string) error {
			if strings.HasSuffix(method, "RenewAgent") {
				w.Lock()
				defer w.Unlock()
				if failures--; failures >= 0 {
					return status.Error(codes.Internal, "disk full")
				}
			}
			return nil
		}
		r := w.run(t)
		time.Sleep(45 * time.Minute)
		if n := w.CallCount("RenewAgent"); n != 4 {
			t.Errorf("asked %d times, want 4", n)
		}
		r.connected(t)
	})
}

func TestANodeOutlivesTheServersAbsence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		l := r.connected(t)
		w.Stop()
		<-l.Done()
		time.Sleep(20 * time.Minute)
		if s := r.Status(); s.Connected || s.LastError == nil || s.ID != tokenAgent {
			t.Errorf("status without a server is %+v", s)
		}
		if n := strings.Count(w.log.String(), "connection refused"); n < 30 || n > 200 {
			t.Errorf("tried %d times in 20 minutes", n)
		}
		w.Start()
		time.Sleep(31 * time.Second)
		if s := r.Status(); !s.Connected || s.LastError != nil {
			t.Errorf("status half a minute after the server's return is %+v", s)
		}
	})
}

func TestANodeTriesMoreOftenAsWhatItHoldsNearsItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		ends := time.Now().Add(21 * time.Minute)
		w.options.NextExpiry = func() time.Time { return ends }
		r := w.run(t)
		l := r.connected(t)
		w.Stop()
		<-l.Done()
		time.Sleep(20 * time.Minute)
		before := strings.Count(w.log.String(), "connection refused")
		time.Sleep(time.Until(ends))
		if n := strings.Count(w.log.String(), "connection refused") - before; n < 15 || n > 200 { // backoff alone makes it 2 to 6
			t.Errorf("tried %d times in the last minute", n)
		}
	})
}

func TestANodeIsBackSoonAfterARestartOfTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		for range 5 {
			time.Sleep(time.Minute)
			l := r.connected(t)
			w.Stop()
			w.Start()
			<-l.Done()
			start := time.Now()
			r.connected(t)
			if took := time.Since(start); took < 50*time.Millisecond || took > 300*time.Millisecond {
				t.Errorf("back after %v, want 50 to 300 ms", took)
			}
		}
	})
}

func TestAServerThatDropsEveryConnectionIsNotHammered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		start := time.Now()
		drops := 0
		for time.Since(start) < 10*time.Minute {
			l, err := r.Link(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			l.Release()
			w.Stop()
			w.Start()
			<-l.Done()
			drops++
		}
		if drops > 150 {
			t.Errorf("%d connections in 10 minutes", drops)
		}
	})
}

func TestANodeLeavesWhenTheServerAsksItTo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		l := r.connected(t)
		w.GracefulStop()
		<-l.Done()
		w.Start()
		if r.connected(t) == l {
			t.Error("no new link")
		}
	})
}

func TestALinkThatItsUserBreaksIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		l := r.connected(t)
		l.Break(errors.New("silence"))
		if r.connected(t) == l {
			t.Error("no new link")
		}
		if !strings.Contains(w.log.String(), "silence") {
			t.Error("the reason is not logged")
		}
	})
}

func TestATaintedAuthorityMakesTheNodeRenewAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		w.Rotate()
		w.Lock()
		w.Authorities[0].Tainted = true
		w.Unlock()
		start := time.Now()
		if err := r.SetBundle(w.CurrentBundle()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if n := w.CallCount("RenewAgent"); n != 1 || time.Since(start) > time.Second {
			t.Errorf("renewed %d times after %v, want once, at once", n, time.Since(start))
		}
		time.Sleep(10 * time.Minute)
		if n := w.CallCount("RenewAgent"); n != 1 {
			t.Errorf("renewed %d times, want once", n)
		}
	})
}

func TestAServerThatSignsWithATaintedAuthorityIsAskedNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := joining(t)
		r := w.run(t)
		r.connected(t)
		w.Lock()
		w.Authorities[0].Tainted = true
		w.Unlock()
		if err := r.SetBundle(w.CurrentBundle()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		if n := w.CallCount("RenewAgent"); n < 10 || n > 21 {
			t.Errorf("renewed %d times in 10 minutes, want about every 30 s", n)
		}
	})
}

func TestAnSVIDThatIsNotWhatWasAskedForIsRefused(t *testing.T) {
	other := nodetest.NewAuthority(t)
	for name, c := range map[string]struct {
		alter func(w *world, s *types.X509SVID)
		want  string
	}{
		"none": {func(_ *world, s *types.X509SVID) { s.CertChain = nil }, "chain of 0 certificates"},
		"too long a chain": {func(_ *world, s *types.X509SVID) {
			for range 10 {
				s.CertChain = append(s.CertChain, s.CertChain[0])
			}
		}, "chain of 11 certificates"},
		"no certificate":        {func(_ *world, s *types.X509SVID) { s.CertChain[0] = []byte("x") }, "malformed certificate"},
		"too large":             {func(_ *world, s *types.X509SVID) { s.CertChain[0] = make([]byte, 1<<20) }, "certificate of 1048576 bytes"},
		"of a server":           {func(w *world, s *types.X509SVID) { s.CertChain = w.Chain(nil, "/spire/server") }, "no agent"},
		"of a workload":         {func(w *world, s *types.X509SVID) { s.CertChain = w.Chain(nil, "/web") }, "no agent"},
		"for another key":       {func(w *world, s *types.X509SVID) { s.CertChain = w.Chain(nil, testAgent.Path()) }, "another key"},
		"of another authority":  {func(w *world, s *types.X509SVID) { s.CertChain = w.Chain(other, testAgent.Path()) }, "does not verify"},
		"an authority's itself": {func(w *world, s *types.X509SVID) { s.CertChain = [][]byte{w.Authorities[0].Certificate.Raw} }, "does not verify"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := reattesting(t)
				w.Alter = func(s *types.X509SVID) { c.alter(w, s) }
				r := w.run(t)
				time.Sleep(time.Second)
				if s := r.Status(); s.Connected || !s.ID.IsZero() {
					t.Errorf("status is %+v", s)
				}
				wantError(t, r.Status().LastError, c.want)
			})
		})
	}
}

func TestARenewedSVIDOfAnotherAgentIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := reattesting(t)
		r := w.run(t)
		r.connected(t)
		w.Lock()
		w.RenewAs = spiffeid.RequireFromPath(nodetest.TrustDomain, "/spire/agent/test/node-2")
		w.Unlock()
		time.Sleep(40 * time.Minute)
		if s := r.Status(); s.ID != testAgent {
			t.Errorf("agent became %s", s.ID)
		}
		wantError(t, r.Status().LastError, "node-2")
	})
}

func TestOpenRefusesTwoWaysToTrust(t *testing.T) {
	w := joining(t)
	w.options.Insecure = true
	_, err := node.Open(w.options)
	wantError(t, err, "a join string and insecure bootstrap exclude each other")
	w.options.Insecure, w.options.TrustBundle = false, w.CurrentBundle()
	_, err = node.Open(w.options)
	wantError(t, err, "a trust bundle and a join string exclude each other")
}

func TestABundleThatWouldLockTheServerOutIsRefused(t *testing.T) {
	w := joining(t)
	n, err := node.Open(w.options)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	wantError(t, n.SetBundle(&bundle.Bundle{TrustDomain: nodetest.TrustDomain}), "no X.509 authority")
	wantError(t, n.SetBundle(&bundle.Bundle{TrustDomain: spiffeid.RequireTrustDomainFromString("other.org")}), "not the node's own")
}

func TestBackoffGrowsWithFullJitterAndStaysBounded(t *testing.T) {
	var least, most [12]time.Duration
	for range 2000 {
		var b node.Backoff
		for i := range most {
			d := b.Next()
			if least[i] == 0 || d < least[i] {
				least[i] = d
			}
			most[i] = max(most[i], d)
		}
		b.Reset()
		if d := b.Next(); d > 300*time.Millisecond {
			t.Fatalf("first retry after a reset waits %v", d)
		}
	}
	if least[0] < 50*time.Millisecond || most[0] > 300*time.Millisecond || most[0] < 250*time.Millisecond {
		t.Errorf("first retry waits %v to %v, want 50 to 300 ms", least[0], most[0])
	}
	for i, bound := 1, 400*time.Millisecond; i < len(most); i, bound = i+1, min(2*bound, 30*time.Second) {
		if least[i] < 50*time.Millisecond || least[i] > bound/4 || most[i] > bound || most[i] < bound*9/10 {
			t.Errorf("retry %d waits %v to %v, want anything up to %v", i+1, least[i], most[i], bound)
		}
	}
}
