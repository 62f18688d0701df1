// Package badinputs gives Hallmark what it must refuse, of every kind: each
// case says what the error names, cause and remedy, and what the exit status
// or code is. After each nothing may be half written, and whoever serves must
// serve on.
package badinputs

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/hallmark-id/hallmark/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

// house is a server and an agent in one process, `hallmark dev`.
type house struct {
	dir, address, admin, socket string
	server, agent               *grpc.ClientConn
}

func newHouse(t testing.TB) *house {
	t.Helper()
	dir := shortDir(t)
	h := &house{dir: dir, address: harness.FreeAddress(t), admin: filepath.Join(dir, "admin.sock"), socket: filepath.Join(dir, "workload.sock")}
	p := harness.Command{Args: []string{"dev", "--dir", dir, "--listen", h.address}}.Start(t)
	p.WaitOutput(t, "export SPIFFE_ENDPOINT_SOCKET=")
	h.server, h.agent = harness.Dial(t, h.admin), harness.Dial(t, h.socket)
	return h
}

// serves fails the test if the server or the Workload API does not answer.
func (h *house) serves(t testing.TB) {
	t.Helper()
	harness.Command{Args: []string{"server", "health", "--admin-socket", h.admin}}.Run(t)
	harness.Command{Args: []string{"fetch", "x509", "--socket", h.socket}}.Run(t)
}

// state is all that an administrator can see of what the server keeps.
func (h *house) state(t testing.TB) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	entries, err := entryv1.NewEntryClient(h.server).ListEntries(ctx, &entryv1.ListEntriesRequest{})
	must(t, err)
	agents, err := agentv1.NewAgentClient(h.server).ListAgents(ctx, &agentv1.ListAgentsRequest{OutputMask: nil})
	must(t, err)
	bundles, err := bundlev1.NewBundleClient(h.server).ListFederatedBundles(ctx, &bundlev1.ListFederatedBundlesRequest{})
	must(t, err)
	var b strings.Builder
	for _, e := range entries.Entries {
		fmt.Fprintln(&b, e.Id, e.RevisionNumber)
	}
	for _, a := range agents.Agents {
		fmt.Fprintln(&b, a.Id, a.Banned)
	}
	for _, m := range bundles.Bundles {
		text, err := proto.Marshal(m)
		must(t, err)
		fmt.Fprintf(&b, "%x\n", text)
	}
	return b.String()
}

// unchanged compares the state with one of before.
func (h *house) unchanged(t testing.TB, before string) {
	t.Helper()
	if now := h.state(t); now != before {
		t.Errorf("the state was\n%s\nand is\n%s", before, now)
	}
}

func called(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(context.Background(), "workload.spiffe.io", "true"), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// shortDir is a directory whose path leaves room for sockets.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-bad-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// listing is every file below a directory with its mode and content.
func listing(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprint(&b, strings.TrimPrefix(path, dir), " ", info.Mode())
		if info.Mode().IsRegular() {
			text, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", text)
		}
		fmt.Fprintln(&b)
		return nil
	}))
	return b.String()
}

// says checks an error's text for all that it has to name.
func says(t testing.TB, text string, all ...string) {
	t.Helper()
	for _, want := range all {
		if !strings.Contains(text, want) {
			t.Errorf("the error does not say %q:\n%s", want, text)
		}
	}
	if strings.Contains(text, "panic") || strings.Contains(text, "goroutine ") {
		t.Errorf("it panicked:\n%s", text)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
