package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	hallmarkv1 "github.com/hallmark-id/hallmark/proto/hallmark/v1"
	"github.com/hallmark-id/hallmark/test/harness"
)

const (
	chaosAgents   = 2
	chaosPace     = 60 * time.Millisecond // between the writes of one writer
	chaosLifetime = 30                    // seconds, of the workloads' SVIDs
	chaosPatience = 2 * time.Minute       // until a server writes again
	chaosDisk     = "size=2g"             // of each server
)

// TestChaos does to three servers, each on a host of its own, what happens to
// servers, while entries come and go at each of them and workloads on two other
// hosts use their SVIDs. HALLMARK_CHAOS is how often it does all of it, and how
// long a fault lasts then: "20,30s". By default it does most of it, once.
func TestChaos(t *testing.T) {
	rounds, fault := 1, 4*time.Second
	if v := os.Getenv("HALLMARK_CHAOS"); v != "" {
		n, d, _ := strings.Cut(v, ",")
		var errs [2]error
		rounds, errs[0] = strconv.Atoi(n)
		fault, errs[1] = time.ParseDuration(d)
		if err := errors.Join(errs[:]...); err != nil {
			t.Fatalf("HALLMARK_CHAOS is %q: %v", v, err)
		}
	}
	c := newChaos(t)
	type step struct {
		name string
		do   func(*testing.T, time.Duration)
	}
	steps := []step{
		{"the leader is killed", c.killLeader},
		{"the leader is cut off from the other servers", c.cutLeader},
		{"a server's disk is full", c.fillDisk},
		{"every server is restarted in turn", c.restartAll},
	}
	if rounds > 1 {
		steps = append(steps, step{"no server reaches another", c.cutAll}, step{"the leader is paused", c.pauseLeader})
	}
	for round := range rounds {
		for _, step := range steps {
			if rounds > 1 {
				t.Logf("round %d: %s", round+1, step.name)
			} else {
				t.Log(step.name)
			}
			step.do(t, fault)
			c.check(t)
			if t.Failed() {
				t.FailNow()
			}
		}
	}
	c.end(t)
}

// chaos is three servers and what goes on with them.
type chaos struct {
	*servers
	names  []string
	hosts  map[string]*harness.Host
	agents []*chaosAgent
	writes *writers
	stop   func()

	mu    sync.Mutex
	views map[int64][]byte // digests of what servers knew, by revision
}

func newChaos(t *testing.T) *chaos {
	lan := harness.NewLAN(t)
	c := &chaos{servers: newServers(t), names: []string{"s1", "s2", "s3"}, hosts: make(map[string]*harness.Host), views: make(map[int64][]byte)}
	for _, name := range c.names {
		c.hosts[name] = lan.Host(t)
		c.mount(t, c.path(name))
		address := c.hosts[name].Address
		c.configure(t, name, address+":8081", fmt.Sprintf("name: %s\nstore: {etcd: {embedded: {listen: %q}}}\n", name, address+":2380"))
		var more []string
		if name != "s1" {
			more = []string{"--join", strings.TrimSpace(c.command("s1", "cluster", "invite").Run(t))}
		}
		c.start(t, name, more...)
		c.ready(t, name)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	c.stop = func() { cancel(); running.Wait() }
	t.Cleanup(func() { c.stop() })
	for i := range chaosAgents {
		c.agents = append(c.agents, c.startAgent(t, lan.Host(t), i))
	}
	for _, a := range c.agents {
		running.Go(func() { a.watch(ctx) })
		running.Go(func() { a.use(ctx, t) })
	}
	c.writes = &writers{present: map[string]string{}, gone: map[string]bool{}, at: map[string][]time.Time{}}
	for _, name := range c.names {
		conn := c.dial(t, name)
		running.Go(func() { c.writes.run(ctx, name, conn) })
		running.Go(func() { c.look(ctx, t, name, conn) })
	}
	for _, name := range c.names {
		c.writes.after(t, name, time.Now())
	}
	return c
}

// mount gives a directory a disk of its own.
func (c *chaos) mount(t *testing.T, dir string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, chaosDisk+",mode=0700"); err != nil {
		t.Fatalf("mount a disk: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

func (c *chaos) start(t *testing.T, name string, more ...string) {
	t.Helper()
	c.processes[name] = c.hosts[name].On(t, harness.Command{Args: append([]string{"server", "run", "-c", c.path(name + ".yaml")}, more...)}).Start(t)
}

func (c *chaos) others(of string) []string {
	return slices.DeleteFunc(slices.Clone(c.names), func(name string) bool { return name == of })
}

// recovered waits until servers write again, and says how long they did not.
func (c *chaos) recovered(t *testing.T, since time.Time, names ...string) {
	t.Helper()
	for _, name := range names {
		c.writes.after(t, name, since)
	}
	for _, name := range names {
		t.Logf("  %s wrote nothing for %v", name, c.writes.pause(name, since).Round(time.Millisecond))
	}
}

func (c *chaos) killLeader(t *testing.T, _ time.Duration) {
	leader := c.leader(t, "s1")
	c.processes[leader].Kill()
	c.recovered(t, time.Now(), c.others(leader)...)
	c.start(t, leader)
	c.ready(t, leader)
	c.recovered(t, time.Now(), leader)
}

func (c *chaos) cutLeader(t *testing.T, fault time.Duration) {
	leader := c.leader(t, "s1")
	for _, other := range c.others(leader) {
		c.hosts[leader].Drop(t, c.hosts[other])
		c.hosts[other].Drop(t, c.hosts[leader])
	}
	cut := time.Now()
	c.recovered(t, cut, c.others(leader)...)
	c.hold(t, cut, fault)
	c.heal(t)
}

func (c *chaos) cutAll(t *testing.T, fault time.Duration) {
	for _, name := range c.names {
		for _, other := range c.others(name) {
			c.hosts[name].Drop(t, c.hosts[other])
		}
	}
	c.hold(t, time.Now(), fault)
	c.heal(t)
}

// hold lets a fault last, and the workloads feel it.
func (c *chaos) hold(t *testing.T, since time.Time, fault time.Duration) {
	t.Helper()
	select {
	case <-time.After(time.Until(since.Add(fault))):
	case <-t.Context().Done():
	}
}

func (c *chaos) heal(t *testing.T) {
	t.Helper()
	since := time.Now() // the first may reach each other before all can
	for _, name := range c.names {
		c.hosts[name].Heal(t)
	}
	c.recovered(t, since, c.names...)
}

func (c *chaos) pauseLeader(t *testing.T, fault time.Duration) {
	leader := c.leader(t, "s1")
	c.processes[leader].Signal(syscall.SIGSTOP)
	paused := time.Now()
	c.recovered(t, paused, c.others(leader)...)
	c.hold(t, paused, fault)
	c.processes[leader].Signal(syscall.SIGCONT)
	c.recovered(t, time.Now(), leader)
}

// fillDisk lets no byte be written at a server, until more has been than it had
// room for beforehand.
func (c *chaos) fillDisk(t *testing.T, _ time.Duration) {
	const victim = "s2"
	ballast := filepath.Join(c.path(victim), "ballast")
	f, err := os.Create(ballast)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(block)
	}
	f.Close()
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	full := time.Now()
	c.bulk(t, "s1")
	for _, name := range c.others(victim) {
		t.Logf("  %s wrote nothing for %v", name, c.writes.pause(name, full).Round(time.Millisecond))
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	room := time.Now()
	select {
	case <-c.processes[victim].Done():
		t.Logf("  %s had ended", victim)
		c.start(t, victim)
	default:
		t.Logf("  %s ran on", victim)
	}
	c.ready(t, victim)
	c.recovered(t, room, victim)
}

// bulk writes and deletes some 30 MB, more than a store has room for without a
// larger file.
func (c *chaos) bulk(t *testing.T, at string) {
	t.Helper()
	client := entryv1.NewEntryClient(c.dial(t, at))
	var ids []string
	for i := range 600 {
		e := &types.Entry{
			Id:       fmt.Sprintf("bulk-%03d", i),
			SpiffeId: &types.SPIFFEID{TrustDomain: "example.org", Path: fmt.Sprintf("/bulk/%d", i)},
			ParentId: &types.SPIFFEID{TrustDomain: "example.org", Path: "/nowhere"},
		}
		for j := range 50 {
			e.Selectors = append(e.Selectors, &types.Selector{Type: "bulk", Value: fmt.Sprint(j, strings.Repeat("x", 1000))})
		}
		harness.Eventually(t, "a large write", func(ctx context.Context) error {
			resp, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{e}})
			if err == nil {
				if code := codes.Code(resp.Results[0].Status.Code); code != codes.OK && code != codes.AlreadyExists {
					err = errors.New(resp.Results[0].Status.Message)
				}
			}
			return err
		})
		ids = append(ids, e.Id)
	}
	harness.Eventually(t, "the large entries' deletion", func(ctx context.Context) error {
		resp, err := client.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: ids})
		if err != nil {
			return err
		}
		for _, r := range resp.Results {
			if code := codes.Code(r.Status.Code); code != codes.OK && code != codes.NotFound {
				return errors.New(r.Status.Message)
			}
		}
		return nil
	})
}

func (c *chaos) restartAll(t *testing.T, _ time.Duration) {
	for _, name := range c.names {
		began := time.Now()
		if code := c.processes[name].Stop(t); code != 0 {
			t.Errorf("%s ended with status %d when it was told to stop", name, code)
		}
		c.recovered(t, time.Now(), c.others(name)...)
		c.start(t, name)
		c.ready(t, name)
		t.Logf("  %s was restarted in %v", name, time.Since(began).Round(time.Millisecond))
		c.recovered(t, time.Now(), name)
	}
}

// check looks whether every server knows what was acknowledged at any.
func (c *chaos) check(t *testing.T) {
	t.Helper()
	for _, name := range c.names {
		harness.Eventually(t, "what was acknowledged, at "+name, func(context.Context) error {
			present, gone := c.writes.acknowledged()
			known := c.entries(t, name)
			now, _ := c.writes.acknowledged()
			for id := range present {
				if _, still := now[id]; still && !known[id] {
					return fmt.Errorf("entry %s is missing", id)
				}
			}
			for id := range gone {
				if known[id] {
					return fmt.Errorf("entry %s was deleted and is there", id)
				}
			}
			return nil
		})
	}
	for _, a := range c.agents {
		a.verdict(t)
	}
}

// end stops all writing and compares what everyone has.
func (c *chaos) end(t *testing.T) {
	c.writes.halt()
	harness.Eventually(t, "one state of all servers", func(ctx context.Context) error {
		seen := make(map[string]bool)
		for _, name := range c.names {
			conn := c.dial(t, name)
			resp, err := hallmarkv1.NewAdminServiceClient(conn).GetServer(ctx, &hallmarkv1.GetServerRequest{})
			conn.Close()
			if err != nil {
				return err
			}
			seen[fmt.Sprintf("%d %x", resp.Revision, resp.Digest)] = true
		}
		if len(seen) > 1 {
			return fmt.Errorf("they are %v", slices.Collect(maps.Keys(seen)))
		}
		return nil
	})
	want, all := c.dump(t, "s1")
	var backup []byte
	for _, name := range c.names {
		if got, _ := c.dump(t, name); !bytes.Equal(got, want) {
			t.Errorf("%s tells other entries and agents than s1", name)
		}
		if got, want := c.command(name, "bundle", "show").Run(t), c.command("s1", "bundle", "show").Run(t); got != want {
			t.Errorf("%s has another bundle than s1:\n%s\n%s", name, got, want)
		}
		c.command(name, "server", "backup", c.path(name+".backup")).Run(t)
		got, err := os.ReadFile(c.path(name + ".backup"))
		if err != nil {
			t.Fatal(err)
		}
		if backup == nil {
			backup = got
		} else if !bytes.Equal(got, backup) {
			t.Errorf("the store of %s has other records than that of s1", name)
		}
	}
	for i, a := range c.agents {
		expected := map[string]bool{}
		for _, e := range all {
			if e.ParentId.Path == nodePath(i) {
				expected[e.SpiffeId.Path] = true
			}
		}
		harness.Eventually(t, fmt.Sprintf("the SVIDs that workloads of agent %d should have", i), func(context.Context) error {
			if has := a.paths(); !maps.Equal(has, expected) {
				return fmt.Errorf("they have %v, not %v", slices.Sorted(maps.Keys(has)), slices.Sorted(maps.Keys(expected)))
			}
			return nil
		})
	}
	c.mu.Lock()
	revisions := len(c.views)
	c.mu.Unlock()
	c.stop()
	for i, a := range c.agents {
		a.verdict(t)
		t.Logf("agent %d: %d JWT-SVIDs, the slowest after %v; %d updates of X509-SVIDs", i, a.fetched, a.slowest.Round(time.Millisecond), a.updates)
	}
	t.Logf("%d writes were acknowledged; %d revisions were compared", c.writes.count(), revisions)

	// The store says the same as the servers that follow it.
	c.configure(t, "restored", harness.FreeAddress(t), "")
	harness.Command{Args: []string{"server", "restore", "-c", c.path("restored.yaml"), "--yes", c.path("s1.backup")}}.Run(t)
	c.run(t, "restored")
	c.ready(t, "restored")
	if got, _ := c.dump(t, "restored"); !bytes.Equal(got, want) {
		t.Error("a server that starts from the store tells other entries and agents than the servers that followed it")
	}
}

// dump is all entries and agents that a server tells of, in its order.
func (c *chaos) dump(t *testing.T, name string) (all []byte, entries []*types.Entry) {
	t.Helper()
	conn := c.dial(t, name)
	add := func(m proto.Message) {
		var err error
		if all, err = (proto.MarshalOptions{Deterministic: true}).MarshalAppend(all, m); err != nil {
			t.Fatal(err)
		}
	}
	for page := ""; ; {
		resp, err := entryv1.NewEntryClient(conn).ListEntries(t.Context(), &entryv1.ListEntriesRequest{PageSize: 500, PageToken: page})
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range resp.Entries {
			add(e)
		}
		entries = append(entries, resp.Entries...)
		if page = resp.NextPageToken; page == "" {
			break
		}
	}
	agents, err := agentv1.NewAgentClient(conn).ListAgents(t.Context(), &agentv1.ListAgentsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range agents.Agents {
		add(a)
	}
	return all, entries
}

// look compares what a server knows at a revision with what others knew at it.
func (c *chaos) look(ctx context.Context, t *testing.T, name string, conn *grpc.ClientConn) {
	client := hallmarkv1.NewAdminServiceClient(conn)
	tick := time.NewTicker(chaosPace / 2)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		asking, cancel := context.WithTimeout(ctx, time.Second)
		resp, err := client.GetServer(asking, &hallmarkv1.GetServerRequest{})
		cancel()
		if err != nil {
			continue
		}
		c.mu.Lock()
		if before, ok := c.views[resp.Revision]; !ok {
			c.views[resp.Revision] = resp.Digest
		} else if !bytes.Equal(before, resp.Digest) {
			t.Errorf("at revision %d %s knows what sums up to %x; another server's was %x", resp.Revision, name, resp.Digest, before)
		}
		c.mu.Unlock()
	}
}

// writers create entries, each at its own server, and delete them later.
type writers struct {
	mu      sync.Mutex
	present map[string]string      // entries whose creation was acknowledged, and the path of their parent; none whose deletion was tried
	gone    map[string]bool        // entries whose deletion was acknowledged
	at      map[string][]time.Time // when each server acknowledged something
	halted  bool
}

func nodePath(agent int) string { return fmt.Sprintf("/node/%d", agent) }

func (w *writers) run(ctx context.Context, name string, conn *grpc.ClientConn) {
	const kept = 5
	client := entryv1.NewEntryClient(conn)
	tick := time.NewTicker(chaosPace)
	defer tick.Stop()
	var mine []string
	for i := 0; ; i++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		w.mu.Lock()
		halted := w.halted
		w.mu.Unlock()
		if halted {
			return
		}
		if len(mine) < kept {
			id, node := fmt.Sprintf("%s-%06d", name, i), nodePath(i%chaosAgents)
			if createAt(ctx, client, id, node) == nil {
				mine = append(mine, id)
				w.done(name, func() { w.present[id] = node })
			}
			continue
		}
		id := mine[0]
		mine = mine[1:]
		w.mu.Lock()
		delete(w.present, id)
		w.mu.Unlock()
		resp, err := client.BatchDeleteEntry(ctx, &entryv1.BatchDeleteEntryRequest{Ids: []string{id}})
		if err == nil && codes.Code(resp.Results[0].Status.Code) == codes.OK {
			w.done(name, func() { w.gone[id] = true })
		}
	}
}

func createAt(ctx context.Context, client entryv1.EntryClient, id, node string) error {
	resp, err := client.BatchCreateEntry(ctx, &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{{
		Id:          id,
		SpiffeId:    &types.SPIFFEID{TrustDomain: "example.org", Path: "/w/" + id},
		ParentId:    &types.SPIFFEID{TrustDomain: "example.org", Path: node},
		Selectors:   []*types.Selector{{Type: "unix", Value: fmt.Sprintf("uid:%d", os.Getuid())}},
		X509SvidTtl: chaosLifetime,
	}}})
	if err == nil && codes.Code(resp.Results[0].Status.Code) != codes.OK {
		err = errors.New(resp.Results[0].Status.Message)
	}
	return err
}

func (w *writers) done(name string, note func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	note()
	w.at[name] = append(w.at[name], time.Now())
}

// acknowledged returns what entries there must be, and must not be.
func (w *writers) acknowledged() (present map[string]string, gone map[string]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.present), maps.Clone(w.gone)
}

// after waits until a server has acknowledged something that was asked of it
// after a moment: the second thing, as the first may have been under way.
func (w *writers) after(t *testing.T, name string, moment time.Time) {
	t.Helper()
	deadline := time.After(chaosPatience)
	tick := time.NewTicker(chaosPace)
	defer tick.Stop()
	for {
		w.mu.Lock()
		at := w.at[name]
		there := len(at) > 1 && at[len(at)-2].After(moment)
		w.mu.Unlock()
		if there {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s has acknowledged no write for %v", name, chaosPatience)
		}
	}
}

// pause returns the longest time since a moment in which a server acknowledged
// nothing.
func (w *writers) pause(name string, since time.Time) (longest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	at := w.at[name]
	i, _ := slices.BinarySearchFunc(at, since, time.Time.Compare)
	for _, moment := range at[i:] {
		longest, since = max(longest, moment.Sub(since)), moment
	}
	return max(longest, time.Since(since))
}

func (w *writers) count() (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, at := range w.at {
		n += len(at)
	}
	return n
}

func (w *writers) halt() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.halted = true
}

// chaosAgent is an agent and workloads of it.
type chaosAgent struct {
	socket string
	steady spiffeid.ID // that stays

	mu      sync.Mutex
	latest  *workloadapi.X509Context
	updates int
	fetched int
	slowest time.Duration
	faults  []string
}

func (c *chaos) startAgent(t *testing.T, host *harness.Host, i int) *chaosAgent {
	t.Helper()
	name := fmt.Sprintf("a%d", i)
	a := &chaosAgent{socket: c.path(name + "-workload.sock"), steady: spiffeid.RequireFromString(fmt.Sprintf("spiffe://example.org/steady/%d", i))}
	token := strings.TrimSpace(c.command("s1", "token", "generate", "--agent-id", nodePath(i)).Run(t))
	agent := host.On(t, harness.Command{Args: []string{"agent", "run", "--join", token, "--data-dir", c.path(name),
		"--socket", a.socket, "--admin-socket", c.path(name + ".sock")}}).Start(t)
	agent.WaitReady(t, "agent", "health", "--admin-socket", c.path(name+".sock"))
	c.command("s1", "entry", "create", "--id", fmt.Sprintf("steady-%d", i), "--spiffe-id", fmt.Sprintf("/steady/%d", i), "--parent-id", nodePath(i),
		"--x509-ttl", fmt.Sprintf("%ds", chaosLifetime), "--selector", fmt.Sprintf("unix:uid:%d", os.Getuid())).Run(t)
	harness.Eventually(t, "three servers that agent "+name+" knows", func(context.Context) error {
		known, err := os.ReadFile(filepath.Join(c.path(name), "servers"))
		if n := len(strings.Fields(string(known))); err == nil && n != 3 {
			err = fmt.Errorf("it knows %d", n)
		}
		return err
	})
	return a
}

func (a *chaosAgent) OnX509ContextUpdate(u *workloadapi.X509Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.latest = u
	a.updates++
}

func (a *chaosAgent) OnX509ContextWatchError(error) {}

// watch is a workload that has an open stream, and looks whether an SVID that it
// has been given has ended.
func (a *chaosAgent) watch(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() { _ = workloadapi.WatchX509Context(ctx, a, workloadapi.WithAddr("unix://"+a.socket)) })
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		a.mu.Lock()
		if a.latest != nil {
			for _, s := range a.latest.SVIDs {
				if end := s.Certificates[0].NotAfter; time.Now().After(end) {
					a.faults = append(a.faults, fmt.Sprintf("the SVID of %s ended at %v", s.ID, end))
					a.latest = nil
					break
				}
			}
		}
		a.mu.Unlock()
	}
}

// use is a workload that asks for one JWT-SVID after the other, each for another
// audience: one that a server has to sign.
func (a *chaosAgent) use(ctx context.Context, t *testing.T) {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+a.socket))
	if err != nil {
		t.Error(err)
		return
	}
	defer client.Close()
	tick := time.NewTicker(chaosPace)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		began := time.Now()
		_, err := client.FetchJWTSVID(ctx, jwtsvid.Params{Audience: fmt.Sprint("audience-", i), Subject: a.steady})
		took := time.Since(began)
		if ctx.Err() != nil {
			return
		}
		a.mu.Lock()
		a.fetched++
		a.slowest = max(a.slowest, took)
		if err != nil {
			a.faults = append(a.faults, fmt.Sprintf("no JWT-SVID, after %v: %v", took.Round(time.Millisecond), err))
		}
		a.mu.Unlock()
	}
}

// paths returns those of the SPIFFE IDs that the workload with the stream has.
func (a *chaosAgent) paths() map[string]bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make(map[string]bool)
	if a.latest != nil {
		for _, s := range a.latest.SVIDs {
			out[s.ID.Path()] = true
		}
	}
	return out
}

// verdict fails the test if a workload has noticed anything.
func (a *chaosAgent) verdict(t *testing.T) {
	t.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, f := range a.faults[:min(len(a.faults), 10)] {
		t.Errorf("a workload at %s: %s", a.socket, f)
	}
	a.faults = nil
}
