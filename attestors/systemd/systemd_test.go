package systemd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cgroup"
	"github.com/hallmark-id/hallmark/attestors/systemd"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

// bus is a message bus of the test's own. Anybody may own any name of it.
type bus struct {
	socket string
	daemon *harness.Process
}

func newBus(t testing.TB) *bus {
	t.Helper()
	harness.NeedCommand(t, "dbus-daemon")
	dir, err := os.MkdirTemp("", "hallmark-bus-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := &bus{socket: filepath.Join(dir, "bus")}
	must(t, os.WriteFile(filepath.Join(dir, "bus.conf"), fmt.Appendf(nil, `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path=%s</listen>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
    <allow user="*"/>
  </policy>
</busconfig>`, b.socket), 0o644))
	b.start(t)
	return b
}

func (b *bus) start(t testing.TB) {
	t.Helper()
	os.Remove(b.socket)
	b.daemon = harness.Command{Path: "/usr/bin/dbus-daemon", Args: []string{"--nofork", "--config-file", filepath.Join(filepath.Dir(b.socket), "bus.conf")}}.Start(t)
	harness.Eventually(t, "the bus", func(context.Context) error {
		c, err := net.Dial("unix", b.socket)
		if err == nil {
			c.Close()
		}
		return err
	})
}

// manager stands in for systemd on a bus, with one unit.
type manager struct {
	path  dbus.ObjectPath // of the unit that every process is in
	fails *dbus.Error     // instead
	hang  chan struct{}   // closed: it answers
	calls atomic.Int32

	mu         sync.Mutex
	properties map[string]map[string]any // by interface
}

const unitPath = "/org/freedesktop/systemd1/unit/web_2eservice"

// own is the control group of the tests.
func own(t testing.TB) string {
	t.Helper()
	g, err := cgroup.Of(int32(os.Getpid()))
	must(t, err)
	if path, ok := g["name=systemd"]; ok {
		return path
	}
	return g[""]
}

func newManager(t testing.TB, change func(*manager)) *manager {
	m := &manager{path: unitPath, hang: make(chan struct{}), properties: map[string]map[string]any{
		"org.freedesktop.systemd1.Unit": {
			"Id": "web.service", "FragmentPath": "/etc/systemd/system/web.service",
			"InvocationID": []byte{0x0f, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
		},
		"org.freedesktop.systemd1.Service": {"ControlGroup": own(t), "Slice": "system.slice", "User": "www-data"},
	}}
	close(m.hang)
	if change != nil {
		change(m)
	}
	return m
}

// join makes a manager the systemd of a bus.
func (m *manager) join(t testing.TB, b *bus) {
	t.Helper()
	conn, err := dbus.Connect("unix:path=" + b.socket)
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	must(t, conn.Export(m, "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"))
	must(t, conn.Export(m, m.path, "org.freedesktop.DBus.Properties"))
	_, err = conn.RequestName("org.freedesktop.systemd1", dbus.NameFlagDoNotQueue)
	must(t, err)
}

func (m *manager) GetUnitByPID(uint32) (dbus.ObjectPath, *dbus.Error) {
	<-m.hang
	m.calls.Add(1)
	return m.path, m.fails
}

func (m *manager) GetAll(name string) (map[string]dbus.Variant, *dbus.Error) {
	<-m.hang
	m.calls.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	of, ok := m.properties[name]
	if !ok {
		return nil, dbus.NewError("org.freedesktop.DBus.Error.UnknownInterface", []any{"Unknown interface " + name})
	}
	out := make(map[string]dbus.Variant)
	for k, v := range of {
		out[k] = dbus.MakeVariant(v)
	}
	return out, nil
}

func (m *manager) set(name, property string, value any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if value == nil {
		delete(m.properties["org.freedesktop.systemd1."+name], property)
		return
	}
	m.properties["org.freedesktop.systemd1."+name][property] = value
}

func attestor(t testing.TB, socket string) *systemd.Attestor {
	t.Helper()
	a, err := systemd.New(systemd.Config{Bus: socket})
	must(t, err)
	return a
}

// attest has the tests' own process attested.
func attest(t testing.TB, a *systemd.Attestor) ([]string, error) {
	t.Helper()
	got, err := a.Attest(t.Context(), attestors.Process{PID: int32(os.Getpid())})
	return selector.NewSet(got...).Strings(), err
}

var wanted = []string{
	"systemd:fragment_path:/etc/systemd/system/web.service",
	"systemd:id:web.service",
	"systemd:invocation_id:0f0102030405060708090a0b0c0d0e0f",
	"systemd:slice:system.slice",
	"systemd:user:www-data",
}

func TestAProcessIsWhatItsUnitIs(t *testing.T) {
	b := newBus(t)
	newManager(t, nil).join(t, b)
	got, err := attest(t, attestor(t, b.socket))
	if err != nil || !slices.Equal(got, wanted) {
		t.Errorf("got %q, %v", got, err)
	}
}

// What is no service has no user, and may have no file.
func TestAScopeIsAUnitToo(t *testing.T) {
	b := newBus(t)
	m := newManager(t, func(m *manager) {
		m.set("Unit", "Id", "session-3.scope")
		m.set("Unit", "FragmentPath", "")
		m.properties["org.freedesktop.systemd1.Scope"] = map[string]any{"ControlGroup": own(t), "Slice": "user-1000.slice"}
	})
	m.join(t, b)
	got, err := attest(t, attestor(t, b.socket))
	want := []string{"systemd:id:session-3.scope", wanted[2], "systemd:slice:user-1000.slice"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestWhatTheManagerSaysIsChecked(t *testing.T) {
	long := strings.Repeat("x", 1<<16)
	for name, c := range map[string]struct {
		change func(*manager)
		want   string // of the error; empty: no selectors and no error
	}{
		"no unit": {func(m *manager) {
			m.fails = dbus.NewError("org.freedesktop.systemd1.NoUnitForPID", []any{"PID 1 does not belong to any loaded unit."})
		}, ""},
		"refused": {func(m *manager) {
			m.fails = dbus.NewError("org.freedesktop.DBus.Error.AccessDenied", []any{"Access denied"})
		}, "Access denied"},
		"an object that is no unit": {func(m *manager) { m.path = "/org/example/unit/web_2eservice" }, "which is no unit"},
		"a process of the same number in another PID namespace": {func(m *manager) { m.set("Service", "ControlGroup", "/system.slice/other.service") },
			"must share the PID and control group namespaces"},
		"a control group whose name only begins alike": {func(m *manager) { m.set("Service", "ControlGroup", strings.TrimSuffix(own(t), own(t)[len(own(t))-1:])) },
			"must share the PID and control group namespaces"},
		"a control group below that of the process": {func(m *manager) { m.set("Service", "ControlGroup", own(t)+"/below") },
			"must share the PID and control group namespaces"},
		"no control group":                 {func(m *manager) { m.set("Service", "ControlGroup", "") }, "must share the PID and control group namespaces"},
		"a control group that is left out": {func(m *manager) { m.set("Service", "ControlGroup", nil) }, "left out the property ControlGroup"},
		"a name that is left out":          {func(m *manager) { m.set("Unit", "Id", nil) }, "left out the property Id"},
		"a name that is a number":          {func(m *manager) { m.set("Unit", "Id", uint32(7)) }, "the property Id as"},
		"an invocation that is a text":     {func(m *manager) { m.set("Unit", "InvocationID", "0f01") }, "the property InvocationID as"},
		"a user that is a number":          {func(m *manager) { m.set("Service", "User", uint32(0)) }, "the property User as"},
		"a unit that has no processes":     {func(m *manager) { m.set("Unit", "Id", "basic.target") }, "which has no processes"},
		"a name without a kind":            {func(m *manager) { m.set("Unit", "Id", "web") }, "which has no processes"},
		"an empty name":                    {func(m *manager) { m.set("Unit", "Id", "") }, "which has no processes"},
		"a kind that it is not":            {func(m *manager) { m.set("Unit", "Id", "web.scope") }, "Unknown interface"},
		"names longer than any": {func(m *manager) {
			m.set("Unit", "Id", long+".service")
			m.set("Unit", "FragmentPath", long)
			m.set("Unit", "InvocationID", []byte(long))
			m.set("Service", "Slice", long)
			m.set("Service", "User", long)
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBus(t)
			newManager(t, c.change).join(t, b)
			got, err := attest(t, attestor(t, b.socket))
			if len(got) != 0 {
				t.Errorf("got %q", got)
			}
			switch {
			case c.want == "" && err != nil:
				t.Errorf("error is %v", err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("error is %v; want %q", err, c.want)
			}
		})
	}
}

func TestABusThatFailsIsExplained(t *testing.T) {
	t.Run("none", func(t *testing.T) {
		_, err := attest(t, attestor(t, filepath.Join(t.TempDir(), "bus")))
		wantError(t, err, "start dbus")
	})
	t.Run("nobody is systemd on it", func(t *testing.T) {
		_, err := attest(t, attestor(t, newBus(t).socket))
		wantError(t, err, "org.freedesktop.systemd1")
	})
	t.Run("it hangs up", func(t *testing.T) {
		_, err := attest(t, attestor(t, listen(t, func(c net.Conn) { c.Close() })))
		wantError(t, err, "log in to the bus")
	})
	t.Run("it talks nonsense", func(t *testing.T) {
		_, err := attest(t, attestor(t, listen(t, func(c net.Conn) { c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n")); c.Close() })))
		wantError(t, err, "log in to the bus")
	})
	t.Run("it says nothing", func(t *testing.T) {
		a := attestor(t, listen(t, func(c net.Conn) { t.Cleanup(func() { c.Close() }) }))
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := a.Attest(ctx, attestors.Process{PID: int32(os.Getpid())})
		wantError(t, err, "i/o timeout")
	})
	t.Run("systemd does not answer", func(t *testing.T) {
		b := newBus(t)
		m := newManager(t, func(m *manager) { m.hang = make(chan struct{}) })
		m.join(t, b)
		a := attestor(t, b.socket)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err := a.Attest(ctx, attestors.Process{PID: int32(os.Getpid())})
		wantError(t, err, context.DeadlineExceeded.Error())
		close(m.hang)
		if got, err := attest(t, a); err != nil || !slices.Equal(got, wanted) {
			t.Errorf("once it answers: %q, %v", got, err)
		}
	})
}

func TestABusThatIsRestartedIsFoundAgain(t *testing.T) {
	b := newBus(t)
	newManager(t, nil).join(t, b)
	a := attestor(t, b.socket)
	if _, err := attest(t, a); err != nil {
		t.Fatal(err)
	}
	b.daemon.Stop(t)
	if _, err := attest(t, a); err == nil {
		t.Error("attested without a bus")
	}
	b.start(t)
	newManager(t, nil).join(t, b)
	if got, err := attest(t, a); err != nil || !slices.Equal(got, wanted) {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestAProcessMayBeQuickerThanSystemd(t *testing.T) {
	b := newBus(t)
	a := attestor(t, b.socket)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if got, err := attest(t, a); err != nil || !slices.Equal(got, wanted) {
			t.Errorf("got %q, %v", got, err)
		}
	}()
	newManager(t, nil).join(t, b)
	<-done
}

func TestAProcessThatEndedHasNoUnit(t *testing.T) {
	b := newBus(t)
	newManager(t, nil).join(t, b)
	ended := harness.Command{Path: "/bin/true"}.Start(t)
	ended.Wait(t)
	got, err := attestor(t, b.socket).Attest(t.Context(), attestors.Process{PID: int32(ended.PID())})
	if err == nil || len(got) != 0 {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestManyMayAskAtOnce(t *testing.T) {
	b := newBus(t)
	newManager(t, nil).join(t, b)
	a := attestor(t, b.socket)
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			if got, err := attest(t, a); err != nil || !slices.Equal(got, wanted) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	all.Wait()
}

func TestABadSettingIsExplained(t *testing.T) {
	_, err := systemd.New(systemd.Config{Bus: "bus"})
	wantError(t, err, "give an absolute path, such as /run/dbus/system_bus_socket")
}

// listen serves something that is no bus.
func listen(t testing.TB, serve func(net.Conn)) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hallmark-bus-")
	must(t, err)
	socket = filepath.Join(dir, "bus")
	l, err := net.Listen("unix", socket)
	must(t, err)
	t.Cleanup(func() { l.Close(); os.RemoveAll(dir) })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			serve(c)
		}
	}()
	return socket
}

func wantError(t testing.TB, err error, says string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), says) {
		t.Errorf("error is %v; want %q", err, says)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// BenchmarkAttest asks a stand-in for systemd, over a real bus, which counts; and
// the systemd of a system that boots for it, in a unit of that.
func BenchmarkAttest(b *testing.B) {
	b.Run("stand-in", func(b *testing.B) {
		bus := newBus(b)
		m := newManager(b, nil)
		m.join(b, bus)
		a := attestor(b, bus.socket)
		harness.Attestations(b, func() int64 { return int64(m.calls.Load()) }, nil, func() error {
			_, err := attest(b, a)
			return err
		})
	})
	b.Run("real", func(b *testing.B) {
		dir, err := os.MkdirTemp("", "hallmark-unit-")
		must(b, err)
		b.Cleanup(func() { os.RemoveAll(dir) })
		program, err := os.ReadFile("/proc/self/exe")
		must(b, err)
		must(b, os.WriteFile(filepath.Join(dir, "test"), program, 0o755))
		harness.Systemd(b, map[string]string{"bench.service": fmt.Sprintf("[Service]\nType=oneshot\nEnvironment=SYSTEMD_TEST_ATTEST=%s/out\nExecStart=%[1]s/test\nStandardError=append:%[1]s/err\n", dir)},
			[]string{"bench.service"}, dir)
		var took []time.Duration
		harness.Eventually(b, "the unit", func(context.Context) error {
			text, err := os.ReadFile(filepath.Join(dir, "out"))
			if err != nil {
				said, _ := os.ReadFile(filepath.Join(dir, "err"))
				return fmt.Errorf("%w\n%s", err, said)
			}
			return json.Unmarshal(text, &took)
		})
		var total time.Duration
		for _, t := range took {
			total += t
		}
		harness.Latencies(b, took)
		b.ReportMetric(float64(len(took))/total.Seconds(), "attestations/s")
		b.ReportMetric(0, "ns/op") // it was measured inside
	})
}

// TestMain runs the tests, or attests itself, as a unit of a real systemd.
func TestMain(m *testing.M) {
	out := os.Getenv("SYSTEMD_TEST_ATTEST")
	if out == "" {
		os.Exit(m.Run())
	}
	if err := attestMyself(out); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func attestMyself(out string) error {
	a, err := systemd.New(systemd.Config{})
	if err != nil {
		return err
	}
	var took []time.Duration
	for range 3000 {
		began := time.Now()
		got, err := a.Attest(context.Background(), attestors.Process{PID: int32(os.Getpid())})
		if err != nil || !slices.Contains(selector.NewSet(got...).Strings(), "systemd:id:bench.service") {
			return fmt.Errorf("got %v, %w", got, err)
		}
		took = append(took, time.Since(began))
	}
	text, err := json.Marshal(took)
	if err != nil {
		return err
	}
	if err := os.WriteFile(out+".new", text, 0o644); err != nil {
		return err
	}
	return os.Rename(out+".new", out)
}
