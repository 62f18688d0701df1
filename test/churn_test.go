package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/test/harness"
)

// churnOf returns how many processes and containers come and go: few, or with
// HALLMARK_CHURN, which "make churn" sets, "2000,200".
func churnOf(t *testing.T) (processes, containers int) {
	t.Helper()
	processes, containers = 150, 15
	if v := os.Getenv("HALLMARK_CHURN"); v != "" {
		if _, err := fmt.Sscanf(v, "%d,%d", &processes, &containers); err != nil {
			t.Fatalf("HALLMARK_CHURN is %q: %v", v, err)
		}
	}
	return processes, containers
}

// buildChurn builds the program that comes and goes.
func buildChurn(t *testing.T, path string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", path, "github.com/hallmark-id/hallmark/test/churn")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
}

// churned is one process of test/churn, as it reports itself.
type churned struct {
	IDs  []string
	Code string
	Took time.Duration
}

// Processes of many kinds come and go in one PID namespace in which the kernel
// is made to give the same few PIDs again and again. Each gets the identity of
// its kind and no other. Every fourth ends as soon as it has connected and
// leaves the connection to a child: by then its PID may be another's, and
// nobody is to be answered.
func TestNoProcessGetsAnothersIdentity(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	harness.NeedCommand(t, "unshare")
	if _, err := os.Stat("/proc/sys/kernel/ns_last_pid"); err != nil {
		harness.Skip(t, "this kernel does not let PIDs be chosen (CONFIG_CHECKPOINT_RESTORE)")
	}
	count, _ := churnOf(t)
	d := harness.NewDomain(t, harness.Settings{Agent: "workload_attestors:\n  unix: {path: true}\n"})
	d.StartServer(t)

	type kind struct {
		Program string
		UID     uint32
	}
	var kinds []kind
	var want []string // by kind; empty: none
	program := filepath.Join(d.Dir, "churn")
	buildChurn(t, program)
	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	join := d.Join(t)
	for _, name := range []string{"web", "db", "mail"} {
		path := filepath.Join(d.Dir, name)
		harness.WriteProgram(t, path, b)
		for uid := uint32(62001); uid <= 62005; uid++ {
			kinds = append(kinds, kind{path, uid})
			if uid == 62005 { // nobody's
				want = append(want, "")
				continue
			}
			id := fmt.Sprintf("/u%d/%s", uid, name)
			d.Admin(t, "entry", "create", "--spiffe-id", id, "--parent-id", "/node",
				"--selector", "unix:uid:"+strconv.Itoa(int(uid)), "--selector", "unix:path:"+path)
			want = append(want, "spiffe://example.org"+id)
		}
	}
	plan, err := json.Marshal(map[string]any{
		// As root, to see which programs others run.
		"Agent":  []string{harness.Binary(t), "agent", "run", "-c", filepath.Join(d.Dir, "agent.yaml"), "--join", join},
		"Health": []string{harness.Binary(t), "agent", "health", "--admin-socket", d.AgentSocket},
		"Socket": d.Socket, "Kinds": kinds, "Count": count, "AtOnce": 8,
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "plan.json")
	if err := os.WriteFile(file, plan, 0o644); err != nil {
		t.Fatal(err)
	}
	started := time.Now()
	cmd := exec.CommandContext(t.Context(), "unshare", "--pid", "--mount-proc", "--fork", "--kill-child", program, "swarm", file)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("the swarm: %v\n%s", err, stderr.String())
	}
	took := time.Since(started)

	var ran []struct {
		Kind int
		Left bool
		PID  int
		Got  churned
	}
	if err := json.Unmarshal(out, &ran); err != nil {
		t.Fatal(err)
	}
	if len(ran) != count {
		t.Fatalf("%d processes ran; want %d", len(ran), count)
	}
	kindsOf := map[int]map[int]bool{} // by PID
	var times []time.Duration
	left := 0
	for _, r := range ran {
		if kindsOf[r.PID] == nil {
			kindsOf[r.PID] = map[int]bool{}
		}
		kindsOf[r.PID][r.Kind] = true
		switch want := want[r.Kind]; {
		case r.Left:
			left++
			if len(r.Got.IDs) != 0 {
				t.Errorf("a child that was left the connection of pid %d, kind %d, got %q", r.PID, r.Kind, r.Got.IDs)
			}
		case want == "" && (len(r.Got.IDs) != 0 || r.Got.Code != "PermissionDenied"):
			t.Errorf("pid %d, which no entry is for, got %q %s", r.PID, r.Got.IDs, r.Got.Code)
		case want != "" && !slices.Equal(r.Got.IDs, []string{want}):
			t.Errorf("pid %d got %q %s; want %s", r.PID, r.Got.IDs, r.Got.Code, want)
		case want != "":
			times = append(times, r.Got.Took)
		}
	}
	shared := 0
	for _, k := range kindsOf {
		if len(k) > 1 {
			shared++
		}
	}
	if shared == 0 {
		t.Errorf("no PID was used by processes of two kinds, of %d", len(kindsOf))
	}
	t.Logf("%d processes of %d kinds in %v with %d PIDs, of which %d were of several kinds; %d left their connection behind",
		count, len(kinds), took.Round(time.Millisecond), len(kindsOf), shared, left)
	logTimes(t, times)
}

// logTimes prints how long it took from connecting to the SVID.
func logTimes(t *testing.T, times []time.Duration) {
	t.Helper()
	if len(times) == 0 {
		return
	}
	slices.Sort(times)
	t.Logf("from connecting to the SVID: p50 %v, p99 %v, of %d",
		times[len(times)/2].Round(time.Microsecond), times[len(times)*99/100].Round(time.Microsecond), len(times))
}

// Containers of several identities are started and removed, several at once.
func TestNoContainerGetsAnothersIdentity(t *testing.T) {
	t.Parallel()
	engine := harness.Docker(t)
	_, count := churnOf(t)
	for path, mode := range map[string]os.FileMode{filepath.Dir(engine.Socket): 0o755, engine.Socket: 0o666} {
		if err := os.Chmod(path, mode); err != nil { // as a group would be given it
			t.Fatal(err)
		}
	}
	d := harness.NewDomain(t, harness.Settings{Agent: "workload_attestors:\n  unix: {}\n  docker:\n    socket: " + engine.Socket + "\n"})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	apps := []string{"web", "db", "mail", "stranger"}
	for _, app := range apps[:3] {
		d.Register(t, "--spiffe-id", "/"+app, "--parent-id", "/node", "--selector", "docker:label:app:"+app)
	}
	program := filepath.Join(t.TempDir(), "churn")
	buildChurn(t, program)
	engine.Import(t, "example.com/churn:1", program)

	var mu sync.Mutex
	var times []time.Duration
	work := make(chan int)
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for i := range work {
				app := apps[i%len(apps)]
				var got churned
				out, err := engine.Client("run", "--rm", "--network", "none", "--label", "app="+app, "-v", filepath.Dir(d.Socket)+":/run/hallmark",
					"example.com/churn:1", "/run/hallmark/workload.sock")
				if err == nil {
					err = json.Unmarshal([]byte(out), &got)
				}
				switch {
				case err != nil:
					t.Errorf("container %d, %s: %v", i, app, err)
				case app == "stranger" && (len(got.IDs) != 0 || got.Code != "PermissionDenied"):
					t.Errorf("container %d, which no entry is for, got %q %s", i, got.IDs, got.Code)
				case app != "stranger" && !slices.Equal(got.IDs, []string{"spiffe://example.org/" + app}):
					t.Errorf("container %d, %s, got %q %s", i, app, got.IDs, got.Code)
				case app != "stranger":
					mu.Lock()
					times = append(times, got.Took)
					mu.Unlock()
				}
			}
		})
	}
	for i := range count {
		work <- i
	}
	close(work)
	workers.Wait()
	t.Logf("%d containers", count)
	logTimes(t, times)
}
