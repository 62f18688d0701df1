package test

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hallmark-id/hallmark/test/harness"
)

func devDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-dev-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func startDev(t testing.TB, dir string, more ...string) *harness.Process {
	t.Helper()
	p := harness.Command{Args: append([]string{"dev", "--dir", dir, "--listen", "127.0.0.1:0"}, more...)}.Start(t)
	p.WaitOutput(t, "export SPIFFE_ENDPOINT_SOCKET=unix://"+filepath.Join(dir, "workload.sock"))
	return p
}

// TestDevGivesAnIdentity is the first five minutes: one command, and an SVID
// that three independent parties accept.
func TestDevGivesAnIdentity(t *testing.T) {
	t.Parallel()
	harness.NeedCommand(t, "openssl")
	dir := devDir(t)
	dev := startDev(t, dir)
	id := regexp.MustCompile(`spiffe://example\.org/\S+`).FindString(dev.Stdout())
	if id == "" {
		t.Fatalf("no SPIFFE ID in:\n%s", dev.Stdout())
	}
	socket := filepath.Join(dir, "workload.sock")

	files := t.TempDir()
	out := harness.Command{Args: []string{"fetch", "x509", "--write", files}, Env: []string{"SPIFFE_ENDPOINT_SOCKET=unix://" + socket}}.Run(t)
	if !strings.Contains(out, id) {
		t.Errorf("hallmark fetch x509 printed:\n%s", out)
	}
	if out, err := exec.Command("openssl", "verify", "-x509_strict", "-CAfile", filepath.Join(files, "bundle.0.pem"), filepath.Join(files, "svid.0.pem")).CombinedOutput(); err != nil {
		t.Errorf("openssl verify: %v\n%s", err, out)
	}
	if info, err := os.Stat(filepath.Join(files, "svid.0.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the key's file: %v, %v", info, err)
	}

	x509ctx, err := workloadapi.FetchX509Context(t.Context(), workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		t.Fatal(err)
	}
	verified, _, err := x509svid.Verify(x509ctx.DefaultSVID().Certificates, x509ctx.Bundles)
	if err != nil || verified.String() != id {
		t.Errorf("go-spiffe verified %q, %v; want %q", verified, err, id)
	}
	if x509ctx.DefaultSVID().Certificates[0].KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("key usage %v", x509ctx.DefaultSVID().Certificates[0].KeyUsage)
	}

	dev.Signal(syscall.SIGINT)
	if code := dev.Wait(t); code != 0 && code != 130 {
		t.Errorf("dev ended with %d after Ctrl-C", code)
	}
	if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// TestDevStartsAgain: after Ctrl-C and after kill -9 the next start finds the
// same trust domain.
func TestDevStartsAgain(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	root := ""
	for _, end := range []os.Signal{syscall.SIGINT, syscall.SIGKILL, syscall.SIGTERM} {
		dev := startDev(t, dir)
		x509ctx, err := workloadapi.FetchX509Context(t.Context(), workloadapi.WithAddr("unix://"+filepath.Join(dir, "workload.sock")))
		if err != nil {
			t.Fatal(err)
		}
		bundle, err := x509ctx.Bundles.GetX509BundleForTrustDomain(x509ctx.DefaultSVID().ID.TrustDomain())
		if err != nil {
			t.Fatal(err)
		}
		got := string(bundle.X509Authorities()[0].Raw)
		if root != "" && got != root {
			t.Errorf("before %v: the authority is another", end)
		}
		root = got
		dev.Signal(end)
		dev.Wait(t)
	}
}

func TestDevRunsACommandInside(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	for command, want := range map[string]int{"exit 0": 0, "exit 7": 7} {
		p := harness.Command{Args: []string{"dev", "--dir", dir, "--listen", "127.0.0.1:0", "--", "sh", "-c", `test -S "${SPIFFE_ENDPOINT_SOCKET#unix://}" || exit 99; ` + command}}
		if out, stderr, code := p.Try(t); code != want {
			t.Errorf("%s: exit status %d, want %d\n%s%s", command, code, want, out, stderr)
		}
	}
}

func TestTwoDevsInOneDirectoryAreRefused(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	startDev(t, dir)
	_, stderr, code := harness.Command{Args: []string{"dev", "--dir", dir, "--listen", "127.0.0.1:0"}}.Try(t)
	if code == 0 || !strings.Contains(stderr, dir) {
		t.Errorf("exit status %d\n%s", code, stderr)
	}
}

// TestChangesReachAnOpenStream: an entry is created, changed and deleted, and
// an open Workload API stream sees each.
func TestChangesReachAnOpenStream(t *testing.T) {
	t.Parallel()
	dir := devDir(t)
	startDev(t, dir)
	updates := make(chan *workloadapi.X509Context, 16)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	watched := make(chan error, 1)
	go func() {
		watched <- workloadapi.WatchX509Context(ctx, watcher(updates), workloadapi.WithAddr("unix://"+filepath.Join(dir, "workload.sock")))
	}()
	defer func() { stop(); <-watched }()
	has := func(id string, want bool) func(context.Context) error {
		var last []string
		return func(context.Context) error {
			for {
				select {
				case u := <-updates:
					last = last[:0]
					for _, s := range u.SVIDs {
						last = append(last, s.ID.String())
					}
				default:
					if found := strings.Contains(strings.Join(last, " ")+" ", id+" "); last == nil || found != want {
						return fmt.Errorf("the stream shows %v", last)
					}
					return nil
				}
			}
		}
	}
	admin := filepath.Join(dir, "admin.sock")
	harness.Eventually(t, "first update", has("spiffe://example.org/new", false))
	selector := fmt.Sprintf("unix:uid:%d", os.Getuid())
	harness.Command{Args: []string{"entry", "create", "--id", "new", "--spiffe-id", "/new", "--parent-id", "/dev", "--selector", selector, "--admin-socket", admin}}.Run(t)
	harness.Eventually(t, "created", has("spiffe://example.org/new", true))
	harness.Command{Args: []string{"entry", "update", "new", "--spiffe-id", "/newer", "--admin-socket", admin}}.Run(t)
	harness.Eventually(t, "changed", has("spiffe://example.org/newer", true))
	harness.Command{Args: []string{"entry", "delete", "new", "--admin-socket", admin}}.Run(t)
	harness.Eventually(t, "deleted", has("spiffe://example.org/newer", false))
}

type watcher chan *workloadapi.X509Context

func (w watcher) OnX509ContextUpdate(u *workloadapi.X509Context) { w <- u }
func (w watcher) OnX509ContextWatchError(error)                  {}

func TestDemoOfMTLSFailsNoRequest(t *testing.T) {
	t.Parallel()
	out := harness.Command{Args: []string{"demo", "mtls", "--duration", "5s"}}.Run(t)
	if !regexp.MustCompile(`(?i)\b0 failed|failed\W+0\b`).MatchString(out) {
		t.Errorf("the demo printed:\n%s", out)
	}
}
