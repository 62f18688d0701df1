// Package docker attests a process by the container it runs in, as the daemon
// that runs the container describes it: docker, or podman, which speaks the
// same API. Make an [Attestor] with [New] or [NewPodman].
//
// The selectors, of type "docker" or "podman", are named as SPIRE's are, where
// SPIRE has them:
//
//	label:com.example.app:web             each label
//	env:TIER=gold                         each variable of the configuration's env
//	image_id:example.com/shop/web:1.4     the image, as whoever ran the container named it
//	image_config_digest:sha256:1385ac…    the image itself
//	image_digest:example.com/shop/web@sha256:9c1f…  as each registry that it came from names it
//	container_name:web-1                  unique on its daemon
//	compose_project:shop                  of containers made by compose
//	compose_service:web
//	rootless_uid:1000                     podman only: whose rootless podman runs the container
//	image-signature:verified              and more, see package imagesig
//
// What they are worth: whoever may talk to the daemon chooses all of them but
// the digests, and is as good as root on the machine anyway. Of a rootless
// podman all of them are the word of its user, but rootless_uid.
//
// The process is tied to the container by its control groups; that a group with
// the container's ID is really the container's, and was not made by somebody
// with a part of the tree to manage, is certain because the container's first
// process, whose PID the daemon tells, is in that group too.
package docker

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/cgroup"
	"github.com/hallmark-id/hallmark/attestors/imagesig"
	"github.com/hallmark-id/hallmark/pkg/selector"
)

// The attestors' names and the types of their selectors.
const (
	Name       = "docker"
	PodmanName = "podman"
)

// Config is the configuration of the attestor for docker. The zero value is the
// default.
type Config struct {
	// Socket is the path of the daemon's Unix socket. Default
	// /var/run/docker.sock.
	Socket string `yaml:"socket" env:"expand"`
	// Env names the variables of a container's environment that become
	// selectors: no others, as environments hold passwords. Default: none.
	Env []string `yaml:"env"`
	// ImageSignatures has selectors made of who signed a container's image.
	// Default: they are not looked for.
	ImageSignatures *imagesig.Config `yaml:"image_signatures"`
}

// PodmanConfig is the configuration of the attestor for podman. The zero value
// is the default: containers of root.
type PodmanConfig struct {
	// Socket is the path of the Unix socket of root's podman ("podman system
	// service"). Default /run/podman/podman.sock.
	Socket string `yaml:"socket" env:"expand"`
	// Env names the variables of a container's environment that become
	// selectors. Default: none.
	Env []string `yaml:"env"`
	// RootlessUIDs are the users whose own podman is believed too, by
	// /run/user/UID/podman/podman.sock. Such a user can give any process any
	// selector but rootless_uid; let entries for its containers name that.
	// Default: none.
	RootlessUIDs []uint32 `yaml:"rootless_uids"`
	// ImageSignatures has selectors made of who signed the image of a container
	// of root. Default: they are not looked for.
	ImageSignatures *imagesig.Config `yaml:"image_signatures"`
}

const (
	defaultSocket       = "/var/run/docker.sock"
	defaultPodmanSocket = "/run/podman/podman.sock"

	maxEnv = 100 // names: more is a mistake in writing

	// knownFor is how long a container's description is believed: all of it but
	// the name is as it was when the container was made.
	knownFor = 5 * time.Second
	maxKnown = 4096 // containers

	// startTime is how long a container may be on its way from its first process
	// to the daemon saying that it runs.
	startTime  = time.Second
	startRetry = 20 * time.Millisecond
)

// Attestor is the workload half; there is no other.
type Attestor struct {
	name     string
	daemon   *daemon            // of root
	rootless map[uint32]*daemon // by user
	env      []string
	signed   *imagesig.Verifier // nil: nobody asks

	flights singleflight.Group
	mu      sync.Mutex
	known   map[string]*container // by ID
}

var _ attestors.Workload = (*Attestor)(nil)

// container is what is known of one for a while.
type container struct {
	until     time.Time
	group     cgroup.Container // that of its first process
	selectors []selector.Selector
	digests   []string // names of its image, by digest
}

// New makes an attestor for docker. It fails if a setting makes no sense.
func New(c Config) (*Attestor, error) {
	return newAttestor(Name, c.Socket, defaultSocket, c.Env, nil, c.ImageSignatures)
}

// NewPodman makes an attestor for podman. It fails if a setting makes no sense.
func NewPodman(c PodmanConfig) (*Attestor, error) {
	return newAttestor(PodmanName, c.Socket, defaultPodmanSocket, c.Env, c.RootlessUIDs, c.ImageSignatures)
}

func newAttestor(name, socket, otherwise string, env []string, rootless []uint32, signatures *imagesig.Config) (*Attestor, error) {
	if socket == "" {
		socket = otherwise
	}
	if !filepath.IsAbs(socket) {
		return nil, fmt.Errorf("socket of the %s attestor is %q; give an absolute path, such as %s", name, socket, otherwise)
	}
	if len(env) > maxEnv {
		return nil, fmt.Errorf("env of the %s attestor has %d names; the most is %d", name, len(env), maxEnv)
	}
	for _, e := range env {
		if e == "" || strings.ContainsAny(e, "=\x00") {
			return nil, fmt.Errorf("env of the %s attestor has %q, which is no name of a variable", name, e)
		}
	}
	a := &Attestor{
		name: name, env: env, known: make(map[string]*container),
		daemon:   newDaemon(socket, anyUser),
		rootless: make(map[uint32]*daemon),
	}
	if signatures != nil {
		v, err := imagesig.New(*signatures)
		if err != nil {
			return nil, fmt.Errorf("the %s attestor: %w", name, err)
		}
		a.signed = v
	}
	for _, uid := range rootless {
		if uid == 0 {
			return nil, fmt.Errorf("rootless_uids of the %s attestor has 0, which is root; its socket is the setting socket", name)
		}
		a.rootless[uid] = newDaemon(fmt.Sprintf("/run/user/%d/podman/podman.sock", uid), int64(uid))
	}
	return a, nil
}

// Attest returns the selectors of the container that a process is in: none if
// it is in no container, or in one that this daemon does not know.
func (a *Attestor) Attest(ctx context.Context, p attestors.Process) ([]selector.Selector, error) {
	groups, err := cgroup.Of(p.PID)
	if err != nil {
		return nil, fmt.Errorf("find the container of process %d: %w", p.PID, err)
	}
	in, ok, err := groups.Container()
	if err != nil {
		return nil, fmt.Errorf("find the container of process %d: %w", p.PID, err)
	}
	if !ok {
		return nil, nil
	}
	asked := a.daemon
	uid, ofUser := userOf(in.Path)
	if ofUser && a.name == PodmanName {
		if asked = a.rootless[uid]; asked == nil {
			return nil, nil
		}
	}
	c, err := a.describe(ctx, asked, in.ID)
	if err != nil || c == nil {
		return nil, err
	}
	if !c.group.Holds(groups) {
		return nil, fmt.Errorf("process %d is in the control group %s, which bears the ID of a container but is not its group, %s",
			p.PID, in.Path, c.group.Path)
	}
	selectors := slices.Clone(c.selectors) // others have the same
	if a.signed == nil || asked.user != anyUser {
		return selectors, nil
	}
	values, err := a.signed.Values(ctx, c.digests)
	return append(selectors, attestors.SelectorsOf(a.name, values)...), err
}

// userOf returns the user in whose part of systemd's tree a group is.
func userOf(path string) (uid uint32, ok bool) {
	rest, ok := strings.CutPrefix(path, "/user.slice/user-")
	if !ok {
		return 0, false
	}
	digits, _, ok := strings.Cut(rest, ".slice/")
	n, err := strconv.ParseUint(digits, 10, 32)
	return uint32(n), ok && err == nil
}

// describe returns what a daemon says of a container, nil if it has none of
// that ID. Concurrent callers share one question.
func (a *Attestor) describe(ctx context.Context, d *daemon, id string) (*container, error) {
	key := d.socket + " " + id
	now := time.Now()
	a.mu.Lock()
	c := a.known[key]
	a.mu.Unlock()
	if c != nil && now.Before(c.until) {
		return c, nil
	}
	// The question goes on for the others when the one who asked it first gives
	// up; the client bounds how long.
	answer := a.flights.DoChan(key, func() (any, error) { return a.ask(d, id) })
	select {
	case <-ctx.Done():
		return nil, fmt.Errorf("ask %s about container %s: %w", a.name, id, ctx.Err())
	case r := <-answer:
		if r.Err != nil {
			return nil, fmt.Errorf("ask %s about container %s: %w", a.name, id, r.Err)
		}
		c := r.Val.(*container)
		if c == nil {
			return nil, nil
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if len(a.known) >= maxKnown {
			clear(a.known)
		}
		a.known[key] = c
		return c, nil
	}
}

// ask asks a daemon about a container.
func (a *Attestor) ask(d *daemon, id string) (*container, error) {
	ctx, cancel := context.WithTimeout(context.Background(), askTime)
	defer cancel()
	asked := time.Now()
	for {
		info, err := d.container(ctx, id)
		if errors.Is(err, errNotFound) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if info.ID != id {
			return nil, fmt.Errorf("it answered about %q", info.ID)
		}
		if info.State.Running && info.State.PID > 0 {
			return a.learn(ctx, d, info)
		}
		// Its first process may be quicker than the daemon.
		if time.Since(asked) > startTime {
			return nil, errors.New("it says that the container does not run")
		}
		select {
		case <-time.After(startRetry):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (a *Attestor) learn(ctx context.Context, d *daemon, info *containerInfo) (*container, error) {
	groups, err := cgroup.Of(info.State.PID)
	if err != nil {
		return nil, fmt.Errorf("find the control group of its first process, %d: %w", info.State.PID, err)
	}
	group, ok, err := groups.Container()
	if err != nil {
		return nil, fmt.Errorf("find the control group of its first process, %d: %w", info.State.PID, err)
	}
	if !ok || group.ID != info.ID {
		return nil, fmt.Errorf("its first process, %d, is not in a control group of that ID", info.State.PID)
	}
	digests, err := d.imageDigests(ctx, info.Image)
	if err != nil && !errors.Is(err, errNotFound) { // the image may have been removed since
		return nil, err
	}
	return &container{until: time.Now().Add(knownFor), group: group, selectors: a.selectors(d, info, digests), digests: digests}, nil
}

// Labels that compose gives to what it makes.
const (
	composeProject = "com.docker.compose.project"
	composeService = "com.docker.compose.service"
)

func (a *Attestor) selectors(d *daemon, info *containerInfo, digests []string) []selector.Selector {
	var out []selector.Selector
	add := func(kind, value string) {
		if value == "" {
			return
		}
		if s, err := selector.New(a.name, kind+":"+value); err == nil { // it fails if longer than any registered one
			out = append(out, s)
		}
	}
	add("container_name", strings.TrimPrefix(info.Name, "/"))
	add("image_id", info.Config.Image)
	add("image_config_digest", withAlgorithm(info.Image))
	for _, digest := range digests {
		add("image_digest", digest)
	}
	for key, value := range info.Config.Labels {
		add("label", key+":"+value)
	}
	for _, variable := range info.Config.Env {
		if name, _, _ := strings.Cut(variable, "="); slices.Contains(a.env, name) {
			add("env", variable)
		}
	}
	add("compose_project", info.Config.Labels[composeProject])
	add("compose_service", info.Config.Labels[composeService])
	if d.user != anyUser {
		add("rootless_uid", strconv.FormatInt(d.user, 10))
	}
	return out
}

// withAlgorithm returns an image's ID with the algorithm before it, which some
// versions of podman leave out.
func withAlgorithm(id string) string {
	if id == "" || strings.Contains(id, ":") {
		return id
	}
	return "sha256:" + id
}
