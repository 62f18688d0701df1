// Package plugin attests by external programs that were written for SPIRE with
// its plugin SDK (github.com/spiffe/spire-plugin-sdk): node attestors, on the
// agent ([Agent]) and on the server ([Server]), and workload attestors
// ([Workload]).
//
// A plugin is made from its [Config] by [NewAgent], [NewServer] or [NewWorkload],
// which start nothing, and lives while its Run does. The program is started
// after its checksum was verified, restarted with a growing delay when it ends
// or hangs, and killed at the end. What it answers is bounded and checked: it
// speaks for its own name alone.
package plugin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// times bounds a plugin in time.
type times struct {
	start        time.Duration // from its start until it is configured
	stop         time.Duration // for it to end when it is told to
	step         time.Duration // for one answer in the attestation of a node
	call         time.Duration // for the attestation of a process
	firstDelay   time.Duration // before it is started again; doubled each time
	longestDelay time.Duration
	steady       time.Duration // what ran so long is started again after firstDelay
}

var usualTimes = times{
	start: 20 * time.Second, stop: 3 * time.Second,
	step: 20 * time.Second, call: 2 * time.Second,
	firstDelay: time.Second, longestDelay: time.Minute, steady: time.Minute,
}

// maxHung is how many answers in a row may fail to come before a plugin is
// started again.
const maxHung = 3

// Bounds of what a plugin may say and be told.
const (
	maxMessage    = 4 << 20  // bytes of one message of gRPC; SPIRE's bound
	maxPayload    = 64 << 10 // bytes of a proof, a challenge, a response; attestors.Server
	maxChallenges = 10       // attestors.Server
	maxSelectors  = 1000     // of one attestation
	maxData       = 1 << 20  // bytes of its configuration
	maxArgs       = 100
	maxPlugins    = 16 // of one kind
)

// Config is how an external program is run. Its name is the key that it stands
// under: the type of its selectors, and what the IDs of agents begin with.
type Config struct {
	// Command is the absolute path of the program. It is no script, belongs to
	// root or to the user that Hallmark runs as, and nobody else may write to it.
	Command string `yaml:"command"`
	// Args are its arguments, at most 100. Default: none.
	Args []string `yaml:"args"`
	// Checksum is the SHA-256 of the program in hexadecimal, as sha256sum prints
	// it. It is verified at each start. It is required unless
	// insecure_no_checksum is set.
	Checksum string `yaml:"checksum"`
	// InsecureNoChecksum runs the program whatever is in it: for trials only.
	InsecureNoChecksum bool `yaml:"insecure_no_checksum"`
	// Env names the variables of the environment that the program gets, beside
	// those that the protocol needs. Default: none.
	Env []string `yaml:"env"`
	// Data is the configuration that the program is given: its plugin_data of
	// SPIRE, the text of HCL inside of the braces. At most 1 MiB. Default: none.
	Data string `yaml:"data"`
}

var (
	nameForm     = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$`)
	variableForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,127}$`)
)

// builtIn are the names that no plugin may take.
var builtIn = []string{
	"join_token", "x509pop", "sshpop", "tpm_ek", "tpm_devid", "k8s_psat",
	"aws_iid", "azure_imds", "azure_msi", "gcp_iit", "oidc", "http_challenge",
	"unix", "docker", "podman", "systemd", "k8s",
}

// Check finds out whether a plugin can have a name and a configuration. It does
// not look at the program.
func (c Config) Check(name string) error {
	sum, err := hex.DecodeString(c.Checksum)
	switch {
	case !nameForm.MatchString(name):
		return fmt.Errorf("plugin name %q; write at most 64 letters, digits, - and _, the first a letter or a digit", name)
	case slices.Contains(builtIn, name):
		return fmt.Errorf("%s is the name of a built-in attestor; give the plugin another one", name)
	case c.Command == "":
		return errors.New("command is missing; set it to the absolute path of the program")
	case !filepath.IsAbs(c.Command):
		return fmt.Errorf("command %q is no absolute path; write one", c.Command)
	case c.Checksum == "" && !c.InsecureNoChecksum:
		return errors.New("checksum is missing; set it to what \"sha256sum\" prints of the program")
	case c.Checksum != "" && c.InsecureNoChecksum:
		return errors.New("checksum and insecure_no_checksum exclude each other; remove one of the two")
	case c.Checksum != "" && (err != nil || len(sum) != sha256.Size):
		return errors.New("checksum is no SHA-256 in hexadecimal; set it to what \"sha256sum\" prints of the program")
	case len(c.Args) > maxArgs:
		return fmt.Errorf("args has %d; the most is %d", len(c.Args), maxArgs)
	case len(c.Data) > maxData:
		return fmt.Errorf("data is %d bytes long; the most is %d", len(c.Data), maxData)
	}
	for _, v := range c.Env {
		if !variableForm.MatchString(v) {
			return fmt.Errorf("env %q is no name of a variable; write the name alone, its value is that of Hallmark's own environment", v)
		}
	}
	return nil
}

// CheckAll checks the plugins of one kind, by name.
func CheckAll(all map[string]Config) error {
	if len(all) > maxPlugins {
		return fmt.Errorf("there are %d plugins; the most is %d", len(all), maxPlugins)
	}
	return nil
}

// kind of plugin: what SPIRE calls it, and the service that it must have.
type kind struct{ name, service string }

// supervisor keeps a program running.
type supervisor struct {
	name   string
	kind   kind
	config Config
	td     spiffeid.TrustDomain
	agents func(spiffeid.ID) bool // whether there is such an agent; nil: it cannot be asked
	times  times

	mu      sync.Mutex
	live    *instance     // nil: it does not serve
	why     error         // why not; nil before the first start has ended
	changed chan struct{} // closed when live or why is set for the first time
}

func newSupervisor(name string, k kind, c Config, td spiffeid.TrustDomain) (*supervisor, error) {
	if err := c.Check(name); err != nil {
		return nil, err
	}
	return &supervisor{name: name, kind: k, config: c, td: td, times: usualTimes, changed: make(chan struct{})}, nil
}

// Run runs the program until the context ends, whatever happens to it.
func (s *supervisor) Run(ctx context.Context, log *slog.Logger) {
	log = log.With("plugin", s.name, "kind", s.kind.name)
	if s.config.InsecureNoChecksum {
		log.Warn("plugin runs without a checksum; whoever can change its program has the rights of this one", "command", s.config.Command)
	}
	delay := s.times.firstDelay
	for {
		began := time.Now()
		err := s.serve(ctx, log)
		if ctx.Err() != nil {
			s.set(nil, errors.New("plugin has been stopped"))
			return
		}
		s.set(nil, err)
		if time.Since(began) > s.times.steady {
			delay = s.times.firstDelay
		}
		log.Error("plugin does not serve; it is started again", "error", err, "in", delay)
		select {
		case <-ctx.Done():
		case <-time.After(delay):
		}
		delay = min(2*delay, s.times.longestDelay)
	}
}

func (s *supervisor) set(live *instance, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live == nil && s.why == nil {
		defer close(s.changed)
	}
	s.live, s.why = live, why
}

// get returns what serves. Only the very first start is waited for.
func (s *supervisor) get(ctx context.Context) (*instance, error) {
	select {
	case <-s.changed:
	case <-ctx.Done():
		return nil, fmt.Errorf("plugin %s has not started yet: %w", s.name, context.Cause(ctx))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.live == nil {
		return nil, fmt.Errorf("plugin %s does not serve: %w", s.name, s.why)
	}
	return s.live, nil
}
