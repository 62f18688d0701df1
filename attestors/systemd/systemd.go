// Package systemd attests a process by the unit of systemd that it runs in, as
// the system's manager says over D-Bus. Make an [Attestor] with [New].
//
// The selectors, of type "systemd", are named as SPIRE's are, where SPIRE has
// them:
//
//	id:nginx.service                             the unit's name
//	fragment_path:/lib/systemd/system/nginx.service  the file that describes it
//	slice:system.slice                           what it is part of
//	user:www-data                                the User= of its description
//	invocation_id:0f3c…                          this start of it: 32 hexadecimal digits
//
// What they are worth: who may make units of the system's manager, or start
// and stop them, is root or was given that by root's polkit. Programs that a
// user's own manager (systemd --user) runs are all of the one unit
// user@UID.service.
//
// The manager finds a process's unit by its control group. The attestor checks
// that it means the same process, by that group's path, since a number that
// the agent knows a process by may be another's to a manager in another PID
// namespace.
package systemd

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cgroup"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// Name is the attestor's name and the type of its selectors.
const Name = "systemd"

// Config is the configuration of the attestor. The zero value is the default.
type Config struct {
	// Bus is the path of the system bus's Unix socket. Default
	// /run/dbus/system_bus_socket.
	Bus string `yaml:"bus" env:"expand"`
}

const (
	defaultBus = "/run/dbus/system_bus_socket"

	askTime = 4 * time.Second // less than an attestation may take
	maxAsks = 32              // at once; the bus allows one client some hundreds
)

// Attestor is the workload half; there is no other.
type Attestor struct {
	manager manager
	asks    chan struct{}
}

var _ attestors.Workload = (*Attestor)(nil)

// New makes an attestor. It fails if Bus is not an absolute path. It does not
// connect: the bus may start later.
func New(c Config) (*Attestor, error) {
	if c.Bus == "" {
		c.Bus = defaultBus
	}
	if !filepath.IsAbs(c.Bus) {
		return nil, fmt.Errorf("bus of the systemd attestor is %q; give an absolute path, such as %s", c.Bus, defaultBus)
	}
	return &Attestor{manager: manager{socket: c.Bus}, asks: make(chan struct{}, maxAsks)}, nil
}

// Attest returns the selectors of the unit that a process is in: none if it is
// in none.
func (a *Attestor) Attest(ctx context.Context, p attestors.Process) ([]selector.Selector, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	select {
	case a.asks <- struct{}{}:
		defer func() { <-a.asks }()
	case <-ctx.Done():
		return nil, fmt.Errorf("ask systemd about process %d: too many questions are under way: %w", p.PID, ctx.Err())
	}
	u, err := a.manager.unitOf(ctx, p.PID)
	if errors.Is(err, errNoUnit) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask systemd about process %d: %w", p.PID, err)
	}
	groups, err := cgroup.Of(p.PID)
	if err != nil {
		return nil, fmt.Errorf("find the control group of process %d: %w", p.PID, err)
	}
	if path := pathOf(groups); !u.holds(path) {
		return nil, fmt.Errorf("systemd says that process %d is in %s, whose control group is %q, but it is in %q; "+
			"the agent must share the PID and control group namespaces of the systemd whose bus it asks", p.PID, u.id, u.controlGroup, path)
	}
	return u.selectors(), nil
}

// pathOf returns a process's group in the hierarchy that systemd keeps its units
// in: one of its own, or that of version 2.
func pathOf(g cgroup.Groups) string {
	if path, ok := g["name=systemd"]; ok {
		return path
	}
	return g[""]
}

// unit is what the manager says of one.
type unit struct {
	id           string
	fragmentPath string
	slice        string
	user         string
	invocation   []byte
	controlGroup string
}

// holds reports whether a group is the unit's, or below it.
func (u *unit) holds(path string) bool {
	return path != "" && (path == u.controlGroup || u.controlGroup != "" && strings.HasPrefix(path, u.controlGroup+"/"))
}

func (u *unit) selectors() []selector.Selector {
	out := make([]selector.Selector, 0, 5)
	add := func(kind, value string) {
		if value == "" {
			return
		}
		if s, err := selector.New(Name, kind+":"+value); err == nil { // it fails if longer than any registered one
			out = append(out, s)
		}
	}
	add("id", u.id)
	add("fragment_path", u.fragmentPath)
	add("slice", u.slice)
	add("user", u.user)
	add("invocation_id", hex.EncodeToString(u.invocation))
	return out
}
