package bench_test

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/bench"
	"github.com/hallmark-id/hallmark/pkg/sizing"
	"github.com/hallmark-id/hallmark/test/harness"
)

func TestMain(m *testing.M) {
	code := m.Run()
	harness.Cleanup()
	os.Exit(code)
}

func measure(t *testing.T, run func(context.Context, sizing.Plan) (*sizing.Report, error), plan sizing.Plan) *sizing.Report {
	t.Helper()
	dir, err := os.MkdirTemp("", "hb") // sockets need short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	plan.Dir, plan.Binary = dir, harness.Binary(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	report, err := run(ctx, plan)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// complete checks that each of the figures named has a value at each size, and
// that no other has less.
func complete(t *testing.T, r *sizing.Report, titles ...string) {
	t.Helper()
	there := make(map[string]bool)
	for _, f := range r.Figures {
		there[f.Title] = true
		for _, l := range f.Lines {
			if len(l.Values) != len(r.Sizes) {
				t.Errorf("%s, %s: %d values for %d sizes", f.Title, l.Name, len(l.Values), len(r.Sizes))
			}
			for _, v := range l.Values {
				if v < 0 && f.Unit != "kB" { // memory of few agents is less than its noise
					t.Errorf("%s, %s: %v", f.Title, l.Name, v)
				}
			}
		}
	}
	for _, title := range titles {
		if !there[title] {
			t.Errorf("%q was not measured", title)
		}
	}
}

func TestAServerIsMeasuredByItsEntries(t *testing.T) {
	t.Parallel()
	r := measure(t, bench.Entries, sizing.Plan{Sizes: []int{20, 1100}, Samples: 3})
	complete(t, r, "entries created, in batches of 1,000", "create one entry meanwhile", "entry create → SVID on an open stream",
		"entry delete → gone from the stream", "a page of 1,000 IDs", "memory of the server", "start of the server",
		"unchanged sync of SPIRE's call, up to 100,000 entries")
}

func TestAServerIsMeasuredByItsAgents(t *testing.T) {
	t.Parallel()
	r := measure(t, bench.Agents, sizing.Plan{Sizes: []int{2, 5}, Samples: 2, Idle: time.Second})
	complete(t, r, "attest and connect an agent", "one change to all → an agent has it", "one change to all → the last has acknowledged",
		"memory of the server for each agent", "server at rest", "server restarted → an agent is in step again", "all renew at once → an agent has its SVID")
}

func TestAServerThatStaysIsLeftAsItWas(t *testing.T) {
	t.Parallel()
	d := harness.NewDomain(t, harness.Settings{})
	d.StartServer(t)
	d.Entry(t, "/mine", 1000)
	before := d.Admin(t, "entry", "list", "-o", "json")
	plan := sizing.Plan{Sizes: []int{3}, Samples: 1, Idle: time.Second, AdminSocket: d.AdminSocket}
	complete(t, measure(t, bench.Entries, plan), "entry create → SVID on an open stream")
	complete(t, measure(t, bench.Agents, plan), "one change to all → an agent has it")
	if after := d.Admin(t, "entry", "list", "-o", "json"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if nodes := d.Admin(t, "node", "list", "-o", "json"); nodes != "[]\n" {
		t.Errorf("nodes are left: %s", nodes)
	}
}

func TestWhatIsNoServerIsSaidToBeNone(t *testing.T) {
	plan := sizing.Plan{Sizes: []int{1}, Samples: 1, Dir: t.TempDir(), AdminSocket: "/nowhere/server.sock"}
	if r, err := bench.Entries(t.Context(), plan); err == nil {
		t.Errorf("got %+v", r)
	}
	plan.Sizes = nil
	if r, err := bench.Agents(t.Context(), plan); err == nil {
		t.Errorf("got %+v", r)
	}
}
