package systemd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

// What is asked, and of whom. The bus gives that name to root alone.
const (
	busName       = "org.freedesktop.systemd1"
	managerPath   = dbus.ObjectPath("/org/freedesktop/systemd1")
	unitPaths     = "/org/freedesktop/systemd1/unit/"
	unitByPID     = "org.freedesktop.systemd1.Manager.GetUnitByPID"
	allProperties = "org.freedesktop.DBus.Properties.GetAll"
	unitInterface = "org.freedesktop.systemd1.Unit"
)

// errNoUnit says that a process is in no unit.
var errNoUnit = errors.New("the process is in no unit")

// manager is the system's systemd, on the other side of a bus. One connection
// serves all questions; one that broke is made anew by the next.
type manager struct {
	socket string

	mu   sync.Mutex
	conn *dbus.Conn
}

// While a machine boots, its programs can be quicker than systemd is on the bus.
const (
	startTime  = 2 * time.Second
	startRetry = 20 * time.Millisecond
)

// unitOf asks which unit a process is in, and what that is.
func (m *manager) unitOf(ctx context.Context, pid int32) (*unit, error) {
	for began := time.Now(); ; {
		u, err := m.askAbout(ctx, pid)
		if e := (dbus.Error{}); !errors.As(err, &e) || e.Name != "org.freedesktop.DBus.Error.NameHasNoOwner" || time.Since(began) > startTime {
			return u, err
		}
		select {
		case <-time.After(startRetry):
		case <-ctx.Done():
			return nil, err
		}
	}
}

func (m *manager) askAbout(ctx context.Context, pid int32) (*unit, error) {
	conn, reused, err := m.connect(ctx)
	if err != nil {
		return nil, err
	}
	u, err := ask(ctx, conn, pid)
	if err != nil && reused && !conn.Connected() { // the bus was restarted since
		if conn, _, err = m.connect(ctx); err != nil {
			return nil, err
		}
		u, err = ask(ctx, conn, pid)
	}
	return u, err
}

// connect returns the connection to the bus, and whether it was used before.
func (m *manager) connect(ctx context.Context) (conn *dbus.Conn, reused bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conn != nil && m.conn.Connected() {
		return m.conn, true, nil
	}
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, "unix", m.socket)
	if errors.Is(err, os.ErrNotExist) {
		return nil, false, fmt.Errorf("%w; start dbus, or take systemd out of workload_attestors", err)
	}
	if err != nil {
		return nil, false, err
	}
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	conn, err = dbus.NewConn(c)
	if err != nil {
		c.Close()
		return nil, false, err
	}
	if err = conn.Auth(nil); err == nil {
		err = conn.Hello()
	}
	if err != nil {
		conn.Close()
		return nil, false, fmt.Errorf("log in to the bus at %s: %w", m.socket, err)
	}
	c.SetDeadline(time.Time{})
	m.conn = conn
	return conn, false, nil
}

func ask(ctx context.Context, conn *dbus.Conn, pid int32) (*unit, error) {
	var path dbus.ObjectPath
	err := conn.Object(busName, managerPath).CallWithContext(ctx, unitByPID, dbus.FlagNoAutoStart, uint32(pid)).Store(&path)
	if e := (dbus.Error{}); errors.As(err, &e) && e.Name == "org.freedesktop.systemd1.NoUnitForPID" {
		return nil, errNoUnit
	}
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(string(path), unitPaths) {
		return nil, fmt.Errorf("it answered %q, which is no unit", path)
	}
	of := conn.Object(busName, path)
	p, err := propertiesOf(ctx, of, unitInterface)
	if err != nil {
		return nil, err
	}
	var u unit
	if err := errors.Join(get(p, "Id", &u.id), get(p, "FragmentPath", &u.fragmentPath), get(p, "InvocationID", &u.invocation)); err != nil {
		return nil, err
	}
	kind := kindOf(u.id)
	if kind == "" {
		return nil, fmt.Errorf("it answered with the unit %q, which has no processes", u.id)
	}
	if p, err = propertiesOf(ctx, of, "org.freedesktop.systemd1."+kind); err != nil {
		return nil, err
	}
	if err := errors.Join(get(p, "ControlGroup", &u.controlGroup), get(p, "Slice", &u.slice)); err != nil {
		return nil, err
	}
	if _, has := p["User"]; has { // services; scopes in later versions
		if err := get(p, "User", &u.user); err != nil {
			return nil, err
		}
	}
	return &u, nil
}

// kindOf returns the D-Bus interface of the units that have processes; empty
// for others.
func kindOf(id string) string {
	dot := strings.LastIndexByte(id, '.')
	switch id[dot+1:] {
	case "service":
		return "Service"
	case "scope":
		return "Scope"
	case "socket":
		return "Socket"
	case "mount":
		return "Mount"
	case "swap":
		return "Swap"
	case "slice":
		return "Slice"
	}
	return ""
}

// properties are those of one interface of an object.
type properties map[string]dbus.Variant

func propertiesOf(ctx context.Context, of dbus.BusObject, name string) (p properties, err error) {
	err = of.CallWithContext(ctx, allProperties, dbus.FlagNoAutoStart, name).Store(&p)
	return p, err
}

// get stores a property, which must be there and of that type: dbus itself would
// make a text of a number.
func get[T any](p properties, name string, into *T) error {
	v, ok := p[name]
	if !ok {
		return fmt.Errorf("it left out the property %s", name)
	}
	if *into, ok = v.Value().(T); !ok {
		return fmt.Errorf("it answered with the property %s as %T", name, v.Value())
	}
	return nil
}
